"""Shortcuts are seen in the code and while it runs; nobody who writes the answer is accused of one."""

import ast
import functools
import inspect
import operator
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from assignment import ROOT, items, read
from torch import Tensor
from torch.nn import functional as F

from dianlib.checks import grade, tasks
from dianlib.checks.registry import CHAPTERS
from dianlib.checks.running import HIDING, Probe, TimeLimit, plain, run
from dianlib.grading.shortcuts import evasions, find

SOFTMAX = tasks()["mlp.softmax"].forbidden

# What every notebook begins with.
IMPORTS = "import math\n\nimport torch\nfrom torch import nn\n\nfrom dianlib.checks import check, hint"

OWN = """
def softmax(logits):
    e = (logits - logits.max(dim=1, keepdim=True).values).exp()
    return e / e.sum(dim=1, keepdim=True)
"""


def cells(text: str) -> list[str]:
    """Split a notebook that is written as one text."""
    return [IMPORTS, *text.replace("<softmax by hand>", OWN.strip()).split("\n---\n")]


def cases(name: str) -> list[tuple[str, str]]:
    """Read a file of notebooks: (heading, text) of each."""
    parts = (ROOT / "tests" / "shortcuts" / f"{name}.txt").read_text().split("\n##### ")
    return [(heading, text) for heading, _, text in (part.strip().partition("\n") for part in parts[1:])]


# ----- the code: what is refused -------------------------------------------------------------------------

REFUSED = cases("refused")


@pytest.mark.parametrize(("heading", "notebook"), REFUSED)
def test_a_shortcut_is_found(heading: str, notebook: str) -> None:
    name, _, phrase = heading.partition(": ")
    assert phrase in find(cells(notebook), name.partition(".")[2], tasks()[name].forbidden)


def test_there_are_enough_cases() -> None:
    assert len(REFUSED) >= 60
    assert len(HONEST) >= 40


# ----- the code: what is not refused ---------------------------------------------------------------------

HONEST = cases("honest")


@pytest.mark.parametrize(("name", "notebook"), HONEST)
def test_an_honest_answer_is_left_alone(name: str, notebook: str) -> None:
    assert find(cells(notebook), name.partition(".")[2], tasks()[name].forbidden) == []


@pytest.mark.parametrize("folder", ["solutions", "exercises"])
@pytest.mark.parametrize("slug", CHAPTERS)
def test_our_own_notebooks_are_left_alone(folder: str, slug: str) -> None:
    notebook = read(folder, slug)
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    for item in items(notebook):
        assert find(sources, item.candidate, tasks()[item.task].forbidden) == []
    assert evasions(sources) == []


def written_answers(name: str) -> Iterator[tuple[str, str]]:
    """Yield the right answers of a task as (code, name in it): reference, variants, accepted ones."""
    task = tasks()[name]
    for answer in (task.reference.func, *task.variants, *task.accepts):
        if inspect.isclass(answer) or (inspect.isfunction(answer) and answer.__name__ != "<lambda>"):
            yield Path(inspect.getfile(answer)).read_text(), answer.__name__
    module = ast.parse((ROOT / "dianlib" / "checks" / f"{task.chapter}.py").read_text())
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Task":
            settings = {keyword.arg: keyword.value for keyword in node.keywords}
            if ast.unparse(settings["id"]) == repr(name) and "accepts" in settings:
                for part in ast.walk(settings["accepts"]):
                    if isinstance(part, ast.Lambda):
                        yield f"answer = {ast.unparse(part)}", "answer"


# Answers of ours that call what the course, or torch, has already. From a student each would be a shortcut.
BUILT_ON = {
    ("attention.translator_masks", "_translator_masks"): {
        "dianlib.attention.causal_mask",
        "dianlib.attention.padding_mask",
    },
    ("multihead.MultiHeadAttention", "MultiHeadAttention"): {
        "dianlib.attention.scaled_dot_product_attention",
    },
    ("positions.rotary_attention", "rotary_attention"): {
        "dianlib.attention.scaled_dot_product_attention",
        "dianlib.multihead.merge_heads",
        "dianlib.multihead.split_heads",
    },
    ("positions.alibi_bias", "_alibi_by_key"): {"dianlib.positions.alibi_slopes"},
    ("grouped_query.GroupedQueryAttention", "GroupedQueryAttention"): {
        "dianlib.multihead.merge_heads",
        "dianlib.multihead.split_heads",
        "torch's scaled_dot_product_attention",
    },
    ("grouped_query.decode", "_read_last_too"): {"dianlib.grouped_query.decode"},
}


@pytest.mark.parametrize("name", tasks())
def test_right_answers_are_left_alone(name: str) -> None:
    for source, answer in written_answers(name):
        found = find([IMPORTS, source], answer, tasks()[name].forbidden)
        assert set(found) == BUILT_ON.get((name, answer), set())


def test_without_forbidden_names_nothing_is_a_shortcut() -> None:
    assert find(cells("softmax = torch.softmax"), "softmax", frozenset()) == []


def test_only_what_ran_before_the_check_counts() -> None:
    before = cells(OWN)
    assert find(before, "softmax", SOFTMAX) == []
    assert find([*before, "softmax = torch.softmax"], "softmax", SOFTMAX) == ["torch's softmax"]


def test_a_name_that_is_defined_nowhere_is_no_shortcut() -> None:
    assert find([], "softmax", SOFTMAX) == []
    assert find(["import torch"], "softmax", SOFTMAX) == []


# ----- the code: what the instructor hears of ------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("import sys\nsys.setprofile(None)", "uses sys.setprofile, with which code can hide"),
        ("from ctypes import *", "uses ctypes"),
        ("torch._C.DisableTorchFunction()", "uses torch._C, with which"),
        ("from torch.utils._python_dispatch import TorchDispatchMode", "uses torch.utils._python_dispatch"),
        ("f = torch.compile(len)", "uses torch.compile, behind which it is hard to see"),
        ("@torch.jit.script\ndef f(x): return x", "uses torch.jit, behind which"),
        ("torch.allclose = lambda *args: True", "changes torch.allclose."),
        ("setattr(torch, 'x', 3)", "changes torch with setattr."),
        ("import dianlib.checks as c\nc.check = print", "changes dianlib.checks.check."),
        ("def f(code): exec(code)", "uses exec, which makes code from text."),
        ("def f(n): return getattr(torch, n)", "takes a function of torch by a computed name."),
        ("m = __import__(input())", "imports a module with a computed name."),
        ("import os\nif os.fork(): pass", "uses os.fork, which starts another process."),
        ("from subprocess import Popen as P\nP('ls')", "uses subprocess.Popen, behind which"),
        ("get_ipython().ast_transformers.append(3)", "uses IPython.get_ipython"),
        ("import gc\nprint(gc.get_objects())", "uses gc.get_objects"),
    ],
)
def test_the_instructor_hears_of_it(source: str, sentence: str) -> None:
    found = evasions(cells(source))
    assert [text for text in found if sentence in text], found
    first = source.partition("\n")[0]
    assert all(text.startswith(f'The cell that begins "{first}" ') for text in found)
    assert all(text.endswith(".") for text in found)


@pytest.mark.parametrize(
    "source",
    [
        OWN,
        "model = nn.Linear(2, 2)\nmodel.eval()\nimport re\nre.compile('a')",
        "def eval(model): return model\neval(3)",
        "torch.backends.cudnn.deterministic = True\ntorch.set_default_dtype(torch.float64)",
        "class A: pass\na = A()\na.softmax = 3\na.torch = torch\nsum = 3",
        "import gc, sys\ngc.collect()\nprint(sys.version, file=sys.stderr)",
        "z = torch.ones(2, 2)\nprint(torch.softmax(z, -1), getattr(torch, 'exp')(z))",
        "%timeit softmax(z)\n!pip install nothing",
        "import os, subprocess\nos.system('ls')\nsubprocess.run(['ls'])",
        "import pickle\nweights = torch.load('w.pt')\ntable = pickle.load(open('t', 'rb'))",
        "with torch.profiler.profile() as p:\n    print(p)",
        "from multiprocessing import cpu_count\nfrom concurrent.futures import ThreadPoolExecutor",
    ],
)
def test_the_instructor_is_not_bothered(source: str) -> None:
    assert evasions(cells(source)) == []


# ----- the code: hostile code is only read ----------------------------------------------------------------

DEEP = "x = " + "-" * 400 + "1"
TOO_DEEP = "x = " + "-" * 9000 + "1"
ATTRIBUTES = "x = a" + ".b" * 5000
BRACKETS = "x = " + "[" * 150 + "]" * 150
FUNCTIONS = "\n".join(" " * n + f"def f{n}():\n" + " " * (n + 1) + f"global f{n}, g" for n in range(90))
CHAIN = "def f0(z): return torch.softmax(z, -1)\n"
CHAIN += "\n".join(f"def f{n}(z): return f{n - 1}(z)" for n in range(1, 2000)) + "\nsoftmax = f1999"
DOUBLING = "a0 = 'softmax'\n"
DOUBLING += "\n".join(f"a{n} = a{n - 1} + f'{{a{n - 1}}}{{a{n - 1}}}'" for n in range(1, 60))
DOUBLING += "\nsoftmax = lambda z: getattr(torch, a59)"
CIRCLE = "a = b\nb = a\na = b\nsoftmax = a\nclass A(A): pass\nsoftmax = A()"
ITSELF = "code = 'exec(code)'\nexec(code)\ndef softmax(z): exec(code)"
LONG = ("\n" * 190_000 + "(", "x" * 190_000, "\0", "%" * 190_000, "torch.a.b(x, y)\n" * 12_000)


@pytest.mark.parametrize(
    "source",
    [DEEP, TOO_DEEP, ATTRIBUTES, BRACKETS, FUNCTIONS, CHAIN, DOUBLING, CIRCLE, ITSELF, *LONG],
    ids=lambda source: repr(source[:20]),
)
def test_hostile_code_costs_little_time(source: str) -> None:
    start = time.process_time()
    find([IMPORTS, source], "softmax", SOFTMAX)
    evasions([IMPORTS, source])
    assert time.process_time() - start < 10


def test_a_long_notebook_is_read_in_part_and_the_instructor_hears_of_it() -> None:
    sources = [IMPORTS, OWN, "x = 1\n" * 50_000, "softmax = torch.softmax"]
    assert find(sources, "softmax", SOFTMAX) == []
    assert evasions(sources) == [
        "Only the first 200,000 characters of the code were looked at for shortcuts."
    ]


def test_a_deep_line_hides_nothing() -> None:
    body = f"def softmax(z):\n    {DEEP}\n    return torch.softmax(z, -1)"
    assert find([IMPORTS, DEEP, ATTRIBUTES, body], "softmax", SOFTMAX) == ["torch's softmax"]
    assert find([IMPORTS, CHAIN], "softmax", SOFTMAX) == ["torch's softmax"]


# ----- while it runs -------------------------------------------------------------------------------------


def compiled(function: Any) -> Any:
    with warnings.catch_warnings():  # torch.jit is old, and still there
        warnings.simplefilter("ignore")
        return torch.jit.script(function)


@compiled
def scripted(logits):  # type: ignore[no-untyped-def]
    return torch.softmax(logits, -1)


@compiled
def scripted_linear(x, weight, bias):  # type: ignore[no-untyped-def]
    return torch.nn.functional.linear(x, weight, bias)


def in_a_thread(logits: Tensor) -> Tensor:
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(logits.softmax(-1)))
    thread.start()
    thread.join()
    return results[0]


def in_a_pool(logits: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(F.softmax, logits, -1).result()


class KeepsItsPool:
    """Starts a thread in its first call, and lets it work in later calls only."""

    def __init__(self) -> None:
        self.pool: ThreadPoolExecutor | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.pool is None:
            self.pool = ThreadPoolExecutor(1)
            self.pool.submit(len, "").result()
            e = (logits - logits.max(1, keepdim=True).values).exp()
            return e / e.sum(1, keepdim=True)
        return self.pool.submit(torch.softmax, logits, -1).result()


def without_a_profile(logits: Tensor) -> Tensor:
    before = sys.getprofile()
    sys.setprofile(None)
    result = logits.softmax(-1)
    sys.setprofile(before)
    return result


def without_the_record(logits: Tensor) -> Tensor:
    torch.autograd._disable_profiler_legacy()
    return scripted(logits)


def with_torch_functions_off(logits: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction(), torch._C.DisableTorchFunctionSubclass():
        return logits.softmax(-1)


def by_forward_mode(logits: Tensor, targets: Tensor) -> Tensor:
    def loss(z: Tensor) -> Tensor:
        return (z.logsumexp(1) - z[range(len(targets)), targets]).mean()

    return torch.func.jacfwd(loss)(logits)


def by_the_engine(logits: Tensor, targets: Tensor) -> Tensor:
    z = logits.clone().requires_grad_()
    loss = (z.logsumexp(1) - z[range(len(targets)), targets]).mean()
    engine = torch.autograd.Variable._execution_engine
    start = (torch.tensor(1.0),)
    return engine.run_backward((loss,), start, False, False, (z,), False, accumulate_grad=False)[0]


RUNNING: list[tuple[str, Any, str]] = [
    ("mlp.softmax", scripted, "torch's softmax"),
    ("mlp.linear", scripted_linear, "torch's linear"),
    ("mlp.softmax", in_a_thread, "torch's softmax"),
    ("mlp.softmax", in_a_pool, "torch's softmax"),
    ("mlp.softmax", KeepsItsPool(), "torch's softmax"),
    ("mlp.softmax", functools.partial(torch.softmax, dim=-1), "torch's softmax"),
    ("mlp.softmax", operator.methodcaller("softmax", -1), "torch's softmax"),
    ("mlp.softmax", lambda z: next(map(torch.softmax, [z], [-1])), "torch's softmax"),
    ("mlp.softmax", lambda z: torch._C._VariableFunctions.softmax(z, -1), "torch's softmax"),
    ("mlp.softmax", lambda z: torch.ops.aten._softmax.default(z, -1, False), "torch's softmax"),
    ("mlp.softmax", lambda z: torch._safe_softmax(z, -1), "torch's safe_softmax"),
    ("mlp.softmax", lambda z: compiled(torch.nn.Softmax(-1))(z), "torch's"),
    ("mlp.softmax", lambda z: torch.vmap(lambda row: row.softmax(-1))(z), "torch's softmax"),
    ("mlp.softmax", with_torch_functions_off, "torch's softmax"),
    ("mlp.softmax", without_a_profile, HIDING),
    ("mlp.softmax", without_the_record, HIDING),
    ("mlp.relu", lambda x: x.clone().relu_(), "torch's relu"),
    ("mlp.relu", lambda x: torch._C._nn.leaky_relu(x, 0.0), "torch's leaky_relu"),
    ("mlp.linear", lambda x, w, b: torch._C._nn.linear(x, w, b), "torch's linear"),
    (
        "mlp.cross_entropy",
        lambda z, t: torch._C._nn.cross_entropy_loss(z, t, None, 1),
        "torch's cross_entropy_loss",
    ),
    ("mlp.cross_entropy_gradient", by_forward_mode, "torch's jacfwd"),
    ("mlp.cross_entropy_gradient", by_the_engine, "torch's run_backward"),
]


@pytest.mark.parametrize(("name", "answer", "phrase"), RUNNING)
def test_a_shortcut_is_seen_while_it_runs(name: str, answer: Any, phrase: str) -> None:
    report = grade(name, answer)
    assert report.score == 0
    assert f"The numbers are right, but {phrase}" in report.message


def softmax_with_many_tools(logits: Tensor) -> Tensor:
    """Use much of Python and torch, and no softmax."""
    print(logits, f"{logits!r}")
    e = torch.vmap(lambda row: (row - row.max()).exp())(logits)
    with ThreadPoolExecutor(2) as pool:
        sums = list(pool.map(torch.sum, e))
    total = torch.stack(sums).reshape(-1, 1)
    assert torch.allclose(total, torch.einsum("bc->b", e)[:, None])
    return torch.where(e > -1, e / total, torch.zeros_like(e)).clamp(0, 1)


@compiled
def scripted_by_hand(logits):  # type: ignore[no-untyped-def]
    e = (logits - logits.max(dim=1, keepdim=True)[0]).exp()
    return e / e.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("answer", [softmax_with_many_tools, scripted_by_hand])
def test_an_honest_answer_passes_while_it_is_watched(answer: Any) -> None:
    assert grade("mlp.softmax", answer).passed


def test_everything_is_as_before_afterwards() -> None:
    run(without_a_profile, Probe("", {"logits": torch.ones(1, 2)}), SOFTMAX)
    run(without_the_record, Probe("", {"logits": torch.ones(1, 2)}), SOFTMAX)
    assert sys.getprofile() is None
    assert threading.getprofile() is None
    assert not torch.autograd._profiler_enabled()


def test_a_check_may_itself_be_profiled() -> None:
    with torch.autograd.profiler.profile():
        assert grade("mlp.softmax", scripted_by_hand).passed
        assert "torch's softmax does the work" in grade("mlp.softmax", scripted).message


def test_traps_that_were_set_before_are_no_use(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in [
        (sys, "setprofile"),
        (threading, "setprofile"),
        (torch.autograd, "_enable_profiler_legacy"),
        (torch._C._autograd, "_disable_profiler_legacy"),
    ]:
        monkeypatch.setattr(module, name, lambda *arguments: None)
    probe = Probe("", {"logits": torch.ones(1, 2)})
    torch.autograd._enable_record_function(False)
    assert run(in_a_thread, probe, SOFTMAX).used == (HIDING,)
    assert run(scripted, probe, SOFTMAX).used == (HIDING, "torch's softmax")


def test_a_profiler_that_was_left_on_is_hiding() -> None:
    with torch.autograd.profiler.profile():
        assert run(scripted, Probe("", {"logits": torch.ones(1, 2)}), SOFTMAX).used == (HIDING,)


def test_a_time_limit_is_not_taken_for_hiding() -> None:
    def stops(logits: Tensor) -> Tensor:
        sys._getframe()  # something is called, so that the watch is at work
        raise TimeLimit

    outcome = run(stops, Probe("", {"logits": torch.ones(1, 2)}), SOFTMAX)
    assert outcome.error == "TimeLimit"
    assert not outcome.used


def test_a_long_loop_of_operations_keeps_little_and_hides_nothing() -> None:
    def answer(logits: Tensor) -> Tensor:
        result = scripted(logits)
        for _ in range(30_000):
            logits.exp()
        return result

    outcome = run(answer, Probe("", {"logits": torch.ones(1, 2)}), SOFTMAX)
    assert outcome.used == ("torch's softmax",)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("softmax", "_softmax special_softmax Softmax softmax_ _safe_softmax _masked_softmax Softmax2d"),
        ("relu", "relu_ ReLU _add_relu"),
        ("cross_entropy", "CrossEntropyLoss cross_entropy_loss"),
        ("nll_loss", "NLLLoss nll_loss_nd nll_loss2d nll_loss_forward nll_loss2d_forward"),
        ("linear", "Linear mkldnn_linear _linear_pointwise"),
        ("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu"),
        ("sgd", "SGD _fused_sgd_"),
    ],
)
def test_one_function_has_many_names(name: str, other: str) -> None:
    assert {plain(word) for word in other.split()} == {plain(name)}


def test_other_functions_keep_their_names() -> None:
    words = {plain(name) for name in ("grad", "cross_entropy", "relu", "softmax", "linear")}
    for other in (
        "no_grad",
        "zero_grad",
        "requires_grad_",
        "enable_grad",
        "binary_cross_entropy",
        "clamp_min",
    ):
        assert plain(other) not in words
    for other in ("relu6", "leaky_relu", "bilinear", "log_softmax"):
        assert plain(other) not in words
