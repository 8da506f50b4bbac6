"""Turn a SqueezeLLM checkpoint back into an ordinary one, to compare with any other runtime."""

from __future__ import annotations

from pathlib import Path

import torch

from quantserve.errors import CheckpointError
from quantserve_squeezellm._files import (
    SafetensorsFolder,
    ShardWriter,
    copy_companions,
    new_folder,
    read_json,
    write_json,
)
from quantserve_squeezellm._packing import SUFFIXES, dequantize


def dequantize_checkpoint(source: Path, destination: Path) -> None:
    """Write `source` with every quantized linear as a plain float32 `weight`, and float32 everywhere else too.

    Args:
        source: a SqueezeLLM safetensors folder.
        destination: a folder that does not exist yet.

    Raises:
        UsageError: the destination exists.
        CheckpointError: the source is unreadable or holds no quantized linear.
    """
    reader = SafetensorsFolder(source)
    modules = sorted({name.removesuffix(".qweight") for name in reader.names() if name.endswith(".qweight")})
    if not modules:
        raise CheckpointError(f"{source}: no tensor ends in .qweight, so there is nothing to dequantize")
    config = read_json(source / "config.json")
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    with new_folder(destination) as folder:
        copy_companions(source, folder)
        write_json(folder / "config.json", {**config, "dtype": "float32"})
        writer = ShardWriter(folder)
        quantized = set()
        for module in modules:
            names = {suffix: f"{module}.{suffix}" for suffix in SUFFIXES if f"{module}.{suffix}" in reader.where}
            quantized |= set(names.values())
            writer.add(f"{module}.weight", dequantize({suffix: reader.get(name) for suffix, name in names.items()}))
        for name in reader.names():
            if name not in quantized:
                writer.add(name, reader.get(name).to(torch.float32))
        writer.close()
