"""Frames between judge and sandbox: what is ours travels unharmed, and nothing hostile gets through."""

import contextlib
import copy
import dataclasses
import json
import math
import random
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from dianlib.checks import running, tasks
from dianlib.checks.judging import Bench
from dianlib.checks.running import Foreign, Outcome, Probe, Source, run
from dianlib.grading import wire
from dianlib.grading.wire import Closed, Sealed, TooLate, WireError

TASKS = tuple(tasks())
Pair = tuple[socket.socket, socket.socket]


@cache
def bench(name: str) -> Bench:
    return Bench(tasks()[name], 0)


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def in_background(work: Any, *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=work, args=arguments, daemon=True)
    thread.start()
    return thread


def equal(a: Any, b: Any) -> bool:
    """Compare values of any depth: the types count, tensors bit by bit, not-a-number equals itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        same_kind = a.dtype == b.dtype and a.shape == b.shape
        return same_kind and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if dataclasses.is_dataclass(a):
        return all(equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return bool(a == b)


def travel(pair: Pair, described: Any, buffers: wire.Buffers) -> tuple[Any, wire.Buffers]:
    """Send a description and its buffers through a real socket."""
    sender = in_background(wire.send, pair[0], {"value": described}, buffers)
    header, arrived = wire.receive(pair[1], 10)
    sender.join()
    return header["value"], arrived


def there_and_back(pair: Pair, value: Any) -> Any:
    buffers: wire.Buffers = []
    return wire.unpack(*travel(pair, wire.pack(value, buffers), buffers))


def outcome_there_and_back(pair: Pair, outcome: Outcome) -> Outcome:
    buffers: wire.Buffers = []
    return wire.unpack_outcome(*travel(pair, wire.pack_outcome(outcome, buffers), buffers))


# ----- what is ours travels --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_every_probe_of_a_task_arrives_as_it_was(name: str, pair: Pair) -> None:
    for probe in bench(name).probes:
        # Code is never sent: the session puts a sealed function in its place.
        args = {k: Sealed(1, v.name) if isinstance(v, Source) else v for k, v in probe.args.items()}
        blinded = dataclasses.replace(probe, args=args)
        assert equal(there_and_back(pair, blinded), blinded), probe.name


@pytest.mark.parametrize("name", TASKS)
def test_what_a_right_and_a_wrong_answer_do_arrives_as_it_was(name: str, pair: Pair) -> None:
    task = tasks()[name]
    for candidate in (task.reference, *list(task.faults.values())[:2]):
        for probe in bench(name).probes:
            outcome = run(candidate, probe, task.forbidden)
            assert equal(outcome_there_and_back(pair, outcome), outcome), probe.name


def test_every_kind_of_specification_can_be_sent() -> None:
    defined = {
        kind
        for kind in vars(running).values()
        if dataclasses.is_dataclass(kind) and kind.__module__ == running.__name__
    }
    # An outcome has a description of its own, and code is not sent.
    assert set(wire.SPECIFICATIONS.values()) == defined - {Outcome, Source} | {Sealed}


@pytest.mark.parametrize("dtype", wire.DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3), (1,) * 16], ids=str)
def test_tensors_of_every_dtype_and_shape_travel(dtype: torch.dtype, shape: Any, pair: Pair) -> None:
    value = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    assert equal(there_and_back(pair, value), value)


def test_unusual_tensors_travel_as_their_numbers(pair: Pair) -> None:
    base = torch.tensor([[1.5, -2.0], [float("nan"), float("inf")]])
    for value in (base.T, base[:, 1], base.expand(3, 2, 2), base.clone().requires_grad_()):
        assert equal(there_and_back(pair, value), value.detach().clone())
    turned = torch.tensor([1 + 2j, 3 - 4j])
    assert equal(there_and_back(pair, turned.conj()), torch.tensor([1 - 2j, 3 + 4j]))
    assert equal(there_and_back(pair, turned.conj().imag), torch.tensor([-2.0, 4.0]))
    for value in (
        torch.zeros(1_000_001),
        torch.eye(2).to_sparse(),
        torch.zeros([1] * 17),
        torch.ones(0, 2**21),
    ):
        assert isinstance(there_and_back(pair, value), Foreign)


def test_values_of_every_plain_kind_travel(pair: Pair) -> None:
    value = {
        "numbers": [0, -1, 2**63, -(2**63), 1.5, math.nan, math.inf, -math.inf, True, False, None],
        "texts": ("", "数据 Zürich 🎲", "two\nlines\tand a tab"),
        "nested": [[[(1, {"": {}})]]],
    }
    assert equal(there_and_back(pair, value), value)


def test_other_objects_travel_as_the_name_of_their_type(pair: Pair) -> None:
    assert there_and_back(pair, {1, 2}) == Foreign("set")
    assert there_and_back(pair, [open]) == [Foreign("builtin_function_or_method")]
    assert there_and_back(pair, Source("import os", "f")) == Foreign("Source")
    assert there_and_back(pair, 10**5000) == Foreign("int")
    outcome = outcome_there_and_back(pair, Outcome({"result": "a text", "x": [1], "y": 2**64}))
    assert outcome == Outcome({"result": Foreign("str"), "x": Foreign("list"), "y": Foreign("int")})


def test_what_is_nested_too_deeply_is_cut_and_still_arrives(pair: Pair) -> None:
    value: Any = "core"
    for _ in range(50):
        value = [value]
    found = there_and_back(pair, value)
    for _ in range(wire.MAX_DEPTH):
        (found,) = found
    assert found == Foreign("something nested too deeply")


# ----- hostile frames --------------------------------------------------------------------------------------


def frame(header: bytes, buffers: list[bytes], **lies: Any) -> bytes:
    """Make the bytes of a frame, with sizes that may be lies."""
    sizes = lies.get("sizes", [len(buffer) for buffer in buffers])
    counts = struct.pack("<II", lies.get("header_size", len(header)), lies.get("count", len(sizes)))
    return counts + struct.pack(f"<{len(sizes)}Q", *sizes) + header + b"".join(buffers)


def receive(data: bytes, seconds: float = 5.0) -> Any:
    """Let somebody send these bytes and hang up; return what is received."""
    ours, theirs = socket.socketpair()

    def send() -> None:
        with theirs, contextlib.suppress(OSError):  # the receiver has hung up
            theirs.sendall(data)

    with ours:
        sender = in_background(send)
        try:
            return wire.receive(ours, seconds)
        finally:
            ours.close()
            sender.join()


HOSTILE_FRAMES = {
    "nothing": b"",
    "half of the counts": b"\x02\x00\x00",
    "a huge header": struct.pack("<II", 2**32 - 1, 0),
    "a header that is a bit too large": frame(b"{}", [], header_size=wire.MAX_HEADER + 1),
    "a thousand million buffers": struct.pack("<II", 2, 10**9),
    "one buffer too many": frame(b"{}", [b""] * (wire.MAX_BUFFERS + 1)),
    "buffers of 16 exabytes": frame(b"{}", [], sizes=[2**64 - 1, 2**64 - 1]),
    "sizes whose sum wraps around": frame(b"{}", [], sizes=[2**63, 2**63]),
    "a buffer that is a bit too large": frame(b"{}", [], sizes=[wire.MAX_BYTES + 1]),
    "fewer bytes than said": frame(b"{}", [b"abc"], sizes=[4]),
    "no header": frame(b"", []),
    "no JSON": frame(b"{]", []),
    "a list": frame(b"[1, 2]", []),
    "null": frame(b"null", []),
    "a number": frame(b"17", []),
    "no text": frame(bytes(range(256)), []),
    "a lone byte of UTF-8": frame(b'{"a": "\xff"}', []),
    "two objects": frame(b"{}{}", []),
    "a very long integer": frame(b'{"a": ' + b"9" * 100_000 + b"}", []),
    "lists in lists": frame(b'{"a": ' + b"[" * 1_000_000, []),
    "closed lists in lists": frame(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", []),
    "objects in objects": frame(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, []),
    "pickle": frame(b"\x80\x04\x95", []),
}


@pytest.mark.parametrize("data", HOSTILE_FRAMES.values(), ids=HOSTILE_FRAMES)
def test_a_hostile_frame_is_refused(data: bytes) -> None:
    began = time.monotonic()
    with pytest.raises(WireError):
        receive(data)
    assert time.monotonic() - began < 4


def test_random_bytes_are_refused_or_are_a_frame() -> None:
    draw = random.Random(1)
    whole = frame(b'{"outcome": {"values": []}}', [b"abcd", b""])
    refused = 0
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            match draw.randrange(3):
                case 0:
                    data[draw.randrange(len(data))] = draw.randrange(256)
                case 1:
                    del data[draw.randrange(len(data)) :]
                    data += draw.randbytes(draw.randrange(40))
                case _:
                    data += draw.randbytes(1)
        try:
            header, buffers = receive(bytes(data), 0.5)
            assert isinstance(header, dict)
            assert all(isinstance(buffer, bytes) for buffer in buffers)
        except WireError:
            refused += 1
    assert 300 < refused < 600


def test_a_frame_must_arrive_in_time_however_it_drips(pair: Pair) -> None:
    data = frame(b'{"a": "' + b"x" * 10_000 + b'"}', [])

    def drip() -> None:
        with contextlib.suppress(OSError):
            for byte in data:
                pair[0].send(bytes([byte]))
                time.sleep(0.02)

    in_background(drip)
    began = time.monotonic()
    with pytest.raises(TooLate):
        wire.receive(pair[1], 0.3)
    assert 0.2 < time.monotonic() - began < 2
    with pytest.raises(TooLate):
        wire.receive(pair[1], -1)


def test_the_end_of_the_other_side_is_told_apart(pair: Pair) -> None:
    pair[0].close()
    with pytest.raises(Closed):
        wire.receive(pair[1], 5)
    with pytest.raises(Closed):
        wire.send(pair[1], {})


def test_a_reader_that_does_not_read_is_not_waited_for(pair: Pair) -> None:
    pair[0].settimeout(0.2)
    with pytest.raises(TooLate):
        wire.send(pair[0], {}, [bytes(8 << 20)])


# ----- hostile values --------------------------------------------------------------------------------------


def described(**changed: Any) -> dict[str, Any]:
    """Describe an outcome that is fine except for what is changed."""
    fine = {"error": "", "error_text": "", "changed": [], "detached": False, "used": [], "random": False}
    return {"values": [], **fine, **changed}


def tensor(**changed: Any) -> dict[str, Any]:
    return {"is": "Tensor", "dtype": "float32", "shape": [2], "buffer": 0, **changed}


EIGHT = [bytes(8)]

HOSTILE_TENSORS = {
    "too few bytes": tensor(shape=[3]),
    "too many bytes": tensor(shape=[1]),
    "another width": tensor(dtype="float64"),
    "no such dtype": tensor(dtype="qint8"),
    "a dtype of torch that is no dtype": tensor(dtype="nn"),
    "a dtype in a list": tensor(dtype=["float32"]),
    "no dtype": {"is": "Tensor", "shape": [2], "buffer": 0},
    "a negative size": tensor(shape=[-2]),
    "two negative sizes": tensor(shape=[-1, -2]),
    "a size that is NaN": tensor(shape=[math.nan]),
    "an infinite size": tensor(shape=[math.inf]),
    "a size with a point": tensor(shape=[2.0]),
    "a size that is True": tensor(dtype="float64", shape=[True]),
    "a size in a list": tensor(shape=[[2]]),
    "a size in words": tensor(shape=["2"]),
    "a shape that is a number": tensor(shape=2),
    "a shape that is an object": tensor(shape={"0": 2}),
    "no shape": {"is": "Tensor", "dtype": "float32", "buffer": 0},
    "sizes that overflow": tensor(shape=[2**32, 2**32]),
    "sizes that overflow beside a zero": tensor(shape=[0, 2**20, 2**20, 2**20, 2**20]),
    "sizes that overflow before a zero": tensor(shape=[2**62, 4, 0]),
    "a very long size": tensor(shape=[10**4000, 0]),
    "many dimensions": tensor(shape=[2] + [1] * 100),
    "a million dimensions": tensor(shape=[1] * 1_000_000),
    "too many numbers": tensor(dtype="uint8", shape=[1_000_001]),
    "no buffer": tensor(buffer=None),
    "a buffer that is not there": tensor(buffer=1),
    "the last buffer": tensor(buffer=-1),
    "a buffer with a point": tensor(buffer=0.0),
    "a buffer in a list": tensor(buffer=[0]),
    "a very long buffer number": tensor(buffer=10**4000),
}


@pytest.mark.parametrize("value", HOSTILE_TENSORS.values(), ids=HOSTILE_TENSORS)
def test_a_hostile_tensor_is_refused(value: Any) -> None:
    for buffers in (EIGHT, [b""]):
        with pytest.raises(WireError):
            wire.unpack(value, buffers)
        with pytest.raises(WireError):
            wire.unpack_outcome(described(values=[["result", value]]), buffers)
    wire.unpack_outcome(described(values=[["result", tensor()]]), EIGHT)


def test_a_truth_value_is_0_or_1() -> None:
    value = tensor(dtype="bool", shape=[3])
    assert wire.unpack(value, [b"\0\1\0"]).tolist() == [False, True, False]
    for data in (b"\0\1\2", b"\xff\1\0"):
        with pytest.raises(WireError):
            wire.unpack(value, [data])


HOSTILE_VALUES = {
    "a text": "text",
    "null": None,
    "a list": [1],
    "a described list": {"is": "list", "parts": [1]},
    "a described dictionary": {"is": "dict", "items": [["a", 1]]},
    "a probe": wire.pack(Probe("p", {}), []),
    "an unknown kind": {"is": "Evil"},
    "a private kind": {"is": "__class__"},
    "a kind that is a list": {"is": []},
    "no kind": {},
    "too long an integer": 2**63 + 1,
    "a very long integer": 10**4000,
    "a sealed function": {"is": "Sealed", "number": 1, "name": "f"},
    "a foreign object without a name": {"is": "Foreign"},
    "a foreign object with a number": {"is": "Foreign", "type_name": 3},
}


@pytest.mark.parametrize("value", HOSTILE_VALUES.values(), ids=HOSTILE_VALUES)
def test_an_outcome_holds_only_tensors_and_numbers(value: Any) -> None:
    with pytest.raises(WireError):
        wire.unpack_outcome(described(values=[["result", value]]), EIGHT)


HOSTILE_OUTCOMES = {
    "nothing": None,
    "a list": [],
    "a text": "{}",
    "an empty object": {},
    "values in an object": described(values={"result": 1}),
    "a value without a name": described(values=[[1]]),
    "a value with a number for a name": described(values=[[1, 1]]),
    "a value with a list for a name": described(values=[[["a"], 1]]),
    "a value in three parts": described(values=[["a", 1, 2]]),
    "a text for a value": described(values=["ab"]),
    "too many values": described(values=[["a", 1]] * (wire.MAX_PARTS + 1)),
    "an error in a list": described(error=["ValueError"]),
    "no error text": described(error_text=None),
    "changed in a text": described(changed="x"),
    "detached in a number": described(detached=1),
    "used in an object": described(used={}),
    "random in a text": described(random="false"),
}


@pytest.mark.parametrize("value", HOSTILE_OUTCOMES.values(), ids=HOSTILE_OUTCOMES)
def test_a_malformed_outcome_is_refused(value: Any) -> None:
    with pytest.raises(WireError):
        wire.unpack_outcome(value, EIGHT)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Outcome)])
def test_no_field_of_an_outcome_may_be_missing(field: str) -> None:
    value = described()
    del value[field]
    with pytest.raises(WireError):
        wire.unpack_outcome(value, EIGHT)


def test_one_buffer_is_not_copied_a_thousand_times() -> None:
    big = [bytes(16_000_000)]
    value = tensor(dtype="complex128", shape=[1_000_000])
    values = [[f"v{number}", value] for number in range(1_000)]
    nested = {"is": "list", "parts": [{"is": "list", "parts": [value] * 2_000}] * 1_000}
    tracemalloc.start()
    try:
        for hostile in (values, [["result", nested]]):
            with pytest.raises(WireError):
                wire.unpack_outcome(described(values=hostile), big)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_names_and_texts_that_a_person_reads_are_plain() -> None:
    nasty = "a\x1b[31mb\x00c\u202ed\u2066e\ud800f\u200bg\r\nh\x07\x9b" + "ü" * 1_000_000
    found = wire.unpack_outcome(
        described(
            values=[[nasty, {"is": "Foreign", "type_name": nasty}]],
            error=nasty,
            error_text=nasty,
            changed=[nasty, 3, None, *["x"] * 1_000],
            used=[nasty, ["torch"]],
        ),
        EIGHT,
    )
    (name,), (value,) = found.values.keys(), found.values.values()
    for text in (name, value.type_name, found.error, found.error_text, found.changed[0], found.used[0]):
        assert text.startswith("a[31mbcde?fg\nhüüü")
        assert len(text) <= 600
    assert found.changed[1:3] == ("", "")
    assert found.used[1] == ""
    assert len(found.changed) == 100


HOSTILE_PARTS: list[Any] = [
    *(None, True, False, 0, -1, 2**31, 2**63, 2**64, 10**4000, 1.5, math.nan, math.inf, -math.inf),
    *("", "Tensor", "list", "\ud800", "\u202e", "x" * 100_000, "__class__", "float32", "bool"),
    *([], {}, [[]], [{}], {"is": "Tensor"}, {"is": "list", "parts": [1, 2]}, {"is": "dict", "items": [[1]]}),
    *({"is": "Net"}, {"is": "Probe", "name": "", "args": 1}, {"is": "Foreign", "type_name": []}),
    *(list(range(3_000)), [[[[[[[[[[[[1]]]]]]]]]]]], {"is": "list", "parts": [[]] * 5_000}),
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """List all places in nested lists and objects: the container and the key."""
    if isinstance(value, dict):
        keys: list[Any] = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    else:
        return []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def damaged(value: Any, draw: random.Random) -> Any:
    """Change a description in a few random places."""
    value = copy.deepcopy(value)
    for container, key in draw.sample(places(value), draw.randrange(1, 4)):
        part = copy.deepcopy(draw.choice(HOSTILE_PARTS))
        match draw.randrange(5):
            case 0 if isinstance(container, dict):
                container.pop(key, None)
            case 1 if isinstance(container, dict):
                container[draw.choice(["is", "parts", "extra", "buffer", "\ud800"])] = part
            case 0:
                container.append(part)
            case 1:
                container[:] = copy.deepcopy(container) * 50
            case _:
                container[key] = part
    return value


def test_a_damaged_outcome_is_refused_or_holds_what_an_outcome_may_hold() -> None:
    draw = random.Random(2)
    buffers: wire.Buffers = []
    whole = wire.pack_outcome(
        Outcome(
            {
                "result": torch.eye(2),
                "n": 3,
                "x": 0.5,
                "yes": True,
                "mask": torch.tensor([True]),
                "f": Foreign("set"),
            },
            "ValueError",
            "text",
            ("x",),
            False,
            ("torch's softmax",),
        ),
        buffers,
    )
    refused = 0
    began = time.monotonic()
    for _ in range(3_000):
        try:
            found = wire.unpack_outcome(damaged(whole, draw), buffers)
        except WireError:
            refused += 1
            continue
        assert all(isinstance(v, Tensor | bool | int | float | Foreign) for v in found.values.values())
        texts = [*found.values, found.error, found.error_text, *found.changed, *found.used]
        assert all(isinstance(text, str) and len(text) <= 600 for text in texts)
        assert "\ud800" not in "".join(texts)
        assert isinstance(found.detached, bool)
        assert isinstance(found.random, bool)
    assert 1_000 < refused < 3_000
    assert time.monotonic() - began < 20


def test_a_damaged_value_is_refused_or_made() -> None:
    draw = random.Random(3)
    for name in ("mlp.train_epoch", "mlp.sgd_step", "mlp.MLP"):
        buffers: wire.Buffers = []
        whole = wire.pack(bench(name).probes[0], buffers)
        results = []
        for _ in range(300):
            try:
                wire.unpack(damaged(whole, draw), buffers)
                results.append("made")
            except WireError:
                results.append("refused")
        assert set(results) == {"made", "refused"}


def test_values_nested_deeply_are_refused() -> None:
    for wrap in (lambda v: {"is": "list", "parts": [v]}, lambda v: {"is": "dict", "items": [["a", v]]}):
        value: Any = 1
        for _ in range(900):  # as deep as JSON may be
            value = wrap(value)
        with pytest.raises(WireError):
            wire.unpack(value, [])


def test_the_last_of_two_equal_keys_counts() -> None:
    text = json.dumps(described(values=[["result", 1]]))[:-1] + ', "values": [["result", 2], ["result", 3]]}'
    header, _ = receive(frame(b'{"outcome": ' + text.encode() + b"}", []))
    assert wire.unpack_outcome(header["outcome"], []).values == {"result": 3}


def test_a_special_kind_is_made_by_its_maker() -> None:
    value = wire.pack((Sealed(4, "softmax"), 1), [])
    assert wire.unpack(value, [], lambda d: len if d.get("is") == "Sealed" else None) == (len, 1)
    assert wire.unpack(value, []) == (Sealed(4, "softmax"), 1)
