"""How far recurrent networks remember: the case of the chapter "Long short-term memory"."""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from statistics import mean

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dianlib.data import recall_task
from dianlib.lstm import open_forget_gates, remember_for
from dianlib.reproduce.tables import write_csv
from dianlib.training import seed_everything

HIDDEN_SIZE, N_SYMBOLS, BATCH_SIZE, LEARNING_RATE = 32, 8, 32, 0.01
N_TEST = 2000
# Training stops early when this many batches in a row had no error.
SOLVED = 10


def _lstm(prepare: Callable[[nn.Module, int], None]) -> Callable[[int], nn.Module]:
    def build(distance: int) -> nn.Module:
        layer = nn.LSTM(N_SYMBOLS + 1, HIDDEN_SIZE, batch_first=True)
        prepare(layer, distance)
        return layer

    return build


# Each network by the name it has in the table: a function of the distance.
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "RNN": lambda distance: nn.RNN(N_SYMBOLS + 1, HIDDEN_SIZE, batch_first=True),
    "GRU": lambda distance: nn.GRU(N_SYMBOLS + 1, HIDDEN_SIZE, batch_first=True),
    "LSTM": _lstm(lambda layer, distance: None),
    "LSTM, forget bias 1": _lstm(lambda layer, distance: open_forget_gates(layer, 1.0)),
    "LSTM, forget bias log T": _lstm(lambda layer, distance: open_forget_gates(layer, math.log(distance))),
    "LSTM, set for the distance": _lstm(remember_for),
}


@dataclass(frozen=True)
class Row:
    """One trained network; the field names are the columns of the table."""

    network: str
    distance: int
    seed: int
    steps: int
    accuracy: float  # on fresh sequences
    seconds: float


def measure(name: str, distance: int, seed: int, steps: int) -> Row:
    """Train one network on fresh sequences in every step and test it on others."""
    started = time.process_time()
    seed_everything(seed)
    layer, output = NETWORKS[name](distance), nn.Linear(HIDDEN_SIZE, N_SYMBOLS)
    parameters = [*layer.parameters(), *output.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    flawless = step = 0
    while step < steps and flawless < SOLVED:
        inputs, targets = recall_task(BATCH_SIZE, distance, N_SYMBOLS, generator=generator)
        logits = output(layer(inputs)[0][:, -1])
        optimizer.zero_grad()
        cross_entropy(logits, targets).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        flawless = flawless + 1 if bool((logits.argmax(dim=1) == targets).all()) else 0
        step += 1
    with torch.no_grad():
        inputs, targets = recall_task(N_TEST, distance, N_SYMBOLS, generator=generator)
        hits = output(layer(inputs)[0][:, -1]).argmax(dim=1) == targets
    accuracy = hits.double().mean().item()
    return Row(name, distance, seed, step, round(accuracy, 4), round(time.process_time() - started, 1))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this experiment to its command."""
    parser.add_argument(
        "--distances",
        type=int,
        nargs="+",
        default=[10, 20, 50, 100, 200],
        help="steps between the symbol and the question (default: 10 20 50 100 200)",
    )
    parser.add_argument("--steps", type=int, default=1000, help="most steps of training (default: 1000)")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds to run (default: 3)")


def run(options: argparse.Namespace) -> None:
    """Measure every network at every distance, print the ranges and write all rows to a table."""
    if min(*options.distances, options.steps, options.seeds) < 1:
        raise ValueError("distances, steps and seeds must be at least 1.")
    options.output.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the steps are too short to share
    try:
        rows = []
        for name in NETWORKS:
            for distance in options.distances:
                found = [measure(name, distance, seed, options.steps) for seed in range(options.seeds)]
                rows += found
                low, high = (extreme(row.accuracy for row in found) for extreme in (min, max))
                mean_steps = mean(row.steps for row in found)
                seconds = sum(row.seconds for row in found)
                print(
                    f"{name:27} distance {distance:4}: {low:.1%} to {high:.1%}, "
                    f"{mean_steps:.0f} steps, {seconds:.0f} s",
                    flush=True,
                )
    finally:
        torch.set_num_threads(threads)
    write_csv(Path(options.output) / "recall.csv", [field.name for field in fields(Row)], map(astuple, rows))
