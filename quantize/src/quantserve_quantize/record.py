"""A measurement kept beside the weights it is of, where `recommend` and a server read it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantserve.checkpoint import Checkpoint, open_checkpoint
from quantserve.checkpoint.quality import MeasuredQuality, measured_quality, record_name, record_text
from quantserve.cli.convert_command import local_path
from quantserve.plugins.registry import Registry
from quantserve_quantize.card import card
from quantserve_quantize.draft import write_whole


def opened(model: str) -> Checkpoint:
    """The headers of a folder, a file that a plugin reads, or a hub id, which is downloaded."""
    return open_checkpoint(str(local_path(model)), readers=Registry.load().readers)


def keep(report: Mapping[str, Any], model: Mapping[str, Any]) -> Path | None:
    """Write the record of one model of a report, and its figures into its model card.

    Returns:
        The record's file; None for a model of the hub, which is not written to.

    Raises:
        OSError: the folder cannot be written.
    """
    if not Path(model["model"]).expanduser().exists():
        return None
    checkpoint = opened(model["model"])
    assert checkpoint.path is not None
    reference = report["reference"]
    record = MeasuredQuality(
        perplexity=model["perplexity"],
        baseline=reference["perplexity"],
        kl_mean=model["kl_mean"],
        same_top=model["same_top"],
        tokens=model["tokens"],
        samples=report["samples"],
        length=report["length"],
        text=Path(report["text"]).name,
        text_sha256=report["text_sha256"],
        reference=Path(reference["model"]).name,
        reference_sha256=reference["sha256"],
        weights_sha256=model["sha256"],
        weight_bytes=checkpoint.weight_bytes,
        through=report["through"],
        date=datetime.date.today().isoformat(),
    )
    before = measured_quality(checkpoint)
    path = checkpoint.path / record_name(checkpoint)
    write_whole(path, record_text(record))
    _into_card(checkpoint.path, before, record)
    return path


def _into_card(folder: Path, before: MeasuredQuality | None, now: MeasuredQuality) -> None:
    """Only where the card is as `quantize` or an earlier measurement left it."""
    provenance, readme = folder / "quantserve.json", folder / "README.md"
    if not (provenance.is_file() and readme.is_file()):
        return
    made = json.loads(provenance.read_text(encoding="utf-8"))
    if readme.read_text(encoding="utf-8") == card(made, before):
        write_whole(readme, card(made, now))
