"""Torch pickles: read without torch, and nothing in them is ever run."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

import fuzzing
from fuzzing import pickles as fuzzing_pickles
from helpers.checkpoints import make_llama
from quantserve.checkpoint import Checkpoint, open_checkpoint
from quantserve.checkpoint.pickle_machine import MAX_STEPS, Budget
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
        made.writestr("x/version", "3\n")
        for name, data in (members or {}).items():
            made.writestr(name, data)
    return buffer.getvalue()


def read(raw: bytes) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, object], list[str]]:
    begin = time.process_time()
    tensors, other, findings = read_pickle(io.BytesIO(raw), "w.pt")
    assert time.process_time() - begin < 20
    assert all(finding.message.isprintable() for finding in findings)
    return {t.name: (t.dtype, t.shape) for t in tensors.values()}, other, [finding.code for finding in findings]


@pytest.mark.parametrize("protocol", [2, 3])
def test_state_dict_of_torch(protocol: int) -> None:
    tensors, other, findings = read(save(state_dict(), protocol))
    assert tensors == SHAPES
    assert other == {"sparse_threshold.model.layers.0.mlp.up_proj": 12}
    assert findings == []


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [1, 4, 5])
def test_protocols_that_weights_only_does_not_read(protocol: int) -> None:
    raw = save(state_dict(), protocol)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(raw), weights_only=True)
    _, _, (finding,) = read_pickle(io.BytesIO(raw), "w.pt")
    assert finding.code == "pickle-invalid"
    assert "pickle_protocol=2" in finding.fix


def test_file_without_checksums() -> None:
    torch.serialization.set_crc32_options(False)
    try:
        raw = save(state_dict())
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.load(io.BytesIO(raw), weights_only=True).keys() == state_dict().keys()
    assert read(raw)[2] == []


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
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=300)
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


def test_archives_that_lie() -> None:
    assert read(archive(b"\0" * (70 * 2**20), compression=zipfile.ZIP_DEFLATED))[2] == ["pickle-invalid"]
    assert read(archive(b"}.", {"y/data.pkl": b"}."}))[2] == ["pickle-invalid"]
    good = save(state_dict())
    assert read(good[:-40])[2] == ["pickle-invalid"]
    assert read(good[: len(good) // 2])[2] == ["pickle-invalid"]
    assert read(b"PK\x03\x04")[2] == ["pickle-invalid"]
    assert read(b"")[2] == read(b"nonsense")[2] == ["pickle-invalid"]
    assert read(b"version https://git-lfs.github.com/spec/v1\n")[2] == ["lfs-pointer"]
    assert read(archive(pickle.dumps([1, 2])))[2] == ["pickle-invalid"]
    assert read(archive(pickle.dumps({"state_dict": {"a": 1}})))[2] == ["pickle-invalid"]


@pytest.mark.parametrize("start", [b"<!DOCTYPE html>", b"GGUF\3\0\0\0", b"\x89HDF\r\n", b"\x1f\x8b\x08", b"\x93NUMPY"])
def test_files_that_are_no_torch_files(start: bytes) -> None:
    _, _, (finding,) = read_pickle(io.BytesIO(start + bytes(100)), "pytorch_model.bin")
    assert finding.code == "pickle-invalid"
    assert "no torch file: it begins with" in finding.message
    assert finding.fix == "download the file again"


@pytest.mark.parametrize(
    "version", [b"3", b"3\n", b" 1", b"+10", b"3x", b"", b"0", b"0x3", b"-1", b"11", b"x", b"9" * 30, b"9" * 5000]
)
def test_the_version_of_the_format_is_read_as_torch_reads_it(version: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(save({"a": torch.zeros(2)}))) as good:
        members = {name: good.read(name) for name in good.namelist()}
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as changed:
        for name, data in members.items():
            changed.writestr(name, version if name.endswith("/version") else data)
    try:
        torch.load(io.BytesIO(raw.getvalue()), weights_only=True)
        expected = []
    except (RuntimeError, IndexError, ValueError):
        expected = ["pickle-invalid"]
    assert read(raw.getvalue())[2] == expected


def test_old_format() -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(1)}, buffer, _use_new_zipfile_serialization=False)
    assert read(buffer.getvalue())[2] == ["pickle-legacy"]


def test_data_that_are_missing() -> None:
    with zipfile.ZipFile(io.BytesIO(save({"a": torch.zeros(100), "b": torch.zeros(100)}))) as good:
        members = {name: good.read(name) for name in good.namelist()}
    prefix = next(iter(members)).partition("/")[0]
    program = members.pop(f"{prefix}/data.pkl")
    members = {"x" + name.removeprefix(prefix): data for name, data in members.items() if "version" not in name}
    assert read(archive(program, members))[2] == []
    assert read(archive(program, members | {"x/data/0": b"short"}))[2] == ["file-truncated"]
    assert read(archive(program, members | {"x/data/0": bytes(401)}))[2] == ["pickle-invalid"]
    assert read(archive(program, members | {"x/data/0": bytes(399), "x/data/1": bytes(401)}))[2] == [
        "file-truncated",
        "pickle-invalid",
    ]
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


# --- files that readers of archives read differently ------------------------------------------------------------------


def two_programs(first: str, second: str) -> bytes:
    """A file with a harmless program and one that would run a command."""
    with zipfile.ZipFile(io.BytesIO(save({"a": torch.zeros(4)}))) as good:
        members = [(name.partition("/")[2], good.read(name)) for name in good.namelist()]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for name, data in members:
            if name == "data.pkl":
                made.writestr(first, data)
                made.writestr(second, pickle.dumps({"a": Evil(os.system, "true")}, 2))
            else:
                made.writestr(f"x/{name}", data)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "names", [("x/data.pkl", "x/DATA.PKL"), ("x/DATA.pkl", "x/data.pkl"), ("x/data.pkl", "x/data.pkl")]
)
def test_two_members_that_are_one_to_torch(names: tuple[str, str]) -> None:
    _, _, (finding,) = read_pickle(io.BytesIO(two_programs(*names)), "w.bin")
    assert finding.code == "pickle-invalid"
    assert "two members" in finding.message


def test_members_of_two_folders() -> None:
    raw = two_programs("x/data.pkl", "y/data.pkl")
    with pytest.raises(RuntimeError):
        torch.load(io.BytesIO(raw), weights_only=True)
    assert read(raw)[2] == ["pickle-invalid"]


def directories(raw: bytes) -> tuple[bytes, bytes, bytes]:
    """An archive without zip64: members, directory, end record."""
    length, start = struct.unpack_from("<2L", raw, len(raw) - 10)
    return raw[:start], raw[start : start + length], raw[-22:]


def end_record(count: int, length: int, start: int, *, disk: int = 0, comment: bytes = b"") -> bytes:
    return struct.pack("<4s4H2LH", b"PK\5\6", disk, 0, count, count, length, start, len(comment)) + comment


PLAIN = archive(PLAIN_PROGRAM := b"\x80\x02}X\x01\x00\x00\x00aK\x01s.")
MEMBERS, DIRECTORY, END = directories(PLAIN)


def test_plain_archive_is_read() -> None:
    """The base of the next test: what is refused there is refused for the archive, not for having no tensors."""
    assert MEMBERS + DIRECTORY + end_record(2, len(DIRECTORY), len(MEMBERS)) == PLAIN
    for raw in (PLAIN, PLAIN[:-22] + end_record(2, len(DIRECTORY), len(MEMBERS), comment=b"PK\5\6 made by hand")):
        _, _, (finding,) = read_pickle(io.BytesIO(raw), "w.bin")
        assert "no tensors" in finding.message


def with_flag(at: int, value: bytes) -> bytes:
    changed = DIRECTORY[:at] + value + DIRECTORY[at + len(value) :]
    return MEMBERS + changed + END


ODD = {
    "something before the archive": b"PK\3\4" + PLAIN,
    "directory elsewhere": MEMBERS + DIRECTORY + DIRECTORY + END,
    "directory begins later": MEMBERS + DIRECTORY + end_record(2, len(DIRECTORY), len(MEMBERS) + 1),
    "gap after the directory": MEMBERS + DIRECTORY + b"\0" * 8 + END,
    "fewer entries than there are": MEMBERS + DIRECTORY + end_record(1, len(DIRECTORY), len(MEMBERS)),
    "more entries than there are": MEMBERS + DIRECTORY + end_record(3, len(DIRECTORY), len(MEMBERS)),
    "part of several": MEMBERS + DIRECTORY + end_record(2, len(DIRECTORY), len(MEMBERS), disk=1),
    "encrypted": with_flag(8, b"\1"),
    "packed with LZMA": with_flag(10, b"\x0e"),
    "stored in another size": with_flag(20, b"\1"),
    "offset of another member": with_flag(42, struct.pack("<L", MEMBERS.rindex(b"PK\3\4"))),
    "offset outside": with_flag(42, struct.pack("<L", 2**31)),
    "sizes of zip64 without its field": with_flag(20, b"\xff" * 8),
    "null byte in a name": PLAIN.replace(b"x/version", b"x/versi\0n"),
    "no folder": PLAIN.replace(b"x/data.pkl", b"x_data.pkl").replace(b"x/version", b"x_version"),
    "no version": PLAIN.replace(b"x/version", b"x/vrosion"),
    "TorchScript": archive(PLAIN_PROGRAM, {"x/constants.pkl": b"\x80\x02).."}),
    "zip64 record elsewhere": MEMBERS + DIRECTORY + struct.pack("<4sLQL", b"PK\6\7", 0, 0, 1) + END,
    "directory of 4 GB": MEMBERS + DIRECTORY + end_record(2, 2**32 - 2, 0),
    "data.pkl of 4 GB": with_flag(20, struct.pack("<2L", 2**32 - 2, 2**32 - 2)),
}


@pytest.mark.parametrize("raw", ODD.values(), ids=ODD)
def test_odd_archives_are_refused(raw: bytes) -> None:
    _, _, (finding,) = read_pickle(io.BytesIO(raw), "w.bin")
    assert finding.code == "pickle-invalid"
    assert "no tensors" not in finding.message


def test_packed_program_is_read() -> None:
    assert "no tensors" in read_pickle(io.BytesIO(archive(PLAIN_PROGRAM, compression=8)), "w.bin")[2][0].message
    bomb = archive(b"\0" * 2**20, compression=8)
    at = bomb.index(struct.pack("<L", 2**20), bomb.rindex(b"PK\1\2", 0, bomb.rindex(b"PK\1\2")))
    smaller = bomb[:at] + struct.pack("<L", 2**10) + bomb[at + 4 :]
    assert "another size" in read_pickle(io.BytesIO(smaller), "w.bin")[2][0].message


# --- programs that make torch load something else ---------------------------------------------------------------------


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def stored(kind: str, count: int, key: str = "0") -> bytes:
    return b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + bytes([75, count]) + b"tQ"


def tensor(storage: bytes, size: int, function: str = "_rebuild_tensor_v2", more: bytes = b"") -> bytes:
    end = b"(K\x01t\x89ccollections\nOrderedDict\n)R" + more + b"tR"
    return f"ctorch._utils\n{function}\n(".encode() + storage + b"K\x00(" + bytes([75, size]) + b"t" + end


def loaded(program: bytes, sizes: dict[str, int]) -> tuple[Any, Any]:
    """What the reader says and what torch loads: names, dtypes, shapes; None where it is refused."""
    raw = archive(program, {f"x/data/{key}": bytes(size) for key, size in sizes.items()})
    tensors, _, findings = read(raw)
    try:
        made = torch.load(io.BytesIO(raw), weights_only=True)
    except Exception:
        made = None
    torchs = made and {name: (str(t.dtype), tuple(t.shape)) for name, t in made.items() if isinstance(t, torch.Tensor)}
    names = {"F32": "torch.float32", "I8": "torch.int8", "F16": "torch.float16", "U8": "torch.uint8"}
    return (None if findings else {name: (names[dtype], shape) for name, (dtype, shape) in tensors.items()}), torchs


A, B = text("a"), text("b")
FLOATS = tensor(stored("FloatStorage", 4), 4)
FLOATS_2 = tensor(stored("FloatStorage", 8, "1"), 8)


def test_one_storage_with_two_types() -> None:
    program = b"\x80\x02}" + A + FLOATS + b"s" + B + tensor(stored("CharStorage", 16), 4) + b"s."
    ours, torchs = loaded(program, {"0": 16})
    assert ours == torchs == {"a": ("torch.float32", (4,)), "b": ("torch.float32", (4,))}


def test_the_seventh_argument_is_a_dtype_only_in_version_3() -> None:
    half = b"ctorch\nfloat16\n"
    v3 = b"\x80\x02}" + A + tensor(stored("ByteStorage", 16), 8, "_rebuild_tensor_v3", half) + b"s."
    ours, torchs = loaded(v3, {"0": 16})
    assert ours == torchs == {"a": ("torch.float16", (8,))}
    assert loaded(b"\x80\x02}" + A + tensor(stored("ByteStorage", 16), 8, "_rebuild_tensor_v3") + b"s.", {"0": 16}) == (
        None,
        None,
    )


STATES = {
    "tensor set to another storage": FLOATS + b"(" + stored("FloatStorage", 8, "1") + b"K\x00(K\x08t(K\x01ttb",
    "parameter with other data": b"ctorch._utils\n_rebuild_parameter_with_state\n(" + FLOATS
    + b"\x89ccollections\nOrderedDict\n)R}" + text("data") + FLOATS_2 + b"stR",
}  # fmt: skip


@pytest.mark.parametrize("value", STATES.values(), ids=STATES)
def test_states_that_replace_a_tensor(value: bytes) -> None:
    ours, torchs = loaded(b"\x80\x02}" + A + value + b"s.", {"0": 16, "1": 32})
    assert torchs == {"a": ("torch.float32", (8,))}  # not the four that the tensor was made of
    assert ours is None


def test_a_state_that_hides_the_items() -> None:
    program = (
        b"\x80\x02ccollections\nOrderedDict\n)R"
        + A
        + FLOATS
        + b"s}"
        + text("items")
        + b"ccollections\nOrderedDict\nsb."
    )
    assert loaded(program, {"0": 16}) == (None, {})  # what vLLM would load: nothing
    metadata = b"\x80\x02ccollections\nOrderedDict\n)R" + A + FLOATS + b"s}" + text("_metadata") + b"}sb."
    ours, torchs = loaded(metadata, {"0": 16})
    assert ours == torchs == {"a": ("torch.float32", (4,))}


def test_what_a_call_gives_is_what_torch_makes() -> None:
    """A tensor in torch.Size is no tensor any more; one in a parameter is."""
    size = b"ctorch\nSize\n(" + tensor(stored("LongStorage", 0), 0) + b"tR"
    ours, torchs = loaded(b"\x80\x02}" + A + size + b"s" + B + FLOATS_2 + b"s.", {"0": 0, "1": 32})
    assert torchs == {"b": ("torch.float32", (8,))}
    assert ours in (torchs, None)
    parameter = b"ctorch._utils\n_rebuild_parameter\n(" + FLOATS + b"\x89ccollections\nOrderedDict\n)RtR"
    ours, torchs = loaded(b"\x80\x02}" + A + parameter + b"s.", {"0": 16})
    assert ours == torchs == {"a": ("torch.float32", (4,))}


def test_names_of_python_2_are_utf_8() -> None:
    ours, torchs = loaded(b"\x80\x02}U\x02\xc3\xa9" + FLOATS + b"s.", {"0": 16})
    assert ours == torchs == {"é": ("torch.float32", (4,))}


def test_keys_that_are_no_names() -> None:
    for key in (b"K\x01", b"N", b"\x88", b"G" + bytes(8), b"B\x01\x00\x00\x00a", b"C\x01a"):
        assert read(archive(b"\x80\x02}" + key + FLOATS + b"s.", {"x/data/0": bytes(16)}))[2] == ["pickle-invalid"]


# --- bounds -----------------------------------------------------------------------------------------------------------

ORDERED = b"ccollections\nOrderedDict\n"
LONG4 = b"\x8b" + struct.pack("<I", 4000) + b"\x7f" * 4000
ATTRIBUTES = b"}(" + b"".join(text(f"_{i}") + b"N" for i in range(20_000)) + b"uq\x00"
COSTLY = {
    "copies of an OrderedDict": b"](" + b"".join(text(f"{i}") + b"N\x86" for i in range(20_000)) + b"e\x85q\x00"
    + ORDERED + b"q\x01" + b"h\x01h\x00R0" * 20_000,
    "calls with many arguments": b"(" + b"N" * 50_000 + b"tq\x00ctorch\ndevice\nq\x01" + b"h\x01h\x00R0" * 50_000,
    "states with many attributes": ATTRIBUTES + ORDERED + b")R" + b"h\x00b" * 50_000,
    "parameters with many attributes": ATTRIBUTES + FLOATS + b"q\x01"
    + b"ctorch._utils\n_rebuild_parameter_with_state\nq\x02(h\x01\x89Nh\x00tq\x03" + b"h\x02h\x03R0" * 50_000,
    "equal keys of a megabyte": text("k" * 2**20) + b"q\x00" + text("k" * 2**20) + b"q\x01}h\x00Ns"
    + b"h\x01Ns" * 50_000,
    "numbers that collide": b"}("
    + b"".join(b"\x8a\x08" + (i << 40).to_bytes(8, "little") + b"N" for i in range(90_000))
    + b"u",
    "distinct globals": b"".join(b"cm\n%d\n0" % i for i in range(90_000)),
    "globals with long names": text("m" * 2**22) + b"q\x00" + b"h\x00h\x00\x930" * 40_000,
    "deep lists": b"]" * 90_000 + b"a" * 89_999,
    "many instructions": b"N0" * 110_000,
    "many tensors": FLOATS + b"q\x000}" + b"".join(text(f"{i}") + b"h\x00s" for i in range(60_000)),
}  # fmt: skip


@pytest.mark.parametrize("program", COSTLY.values(), ids=COSTLY)
def test_no_program_takes_long(program: bytes) -> None:
    """A tenth of the steps takes a tenth of a few seconds, whatever they are spent on."""
    raw = archive(b"\x80\x02" + program + b".", {"x/data/0": bytes(16)})
    begin = time.process_time()
    read_pickle(io.BytesIO(raw), "w.bin", Budget(MAX_STEPS // 10))
    assert time.process_time() - begin < 1


def test_the_budget_is_that_of_all_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in "ab":
        (tmp_path / f"{name}.bin").write_bytes(archive(b"\x80\x02" + b"N" * (2 * MAX_STEPS // 3) + b"}."))
    problems = [problem.message for problem in open_checkpoint(str(tmp_path), allow_pickle=True).problems]
    assert [message for message in problems if "a.bin" in message and "no tensors" in message]
    assert [message for message in problems if "b.bin" in message and f"{MAX_STEPS:,} steps" in message]


@pytest.mark.parametrize(
    "number", [LONG4, b"\x8a\x09" + b"\x7f" * 9, b"L" + b"9" * 4000 + b"L\n", b"I" + b"9" * 30 + b"\n"]
)
@pytest.mark.parametrize("place", ["key", "value", "nested"])
def test_numbers_are_bounded(number: bytes, place: str) -> None:
    item = {"key": number + b"N", "value": A + number, "nested": A + b"]" + number + b"a"}[place]
    tensors, other, findings = read(
        archive(b"\x80\x02}" + item + b"sX\x01\x00\x00\x00b" + FLOATS + b"s.", {"x/data/0": bytes(16)})
    )
    assert (tensors, other, findings) == ({}, {}, ["pickle-invalid"])


def test_unsafe_things_are_named_even_when_the_rest_is_damaged() -> None:
    assert read(archive(b"\x80\x02cos\nsystem\n(K\x01tR"))[2] == ["pickle-unsafe"]


def test_fuzzed_files() -> None:
    report = fuzzing.run(fuzzing_pickles.TARGET, 2500, seed=15)
    assert report.failures == []
    assert report.verdicts["accepted"] > 250
