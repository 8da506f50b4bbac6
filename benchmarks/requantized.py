"""Let llama.cpp quantize a GGUF file with a preset, and write what the result stands for in bfloat16.

Runs in llama.cpp's virtual environment: `-m benchmarks.requantized PRESET SOURCE FILE WIDE`. Prints the bytes of FILE
and the bits per weight of its blocks' linears as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf  # type: ignore[import-not-found]
import llama_cpp  # type: ignore[import-not-found]


def quantize(source: Path, path: Path, preset: str) -> None:
    """Write `path`, whole or not at all."""
    draft = path.with_suffix(".part")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, preset)
    parameters.nthread = 1
    parameters.allow_requantize = True
    try:
        if llama_cpp.llama_model_quantize(str(source).encode(), str(draft).encode(), parameters):
            raise SystemExit(f"llama.cpp could not write {path.name} of {source.name}")
        draft.rename(path)
    finally:
        draft.unlink(missing_ok=True)


def main(preset: str, source: Path, path: Path, wide: Path) -> None:
    """Write both files."""
    if not path.exists():
        quantize(source, path, preset)
    quantize(path, wide, "LLAMA_FTYPE_MOSTLY_BF16")
    linears = [one for one in gguf.GGUFReader(path).tensors if one.name.startswith("blk.") and len(one.shape) == 2]
    bits = 8 * sum(int(one.n_bytes) for one in linears) / sum(int(one.n_elements) for one in linears)
    print(json.dumps({"bytes": path.stat().st_size, "bits_per_weight": bits}))


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:5]))
