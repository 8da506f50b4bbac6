"""What `profile` and `recommend` share: from MODEL on the command line to advice, and its cells."""

from __future__ import annotations

from typing import Any

from quantserve.config import ModelConfig, load, model_from_source
from quantserve.errors import UsageError
from quantserve.planning.advise import Advice, Candidate, advise
from quantserve.plugins.registry import Registry
from quantserve.predict.machine import ENGINE_NOW
from quantserve.predict.prediction import Prediction
from quantserve.system.homes import expand
from quantserve.target import Target, gib

MOST_USERS = 4096


def model_of(source: str) -> ModelConfig:
    """The one model that MODEL names: a folder with or without weights, its config.json, a hub id, or a model file.

    Raises:
        UsageError: the file holds several models.
        ConfigError: it is none of these.
    """
    path = expand(source)
    if path.name == "config.json" and path.is_file():
        return model_from_source(path.parent)
    models = load([source]).models
    if len(models) > 1:
        names = ", ".join(model.model_id for model in models)
        raise UsageError(f"{source} holds {len(models)} models ({names})\n  fix: name one folder, hub id or model file")
    return models[0]


def advice_for(
    source: str,
    target: Target,
    methods: tuple[str, ...],
    ranks: int | None,
    engine: str = ENGINE_NOW,
    *,
    as_published: bool = False,
) -> Advice:
    """Look at all methods (or those named) for MODEL."""
    return advise(
        model_of(source),
        Registry.load(),
        target,
        methods=methods,
        ranks=ranks,
        engine=engine,
        as_published=as_published,
    )


def integers(text: str, what: str, most: int) -> list[int]:
    """A comma list of whole numbers from 1 to ``most``.

    Raises:
        UsageError: anything else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 10 and 1 <= int(part) <= most for part in parts):
        raise UsageError(f"{what} {text!r}: expected whole numbers from 1 to {most}, with commas: 1,4,16")
    return list(dict.fromkeys(int(part) for part in parts))


def number(value: float) -> str:
    """Three significant digits, thousands with commas."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def within(prediction: Prediction) -> str:
    """The factor by which the truth may be smaller or larger: ``x/÷ 1.35``."""
    return f"x/÷ {1 + prediction.uncertainty:.2f}"


def devices(candidate: Candidate, target: Target) -> str:
    """``4 x a100-80g``."""
    return f"{candidate.ranks} x {target.name}" if candidate.ranks > 1 else target.name


def weights(candidate: Candidate) -> str:
    """Weights of a rank, for people."""
    if candidate.memory is None:
        return "unknown"
    each = gib(candidate.memory.weights_bytes)
    return f"{candidate.ranks} x {each}" if candidate.ranks > 1 else each


def source_of(prediction: Prediction, advice: Advice) -> str:
    """``roofline``, or ``calibration of 2026-11-25``."""
    if prediction.source == "roofline":
        return "roofline"
    from quantserve.predict.calibration import find_calibration

    found = find_calibration(advice.target).calibration
    return f"calibration of {found.date}" if found else "calibration"


def candidate_json(candidate: Candidate) -> dict[str, Any]:
    """What is known of a candidate before anything is predicted."""
    kernel = candidate.made.kernel if candidate.made else None
    return {
        "method": candidate.method.name,
        "bits": candidate.bits,
        "key": candidate.key,
        "tensor_parallel_size": candidate.ranks,
        "in_files": candidate.in_files,
        "refusal": candidate.refusal or None,
        "failed": str(candidate.failure).partition("\n")[0] if candidate.failure else None,
        "memory": candidate.memory.to_json() if candidate.memory else None,
        "kernel": kernel.to_json() if kernel else None,
        "kernel_measured_here": bool(candidate.made and candidate.made.measured),
        "published": candidate.published.to_json() if candidate.published else None,
        "quality": candidate.quality.to_json() if candidate.quality else None,
        "measured_quality": (
            {**candidate.measured.to_json(), "increase": round(candidate.measured.increase, 4)}
            if candidate.measured
            else None
        ),
    }
