"""Reading a recipe file: YAML with line numbers, `a.b=c` overrides, and the line that says what is wrong with a key.

Knows pydantic models in general and no recipe key in particular.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hsrgan.engine.errors import UserError

KeyPath = tuple[Any, ...]   # ("hsr", "layers", 8); section and key names are str, resolutions int
MAX_REPORTED = 5            # problems in one line; the others are counted
MAX_DEPTH = 8               # of nesting; also ends a file whose alias contains itself
TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "map", "seq")}


class _Yaml12(yaml.SafeLoader):
    """YAML 1.2's plain scalars. In PyYAML's 1.1 `1e-3` is text, `8:11` is 491, `no` is false and `010` is 8."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012  (PyYAML's own class attribute; filled below)


for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    ("float", r"(?:[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)", list("-+.0123456789")),
):
    _Yaml12.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^{_pattern}$"), _first)


def dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path)


@dataclass
class Source:
    """What the recipe file and the overrides say, and where they say it."""

    name: str                                                   # the recipe file, as the user wrote it
    values: dict = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)   # "recipes/x.yaml line 12" or "override batch=33"

    def where(self, path: KeyPath) -> str:
        """The place that set `path` or the nearest section around it; the file when neither is written anywhere."""
        return next((self.origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.origins), self.name)

    def get(self, path: KeyPath) -> Any:
        value: Any = self.values
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def set_default(self, path: KeyPath, value: Any) -> None:
        """Set a leaf that nobody has set. A section that is no mapping is left for validation to report."""
        section = self.values
        for part in path[:-1]:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                return
        section.setdefault(path[-1], value)

    def override(self, path: KeyPath, value: Any, text: str) -> None:
        section = self.values
        for part in path[:-1]:
            if not isinstance(section.get(part), dict):
                section[part] = {}
            section = section[part]
        section[path[-1]] = value
        self.origins = {p: o for p, o in self.origins.items() if p[: len(path)] != path}
        self.origins[path] = f"override {text}"

    def fail(self, problems: list[tuple[KeyPath, str]]) -> NoReturn:
        """Raise one line with the place and the text of each problem."""
        lines = [f"{self.where(path)}: {text}" for path, text in problems[:MAX_REPORTED]]
        more = len(problems) - MAX_REPORTED
        message = "; ".join(lines) + (f"; and {more} more" if more > 0 else "")
        raise UserError(" ".join(message.split()))      # an override may hold a line break


def read_recipe_file(path: str | Path) -> Source:
    """The file as plain values with the line of every key. Refuses a missing file, bad YAML and a key set twice."""
    path = Path(path)
    source = Source(str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f", did you mean {path.with_name(near[0])}?" if near else ""
        raise UserError(f"recipe {path} does not exist{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} cannot be read as text: {error}") from None
    values = _parse(text, source.name, source.origins, lines=True)
    if values is None:
        raise UserError(f"recipe {path} is empty")
    if not isinstance(values, dict):
        raise UserError(f"recipe {path} holds {found(values)}, not `key: value` lines")
    source.values = values
    return source


def apply_overrides(source: Source, overrides: list[str], model: type[BaseModel]) -> None:
    """Lay `a.b=c` over the file's values, c read as YAML; the last of two overrides of one key holds."""
    for text in overrides:
        key, equals, value_text = text.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            raise UserError(f"override {text!r} is not of the form key=value, as in r1.gamma=1")
        if not value_text.strip():
            raise UserError(f"override {text!r} has no value (write {key}=null for none)")
        path = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
        problem = unknown_key(model, path)
        if problem:
            raise UserError(f"override {text!r}: {problem}")
        source.override(path, _parse(value_text, f"override {text!r}", {}), text)


def _parse(text: str, name: str, origins: dict[KeyPath, str], *, lines: bool = False) -> Any:
    """YAML → plain values; fills `origins` with the place of each key."""
    place = f"recipe {name}" if lines else name
    loader = None

    def refuse(node: yaml.Node, problem: str) -> NoReturn:
        raise UserError(f"{name} line {node.start_mark.line + 1}: {problem}" if lines else f"{name}: {problem}")

    def plain(node: yaml.Node, path: KeyPath) -> Any:
        if len(path) > MAX_DEPTH:
            refuse(node, f"nested more than {MAX_DEPTH} levels deep")
        if node.tag not in TAGS:
            refuse(node, f"a recipe has no values of type {node.tag}")
        if isinstance(node, yaml.SequenceNode):
            return [plain(item, (*path, i)) for i, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return loader.construct_object(node)
        mapping = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                refuse(key_node, "a key must be a plain word or number")
            key = loader.construct_object(key_node)
            here = (*path, key)
            if key in mapping:
                first = f", first on {origins[here].removeprefix(name + ' ')}" if lines else ""
                refuse(key_node, f"{dotted(here)} is set twice{first}")
            origins[here] = f"{name} line {key_node.start_mark.line + 1}"
            mapping[key] = plain(value_node, here)
        return mapping

    try:
        loader = _Yaml12(text)
        node = loader.get_single_node()
        return None if node is None else plain(node, ())
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if lines and error.problem_mark else ""
        raise UserError(f"{place}{line}: not valid YAML: {error.problem or error.context}") from None
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, LookupError) as error:     # the last two: `!!int x`, `!!bool x`
        raise UserError(f"{place}: not valid YAML: {' '.join(str(error).split())}") from None
    finally:
        if loader is not None:
            loader.dispose()


# What a model allows at a key


def _unwrap(annotation: Any, metadata: tuple | list = ()) -> tuple[Any, list, bool]:
    """(bare type, constraints, whether null is allowed) of a field's annotation."""
    constraints, nullable = list(metadata), False
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *more = get_args(annotation)
            for item in more:
                constraints += item.metadata if isinstance(item, FieldInfo) else [item]
        elif get_origin(annotation) in (Union, UnionType):
            nullable = True
            (annotation,) = (a for a in get_args(annotation) if a is not NoneType)
        else:
            return annotation, constraints, nullable


def _fields(annotation: Any) -> dict[str, FieldInfo]:
    core = _unwrap(annotation)[0]
    return core.model_fields if isinstance(core, type) and issubclass(core, BaseModel) else {}


def leaves(model: Any, prefix: KeyPath = ()) -> Iterator[KeyPath]:
    """Every key of the model that holds a value rather than a section."""
    for name, info in _fields(model).items():
        if _fields(info.annotation):
            yield from leaves(info.annotation, (*prefix, name))
        else:
            yield (*prefix, name)


def unknown_key(model: type[BaseModel], path: KeyPath) -> str | None:
    """None when the model has this key, else what to say about it, with the nearest key that it has."""
    annotation: Any = model
    for depth, part in enumerate(path):
        fields = _fields(annotation)
        if part not in fields:
            if get_origin(_unwrap(annotation)[0]) is dict and depth == len(path) - 1:
                return None
            if depth and not fields:
                return f"{dotted(path[:depth])} is a single value, it has no key {part}"
            wrong = path[: depth + 1]
            return f"unknown key {dotted(wrong)}, {_nearest(model, wrong, list(fields))}"
        annotation = fields[part].annotation
    return None


def _nearest(model: type[BaseModel], wrong: KeyPath, siblings: list[str]) -> str:
    def likeness(known: KeyPath) -> float:
        name = difflib.SequenceMatcher(None, str(wrong[-1]), known[-1]).ratio()
        if known[:-1] == wrong[:-1]:
            return name + 0.2       # a neighbour is the likelier slip
        return max(name, difflib.SequenceMatcher(None, dotted(wrong), dotted(known)).ratio())

    known = {*leaves(model), *((*wrong[:-1], s) for s in siblings)}
    best = max(map(likeness, known))
    if best >= 0.6:
        return f"did you mean {' or '.join(sorted(dotted(k) for k in known if likeness(k) == best))}?"
    return f"known here: {', '.join(siblings)}"


def unknown_keys(source: Source, model: type[BaseModel]) -> list[tuple[KeyPath, str]]:
    """A problem for each key of the source that the model has not."""
    problems: list[tuple[KeyPath, str]] = []

    def visit(values: dict, annotation: Any, path: KeyPath) -> None:
        fields = _fields(annotation)
        for key, value in values.items():
            here = (*path, key)
            if key not in fields:
                problems.append((here, unknown_key(model, here)))
            elif isinstance(value, dict) and _fields(fields[key].annotation):
                visit(value, fields[key].annotation, here)

    visit(source.values, model, ())
    return problems


def _bounds(constraints: list) -> str:
    limit = {name: getattr(c, name) for c in constraints for name in ("ge", "gt", "le", "lt") if hasattr(c, name)}
    if "ge" in limit and "le" in limit:
        return f" from {limit['ge']} to {limit['le']}"
    words = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
    parts = [f"{words[name]} {value}" for name, value in limit.items()]
    return f" {' and '.join(parts)}" if parts else ""


def allowed(annotation: Any, metadata: tuple | list = ()) -> str:
    """In words, what values a field takes: "a whole number from 0 to 3"."""
    core, constraints, nullable = _unwrap(annotation, metadata)
    if _fields(core):
        text = f"a section with the keys {', '.join(_fields(core))}"
    elif get_origin(core) is Literal:
        text = " or ".join(str(value) for value in get_args(core))
    elif get_origin(core) is dict:
        key, value = get_args(core)
        text = f"a mapping from {allowed(key)} to {allowed(value)}"
    elif get_origin(core) is list:
        text = f"a list whose items are each {allowed(*get_args(core))}"
    else:
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        text = words[core] + _bounds(constraints)
    return text + (" or null" if nullable else "")


def found(value: Any) -> str:
    """A value as the user would have written it, short."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict | list):
        return ("a section" if isinstance(value, dict) else "a list") if value else "empty"
    return repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "…"


def type_problem(model: type[BaseModel], path: KeyPath, value: Any, kind: str) -> tuple[KeyPath, str]:
    """What to say about one entry of pydantic's error list: its `loc`, `input` and `type`."""
    if path[-1] == "[key]":     # pydantic's mark for a wrong key of a mapping: ("hsr", "layers", "x", "[key]")
        path, kind = path[:-1], "key"
    annotation, metadata, description = model, (), None
    for depth, part in enumerate(path):
        fields = _fields(annotation)
        if part in fields:
            info = fields[part]
            annotation, metadata, description = info.annotation, info.metadata, info.description
        elif get_origin(_unwrap(annotation)[0]) is list:  # an element: it is the whole list that is described
            path = path[:depth]
            break
        else:
            *key_type, value_type = get_args(_unwrap(annotation)[0])    # a list's items have no key
            annotation, metadata, description = (key_type[0] if kind == "key" else value_type), (), None
    what = description or allowed(annotation, metadata)
    name = dotted(path)
    if kind == "missing":
        return path, f"{name} is missing, give it {what}"
    if kind == "key":
        return path, f"{dotted(path[:-1])} has the key {found(value)}, allowed: {what}"
    return path, f"{name} is {found(value)}, allowed: {what}"


