"""Compiles csrc/ into one library of torch operators; everything else is in pyproject.toml.

Each instruction set is a source file with flags of its own, which neither setuptools nor torch's build helper knows,
so the compiler is called here. OpenMP is compiled in and not linked: the library then uses the one runtime torch has
loaded, never a second one. That is GCC's, so g++ is preferred: clang's code wants a runtime of its own. Objects stay in
build/objects and are compiled again when their source, a header, the flags or torch change. Where nothing can be
compiled, or the library does not load, the package is installed all the same: it works in plain torch, slowly, and
`quantserve doctor` says so with the reason, which is kept in build-failure.txt.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PACKAGE = Path("src", "quantserve_kernels")
OBJECTS = Path("build", "objects")
NOTE = "build-failure.txt"
NOTE_LINES = 20  # of the compiler's output
LOADING_TAKES = 300  # seconds at most

COMMON = ["-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall"]
# GCC 12 takes its own intrinsics' undefined operands for mistakes.
KERNEL = [*COMMON, "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
AVX512BF16 = [*AVX512, "-mavx512bf16", "-mavx512vbmi"]
# GCC 12 would move loads up until they no longer fit the registers: a quarter more instructions.
NEON = [*KERNEL, "-fno-schedule-insns"]


def sources(machine: str) -> dict[str, list[str]]:
    """The sources for a processor, named as `platform.machine()` does, with the flags of each."""
    # Plain loops in many variants: what -O3 unrolls here only takes time to compile. It takes longest, so it is first.
    # Its vectors pass between functions of this file alone, so that no ABI matters.
    chosen = {"csrc/isa_portable.cpp": [*KERNEL, "-O2", "-Wno-psabi"]}
    if machine in ("x86_64", "AMD64"):
        chosen |= {
            "csrc/isa_avx2.cpp": [*KERNEL, "-mavx2", "-mfma", "-mf16c"],
            "csrc/isa_avx512.cpp": [*KERNEL, *AVX512],
            "csrc/isa_avx512bf16.cpp": [*KERNEL, *AVX512BF16],
            "csrc/isa_amx.cpp": [*KERNEL, *AVX512BF16, "-mamx-tile", "-mamx-bf16"],
        }
    elif machine in ("aarch64", "arm64"):
        chosen |= {
            "csrc/isa_neon.cpp": NEON,
            "csrc/isa_neonbf16.cpp": [*NEON, "-march=armv8.2-a+bf16"],
        }
    return chosen | {
        "csrc/ops.cpp": [*COMMON, "-fopenmp"],
        # Without traps, loops with comparisons become vectors.
        "csrc/experts.cpp": [*COMMON, "-fopenmp", "-fno-trapping-math"],
    }


SOURCES = sources(platform.machine())


class BuildError(Exception):
    """Why there is no library: one line that says it all, then the end of the compiler's output."""


class Build(build_ext):
    """Leaves the library or the note, never both and never neither."""

    def build_extension(self, ext: Extension) -> None:
        """Make the library; on failure leave a note for `quantserve_kernels.status` instead."""
        library = Path(self.get_ext_fullpath(ext.name))
        note = library.with_name(NOTE)
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)
        note.unlink(missing_ok=True)
        try:
            make_library(library)
        except Exception as error:
            reason = str(error) if isinstance(error, BuildError) else f"{type(error).__name__}: {error}"
            note.write_text(reason + "\n")
            print(f"quantserve-kernels: not compiled, plain torch is used instead: {reason}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """In an editable install, put the same into the source folder, in the place of what an earlier one left."""
        for old in (*PACKAGE.glob("_C.*"), PACKAGE / NOTE):
            old.unlink(missing_ok=True)
        super().copy_extensions_to_source()
        note = Path(self.build_lib, PACKAGE.name, NOTE)
        if note.exists():
            shutil.copy(note, PACKAGE)


def make_library(library: Path) -> None:
    """Compile what changed, side by side, and link.

    Raises:
        BuildError: torch or a compiler is missing, or the compiler failed.
    """
    compiler = find_compiler()
    try:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        raise BuildError(f"torch cannot be imported during the build: {error}") from error
    extra = shlex.split(os.environ.get("QUANTSERVE_KERNELS_CFLAGS", ""))
    includes = [f"-isystem{path}" for path in include_paths()]
    OBJECTS.mkdir(parents=True, exist_ok=True)

    def compiled(source: str) -> str:
        return make_object(source, [*compiler, *SOURCES[source], *extra, *includes], torch.__version__)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, SOURCES))
    places = [f"-L{path}" for path in library_paths()]
    draft = library.with_suffix(".tmp")
    libraries = [*places, "-ltorch", "-ltorch_cpu", "-lc10"]
    try:
        run([*compiler, "-shared", *objects, *libraries, *extra, "-o", str(draft)], "link")
        check_that_it_loads(draft, compiler)
        draft.replace(library)  # whole or not at all
    finally:
        draft.unlink(missing_ok=True)


def check_that_it_loads(library: Path, compiler: list[str]) -> None:
    """Load the library as `quantserve_kernels.load` does, in a process of its own, which it may take down.

    Raises:
        BuildError: it does not load; gives the loader's reason.
    """
    code = "import ctypes, sys, torch; ctypes.CDLL(sys.argv[1])"
    command = [sys.executable, "-c", code, str(library.absolute())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=LOADING_TAKES)
    except subprocess.TimeoutExpired:
        raise BuildError(f"the library does not load within {LOADING_TAKES} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        what = lines[-1] if lines else f"exit code {done.returncode}"
        openmp = ". Fix: install g++ and build again: torch brings the OpenMP runtime of GCC, not that of clang"
        hint = openmp if "__kmpc" in what else ""
        reason = f"{compiler[0]} made a library that does not load: {what}{hint}"
        raise BuildError("\n".join([reason, *lines[-NOTE_LINES:]]))


def make_object(source: str, command: list[str], torch_version: str) -> str:
    """The object of a source, compiled unless it is there already.

    Raises:
        BuildError: the compiler failed.
    """
    digest = hashlib.sha256(shlex.join([*command, torch_version]).encode())
    for path in (Path(source), *sorted(Path("csrc").glob("*.h"))):
        digest.update(path.read_bytes())
    stem = Path(source).stem
    found = OBJECTS / f"{stem}-{digest.hexdigest()[:16]}.o"
    if not found.exists():
        draft = found.with_suffix(f".{os.getpid()}")
        run([*command, "-c", source, "-o", str(draft)], f"compile {source}")
        for old in OBJECTS.glob(f"{stem}-*.o"):
            old.unlink(missing_ok=True)
        draft.replace(found)
    return str(found)


def find_compiler() -> list[str]:
    """The command of a C++ compiler: CXX, or g++, or the one Python was built with, or another on the path.

    Raises:
        BuildError: there is none.
    """
    asked = os.environ.get("CXX")
    candidates = [asked] if asked else ["g++", sysconfig.get_config_var("CXX") or "", "c++", "clang++"]
    for words in map(shlex.split, candidates):
        if words and shutil.which(words[0]):
            return words
    raise BuildError(f"no C++ compiler found (looked for {', '.join(dict.fromkeys(filter(None, candidates)))})")


def run(command: list[str], purpose: str) -> None:
    """Run the compiler and print what it prints.

    Raises:
        BuildError: it failed; names the first error.
    """
    print(shlex.join(command), flush=True)
    environment = {**os.environ, "LC_ALL": "C"}  # errors are found by the word
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    )
    print(done.stdout, end="", flush=True)
    if done.returncode:
        lines = done.stdout.strip().splitlines()
        what = next((line.strip() for line in lines if "error" in line), f"exit code {done.returncode}")
        raise BuildError("\n".join([f"{command[0]} cannot {purpose}: {what}", *lines[-NOTE_LINES:]]))


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("quantserve_kernels._C", list(SOURCES), optional=True)],
        cmdclass={"build_ext": Build},
    )
