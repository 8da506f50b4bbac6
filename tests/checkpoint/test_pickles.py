"""Torch pickles: read without torch, and nothing in them is ever run."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.checkpoints import make_llama
from quantserve.checkpoint import Checkpoint, open_checkpoint
from quantserve.checkpoint.pickles import read_pickle

torch = pytest.importorskip("torch")


def codes(checkpoint: Checkpoint) -> list[str]:
    return [problem.code for problem in checkpoint.problems]


def state_dict() -> dict[str, Any]:
    return {
        "a": torch.zeros(4, 8, dtype=torch.float16),
        "b": torch.zeros(3, dtype=torch.int32),
        "bf": torch.zeros(2, 3, dtype=torch.bfloat16),
        "f8": torch.zeros(5, dtype=torch.float8_e4m3fn),
        "scalar": torch.tensor(3),
        "view": torch.zeros(4, 4)[1:, :2],
        "parameter": torch.nn.Parameter(torch.zeros(2)),
        "sparse_threshold.model.layers.0.mlp.up_proj": 12,
    }


SHAPES = {
    "a": ("F16", (4, 8)), "b": ("I32", (3,)), "bf": ("BF16", (2, 3)), "f8": ("F8_E4M3", (5,)), "scalar": ("I64", ()),
    "view": ("F32", (3, 2)), "parameter": ("F32", (2,)),
}  # fmt: skip


def save(state: Any, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, pickle_protocol=protocol)
    return buffer.getvalue()


def archive(program: bytes, members: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as made:
        made.writestr("x/data.pkl", program)
        for name, data in (members or {}).items():
            made.writestr(name, data)
    return buffer.getvalue()


def read(raw: bytes) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, object], list[str]]:
    begin = time.process_time()
    tensors, other, findings = read_pickle(io.BytesIO(raw), "w.pt")
    assert time.process_time() - begin < 20
    assert all(finding.message.isprintable() for finding in findings)
    return {t.name: (t.dtype, t.shape) for t in tensors.values()}, other, [finding.code for finding in findings]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_state_dict_of_torch(protocol: int) -> None:
    tensors, other, findings = read(save(state_dict(), protocol))
    assert tensors == SHAPES
    assert other == {"sparse_threshold.model.layers.0.mlp.up_proj": 12}
    assert findings == []


def test_module_state_dict() -> None:
    tensors, _, findings = read(save(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8)).state_dict()))
    assert (tensors["0.weight"], len(tensors), findings) == (("F32", (8, 4)), 4, [])


def test_folder_of_pickles(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "sq-w4-s0.pt").write_bytes(save(state_dict()))
    refused = open_checkpoint(str(folder))
    assert codes(refused) == ["pickle-weights"]
    assert refused.problems[0].severity == "error"
    assert "allow_pickle" in refused.problems[0].fix
    assert refused.tensors == {}
    allowed = open_checkpoint(str(folder), allow_pickle=True)
    assert codes(allowed) == ["pickle-allowed"]
    assert {t.name: (t.dtype, t.shape) for t in allowed.tensors.values()} == SHAPES
    (folder / "pytorch_model.bin").write_bytes(save({"only": torch.zeros(1)}))
    assert list(open_checkpoint(str(folder), allow_pickle=True).tensors) == ["only"]  # *.bin hides *.pt, as in vLLM


def test_sharded_pickles(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    (folder / names[0]).write_bytes(save({"a": torch.zeros(1)}))
    assert codes(open_checkpoint(str(folder), allow_pickle=True)) == ["pickle-allowed", "shard-missing"]
    (folder / "pytorch_model.bin.index.json").write_text(f'{{"weight_map": {{"a": "{names[0]}", "b": "{names[1]}"}}}}')
    assert codes(open_checkpoint(str(folder), allow_pickle=True)) == ["pickle-allowed", "shard-missing"]
    (folder / names[1]).write_bytes(save({"a": torch.zeros(1)}))
    assert codes(open_checkpoint(str(folder), allow_pickle=True)) == ["pickle-allowed", "duplicate-tensor"]


def test_no_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "w.pt").write_bytes(save(state_dict()))
    program = (
        "import sys; from quantserve.checkpoint import open_checkpoint;"
        "assert len(open_checkpoint(sys.argv[1], allow_pickle=True).tensors) == 7; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# --- hostile files ----------------------------------------------------------------------------------------------------


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize("function", [os.system, exec, eval, __import__, getattr, subprocess.check_output])
def test_nothing_is_run(tmp_path: Path, function: Any, protocol: int) -> None:
    witness = tmp_path / "ran"
    program = pickle.dumps({"w": 1, "x": Evil(function, f"touch {witness}")}, protocol)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "w.pt").write_bytes(archive(program))
    checkpoint = open_checkpoint(str(tmp_path), allow_pickle=True)
    problem = next(problem for problem in checkpoint.problems if problem.code == "pickle-unsafe")
    assert problem.severity == "error"
    assert function.__name__ in problem.message
    assert checkpoint.tensors == {}
    assert not witness.exists()
    if function is os.system:  # the witness works: Python itself runs it
        pickle.loads(program)
        assert witness.exists()


def test_classes_are_named() -> None:
    _, _, findings = read(save(torch.nn.Linear(2, 2)))
    assert findings == ["pickle-unsafe"]


HOSTILE = {
    "memo index of 2^31": b"\x80\x02}r\xff\xff\xff\x7f.",
    "string of 2^62 bytes": b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"x.",
    "no end": b"\x80\x02}",
    "empty": b"",
    "pop of nothing": b"0.",
    "stray mark": b"(.",
    "get of nothing": b"\x80\x02h\x05.",
    "items without mark": b"}u.",
    "odd items": b"}(K\x01u.",
    "item of a number": b"K\x01K\x01K\x01s.",
    "list as key": b"}]K\x01s.",
    "deep tuple as key": b"}" + b"K\x01" + b"\x85" * 400_000 + b"K\x01s.",
    "deep list": b"]" * 300_000 + b"a" * 299_999 + b".",
    "list in itself": b"](h\x00e.".replace(b"](", b"]q\x00("),
    "extension": b"\x82\x01.",
    "endless integer": b"I" + b"9" * 10_000 + b"\n.",
    "storage of no type": b"}X\x01\x00\x00\x00w(X\x07\x00\x00\x00storageK\x01K\x01K\x01K\x01tQs.",
    "tensor of nothing": b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "ordered dict of numbers": b"ccollections\nOrderedDict\n(](K\x01K\x02etR.",
    "global that is no name": b"\x80\x04K\x01K\x02\x93.",
    "binary noise": bytes(range(256)),
}


@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_programs(program: bytes) -> None:
    tensors, _, findings = read(archive(program))
    assert tensors == {}
    assert findings in (["pickle-invalid"], ["pickle-unsafe"])


def test_more_instructions_than_any_model_needs() -> None:
    assert read(archive(b"\x80\x02" + b"N0" * 2_600_000 + b"}."))[2] == ["pickle-invalid"]


def test_archives_that_lie() -> None:
    assert read(archive(b"\0" * (70 * 2**20), compression=zipfile.ZIP_DEFLATED))[2] == ["pickle-invalid"]
    assert read(archive(b"}.", {"y/data.pkl": b"}."}))[2] == ["pickle-invalid"]
    good = save(state_dict())
    assert read(good[:-40])[2] == ["pickle-invalid"]
    assert read(good[: len(good) // 2])[2] == ["pickle-invalid"]
    assert read(b"PK\x03\x04")[2] == ["pickle-invalid"]
    assert read(b"")[2] == read(b"nonsense")[2] == ["pickle-legacy"]
    assert read(b"version https://git-lfs.github.com/spec/v1\n")[2] == ["lfs-pointer"]
    assert read(archive(pickle.dumps([1, 2])))[2] == ["pickle-invalid"]
    assert read(archive(pickle.dumps({"state_dict": {"a": 1}})))[2] == ["pickle-invalid"]


def test_old_format() -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(1)}, buffer, _use_new_zipfile_serialization=False)
    assert read(buffer.getvalue())[2] == ["pickle-legacy"]


def test_data_that_are_missing() -> None:
    with zipfile.ZipFile(io.BytesIO(save({"a": torch.zeros(100), "b": torch.zeros(100)}))) as good:
        members = {name: good.read(name) for name in good.namelist()}
    prefix = next(iter(members)).partition("/")[0]
    program = members.pop(f"{prefix}/data.pkl")
    members = {"x" + name.removeprefix(prefix): data for name, data in members.items()}
    assert read(archive(program, members))[2] == []
    assert read(archive(program, members | {"x/data/0": b"short"}))[2] == ["file-truncated"]
    del members["x/data/1"]
    tensors, _, findings = read(archive(program, members))
    assert findings == ["file-truncated"]
    assert set(tensors) == {"a", "b"}


def test_tensor_larger_than_its_storage() -> None:
    raw = save({"a": torch.zeros(100)})
    with zipfile.ZipFile(io.BytesIO(raw)) as good:
        program = next(good.read(name) for name in good.namelist() if name.endswith("data.pkl"))
    assert b"Kd\x85" in program  # the shape, (100,)
    assert read(archive(program.replace(b"Kd\x85", b"J\x00\x00\x00\x7f\x85")))[2] == ["pickle-invalid"]


REAL = save(state_dict())
with zipfile.ZipFile(io.BytesIO(REAL)) as _good:
    PROGRAM = next(_good.read(name) for name in _good.namelist() if name.endswith("data.pkl"))


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, len(PROGRAM)), st.binary(max_size=3)), min_size=1, max_size=5))
def test_mutated_programs(changes: list[tuple[int, bytes]]) -> None:
    program = bytearray(PROGRAM)
    for at, new in changes:
        program[at : at + len(new)] = new
    read(archive(bytes(program)))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(REAL)), st.binary(max_size=4)), max_size=5), st.integers(0, len(REAL)))
def test_mutated_archives(changes: list[tuple[int, bytes]], cut: int) -> None:
    raw = bytearray(REAL)
    for at, new in changes:
        raw[at : at + len(new)] = new
    read(bytes(raw[: cut if len(changes) == 5 else len(raw)]))
