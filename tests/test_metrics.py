"""The measures of a classifier against scikit-learn, and by their properties."""

import math

import pytest
import torch
from scipy import stats
from sklearn import metrics as sk
from torch import Tensor, nn

from dianlib import metrics
from dianlib.data import Batches

SEEDS = range(20)


def draw(seed: int, n_classes: int = 6) -> tuple[Tensor, Tensor]:
    """Draw predictions and targets; some classes never occur, some are never predicted."""
    generator = torch.Generator().manual_seed(seed)
    used = torch.randint(n_classes, (2, 4), generator=generator)
    picks = torch.randint(4, (2, 50), generator=generator)
    return used[0][picks[0]], used[1][picks[1]]


@pytest.mark.parametrize("seed", SEEDS)
def test_equals_scikit_learn(seed: int) -> None:
    predictions, targets = draw(seed)
    confusion = metrics.confusion_matrix(predictions, targets, 6)
    labels = list(range(6))
    assert confusion.dtype == torch.int64
    assert confusion.tolist() == sk.confusion_matrix(targets, predictions, labels=labels).tolist()
    assert metrics.accuracy(confusion) == pytest.approx(sk.accuracy_score(targets, predictions))
    p, r, f, _ = sk.precision_recall_fscore_support(targets, predictions, labels=labels, zero_division=0)
    assert metrics.precision(confusion).tolist() == pytest.approx(p)
    assert metrics.recall(confusion).tolist() == pytest.approx(r)
    assert metrics.f1(confusion).tolist() == pytest.approx(f)
    macro = sk.f1_score(targets, predictions, labels=labels, average="macro", zero_division=0)
    weighted = sk.f1_score(targets, predictions, labels=labels, average="weighted", zero_division=0)
    assert metrics.macro_f1(confusion) == pytest.approx(macro)
    assert metrics.weighted_f1(confusion) == pytest.approx(weighted)


@pytest.mark.parametrize("seed", SEEDS)
def test_properties(seed: int) -> None:
    predictions, targets = draw(seed)
    confusion = metrics.confusion_matrix(predictions, targets, 6)
    first = metrics.confusion_matrix(predictions[:17], targets[:17], 6)
    rest = metrics.confusion_matrix(predictions[17:], targets[17:], 6)
    assert torch.equal(first + rest, confusion)
    assert torch.equal(metrics.confusion_matrix(targets, predictions, 6), confusion.T)
    assert torch.equal(metrics.precision(confusion), metrics.recall(confusion.T))
    assert torch.equal(metrics.f1(confusion), metrics.f1(confusion.T))
    p, r, f = metrics.precision(confusion), metrics.recall(confusion), metrics.f1(confusion)
    assert bool(((f >= torch.minimum(p, r) - 1e-12) & (f <= torch.maximum(p, r) + 1e-12)).all())
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    assert metrics.macro_f1(confusion[order][:, order]) == pytest.approx(metrics.macro_f1(confusion))


def test_refuses_what_it_cannot_count() -> None:
    with pytest.raises(ValueError, match="one prediction for each target"):
        metrics.confusion_matrix(torch.zeros(3), torch.zeros(4), 2)
    with pytest.raises(ValueError, match="prediction 2 is outside the classes 0 to 1"):
        metrics.confusion_matrix(torch.tensor([2]), torch.tensor([0]), 2)
    with pytest.raises(ValueError, match="target -1 is outside"):
        metrics.confusion_matrix(torch.tensor([0]), torch.tensor([-1]), 2)
    assert math.isnan(metrics.accuracy(torch.zeros(2, 2, dtype=torch.int64)))


@pytest.mark.parametrize("batch_size", [1, 7, 16, 50])
def test_evaluate_does_not_depend_on_the_batches(batch_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 4, generator=generator), torch.randint(3, (50,), generator=generator)
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).train()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(3, 4, generator=generator))
    got = metrics.evaluate(model, Batches(x, y, batch_size=batch_size), 3)
    predictions = model.eval()(x).argmax(1)
    p, r, f, _ = sk.precision_recall_fscore_support(y, predictions, average="macro", zero_division=0)
    wanted = {"accuracy": sk.accuracy_score(y, predictions), "precision": p, "recall": r, "f1": f}
    assert got == pytest.approx(wanted)


def test_evaluate_gives_the_model_its_mode_back_and_refuses_an_empty_set() -> None:
    model = nn.Linear(2, 2)
    data = [(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))]
    for training in (True, False):
        metrics.evaluate(model.train(training), data, 2)
        assert model.training is training
    with pytest.raises(ValueError, match="no sample to measure"):
        metrics.evaluate(model, iter([]), 2)


@pytest.mark.parametrize(("k", "n"), [(0, 20), (20, 20), (1, 3), (952, 1000), (9823, 10_000)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_equals_scipy_and_solves_its_equation(k: int, n: int, confidence: float) -> None:
    z = float(stats.norm.ppf((1 + confidence) / 2))
    low, high = metrics.wilson_interval(k, n, z)
    wanted = stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert (low, high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    for end in (low, high):
        assert (k / n - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / n, abs=1e-12)
    assert 0 <= low < high <= 1
    assert (low == 0) is (k == 0)
    assert (high == 1) is (k == n)


@pytest.mark.parametrize(("k", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(k: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"cannot be {k} right answers among {n}"):
        metrics.wilson_interval(k, n)
