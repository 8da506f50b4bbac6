"""Ray Serve LLM in a virtual environment of its own, on the same Ray, vLLM and torch as everything else here.

`pip install ray[serve,llm]` brings the CUDA build of vLLM, which does not run on a CPU. So the environment looks
through to the packages of the one that runs this, where Ray, Serve and vLLM's CPU build are, and adds what
`ray.serve.llm` imports besides. What differs between the servers is then the serving path and nothing else.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Final

from benchmarks.console import BUILD, ROOT, BenchError, say, shown

VENV: Final = BUILD / "ray-venv"
PYTHON: Final = VENV / "bin" / "python"
LOG: Final = BUILD / "logs" / "ray-venv.log"
REQUIREMENTS: Final = ("pyarrow>=17", "jsonref>=1.1", "hf_transfer", "pandas>=2.2.3", "pybind11")
PROBE: Final = (
    "from ray.serve.llm import LLMConfig, build_openai_app; import ray, vllm; print(ray.__version__, vllm.__version__)"
)


def ready() -> str | None:
    """Versions of Ray and vLLM where the environment works, else None."""
    if not PYTHON.exists():
        return None
    asked = subprocess.run([str(PYTHON), "-c", PROBE], capture_output=True, text=True, cwd=ROOT, check=False)
    return asked.stdout.splitlines()[-1] if asked.returncode == 0 and asked.stdout else None


def install() -> str:
    """Make the environment unless it works already; versions of Ray and vLLM.

    Raises:
        BenchError: it cannot be made, or does not import; says why.
    """
    if found := ready():
        return found
    say(f"making {shown(VENV)}; log: {shown(LOG)}")
    LOG.parent.mkdir(parents=True, exist_ok=True)
    venv.create(VENV, clear=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(VENV), "platbase": str(VENV)}))
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(PYTHON), "install", "--no-input", "--progress-bar", "off"]
    with LOG.open("w") as log:
        done = subprocess.run([*pip, "--no-deps", *REQUIREMENTS], stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise BenchError(f"pip failed: {last_line(LOG)}")
    if found := ready():
        return found
    asked = subprocess.run([str(PYTHON), "-c", PROBE], capture_output=True, text=True, cwd=ROOT, check=False)
    raise BenchError(f"ray.serve.llm does not import: {(asked.stderr.strip().splitlines() or ['?'])[-1]}")


def last_line(path: Path) -> str:
    """The last line of a log that says anything."""
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
