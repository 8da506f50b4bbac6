"""From a .gguf file to a 16-bit checkpoint in safetensors."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from quantserve.errors import UserError
from quantserve_gguf._folder import folder_of
from quantserve_gguf._weights import weights
from quantserve_gguf.header import read_header
from quantserve_quantize.draft import must_be_new, write_folder

Progress = Callable[[str, int, int], None]


def convert(
    source: Path,
    destination: Path,
    *,
    base: Path | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the checkpoint that a file stands for, in bfloat16, with its config and tokenizer.

    Args:
        source: a .gguf file, or the first of several numbered ones.
        destination: must not exist.
        base: not used.
        allow_pickle: not used.
        progress: called with what is done, how many tensors are done, and how many there are.

    Raises:
        UserError: the file cannot be read, or the destination exists.
    """
    must_be_new(destination)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = folder_of(str(source), None, Path(scratch))
        except ValueError as error:
            raise UserError(f"{source}: {error}\n  fix: take another file of this model") from error
        if folder is None:
            raise UserError(f"{source} is no .gguf file\n  fix: name one")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config.pop("quantization_config", None)
        config.pop("torch_dtype", None)
        text = json.dumps({**config, "dtype": "bfloat16"}, indent=2) + "\n"
        copies = [path for path in sorted(folder.iterdir()) if path.suffix != ".gguf" and path.name != "config.json"]
        write_folder(destination, _tensors(folder, progress), {"config.json": text}, copies)


def _tensors(folder: Path, progress: Progress | None) -> Iterator[tuple[str, Tensor]]:
    config = AutoConfig.from_pretrained(folder)
    files = sorted(folder.glob("*.gguf"))
    total, done = 0, 0
    for path in files:
        with path.open("rb") as file:
            total += len(read_header(file).tensors)
    for path in files:
        with path.open("rb") as file:
            for name, tensor in weights(file, config, {}, torch.bfloat16):
                yield name, tensor
                done += 1
                if progress:
                    progress("converting", done, total)
