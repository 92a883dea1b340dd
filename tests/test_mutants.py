"""Small random-looking changes of the solutions: the checks have to notice every one that matters.

Cosmic Ray makes the mutants: it changes one operator, number, comparison, keyword or loop at a time. Two
changes of our own are added: a statement left out, and a `with` block without its `with`. A mutant that gets
full marks is a blind spot of the probes, unless it is no mistake at all; those stand in EQUIVALENT.
"""

import ast
import multiprocessing
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from assignment import answer_cells, define, items, read
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

from dianlib.checks import grade, tasks
from dianlib.checks.registry import CHAPTERS

SEEDS = (0, 7)

# Mutants that are right answers: the changed line, and why it changes no result.
EQUIVALENT = {
    "metrics.f1": {
        "return 2 * hits / (called + there).clamp(min=2)": "a divisor of 1 has no hit above it",
    },
    "metrics.evaluate": {
        "if True:": "without no_grad the counts are the same; only memory is lost",
    },
    "metrics.grade_this": {
        "pass  # return True": "a test that returns nothing accepts, like one made of assert statements",
    },
    "metrics.read_a_table": {
        'answers["weight"] = 64 // 16': "16 divides 64",
    },
    "mlp.relu": {
        "return x * (x >= 0)": "0 times 1 is 0, and at 0 every slope from 0 to 1 is accepted",
    },
    "mlp.grade_this": {
        "pass  # return True": "a test that returns nothing accepts, like one made of assert statements",
        "if not torch.allclose(softmax(logits - shift), expected, atol=1e-3):": "a shift down serves, too",
        "for shift in (1.0, 1000.0, torch.tensor([[0.0], [500.0]])):": "any small shift serves",
        "for shift in (-1.0, 1000.0, torch.tensor([[0.0], [500.0]])):": "any small shift serves",
        "for shift in (0.0, 1001.0, torch.tensor([[0.0], [500.0]])):": "any large shift serves",
        "for shift in (0.0, 999.0, torch.tensor([[0.0], [500.0]])):": "any large shift serves",
        "for shift in (0.0, 1000.0, torch.tensor([[1.0], [500.0]])):": "the rows are far apart all the same",
        "for shift in (0.0, 1000.0, torch.tensor([[-1.0], [500.0]])):": "the rows are far apart all the same",
        "for shift in (0.0, 1000.0, torch.tensor([[0.0], [501.0]])):": "the rows are far apart all the same",
        "for shift in (0.0, 1000.0, torch.tensor([[0.0], [499.0]])):": "the rows are far apart all the same",
    },
    "mlp.read_logs": {
        'answers["parameters"] = sum(n_in * n_out | n_out for n_in, n_out in pairwise(sizes))': (
            "the two numbers share no binary digit, so `or` adds them"
        ),
        'answers["parameters"] = sum(n_in * n_out ^ n_out for n_in, n_out in pairwise(sizes))': (
            "the two numbers share no binary digit, so `exclusive or` adds them"
        ),
    },
    "search.set_of_depths": {
        "width = 0": "it starts lower and ends at the same width",
    },
    "search.choose": {
        'key = (mean, ~result["parameters"])': "~n is -n - 1: the same order",
    },
    "search.paired_interval": {
        "variance = (d % 2).mean().item() - m**2": "-1, 0 and 1 give 1, 0 and 1, like their squares",
    },
    "search.audit_table": {
        "if abs(nearest - value) >= 0.5 * 10**-decimals:": "no printed value lies exactly half-way",
    },
    "search.grade_this": {
        "return int(chosen) <= 1 and abs(float(reported) - honest) < 1e-6": "the report tells as well",
        "return int(chosen) >= 1 and abs(float(reported) - honest) < 1e-6": "the report tells as well",
        "return int(chosen) == 1 and abs(float(reported) - honest) <= 1e-6": "no report is off by 1e-6",
    },
    "search.read_a_study": {
        "variances = [p * (1 % p) / n_test_images for p in (five_layers, four_layers)]": (
            "for p above one half, the rest of 1 divided by p is 1 - p"
        ),
        'answers["standard errors"] = (five_layers % four_layers) / math.sqrt(sum(variances))': (
            "the rest of a division whose quotient is 1 is the difference"
        ),
        'answers["parameters"] = sum(a * b | b for a, b in pairwise(sizes_with_five_hidden_layers))': (
            "the two numbers share no binary digit, so `or` adds them"
        ),
        'answers["parameters"] = sum(a * b ^ b for a, b in pairwise(sizes_with_five_hidden_layers))': (
            "the two numbers share no binary digit, so `exclusive or` adds them"
        ),
    },
    "rnn.clip_grad_norm": {
        "if norm >= max_norm:": "at the bound itself the factor is 1",
    },
    "rnn.RNNClassifier": {
        "h = torch.zeros_like(inputs[:, -1])": "every step has the same shape",
    },
    "rnn.grade_this": {
        "xs = torch.stack([square, square.T, +square])": "two different samples are enough",
        "xs = torch.stack([square, square.T, square])": "two different samples are enough",
        "torch.manual_seed(1)": "any random numbers serve",
        "torch.manual_seed(-1)": "any random numbers serve",
        "pass  # torch.manual_seed(0)": "any random numbers serve",
        "bias = square[1]": "any bias that is not 0 serves",
        "bias = square[-1]": "any bias that is not 0 serves",
    },
    "rnn.read_claims": {
        'answers["time steps"] = n_pixels / (layer_input - n_hidden)': "the division leaves no rest",
        'answers["time steps"] = n_pixels // (layer_input ^ n_hidden)': (
            "128 is one binary digit of 912, so `exclusive or` takes it away"
        ),
    },
    "lstm.hidden_size_at_budget": {
        "size = 0": "the search may begin one lower: a layer without units always fits",
    },
    "lstm.grade_this": {
        "generator = torch.Generator().manual_seed(0)": "other random numbers serve as well",
        "generator = torch.Generator().manual_seed(2)": "other random numbers serve as well",
    },
    "lstm.read_a_memory": {
        'answers["bias for 200"] = math.log(wanted / (1 % wanted))': "a remainder that is 1 - wanted",
        'answers["bias for 200"] = math.log(wanted // (1 - wanted))': "288.04 rounded down: the fifth digit",
    },
    "seq2seq.Encoder": {
        "self.gru = nn.GRU(hidden_size, hidden_size // 2, batch_first=False, bidirectional=True)": (
            "a packed batch has no batch axis"
        ),
    },
    "seq2seq.greedy_decode": {
        "ended = ended + (token == eos)": "the sum of two truth values is their `or`",
    },
    "seq2seq.grade_this": {
        "pass  # return True": "a test that returns nothing accepts, like one made of assert statements",
        "query, keys = torch.tensor([[0.2], [0.5]]), torch.arange(6.0).reshape(2, 3, 1) - 5": (
            "any unequal keys serve"
        ),
        "query, keys = torch.tensor([[0.2], [0.5]]), torch.arange(6.0).reshape(2, 3, 1) % 5": (
            "any unequal keys serve"
        ),
        "query, keys = torch.tensor([[1.2], [0.5]]), torch.arange(6.0).reshape(2, 3, 1) / 5": (
            "any queries serve"
        ),
        "query, keys = torch.tensor([[-0.8], [0.5]]), torch.arange(6.0).reshape(2, 3, 1) / 5": (
            "any queries serve"
        ),
        "query, keys = torch.tensor([[0.2], [1.5]]), torch.arange(6.0).reshape(2, 3, 1) / 5": (
            "any queries serve"
        ),
        "query, keys = torch.tensor([[0.2], [-0.5]]), torch.arange(6.0).reshape(2, 3, 1) / 5": (
            "any queries serve"
        ),
        "query, keys = torch.tensor([[0.2], [0.5]]), torch.arange(6.0).reshape(2, 3, 1) / 6": (
            "any unequal keys serve"
        ),
        "query, keys = torch.tensor([[0.2], [0.5]]), torch.arange(6.0).reshape(2, 3, 1) / 4": (
            "any unequal keys serve"
        ),
        "for b, length in enumerate((2, 4)):": "a slice ends with its tensor, after 3",
    },
    "attention.attention_one_query": {
        "weights = torch.softmax(scores, dim=-1)": "a vector has one axis, the first and the last",
    },
    "attention.translator_masks": {
        "of_target = padding_mask(target_lengths, n_target) * causal_mask(n_target)": (
            "the product of two truth values is their `and`"
        ),
    },
    "attention.grade_this": {
        "generator = torch.Generator().manual_seed(0)": "other random numbers serve as well",
        "generator = torch.Generator().manual_seed(2)": "other random numbers serve as well",
        "sizes = [(3, 4), (6, 4), (6, 5)]": "values may be wider than keys",
        "sizes = [(3, 4), (6, 4), (6, 3)]": "values may be narrower than keys",
        "mask = torch.ones(3, 6).tril(2).bool()": "it hides other keys",
        "mask = torch.ones(3, 6).tril(4).bool()": "it hides other keys",
        "for i in range(2):": "two queries are enough",
        "row = torch.softmax(key[seen] @ query[i] / math.sqrt(4), dim=-1)": "a vector has one axis",
        "if not torch.allclose(weights[i, seen], row, atol=1.0001):": "raw scores are further off",
        "pass  # return True": "a test that returns nothing accepts, like one made of assert statements",
    },
    "attention.read_a_heat_map": {
        'answers["open places"] = sum(all_keys ^ after for after in range(new_queries))': (
            "7 is all ones in binary, so `exclusive or` takes away"
        ),
    },
    "multihead.grade_this": {
        "x = torch.randn(4, 5, 12)  # several samples, tokens and heads": "any number of samples serves",
        "x = torch.randn(2, 5, 12)  # several samples, tokens and heads": "any number of samples serves",
        "x = torch.randn(3, 6, 12)  # several samples, tokens and heads": "any few tokens serve",
        "x = torch.randn(3, 4, 12)  # several samples, tokens and heads": "any few tokens serve",
        "if True:": "without no_grad the numbers are the same; only memory is lost",
        "oracle = nn.MultiheadAttention(12, 4, bias=True, batch_first=True)": "torch's biases start at zero",
    },
    "positions.rope_frequencies": {
        "def rope_frequencies(head_dim, base=10001.0):": "off by less than one part in ten thousand",
        "def rope_frequencies(head_dim, base=9999.0):": "off by less than one part in ten thousand",
    },
    "positions.grade_this": {
        "x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))": "any numbers serve",
        "x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(2))": "any numbers serve",
        "places = torch.tensor([6, 0, 40, 2])": "other places serve as well",
        "places = torch.tensor([4, 0, 40, 2])": "other places serve as well",
        "places = torch.tensor([5, 1, 40, 2])": "other places serve as well",
        "places = torch.tensor([5, -1, 40, 2])": "other places serve as well",
        "places = torch.tensor([5, 0, 41, 2])": "other places serve as well",
        "places = torch.tensor([5, 0, 39, 2])": "other places serve as well",
        "places = torch.tensor([5, 0, 40, 3])": "other places serve as well",
        "places = torch.tensor([5, 0, 40, 1])": "other places serve as well",
        "return torch.allclose(apply_rope(x, places), wanted, atol=1.001)": "each wrong one is off by more",
    },
    "positions.read_claims": {
        'answers["slowest wavelength"] = 2 * math.pi * 10001.0 ** (62 / head_dim)': "the fifth digit",
        'answers["slowest wavelength"] = 2 * math.pi * 9999.0 ** (62 / head_dim)': "the fifth digit",
    },
    "grouped_query.KVCache": {
        "def length(self):": "without its decorator a method, which may stand for a property",
        "def nbytes(self):": "without its decorator a method, which may stand for a property",
    },
    "grouped_query.grade_this": {
        "generator = torch.Generator().manual_seed(0)": "other random numbers serve as well",
        "generator = torch.Generator().manual_seed(2)": "other random numbers serve as well",
        "query = torch.randn(2, 6, 4, 4, generator=generator)": "four queries serve as well as three",
        "query = torch.randn(2, 6, 2, 4, generator=generator)": "two queries serve as well as three",
        "key, value = torch.randn(2, 1, 2, 5, 4, generator=generator)": "one sample of keys serves",
        "key, value = torch.randn(2, 2, 3, 5, 4, generator=generator)": "three key-value heads serve",
        "key, value = torch.randn(2, 2, 2, 6, 4, generator=generator)": "six keys serve",
        "key, value = torch.randn(2, 2, 2, 4, 4, generator=generator)": "four keys serve",
    },
    "grouped_query.read_a_claim": {
        'answers["tokens"] = memory // (of_a_head * n_kv_heads)': "the division leaves no rest",
        'answers["tokens with 32"] = memory // (of_a_head * n_heads)': "the division leaves no rest",
    },
}


@dataclass(frozen=True)
class Mutant:
    """A changed answer cell: what was changed, the line as it is now, and how to run it."""

    task: str
    candidate: str
    operator: str
    line: str
    sources: tuple[str, ...]  # all answer cells of the notebook, one of them changed


def changed_line(before: str, after: str) -> str:
    """Return the first line that differs, without the spaces that a change may leave behind."""
    lines = zip(before.splitlines(), after.splitlines(), strict=True)
    return next(squeezed(b) for a, b in lines if squeezed(a) != squeezed(b))


def squeezed(line: str) -> str:
    return line.replace(" ", "")


def by_cosmic_ray(code: str) -> Iterator[tuple[str, str]]:
    """Yield (operator, changed code) for every operator that needs no settings and every place for it."""
    for name in operator_names():
        operator = get_operator(name)
        place = 0
        while not operator.arguments() and (changed := mutate_code(code, operator(), place)) is not None:
            yield name, changed
            place += 1


def by_leaving_out(code: str) -> Iterator[tuple[str, str]]:
    """Yield the code without one statement, or with a `with` that does nothing."""
    lines = code.splitlines()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.With):
            first, last, instead = node.lineno, node.lineno, "if True:"
        elif isinstance(node, ast.Expr | ast.Assign | ast.AugAssign | ast.Return):
            first, last = node.lineno, node.end_lineno or node.lineno
            instead = f"pass  # {lines[first - 1].strip()}"
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue  # a docstring
        else:
            continue
        blank = [""] * (last - first)
        yield (
            "left out",
            "\n".join([*lines[: first - 1], " " * node.col_offset + instead, *blank, *lines[last:]]),
        )


def mutants_of(code: str) -> Iterator[tuple[str, str]]:
    """Yield each different mutant once; what is no valid Python is none."""
    seen = {ast.dump(ast.parse(code))}
    for operator, changed in [*by_cosmic_ray(code), *by_leaving_out(code)]:
        try:
            tree = ast.dump(ast.parse(changed))
        except SyntaxError:
            continue
        if tree not in seen:
            seen.add(tree)
            yield operator, changed


def all_mutants() -> Iterator[Mutant]:
    for slug in CHAPTERS:
        notebook = read("solutions", slug)
        cells = answer_cells(notebook)
        for item in items(notebook):
            for operator, changed in mutants_of(item.answer.source):
                sources = tuple(changed if cell is item.answer else cell.source for cell in cells)
                line = changed_line(item.answer.source, changed)
                yield Mutant(item.task, item.candidate, operator, line, sources)


def survives(mutant: Mutant) -> bool:
    """Tell whether a mutant gets full marks on every seed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `x is 3` and the like
            names = define(list(mutant.sources))
    except Exception:
        return False
    return all(grade(mutant.task, names.get(mutant.candidate), seed).passed for seed in SEEDS)


def prepare() -> None:
    """Take one thread, and have less patience: a mutant that never ends is rejected sooner."""
    torch.set_num_threads(1)
    for task in tasks().values():
        object.__setattr__(task, "limit", 2.0)


@pytest.fixture(scope="module")
def graded() -> list[tuple[Mutant, bool]]:
    """Every mutant of every solution, and whether it survived. Two processes share the work."""
    mutants = list(all_mutants())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context, initializer=prepare) as pool:
        return list(zip(mutants, pool.map(survives, mutants, chunksize=8), strict=True))


def test_every_mutant_is_rejected_unless_it_is_right(graded: list[tuple[Mutant, bool]]) -> None:
    survivors = [mutant for mutant, alive in graded if alive]
    allowed = {(task, squeezed(line)) for task, lines in EQUIVALENT.items() for line in lines}
    print(f"{len(graded)} mutants, {len(graded) - len(survivors)} rejected, {len(survivors)} right answers")
    unexplained = [(m.task, m.operator, m.line) for m in survivors if (m.task, m.line) not in allowed]
    assert unexplained == []


def test_every_solution_has_mutants(graded: list[tuple[Mutant, bool]]) -> None:
    mutated = {mutant.task for mutant, _ in graded}
    assert mutated == {item.task for slug in CHAPTERS for item in items(read("solutions", slug))}
    assert len(graded) > 1000


def test_the_table_of_right_mutants_has_no_stale_line(graded: list[tuple[Mutant, bool]]) -> None:
    alive = {(mutant.task, mutant.line) for mutant, survived in graded if survived}
    listed = {(task, squeezed(line)) for task, lines in EQUIVALENT.items() for line in lines}
    assert listed - alive == set()
