"""`quantserve quality` keeps its figures beside the weights and in the model card."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

from helpers.quantized import squeezellm
from helpers.tiny_squeezellm import write_llama
from helpers.tokenizer import write_words
from quantserve.checkpoint import open_checkpoint
from quantserve.checkpoint.quality import measured_quality
from quantserve.cli.main import run

TEXT = " ".join(f"w{number * number % 97}" for number in range(300))


def test_figures_are_kept_and_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out, text = tmp_path / "base", tmp_path / "out", tmp_path / "text.txt"
    write_llama(source, dtype=torch.bfloat16)
    write_words(source, 97)
    text.write_text(TEXT)
    squeezellm(source, out)
    assert measured_quality(open_checkpoint(str(out))) is None
    card = (out / "README.md").read_text()

    asked = ["quality", str(out), "--reference", str(source), "--text", str(text), "--length", "32", "--json"]
    assert run([*asked, "--samples", "4"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = measured_quality(open_checkpoint(str(out)))
    assert found is not None
    assert found.increase == pytest.approx(report["models"][0]["perplexity_ratio"] - 1)
    assert (found.samples, found.length, found.tokens) == (4, 32, 4 * 31)
    assert (found.text, found.reference, found.through) == ("text.txt", "base", "transformers")
    assert found.text_sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    assert found.reference_sha256 == json.loads((out / "quantserve.json").read_text())["source_sha256"]
    assert "Measured on 4 x 32 tokens of text.txt against base" in (out / "README.md").read_text()

    assert run([*asked, "--samples", "6"]) == 0
    again = (out / "README.md").read_text()
    assert "Measured on 6 x 32 tokens" in again
    assert again.count("Measured on") == card.count("Measured on") + 1
    (out / "README.md").write_text("a card of one's own")
    assert run([*asked, "--samples", "4"]) == 0
    assert (out / "README.md").read_text() == "a card of one's own"
    assert not measured_quality(open_checkpoint(str(source)))
    assert sorted(os.listdir(source)) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def test_what_cannot_be_asked_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quality", "m", "--reference", "b", "--dtype", "float32"]) == 2
    assert "--dtype is of --engine" in capsys.readouterr().err
