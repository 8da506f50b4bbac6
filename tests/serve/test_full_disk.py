"""A full disk at the start is a line that names the folder."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .server import BIN, Server

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(400)]


def on_a_full_disk(folder: Path, command: list[str]) -> list[str]:
    """The command in a mount namespace of its own, with a file system without space at `folder`."""
    script = 'mount -t tmpfs -o size=64k tmpfs "$0" && { head -c 1000000 /dev/zero 2>&- > "$0/full"; exec "$@"; }'
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(folder), *command]


@pytest.fixture
def full() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:  # Ray's sockets need a short path
        trial = on_a_full_disk(Path(folder), ["true"])
        if not shutil.which("unshare") or subprocess.run(trial, capture_output=True).returncode:
            pytest.skip("no mount namespaces here")
        yield Path(folder)


@pytest.mark.parametrize(
    ("variable", "said", "seconds"),
    [
        ("RAY_TMPDIR", r"^error: too little free space in {folder} for Ray's session: 0 MiB, 64 MiB needed$", 30),
        ("VLLM_CACHE_ROOT", r"^  checkpoint  failed: No space left on device: {folder} \(VLLM_CACHE_ROOT\)$", 200),
    ],
)
def test_a_full_disk_at_the_start_is_reported_in_one_line(
    demo: Path, full: Path, variable: str, said: str, seconds: float
) -> None:
    command = [str(BIN / "quantserve"), "serve", str(demo / "checkpoint"), "--port", "0"]
    extra: dict[str, Any] = {variable: str(full)}
    running = Server(on_a_full_disk(full, command), **extra)
    try:
        assert running.process.wait(seconds) == 4
    finally:
        if running.process.poll() is None:
            running.stop(signal.SIGTERM)
    running.wait_for(said.format(folder=full))
    assert "Traceback" not in running.output
