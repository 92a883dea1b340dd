"""The assignments: every task stands in them once, solved in the source and open in the release."""

import contextlib
import io
import math
import re
from functools import cache
from typing import Any

import nbformat
import pytest
import torch
import yaml
from assignment import BEGIN, END, ROOT, answer_cells, define, items, mark, read, visible_and_hidden

from dianlib import attention, grouped_query, lstm, metrics, mlp, multihead, positions, rnn, search, seq2seq
from dianlib.checks import grade, tasks
from dianlib.checks.registry import CHAPTERS
from dianlib.checks.running import make

FOLDERS = ("solutions", "exercises")
EVERY_TASK = [(slug, item.task) for slug in CHAPTERS for item in items(read("solutions", slug))]


def item_of(folder: str, slug: str, task: str) -> Any:
    return next(item for item in items(read(folder, slug)) if item.task == task)


@cache
def answers(folder: str, slug: str) -> dict[str, Any]:
    return define([cell.source for cell in answer_cells(read(folder, slug))])


# ----- structure -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("slug", CHAPTERS)
def test_every_task_of_the_chapter_stands_there_once_and_in_order(folder: str, slug: str) -> None:
    found = [item.task for item in items(read(folder, slug))]
    assert found == [name for name, task in tasks().items() if task.chapter == slug]
    assert 6 <= len(found) <= 10


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("slug", CHAPTERS)
def test_points_are_those_of_the_task_and_the_sum_is_announced(folder: str, slug: str) -> None:
    notebook = read(folder, slug)
    for number, item in enumerate(items(notebook), 1):
        points = tasks()[item.task].points
        assert mark(item.check, "points") == points
        unit = "point" if points == 1 else "points"
        heading = item.statement.splitlines()[0]
        assert heading.startswith(f"## Task {number}: ")
        assert heading.endswith(f"({points} {unit})")
    total = sum(mark(cell, "points") or 0 for cell in notebook.cells)
    assert f"**Points:** {total}" in notebook.cells[0].source


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("slug", CHAPTERS)
def test_nbgrader_marks_are_whole(folder: str, slug: str) -> None:
    marked = [cell for cell in read(folder, slug).cells if "nbgrader" in cell.metadata]
    names = [mark(cell, "grade_id") for cell in marked]
    assert len(set(names)) == len(names)
    for cell in marked:
        assert mark(cell, "schema_version") == 3
        assert mark(cell, "task") is False
        # A check can be read and not changed; an answer can be changed; other marked cells give no points.
        if mark(cell, "points"):
            assert mark(cell, "grade") is True
            assert mark(cell, "locked") is not mark(cell, "solution")
        elif not mark(cell, "solution"):
            assert mark(cell, "locked") is True


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("slug", CHAPTERS)
def test_no_outputs_are_stored(folder: str, slug: str) -> None:
    for cell in read(folder, slug).cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)


@pytest.mark.parametrize(("slug", "task"), EVERY_TASK)
def test_a_statement_says_what_to_write(slug: str, task: str) -> None:
    item = item_of("exercises", slug, task)
    assert tasks()[task].signature in item.statement.replace("`", "")
    assert "**Example" in item.statement
    if not tasks()[task].is_value:
        assert "\n- Return" in item.statement or "it returns" in item.statement
        assert f" {item.candidate}(" in item.answer.source  # the head of the function stays visible
        assert '"""' in item.answer.source
    assert item.answer.source.splitlines()[-1].strip() == "raise NotImplementedError"


@pytest.mark.parametrize(("slug", "task"), EVERY_TASK)
def test_what_to_read_exists(slug: str, task: str) -> None:
    chapter = nbformat.read(ROOT / "book" / f"{slug}.ipynb", as_version=4)
    text = "\n".join(cell.source for cell in chapter.cells if cell.cell_type == "markdown")
    named = re.search(r"^\*\*Read:\*\* (.*)$", item_of("exercises", slug, task).statement, re.MULTILINE)
    headings = re.findall('"([^"]+)"', named[1]) if named else []
    assert headings
    for heading in headings:
        assert f"\n## {heading}\n" in f"\n{text}\n"


@pytest.mark.parametrize("slug", CHAPTERS)
def test_the_first_cell_tells_how_to_work(slug: str) -> None:
    text = read("exercises", slug).cells[0].source
    repository = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]
    setup = f"{repository['url']}/blob/{repository['branch']}/book/setup.md"
    assert f"[Setup]({setup})" in text
    assert (ROOT / "book" / "setup.md").is_file()
    assert "Colab" in text
    example = re.search(r'hint\("([\w.]+)"\)', text)
    assert example
    assert example[1] in tasks()


@pytest.mark.parametrize("slug", CHAPTERS)
def test_prose_is_plain(slug: str) -> None:
    for cell in read("solutions", slug).cells:
        if cell.cell_type == "markdown":
            assert not re.search(
                r"\b(simply|just|obviously|trivially|of course)\b", cell.source, re.IGNORECASE
            )


# ----- the worked examples -------------------------------------------------------------------------------

WARM_UP = torch.tensor([[3, 1, 0], [2, 1, 0], [1, 2, 0]])
LOGITS, LABELS = torch.tensor([[0, 1.0986], [5, 5]]), torch.tensor([0, 1])


def test_the_examples_of_the_metrics_statements_are_right() -> None:
    targets = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    predictions = torch.tensor([0, 0, 0, 1, 1, 0, 0, 0, 1, 1])
    notebook = read("exercises", "metrics")
    table = next(cell.source for cell in notebook.cells if cell.id == "warm-up")
    for row in (targets, predictions):
        assert f"| {' | '.join(map(str, row.tolist()))} |" in table
    assert torch.equal(metrics.confusion_matrix(predictions, targets, 3), WARM_UP)
    for row in WARM_UP.tolist():
        assert f"| {' | '.join(map(str, row))} |" in table

    def said(task: str, *numbers: str) -> bool:
        statement = item_of("exercises", "metrics", f"metrics.{task}").statement
        return all(number in statement for number in numbers)

    def rounded(values: torch.Tensor) -> str:
        return str([round(value, 4) for value in values.tolist()])

    assert said("confusion_matrix", str(WARM_UP.tolist()))
    assert said("accuracy", f"the result is {metrics.accuracy(WARM_UP)}")
    for name in ("precision", "recall", "f1"):
        assert said(name, rounded(getattr(metrics, name)(WARM_UP)))
    p, r = (float(rate.mean()) for rate in (metrics.precision(WARM_UP), metrics.recall(WARM_UP)))
    assert said("macro_f1", f"= {metrics.macro_f1(WARM_UP):.4f}", f"would be {2 * p * r / (p + r):.4f}")
    assert said(
        "evaluate", f"precision {p:.2f}, recall {r:.4f}, f1 {metrics.macro_f1(WARM_UP):.4f}, as for all ten"
    )
    parts = [
        metrics.confusion_matrix(a, b, 3) for a, b in zip(predictions.split(4), targets.split(4), strict=True)
    ]
    by_batch = [(metrics.accuracy(part), metrics.macro_f1(part)) for part in parts]
    first, second = (sum(column) / 3 for column in zip(*by_batch, strict=True))
    assert said("evaluate", f"would give accuracy {first:.4f} and f1 {second:.4f}")
    low, high = metrics.wilson_interval(8, 10)
    assert said("wilson_interval", f"({low:.4f}, {high:.4f})", f"{1 + 1.96**2 / 10:.5f}")
    assert said("grade_this", f"{metrics.macro_f1(WARM_UP):.6f}")


def test_the_examples_of_the_mlp_statements_are_right() -> None:
    def said(task: str, *numbers: str) -> bool:
        statement = item_of("exercises", "mlp", f"mlp.{task}").statement
        return all(number in statement for number in numbers)

    x, weight = torch.tensor([[1.0, 2], [3, -1]]), torch.tensor([[1.0, 0], [2, 1], [0, -1]])
    outputs = mlp.linear(x, weight, torch.tensor([0.5, 0, 1]))
    assert outputs.tolist() == [[1.5, 4, -1], [3.5, 5, 2]]
    assert said("linear", "`[[1.5, 4, -1], [3.5, 5, 2]]`")

    def close(values: torch.Tensor, wanted: list[Any]) -> bool:
        return torch.allclose(values, torch.tensor(wanted), atol=5e-5)

    assert close(mlp.softmax(LOGITS), [[0.25, 0.75], [0.5, 0.5]])
    assert close(mlp.softmax(torch.tensor([[-500, -498.9014]])), [[0.25, 0.75]])
    assert said("softmax", "`[0.25, 0.75]`", "`[0.5, 0.5]`", "[-500, -498.9014]")
    assert torch.tensor(89.0).exp().isinf()
    assert said("softmax", "exp(89)")
    assert close(mlp.cross_entropy(LOGITS, LABELS), 1.0397)
    assert said("cross_entropy", "1.0397", "1.3863 and 0.6931")
    assert close(mlp.cross_entropy_gradient(LOGITS, LABELS), [[-0.375, 0.375], [0.25, -0.25]])
    assert said("cross_entropy_gradient", "`[[-0.375, 0.375], [0.25, -0.25]]`")
    assert sum(parameter.numel() for parameter in mlp.MLP([3, 5, 4]).parameters()) == 44
    assert said("MLP", "= 44 parameters")
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    parameter.grad = torch.tensor([0.5, -1.0])
    mlp.sgd_step([parameter], 0.1)
    assert close(parameter.detach(), [0.95, 2.1])
    assert said("sgd_step", "`[0.95, 2.1]`")


def test_the_examples_of_the_search_statements_are_right() -> None:
    def said(task: str, *numbers: str) -> bool:
        statement = item_of("exercises", "search", f"search.{task}").statement
        return all(number in statement for number in numbers)

    networks = search.set_of_depths([1, 2], 100, 5, 3)
    assert said("set_of_depths", f"`{networks}`")
    counts = [search.n_parameters(sizes) for sizes in (*networks, [5, 11, 3], [5, 7, 7, 3])]
    assert counts == [93, 99, 102, 122]
    assert said("set_of_depths", *(f" {count}" for count in counts))

    rows = {"A": ([0.94, 0.96], 9_000), "B": ([0.99, 0.89], 5_000), "C": ([0.92, 0.94], 7_000)}
    results = [{"validation": runs, "parameters": size} for runs, size in rows.values()]
    assert search.choose(results) == 0
    results[2]["validation"] = [0.96, 0.94]
    assert search.choose(results) == 2
    assert said("choose", "9,000, 5,000 and 7,000", "gives 0.", "would be 2")

    first = torch.tensor([True] * 8 + [False] * 2)
    second = torch.tensor([True] * 6 + [False] * 2 + [True, False])
    low, high = search.paired_interval(first, second)
    assert said("paired_interval", f"({low:.4f}, {high:.4f})")
    best = [search.expected_best([0.7, 0.9, 0.8], k) for k in (1, 2, 3)]
    assert said("expected_best", f"{best[0]:.1f}; for k = 3", f"{best[1]:.4f}", f"the maximum, {best[2]}")
    found = search.audit_table([0.976612, 0.982285], 10_000, 64)
    assert said("audit_table", str(found).replace("'", '"'))
    assert math.lcm(72, 1_000 % 72) == 576
    assert said("audit_table", "576")
    assert said("grade_this", f"reports {(0.93 + 0.94 + 0.94) / 3:.4f}")


def test_the_examples_of_the_rnn_statements_are_right() -> None:
    def said(task: str, *numbers: str) -> bool:
        statement = item_of("exercises", "rnn", f"rnn.{task}").statement
        return all(number in statement for number in numbers)

    def close(values: torch.Tensor, wanted: list[Any]) -> bool:
        return torch.allclose(values, torch.tensor(wanted), atol=5e-5)

    swap = torch.tensor([[0.0, 1], [1, 0]])
    weights = torch.tensor([[1.0], [0]]), swap, torch.zeros(2), torch.zeros(2)
    xs, h0 = torch.tensor([[[1.0], [0]]]), torch.tensor([[0.5, 0]])
    assert close(rnn.rnn_cell(xs[:, 0], h0, *weights), [[0.7616, 0.4621]])
    assert said("rnn_cell", "`[[0.7616, 0.4621]]`")
    assert close(rnn.unroll(xs, h0, *weights), [[[0.7616, 0.4621], [0.4318, 0.6420]]])
    assert said("unroll", "`[[[0.7616, 0.4621], [0.4318, 0.6420]]]`")
    from_zero = rnn.unroll(xs, torch.zeros(1, 2), *weights)
    assert close(from_zero, [[[0.7616, 0], [0, 0.6420]]])
    assert said("grade_this", "(0.7616, 0) and (0, 0.6420)", "`[[0, 0.6420]]`")

    one, half, zero = torch.ones(1, 1), torch.full((1, 1), 0.5), torch.zeros(1)
    inputs = torch.tensor([[[1.0], [0], [-1]]])
    found = rnn.bptt_gradient(inputs, torch.zeros(1, 1), one, half, zero, zero, one)
    assert close(torch.cat([part.flatten() for part in found]), [-0.4958, 0.3785, 0.8320])
    assert said("bptt_gradient", "-0.4958, 0.3785 and 0.8320")
    weighted = rnn.gradient_by_distance(lambda x: x[:, 2] + 0.5 * x[:, 1] + 0.25 * x[:, 0], inputs)
    assert weighted.tolist() == [1, 0.5, 0.25]
    assert said("gradient_by_distance", "`[1, 0.5, 0.25]`")
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    for parameter, gradient in zip(parameters, (30.0, 40.0), strict=True):
        parameter.grad = torch.tensor([gradient])
    assert rnn.clip_grad_norm(parameters, 5) == 50
    assert [parameter.grad for parameter in parameters] == [torch.tensor([3.0]), torch.tensor([4.0])]
    assert said("clip_grad_norm", "become `[3]` and `[4]`, and 50 is returned")
    assert close(rnn.orthogonal(torch.tensor([[3.0, 5], [4, 0]])), [[0.6, 0.8], [0.8, -0.6]])
    assert said("orthogonal", "`[[0.6, 0.8], [0.8, -0.6]]`")
    assert sum(parameter.numel() for parameter in rnn.RNNClassifier(28, 128, 10).parameters()) == 21514
    assert said("RNNClassifier", "= 21,514 parameters")
    assert (92 - 64) * 28 == 784
    assert said("read_claims", "(64, 92)", "28 steps for one image of 784 pixels")


def test_the_examples_of_the_lstm_statements_are_right() -> None:
    def said(task: str, *numbers: str) -> bool:
        statement = item_of("exercises", "lstm", f"lstm.{task}").statement
        return all(number in statement for number in numbers)

    nothing = (torch.zeros(4, 1), torch.zeros(4, 1))
    biases = (torch.tensor([0, 1.0986, 0.6931, -1.0986]), torch.zeros(4))
    h, c = lstm.lstm_cell(torch.zeros(1, 1), (torch.zeros(1, 1), torch.tensor([[2.0]])), *nothing, *biases)
    assert (round(float(h), 4), round(float(c), 4)) == (0.2367, 1.8)
    assert said("lstm_cell", "[0, 1.0986, 0.6931, -1.0986]", "h = 0.2367 and c = 1.8")
    assert said("grade_this", "c must become 1.8 and h 0.2367")
    new = lstm.gru_cell(
        torch.zeros(1, 1),
        torch.tensor([[0.2]]),
        torch.zeros(3, 1),
        torch.zeros(3, 1),
        torch.tensor([0, 1.0986, 0]),
        torch.tensor([0, 0, 1.3863]),
    )
    assert round(float(new), 4) == 0.3
    assert said("gru_cell", "[0, 1.0986, 0]", "[0, 0, 1.3863]", "the result is 0.3")
    count = sum(parameter.numel() for parameter in lstm.LSTMClassifier(2, 3, 5).parameters())
    assert said("LSTMClassifier", f"= {count} parameters")
    gates = lstm.gates(torch.ones(1, 2, 1), *nothing, *biases)
    shown = {name: round(float(values[0, 1, 0]), 4) for name, values in gates.items()}
    assert shown == {"input": 0.5, "forget": 0.75, "candidate": 0.6, "output": 0.25}
    assert said("gates", "input 0.5, forget 0.75, output 0.25, candidate 0.6")
    moved = lstm.to_torch_order(torch.arange(1.0, 9), "iofg")
    assert said("to_torch_order", f"{[int(number) for number in moved]}")
    sizes = [lstm.hidden_size_at_budget(kind, 8, 1000) for kind in ("lstm", "rnn", "gru")]
    used = lstm.n_parameters("lstm", 8, sizes[0])
    assert said("hidden_size_at_budget", f"= {used} parameters", f"the result is {sizes[0]}", "1,056")
    assert said("hidden_size_at_budget", f"For the RNN it is {sizes[1]}, for the GRU {sizes[2]}")
    gate = 1 / (1 + math.exp(-3))
    half_life = math.log(0.5) / math.log(gate)
    assert said("read_a_memory", f"= {gate:.4f}", f"{gate**20:.3f} is left", f"= {half_life:.1f} steps")


def test_the_examples_of_the_seq2seq_statements_are_right() -> None:
    def said(task: str, *numbers: str) -> bool:
        statement = item_of("exercises", "seq2seq", f"seq2seq.{task}").statement
        return all(number in statement for number in numbers)

    mask = seq2seq.padding_mask(torch.tensor([[5, 6, 0], [7, 0, 0]]), 0)
    assert said("padding_mask", f"`{mask.tolist()}`")
    shifted = seq2seq.shift_right(torch.tensor([[7, 8, 2], [9, 2, 0]]), 1)
    assert said("shift_right", f"`{shifted.tolist()}`")

    targets = torch.tensor([[1, 1], [1, 0]])
    logits = torch.tensor([[[0.75, 0.25], [0.75, 0.25]], [[0.5, 0.5], [0.5, 0.5]]]).log()
    prices = [1.3863, 1.3863, 0.6931]
    assert said("sequence_loss", "1.3863, 1.3863 and 0.6931")
    assert said("sequence_loss", f"3.4657 / 3 = {seq2seq.sequence_loss(logits, targets):.4f}")
    by_sentence, by_position = (prices[0] + prices[2]) / 2, sum(prices) / 4
    assert said("sequence_loss", f"means would be {by_sentence:.4f}", f"{by_position:.4f}")

    one, keys = torch.ones(1, 1), torch.tensor([[[0.0], [1.0], [-1.0]]])
    arguments = (0 * one, keys, one, one, torch.tensor([2.0]))
    context, weights = seq2seq.additive_attention(*arguments)
    assert said("additive_attention", f"{2 * math.tanh(1):.4f}", f"`[[{context.item():.4f}]]`")
    assert said("additive_attention", f"`[[{', '.join(f'{weight:.4f}' for weight in weights[0])}]]`")
    context, weights = seq2seq.additive_attention(*arguments, torch.tensor([[True, True, False]]))
    masked = f"{weights[0, 0]:.3f}, {weights[0, 1]:.3f}"
    assert said("additive_attention", f"`[[{masked}, 0]]`", f"the context `[[{context.item():.3f}]]`")
    assert said("grade_this", f"{masked} and 0")


def test_the_examples_of_the_attention_statements_are_right() -> None:
    def said(task: str, *numbers: str) -> bool:
        statement = item_of("exercises", "attention", f"attention.{task}").statement
        return all(number in statement for number in numbers)

    def close(values: torch.Tensor, wanted: list[Any]) -> bool:
        return torch.allclose(values, torch.tensor(wanted, dtype=torch.float32), atol=5e-5)

    query, keys = torch.tensor([2.1972, 0, 0, 0]), torch.eye(4)[:2]
    assert close(attention.attention_one_query(query, keys, torch.tensor([[4.0], [8]])), [5.0])
    assert said("attention_one_query", "`query = [2.1972, 0, 0, 0]`", "`values = [[4], [8]]` give `[5]`")

    x, one = torch.tensor([[0.0], [1]]), torch.ones(1, 1)
    output, weights = attention.self_attention(x, 1.0986 * one, one, 4 * one)
    assert close(weights, [[0.5, 0.5], [0.25, 0.75]])
    assert close(output, [[2.0], [3]])
    assert said("self_attention", "`w_query = [[1.0986]]`", "`[[0.5, 0.5], [0.25, 0.75]]`", "`[[2], [3]]`")

    key, value = torch.tensor([[0], [0.6931], [1.3863]]), torch.tensor([[8.0], [16], [24]])
    for mask, shares, result, words in (
        (None, [1 / 7, 2 / 7, 4 / 7], 19.4286, "1/7, 2/7 and 4/7 and the output 19.4286"),
        ([[True, True, False]], [1 / 3, 2 / 3, 0], 13.3333, "1/3, 2/3 and 0, and the output is 13.3333"),
        ([[False, False, False]], [0, 0, 0], 0, "all weights are 0, and so is the output"),
    ):
        given = None if mask is None else torch.tensor(mask)
        output, weights = attention.scaled_dot_product_attention(one, key, value, given)
        assert close(weights[0], shares)
        assert close(output[0], [result])
        assert said("scaled_dot_product_attention", words)
    assert said("grade_this", "1/3, 2/3 and 0, and the output 13.3333")

    for shape in ((3,), (2, 4)):
        asked = ", ".join(map(str, shape))
        assert said("causal_mask", f"`causal_mask({asked})` is `{attention.causal_mask(*shape).tolist()}`")
    mask = attention.padding_mask(torch.tensor([1, 3]), 4)
    rows = " and ".join(f"`{row[0][0]}`" for row in mask.tolist())
    assert said("padding_mask", "`padding_mask(torch.tensor([1, 3]), 4)`", rows)
    masks = tasks()["attention.translator_masks"].reference(torch.tensor([2]), torch.tensor([1]), 3, 2)
    assert torch.equal(masks[0], masks[2])
    assert said("translator_masks", f"`{masks[0].tolist()}`", f"`{masks[1].tolist()}`")
    assert round(math.log(0.6 / 0.2) * 4, 4) == 4.3944
    assert int(attention.causal_mask(2, 4).sum()) == 7
    assert said("read_a_heat_map", "4.3944 / ln 3 = 4", "row sum 0.5", "3 + 4 = 7 times")


def test_the_examples_of_the_multihead_statements_are_right() -> None:
    def said(task: str, *numbers: str) -> bool:
        statement = item_of("exercises", "multihead", f"multihead.{task}").statement
        return all(number in statement for number in numbers)

    x = torch.arange(1, 9).reshape(1, 2, 4)
    heads = multihead.split_heads(x, 2)
    assert multihead.merge_heads(heads).tolist() == x.tolist()
    for task in ("split_heads", "merge_heads"):
        assert said(task, f"`x = {x.tolist()}`" if task == "split_heads" else f"`{x.tolist()}`")
        assert said(task, f"`{heads.tolist()}`" if task == "split_heads" else f"`x = {heads.tolist()}`")
    assert said("parameter_count", f"the result is {multihead.parameter_count(4, 2)}")

    layer = multihead.MultiHeadAttention(2, 2)
    with torch.no_grad():
        for part in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj):
            part.weight.copy_(torch.eye(2))
            part.bias.zero_()
        output, weights = layer(*[torch.eye(2)[None]] * 3)
    shown = [*output.tolist(), *weights[0].tolist()]
    shown = [[[round(number, 4) for number in row] for row in rows] for rows in shown]
    assert said("MultiHeadAttention", f"`[{shown[0]}]`", f"`{shown[2]}`")
    assert said("grade_this", f"`[{shown[0]}]`")
    assert shown[1] == [[0.7311, 0.2689], [0.5, 0.5]]

    parts = multihead.head_contributions(
        torch.tensor([[[[2.0]], [[3.0]]]]), torch.tensor([[1.0, 10], [100, 1000]])
    )
    assert parts.tolist() == [[[[2, 200]], [[30, 3000]]]]
    assert said("head_contributions", "`[2, 200]`", "`[30, 3000]`")
    distances = multihead.head_distances(torch.tensor([[[[0.5, 0.5, 0]], [[0, 0.5, 0.5]]]]))
    assert said("head_distances", f"`{distances.tolist()}`".replace("0.0", "0"))
    assert said("read_claims", f"would be {3 * 4 * 4} and {3 * 12 * 12}")


def test_the_examples_of_the_positions_statements_are_right() -> None:
    def said(task: str, *numbers: str) -> bool:
        statement = item_of("exercises", "positions", f"positions.{task}").statement
        return all(number in statement for number in numbers)

    def row(values: torch.Tensor) -> str:
        return ", ".join(f"{value:.4f}" for value in values.tolist())

    assert said("sinusoidal", f"`[{row(positions.sinusoidal(3, 4)[2])}]`")
    shown = [f"{value:g}" for value in positions.rope_frequencies(8).tolist()]
    assert said("rope_frequencies", f"`[{', '.join(shown)}]`", "`[1, 0.1]`")
    torch.testing.assert_close(positions.rope_frequencies(4, base=100.0), torch.tensor([1, 0.1]))
    turned = positions.apply_rope(torch.tensor([[1.0, 0, 0, 2]]), torch.tensor([3]))[0]
    assert said("apply_rope", f"`[[{row(turned)}]]`")
    assert said("grade_this", f"`[{row(turned)}]`")

    x, unit = torch.tensor([[[1.0, 0], [1, 0]]]), torch.eye(2)
    output, weights = positions.rotary_attention(x, unit, unit, unit, 1)
    torch.testing.assert_close(output, x)
    assert said("rotary_attention", f"{weights[0, 0, 0, 0]:.4f} and {weights[0, 0, 0, 1]:.4f}")
    assert said("to_neighbours", f"`{positions.to_neighbours(torch.arange(6), 1).tolist()}`")
    assert said("to_neighbours", f"`{positions.to_neighbours(torch.arange(12), 2).tolist()}`")
    assert positions.alibi_slopes(2).tolist() == [1 / 16, 1 / 256]
    assert said("alibi_bias", "1/16 and 1/256", "`[[-0.0625, 0, -0.0625], [-0.125, -0.0625, 0]]`")
    assert positions.alibi_bias(2, 2, 3)[0].tolist() == [[-0.0625, 0, -0.0625], [-0.125, -0.0625, 0]]
    query, key, table = (
        torch.tensor([[1.0], [2]]),
        torch.tensor([[3.0], [5]]),
        torch.tensor([[10.0], [20], [30]]),
    )
    scores = [[int(score) for score in line] for line in positions.relative_scores(query, key, table)]
    assert said("relative_scores", f"`{scores}`")
    slowest = positions.rope_frequencies(8)[-1].item()
    assert said(
        "read_claims", f"= {slowest:g} and", f"= {2 * math.pi / slowest:,.0f} places", "hold 400 angles"
    )


def test_the_examples_of_the_grouped_query_statements_are_right() -> None:
    def said(task: str, *numbers: str) -> bool:
        statement = item_of("exercises", "grouped_query", f"grouped_query.{task}").statement
        return all(number in statement for number in numbers)

    assert said("cache_bytes", f"four bytes a number: {grouped_query.cache_bytes(2, 1, 3, 5, 1, 4)}.")
    repeated = grouped_query.repeat_kv(torch.tensor([10, 20]).reshape(1, 2, 1, 1), 2)
    assert said("repeat_kv", "`[10, 20]`", f"`{repeated.flatten().tolist()}`")
    layer = grouped_query.GroupedQueryAttention(8, 4, 2)
    parts = [sum(p.numel() for p in part.parameters()) for part in layer.children()]
    assert parts == [72, 36, 36, 72]
    assert said("GroupedQueryAttention", f"72 + 36 + 36 + 72 = {sum(parts)} parameters")
    cache = grouped_query.KVCache()
    cache.append(*(torch.zeros(1, 2, 3, 4) for _ in range(2)))
    assert said("KVCache", f"`length` is {cache.length} and `nbytes` is {cache.nbytes}")
    merged = grouped_query.mha_to_gqa(torch.tensor([[1.0], [3], [5], [9]]), 4, 2)
    assert said("mha_to_gqa", "`[[1], [3], [5], [9]]`", f"`{merged.int().tolist()}`")

    query = torch.tensor([1.0, -1]).reshape(1, 2, 1, 1)
    key, value = torch.tensor([math.log(3), 0, 4, 8]).reshape(2, 1, 1, 2, 1)
    outputs = grouped_query.grouped_attention(query, key, value).flatten()
    assert torch.allclose(outputs, torch.tensor([5.0, 7.0]))
    assert said("grade_this", "the outputs must be 5 and 7")
    size = grouped_query.cache_bytes(2, 4, 64, length=1)
    assert said("read_a_claim", f"= {size:,} bytes a token", f"{2**30 // size:,} tokens fit")


# ----- the solutions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slug", "task"), EVERY_TASK)
def test_the_solution_gets_all_points_on_every_seed(slug: str, task: str) -> None:
    item = item_of("solutions", slug, task)
    candidate = answers("solutions", slug)[item.candidate]
    for seed in (0, item.seed, 1, 2026):
        report = grade(task, candidate, seed)
        assert report.passed, report.message


@pytest.mark.parametrize("slug", CHAPTERS)
def test_the_solutions_are_written_out(slug: str) -> None:
    """They use torch and each other, not the library that they are compared with."""
    for cell in read("solutions", slug).cells:
        if cell.cell_type == "code":
            used = re.findall(r"dianlib[.\w]*", cell.source)
            assert set(used) <= {"dianlib.checks", "dianlib.data"}


@pytest.mark.parametrize("slug", CHAPTERS)
def test_hidden_seeds_are_the_graders_own(slug: str) -> None:
    seeds = [item.seed for item in items(read("solutions", slug))]
    assert None not in seeds
    assert 0 not in seeds  # the visible check's
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("slug", CHAPTERS)
def test_one_of_the_three_submissions_is_right(slug: str) -> None:
    """Students read three implementations; the solution's own test accepts one of them."""
    cells = {cell.id: cell.source for cell in read("exercises", slug).cells}
    shown = define([cells["imports"], cells["grade-this-submissions"]])
    submissions = [shown[f"submission_{letter}"] for letter in "abc"]
    examine = answers("solutions", slug)["examine"]
    assert sum(examine(submission) for submission in submissions) == 1
    # The grader's own specimens are others.
    task = tasks()[f"{slug}.grade_this"]
    for probe in task.probes(torch.Generator().manual_seed(0)):
        for source in probe.args.values():
            assert callable(make(source))
            body = source.text.split("\n", 1)[1].strip()
            assert body not in cells["grade-this-submissions"]


# ----- the release ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", CHAPTERS)
def test_the_release_holds_no_solution_and_no_hidden_check(slug: str) -> None:
    path = ROOT / "exercises" / slug / f"{slug}.ipynb"
    assert [file.name for file in path.parent.iterdir() if file.name != ".ipynb_checkpoints"] == [path.name]
    notebook = read("exercises", slug)
    text = "\n".join(cell.source for cell in notebook.cells)
    for marker in (BEGIN, END, "HIDDEN TESTS", "MARK SCHEME", "Marking:"):
        assert marker not in path.read_text()
    for item in items(read("solutions", slug)):
        assert str(item.seed) not in text
    assert all(item.seed is None for item in items(notebook))

    visible, hidden = (
        set().union(*lines)
        for lines in zip(*map(visible_and_hidden, read("solutions", slug).cells), strict=True)
    )
    assert len(hidden) > 50
    essays = [
        cell.source for cell in notebook.cells if cell.cell_type == "markdown" and mark(cell, "solution")
    ]
    assert set(essays) <= {"Write your answer here."}
    assert (hidden - visible) & {line.strip() for line in text.splitlines()} == set()


@pytest.mark.parametrize(("slug", "task"), EVERY_TASK)
def test_the_stub_gets_nothing_and_a_sentence(slug: str, task: str) -> None:
    item = item_of("exercises", slug, task)
    candidate = answers("exercises", slug)[item.candidate]
    report = grade(task, candidate)
    assert (report.score, report.points, report.diagnosis) == (0.0, 0.0, ())
    assert "This is still the stub" in report.message
    assert "Traceback" not in report.message
    assert "Cause not recognised" not in report.message


@pytest.mark.parametrize("slug", CHAPTERS)
def test_numbers_count_even_when_the_stub_line_stays(slug: str) -> None:
    """Whoever fills in the dictionary and forgets to delete the `raise` below it loses nothing."""
    solved = answers("solutions", slug)["answers"]
    stub = items(read("exercises", slug))[-1]
    filled = stub.answer.source
    for key, value in solved.items():
        filled = filled.replace(f'"{key}": None', f'"{key}": {value!r}')
    assert filled.endswith("raise NotImplementedError")
    assert grade(stub.task, define([filled])["answers"]).passed


@pytest.mark.parametrize("slug", CHAPTERS)
def test_the_trial_on_real_digits_works_and_waits_politely(slug: str) -> None:
    cells = {cell.id: cell.source for cell in read("exercises", slug).cells}
    printed = {}
    for folder in FOLDERS:
        names = dict(answers(folder, slug))
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            exec(cells["use-it-digits"], names)
        assert err.getvalue() == ""
        printed[folder] = out.getvalue()
    assert printed["exercises"].startswith("Write ")
    assert "run this cell again" in printed["exercises"]
    # The course's own code gets the same numbers from the same scans.
    wanted = {
        "metrics": r"accuracy 0\.8[89]\d, .*f1 0\.8[89]",
        "mlp": r"(3[789]\d) of 397 scans right",
        "search": r"best validation accuracy 0\.9\d\d; the chosen network reads 0\.9\d\d of the test",
        "rnn": r"(3[6789]\d) of 397 scans right",
        "lstm": r"(3[456789]\d) of 397 scans right",
        "seq2seq": r"(1[6-9]\d|200) of 200 new dates right",
        "attention": r"(19\d|200) of 200 new sequences right, weight on padding 0\.000",
        "multihead": r"1 heads: [45]\d%.*\n2 heads: [67]\d%.*\n4 heads: (9[5-9]|100)%",
        "positions": r"(1[4-9]\d|200) of 200 new sequences right",
        "grouped_query": r"(9\d|100)% of 900 new tokens right; the same as without a cache: True",
    }[slug]
    assert re.search(wanted, printed["solutions"]), printed["solutions"]
    # A half-finished function gets a sentence, too.
    broken = {
        "metrics": {"evaluate": lambda *_args, **_names: None},
        "mlp": {"MLP": lambda _sizes: None},
        "search": {"search_space": lambda trial: trial.ask_me_anything()},
        "rnn": {"RNNClassifier": lambda *_sizes: None},
        "lstm": {"LSTMClassifier": lambda *_sizes: None},
        "seq2seq": {"shift_right": lambda _target, _bos: None},
        "attention": {"padding_mask": lambda _lengths, _max_length: None},
        "multihead": {"MultiHeadAttention": lambda *_sizes: None},
        "positions": {"rotary_attention": lambda *_: (None, None)},
        "grouped_query": {"KVCache": lambda: 0},
    }
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(cells["use-it-digits"], dict(answers("solutions", slug)) | broken[slug])
    assert out.getvalue().startswith("This does not work yet (AttributeError: ")
