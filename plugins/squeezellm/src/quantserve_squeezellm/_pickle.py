"""Read a torch pickle without running what it says: torch's restricted unpickler, tensors mapped from the file."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from quantserve.errors import CheckpointError


def load_state(path: Path) -> dict[str, Any]:
    """The state dict of a `.pt` or `.bin` file. Tensors stay on disk until used.

    Raises:
        CheckpointError: not a whole zip-format torch file, a pickle that asks for more than tensors, or no state dict.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused: its pickle asks for more than tensors and plain values ({_first_line(error)}). "
            "Nothing of it was run\n  fix: get the file from a source you trust, as safetensors"
        ) from error
    except (RuntimeError, ValueError, EOFError, OSError, KeyError) as error:
        size = path.stat().st_size if path.is_file() else 0
        raise CheckpointError(
            f"{path} ({size:,} bytes): not a whole torch file ({_first_line(error)}). "
            "Fix: compare its size with the source and download it again"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{path}: holds {type(state).__name__}, expected a state dict of names and tensors")
    return dict(state)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
