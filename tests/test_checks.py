"""What the checks promise: every wrong answer is rejected and named, no right one is, and nothing crashes."""

import io
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.nn import functional as F

from dianlib import attention, grouped_query, lstm, metrics, mlp, multihead, positions, rnn, search, training
from dianlib.checks import check, grade, hint, tasks
from dianlib.checks.judging import Bench, anchor, judge
from dianlib.checks.running import Probe, run, run_all
from dianlib.checks.table import Trial, trials, write_rows

ROOT = Path(__file__).parent.parent
TASKS = tuple(tasks())
FUNCTIONS = tuple(name for name, task in tasks().items() if not task.is_value)


# ----- the table: mistakes, pairs, right answers, trivial answers ----------------------------------------


@cache
def measured(name: str) -> list[Trial]:
    return list(trials(tasks()[name]))


@pytest.mark.parametrize("name", TASKS)
def test_every_mistake_is_named_and_no_right_answer_is_flagged(name: str) -> None:
    found = measured(name)
    assert [f"{t.kind} {t.name}: {t.report.message}" for t in found if not t.ok] == []
    assert {t.kind for t in found} >= {"mistake", "trivial answer"}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("seed", [1, 2, 93])
def test_other_probes_see_the_same(name: str, seed: int) -> None:
    task = tasks()[name]
    assert grade(name, task.reference, seed).passed
    for fault in task.mistakes:
        for form in task.forms(fault):
            report = grade(name, form, seed)
            assert report.diagnosis == (fault.id,), f"{fault.id}: {report.message}"
            assert report.score < 1
    for answer in task.accepts:
        assert grade(name, answer, seed).passed


def test_the_public_faults_are_wrong_implementations_by_id() -> None:
    for name, task in tasks().items():
        assert task.faults.keys() == {fault.id for fault in task.mistakes}
        for fault_id, wrong in task.faults.items():
            assert grade(name, wrong).diagnosis == (fault_id,)


def test_two_independent_mistakes_are_both_named() -> None:
    def evaluate(model: nn.Module, batches: Any, n_classes: int) -> dict[str, float]:
        model.eval()
        parts = [metrics.confusion_matrix(model(x).argmax(1), y, n_classes) for x, y in batches]
        values = {
            "accuracy": metrics.accuracy,
            "precision": lambda c: float(metrics.precision(c).mean()),
            "recall": lambda c: float(metrics.recall(c).mean()),
            "f1": metrics.macro_f1,
        }
        return {key: sum(f(c) for c in parts) / len(parts) for key, f in values.items()}

    report = grade("metrics.evaluate", evaluate)
    assert set(report.diagnosis) == {"metrics-macro-over-minibatches", "metrics-len-loader-divisor"}
    assert "These mistakes together" in report.message


def test_the_usual_training_loop_has_three_mistakes() -> None:
    def train_epoch(model: nn.Module, batches: Any, optimizer: Any, loss_fn: Any) -> float:
        total = 0.0
        for x, y in batches:
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item()
        return total / len(batches)

    report = grade("mlp.train_epoch", train_epoch)
    assert set(report.diagnosis) == {
        "train-missing-zero-grad",
        "train-in-evaluation-mode",
        "metrics-len-loader-divisor",
    }


# ----- shortcuts -----------------------------------------------------------------------------------------


def gradient_by_backward(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits.clone().requires_grad_(True)
    (logits.logsumexp(-1) - logits.gather(1, targets[:, None]).squeeze(1)).mean().backward()
    assert logits.grad is not None
    return logits.grad


def gradient_by_autograd(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits.clone().requires_grad_(True)
    loss = (logits.logsumexp(-1) - logits.gather(1, targets[:, None]).squeeze(1)).mean()
    return torch.autograd.grad(loss, logits)[0]


def macro_f1_by_scikit_learn(confusion: Tensor) -> float:
    pairs = [(i, j) for i, row in enumerate(confusion.tolist()) for j, n in enumerate(row) for _ in range(n)]
    truth, guess = zip(*pairs, strict=True)
    return float(f1_score(truth, guess, labels=range(len(confusion)), average="macro", zero_division=0))


def cell_by_torch(x: Tensor, h: Tensor, *weights: Tensor) -> Any:
    cell = nn.RNNCell(x.shape[1], h.shape[1])
    return torch.func.functional_call(cell, dict(zip(cell.state_dict(), weights, strict=True)), (x, h))


def unroll_by_torch(xs: Tensor, h0: Tensor, *weights: Tensor) -> Any:
    layer = nn.RNN(xs.shape[2], h0.shape[1], batch_first=True)
    values = dict(zip(layer.state_dict(), weights, strict=True))
    return torch.func.functional_call(layer, values, (xs, h0.unsqueeze(0)))[0]


def bptt_by_autograd(xs: Tensor, h0: Tensor, *rest: Tensor) -> Any:
    *weights, grad_last = (tensor.clone().requires_grad_(True) for tensor in rest)
    h = h0
    for x in xs.unbind(1):
        h = torch.tanh(x @ weights[0].T + weights[2] + h @ weights[1].T + weights[3])
    return torch.autograd.grad((h * grad_last.detach()).sum(), weights[:3])


class ClassifierByTorch(nn.Module):
    def __init__(self, input_size: int, hidden_size: int, n_classes: int) -> None:
        super().__init__()
        self.rnn = nn.RNN(input_size, hidden_size, batch_first=True)
        self.output = nn.Linear(hidden_size, n_classes)

    def forward(self, xs: Tensor) -> Any:
        return self.output(self.rnn(xs)[0][:, -1])


def lstm_cell_by_module(x: Tensor, state: tuple[Tensor, Tensor], *weights: Tensor) -> Any:
    cell = nn.LSTMCell(x.shape[1], state[0].shape[1])
    names = [name for name, _ in cell.named_parameters()]
    return torch.func.functional_call(cell, dict(zip(names, weights, strict=True)), (x, state))


class ClassifierOnTorch(nn.Module):
    def __init__(self, input_size: int, hidden_size: int, n_classes: int) -> None:
        super().__init__()
        self.layer = nn.LSTM(input_size, hidden_size, batch_first=True)
        self.output = nn.Linear(hidden_size, n_classes)

    def forward(self, x: Tensor) -> Any:
        return self.output(self.layer(x)[0][:, -1])


def one_query_by_torch(query: Tensor, keys: Tensor, values: Tensor) -> Any:
    return F.scaled_dot_product_attention(query[None], keys, values)[0]


def attention_by_torch(query: Tensor, key: Tensor, value: Tensor, mask: Any = None) -> Any:
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    ones = torch.eye(key.shape[-2]).to(value).expand(*key.shape[:-2], -1, -1)
    return output, F.scaled_dot_product_attention(query, key, ones, attn_mask=mask)


def causal_mask_by_torch(n_queries: int, n_keys: Any = None) -> Any:
    n_keys = n_keys or n_queries
    return ~nn.Transformer.generate_square_subsequent_mask(n_keys).isinf()[n_keys - n_queries :]


def parameters_of_torch(d_model: int, n_heads: int) -> int:
    return sum(p.numel() for p in nn.MultiheadAttention(d_model, n_heads).parameters())


class MultiHeadByTorch(nn.Module):
    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(d_model, n_heads, batch_first=True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Any = None) -> Any:
        if mask is not None:
            shape = (len(query), self.layer.num_heads, query.shape[1], key.shape[1])
            mask = ~mask.expand(shape).flatten(0, 1)
        return self.layer(query, key, value, attn_mask=mask, average_attn_weights=False)


class GroupedByTorch(nn.Module):
    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        width = d_model // n_heads * n_kv_heads
        self.q_proj, self.o_proj = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        self.k_proj, self.v_proj = nn.Linear(d_model, width), nn.Linear(d_model, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Any:
        q = self.q_proj(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        k, v = (
            part(x).unflatten(-1, (self.n_kv_heads, -1)).transpose(1, 2)
            for part in (self.k_proj, self.v_proj)
        )
        if cache is not None:
            k, v = cache.append(k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


SHORTCUTS: list[tuple[str, Any]] = [
    ("metrics.confusion_matrix", metrics.confusion_matrix),
    ("metrics.accuracy", metrics.accuracy),
    ("metrics.precision", lambda c: metrics.precision(c)),
    ("metrics.recall", metrics.recall),
    ("metrics.f1", metrics.f1),
    ("metrics.macro_f1", metrics.macro_f1),
    ("metrics.macro_f1", macro_f1_by_scikit_learn),
    ("metrics.evaluate", metrics.evaluate),
    ("metrics.wilson_interval", metrics.wilson_interval),
    ("mlp.linear", F.linear),
    ("mlp.linear", mlp.linear),
    ("mlp.relu", torch.relu),
    ("mlp.relu", nn.ReLU()),
    ("mlp.relu", lambda x: x.relu()),
    ("mlp.relu", mlp.relu),
    ("mlp.softmax", lambda z: torch.softmax(z, -1)),
    ("mlp.softmax", lambda z: z.softmax(-1)),
    ("mlp.softmax", nn.Softmax(dim=-1)),
    ("mlp.softmax", lambda z: F.log_softmax(z, -1).exp()),
    ("mlp.softmax", mlp.softmax),
    ("mlp.cross_entropy", F.cross_entropy),
    ("mlp.cross_entropy", nn.CrossEntropyLoss()),
    ("mlp.cross_entropy", mlp.cross_entropy),
    ("mlp.cross_entropy_gradient", mlp.cross_entropy_gradient),
    ("mlp.cross_entropy_gradient", gradient_by_backward),
    ("mlp.cross_entropy_gradient", gradient_by_autograd),
    ("mlp.sgd_step", mlp.sgd_step),
    ("mlp.sgd_step", lambda parameters, lr: torch.optim.SGD(parameters, lr=lr).step()),
    ("mlp.train_epoch", training.train_epoch),
    ("mlp.MLP", mlp.MLP),
    ("search.search_space", search.search_space),
    ("search.set_of_depths", search.set_of_depths),
    ("search.choose", lambda results: search.choose(results)),
    ("search.paired_interval", search.paired_interval),
    ("search.expected_best", search.expected_best),
    ("search.audit_table", search.audit_table),
    ("rnn.rnn_cell", rnn.rnn_cell),
    ("rnn.rnn_cell", torch.rnn_tanh_cell),
    ("rnn.rnn_cell", cell_by_torch),
    ("rnn.unroll", rnn.unroll),
    ("rnn.unroll", unroll_by_torch),
    ("rnn.bptt_gradient", rnn.bptt_gradient),
    ("rnn.bptt_gradient", bptt_by_autograd),
    ("rnn.gradient_by_distance", rnn.gradient_by_distance),
    ("rnn.clip_grad_norm", rnn.clip_grad_norm),
    ("rnn.clip_grad_norm", torch.nn.utils.clip_grad_norm_),
    ("rnn.orthogonal", rnn.orthogonal),
    ("rnn.RNNClassifier", rnn.RNNClassifier),
    ("rnn.RNNClassifier", ClassifierByTorch),
    ("lstm.lstm_cell", lstm.lstm_cell),
    ("lstm.lstm_cell", lambda x, state, *weights: torch.lstm_cell(x, state, *weights)),
    ("lstm.lstm_cell", lstm_cell_by_module),
    ("lstm.gru_cell", lstm.gru_cell),
    ("lstm.gru_cell", lambda x, h, *weights: torch.gru_cell(x, h, *weights)),
    ("lstm.LSTMClassifier", lstm.LSTMClassifier),
    ("lstm.LSTMClassifier", ClassifierOnTorch),
    ("lstm.open_forget_gates", lstm.open_forget_gates),
    ("lstm.gates", lstm.gates),
    ("lstm.to_torch_order", lstm.to_torch_order),
    ("lstm.hidden_size_at_budget", lstm.hidden_size_at_budget),
    ("attention.attention_one_query", attention.attention_one_query),
    ("attention.attention_one_query", one_query_by_torch),
    ("attention.self_attention", attention.self_attention),
    ("attention.scaled_dot_product_attention", attention.scaled_dot_product_attention),
    ("attention.scaled_dot_product_attention", attention_by_torch),
    ("attention.causal_mask", attention.causal_mask),
    ("attention.causal_mask", causal_mask_by_torch),
    ("attention.padding_mask", attention.padding_mask),
    ("multihead.split_heads", multihead.split_heads),
    ("multihead.merge_heads", multihead.merge_heads),
    ("multihead.parameter_count", multihead.parameter_count),
    ("multihead.parameter_count", parameters_of_torch),
    ("multihead.MultiHeadAttention", multihead.MultiHeadAttention),
    ("multihead.MultiHeadAttention", MultiHeadByTorch),
    ("multihead.head_contributions", multihead.head_contributions),
    ("multihead.head_distances", multihead.head_distances),
    ("positions.sinusoidal", positions.sinusoidal),
    ("positions.rope_frequencies", positions.rope_frequencies),
    ("positions.apply_rope", positions.apply_rope),
    ("positions.apply_rope", lambda x, p, base=10000.0: positions.apply_rope(x, p, base)),
    ("positions.rotary_attention", positions.rotary_attention),
    ("positions.to_neighbours", positions.to_neighbours),
    ("positions.alibi_bias", positions.alibi_bias),
    ("positions.relative_scores", positions.relative_scores),
    ("grouped_query.cache_bytes", grouped_query.cache_bytes),
    ("grouped_query.repeat_kv", lambda x, n_repeats: grouped_query.repeat_kv(x, n_repeats)),
    ("grouped_query.GroupedQueryAttention", grouped_query.GroupedQueryAttention),
    ("grouped_query.GroupedQueryAttention", GroupedByTorch),
    ("grouped_query.KVCache", grouped_query.KVCache),
    ("grouped_query.mha_to_gqa", grouped_query.mha_to_gqa),
    ("grouped_query.decode", grouped_query.decode),
]


@pytest.mark.parametrize(("name", "answer"), SHORTCUTS)
def test_a_shortcut_is_refused_in_words(name: str, answer: Any) -> None:
    report = grade(name, answer)
    assert report.score == 0
    assert "does the work" in report.message


# ----- a candidate may do anything -----------------------------------------------------------------------


def raises(*args: Any) -> Any:
    raise KeyError("weights")


def exits(*args: Any) -> Any:
    sys.exit(3)


def recurses(*args: Any) -> Any:
    return recurses(*args)


def own_type(*args: Any) -> Any:
    return object()


def nan(*args: Any) -> Any:
    return torch.tensor(float("nan"))


def nested(*args: Any) -> Any:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    return deep


def huge(*args: Any) -> Any:
    return torch.zeros(1).expand(10**12)


def wrong_number_of_arguments() -> Any:
    return 0


MISBEHAVIOURS = [
    raises,
    exits,
    recurses,
    own_type,
    nan,
    nested,
    huge,
    wrong_number_of_arguments,
    lambda *args: "text",
    lambda *args: torch.zeros(0),
    lambda *args: torch.zeros(2, 3, dtype=torch.complex64),
    lambda *args: torch.zeros(2, 2).to_sparse(),
    lambda *args: {1: 2},
    lambda *args: iter([1]),
]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("candidate", MISBEHAVIOURS)
def test_misbehaviour_gets_a_report(name: str, candidate: Callable[..., Any]) -> None:
    report = grade(name, candidate)
    assert report.score < 1
    assert report.message.startswith(name)
    assert "dianlib/checks" not in report.message, report.message
    assert "Traceback" not in report.message


def test_layers_are_loaded_by_name_whatever_their_order_and_size() -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in ((4, 4), (4,), (4, 4), (4,))]
    names = ("first.weight", "first.bias", "second.weight", "second.bias")

    def loaded(**layers: nn.Linear) -> nn.Module:
        build = partial(nn.ModuleDict, layers)
        run(build, Probe("", {}, build=(), state=tuple(values), names=names))
        return nn.ModuleDict(layers)

    turned = loaded(second=nn.Linear(4, 4), first=nn.Linear(4, 4))
    assert all(torch.equal(turned.get_parameter(n), v) for n, v in zip(names, values, strict=True))
    renamed = loaded(a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    assert all(torch.equal(p, v) for p, v in zip(renamed.parameters(), values, strict=True))
    weight, bias = loaded(both=nn.Linear(4, 8)).parameters()
    assert torch.equal(weight, torch.cat(values[::2]))
    assert torch.equal(bias, torch.cat(values[1::2]))
    # One of another size gets definite numbers: a part of them, or the same ones again.
    small, _, large, _ = loaded(first=nn.Linear(2, 3), second=nn.Linear(4, 6)).parameters()
    assert torch.equal(small, values[0][:3, :2])
    assert torch.equal(large, torch.cat([values[2], values[2][:2]]))


@pytest.mark.parametrize("value", [None, 5, "softmax", torch.zeros(3), [1, 2], {"a": 1}])
def test_a_value_in_place_of_a_function_gets_a_sentence(value: Any) -> None:
    report = grade("mlp.softmax", value)
    assert report.score == 0
    assert "pass the function or class softmax(logits) itself" in report.message


def test_an_endless_loop_is_left_behind() -> None:
    def forever(*args: Any) -> Any:
        while True:
            pass

    start = time.monotonic()
    report = grade("mlp.relu", forever)
    assert report.score == 0
    assert "did not finish in time" in report.message
    assert time.monotonic() - start < 30


def test_a_loop_in_one_corner_costs_that_corner_only() -> None:
    def macro_f1(confusion: Tensor) -> float:
        below = confusion.sum(0) + confusion.sum(1)
        while bool((below == 0).any()):
            pass
        return float((2 * confusion.diagonal() / below).mean())

    report = grade("metrics.macro_f1", macro_f1)
    assert 0 < report.score < 1


def test_what_a_candidate_writes_to_stderr_is_dropped(capfd: pytest.CaptureFixture[str]) -> None:
    def relu(x: Tensor) -> Tensor:
        import warnings

        warnings.warn("careful", stacklevel=1)
        print("debug", file=sys.stderr)
        return x.clamp(min=0)

    assert check("mlp.relu", relu) == tasks()["mlp.relu"].points
    assert capfd.readouterr().err == ""


def test_global_state_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    grade("mlp.MLP", tasks()["mlp.MLP"].reference)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert sys.getprofile() is None


def test_changing_the_argument_is_noticed() -> None:
    def softmax(logits: Tensor) -> Tensor:
        with torch.no_grad():
            logits -= logits.max(-1, keepdim=True).values
        return logits.exp() / logits.exp().sum(-1, keepdim=True)

    report = grade("mlp.softmax", softmax)
    assert report.score < 1
    assert "changed its argument logits in place" in report.message


def test_memory_of_earlier_calls_is_noticed() -> None:
    seen: list[int] = []

    def accuracy(confusion: Tensor) -> float:
        seen.append(1)
        return metrics_accuracy(confusion) + (0.25 if len(seen) > 5 else 0.0)

    def metrics_accuracy(confusion: Tensor) -> float:
        return float(confusion.trace() / confusion.sum())

    report = grade("metrics.accuracy", accuracy)
    assert report.score < 1
    assert "kept from an earlier call" in report.message


# ----- unknown causes: a property, never a guess ---------------------------------------------------------


def test_an_unknown_cause_is_not_guessed() -> None:
    report = grade("mlp.softmax", lambda z: (z / z.abs().sum()).sigmoid())
    assert report.diagnosis == ()
    assert "Row 0 of the result sums to" in report.message
    assert "Cause not recognised" in report.message


def test_a_constant_factor_is_seen() -> None:
    report = grade("metrics.recall", lambda c: c.diagonal() / c.sum(1).clamp(min=1) / 7)
    assert report.diagnosis == ()
    assert "everything is 1/7 of what it should be" in report.message


def test_another_order_is_seen() -> None:
    report = grade("metrics.recall", lambda c: (c.diagonal() / c.sum(1).clamp(min=1)).flip(0))
    assert report.diagnosis == ()
    assert "the right numbers in another order" in report.message


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_report_does_not_give_the_answer_away(name: str) -> None:
    task = tasks()[name]
    bench = Bench(task, 0)
    right = run_all(task.reference, bench.probes)
    for fault in task.mistakes:
        report = grade(name, task.forms(fault)[0])
        got = run_all(task.forms(fault)[0], bench.probes)
        shown = [str(v.tolist()) for v in right[0].values.values() if isinstance(v, Tensor) and v.numel() > 1]
        own = [str(v.tolist()) for v in got[0].values.values() if isinstance(v, Tensor)]
        assert not [text for text in shown if text in report.message and text not in own]


# ----- the interface -------------------------------------------------------------------------------------


def test_check_prints_the_report_and_returns_the_points(capsys: pytest.CaptureFixture[str]) -> None:
    points = check("metrics.precision", lambda c: c.diagonal() / c.sum(0))
    printed = capsys.readouterr().out
    assert points == grade("metrics.precision", lambda c: c.diagonal() / c.sum(0)).points
    assert 0 < points < tasks()["metrics.precision"].points
    assert "[metrics-zero-division]" in printed
    assert "What if a class is never predicted?" in printed


def test_an_unknown_task_gets_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert check("mlp.sofmax", mlp.softmax) == 0
    hint("mlp.sofmax")
    assert capsys.readouterr().out.count("did you mean 'mlp.softmax'?") == 2
    with pytest.raises(LookupError, match=r"did you mean 'mlp.softmax'\?"):
        grade("mlp.sofmax", mlp.softmax)


@pytest.mark.parametrize("name", TASKS)
def test_three_hints(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2, 3):
        hint(name, step)
        printed = capsys.readouterr().out
        assert tasks()[name].hints[step - 1] in printed
        assert (f'hint("{name}", {step + 1})' in printed) == (step < 3)
    assert "?" in tasks()[name].hints[0]
    hint(name, 4)
    assert "three hints" in capsys.readouterr().out


@pytest.mark.parametrize("name", TASKS)
def test_what_to_reread_exists(name: str) -> None:
    for fault in tasks()[name].mistakes:
        slug, heading = fault.reread.split(": ", 1)
        notebook = nbformat.read(ROOT / "book" / f"{slug}.ipynb", as_version=4)
        text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        assert f"\n## {heading}\n" in f"\n{text}\n", (
            f"{fault.id}: no heading {heading!r} in book/{slug}.ipynb"
        )


def test_anchor() -> None:
    assert anchor("A case: 93.9 % after a hundred epochs") == "a-case-93-9-after-a-hundred-epochs"


@pytest.mark.parametrize("name", TASKS)
def test_sentences_are_complete(name: str) -> None:
    for fault in tasks()[name].mistakes:
        for sentence in (fault.does, fault.todo):
            named_code = "()" in sentence.split()[0] or sentence.split()[0] in ("argmax", "exp")
            assert sentence[0].isupper() or sentence[0].isdigit() or named_code
            assert sentence.endswith(".")
            assert len(sentence.split()) <= 45


def test_the_judge_needs_outcomes_only() -> None:
    task = tasks()["mlp.softmax"]
    bench = Bench(task, 7)
    outcomes = run_all(task.reference, bench.probes)
    assert judge(bench, outcomes).passed


def test_running_knows_neither_references_nor_faults_nor_the_judge() -> None:
    code = (
        "import sys, dianlib.checks.running\n"
        "print(sorted(name for name in sys.modules if name.startswith('dianlib')))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "['dianlib', 'dianlib.checks', 'dianlib.checks.running']"


def test_a_probe_is_plain_data() -> None:
    for task in tasks().values():
        for probe in task.probes(torch.Generator().manual_seed(0)):
            assert isinstance(probe, Probe)
            for value in probe.args.values():
                plain = isinstance(value, Tensor | int | float | str | None)
                assert plain or type(value).__module__ == "dianlib.checks.running"


def test_the_table_in_the_book_is_the_measured_one() -> None:
    stream = io.StringIO()
    assert write_rows([measured(name) for name in TASKS], True, stream)
    page = (ROOT / "book" / "checks-table.md").read_text()
    assert stream.getvalue() in page
