"""One submission in the sandbox: whatever its code does, the session goes on and says what happened."""

import base64
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dianlib.checks import tasks
from dianlib.checks.judging import Bench, judge
from dianlib.checks.registry import CHAPTERS, REFERENCES, TOOLS
from dianlib.checks.running import Outcome, run_all
from dianlib.checks.task import Candidate, Task
from dianlib.grading import session as trusted
from dianlib.grading import wire
from dianlib.grading.records import Flag
from dianlib.grading.sandbox import Sandbox
from dianlib.grading.session import Answer, Session, Shown, Times

pytestmark = pytest.mark.skipif(
    shutil.which("bwrap") is None,
    reason="bubblewrap is not installed (Debian and Ubuntu: apt install bubblewrap)",
)


class OpenSandbox(Sandbox):
    """A sandbox in which the answers can be imported, so that one side can be compared with the other."""

    def _test(self) -> None:
        """Do not insist that the references are out of sight; tests/test_sandbox.py looks after the walls."""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    modules = {*TOOLS, *(module for slug in CHAPTERS for module in REFERENCES[slug])}
    checks = ("judging", "kinds", "task", "registry", *CHAPTERS)
    made = OpenSandbox([*sorted(modules), *(f"dianlib.checks.{n}" for n in checks)])
    yield made
    made.close()


@pytest.fixture
def make(sandbox: Sandbox) -> Iterator[Callable[..., Session]]:
    """Make sessions, and close them."""
    made = []

    def one(files: Mapping[str, bytes] | None = None, **limits: Any) -> Session:
        made.append(Session(sandbox, Times(**limits), files))
        return made[-1]

    yield one
    for session in made:
        session.close()


@pytest.fixture
def session(make: Callable[..., Session]) -> Session:
    return make()


@pytest.fixture
def hasty(make: Callable[..., Session]) -> Session:
    """A session in which a cell has half a second."""
    return make(cell=0.5)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop waiting soon for what does not end by itself."""
    monkeypatch.setattr(trusted, "SLACK", 1.0)


def kinds(session: Session) -> list[str]:
    return [flag.kind for flag in session.flags]


# ----- cells ---------------------------------------------------------------------------------------------


def test_a_cell_prints_and_shows(session: Session) -> None:
    shown = session.cell("import sys\nprint('out')\nprint('err', file=sys.stderr)\ndisplay({'a': 1})\n40 + 2")
    assert shown == Shown("out\nerr\n", [{"text/plain": "{'a': 1}"}, {"text/plain": "42"}])
    assert session.flags == []


def test_a_cell_uses_what_the_cells_before_it_defined(session: Session) -> None:
    session.cell("x = 20")
    session.cell("def double(x): return 2 * x")
    assert session.cell("double(x) + 2").shown == [{"text/plain": "42"}]


@pytest.mark.parametrize("last", ["plt.show()", "", "figure"])
def test_a_figure_is_shown_as_a_picture(session: Session, last: str) -> None:
    source = "%matplotlib inline\nimport matplotlib.pyplot as plt\nfigure = plt.figure()\nplt.plot([1, 2]);"
    shown = session.cell(f"{source}\n{last}")
    assert shown.error is None
    pictures = [picture["image/png"] for picture in shown.shown if "image/png" in picture]
    assert pictures
    assert base64.b64decode(pictures[0]).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("%%bash\necho hello", "hello\n"),
        ("!echo hello", "hello\n"),
        ("await __import__('asyncio').sleep(0); print('hello')", "hello\n"),
        ("exit()\nprint('hello')", "hello\n"),
        ("quit\nprint('hello')", "hello\n"),
        ("import atexit\natexit.register(print, 'bye')\nprint('hello')", "hello\n"),
        ("import helper\nprint(helper.word)", "hello\n"),
        ("print(open('helper.py').read())", "word = 'hello'\n"),
        ("import os\nos.fork()\nprint('hello')", "hello\n"),
        ("import multiprocessing\nwith multiprocessing.Pool(2) as pool: print(pool.map(abs, [-1]))", "[1]\n"),
        ("print('\\x1b[31mred\\x1b[0m', '\\x00', '\\ud800')", "[31mred[0m  ?\n"),
        ("", ""),
        ("# nothing but a comment", ""),
    ],
)
def test_a_cell_may(make: Callable[..., Session], source: str, text: str) -> None:
    session = make({"helper.py": b"word = 'hello'"})
    shown = session.cell(source)
    assert (shown.text.rstrip(), shown.error, session.flags) == (text.rstrip(), None, [])
    assert session.cell("print('next')").text == "next\n"


@pytest.mark.parametrize(
    ("source", "name", "text"),
    [
        ("x = 1\nx / 0", "ZeroDivisionError", 'ZeroDivisionError: division by zero\n    in the line "x / 0"'),
        (
            "x = 1\n this is",
            "IndentationError",
            'IndentationError: unexpected indent\n    in the line "this is"',
        ),
        ("print('x'", "SyntaxError", "SyntaxError: incomplete input\n    in the line \"print('x'\""),
        ("import sys\nsys.exit(3)", "SystemExit", 'SystemExit: 3\n    in the line "sys.exit(3)"'),
        ("raise KeyboardInterrupt", "KeyboardInterrupt", "KeyboardInterrupt"),
        ("input('name?')", "EOFError", "EOFError: EOF when reading a line"),
        ("def f(n):\n    return f(n + 1)\nf(0)", "RecursionError", "RecursionError: maximum recursion depth"),
        (
            "class E(Exception):\n    def __str__(self): 1 / 0\nraise E()",
            "E",
            'E\n    in the line "raise E()"',
        ),
        ("raise type('A' * 300, (Exception,), {})('b' * 9999)", "A" * 80, "A" * 300),
        ("%nomagic", "UsageError", "UsageError: Line magic function `%nomagic` not found."),
    ],
)
def test_an_error_in_a_cell_is_told_with_its_line(
    session: Session, source: str, name: str, text: str
) -> None:
    found = session.cell(source)
    assert found.error is not None
    assert found.error[0] == name
    assert found.error[1].startswith(text)
    assert len(found.error[1]) < 1_000
    # What went before the error holds, and the session goes on.
    assert session.cell("print('next')").text == "next\n"
    assert session.flags == []


def test_only_text_and_pictures_are_shown(session: Session) -> None:
    source = """
from IPython.display import HTML, SVG, Javascript, display
display(HTML("<script>alert(1)</script>"), SVG("<svg/>"), Javascript("alert(1)"))
display({"image/png": "PHNjcmlwdD4=", "text/html": "<b>", "text/plain": "plain"}, raw=True)
"""
    shown = session.cell(source).shown
    assert {kind for picture in shown for kind in picture} == {"text/plain"}
    assert shown[-1] == {"text/plain": "plain"}


def test_what_a_cell_prints_is_cut(session: Session) -> None:
    shown = session.cell("print('x' * 1_000_000)")
    assert len(shown.text) == 200_000
    assert session.flags == [
        Flag("output-limit", "A cell printed more than is kept: \"print('x' * 1_000_000)\"")
    ]


def test_more_pictures_than_fit_cost_the_last_ones_and_not_the_cell(session: Session) -> None:
    # Noise hardly shrinks: each picture is about 700 kB, and one answer has room for a few of them.
    source = """
import numpy as np
from matplotlib import pyplot as plt

noise = np.random.default_rng(0).random((500, 500, 3))
for _ in range(8):
    plt.imsave("noise.png", noise)
    display({"image/png": __import__("base64").b64encode(open("noise.png", "rb").read()).decode()}, raw=True)
print("done")
"""
    shown = session.cell(source)
    assert (shown.text, shown.error) == ("done\n", None)
    assert 0 < len(shown.shown) < 8
    assert all(picture.keys() == {"image/png"} for picture in shown.shown)
    assert kinds(session) == ["output-limit"]
    assert session.cell("print('next')").text == "next\n"


def test_what_all_cells_show_is_limited(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_room", 1_000)
    assert session.cell("print('x' * 600)").text == "x" * 600 + "\n"
    assert session.cell("print('x' * 600)").text == "What this cell showed is left out: it is too much.\n"
    assert session.cell("print('x' * 300)").text == "x" * 300 + "\n"
    assert kinds(session) == ["output-limit"]


# ----- cells that do not end -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "while True: print('more')",
        "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()",
        "import time\ntry:\n    time.sleep(60)\nexcept Exception: pass",
    ],
)
def test_a_cell_out_of_time_is_left_and_its_names_stay(hasty: Session, source: str) -> None:
    hasty.cell("x = 41")
    began = time.monotonic()
    shown = hasty.cell(f"x = 42\n{source}")
    assert time.monotonic() - began < 0.5 + trusted.SLACK
    assert shown.error == ("OutOfTime", "This cell did not end within 0.5 s.")
    assert kinds(hasty) == ["timeout"]
    assert hasty.cell("x").shown == [{"text/plain": "42"}]  # in the same process


@pytest.mark.parametrize(
    "source",
    [
        "import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\nwhile True: pass",
        "import signal\nsignal.setitimer(signal.ITIMER_REAL, 0)\nwhile True: pass",
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass",
        "sum(range(10**12))",
    ],
)
def test_a_cell_that_does_not_let_go_costs_only_itself(hasty: Session, impatient: None, source: str) -> None:
    hasty.cell("x = 41")
    began = time.monotonic()
    shown = hasty.cell(f"x = 42\n{source}")
    assert time.monotonic() - began < 10
    assert shown.error == ("OutOfTime", "This cell did not end within 0.5 s.")
    assert hasty.cell("x").shown == [{"text/plain": "41"}]  # in a new process, without that cell
    assert kinds(hasty) == ["timeout"]


def test_a_cell_that_catches_everything_ends(hasty: Session, impatient: None) -> None:
    hasty.cell("x = 41")
    began = time.monotonic()
    shown = hasty.cell("while True:\n    try:\n        while True: pass\n    except BaseException: pass")
    assert time.monotonic() - began < 10
    # It ends at the alarm that comes while it handles another one, or with its process.
    assert shown.error == ("OutOfTime", "This cell did not end within 0.5 s.")
    assert hasty.cell("x").shown == [{"text/plain": "41"}]


# Cells and answers that find the socket to the trusted side write nonsense on it.
SCRIBBLE = """
import os
for number in range(3, 256):
    try:
        os.write(number, b"x" * 4096)
    except OSError:
        pass
"""


# ----- cells that end their process ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos._exit(0)",
        "import ctypes\nctypes.string_at(0)",
        "import os\nos.abort()",
        "import os\nos.close(200)",
        SCRIBBLE,
        "import builtins\nbuiltins.len = None",
        "import json\njson.dumps = None",
    ],
)
def test_a_cell_that_ends_its_process_is_left_out(session: Session, source: str) -> None:
    session.cell("x = 41")
    session.cell("y = 1 / 0")
    shown = session.cell(source)
    assert shown.error == ("ProcessEnded", "This cell ended the process that ran it, so it was left out.")
    assert kinds(session) == ["died"]
    assert session.cell("x + 1").shown == [{"text/plain": "42"}]


def test_a_cell_whose_process_dies_once_is_run_again(session: Session) -> None:
    session.cell("x = 41")
    box = session._box
    assert box is not None
    box.connection.shutdown(socket.SHUT_RDWR)  # as if the system had ended its process
    assert session.cell("x + 1").shown == [{"text/plain": "42"}]
    assert session.flags == []


def test_files_are_there_again_after_a_loss(make: Callable[..., Session]) -> None:
    session = make({"helper.py": b"word = 'hello'"})
    session.cell("import os\nos._exit(0)")
    assert session.cell("import helper\nhelper.word").shown == [{"text/plain": "'hello'"}]


def test_after_too_many_losses_the_rest_is_not_run(make: Callable[..., Session]) -> None:
    session = make(restarts=3)
    assert session.cell("import os\nos._exit(0)").error is not None
    assert session.cell("print(1)").text == "1\n"
    session.cell("import os\nos._exit(1)")
    left_out = session.cell("print(1)")
    assert left_out.error == ("NotRun", "This cell was not run: its process ended too often.")
    answer = session.task(Bench(tasks()["mlp.relu"], 1), "relu", frozenset())
    assert {outcome.error for outcome in answer.outcomes} == {"TimeLimit"}
    assert Flag("died", "Its process ended too often, so the rest was not run.") in session.flags


def test_a_submission_has_its_time_and_no_more(make: Callable[..., Session]) -> None:
    session = make(cell=30.0, submission=1.0)
    began = time.monotonic()
    session.cell("def relu(x): return x")
    assert session.cell("import time\ntime.sleep(20)").error is not None
    late = session.cell("print(1)")
    assert time.monotonic() - began < 1.0 + trusted.SLACK
    assert late.error == ("NotRun", "This cell was not run: the submission has used its 1 s.")
    assert kinds(session)[-1] == "timeout"
    bench = Bench(tasks()["mlp.relu"], 1)
    answer = session.task(bench, "relu", frozenset())
    assert [outcome.error for outcome in answer.outcomes] == ["TimeLimit"] * (len(bench.probes) + 1)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("bytes(9 << 30)", "memory"),
        ("import torch\ntorch.zeros(2 << 30)", "memory"),
        (
            "import threading\nfor _ in range(99): threading.Thread(target=threading.Event().wait).start()",
            "processes",
        ),
        ("open('/tmp/f', 'wb').write(bytes(60 << 20))", "disk-limit"),
        ("open('/usr/f', 'w')", "denied"),
    ],
)
def test_what_the_walls_stop_is_noted(session: Session, source: str, kind: str) -> None:
    assert session.cell(source).error is not None
    assert kinds(session) == [kind]


# ----- tasks ---------------------------------------------------------------------------------------------


def shorter(task: Task, limit: float) -> Task:
    """Give each probe of a task less time."""
    short = replace(task, limit=limit)
    object.__setattr__(short, "reference", task.reference)
    return short


LINEAR = tasks()["mlp.linear"]
READ = tasks()["metrics.read_a_table"]
RIGHT = {
    probe.args["question"]: outcome.values["result"]
    for bench in [Bench(READ, 1)]
    for probe, outcome in zip(bench.probes, bench.right, strict=False)
}


def linear(session: Session, body: str, limit: float = LINEAR.limit) -> Answer:
    """Hand in a linear layer with a few lines before its right answer; ``calls`` counts the calls so far."""
    source = "import os, signal, time, torch\ncalls = 0\n"
    source += "def linear(x, weight, bias):\n    global calls\n    calls += 1\n"
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    shown = session.cell(f"{source}{lines}    return x @ weight.T + bias")
    assert shown.error is None, shown.error
    return session.task(Bench(shorter(LINEAR, limit), 1), "linear", frozenset())


def errors(answer: Answer) -> list[str]:
    return [outcome.error for outcome in answer.outcomes]


def points(answer: Answer, task: Task = LINEAR) -> float:
    return judge(Bench(task, 1), answer.outcomes).points


def test_a_right_answer(session: Session) -> None:
    answer = linear(session, "")
    assert answer.state == "ready"
    assert points(answer) == LINEAR.points
    assert session.flags == []


@pytest.mark.parametrize(
    ("source", "state", "type_name"),
    [
        ("x = 1", "missing", "NoneType"),
        ("linear = 3", "unusable", "int"),
        ("linear = None", "unusable", "NoneType"),
        ("import torch\nlinear = torch.zeros(2)", "unusable", "Tensor"),
        ("class Odd: pass\nlinear = Odd()", "unusable", "Odd"),
        ("linear = type('x' * 500, (), {})()", "unusable", "x" * 80),
        ("linear = {}", "unusable", "dict"),
    ],
)
def test_an_answer_that_is_none(session: Session, source: str, state: str, type_name: str) -> None:
    session.cell(source)
    assert session.task(Bench(LINEAR, 1), "linear", frozenset()) == Answer(state, [], type_name)


def test_answers_with_numbers(session: Session) -> None:
    session.cell(f"answers = {RIGHT!r}")
    assert points(session.task(Bench(READ, 1), "answers", frozenset()), READ) == READ.points


@pytest.mark.parametrize(
    "body",
    [
        "get = property(lambda self: 1 / 0)",
        "get = None",
        "def get(self, key): raise SystemExit",
        "def get(self, key): import os; os._exit(0)",
        "def get(self, key): return self",
        "def __getattribute__(self, name): raise KeyError",
        "get = property(lambda self: __import__('os')._exit(0))",
    ],
)
def test_a_dictionary_with_tricks_gets_no_points(session: Session, body: str) -> None:
    session.cell(f"class Odd(dict):\n    {body}\nanswers = Odd({RIGHT!r})")
    answer = session.task(Bench(READ, 1), "answers", frozenset())
    assert answer.state == "unusable" or points(answer, READ) == 0


def test_a_dictionary_that_hangs_when_it_is_looked_at(session: Session, impatient: None) -> None:
    session.cell(
        "class Odd(dict):\n    @property\n    def get(self):\n        while True: pass\nanswers = Odd()"
    )
    answer = session.task(Bench(READ, 1), "answers", frozenset())
    assert set(errors(answer)) == {"TimeLimit"}
    assert session.cell("1 + 1").shown == [{"text/plain": "2"}]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        # A process that dies once costs nothing, and one that always dies only its probes.
        ("if calls == 2: os._exit(0)", ["", "", "", "", ""]),
        ("if len(x) == LEN: os._exit(0)", ["", "Died", "", "", ""]),
        ("if len(x) == LEN: __import__('ctypes').string_at(0)", ["", "Died", "", "", ""]),
        ("os._exit(0)", ["Died", "Died", "TimeLimit", "TimeLimit", "TimeLimit"]),
        ("if calls == 2: time.sleep(60)", ["", "TimeLimit", "", "", ""]),
        ("if calls in (2, 3): time.sleep(60)", ["", "TimeLimit", "TimeLimit", "TimeLimit", "TimeLimit"]),
        ("while True: pass", ["TimeLimit"] * 5),
        ("if len(x) == LEN: sum(range(10**12))", ["", "TimeLimit", "", "", ""]),
        (
            "if len(x) == LEN:\n    signal.signal(signal.SIGALRM, signal.SIG_IGN)\n    time.sleep(60)",
            ["", "TimeLimit", "", "", ""],
        ),
        ("raise SystemExit", ["SystemExit"] * 5),
        ("raise NotImplementedError", ["NotImplementedError"] * 5),
        ("bytes(9 << 30)", ["MemoryError"] * 5),
        ("print('x' * 10**7)", [""] * 5),
    ],
)
def test_a_probe_that_goes_wrong_costs_only_itself(session: Session, body: str, expected: list[str]) -> None:
    second = Bench(LINEAR, 1).probes[1].args["x"]
    assert sum(len(probe.args["x"]) == len(second) for probe in Bench(LINEAR, 1).probes) == 1
    answer = linear(session, body.replace("LEN", str(len(second))), limit=1.0)
    assert errors(answer) == expected
    lost = {"Died", "TimeLimit"} & set(expected)
    assert set(kinds(session)) >= {{"Died": "died", "TimeLimit": "timeout"}[error] for error in lost}
    assert session.cell("calls").shown == [{"text/plain": "0"}]  # the notebook's own process lives on


def test_an_answer_that_takes_its_box_along_is_given_up(session: Session) -> None:
    # Every probe runs in a child; this one ends the process that it came from.
    assert "" not in errors(linear(session, SCRIBBLE))
    assert session.cell("print(1)").text == "1\n"


@pytest.mark.parametrize(
    "value",
    [
        "None",
        "calls",
        "torch.tensor(1j)",
        "torch.ones(3, dtype=torch.complex64)",
        "torch.zeros(0)",
        "torch.zeros(10**7)",
        "x.to_sparse()",
        "torch.nested.nested_tensor([x[0]])",
        "torch.zeros(2, 2, device='meta')",
        "torch.nn.Parameter(x)",
        "10**400",
        "float('nan')",
        "'x' * 10**8",
        "[torch.zeros(2)] * 100_000",
        "[[[[[[[[[[[[1]]]]]]]]]]]]",
        "{torch.zeros(1): 2, 'result': 3}",
        "type('Odd', (torch.Tensor,), {'shape': property(lambda self: 1 / 0)})()",
        "linear",
    ],
)
def test_whatever_an_answer_returns_is_judged(session: Session, value: str) -> None:
    answer = linear(session, f"return {value}")
    report = judge(Bench(LINEAR, 1), answer.outcomes)
    assert report.points == 0
    assert report.message.startswith("mlp.linear: not right yet")


def test_an_answer_that_remembers_its_calls_gives_itself_away(session: Session) -> None:
    answer = linear(session, "if calls == 5: return 2 * x")
    assert errors(answer) == [""] * 5
    assert points(answer) == LINEAR.points / 2


def test_the_probes_of_a_task_do_not_change_the_notebook(session: Session) -> None:
    linear(session, "")
    assert session.cell("calls").shown == [{"text/plain": "0"}]


def test_a_shortcut_is_seen_in_the_sandbox(session: Session) -> None:
    session.cell("import torch\nrelu = torch.relu")
    task = tasks()["mlp.relu"]
    answer = session.task(Bench(task, 1), "relu", task.forbidden)
    assert answer.outcomes[0].used == ("torch's relu",)


# ----- sealed functions ----------------------------------------------------------------------------------

GRADE_THIS = tasks()["metrics.grade_this"]
GOOD_TEST = """
def examine(macro_f1):
    found = {CALL}
    return abs(float(found) - 0.7916666) < 1e-4
"""


def examine(session: Session, source: str) -> Answer:
    session.cell("import gc, inspect, sys, torch\nconfusion = torch.tensor([[3, 1], [1, 5]])")
    shown = session.cell(source)
    assert shown.error is None, shown.error
    return session.task(Bench(GRADE_THIS, 1), "examine", frozenset())


def verdicts(answer: Answer) -> list[Any]:
    return [outcome.values.get("result") for outcome in answer.outcomes]


def in_process(source: str) -> list[Any]:
    names: dict[str, Any] = {"torch": torch, "confusion": torch.tensor([[3, 1], [1, 5]])}
    exec(source, names)
    outcomes = run_all(names["examine"], Bench(GRADE_THIS, 1).probes, frozenset(), GRADE_THIS.limit)
    return [outcome.values.get("result") for outcome in outcomes]


@pytest.mark.parametrize(
    "call", ["macro_f1(confusion)", "macro_f1(confusion=confusion)", "macro_f1(confusion.float())"]
)
def test_a_test_judges_functions_that_run_elsewhere(session: Session, call: str) -> None:
    source = GOOD_TEST.replace("{CALL}", call)
    answer = examine(session, source)
    assert verdicts(answer) == in_process(source)
    assert {True, False} <= set(verdicts(answer))


@pytest.mark.parametrize(
    "body",
    [
        "macro_f1()",  # the function raises: it is rejected
        "macro_f1('x')",
        "macro_f1(torch.zeros(2, 2))",
        "macro_f1(confusion, 1, 2)",
        "macro_f1(None)",
    ],
)
def test_a_sealed_function_raises_as_an_open_one(session: Session, body: str) -> None:
    source = f"def examine(macro_f1):\n    {body}"
    assert verdicts(examine(session, source)) == in_process(source)


LOOK_AROUND = '''
log = []

def texts(start):
    """Find all texts that can be reached from an object."""
    seen, waiting, found = set(), [start], []
    while waiting and len(seen) < 20_000:
        one = waiting.pop()
        if id(one) in seen or inspect.ismodule(one):
            continue
        seen.add(id(one))
        found += [one] if isinstance(one, str) else []
        waiting += gc.get_referents(one)
    return found

def examine(macro_f1):
    frames, frame = [], sys._getframe()
    while frame:
        frames += [repr(value) for value in frame.f_locals.values()]
        frame = frame.f_back
    everything = [one for one in gc.get_objects() if type(one) is dict]
    found = texts(macro_f1) + texts(frames) + [v for d in everything for v in d.values() if type(v) is str]
    open("/tmp/found", "a").write("\\n".join(found))
    return True
'''


def test_a_sealed_function_tells_only_its_name(session: Session) -> None:
    examine(session, LOOK_AROUND)
    session.cell("found = open('/tmp/found').read()")
    known = [probe.args["macro_f1"].text for probe in Bench(GRADE_THIS, 1).probes]
    lines = {
        line.strip()
        for text in known
        for line in text.splitlines()
        if "confusion" in line and "def" not in line
    }
    assert lines
    for line in lines:
        assert session.cell(f"{line!r} in found").shown == [{"text/plain": "False"}], line
    for word in ("a right implementation", "a wrong implementation"):
        assert session.cell(f"{word!r} in found").shown == [{"text/plain": "False"}]
    assert session.cell("'macro_f1' in found").shown == [{"text/plain": "True"}]  # it did look
    assert session.cell("import os\nos.path.getsize('/tmp/found') > 10_000").shown == [{"text/plain": "True"}]


MLP_TEST = tasks()["mlp.grade_this"]


def judge_softmax(session: Session, source: str) -> Answer:
    assert session.cell(f"import torch\n{source}").error is None
    return session.task(Bench(MLP_TEST, 1), "examine", frozenset())


@pytest.mark.parametrize(
    "source",
    [
        # A change of the argument, and a gradient that is cut off or wrong, are seen from inside.
        """
def examine(softmax):
    x = torch.tensor([[1.0, 2.0]])
    softmax(x)
    return bool(x[0, 0] == 1)
""",
        """
def examine(softmax):
    x = torch.tensor([[1.0, 2.0, 4.0]], requires_grad=True)
    softmax(x)[0, 0].backward()
    right = torch.softmax(x, 1)[0, 0] * (torch.tensor([1.0, 0, 0]) - torch.softmax(x, 1)[0])
    return torch.allclose(x.grad, right, atol=1e-4)
""",
        "def examine(softmax):\n    return softmax(torch.zeros(2, 3, requires_grad=True)).requires_grad",
        "def examine(softmax):\n    return not softmax(torch.tensor([[1000.0, 0.0]])).isnan().any()",
    ],
)
def test_a_sealed_function_behaves_as_an_open_one(session: Session, source: str) -> None:
    names: dict[str, Any] = {"torch": torch}
    exec(source, names)
    wanted = run_all(names["examine"], Bench(MLP_TEST, 1).probes, frozenset(), MLP_TEST.limit)
    assert verdicts(judge_softmax(session, source)) == [outcome.values.get("result") for outcome in wanted]


def test_an_answer_that_a_test_did_not_wait_for_is_not_taken_for_the_next(session: Session) -> None:
    """The time of a probe ends while a sealed function is at work; what it returns late belongs to nobody."""
    session.cell("import torch\nconfusion = torch.tensor([[3, 1], [1, 5]])")
    session.cell("def examine(macro_f1):\n    while True:\n        macro_f1(confusion)")
    bench = Bench(replace(GRADE_THIS, limit=0.3), 1)
    answer = session.task(bench, "examine", GRADE_THIS.forbidden)
    assert len(answer.outcomes) == len(bench.probes) + 1
    assert {outcome.error for outcome in answer.outcomes} == {"TimeLimit"}
    session.cell(GOOD_TEST.replace("{CALL}", "macro_f1(confusion)"))
    after = session.task(Bench(GRADE_THIS, 1), "examine", GRADE_THIS.forbidden)
    assert {outcome.error for outcome in after.outcomes} <= {"", "AssertionError"}
    assert {True, False} <= set(verdicts(after))


def test_a_test_that_never_stops_calling_is_stopped(session: Session) -> None:
    source = "def examine(macro_f1):\n    while True: macro_f1(confusion)"
    task = shorter(GRADE_THIS, 1.0)
    session.cell("import torch\nconfusion = torch.tensor([[3, 1], [1, 5]])")
    session.cell(source)
    began = time.monotonic()
    answer = session.task(Bench(task, 1), "examine", frozenset())
    assert time.monotonic() - began < 10
    assert set(errors(answer)) == {"TimeLimit"}


# ----- frames that somebody else wrote -------------------------------------------------------------------

# Finds the socket to the trusted side, and writes on it what it likes.
FORGE = """
import json, os, struct
def frame(header, buffers=()):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    sizes = struct.pack(f"<II{len(buffers)}Q", len(text), len(buffers), *map(len, buffers))
    return sizes + text + b"".join(buffers)
def forge(*frames):
    for one in frames:
        os.write(200, one)
right = {"values": [["result", 1.0]], "error": "", "error_text": "", "changed": [], "detached": False}
right |= {"used": [], "random": False}
"""


@pytest.fixture
def forging(make: Callable[..., Session], impatient: None) -> Session:
    session = make(cell=1.0, submission=20.0)
    assert session.cell(FORGE).error is None
    return session


@pytest.mark.parametrize(
    "frames",
    [
        "b'x' * 100",
        "b'\\xff' * 100",
        "struct.pack('<II', 1 << 30, 0)",
        "struct.pack('<II', 2, 1 << 30)",
        "struct.pack('<IIQ', 2, 1, 1 << 60)",
        "frame(b'[' * 100_000)",
        "frame(b'[]')",
        "frame(b'{')",
        "frame(b'1' * 10_000)",
        "frame({'text': 3, 'shown': 3, 'error': 3, 'cut': 3})",
        "frame({'text': 'x' * 3_000_000, 'shown': [{'image/png': 'x' * 100}] * 200})",
        "frame({'error': ['CellTimeLimit', '']})",
        "frame({'state': 'ready'}), frame({'outcome': right})",
        "frame({'call': 1, 'arguments': []})",
    ],
)
def test_a_cell_that_forges_frames_hurts_nobody_but_itself(forging: Session, frames: str) -> None:
    began = time.monotonic()
    forging.cell(f"forge({frames})")
    forging.cell("x = 1")
    answer = forging.task(Bench(LINEAR, 1), "linear", frozenset())
    assert answer.state == "missing" or points(answer) == 0
    forging.cell("print('end')")
    assert time.monotonic() - began < 20 + trusted.SLACK + 1


@pytest.mark.parametrize(
    "outcome",
    [
        "right",
        "None",
        "{}",
        "{**right, 'values': [['result', {'is': 'Tensor', 'dtype': 'float32', 'shape': [2], 'buffer': 0}]]}",
        "{**right, 'values': [['result', {'is': 'Tensor', 'dtype': 'object', 'shape': [1], 'buffer': 0}]]}",
        "{**right, 'values': [['result', {'is': 'Sealed', 'number': 1, 'name': 'x'}]]}",
        "{**right, 'values': [['result', 10**300]]}",
        "{**right, 'values': [['result', float('nan')]] * 2000}",
        "{**right, 'error': 'x' * 10**6, 'error_text': '<script>' * 1000}",
        "{**right, 'changed': ['\\ud800'] * 10000}",
    ],
)
def test_forged_outcomes_get_no_points(forging: Session, outcome: str) -> None:
    # Before the task is asked for, everything that could be its answer lies on the socket.
    answers = f"[frame({{'outcome': {outcome}}}, [b'12345678'])] * 8"
    forging.cell(f"forge(frame({{}}), frame({{'state': 'ready'}}), *{answers})")
    answer = forging.task(Bench(LINEAR, 1), "linear", frozenset())
    assert answer.state in ("missing", "ready")
    if answer.state == "ready":
        report = judge(Bench(LINEAR, 1), answer.outcomes)
        assert report.points == 0
        assert len(report.message) < 3_000
        assert "\ud800" not in report.message


def test_frames_that_come_in_drops_are_not_waited_for(forging: Session) -> None:
    drops = "forge(struct.pack('<II', 1000, 0))\nfor _ in range(1000):\n    time.sleep(0.02)\n    forge(b' ')"
    began = time.monotonic()
    assert forging.cell(f"import time\n{drops}").error is not None
    assert time.monotonic() - began < 5


def test_heavy_outcomes_do_not_fill_the_memory(forging: Session) -> None:
    source = """
import threading
tensor = {"is": "Tensor", "dtype": "uint8", "shape": [1_000_000]}
values = [[str(number), {**tensor, "buffer": number}] for number in range(40)]
one = frame({"outcome": {**right, "values": values}}, [bytes(1_000_000)] * 40)
def flood():
    while True:
        view = memoryview(one)
        while view:
            view = view[os.write(200, view):]
forge(frame({}), frame({"state": "ready"}))
threading.Thread(target=flood, daemon=True).start()
"""
    forging.cell(source)
    answer = forging.task(Bench(LINEAR, 1), "linear", frozenset())
    kept = sum(v.nbytes for o in answer.outcomes for v in o.values.values() if isinstance(v, Tensor))
    assert kept <= wire.MAX_BYTES


def test_calls_of_sealed_functions_are_counted_and_checked(forging: Session) -> None:
    forging.cell(
        "def examine(macro_f1):\n    forge(frame({'call': 10**9, 'arguments': None}))\n    return True"
    )
    answer = forging.task(Bench(GRADE_THIS, 1), "examine", frozenset())
    assert judge(Bench(GRADE_THIS, 1), answer.outcomes).points == 0


# ----- the same as in a notebook -------------------------------------------------------------------------


def candidates(task: Task) -> list[Candidate]:
    """Right answers of all kinds, and two forms of each mistake. Runs on both sides."""
    right = [task.reference, *task.accepts, *task.variants]
    return right + [form for fault in task.mistakes for form in task.forms(fault)[:2]]


ON_THE_OTHER_SIDE = """
from dianlib.checks.registry import tasks
def candidates(task):
    right = [task.reference, *task.accepts, *task.variants]
    return right + [form for fault in task.mistakes for form in task.forms(fault)[:2]]
for task in tasks().values():
    for number, candidate in enumerate(candidates(task)):
        globals()[f"{task.id}-{number}"] = candidate
"""


def equal(one: Outcome, other: Outcome) -> bool:
    """Compare two outcomes to the last bit."""
    if one.values.keys() != other.values.keys():
        return False
    plain = [f.name for f in fields(Outcome) if f.name not in ("values", "error_text")]
    return all(getattr(one, name) == getattr(other, name) for name in plain) and all(
        torch.equal(
            torch.as_tensor(one.values[name]).nan_to_num(nan=3.5), torch.as_tensor(value).nan_to_num(nan=3.5)
        )
        if isinstance(value, Tensor | float)
        else one.values[name] == value
        for name, value in other.values.items()
    )


@pytest.fixture(scope="module")
def full(sandbox: Sandbox) -> Iterator[Session]:
    """A session whose notebook defines all answers, right and wrong."""
    session = Session(sandbox, Times(submission=600.0))
    shown = session.cell(ON_THE_OTHER_SIDE)
    assert shown.error is None, shown.error
    yield session
    session.close()


@pytest.mark.parametrize("name", tasks())
def test_an_answer_does_the_same_in_the_sandbox_and_in_a_notebook(full: Session, name: str) -> None:
    task = tasks()[name]
    bench = Bench(task, 11)
    for number, candidate in enumerate(candidates(task)):
        call = candidate.get if task.is_value and isinstance(candidate, dict) else candidate
        wanted = run_all(call, bench.probes, frozenset(), task.limit)
        answer = full.task(bench, f"{name}-{number}", frozenset())
        assert answer.state == "ready"
        if not equal(wanted[0], wanted[-1]):  # it keeps something from all earlier calls, in other tests too
            reports = [judge(bench, outcomes) for outcomes in (answer.outcomes, wanted)]
            assert reports[0].diagnosis == reports[1].diagnosis
            assert reports[0].points == reports[1].points < task.points
            continue
        different = [
            n for n, pair in enumerate(zip(answer.outcomes, wanted, strict=True)) if not equal(*pair)
        ]
        assert different == [], f"candidate {number}, probes {different}"
    assert full.flags == []


@pytest.mark.parametrize("name", tasks())
def test_a_report_is_the_same_in_the_sandbox_and_in_a_notebook(full: Session, name: str) -> None:
    task = tasks()[name]
    bench = Bench(task, 12)
    right = len(candidates(task)) - len([form for fault in task.mistakes for form in task.forms(fault)[:2]])
    for number in (0, right):  # the reference, and the first mistake
        report = judge(bench, full.task(bench, f"{name}-{number}", frozenset()).outcomes)
        wanted = judge(bench, run_all(candidates(task)[number], bench.probes, frozenset(), task.limit))
        assert (report.points, report.diagnosis) == (wanted.points, wanted.diagnosis)
        assert report.passed == (number == 0)
