"""Measure a classifier: count once, divide last.

Letters: N samples, C classes. A confusion matrix has rows = true classes and
columns = predicted classes, as in scikit-learn: entry (i, j) counts the samples of
class i that were called j.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

Pairs = Iterable[tuple[Tensor, Tensor]]


def confusion_matrix(predictions: Tensor, targets: Tensor, n_classes: int) -> Tensor:
    """Count the pairs (true class, predicted class): (N,), (N,) -> (C, C) int64.

    The matrices of two batches add up to the matrix of both, so a data set can be
    counted in pieces. Raises ValueError when the shapes differ or a label lies outside
    0 .. C-1.
    """
    if predictions.shape != targets.shape:
        raise ValueError(
            f"predictions have shape {tuple(predictions.shape)} "
            f"and targets {tuple(targets.shape)}; give one prediction for each target."
        )
    predictions, targets = predictions.flatten().long(), targets.flatten().long()
    for name, labels in (("prediction", predictions), ("target", targets)):
        outside = labels[(labels < 0) | (labels >= n_classes)]
        if len(outside):
            label = int(outside[0])
            raise ValueError(f"{name} {label} is outside the classes 0 to {n_classes - 1}.")
    # Each pair becomes one number, row * C + column: one pass of bincount counts all.
    pairs = targets * n_classes + predictions
    counts = torch.bincount(pairs, minlength=n_classes * n_classes)
    return counts.reshape(n_classes, n_classes)


def accuracy(confusion: Tensor) -> float:
    """Return the share of samples on the diagonal: (C, C) -> a number from 0 to 1.

    An empty matrix has no accuracy and gives NaN.
    """
    total = int(confusion.sum())
    return int(confusion.diagonal().sum()) / total if total else math.nan


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide element by element and read 0 / 0 as 0."""
    return torch.where(denominator > 0, numerator / denominator.clamp(min=1), 0.0)


def precision(confusion: Tensor) -> Tensor:
    """Of the samples called c, how many are c? (C, C) -> (C,) float64.

    A class that is never predicted gets 0.
    """
    confusion = confusion.double()
    return _divide(confusion.diagonal(), confusion.sum(dim=0))


def recall(confusion: Tensor) -> Tensor:
    """Of the samples that are c, how many were called c? (C, C) -> (C,) float64.

    A class that never occurs gets 0.
    """
    confusion = confusion.double()
    return _divide(confusion.diagonal(), confusion.sum(dim=1))


def f1(confusion: Tensor) -> Tensor:
    """Return the harmonic mean of precision and recall: (C, C) -> (C,) float64.

    It is written in counts, 2 TP / (2 TP + FP + FN), which is 0 / 0 only for a class
    that is neither true nor predicted anywhere; that class gets 0
    (van Rijsbergen 1979, chapter 7).
    """
    confusion = confusion.double()
    called, there = confusion.sum(dim=0), confusion.sum(dim=1)
    return _divide(2 * confusion.diagonal(), called + there)


def macro_f1(confusion: Tensor) -> float:
    """Return the plain mean of the F1 of all C classes, however rare they are."""
    return float(f1(confusion).mean())


def weighted_f1(confusion: Tensor) -> float:
    """Return the mean of the classes' F1, weighted with their shares of true labels."""
    shares = confusion.sum(dim=1).double() / confusion.sum()
    return float((shares * f1(confusion)).sum())


@torch.no_grad()
def evaluate(model: nn.Module, batches: Pairs, n_classes: int) -> dict[str, float]:
    """Measure a model over a whole data set: accuracy, macro precision, recall, F1.

    ``batches`` yields pairs (inputs, targets (N,)); the model maps inputs to logits
    (N, C). The counts of all batches are added before anything is divided. The model
    is in evaluation mode meanwhile and gets its own mode back. Raises ValueError when
    there is no sample at all.
    """
    was_training = model.training
    model.eval()
    confusion = torch.zeros(n_classes, n_classes, dtype=torch.int64)
    for inputs, targets in batches:
        predictions = model(inputs).argmax(dim=-1)
        confusion += confusion_matrix(predictions.cpu(), targets.cpu(), n_classes)
    model.train(was_training)
    if not confusion.any():
        raise ValueError("no sample to measure; check that the batches are not used up.")
    return {
        "accuracy": accuracy(confusion),
        "precision": float(precision(confusion).mean()),
        "recall": float(recall(confusion).mean()),
        "f1": macro_f1(confusion),
    }


def wilson_interval(n_correct: int, n_total: int, z: float = 1.96) -> tuple[float, float]:
    """Return the interval (low, high) of success rates that fit n_correct of n_total.

    Wilson's score interval (1927, J. Am. Stat. Assoc. 22, 209-212): all rates p whose
    distance from the observed one is at most z standard deviations,
    sqrt(p (1 - p) / n_total). z = 1.96 gives 95 %. Raises ValueError unless
    0 <= n_correct <= n_total and n_total > 0.
    """
    if n_total <= 0 or not 0 <= n_correct <= n_total:
        raise ValueError(f"there cannot be {n_correct} right answers among {n_total}.")
    rate = n_correct / n_total
    shrink = 1 + z**2 / n_total
    centre = (rate + z**2 / (2 * n_total)) / shrink
    variance = rate * (1 - rate) / n_total + z**2 / (4 * n_total**2)
    half_width = z / shrink * math.sqrt(variance)
    # With none or all correct one end is exactly 0 or 1, which rounding would miss.
    low = 0.0 if n_correct == 0 else centre - half_width
    high = 1.0 if n_correct == n_total else centre + half_width
    return low, high
