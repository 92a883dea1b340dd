"""Tasks of the chapter "Choosing a network": right answers, and the wrong ones that are known."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dianlib import search
from dianlib.checks.kinds import answer_probes, known_answer, specimen_probes, verdict_faults
from dianlib.checks.running import Data, Outcome, Probe, Trial
from dianlib.checks.task import Fault, Task

DIGITS = "search: What do the digits of a table say?"
LUCK = "search: How large is luck?"
ONCE = "search: Why is the test set looked at once?"
DEPTH = "search: One thing at a time: depth"
BATCH = "search: Is a small batch better?"
SPACE = "search: What is a search space?"
RANDOM = "search: Random search, and what TPE adds"
MATTERS = "search: Which setting matters?"
CASE = "search: The case, solved"


def _integer(generator: torch.Generator, low: int, high: int) -> int:
    """Draw a whole number from low to high - 1."""
    return int(torch.randint(low, high, (1,), generator=generator))


# ----- search_space -----------------------------------------------------------------------------------------


def _space_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, n_layers: int, core: bool = False) -> Probe:
        first = _integer(generator, 0, 4)
        # Neighbouring layers get other widths, and the middle answer is left out: it is that of unknown names.
        steps = [(first + layer * (1 + 2 * (layer % 2))) % 4 for layer in range(4)]
        draws = {f"width_{layer}": (step + 0.5) / 4 for layer, step in enumerate(steps, 1)}
        draws |= {"n_layers": (n_layers - 0.5) / 4, "lr": _integer(generator, 60, 95) / 100}
        draws |= {"batch_size": (_integer(generator, 0, 4) + 0.4) / 4}
        return Probe(name, {"trial": Trial(draws)}, core=core)

    return [
        probe("a trial with two hidden layers", 2, core=True),
        probe("a trial with four hidden layers", 4, core=True),
        probe("a trial with one hidden layer", 1),
        probe("a trial with three hidden layers", 3),
    ]


def _space_twin(
    trial: Any,
    *,
    depth: str = "first",
    widths: str = "used",
    names: str = "one each",
    lr: str = "log",
    rate_range: tuple[float, float] = (1e-4, 1e-1),
    batch: str = "choice",
) -> dict[str, Any]:
    if depth == "as a choice":
        n_layers = trial.suggest_categorical("n_layers", [1, 2, 3, 4])
    else:
        n_layers = trial.suggest_int("n_layers", 1, 4)
    used = {"ignored": 2, "one too few": n_layers - 1, "one too many": n_layers + 1}.get(depth, n_layers)

    def width(layer: int) -> Any:
        name = {"one for all": "width", "from 0": f"width_{layer - 1}"}.get(names, f"width_{layer}")
        return trial.suggest_categorical(name, [32, 64, 128, 256])

    asked = [width(layer) for layer in range(1, 1 + (4 if widths == "all asked" else used))]
    hidden = [128] * used if widths == "never used" else asked[:used]
    if widths == "defaults used":
        hidden = [128, 256]
    low, high = rate_range
    if lr == "as an exponent":
        rate = 10 ** trial.suggest_float("lr", math.log10(low), math.log10(high))
    else:
        rate = trial.suggest_float("lr", low, high, log=lr != "even")
    rate = 1e-3 if lr == "never used" else rate
    if batch == "as a number":
        batch_size = trial.suggest_int("batch_size", 32, 256)
    else:
        batch_size = trial.suggest_categorical("batch_size", [32, 64, 128, 256])
    return {"hidden": hidden, "lr": rate, "batch_size": 64 if batch == "never used" else batch_size}


def _space_in_a_loop(trial: Any) -> Any:
    settings = {"lr": trial.suggest_float("lr", 1e-4, 0.1, log=True)}
    choices = (32, 64, 128, 256)
    settings["batch_size"] = trial.suggest_categorical("batch_size", choices)
    settings["hidden"] = []
    depth = trial.suggest_int("n_layers", low=1, high=4)
    while len(settings["hidden"]) < depth:
        name = "width_" + str(len(settings["hidden"]) + 1)
        settings["hidden"].append(trial.suggest_categorical(name, choices))
    return settings


def _space_with_a_tuple(trial: Any) -> Any:
    n = trial.suggest_int("n_layers", 1, 4, step=1)
    widths = tuple(trial.suggest_categorical(f"width_{i + 1}", [32, 64, 128, 256]) for i in range(n))
    return {
        "hidden": widths,
        "lr": trial.suggest_float("lr", 10**-4, 10**-1, log=True),
        "batch_size": trial.suggest_categorical("batch_size", [2**k for k in range(5, 9)]),
    }


def _what_was_asked(probe: Probe, got: Outcome, wanted: Outcome) -> str:
    """Say which setting the trial was not asked for, or which range differs."""
    for name in wanted.values:
        if name.startswith("result") or name in got.values:
            continue
        setting = name.partition(" of ")[2]
        if setting and not any(other.endswith(f" of {setting}") for other in got.values):
            return f"The trial was never asked for {setting}."
    for name, value in wanted.values.items():
        question, _, setting = name.partition(" of ")
        if not setting or name.startswith("result") or got.values.get(name) == value:
            continue
        given = got.values.get(name)
        if not isinstance(given, int | float) or not math.isclose(given, value, rel_tol=1e-4):
            return f"The trial was asked for {setting} in another way: look at its {question}."
    extra = got.values.get("number of settings asked for", 0) - wanted.values["number of settings asked for"]
    return f"The trial was asked for {extra} settings too many." if extra > 0 else ""


SPACE_TASK = Task(
    id="search.search_space",
    signature="search_space(trial)",
    points=3,
    reference=search.search_space,
    accepts=[
        lambda trial: _space_twin(trial, depth="as a choice"),
        lambda trial: _space_twin(trial, lr="as an exponent"),
    ],
    probes=_space_probes,
    twin=_space_twin,
    properties=[_what_was_asked],
    forbidden=frozenset({"search_space"}),
    variants=[_space_in_a_loop, _space_with_a_tuple],
    hints=(
        "A trial says two hidden layers. Which widths does the training use, and which should be asked for?",
        "Ask for n_layers first; then for width_1 to width_<n_layers> and no further. Everything that is asked for is "
        "returned, and everything that is returned was asked for.",
        "n = trial.suggest_int(n_layers from 1 to 4)\nhidden = for each layer 1 to n: trial.suggest_categorical(its own name, "
        "the four widths)\nlr = trial.suggest_float(..., log=True); batch_size = one of the four\nreturn all three by name",
    ),
    mistakes=[
        Fault(
            "hp-space-key-mismatch",
            "The trial is asked for a setting, and the training gets another value: this setting never varies.",
            "Return the very value that the trial gave. A search over a number that nobody reads finds nothing.",
            CASE,
            settings=[
                {"widths": "defaults used"},
                {"widths": "never used"},
                {"lr": "never used"},
                {"batch": "never used"},
            ],
        ),
        Fault(
            "space-depth-never-used",
            "The number of layers is asked for, and every network has two.",
            "Ask for as many widths as n_layers says.",
            SPACE,
            settings=[{"depth": "ignored"}],
        ),
        Fault(
            "space-layer-count-off-by-one",
            "The network has one hidden layer more or fewer than n_layers says.",
            "Use range(1, n + 1), which counts from 1 to n.",
            SPACE,
            settings=[{"depth": "one too few"}, {"depth": "one too many"}],
        ),
        Fault(
            "space-unused-widths-asked",
            "Widths are asked for that the network does not have, so the sampler learns from numbers without effect.",
            "Ask for a width only if its layer exists: let the loop end at n_layers.",
            SPACE,
            settings=[{"widths": "all asked"}],
        ),
        Fault(
            "space-one-name-for-all-layers",
            'All layers are asked for under one name, "width". A trial answers the same question once: all widths are equal.',
            "Give each layer its own name: width_1, width_2, and so on.",
            SPACE,
            settings=[{"names": "one for all"}],
        ),
        Fault(
            "space-layers-counted-from-0",
            "The names of the layers begin with width_0.",
            "Begin with width_1, as the task says; names are how two studies are compared.",
            SPACE,
            settings=[{"names": "from 0"}],
        ),
        Fault(
            "space-rate-not-logarithmic",
            "The learning rate is drawn evenly from 0.0001 to 0.1, so nine of ten trials lie above 0.01.",
            "Use log=True: each factor of ten then gets a third of the trials.",
            SPACE,
            settings=[{"lr": "even"}],
        ),
        Fault(
            "space-rate-range",
            "The range of the learning rate is another one than the task asks for.",
            "Search from 1e-4 to 1e-1.",
            SPACE,
            settings=[
                {"rate_range": (1e-5, 1e-1)},
                {"rate_range": (1e-4, 1.0)},
                {"rate_range": (1e-3, 1e-1)},
            ],
        ),
        Fault(
            "space-batch-any-number",
            "The batch size is any whole number from 32 to 256, so it is seldom small.",
            "Choose among 32, 64, 128 and 256.",
            SPACE,
            settings=[{"batch": "as a number"}],
        ),
    ],
)


# ----- set_of_depths ----------------------------------------------------------------------------------------


def _depth_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, depths: list[int], budget: int, n_in: int, n_out: int, core: bool = False) -> Probe:
        args = {"depths": Data(depths), "budget": budget, "n_in": n_in, "n_out": n_out}
        return Probe(name, args, core=core)

    width = _integer(generator, 9, 20)
    exact = search.n_parameters([7, width, width, 4])
    return [
        probe(
            "one and two hidden layers, a small budget",
            [1, 2],
            _integer(generator, 180, 320),
            5,
            3,
            core=True,
        ),
        probe(
            "one to six hidden layers for scans",
            [1, 2, 3, 4, 5, 6],
            _integer(generator, 15_000, 25_000),
            64,
            10,
            core=True,
        ),
        probe("a budget that two layers use up to the last parameter", [2], exact, 7, 4),
        probe("one parameter less", [2], exact - 1, 7, 4),
        probe("a budget for a width of 1", [3, 1], search.n_parameters([6, 1, 1, 1, 2]), 6, 2),
        probe("depths in another order", [3, 1], _integer(generator, 3_000, 9_000), 20, 6),
    ]


def _depth_twin(
    depths: Sequence[int],
    budget: int,
    n_in: int,
    n_out: int,
    *,
    counted: str = "all",
    fit: str = "at most",
    hidden: str = "depth",
    family: str = "equal budgets",
) -> list[list[int]]:
    def count(sizes: list[int]) -> int:
        pairs = list(pairwise(sizes))
        if counted == "no output layer":
            pairs = pairs[:-1]
        elif counted == "one square too few":
            pairs = [*pairs[:1], *pairs[2:]] if len(pairs) > 2 else pairs
        return sum(a * b + (0 if counted == "no biases" else b) for a, b in pairs)

    def network(depth: int, width: int) -> list[int]:
        return [n_in, *[width] * (depth - 1 if hidden == "depth - 1" else depth), n_out]

    def width_of(depth: int) -> int:
        width = 1
        if len(network(depth, 1)) == 2:
            return 1
        while count(network(depth, width + 1)) <= budget:
            width += 1
        above = count(network(depth, width + 1))
        if fit == "less than" and count(network(depth, width)) == budget:
            return width - 1
        if fit == "nearest" and above - budget < budget - count(network(depth, width)):
            return width + 1
        return width + 1 if fit == "first above" else width

    if family == "one width for all":
        return [network(depth, width_of(depths[0])) for depth in depths]
    return [network(depth, width_of(depth)) for depth in depths]


def _depths_by_formula(depths: Any, budget: int, n_in: int, n_out: int) -> Any:
    # (d - 1) w^2 + (n_in + d + n_out) w + n_out <= budget, solved for w in whole numbers
    import math

    found = []
    for depth in depths:
        a, b, c = depth - 1, n_in + depth + n_out, n_out - budget
        width = -c // b if a == 0 else (math.isqrt(b * b - 4 * a * c) - b) // (2 * a)
        found.append([n_in] + depth * [width] + [n_out])
    return found


def _depths_by_counting_a_module(depths: Any, budget: int, n_in: int, n_out: int) -> Any:
    def count(depth: int, width: int) -> int:
        weights = n_in * width + (depth - 1) * width * width + width * n_out
        biases = depth * width + n_out
        return weights + biases

    networks = []
    for depth in depths:
        low, high = 1, budget
        while low < high:  # halve the range until one width is left
            middle = (low + high + 1) // 2
            low, high = (middle, high) if count(depth, middle) <= budget else (low, middle - 1)
        networks.append((n_in, *([low] * depth), n_out))
    return networks


DEPTHS_TASK = Task(
    id="search.set_of_depths",
    signature="set_of_depths(depths, budget, n_in, n_out)",
    points=3,
    reference=search.set_of_depths,
    probes=_depth_probes,
    twin=_depth_twin,
    forbidden=frozenset({"set_of_depths"}),
    variants=[_depths_by_formula, _depths_by_counting_a_module],
    hints=(
        "How many weights and biases has 64-w-w-10, written with w?",
        "Depth d has n_in w + (d - 1) w^2 + w n_out weights and d w + n_out biases. It grows with w: find the last w within the budget.",
        "for each depth:\n    width = 1\n    while the network with width + 1 has at most budget parameters: width += 1\n"
        "    append [n_in, depth times width, n_out]",
    ),
    mistakes=[
        Fault(
            "hp-depth-confounded-with-width",
            "All depths have one width, so a deeper network is a larger one too: two things change at once.",
            "Look for the width of each depth by itself, so that all have the same number of parameters.",
            DEPTH,
            settings=[{"family": "one width for all"}],
        ),
        Fault(
            "depths-biases-forgotten",
            "The biases are not counted, so the network is larger than the budget.",
            "A layer from a to b has a b weights and b biases.",
            DEPTH,
            settings=[{"counted": "no biases"}],
        ),
        Fault(
            "depths-output-layer-forgotten",
            "The last layer is not counted.",
            "Add width times n_out weights and n_out biases.",
            DEPTH,
            settings=[{"counted": "no output layer"}],
        ),
        Fault(
            "depths-square-forgotten",
            "One of the layers between two hidden layers is not counted.",
            "Between d hidden layers lie d - 1 square layers.",
            DEPTH,
            settings=[{"counted": "one square too few"}],
        ),
        Fault(
            "depths-budget-exceeded",
            "The network has more parameters than the budget allows.",
            "Stop at the last width that still fits.",
            DEPTH,
            settings=[{"fit": "nearest"}, {"fit": "first above"}],
        ),
        Fault(
            "depths-budget-not-used-up",
            "A network with exactly as many parameters as the budget is refused.",
            "At most means less or equal.",
            DEPTH,
            settings=[{"fit": "less than"}],
        ),
        Fault(
            "depths-counted-as-layers",
            "Depth counts hidden layers, and you made one fewer.",
            "A network of depth 2 has the sizes n_in, width, width, n_out.",
            DEPTH,
            settings=[{"hidden": "depth - 1"}],
        ),
    ],
)


# ----- choose ------------------------------------------------------------------------------------------------


def _result(validation: list[int], test: list[int], parameters: int) -> dict[str, Any]:
    """Make a result; accuracies are multiples of 1/1024, so that equal means are exactly equal."""
    return {
        "validation": [value / 1024 for value in validation],
        "test": [value / 1024 for value in test],
        "parameters": parameters,
    }


def _choose_probes(generator: torch.Generator) -> list[Probe]:
    def moved(rows: list[tuple[list[int], list[int], int]]) -> Data:
        """Shift all accuracies by one amount and put the candidates into another order."""
        shift = _integer(generator, 0, 20)
        order = torch.randperm(len(rows), generator=generator).tolist()
        made = [_result([v + shift for v in a], [v + shift for v in b], n) for a, b, n in rows]
        return Data([made[index] for index in order])

    def kept(rows: list[tuple[list[int], list[int], int]], first_is_nan: bool) -> Data:
        results = [_result(*row) for row in rows]
        results[0 if first_is_nan else -1]["validation"][1] = math.nan
        return Data(results)

    # The highest mean, single run, first run, last run, worst run, median and test belong to seven candidates.
    plain = [
        ([960, 964, 968], [950, 950, 951], 9_000),
        ([930, 985, 940], [955, 956, 954], 5_000),
        ([975, 945, 950], [957, 958, 959], 4_000),
        ([940, 942, 972], [958, 961, 960], 6_000),
        ([974, 940, 971], [951, 950, 949], 6_500),
        ([961, 961, 962], [970, 972, 974], 8_000),
        ([900, 905, 907], [940, 938, 936], 7_000),
    ]
    ties = [
        ([960, 970, 965], [940, 941, 942], 9_000),
        ([950, 952, 954], [980, 981, 982], 1_000),
        ([965, 960, 970], [930, 931, 932], 3_000),
        ([970, 965, 960], [955, 956, 957], 6_000),
    ]
    seeds = [
        ([930, 931, 932, 933, 934], [950, 951, 952, 953, 954], 5_000),
        ([934, 936, 938], [945, 946, 947], 5_000),
        ([940, 941, 942, 943], [930, 931, 932, 933], 5_000),
    ]
    # Without its lost run the first candidate would win in one table, and not in the other.
    lost_and_good = [
        ([990, 985, 995], [990, 985, 995], 2_000),
        ([960, 950, 955], [940, 950, 945], 3_000),
        ([940, 941, 942], [955, 956, 957], 4_000),
    ]
    lost_and_bad = [([900, 905, 910], [900, 901, 902], 2_000), *lost_and_good[1:]]
    same = [([950, 960], [940, 941], 4_000), ([960, 950], [950, 951], 4_000), ([900, 901], [970, 971], 100)]
    return [
        Probe("seven candidates, three seeds each", {"results": moved(plain)}, core=True),
        Probe("seven candidates, in another order", {"results": moved(plain)}, core=True),
        Probe("three candidates with the same mean", {"results": moved(ties)}),
        Probe("candidates with three, four and five seeds", {"results": moved(seeds)}),
        Probe("the first candidate has a run that diverged", {"results": kept(lost_and_bad, True)}),
        Probe("the last candidate has a run that diverged", {"results": kept(lost_and_good[::-1], False)}),
        Probe(
            "two candidates with the same mean and size", {"results": Data([_result(*row) for row in same])}
        ),
    ]


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return (ordered[len(ordered) // 2] + ordered[(len(ordered) - 1) // 2]) / 2


_SUMMARIES: dict[str, Callable[[list[float]], float]] = {
    "mean": lambda values: math.fsum(values) / len(values),
    "best run": max,
    "first run": lambda values: values[0],
    "last run": lambda values: values[-1],
    "worst run": min,
    "sum": math.fsum,
    "median": _median,
}


def _choose_twin(
    results: Sequence[Mapping[str, Any]],
    *,
    part: str = "validation",
    summary: str = "mean",
    best: str = "highest",
    ties: str = "smallest",
    diverged: str = "out",
) -> int:
    def score(result: Mapping[str, Any]) -> float:
        values = list(result["validation"] if part != "test" else result["test"])
        if part == "both":
            values = [(v + t) / 2 for v, t in zip(values, result["test"], strict=True)]
        if diverged == "run left out":
            values = [value for value in values if not math.isnan(value)]
        if any(math.isnan(value) for value in values):
            return math.nan
        return _SUMMARIES[summary](values)

    sign = 1 if best == "highest" else -1
    scores = [sign * score(result) for result in results]
    chosen = 0
    if diverged == "wins" and any(map(math.isnan, scores)):
        return next(index for index, value in enumerate(scores) if math.isnan(value))
    for index, value in enumerate(scores):
        size, size_so_far = results[index]["parameters"], results[chosen]["parameters"]
        if (diverged == "out" and math.isnan(scores[chosen])) or value > scores[chosen]:
            chosen = index
        elif value == scores[chosen] and index != chosen:
            smaller, larger = size < size_so_far, size > size_so_far
            if (ties == "smallest" and smaller) or (ties == "largest" and larger) or ties == "last":
                chosen = index
    return chosen


def _choose_by_sorting(results: Any) -> int:
    def key(index: int) -> tuple[bool, float, int, int]:
        values = results[index]["validation"]
        mean = sum(values) / len(values)
        return (mean != mean, -mean, results[index]["parameters"], index)

    return min(range(len(results)), key=key)


def _choose_with_tensors(results: Any) -> Any:
    means = torch.tensor([torch.tensor(r["validation"]).mean().item() for r in results])
    means = means.nan_to_num(nan=-1.0)
    winners = (means == means.max()).nonzero().flatten()
    sizes = torch.tensor([results[i]["parameters"] for i in winners])
    return winners[sizes == sizes.min()][0]


CHOOSE_TASK = Task(
    id="search.choose",
    signature="choose(results)",
    points=3,
    reference=search.choose,
    probes=_choose_probes,
    twin=_choose_twin,
    forbidden=frozenset({"choose"}),
    variants=[_choose_by_sorting, _choose_with_tensors],
    hints=(
        "Which of the numbers in a result may you look at before the choice is made?",
        "The mean of the validation runs decides. Equal means: fewer parameters. A mean that is not a number is equal to "
        "nothing, and every comparison with it is False.",
        "best = None\nfor each index and result:\n    mean = sum of validation / number of runs; not a number: go on\n"
        "    better if there is no best yet, or mean is higher, or it is equal and parameters are fewer\nreturn the index of best",
    ),
    mistakes=[
        Fault(
            "hp-test-set-as-objective",
            "You chose with the exam: the test accuracies decide, alone or together with the others.",
            "Look at validation accuracies only. The test set tells the truth once, about the network that was chosen.",
            ONCE,
            settings=[{"part": "test"}, {"part": "both"}],
        ),
        Fault(
            "hp-single-run-differences",
            "One run of each candidate decides: its best, its worst, its first or its last. That rewards luck.",
            "Compare the means over all seeds.",
            LUCK,
            settings=[
                {"summary": "best run"},
                {"summary": "first run"},
                {"summary": "last run"},
                {"summary": "worst run"},
            ],
        ),
        Fault(
            "choose-sum-instead-of-mean",
            "The accuracies are added and not divided, so the candidate with the most seeds wins.",
            "Divide by the number of runs.",
            LUCK,
            settings=[{"summary": "sum"}],
        ),
        Fault(
            "choose-median",
            "The median decides; the task asks for the mean.",
            "Add the accuracies of all runs and divide by their number.",
            LUCK,
            settings=[{"summary": "median"}],
        ),
        Fault(
            "choose-lowest",
            "The lowest accuracy wins, as if it were a loss.",
            "Take the highest mean.",
            ONCE,
            settings=[{"best": "lowest"}],
        ),
        Fault(
            "choose-tie-not-by-size",
            "Of equal means the first, the last or the largest network wins.",
            "Take the one with the fewest parameters; only then the first.",
            ONCE,
            settings=[{"ties": "first"}, {"ties": "last"}, {"ties": "largest"}],
        ),
        Fault(
            "choose-diverged-run-left-out",
            "Runs that diverged are left out of the mean, so a candidate that often fails looks good.",
            "A run that is not a number is a failure of its candidate: leave the candidate out.",
            LUCK,
            settings=[{"diverged": "run left out"}],
        ),
        Fault(
            "choose-nan-wins",
            "A mean that is not a number wins: max() keeps it if it comes first, and argmax of a tensor always.",
            "Ask math.isnan(mean) before you compare.",
            LUCK,
            settings=[{"diverged": "wins"}, {"diverged": "stays first"}],
        ),
    ],
)


# ----- paired_interval --------------------------------------------------------------------------------------


def _paired_probes(generator: torch.Generator) -> list[Probe]:
    def probe(
        name: str, both: int, only_first: int, only_second: int, neither: int, *z: float, core: bool = False
    ) -> Probe:
        first = [True] * (both + only_first) + [False] * (only_second + neither)
        second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
        order = torch.randperm(len(first), generator=generator)
        args: dict[str, Any] = {"first": torch.tensor(first)[order], "second": torch.tensor(second)[order]}
        return Probe(name, args | ({"z": z[0]} if z else {}), core=core)

    return [
        probe("twelve images", 5, _integer(generator, 3, 5), 1, 2, core=True),
        probe(
            "a thousand images", 900, _integer(generator, 30, 45), _integer(generator, 10, 20), 40, core=True
        ),
        probe("the second is better", 300, 9, _integer(generator, 20, 30), 50),
        probe("both are right on the same images", 30, 0, 0, 10),
        probe("another z", 150, 20, _integer(generator, 8, 14), 30, 2.5758),
    ]


def _paired_twin(
    first: Tensor,
    second: Tensor,
    z: float = 1.96,
    *,
    spread: str = "paired",
    order: str = "first - second",
    divided: str = "by N",
    given_z: str = "used",
    ends: str = "low, high",
    freedom: int = 0,
) -> tuple[float, float]:
    a, b = first.double(), second.double()
    n, z = len(a), 1.96 if given_z == "ignored" else z
    d = (b - a) if order == "second - first" else (a - b)
    mean = d.mean().item()
    variance = max(d.square().mean().item() - mean**2, 0.0) * n / (n - freedom)
    if spread == "as if on other images":
        p, q = a.mean().item(), b.mean().item()
        variance = p * (1 - p) + q * (1 - q)
    elif spread == "around zero":
        variance = d.square().mean().item()
    elif spread == "of the disagreements":
        apart = d[d != 0]
        variance = apart.square().mean().item() - apart.mean().item() ** 2 if len(apart) else 0.0
        n = max(len(apart), 1)
    elif spread == "one accuracy only":
        p = a.mean().item()
        variance = p * (1 - p)
    half = {"by N": z * math.sqrt(variance / n), "no root": z * variance / n}.get(
        divided, z * math.sqrt(variance)
    )
    return (mean + half, mean - half) if ends == "high, low" else (mean - half, mean + half)


def _paired_by_counts(first: Tensor, second: Tensor, z: float = 1.96) -> tuple[float, float]:
    n = len(first)
    b = int((first & ~second).sum())  # only the first is right
    c = int((~first & second).sum())
    half = z / n * ((b + c) - (b - c) ** 2 / n) ** 0.5
    return (b - c) / n - half, (b - c) / n + half


def _paired_with_std(first: Tensor, second: Tensor, z: float = 1.96) -> Any:
    d = first.float() - second.float()
    half = z * d.std() / len(d) ** 0.5
    return d.mean() - half, d.mean() + half


def _paired_with_lists(first: Tensor, second: Tensor, z: float = 1.96) -> list[float]:
    d = [int(a) - int(b) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    m = sum(d) / len(d)
    s = (sum((x - m) ** 2 for x in d) / len(d)) ** 0.5
    return [m - z * s / len(d) ** 0.5, m + z * s / len(d) ** 0.5]


PAIRED_TASK = Task(
    id="search.paired_interval",
    signature="paired_interval(first, second, z=1.96)",
    points=3,
    reference=search.paired_interval,
    accepts=[lambda first, second, z=1.96: _paired_twin(first, second, z, freedom=1)],
    probes=_paired_probes,
    twin=_paired_twin,
    forbidden=frozenset({"paired_interval"}),
    variants=[_paired_by_counts, _paired_with_std, _paired_with_lists],
    hints=(
        "On how many images do the two networks differ, and what do all the others say about the difference?",
        "Give each image the number +1, 0 or -1. The difference of the accuracies is their mean, and its standard error is "
        "their standard deviation divided by the square root of N.",
        "d = first as numbers - second as numbers\nm = mean of d; s = square root of (mean of d^2 - m^2)\n"
        "return m - z s / sqrt(N), m + z s / sqrt(N)",
    ),
    mistakes=[
        Fault(
            "paired-as-if-independent",
            "The two variances are added, as if each network had seen images of its own. The interval is too wide.",
            "Both answered the same images: take the variance of the differences.",
            LUCK,
            settings=[{"spread": "as if on other images"}],
        ),
        Fault(
            "paired-variance-around-zero",
            "The mean of d^2 is used as the variance; the square of the mean is not subtracted.",
            "The variance is mean(d^2) - mean(d)^2.",
            LUCK,
            settings=[{"spread": "around zero"}],
        ),
        Fault(
            "paired-disagreements-only",
            "The spread is that of the images on which the networks differ, divided by their number.",
            "An image on which they agree counts, too, with d = 0: use all N.",
            LUCK,
            settings=[{"spread": "of the disagreements"}],
        ),
        Fault(
            "paired-one-accuracy-only",
            "The width comes from the first network alone.",
            "Take the variance of the differences.",
            LUCK,
            settings=[{"spread": "one accuracy only"}],
        ),
        Fault(
            "paired-order-swapped",
            "The difference has the wrong sign: it is second minus first.",
            "Subtract the second from the first.",
            LUCK,
            settings=[{"order": "second - first"}],
        ),
        Fault(
            "paired-not-divided",
            "The interval is that of one image: the division by the square root of N is missing.",
            "Divide the standard deviation by the square root of N.",
            LUCK,
            settings=[{"divided": "not"}],
        ),
        Fault(
            "paired-no-root",
            "The variance stands where the standard deviation belongs: the square root is missing.",
            "Take the square root of variance / N.",
            LUCK,
            settings=[{"divided": "no root"}],
        ),
        Fault(
            "paired-z-ignored",
            "The argument z is not used; the interval is always the one for 1.96.",
            "Multiply the standard error by z.",
            LUCK,
            settings=[{"given_z": "ignored"}],
            sign=lambda probe, got, wanted: "z" in probe.args and "positional argument" in got.error_text,
        ),
        Fault(
            "paired-ends-swapped",
            "The higher end comes first.",
            "Return (low, high).",
            LUCK,
            settings=[{"ends": "high, low"}],
        ),
    ],
)


# ----- expected_best ----------------------------------------------------------------------------------------


def _best_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, n: int, k: int, core: bool = False) -> Probe:
        values = (torch.rand(n, generator=generator, dtype=torch.float64) * 100).round().div(100).tolist()
        # Neither the first nor the last is the best, so that order shows.
        values[1] = 0.99
        return Probe(name, {"values": Data(values), "k": k}, core=core)

    return [
        probe("two of four trials", 4, 2, core=True),
        probe("three of nine trials", 9, 3, core=True),
        probe("one of six trials", 6, 1),
        probe("all seven trials", 7, 7),
        Probe("equal values", {"values": Data([0.5, 0.9, 0.5, 0.9, 0.7]), "k": 2}),
    ]


def _best_twin(
    values: Sequence[float],
    k: int,
    *,
    drawn: str = "without repeats",
    sorting: str = "up",
    kind: str = "expected",
    start: int = 0,
) -> float:
    n = len(values)
    if kind == "best of all":
        return max(values)
    if kind == "best of the first":
        return max(values[:k])
    if kind == "mean of the best":
        return sum(sorted(values)[-k:], 0.0) / k
    if kind == "mean":
        return sum(values, 0.0) / n
    ordered = list(values) if sorting == "not" else sorted(values, reverse=sorting == "down")
    if drawn == "with repeats":
        weights = [(i / n) ** k - ((i - 1) / n) ** k for i in range(1, n + 1)]
    else:
        weights = [math.comb(i - 1 + start, k - 1) / math.comb(n, k) for i in range(1, n + 1)]
    if drawn == "weights not divided":
        weights = [weight * math.comb(n, k) for weight in weights]
    return sum((weight * value for weight, value in zip(weights, ordered, strict=True)), 0.0)


def _best_by_trying_all_sets(values: Any, k: int) -> Any:
    from itertools import combinations

    found = [max(some) for some in combinations(values, k)]
    return sum(found) / len(found)


def _best_by_recursion(values: Any, k: int) -> Any:
    # The largest of n is in the set with probability k/n; otherwise go on with the n - 1 smaller ones.
    *smaller, largest = sorted(values)
    if k > len(smaller):
        return largest
    share = k / (len(smaller) + 1)
    return share * largest + (1 - share) * _best_by_recursion(smaller, k)


def _best_with_tensors(values: Any, k: int) -> Any:
    import math

    ordered = torch.tensor(values).sort().values
    weights = torch.tensor([float(math.comb(i, k - 1)) for i in range(len(values))])
    return (weights * ordered).sum() / weights.sum()


BEST_TASK = Task(
    id="search.expected_best",
    signature="expected_best(values, k)",
    points=3,
    reference=search.expected_best,
    probes=_best_probes,
    twin=_best_twin,
    forbidden=frozenset({"expected_best"}),
    variants=[_best_by_trying_all_sets, _best_by_recursion, _best_with_tensors],
    hints=(
        "Which sets of two of the values 1, 2, 3 and 4 have 3 as their largest?",
        "Sort. The i-th smallest of n values is the largest of a set when the other k - 1 come from the i - 1 below it.",
        "ordered = sorted(values)\nfor i from 1 to n: weight = comb(i - 1, k - 1) / comb(n, k)\nreturn the sum of weight * value",
    ),
    mistakes=[
        Fault(
            "best-of-everything",
            "You return the best of all trials, whatever k is. That is what luck gave to n trials, not to k.",
            "Average the largest value over all sets of k trials.",
            RANDOM,
            settings=[{"kind": "best of all"}],
        ),
        Fault(
            "best-of-the-first-k",
            "You look at the first k trials only: one set of many, and the order was chance.",
            "Average over all sets of k trials.",
            RANDOM,
            settings=[{"kind": "best of the first"}],
        ),
        Fault(
            "best-mean-instead",
            "You return a mean of values: of all of them, or of the k highest.",
            "Take the largest value of each set, then the mean over the sets.",
            RANDOM,
            settings=[{"kind": "mean"}, {"kind": "mean of the best"}],
        ),
        Fault(
            "best-with-repeats",
            "The same trial is drawn more than once: these weights are (i/n)^k - ((i-1)/n)^k.",
            "Draw k different trials: comb(i - 1, k - 1) / comb(n, k).",
            RANDOM,
            settings=[{"drawn": "with repeats"}],
        ),
        Fault(
            "best-not-sorted",
            "The weights belong to sorted values, and these are not, or downwards.",
            "Sort from the lowest to the highest first.",
            RANDOM,
            settings=[{"sorting": "not"}, {"sorting": "down"}],
        ),
        Fault(
            "best-count-off-by-one",
            "One value too many is counted below each value: comb(i, k - 1) in place of comb(i - 1, k - 1).",
            "Below the i-th smallest lie i - 1 values.",
            RANDOM,
            settings=[{"start": 1}],
        ),
        Fault(
            "best-weights-not-divided",
            "The weights are counts of sets; their sum is not 1.",
            "Divide by the number of all sets, comb(n, k).",
            RANDOM,
            settings=[{"drawn": "weights not divided"}],
        ),
    ],
)


# ----- audit_table ------------------------------------------------------------------------------------------


def _audit_probes(generator: torch.Generator) -> list[Probe]:
    def probe(
        name: str,
        numerators: list[int],
        denominator: int,
        n: int,
        batch: int,
        *decimals: int,
        core: bool = False,
    ) -> Probe:
        digits = decimals[0] if decimals else 6
        values = [round(number / denominator, digits) for number in numerators]
        args = {"values": Data(values), "n_images": n, "batch_size": batch}
        return Probe(name, args | ({"decimals": decimals[0]} if decimals else {}), core=core)

    def near(high: int) -> list[int]:
        """Draw four counts a little below a denominator; prime steps keep them off other denominators."""
        start = int(high * 0.97)
        return [start + 7 * _integer(generator, 0, 9) + step for step in (1, 71, 139, 211)]

    few = [number * 3 + 1 for number in range(120, 124)]
    # Counted, averaged over batches, or counted without the last batch: in another order for each seed.
    ways = [(10_000, 10_048, 9_984)[way] for way in torch.randperm(3, generator=generator).tolist()]
    return [
        probe("ten thousand images in batches of 64", near(ways[0]), ways[0], 10_000, 64, core=True),
        probe("the same images, another table", near(ways[1]), ways[1], 10_000, 64, core=True),
        probe("the same images, a third table", near(ways[2]), ways[2], 10_000, 64),
        # 10,000 = 104 x 96 + 16: the short batch divides 96; 1,000 = 13 x 72 + 64 does not.
        probe(
            "a short batch that does not divide the others", [7_930, 7_931, 7_933, 7_937], 14 * 576, 1_000, 72
        ),
        probe("batches that leave nothing over", few, 400, 400, 50),
        probe("too few digits to tell", near(10_048), 10_048, 10_000, 64, 3),
        # The first value fits everything: a quarter is a multiple of 1 / D for each D that 4 divides.
        Probe(
            "one of the values fits all",
            {"values": Data([0.75, 0.9803, 0.9811]), "n_images": 10_000, "batch_size": 64},
        ),
        # Multiples of 1/10,000 that the others miss in the sixth digit, and not in the fifth.
        probe("values that only the sixth digit tells apart", [9_380, 9_381, 9_383], 10_000, 10_000, 64),
        probe("half of the images, four digits", [4_801, 4_833, 4_847], 5_024, 5_000, 32, 4),
    ]


def _audit_twin(
    values: Sequence[float],
    n_images: int,
    batch_size: int,
    decimals: int = 6,
    *,
    means: str = "lcm",
    dropped: str = "full batches",
    tolerance: str = "half of the last place",
    every: str = "all",
    digits: str = "used",
) -> dict[str, bool]:
    decimals = 6 if digits == "ignored" else decimals
    full, rest = divmod(n_images, batch_size)
    sizes = [batch_size] * full + [rest] * (rest > 0)
    of_means = len(sizes) * math.lcm(*sizes)
    if means == "short batch as full":
        of_means = len(sizes) * batch_size
    elif means == "batches rounded down":
        of_means = full * math.lcm(*sizes)
    elif means == "number of batches only":
        of_means = len(sizes)
    of_full = {"one batch less": n_images - batch_size}.get(dropped, full * batch_size)

    def fits(value: float, denominator: int) -> bool:
        nearest = round(value * denominator)
        if tolerance == "whole product":
            return abs(value * denominator - nearest) < 1e-6
        if tolerance == "whole last place":
            return abs(nearest / denominator - value) <= 1.000001 * 10.0**-decimals
        if tolerance == "tenth of an image":
            return abs(value * denominator - nearest) < 0.1
        return abs(nearest / denominator - value) <= 0.5000001 * 10.0**-decimals

    quantifiers: dict[str, Callable[[list[bool]], bool]] = {"any": any, "first": lambda found: found[0]}
    some = quantifiers.get(every, all)
    named = {"images": n_images, "batch means": of_means, "last batch dropped": of_full}
    return {name: some([fits(value, d) for value in values]) for name, d in named.items()}


def _audit_by_rounding(values: Any, n_images: int, batch_size: int, decimals: int = 6) -> Any:
    import math

    n_batches = math.ceil(n_images / batch_size)
    rest = n_images % batch_size or batch_size
    denominators = {
        "images": n_images,
        "batch means": n_batches * batch_size * rest // math.gcd(batch_size, rest),
        "last batch dropped": n_images // batch_size * batch_size,
    }
    return {
        name: not [v for v in values if round(round(v * d) / d, decimals) != v]
        for name, d in denominators.items()
    }


def _audit_with_tensors(values: Any, n_images: int, batch_size: int, decimals: int = 6) -> Any:
    from math import lcm

    v = torch.tensor(values, dtype=torch.float64)
    full, rest = n_images // batch_size, n_images % batch_size

    def fits(denominator: int) -> Any:
        return ((v * denominator).round() / denominator - v).abs().max() < 0.500001 * 0.1**decimals

    batch_means = fits((full + 1) * lcm(batch_size, rest)) if rest else fits(n_images)
    return {"images": fits(n_images), "batch means": batch_means, "last batch dropped": fits(n_images - rest)}


AUDIT_TASK = Task(
    id="search.audit_table",
    signature="audit_table(values, n_images, batch_size, decimals=6)",
    points=3,
    reference=search.audit_table,
    probes=_audit_probes,
    twin=_audit_twin,
    forbidden=frozenset({"audit_table"}),
    variants=[_audit_by_rounding, _audit_with_tensors],
    hints=(
        "For which whole numbers k and D is .982285 the number k / D, written with six digits?",
        "Each way of computing has one D. The mean of the accuracies of all batches is a multiple of 1 / (number of batches x "
        "the least common multiple of the full and the short batch).",
        "for each D: nearest = round(value x D) / D\n    it fits if |nearest - value| is at most half of 10^-decimals\n"
        "a way fits the table if it fits every value",
    ),
    mistakes=[
        Fault(
            "audit-short-batch-as-full",
            "The short batch is treated as if its accuracy were a multiple of 1 / batch_size.",
            "Use the least common multiple of the size of a full batch and that of the short one.",
            DIGITS,
            settings=[{"means": "short batch as full"}],
        ),
        Fault(
            "audit-batches-rounded-down",
            "The short batch is not counted as a batch.",
            "The number of batches is n_images / batch_size, rounded up.",
            DIGITS,
            settings=[{"means": "batches rounded down"}],
        ),
        Fault(
            "audit-number-of-batches-only",
            "You take the number of batches as the denominator; each batch accuracy is a fraction itself.",
            "Multiply by the least common multiple of the batch sizes.",
            DIGITS,
            settings=[{"means": "number of batches only"}],
        ),
        Fault(
            "audit-one-batch-less",
            "A whole batch is subtracted from the images.",
            "Without the last batch, the images in full batches remain: n_images // batch_size x batch_size.",
            DIGITS,
            settings=[{"dropped": "one batch less"}],
        ),
        Fault(
            "audit-rounding-forgotten",
            "You ask for an exactly whole product, but the printed value was rounded.",
            "Allow half of the last printed place.",
            DIGITS,
            settings=[{"tolerance": "whole product"}],
        ),
        Fault(
            "audit-too-generous",
            "The tolerance is too wide, so that wrong denominators fit, too.",
            "A rounded value lies at most half of 10^-decimals from the exact one.",
            DIGITS,
            settings=[{"tolerance": "whole last place"}, {"tolerance": "tenth of an image"}],
        ),
        Fault(
            "audit-not-all-values",
            "One value that fits is enough for you; one that does not fit refutes the denominator.",
            "Ask whether all values fit.",
            DIGITS,
            settings=[{"every": "any"}, {"every": "first"}],
        ),
        Fault(
            "audit-decimals-ignored",
            "The argument decimals is not used.",
            "Fewer digits say less: the tolerance is half of 10^-decimals.",
            DIGITS,
            settings=[{"digits": "ignored"}],
            sign=lambda probe, got, wanted: (
                "decimals" in probe.args and "positional argument" in got.error_text
            ),
        ),
    ],
)


# ----- grade this: protocols as source text ----------------------------------------------------------------


def _right_with_loops(results: list[dict[str, list[float]]]) -> tuple[int, float]:
    chosen, highest = 0, -1.0
    for index, result in enumerate(results):
        mean = sum(result["validation"]) / len(result["validation"])
        if mean > highest:
            chosen, highest = index, mean
    test = results[chosen]["test"]
    return chosen, sum(test) / len(test)


def _right_with_max(results: list[dict[str, list[float]]]) -> tuple[int, float]:
    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    chosen = max(range(len(results)), key=lambda index: mean(results[index]["validation"]))
    return chosen, mean(results[chosen]["test"])


def _right_with_tensors(results: list[dict[str, list[float]]]) -> tuple[int, float]:
    means = torch.tensor([result["validation"] for result in results]).double().mean(dim=1)
    chosen = int(means.argmax())
    return chosen, torch.tensor(results[chosen]["test"]).double().mean().item()


def _wrong_by_test(results: list[dict[str, list[float]]]) -> tuple[int, float]:
    means = [sum(result["test"]) / len(result["test"]) for result in results]
    chosen = means.index(max(means))
    return chosen, means[chosen]


def _wrong_reports_validation(results: list[dict[str, list[float]]]) -> tuple[int, float]:
    means = [sum(result["validation"]) / len(result["validation"]) for result in results]
    chosen = means.index(max(means))
    return chosen, means[chosen]


def _wrong_reports_best_seed(results: list[dict[str, list[float]]]) -> tuple[int, float]:
    means = [sum(result["validation"]) / len(result["validation"]) for result in results]
    chosen = means.index(max(means))
    return chosen, max(results[chosen]["test"])


def _wrong_reports_best_test(results: list[dict[str, list[float]]]) -> tuple[int, float]:
    means = [sum(result["validation"]) / len(result["validation"]) for result in results]
    tests = [sum(result["test"]) / len(result["test"]) for result in results]
    return means.index(max(means)), max(tests)


def _wrong_best_validation_seed(results: list[dict[str, list[float]]]) -> tuple[int, float]:
    best = [max(result["validation"]) for result in results]
    chosen = best.index(max(best))
    return chosen, sum(results[chosen]["test"]) / len(results[chosen]["test"])


def _wrong_first_seed(results: list[dict[str, list[float]]]) -> tuple[int, float]:
    first = [result["validation"][0] for result in results]
    chosen = first.index(max(first))
    return chosen, sum(results[chosen]["test"]) / len(results[chosen]["test"])


def _wrong_both(results: list[dict[str, list[float]]]) -> tuple[int, float]:
    both = [sum(result["validation"]) + sum(result["test"]) for result in results]
    chosen = both.index(max(both))
    return chosen, sum(results[chosen]["test"]) / len(results[chosen]["test"])


def _wrong_without_worst_seed(results: list[dict[str, list[float]]]) -> tuple[int, float]:
    means = [sum(result["validation"]) / len(result["validation"]) for result in results]
    chosen = means.index(max(means))
    kept = sorted(results[chosen]["test"])[1:]
    return chosen, sum(kept) / len(kept)


def _wrong_finalists_by_test(results: list[dict[str, list[float]]]) -> tuple[int, float]:
    means = [sum(result["validation"]) / len(result["validation"]) for result in results]
    finalists = sorted(range(len(results)), key=lambda index: means[index])[-2:]
    chosen = max(finalists, key=lambda index: sum(results[index]["test"]))
    return chosen, sum(results[chosen]["test"]) / len(results[chosen]["test"])


RIGHT_SPECIMENS = (_right_with_loops, _right_with_max, _right_with_tensors)
WRONG_SPECIMENS = (
    _wrong_by_test,
    _wrong_reports_validation,
    _wrong_reports_best_seed,
    _wrong_reports_best_test,
    _wrong_best_validation_seed,
    _wrong_first_seed,
    _wrong_both,
    _wrong_without_worst_seed,
    _wrong_finalists_by_test,
)


def _specimen_probes(generator: torch.Generator) -> list[Probe]:
    return specimen_probes("protocol", RIGHT_SPECIMENS, WRONG_SPECIMENS, generator)


# The first candidate has the best mean on validation images; the best first run, best single run and best
# test belong to others.
_EXAMPLE: list[dict[str, Any]] = [
    {"validation": [0.93, 0.96, 0.95], "test": [0.94, 0.90, 0.92]},
    {"validation": [0.94, 0.93, 0.95], "test": [0.95, 0.96, 0.94]},
    {"validation": [0.90, 0.98, 0.91], "test": [0.91, 0.92, 0.93]},
    {"validation": [0.95, 0.92, 0.90], "test": [0.93, 0.95, 0.93]},
]


def _examine_one(protocol: Any, results: list[dict[str, Any]], chosen: int) -> bool:
    found, reported = protocol(results)
    test = results[chosen]["test"]
    return int(found) == chosen and math.isclose(float(reported), sum(test) / len(test), rel_tol=1e-6)


def _examine(protocol: Any) -> bool:
    """Accept a protocol that chooses by validation means and reports the mean test accuracy of its choice."""
    return _examine_one(protocol, _EXAMPLE, 0)


def _examine_choice_only(protocol: Any) -> bool:
    return int(protocol(_EXAMPLE)[0]) == 0


def _examine_report_only(protocol: Any) -> bool:
    chosen, reported = protocol(_EXAMPLE)
    test = _EXAMPLE[int(chosen)]["test"]
    return math.isclose(float(reported), sum(test) / len(test), rel_tol=1e-6)


def _examine_agreeing(protocol: Any) -> bool:
    results = [
        {"validation": [0.95, 0.97, 0.96], "test": [0.94, 0.96, 0.95]},
        {"validation": [0.81, 0.82, 0.80], "test": [0.79, 0.80, 0.81]},
    ]
    return _examine_one(protocol, results, 0)


def _examine_with_assert(protocol: Any) -> None:
    a = {"validation": [0.5, 0.75, 0.75], "test": [0.25, 0.5, 0.375]}
    b = {"validation": [0.75, 0.5, 0.5], "test": [0.75, 0.75, 0.875]}
    c = {"validation": [0.25, 1.0, 0.5], "test": [0.5, 0.5, 0.75]}
    d = {"validation": [0.625, 0.625, 0.5], "test": [0.5, 0.625, 0.5]}
    for order in ([a, b, c, d], [d, c, b, a]):
        chosen, reported = protocol(order)
        assert order[int(chosen)] is a
        assert abs(float(reported) - 0.375) < 1e-6


GRADE_THIS = Task(
    id="search.grade_this",
    signature="examine(protocol)",
    points=3,
    reference=_examine,
    probes=_specimen_probes,
    variants=[_examine_with_assert],
    hints=(
        "In your table of results, who wins if the test set decides? Who wins if one lucky seed decides?",
        "A table unmasks a protocol when each wrong way of choosing picks another candidate, and each wrong way of reporting "
        "gives another number, than the honest one.",
        "write results with four candidates: the best validation mean, the best test, the best single run and the best first run "
        "are four different ones\nchosen, reported = protocol(results)\naccept only the first, with the mean of its test accuracies",
    ),
    mistakes=[
        Fault(
            "test-of-the-choice-only",
            "Your test looks at the choice and not at the number that is reported.",
            "Compare the reported number with the mean test accuracy of the chosen candidate.",
            ONCE,
            implementations=[_examine_choice_only],
        ),
        Fault(
            "test-of-the-report-only",
            "Your test looks at the reported number and not at the way the candidate was chosen.",
            "Make a table in which choosing by test accuracy, or by one seed, picks another candidate.",
            ONCE,
            implementations=[_examine_report_only],
        ),
        Fault(
            "test-with-one-clear-winner",
            "In your table one candidate is the best in every respect, so every protocol picks it.",
            "Let another candidate win the test, another the best single run, another the first run.",
            ONCE,
            implementations=[_examine_agreeing],
        ),
        *verdict_faults(ONCE),
    ],
)


# ----- read a study -------------------------------------------------------------------------------------------


# The best of ten trials, .979932, had batches of 32: 10,000 = 312 x 32 + 16, so 313 batches and D = 313 x 32.
# The two best depths, .982285 and .978901, differ by .003384. One accuracy p has the standard error
# sqrt(p (1 - p) / 10,000); of a difference of two, the variances add up.
_STANDARD_ERROR = math.sqrt((0.982285 * (1 - 0.982285) + 0.978901 * (1 - 0.978901)) / 10_000)
_STUDY = {
    "networks": 1,
    "trials by the sampler": 0,
    "denominator": 10_016,
    "standard errors": (0.982285 - 0.978901) / _STANDARD_ERROR,
    "updates": 1_880,
    "parameters": 136_074 + 3 * (256 * 256 + 256),
}


READ_A_STUDY = Task(
    id="search.read_a_study",
    signature="answers: a dictionary",
    points=3,
    reference=_STUDY.get,
    accepts=[
        {**_STUDY, "standard errors": round(_STUDY["standard errors"], digits)}.get for digits in (1, 2, 3)
    ],
    probes=answer_probes(
        {
            "networks": "how many different networks the ten trials trained",
            "trials by the sampler": "how many of the ten trials TPE chose by what it had seen",
            "denominator": "the denominator behind .979932",
            "standard errors": "the lead of five layers over four, in standard errors of a difference",
            "updates": "the updates of 20 epochs in batches of 640",
            "parameters": "the parameters of the network with five hidden layers",
        }
    ),
    is_value=True,
    hints=(
        "What did the program read, and what did the search write?",
        "Keys that differ by one letter are different keys. The mean of 313 batch accuracies hides in .979932. The variances "
        "of two accuracies add up to the variance of their difference.",
        "networks: widths come from feature1 and feature2, which no trial sets\nsampler: 20 random trials come first\n"
        "denominator: number of batches x 32\nstandard errors: difference / sqrt(p1 (1 - p1) / n + p2 (1 - p2) / n)\n"
        "updates: epochs x (60,000 / 640, rounded up)\nparameters: for each layer n_in x n_out + n_out",
    ),
    mistakes=[
        known_answer(
            _STUDY,
            "networks",
            10,
            fault_id="hp-space-key-mismatch",
            does="You counted ten different networks, but the program never reads the widths that were searched.",
            todo="Compare the names in the search space with the names in the program, letter by letter.",
            reread=CASE,
        ),
        known_answer(
            _STUDY,
            "trials by the sampler",
            10,
            fault_id="study-startup-trials-forgotten",
            does="You took all ten trials for TPE's own; its first trials are drawn at random.",
            todo="Look at the number of startup trials: with 20 of them, the first ten are all random.",
            reread=RANDOM,
        ),
        known_answer(
            _STUDY,
            "denominator",
            10_000,
            fault_id="table-claim-believed",
            does="0.979932 x 10,000 is no whole number, even with the rounding.",
            todo="Try the mean over 313 batches.",
            reread=DIGITS,
        ),
        known_answer(
            _STUDY,
            "denominator",
            10_048,
            fault_id="study-wrong-batch-size",
            does="10,048 belongs to batches of 64; the best trial had batches of 32.",
            todo="Count the batches of 32 in 10,000 images, the short one too, and multiply by 32.",
            reread=DIGITS,
        ),
        known_answer(
            _STUDY,
            "standard errors",
            (0.982285 - 0.978901) / math.sqrt(0.982285 * (1 - 0.982285) / 10_000),
            fault_id="hp-single-run-differences",
            does="You divided by the standard error of one accuracy, but both are uncertain.",
            todo="Add the two variances before you take the root.",
            reread=LUCK,
        ),
        known_answer(
            _STUDY,
            "standard errors",
            0.982285 - 0.978901,
            fault_id="study-difference-not-divided",
            does="This is the difference itself.",
            todo="Divide it by its standard error, the luck that is usual for a difference.",
            reread=LUCK,
        ),
        known_answer(
            _STUDY,
            "updates",
            18_760,
            fault_id="prose-batch-size-verdict",
            does="18,760 updates belong to batches of 64; with 640 images each there are a tenth.",
            todo="Divide 60,000 by 640, round up, and multiply by the epochs.",
            reread=BATCH,
        ),
        known_answer(
            _STUDY,
            "updates",
            1_875,
            fault_id="log-last-batch-forgotten",
            does="You counted the short last batch as three quarters of an update; it is a whole one.",
            todo="Round 60,000 / 640 up: each epoch has 94 updates.",
            reread=BATCH,
        ),
        known_answer(
            _STUDY,
            "updates",
            1_860,
            fault_id="log-last-batch-forgotten",
            does="You left out the short last batch of each epoch.",
            todo="Round 60,000 / 640 up: each epoch has 94 updates.",
            reread=BATCH,
        ),
        known_answer(
            _STUDY,
            "parameters",
            136_074 + 3 * 256 * 256,
            fault_id="depths-biases-forgotten",
            does="The biases of the added layers are missing.",
            todo="A layer from 256 to 256 has 256 x 256 weights and 256 biases.",
            reread=DEPTH,
        ),
        known_answer(
            _STUDY,
            "parameters",
            136_074,
            fault_id="hp-depth-confounded-with-width",
            does="This is the network with two hidden layers. The one with five is more than twice as large.",
            todo="Add three layers from 256 to 256.",
            reread=DEPTH,
        ),
    ],
)

TASKS = [
    SPACE_TASK,
    DEPTHS_TASK,
    CHOOSE_TASK,
    PAIRED_TASK,
    BEST_TASK,
    AUDIT_TASK,
    GRADE_THIS,
    READ_A_STUDY,
]
