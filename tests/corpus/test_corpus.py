"""`quantserve check` of public checkpoints of all families finds what vLLM would, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from corpus import entries
from corpus.judge import Row, judge, table
from corpus.patterns import fold, unfold
from quantserve.plugins.registry import Registry

RECOMPUTED = (
    "meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen2.5-7B-Instruct", "google/gemma-2-9b-it", "google/gemma-3-1b-it",
    "microsoft/phi-4", "microsoft/Phi-4-mini-instruct", "CohereForAI/c4ai-command-r-v01", "tiiuae/falcon-7b-instruct",
    "ibm-granite/granite-4.0-h-tiny", "deepseek-ai/DeepSeek-V2-Lite", "bigcode/starcoder", "mosaicml/mpt-7b-chat",
    "LiquidAI/LFM2-2.6B", "Qwen/Qwen2.5-7B-Instruct-AWQ", "internlm/internlm2_5-7b-chat",
)  # fmt: skip
"""Entries whose ``tensors`` and ``vllm`` a test computes anew."""


def cases() -> Iterator[object]:
    for name in entries.names():
        entry = entries.read(name)
        marks = [pytest.mark.slow] if entry.large else []
        for number in range(len(entry.cases)):
            yield pytest.param(name, number, marks=marks, id=f"{name}-{number}")


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.load()


@pytest.fixture(scope="module")
def rows() -> Iterator[list[Row]]:
    """The rows of this run; printed at its end (seen with ``-s``)."""
    kept: list[Row] = []
    yield kept
    print("\n" + table(kept))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"": tmp_path_factory.mktemp("corpus")}


@pytest.mark.parametrize(("name", "number"), cases())
def test_the_judgement(name: str, number: int, registry: Registry, rows: list[Row], folders: dict[str, Path]) -> None:
    entry = entries.read(name)
    if name not in folders:
        folders[name] = entry.write(folders[""] / name)
    row = judge(entry, entry.cases[number], folders[name], registry)
    rows.append(row)
    assert not row.differences


@pytest.mark.vllm
def test_what_vllm_makes_of_a_part_of_the_corpus_is_still_what_is_stored() -> None:
    """The rest takes minutes, and torchvision: ``python -m corpus.build --compare``."""
    command = [sys.executable, "-m", "corpus.build", "--compare", *RECOMPUTED]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_the_corpus_is_large_and_its_refusals_have_reasons() -> None:
    cases = [case for name in entries.names() for case in entries.read(name).cases]
    assert len(entries.names()) >= 80
    refused = [case for case in cases if case.errors]
    assert len(refused) >= 20
    assert all(case.why for case in refused)


def test_tensor_lists_are_folded_without_loss() -> None:
    tensors = entries.read("deepseek-ai/DeepSeek-V2-Lite").tensors
    assert unfold(fold(tensors)) == tensors
    assert fold(
        {"a.0.b.7.c": ("F16", (2,)), "a.0.b.9.c": ("F16", (2,)), "a.3.b.7.c": ("F16", (2,)), "d": ("F32", ())}
    ) == {
        "a.0.b.{7,9}.c": ["F16", [2]],
        "a.3.b.7.c": ["F16", [2]],
        "d": ["F32", []],
    }


def test_the_corpus_is_small_on_disk() -> None:
    assert sum(path.stat().st_size for path in entries.FOLDER.iterdir()) < 1 << 20
