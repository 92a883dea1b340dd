"""Recurrent networks on Fashion-MNIST: what logs report, what their networks are, and a collapse."""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam
from tqdm import tqdm

from dianlib.data import Batches, ImageData, digits, fashion_mnist, mnist
from dianlib.metrics import confusion_matrix, wilson_interval
from dianlib.mlp import MLP
from dianlib.reproduce.tables import write_csv
from dianlib.rnn import RNNClassifier, clip_grad_norm, orthogonal
from dianlib.training import is_watched, seed_everything

DATASETS: dict[str, Callable[[], ImageData]] = {
    "fashion_mnist": fashion_mnist,
    "mnist": mnist,
    "digits": digits,
}
HIDDEN, BATCH = 128, 64


class KeptState(nn.Module):
    """As in a log: all pixels in one step, no recurrent weight, the state of the batch before added."""

    def __init__(self, n_pixels: int, n_classes: int) -> None:
        super().__init__()
        self.input = nn.Linear(n_pixels, HIDDEN)
        self.output = nn.Linear(HIDDEN, n_classes)
        self.kept = torch.zeros(BATCH, HIDDEN)

    def forward(self, images: Tensor) -> Tensor:
        state = torch.tanh(self.input(images.flatten(1)) + self.kept[: len(images)])
        self.kept[: len(images)] = state.detach()
        logits: Tensor = self.output(state)
        return logits


class OutputFromCombined(nn.Module):
    """As in a log: the class is read from the last row and the state before it."""

    def __init__(self, n_columns: int, n_classes: int) -> None:
        super().__init__()
        self.to_state = nn.Linear(n_columns + HIDDEN, HIDDEN)
        self.to_classes = nn.Linear(n_columns + HIDDEN, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        state = images.new_zeros(len(images), HIDDEN)
        for row in images.unbind(1):
            combined = torch.cat([row, state], dim=1)
            state = torch.tanh(self.to_state(combined))
        logits: Tensor = self.to_classes(combined)
        return logits


def rotated(images: ImageData) -> RNNClassifier:
    """Make a tanh network over rows whose recurrent weight starts as a random rotation or reflection."""
    model = RNNClassifier(images.train_images.shape[2], HIDDEN, len(images.classes))
    with torch.no_grad():
        model.rnn.weight_hh_l0.copy_(orthogonal(torch.randn(HIDDEN, HIDDEN)))
    return model


def with_relu(images: ImageData) -> RNNClassifier:
    """Make a network over rows with ReLU in its cell."""
    return RNNClassifier(images.train_images.shape[2], HIDDEN, len(images.classes), torch.relu)


@dataclass(frozen=True)
class Recipe:
    """A network and how it is trained: Adam's rate, and the norm that gradients are clipped to, if any."""

    network: Callable[[ImageData], nn.Module]
    lr: float = 0.001
    clip: float | None = None
    is_long: bool = False  # all epochs; the others take a third of them


RECIPES = {
    "one step, state kept": Recipe(lambda i: KeptState(i.train_images[0].numel(), len(i.classes))),
    "output from combined": Recipe(lambda i: OutputFromCombined(i.train_images.shape[2], len(i.classes))),
    "fully connected": Recipe(lambda i: MLP([i.train_images[0].numel(), HIDDEN, len(i.classes)])),
    "rows, tanh, clipped at 1": Recipe(rotated, clip=1.0),
    "rows, ReLU, rate 0.003": Recipe(with_relu, lr=0.003, is_long=True),
    "rows, ReLU, rate 0.003, clipped at 1": Recipe(with_relu, lr=0.003, clip=1.0, is_long=True),
}
OURS = "rows, tanh, clipped at 1"


@dataclass(frozen=True)
class Result:
    """One trained network: its test accuracy after the last epoch, Wilson's 95 % interval, and its way there.

    ``lowest_after_best`` is the lowest validation accuracy after the best one, ``largest_norm`` the
    largest norm of a gradient before clipping, ``changed`` the share of test answers that change with the
    order of the test.
    """

    dataset: str
    recipe: str
    seed: int
    epochs: int
    accuracy: float
    low: float
    high: float
    best_validation: float
    lowest_after_best: float
    largest_norm: float
    changed: float
    seconds: float


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Return the predicted classes of images (N, H, W), asked for in batches, in their order."""
    model.eval()
    return torch.cat([model(batch).argmax(1) for (batch,) in Batches(images, batch_size=BATCH)])


def train(images: ImageData, recipe: Recipe, model: nn.Module, epochs: int) -> list[tuple[float, float]]:
    """Train and return, for each epoch, the validation accuracy and the largest norm of a gradient."""
    optimizer = Adam(model.parameters(), lr=recipe.lr, fused=True)
    batches = Batches(images.train_images, images.train_labels, batch_size=BATCH, shuffle=True)
    found = []
    for _ in tqdm(range(epochs), unit="epoch", leave=False, disable=not is_watched()):
        model.train()
        largest = 0.0
        for inputs, targets in batches:
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            # Without a bound the norm is only measured.
            largest = max(largest, clip_grad_norm(model.parameters(), recipe.clip or float("inf")))
            optimizer.step()
        right = predict(model, images.validation_images) == images.validation_labels
        found.append((right.double().mean().item(), largest))
    return found


def reproduce_rnn(
    dataset: str = "fashion_mnist", *, epochs: int = 30, seeds: int = 3, output: Path = Path("reproduced")
) -> list[Result]:
    """Train each recipe from the seeds 0 .. ``seeds`` - 1 and print a table and our confusion matrix.

    The two ReLU recipes take ``epochs`` epochs, the others a third of them. The folder ``output`` gets
    rnn-<dataset>.md and .csv, rnn-<dataset>-curves.csv with every epoch and rnn-<dataset>-confusion.csv, the
    matrix of our recipe over all seeds. Raises ValueError for an unknown data set or a count below 1, and
    dianlib.data.DataError when the data set is not on this machine.
    """
    if dataset not in DATASETS:
        raise ValueError(f"there is no data set {dataset!r}; choose one of {', '.join(DATASETS)}.")
    if epochs < 1 or seeds < 1:
        raise ValueError(f"epochs and seeds must be at least 1, not {epochs} and {seeds}.")
    images = DATASETS[dataset]()
    output.mkdir(parents=True, exist_ok=True)
    n_classes, n_test = len(images.classes), len(images.test_labels)
    results: list[Result] = []
    curves: list[tuple[object, ...]] = []
    confusion = torch.zeros(n_classes, n_classes, dtype=torch.int64)
    for name, recipe in RECIPES.items():
        for seed in range(seeds):
            seed_everything(seed)
            model = recipe.network(images)
            started = time.perf_counter()
            course = train(images, recipe, model, epochs if recipe.is_long else -(-epochs // 3))
            seconds = time.perf_counter() - started
            answers = predict(model, images.test_images)
            order = torch.randperm(n_test, generator=torch.Generator().manual_seed(seed))
            again = predict(model, images.test_images[order])
            n_right = int((answers == images.test_labels).sum())
            accuracies = [accuracy for accuracy, _ in course]
            best = accuracies.index(max(accuracies))
            results.append(
                Result(
                    images.name,
                    name,
                    seed,
                    len(course),
                    n_right / n_test,
                    *wilson_interval(n_right, n_test),
                    best_validation=accuracies[best],
                    lowest_after_best=min(accuracies[best:]),
                    largest_norm=max(norm for _, norm in course),
                    changed=(answers[order] != again).double().mean().item(),
                    seconds=seconds,
                )
            )
            curves += [(name, seed, epoch, *numbers) for epoch, numbers in enumerate(course, start=1)]
            if name == OURS:
                confusion += confusion_matrix(answers, images.test_labels, n_classes)
            # A long run may be ended early: what is done is on the disk.
            _write(output, images, results, curves, confusion)
    print(markdown_table(results))
    return results


def _write(
    output: Path,
    images: ImageData,
    results: Sequence[Result],
    curves: Sequence[tuple[object, ...]],
    confusion: Tensor,
) -> None:
    stem = f"rnn-{images.name}"
    (output / f"{stem}.md").write_text(markdown_table(results) + "\n", encoding="utf-8")
    write_csv(output / f"{stem}.csv", [field.name for field in fields(Result)], map(astuple, results))
    columns = ["recipe", "seed", "epoch", "validation_accuracy", "largest_norm"]
    write_csv(output / f"{stem}-curves.csv", columns, curves)
    rows = [[name, *counts] for name, counts in zip(images.classes, confusion.tolist(), strict=True)]
    write_csv(output / f"{stem}-confusion.csv", ["true class", *images.classes], rows)


def markdown_table(results: Sequence[Result]) -> str:
    """Return a Markdown table: a line for each result, and the mean over the seeds of each recipe."""
    lines = [
        "| recipe | seed | epochs | test accuracy | 95 % interval | best validation | lowest after | "
        "largest norm | changed | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for recipe in dict.fromkeys(result.recipe for result in results):
        runs = [result for result in results if result.recipe == recipe]
        lines += [
            f"| {r.recipe} | {r.seed} | {r.epochs} | {r.accuracy:.4f} | {r.low:.4f} to {r.high:.4f} "
            f"| {r.best_validation:.4f} | {r.lowest_after_best:.4f} | {r.largest_norm:.3g} | {r.changed:.4f} "
            f"| {r.seconds:.1f} |"
            for r in runs
        ]
        average = mean(run.accuracy for run in runs)
        seconds = mean(run.seconds for run in runs)
        lines.append(f"| {recipe} | mean | {runs[0].epochs} | {average:.4f} | | | | | | {seconds:.1f} |")
    return "\n".join(lines)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what `dianlib reproduce rnn` can be told."""
    parser.add_argument(
        "--dataset",
        choices=DATASETS,
        default="fashion_mnist",
        help="images to train on (default: fashion_mnist)",
    )
    parser.add_argument(
        "--epochs", type=int, default=30, help="epochs with ReLU; the others take a third (default: 30)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="networks for each recipe (default: 3)")


def run(options: argparse.Namespace) -> None:
    """Carry out `dianlib reproduce rnn`."""
    reproduce_rnn(options.dataset, epochs=options.epochs, seeds=options.seeds, output=options.output)
