"""Architectures that this machine's vLLM cannot import for want of a package are refused, with how to install it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.checkpoints import make_llama
from quantserve.checkpoint import open_checkpoint
from quantserve.checks import packages
from quantserve.checks.packages import NEEDS, check_packages, how_to_install
from quantserve.config import ModelConfig
from quantserve.finding import Finding, Severity
from quantserve.target import Target, find_target

SCRIPT = Path(__file__).parents[2] / "scripts" / "multimodal_needs.py"

Check = Callable[..., list[Finding]]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Findings about an architecture on a machine with some packages."""
    checkpoint = open_checkpoint(str(make_llama(tmp_path / "m")))

    def found(architecture: str, *installed: str, target: Target | None = None, **kwargs: object) -> list[Finding]:
        monkeypatch.setattr(packages, "find_spec", lambda name: name in installed or None)
        one = replace(checkpoint, config={**checkpoint.config, "architectures": [architecture]})
        model = ModelConfig.model_validate({"engine_config": {"model_id": "m", "engine_kwargs": kwargs}})
        return list(check_packages(one, model, target or find_target("cpu")))

    return found


@pytest.mark.parametrize("package", NEEDS)
def test_a_model_class_that_cannot_be_imported(package: str, check: Check) -> None:
    architecture = sorted(NEEDS[package])[0]
    (finding,) = check(architecture, "vllm")
    assert (finding.severity, finding.code) == (Severity.ERROR, "package-missing")
    assert package in finding.message
    assert f"pip install '{package}" in finding.fix or f"pip install {package}" in finding.fix
    assert check(architecture, "vllm", package) == []


def test_settings_that_leave_images_out_do_not_help(check: Check) -> None:
    for kwargs in ({"limit_mm_per_prompt": {"image": 0, "video": 0}}, {"language_model_only": True}):
        assert check("Qwen2_5_VLForConditionalGeneration", "vllm", **kwargs) != []
    assert check("Qwen2_5_VLForConditionalGeneration", "vllm", model_impl="transformers") == []


def test_other_models_and_machines(check: Check) -> None:
    assert check("LlamaForCausalLM", "vllm") == []
    assert check("PaliGemmaForConditionalGeneration", "vllm") == []
    assert check("Qwen2_5_VLForConditionalGeneration") == []  # no vLLM here: this machine only checks
    assert check("Qwen2_5_VLForConditionalGeneration", "vllm", target=find_target("l4")) == []


@pytest.mark.parametrize(
    ("torch", "expected"),
    [
        ("2.13.0+cpu", "pip install 'torchvision==0.28.*' --index-url https://download.pytorch.org/whl/cpu"),
        ("2.9.1", "pip install 'torchvision==0.24.*', the build for torch 2.9.1"),
    ],
)
def test_the_build_that_fits_torch(torch: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "version", lambda name: torch)
    assert how_to_install("torchvision").startswith(expected)


@pytest.mark.slow
@pytest.mark.vllm
def test_the_architectures_are_those_of_the_installed_vllm() -> None:
    pytest.importorskip("vllm")
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=600, check=True)
    assert json.loads(done.stdout) == {package: sorted(names) for package, names in NEEDS.items()}
