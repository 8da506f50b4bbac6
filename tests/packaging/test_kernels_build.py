"""kernels/setup.py with compilers that are missing, broken, or only write down what they are asked."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.environments import PROJECTS, Environment

pytestmark = pytest.mark.slow

SETUP = runpy.run_path(str(PROJECTS["quantserve-kernels"] / "setup.py"))
SOURCES = sorted(Path(source).name for source in SETUP["SOURCES"])
# Writes down what it should compile, and links a library of this C++ instead.
STAND_IN = """for word; do
  case $word in *.cpp) echo $word >> "$0.log";; -shared) link=1;; esac
done
: > "$word"  # the output is the last argument
[ -z "$link" ] || echo '{code}' | g++ -shared -fPIC -x c++ - -o "$word"
"""
OBEDIENT = STAND_IN.format(code="")
CLANG = STAND_IN.format(code='extern "C" void __kmpc_fork_call(); void task() { __kmpc_fork_call(); }')
BROKEN = """echo "a warning that is not it" >&2
echo "gemm.h:7:1: error: no such instruction" >&2
echo "compilation terminated." >&2
exit 1
"""


@dataclass
class Checkout:
    """A copy of kernels/ and the compiler that builds it."""

    path: Path
    compiler: Path

    @property
    def package(self) -> Path:
        return self.path / "src" / "quantserve_kernels"

    def behave(self, script: str) -> None:
        """What the compiler does from now on."""
        self.compiler.write_text(f"#!/bin/sh\n{script}")
        self.compiler.chmod(0o755)

    def wheel(self, **environment: str) -> set[str]:
        """Build a wheel, which must succeed; returns what it holds of the library or of the note."""
        out = self.path / "wheels"
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {"CXX": str(self.compiler), **environment}.items():
                patch.setenv(name, value)
            done = subprocess.run(
                [*command, "--wheel-dir", str(out), str(self.path)], capture_output=True, text=True, timeout=120
            )
        assert done.returncode == 0, done.stdout + done.stderr
        return self.unpacked(out)

    def unpacked(self, out: Path) -> set[str]:
        (path,) = out.glob("*.whl")
        with zipfile.ZipFile(path) as archive:
            archive.extractall(out)
        return outcome(out / "quantserve_kernels")

    def compiled(self) -> list[str]:
        """The sources compiled since the last time this was asked."""
        log = self.compiler.with_name(f"{self.compiler.name}.log")
        names = sorted(Path(line).name for line in log.read_text().splitlines()) if log.exists() else []
        log.unlink(missing_ok=True)
        return names


def outcome(package: Path) -> set[str]:
    return {path.name.partition(".")[0] for pattern in ("_C.*", "build-*") for path in package.glob(pattern)}


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    left_out = shutil.ignore_patterns("build", "*.egg-info", "_C.*", "build-failure.txt", "__pycache__")
    copy = shutil.copytree(PROJECTS["quantserve-kernels"], tmp_path / "kernels", ignore=left_out)
    made = Checkout(copy, tmp_path / "c++")
    made.behave(OBEDIENT)
    return made


def test_only_what_changed_is_compiled_again(checkout: Checkout) -> None:
    assert checkout.wheel() == {"_C"}
    assert checkout.compiled() == SOURCES
    assert checkout.wheel() == {"_C"}
    assert checkout.compiled() == []
    (checkout.path / "csrc" / "ops.cpp").open("a").write("// changed\n")
    checkout.wheel()
    assert checkout.compiled() == ["ops.cpp"]
    (checkout.path / "csrc" / "kernel.h").open("a").write("// changed\n")
    checkout.wheel()
    assert checkout.compiled() == SOURCES
    checkout.wheel(QUANTSERVE_KERNELS_CFLAGS="-g")
    assert checkout.compiled() == SOURCES


def test_a_compiler_that_fails_leaves_the_reason(checkout: Checkout) -> None:
    checkout.behave(BROKEN)
    assert checkout.wheel() == {"build-failure"}
    first, *rest = (checkout.path / "wheels" / "quantserve_kernels" / "build-failure.txt").read_text().splitlines()
    assert first.startswith(f"{checkout.compiler} cannot compile csrc/")
    assert first.endswith(": gemm.h:7:1: error: no such instruction")
    assert "compilation terminated." in rest
    assert not (checkout.package / "build-failure.txt").exists(), "a wheel leaves the sources alone"


def test_a_library_that_does_not_load_is_no_library(checkout: Checkout) -> None:
    """As clang's, whose OpenMP runtime is not there: linking a shared library does not ask for it."""
    checkout.behave(CLANG)
    assert checkout.wheel() == {"build-failure"}
    first, *rest = (checkout.path / "wheels" / "quantserve_kernels" / "build-failure.txt").read_text().splitlines()
    assert first.startswith(f"{checkout.compiler} made a library that does not load: OSError: ")
    assert "undefined symbol: __kmpc_fork_call. Fix: install g++" in first
    assert rest


def test_without_a_compiler_the_package_works_and_says_why_it_is_slow(checkout: Checkout, tmp_path: Path) -> None:
    assert checkout.wheel(CXX="no-such-compiler") == {"build-failure"}
    environment = Environment.make(tmp_path / "environment")
    environment.see_packages_of_this_python()
    installed = environment.pip("install", "--no-deps", "--no-index", next((checkout.path / "wheels").glob("*.whl")))
    assert installed.returncode == 0, installed.stderr
    code = """
import torch
import quantserve_kernels as kernels
weight = kernels.pack(torch.ones(4, 32, dtype=torch.uint8), torch.arange(16.0)[None], bits=4)
assert kernels.linear(torch.ones(1, 32), weight).tolist() == [[32.0] * 4]
print(kernels.status().native, kernels.status().reason)
"""
    done = environment.run("python", "-c", code)
    assert done.stdout == "False no C++ compiler found (looked for no-such-compiler)\n", done.stderr


def test_an_editable_install_has_the_library_or_the_note(checkout: Checkout, tmp_path: Path) -> None:
    environment = Environment.make(tmp_path / "environment")
    environment.see_packages_of_this_python()
    for script, expected in ((OBEDIENT, {"_C"}), (BROKEN, {"build-failure"}), (OBEDIENT, {"_C"})):
        checkout.behave(script)
        (checkout.path / "csrc" / "kernel.h").open("a").write("// changed\n")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CXX", str(checkout.compiler))
            installed = environment.pip(
                "install", "--no-deps", "--no-index", "--no-build-isolation", "--editable", checkout.path
            )
        assert installed.returncode == 0, installed.stdout + installed.stderr
        assert outcome(checkout.package) == expected
