"""CUDA kernels are compiled when weights are packed and kept on disk; where they cannot be, Triton takes the weights.

NVRTC and the driver are a small library in C; no GPU is needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from quantserve_kernels import _cache, _cuda, _nvrtc  # noqa: E402
from quantserve_kernels._weight import _layout_for  # noqa: E402

GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc on this machine")
    made = tmp_path_factory.mktemp("fake") / "fake_cuda.so"
    source = Path(__file__).with_name("fake_cuda.c")
    subprocess.run([compiler, "-w", "-shared", "-fPIC", str(source), "-o", str(made)], check=True)
    return ctypes.CDLL(str(made))


@pytest.fixture
def cuda(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ctypes.CDLL]:
    """An H100, an NVRTC that knows it, and an empty cache."""
    monkeypatch.setattr(_nvrtc, "_compiler", lambda: library)
    monkeypatch.setattr(_nvrtc, "_driver", lambda: library)
    monkeypatch.setattr(_cuda, "_has_tensor_cores", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, device=None, **kept: empty(*sizes, **kept))
    monkeypatch.setenv("FAKE_ARCHITECTURES", "80 90")
    monkeypatch.setenv("QUANTSERVE_KERNELS_CACHE", str(tmp_path / "cache"))
    _forget()
    yield library
    _forget()


def _forget() -> None:
    """As in a new process."""
    _cuda._module.cache_clear()
    _cuda.compiles.cache_clear()


def _compiled(capability: tuple[int, int] = (9, 0), **defines: str) -> bytes:
    return _nvrtc.compiled("source", "codebook.cu", capability, {"BITS": "4", **defines})


def test_packing_compiles_and_the_next_process_takes_the_file(cuda: Any) -> None:
    before = cuda.fake_compilations()
    for _ in range(2):
        assert _layout_for(GPU, 4, 64, -1) == "tensor cores"
        assert cuda.fake_compilations() == before + 1
        _forget()
    assert _layout_for(GPU, 3, 64, -1) == "tensor cores"
    assert cuda.fake_compilations() == before + 2


@pytest.mark.parametrize("change", ["FAKE_MINOR", "defines", "damage"])
def test_a_kept_file_is_for_one_compiler_one_source_and_whole(
    cuda: Any, change: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, before = _compiled(), cuda.fake_compilations()
    assert _compiled() == first
    assert cuda.fake_compilations() == before
    if change == "damage":
        (kept,) = (tmp_path / "cache").iterdir()
        kept.write_bytes(kept.read_bytes()[:-1])
    elif change == "FAKE_MINOR":
        monkeypatch.setenv(change, "1")
    assert _compiled(**({"HALF": "1"} if change == "defines" else {})) == first
    assert cuda.fake_compilations() == before + 1


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((9, 0), b"cubin --gpu-architecture=sm_90"), ((10, 3), b"ptx --gpu-architecture=compute_90"),
     ((8, 6), b"ptx --gpu-architecture=compute_80")],
)  # fmt: skip
def test_a_device_newer_than_the_compiler_gets_ptx(cuda: Any, capability: tuple[int, int], expected: bytes) -> None:
    assert _compiled(capability).rstrip(b"\0") == expected


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"FAKE_COMPILES": "6"}, "codebook.cu does not compile for sm_90: nonsense"),
        ({"FAKE_LOADS": "209"}, r"loading kernels: no such image \(209\)"),
        ({"FAKE_ARCHITECTURES": "100 120"}, r"NVRTC compiles for compute capabilities \[100, 120\]"),
        ({}, "libnvrtc.so.13 does not load"),
    ],
)
def test_what_does_not_compile_goes_to_triton_with_one_warning(
    cuda: Any, broken: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in broken.items():
        monkeypatch.setenv(name, value)
    if not broken:
        missing = _nvrtc.CudaError("libnvrtc.so.13 does not load")
        monkeypatch.setattr(_nvrtc, "_compiler", lambda: (_ for _ in ()).throw(missing))
    with pytest.warns(RuntimeWarning, match=rf"4 bits do not compile or load on cuda:0, so Triton's .*{reason}"):
        assert _layout_for(GPU, 4, 64, -1) == "words"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _layout_for(GPU, 4, 128, -1) == "words"


@pytest.mark.parametrize(("bits", "k", "group"), [(8, 64, -1), (4, 60, -1), (4, 64, 32)])
def test_what_the_cuda_kernels_do_not_take_compiles_nothing(cuda: Any, bits: int, k: int, group: int) -> None:
    before = cuda.fake_compilations()
    assert _layout_for(GPU, bits, k, group) == "words"
    assert cuda.fake_compilations() == before


def test_the_cache_is_where_it_was_asked_for_else_in_the_users_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("QUANTSERVE_KERNELS_CACHE", str(tmp_path / "asked"))
    assert _cache.cache_folder() == tmp_path / "asked"
    monkeypatch.setenv("QUANTSERVE_KERNELS_CACHE", "")
    assert _cache.cache_folder() == tmp_path / "xdg" / "quantserve-kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert _cache.cache_folder() == tmp_path / "home" / ".cache" / "quantserve-kernels"
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = _cache.cache_folder()
    assert found is not None
    assert found.parent == tmp_path
    found.chmod(0o777)  # another user may have put a file there
    assert _cache.cache_folder() is None


def test_without_a_writable_folder_kernels_are_compiled_each_time(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QUANTSERVE_KERNELS_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.setenv(name, "/dev/null/no-folder")
    monkeypatch.setattr("tempfile.tempdir", "/dev/null/" + "long" * 2000)
    before = cuda.fake_compilations()
    assert _compiled() == _compiled()
    assert cuda.fake_compilations() == before + 2
