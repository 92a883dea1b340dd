"""The chapter's tools for an honest choice, against Optuna, brute force and simulation."""

import itertools
import math

import optuna
import pytest
import torch
from scipy import stats

from dianlib import search
from dianlib.checks.running import AskedTrial
from dianlib.mlp import MLP

optuna.logging.set_verbosity(optuna.logging.WARNING)


# ----- search_space ---------------------------------------------------------------------------------------


def test_the_space_runs_in_a_study_and_every_setting_that_is_used_was_recorded() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(40):
        trial = study.ask()
        settings = search.search_space(trial)
        depth = trial.params["n_layers"]
        widths = [trial.params[f"width_{layer}"] for layer in range(1, depth + 1)]
        assert settings == {
            "hidden": widths,
            "lr": trial.params["lr"],
            "batch_size": trial.params["batch_size"],
        }
        assert len(trial.params) == 3 + depth  # nothing that is not used
        MLP([4, *settings["hidden"], 2])
        study.tell(trial, 0.0)
    depths = [trial.params["n_layers"] for trial in study.trials]
    assert set(depths) == {1, 2, 3, 4}
    rates = sorted(trial.params["lr"] for trial in study.trials)
    assert 1e-4 <= rates[0] < 3e-4
    assert 3e-2 < rates[-1] <= 1e-1
    assert 1e-3 < rates[20] < 1e-2  # the middle of a logarithmic range, not of an even one


def test_the_checks_trial_asks_like_optunas() -> None:
    """What a recording trial answers and notes is what Optuna's own trial gives for the same parameters."""
    ours = AskedTrial({"n_layers": 0.6, "width_1": 0.1, "width_2": 0.9, "width_3": 0.5, "lr": 0.25})
    settings = search.search_space(ours)
    assert settings["hidden"] == [32, 256, 128]
    assert settings["lr"] == pytest.approx(1e-4 * 1000**0.25)
    theirs = optuna.trial.FixedTrial(ours.params)
    assert search.search_space(theirs) == settings
    ranges = theirs.distributions
    asked = ours.asked()
    assert asked["number of settings asked for"] == len(ranges) == 6
    assert (asked["lowest of 'lr'"], asked["highest of 'lr'"]) == (ranges["lr"].low, ranges["lr"].high)
    assert asked["log scale of 'lr'"] is ranges["lr"].log is True
    assert tuple(asked[f"choice {i} of 'width_1'"] for i in range(4)) == ranges["width_1"].choices


@pytest.mark.parametrize("drawn", [0.0, 0.2, 0.5, 0.999, 1.0])
def test_the_checks_trial_stays_in_its_ranges(drawn: float) -> None:
    trial = AskedTrial(dict.fromkeys("abcdef", drawn))
    assert 3 <= trial.suggest_int("a", 3, 9) <= 9
    assert trial.suggest_int("b", 3, 10, step=2) in (3, 5, 7, 9)
    assert 2 <= trial.suggest_int("c", 2, 64, log=True) <= 64
    assert -1 <= trial.suggest_float("d", -1, 1) <= 1
    assert trial.suggest_float("e", 0, 1, step=0.25) in (0, 0.25, 0.5, 0.75, 1)
    assert trial.suggest_categorical("f", "xyz") in "xyz"
    assert trial.suggest_categorical("f", "xyz") == trial.params["f"]
    with pytest.raises(ValueError, match="asked for 'a' twice"):
        trial.suggest_int("a", 3, 10)


# ----- set_of_depths --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "n_in", "n_out"), [(136_074, 784, 10), (20_000, 64, 10), (60, 3, 2)])
def test_networks_of_all_depths_use_the_budget_and_no_more(budget: int, n_in: int, n_out: int) -> None:
    def count(sizes: list[int]) -> int:
        return sum(parameter.numel() for parameter in MLP(sizes).parameters())

    networks = search.set_of_depths([1, 2, 6], budget, n_in, n_out)
    assert [len(sizes) - 2 for sizes in networks] == [1, 2, 6]
    for sizes in networks:
        assert (sizes[0], sizes[-1]) == (n_in, n_out)
        assert len(set(sizes[1:-1])) == 1
        assert count(sizes) == search.n_parameters(sizes) <= budget
        wider = [n_in, *[width + 1 for width in sizes[1:-1]], n_out]
        assert count(wider) > budget


def test_a_budget_that_is_met_exactly_is_used_and_one_that_is_too_small_is_refused() -> None:
    exact = search.n_parameters([5, 7, 7, 3])
    assert search.set_of_depths([2], exact, 5, 3) == [[5, 7, 7, 3]]
    assert search.set_of_depths([2], exact - 1, 5, 3) == [[5, 6, 6, 3]]
    with pytest.raises(ValueError, match="10 parameters are too few for 2 hidden layers"):
        search.set_of_depths([2], 10, 5, 3)


# ----- choose ---------------------------------------------------------------------------------------------


def result(validation: list[float], parameters: int = 100) -> dict[str, object]:
    return {"validation": validation, "parameters": parameters, "test": None}


def test_choose_looks_at_validation_means_only() -> None:
    results = [result([0.8, 0.99]), result([0.9, 0.91]), result([0.7, 0.7])]
    assert search.choose(results) == 1  # and None in "test" shows that nobody looked
    assert search.choose(results[::-1]) == 1


def test_choose_breaks_ties_by_size_and_then_by_order() -> None:
    assert search.choose([result([0.5, 0.75], 30), result([0.75, 0.5], 20), result([0.5, 0.5], 1)]) == 1
    assert search.choose([result([0.5], 20), result([0.5], 20)]) == 0


def test_choose_leaves_out_what_diverged() -> None:
    nan = math.nan
    assert search.choose([result([nan, 0.9]), result([0.1, 0.2]), result([0.9, nan])]) == 1
    with pytest.raises(ValueError, match="every candidate"):
        search.choose([result([nan]), result([0.5, nan])])
    with pytest.raises(ValueError, match="every candidate"):
        search.choose([])


# ----- paired_interval ------------------------------------------------------------------------------------


def draw_pair(seed: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw two networks that are often wrong on the same images; the first is right 2 % more often."""
    drawn = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    noise = torch.rand(2, n, generator=torch.Generator().manual_seed(seed + 10_000))
    return (drawn > 0.1) & (noise[0] > 0.02), (drawn > 0.1) & (noise[1] > 0.04222)


def test_the_paired_interval_equals_scipys() -> None:
    first, second = draw_pair(0, 500)
    d = (first.double() - second.double()).numpy()
    low, high = search.paired_interval(first, second)
    wanted = stats.norm.interval(0.95, loc=d.mean(), scale=d.std() / math.sqrt(500))
    assert (low, high) == pytest.approx(wanted, rel=1e-4)
    b, c = int((first & ~second).sum()), int((~first & second).sum())
    assert (low + high) / 2 == pytest.approx((b - c) / 500)
    mirrored = search.paired_interval(second, first)
    assert mirrored == pytest.approx((-high, -low))


def test_the_paired_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    intervals = [search.paired_interval(*draw_pair(seed, 1000)) for seed in range(400)]
    truth = 0.9 * (0.98 - (1 - 0.04222))
    covered = sum(low <= truth <= high for low, high in intervals) / 400
    assert 0.92 < covered < 0.98


def test_the_paired_interval_is_narrower_than_that_of_two_samples_when_errors_are_shared() -> None:
    first, second = draw_pair(3, 2000)
    low, high = search.paired_interval(first, second)
    p, q = first.double().mean().item(), second.double().mean().item()
    unpaired = 2 * 1.96 * math.sqrt((p * (1 - p) + q * (1 - q)) / 2000)
    assert high - low < 0.8 * unpaired
    assert search.paired_interval(first, first) == (0, 0)


def test_the_paired_interval_refuses_unequal_answers() -> None:
    for sizes in ((2, 3), (0, 0)):
        with pytest.raises(ValueError, match="the same images"):
            search.paired_interval(*(torch.ones(size, dtype=torch.bool) for size in sizes))


# ----- expected_best --------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_the_expected_best_is_the_mean_over_all_sets(k: int) -> None:
    values = torch.rand(8, generator=torch.Generator().manual_seed(k), dtype=torch.float64).tolist()
    sets = [max(some) for some in itertools.combinations(values, k)]
    assert search.expected_best(values, k) == pytest.approx(sum(sets) / len(sets), rel=1e-12)


def test_the_expected_best_of_many_values_does_not_overflow() -> None:
    values = [index / 1000 for index in range(1, 1001)]
    # The mean of the largest of k numbers drawn without repeats from 1 .. n is k (n + 1) / (k + 1).
    assert search.expected_best(values, 500) == pytest.approx(500 * 1001 / 501 / 1000)


@pytest.mark.parametrize("k", [0, 4])
def test_the_expected_best_refuses_sets_that_do_not_exist(k: int) -> None:
    with pytest.raises(ValueError, match="k must be from 1 to the number of values, 3"):
        search.expected_best([0.1, 0.2, 0.3], k)


# ----- audit_table ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch_size"), [(10_000, 64), (10_000, 32), (1000, 72), (997, 100), (50, 64)])
def test_the_audit_recognises_how_a_table_was_computed(n: int, batch_size: int) -> None:
    generator = torch.Generator().manual_seed(n + batch_size)
    tables: dict[str, list[float]] = {"images": [], "batch means": [], "last batch dropped": []}
    for _ in range(6):
        right = (torch.rand(n, generator=generator) > 0.05).double()
        batches = right.split(batch_size)
        full = [batch for batch in batches if len(batch) == batch_size]
        tables["images"].append(right.mean().item())
        tables["batch means"].append(sum(batch.mean().item() for batch in batches) / len(batches))
        if full:
            tables["last batch dropped"].append(torch.cat(full).mean().item())
    for way, values in tables.items():
        if values:
            assert search.audit_table([round(value, 6) for value in values], n, batch_size)[way]
    if n == 10_000:  # six values with six digits leave one way only
        for way, values in tables.items():
            found = search.audit_table([round(value, 6) for value in values], n, batch_size)
            assert [name for name, fits in found.items() if fits] == [way]


def test_the_audit_of_the_case() -> None:
    depths = [0.976612, 0.978304, 0.978304, 0.978901, 0.982285, 0.978404]
    only_means = {"images": False, "batch means": True, "last batch dropped": False}
    assert search.audit_table(depths, 10_000, 64) == only_means
    assert search.audit_table([0.979932], 10_000, 32) == only_means


def test_the_audit_with_few_digits_says_nothing_and_even_batches_are_all_the_same() -> None:
    assert all(search.audit_table([0.978, 0.982], 10_000, 64, decimals=3).values())
    assert set(search.audit_table([0.9123, 0.5], 100, 10, decimals=4).values()) == {False}
    assert set(search.audit_table([0.91, 0.5], 100, 10, decimals=2).values()) == {True}
