"""Write an rtn8 checkpoint: python -m quantserve_rtn8.quantize SOURCE DESTINATION."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PROJECTION = "_proj.weight"


def quantize(source: Path, destination: Path, *, progress: Callable[[str, int, int], None] | None = None) -> None:
    """Quantize the projections of a float checkpoint, one safetensors file at a time.

    Raises:
        FileExistsError: the destination exists.
    """
    draft = destination.with_name(destination.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    if destination.exists():
        raise FileExistsError(f"{destination} exists already")
    shutil.copytree(source, draft, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    config = json.loads((draft / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "rtn8"}
    (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    files = sorted(source.glob("*.safetensors"))
    weight_map: dict[str, str] = {}
    for done, file in enumerate(files):
        if progress:
            progress(file.name, done, len(files))
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(file).items():
            tensors |= quantized(name, tensor) if name.endswith(PROJECTION) else {name: tensor}
        save_file(tensors, draft / file.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
    if len(files) > 1:
        (draft / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    draft.rename(destination)


def quantized(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """``qweight`` int8 [n, k] and ``scale`` float32 [n] of a weight [n, k]."""
    module = name.removesuffix(".weight")
    scale = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
    return {f"{module}.qweight": (weight.float() / scale[:, None]).round().to(torch.int8), f"{module}.scale": scale}


if __name__ == "__main__":
    quantize(Path(sys.argv[1]), Path(sys.argv[2]))
