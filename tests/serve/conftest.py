"""What the tests of servers share."""

from __future__ import annotations

from pathlib import Path

import pytest

from .server import DEMO


@pytest.fixture(scope="session")
def demo() -> Path:
    """The demo model's folder with its quantized exports."""
    for name in ("checkpoint", "awq", "squeezellm"):
        if not (DEMO / name / "model.safetensors").is_file():
            pytest.fail(f"examples/demo-model/{name} is missing; `make prepare` makes it")
    return DEMO
