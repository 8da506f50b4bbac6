"""The calibration text as token ids."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from quantserve.errors import UsageError, one_line

SHORTEST = 16
"""Tokens of a sample, at least."""


@dataclass(frozen=True)
class Calibration:
    """Samples of equal length.

    Attributes:
        ids: int64 [samples, tokens].
        digest: SHA-256 of the text.
        source: the file, or ``built-in``.
    """

    ids: Tensor
    digest: str
    source: str


def read(path: Path | None, folder: Path, samples: int, length: int, seed: int) -> Calibration:
    """Cut a text into samples that do not overlap; which ones follows from the seed.

    Args:
        path: a UTF-8 text, None for the one that ships with this package.
        folder: the checkpoint, for its tokenizer.
        samples: how many.
        length: tokens of each.
        seed: of the choice.

    Raises:
        UsageError: the text cannot be read, or is too short; or there is no tokenizer.
    """
    text = text_of(path, "calibration.txt")
    ids = encode(text, folder)
    there = len(ids) // length
    if there < samples:
        fix = "give a longer text"
        if there or len(ids) >= SHORTEST:
            fix += f", or --samples {there}" if there else f", or --samples 1 --length {len(ids)}"
        raise UsageError(
            f"{path or 'the built-in text'} has {len(ids)} tokens, which make {there} samples of {length}; {samples} "
            f"are asked for\n  fix: {fix}"
        )
    chosen = torch.randperm(there, generator=torch.Generator().manual_seed(seed))[:samples].sort().values
    rows = ids[: there * length].view(there, length)[chosen]
    return Calibration(rows, hashlib.sha256(text.encode()).hexdigest(), str(path) if path else "built-in")


def text_of(path: Path | None, default: str) -> str:
    """A text file, or one that ships with this package.

    Raises:
        UsageError: it cannot be read, or is not UTF-8.
    """
    if path is None:
        return (files("quantserve_quantize") / "texts" / default).read_text(encoding="utf-8")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}\n  fix: name a text file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {one_line(error)}\n  fix: give plain text") from error


def encode(text: str, folder: Path) -> Tensor:
    """Token ids of a text, without special tokens, int64 [tokens].

    Raises:
        UsageError: the folder has no tokenizer that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UsageError(
            f"{folder} has no tokenizer that transformers can load: {one_line(error)}\n"
            "  fix: add the tokenizer's files, or use a method that needs no calibration"
        ) from error
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
