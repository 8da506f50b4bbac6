"""CUDA C++ compiled at run time: NVRTC, which comes with every CUDA build of torch, and the driver, called by ctypes.

torch has the same as a private function, which wants the headers of a CUDA toolkit that pip does not install.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from quantserve_kernels import _cache


class CudaError(RuntimeError):
    """NVRTC or the driver refused; str(error) says what."""


@cache
def _compiler() -> ctypes.CDLL:
    """NVRTC, as torch finds it.

    Raises:
        CudaError: it is not there.
    """
    major = (torch.version.cuda or "13").partition(".")[0]
    torch.cuda.init()  # torch looks for its libraries in the wheels beside it
    for name in (f"libnvrtc.so.{major}", "libnvrtc.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CudaError(f"libnvrtc.so.{major} does not load\n  fix: pip install --force-reinstall nvidia-cuda-nvrtc")


def compiled(source: str, name: str, capability: tuple[int, int], defines: dict[str, str]) -> bytes:
    """Return what `Module` loads, for a device of this compute capability; kept on disk for the next process.

    Raises:
        CudaError: as `compile_source`, or NVRTC knows only newer devices.
    """
    library = _compiler()
    major, minor = ctypes.c_int(), ctypes.c_int()
    _called(library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "version")
    architecture = architecture_for(capability, supported_architectures())
    parts = (source, architecture, repr(sorted(defines.items())), f"{major.value}.{minor.value}")
    kept = f"{name}-{architecture}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}"
    found = _cache.read(kept)
    if found is None:
        found = compile_source(source, name, architecture, defines)
        _cache.write(kept, found)
    return found


def supported_architectures() -> list[int]:
    """Compute capabilities that NVRTC compiles for, `90` for 9.0.

    Raises:
        CudaError: NVRTC does not answer.
    """
    library, count = _compiler(), ctypes.c_int()
    _called(library.nvrtcGetNumSupportedArchs(ctypes.byref(count)), "number of architectures")
    known = (ctypes.c_int * count.value)()
    _called(library.nvrtcGetSupportedArchs(known), "architectures")
    return list(known)


def architecture_for(capability: tuple[int, int], known: Sequence[int]) -> str:
    """`sm_90` where NVRTC knows the device, else the newest older one as `compute_90`: PTX, which the driver compiles.

    Raises:
        CudaError: NVRTC knows only newer devices.
    """
    wanted = capability[0] * 10 + capability[1]
    if wanted in known:
        return f"sm_{wanted}"
    older = [number for number in known if number < wanted]
    if not older:
        raise CudaError(
            f"NVRTC compiles for compute capabilities {list(known)} (90 is 9.0), and the device has {wanted}"
        )
    return f"compute_{max(older)}"


def compile_source(source: str, name: str, architecture: str, defines: dict[str, str]) -> bytes:
    """Return a cubin, or PTX for a virtual architecture.

    Args:
        source: CUDA C++ without headers; kernels are `extern "C"`.
        name: what messages call it.
        architecture: `sm_90` or `compute_90`.
        defines: preprocessor symbols.

    Raises:
        CudaError: it does not compile; with the compiler's messages.
    """
    library = _compiler()
    given = [f"--gpu-architecture={architecture}", "--std=c++17"]
    given += [f"-D{key}={value}" for key, value in defines.items()]
    options = (ctypes.c_char_p * len(given))(*(option.encode() for option in given))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    failed = library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
    if failed:
        raise CudaError(f"NVRTC takes no program: error {failed}")
    try:
        failed = library.nvrtcCompileProgram(program, len(given), options)
        if failed:
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            raise CudaError(f"{name} does not compile for {architecture}: {log.value.decode(errors='replace')}")
        kind = "PTX" if architecture.startswith("compute_") else "CUBIN"
        _called(getattr(library, f"nvrtcGet{kind}Size")(program, ctypes.byref(size)), f"size of {kind}")
        out = ctypes.create_string_buffer(size.value)
        _called(getattr(library, f"nvrtcGet{kind}")(program, out), kind)
        return out.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _called(result: int, asked: str) -> None:
    if result:
        raise CudaError(f"NVRTC gives no {asked}: error {result}")


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaError(f"the driver does not load: {error}") from error


def _check(result: int, doing: str) -> None:
    if result:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(text))
        raise CudaError(f"{doing}: {(text.value or b'unknown error').decode()} ({result})")


class Module:
    """The kernels of a cubin or of PTX, for one device.

    All are loaded here and now: the driver would load each at its first launch, which a CUDA graph's capture forbids.

    Args:
        cubin: from `compiled`.
        device: becomes the current one while they are loaded.
        names: of its kernels.

    Raises:
        CudaError: the driver does not load it, or a kernel is missing.
    """

    def __init__(self, cubin: bytes, device: torch.device, names: Sequence[str]) -> None:
        self._functions: dict[str, ctypes.c_void_p] = {}
        driver, module = _driver(), ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.empty(1, device=device)  # the driver wants a context
            _check(driver.cuModuleLoadData(ctypes.byref(module), cubin), "loading kernels")
            for name in names:
                function = ctypes.c_void_p()
                _check(driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"kernel {name}")
                if hasattr(driver, "cuFuncLoad"):  # from CUDA 12.4 on
                    _check(driver.cuFuncLoad(function), f"loading kernel {name}")
                self._functions[name] = function

    def launch(
        self, name: str, grid: tuple[int, int, int], threads: int, arguments: Sequence[Tensor | int | None]
    ) -> None:
        """Start a kernel on the current stream of the current device.

        Args:
            name: one of `names`.
            grid: blocks.
            threads: of a block.
            arguments: tensors become pointers, None a null pointer, numbers a 32-bit int.

        Raises:
            CudaError: the driver refuses the launch.
        """
        values = [
            ctypes.c_int(given)
            if isinstance(given, int)
            else ctypes.c_void_p(None if given is None else given.data_ptr())
            for given in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        started = _driver().cuLaunchKernel(self._functions[name], *grid, threads, 1, 1, 0, stream, pointers, None)
        _check(started, f"starting kernel {name}")
