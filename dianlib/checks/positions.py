"""Tasks of the chapter "Positions": right answers, and the wrong ones that are known."""

import math
from typing import Any

import torch
from torch import Tensor

from dianlib import positions as pos
from dianlib.checks.judging import close
from dianlib.checks.kinds import (
    DETACHED,
    answer_probes,
    known_answer,
    randn,
    specimen_probes,
    verdict_faults,
    without_gradient,
)
from dianlib.checks.running import Outcome, Probe
from dianlib.checks.task import Fault, Task
from dianlib.multihead import merge_heads, split_heads

BLIND = "positions: What does attention see without positions?"
WAVES = "positions: What is a pair of columns?"
ROTARY = "positions: Why rotate instead of add?"
FREQUENCIES = "positions: How fast does each pair turn?"
PAIRS = "positions: Which two numbers are a pair?"
WHERE = "positions: Where does the rotation belong?"
ALIBI = "positions: What does a penalty for distance do?"
RELATIVE = "positions: A vector for every distance"
WRONG = "positions: Tempting, but wrong"
CASE = "positions: The case, solved"

# ----- frequencies: what the waves and the rotation share -------------------------------------------------


def _exponents(width: int, exponent: str) -> Tensor:
    """Return what the base is raised to for each pair, (width/2,), right or as a mistaken learner would have it."""
    even = torch.arange(0, width, 2)
    return {
        "2i/d": lambda: -even / width,
        "i/d": lambda: -even / 2 / width,
        "4i/d": lambda: -2.0 * even / width,
        "2(i+1)/d": lambda: -(even + 2) / width,
        "2i//d": lambda: -(even // width).float(),
        "i/(d/2-1)": lambda: -even / max(width - 2, 1),
        "-2i/d": lambda: even / width,
        "slowest first": lambda: -even.flip(0) / width,
    }[exponent]()


_EXPONENTS = ("i/d", "4i/d", "2(i+1)/d", "2i//d", "i/(d/2-1)", "-2i/d", "slowest first")


def _frequencies(width: int, base: float, exponent: str) -> Tensor:
    if exponent == "k/(base d)":  # a straight line in place of a power
        return torch.arange(0, width, 2) / (base * width)
    result: Tensor = base ** _exponents(width, exponent)
    return result


# ----- sinusoidal -----------------------------------------------------------------------------------------


def _sinusoidal_probes(generator: torch.Generator) -> list[Probe]:
    length = int(torch.randint(11, 17, (), generator=generator))

    def probe(name: str, length: int, d_model: int, core: bool = False) -> Probe:
        return Probe(name, {"length": length, "d_model": d_model}, core=core)

    return [
        probe("five places, width 4", 5, 4, core=True),
        probe("seven places, width 8", 7, 8, core=True),
        probe("more places than columns", 2 * length + 1, 6),
        probe("more columns than places", 4, 2 * length),
        probe("a single place", 1, 10),
    ]


def _sinusoidal_twin(
    length: int,
    d_model: int,
    *,
    exponent: str = "2i/d",
    shared: str = "by the pair",
    layout: str = "neighbours",
    first: str = "sin",
    places: str = "from 0",
    rows: str = "length",
) -> Tensor:
    n_rows = length + length % 2 if rows == "even" else length
    place = {
        "from 0": lambda: torch.arange(n_rows),
        "from 1": lambda: torch.arange(1, n_rows + 1),
        "0 last": lambda: torch.arange(n_rows).roll(-1),
        "last first": lambda: torch.arange(n_rows).roll(1),
        "all 0": lambda: torch.zeros(n_rows),
        "all last": lambda: torch.full((n_rows,), n_rows - 1),
    }[places]()
    frequencies = _frequencies(d_model, 10000.0, exponent)
    for_sin, for_cos = {
        "by the pair": (frequencies, frequencies),
        "each column its own": (frequencies, frequencies * 10000 ** (-1 / d_model)),
        # The loop index is even already, and is doubled once more.
        "doubled": (
            10000.0 ** (-2.0 * torch.arange(0, d_model, 2) / d_model),
            10000.0 ** (-2.0 * torch.arange(1, d_model + 1, 2) / d_model),
        ),
        "cosine one pair on": (frequencies, frequencies * 10000 ** (-2 / d_model)),
    }[shared]
    sines, cosines = torch.outer(place, for_sin).sin(), torch.outer(place, for_cos).cos()
    parts = [sines, cosines] if first == "sin" else [cosines, sines]
    table = torch.cat(parts, dim=1) if layout == "halves" else torch.stack(parts, dim=-1).flatten(1)
    return table.T if rows == "columns" else table


def _sinusoidal_by_loops(length: int, d_model: int) -> Any:
    import math

    table = torch.zeros(length, d_model)
    for p in range(length):
        for i in range(0, d_model, 2):
            table[p, i] = math.sin(p / 10000 ** (i / d_model))
            table[p, i + 1] = math.cos(p / 10000 ** (i / d_model))
    return table


def _sinusoidal_by_exp(length: int, d_model: int) -> Any:
    import math

    position = torch.arange(length).unsqueeze(1)
    div_term = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
    pe = torch.empty(length, d_model)
    pe[:, 0::2] = torch.sin(position * div_term)
    pe[:, 1::2] = torch.cos(position * div_term)
    return pe


def _sinusoidal_by_shift(length: int, d_model: int) -> Any:
    k = torch.arange(d_model, dtype=torch.float64)
    angle = torch.arange(length, dtype=torch.float64)[:, None] / 10000 ** (2 * (k // 2) / d_model)
    return torch.sin(angle + torch.pi / 2 * (k % 2))


def _sinusoidal_by_steps(length: int, d_model: int) -> Any:
    # Each place is the one before, turned on.
    theta = torch.pow(10000.0, -torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
    turn = torch.polar(torch.ones_like(theta), theta)
    rows = [torch.ones_like(turn)]
    while len(rows) < length:
        rows.append(rows[-1] * turn)
    whole = torch.stack(rows)
    return torch.stack([whole.imag, whole.real], dim=2).reshape(length, d_model)


def _pair_circle(probe: Probe, got: Outcome, wanted: Outcome) -> str:
    """Say which pair of columns is not on the unit circle."""
    table = got.values.get("result")
    if not isinstance(table, Tensor):
        return ""
    sums = table[:, 0::2].square() + table[:, 1::2].square()
    place, pair = divmod(int((sums - 1).abs().argmax()), sums.shape[1])
    worst = float(sums[place, pair])
    if abs(worst - 1) < 1e-3:
        return ""
    return (
        f"In row {place} columns {2 * pair} and {2 * pair + 1} have squares that add up to {worst:.3f}; "
        "the sine and the cosine of one angle give 1."
    )


SINUSOIDAL = Task(
    id="positions.sinusoidal",
    signature="sinusoidal(length, d_model)",
    points=3,
    reference=pos.sinusoidal,
    probes=_sinusoidal_probes,
    twin=_sinusoidal_twin,
    forbidden=frozenset({"sinusoidal"}),
    properties=[_pair_circle],
    variants=[_sinusoidal_by_loops, _sinusoidal_by_exp, _sinusoidal_by_shift, _sinusoidal_by_steps],
    hints=(
        "A row has a width of 4. How many different frequencies stand in it, and which columns share one?",
        "Columns 2i and 2i + 1 hold the sine and the cosine of one angle, p / 10000^(2i/D), at the place p. "
        "So the squares of a pair add up to 1.",
        "for p = 0, 1, ..., length - 1 and for even k = 0, 2, ..., D - 2:\n    angle = p / 10000^(k / D)\n"
        "    table[p, k] = sin(angle)\n    table[p, k + 1] = cos(angle)",
    ),
    mistakes=[
        Fault(
            "pe-doubled-index",
            "The index is doubled twice, so sine and cosine get two different frequencies, both too slow.",
            "A loop that steps by 2 has the 2 of 2i in it already; and the pair shares one frequency.",
            WRONG,
            settings=[{"shared": "doubled"}, {"exponent": "4i/d"}],
        ),
        Fault(
            "pe-pair-not-shared",
            "Sine and cosine of a pair have different frequencies, as if each column had its own.",
            "Use the exponent 2i/D for both columns 2i and 2i + 1.",
            WAVES,
            settings=[{"shared": "each column its own"}, {"shared": "cosine one pair on"}],
        ),
        Fault(
            "pe-integer-division",
            "The exponent is a whole number, 0 for every pair: all pairs have the frequency 1.",
            "Divide with /, not with //.",
            WAVES,
            settings=[{"exponent": "2i//d"}],
        ),
        Fault(
            "pe-frequency-wrong",
            "The frequencies are not 10000^(-2i/D): the exponent has another factor, sign, start or end.",
            "For D = 8 they are 1, 1/10, 1/100 and 1/1000; print yours.",
            WAVES,
            settings=[{"exponent": e} for e in _EXPONENTS if e not in ("2i//d", "4i/d")],
        ),
        Fault(
            "pe-halves",
            "All sines stand in the first half of the columns and all cosines in the second. "
            "That is an encoding too, and some programs use it; here the pairs are neighbours.",
            "Put the sine into column 2i and the cosine into column 2i + 1.",
            WAVES,
            settings=[{"layout": "halves"}],
        ),
        Fault(
            "pe-sin-cos-exchanged",
            "The even columns hold the cosine and the odd ones the sine.",
            "Sine first: at place 0 a row reads 0, 1, 0, 1, ...",
            WAVES,
            settings=[{"first": "cos"}],
        ),
        Fault(
            "pe-starts-at-one",
            "The first row belongs to place 1.",
            "Count places from 0, as Python does.",
            WAVES,
            settings=[{"places": "from 1"}],
        ),
        Fault(
            "pe-positions-hard-coded",
            "The rows are those of the right places in another order, with the first one last or the last one first.",
            "Row p belongs to place p: take the places 0, 1, ..., length - 1 for every length.",
            WAVES,
            settings=[{"places": "0 last"}, {"places": "last first"}],
        ),
        Fault(
            "pe-batch-axis",
            "All rows are the same, as if every token stood at one place.",
            "Let the place run along the rows, one row for each token, not along a batch.",
            WAVES,
            settings=[{"places": "all 0"}, {"places": "all last"}],
            sign=lambda probe, got, wanted: (
                close(got.values["result"][1:], got.values["result"][:-1])
                and not close(wanted.values["result"][1:], wanted.values["result"][:-1])
            ),
        ),
        Fault(
            "pe-axes-confused",
            "Rows and columns are confused: the table is transposed, or its length is made even.",
            "Return (length, d_model). The width has to be even, the length need not.",
            WAVES,
            settings=[{"rows": "columns"}, {"rows": "even"}],
        ),
    ],
)


# ----- rope_frequencies -----------------------------------------------------------------------------------


def _frequency_probes(generator: torch.Generator) -> list[Probe]:
    base = float(torch.randint(50, 900, (), generator=generator))

    def probe(name: str, head_dim: int, base: float | None = None, core: bool = False) -> Probe:
        args = {"head_dim": head_dim} | ({} if base is None else {"base": base})
        return Probe(name, args, core=core)

    return [
        probe("width 8, the usual base", 8, core=True),
        probe("width 12", 12, core=True),
        probe("another base", 6, base),
        probe("a large base, as in long contexts", 10, 500000.0),
        probe("a single pair", 2),
    ]


def _frequency_twin(
    head_dim: int,
    base: float = 10000.0,
    *,
    exponent: str = "2i/d",
    base_used: str = "given",
    repeated: str = "once",
    counted: str = "pairs",
    shown: str = "frequency",
) -> Tensor:
    used = {"given": base, "always 10000": 10000.0, "e": math.e}[base_used]
    if counted == "columns":  # one for each column, not for each pair
        result: Tensor = used ** -(torch.arange(head_dim) / head_dim)
    else:
        result = _frequencies(head_dim, used, exponent)
    if shown == "wavelength":
        result = 2 * math.pi / result
    if repeated == "neighbours":
        return result.repeat_interleave(2)
    return torch.cat([result, result]) if repeated == "halves" else result


def _frequencies_by_loop(head_dim: int, base: float = 10000.0) -> Any:
    return torch.tensor([base ** (-2 * i / head_dim) for i in range(head_dim // 2)])


def _frequencies_by_exp(head_dim: int, base: float = 10000.0) -> Any:
    import math

    steps = torch.arange(0, head_dim, 2, dtype=torch.float64)
    return torch.exp(-steps / head_dim * math.log(base))


def _frequencies_by_division(head_dim: int, base: float = 10000.0) -> Any:
    return 1.0 / (base ** (torch.arange(0, head_dim, 2).float() / head_dim))


FREQUENCY_TASK = Task(
    id="positions.rope_frequencies",
    signature="rope_frequencies(head_dim, base=10000.0)",
    points=2,
    reference=pos.rope_frequencies,
    probes=_frequency_probes,
    twin=_frequency_twin,
    forbidden=frozenset({"rope_frequencies"}),
    variants=[_frequencies_by_loop, _frequencies_by_exp, _frequencies_by_division],
    hints=(
        "A width of 8 has four pairs, and they turn by 1, 0.1, 0.01 and 0.001. What are the exponents of 10000?",
        "Pair i turns by base^(-2i/d) from one place to the next: the first pair by 1 radian, each next one by the same factor less.",
        "for i = 0, 1, ..., d/2 - 1: frequency[i] = base ** (-2 * i / d)",
    ),
    mistakes=[
        Fault(
            "rope-frequency-wrong",
            "The exponent is not -2i/d: it lacks the 2, has another factor, sign, start or end, or is cut to a whole number.",
            "For d = 8 and base 10000 the logarithms to base 10 are 0, -1, -2, -3; print yours.",
            FREQUENCIES,
            settings=[{"exponent": e} for e in (*_EXPONENTS, "k/(base d)")],
        ),
        Fault(
            "rope-frequency-per-column",
            "There is a frequency for each number of a head; a pair of numbers turns together and has one.",
            "Return d/2 numbers, one for each pair.",
            FREQUENCIES,
            settings=[{"counted": "columns"}, {"repeated": "neighbours"}, {"repeated": "halves"}],
        ),
        Fault(
            "rope-base-ignored",
            "The argument base changes nothing, or another number stands in its place.",
            "Raise the given base to the power -2i/d.",
            FREQUENCIES,
            settings=[{"base_used": "always 10000"}, {"base_used": "e"}],
        ),
        Fault(
            "rope-wavelength",
            "These are wavelengths, the places that a full turn takes.",
            "Return how far a pair turns from one place to the next: 2 pi divided by the wavelength.",
            FREQUENCIES,
            settings=[{"shown": "wavelength"}],
        ),
    ],
)


# ----- apply_rope -----------------------------------------------------------------------------------------


def _rope_probes(generator: torch.Generator) -> list[Probe]:
    def probe(
        name: str,
        shape: tuple[int, ...],
        places: list[int] | None = None,
        core: bool = False,
        base: float | None = None,
    ) -> Probe:
        positions = torch.arange(shape[-2]) if places is None else torch.tensor(places)
        args: dict[str, Any] = {"x": (randn(generator, *shape) * 4).round() / 4, "positions": positions}
        return Probe(name, args | ({} if base is None else {"base": base}), gradients=("x",), core=core)

    later = int(torch.randint(20, 60, (), generator=generator))
    return [
        probe("three places, two pairs", (3, 4), core=True),
        probe("three samples, two heads, five places", (3, 2, 5, 6), core=True),
        probe("places in any order, as from a cache", (2, 4, 8), [7, 2, 0, later]),
        probe("as many samples as heads and places", (4, 4, 4, 6)),
        probe("another base", (2, 3, 8), base=100.0),
        probe("one token far along", (2, 1, 6), [later]),
    ]


def _rope_twin(
    x: Tensor,
    positions: Tensor,
    base: float = 10000.0,
    *,
    exponent: str = "2i/d",
    pairing: str = "neighbours",
    table: str = "own",
    output: str = "in place",
    rotation: str = "turn",
    turn: str = "forwards",
    swapped: bool = False,
    places: str = "given",
    axis: int = -2,
    base_used: str = "given",
    cut: bool = False,
) -> Tensor:
    width = x.shape[-1]
    place = {
        "given": lambda: positions,
        "counted": lambda: torch.arange(len(positions)),
        "one more": lambda: positions + 1,
        "all 0": lambda: 0 * positions,
    }[places]()
    theta = _frequencies(width, base if base_used == "given" else 10000.0, exponent)
    angles = torch.outer(place, theta)
    # One angle for each number of a head, in the order of the pairs; "other" is the other order.
    as_neighbours = (pairing == "neighbours") == (table == "own")
    angles = angles.repeat_interleave(2, dim=-1) if as_neighbours else torch.cat([angles, angles], dim=-1)
    cos, sin = angles.cos(), angles.sin() * (1 if turn == "forwards" else -1)
    if swapped:
        cos, sin = sin, cos
    if axis == -3:  # the places run along another axis; where the sizes differ, this does not fit
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if pairing == "neighbours":
        across = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    else:
        across = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], dim=-1)
    result = {
        "turn": lambda: x * cos + across * sin,
        "cos twice": lambda: x * cos + x * cos,
        "x cos + x sin": lambda: x * cos + x * sin,
        "x cos - x sin": lambda: x * cos - x * sin,
        "both plus": lambda: x * cos + across * _both_plus(width, pairing) * sin,
        "cos only": lambda: x * cos + across * 0,
    }[rotation]()
    if output == "halves":
        result = torch.cat([result[..., 0::2], result[..., 1::2]], dim=-1)
    return result.detach() if cut else result


def _both_plus(width: int, pairing: str) -> Tensor:
    """Return the signs that undo the minus of the first number of each pair: -1 for the first, 1 for the second."""
    number = torch.arange(width)
    is_first = number % 2 == 0 if pairing == "neighbours" else number < width // 2
    return 1 - 2 * is_first.int()


def _rope_by_loops(x: Any, positions: Any, base: float = 10000.0) -> Any:
    import math

    d = x.shape[-1]
    rows = []
    for index, m in enumerate(positions.tolist()):
        row = []
        for i in range(0, d, 2):
            c, s = math.cos(m * base ** (-i / d)), math.sin(m * base ** (-i / d))
            a, b = x[..., index, i], x[..., index, i + 1]
            row += [a * c - b * s, a * s + b * c]
        rows.append(torch.stack(row, dim=-1))
    return torch.stack(rows, dim=-2)


def _rope_by_complex(x: Any, positions: Any, base: float = 10000.0) -> Any:
    d = x.shape[-1]
    theta = base ** (-torch.arange(0, d, 2) / d)
    angles = positions[:, None] * theta
    numbers = torch.view_as_complex(x.reshape(*x.shape[:-1], d // 2, 2))
    return torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles)).reshape(x.shape)


def _rope_by_slices(x: Any, positions: Any, base: float = 10000.0) -> Any:
    d = x.shape[-1]
    angles = torch.einsum("l,i->li", positions.float(), 1 / base ** (torch.arange(0, d, 2) / d))
    out = torch.empty_like(x)
    out[..., ::2] = x[..., ::2] * angles.cos() - x[..., 1::2] * angles.sin()
    out[..., 1::2] = x[..., ::2] * angles.sin() + x[..., 1::2] * angles.cos()
    return out


def _rope_by_matrices(x: Any, positions: Any, base: float = 10000.0) -> Any:
    d = x.shape[-1]
    turns = torch.zeros(len(positions), d, d)
    for i in range(0, d, 2):
        angle = positions * base ** (-i / d)
        turns[:, i, i] = turns[:, i + 1, i + 1] = angle.cos()
        turns[:, i + 1, i] = angle.sin()
        turns[:, i, i + 1] = -angle.sin()
    return torch.einsum("lij,...lj->...li", turns, x)


def _rope_by_way_of_halves(x: Any, positions: Any, base: float = 10000.0) -> Any:
    # Reorder to halves, rotate there, and reorder back.
    first, second = x[..., 0::2], x[..., 1::2]
    halves = torch.cat([first, second], dim=-1)
    angles = torch.outer(positions.double(), base ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1]))
    cos, sin = angles.cos().repeat(1, 2).to(x.dtype), angles.sin().repeat(1, 2).to(x.dtype)
    turned = halves * cos + torch.cat([-second, first], dim=-1) * sin
    a, b = turned.chunk(2, dim=-1)
    return torch.stack((a, b), -1).flatten(-2)


def _length_changed(probe: Probe, got: Outcome, wanted: Outcome) -> str:
    """Say that a rotation must not change lengths, where one did."""
    result, x = got.values.get("result"), probe.args["x"]
    if not isinstance(result, Tensor) or result.is_complex():
        return ""
    ratio = (result.norm(dim=-1) / x.norm(dim=-1)).flatten()
    worst = float(ratio[(ratio - 1).abs().argmax()])
    if abs(worst - 1) < 1e-3:
        return ""
    return f"A vector came back {worst:.3f} times as long; a rotation changes no length."


def _moved_at_zero(probe: Probe, got: Outcome, wanted: Outcome) -> str:
    """Say that place 0 is turned, where it is."""
    result, x, positions = got.values["result"], probe.args["x"], probe.args["positions"]
    if not (positions == 0).any():
        return ""
    change = (result - x)[..., positions == 0, :].abs().max()
    return f"At place 0 nothing turns, but a number moved by {float(change):.3f}." if change > 1e-3 else ""


_HALF_SPLIT = Fault(
    "rope-half-split",
    "You rotate the pairs (i, i + d/2), the convention of GPT-NeoX and of Llama in Transformers. "
    "It is a rotary encoding too, but not the one that is asked for here.",
    "Rotate neighbours, (2i, 2i + 1), as the paper does.",
    PAIRS,
    settings=[{"pairing": "halves"}],
)

APPLY_ROPE = Task(
    id="positions.apply_rope",
    signature="apply_rope(x, positions, base=10000.0)",
    points=4,
    reference=pos.apply_rope,
    probes=_rope_probes,
    twin=_rope_twin,
    forbidden=frozenset({"apply_rope"}),
    properties=[_length_changed, _moved_at_zero],
    variants=[_rope_by_loops, _rope_by_complex, _rope_by_slices, _rope_by_matrices, _rope_by_way_of_halves],
    hints=(
        "The pair (1, 0) is turned by 90 degrees. Where does it point, and which of its two numbers got the sine?",
        "With the angle a = m base^(-2i/d) at place m, the pair (u, v) in columns 2i and 2i + 1 becomes "
        "(u cos a - v sin a, u sin a + v cos a), in the same two columns.",
        "angles = positions (L, 1) times frequencies (d/2,)\neven, odd = x[..., 0::2], x[..., 1::2]\n"
        "new_even = even * cos - odd * sin\nnew_odd = even * sin + odd * cos\n"
        "stack the two along a new last axis, and flatten it away",
    ),
    mistakes=[
        _HALF_SPLIT,
        Fault(
            "rope-half-vs-interleaved",
            "Your cosines stand in the order of one pairing, and your rotation uses the other, "
            "so the two numbers of a pair turn by different angles.",
            "Choose one pairing for both: for neighbours repeat each angle twice in a row.",
            PAIRS,
            settings=[{"table": "other"}, {"table": "other", "pairing": "halves"}],
        ),
        Fault(
            "rope-interleaved-in-halves-out",
            "The numbers are right and stand in a new order: all first ones of the pairs, then all second ones.",
            "Put each number back where it was, with stack and flatten in place of cat.",
            PAIRS,
            settings=[{"output": "halves"}],
        ),
        Fault(
            "rope-no-rotation",
            "No number moves into its partner: x is multiplied by a factor, and nothing rotates.",
            "Mix the two numbers of a pair: the first becomes u cos a - v sin a, the second u sin a + v cos a.",
            WRONG,
            settings=[{"rotation": r} for r in ("cos twice", "x cos + x sin", "x cos - x sin", "cos only")],
        ),
        Fault(
            "rope-same-signs",
            "Both products with the sine are added, so lengths change.",
            "One of the two is subtracted: u cos a - v sin a, and u sin a + v cos a.",
            ROTARY,
            settings=[{"rotation": "both plus"}],
        ),
        Fault(
            "rope-cos-sin-swapped",
            "Cosine and sine are exchanged, so place 0 is turned by 90 degrees.",
            "At place 0 the angle is 0 and nothing moves: the cosine stays with its own number.",
            WRONG,
            settings=[{"swapped": True}],
        ),
        Fault(
            "rope-turned-backwards",
            "The rotation goes the other way round.",
            "The minus belongs to the first number of a pair: u cos a - v sin a.",
            ROTARY,
            settings=[{"turn": "backwards"}],
        ),
        Fault(
            "rope-frequency-wrong",
            "The pairs turn at other speeds than base^(-2i/d).",
            "Compare your angles for d = 8: at place 1 they are 1, 0.1, 0.01 and 0.001.",
            FREQUENCIES,
            settings=[{"exponent": e} for e in ("i/d", "2i//d", "k/(base d)")],
        ),
        Fault(
            "rope-positions-ignored",
            "The given places are not used: you count from 0, or every token stands at place 0.",
            "Take the angles from the argument positions; with a cache it does not start at 0.",
            ROTARY,
            settings=[{"places": "counted"}, {"places": "all 0"}],
        ),
        Fault(
            "rope-positions-shifted",
            "Every token is turned by one place too many, place 0 as well.",
            "Use the given places as they are; nothing turns at place 0.",
            ROTARY,
            settings=[{"places": "one more"}],
        ),
        Fault(
            "rope-batch-axis",
            "The places run along the wrong axis, over samples or heads; it fits only where the sizes agree by chance.",
            "The place is the second axis from the end: angles of shape (L, d/2) broadcast by themselves.",
            WRONG,
            settings=[{"axis": -3}],
        ),
        Fault(
            "rope-base-ignored",
            "The argument base changes nothing.",
            "Use the given base for the frequencies.",
            FREQUENCIES,
            settings=[{"base_used": "always 10000"}],
        ),
        Fault("backward-detached", *DETACHED, ROTARY, settings=[{"cut": True}], sign=without_gradient),
    ],
)


# ----- rotary_attention -----------------------------------------------------------------------------------


def _attention_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, n: int, length: int, width: int, n_heads: int, core: bool = False) -> Probe:
        args: dict[str, Any] = {"x": randn(generator, n, length, width)}
        for letter in "qkv":
            args[f"w_{letter}"] = 1.5 * randn(generator, width, width) / width**0.5
        args["n_heads"] = n_heads
        return Probe(name, args, gradients=("x", "w_q", "w_k", "w_v"), core=core)

    return [
        probe("one head", 1, 3, 4, 1, core=True),
        probe("three samples of five places, four heads", 3, 5, 24, 4, core=True),
        probe("as many samples as heads and places", 3, 3, 12, 3),
        probe("a single place", 2, 1, 8, 2),
    ]


def _attention_twin(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    n_heads: int,
    *,
    where: str = "queries and keys",
    values: str = "left",
    keys: str = "forwards",
    exponent: str = "2i/d",
    pairing: str = "neighbours",
    axis: str = "length",
    scale: str = "sqrt d",
    split: str = "transpose",
    merge: str = "transpose",
    cut: bool = False,
) -> tuple[Tensor, Tensor]:
    n, length, width = x.shape

    def rotate(t: Tensor, direction: int = 1) -> Tensor:
        if axis == "samples":
            place = torch.arange(n).reshape(n, *[1] * (t.dim() - 1))
            angles = place * _frequencies(t.shape[-1], 10000.0, exponent)
            return _turn(t, direction * angles)
        if axis == "heads" and t.dim() == 4:
            return rotate_along(t.transpose(1, 2), direction).transpose(1, 2)
        return rotate_along(t, direction)

    def rotate_along(t: Tensor, direction: int) -> Tensor:
        place = direction * torch.arange(t.shape[-2])
        return _rope_twin(t, place, exponent=exponent, pairing=pairing)

    def cut_in_heads(t: Tensor) -> Tensor:
        if split == "view":
            return t.reshape(n, n_heads, length, width // n_heads)
        return split_heads(t, n_heads)

    backwards = -1 if keys == "backwards" else 1
    x_qk, x_v = x, x
    if where in ("embeddings", "embeddings, not for the values"):
        x_qk = rotate(x)
        x_v = x_qk if where == "embeddings" else x
    if where == "embeddings by heads":
        x_qk = x_v = merge_heads(rotate(split_heads(x, n_heads)))
    q, k, v = x_qk @ w_q, x_qk @ w_k, x_v @ w_v
    if where == "before the split":
        q, k = rotate(q), rotate(k, backwards)
    q, k, v = cut_in_heads(q), cut_in_heads(k), cut_in_heads(v)
    if where in ("queries and keys", "queries only"):
        q = rotate(q)
    if where in ("queries and keys", "keys only"):
        k = rotate(k, backwards)
    if values == "rotated":
        v = rotate(v)
    factor = {"sqrt d": q.shape[-1] ** -0.5, "sqrt D": width**-0.5, "none": 1.0}[scale]
    weights = (q @ k.transpose(-2, -1) * factor).softmax(dim=-1)
    output = weights @ v
    if merge == "transpose":
        output = merge_heads(output)
    else:
        output = output.transpose(-2, -1).reshape(n, length, width)
    return (output.detach(), weights.detach()) if cut else (output, weights)


def _turn(x: Tensor, angles: Tensor) -> Tensor:
    """Turn pairs of neighbours by any angles that broadcast."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = [even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()]
    return torch.stack(turned, dim=-1).flatten(-2)


def _attention_by_heads(x: Any, w_q: Any, w_k: Any, w_v: Any, n_heads: int) -> Any:
    n, length, width = x.shape
    d = width // n_heads
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, d, 2) / d)
    turns = torch.polar(torch.ones_like(angles), angles)

    def rotated(t: Any) -> Any:
        whole = torch.view_as_complex(t.reshape(n, length, d // 2, 2).contiguous()) * turns
        return torch.view_as_real(whole).reshape(n, length, d)

    outputs, weights = [], []
    for h in range(n_heads):
        columns = slice(h * d, (h + 1) * d)
        q, k, v = x @ w_q[:, columns], x @ w_k[:, columns], x @ w_v[:, columns]
        a = torch.softmax(torch.bmm(rotated(q), rotated(k).mT) / d**0.5, dim=-1)
        outputs.append(a @ v)
        weights.append(a)
    return torch.cat(outputs, dim=-1), torch.stack(weights, dim=1)


def _attention_from_one(x: Any, w_q: Any, w_k: Any, w_v: Any, n_heads: int) -> Any:
    # Places from 1: only distances count.
    b, length, width = x.shape
    d = width // n_heads
    q, k, v = (t.view(b, length, n_heads, d).transpose(1, 2) for t in (x @ w_q, x @ w_k, x @ w_v))
    angles = torch.arange(1, length + 1).float()[:, None] / 10000 ** (torch.arange(0, d, 2) / d)
    c, s = angles.cos(), angles.sin()

    def rotated(t: Any) -> Any:
        u, w = t[..., ::2], t[..., 1::2]
        return torch.stack((u * c - w * s, u * s + w * c), dim=-1).reshape(t.shape)

    a = (torch.einsum("bhqd,bhkd->bhqk", rotated(q), rotated(k)) / d**0.5).softmax(-1)
    return [torch.einsum("bhqk,bhkd->bqhd", a, v).reshape(b, length, width), a]


def _attention_halves_out(x: Any, w_q: Any, w_k: Any, w_v: Any, n_heads: int) -> Any:
    # The rotated pairs come out in another order, alike for queries and keys: no score changes.
    _b, length, width = x.shape
    d = width // n_heads
    q, k, v = (t.unflatten(-1, (n_heads, d)).transpose(1, 2) for t in (x @ w_q, x @ w_k, x @ w_v))
    angles = torch.outer(torch.arange(length).float(), 10000 ** (-torch.arange(0, d, 2) / d))

    def rotated(t: Any) -> Any:
        u, w = t[..., ::2], t[..., 1::2]
        return torch.cat([u * angles.cos() - w * angles.sin(), u * angles.sin() + w * angles.cos()], dim=-1)

    a = torch.softmax(rotated(q) @ rotated(k).transpose(-2, -1) * d**-0.5, dim=-1)
    return (a @ v).transpose(1, 2).flatten(2), a


def _attention_through_the_kernel(x: Any, w_q: Any, w_k: Any, w_v: Any, n_heads: int) -> Any:
    b, length, width = x.shape
    d = width // n_heads
    q, k, v = (t.view(b, length, n_heads, d).transpose(1, 2) for t in (x @ w_q, x @ w_k, x @ w_v))
    theta = 10000.0 ** (-torch.arange(0, d, 2) / d)
    turn = torch.exp(1j * torch.arange(length)[:, None] * theta)
    q, k = (torch.view_as_real(torch.complex(t[..., 0::2], t[..., 1::2]) * turn).flatten(3) for t in (q, k))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    weights = (q @ k.mT / d**0.5).softmax(-1)
    return out.transpose(1, 2).reshape(b, length, width), weights


def _rows_sum(probe: Probe, got: Outcome, wanted: Outcome) -> str:
    """Say which row of the weights does not sum to 1."""
    weights = got.values.get("result[1]")
    if not isinstance(weights, Tensor) or weights.shape != wanted.values["result[1]"].shape:
        return ""
    sums = weights.sum(dim=-1).flatten()
    worst = float(sums[(sums - 1).abs().argmax()])
    return f"A row of the weights sums to {worst:.3f}, not to 1." if abs(worst - 1) > 1e-3 else ""


ROTARY_ATTENTION = Task(
    id="positions.rotary_attention",
    signature="rotary_attention(x, w_q, w_k, w_v, n_heads)",
    points=4,
    reference=pos.rotary_attention,
    probes=_attention_probes,
    twin=_attention_twin,
    forbidden=frozenset({"rotary_attention"}),
    properties=[_rows_sum],
    variants=[
        _attention_by_heads,
        _attention_from_one,
        _attention_halves_out,
        _attention_through_the_kernel,
    ],
    hints=(
        "If all tokens move three places on, which weights may change? Which do, when you rotate x itself?",
        "Only queries and keys carry the place, each head by itself, after its projection; values carry the content. "
        "Then q_m . k_n depends on m - n.",
        "q, k, v = x @ w_q, x @ w_k, x @ w_v, each cut into (B, H, L, d)\nq, k = apply_rope(q, places), apply_rope(k, places)\n"
        "weights = softmax(q k^T / sqrt(d)) over the keys\nlay the heads of weights @ v side by side; return both",
    ),
    mistakes=[
        Fault(
            "rope-applied-to-embeddings",
            "You rotate x before it is projected, so the weights depend on where the sentence starts, not on distances.",
            "Rotate the queries and the keys after their projections, and leave x and the values alone.",
            WHERE,
            settings=[
                {"where": place}
                for place in ("embeddings", "embeddings, not for the values", "embeddings by heads")
            ],
        ),
        Fault(
            "rope-before-the-split",
            "You rotate queries and keys over their whole width, so the heads turn at different speeds.",
            "Cut them in heads first: every head has the same d/2 frequencies.",
            WHERE,
            settings=[{"where": "before the split"}],
        ),
        Fault(
            "rope-on-values",
            "The values are rotated as well, so what a token says depends on its place.",
            "Rotate queries and keys only; distance belongs into the weights.",
            WHERE,
            settings=[{"values": "rotated"}],
        ),
        Fault(
            "rope-one-side-only",
            "Only the queries, or only the keys, are rotated; the weights then depend on one place, not on the distance.",
            "Rotate both, by their own places.",
            WHERE,
            settings=[{"where": "queries only"}, {"where": "keys only"}],
        ),
        Fault(
            "rope-not-applied",
            "No rotation reaches the weights: they are those of attention without positions.",
            "Rotate queries and keys by the places 0 to L - 1, along the length, not along samples or heads.",
            WHERE,
            settings=[{"where": "nowhere"}, {"axis": "samples"}, {"axis": "heads"}],
        ),
        Fault(
            "rope-key-rotated-backwards",
            "Keys turn backwards, so the scores depend on the sum of the two places, not on their difference.",
            "Rotate queries and keys the same way; the dot product subtracts.",
            WRONG,
            settings=[{"keys": "backwards"}],
        ),
        _HALF_SPLIT,
        Fault(
            "rope-frequency-wrong",
            "The pairs turn at other speeds than 10000^(-2i/d).",
            "Use your rope_frequencies, with d the width of one head.",
            FREQUENCIES,
            settings=[{"exponent": e} for e in ("i/d", "2i//d")],
        ),
        Fault(
            "sdpa-scale-sqrt-embed",
            "The scores are divided by the root of the whole width D.",
            "Divide by the root of d = D / H, the width of one head.",
            WHERE,
            settings=[{"scale": "sqrt D"}],
        ),
        Fault(
            "sdpa-no-scale",
            "The scores are not divided by the root of d.",
            "Divide the scores by sqrt(d) before the softmax.",
            WHERE,
            settings=[{"scale": "none"}],
        ),
        Fault(
            "mha-split-by-view",
            "The heads are cut from the length: a reshape to (B, H, L, d) mixes tokens.",
            "Reshape to (B, L, H, d) first, then exchange the axes of length and heads.",
            WHERE,
            settings=[{"split": "view"}],
        ),
        Fault(
            "mha-merge-transpose-last-two",
            "The heads are not laid side by side: the last two axes are exchanged, and the reshape mixes tokens.",
            "Bring (B, H, L, d) to (B, L, H, d), then join the last two axes.",
            WHERE,
            settings=[{"merge": "last two"}],
        ),
        Fault("backward-detached", *DETACHED, WHERE, settings=[{"cut": True}], sign=without_gradient),
    ],
)


# ----- to_neighbours --------------------------------------------------------------------------------------


def _reorder_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, shape: tuple[int, ...], n_heads: int, core: bool = False) -> Probe:
        weight = (randn(generator, *shape) * 8).round() / 8
        return Probe(name, {"weight": weight, "n_heads": n_heads}, core=core)

    return [
        probe("one head of six rows", (6, 2), 1, core=True),
        probe("three heads of eight rows", (24, 24), 3, core=True),
        probe("a bias of two heads", (20,), 2),
        probe("heads of two rows: nothing to do", (8, 5), 4),
        probe("a wide input", (12, 30), 2),
    ]


def _reorder_twin(
    weight: Tensor,
    n_heads: int,
    *,
    direction: str = "to neighbours",
    heads: str = "each",
    axis: str = "rows",
) -> Tensor:
    moved = weight.T if axis == "columns" and weight.dim() == 2 else weight
    n = len(moved)
    places = torch.arange(n).reshape(n_heads if heads == "each" else 1, -1)
    if direction == "flipped halves":
        halves = places.reshape(len(places), 2, -1)
        order = torch.stack([halves[:, 1], halves[:, 0]], dim=-1).flatten()
    elif direction == "to halves":
        order = places.reshape(len(places), -1, 2).transpose(1, 2).flatten()
    elif direction == "heads by columns":
        order = places.T.flatten()
    else:
        order = places.reshape(len(places), 2, -1).transpose(1, 2).flatten()
    moved = moved[order]
    return moved.T if axis == "columns" and weight.dim() == 2 else moved


def _reorder_by_loop(weight: Any, n_heads: int) -> Any:
    d = len(weight) // n_heads
    rows = []
    for h in range(n_heads):
        for i in range(d // 2):
            rows.append(weight[h * d + i])
            rows.append(weight[h * d + d // 2 + i])
    return torch.stack(rows)


def _reorder_by_view(weight: Any, n_heads: int) -> Any:
    d = weight.shape[0] // n_heads
    return weight.view(n_heads, 2, d // 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _reorder_by_assignment(weight: Any, n_heads: int) -> Any:
    out = torch.empty_like(weight)
    d = len(weight) // n_heads
    for start in range(0, len(weight), d):
        out[start : start + d : 2] = weight[start : start + d // 2]
        out[start + 1 : start + d : 2] = weight[start + d // 2 : start + d]
    return out


TO_NEIGHBOURS = Task(
    id="positions.to_neighbours",
    signature="to_neighbours(weight, n_heads)",
    points=2,
    reference=pos.to_neighbours,
    probes=_reorder_probes,
    twin=_reorder_twin,
    forbidden=frozenset({"to_neighbours"}),
    variants=[_reorder_by_loop, _reorder_by_view, _reorder_by_assignment],
    hints=(
        "In a head of six rows, half-split pairs are (0, 3), (1, 4) and (2, 5). Where must row 3 go to stand beside row 0?",
        "Head by head, the new row 2i is the old row i, and the new row 2i + 1 is the old row i + d/2.",
        "for each head, with its d rows:\n    new rows 0, 2, 4, ... = the first half of the old rows\n"
        "    new rows 1, 3, 5, ... = the second half",
    ),
    mistakes=[
        Fault(
            "rope-reorder-backwards",
            "This is the way back: it takes neighbours apart into halves.",
            "The two halves of a head must end up side by side: row 0 beside row d/2.",
            PAIRS,
            settings=[{"direction": "to halves"}],
        ),
        Fault(
            "rope-reorder-across-heads",
            "The rows are reordered over the whole matrix, so rows of different heads become pairs.",
            "Work head by head: each head has its own d rows.",
            PAIRS,
            settings=[{"heads": "all as one"}, {"direction": "heads by columns"}],
        ),
        Fault(
            "rope-reorder-columns",
            "You reorder the columns; those belong to the inputs.",
            "Reorder rows: the outputs of a linear layer stand in the rows of its weight.",
            PAIRS,
            settings=[{"axis": "columns"}],
        ),
        Fault(
            "rope-reorder-halves-exchanged",
            "The second half of each head comes first, so every pair stands the wrong way round.",
            "Take the first number of a pair from the first half.",
            PAIRS,
            settings=[{"direction": "flipped halves"}],
        ),
    ],
)


# ----- alibi_bias -----------------------------------------------------------------------------------------


def _alibi_probes(generator: torch.Generator) -> list[Probe]:
    length = int(torch.randint(9, 14, (), generator=generator))

    def probe(name: str, n_heads: int, n_queries: int, n_keys: int, core: bool = False) -> Probe:
        return Probe(name, {"n_heads": n_heads, "n_queries": n_queries, "n_keys": n_keys}, core=core)

    return [
        probe("two heads, three places", 2, 3, 3, core=True),
        probe("eight heads", 8, 4, 4, core=True),
        probe("two queries, five keys: the queries are the last", 4, 2, 5),
        probe("one query, as in decoding", 16, 1, length),
        probe("one head", 1, 5, 5),
    ]


def _alibi_twin(
    n_heads: int,
    n_queries: int,
    n_keys: int,
    *,
    slopes: str = "2^(-8h/H)",
    sign: int = -1,
    aligned: str = "end",
    measure: str = "distance",
    axes: str = "heads first",
    sides: str = "both",
) -> Tensor:
    number = torch.arange(1, n_heads + 1)
    slope = {
        "2^(-8h/H)": lambda: 2.0 ** (-8 * number / n_heads),
        "2^-h": lambda: 2.0**-number,
        "from 1": lambda: 2.0 ** (-8 * (number - 1) / n_heads),
        "gentlest first": lambda: 2.0 ** (-8 * number.flip(0) / n_heads),
        "one for all": lambda: torch.full((n_heads,), 0.5),
        "1/h": lambda: 1.0 / number,
        "e^(-8h/H)": lambda: torch.exp(-8 * number / n_heads),
        "2^(-8/h)": lambda: 2.0 ** (-8 / number),
    }[slopes]()
    shift = n_keys - n_queries if aligned == "end" else 0
    after = torch.arange(n_keys) - shift - torch.arange(n_queries)[:, None]
    distance = {
        "distance": lambda: after.abs(),
        "squared": lambda: after**2,
        "log": lambda: after.abs().float().log1p(),
        "from the end": lambda: (n_keys - 1 - torch.arange(n_keys)).expand(n_queries, -1) + 0 * after,
    }[measure]()
    if sides == "signed":
        distance = -after
    bias = sign * slope[:, None, None] * distance
    return bias.permute(1, 2, 0) if axes == "heads last" else bias


def _alibi_signed(n_heads: int, n_queries: int, n_keys: int) -> Tensor:
    return _alibi_twin(n_heads, n_queries, n_keys, sides="signed")


def _alibi_by_key(n_heads: int, n_queries: int, n_keys: int) -> Tensor:
    """The authors' short form: the query's share is one number for a row, which the softmax does not see."""
    places = torch.arange(n_keys).expand(n_heads, n_queries, n_keys)
    return pos.alibi_slopes(n_heads)[:, None, None] * places


def _alibi_by_loops(n_heads: int, n_queries: int, n_keys: int) -> Any:
    bias = torch.zeros(n_heads, n_queries, n_keys)
    for h in range(n_heads):
        for i in range(n_queries):
            for j in range(n_keys):
                bias[h, i, j] = -abs(n_keys - n_queries + i - j) * 2 ** (-8 * (h + 1) / n_heads)
    return bias


def _alibi_by_ratio(n_heads: int, n_queries: int, n_keys: int) -> Any:
    ratio = 2 ** (-8 / n_heads)
    slopes = torch.tensor([ratio * ratio**h for h in range(n_heads)], dtype=torch.float64)
    gaps = (torch.arange(n_keys - n_queries, n_keys)[:, None] - torch.arange(n_keys)[None]).abs()
    return torch.einsum("h,qs->hqs", -slopes, gaps.double())


ALIBI_BIAS = Task(
    id="positions.alibi_bias",
    signature="alibi_bias(n_heads, n_queries, n_keys)",
    points=3,
    reference=pos.alibi_bias,
    accepts=[_alibi_signed, _alibi_by_key],
    probes=_alibi_probes,
    twin=_alibi_twin,
    forbidden=frozenset({"alibi_bias", "alibi_slopes"}),
    variants=[_alibi_by_loops, _alibi_by_ratio],
    hints=(
        "Five keys are in a cache or new, and two queries come. At which of the five places does the first query stand?",
        "The bias of head h is -slope_h times the distance between query and key; the slopes are 2^(-8/H), 2^(-16/H), ..., 2^-8. "
        "The queries are the last of the keys.",
        "slope[h] = 2 ** (-8 * (h + 1) / H) for h = 0, ..., H - 1\nplace of query i = n_keys - n_queries + i; place of key j = j\n"
        "bias[h, i, j] = -slope[h] * |place of query i - place of key j|",
    ),
    mistakes=[
        Fault(
            "alibi-slopes",
            "The slopes are not 2^(-8/H), 2^(-16/H), ..., 2^-8.",
            "For 8 heads they are 1/2, 1/4, ..., 1/256; for 2 heads 1/16 and 1/256.",
            ALIBI,
            settings=[
                {"slopes": s}
                for s in ("2^-h", "from 1", "gentlest first", "one for all", "1/h", "e^(-8h/H)", "2^(-8/h)")
            ],
        ),
        Fault(
            "alibi-rewards-distance",
            "Far keys get a positive bias, so distance is rewarded.",
            "Put a minus before the slope: the further, the lower the score.",
            ALIBI,
            settings=[{"sign": 1}, {"sign": 1, "sides": "signed"}],
        ),
        Fault(
            "alibi-aligned-to-the-start",
            "With fewer queries than keys you count the queries from place 0.",
            "The queries are the last ones: query i stands at place n_keys - n_queries + i.",
            ALIBI,
            settings=[{"aligned": "start"}, {"aligned": "start", "sides": "signed"}],
        ),
        Fault(
            "alibi-not-linear",
            "The bias does not grow linearly with the distance between query and key.",
            "Multiply the slope by the plain distance, counted from each query's own place.",
            ALIBI,
            settings=[{"measure": "squared"}, {"measure": "log"}, {"measure": "from the end"}],
        ),
        Fault(
            "alibi-heads-last",
            "The heads stand on the last axis.",
            "Return (H, L, S): the bias is added to scores (B, H, L, S).",
            ALIBI,
            settings=[{"axes": "heads last"}],
        ),
    ],
)


# ----- relative_scores ------------------------------------------------------------------------------------


def _relative_probes(generator: torch.Generator) -> list[Probe]:
    def probe(
        name: str,
        before: tuple[int, ...],
        n_queries: int,
        n_keys: int,
        d: int,
        reach: int,
        core: bool = False,
    ) -> Probe:
        args = {
            "query": (randn(generator, *before, n_queries, d) * 4).round() / 4,
            "key": (randn(generator, *before, n_keys, d) * 4).round() / 4,
            "table": (randn(generator, 2 * reach + 1, d) * 4).round() / 4,
        }
        return Probe(name, args, gradients=tuple(args), core=core)

    return [
        probe("three places, distances up to 2", (), 3, 3, 2, 2, core=True),
        probe("two samples, three heads, six places, distances up to 2", (2, 3), 6, 6, 5, 2, core=True),
        probe("two queries, five keys: the queries are the last", (2,), 2, 5, 4, 3),
        probe("a table that is longer than needed", (2,), 4, 4, 3, 7),
        probe("one row for each direction and one for the place itself", (3,), 5, 5, 6, 1),
    ]


def _relative_twin(
    query: Tensor,
    key: Tensor,
    table: Tensor,
    *,
    direction: int = 1,
    beyond: str = "last row",
    scale: str = "all",
    aligned: str = "end",
    side: str = "query",
    parts: str = "both",
    cut: bool = False,
) -> Tensor:
    n_queries, n_keys, reach = query.shape[-2], key.shape[-2], len(table) // 2
    shift = n_keys - n_queries if aligned == "end" else 0
    after = torch.arange(n_keys) - shift - torch.arange(n_queries)[:, None]
    if beyond == "absolute":
        after = after.abs()
    rows = direction * after + reach
    inside = (rows >= 0) & (rows < len(table))
    if beyond == "python":  # a negative index counts from the end
        rows = torch.where(rows < 0, rows % len(table), rows.clamp(max=len(table) - 1))
    elif beyond == "modulo":
        rows = rows % len(table)
    vectors = table[rows.clamp(0, len(table) - 1)]  # (L, S, d)
    if beyond == "nothing":
        vectors = vectors * inside.unsqueeze(-1)
    if side == "query":
        by_distance = torch.einsum("...qd,qsd->...qs", query, vectors)
    else:
        by_distance = torch.einsum("...sd,qsd->...qs", key, vectors)
    root = query.shape[-1] ** 0.5
    content = query @ key.transpose(-2, -1)
    content, by_distance = {
        "both": (content, by_distance),
        "content": (content, 0 * by_distance),
        "distance": (0 * content, by_distance),
        "product": (content * by_distance, 0 * content),
    }[parts]
    result: Tensor = {
        "all": (content + by_distance) / root,
        "content": content / root + by_distance,
        "none": content + by_distance,
        "d": (content + by_distance) / root**2,
    }[scale]
    return result.detach() if cut else result


def _relative_by_loops(query: Any, key: Any, table: Any) -> Any:
    n_q, n_k, d = query.shape[-2], key.shape[-2], query.shape[-1]
    reach = (len(table) - 1) // 2
    lines = []
    for i in range(n_q):
        line = []
        for j in range(n_k):
            r = max(-reach, min(reach, j - (n_k - n_q + i)))
            line.append((query[..., i, :] * (key[..., j, :] + table[r + reach])).sum(-1))
        lines.append(torch.stack(line, dim=-1))
    return torch.stack(lines, dim=-2) / d**0.5


def _relative_by_einsum(query: Any, key: Any, table: Any) -> Any:
    n_q, n_k = query.shape[-2], key.shape[-2]
    reach = len(table) // 2
    r = torch.arange(n_k)[None, :] - torch.arange(n_k - n_q, n_k)[:, None]
    vectors = table[torch.clip(r, -reach, reach) + reach]
    scores = torch.einsum("...id,...jd->...ij", query, key) + torch.einsum("...id,ijd->...ij", query, vectors)
    return scores / torch.sqrt(torch.tensor(query.shape[-1], dtype=query.dtype))


def _relative_with_every_key(query: Any, key: Any, table: Any) -> Any:
    # A key of its own for every query.
    n_q, n_k = query.shape[-2], key.shape[-2]
    reach = len(table) // 2
    r = (torch.arange(n_k) - torch.arange(n_k - n_q, n_k).unsqueeze(1)).clamp(-reach, reach) + reach
    keys = key.unsqueeze(-3) + table[r]
    return (query.unsqueeze(-2) * keys).sum(-1) * query.shape[-1] ** -0.5


RELATIVE_SCORES = Task(
    id="positions.relative_scores",
    signature="relative_scores(query, key, table)",
    points=3,
    reference=pos.relative_scores,
    probes=_relative_probes,
    twin=_relative_twin,
    forbidden=frozenset({"relative_scores"}),
    variants=[_relative_by_loops, _relative_by_einsum, _relative_with_every_key],
    hints=(
        "The table has five rows. Which of them belongs to the key one place before the query, and which to a key nine places before it?",
        "For r = place of the key - place of the query, cut to -R ... R, take row R + r, and score query . (key + row) / sqrt(d). "
        "The queries are the last of the keys.",
        "R = len(table) // 2\nr[i, j] = j - (S - L + i), clamped to -R and R\n"
        "score[i, j] = query[i] . (key[j] + table[R + r[i, j]]) / sqrt(d)",
    ),
    mistakes=[
        Fault(
            "relative-direction",
            "Before and after are exchanged: a key before the query gets the row of one after it.",
            "Count r = place of the key - place of the query, and take row R + r.",
            RELATIVE,
            settings=[{"direction": -1}],
        ),
        Fault(
            "relative-not-clipped",
            "Distances beyond the table get no row, or one from its other end: Python counts a negative index from the end.",
            "Clamp the distance to -R and R before you add R.",
            RELATIVE,
            settings=[{"beyond": "nothing"}, {"beyond": "python"}, {"beyond": "modulo"}],
        ),
        Fault(
            "relative-absolute-distance",
            "You use the distance without its sign, so before and after get the same row.",
            "Keep the sign: the table has a row for each direction.",
            RELATIVE,
            settings=[{"beyond": "absolute"}],
        ),
        Fault(
            "relative-scale",
            "Not the whole score is divided by the root of d.",
            "Add both products first, and divide the sum by sqrt(d).",
            RELATIVE,
            settings=[{"scale": "content"}, {"scale": "none"}, {"scale": "d"}],
        ),
        Fault(
            "relative-aligned-to-the-start",
            "With fewer queries than keys you count the queries from place 0.",
            "The queries are the last ones: query i stands at place S - L + i.",
            RELATIVE,
            settings=[{"aligned": "start"}],
        ),
        Fault(
            "relative-row-times-key",
            "You multiply the row of the table by the key.",
            "The query asks both: multiply the row by the query, as you multiply the key by it.",
            RELATIVE,
            settings=[{"side": "key"}],
        ),
        Fault(
            "relative-part-missing",
            "One of the two parts, content or distance, is missing, or they are multiplied.",
            "Add query . key and query . row.",
            RELATIVE,
            settings=[{"parts": "content"}, {"parts": "distance"}, {"parts": "product"}],
        ),
        Fault("backward-detached", *DETACHED, RELATIVE, settings=[{"cut": True}], sign=without_gradient),
    ],
)


# ----- grade this: implementations of the rotation as source text ------------------------------------------


def _right_stacked(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    angles = torch.outer(positions.float(), base ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1]))
    a, b = x[..., ::2], x[..., 1::2]
    turned = (a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos())
    return torch.stack(turned, dim=-1).flatten(-2)


def _right_complex(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    theta = 1.0 / base ** (torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    turn = torch.exp(1j * positions[:, None] * theta)
    return torch.view_as_real(torch.complex(x[..., 0::2], x[..., 1::2]) * turn).flatten(-2)


def _right_repeated(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    k = torch.arange(x.shape[-1])
    angle = positions[:, None] * base ** (-2 * (k // 2) / x.shape[-1])
    partner = x[..., k + 1 - 2 * (k % 2)] * (2 * (k % 2) - 1)
    return x * angle.cos() + partner * angle.sin()


def _wrong_halves(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    angles = torch.outer(positions.float(), base ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1]))
    a, b = x.chunk(2, dim=-1)
    turned = [a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()]
    return torch.cat(turned, dim=-1)


def _wrong_halves_out(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    angles = torch.outer(positions.float(), base ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1]))
    a, b = x[..., ::2], x[..., 1::2]
    turned = [a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()]
    return torch.cat(turned, dim=-1)


def _wrong_mixed(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    angles = torch.outer(positions.float(), base ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1]))
    angles = angles.repeat_interleave(2, dim=-1)
    a, b = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-b, a], dim=-1) * angles.sin()


def _wrong_swapped(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    angles = torch.outer(positions.float(), base ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1]))
    sin, cos = angles.cos(), angles.sin()
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def _wrong_backwards(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    angles = torch.outer(positions.float(), base ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1]))
    a, b = x[..., ::2], x[..., 1::2]
    turned = (a * angles.cos() + b * angles.sin(), b * angles.cos() - a * angles.sin())
    return torch.stack(turned, dim=-1).flatten(-2)


def _wrong_scaling(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    angles = torch.outer(positions.float(), base ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1]))
    angles = angles.repeat_interleave(2, dim=-1)
    return x * angles.cos() - x * angles.sin()


def _wrong_frequency(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    angles = torch.outer(positions.float(), base ** (-torch.arange(x.shape[-1] // 2) / x.shape[-1]))
    a, b = x[..., ::2], x[..., 1::2]
    turned = (a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos())
    return torch.stack(turned, dim=-1).flatten(-2)


def _wrong_one_speed(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    angles = torch.outer(positions.float(), base ** -(torch.arange(0, x.shape[-1], 2) // x.shape[-1]).float())
    a, b = x[..., ::2], x[..., 1::2]
    turned = (a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos())
    return torch.stack(turned, dim=-1).flatten(-2)


def _wrong_places(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    places = torch.arange(x.shape[-2]).float()
    angles = torch.outer(places, base ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1]))
    a, b = x[..., ::2], x[..., 1::2]
    turned = (a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos())
    return torch.stack(turned, dim=-1).flatten(-2)


def _wrong_untouched(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    return x.clone()


RIGHT_SPECIMENS = (_right_stacked, _right_complex, _right_repeated)
WRONG_SPECIMENS = (
    _wrong_halves,
    _wrong_halves_out,
    _wrong_mixed,
    _wrong_swapped,
    _wrong_backwards,
    _wrong_scaling,
    _wrong_frequency,
    _wrong_one_speed,
    _wrong_places,
    _wrong_untouched,
)


def _specimen_probes(generator: torch.Generator) -> list[Probe]:
    return specimen_probes("apply_rope", RIGHT_SPECIMENS, WRONG_SPECIMENS, generator)


def _examine(apply_rope: Any, places: tuple[int, ...] = (0, 3, 1, 9), width: int = 8) -> bool:
    """Accept a rotation that gives the right numbers for places in any order and more than two pairs."""
    x = randn(torch.Generator().manual_seed(3), 2, len(places), width)
    positions = torch.tensor(places)
    return torch.allclose(apply_rope(x, positions), pos.apply_rope(x, positions), atol=1e-4)


def _examine_by_hand(apply_rope: Any) -> None:
    import math

    # Width 4: the first pair turns by 1 a place, the second by 1/100.
    x = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 2.0, 3.0, 0.0]])
    got = apply_rope(x, torch.tensor([2, 5]))
    wanted = torch.tensor(
        [
            [math.cos(2), math.sin(2), -math.sin(0.02), math.cos(0.02)],
            [-2 * math.sin(5), 2 * math.cos(5), 3 * math.cos(0.05), 3 * math.sin(0.05)],
        ]
    )
    assert (got - wanted).abs().max() < 1e-4, got


def _keeps_lengths(apply_rope: Any) -> bool:
    x = randn(torch.Generator().manual_seed(3), 2, 4, 8)
    turned = apply_rope(x, torch.tensor([0, 3, 1, 9]))
    return torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-4)


def _is_relative(apply_rope: Any) -> bool:
    q, k = randn(torch.Generator().manual_seed(3), 2, 1, 8)

    def score(m: int, n: int) -> Any:
        turned_q, turned_k = apply_rope(q, torch.tensor([m])), apply_rope(k, torch.tensor([n]))
        return (turned_q * turned_k).sum()

    same = torch.allclose(score(5, 2), score(9, 6), atol=1e-4)
    return same and not torch.allclose(score(5, 2), score(5, 4), atol=1e-4)


def _leaves_zero_alone(apply_rope: Any) -> bool:
    x = randn(torch.Generator().manual_seed(3), 2, 1, 8)
    return torch.allclose(apply_rope(x, torch.tensor([0])), x, atol=1e-4)


GRADE_THIS = Task(
    id="positions.grade_this",
    signature="examine(apply_rope)",
    points=3,
    reference=_examine,
    probes=_specimen_probes,
    variants=[_examine_by_hand],
    hints=(
        "An implementation that exchanges cosine and sine keeps every length and every relative score. Where does it show?",
        "Lengths, relative scores and place 0 each let wrong rotations pass. Compare numbers, at places that are not 0, 1, 2, ..., "
        "with at least two pairs.",
        "draw x of shape (2, 4, 8), and take places such as 0, 3, 1, 9\nwanted = the rotation that you trust: your own, or complex numbers\n"
        "return True if apply_rope(x, places) is close to wanted, else False",
    ),
    mistakes=[
        Fault(
            "test-of-lengths-only",
            "You look at lengths only; many wrong rotations keep them.",
            "Compare the numbers themselves with ones that you trust.",
            WRONG,
            implementations=[_keeps_lengths],
        ),
        Fault(
            "test-of-scores-only",
            "You look only at scores: that they depend on the distance, and perhaps at lengths. "
            "Another pairing, another order and exchanged sines pass.",
            "Compare the rotated numbers, too.",
            WRONG,
            implementations=[
                _is_relative,
                lambda apply_rope: _is_relative(apply_rope) and _keeps_lengths(apply_rope),
            ],
        ),
        Fault(
            "test-at-place-zero",
            "At place 0 nothing turns, so most mistakes are invisible there.",
            "Use places that are not 0.",
            WRONG,
            implementations=[_leaves_zero_alone],
        ),
        Fault(
            "test-with-one-pair",
            "A width of 2 has one pair: its order, its pairing and its frequency are always right.",
            "Use a width of at least 4.",
            PAIRS,
            implementations=[lambda apply_rope: _examine(apply_rope, width=2)],
        ),
        Fault(
            "test-with-counted-places",
            "Your places are 0, 1, 2, ..., so a function that ignores them passes.",
            "Use places with gaps, in another order.",
            ROTARY,
            implementations=[lambda apply_rope: _examine(apply_rope, places=(0, 1, 2, 3))],
        ),
        *verdict_faults(WRONG),
    ],
)


# ----- read claims ----------------------------------------------------------------------------------------


_CLAIMS = {
    "slowest wavelength": 2 * math.pi * 10000 ** (62 / 64),
    "score of (5, 2)": math.cos(3),
    "score of (105, 102)": 1.7,
    "table": 4096 * 32,
    "extra work": 1 / 512,
    "weight ratio": math.exp(2),
}


READ_CLAIMS = Task(
    id="positions.read_claims",
    signature="answers: a dictionary",
    points=3,
    reference=_CLAIMS.get,
    accepts=[
        {
            **_CLAIMS,
            "slowest wavelength": 47117.0,
            "score of (5, 2)": -0.99,
            "extra work": 0.00195,
            "weight ratio": 7.389,
        }.get
    ],
    probes=answer_probes(
        {
            "slowest wavelength": "after how many places the slowest pair of a head of width 64 has turned once",
            "score of (5, 2)": "the product of the two rotated vectors at places 5 and 2",
            "score of (105, 102)": "the score after both tokens have moved 100 places on",
            "table": "how many angles a table for 4,096 places needs",
            "extra work": "the products of the rotation as a share of those of the four projections",
            "weight ratio": "how many times as much weight the nearer of two equal keys gets",
        }
    ),
    is_value=True,
    hints=(
        "The last pair of a head of width 64 has i = 31. By how much does it turn from one place to the next?",
        "Pair i turns by base^(-2i/d) a place, and once round after 2 pi divided by that. Scores depend on m - n. "
        "A bias is added before the softmax, so it multiplies the weight by e to the bias.",
        "slowest: 2 pi * 10000^(62/64)\nscore: cos((5 - 2) * 1)\ntable: places times pairs\n"
        "work: 4 products for each of D/2 pairs, of q and of k, against 4 * D * D\nratio: e^(slope * difference of distances)",
    ),
    mistakes=[
        known_answer(
            _CLAIMS,
            "slowest wavelength",
            10000 ** (62 / 64),
            "claims-no-full-turn",
            "This is the time for one radian; a full turn has 2 pi of them.",
            "Multiply by 2 pi.",
            FREQUENCIES,
        ),
        known_answer(
            _CLAIMS,
            "slowest wavelength",
            2 * math.pi * 10000,
            "claims-last-pair",
            "The exponent of the last pair is not 1: it has i = d/2 - 1.",
            "Take i = 31, so the exponent 2i/d is 62/64.",
            FREQUENCIES,
        ),
        known_answer(
            _CLAIMS,
            "slowest wavelength",
            2 * math.pi * 10000 ** (31 / 64),
            "rope-frequency-wrong",
            "The exponent lacks its 2.",
            "Pair i turns by 10000^(-2i/64), with i = 31.",
            FREQUENCIES,
        ),
        known_answer(
            _CLAIMS,
            "score of (5, 2)",
            math.cos(7),
            "rope-key-rotated-backwards",
            "This is the cosine of 5 + 2: you turned the key backwards.",
            "Turn both the same way; the product of two unit vectors is the cosine of the difference.",
            WRONG,
        ),
        known_answer(
            _CLAIMS,
            "score of (5, 2)",
            math.cos(math.radians(3)),
            "claims-degrees",
            "You took the angle in degrees.",
            "Angles are in radians: a place is 1 radian for the first pair.",
            ROTARY,
        ),
        known_answer(
            _CLAIMS,
            "table",
            4096 * 64,
            "rope-frequency-per-column",
            "You counted an angle for each number; a pair shares one.",
            "A width of 64 has 32 pairs.",
            PAIRS,
        ),
        known_answer(
            _CLAIMS,
            "table",
            4096 * 32 * 32,
            "rope-table-per-layer",
            "You counted the angles again for each of the 32 layers.",
            "Angles depend on the place only: one table serves all layers and heads.",
            ROTARY,
        ),
        known_answer(
            _CLAIMS,
            "table",
            0,
            "rope-cannot-be-precomputed",
            "Angles depend on the place only, so they can be tabulated before any token is read.",
            "Count an angle for each place and each pair.",
            ROTARY,
        ),
        known_answer(
            _CLAIMS,
            "extra work",
            0.5,
            "rope-costs-more",
            "You count a product with a full rotation matrix, which is nearly all zeros.",
            "A pair takes 4 products, so a query of D numbers takes 2 D, not D times D.",
            ROTARY,
        ),
        known_answer(
            _CLAIMS,
            "extra work",
            2 / 512,
            "claims-two-projections",
            "You compare with two projections; a layer has four, for queries, keys, values and the output.",
            "Divide 4 D products by 4 times D times D.",
            ROTARY,
        ),
        known_answer(
            _CLAIMS,
            "extra work",
            1 / 1024,
            "claims-half-the-products",
            "You count two products for each pair, or you rotate the queries only.",
            "A pair takes four products: two with the cosine, two with the sine. Keys are rotated as well.",
            ROTARY,
        ),
        known_answer(
            _CLAIMS,
            "weight ratio",
            2.0,
            "claims-bias-not-a-weight",
            "This is the difference of the two biases; the softmax takes e to its power.",
            "Compute e^2.",
            ALIBI,
        ),
        known_answer(
            _CLAIMS,
            "weight ratio",
            math.exp(-2),
            "alibi-rewards-distance",
            "You gave the farther key the larger weight.",
            "The bias is 0 at distance 0 and -2 at distance 4: the near key gets more.",
            ALIBI,
        ),
    ],
)

TASKS = [
    SINUSOIDAL,
    FREQUENCY_TASK,
    APPLY_ROPE,
    ROTARY_ATTENTION,
    TO_NEIGHBOURS,
    ALIBI_BIAS,
    RELATIVE_SCORES,
    GRADE_THIS,
    READ_CLAIMS,
]
