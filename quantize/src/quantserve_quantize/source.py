"""An unquantized checkpoint, its weights read one tensor at a time."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantserve.api import Checkpoint
from quantserve.checkpoint import open_checkpoint
from quantserve.errors import CheckpointError
from quantserve.finding import Severity

FLOATS = {"F64", "F32", "F16", "BF16"}
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken", "*.model",
    "chat_template*", "generation_config.json", "preprocessor_config.json", "processor_config.json", "LICENSE*",
    "NOTICE*", "USE_POLICY*",
)  # fmt: skip
_CHUNK = 1 << 24


class Weights:
    """The weights of a folder in safetensors.

    Args:
        folder: a checkpoint in transformers' format.

    Raises:
        CheckpointError: it is no checkpoint, damaged, quantized already, or in another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = checked(folder)
        self.files = {name: folder / tensor.file for name, tensor in self.checkpoint.tensors.items()}

    @property
    def names(self) -> list[str]:
        """All tensors, layer 2 before layer 10."""
        return sorted(self.files, key=natural)

    def get(self, name: str) -> Tensor:
        """A tensor as it is stored.

        Raises:
            CheckpointError: it cannot be read.
        """
        try:
            with safe_open(self.files[name], framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.files[name]}: cannot read {name}: {error}\n  fix: download the file again"
            ) from error

    def finite(self, name: str) -> Tensor:
        """The same in float32.

        Raises:
            CheckpointError: it holds NaN or infinity.
        """
        tensor = self.get(name).to(torch.float32)
        if lost := int((~torch.isfinite(tensor)).sum()):
            raise CheckpointError(
                f"{name} of {self.folder} holds {lost} NaN or infinities\n  fix: download the file again"
            )
        return tensor

    def fingerprint(self, progress: Callable[[int, int], None]) -> str:
        """See `fingerprint`."""
        return fingerprint(self.checkpoint, progress)

    def companions(self) -> list[Path]:
        """See `companions`."""
        return companions(self.folder)


def companions(folder: Path) -> list[Path]:
    """Tokenizer, chat template, generation config and licence of a checkpoint folder."""
    return sorted({path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()})


def fingerprint(checkpoint: Checkpoint, progress: Callable[[int, int], None]) -> str:
    """SHA-256 of config.json and of every weight file of a local checkpoint, as hex."""
    assert checkpoint.path is not None
    names = sorted({tensor.file for tensor in checkpoint.tensors.values()})
    paths = [checkpoint.path / name for name in ("config.json", *names) if name in checkpoint.files]
    total, done, digest = sum(path.stat().st_size for path in paths), 0, hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                done += len(chunk)
                progress(done, total)
    return digest.hexdigest()


def checked(folder: Path) -> Checkpoint:
    """The headers of a folder that can be quantized.

    Raises:
        CheckpointError: see `Weights`.
    """
    checkpoint = open_checkpoint(str(folder))
    if errors := [problem for problem in checkpoint.problems if problem.severity is Severity.ERROR]:
        raise CheckpointError(f"{folder}: {errors[0].message}\n  fix: {errors[0].fix or 'use the whole checkpoint'}")
    if declared := checkpoint.quantization_config:
        raise CheckpointError(
            f"{folder} is quantized already ({declared.get('quant_method', 'an unnamed method')})\n"
            "  fix: give the unquantized model it was made from"
        )
    other = [tensor for tensor in checkpoint.tensors.values() if tensor.dtype not in FLOATS and len(tensor.shape) == 2]
    if other:
        raise CheckpointError(
            f"{folder}: {other[0].name} is {other[0].dtype}, expected one of {', '.join(sorted(FLOATS))}\n"
            "  fix: give the unquantized model"
        )
    return checkpoint


def natural(name: str) -> list[str | int]:
    """A sort key under which layer 2 comes before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
