"""Quantizers and converters."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator
from pathlib import Path

from quantserve.checkpoint import open_checkpoint
from quantserve.errors import UsageError
from quantserve.plugins.registry import Hooks
from quantserve.testing.check import Skip, check
from quantserve.testing.checks.detection import claims
from quantserve.testing.child import ask
from quantserve.testing.subject import Subject, engine_available
from quantserve.testing.tiny import write_llama, write_tokenizer

_CALL = """
from importlib import import_module
from pathlib import Path
reference, method, source, destination = sys.argv[1:]
module, _, name = reference.partition(":")
try:
    found = getattr(import_module(module), name)
except ModuleNotFoundError as error:
    if error.name != "quantserve_quantize":
        raise
    answer("missing")
    sys.exit()
if isinstance(found, type):
    from quantserve.cli.main import run
    small = ["--samples", "4", "--length", "32"]
    if code := run(["quantize", source, "--method", method, "--out", destination, *small]):
        sys.exit(code)
    answer("class")
else:
    found(Path(source), Path(destination))
    answer("function")
"""


@check("Q01-quantizer", "quantizer", "method")
def quantizer(subject: Subject) -> Iterator[str]:
    """The quantizer turns a small Llama into a checkpoint that the plugin claims and that has no errors, and does not
    write over a folder that exists. A class runs as `quantserve quantize` runs it, with a few calibration samples.

    Fix: write a whole folder, config.json with its quantization_config included, under another name and rename it.
    """
    if why := engine_available():
        raise Skip(why)
    reference = Hooks([subject.loaded]).call(subject.loaded, "quantserve_quantizer")
    if not isinstance(reference, str):
        return
    with tempfile.TemporaryDirectory(prefix="quantserve-") as folder:
        source, destination = (
            write_llama(Path(folder, "plain"), hidden=256, intermediate=512),
            Path(folder, "quantized"),
        )
        write_tokenizer(source)
        arguments = (reference, subject.case.name, str(source), str(destination))
        answer = ask(_CALL, *arguments, parts=60)
        if answer.problem:
            yield f"{reference}: {answer.problem}"
            return
        if answer.value == "missing":
            raise Skip("quantserve-quantize is not installed")
        opened = open_checkpoint(str(destination), readers=subject.registry.readers)
        if not claims(subject, opened):
            yield f"{reference} writes what quantserve_detect does not claim"
        for finding in subject.errors(opened):
            yield f"{reference} writes a checkpoint with the error {finding.code}: {finding.message}"
        if answer.value == "function" and not ask(_CALL, *arguments, parts=60).problem:
            yield f"{reference} writes over a folder that exists"


@check("Q02-converter", "converter")
def converter(subject: Subject) -> Iterator[str]:
    """The converter can be imported and takes `(source, destination, *, base, allow_pickle)`.

    Fix: name a callable with these parameters as "module:callable".
    """
    given = Hooks([subject.loaded]).call(subject.loaded, "quantserve_converter")
    try:
        function = subject.loaded.load_callable(given)
    except UsageError as error:
        raise Skip(str(error)) from error
    try:
        inspect.signature(function).bind(Path("a"), Path("b"), base=None, allow_pickle=False)
    except TypeError as error:
        yield f"{given}{inspect.signature(function)}: {error}"
