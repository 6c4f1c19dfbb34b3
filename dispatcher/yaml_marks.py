"""YAML that remembers where everything stood, so that an error names file, line and column and all come at once.

Two steps: `load` turns text into plain data with a position per path, `validate` feeds it to a pydantic model and turns
each finding back into a position, with a "did you mean" where a word is close to an allowed one.

The text is treated as hostile: nesting, size and the expansion of aliases are bounded, a key that occurs twice is an
error, tags construct nothing. Scalars follow YAML 1.2: `no`, `on`, `012` and `1:30` stay words, so that a strict model
refuses them loudly where it wants a number or a boolean. Nothing here may know what a file is about.
"""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

MAX_BYTES = 4 << 20
MAX_DEPTH = 64
# Values after expansion of aliases. 100,000 take the C parser about 0.5 s: slow enough to notice, harmless.
MAX_VALUES = 100_000

Path = tuple[str | int, ...]
M = TypeVar("M", bound=BaseModel)

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_STR_TAG = "tag:yaml.org,2002:str"


@dataclass(frozen=True, slots=True)
class Mark:
    """A position in a file, both counted from 1."""

    line: int = 1
    column: int = 1


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in a file. Sorts by position."""

    file: str
    line: int
    column: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.message}"


class YamlError(ValueError):
    """All that is wrong with a file; `str()` has one line per problem, in the order of the file."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: (problem.line, problem.column)))
        super().__init__("\n".join(str(problem) for problem in self.problems))


@dataclass(slots=True)
class Document:
    """Parsed data with the position of each value and of each key of a mapping."""

    file: str
    data: Any = None
    marks: dict[Path, Mark] = field(default_factory=dict)
    key_marks: dict[Path, Mark] = field(default_factory=dict)

    def mark(self, path: Sequence[str | int] = (), *, key: bool = False) -> Mark:
        """Return where a value (or, with `key`, the key that leads to it) stands, or its nearest ancestor."""
        at = tuple(path)
        if key and at in self.key_marks:
            return self.key_marks[at]
        while at:
            if at in self.marks:
                return self.marks[at]
            at = at[:-1]
        return self.marks.get((), Mark())

    def problem(self, path: Sequence[str | int], message: str, *, key: bool = False) -> Problem:
        """Make a problem at a value, or with `key` at its key. The message gets the path in front."""
        mark = self.mark(path, key=key)
        where = spell(path)
        return Problem(self.file, mark.line, mark.column, f"{where}: {message}" if where else message)


def spell(path: Sequence[str | int]) -> str:
    """Return a path as people write it, such as `rules[2].when.labels`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Return ` Did you mean "x"?` for the closest candidate, or "" where none is close."""
    close = difflib.get_close_matches(word, sorted(candidates), n=1, cutoff=0.6)
    return f' Did you mean "{close[0]}"?' if close else ""


# --------------------------------------------------------------------------------------------------------------- load
@dataclass(slots=True)
class _Open:
    """A mapping or sequence that is being read. `key` is the key read last, `has_key` that its value comes next."""

    value: dict[str, Any] | list[Any]
    path: Path
    anchor: str | None
    weight: int = 1
    key: str = ""
    has_key: bool = False


class _Builder:
    """Turns parser events into data. Iterative, since the depth of a hostile file must not be that of our stack."""

    def __init__(self, file: str) -> None:
        self.document = Document(file)
        self.problems: list[Problem] = []
        self._stack: list[_Open] = []
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._values = 0
        self._documents = 0

    def feed(self, event: yaml.Event) -> None:
        start: Any = event.start_mark
        mark = Mark(start.line + 1, start.column + 1)
        match event:
            case yaml.DocumentStartEvent():
                self._documents += 1
                if self._documents > 1:
                    raise self._fail(mark, "only one document per file is allowed")
            case yaml.ScalarEvent():
                self._scalar(event, mark)
            case yaml.MappingStartEvent():
                self._begin({}, event, mark)
            case yaml.SequenceStartEvent():
                self._begin([], event, mark)
            case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                closed = self._stack.pop()
                self._remember(closed.anchor, closed.value, closed.weight)
                if self._stack:
                    self._stack[-1].weight += closed.weight
            case yaml.AliasEvent():
                if event.anchor not in self._anchors:
                    raise self._fail(mark, f"alias *{event.anchor} refers to nothing that is complete before it")
                value, weight = self._anchors[event.anchor]
                self._add(value, mark, weight)
            case _:
                pass

    def _fail(self, mark: Mark, message: str) -> YamlError:
        return YamlError([*self.problems, Problem(self.document.file, mark.line, mark.column, message)])

    def _remember(self, anchor: str | None, value: Any, weight: int) -> None:
        if anchor is not None:
            self._anchors[anchor] = (value, weight)

    def _scalar(self, event: Any, mark: Mark) -> None:
        if event.tag not in (None, "!", _STR_TAG):
            raise self._fail(mark, f"tag {event.tag} is not allowed")
        parent = self._stack[-1] if self._stack else None
        if parent is not None and isinstance(parent.value, dict) and not parent.has_key:
            self._key(parent, event, mark)
            return
        value = _resolve(event.value) if event.implicit[0] and event.tag is None else event.value
        self._remember(event.anchor, value, 1)
        self._add(value, mark, 1)

    def _key(self, parent: _Open, event: Any, mark: Mark) -> None:
        if event.value == "<<" and event.implicit[0]:
            raise self._fail(mark, "merge keys (<<) are not supported: repeat the keys, or quote the word")
        path = (*parent.path, event.value)
        if path in self.document.key_marks:
            first = self.document.key_marks[path]
            self.problems.append(
                Problem(
                    self.document.file,
                    mark.line,
                    mark.column,
                    f"{spell(path)}: this key stands already in line {first.line}",
                )
            )
        else:
            self.document.key_marks[path] = mark
        parent.key, parent.has_key = event.value, True
        self._remember(event.anchor, event.value, 1)

    def _begin(self, value: dict[str, Any] | list[Any], event: Any, mark: Mark) -> None:
        if event.tag is not None:
            raise self._fail(mark, f"tag {event.tag} is not allowed")
        if len(self._stack) >= MAX_DEPTH:
            raise self._fail(mark, f"nested deeper than {MAX_DEPTH} levels")
        path = self._add(value, mark, 1, counted=False)
        self._stack.append(_Open(value, path, event.anchor))

    def _add(self, value: Any, mark: Mark, weight: int, *, counted: bool = True) -> Path:
        """Put a value where it belongs and return its path. The weight of a container is added when it closes."""
        self._values += weight
        if self._values > MAX_VALUES:
            raise self._fail(mark, f"more than {MAX_VALUES} values")
        if not self._stack:
            self.document.data = value
            self.document.marks[()] = mark
            return ()
        parent = self._stack[-1]
        if counted:
            parent.weight += weight
        path: Path
        if isinstance(parent.value, list):
            path = (*parent.path, len(parent.value))
            parent.value.append(value)
        elif parent.has_key:
            path = (*parent.path, parent.key)
            parent.value[parent.key] = value
            parent.has_key = False
        else:
            raise self._fail(mark, "a key has to be a plain word")
        self.document.marks[path] = mark
        return path


def _resolve(text: str) -> Any:
    """Return what a plain scalar means in YAML 1.2's core schema, without the octal trap and without infinities."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text) and len(text) <= 40:
        return int(text, 0)
    if _FLOAT.fullmatch(text) and len(text) <= 40 and not _leading_zero(text):
        return float(text)
    return text


def _leading_zero(text: str) -> bool:
    digits = text.lstrip("+-")
    return len(digits) > 1 and digits[0] == "0" and digits[1].isdigit()


def load(text: str | bytes, file: str) -> Document:
    """Parse YAML text (JSON is YAML too) into plain data with positions.

    `file` is used in messages only. An empty text gives data of None. Nothing is constructed but dict, list, str, int,
    float, bool and None; keys are always strings.

    Raises:
        YamlError: the text is no YAML, too large, too deep, has a key twice or something that is not allowed.
    """
    return _parse(text, [_Builder(file)], file)[0].document


def load_all(text: str | bytes, file: str) -> tuple[Document, ...]:
    """Parse a text of several documents, as Kubernetes manifests are. Empty documents are left out.

    Raises:
        YamlError: as `load`; the limits hold for each document, the size for the whole text.
    """
    builders = _parse(text, [], file)
    return tuple(builder.document for builder in builders if builder.document.data is not None)


def _parse(text: str | bytes, builders: list[_Builder], file: str) -> list[_Builder]:
    """Feed all events to the one builder that was given, or else to a new one for each document."""
    is_single = bool(builders)
    if len(text) > MAX_BYTES:
        raise YamlError([Problem(file, 1, 1, f"larger than {MAX_BYTES >> 20} MiB")])
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        for event in yaml.parse(text, Loader=loader):
            if isinstance(event, yaml.DocumentStartEvent) and not is_single:
                builders.append(_Builder(file))
            if builders:
                builders[-1].feed(event)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        message = ", ".join(filter(None, (error.context, error.problem)))
        raise YamlError([*_problems(builders), Problem(file, line, column, message)]) from None
    except UnicodeError as error:
        raise YamlError([Problem(file, 1, 1, f"not UTF-8 text: {error}")]) from None
    except yaml.YAMLError as error:
        raise YamlError([*_problems(builders), Problem(file, 1, 1, " ".join(str(error).split()))]) from None
    if problems := _problems(builders):
        raise YamlError(problems)
    return builders


def _problems(builders: Iterable[_Builder]) -> list[Problem]:
    return [problem for builder in builders for problem in builder.problems]


# ----------------------------------------------------------------------------------------------------------- validate
def validate(document: Document, model: type[M], path: Sequence[str | int] = ()) -> M:
    """Return the document's data (or the part of it below `path`) as an instance of `model`.

    The model should be strict and forbid extra keys. An empty document counts as an empty mapping.

    Raises:
        YamlError: every finding of pydantic, each at its line and column.
    """
    data = document.data
    for part in path:
        data = data[part]
    try:
        # By way of JSON, because a strict model takes a list for a tuple or a word for an enum from JSON only.
        return model.model_validate_json(json.dumps({} if data is None else data))
    except ValidationError as error:
        raise YamlError(problems_of(error, document, model, path)) from None


def problems_of(
    error: ValidationError, document: Document, model: type[BaseModel], path: Sequence[str | int] = ()
) -> list[Problem]:
    """Turn a validation error into positioned problems. `path` is where the model's data begins in the document."""
    base = document.data
    for part in path:
        base = base[part]
    found: dict[tuple[int, int, str], Problem] = {}
    for item in error.errors(include_url=False):
        loc = item["loc"]
        problem = document.problem(
            (*path, *_data_path(base, loc)),
            _sentence(item, loc, model),
            key=item["type"] == "extra_forbidden",
        )
        found.setdefault((problem.line, problem.column, problem.message), problem)
    return list(found.values())


def _data_path(data: Any, loc: Sequence[str | int]) -> Path:
    """Drop the parts of a pydantic location that name branches of a union instead of something in the data."""
    path: list[str | int] = []
    for part in loc:
        if (isinstance(data, dict) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        ):
            path.append(part)
            data = data[part]  # type: ignore[index]
    return tuple(path)


def _sentence(item: Any, loc: Sequence[str | int], model: type[BaseModel]) -> str:
    kind, context = item["type"], item.get("ctx") or {}
    word = item.get("input")
    if kind == "extra_forbidden":
        return f"unknown key.{did_you_mean(str(loc[-1]), _fields_at(model, loc[:-1]))}"
    if kind == "missing":
        return f'the key "{loc[-1]}" is missing'
    if kind in {"literal_error", "enum"}:
        allowed = re.findall(r"'([^']*)'", str(context.get("expected", "")))
        shown = repr(word) if isinstance(word, str | int | float | bool) and len(str(word)) < 80 else "this"
        hint = did_you_mean(word, allowed) if isinstance(word, str) else ""
        return f"{shown} is not one of {', '.join(allowed)}.{hint}"
    if kind == "union_tag_invalid":
        allowed = re.findall(r"'([^']*)'", str(context.get("expected_tags", "")))
        tag = str(context.get("tag", ""))
        return f"{tag!r} is not one of {', '.join(allowed)}.{did_you_mean(tag, allowed)}"
    if kind in {"value_error", "assertion_error"}:
        return str(context.get("error", item["msg"]))
    message = str(item["msg"]).replace("Input should be", "should be")
    if isinstance(word, str | int | float | bool) and len(str(word)) < 80:
        message += f", not {str(word).lower() if isinstance(word, bool) else repr(word)}"
    return message


def _fields_at(kind: Any, loc: Sequence[str | int]) -> set[str]:
    """Return the names of the fields that a model knows at a location, over all branches of unions."""
    if isinstance(kind, typing.TypeAliasType) if hasattr(typing, "TypeAliasType") else False:
        kind = kind.__value__
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _fields_at(arguments[0], loc)
    if origin in (typing.Union, types.UnionType):
        # pydantic names the branch in the location; a name that no branch has as a field is such a name.
        names: set[str] = set()
        for branch in arguments:
            names |= _fields_at(branch, loc)
            if loc:
                names |= _fields_at(branch, loc[1:])
        return names
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        known = {(info.alias or name): info for name, info in kind.model_fields.items()}
        if not loc:
            return set(known)
        info = known.get(str(loc[0]))
        return _fields_at(info.annotation, loc[1:]) if info else set()
    if loc and arguments:
        return _fields_at(arguments[1] if origin is dict and len(arguments) > 1 else arguments[0], loc[1:])
    return set()
