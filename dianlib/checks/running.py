"""Run a candidate on a probe and write down what it did, as plain tensors and numbers.

This is the half of a check that executes somebody else's code. It knows no reference, no mistake
and no score, so that it can stand alone in a sandbox while the judge stays outside.
"""

import contextlib
import contextvars
import copy
import ctypes
import functools
import io
import math
import numbers
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from types import FrameType, MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._C._autograd import (
    _disable_profiler_legacy,
    _enable_profiler_legacy,
    _enable_record_function,
    _profiler_enabled,
)
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig

# ----- what a probe may ask: plain data, from which the objects for the candidate are made ---------


@dataclass(frozen=True)
class Net:
    """A network made of given layers: weights (n_out, n_in) and biases, ReLU and dropout between.

    It is handed over in evaluation mode, or in training mode where ``training`` says so.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    dropout: float = 0.0
    training: bool = False


@dataclass(frozen=True)
class Batches:
    """A list of batches, each a tuple of tensors."""

    batches: tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True)
class Momentum:
    """An SGD optimizer with momentum 0.9 over the parameters of the probe's Net."""

    lr: float


@dataclass(frozen=True)
class Loss:
    """A loss of torch.nn.functional by its name, for example "cross_entropy"."""

    name: str


@dataclass(frozen=True)
class Parameters:
    """Trainable tensors with given gradients (None: no gradient yet), handed over as a generator.

    With ``watch_gradients`` it is the gradients that a call may change; the values should stay.
    """

    values: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...]
    watch_gradients: bool = False


@dataclass(frozen=True)
class Recurrent:
    """A function that reads sequences (B, T, F) with a tanh cell, from zeros, and returns the last state (B, H)."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor


@dataclass(frozen=True)
class DecoderParts:
    """A decoder of given weights: an embedding (V, E), a GRU cell and a readout, and a way to attend.

    ``cell`` holds the four tensors of nn.GRUCell, ``readout`` the two of nn.Linear.
    """

    embedding: Tensor
    cell: tuple[Tensor, ...]
    readout: tuple[Tensor, ...]


@dataclass(frozen=True)
class NextToken:
    """A model that scores the next token: at its call t a last token k of row b gets scores[t, b, k], (V,)."""

    scores: Tensor


@dataclass(frozen=True)
class Cache:
    """A cache of keys and values: append(key, value) adds (B, G, L, d) and returns all so far. It has a length.

    It holds ``key`` and ``value`` already, or is empty, and then counts as False.
    """

    key: Tensor | None = None
    value: Tensor | None = None


@dataclass(frozen=True)
class CachedModel:
    """A language model of attention layers: model(tokens, positions, mask, cache) -> logits (B, L, V).

    ``tokens`` (V, D), ``places`` (P, D), a query, a key and a value matrix (D, D) for each layer, and
    ``readout`` (V, D). Its new_cache() is empty. The model notes how many tokens it has read.
    """

    tokens: Tensor
    places: Tensor
    layers: tuple[tuple[Tensor, Tensor, Tensor], ...]
    readout: Tensor


@dataclass(frozen=True)
class Source:
    """A function given as source text: ``name`` is the function to take from it."""

    text: str
    name: str


@dataclass(frozen=True)
class Data:
    """Plain Python values: numbers and strings in lists and dictionaries. A candidate gets a copy."""

    value: Any


@dataclass(frozen=True)
class Trial:
    """A trial of a search, which is asked for settings as in Optuna and notes what it was asked.

    ``draws`` says for the name of a setting where in its range the answer lies, from 0 to 1; in the middle
    for a name that is not there.
    """

    draws: dict[str, float]


@dataclass(frozen=True)
class Tensors:
    """A tuple of tensors, such as the state (h, c) of a cell."""

    values: tuple[Tensor, ...]


@dataclass(frozen=True)
class Layer:
    """A layer of torch.nn by its name, for example "LSTM": ``sizes`` by position, ``options`` by name.

    ``state`` are the values of its parameters, in their order.
    """

    name: str
    sizes: tuple[int, ...]
    state: tuple[Tensor, ...]
    options: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Probe:
    """One question to a candidate.

    ``args`` are passed by position, in order. With ``build`` the candidate is a class: it is built
    with these arguments, its parameters get the values of ``state`` by shape, and the module is
    called with ``args``. Where ``names`` are given, values and parameters meet by name instead.
    With ``steps`` the candidate is any class: each step is the name of a method or attribute, and the names
    of the arguments for it, and what it gives is a part of the result. ``gradients`` names the
    arguments whose gradients are taken ("parameters" for all parameters of a module). With two ``calls``
    the call is repeated on the same objects. ``verdict`` marks a candidate that judges: it rejects by returning False or by raising. A failed ``core``
    probe leaves no points for the others; ``weight`` is the probe's share of the points.
    """

    name: str
    args: dict[str, Any]
    build: tuple[Any, ...] | None = None
    state: tuple[Tensor, ...] = ()
    names: tuple[str, ...] = ()
    steps: tuple[tuple[str, ...], ...] = ()
    gradients: tuple[str, ...] = ()
    calls: Literal[1, 2] = 1
    verdict: bool = False
    core: bool = False
    weight: float = 1.0


@dataclass
class Outcome:
    """What one call did. ``values`` maps a name such as "result" to a tensor, a number or a type name."""

    values: dict[str, Any] = field(default_factory=dict)
    error: str = ""  # the name of the exception's type, "" when none was raised
    error_text: str = ""
    changed: tuple[str, ...] = ()  # arguments that the call changed in place
    detached: bool = False  # a gradient was wanted and the result has none
    used: tuple[str, ...] = ()  # forbidden functions that were called
    random: bool = False  # torch's random numbers were drawn while it ran


@dataclass(frozen=True)
class Foreign:
    """Stands for a returned object that is neither a tensor nor a number: only its type is kept."""

    type_name: str


class TimeLimit(BaseException):
    """Raised inside a candidate that runs too long. No ``except Exception`` catches it."""


class AskedTrial:
    """Answers the three questions of an Optuna trial from given draws, without Optuna."""

    def __init__(self, draws: Mapping[str, float]) -> None:
        self._draws = draws
        self._asked: dict[str, dict[str, Any]] = {}
        self.params: dict[str, Any] = {}

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """Return a whole number from low to high, both included."""
        n_steps = (high - low) // step + 1
        drawn = self._draw(name)
        value = int(low * ((high + 1) / low) ** drawn) if log else low + step * int(drawn * n_steps)
        return int(self._note(name, value, {"lowest": low, "highest": high, "step": step, "log scale": log}))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """Return a number from low to high."""
        drawn = self._draw(name)
        value = low * (high / low) ** drawn if log else low + drawn * (high - low)
        if step is not None:
            value = low + step * ((value - low) // step)
        question = {"lowest": float(low), "highest": float(high), "log scale": log, "step": step or 0.0}
        return float(self._note(name, value, question))

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """Return one of the choices."""
        listed = list(choices)
        question = {f"choice {number}": choice for number, choice in enumerate(listed)}
        return self._note(name, listed[int(self._draw(name) * len(listed))], question)

    def _draw(self, name: str) -> float:
        return min(max(self._draws.get(name, 0.5), 0.0), 0.999999)

    def _note(self, name: str, value: Any, question: dict[str, Any]) -> Any:
        """Remember the first answer to a name, and refuse the same name with another question, as Optuna does."""
        if self._asked.setdefault(name, question) != question:
            raise ValueError(f"the trial was asked for {name!r} twice, with two different ranges")
        return self.params.setdefault(name, value)

    def asked(self) -> dict[str, Any]:
        """Write down the questions, as numbers with a name each."""
        found: dict[str, Any] = {"number of settings asked for": len(self._asked)}
        for name, question in self._asked.items():
            for key, value in question.items():
                plain_value = isinstance(value, bool | int | float)
                found[f"{key} of {name!r}"] = value if plain_value else Foreign(str(value))
        return found


# ----- objects from data, and data from objects -----------------------------------------------------


def make(spec: Any, made: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """Build the object that a candidate receives for one argument."""
    match spec:
        case Tensor():
            return spec.clone()
        case Net():
            layers: list[nn.Module] = []
            for index, (weight, bias) in enumerate(zip(spec.weights, spec.biases, strict=True)):
                if index > 0:
                    layers += [nn.ReLU(), nn.Dropout(spec.dropout)]
                layer = nn.Linear(weight.shape[1], weight.shape[0])
                with torch.no_grad():
                    layer.weight.copy_(weight)
                    layer.bias.copy_(bias)
                layers.append(layer)
            return nn.Sequential(*layers).train(spec.training)
        case Batches():
            return [tuple(tensor.clone() for tensor in batch) for batch in spec.batches]
        case Momentum():
            model = next(value for value in made.values() if isinstance(value, nn.Module))
            return torch.optim.SGD(model.parameters(), lr=spec.lr, momentum=0.9)
        case Loss():
            return getattr(nn.functional, spec.name)
        case Parameters():
            parameters = [nn.Parameter(value.clone()) for value in spec.values]
            for parameter, gradient in zip(parameters, spec.gradients, strict=True):
                parameter.grad = None if gradient is None else gradient.clone()
            return parameters
        case Data():
            return copy.deepcopy(spec.value)
        case Trial():
            return AskedTrial(spec.draws)
        case Recurrent():

            def last_state(xs: Tensor) -> Tensor:
                h = xs.new_zeros(len(xs), len(spec.bias))
                for x in xs.unbind(1):
                    h = torch.tanh(x @ spec.weight_ih.T + h @ spec.weight_hh.T + spec.bias)
                return h

            return last_state
        case Tensors():
            return tuple(value.clone() for value in spec.values)
        case Layer():
            module: nn.Module = getattr(nn, spec.name)(*spec.sizes, **dict(spec.options))
            with torch.no_grad():
                for parameter, value in zip(module.parameters(), spec.state, strict=True):
                    parameter.copy_(value)
            return module
        case DecoderParts():
            return _Decoder(spec)
        case NextToken():
            return _next_token(spec.scores)
        case Cache():
            return _Cache(spec.key, spec.value)
        case CachedModel():
            return _CachedModel(spec)
        case Source():
            namespace: dict[str, Any] = {"torch": torch, "Tensor": Tensor}
            exec(spec.text, namespace)
            return namespace[spec.name]
        case _:
            return spec


class _Decoder(nn.Module):
    """What DecoderParts describes. It attends to the keys that are near the query."""

    def __init__(self, spec: DecoderParts) -> None:
        super().__init__()
        hidden_size = spec.cell[1].shape[1]
        self.embedding = nn.Embedding.from_pretrained(spec.embedding.clone(), freeze=False)
        self.cell = nn.GRUCell(spec.cell[0].shape[1], hidden_size)
        self.readout = nn.Linear(spec.readout[0].shape[1], spec.readout[0].shape[0])
        given = [*zip(self.cell.parameters(), spec.cell, strict=True)]
        given += zip(self.readout.parameters(), spec.readout, strict=True)
        with torch.no_grad():
            for parameter, value in given:
                parameter.copy_(value)

    def attend(
        self, query: Tensor, keys: Tensor, mask: Tensor | None = None, projected: None = None
    ) -> tuple[Tensor, Tensor]:
        # Nothing is projected here; the argument is that of dianlib.seq2seq.Decoder.
        scores = -(keys - query.unsqueeze(1)).abs().sum(dim=-1)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        weights = scores.softmax(dim=-1)
        return (weights.unsqueeze(-1) * keys).sum(dim=1), weights


class _Cache:
    """What Cache describes."""

    def __init__(self, key: Tensor | None = None, value: Tensor | None = None) -> None:
        self._parts = [] if key is None or value is None else [key.clone(), value.clone()]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self._parts = list(map(_join, self._parts, (key, value))) if self._parts else [key, value]
        return self._parts[0], self._parts[1]

    @property
    def length(self) -> int:
        return self._parts[0].shape[-2] if self._parts else 0

    def __len__(self) -> int:
        return self.length

    def held(self) -> dict[str, Tensor]:
        """Name what it holds."""
        return {name: part.detach().clone() for name, part in zip(("keys", "values"), self._parts)}  # noqa: B905


def _join(before: Tensor, new: Tensor) -> Tensor:
    return torch.cat([before, new], dim=-2)


class _CachedModel:
    """What CachedModel describes."""

    def __init__(self, spec: CachedModel) -> None:
        self._spec = spec
        self.n_read = 0

    def new_cache(self) -> list[_Cache]:
        return [_Cache() for _ in self._spec.layers]

    def __call__(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | None = None, cache: Any = None
    ) -> Tensor:
        self.n_read += tokens.shape[-1]
        x = self._spec.tokens[tokens] + self._spec.places[positions]
        for number, weights in enumerate(self._spec.layers):
            query, key, value = (x @ weight for weight in weights)
            if cache is not None:
                key, value = cache[number].append(key, value)
            scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
            if mask is not None:
                scores = scores.masked_fill(~mask, -math.inf)
            # A row without any allowed token looks at nothing.
            x = x + scores.softmax(dim=-1).nan_to_num() @ value
        return x @ self._spec.readout.T


def _next_token(scores: Tensor) -> Any:
    """Return a step for decoding that counts its own calls, as a model that keeps its state does."""
    calls = 0

    def step(token: Tensor) -> Tensor:
        nonlocal calls
        if not isinstance(token, Tensor) or token.shape != scores.shape[1:2]:
            shape = tuple(token.shape) if isinstance(token, Tensor) else type(token).__name__
            raise ValueError(
                f"step takes the last token of each row, shape ({scores.shape[1]},), not {shape}"
            )
        now = scores[min(calls, len(scores) - 1)]
        calls += 1
        return now[torch.arange(len(token)), token].clone()

    return step


MAX_DEPTH = 20  # of lists in lists: no task asks for more than three


def _leaves(value: Any, name: str, depth: int = 0) -> dict[str, Any]:
    """Flatten what a candidate returned into named tensors and numbers."""
    if depth > MAX_DEPTH:
        return {name: Foreign(type(value).__name__)}
    match value:
        case None:
            return {}
        case Foreign():
            return {name: value}
        case Tensor() if _is_plain(value):
            return {name: value.detach().as_subclass(Tensor).clone()}
        case Tensor():
            return {name: Foreign(f"a tensor of shape {tuple(value.shape)} that cannot be compared")}
        case int() if abs(value) > 2**63:  # longer than a float, or a line of a report, can hold
            return {name: math.inf if value > 0 else -math.inf}
        case bool() | int():
            return {name: value}
        case numbers.Real() if type(value).__module__ in ("builtins", "fractions", "numpy"):
            return {name: float(value)}
        case tuple() | list():
            found = {f"{name} (number of parts)": len(value)}
            for index, part in enumerate(value[:100]):
                found |= _leaves(part, f"{name}[{index}]", depth + 1)
            return found
        case dict():
            found = {}  # further keys than the wanted ones do no harm
            for key, part in list(value.items())[:100]:
                found |= _leaves(part, f"{name}[{key!r}]", depth + 1)
            return found or {name: Foreign("dict")}
        case _ if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
            return {name: value.item()}
        case _:
            return {name: Foreign(type(value).__name__)}


def _is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor is an ordinary one of a size that is worth comparing."""
    unusual = tensor.is_meta or tensor.is_quantized or tensor.is_nested or tensor.layout != torch.strided
    return not unusual and tensor.numel() <= 1_000_000


def _after(name: str, made: Any, spec: Any) -> dict[str, Any]:
    """Write down the state in which a call left an object that it may change."""
    if isinstance(made, nn.Module):
        return {f"{name}.{key} afterwards": value.detach().clone() for key, value in made.named_parameters()}
    if isinstance(made, AskedTrial):
        return made.asked()
    if isinstance(made, _Cache):
        held = {f"{name}.{part} afterwards": value for part, value in made.held().items()}
        return {f"{name}.length afterwards": made.length, **held}
    if isinstance(made, _CachedModel):
        return {f"tokens that {name} has read": made.n_read}
    if not isinstance(spec, Parameters):
        return {}
    if not spec.watch_gradients:
        return {f"{name}[{index}] afterwards": value.detach().clone() for index, value in enumerate(made)}
    found: dict[str, Any] = {}
    for index, (value, before) in enumerate(zip(made, spec.values, strict=True)):
        found[f"{name}[{index}] was changed"] = not torch.equal(value.detach(), before)
        if value.grad is not None:
            found[f"{name}[{index}].grad afterwards"] = value.grad.detach().clone()
    return found


def _load_by_shape(module: nn.Module, state: tuple[Tensor, ...]) -> None:
    """Give the module's parameters the wanted values: each tensor goes to the next parameter of its shape.

    A matrix may also be stored transposed, for a layer that computes x @ W, and a vector as a row.
    """
    free = list(module.parameters())
    for wanted in state:
        for value in (wanted, wanted.T) if wanted.dim() == 2 else (wanted, wanted.reshape(1, -1)):
            target = next((parameter for parameter in free if parameter.shape == value.shape), None)
            if target is not None:
                with torch.no_grad():
                    target.copy_(value)
                free = [parameter for parameter in free if parameter is not target]
                break


def _load_by_name(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Give the module's parameters the wanted values by their names.

    A parameter with another name takes the next value that is left, or several of them one below the other, as a
    fused layer has them. One of another size takes what fits, repeated where it is larger: a
    mistake in a size then computes definite numbers.
    """
    own = dict(module.named_parameters())
    left = [value for name, value in values.items() if name not in own]
    for name, parameter in own.items():
        value = values.get(name)
        if value is None:
            parts: list[Tensor] = []
            for candidate in left:
                if candidate.dim() == parameter.dim() and sum(map(len, parts)) < len(parameter):
                    parts.append(candidate)
            if not parts:
                continue
            left = [other for other in left if all(other is not part for part in parts)]
            value = torch.cat(parts)
        if value.dim() == parameter.dim():
            for axis, size in enumerate(parameter.shape):
                if size != value.shape[axis]:
                    value = value.index_select(axis, torch.arange(size) % value.shape[axis])
            with torch.no_grad():
                parameter.copy_(value)


def _cotangent(like: Tensor) -> Tensor:
    """Fixed unequal weights for a weighted sum, so that no part of a gradient cancels."""
    return torch.linspace(0.5, 1.5, like.numel(), dtype=like.dtype).reshape(like.shape)


# ----- watching which functions are called ----------------------------------------------------------

# Libraries whose functions are answers. A candidate may not call them where the point is to write them.
LIBRARIES = ("sklearn", "torchmetrics", "torcheval", "scipy", "statsmodels")
_OWN_ALLOWED = ("dianlib.data", "dianlib.plotting", "dianlib.checks.running", "dianlib.grading")

# The tools of the watch, taken before anybody can change them.
_set_hook, _get_hook = sys.setprofile, sys.getprofile
_set_hook_of_threads, _get_hook_of_threads = threading.setprofile, threading.getprofile
_RECORD_OF_CPU = ProfilerConfig(ProfilerState.CPU, False, False, False, False, False, _ExperimentalConfig())

# What a report says of a candidate that tries not to be seen: "..., but <this> does the work."
HIDING = "code that hides from this check"
_SWITCHES = frozenset(
    {"setprofile", "disableprofiler", "disableprofilerlegacy", "enablerecordfunction", "startnewthread"}
)

# torch has many names for one function: Softmax, softmax, _softmax, special_softmax, _safe_softmax, ...
_BEFORE = ("special", "sparse", "masked", "safe", "mkldnn", "fused", "add")
_AFTER = ("loss", "forward", "nd", "2d", "kernel", "withnoise", "pointwise")
_ALIASES = {"runbackward": "backward"} | dict.fromkeys(
    ("makedual", "gradandvalue", "vjp", "jvp", "jacrev", "jacfwd", "jacobian"), "grad"
)


@functools.lru_cache(maxsize=10_000)
def plain(name: str) -> str:
    """Bring the names that torch has for one function to a common one."""
    plainer = name.replace("_", "").lower()
    if plainer.startswith("scaleddotproduct"):
        return "scaleddotproduct"
    while plainer != name:
        name = plainer
        for affix in _BEFORE:
            plainer = plainer.removeprefix(affix)
        for affix in _AFTER:
            plainer = plainer.removesuffix(affix)
    return _ALIASES.get(name, name)


@functools.lru_cache(maxsize=10_000)
def _seen_in(module: str, function: str, forbidden: frozenset[str]) -> str:
    """Name a Python function that a candidate must not call, or return "" for any other."""
    library = module.partition(".")[0]
    if library == "dianlib" and not any(f"{module}.".startswith(f"{own}.") for own in _OWN_ALLOWED):
        return f"{module}.{function.partition('.')[0]}"
    if library in LIBRARIES and "<locals>" not in function:  # a wrapper's name would tell nothing
        public = [part for part in module.split(".") if not part.startswith("_")]
        return ".".join([*public, function.partition(".")[0]])
    if library in ("torch", "torchvision"):
        for part in reversed(function.split(".")):  # "Softmax.forward" has two names
            if plain(part) in forbidden:
                return f"torch's {part.lstrip('_')}"
    return HIDING if module == "threading" and function == "setprofile" else ""


@functools.lru_cache
def _are_operations(names: frozenset[str]) -> bool:
    """Tell whether torch has an operation by one of these names, below Python."""
    return any(torch._C._jit_get_schemas_for_operator(f"aten::{name}") for name in names)


class _Watch:
    """Notes the forbidden functions that are called from ``start`` to ``stop``.

    It looks from two sides. Python reports every function that is called from Python code, in this
    thread and in those that are started meanwhile. And where operations are forbidden, torch's profiler
    records all that this thread carries out, whoever calls them: map(), compiled code, a module in C.
    """

    current: "_Watch | None" = None

    def __init__(self, forbidden: frozenset[str]) -> None:
        self.forbidden = frozenset(map(plain, forbidden))
        self.suspects = self.forbidden | _SWITCHES
        self.used: list[str] = []
        self.hook = self._see
        self.calls = 0
        self.records = _are_operations(forbidden)
        self.is_recording = False

    def start(self) -> None:
        self.thread = threading.get_ident()
        self.before = (_get_hook(), _get_hook_of_threads(), _Watch.current)
        _Watch.current = self
        self._start_record()
        _set_hook_of_threads(_see_elsewhere)
        _set_hook(self.hook)

    def stop(self) -> bool:
        """End the watch; return False where it was ended or changed before, or could not begin."""
        watched = _get_hook() is self.hook and _get_hook_of_threads() is _see_elsewhere
        watched &= sys.setprofile is _set_hook  # new threads use it
        own, of_threads, _Watch.current = self.before
        _set_hook(own)
        _set_hook_of_threads(of_threads)
        return self._read_record() and watched

    def note(self, name: str) -> None:
        if name not in self.used:
            self.used.append(name)

    def _see(self, frame: FrameType, event: str, called: Any) -> None:
        if event == "call":
            module = frame.f_globals.get("__name__")
            if type(module) is str:
                name = _seen_in(module, frame.f_code.co_qualname, self.forbidden)
                if name:
                    self.note(name)
        elif event == "c_call":
            if plain(called.__name__) in self.suspects:
                self._see_c(frame, called)
            self.calls += 1
            # The record of an endless loop must not fill the memory.
            if self.calls % 10_000 == 0 and threading.get_ident() == self.thread and self._read_record():
                self._start_record()

    def _see_c(self, frame: FrameType, called: Any) -> None:
        owner = called.__module__ or type(called.__self__).__module__
        if plain(called.__name__) in _SWITCHES:
            ours = _Watch.current is not self or frame.f_globals.get("__name__") == "threading"
            if not ours:
                self.note(HIDING)
        elif isinstance(called.__self__, Tensor) or owner.partition(".")[0] == "torch":
            self.note(f"torch's {called.__name__.lstrip('_')}")

    def _start_record(self) -> None:
        if self.records and not _profiler_enabled():  # there can be one only
            _enable_record_function(True)
            _enable_profiler_legacy(_RECORD_OF_CPU)
            self.is_recording = True

    def _read_record(self) -> bool:
        """Note what torch has recorded since the last time; return False when it did not."""
        if not self.records:
            return True
        if not self.is_recording or not _profiler_enabled():
            return False
        for operation in {event.name() for events in _disable_profiler_legacy() for event in events}:
            name = operation.partition("::")[2]
            if name and plain(name) in self.forbidden:
                self.note(f"torch's {name.strip('_')}")
            elif operation.startswith("autograd::engine") and {"backward", "grad"} & self.forbidden:
                self.note("torch's autograd")
        return True


def _see_elsewhere(frame: FrameType, event: str, called: Any) -> None:
    """Watch a thread that a candidate started; it may live on and work for later calls."""
    if _Watch.current is not None:
        _Watch.current.hook(frame, event, called)


@contextlib.contextmanager
def _watch(forbidden: frozenset[str]) -> Iterator[list[str]]:
    """Collect the forbidden functions that are called inside the block."""
    if not forbidden:
        yield []
        return
    watch = _Watch(forbidden)
    watch.start()
    try:
        yield watch.used
    except BaseException:
        watch.stop()  # an exception may end a watch, a time limit for one: that is nobody's trick
        raise
    if not watch.stop():
        watch.note(HIDING)


# ----- the run ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def usual_surroundings() -> Iterator[None]:
    """Keep torch's random numbers, its default dtype and the warning filters as they were before."""
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def run(candidate: Any, probe: Probe, forbidden: frozenset[str] = frozenset()) -> Outcome:
    """Call a candidate once on one probe, in this thread, and return what it did. Never raises."""
    with usual_surroundings():
        return _run(candidate, probe, forbidden)


def _run(candidate: Any, probe: Probe, forbidden: frozenset[str]) -> Outcome:
    outcome = Outcome()
    torch.default_generator.manual_seed(0)  # torch.manual_seed visits every kind of device, which takes long
    try:
        with torch.enable_grad():
            made: dict[str, Any] = {}
            for name, spec in probe.args.items():
                made[name] = make(spec, made)
            _call(candidate, probe, made, outcome, forbidden)
    except TimeLimit:
        outcome.error = "TimeLimit"
    except BaseException as error:  # whatever a candidate raises is a result, not our failure
        outcome.error = type(error).__name__
        outcome.error_text = describe(error)
    if probe.verdict and outcome.error not in ("NotImplementedError", "TimeLimit"):
        return _verdict(outcome)
    return outcome


def _verdict(outcome: Outcome) -> Outcome:
    """Read a verdict: a candidate rejects by raising, or by returning False; returning nothing accepts."""
    answer = outcome.values.get("result", True)
    if isinstance(answer, Tensor) and answer.numel() == 1:
        answer = bool(answer)
    neither_yes_nor_no = not isinstance(answer, bool | int | float)
    if not outcome.error and neither_yes_nor_no:
        return outcome
    return Outcome({"result": not outcome.error and bool(answer)}, error_text=outcome.error_text)


def _call(
    candidate: Any, probe: Probe, made: dict[str, Any], outcome: Outcome, forbidden: frozenset[str]
) -> None:
    used: list[str] = []
    try:
        with _watch(forbidden) as used:
            call = candidate if probe.build is None else candidate(*probe.build)
        if probe.build is not None and not probe.steps:
            if not isinstance(call, nn.Module):
                raise TypeError(f"this must be an nn.Module, but building it gave a {type(call).__name__}")
            outcome.values["number of parameters"] = sum(p.numel() for p in call.parameters())
            if probe.names:
                _load_by_name(call, dict(zip(probe.names, probe.state, strict=True)))
            else:
                _load_by_shape(call, probe.state)
        tensors = _tensors(made)
        for name in probe.gradients:
            if name != "parameters":
                for tensor in _tensors({name: made[name]}).values():
                    tensor.requires_grad_(True)
        before = {name: value.detach().clone() for name, value in tensors.items()}
        state = torch.get_rng_state()
        for number in range(probe.calls):
            # model.parameters() is a generator in real life, so it is one here.
            objects = [
                iter(value) if isinstance(probe.args[name], Parameters) else value
                for name, value in made.items()
            ]
            with _watch(forbidden) as used_now:
                result = _follow(call, probe.steps, made) if probe.steps else call(*objects)
            used += used_now
            outcome.values |= _leaves(result, ("result", "result of the second call")[number])
        outcome.random = not torch.equal(torch.get_rng_state(), state)
    finally:
        outcome.used = tuple(dict.fromkeys(used))
    outcome.changed = tuple(
        name for name, value in before.items() if not torch.equal(value, tensors[name].detach())
    )
    for name, value in made.items():
        outcome.values |= _after(name, value, probe.args[name])
    if probe.gradients:
        _differentiate(call, result, probe, made, outcome)


def _follow(candidate: Any, steps: tuple[tuple[str, ...], ...], made: dict[str, Any]) -> dict[str, Any]:
    """Take the steps one after the other on one object; an attribute may stand where a method is asked for."""
    found = {}
    for number, (name, *arguments) in enumerate(steps, 1):
        part = getattr(candidate, name)
        value = part(*(made[argument] for argument in arguments)) if callable(part) else part
        # As it is now: what was returned may be a view of memory that later steps write to.
        found[f"step {number}: {name}"] = Foreign("nothing") if value is None else _frozen(value)
    return found


def _frozen(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_frozen(part) for part in value[:100])
    return value.clone() if isinstance(value, Tensor) and _is_plain(value) else value


def _tensors(made: Mapping[str, Any]) -> dict[str, Tensor]:
    """Name the tensors among the arguments, those inside a tuple one by one."""
    found: dict[str, Tensor] = {}
    for name, value in made.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, tuple):
            found |= {f"{name}[{i}]": part for i, part in enumerate(value) if isinstance(part, Tensor)}
    return found


def _differentiate(call: Any, result: Any, probe: Probe, made: dict[str, Any], outcome: Outcome) -> None:
    parts = result if isinstance(result, tuple | list) else [result]
    results = [part for part in parts if isinstance(part, Tensor) and part.requires_grad]
    if not results:
        outcome.detached = True
        return
    wanted: dict[str, Tensor] = {}
    for name in probe.gradients:
        if name == "parameters":
            wanted |= {f"parameter {n}": p for n, p in enumerate(call.parameters())}
        else:
            wanted |= _tensors({name: made[name]})
    if not wanted:  # a module in which parameters() finds nothing
        return
    total = sum(((part * _cotangent(part)).sum() for part in results), torch.zeros(()))
    gradients = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    for name, gradient in zip(wanted, gradients, strict=True):
        if gradient is None:
            outcome.detached = True
        elif not name.startswith("parameter "):
            outcome.values[f"gradient of {name}"] = gradient.detach().clone()


def describe(error: BaseException) -> str:
    """Say briefly what was raised and on which line of the candidate's own code."""
    try:
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
    except Exception:  # an exception may even fail to print itself
        text = type(error).__name__
    if len(text) > 300:
        text = text[:300] + " ..."
    # The last hundred frames tell enough; a recursion without end leaves a thousand.
    frames = traceback.extract_tb(error.__traceback__, limit=-100)
    own = [frame for frame in frames if frame.filename != __file__]
    # The deepest line that is not inside an installed package is the one the learner can change.
    lines = [f for f in own if "site-packages" not in f.filename] or own
    if lines and lines[-1].line:
        text += f'\n    in the line "{lines[-1].line.strip()[:200]}"'
    return text


def run_all(
    candidate: Any, probes: list[Probe], forbidden: frozenset[str] = frozenset(), limit: float | None = None
) -> list[Outcome]:
    """Run a candidate on all probes in order, then on the first one again.

    The outcome of the repetition stands last: a candidate that remembers its earlier calls gives
    itself away. ``limit`` is the time in seconds for each probe; with a limit the candidate runs in a thread of
    its own, so that an endless loop can be left behind. After two probes out of time the rest is not run.
    """
    outcomes: list[Outcome] = []
    thread: _ProbeThread | None = None
    for probe in [*probes, probes[0]]:
        if sum(outcome.error == "TimeLimit" for outcome in outcomes) >= 2:
            outcomes.append(Outcome(error="TimeLimit"))
        elif limit is None:
            outcomes.append(run(candidate, probe, forbidden))
        else:
            thread = thread if thread is not None and thread.is_free else _ProbeThread(candidate, forbidden)
            # nbgrader gives 0 points to a cell with any text on stderr, a warning included.
            with usual_surroundings(), contextlib.redirect_stderr(io.StringIO()):
                outcomes.append(thread.run(probe, limit))
    if thread is not None:
        thread.leave()
    return outcomes


class _ProbeThread:
    """Runs probes in a thread of its own, so that an endless loop can be left behind.

    A thread cannot be ended from outside while it waits inside C, or when it catches everything; then it
    is left behind.
    """

    def __init__(self, candidate: Any, forbidden: frozenset[str]) -> None:
        self.is_free = True
        self._candidate, self._forbidden = candidate, forbidden
        self._asked: SimpleQueue[Probe | None] = SimpleQueue()
        self._found: SimpleQueue[Outcome] = SimpleQueue()
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._serve,), daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(TimeLimit):  # it may come when the work has just been done
            while (probe := self._asked.get()) is not None:
                self._found.put(_run(self._candidate, probe, self._forbidden))

    def run(self, probe: Probe, limit: float) -> Outcome:
        """Run one probe, and stop waiting after ``limit`` seconds."""
        self._asked.put(probe)
        try:
            return self._found.get(timeout=limit)
        except Empty:
            self.is_free = False
            self.leave()
        # Python raises this in the thread at its next bytecode.
        number, error = ctypes.c_ulong(self._thread.ident or 0), ctypes.py_object(TimeLimit)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(number, error)
        try:
            return self._found.get(timeout=0.5)
        except Empty:
            return Outcome(error="TimeLimit")

    def leave(self) -> None:
        """Let the thread end when it has nothing to do any more."""
        self._asked.put(None)
