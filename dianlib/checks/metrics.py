"""Tasks of the chapter "Measuring a classifier": right answers, and the wrong ones that are known."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dianlib import metrics
from dianlib.checks.kinds import answer_probes, specimen_probes, verdict_faults, wrong_answer
from dianlib.checks.running import Batches, Net, Outcome, Probe
from dianlib.checks.task import Fault, Task

COUNT = "metrics: Count before you divide: the confusion matrix"
ACCURACY = "metrics: Accuracy: one number, one division"
COLUMN_ROW = "metrics: Precision asks the column, recall asks the row"
NEVER = "metrics: What if a class is never predicted?"
AVERAGES = "metrics: Macro, micro, weighted: what does each average hide?"
NEGATIVES = "metrics: Why do true negatives flatter?"
DIVIDE_LAST = "metrics: Why count first and divide last?"
INTERVAL = "metrics: How sure is an accuracy? The Wilson interval"


# ----- confusion_matrix ------------------------------------------------------------------------------------


def _labels(
    generator: torch.Generator, n: int, classes: list[int], share_right: float
) -> tuple[Tensor, Tensor]:
    """Draw n targets from ``classes`` and predictions of which about ``share_right`` agree."""
    pool = torch.tensor(classes)
    targets = pool[torch.randint(len(pool), (n,), generator=generator)]
    others = pool[torch.randint(len(pool), (n,), generator=generator)]
    right = torch.rand(n, generator=generator) < share_right
    return torch.where(right, targets, others), targets


def _label_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, predictions: Tensor, targets: Tensor, n_classes: int, core: bool = False) -> Probe:
        args = {"predictions": predictions, "targets": targets, "n_classes": n_classes}
        return Probe(name, args, core=core)

    # One class is confused in one direction only, so that the transpose is another matrix.
    order = torch.randperm(5, generator=generator)
    small_targets, small_predictions = torch.tensor([0, 0, 0, 1, 2]), torch.tensor([0, 1, 1, 1, 1])
    return [
        probe("five samples, three classes", small_predictions[order], small_targets[order], 3, core=True),
        probe(
            "two hundred samples, six classes",
            *_labels(generator, 200, [0, 1, 2, 3, 4, 5], 0.6),
            6,
            core=True,
        ),
        # Three classes again: a candidate that keeps its counts from the first call gives itself away here.
        probe("twelve samples, three classes", *_labels(generator, 12, [0, 1, 2], 0.5), 3),
        probe("the last two classes never occur", *_labels(generator, 30, [0, 1, 2], 0.5), 5),
        probe("a single sample", torch.tensor([1]), torch.tensor([3]), 4),
    ]


def _confusion_twin(
    predictions: Tensor,
    targets: Tensor,
    n_classes: int,
    *,
    rows: str = "true",
    counting: str = "add",
    size: str = "n_classes",
    cells: str = "counts",
) -> Tensor:
    if rows == "predicted":
        predictions, targets = targets, predictions
    if size == "up to the largest label":
        n_classes = int(torch.cat([predictions, targets]).max()) + 1
    elif size == "labels that occur":
        occurring = torch.cat([predictions, targets]).unique()
        n_classes = len(occurring)
        predictions, targets = (torch.searchsorted(occurring, labels) for labels in (predictions, targets))
    confusion = torch.zeros(n_classes, n_classes, dtype=torch.int64)
    if counting == "add":
        confusion.index_put_((targets, predictions), torch.tensor(1), accumulate=True)
    elif counting == "overwrite":
        confusion[targets, predictions] += 1
    elif counting == "right only":
        hits = targets[targets == predictions]
        confusion.index_put_((hits, hits), torch.tensor(1), accumulate=True)
    if cells == "floats":
        return confusion.float()
    if cells == "counts":
        return confusion
    totals = {"row shares": confusion.sum(1, keepdim=True), "shares of all": confusion.sum()}[cells]
    return confusion / totals.clamp(min=1)


def _confusion_by_loop(predictions: Tensor, targets: Tensor, n_classes: int) -> Tensor:
    matrix = torch.zeros(n_classes, n_classes, dtype=torch.int64)
    for prediction, target in zip(predictions.tolist(), targets.tolist(), strict=True):
        matrix[target, prediction] += 1
    return matrix


def _confusion_by_lists(predictions: Tensor, targets: Tensor, n_classes: int) -> Tensor:
    rows = [[0] * n_classes for _ in range(n_classes)]
    for prediction, target in zip(predictions, targets, strict=True):
        rows[int(target)][int(prediction)] += 1
    return torch.tensor(rows)


def _confusion_by_one_hot(predictions: Tensor, targets: Tensor, n_classes: int) -> Tensor:
    one_hot = torch.eye(n_classes, dtype=torch.int64)
    return one_hot[targets].T @ one_hot[predictions]


def _confusion_by_comparison(predictions: Tensor, targets: Tensor, n_classes: int) -> Tensor:
    classes = torch.arange(n_classes)
    is_true, is_called = targets[:, None] == classes, predictions[:, None] == classes
    return (is_true[:, :, None] & is_called[:, None, :]).sum(0)


CONFUSION_MATRIX = Task(
    id="metrics.confusion_matrix",
    signature="confusion_matrix(predictions, targets, n_classes)",
    points=3,
    reference=metrics.confusion_matrix,
    probes=_label_probes,
    twin=_confusion_twin,
    forbidden=frozenset({"confusion_matrix"}),
    variants=[_confusion_by_loop, _confusion_by_lists, _confusion_by_one_hot, _confusion_by_comparison],
    hints=(
        "Take the sample whose true class is 2 and whose prediction is 1. Which single entry of the matrix grows?",
        "Rows are true classes, columns are predicted ones. All entries add up to the number of samples, and row i adds "
        "up to the number of samples of class i. A pair that occurs twice must count twice.",
        "start with a C x C matrix of integer zeros\nfor each sample: add 1 at (its target, its prediction)\n"
        "without a loop: number the pairs target * C + prediction, count the numbers with bincount, reshape",
    ),
    mistakes=[
        Fault(
            "metrics-precision-recall-swapped",
            "Your rows are predictions and your columns are true classes: the matrix is transposed.",
            "Use the target as the row and the prediction as the column; otherwise precision and recall change places.",
            COUNT,
            settings=[{"rows": "predicted"}],
        ),
        Fault(
            "metrics-count-overwritten",
            "A pair that occurs several times is counted once: `matrix[targets, predictions] += 1` adds only once to each entry.",
            "Add in a loop, or use torch.bincount, or index_put_ with accumulate=True.",
            COUNT,
            settings=[{"counting": "overwrite"}],
        ),
        Fault(
            "metrics-only-hits-counted",
            "Only right predictions are counted, so every entry off the diagonal is 0.",
            "Count every sample; the wrong ones are what a confusion matrix shows.",
            COUNT,
            settings=[{"counting": "right only"}],
        ),
        Fault(
            "metrics-absent-class-dropped",
            "The size comes from the labels that occur, so a class that does not occur has no row.",
            "Make the matrix n_classes x n_classes, whatever occurs; then the matrices of two batches can be added.",
            NEVER,
            settings=[{"size": "up to the largest label"}, {"size": "labels that occur"}],
        ),
        Fault(
            "metrics-counts-not-int64",
            "The counts are right, but they are not int64: torch.zeros, for example, makes floating-point numbers.",
            "Make the matrix with dtype=torch.int64; large counts are not exact in float32.",
            COUNT,
            settings=[{"cells": "floats"}],
        ),
        Fault(
            "metrics-confusion-normalised",
            "The entries are shares, not counts.",
            "Return the integer counts. Whoever needs shares can divide later; shares of two batches cannot be added.",
            DIVIDE_LAST,
            settings=[{"cells": "row shares"}, {"cells": "shares of all"}],
        ),
    ],
)


# ----- accuracy, precision, recall, f1, macro_f1: functions of a confusion matrix --------------------------------


def _confusions(generator: torch.Generator) -> list[Probe]:
    """Make matrices with unequal classes, the smallest first; two have classes with empty rows or columns."""

    def probe(name: str, confusion: Tensor, core: bool = False) -> Probe:
        return Probe(name, {"confusion": confusion}, core=core)

    def draw(n: int, off_diagonal: int, diagonal: int) -> Tensor:
        confusion = torch.randint(1, off_diagonal, (n, n), generator=generator)
        confusion += torch.diag(torch.randint(3, diagonal, (n,), generator=generator))
        return confusion * torch.arange(1, n + 1).unsqueeze(1)  # classes of unequal size

    never_predicted = draw(4, 4, 20)
    never_predicted[:, 2] = 0
    absent = draw(4, 4, 20)
    absent[1, :] = 0
    neither = draw(5, 4, 20)
    neither[3, :] = 0
    neither[:, 3] = 0
    neither[0, :] = 0
    neither[:, 0] = 0
    neither[0, 0] = 1  # the smallest class that there is: 1 of 1
    return [
        probe("two classes of unequal size", draw(2, 6, 12), core=True),
        probe("six classes", draw(6, 5, 40), core=True),
        probe("class 2 is never predicted", never_predicted),
        probe("class 1 never occurs but is predicted", absent),
        probe("class 3 neither occurs nor is predicted, class 0 has one sample", neither),
    ]


def _accuracy_one_versus_rest_pooled(confusion: Tensor) -> float:
    n, total, hits = len(confusion), confusion.sum(), confusion.diagonal().sum()
    true_negatives = (n - 2) * total + hits
    return float((hits + true_negatives) / (n * total))


def _accuracy_true_negatives_of_hits(confusion: Tensor) -> float:
    # TN taken as the other classes' true positives: p becomes C p / ((C - 2) p + 2), 10p / (8p + 2) for ten classes.
    n, total, hits = len(confusion), confusion.sum(), confusion.diagonal().sum()
    misses = total - hits
    return float(n * hits / (n * hits + 2 * misses))


def _accuracy_by_trace(confusion: Tensor) -> Tensor:
    return confusion.trace() / confusion.sum()


def _accuracy_by_loop(confusion: Tensor) -> float:
    right = sum(confusion[c, c].item() for c in range(len(confusion)))
    return float(right / sum(sum(row) for row in confusion.tolist()))


def _accuracy_as_float64(confusion: Tensor) -> Tensor:
    return confusion.double().diag().sum() / confusion.double().sum()


ACCURACY_TASK = Task(
    id="metrics.accuracy",
    signature="accuracy(confusion)",
    points=1,
    reference=metrics.accuracy,
    probes=_confusions,
    forbidden=frozenset({"accuracy"}),
    variants=[_accuracy_by_trace, _accuracy_by_loop, _accuracy_as_float64],
    hints=(
        "Which entries of the matrix are right answers, and what do all entries add up to?",
        "Accuracy is one division: right answers by all answers. It is a whole number divided by N.",
        "right = sum of the diagonal; all = sum of the matrix; return right / all",
    ),
    mistakes=[
        Fault(
            "metrics-tn-inflates-accuracy",
            "True negatives are counted as right. With many classes almost everything is a true negative, so .952 looks like .990.",
            "Accuracy with more than two classes is the diagonal divided by N; leave true negatives out.",
            NEGATIVES,
            implementations=[_accuracy_true_negatives_of_hits, _accuracy_one_versus_rest_pooled],
        ),
        Fault(
            "metrics-balanced-accuracy",
            "This is the mean of the classes' recalls (balanced accuracy): a rare class counts as much as a common one.",
            "Divide once: the whole diagonal by the sum of the matrix.",
            ACCURACY,
            implementations=[lambda confusion: float(metrics.recall(confusion).mean())],
        ),
        Fault(
            "metrics-integer-truncation",
            "The result is rounded, or its decimals are cut off.",
            "Do not use round(), int() or // on the way; return the fraction as it is and round only when you print.",
            ACCURACY,
            implementations=[
                lambda confusion: int(100 * metrics.accuracy(confusion)) / 100,
                lambda confusion: int(100 * metrics.accuracy(confusion)),
                lambda confusion: int(metrics.accuracy(confusion)),
                lambda confusion: round(metrics.accuracy(confusion), 2),
            ],
        ),
        Fault(
            "metrics-percent",
            "The result is a percentage, 100 times too large.",
            "Return the fraction, a number from 0 to 1.",
            ACCURACY,
            implementations=[lambda confusion: 100 * metrics.accuracy(confusion)],
        ),
        Fault(
            "metrics-error-rate",
            "This is the share of wrong answers.",
            "Put the diagonal, the right answers, into the numerator.",
            ACCURACY,
            implementations=[lambda confusion: 1 - metrics.accuracy(confusion)],
        ),
    ],
)


def _rates_twin(
    confusion: Tensor,
    *,
    measure: str,
    divisor: str = "right",
    empty: str = "zero",
    average: str = "none",
    factor: float = 1.0,
    mean: str = "harmonic",
) -> Tensor:
    """Precision, recall or F1 of each class with one thing or two done wrong."""
    confusion = confusion.double()
    hits, columns, rows = confusion.diagonal(), confusion.sum(0), confusion.sum(1)
    if average == "micro":  # pool the counts of all classes
        hits, columns, rows = (counts.sum().expand(len(counts)) for counts in (hits, columns, rows))
    if divisor == "swapped":
        columns, rows = rows, columns
    elif divisor == "all samples":
        columns = rows = confusion.sum().expand_as(hits)
    elif divisor == "misses":
        columns, rows = columns - hits, rows - hits
    elif divisor == "true negatives added":
        negatives = confusion.sum() - columns - rows + hits
        hits, columns, rows = hits + negatives, columns + negatives, rows + negatives

    def divide(top: Tensor, bottom: Tensor) -> Tensor:
        if empty == "zero":
            return torch.where(bottom > 0, top / bottom.clamp(min=1), 0.0)
        if empty == "one":
            return torch.where(bottom > 0, top / bottom.clamp(min=1), 1.0)
        if empty == "raise" and bool((bottom == 0).any()):
            raise ZeroDivisionError("division by zero")
        return top / bottom

    precision, recall = divide(hits, columns), divide(hits, rows)
    if measure == "precision":
        values = precision
    elif measure == "recall":
        values = recall
    elif mean == "arithmetic":
        values = (precision + recall) / 2
    elif mean == "geometric":
        values = (precision * recall).sqrt()
    elif empty == "zero":
        values = divide(2 * hits, columns + rows)
    else:
        sums = precision + recall
        if empty == "raise" and bool((sums == 0).any()):
            raise ZeroDivisionError("float division by zero")
        values = (
            torch.where(sums > 0, 2 * precision * recall / sums, 1.0)
            if empty == "one"
            else (2 * precision * recall / sums)
        )
    if empty == "dropped":
        values = values[~values.isnan()]
    return values * factor if average != "mean" else values.mean() * factor


def _divided_by_zero(probe: Probe, got: Outcome, wanted: Outcome) -> bool:
    """Recognise 0 / 0: Python's exception, or NaN in some numbers while all others are right."""
    if got.error:
        return got.error == "ZeroDivisionError"
    pairs = [
        (_float64(got.values[name]), _float64(right))
        for name, right in wanted.values.items()
        if name in got.values
    ]
    nan = any(a.shape == b.shape and bool((a.isnan() & b.isfinite()).any()) for a, b in pairs)
    return nan and all(
        a.shape == b.shape and torch.allclose(a[a.isfinite()], b[a.isfinite()], 1e-4, 1e-5) for a, b in pairs
    )


def _float64(value: Any) -> Tensor:
    """Read a leaf as a tensor; what is no number at all becomes an empty one."""
    if isinstance(value, Tensor):
        return value.double() if not value.is_complex() else torch.empty(0)
    return (
        torch.tensor(float(value), dtype=torch.float64) if isinstance(value, int | float) else torch.empty(0)
    )


def _zero_division(do: str) -> Fault:
    return Fault(
        "metrics-zero-division",
        "A class with nothing to divide by gives 0 / 0: the result is NaN, or Python raises ZeroDivisionError.",
        do,
        NEVER,
        settings=[{"empty": "nan"}, {"empty": "raise"}],
        sign=_divided_by_zero,
    )


_EMPTY_ONE = Fault(
    "metrics-empty-class-is-perfect",
    "A class with nothing to divide by gets 1, as if the model were perfect on it.",
    "Read 0 / 0 as 0.",
    NEVER,
    settings=[{"empty": "one"}],
)
_EMPTY_DROPPED = Fault(
    "metrics-absent-class-dropped",
    "A class with nothing to divide by is left out, so the result has fewer than C entries.",
    "Keep one entry for each class and give 0 to a class with nothing to divide by.",
    NEVER,
    settings=[{"empty": "dropped"}],
)
_MICRO = Fault(
    "metrics-micro-called-f1",
    "You pooled the counts of all classes before dividing (micro average): every class gets the same number, the accuracy.",
    "Divide for each class on its own; precision, recall and F1 of different classes differ.",
    AVERAGES,
    settings=[{"average": "micro"}],
)
_MEAN_TOO_EARLY = Fault(
    "metrics-mean-too-early",
    "You returned the mean over the classes, one number instead of C.",
    "Return one number for each class, shape (C,).",
    AVERAGES,
    settings=[{"average": "mean"}],
)
_PERCENT = Fault(
    "metrics-percent",
    "The result is a percentage, 100 times too large.",
    "Return fractions, numbers from 0 to 1.",
    ACCURACY,
    settings=[{"factor": 100.0}],
)
_TRUE_NEGATIVES = Fault(
    "metrics-tn-inflates-accuracy",
    "True negatives are added above and below the line; with many classes they make every class look good.",
    "Precision, recall and F1 do not use true negatives at all.",
    NEGATIVES,
    settings=[{"divisor": "true negatives added"}],
)
_ALL_SAMPLES = Fault(
    "metrics-divided-by-all",
    "The hits of each class are divided by the number of all samples.",
    "Divide by the column sum (precision) or the row sum (recall) of the class.",
    COLUMN_ROW,
    settings=[{"divisor": "all samples"}],
)
_MISSES = Fault(
    "metrics-divided-by-misses",
    "The hits are divided by the misses only: the result can be larger than 1.",
    "The divisor contains the hits: TP + FP for precision, TP + FN for recall.",
    COLUMN_ROW,
    settings=[{"divisor": "misses"}],
)


# Precision, recall and F1 of each class can all go wrong in these ways.
_MISTAKES_OF_RATES = (
    _EMPTY_ONE,
    _EMPTY_DROPPED,
    _MICRO,
    _MEAN_TOO_EARLY,
    _PERCENT,
    _TRUE_NEGATIVES,
    _ALL_SAMPLES,
    _MISSES,
)


def _rate_property(probe: Probe, got: Outcome, wanted: Outcome) -> str:
    values = got.values.get("result")
    if isinstance(values, Tensor) and values.is_floating_point() and bool((values > 1.0001).any()):
        return f"result has an entry of {float(values.max()):.4g}; a share cannot be larger than 1."
    return ""


def _with_measure(measure: str, *, also: dict[str, Any] | None = None) -> Any:
    def twin(confusion: Tensor, **settings: Any) -> Tensor:
        return _rates_twin(confusion, measure=measure, **(also or {}), **settings)

    return twin


def _precision_by_loop(confusion: Tensor) -> Tensor:
    values = []
    for c in range(len(confusion)):
        called = confusion[:, c].sum().item()
        values.append(confusion[c, c].item() / called if called > 0 else 0.0)
    return torch.tensor(values)


def _precision_by_nan_to_num(confusion: Tensor) -> Tensor:
    return torch.nan_to_num(confusion.diagonal() / confusion.sum(dim=0))


def _precision_with_epsilon(confusion: Tensor) -> Tensor:
    return confusion.diagonal() / (confusion.sum(dim=0) + 1e-12)


PRECISION = Task(
    id="metrics.precision",
    signature="precision(confusion)",
    points=2,
    reference=metrics.precision,
    probes=_confusions,
    twin=_with_measure("precision"),
    forbidden=frozenset({"precision"}),
    properties=[_rate_property],
    variants=[_precision_by_loop, _precision_by_nan_to_num, _precision_with_epsilon],
    hints=(
        "All samples that the model called class c stand in one line of the matrix. Is it a row or a column?",
        "Precision divides the diagonal by the column sums. A column that is all zeros gives 0, not NaN.",
        "hits = diagonal; called = column sums\nfor each class: hits / called where called > 0, otherwise 0",
    ),
    mistakes=[
        Fault(
            "metrics-precision-recall-swapped",
            "Your precision is the recall: you divide by the number of true samples of each class (the row sums).",
            "Divide by the number of predictions of each class: the column sums.",
            COLUMN_ROW,
            settings=[{"divisor": "swapped"}],
        ),
        _zero_division(
            "Give precision 0 to a class that is never predicted: torch.where(called > 0, hits / called, 0)."
        ),
        *_MISTAKES_OF_RATES,
    ],
)


def _recall_by_loop(confusion: Tensor) -> Tensor:
    values = torch.zeros(len(confusion), dtype=torch.float64)
    for c, row in enumerate(confusion):
        if row.sum() > 0:
            values[c] = row[c] / row.sum()
    return values


def _recall_by_clamp(confusion: Tensor) -> Tensor:
    return confusion.diagonal() / confusion.sum(dim=1).clamp(min=1)


RECALL = Task(
    id="metrics.recall",
    signature="recall(confusion)",
    points=2,
    reference=metrics.recall,
    probes=_confusions,
    twin=_with_measure("recall"),
    forbidden=frozenset({"recall"}),
    properties=[_rate_property],
    variants=[_recall_by_loop, _recall_by_clamp],
    hints=(
        "All samples that truly are class c stand in one line of the matrix. Is it a row or a column?",
        "Recall divides the diagonal by the row sums. A row that is all zeros gives 0, not NaN.",
        "hits = diagonal; there = row sums\nfor each class: hits / there where there > 0, otherwise 0",
    ),
    mistakes=[
        Fault(
            "metrics-precision-recall-swapped",
            "Your recall is the precision: you divide by the number of predictions of each class (the column sums).",
            "Divide by the number of true samples of each class: the row sums.",
            COLUMN_ROW,
            settings=[{"divisor": "swapped"}],
        ),
        _zero_division(
            "Give recall 0 to a class that never occurs: torch.where(there > 0, hits / there, 0)."
        ),
        *_MISTAKES_OF_RATES,
    ],
)


def _f1_from_precision_and_recall(confusion: Tensor) -> Tensor:
    p = torch.nan_to_num(confusion.diagonal() / confusion.sum(dim=0))
    r = torch.nan_to_num(confusion.diagonal() / confusion.sum(dim=1))
    return torch.nan_to_num(2 * p * r / (p + r))


def _f1_from_counts(confusion: Tensor) -> Tensor:
    tp = confusion.diagonal()
    fp, fn = confusion.sum(dim=0) - tp, confusion.sum(dim=1) - tp
    below = 2 * tp + fp + fn
    return torch.where(below == 0, torch.zeros(()), 2 * tp / below.clamp(min=1))


F1 = Task(
    id="metrics.f1",
    signature="f1(confusion)",
    points=2,
    reference=metrics.f1,
    probes=_confusions,
    twin=_with_measure("f1"),
    forbidden=frozenset({"f1"}),
    properties=[_rate_property],
    variants=[_f1_from_precision_and_recall, _f1_from_counts],
    hints=(
        "Write F1 with counts instead of precision and recall. What is left of 2PR / (P + R) when you put in TP, FP and FN?",
        "F1 = 2 TP / (2 TP + FP + FN). It lies between precision and recall of the same class, nearer to the smaller one.",
        "hits = diagonal; below = row sums + column sums\nfor each class: 2 * hits / below where below > 0, otherwise 0",
    ),
    mistakes=[
        _zero_division("Write F1 as 2 TP / (2 TP + FP + FN) and give 0 where that divisor is 0."),
        Fault(
            "metrics-f1-factor-missing",
            "Every value is half of F1: the factor 2 is missing.",
            "The harmonic mean of P and R is 2 P R / (P + R).",
            COLUMN_ROW,
            settings=[{"factor": 0.5}],
        ),
        Fault(
            "metrics-f1-other-mean",
            "Precision and recall are averaged with another mean than the harmonic one.",
            "F1 is the harmonic mean, 2 P R / (P + R): it is near 0 when one of the two is near 0.",
            COLUMN_ROW,
            settings=[{"mean": "arithmetic"}, {"mean": "geometric"}],
        ),
        *_MISTAKES_OF_RATES,
    ],
)


def _macro_twin(
    confusion: Tensor,
    *,
    average: str = "mean of f1",
    classes: str = "all",
    empty: str = "zero",
    factor: float = 1.0,
) -> float:
    rows, columns = confusion.sum(1), confusion.sum(0)
    if empty == "raise" and bool(((rows == 0) | (columns == 0)).any()):
        raise ZeroDivisionError("division by zero")
    values = {
        "precision": metrics.precision(confusion),
        "recall": metrics.recall(confusion),
        "f1": metrics.f1(confusion),
    }
    kept = {
        "all": torch.ones_like(rows, dtype=torch.bool),
        "that occur": rows > 0,
        "that occur or are predicted": (rows > 0) | (columns > 0),
        "with an f1 above 0": values["f1"] > 0,
    }[classes]
    values = {name: value[kept] for name, value in values.items()}
    if empty == "nan" and bool(((rows == 0) | (columns == 0))[kept].any()):
        return math.nan
    if average == "mean of f1":
        result = values["f1"].mean()
    elif average == "f1 of means":
        p, r = values["precision"].mean(), values["recall"].mean()
        result = 2 * p * r / (p + r)
    elif average == "micro":
        result = confusion.diagonal().sum() / confusion.sum()
    elif average == "weighted":
        result = (values["f1"] * rows[kept] / rows[kept].sum()).sum()
    elif average == "median":
        result = values["f1"].median()
    else:
        result = values["f1"].sum()
    return float(result) * factor


def _macro_f1_as_tensor(confusion: Tensor) -> Tensor:
    below = (confusion.sum(dim=0) + confusion.sum(dim=1)).clamp(min=1)
    return (2 * confusion.diagonal() / below).mean()


def _macro_f1_by_loop(confusion: Tensor) -> float:
    n_classes, total = len(confusion), 0.0
    for c in range(n_classes):
        below = confusion[c].sum().item() + confusion[:, c].sum().item()
        total += 2 * confusion[c, c].item() / below if below else 0.0
    return total / n_classes


MACRO_F1 = Task(
    id="metrics.macro_f1",
    signature="macro_f1(confusion)",
    points=2,
    reference=metrics.macro_f1,
    probes=_confusions,
    twin=_macro_twin,
    forbidden=frozenset({"macro_f1"}),
    variants=[_macro_f1_as_tensor, _macro_f1_by_loop],
    hints=(
        "You have C numbers, one F1 for each class. How should a class with 10 samples count beside one with 1,000?",
        "Macro means: one F1 for each of the C classes, then their plain mean. A class without any sample or prediction counts as 0.",
        "values = f1(confusion)   # shape (C,), with 0 for empty classes\nreturn the mean of values as a float",
    ),
    mistakes=[
        Fault(
            "metrics-f1-of-macro-averages",
            "You took the F1 of the mean precision and the mean recall. It is another number than the mean of the F1s.",
            "Compute one F1 for each class first, then take their mean.",
            AVERAGES,
            settings=[{"average": "f1 of means"}],
        ),
        Fault(
            "metrics-micro-called-f1",
            "This is the micro average: it equals the accuracy.",
            "Macro means one F1 for each class, then the mean.",
            AVERAGES,
            settings=[{"average": "micro"}],
        ),
        Fault(
            "metrics-weighted-called-macro",
            "The classes are weighted with their size, so the common classes decide.",
            "Take the plain mean: every class counts alike.",
            AVERAGES,
            settings=[{"average": "weighted"}],
        ),
        Fault(
            "metrics-sum-not-mean",
            "This is the sum of the classes' F1; it can be larger than 1.",
            "Divide the sum by the number of classes.",
            AVERAGES,
            settings=[{"average": "sum"}],
        ),
        Fault(
            "metrics-median-not-mean",
            "This is the median of the classes' F1.",
            "Take the mean.",
            AVERAGES,
            settings=[{"average": "median"}],
        ),
        Fault(
            "metrics-absent-class-dropped",
            "Classes without samples or predictions are left out of the mean, so the divisor is smaller than C.",
            "Divide by n_classes: a class that is never found counts as 0.",
            NEVER,
            settings=[
                {"classes": "that occur"},
                {"classes": "that occur or are predicted"},
                {"classes": "with an f1 above 0"},
            ],
        ),
        Fault(
            "metrics-zero-division",
            "A class with nothing to divide by makes the whole mean NaN, or Python raises ZeroDivisionError.",
            "Give such a class the F1 of 0 before you take the mean.",
            NEVER,
            settings=[{"empty": "nan"}, {"empty": "raise"}],
            sign=_divided_by_zero,
        ),
        Fault(
            "metrics-percent",
            "The result is a percentage, 100 times too large.",
            "Return a number from 0 to 1.",
            ACCURACY,
            settings=[{"factor": 100.0}],
        ),
    ],
)


# ----- evaluate -----------------------------------------------------------------------------------------------


def _evaluate_probes(generator: torch.Generator) -> list[Probe]:
    """Make data sets that are sorted by class, so that batches differ; the last batch is short and the worst."""

    def probe(
        name: str,
        n: int,
        size: int,
        n_classes: int,
        unused: int = 0,
        dropout: float = 0.0,
        core: bool = False,
    ) -> Probe:
        first, second = (
            torch.randn(12, 5, generator=generator),
            torch.randn(n_classes, 12, generator=generator),
        )
        model = Net(
            (first, second), (torch.randn(12, generator=generator), torch.zeros(n_classes)), dropout, True
        )
        second[n_classes - unused :] = 0
        model.biases[1][n_classes - unused :] = -100  # the model never predicts these classes
        x = torch.randn(n, 5, generator=generator)
        predicted = ((x @ first.T + model.biases[0]).relu() @ second.T + model.biases[1]).argmax(1)
        order = predicted.argsort(stable=True)
        x, y = x[order], predicted[order].clone()
        wrong = torch.rand(n, generator=generator) < 0.25
        wrong[n - n % size :] = True
        shift = torch.randint(1, n_classes - unused, (n,), generator=generator)
        y[wrong] = ((y + shift) % (n_classes - unused))[wrong]
        batches = tuple((x[i : i + size], y[i : i + size]) for i in range(0, n, size))
        args = {"model": model, "batches": Batches(batches), "n_classes": n_classes}
        return Probe(name, args, calls=2 if core else 1, core=core)

    return [
        probe("ten samples in batches of four, three classes", 10, 4, 3, core=True),
        probe("forty-five samples in batches of eight, six classes", 45, 8, 6, core=True),
        # Three classes again: a candidate that keeps its counts from the first call gives itself away here.
        probe("eleven samples in batches of three, three classes", 11, 3, 3),
        probe("two classes never occur and are never predicted", 21, 6, 5, unused=2),
        probe("a network with dropout that comes in training mode", 50, 16, 4, dropout=0.5),
    ]


def _evaluate_twin(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    n_classes: int,
    *,
    rates: str = "pooled",
    accuracy: str = "pooled",
    used: str = "all",
    mode: str = "eval",
    swapped: bool = False,
    average: str = "macro",
    empty: str = "zero",
    factor: float = 1.0,
    updating: bool = False,
) -> dict[str, float]:
    was_training = model.training
    model.train(mode == "train")
    confusions: list[Tensor] = []
    for inputs, targets in batches:
        logits = model(inputs)
        confusions.append(metrics.confusion_matrix(logits.argmax(-1), targets, n_classes))
        if updating:
            model.zero_grad()
            nn.functional.cross_entropy(logits, targets).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(0.1 * parameter.grad)
    model.train(was_training)
    if used == "last":
        confusions = confusions[-1:]
    elif used == "all but the last":
        confusions = confusions[:-1]
    whole = torch.stack(confusions).sum(0)

    def measure(confusion: Tensor) -> Tensor:
        hits, rows, columns = confusion.diagonal().sum(), confusion.sum(1), confusion.sum(0)
        if average == "micro":
            return (hits / confusion.sum()).double().expand(3)
        if empty != "zero" and bool(((rows == 0) | (columns == 0)).any()):
            if empty == "raise":
                raise ZeroDivisionError("division by zero")
            return torch.full((3,), math.nan, dtype=torch.float64)
        values = torch.stack([metrics.precision(confusion), metrics.recall(confusion), metrics.f1(confusion)])
        if empty == "zero" and rates == "mean over batches of the classes in the batch":
            kept = (rows > 0) | (columns > 0)
            values, rows = values[:, kept], rows[kept]
        if average == "weighted":
            return (values * rows / rows.sum()).sum(1)
        p, r, f = values.mean(1)
        return torch.stack([p, r, 2 * p * r / (p + r) if average == "f1 of means" else f])

    sizes = torch.stack([c.sum() for c in confusions]).double()
    if rates == "pooled":
        p, r, f = measure(whole)
    elif rates == "mean over batches weighted by size":
        p, r, f = (torch.stack([measure(c) for c in confusions]) * sizes[:, None]).sum(0) / sizes.sum()
    else:
        p, r, f = torch.stack([measure(c) for c in confusions]).mean(0)
    shares = torch.tensor([metrics.accuracy(c) for c in confusions], dtype=torch.float64)
    right = {
        "pooled": metrics.accuracy(whole),
        "mean over batches": float(shares.mean()),
        "true negatives of hits": _accuracy_true_negatives_of_hits(whole),
        "one versus rest": _accuracy_one_versus_rest_pooled(whole),
    }[accuracy]
    if swapped:
        p, r = r, p
    values = {"accuracy": right, "precision": float(p), "recall": float(r), "f1": float(f)}
    return {name: value * factor for name, value in values.items()}


class _EvaluateKeepingTotals:
    """Adds to the same counts in every call: the total is never reset."""

    def __init__(self) -> None:
        self.totals: dict[int, Tensor] = {}

    def __call__(
        self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], n_classes: int
    ) -> dict[str, float]:
        batches = list(batches)
        now = _evaluate_twin(model, batches, n_classes)
        total = self.totals.get(n_classes, torch.zeros(4))
        total = total / len(batches) + torch.tensor(list(now.values()))
        self.totals[n_classes] = total
        return dict(zip(now, total.tolist(), strict=True))


def _weights_changed(probe: Probe, got: Outcome, wanted: Outcome) -> bool:
    return any(
        name.endswith("afterwards") and name in got.values and not torch.equal(got.values[name], value)
        for name, value in wanted.values.items()
    )


def _second_call_differs(probe: Probe, got: Outcome, wanted: Outcome) -> bool:
    return (
        probe.calls > 1
        and not got.random
        and not _weights_changed(probe, got, wanted)
        and any(
            not math.isclose(float(value), float(got.values[name]), rel_tol=1e-6, abs_tol=1e-9)
            for again, value in got.values.items()
            if again.startswith("result of the second call[")
            and (name := again.replace("result of the second call", "result")) in got.values
            and isinstance(value, int | float)
            and not math.isnan(float(value))
        )
    )


def _evaluate_by_collecting(model: Any, batches: Any, n_classes: int) -> dict[str, float]:
    model.eval()
    with torch.inference_mode():
        predictions = torch.cat([model(x).argmax(1) for x, _ in batches])
    targets = torch.cat([y for _, y in batches])
    p, r, f = [], [], []
    for c in range(n_classes):
        tp = int(((predictions == c) & (targets == c)).sum())
        called, there = int((predictions == c).sum()), int((targets == c).sum())
        p.append(tp / called if called else 0.0)
        r.append(tp / there if there else 0.0)
        f.append(2 * tp / (called + there) if called + there else 0.0)
    model.train()
    return {
        "accuracy": (predictions == targets).float().mean().item(),
        "precision": sum(p) / n_classes,
        "recall": sum(r) / n_classes,
        "f1": sum(f) / n_classes,
    }


def _evaluate_by_running_counts(model: Any, batches: Any, n_classes: int) -> dict[str, Any]:
    model.eval()
    hits, called, there = (torch.zeros(n_classes) for _ in range(3))
    for x, y in batches:
        guess = model(x).detach().softmax(-1).argmax(-1)
        hits += torch.bincount(y[guess == y], minlength=n_classes)
        called += torch.bincount(guess, minlength=n_classes)
        there += torch.bincount(y, minlength=n_classes)
    return {
        "f1": (2 * hits / (called + there).clamp(min=1)).mean(),
        "recall": (hits / there.clamp(min=1)).mean(),
        "precision": (hits / called.clamp(min=1)).mean(),
        "accuracy": hits.sum() / there.sum(),
    }


EVALUATE = Task(
    id="metrics.evaluate",
    often_together=[frozenset({"metrics-macro-over-minibatches", "metrics-len-loader-divisor"})],
    signature="evaluate(model, batches, n_classes)",
    points=4,
    reference=metrics.evaluate,
    probes=_evaluate_probes,
    twin=_evaluate_twin,
    forbidden=frozenset({"evaluate"}),
    variants=[_evaluate_by_collecting, _evaluate_by_running_counts],
    hints=(
        "If the same predictions came in batches of another size, should any of the four numbers change?",
        "Confusion matrices of batches add up. Everything is divided once, after the last batch. The model is in evaluation mode.",
        "model.eval(); total = C x C zeros\nwithout gradients, for inputs, targets in batches:\n"
        "    predictions = argmax of model(inputs) over classes\n    total += confusion_matrix(predictions, targets, n_classes)\n"
        "return accuracy, mean precision, mean recall, mean f1 of total",
    ),
    mistakes=[
        Fault(
            "metrics-macro-over-minibatches",
            "Precision, recall and F1 are computed for each batch and then averaged. A class that is absent from a batch "
            "counts as 0 there (or is skipped), so the numbers change with the batch size.",
            "Add up one confusion matrix over the whole set, then divide once.",
            DIVIDE_LAST,
            settings=[
                {"rates": "mean over batches"},
                {"rates": "mean over batches weighted by size"},
                {"rates": "mean over batches of the classes in the batch"},
            ],
        ),
        Fault(
            "metrics-len-loader-divisor",
            "The accuracies of the batches are averaged, so a sample of the short last batch counts more than the others.",
            "Sum the right answers over all batches and divide by N once.",
            DIVIDE_LAST,
            settings=[{"accuracy": "mean over batches"}],
        ),
        Fault(
            "metrics-last-batch-only",
            "Only the last batch counts: the counts start anew inside the loop.",
            "Create the confusion matrix before the loop and add to it.",
            DIVIDE_LAST,
            settings=[{"used": "last"}],
        ),
        Fault(
            "metrics-drop-last-test",
            "The short last batch is left out, so some test samples never count.",
            "Count every batch, whatever its size; do not use drop_last when you measure.",
            DIVIDE_LAST,
            settings=[{"used": "all but the last"}],
        ),
        Fault(
            "metrics-tn-inflates-accuracy",
            "The accuracy counts true negatives as right.",
            "Accuracy is the diagonal divided by N.",
            NEGATIVES,
            settings=[{"accuracy": "true negatives of hits"}, {"accuracy": "one versus rest"}],
        ),
        Fault(
            "metrics-precision-recall-swapped",
            "Precision and recall have changed places.",
            "Check which axis of your matrix is the prediction: precision divides by the number of predictions of a class.",
            COLUMN_ROW,
            settings=[{"swapped": True}],
        ),
        Fault(
            "metrics-micro-called-f1",
            "Precision, recall and F1 are micro averages: all three equal the accuracy.",
            "Compute each for every class, then take the mean over the classes.",
            AVERAGES,
            settings=[{"average": "micro"}],
        ),
        Fault(
            "metrics-weighted-called-macro",
            "The classes are weighted with their size.",
            "Take the plain mean over the classes.",
            AVERAGES,
            settings=[{"average": "weighted"}],
        ),
        Fault(
            "metrics-f1-of-macro-averages",
            "The F1 is computed from the mean precision and the mean recall.",
            "Compute one F1 for each class, then take the mean.",
            AVERAGES,
            settings=[{"average": "f1 of means"}],
        ),
        Fault(
            "metrics-zero-division",
            "A class that is never predicted or never occurs makes the result NaN, or Python raises ZeroDivisionError.",
            "Give such a class 0, then take the mean over all n_classes classes.",
            NEVER,
            settings=[{"empty": "nan"}, {"empty": "raise"}],
            sign=_divided_by_zero,
        ),
        Fault(
            "metrics-percent",
            "All four numbers are percentages.",
            "Return fractions, numbers from 0 to 1.",
            ACCURACY,
            settings=[{"factor": 100.0}],
        ),
        Fault(
            "metrics-evaluated-in-training-mode",
            "The network is measured in training mode: dropout removes random units while you count.",
            "Call model.eval() before the loop.",
            DIVIDE_LAST,
            settings=[{"mode": "train"}],
        ),
        Fault(
            "metrics-train-set-while-updating",
            "The weights change while you count, so every batch is predicted by another model.",
            "Measure a finished model: no backward(), no optimizer, weights as they are.",
            DIVIDE_LAST,
            settings=[{"updating": True}],
            sign=_weights_changed,
        ),
        Fault(
            "metrics-totals-not-reset",
            "The totals of one call are still there in the next: a second call on the same data gives other numbers.",
            "Create the totals inside the function, so that every call starts at 0.",
            DIVIDE_LAST,
            implementations=[_EvaluateKeepingTotals()],
            sign=_second_call_differs,
        ),
    ],
)


# ----- wilson_interval ------------------------------------------------------------------------------------------


def _interval_probes(generator: torch.Generator) -> list[Probe]:
    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    def probe(name: str, n_correct: int, n_total: int, *z: float, core: bool = False) -> Probe:
        args: dict[str, Any] = {"n_correct": n_correct, "n_total": n_total}
        return Probe(name, args | ({"z": z[0]} if z else {}), core=core)

    small = draw(8, 14)
    return [
        probe("a dozen samples", small - draw(2, 4), small, core=True),
        probe("ten thousand samples", draw(9_000, 9_900), 10_000, core=True),
        probe("nothing right", 0, draw(15, 40)),
        probe("everything right", small + 9, small + 9),
        probe("another z", draw(10, 30), 50, 2.5758),
    ]


def _interval_twin(
    n_correct: int,
    n_total: int,
    z: float = 1.96,
    *,
    kind: str = "wilson",
    ends: str = "low, high",
    given_z: str = "used",
    divisor: int = 0,
) -> tuple[float, float]:
    z = 1.96 if given_z == "ignored" else z
    n = n_total - divisor
    rate = n_correct / n_total
    shrink = 1 + z**2 / n
    centre = (rate + z**2 / (2 * n)) / shrink
    variance = max(0.0, rate * (1 - rate) / n)
    half = z / shrink * math.sqrt(variance + z**2 / (4 * n**2))
    if kind == "wald":
        centre, half = rate, z * math.sqrt(variance)
    elif kind == "clipped wald":
        low, high = max(0.0, rate - z * math.sqrt(variance)), min(1.0, rate + z * math.sqrt(variance))
        centre, half = (low + high) / 2, (high - low) / 2
    elif kind == "not moved":
        centre = rate
    elif kind == "no root":
        half = z / shrink * (variance + z**2 / (4 * n**2))
    elif kind == "not shrunk":
        centre, half = centre * shrink, half * shrink
    low, high = centre - half, centre + half
    return (high, low) if ends == "high, low" else (low, high)


def _wilson_by_quadratic_formula(n_correct: int, n_total: int, z: float = 1.96) -> tuple[float, float]:
    # (p_hat - p)^2 = z^2 p (1 - p) / n is a p^2 + b p + c = 0
    p_hat = n_correct / n_total
    a, b, c = 1 + z**2 / n_total, -(2 * p_hat + z**2 / n_total), p_hat**2
    root = max(0.0, b**2 - 4 * a * c) ** 0.5
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


def _wilson_as_list_of_tensors(n_correct: int, n_total: int, z: float = 1.96) -> list[Tensor]:
    k, n, s = torch.tensor(float(n_correct)).double(), n_total, z**2
    centre = (k + s / 2) / (n + s)
    half = z * (k * (n - k) / n + s / 4).sqrt() / (n + s)
    return [centre - half, centre + half]


def _outside_shares(probe: Probe, got: Outcome, wanted: Outcome) -> str:
    ends = [got.values.get("result[0]"), got.values.get("result[1]")]
    for end in ends:
        if isinstance(end, int | float) and not -1e-6 <= end <= 1 + 1e-6:
            return f"The interval has an end at {end:.4g}; success rates lie between 0 and 1."
    return ""


WILSON = Task(
    id="metrics.wilson_interval",
    signature="wilson_interval(n_correct, n_total, z=1.96)",
    points=2,
    reference=metrics.wilson_interval,
    probes=_interval_probes,
    twin=_interval_twin,
    forbidden=frozenset({"wilson_interval"}),
    properties=[_outside_shares],
    variants=[_wilson_by_quadratic_formula, _wilson_as_list_of_tensors],
    hints=(
        "20 of 20 are right. Which true rates could still have given that? Is 1.0 the only one?",
        "Solve (p_hat - p)^2 = z^2 p (1 - p) / n for p. The two solutions are the ends; they stay inside 0 and 1.",
        "p = n_correct / n_total; s = 1 + z^2 / n\ncentre = (p + z^2 / (2 n)) / s\n"
        "half = z / s * sqrt(p (1 - p) / n + z^2 / (4 n^2))\nreturn centre - half, centre + half",
    ),
    mistakes=[
        Fault(
            "metrics-wald-interval",
            "This is the Wald interval, p plus or minus z sqrt(p (1 - p) / n). With no error at all it has no width.",
            "Solve for the rates p whose own spread z sqrt(p (1 - p) / n) reaches the observed share.",
            INTERVAL,
            settings=[{"kind": "wald"}, {"kind": "clipped wald"}],
        ),
        Fault(
            "metrics-interval-centre-not-moved",
            "The interval is centred at the observed share.",
            "The centre is (p + z^2 / (2 n)) / (1 + z^2 / n): it lies nearer to one half.",
            INTERVAL,
            settings=[{"kind": "not moved"}],
        ),
        Fault(
            "metrics-interval-no-root",
            "The variance is used where the standard deviation belongs: the square root is missing.",
            "Take the square root of p (1 - p) / n + z^2 / (4 n^2).",
            INTERVAL,
            settings=[{"kind": "no root"}],
        ),
        Fault(
            "metrics-interval-not-divided",
            "The division by 1 + z^2 / n is missing.",
            "Divide both the centre and the half-width by 1 + z^2 / n.",
            INTERVAL,
            settings=[{"kind": "not shrunk"}],
        ),
        Fault(
            "metrics-interval-ends-swapped",
            "The higher end comes first.",
            "Return (low, high).",
            INTERVAL,
            settings=[{"ends": "high, low"}],
        ),
        Fault(
            "metrics-interval-z-ignored",
            "The argument z is not used; the interval is always the one for 1.96.",
            "Use z wherever the formula has it.",
            INTERVAL,
            settings=[{"given_z": "ignored"}],
            sign=lambda probe, got, wanted: "z" in probe.args and "positional argument" in got.error_text,
        ),
        Fault(
            "metrics-interval-n-minus-one",
            "You divide by n - 1, as for an estimated variance.",
            "Divide by n: the variance p (1 - p) / n is not estimated from a sample of values.",
            INTERVAL,
            settings=[{"divisor": 1}],
        ),
    ],
)


# ----- grade this: implementations of macro_f1 as source text -----------------------------------------------------


def _right_by_counts(confusion: Tensor) -> float:
    hits = confusion.diagonal().double()
    below = confusion.sum(0) + confusion.sum(1)
    return (2 * hits / below.clamp(min=1)).mean().item()


def _right_by_loop(confusion: Tensor) -> float:
    total = 0.0
    n_classes = len(confusion)
    for c in range(n_classes):
        hits = int(confusion[c, c])
        called = sum(int(confusion[i, c]) for i in range(n_classes))
        there = sum(int(confusion[c, i]) for i in range(n_classes))
        precision = hits / called if called else 0.0
        recall = hits / there if there else 0.0
        if precision + recall > 0:
            total += 2 * precision * recall / (precision + recall)
    return total / n_classes


def _right_on_the_transpose(confusion: Tensor) -> float:
    # Precision and recall change places in the transpose; F1 does not notice.
    flipped = confusion.T.double()
    precision = flipped.diagonal() / flipped.sum(0).clamp(min=1)
    recall = flipped.diagonal() / flipped.sum(1).clamp(min=1)
    return torch.nan_to_num(2 * precision * recall / (precision + recall)).mean().item()


def _wrong_f1_of_means(confusion: Tensor) -> float:
    hits = confusion.diagonal().double()
    precision = (hits / confusion.sum(0).clamp(min=1)).mean()
    recall = (hits / confusion.sum(1).clamp(min=1)).mean()
    return (2 * precision * recall / (precision + recall)).item()


def _wrong_present_only(confusion: Tensor) -> float:
    hits = confusion.diagonal().double()
    below = confusion.sum(0) + confusion.sum(1)
    return (2 * hits / below)[below > 0].mean().item()


def _wrong_weighted(confusion: Tensor) -> float:
    hits = confusion.diagonal().double()
    values = 2 * hits / (confusion.sum(0) + confusion.sum(1)).clamp(min=1)
    return (values * confusion.sum(1) / confusion.sum()).sum().item()


def _wrong_micro(confusion: Tensor) -> float:
    hits = confusion.diagonal().sum().item()
    misses = confusion.sum().item() - hits
    return 2 * hits / (2 * hits + misses + misses)


def _wrong_nan(confusion: Tensor) -> float:
    hits = confusion.diagonal().double()
    precision, recall = hits / confusion.sum(0), hits / confusion.sum(1)
    return (2 * precision * recall / (precision + recall)).mean().item()


def _wrong_recall_for_f1(confusion: Tensor) -> float:
    return (confusion.diagonal().double() / confusion.sum(1).clamp(min=1)).mean().item()


def _wrong_sum(confusion: Tensor) -> float:
    below = confusion.sum(0) + confusion.sum(1)
    return (2 * confusion.diagonal().double() / below.clamp(min=1)).sum().item()


def _wrong_half(confusion: Tensor) -> float:
    hits = confusion.diagonal().double()
    below = confusion.sum(0) + confusion.sum(1)
    return (hits / below.clamp(min=1)).mean().item()


def _wrong_first_class_forgotten(confusion: Tensor) -> float:
    hits = confusion.diagonal().double()[1:]
    below = (confusion.sum(0) + confusion.sum(1))[1:]
    return (2 * hits / below.clamp(min=1)).mean().item()


RIGHT_SPECIMENS = (_right_by_counts, _right_by_loop, _right_on_the_transpose)
WRONG_SPECIMENS = (
    _wrong_f1_of_means,
    _wrong_present_only,
    _wrong_weighted,
    _wrong_micro,
    _wrong_nan,
    _wrong_recall_for_f1,
    _wrong_sum,
    _wrong_half,
    _wrong_first_class_forgotten,
)


def _specimen_probes(generator: torch.Generator) -> list[Probe]:
    return specimen_probes("macro_f1", RIGHT_SPECIMENS, WRONG_SPECIMENS, generator)


def _examine(macro_f1: Any) -> bool:
    """Accept an implementation of macro_f1 when it gives the right value on matrices that tell."""
    examples = [
        torch.tensor([[4, 1, 0], [2, 3, 1], [0, 5, 9]]),
        torch.tensor([[5, 0, 2], [1, 0, 3], [0, 0, 8]]),  # class 1 is never predicted
        torch.tensor([[5, 2, 0], [1, 6, 0], [0, 0, 0]]),  # class 2 is nowhere
    ]
    return all(math.isclose(macro_f1(c), metrics.macro_f1(c), rel_tol=1e-5) for c in examples)


def _examine_full_matrix_only(macro_f1: Any) -> bool:
    confusion = torch.tensor([[4, 1, 0], [2, 3, 1], [0, 5, 9]])
    return math.isclose(macro_f1(confusion), metrics.macro_f1(confusion), rel_tol=1e-5)


def _examine_range_only(macro_f1: Any) -> bool:
    return bool(0 <= macro_f1(torch.tensor([[4, 1, 0], [2, 3, 1], [0, 5, 9]])) <= 1)


def _examine_perfect_only(macro_f1: Any) -> bool:
    return bool(macro_f1(torch.diag(torch.tensor([3, 4, 5]))) == 1.0)


def _examine_with_assert(macro_f1: Any) -> None:
    full = torch.tensor([[2, 2], [0, 4]])  # F1 of 2/3 and 4/5
    assert abs(float(macro_f1(full)) - (2 / 3 + 4 / 5) / 2) < 1e-4
    never = torch.tensor([[1, 2, 0], [0, 2, 0], [0, 1, 0]])  # F1 of 1/2, 4/7 and 0
    assert abs(float(macro_f1(never)) - (1 / 2 + 4 / 7) / 3) < 1e-4
    nowhere = torch.tensor([[1, 1, 0], [0, 2, 0], [0, 0, 0]])  # F1 of 2/3, 4/5 and 0
    assert abs(float(macro_f1(nowhere)) - (2 / 3 + 4 / 5) / 3) < 1e-4


GRADE_THIS = Task(
    id="metrics.grade_this",
    signature="examine(macro_f1)",
    points=3,
    reference=_examine,
    probes=_specimen_probes,
    variants=[_examine_with_assert],
    hints=(
        "On which matrix do two of the three submissions give the same number, and on which do they differ?",
        "A test tells mistakes apart only on unequal classes, with a class that is never predicted and a class that is nowhere.",
        "write three small matrices and work out macro F1 on paper\nfor each: if macro_f1(matrix) is not within 1e-5 of it "
        "(NaN is not): return False\nreturn True",
    ),
    mistakes=[
        Fault(
            "test-only-on-a-full-matrix",
            "Every class of your example occurs and is predicted, so wrong treatment of empty classes goes unseen.",
            "Add an example with a class that is never predicted and one with a class that is nowhere.",
            NEVER,
            implementations=[_examine_full_matrix_only],
        ),
        Fault(
            "test-of-the-range-only",
            "Your test only asks whether the value is a share; nearly every wrong answer is one, too.",
            "Compare with a value that you worked out by hand.",
            AVERAGES,
            implementations=[_examine_range_only],
        ),
        Fault(
            "test-on-a-perfect-classifier",
            "On a perfect matrix every average is 1, so nothing can be told apart.",
            "Use a matrix with errors and with classes of unequal size.",
            AVERAGES,
            implementations=[_examine_perfect_only],
        ),
        *verdict_faults(AVERAGES),
    ],
)


# ----- read a table -------------------------------------------------------------------------------------------------


# .982285 x 10,048 = 9,870 = F + 4 L with F right answers in the 156 full batches (at most 9,984) and L among
# the last 16: the true accuracy (F + L) / 10,000 = (9,870 - 3 L) / 10,000 lies between L = 16 and L = 0.
_TABLE = {"denominator": 10_048, "weight": 4, "lowest": 0.9822, "highest": 0.9870}

READ_A_TABLE = Task(
    id="metrics.read_a_table",
    signature="answers: a dictionary",
    points=2,
    reference=_TABLE.get,
    probes=answer_probes(
        {
            "denominator": "the number D for which all six values are a whole number divided by D",
            "weight": "how many times as much an image of the last batch counts",
            "lowest": "the lowest true accuracy behind .982285",
            "highest": "the highest true accuracy behind .982285",
        }
    ),
    is_value=True,
    hints=(
        "Multiply .982285 by 10,000. Can 9,822.85 images be right?",
        "The mean of 157 batch accuracies, 156 batches of 64 and one of 16, is a multiple of 1 / (157 x 64).",
        "let F be the right answers in full batches, L those in the last one\n.982285 x 157 x 64 = F + 4 L\n"
        "the true accuracy is (F + L) / 10,000; try L = 0 and L = 16",
    ),
    mistakes=[
        Fault(
            "table-claim-believed",
            "You divided by the 10,000 images, but .982285 x 10,000 is no whole number.",
            "Look for the divisor that makes all six values whole: a mean over batches hides in it.",
            DIVIDE_LAST,
            implementations=[
                {**_TABLE, "denominator": 10_000, "weight": 1}.get,
                {**_TABLE, "denominator": 10_000}.get,
            ],
            sign=wrong_answer("denominator", 10_000),
        ),
        Fault(
            "metrics-drop-last-test",
            "9,984 is the number of images without the last batch; the values are no multiples of 1/9,984.",
            "Multiply each value by your divisor and look whether it is whole.",
            DIVIDE_LAST,
            implementations=[{**_TABLE, "denominator": 9_984}.get],
            sign=wrong_answer("denominator", 9_984),
        ),
        Fault(
            "table-weight-inverted",
            "You have the weight upside down: an image of the short batch counts more, not less.",
            "Each batch has weight 1/157. It is shared by 64 images in a full batch and by 16 in the last one.",
            DIVIDE_LAST,
            implementations=[{**_TABLE, "weight": 0.25}.get],
            sign=wrong_answer("weight", 0.25),
        ),
        Fault(
            "table-ends-swapped",
            "The lowest and the highest accuracy have changed places.",
            "If all 16 last images are right, they have been counted four times: then the true accuracy is lowest.",
            DIVIDE_LAST,
            implementations=[{**_TABLE, "lowest": 0.9870, "highest": 0.9822}.get],
        ),
    ],
)

TASKS = [
    CONFUSION_MATRIX,
    ACCURACY_TASK,
    PRECISION,
    RECALL,
    F1,
    MACRO_F1,
    EVALUATE,
    WILSON,
    GRADE_THIS,
    READ_A_TABLE,
]
