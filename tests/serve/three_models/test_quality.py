"""`quantserve quality --url`: log-probabilities of a running server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantserve.cli.main import run

from ..server import DEMO, KEY, Server

pytestmark = [pytest.mark.ray, pytest.mark.vllm]


def test_models_of_a_server_are_compared(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTSERVE_API_KEY", KEY)
    tokenizer: Path = DEMO / "checkpoint"
    models = ["org/demo-awq", "demo-fp16"]
    options = ["--url", server.base, "--tokenizer", str(tokenizer), "--length", "64", "--samples", "2", "--json"]
    assert run(["quality", *models, "--reference", "demo-fp16", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    quantized, itself = report["models"]
    assert report["through"] == "server"
    assert quantized["tokens"] == itself["tokens"] == 2 * 63
    assert quantized["kl_mean"] > 0.01
    assert 0.3 < quantized["same_top"] < 1
    assert itself["kl_mean"] < quantized["kl_mean"] / 5
    assert itself["perplexity_ratio"] == pytest.approx(1, abs=0.02)
    assert run(["quality", "nobody", "--reference", "demo-fp16", *options]) == 2
    assert "nobody" in capsys.readouterr().err
