"""Options that several commands share; imports nothing that sends requests, as ``quantserve list`` imports commands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import click

URL: Final = "http://127.0.0.1:8000"
KEY_VARIABLES: Final = ("QUANTSERVE_API_KEY", "OPENAI_API_KEY")


@dataclass(frozen=True)
class Address:
    """A server and how long to wait for it.

    Attributes:
        url: ``http://host:port``, with or without a path or ``/v1``.
        api_key: sent as a bearer token; never shown.
        timeout_s: for a whole answer.
        stall_s: longest time without data, the wait for the first token included.
    """

    url: str = URL
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 600.0
    stall_s: float = 300.0


@dataclass(frozen=True)
class Generation:
    """How answers are generated; None leaves a parameter to the server.

    Attributes:
        completion: send the prompt as it is to ``/v1/completions``, without a chat template.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    system: str | None = None
    completion: bool = False

    @property
    def extra(self) -> dict[str, Any]:
        """Further fields of the body of a request."""
        return {} if self.seed is None else {"seed": self.seed}


def server_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--url``, ``--api-key`` and timeouts, as the arguments of `Address`."""
    for option in reversed(
        (
            click.option("--url", default=URL, show_default=True, metavar="URL", help="Address of the server."),
            click.option(
                "--api-key",
                envvar=KEY_VARIABLES,
                metavar="KEY",
                help="API key. Better set QUANTSERVE_API_KEY or OPENAI_API_KEY: others can read a command line.",
            ),
            click.option(
                "--timeout",
                "timeout_s",
                type=click.FloatRange(min=0, min_open=True),
                default=Address.timeout_s,
                show_default=True,
                metavar="S",
                help="Longest time for an answer.",
            ),
            click.option(
                "--stall",
                "stall_s",
                type=click.FloatRange(min=0, min_open=True),
                default=Address.stall_s,
                show_default=True,
                metavar="S",
                help="Longest time without data.",
            ),
        )
    ):
        command = option(command)
    return command


def generation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Parameters of generation, as the arguments of `Generation` except ``completion``."""
    for option in reversed(
        (
            click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer in tokens."),
            click.option("--temperature", type=click.FloatRange(min=0), help="Sampling temperature."),
            click.option("--seed", type=int, help="Seed of the sampling."),
            click.option("--system", metavar="TEXT", help="System prompt."),
        )
    ):
        command = option(command)
    return command


completion_option = click.option(
    "--completion", is_flag=True, help="Send the prompt without a chat template, to /v1/completions."
)


def address(options: dict[str, Any]) -> Address:
    """Take the options of `server_options` out of all options."""
    return Address(**{name: options.pop(name) for name in ("url", "api_key", "timeout_s", "stall_s")})


def generation(options: dict[str, Any]) -> Generation:
    """Take the options of `generation_options`, and ``completion`` where there is one, out of all options."""
    names = ("max_tokens", "temperature", "seed", "system", "completion")
    return Generation(**{name: options.pop(name) for name in names if name in options})
