"""What `check`, `plan` and `serve` share: from SOURCES on the command line to compositions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from quantserve.config import AppConfig, ModelConfig, is_model_source, load, model_from_source
from quantserve.errors import QuantserveError, UsageError
from quantserve.planning.compose import Composition, compose
from quantserve.plugins.registry import Registry
from quantserve.target import Target, find_target

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Outcome:
    """One model: its composition, or the error that kept it from being composed."""

    model: ModelConfig
    composition: Composition | None = None
    error: QuantserveError | None = None

    @property
    def exit_code(self) -> int:
        """What this model alone would exit with."""
        if self.error:
            return self.error.exit_code
        return 1 if self.composition and self.composition.errors else 0


def source_options(function: F) -> F:
    """Add SOURCES, ``--target`` and the options for a bare MODEL."""
    options = [
        click.argument("sources", nargs=-1, required=True, metavar="CONFIG|MODEL..."),
        click.option("--target", "target_name", metavar="NAME", help="Hardware to check for, e.g. a100-80g, cpu."),
        click.option("--quantization", metavar="METHOD", help="Method of a bare MODEL; default: detected."),
        click.option("--tensor-parallel-size", type=click.IntRange(min=1), help="Tensor parallelism of a bare MODEL."),
        click.option("--max-model-len", type=click.IntRange(min=1), help="Context length of a bare MODEL, in tokens."),
        click.option("--allow-pickle", is_flag=True, help="Read .bin/.pt weights of a bare MODEL (restricted)."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def load_sources(
    sources: Sequence[str],
    quantization: str | None,
    tensor_parallel_size: int | None,
    max_model_len: int | None,
    allow_pickle: bool,
) -> AppConfig:
    """Load config files, folders and bare models into one app.

    Raises:
        UsageError: an option for a bare MODEL was given without one.
        ConfigError: a file is wrong, or two models share an id.
    """
    given = {
        "--quantization": quantization,
        "--tensor-parallel-size": tensor_parallel_size,
        "--max-model-len": max_model_len,
        "--allow-pickle": allow_pickle or None,
    }
    flags = ", ".join(flag for flag, value in given.items() if value is not None)
    if not flags:
        return load(sources)
    configs = [source for source in sources if not is_model_source(source)]
    if configs:
        raise UsageError(
            f"{flags} can be given for a bare MODEL only, and {configs[0]!r} is a config\n"
            "  fix: write it in the config, or name only model folders and hub ids"
        )
    models = [
        model_from_source(
            source,
            quantization=quantization,
            tensor_parallel_size=tensor_parallel_size,
            max_model_len=max_model_len,
            allow_pickle=allow_pickle or None,
        )
        for source in sources
    ]
    return AppConfig(models=models)


def choose_target(name: str | None) -> Target:
    """The target named on the command line, else this machine."""
    return find_target(name)


def outcomes(models: Sequence[ModelConfig], registry: Registry, target: Target) -> Iterator[Outcome]:
    """Compose every model; an error of one does not stop the others."""
    for model in models:
        try:
            yield Outcome(model, compose(model, registry, target))
        except QuantserveError as error:
            yield Outcome(model, error=error)
