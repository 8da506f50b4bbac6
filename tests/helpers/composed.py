"""Check one checkpoint folder with the installed plugins, as `quantserve check` does."""

from __future__ import annotations

from pathlib import Path

from quantserve.config import load_object
from quantserve.finding import Finding, Severity
from quantserve.planning.compose import Composition, compose
from quantserve.plugins.registry import Registry
from quantserve.target import find_target


def composed(
    folder: Path, target: str = "a100-80g", ranks: int = 1, *, allow_pickle: bool = False, **engine_kwargs: object
) -> Composition:
    """The composition of a model whose config says no more than this."""
    model = {
        "engine_config": {
            "model_id": "m",
            "hf_model_id": str(folder),
            "engine_kwargs": engine_kwargs,
            "allow_pickle": allow_pickle,
        },
        "scaling_config": {"num_workers": ranks},
    }
    app = load_object({"models": [model]}, "test")
    return compose(app.models[0], Registry.load(), find_target(target))


def errors(composition: Composition) -> dict[str, Finding]:
    """The error findings by code."""
    return {finding.code: finding for finding in composition.findings if finding.severity is Severity.ERROR}


def wrong(folder: Path, target: str = "a100-80g", ranks: int = 1) -> dict[str, Finding]:
    """The errors of a checkpoint by code, apart from those about its tokenizer, which test data has none of."""
    found = errors(composed(folder, target, ranks))
    return {code: finding for code, finding in found.items() if not code.startswith("tokenizer")}


def findings(composition: Composition) -> dict[str, Finding]:
    """All findings by code."""
    return {finding.code: finding for finding in composition.findings}


def text(finding: Finding) -> str:
    """Everything a person reads of a finding."""
    return " | ".join([finding.message, *finding.offenders, finding.fix])
