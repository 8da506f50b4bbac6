"""``quantserve quantize``. The module is light, as ``quantserve list`` imports it."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import click


class WithMethodOptions(click.Command):
    """A command that has the options of the quantizer that ``--method`` names, too."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Add the method's options before the arguments are parsed."""
        method = _value_of("--method", args)
        self.params = [param for param in self.params if not getattr(param, "of_method", False)]
        if method is not None:
            self.params += imported("program").method_options(method)
        return super().make_context(info_name, args, parent, **extra)


def imported(module: str) -> Any:
    """A module of this package that imports torch.

    Raises:
        UsageError: torch, transformers or safetensors is not installed.
    """
    from quantserve.errors import UsageError

    try:
        return importlib.import_module(f"quantserve_quantize.{module}")
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers", "safetensors"):
            raise
        raise UsageError(
            f"this command needs {error.name}, which is not installed\n"
            "  fix: pip install 'quantserve[cpu]' or 'quantserve[cuda]', or torch, transformers and safetensors"
        ) from None


def _value_of(name: str, args: list[str]) -> str | None:
    for number, argument in enumerate(args):
        if argument == "--":
            return None
        if argument == name:
            return args[number + 1] if number + 1 < len(args) else None
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return None


@click.command("quantize", cls=WithMethodOptions)
@click.argument("model")
@click.option(
    "--method", required=True, metavar="METHOD", help="Quantization method; `--method METHOD --help` lists its options."
)
@click.option(
    "--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="New folder for the quantized model."
)
@click.option(
    "--calibration",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Text to calibrate with; default: a built-in one.",
)
@click.option("--samples", type=click.IntRange(1, 100_000), default=64, show_default=True, help="Calibration samples.")
@click.option("--length", type=click.IntRange(16, 100_000), default=512, show_default=True, help="Tokens of a sample.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of what is random.")
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str,
    method: str,
    out: Path,
    calibration: Path | None,
    samples: int,
    length: int,
    seed: int,
    resume: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Quantize MODEL, an unquantized checkpoint, into a new folder.

    MODEL is a folder or a hub id in safetensors. The folder DIR appears when it is whole; a run that was stopped
    goes on with --resume, and gives the same bytes. Methods that calibrate run the model block by block on the CPU.
    """
    began = time.monotonic()
    program = imported("program")
    asked = program.Asked(calibration, samples, length, seed)
    done: int = program.run(model, method, out, asked, options, resume, as_json, began)
    return done
