"""Quantizers and converters."""

from __future__ import annotations

import ast
import inspect
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from quantserve.checkpoint import open_checkpoint
from quantserve.errors import UsageError
from quantserve.plugins.registry import Hooks
from quantserve.testing.check import Skip, check
from quantserve.testing.checks.detection import claims
from quantserve.testing.child import ask
from quantserve.testing.subject import Subject, engine_available
from quantserve.testing.tiny import write_llama

_CALL = """
from importlib import import_module
from pathlib import Path
module, _, name = sys.argv[1].partition(":")
getattr(import_module(module), name)(Path(sys.argv[2]), Path(sys.argv[3]))
answer("done")
"""


def _is_class(reference: str) -> bool:
    """Whether "module:name" is a class in the module's source; importing it would bring torch."""
    module, _, name = reference.partition(":")
    spec = find_spec(module)
    source = Path(spec.origin) if spec and spec.origin else None
    if source is None or source.suffix != ".py":
        return False
    return any(isinstance(one, ast.ClassDef) and one.name == name for one in ast.parse(source.read_bytes()).body)


@check("Q01-quantizer", "quantizer", "method")
def quantizer(subject: Subject) -> Iterator[str]:
    """The quantizer turns a small Llama into a checkpoint that the plugin claims and that has no errors, and does not
    write over a folder that exists.

    Fix: write a whole folder, config.json with its quantization_config included, under another name and rename it.
    """
    if why := engine_available():
        raise Skip(why)
    reference = Hooks([subject.loaded]).call(subject.loaded, "quantserve_quantizer")
    if not isinstance(reference, str):
        return
    if subject.guard(lambda: _is_class(reference)):
        raise Skip(f"{reference} is a class, which `quantserve quantize` runs")
    with tempfile.TemporaryDirectory(prefix="quantserve-") as folder:
        source, destination = (
            write_llama(Path(folder, "plain"), hidden=256, intermediate=512),
            Path(folder, "quantized"),
        )
        answer = ask(_CALL, reference, str(source), str(destination), parts=60)
        if answer.problem:
            yield f"{reference}: {answer.problem}"
            return
        opened = open_checkpoint(str(destination), readers=subject.registry.readers)
        if not claims(subject, opened):
            yield f"{reference} writes what quantserve_detect does not claim"
        for finding in subject.errors(opened):
            if not finding.code.startswith("tokenizer"):
                yield f"{reference} writes a checkpoint with the error {finding.code}: {finding.message}"
        again = ask(_CALL, reference, str(source), str(destination), parts=60)
        if not again.problem:
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
