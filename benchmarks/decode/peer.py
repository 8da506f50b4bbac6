"""llama.cpp in a virtual environment of its own, built for this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.console import BUILD, ROOT, BenchError, say, shown
from benchmarks.decode.shapes import GGUF, Shape

# What the figures in docs/performance.md were measured with.
REQUIREMENTS = ("llama-cpp-python==0.3.36", "gguf==0.19.0")
VENV = BUILD / "llama-venv"
PYTHON = VENV / "bin" / "python"
LOG = BUILD / "logs" / "llama-build.log"
TOOLS = ("cmake", "c++")


def version() -> str | None:
    """What is installed, in words; None when it is not or does not run."""
    if not PYTHON.exists():
        return None
    script = "import gguf, llama_cpp; print('llama-cpp-python', llama_cpp.__version__)"
    asked = subprocess.run([str(PYTHON), "-c", script], capture_output=True, text=True)
    return asked.stdout.strip() if asked.returncode == 0 else None


def install(build: bool) -> str:
    """Build and install llama.cpp unless it is there; returns `version()`.

    Args:
        build: whether it may be built if need be, which takes minutes.

    Raises:
        BenchError: it is not there and cannot be built; says why.
    """
    if found := version():
        return found
    if not build:
        raise BenchError("not built yet, which takes minutes: run once without --quick")
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        raise BenchError(f"building llama.cpp needs {' and '.join(missing)}; install them (on Debian build-essential)")
    say(f"building llama.cpp for this machine, about 7 minutes on 2 cores; log: {shown(LOG)}")
    LOG.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "CMAKE_ARGS": "-DGGML_NATIVE=ON", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    with LOG.open("w") as log:
        for line in (
            [sys.executable, "-m", "venv", "--clear", str(VENV)],
            [str(PYTHON), "-m", "pip", "install", "--no-input", "--progress-bar", "off", *REQUIREMENTS],
        ):
            run(line, log.fileno(), environment)
    found = version()
    if not found:
        raise BenchError(f"llama.cpp was installed but does not import; log: {shown(LOG)}")
    return found


def run(line: list[str], log: int, environment: dict[str, str] | None = None) -> None:
    """Run a command at low priority with its output in a log; BenchError with the last line when it fails."""
    process = subprocess.Popen(["nice", *line], cwd=ROOT, stdout=log, stderr=log, env=environment)
    try:
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if code:
        lines = [text for text in LOG.read_text(errors="replace").splitlines() if text.strip()]
        raise BenchError(f"{' '.join(line[1:4])} failed: {lines[-1][:200] if lines else code}; log: {shown(LOG)}")


def make(shape: Shape, kind: str) -> Path:
    """The GGUF file of a shape (a key of `shapes.GGUF`), made from its bf16 checkpoint unless it is there."""
    path = shape.checkpoint(kind)
    if not path.exists():
        say(f"making {shown(path)}")
        with LOG.open("a") as log:
            source = str(shape.checkpoint("bf16"))
            run([str(PYTHON), "-m", "benchmarks.decode.gguf_file", source, str(path), GGUF[kind]], log.fileno())
    return path
