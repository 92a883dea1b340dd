"""Read the code of a submission, without running it, for functions that do the work of an answer.

The checks already watch what an answer calls while it runs (dianlib.checks.running). Code that was
compiled, or that runs in another process, can dodge that, so it is read as well. ``find`` follows the
names from an answer through the notebook and names what the answer certainly leads to; an honest
comparison with torch in a scratch cell is out of its way. ``evasions`` lists what an instructor may
want to look at, and refuses nothing.

This is a reading of names and no proof. Where a name may mean two things, it counts as harmless.
"""

import ast
import builtins
import contextlib
import functools
import math
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dianlib.checks.running import HIDING, LIBRARIES, plain

COMPUTED = "a function with a computed name"
FROM_TEXT = "code that is made from text or loaded from a file"
PROCESS = "another process"

_ALLOWED = frozenset({"dianlib.data", "dianlib.plotting", "dianlib.checks.check", "dianlib.checks.hint"})

# The beginnings of names that no answer needs, and what to say of them.
_HIDING_PLACES = """
    sys.setprofile sys.settrace sys.monitoring sys._current_frames
    sys._getframe().f_back sys._getframe().f_locals sys._getframe().f_globals
    inspect.currentframe().f_back inspect.currentframe().f_locals inspect.currentframe().f_globals
    threading.setprofile threading.settrace threading.setprofile_all_threads _thread
    gc.get_objects gc.get_referrers gc.get_referents ctypes _ctypes cffi
    torch._C torch.overrides torch.library torch._library torch.utils._python_dispatch
    torch.utils.cpp_extension torch.profiler.profile torch.autograd.profiler torch.autograd.profiler_legacy
    torch.autograd._disable_profiler torch.autograd._disable_profiler_legacy
    torch.autograd._enable_record_function
"""
_PROCESSES = """
    os.fork os.forkpty os.system os.popen os.posix_spawn os.posix_spawnp posix pty _posixsubprocess subprocess
    multiprocessing.Process multiprocessing.Pool multiprocessing.get_context multiprocessing.process
    multiprocessing.context torch.multiprocessing concurrent.futures.ProcessPoolExecutor
"""
_LOADERS = """
    marshal.loads pickle.load pickle.loads types.CodeType torch.jit.CompilationUnit torch.jit.load torch.load
    torch.export.load torch.hub runpy importlib.util.spec_from_file_location
"""
_OUT_OF_PLACE = {
    HIDING: frozenset(_HIDING_PLACES.split()),
    PROCESS: frozenset(_PROCESSES.split()),
    FROM_TEXT: frozenset(_LOADERS.split()),
}
_PURPOSES = {
    HIDING: "with which code can hide from the checks",
    PROCESS: "which starts another process",
    FROM_TEXT: "which makes code from text or from a file",
}

# Out of place in an answer, but not in the rest of a notebook.
_USUAL_ELSEWHERE = """
    os.system os.popen subprocess pickle.load pickle.loads torch.load torch.export.load torch.hub
    torch.profiler.profile torch.autograd.profiler
"""
_FINE_ELSEWHERE = frozenset(_USUAL_ELSEWHERE.split())

# Honest people use these as well, even in an answer; an instructor may look.
_SELDOM_USED = """
    torch.jit torch.compile torch._dynamo inspect.stack inspect.currentframe sys._getframe importlib.reload
    unittest.mock IPython.get_ipython subprocess.Popen
"""
_WORTH_A_LOOK = frozenset(_SELDOM_USED.split())

# Calls that look at a function and do not call it.
_LOOKING = "isinstance issubclass hasattr callable type print len id repr str super"
_LOOKS = frozenset(_LOOKING.split())

MAX_CODE = 200_000  # characters of a notebook that are read
MAX_TEXT = 100_000  # longer texts are not put together

_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


def find(sources: Sequence[str], candidate: str, forbidden: frozenset[str]) -> list[str]:
    """Return a phrase for each shortcut that an answer leads to, such as "torch's softmax".

    Args:
        sources: The code cells that ran before the check, in their order; what is no Python is left out.
        candidate: The name that the check is given.
        forbidden: The names of the task's Task.forbidden. Where there are none, nothing is a shortcut.
    """
    if not forbidden:
        return []
    reader = _Reader(_Notebook(sources), forbidden)
    reader.read_all_from(candidate)
    return reader.found


def evasions(sources: Sequence[str]) -> list[str]:
    """Return a sentence for each use of something that could hide from the checks, wherever it stands."""
    sentences: list[str] = []
    notebook = _Notebook(sources)
    if notebook.is_cut:
        sentences.append(f"Only the first {MAX_CODE:,} characters of the code were looked at for shortcuts.")
    imports = _Scope(notebook.scope)  # those inside functions as well
    for _, tree in notebook.cells:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for name, path in _imported(node):
                    imports.names[name] = [_Definition(None, imports, 0, path)]
    for source, tree in notebook.cells:
        first = next((line.strip() for line in source.split("\n") if line.strip()), "")
        for sight in _sights(tree, notebook, imports):
            sentence = f'The cell that begins "{first[:80]}" {sight}.'
            if sentence not in sentences:
                sentences.append(sentence)
    return sentences


# ----- cells ---------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _parse(source: str) -> ast.Module | None:
    """Parse a cell; lines for IPython or the shell are blanked, and a cell in another language is none."""
    magic = re.match(r"\s*%%(\w+)", source)
    if magic and magic[1] not in ("time", "timeit", "capture", "prun"):
        return None
    for text in (source, "\n".join(map(_without_magic, source.split("\n")))):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
    return None


def _without_magic(line: str) -> str:
    code = line.strip()
    if code.startswith(("%", "!", "?")) or code.endswith("?"):
        return line[: len(line) - len(line.lstrip())] + "pass"
    return line


def _whole_cells(sources: Sequence[str]) -> Iterator[str]:
    """Yield the cells that lie within the first MAX_CODE characters."""
    total = 0
    for source in sources:
        total += len(source)
        if total > MAX_CODE:
            return
        yield source


@dataclass(frozen=True)
class _Definition:
    """What a name, or an attribute, was made to mean: a piece of code, or something imported."""

    node: ast.AST | None  # None: something that cannot be known, such as an argument
    scope: "_Scope"
    time: float
    path: str = ""
    sure: bool = True  # False: in a branch, so that an earlier definition may hold as well


class _Scope:
    """The names of the notebook, of a class or of a function."""

    def __init__(self, parent: "_Scope | None" = None, is_class: bool = False) -> None:
        self.parent = parent
        self.is_class = is_class
        self.names: dict[str, list[_Definition]] = defaultdict(list)

    def look_up(self, name: str, time: float) -> list[_Definition]:
        """Return what a name may mean: the last sure definition, and those in branches after it."""
        scope: _Scope | None = self
        while scope is not None and (name not in scope.names or (scope.is_class and scope is not self)):
            scope = scope.parent
        if scope is None:
            return []
        known = scope.names[name]
        if scope.parent is not None:  # inside a function the order is not followed
            return known
        found: list[_Definition] = []
        for definition in known:
            if definition.time < time:
                found = [definition] if definition.sure else [*found, definition]
        return found


@functools.lru_cache(maxsize=256)
def _own_attributes(source: str) -> frozenset[str]:
    """Return the names of attributes that a cell defines somewhere."""
    found: set[str] = set()
    for node in ast.walk(_parse(source) or ast.Module([], [])):
        match node:
            case ast.ClassDef():
                found.update(part.name for part in node.body if isinstance(part, ast.FunctionDef))
            case ast.Attribute(ctx=ast.Store()):
                found.add(node.attr)
            case ast.keyword(arg=str() as name):  # SimpleNamespace(relu=...)
                found.add(name)
    return frozenset(found)


@functools.lru_cache(maxsize=1024)
def _global_names(function: ast.FunctionDef) -> frozenset[str]:
    """Return the names that a function declares as global."""
    declared = (node for node in ast.walk(function) if isinstance(node, ast.Global))
    return frozenset(name for node in declared for name in node.names)


class _Notebook:
    """All cells: their trees, and what their names mean when they have run from top to bottom."""

    def __init__(self, sources: Sequence[str]) -> None:
        read = list(_whole_cells(sources))
        self.is_cut = len(read) < len(sources)
        self.cells = [(source, tree) for source in read if (tree := _parse(source)) is not None]
        self.scope = _Scope()
        self.attributes: dict[str, list[_Definition]] = defaultdict(list)
        self.clock = 0
        self._texts: dict[int, str | None] = {}
        self._code: dict[str, ast.Module | None] = {}
        self._executed: list[ast.Module] = []
        for _, tree in self.cells:
            for statement in tree.body:
                with contextlib.suppress(RecursionError):  # an expression of a thousand levels
                    self.bind([statement], self.scope)
        self.own_attributes = {*self.attributes}.union(*map(_own_attributes, read))

    # -- binding names --

    def bind(self, statements: Iterable[ast.stmt], scope: _Scope, sure: bool = True) -> None:
        """Enter what statements define into a scope."""
        for statement in statements:
            self.clock += 1
            self._bind(statement, scope, sure)

    def _add(self, name: str, node: ast.AST | None, scope: _Scope, sure: bool = True, path: str = "") -> None:
        scope.names[name].append(_Definition(node, scope, self.clock, path, sure))

    def _bind(self, statement: ast.stmt, scope: _Scope, sure: bool) -> None:
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                self._add(name, statement, scope, sure)
                if isinstance(statement, ast.FunctionDef) and scope is self.scope:
                    self._bind_globals(statement)
            case ast.Import() | ast.ImportFrom():
                for name, path in _imported(statement):
                    self._add(name, None, scope, sure, path)
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self._bind_target(target, value, scope, sure)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._bind_target(target, value, scope, sure)
            case ast.AugAssign(target=target, value=value):
                self._bind_target(target, value, scope, sure=False)
            case ast.Delete(targets=targets):
                for target in targets:
                    if isinstance(target, ast.Name):
                        self._add(target.id, None, scope, sure)
            case ast.If(test=test, body=body, orelse=orelse):
                truth = self.truth(test, scope)
                if truth is not False:
                    self.bind(body, scope, sure and truth is True)
                if truth is not True:
                    self.bind(orelse, scope, sure and truth is False)
            case ast.For(target=target, body=body, orelse=orelse):
                self._bind_target(target, None, scope, sure=False)
                self.bind([*body, *orelse], scope, sure=False)
            case ast.While(body=body, orelse=orelse):
                self.bind([*body, *orelse], scope, sure=False)
            case ast.With(items=items, body=body):
                for item in items:
                    if item.optional_vars is not None:
                        self._bind_target(item.optional_vars, item.context_expr, scope, sure)
                self.bind(body, scope, sure)
            case ast.Try(body=body, handlers=handlers, orelse=orelse, finalbody=final):
                self.bind(body, scope, sure)
                for handler in handlers:
                    self.bind(handler.body, scope, sure=False)
                self.bind([*orelse, *final], scope, sure)
            case ast.Match(cases=cases):
                for each in cases:
                    self.bind(each.body, scope, sure=False)
            case ast.Expr(value=ast.Call() as call):
                self._bind_call(call, scope, sure)
        for part in _expressions(statement):
            for node in ast.walk(part):
                if isinstance(node, ast.NamedExpr):
                    self._bind_target(node.target, node.value, scope, sure=False)

    def _bind_target(self, target: ast.expr, value: ast.expr | None, scope: _Scope, sure: bool) -> None:
        match target, value:
            case ((ast.Tuple(elts=parts) | ast.List(elts=parts)), _):
                values: Sequence[ast.expr | None] = [value] * len(parts)
                if isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(parts):
                    values = value.elts
                for part, its_value in zip(parts, values, strict=True):
                    self._bind_target(part, its_value, scope, sure)
            case ast.Name(id=name), _:
                self._add(name, value, scope, sure)
            case ast.Starred(value=inner), _:
                self._bind_target(inner, value, scope, sure)
            case ast.Attribute(attr=name), ast.expr() if scope is self.scope:
                self.attributes[name].append(_Definition(value, scope, self.clock))
            case ast.Subscript(value=ast.Call(func=ast.Name(id="globals")), slice=key), _:
                self._add(self.text(key, scope) or "", value, self.scope, sure)
            case ast.Subscript(value=ast.Name(id=name)), ast.expr() if name in scope.names:
                self._add(name, value, scope, sure=False)  # a part of a list or a dictionary

    def _bind_call(self, call: ast.Call, scope: _Scope, sure: bool) -> None:
        match call:
            case ast.Call(func=ast.Name(id="setattr"), args=[_, key, value]) if scope is self.scope:
                self.attributes[self.text(key, scope) or ""].append(_Definition(value, scope, self.clock))
            case ast.Call(func=ast.Name(id="exec"), args=[code, *_]):
                tree = self.code(self.text(code, scope))
                if tree is not None and tree not in self._executed:  # a text may execute itself
                    self._executed.append(tree)
                    self.bind(tree.body, scope, sure)

    def _bind_globals(self, function: ast.FunctionDef) -> None:
        """Enter the names of the notebook that a function may set."""
        names = _global_names(function)
        if names:
            inside = _Scope(self.scope)
            self.bind(function.body, inside, sure=False)
            for name in names:
                for definition in inside.names.get(name, []):
                    self._add(name, definition.node, self.scope, sure=False, path=definition.path)

    def function_scope(self, function: _Function, parent: _Scope, time: float) -> _Scope:
        """Make the scope of a function: its parameters, with their defaults, and what its body defines."""
        scope = _Scope(parent)
        arguments = function.args
        positional = [*arguments.posonlyargs, *arguments.args]
        given = dict(zip(reversed(positional), reversed(arguments.defaults), strict=False))
        given |= {
            a: d for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is not None
        }
        every = [*positional, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        for argument in every:
            if argument is not None:
                scope.names[argument.arg].append(_Definition(given.get(argument), parent, time))
        if not isinstance(function, ast.Lambda):
            self.bind(function.body, scope)
            for node in ast.walk(function):
                if isinstance(node, ast.Global | ast.Nonlocal):
                    for name in node.names:
                        scope.names.pop(name, None)
        return scope

    def code(self, text: str | None) -> ast.Module | None:
        """Parse a text that is executed."""
        if text is not None and text not in self._code:
            self._code[text] = _parse(text.strip())
        return None if text is None else self._code[text]

    # -- what an expression is, as far as it can be told --

    def truth(self, test: ast.expr, scope: _Scope) -> bool | None:
        """Return the truth of a condition that is a constant, or a name that was set to one."""
        match test:
            case ast.Constant(value=value):
                return bool(value)
            case ast.UnaryOp(op=ast.Not(), operand=(ast.Constant() | ast.Name()) as operand):
                inner = self.truth(operand, scope)
                return None if inner is None else not inner
            case ast.Name(id=name):
                match scope.look_up(name, math.inf):
                    case [_Definition(node=ast.Constant(value=value))]:
                        return bool(value)
        return None

    def text(self, node: ast.expr, scope: _Scope, depth: int = 0) -> str | None:
        """Work out a text that is put together from constants; None when it is not."""
        if id(node) not in self._texts:
            self._texts[id(node)] = None  # for a text that is made of itself
            found = self._text(node, scope, depth + 1) if depth < 20 else None
            self._texts[id(node)] = found if found is None or len(found) <= MAX_TEXT else None
        return self._texts[id(node)]

    def _text(self, node: ast.expr, scope: _Scope, depth: int) -> str | None:
        match node:
            case ast.Constant(value=str() as value):
                return value
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self._joined("", [left, right], scope, depth)
            case ast.JoinedStr(values=parts):
                return self._joined("", parts, scope, depth)
            case ast.FormattedValue(value=inner, format_spec=None):
                return self.text(inner, scope, depth)
            case ast.Name(id=name):
                match scope.look_up(name, math.inf):
                    case [_Definition(node=ast.expr() as inner, scope=there)]:
                        return self.text(inner, there, depth)
            case ast.Call(func=ast.Name(id="chr"), args=[ast.Constant(value=int() as code)]):
                return chr(code) if 0 <= code < 0x110000 else None
            case ast.Call(func=ast.Name(id="compile"), args=[inner, *_]):
                return self.text(inner, scope, depth)
            case ast.Call(
                func=ast.Attribute(value=ast.Constant(value=str() as glue), attr="join"),
                args=[ast.List(elts=parts) | ast.Tuple(elts=parts)],
            ):
                return self._joined(glue, parts, scope, depth)
            case ast.Call(
                func=ast.Attribute(value=inner, attr="lower" | "upper" | "strip" as method), args=[]
            ):
                known = self.text(inner, scope, depth)
                return None if known is None else str(getattr(known, method)())
            case ast.Subscript(
                value=inner,
                slice=ast.Slice(
                    lower=None, upper=None, step=ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=1))
                ),
            ):
                known = self.text(inner, scope, depth)
                return None if known is None else known[::-1]
        return None

    def _joined(self, glue: str, parts: list[ast.expr], scope: _Scope, depth: int) -> str | None:
        texts: list[str] = []
        for part in parts:
            text = self.text(part, scope, depth)
            if text is None or len(texts) * (len(glue) + 1) > MAX_TEXT or len(text) > MAX_TEXT // len(parts):
                return None
            texts.append(text)
        return glue.join(texts)

    def path(self, node: ast.AST, scope: _Scope, time: float, depth: int = 0) -> str:
        """Return the full name of something imported, "torch.nn.functional.softmax"; "" for anything else.

        What calling a class gives has the class's name with "()" behind it.
        """
        if depth > 50:
            return ""

        def inner(part: ast.AST) -> str:
            return self.path(part, scope, time, depth + 1)

        match node:
            case ast.Name(id=name):
                found = scope.look_up(name, time)
                if not found:
                    return self._path_of_unbound(name)
                first = found[0]
                if len(found) > 1:
                    return ""
                if first.path or first.node is None:
                    return first.path
                return self.path(first.node, first.scope, first.time, depth + 1)
            case ast.Attribute(value=value, attr=attr):
                base = inner(value)
                return f"{base}.{attr}" if base else ""
            case ast.NamedExpr(value=value):
                return inner(value)
            case ast.Subscript(value=value, slice=key):
                base, text = inner(value), self.text(key, scope) or ""
                if base == "sys.modules":
                    return text
                return f"{base.removesuffix('__dict__')}{text}" if text and base.endswith(".__dict__") else ""
            case ast.Call(func=function, args=args):
                called = inner(function)
                match called.rpartition(".")[2], args:
                    case "getattr", [owner, key, *_] if called == "builtins.getattr":
                        base, text = inner(owner), self.text(key, scope) or ""
                        return f"{base}.{text}" if base and text else ""
                    case "vars", [owner] if called == "builtins.vars":
                        base = inner(owner)
                        return f"{base}.__dict__" if base else ""
                    case (("__import__" | "import_module"), [module, *_]):
                        text = self.text(module, scope) or ""
                        return text.partition(".")[0] if called == "builtins.__import__" else text
                    case last, _ if last[:1].isupper() or last in ("_getframe", "currentframe"):
                        return f"{called}()"
        return ""

    def _path_of_unbound(self, name: str) -> str:
        """Find a name that came with ``from torch.nn.functional import *``, or that is always there."""
        for definition in self.scope.names.get("*", []):
            module = definition.path.removesuffix(".*")
            if module.partition(".")[0] == "torch" and hasattr(sys.modules.get(module), name):
                return f"{module}.{name}"
        if name == "get_ipython":
            return "IPython.get_ipython"
        return f"builtins.{name}" if hasattr(builtins, name) else ""


def _imported(statement: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
    """Yield the names that an import defines, and what they stand for."""
    for alias in statement.names:
        if isinstance(statement, ast.ImportFrom):
            yield alias.asname or alias.name, f"{statement.module or ''}.{alias.name}"
        elif alias.asname:
            yield alias.asname, alias.name
        else:
            top = alias.name.partition(".")[0]
            yield top, top


def _expressions(statement: ast.stmt) -> Iterator[ast.expr]:
    """Yield the expressions of a statement, without those of the statements inside it."""
    if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        for child in ast.iter_child_nodes(statement):
            if isinstance(child, ast.expr):
                yield child


# ----- from an answer to all that it uses ----------------------------------------------------------------


@dataclass
class _Reader:
    """Follows names from an answer and collects the shortcuts on the way."""

    notebook: _Notebook
    forbidden: frozenset[str]
    found: list[str] = field(default_factory=list)
    _waiting: list[_Definition] = field(default_factory=list)
    _seen: set[int] = field(default_factory=set)
    _mentioned: set[str] = field(default_factory=set)  # attributes, as in x.mentioned
    _methods: dict[str, list[_Definition]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self._plain = frozenset(map(plain, self.forbidden))

    def read_all_from(self, name: str) -> None:
        """Read the code behind a name of the notebook, the code behind the names in it, and so on."""
        self._reference(ast.Name(name), self.notebook.scope, math.inf)
        while self._waiting:
            definition = self._waiting.pop(0)
            with contextlib.suppress(RecursionError):  # an expression of a thousand levels
                self._read_definition(definition)

    def _note(self, phrase: str) -> None:
        if phrase not in self.found:
            self.found.append(phrase)

    # -- definitions --

    def _follow(self, definition: _Definition) -> None:
        """Have the code of a definition read, once."""
        if definition.node is not None and id(definition.node) not in self._seen:
            self._seen.add(id(definition.node))
            self._waiting.append(definition)

    def _read_definition(self, definition: _Definition) -> None:
        match definition.node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() as function:
                self._read_function(function, definition.scope, definition.time)
            case ast.ClassDef() as node:
                self._read_class(node, definition.scope, definition.time)
            case ast.AST() as node:
                self._read(node, definition.scope, definition.time)

    def _read_function(self, function: _Function, scope: _Scope, time: float) -> None:
        outside = [*function.args.defaults, *(d for d in function.args.kw_defaults if d is not None)]
        inside = self.notebook.function_scope(function, scope, time)
        if isinstance(function, ast.Lambda):
            body: list[ast.AST] = [function.body]
        else:
            outside += function.decorator_list
            body = list(function.body)
        for part in outside:
            self._read(part, scope, time)
        for inner in body:
            self._read(inner, inside, math.inf)

    def _read_class(self, node: ast.ClassDef, scope: _Scope, time: float) -> None:
        inside = _Scope(scope, is_class=True)
        self.notebook.bind(node.body, inside)
        for part in [*node.bases, *(keyword.value for keyword in node.keywords), *node.decorator_list]:
            self._read(part, scope, time)
        for statement in node.body:
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                method = _Definition(statement, inside, math.inf)
                is_special = statement.name.startswith("__") or statement.name == "forward"
                if is_special or statement.name in self._mentioned:
                    self._follow(method)
                else:  # a method that nobody calls does no work
                    self._methods[statement.name].append(method)
            else:
                self._read(statement, inside, math.inf)

    # -- code --

    def _read(self, root: ast.AST, scope: _Scope, time: float) -> None:
        """Look at everything that a piece of code mentions."""
        waiting = [root]
        while waiting:
            node = waiting.pop()
            match node:
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                    pass  # read when its name is mentioned
                case ast.Lambda():
                    self._read_function(node, scope, time)
                case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                    self._read_comprehension(node, scope, time)
                case ast.Name(ctx=ast.Load()) | ast.Attribute():
                    waiting += self._reference(node, scope, time)
                case ast.Call():
                    waiting += self._call(node, scope, time)
                case ast.Subscript():
                    waiting += self._subscript(node, scope, time)
                case ast.If(test=test, body=body, orelse=orelse):
                    truth = self.notebook.truth(test, scope)
                    waiting += [test, *(body if truth is not False else ())]
                    waiting += orelse if truth is not True else []
                case ast.IfExp(test=test, body=value, orelse=other):
                    truth = self.notebook.truth(test, scope)
                    waiting += [test, *([value] if truth is not False else ())]
                    waiting += [other] if truth is not True else []
                case ast.Compare(left=left, comparators=others):  # "f is torch.relu" calls nothing
                    waiting += [
                        part for part in (left, *others) if not isinstance(part, ast.Name | ast.Attribute)
                    ]
                case ast.AnnAssign(target=target, value=value):
                    waiting += [target, *([value] if value is not None else ())]
                case ast.ExceptHandler():
                    pass  # what is done after a failure is seen when it is done
                case _:
                    waiting += ast.iter_child_nodes(node)

    def _read_comprehension(self, node: _Comprehension, scope: _Scope, time: float) -> None:
        inside = _Scope(scope)
        for generator in node.generators:
            for target in ast.walk(generator.target):
                if isinstance(target, ast.Name):
                    inside.names[target.id].append(_Definition(None, inside, time))
            self._read(generator.iter, scope, time)
            for condition in generator.ifs:
                self._read(condition, inside, time)
        results = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        for result in results:
            self._read(result, inside, time)

    def _call(self, call: ast.Call, scope: _Scope, time: float) -> list[ast.AST]:
        """Look at a call; return the parts of it that are still to be read."""
        parts: list[ast.AST] = [*call.args, *(keyword.value for keyword in call.keywords)]
        called = self.notebook.path(call.func, scope, time)
        name = called.removeprefix("builtins.")
        if name in _LOOKS:
            return [part for part in parts if not isinstance(part, ast.Name | ast.Attribute)]
        if name in ("eval", "exec") and call.args:
            return parts + self._code_from_text(call.args[0], scope)
        if name in ("getattr", "operator.attrgetter", "operator.methodcaller"):
            return parts + self._getattr(name, call, scope, time)
        if name in ("__import__", "importlib.import_module") and call.args:
            if self.notebook.text(call.args[0], scope) is None:
                self._note(COMPUTED)
            else:
                self._judge(self.notebook.path(call, scope, time))
            return parts
        if name == "compile":
            return parts
        if getattr(call.func, "attr", "") in ("__getattribute__", "__getattr__") and call.args:
            assert isinstance(call.func, ast.Attribute)
            text = self.notebook.text(call.args[-1], scope)
            return [ast.Attribute(call.func.value, text, ast.Load())] if text else [call.func]
        # At notebook level a call is over: what it left is a tensor, and no function that does the work.
        last = called.rpartition(".")[2] or getattr(call.func, "attr", "")
        is_data = scope is self.notebook.scope and plain(last) in self._plain and not last[:1].isupper()
        return parts if is_data and not called.startswith("dianlib") else [call.func, *parts]

    def _code_from_text(self, node: ast.expr, scope: _Scope) -> list[ast.AST]:
        tree = self.notebook.code(self.notebook.text(node, scope))
        if tree is None:
            self._note(FROM_TEXT)
        elif id(tree) not in self._seen:
            self._seen.add(id(tree))
            self.notebook.bind(tree.body, scope, sure=False)
            return list(tree.body)
        return []

    def _getattr(self, name: str, call: ast.Call, scope: _Scope, time: float) -> list[ast.AST]:
        match name, call.args:
            case "getattr", [owner, key, *_]:
                text = self.notebook.text(key, scope)
                if text is not None:
                    return [ast.Attribute(owner, text, ast.Load())]
                if self.notebook.path(owner, scope, time).partition(".")[0] in ("torch", "dianlib"):
                    self._note(COMPUTED)
            case _, [key, *_]:
                for part in (self.notebook.text(key, scope) or "").split("."):
                    self._attribute(part)
        return []

    def _subscript(self, node: ast.Subscript, scope: _Scope, time: float) -> list[ast.AST]:
        """Look at torch.__dict__["softmax"], globals()["softmax"] and the like."""
        path = self.notebook.path(node, scope, time)
        owner = self.notebook.path(node.value, scope, time)
        name = self.notebook.text(node.slice, scope)
        if path:
            self._judge(path)
        elif name is None and (owner == "sys.modules" or owner.endswith(".__dict__")):
            self._note(COMPUTED)
        elif isinstance(node.value, ast.Call) and self._calls_globals(node.value, scope, time):
            if name is None:
                self._note(COMPUTED)
            else:
                self._reference(ast.Name(name), self.notebook.scope, math.inf)
        return [node.value, node.slice]

    def _calls_globals(self, call: ast.Call, scope: _Scope, time: float) -> bool:
        called = self.notebook.path(call.func, scope, time)
        return not call.args and called in ("builtins.globals", "builtins.locals", "builtins.vars")

    def _reference(self, node: ast.Name | ast.Attribute, scope: _Scope, time: float) -> list[ast.AST]:
        """Look at a name, or a chain of names; return what is left to be read."""
        path = self.notebook.path(node, scope, time)
        if path:
            self._judge(path)
        if isinstance(node, ast.Name):
            for definition in scope.look_up(node.id, time):
                self._follow(definition)
            return []
        self._attribute(node.attr, is_known=bool(path))
        root: ast.AST = node.value
        while path and isinstance(root, ast.Attribute):  # inside torch.nn.functional there is nothing more
            root = root.value
        return [] if path and isinstance(root, ast.Name) and self._is_module(root, scope, time) else [root]

    def _is_module(self, name: ast.Name, scope: _Scope, time: float) -> bool:
        return all(definition.path for definition in scope.look_up(name.id, time))

    def _attribute(self, name: str, is_known: bool = False) -> None:
        """Look at x.name, where x can be anything: an object of the notebook, a tensor, a module."""
        self._mentioned.add(name)
        for definition in [*self._methods.pop(name, []), *self.notebook.attributes.get(name, [])]:
            self._follow(definition)
        is_own = is_known or name in self.notebook.own_attributes
        if not is_own and plain(name) in self._plain and callable(getattr(Tensor, name, None)):
            self._note(f"torch's {name.strip('_')}")

    # -- names of imported things --

    def _judge(self, path: str) -> None:
        """Note something imported that does the work, or that has no place in an answer."""
        parts = path.replace("()", "").split(".")
        if parts[0] in LIBRARIES and len(parts) > 1:
            self._note(".".join(parts))
        elif parts[0] == "dianlib" and len(parts) > 1:
            if not _beginning(path, _ALLOWED) and path != "dianlib.checks":
                self._note(".".join(parts))
        elif parts[0] in ("torch", "torchvision") and (name := self._forbidden_name(parts)):
            self._note(f"torch's {name.strip('_')}")
        else:
            for phrase, names in _OUT_OF_PLACE.items():
                if _beginning(path, names):
                    self._note(phrase if phrase != HIDING else f"{HIDING} ({path})")
                    break

    def _forbidden_name(self, parts: list[str]) -> str:
        while parts and parts[-1] in ("__call__", "forward", "apply", "__wrapped__", "default"):
            parts = parts[:-1]
        # torch.ops.aten.softmax.int: the operation is followed by the name of its signature.
        candidates = parts[3:4] if parts[:2] == ["torch", "ops"] else parts[-1:]
        is_module = ".".join(parts) in sys.modules  # torch.nn.modules.linear is one, and no function
        return next((name for name in candidates if plain(name) in self._plain and not is_module), "")


def _beginning(path: str, names: frozenset[str]) -> str:
    """Return the name that a path is, or begins with; "" for none."""
    parts = path.split(".")
    heads = (".".join(parts[: number + 1]).removesuffix("()") for number in range(len(parts)))
    return next((head for head in heads if head in names), "")


# ----- what an instructor may look at --------------------------------------------------------------------


def _sights(tree: ast.Module, notebook: _Notebook, scope: _Scope) -> Iterator[str]:
    """Yield the verbs and objects of sentences about one cell."""
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        with contextlib.suppress(RecursionError):
            if isinstance(node, ast.Name | ast.Attribute) and id(node) not in inner:
                yield from _sight_of_name(node, notebook.path(node, scope, math.inf))
            elif isinstance(node, ast.Import | ast.ImportFrom):
                for _, path in _imported(node):
                    yield from _sight_of_path(path)
            elif isinstance(node, ast.Call):
                yield from _sight_of_call(node, notebook, scope)


def _sight_of_name(node: ast.Name | ast.Attribute, path: str) -> Iterator[str]:
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        is_setting = path.startswith("torch.backends.")
        if path.partition(".")[0] in ("torch", "dianlib", "sys", "builtins") and not is_setting:
            yield f"changes {path}"
    else:
        yield from _sight_of_path(path)


def _sight_of_path(path: str) -> Iterator[str]:
    for phrase, names in _OUT_OF_PLACE.items():
        name = _beginning(path, names - _FINE_ELSEWHERE)
        if name:
            yield f"uses {name}, {_PURPOSES[phrase]}"
    name = _beginning(path, _WORTH_A_LOOK)
    if name:
        yield f"uses {name}, behind which it is hard to see what is called"


def _sight_of_call(call: ast.Call, notebook: _Notebook, scope: _Scope) -> Iterator[str]:
    called = notebook.path(call.func, scope, math.inf).removeprefix("builtins.")
    key = call.args[1] if called in ("getattr", "setattr") and len(call.args) > 1 else None
    if called in ("eval", "exec", "compile"):
        yield f"uses {called}, which makes code from text"
    elif called in ("__import__", "importlib.import_module") and call.args:
        if notebook.text(call.args[0], scope) is None:
            yield "imports a module with a computed name"
    elif key is not None and notebook.path(call.args[0], scope, math.inf).startswith(("torch", "dianlib")):
        if called == "setattr":
            yield f"changes {ast.unparse(call.args[0])} with setattr"
        elif notebook.text(key, scope) is None:
            yield "takes a function of torch by a computed name"
