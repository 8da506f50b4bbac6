"""Compile csrc/ with AddressSanitizer and UndefinedBehaviorSanitizer and run the CPU tests on it: `make sanitize`.

The instrumented library is in build/sanitize, beside a copy of the package, so the installed one stays as it is. Every
instruction set of this processor is tested, as in the plain tests. Not looked for: leaks (Python's and torch's own hide
any), and null pointers and object sizes apart, which AddressSanitizer finds as it finds all accesses. Needs g++.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1]
BUILD = Path("build", "sanitize")
FLAGS = (
    "-O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize=null,object-size,vptr "
    "-fno-sanitize-recover=undefined --param asan-instrumentation-with-call-threshold=0"  # calls: half the compile time
)
TESTS = ("test_cpu.py", "test_experts.py", "test_misuse.py", "test_formats.py", "test_fuzz.py")


def build() -> Path:
    """Make the instrumented package; returns the folder that holds it."""
    spec = importlib.util.spec_from_file_location("kernels_setup", "setup.py")
    assert spec is not None
    assert spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    vars(setup)["OBJECTS"] = BUILD / "objects"
    vars(setup)["check_that_it_loads"] = lambda *_: None  # it loads only after the sanitizers' own libraries
    os.environ |= {"CXX": "g++", "QUANTSERVE_KERNELS_CFLAGS": FLAGS}
    package = BUILD / "quantserve_kernels"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(Path("src", "quantserve_kernels"), package, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    setup.make_library(package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")
    return BUILD


def test(folder: Path, arguments: list[str]) -> int:
    """Run the tests on it; returns pytest's exit code."""
    # The sanitizer's library has to be first, and C++'s second: Python itself loads it too late for exceptions.
    first = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(first),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(folder.absolute()),
    }
    code = "import quantserve_kernels as kernels; print(kernels.__file__)"
    used = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert str(folder.absolute()) in used.stdout, used.stdout
    # Reports go to the process's standard error, which pytest is not to keep for itself.
    options = ("--capture=sys", "-p", "no:faulthandler", "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", *options, *(f"tests/{name}" for name in TESTS)]
    return subprocess.run([*command, *arguments], env=environment).returncode


if __name__ == "__main__":
    os.chdir(KERNELS)
    sys.exit(test(build(), sys.argv[1:]))
