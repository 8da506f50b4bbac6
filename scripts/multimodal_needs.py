"""Print the architectures that the installed vLLM cannot import without torchvision or torchaudio.

    .venv/bin/python scripts/multimodal_needs.py

As JSON: package -> architectures, for core/quantserve/checks/packages.py, which a test holds against it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys

PACKAGES = ("torchvision", "torchaudio")


def needs() -> dict[str, list[str]]:
    """Import every model class with the packages hidden; returns package -> architectures that fail for its sake."""
    os.environ.update(VLLM_PLUGINS="", VLLM_LOGGING_LEVEL="CRITICAL", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1")
    for package in PACKAGES:
        sys.modules[package] = None  # type: ignore[assignment]
    from vllm.model_executor.models import registry

    models = {
        architecture: module
        for table in vars(registry).values()
        if isinstance(table, dict)
        for architecture, (module, *_) in _entries(table)
    }
    failed: dict[str, str] = {}
    for module in sorted(set(models.values())):
        try:
            importlib.import_module(module if "." in module else f"vllm.model_executor.models.{module}")
        except Exception as error:
            failed[module] = causes(error)
    return {
        package: sorted(name for name, module in models.items() if package.lower() in failed.get(module, "").lower())
        for package in PACKAGES
    }


def _entries(table: dict[object, object]) -> list[tuple[str, tuple[str, ...]]]:
    return [
        (name, entry)
        for name, entry in table.items()
        if isinstance(name, str) and isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)
    ]


def causes(error: BaseException | None) -> str:
    """The messages of an exception and of what led to it."""
    return "" if error is None else f"{error} {causes(error.__cause__ or error.__context__)}"


if __name__ == "__main__":
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        found = needs()
    print(json.dumps(found, indent=1))
