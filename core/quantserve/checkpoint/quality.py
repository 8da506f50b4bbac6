"""What a checkpoint lost: the record that `quantserve quality` leaves beside the weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

from quantserve.checkpoint.data import Checkpoint
from quantserve.checkpoint.text import BadJson, parse_json, shown

MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class MeasuredQuality:
    """A checkpoint compared with the one it was made from, on a text.

    Attributes:
        perplexity, baseline: of the checkpoint and of the reference.
        kl_mean: mean KL divergence of the distributions of the next token from the reference's, in nats.
        same_top: share of tokens where both find the same token most probable.
        tokens: how many were predicted.
        samples, length: the text was cut into so many samples of so many tokens.
        text, text_sha256: its file, or ``built-in``.
        reference, reference_sha256: the reference's name; config.json and weights as `quantserve.json` hashes them.
        weights_sha256: the same of the checkpoint.
        weight_bytes: of the checkpoint; the record counts for files of this size only.
        through: ``transformers`` or ``engine``.
        date: ``2026-11-30``.
    """

    perplexity: float
    baseline: float
    kl_mean: float
    same_top: float
    tokens: int
    samples: int
    length: int
    text: str
    text_sha256: str
    reference: str
    reference_sha256: str
    weights_sha256: str
    weight_bytes: int
    through: str
    date: str

    @property
    def increase(self) -> float:
        """By how much the perplexity rises, as a share of the reference's."""
        return self.perplexity / self.baseline - 1

    @property
    def measured_on(self) -> str:
        """``28 x 512 tokens of eval.txt against smollm2, through transformers``."""
        text, reference, through = map(shown, (self.text, self.reference, self.through))
        return f"{self.samples} x {self.length} tokens of {text} against {reference}, through {through}"

    def to_json(self) -> dict[str, Any]:
        """Plain data, as the record holds it."""
        return asdict(self)


def record_name(checkpoint: Checkpoint) -> str:
    """The record's file: ``measured-quality.json``, or ``NAME.measured-quality.json`` beside ``NAME.gguf``."""
    stem = PurePath(checkpoint.container[0]).stem + "." if checkpoint.container else ""
    return f"{stem}measured-quality.json"


def measured_quality(checkpoint: Checkpoint) -> MeasuredQuality | None:
    """The record of this checkpoint; None without one, on the hub, or where it is of other weights."""
    name = record_name(checkpoint)
    if checkpoint.path is None or not 0 < checkpoint.files.get(name, 0) <= MAX_BYTES:
        return None
    try:
        found = read_record(parse_json((checkpoint.path / name).read_bytes()))
    except (OSError, BadJson):
        return None
    return found if found and found.weight_bytes == checkpoint.weight_bytes else None


def read_record(values: object) -> MeasuredQuality | None:
    """A record from plain data; None where it is none. Further keys do not matter."""
    if not isinstance(values, Mapping):
        return None
    kinds: dict[str, type] = {"float": float, "int": int, "str": str}
    given: dict[str, Any] = {}
    for name, kind in MeasuredQuality.__annotations__.items():
        value = values.get(name)
        value = float(value) if kind == "float" and type(value) is int and abs(value) < 1 << 62 else value
        if type(value) is not kinds[kind] or (isinstance(value, float) and not math.isfinite(value)):
            return None
        given[name] = value
    made = MeasuredQuality(**given)
    return made if made.perplexity > 0 and made.baseline > 0 else None


def record_text(quality: MeasuredQuality) -> str:
    """The record as the text of its file."""
    return json.dumps(quality.to_json(), indent=2, ensure_ascii=False) + "\n"
