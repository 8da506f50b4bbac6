"""What the packaging tests share: distributions, built once per run."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.environments import PROJECTS, build


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and an sdist of every distribution of this repository."""
    out = tmp_path_factory.mktemp("dist")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("QUANTSERVE_KERNELS_CFLAGS", "-O0")  # no test times them
        for project in PROJECTS.values():
            build(project, out)
    return out
