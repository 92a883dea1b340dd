"""93.9 % after a hundred epochs, and why: the case of the chapter "A fully connected network"."""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from statistics import mean

import torch
from torch import nn
from torch.optim import SGD, Adam

from dianlib.data import Batches, ImageData, digits, fashion_mnist, mnist
from dianlib.metrics import evaluate, wilson_interval
from dianlib.mlp import MLP
from dianlib.reproduce.tables import write_csv
from dianlib.training import History, fit, seed_everything

DATASETS: dict[str, Callable[[], ImageData]] = {
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "digits": digits,
}


def with_sgd(images: ImageData, model: nn.Module, epochs: int, lr: float) -> History:
    """Train as a learner's log tells it, but for the step: SGD, all images, always in one order.

    The test images are watched from epoch to epoch, to draw the curve. Nothing is chosen by them.
    """
    train_images = torch.cat([images.train_images, images.validation_images])
    train_labels = torch.cat([images.train_labels, images.validation_labels])
    return fit(
        model,
        Batches(train_images, train_labels, batch_size=64),
        Batches(images.test_images, images.test_labels, batch_size=1000),
        epochs=epochs,
        optimizer=SGD(model.parameters(), lr=lr),
    )


def as_logged(images: ImageData, model: nn.Module, epochs: int) -> History:
    """Train with the log's learning rate, 0.001."""
    return with_sgd(images, model, epochs, lr=1e-3)


def with_larger_steps(images: ImageData, model: nn.Module, epochs: int) -> History:
    """Train with a hundred times the log's learning rate, for a tenth of the epochs; nothing else differs."""
    return with_sgd(images, model, -(-epochs // 10), lr=0.1)


def with_adam(images: ImageData, model: nn.Module, epochs: int) -> History:
    """Train with Adam in a fresh order each epoch, until 5 epochs bring no lower validation loss."""
    return fit(
        model,
        Batches(images.train_images, images.train_labels, batch_size=64, shuffle=True),
        Batches(images.validation_images, images.validation_labels, batch_size=1000),
        epochs=epochs,
        optimizer=Adam(model.parameters(), lr=1e-3, fused=True),
        patience=5,
    )


RECIPES = {
    "SGD 0.001, as logged": as_logged,
    "SGD 0.1, a tenth of the epochs": with_larger_steps,
    "Adam 0.001, early stop": with_adam,
}


@dataclass(frozen=True)
class Result:
    """One trained network, measured on the test images; low and high are Wilson's 95 % interval."""

    dataset: str
    recipe: str
    seed: int
    epochs: int
    accuracy: float
    low: float
    high: float
    precision: float
    recall: float
    f1: float
    seconds: float


def reproduce_mlp(
    dataset: str = "mnist", *, epochs: int = 100, seeds: int = 3, output: Path = Path("reproduced")
) -> list[Result]:
    """Train the network of the chapter's case by the log's recipe and by two of ours, and print a table.

    All recipes train the same network (hidden layers of 128 and 256) from the seeds
    0 .. ``seeds`` - 1 for at most ``epochs`` epochs; an epoch of MNIST takes about a second. The
    folder ``output`` gets mlp-<dataset>.md and .csv with the table and mlp-<dataset>-curves.csv
    with every epoch. Raises ValueError for an unknown data set or a count below 1, and
    dianlib.data.DataError when the data set is not on this machine.
    """
    if dataset not in DATASETS:
        raise ValueError(f"there is no data set {dataset!r}; choose one of {', '.join(DATASETS)}.")
    if epochs < 1 or seeds < 1:
        raise ValueError(f"epochs and seeds must be at least 1, not {epochs} and {seeds}.")
    images = DATASETS[dataset]()
    output.mkdir(
        parents=True, exist_ok=True
    )  # a folder that cannot be made is better known now than at the end
    results: list[Result] = []
    curves: list[tuple[object, ...]] = []
    for recipe, train in RECIPES.items():
        for seed in range(seeds):
            seed_everything(seed)
            model = MLP([images.train_images[0].numel(), 128, 256, len(images.classes)])
            started = time.perf_counter()
            history = train(images, model, epochs)
            seconds = time.perf_counter() - started
            results.append(_measure(images, model, recipe, seed, history, seconds))
            per_epoch = zip(
                history.train_loss, history.validation_loss, history.validation_accuracy, strict=True
            )
            curves += [(recipe, seed, epoch, *numbers) for epoch, numbers in enumerate(per_epoch, start=1)]
    table = markdown_table(results)
    print(table)
    (output / f"mlp-{dataset}.md").write_text(table + "\n", encoding="utf-8")
    write_csv(output / f"mlp-{dataset}.csv", [field.name for field in fields(Result)], map(astuple, results))
    # "Watched" are the test images with SGD and the validation images with Adam.
    columns = ["recipe", "seed", "epoch", "train_loss", "watched_loss", "watched_accuracy"]
    write_csv(output / f"mlp-{dataset}-curves.csv", columns, curves)
    return results


def _measure(
    images: ImageData, model: nn.Module, recipe: str, seed: int, history: History, seconds: float
) -> Result:
    n_test = len(images.test_labels)
    scores = evaluate(
        model, Batches(images.test_images, images.test_labels, batch_size=1000), len(images.classes)
    )
    low, high = wilson_interval(round(scores["accuracy"] * n_test), n_test)
    return Result(
        dataset=images.name,
        recipe=recipe,
        seed=seed,
        epochs=len(history.train_loss),
        low=low,
        high=high,
        seconds=seconds,
        **scores,
    )


def markdown_table(results: Sequence[Result]) -> str:
    """Return a Markdown table: one line for each result, and the mean over the seeds of each recipe.

    Precision, recall and F1 are macro averages.
    """
    lines = [
        "| recipe | seed | epochs | accuracy | 95 % interval | precision | recall | F1 | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for recipe in dict.fromkeys(result.recipe for result in results):
        runs = [result for result in results if result.recipe == recipe]
        lines += [_line(f"{run.seed}", f"{run.low:.4f} to {run.high:.4f}", [run]) for run in runs]
        lines.append(_line("mean", "", runs))
    return "\n".join(lines)


def _line(seed: str, interval: str, runs: Sequence[Result]) -> str:
    epochs, accuracy, precision, recall, f1, seconds = (
        mean(getattr(run, name) for run in runs)
        for name in ("epochs", "accuracy", "precision", "recall", "f1", "seconds")
    )
    return (
        f"| {runs[0].recipe} | {seed} | {epochs:.0f} | {accuracy:.4f} | {interval} "
        f"| {precision:.4f} | {recall:.4f} | {f1:.4f} | {seconds:.1f} |"
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what `dianlib reproduce mlp` can be told."""
    parser.add_argument(
        "--dataset", choices=DATASETS, default="mnist", help="images to train on (default: mnist)"
    )
    parser.add_argument("--epochs", type=int, default=100, help="epochs at most (default: 100)")
    parser.add_argument("--seeds", type=int, default=3, help="networks for each recipe (default: 3)")


def run(options: argparse.Namespace) -> None:
    """Carry out `dianlib reproduce mlp`."""
    reproduce_mlp(options.dataset, epochs=options.epochs, seeds=options.seeds, output=options.output)
