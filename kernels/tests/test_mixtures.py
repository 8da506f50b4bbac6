"""Real engines with mixtures of experts, against transformers on the weights that the files mean, in float32.

Mixtral in AWQ, whose experts vLLM cannot serve on CPUs without AMX; Qwen3-MoE in a format with tensors for each expert,
compiled; gpt-oss in one with tensors for all experts of a layer, biases and its own activation.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("vllm")
pytest.importorskip("transformers")
pytest.importorskip("quantserve")

import torch
import transformers

from mixtures import FAMILIES, write

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROMPTS = [[5, 17, 333, 42, 99], [2, 400, 401, 7, 8, 250, 64, 3, 129]]
OPTIONS: dict[str, dict[str, Any]] = {
    "mixtral": {"dtype": "float16", "enforce_eager": True},
    "qwen3_moe": {"dtype": "float32"},
    "gpt_oss": {"dtype": "bfloat16", "enforce_eager": True},
}
CLEAR = {"float16": (0.05, 0.03), "float32": (1e-3, 1e-3), "bfloat16": (0.4, 0.3)}
"""By dtype: the difference of two logits that decides, and of log-probabilities that is allowed."""


@pytest.fixture(scope="module")
def plain_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Checkpoints, quantized and plain."""
    folder = tmp_path_factory.mktemp("mixtures")
    return {family: write(folder / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def generated(
    plain_models: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[tuple[list[int], list[float]]]]:
    """Greedy tokens of all models and their log-probabilities; one process starts the engines, one after the other."""
    out = tmp_path_factory.mktemp("engines") / "out.json"
    models = {family: {"model": str(paths[0]), **OPTIONS[family]} for family, paths in plain_models.items()}
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).parent / "mixtures_main.py"),
            json.dumps({"models": models, "prompts": PROMPTS, "out": str(out)}),
        ],
        capture_output=True,
        text=True,
        timeout=500,
        env={
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_DISABLED_KERNELS": "CPUWNA16LinearKernel,ZentorchWNA16LinearKernel",
            "VLLM_PLUGINS": "none",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        },
    )
    if done.returncode != 0 or not out.exists():
        raise RuntimeError(f"engines failed with {done.returncode}:\n{done.stdout[-20000:]}\n{done.stderr[-20000:]}")
    found: dict[str, list[tuple[list[int], list[float]]]] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_transformers(
    family: str,
    plain_models: dict[str, tuple[Path, Path]],
    generated: dict[str, list[tuple[list[int], list[float]]]],
) -> None:
    """Every token is the reference's wherever its two best logits are clearly apart. The reference continues the
    engine's own text, so every position counts."""
    clear, allowed = CLEAR[OPTIONS[family]["dtype"]]
    model = transformers.AutoModelForCausalLM.from_pretrained(plain_models[family][1], dtype=torch.float32)
    checked = total = 0
    for prompt, (tokens, logprobs) in zip(PROMPTS, generated[family], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        best = logits.topk(2)
        sure = best.values[:, 0] - best.values[:, 1] > clear
        found = torch.tensor(tokens)
        assert torch.equal(found[sure], best.indices[:, 0][sure])
        expected = logits.log_softmax(-1).gather(1, found[:, None])[:, 0]
        assert (expected - torch.tensor(logprobs)).abs().max() < allowed
        checked, total = checked + int(sure.sum()), total + len(tokens)
    assert checked > total / 2, f"only {checked} of {total} positions are clear; the comparison says little"
