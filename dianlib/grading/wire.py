"""What goes between the judge and the sandbox: frames of JSON and raw buffers, never pickles or code objects.

Both sides use this module. Nothing that comes out of the sandbox is trusted: a length, a type, a shape
or a count is used only after it was checked, and what does not fit ends the conversation.
"""

import dataclasses
import json
import math
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dianlib.checks.running import (
    Batches,
    Cache,
    CachedModel,
    Data,
    DecoderParts,
    Foreign,
    Layer,
    Loss,
    Momentum,
    Net,
    NextToken,
    Outcome,
    Parameters,
    Probe,
    Recurrent,
    Tensors,
    Trial,
)

MAX_HEADER = 8 << 20
MAX_BUFFERS = 2_000
MAX_BYTES = 16 << 20
MAX_ELEMENTS = 1_000_000
MAX_DIMENSIONS = 16
MAX_INTEGER = 2**63
MAX_DEPTH = 8
MAX_PARTS = 2_000

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex64,
        torch.complex128,
    )
}


@dataclass(frozen=True)
class Sealed:
    """Stands for a function that a candidate may call and not look at: it runs in another process."""

    number: int
    name: str


# What a probe may be made of. A new kind of specification in dianlib.checks.running is added here.
SPECIFICATIONS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        Batches,
        Cache,
        CachedModel,
        Data,
        DecoderParts,
        Foreign,
        Layer,
        Loss,
        Momentum,
        Net,
        NextToken,
        Parameters,
        Probe,
        Recurrent,
        Sealed,
        Tensors,
        Trial,
    )
}

Buffers = list[bytes]


class WireError(Exception):
    """What arrived is not what was agreed."""


class Closed(WireError):
    """The other side is gone."""


class TooLate(WireError):
    """The other side did not answer in time."""


# ----- frames ------------------------------------------------------------------------------------------


def send(connection: socket.socket, header: dict[str, Any], buffers: Buffers = []) -> None:  # noqa: B006
    """Send one frame: the sizes, a JSON header and raw buffers."""
    text = json.dumps(header).encode()
    sizes = struct.pack(f"<II{len(buffers)}Q", len(text), len(buffers), *map(len, buffers))
    try:
        connection.sendall(b"".join([sizes, text, *buffers]))
    except TimeoutError:
        raise TooLate from None
    except OSError:
        raise Closed from None


def receive(connection: socket.socket, seconds: float | None = None) -> tuple[dict[str, Any], Buffers]:
    """Receive one frame within some seconds, or wait for ever. Raises WireError, and nothing else."""
    end = None if seconds is None else time.monotonic() + seconds
    header_size, n_buffers = struct.unpack("<II", _read(connection, 8, end))
    if header_size > MAX_HEADER or n_buffers > MAX_BUFFERS:
        raise WireError("the frame is too large")
    sizes = struct.unpack(f"<{n_buffers}Q", _read(connection, 8 * n_buffers, end))
    if sum(sizes) > MAX_BYTES:
        raise WireError("the frame is too large")
    try:
        header = json.loads(_read(connection, header_size, end))
    except (ValueError, RecursionError):
        raise WireError("the header is not JSON") from None
    if not isinstance(header, dict):
        raise WireError("the header is not an object")
    return header, [_read(connection, size, end) for size in sizes]


def _read(connection: socket.socket, size: int, end: float | None) -> bytes:
    data = bytearray()
    while len(data) < size:
        try:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise TooLate
            connection.settimeout(left)
            part = connection.recv(min(size - len(data), 1 << 20))
        except TimeoutError:
            raise TooLate from None
        except OSError:
            raise Closed from None
        if not part:
            raise Closed
        data += part
    return bytes(data)


# ----- values --------------------------------------------------------------------------------------------


def pack(value: Any, buffers: Buffers, depth: int = 0) -> Any:
    """Describe a value as JSON; the numbers of tensors go to ``buffers``.

    An object of another kind is described by the name of its type alone.
    """
    if depth == MAX_DEPTH and not isinstance(value, Tensor | bool | int | float | str | None):
        return {"is": "Foreign", "type_name": "something nested too deeply"}
    match value:
        case Tensor():
            return _pack_tensor(value, buffers)
        case None | bool() | float():
            return value if value is None or isinstance(value, bool) else float(value)
        case int() if abs(value) <= MAX_INTEGER:
            return int(value)
        case str():
            return str(value)
        case list() | tuple():
            parts = [pack(part, buffers, depth + 1) for part in value[:MAX_PARTS]]
            return {"is": "tuple" if isinstance(value, tuple) else "list", "parts": parts}
        case dict():
            items = list(value.items())[:MAX_PARTS]
            return {"is": "dict", "items": [[str(k), pack(v, buffers, depth + 1)] for k, v in items]}
        case _ if type(value) in SPECIFICATIONS.values():
            fields = {
                field.name: pack(getattr(value, field.name), buffers, depth + 1)
                for field in dataclasses.fields(value)
            }
            return {"is": type(value).__name__, **fields}
        case _:
            return {"is": "Foreign", "type_name": type(value).__name__}


def _pack_tensor(value: Tensor, buffers: Buffers) -> Any:
    name = str(value.dtype).removeprefix("torch.")
    if name not in DTYPES or value.layout != torch.strided or not _is_possible(value.shape):
        text = f"a tensor of shape {tuple(value.shape)} and dtype {name} that cannot be compared"
        return {"is": "Foreign", "type_name": text}
    plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # Reshaped to one dimension first: a tensor without dimensions has no bytes to look at.
    buffers.append(plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return {"is": "Tensor", "dtype": name, "shape": list(plain.shape), "buffer": len(buffers) - 1}


def unpack(
    described: Any,
    buffers: Buffers,
    special: Callable[[dict[str, Any]], Any] | None = None,
    depth: int = 0,
) -> Any:
    """Make the value that JSON and buffers describe, after checking every part. Raises WireError.

    ``special`` is asked first about each described object; it returns None for what is not its own.
    """
    if described is None or isinstance(described, bool | int | float):
        return described
    if isinstance(described, str):
        return plain_text(described, MAX_HEADER)
    if not isinstance(described, dict) or depth > MAX_DEPTH:
        raise WireError("a value is malformed")
    made = special(described) if special else None
    if made is not None:
        return made
    match described:
        case {"is": "Tensor"}:
            return _unpack_tensor(described, buffers)
        case {"is": "list" | "tuple" as kind, "parts": list(parts)} if len(parts) <= MAX_PARTS:
            values = [unpack(part, buffers, special, depth + 1) for part in parts]
            return values if kind == "list" else tuple(values)
        case {"is": "dict", "items": list(items)} if len(items) <= MAX_PARTS:
            if not all(
                isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) for item in items
            ):
                raise WireError("a dictionary is malformed")
            return {key: unpack(value, buffers, special, depth + 1) for key, value in items}
        case {"is": str(kind)} if kind in SPECIFICATIONS:
            specification = SPECIFICATIONS[kind]
            names = {field.name for field in dataclasses.fields(specification)}
            if described.keys() - {"is"} != names:
                raise WireError(f"a {kind} is malformed")
            return specification(**{n: unpack(described[n], buffers, special, depth + 1) for n in names})
    raise WireError("a value is of an unknown kind")


def _unpack_tensor(described: dict[str, Any], buffers: Buffers) -> Tensor:
    match described:
        case {"dtype": str(name), "shape": list(shape), "buffer": int(index)} if name in DTYPES:
            dtype = DTYPES[name]
        case _:
            raise WireError("a tensor is malformed")
    if not all(type(size) is int for size in shape) or not _is_possible(shape):
        raise WireError("a tensor has an impossible shape")
    if not 0 <= index < len(buffers):
        raise WireError("a tensor has no numbers")
    data = buffers[index]
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise WireError("a tensor has the wrong number of bytes")
    if dtype == torch.bool and not set(data) <= {0, 1}:
        raise WireError("a truth value is neither 0 nor 1")
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def _is_possible(shape: Sequence[int]) -> bool:
    """Tell whether a shape is one that is sent. Without its zeros: torch multiplies the other sizes."""
    sizes = [size or 1 for size in shape[: MAX_DIMENSIONS + 1]]
    return len(sizes) <= MAX_DIMENSIONS and min(sizes, default=1) > 0 and math.prod(sizes) <= MAX_ELEMENTS


def plain_text(text: Any, limit: int) -> str:
    """Make any text safe to store and to show: no lone surrogates, no control characters, not too long."""
    if not isinstance(text, str):
        return ""
    kept = text[:limit].encode("utf-8", "replace").decode()
    return "".join(c for c in kept if c in "\n\t" or c.isprintable() or c == " ")


# ----- outcomes ------------------------------------------------------------------------------------------


def pack_outcome(outcome: Outcome, buffers: Buffers) -> dict[str, Any]:
    """Describe what a candidate did; done inside the sandbox."""
    values = list(outcome.values.items())[:MAX_PARTS]
    return {
        "values": [[name, pack(_leaf(value), buffers)] for name, value in values],
        "error": outcome.error,
        "error_text": outcome.error_text,
        "changed": list(outcome.changed),
        "detached": outcome.detached,
        "used": list(outcome.used),
        "random": outcome.random,
    }


def _leaf(value: Any) -> Any:
    """Keep what an outcome may hold, and the name of the type of anything else."""
    if isinstance(value, Tensor | bool | int | float | Foreign):
        return value
    return Foreign(type(value).__name__)


def unpack_outcome(described: Any, buffers: Buffers) -> Outcome:
    """Read an outcome that comes out of the sandbox. Raises WireError when any part is not as agreed."""
    match described:
        case {
            "values": list(values),
            "error": str(error),
            "error_text": str(error_text),
            "changed": list(changed),
            "detached": bool(detached),
            "used": list(used),
            "random": bool(random),
        } if len(values) <= MAX_PARTS:
            taken: set[int] = set()
            named = {}
            for item in values:
                if not isinstance(item, list) or len(item) != 2 or not isinstance(item[0], str):
                    raise WireError("a value has no name")
                named[plain_text(item[0], 200)] = _unpack_leaf(item[1], buffers, taken)
            return Outcome(
                named,
                plain_text(error, 100),
                plain_text(error_text, 600),
                tuple(plain_text(name, 100) for name in changed[:100]),
                detached,
                tuple(plain_text(name, 100) for name in used[:100]),
                random,
            )
    raise WireError("an outcome is malformed")


def _unpack_leaf(described: Any, buffers: Buffers, taken: set[int]) -> Tensor | bool | int | float | Foreign:
    match described:
        case bool() | float():
            return described
        case int() if abs(described) <= MAX_INTEGER:
            return described
        case {"is": "Foreign", "type_name": str(name)}:
            return Foreign(plain_text(name, 200))
        case {"is": "Tensor"}:
            tensor = _unpack_tensor(described, buffers)
            # A thousand tensors that name one buffer would be a thousand copies of it.
            if described["buffer"] in taken:
                raise WireError("two tensors have the same numbers")
            taken.add(described["buffer"])
            return tensor
    raise WireError("a value is neither a tensor nor a number")
