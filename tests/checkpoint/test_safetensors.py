"""Headers of safetensors files: each damage has its code, and the verdict is that of the safetensors library."""

from __future__ import annotations

import io
import json
import struct
from typing import TYPE_CHECKING, Any

import pytest
import safetensors

import fuzzing
from fuzzing import headers as fuzzing_headers
from helpers.checkpoints import make_llama, safetensors_header, write_header, write_safetensors
from quantserve.checkpoint import Tensor, open_checkpoint
from quantserve.checkpoint.safetensors import read_header

if TYPE_CHECKING:
    from pathlib import Path

    from quantserve.finding import Finding

TWO = {"a": ("F16", (4, 8)), "b": ("I32", (3,))}  # 64 + 12 bytes


def entry(dtype: object = "F16", shape: object = (2,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def raw_file(header: object, data: int = 4, declared: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if declared is None else declared) + raw + bytes(data)


def read(raw: bytes) -> tuple[dict[str, Any], list[Finding]]:
    header = read_header(io.BytesIO(raw), "m.safetensors", len(raw))
    return header.tensors, header.findings


def library_accepts(raw: bytes) -> bool:
    try:
        safetensors.deserialize(raw)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        return False
    return True


DAMAGED = [
    ("empty file", b"", "header-truncated"),
    ("seven bytes", b"1234567", "header-truncated"),
    ("header cut off", raw_file({"a": entry()}, 0, declared=500), "header-truncated"),
    ("101 MB header", raw_file(b"{}", 0, declared=101_000_000), "header-oversized"),
    ("largest number", b"\xff" * 64, "header-oversized"),
    ("HTML", b"<!DOCTYPE html><html><body>404</body></html>", "header-oversized"),
    ("zip", b"PK\x03\x04" + b"\xff" * 60, "header-oversized"),
    ("LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "lfs-pointer"),
    ("not JSON", raw_file(b"{nonsense}"), "header-invalid"),
    ("no header", raw_file(b"", 0), "header-invalid"),
    ("array", raw_file(b"[]"), "header-invalid"),
    ("bomb", raw_file(b'{"a":' + b"[" * 200_000, 0), "header-invalid"),
    (
        "huge integer",
        raw_file(b'{"a":{"dtype":"F16","shape":[1' + b"0" * 9000 + b'],"data_offsets":[0,4]}}'),
        "header-invalid",
    ),
    ("NaN", raw_file(b'{"a":{"dtype":"F16","shape":[NaN],"data_offsets":[0,4]}}'), "header-invalid"),
    ("Latin-1", raw_file(b'{"\xe9":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}'), "header-invalid"),
    ("half a surrogate pair", raw_file({"\ud800": entry()}), "header-invalid"),
    ("metadata array", raw_file({"__metadata__": [1], "a": entry()}), "header-invalid"),
    ("metadata number", raw_file({"__metadata__": {"x": 1}, "a": entry()}), "header-invalid"),
    ("unknown dtype", raw_file({"a": entry(dtype="F15")}), "tensor-invalid"),
    ("dtype null", raw_file({"a": entry(dtype=None)}), "tensor-invalid"),
    ("negative size", raw_file({"a": entry(shape=[-2])}), "tensor-invalid"),
    ("fraction", raw_file({"a": entry(shape=[2.0])}), "tensor-invalid"),
    ("true", raw_file({"a": entry(shape=[True])}), "tensor-invalid"),
    ("shape overflow", raw_file({"a": entry(shape=[2**63, 2**63, 0])}), "tensor-invalid"),
    ("no entry", raw_file({"a": 7}), "tensor-invalid"),
    ("no offsets", raw_file({"a": {"dtype": "F16", "shape": [2]}}), "tensor-offsets"),
    ("one offset", raw_file({"a": entry(offsets=[0])}), "tensor-offsets"),
    ("negative offset", raw_file({"a": entry(offsets=[-4, 0])}), "tensor-offsets"),
    ("backward", raw_file({"a": entry(offsets=[4, 0])}), "tensor-offsets"),
    ("span is not size", raw_file({"a": entry(offsets=[0, 6])}, 6), "tensor-offsets"),
    ("gap", raw_file({"a": entry(), "b": entry(offsets=[8, 12])}, 12), "tensor-offsets"),
    ("gap at start", raw_file({"a": entry(offsets=[2, 6])}, 6), "tensor-offsets"),
    ("overlap", raw_file({"a": entry(), "b": entry(offsets=[2, 6])}, 6), "tensor-offsets"),
    ("half a byte", raw_file({"a": entry(dtype="F4", shape=[3], offsets=[0, 1])}, 1), "tensor-invalid"),
    ("data cut off", raw_file({"a": entry(shape=[200], offsets=[0, 400])}, 300), "file-truncated"),
    ("trailing data", raw_file({"a": entry()}, 5), "file-trailing-data"),
]


@pytest.mark.parametrize(("raw", "code"), [row[1:] for row in DAMAGED], ids=[row[0] for row in DAMAGED])
def test_damage_has_its_code(raw: bytes, code: str) -> None:
    _, findings = read(raw)
    assert [finding.code for finding in findings] == [code]
    assert findings[0].severity == "error"
    assert "m.safetensors" in findings[0].message
    assert findings[0].fix
    assert findings[0].message.isprintable()
    assert not library_accepts(raw)


def test_a_key_given_twice() -> None:
    one = json.dumps(entry())
    _, findings = read(raw_file(f'{{"a": {one}, "a": {one}}}'.encode()))
    assert [(finding.code, "'a' is given twice" in finding.message) for finding in findings] == [
        ("header-invalid", True)
    ]


@pytest.mark.parametrize(
    "raw",
    [
        raw_file({}, 0),
        raw_file(b" {}", 0),
        raw_file(safetensors_header(TWO, {"format": "pt"}), 76),
        raw_file(json.dumps(safetensors_header(TWO)).encode() + b"   ", 76),
        raw_file({"empty": entry(shape=[0, 5], offsets=[0, 0]), "scalar": entry(shape=[], offsets=[0, 2])}, 2),
        raw_file({"b": entry(offsets=[4, 8]), "a": entry(), "é\n": entry(offsets=[8, 12])}, 12),
        raw_file({"a": entry(dtype="F4", shape=[4], offsets=[0, 2])}, 2),
    ],
)
def test_valid_files(raw: bytes) -> None:
    assert library_accepts(raw)
    assert read(raw)[1] == []


def test_numbers_are_shown() -> None:
    _, (cut,) = read(raw_file({"a": entry(shape=[200], offsets=[0, 400])}, 300))
    assert "300 of 400 bytes" in cut.message
    _, (short,) = read(raw_file({"a": entry()}, 0, declared=5000))
    assert "5,000 bytes" in short.message
    _, (page,) = read(b"<!DOCTYPE html><html><body>404</body></html>")
    assert "HTML" in page.message


def test_tensors_are_kept_when_only_the_data_are_wrong() -> None:
    tensors, _ = read(raw_file({"a": entry(shape=[200], offsets=[0, 400])}, 300))
    assert (tensors["a"].dtype, tensors["a"].shape, tensors["a"].nbytes) == ("F16", (200,), 400)


def test_control_characters_and_long_names_are_shown_safely() -> None:
    names = ["\x1b[2J\x07evil", "x" * 5000, "\u202egnp.exe"]
    _, (finding,) = read(raw_file({name: entry(dtype="?") for name in names}))
    text = finding.message + "".join(finding.offenders)
    assert text.isprintable()
    assert len(text) < 2000
    assert "\\x1b[2J" in text


def test_many_offenders_are_counted_not_listed() -> None:
    _, (finding,) = read(raw_file({f"t{i}": entry(dtype="?") for i in range(3000)}))
    assert "3,000 tensors" in finding.message
    assert len(finding.offenders) == 20


def test_fuzzed_headers() -> None:
    """Both accept or both refuse, with the same names, dtypes, shapes and bytes."""
    report = fuzzing.run(fuzzing_headers.TARGET, 6000, seed=15)
    assert report.failures == []
    assert min(report.verdicts["accepted"], report.verdicts["refused"]) > 1500


@pytest.mark.parametrize(
    "header",
    [
        b'{"__metadata__":null}',
        b'{"a":{"dtype":"F16","shape":[-0],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F16","shape":[9223372036854775808,0],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F16","shape":[9223372036854775808,2,0],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F16","shape":[0,9223372036854775808,2],"data_offsets":[0,0]}}',
    ],
)
def test_what_fuzzing_found(header: bytes) -> None:
    raw = raw_file(header, 0)
    assert library_accepts(raw) == (not read(raw)[1])


def test_damaged_file_in_a_folder(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", shards=2)
    write_header(folder / "model-00002-of-00002.safetensors", b"{nonsense}")
    checkpoint = open_checkpoint(str(folder))
    assert [problem.code for problem in checkpoint.problems] == ["header-invalid"]
    assert checkpoint.tensors
    assert not checkpoint.tensors_complete


def test_metadata_of_all_files_is_kept(tmp_path: Path) -> None:
    for file, metadata in (("a", {"format": "pt", "method": "nf4"}), ("b", {"format": "np", "groups": "64"})):
        write_safetensors(tmp_path / f"{file}.safetensors", {file: ("F16", (2,))}, metadata)
    (tmp_path / "config.json").write_text("{}")
    assert open_checkpoint(str(tmp_path)).metadata == {"format": "pt", "method": "nf4", "groups": "64"}


def test_a_reader_may_give_the_bytes_of_a_block_format() -> None:
    tensor = Tensor("blk.0.attn_q.weight", "Q4_K", (256, 256), "m.gguf", stored=256 * 144)
    assert tensor.nbytes == 36864
    assert Tensor("w", "I32", (2, 3)).nbytes == 24
