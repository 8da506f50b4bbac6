"""What a checkpoint may cost to read, all its files together."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from quantserve.checkpoint import Checkpoint, open_checkpoint, weights


def folder(path: Path, **files: bytes | str) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    for name, content in files.items():
        (path / name.replace("__", ".")).write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def codes(checkpoint: Checkpoint) -> list[str]:
    return [problem.code for problem in checkpoint.problems]


def shard(prefix: str, tensors: int, metadata: str = "") -> bytes:
    header: dict[str, object] = {"__metadata__": {"x": metadata}} if metadata else {}
    header |= {f"{prefix}{i}": {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]} for i in range(tensors)}
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw


def test_tensors_of_all_shards_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = folder(tmp_path / "m", **{f"{n}__safetensors": shard(n, 40) for n in "abcd"})
    assert "checkpoint-too-large" not in codes(open_checkpoint(str(model)))
    monkeypatch.setattr(weights, "MAX_TENSORS", 100)
    checkpoint = open_checkpoint(str(model))
    assert codes(checkpoint).count("checkpoint-too-large") == 1
    assert len(checkpoint.tensors) == 120
    assert not checkpoint.tensors_complete


def test_headers_of_all_shards_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = folder(tmp_path / "m", **{f"{n}__safetensors": shard(n, 1, "m" * 10_000) for n in "abcd"})
    monkeypatch.setattr(weights, "MAX_HEADERS", 25_000)
    checkpoint = open_checkpoint(str(model))
    assert codes(checkpoint).count("checkpoint-too-large") == 1
    assert set(checkpoint.tensors) == {"a0", "b0", "c0"}


def test_headers_that_cannot_be_read_count_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = (20_000).to_bytes(8, "little") + b"[" * 20_000
    model = folder(tmp_path / "m", **{f"{n}__safetensors": broken for n in "abcd"})
    monkeypatch.setattr(weights, "MAX_HEADERS", 25_000)
    assert codes(open_checkpoint(str(model))).count("header-invalid") == 2


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    model = folder(tmp_path / "m", **{f"{n}__{suffix}": shard("a", 1) for n in range(12)})  # type: ignore[arg-type]
    monkeypatch.setattr(weights, "MAX_FILES", 11)
    checkpoint = open_checkpoint(str(model), allow_pickle=True)
    (problem,) = [problem for problem in checkpoint.problems if problem.code == "checkpoint-too-large"]
    assert "12 weight files, the limit is 11" in problem.message
    assert checkpoint.tensors == {}


def test_entries_of_the_index_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = json.dumps({"weight_map": {f"a{i}": "a.safetensors" for i in range(12)}})
    model = folder(tmp_path / "m", a__safetensors=shard("a", 12))
    (model / "model.safetensors.index.json").write_text(index)
    assert "index-invalid" not in codes(open_checkpoint(str(model)))
    monkeypatch.setattr(weights, "MAX_TENSORS", 11)
    assert "index-invalid" in codes(open_checkpoint(str(model)))


def test_an_index_of_many_files_that_are_not_there_is_quick(tmp_path: Path) -> None:
    """Seen before: every file named was searched for in the list of those that are there, and of those that are not."""
    index = json.dumps({"weight_map": {f"{i}": f"{'../' if i % 2 else ''}{i}.safetensors" for i in range(100_000)}})
    model = folder(tmp_path / "m", **{f"{n}__safetensors": shard("a", 0) for n in range(100)})  # type: ignore[arg-type]
    (model / "model.safetensors.index.json").write_text(index)
    begin = time.process_time()
    found = codes(open_checkpoint(str(model)))
    assert time.process_time() - begin < 5
    assert {"path-escape", "shard-missing"} <= set(found)


def test_numbered_names_that_claim_a_million_files_are_quick(tmp_path: Path) -> None:
    names = {f"m{i}-00000-of-999999__safetensors": shard("a", 0) for i in range(300)}
    begin = time.process_time()
    found = codes(open_checkpoint(str(folder(tmp_path / "m", **names))))  # type: ignore[arg-type]
    assert time.process_time() - begin < 3
    assert found.count("shard-missing") == 300


def test_json_of_many_brackets_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    many = b'{"a":[' + b"[]," * 8_100_000 + b"0]}"
    model = folder(tmp_path / "m", a__safetensors=len(many).to_bytes(8, "little") + many)
    (model / "tokenizer.json").write_bytes(many)
    begin = time.process_time()
    problems = [p.message for p in open_checkpoint(str(model)).problems if "brackets" in p.message]
    assert len(problems) == 2
    assert time.process_time() - begin < 2


def test_weights_only_in_pth_files_are_named(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", consolidated_00__pth=b"PK")
    (problem,) = [p for p in open_checkpoint(str(model)).problems if p.code == "weights-missing"]
    assert "*.pth" in problem.message
