"""Six depths, ten trials, one test set: the case of the chapter "Choosing a network", done honestly."""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from dianlib.data import Batches, ImageData, digits, fashion_mnist, mnist
from dianlib.metrics import wilson_interval
from dianlib.mlp import MLP
from dianlib.reproduce.tables import write_csv
from dianlib.search import n_parameters, search_space, set_of_depths
from dianlib.training import is_watched

DATASETS: dict[str, Callable[[], ImageData]] = {
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "digits": digits,
}
PARTS = ("search", "depths", "batches")
Report = Callable[[int, float], None]


@dataclass(frozen=True)
class Result:
    """One trained network. Validation accuracy chose it; the test images were asked once, if at all.

    ``seconds`` is the time of its training.
    """

    part: str
    name: str
    seed: int
    epochs: int
    validation: float
    test: float | None
    seconds: float


def train(
    images: ImageData,
    hidden: Sequence[int],
    *,
    lr: float,
    batch_size: int,
    epochs: int,
    seed: int,
    shift: int = 0,
    plain: bool = False,
    report: Report | None = None,
) -> nn.Module:
    """Train a fully connected network and return it.

    Adam follows one cycle: its rate rises to ``lr`` in the first fifth of all steps and falls to nearly 0
    (Smith and Topin 2017, arXiv:1708.07120); with ``plain`` it is SGD at one constant rate. With
    ``shift`` each batch is moved by up to that many pixels in each direction. ``report`` gets the number of
    each epoch and the validation accuracy after it.
    """
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = MLP([images.train_images[0].numel(), *hidden, len(images.classes)])
    batches = Batches(
        images.train_images,
        images.train_labels,
        batch_size=batch_size,
        shuffle=True,
        generator=order,
    )
    optimizer: torch.optim.Optimizer
    schedule = None
    if plain:
        optimizer = SGD(model.parameters(), lr=lr)
    else:
        optimizer = Adam(model.parameters(), lr=lr, fused=True)
        schedule = OneCycleLR(optimizer, lr, total_steps=epochs * len(batches), pct_start=0.2)
    for epoch in range(epochs):
        model.train()
        for inputs, targets in batches:
            if shift:
                down, right = torch.randint(-shift, shift + 1, (2,), generator=order).tolist()
                inputs = inputs.roll((down, right), dims=(1, 2))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
        if report is not None:
            report(epoch, accuracy(model, images.validation_images, images.validation_labels))
    return model


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of right answers: all of them counted, divided once."""
    model.eval()
    right = sum(
        int((model(inputs).argmax(dim=1) == targets).sum())
        for inputs, targets in Batches(images, labels, batch_size=1000)
    )
    return right / len(labels)


def _trained(
    images: ImageData, part: str, name: str, seed: int, epochs: int, **settings: Any
) -> tuple[Result, nn.Module]:
    """Train one network and measure it on the validation images."""
    started = time.perf_counter()
    model = train(images, seed=seed, epochs=epochs, **settings)
    seconds = time.perf_counter() - started
    validation = accuracy(model, images.validation_images, images.validation_labels)
    return Result(part, name, seed, epochs, validation, None, seconds), model


def _tested(images: ImageData, result: Result, model: nn.Module) -> Result:
    """Ask the test images: for a network that was chosen, and once."""
    return replace(result, test=accuracy(model, images.test_images, images.test_labels))


# ----- part 1: search, choose, test once ------------------------------------------------------------------


def run_study(images: ImageData, trials: int, epochs: int, journal: Path | None) -> optuna.Study:
    """Let TPE try ``trials`` settings; those that fall below the median of the others stop early.

    With ``journal`` the study is kept in that file: a second process, or a second call, goes on with it.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = None
    if journal is not None:
        storage = JournalStorage(JournalFileBackend(str(journal)))
    study = optuna.create_study(
        direction="maximize",
        study_name="search",
        storage=storage,
        load_if_exists=True,
        # Two processes with one seed would try the same settings.
        sampler=optuna.samplers.TPESampler(seed=0 if journal is None else None, n_startup_trials=8),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5),
    )

    def objective(trial: optuna.Trial) -> float:
        settings = search_space(trial)

        def report(epoch: int, reached: float) -> None:
            trial.report(reached, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

        model = train(images, epochs=epochs, seed=trial.number, shift=1, report=report, **settings)
        return accuracy(model, images.validation_images, images.validation_labels)

    done = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    with tqdm(total=trials, unit="trial", leave=False, disable=not is_watched()) as bar:

        def show(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            bar.update(len(study.get_trials(deepcopy=False, states=done)) - bar.n)

        study.optimize(objective, callbacks=[show, optuna.study.MaxTrialsCallback(trials, states=done)])
    return study


def search_and_test(
    images: ImageData, *, trials: int, epochs: int, final_epochs: int, seeds: int, journal: Path | None
) -> tuple[list[Result], str]:
    """Search with short trainings, train the winner for longer, and test it once.

    The results are a network for each seed, with and without shifted images, and some words on the study.
    """
    started, computing = time.perf_counter(), time.process_time()
    study = run_study(images, trials, epochs, journal)
    searched = time.perf_counter() - started
    settings = search_space(optuna.trial.FixedTrial(study.best_params))
    pruned = sum(trial.state is optuna.trial.TrialState.PRUNED for trial in study.trials)
    about = (
        f"{len(study.trials)} trials, {pruned} of them stopped early, in {searched:.0f} seconds. "
        f"The best: hidden layers {settings['hidden']}, learning rate {settings['lr']:.2g}, "
        f"batches of {settings['batch_size']}, validation accuracy {study.best_value:.4f}."
    )

    def final(name: str, seed: int, shift: int, lr: float) -> tuple[Result, nn.Module]:
        with_rate = {**settings, "lr": lr, "shift": shift}
        return _trained(images, "search", name, seed, final_epochs, **with_rate)

    # A short training likes a higher rate than a long one: the validation images decide between two.
    name = "chosen, images shifted"
    rates = (settings["lr"], settings["lr"] / 4)
    first = {lr: final(name, 0, 1, lr) for lr in rates}
    lr = max(rates, key=lambda rate: first[rate][0].validation)
    about += (
        f" Trained for {final_epochs} epochs with this rate and with a quarter of it, it reaches "
        f"{first[rates[0]][0].validation:.4f} and {first[rates[1]][0].validation:.4f}. "
        f"Until the first network below: {time.perf_counter() - started:.0f} seconds, "
        f"with {time.process_time() - computing:.0f} seconds of processor time."
    )
    chosen = [first[lr], *(final(name, seed, 1, lr) for seed in range(1, seeds))]
    unshifted = [final("the same without shifts", seed, 0, lr) for seed in range(seeds)]
    return [_tested(images, *trained) for trained in chosen + unshifted], about


# ----- part 2: depth, and nothing else --------------------------------------------------------------------


def compare_depths(images: ImageData, *, epochs: int, seeds: int) -> list[Result]:
    """Train one to six hidden layers, each with about as many parameters as 784-128-256-10.

    Each depth may choose between two learning rates, by its mean validation accuracy; only networks of the
    better rate are tested.
    """
    n_in, n_out = images.train_images[0].numel(), len(images.classes)
    budget = n_parameters([n_in, 128, 256, n_out])
    networks = set_of_depths(range(1, 7), budget, n_in, n_out)
    results = []
    for sizes in tqdm(networks, unit="depth", leave=False, disable=not is_watched()):
        by_rate = {}
        for lr in (1e-3, 3e-3):
            name = f"{len(sizes) - 2} x {sizes[1]}, rate {lr:g}"
            settings = {"hidden": sizes[1:-1], "lr": lr, "batch_size": 128}
            by_rate[lr] = [
                _trained(images, "depths", name, seed, epochs, **settings) for seed in range(seeds)
            ]
        best = max(by_rate.values(), key=lambda runs: mean(result.validation for result, _ in runs))
        results += [_tested(images, *trained) for trained in best]
    return results


# ----- part 3: batches of 64 and of 640 -------------------------------------------------------------------


def compare_batches(images: ImageData, *, epochs: int, seeds: int) -> list[Result]:
    """Train 784-128-256-10 by SGD, in batches of 64 and 640: equal epochs, updates, or a tuned rate."""
    n_small, n_large = (-(-len(images.train_labels) // size) for size in (64, 640))
    runs = [
        ("64, rate 0.1", 64, 0.1, epochs),
        ("640, rate 0.1, equal epochs", 640, 0.1, epochs),
        ("640, rate 0.1, equal updates", 640, 0.1, round(epochs * n_small / n_large)),
        ("640, rate 0.3, equal epochs", 640, 0.3, epochs),
        ("640, rate 0.5, equal epochs", 640, 0.5, epochs),
        ("640, rate 1, equal epochs", 640, 1.0, epochs),
    ]
    results = []
    for name, batch_size, lr, n_epochs in tqdm(runs, unit="recipe", leave=False, disable=not is_watched()):
        for seed in range(seeds):
            settings = {"hidden": [128, 256], "lr": lr, "batch_size": batch_size, "plain": True}
            results.append(_trained(images, "batches", name, seed, n_epochs, **settings)[0])
    return results


# ----- all together ---------------------------------------------------------------------------------------


def reproduce_search(
    dataset: str = "mnist",
    *,
    parts: Sequence[str] = PARTS,
    trials: int = 16,
    epochs: int = 3,
    final_epochs: int = 10,
    seeds: int = 3,
    journal: Path | None = None,
    output: Path = Path("reproduced"),
) -> list[Result]:
    """Run the parts of the chapter's study, print a table for each, and write them down.

    ``epochs`` is the length of a trial and of every run in the two comparisons, ``final_epochs`` that of the
    network that the search chose. The folder ``output`` gets search-<dataset>.md and .csv. Raises ValueError
    for an unknown data set or part or a count below 1, and dianlib.data.DataError when the data set is not
    on this machine.
    """
    if dataset not in DATASETS:
        raise ValueError(f"there is no data set {dataset!r}; choose one of {', '.join(DATASETS)}.")
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"there is no part {min(unknown)!r}; choose from {', '.join(PARTS)}.")
    if min(trials, epochs, final_epochs, seeds) < 1:
        raise ValueError("trials, epochs, final epochs and seeds must be at least 1.")
    images = DATASETS[dataset]()
    output.mkdir(parents=True, exist_ok=True)
    # Adam's averages fade into numbers so small that the processor becomes slow; they are as good as 0.
    torch.set_flush_denormal(True)
    results: list[Result] = []
    texts: list[str] = []
    for part in parts:
        about = ""
        if part == "search":
            found, about = search_and_test(
                images, trials=trials, epochs=epochs, final_epochs=final_epochs, seeds=seeds, journal=journal
            )
        elif part == "depths":
            found = compare_depths(images, epochs=epochs, seeds=seeds)
        else:
            found = compare_batches(images, epochs=epochs, seeds=seeds)
        text = f"{about}\n\n{markdown_table(found, len(images.test_labels))}".strip()
        print(text, end="\n\n", flush=True)
        results += found
        texts.append(text)
    (output / f"search-{dataset}.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    columns = [field.name for field in fields(Result)]
    write_csv(output / f"search-{dataset}.csv", columns, map(astuple, results))
    return results


def markdown_table(results: Sequence[Result], n_test: int) -> str:
    """Return a Markdown table with one line for each name: mean and standard deviation over its seeds.

    The last column but one is Wilson's 95 % interval for the test accuracy of the first seed.
    """
    lines = [
        "| network | seeds | epochs | validation | test | 95 % interval, seed 0 | seconds each |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(result.name for result in results):
        runs = [result for result in results if result.name == name]
        tests = [run.test for run in runs if run.test is not None]
        interval = (
            "{:.4f} to {:.4f}".format(*wilson_interval(round(tests[0] * n_test), n_test)) if tests else ""
        )
        cells = [
            name,
            f"{len(runs)}",
            f"{runs[0].epochs}",
            _spread([run.validation for run in runs]),
            _spread(tests) if tests else "",
            interval,
            f"{mean(run.seconds for run in runs):.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what `dianlib reproduce search` can be told."""
    parser.add_argument(
        "--dataset", choices=DATASETS, default="mnist", help="images to train on (default: mnist)"
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be given again")
    parser.add_argument("--trials", type=int, default=16, help="trials of the search (default: 16)")
    parser.add_argument(
        "--epochs", type=int, default=3, help="epochs of a trial and a comparison (default: 3)"
    )
    parser.add_argument(
        "--final-epochs", type=int, default=10, help="epochs of the chosen network (default: 10)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="networks for each row (default: 3)")
    parser.add_argument(
        "--journal", type=Path, help="file of the study; processes that name the same file share the work"
    )


def run(options: argparse.Namespace) -> None:
    """Carry out `dianlib reproduce search`."""
    reproduce_search(
        options.dataset,
        parts=options.part or PARTS,
        trials=options.trials,
        epochs=options.epochs,
        final_epochs=options.final_epochs,
        seeds=options.seeds,
        journal=options.journal,
        output=options.output,
    )
