"""Every text that the agent can log, found in its source.

A text reaches the log through `log.warning(...)` and its like: written there, or handed on by
functions (Problems.begin), fields (Verdict.problem), tables (RULES), exceptions, lists and
return values. texts() starts at the calls of `log` and follows each value back to where its words
were written. It goes by names alone, without types: where two functions have the same name, it
follows both. So it may find a text that is never logged; it raises on what it does not know.

What is put together in one place is one text; a reason that comes from elsewhere is another one.
"""

from __future__ import annotations

import ast
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Function = ast.FunctionDef | ast.Lambda
# Methods and functions of others whose result holds the words of what they are called with.
HANDS_ON = frozenset(
    "str format join replace removeprefix removesuffix strip lstrip rstrip lower upper partition "
    "rpartition split splitlines get setdefault pop items values keys copy sorted list tuple set "
    "dict frozenset next iter reversed map filter max min fromkeys chain".split()
)
FILLS = frozenset("append add insert extend update".split())  # a list, set or dict
WORDLESS = (ast.Compare, ast.UnaryOp, ast.Slice, ast.Constant, ast.Attribute)
WORDLESS_FIELDS = frozenset(["headers"])  # of a request and of an answer alike
MOST_VARIANTS = 16  # of a text with parts that depend on something


@dataclass(frozen=True)
class Hole:
    """A place in a text where something is put in."""

    name: str


Parts = tuple["str | Hole", ...]


@dataclass(frozen=True)
class Text:
    """Words that can be logged; a {name} in it stands for what is put in there."""

    words: str
    line: int
    fixed: tuple[str, ...]  # what stands before, between and behind what is put in

    def put_in(self, logged: str) -> tuple[str, ...] | None:
        """Return what was put into this text, None if what was logged is another one."""
        if not all(part in logged for part in self.fixed):
            return None
        match = re.fullmatch("(.*)".join(map(re.escape, self.fixed)), logged)
        return match.groups() if match else None


ENDS = " :,;"  # what stands between two texts


def make_text(parts: Parts, line: int) -> Text | None:
    """Return the text of these parts, None if there is no word in it."""
    if not any(re.search("[A-Za-z]{2}", part) for part in parts if isinstance(part, str)):
        return None
    words = "".join(f"{{{p.name}}}" if isinstance(p, Hole) else p for p in parts).strip(ENDS)
    fixed = "".join("\0" if isinstance(p, Hole) else p for p in parts).strip(ENDS)
    return Text(words, line, tuple(fixed.split("\0")))


def name_of(node: ast.AST | None) -> str:
    """Return the last name of an expression: `c` of a.b.c, of c, and of a.b.c()."""
    while isinstance(node, (ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def assignments(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Yield (target, value) of whatever gives names their values, a tuple's items one by one."""
    pairs: list[tuple[ast.expr, ast.expr | None]] = []
    if isinstance(node, ast.Assign):
        pairs = [(target, node.value) for target in node.targets]
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign, ast.NamedExpr)):
        pairs = [(node.target, node.value)]
    elif isinstance(node, (ast.For, ast.comprehension)):
        pairs = [(node.target, node.iter)]
    elif (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            and node.func.attr in FILLS):
        pairs = [(node.func.value, value) for value in node.args]
    for target, value in pairs:
        while isinstance(target, (ast.Subscript, ast.Starred)):
            target = target.value
        if isinstance(target, ast.Tuple):
            fits = isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts)
            items = value.elts if fits and isinstance(value, ast.Tuple) else None
            for index, item in enumerate(target.elts):
                if given := items[index] if items else value:
                    yield item, given
        elif value:
            yield target, value


def arguments(function: Function) -> list[str]:
    its = function.args
    return [argument.arg for argument in (*its.posonlyargs, *its.args, *its.kwonlyargs)]


class Source:
    """A module's functions, calls and assignments, by their names."""

    def __init__(self, source: str, namespace: dict[str, Any]) -> None:
        self._namespace = namespace  # of the module: to find out which exception is which
        self._tree = ast.parse(source)
        self._parents: dict[ast.AST, ast.AST] = {}
        self.functions: dict[str, list[ast.FunctionDef]] = defaultdict(list)
        self.classes: dict[str, ast.ClassDef] = {}
        self.calls: dict[str, list[ast.Call]] = defaultdict(list)
        self.fields: dict[str, list[ast.expr]] = defaultdict(list)  # of all objects alike
        self._raised: list[ast.Call] = []
        # Of a function, of the module (None): name -> what it may hold
        self._values: dict[ast.AST | None, dict[str, list[ast.expr]]] = defaultdict(dict)
        nodes = list(ast.walk(self._tree))
        for node in nodes:
            self._parents |= dict.fromkeys(ast.iter_child_nodes(node), node)
        for kind in (self._index_names, self._index_calls, self._index_values):
            for node in nodes:
                kind(node)

    def _index_names(self, node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef):
            self.functions[node.name].append(node)
        elif isinstance(node, ast.ClassDef):
            self.classes[node.name] = node
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            self._raised.append(node.exc)

    def _index_calls(self, node: ast.AST) -> None:
        """Note calls. A dataclass takes its fields by position or name; replace() by name."""
        if not isinstance(node, ast.Call):
            return
        name = name_of(node.func)
        self.calls[name].append(node)
        if name == "partial":
            later = ast.Call(node.args[0], node.args[1:], node.keywords)
            self.calls[name_of(later.func)].append(later)
        given = [(keyword.arg or "", keyword.value) for keyword in node.keywords]
        if name in self.classes:
            rows = [row.target for row in self.classes[name].body if isinstance(row, ast.AnnAssign)]
            given += zip(map(name_of, rows), node.args)
        elif name != "replace":
            return
        for field, value in given:
            self.fields[field].append(value)

    def _index_values(self, node: ast.AST) -> None:
        scope = next(self.around(node), None)
        if isinstance(node, ast.ExceptHandler) and node.name:
            texts = [text for call in self._raised if self._is_caught(node, call)
                     for text in call.args]
            self._values[scope].setdefault(node.name, []).extend(texts)
        for target, value in assignments(node):
            in_class = isinstance(self._parents.get(node), ast.ClassDef)
            if isinstance(target, ast.Attribute) or in_class:
                self.fields[name_of(target)].append(value)
            elif isinstance(target, ast.Name):
                self._values[scope].setdefault(target.id, []).append(value)

    def around(self, node: ast.AST) -> Iterator[Function]:
        """Yield the functions that a node is in, the innermost first."""
        while parent := self._parents.get(node):
            node = parent
            if isinstance(node, (ast.FunctionDef, ast.Lambda)):
                yield node

    def values(self, name: ast.Name) -> list[ast.expr]:
        """Return what a variable may hold: of the innermost function that knows it, or a global."""
        for function in self.around(name):
            found = self._values[function].get(name.id)
            is_argument = name.id in arguments(function)
            if found is not None or is_argument:
                given = self._given(name.id, function) if is_argument else ()
                return [*(found or ()), *given]
        return self._values[None].get(name.id, [])

    def _given(self, name: str, function: Function) -> Iterator[ast.expr]:
        """Yield what the calls of a function give for one of its arguments."""
        names = arguments(function)
        names = names[1:] if names[:1] in (["self"], ["cls"]) else names
        for call in self._calls_of(function):
            yield from (keyword.value for keyword in call.keywords if keyword.arg in (name, None))
            for argument, value in zip(names, call.args):
                if isinstance(value, ast.Starred):
                    yield value.value
                    break
                if argument == name:
                    yield value

    def _calls_of(self, function: Function) -> list[ast.Call]:
        """Return the calls of a function; _missing() is handed on as `missing`, for one."""
        if isinstance(function, ast.Lambda):
            return []
        owner = self._parents[function]
        if function.name == "__init__" and isinstance(owner, ast.ClassDef):
            return self.calls[owner.name]
        bare = function.name.lstrip("_")
        others = {bare, f"_{bare}"} - self.functions.keys()
        return [call for name in (function.name, *others) for call in self.calls.get(name, ())
                if name in others or self.is_of_kind(function, call.func)]

    def is_of_kind(self, function: ast.FunctionDef, callee: ast.expr) -> bool:
        """Tell whether it is a method that is called as one, or a function called by its name."""
        is_method = isinstance(self._parents[function], ast.ClassDef)
        return is_method == isinstance(callee, ast.Attribute)

    def called(self, callee: ast.expr) -> Iterator[Function]:
        """Yield the functions that a call may mean: by their name, or handed over."""
        for function in self.functions.get(name_of(callee), ()):
            if self.is_of_kind(function, callee):
                yield function
        seen: set[ast.AST] = set()
        waiting: list[ast.AST] = [callee]
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if isinstance(node, ast.Lambda):
                yield node
            elif isinstance(node, (ast.Tuple, ast.List)):
                waiting += node.elts
            elif isinstance(node, ast.Attribute):
                waiting += self.fields.get(node.attr, ())
            elif isinstance(node, ast.Name):
                yield from self.functions.get(node.id, ())
                waiting += self.values(node)

    def _is_caught(self, handler: ast.ExceptHandler, raised: ast.Call) -> bool:
        """Tell whether a handler may catch what is raised; what is not known may be anything."""
        try:
            kind = eval(ast.unparse(raised.func), self._namespace)
            caught = ast.unparse(handler.type) if handler.type else "BaseException"
            return issubclass(kind, eval(caught, self._namespace))
        except (NameError, TypeError):
            return True


class Walk:
    """Follows values back to the words in them."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._seen: set[ast.AST] = set()
        self._waiting: list[ast.AST] = []
        self._inside: set[ast.expr] = set()  # the texts that are being put together
        self.found: dict[str, Text] = {}

    def log_call(self, call: ast.Call) -> None:
        form, *values = call.args[1:] if name_of(call.func) == "log" else call.args
        if isinstance(form, ast.Constant) and form.value == "%s":
            self._follow(*values)
        elif isinstance(form, ast.Constant):
            self._note(filled(str(form.value), r"%[\d.]*[a-z]", values), call)
            self._follow(*values)
        else:
            self._follow(form)
        while self._waiting:
            self._look_at(self._waiting.pop())

    def _follow(self, *nodes: ast.AST | None) -> None:
        """Have expressions looked at, each once."""
        for node in nodes:
            if node is not None and node not in self._seen:
                self._seen.add(node)
                self._waiting.append(node)

    def _note(self, parts: Parts, node: ast.expr) -> None:
        if text := make_text(parts, node.lineno):
            self.found.setdefault(text.words, text)

    def _look_at(self, node: ast.AST) -> None:
        if is_text(node):
            assert isinstance(node, ast.expr)
            for parts in self._variants(node):  # a single word is the name of something
                if any(" " in part for part in parts if isinstance(part, str)):
                    self._note(parts, node)
        elif isinstance(node, ast.Name):
            self._follow(*self._source.values(node))
        elif isinstance(node, ast.Attribute) and node.attr not in WORDLESS_FIELDS:
            self._follow(*self._source.fields.get(node.attr, ()))
            self._returned(*(function for function in self._source.functions.get(node.attr, ())
                             if "property" in map(name_of, function.decorator_list)))
        elif isinstance(node, ast.Call):
            self._look_at_call(node)
        elif isinstance(node, (ast.IfExp, ast.Lambda)):
            self._follow(node.body, getattr(node, "orelse", None))
        elif isinstance(node, ast.DictComp):
            self._follow(node.key, node.value)
        elif isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.SetComp)):
            self._follow(node.elt)
        elif isinstance(node, ast.BinOp):
            self._follow(node.left, node.right)
        elif isinstance(node, (ast.BoolOp, ast.Dict, ast.List, ast.Tuple, ast.Set,
                               ast.Subscript, ast.Starred, ast.NamedExpr)):
            keys = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
            self._follow(*(keys[:1] if isinstance(node, ast.Subscript) else keys))
        elif not isinstance(node, WORDLESS):
            raise NotImplementedError(f"line {getattr(node, 'lineno', 0)}: {ast.dump(node)}")

    def _look_at_call(self, node: ast.Call) -> None:
        name, its_class = name_of(node.func), self._source.classes.get(name_of(node.func))
        self._returned(*self._source.called(node.func))
        if its_class and (shown := [f for f in its_class.body
                                    if isinstance(f, ast.FunctionDef) and f.name == "__str__"]):
            self._returned(*shown)
        elif its_class:
            self._follow(*node.args, *(keyword.value for keyword in node.keywords))
        elif name in HANDS_ON:
            self._follow(*node.args)
        if name in HANDS_ON and isinstance(node.func, ast.Attribute):
            self._follow(node.func.value)

    def _returned(self, *functions: Function) -> None:
        for function in functions:
            if isinstance(function, ast.Lambda):
                self._follow(function.body)
                continue
            for node in ast.walk(function):
                if isinstance(node, (ast.Return, ast.Yield, ast.YieldFrom)):
                    self._follow(node.value)

    # - words that are put together

    def _variants(self, node: ast.expr) -> list[Parts]:
        """Return the texts that an expression may give; what is put in is followed by itself."""
        if isinstance(node, ast.Constant):
            return [(str(node.value),)]
        if isinstance(node, ast.JoinedStr):
            return self._joined(node.values)
        if isinstance(node, ast.BinOp):
            return self._joined((node.left, node.right))
        if isinstance(node, ast.IfExp):
            return [*self._variants(node.body), *self._variants(node.orelse)]
        if isinstance(node, ast.FormattedValue):
            node = node.value
        if isinstance(node, ast.Call) and name_of(node.func) == "format":
            assert isinstance(node.func, ast.Attribute)
            self._follow(*node.args)
            if forms := self._one_of(node.func.value):
                return [filled(str(form[0]), r"\{\}", node.args) for form in forms]
            node = node.func.value
        if known := self._one_of(node):
            return known
        self._follow(node)
        return [(Hole(name_of(node).strip("_") or "..."),)]

    def _one_of(self, node: ast.expr) -> list[Parts]:
        """Return the texts that a name stands for, if it always stands for the same ones."""
        values = self._source.values(node) if isinstance(node, ast.Name) else [node]
        if len(values) != 1 or not is_text(values[0]) or values[0] in self._inside:
            return []
        self._inside.add(values[0])  # x = f"{x}.new"
        found = self._variants(values[0])
        self._inside.remove(values[0])
        return found

    def _joined(self, nodes: Sequence[ast.expr]) -> list[Parts]:
        choices = [self._variants(node) for node in nodes]
        assert math.prod(map(len, choices)) <= MOST_VARIANTS, f"too many: line {nodes[0].lineno}"
        return [tuple(itertools.chain(*parts)) for parts in itertools.product(*choices)]


def is_text(node: ast.AST) -> bool:
    """Tell whether an expression puts words together."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str)
    if isinstance(node, ast.IfExp):
        return is_text(node.body) and is_text(node.orelse)
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Add) and (is_text(node.left) or is_text(node.right))
    is_format = isinstance(node, ast.Call) and name_of(node.func) == "format"
    return is_format or isinstance(node, ast.JoinedStr)


def filled(form: str, place: str, values: Sequence[ast.expr]) -> Parts:
    """Return the parts of a text with places in it where values are put in."""
    words, names = re.split(place, form), [name_of(value).strip("_") for value in values]
    parts: list[str | Hole] = [words[0]]
    for name, part in itertools.zip_longest(names[: len(words) - 1], words[1:], fillvalue=""):
        parts += [Hole(name or "..."), part]
    return tuple(parts)


class Reader:
    """Finds the texts that a line consists of; "..." stands for any text."""

    def __init__(self, known: Sequence[Text]) -> None:
        self._known = known
        self._read: dict[str, frozenset[Text] | None] = {"...": frozenset()}

    def read(self, line: str) -> frozenset[Text] | None:
        """Return the texts of a line, None if it is none.

        A line is a text, or two lines with a colon between them. What is put into a text is a
        value, or a line itself. Of several texts that it may be, the one with most words counts.
        """
        line = line.strip(ENDS)
        if line not in self._read:
            found = [*self._as_one(line), *self._as_two(line)]
            most = max(map(weight, found), default=0)
            best = [one for one in found if weight(one) == most]
            self._read[line] = frozenset().union(*best) if best else None
        return self._read[line]

    def _as_one(self, line: str) -> Iterator[frozenset[Text]]:
        for text in self._known:
            values = [value for value in text.put_in(line) or () if value != line]
            inner = [self.read(value) for value in values]
            is_foreign = any(v for v, its in zip(values, inner) if its is None and ": " in v)
            if text.put_in(line) is not None and not is_foreign:
                yield frozenset([text]).union(*filter(None, inner))

    def _as_two(self, line: str) -> Iterator[frozenset[Text]]:
        for colon in re.finditer(": ", line):
            left, right = self.read(line[: colon.start()]), self.read(line[colon.end() :])
            if left is not None and right is not None:
                yield left | right


def weight(texts: Iterable[Text]) -> int:
    return sum(len(part) for text in texts for part in text.fixed)


def texts(source: str, namespace: dict[str, Any]) -> list[Text]:
    """Return all that a module can log, in the order of its lines."""
    known = Source(source, namespace)
    walk = Walk(known)
    for method in ("debug", "info", "warning", "error", "critical", "exception", "log"):
        for call in known.calls[method]:
            if isinstance(call.func, ast.Attribute) and name_of(call.func.value) == "log":
                walk.log_call(call)
    return sorted(walk.found.values(), key=lambda text: (text.line, text.words))
