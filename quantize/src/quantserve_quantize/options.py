"""The options of a quantizer: the fields of a dataclass, as command-line options with types, bounds and help."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import click

from quantserve.errors import UsageError


def option(
    default: Any, help: str, *, choices: Sequence[Any] = (), low: float | None = None, high: float | None = None
) -> Any:
    """A field of a quantizer's options.

    Args:
        default: gives the type: bool, int, float or str.
        help: one line for ``--help``.
        choices: the values that are allowed.
        low: smallest number allowed.
        high: largest number allowed.
    """
    about = {"help": help, "choices": tuple(choices), "low": low, "high": high}
    return dataclasses.field(default=default, metadata=about)


def checked(options: Any) -> Any:
    """The options, if each is of its choices and within its bounds.

    Raises:
        UsageError: one is not.
    """
    for field in dataclasses.fields(options):
        about, value = field.metadata, getattr(options, field.name)
        low, high = about["low"], about["high"]
        if about["choices"] and value not in about["choices"]:
            known = ", ".join(map(str, about["choices"]))
            raise UsageError(f"{field.name} is {value!r}; expected one of {known}")
        if (low is not None and value < low) or (high is not None and value > high):
            raise UsageError(f"{field.name} is {value!r}; expected {low} to {high}")
    return options


def click_options(options: type) -> list[click.Option]:
    """The command-line options for the fields of a dataclass."""
    return [_click_option(field) for field in dataclasses.fields(options)]


def _click_option(field: dataclasses.Field[Any]) -> click.Option:
    flag = "--" + field.name.replace("_", "-")
    about: Mapping[str, Any] = field.metadata
    if isinstance(field.default, bool):
        flag = f"{flag}/--no-{flag[2:]}"
        return click.Option([flag], default=field.default, show_default=True, help=about["help"])
    return click.Option([flag], type=_kind(field), default=field.default, show_default=True, help=about["help"])


def _kind(field: dataclasses.Field[Any]) -> Any:
    about, number = field.metadata, type(field.default)
    if about["choices"]:
        return Choice(about["choices"])
    if number in (int, float):
        bounds = {"min": about["low"], "max": about["high"]}
        return click.IntRange(**bounds) if number is int else click.FloatRange(**bounds)
    return number


class Choice(click.ParamType[Any]):
    """One of some values that need not be text."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = {str(value): value for value in values}
        self.name = "|".join(self.values)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Find it by its text."""
        if str(value) not in self.values:
            self.fail(f"{value!r} is not one of {', '.join(self.values)}", param, ctx)
        return self.values[str(value)]
