"""Config text becomes plain values, and every value keeps the line it was written on.

YAML is read as ``yaml.safe_load`` would, through its node tree because only that has line numbers. Three differences,
each because a silent answer would be worse: a key given twice is an error (a note in RayLLM's layout), dates and
base-60 numbers (``1:30``) stay text, and size, depth and alias expansion are bounded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NoReturn

import yaml
from yaml.constructor import SafeConstructor

from quantserve.errors import ConfigError

KeyPath = tuple[str | int, ...]
"""Where a value sits in a file: ``("models", 0, "engine_config", "model_id")``."""

MAX_BYTES: Final = 256 * 1024
MAX_VALUES: Final = 50_000
MAX_DEPTH: Final = 40
MAX_PROBLEMS: Final = 20
CORRECT: Final = "correct this line, or the one before it"
SUFFIXES: Final = (".yaml", ".yml", ".json")

_TAG: Final = "tag:yaml.org,2002:"
_NO_VALUE: Final = {
    "int": "no integer of at most 300 digits",
    "float": "no finite number below 1e300",
    "bool": "neither true nor false",
}
_NUMBERS: Final = {"int": SafeConstructor.construct_yaml_int, "float": SafeConstructor.construct_yaml_float}


def dotted(path: KeyPath) -> str:
    """``models[0].engine_config.model_id``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


@dataclass(frozen=True)
class Located:
    """A value and where it was written.

    Attributes:
        value: plain dicts, lists and scalars.
        label: the file as a person named it, or whatever else tells them where the value came from.
        folder: relative paths inside the value start here; None when the value came from no file.
        lines: line number (from 1) of each key path of the whole file; empty for values from no file.
        root: key path of ``value`` in that file.
        moved: new key path -> the path it was written under, for keys that were renamed after reading.
        repeated: keys that a file in RayLLM's layout gives again: line and message.
    """

    value: Any
    label: str
    folder: Path | None = None
    lines: Mapping[KeyPath, int] = field(default_factory=dict)
    root: KeyPath = ()
    moved: dict[KeyPath, KeyPath] = field(default_factory=dict)
    repeated: tuple[str, ...] = ()

    def at(self, *path: str | int) -> Located:
        """The value under `path`, with its own location."""
        value = self.value
        for part in path:
            value = value[part]
        return replace(self, value=value, root=self.root + path, moved={}, repeated=())

    def where(self, *path: str | int) -> str:
        """``file:line`` of `path`, or of the nearest value around it that has a line."""
        written = self._written(path)
        if not self.lines:
            return self.label
        for end in range(len(written), -1, -1):
            if line := self.lines.get(written[:end]):
                return f"{self.label}:{line}"
        return f"{self.label}:1"

    def name(self, *path: str | int) -> str:
        """The dotted path of `path` in its file, under the name it was written with."""
        return dotted(self._written(path))

    def _written(self, path: KeyPath) -> KeyPath:
        for end in range(len(path), 0, -1):
            if (old := self.moved.get(path[:end])) is not None:
                return self.root + old + path[end:]
        return self.root + path


def read(path: Path, label: str | None = None) -> Located:
    """Read a YAML or JSON file.

    Raises:
        ConfigError: it cannot be read, is no text, or is not a file that `parse` takes.
    """
    label = label or str(path)
    try:
        if not path.is_file():
            raise ConfigError(f"{label}: not a regular file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{label}: cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{label}: larger than {MAX_BYTES // 1024} KiB, so this is not a config file")
    return parse(_decode(data, label), label, path.parent, as_json=path.suffix.lower() == ".json")


def parse(text: str, label: str, folder: Path | None = None, *, as_json: bool = False) -> Located:
    """Parse YAML or JSON text.

    Raises:
        ConfigError: with file:line, for syntax, duplicate keys, tags, several documents and exceeded bounds.
    """
    if "\0" in text:
        raise ConfigError(f"{label}:{_line_of(text, text.index(chr(0)))}: a NUL byte, so this is not a text file")
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{label}: longer than {MAX_BYTES // 1024} KiB, so this is not a config")
    value = from_object(_parse_json(text, label), label).value if as_json else None
    # JSON allows tabs between tokens and YAML does not; inside JSON strings they are always escaped.
    node = _compose(text.replace("\t", " ") if as_json else text, label)
    builder = _Builder(label)
    built = builder.build(node, (), 0) if node else None
    if not as_json and built is not None:
        from_object(built, label)  # escapes can make characters that are none
    if is_rayllm(built):
        again = tuple(f"{message}; the last one counts, as in RayLLM" for message in builder.repeated[:MAX_PROBLEMS])
    else:
        again = ()
        builder.problems += [f"{message}\n  fix: keep one" for message in builder.repeated]
    if builder.problems:
        builder.stop()
    return Located(value if as_json else built, label, folder, builder.lines, repeated=again)


def is_rayllm(value: object) -> bool:
    """Whether a model is in the layout of RayLLM, whose engines have a type."""
    engine = value.get("engine_config") if isinstance(value, dict) else None
    return isinstance(engine, dict) and ("type" in engine or "model_type" in engine)


def from_object(value: object, label: str, folder: Path | None = None) -> Located:
    """Wrap values that came from no file, such as the ``args`` of a Ray Serve application.

    Raises:
        ConfigError: the value is not made of dicts with text keys, lists, text, numbers, booleans and None.
    """
    budget = iter(range(MAX_VALUES))

    def copy(item: object, path: KeyPath) -> object:
        if next(budget, None) is None or len(path) > MAX_DEPTH:
            raise ConfigError(f"{label}: {dotted(path)[:80]}: too large or nested too deeply for a config")
        if isinstance(item, Mapping):
            if wrong := [key for key in item if not isinstance(key, str) or not _is_text(key)]:
                raise ConfigError(f"{label}: {dotted(path)}: keys must be text, got {wrong[0]!r}")
            return {key: copy(child, (*path, key)) for key, child in item.items()}
        if isinstance(item, list | tuple):
            return [copy(child, (*path, index)) for index, child in enumerate(item)]
        if isinstance(item, int | float) and not abs(item) < 1e300:
            raise ConfigError(f"{label}: {dotted(path)}: not a number a config can hold")
        if isinstance(item, str) and not _is_text(item):
            raise ConfigError(f"{label}: {dotted(path)}: half of a surrogate pair is no character")
        if item is None or type(item) in (str, int, float, bool):
            return item
        raise ConfigError(f"{label}: {dotted(path) or 'value'}: a {type(item).__name__} cannot be part of a config")

    return Located(copy(value, ()), label, folder)


def _is_text(text: str) -> bool:
    """Whether UTF-8 can hold the text, so that messages and plans that quote it can be written."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _decode(data: bytes, label: str) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(f"{label}:1: UTF-16 text\n  fix: save the file as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{label}:{line}: byte 0x{data[error.start]:02x} is not UTF-8\n  fix: save the file as UTF-8"
        ) from None


def _compose(text: str, label: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ", ".join(part for part in (error.context, error.problem) if part)
        fix = CORRECT
        if "expected a single document" in what:
            what, fix = (
                "a second document begins here (`---`)",
                "one document per file; put several models in `models:`",
            )
        elif "'\\t'" in what:
            what, fix = "a tab where YAML wants spaces", "indent with spaces"
        elif "mapping values are not allowed here" in what:
            fix = 'put text that contains ": " in quotes, and check the indentation'
        at = f"{label}:{mark.line + 1}" if mark else label
        raise ConfigError(f"{at}: not valid YAML: {what}\n  fix: {fix}") from None
    except yaml.reader.ReaderError as error:
        line = _line_of(text, error.position)
        what = f"character U+{ord(text[error.position]):04X} is not allowed"
        raise ConfigError(f"{label}:{line}: {what}\n  fix: remove it") from None
    except RecursionError:
        raise ConfigError(f"{label}: nested deeper than {MAX_DEPTH} levels") from None
    except (yaml.YAMLError, ValueError, IndexError, OverflowError) as error:  # e.g. a broken escape: "\UFFFFFFFF"
        raise ConfigError(f"{label}: not valid YAML: {error}") from None


def _parse_json(text: str, label: str) -> object:
    def refuse(constant: str) -> object:
        raise ConfigError(f"{label}: {constant} is not a number a config can hold")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{label}:{error.lineno}: not valid JSON: {error.msg}\n  fix: {CORRECT}") from None
    except RecursionError:
        raise ConfigError(f"{label}: nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ConfigError(f"{label}: not valid JSON: {error}") from None


def _line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


class _Builder:
    """Turns a node tree into plain values, noting lines and collecting problems."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[str] = []
        self.repeated: list[str] = []
        self._values = 0
        self._constructor = SafeConstructor()

    def build(self, node: yaml.Node, path: KeyPath, depth: int) -> Any:
        self._values += 1
        if self._values > MAX_VALUES:
            self._stop(node, f"more than {MAX_VALUES} values once aliases are expanded")
        if depth > MAX_DEPTH:
            self._stop(node, f"nested deeper than {MAX_DEPTH} levels, or an alias that contains itself")
        self.lines.setdefault(path, node.start_mark.line + 1)
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self._item(child, (*path, index), depth + 1) for index, child in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, kind)
        self._tag(node)
        return None

    def _item(self, node: yaml.Node, path: KeyPath, depth: int) -> Any:
        self.lines[path] = node.start_mark.line + 1  # even where the list is given again
        return self.build(node, path, depth)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == _TAG + "merge":
                for part in reversed(list(self._merges(value_node, path, depth))):  # the first of a list wins
                    merged.update(part)
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                self._add(key_node, "a key must be text, not a list or mapping")
                continue
            key = self._scalar(key_node, key_node.tag.removeprefix(_TAG))
            if not isinstance(key, str):
                self._add(key_node, f"YAML reads the key {key_node.value!r} as {key!r}", "put the key in quotes")
                continue
            if key in seen:
                message = f"{dotted((*path, key))}: given twice, first on line {seen[key]}"
                self.repeated.append(f"{self.label}:{line}: {message}")
            seen.setdefault(key, line)
            self.lines[(*path, key)] = line
            result[key] = self.build(value_node, (*path, key), depth + 1)
        return {**merged, **result}

    def _merges(self, node: yaml.Node, path: KeyPath, depth: int) -> Iterator[dict[str, Any]]:
        for part in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if isinstance(part, yaml.MappingNode):
                yield self.build(part, path, depth + 1) or {}  # None, and a problem, for one with a tag
            else:
                self._add(part, "`<<` takes a mapping or a list of mappings")

    def _scalar(self, node: yaml.ScalarNode, kind: str) -> Any:
        text: str = node.value
        if kind in ("str", "timestamp", "value", "merge"):
            return text
        if kind == "null":
            return None
        try:
            if kind == "bool":
                return self._constructor.construct_yaml_bool(node)
            if kind in _NUMBERS:
                number = text if ":" in text else _NUMBERS[kind](self._constructor, node)
                if isinstance(number, str) or abs(number) < 1e300:
                    return number
        except (ValueError, KeyError, OverflowError, IndexError):
            pass
        if kind == "bool" or kind in _NUMBERS:
            self._add(node, f"{text[:60]!r} is {_NO_VALUE[kind]}")
        else:
            self._tag(node)
        return None

    def _tag(self, node: yaml.Node) -> None:
        tag = node.tag.replace(_TAG, "!!")
        self._add(node, f"the tag {tag[:80]} is refused: a config holds plain values only", "remove the tag")

    def _add(self, node: yaml.Node, message: str, fix: str = "") -> None:
        line = node.start_mark.line + 1
        self.problems.append(f"{self.label}:{line}: {message}" + (f"\n  fix: {fix}" if fix else ""))

    def _stop(self, node: yaml.Node, message: str) -> None:
        self._add(node, message)
        self.stop()

    def stop(self) -> NoReturn:
        """Raise what was found, without flooding the terminal."""
        more = len(self.problems) - MAX_PROBLEMS
        shown = [*self.problems[:MAX_PROBLEMS], *([f"{self.label}: and {more} more problems"] if more > 0 else [])]
        raise ConfigError("\n".join(shown))
