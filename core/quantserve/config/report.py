"""Collects the problems of config files, so that all of them are reported at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from quantserve.config.source import KeyPath, Located
from quantserve.errors import ConfigError

_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "a mapping (`key: value`)",
    "model_type": "a mapping (`key: value`)",
    "model_attributes_type": "a mapping (`key: value`)",
    "list_type": "a list",
    "finite_number": "a finite number",
}


Fault = tuple[str | KeyPath, str, str]
"""Key inside the validated section, message, and fix."""


def fault(message: str, *, at: str | KeyPath = (), fix: str = "") -> PydanticCustomError:
    """An error to raise in a validator; `at` is the offending key inside the validated section."""
    return faults([(at, message, fix)])


def faults(found: Sequence[Fault]) -> PydanticCustomError:
    """Several errors to raise at once in a validator."""
    listed = [((at,) if isinstance(at, str) else tuple(at), message, fix) for at, message, fix in found]
    context: dict[str, Any] = {"text": "; ".join(message for _, message, _ in listed), "faults": listed}
    return PydanticCustomError("config", "{text}", context)


@dataclass
class Report:
    """Problems, which make a config invalid, and notes, which do not."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def problem(self, doc: Located, path: KeyPath, message: str, fix: str = "") -> None:
        """Add a problem with the value at `path` of `doc`."""
        name = doc.name(*path)
        text = f"{doc.where(*path)}: " + (f"{name}: " if name else "") + message + (f"\n  fix: {fix}" if fix else "")
        if text not in self.problems:
            self.problems.append(text)

    def note(self, doc: Located, path: KeyPath, message: str) -> None:
        """Add a note on the value at `path` of `doc`."""
        text = f"{doc.where(*path)}: {message}"
        if text not in self.notes:
            self.notes.append(text)

    def invalid(self, doc: Located, error: ValidationError, model: type[BaseModel]) -> None:
        """Add all validation errors of `doc` as `model`."""
        for details in error.errors(include_url=False):
            for path, message, fix in explain(details, model):
                self.problem(doc, path, message, fix)

    def sort(self, problems_from: int, notes_from: int) -> None:
        """Sort the problems and notes from these indices on, all of one file, by line number."""
        for texts, start in ((self.problems, problems_from), (self.notes, notes_from)):
            texts[start:] = sorted(texts[start:], key=_line)

    def raise_problems(self) -> None:
        """Raise one `ConfigError` with all problems, if there are any."""
        if self.problems:
            raise ConfigError("\n".join(self.problems))


def _line(text: str) -> int:
    found = re.search(r":(\d+): ", text)
    return int(found[1]) if found else 0


def explain(details: ErrorDetails, model: type[BaseModel]) -> list[tuple[KeyPath, str, str]]:
    """One pydantic error as readable messages: key path, message and fix of each."""
    path: KeyPath = tuple(part for part in details["loc"] if part != "[key]")
    kind, value, context = details["type"], details.get("input"), details.get("ctx", {})
    if kind == "config":
        return [((*path, *at), message, fix) for at, message, fix in context["faults"]]
    if kind == "extra_forbidden":
        return [(path, *unknown_key(str(path[-1]), known_keys(model, path[:-1])))]
    if kind == "missing":
        return [(path[:-1], f"`{path[-1]}` is missing", "")]
    if wanted := _WANTED.get(kind):
        return [(path, f"must be {wanted}, got {got(value)}", _fix(wanted, value))]
    if kind == "literal_error":
        return [(path, f"must be one of {context['expected'].replace(' or ', ', ')}, got {got(value)}", "")]
    message = details["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return [(path, f"must be {message}, got {got(value)}", "")]


def unknown_key(key: str, known: list[str]) -> tuple[str, str]:
    """Message and fix for a key that does not exist."""
    close = get_close_matches(key, known, n=1, cutoff=0.6)
    message = f"unknown key `{key}`" + (f"; did you mean `{close[0]}`?" if close else "")
    return f"{message} (known: {', '.join(sorted(known))})", ""


def known_keys(model: type[BaseModel], path: KeyPath) -> list[str]:
    """The valid keys of the section at `path` of `model`."""
    section: type[BaseModel] | None = model
    for part in path:
        if section is None or isinstance(part, int) or part not in section.model_fields:
            continue
        section = _section(section.model_fields[part].annotation) or section
    return list(section.model_fields) if section else []


def _section(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, UnionType):
        return next(filter(None, map(_section, get_args(annotation))), None)
    return None


def got(value: object) -> str:
    """A value in the words of the config, for messages."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text {value[:60]!r}"
    if isinstance(value, int | float):
        # str() refuses integers of thousands of digits
        return f"the number {value:.30g}" if abs(value) < 1e300 else "a number far too large"
    return "a list" if isinstance(value, list) else "a mapping" if isinstance(value, dict) else type(value).__name__


def _fix(wanted: str, value: object) -> str:
    if value is None:
        return "give a value, or remove the line to get the default"
    if wanted == "text" and isinstance(value, int | float):
        return "put the value in quotes"
    if isinstance(value, str) and "number" in wanted:
        try:
            number = float(value)
        except ValueError:
            return ""
        whole = number.is_integer() and abs(number) < 1e15
        if whole or "whole" not in wanted:
            return f"write {int(number) if whole else number!r} without quotes"
    return ""
