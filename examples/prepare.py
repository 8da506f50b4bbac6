"""Make the quantized exports of the demo model: ``examples/demo-model/awq`` and ``.../squeezellm``.

    .venv/bin/python examples/prepare.py

Each comes from the quantizer its plugin names (hook ``quantserve_quantizer``) with its defaults, calibrated on
conversations like those the model was trained on. An export is made again when the checkpoint, that text, or the code
of the plugin or of `quantserve quantize` has changed; it appears only when it is whole.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from quantserve.errors import QuantserveError, UsageError
from quantserve.plugins.registry import Hooks, Plugin, Registry
from quantserve_quantize import Quantizer, run

DEMO = Path(__file__).resolve().parent / "demo-model"
CHECKPOINT = DEMO / "checkpoint"
METHODS = ("awq", "squeezellm")
CALIBRATION = run.Asked(text=DEMO / "calibration.txt", samples=16, length=256)
STAMP = "made-from.txt"


def export(plugin: Plugin, destination: Path) -> bool:
    """Quantize the demo checkpoint with one method; False when the export is there and up to date.

    Raises:
        UsageError: the plugin has no quantizer.
        PluginError: its hook failed.
    """
    made_from = fingerprint(plugin)
    stamp = destination / STAMP
    if stamp.is_file() and stamp.read_text().strip() == made_from:
        return False
    quantizer = Hooks([plugin]).call(plugin, "quantserve_quantizer")
    if not quantizer:
        raise UsageError(f"method {destination.name!r} ({plugin.distribution} {plugin.version}) names no quantizer")
    print(f"making examples/demo-model/{destination.name}", flush=True)
    kind: type[Quantizer] = plugin.load_callable(quantizer)  # type: ignore[assignment]
    with tempfile.TemporaryDirectory(prefix=".export-", dir=destination.parent) as scratch:
        made = Path(scratch) / destination.name
        run.quantize(CHECKPOINT, made, kind(kind.Options()), destination.name, CALIBRATION)
        (made / STAMP).write_text(made_from + "\n")
        shutil.rmtree(destination, ignore_errors=True)
        made.rename(destination)
    return True


def fingerprint(plugin: Plugin) -> str:
    """A hash of the checkpoint's files, the calibration text and the code."""
    digest = hashlib.sha256()
    code = [path for file in (plugin.module.__file__, run.__file__) for path in Path(file or "").parent.glob("*.py")]
    for path in sorted([*CHECKPOINT.iterdir(), DEMO / "calibration.txt", *code]):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def main() -> int:
    """Make what is missing; returns an exit code."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # a small job that no GPU should be claimed for
    registry = Registry.load()
    try:
        for method in METHODS:
            began = time.monotonic()
            if export(registry.find_method(method), DEMO / method):
                print(f"  done in {time.monotonic() - began:.1f} s", flush=True)
    except QuantserveError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
