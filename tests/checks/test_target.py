"""Named targets, counts, and this machine with and without a working nvidia-smi."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quantserve.errors import UsageError
from quantserve.predict.machine import machine_of
from quantserve.target import GIB, Target, find_target, is_named, known_targets, this_cpu, this_gpu
from quantserve_kernels._status import amx_refusal


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("a100-80g", "a100-80g", 0),
        ("A100-80G", "a100-80g", 0),
        ("4xa100-80g", "a100-80g", 4),
        ("4 x a100-80g", "a100-80g", 4),
        ("a100-80g x4", "a100-80g", 4),
        ("h100*8", "h100", 8),
    ],
)
def test_names(text: str, name: str, count: int) -> None:
    target = find_target(text)
    assert (target.name, target.count) == (name, count)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a100-80gb", "did you mean 'a100-80g'"),
        ("tpu", r"known: a100-40g, a100-80g, a10g, b200, cpu, h100"),
        ("", "unknown target ''"),
        ("0xl4", "must be 1 to 1024"),
        ("l4 x2000", "must be 1 to 1024"),
        ("2xcpu", "this machine"),
    ],
)
def test_mistakes(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        find_target(text)


def test_the_table_is_complete() -> None:
    names = ["t4", "v100", "l4", "a10g", "l40s", "a100-40g", "a100-80g", "h100", "h200", "b200", "mi300x", "cpu"]
    known = known_targets()
    assert list(known) == names
    for name in names[:-1]:
        target = known[name]
        assert target.memory_bytes >= 15 * GIB
        assert target.bandwidth_bytes_per_s
        assert target.flops_per_s
        assert (target.capability is None) == (target.device == "rocm")


def test_this_cpu() -> None:
    target = this_cpu()
    assert target.device == "cpu"
    assert 1 <= target.memory_bytes // GIB < 100_000
    assert target.cores >= 1
    assert target.count >= 1
    assert find_target("cpu") == target


@pytest.mark.parametrize(
    ("flags", "features", "bfloat16"),
    [
        ("fp asimd evtstrm fphp asimdhp sve bf16 i8mm", ("asimd", "bf16"), True),
        ("fp asimd evtstrm crc32", ("asimd",), False),
    ],
)
def test_an_arm_cpu_is_read_and_predicted(
    monkeypatch: pytest.MonkeyPatch, flags: str, features: tuple[str, ...], bfloat16: bool
) -> None:
    lines = {"/proc/cpuinfo": f"processor\t: 0\nFeatures\t: {flags}\nCPU part\t: 0xd40\n"}
    monkeypatch.setattr("quantserve.target._read", lambda path: lines.get(path, ""))
    target = this_cpu()
    assert target.features == features
    assert target.prefers_bfloat16 == bfloat16
    unknown = replace(target, features=())
    assert machine_of(target).flops > machine_of(unknown).flops


@pytest.mark.parametrize("refused", [0, -1], ids=["granted", "refused"])
def test_amx_is_asked_for_as_the_kernels_ask(monkeypatch: pytest.MonkeyPatch, refused: int) -> None:
    """One system call for both, so that a prediction and the kernels cannot differ about AMX."""
    asked = []

    class Library:
        def __init__(self, *_: object, **__: object) -> None: ...

        def syscall(self, *arguments: int) -> int:
            asked.append(arguments)
            return refused

    monkeypatch.setattr("ctypes.CDLL", Library)
    monkeypatch.setattr("quantserve.target._read", lambda path: "flags : avx2 amx_bf16" if "cpuinfo" in path else "")
    assert ("amx_bf16" in this_cpu().features) == (refused == 0) == (amx_refusal() == "")
    assert len(set(asked)) == 1


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name on PATH, to be written by the test."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "nvidia-smi"


def install(program: Path, script: str) -> None:
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_gpus_are_counted_and_recognised(nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(nvidia_smi, "echo 'NVIDIA A100-SXM4-80GB, 81920, 8.0'; echo 'NVIDIA A100-SXM4-80GB, 81920, 8.0'")
    target = find_target()
    assert (target.name, target.count, target.capability) == ("NVIDIA A100-SXM4-80GB", 2, 80)
    assert target.memory_bytes == 80 * GIB
    assert target.bandwidth_bytes_per_s == 2039e9
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert find_target().count == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_target().device == "cpu"


def test_the_smallest_of_mixed_gpus_is_the_target(nvidia_smi: Path) -> None:
    install(nvidia_smi, "echo 'NVIDIA H200, 143771, 9.0'; echo 'Tesla T4, 15360, 7.5'")
    target = find_target()
    assert (target.name, target.count, target.capability) == ("Tesla T4", 2, 75)


def test_an_unknown_gpu_has_no_rates(nvidia_smi: Path) -> None:
    install(nvidia_smi, "echo 'NVIDIA GeForce RTX 4090, 24564, 8.9'")
    target = find_target()
    assert target.capability == 89
    assert target.bandwidth_bytes_per_s is None


@pytest.mark.parametrize(
    "script", ["exit 9", "echo 'No devices were found'", "echo 'a, b, c'; exit 0", "printf '\\377'"]
)
def test_a_broken_nvidia_smi_is_no_gpu(nvidia_smi: Path, script: str) -> None:
    install(nvidia_smi, script)
    assert this_gpu() is None
    assert find_target().device == "cpu"


def test_a_hanging_nvidia_smi_is_no_gpu(nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantserve.target._QUERY_TIMEOUT_S", 0.2)
    install(nvidia_smi, "exec sleep 20")
    assert this_gpu() is None


@pytest.mark.parametrize(
    ("name", "known", "same"),
    [
        ("a100-80g", "a100-80g", True),
        ("NVIDIA A100-SXM4-80GB", "a100-80g", True),
        ("NVIDIA A100-SXM4-40GB", "a100-80g", False),
        ("NVIDIA H100 80GB HBM3", "a100-80g", False),
        ("cpu", "a100-80g", False),
        ("cpu", "nothing-of-that-name", False),
    ],
)
def test_a_device_is_known_by_either_name(name: str, known: str, same: bool) -> None:
    assert is_named(Target(name, "cuda", 80 << 30), known) is same
