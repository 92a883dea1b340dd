"""Choose a network honestly: what may vary, what may be looked at, and what a difference is worth.

A trial is one training run with settings of its own. It is asked for its settings, as in
Optuna: ``trial.suggest_float("lr", 1e-4, 1e-1, log=True)`` returns a number and notes its name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:  # the functions below work with any object that can be asked like a trial
    from optuna.trial import BaseTrial


def search_space(trial: BaseTrial) -> dict[str, Any]:
    """Ask a trial for the settings of a network, and return what the training is to use.

    The number of hidden layers comes first, and a layer that does not exist is not asked
    for its width. A learning rate is searched on a logarithmic scale. The result has the
    keys "hidden" (a list of widths), "lr" and "batch_size".
    """
    n_layers = trial.suggest_int("n_layers", 1, 4)
    hidden = [
        trial.suggest_categorical(f"width_{layer}", [32, 64, 128, 256]) for layer in range(1, n_layers + 1)
    ]
    lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
    batch_size = trial.suggest_categorical("batch_size", [32, 64, 128, 256])
    return {"hidden": hidden, "lr": lr, "batch_size": batch_size}


def n_parameters(sizes: Sequence[int]) -> int:
    """Count the weights and biases of a chain of linear layers."""
    return sum(n_in * n_out + n_out for n_in, n_out in pairwise(sizes))


def set_of_depths(depths: Sequence[int], budget: int, n_in: int, n_out: int) -> list[list[int]]:
    """Return the sizes of one network for each depth, all with about ``budget`` parameters.

    A network of depth d has d hidden layers of one width, the largest with which it has at
    most ``budget`` parameters. Raises ValueError when not even a width of 1 fits.
    """
    found = []
    for depth in depths:
        width = 0
        while n_parameters([n_in, *[width + 1] * depth, n_out]) <= budget:
            width += 1
        if width == 0:
            raise ValueError(f"{budget} parameters are too few for {depth} hidden layers.")
        found.append([n_in, *[width] * depth, n_out])
    return found


def choose(results: Sequence[Mapping[str, Any]]) -> int:
    """Return the index of the candidate to keep, looking at validation accuracies only.

    Each result has "validation", one accuracy for each seed, and "parameters", a count.
    The highest mean wins, and of equal means the fewest parameters, then the first. A
    candidate with a run that is not a number is out. Raises ValueError when all are.
    """
    best, best_key = None, (-math.inf, 0)
    for index, result in enumerate(results):
        accuracies = result["validation"]
        mean = math.fsum(accuracies) / len(accuracies)
        key = (mean, -result["parameters"])
        # A comparison with NaN is False, so a run that diverged never wins.
        if not math.isnan(mean) and key > best_key:
            best, best_key = index, key
    if best is None:
        raise ValueError("every candidate has a run that is not a number.")
    return best


def paired_interval(first: Tensor, second: Tensor, z: float = 1.96) -> tuple[float, float]:
    """Return the interval (low, high) for accuracy of the first minus that of the second.

    ``first`` and ``second`` say of the same N images whether each network is right: (N,)
    bool. An image on which both are right, or both wrong, says nothing about the
    difference. The differences d (+1, 0 or -1) have mean m and variance mean(d^2) - m^2;
    the interval is m -+ z sqrt(variance / N). Raises ValueError for unequal shapes.
    """
    if first.shape != second.shape or len(first) == 0:
        raise ValueError("both networks need an answer for each of the same images, one at least.")
    differences = first.double() - second.double()
    mean = differences.mean().item()
    variance = differences.square().mean().item() - mean**2
    half_width = z * math.sqrt(max(variance, 0.0) / len(differences))
    return mean - half_width, mean + half_width


def expected_best(values: Sequence[float], k: int) -> float:
    """Return the mean, over all sets of k of the n values, of the largest in the set.

    It is what a search of k random trials finds on average, told from n trials without
    running more. The i-th smallest value is the largest of comb(i - 1, k - 1) of the
    comb(n, k) sets. (Dodge et al. 2019, EMNLP, 2185-2194, draw with replacement.) Raises
    ValueError unless 1 <= k <= n.
    """
    n = len(values)
    if not 1 <= k <= n:
        raise ValueError(f"k must be from 1 to the number of values, {n}, not {k}.")
    weights = (math.comb(i - 1, k - 1) for i in range(1, n + 1))
    total = math.fsum(weight * value for weight, value in zip(weights, sorted(values), strict=True))
    return total / math.comb(n, k)


def audit_table(
    values: Sequence[float], n_images: int, batch_size: int, decimals: int = 6
) -> dict[str, bool]:
    """Say which ways of computing an accuracy can have given all the printed values.

    - "images": right answers divided by ``n_images``;
    - "batch means": the plain mean of the accuracies of all batches, the short one too;
    - "last batch dropped": right answers in full batches divided by the images in them.

    Each gives whole multiples of 1 / D for some D. A value rounded to ``decimals`` places
    fits if a whole number divided by D lies within half of the last place.
    """
    n_full, rest = divmod(n_images, batch_size)
    # The accuracies of full batches are multiples of 1 / batch_size, that of a short one
    # of 1 / rest, so their sum is one of 1 / lcm, the least number that both divide.
    sizes = [batch_size] * n_full + [rest] * (rest > 0)
    denominators = {
        "images": n_images,
        "batch means": len(sizes) * math.lcm(*sizes),
        "last batch dropped": n_full * batch_size,
    }
    return {
        name: all(_fits(value, denominator, decimals) for value in values)
        for name, denominator in denominators.items()
    }


def _fits(value: float, denominator: int, decimals: int) -> bool:
    nearest = round(value * denominator) / denominator if denominator else math.nan
    # A hair more than one half: 0.0005 may be stored as a little more or less.
    return abs(nearest - value) <= 0.5000001 * 10.0**-decimals
