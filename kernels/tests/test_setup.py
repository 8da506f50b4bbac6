"""setup.py compiles for the processor that it runs on; status() knows the same instruction sets."""

from __future__ import annotations

import platform
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from quantserve_kernels import _status

KERNELS = Path(__file__).parents[1]
ANYWHERE = {"ops", "experts", "isa_portable"}
BY_FAMILY = {
    ("x86_64", "AMD64"): {"isa_avx2", "isa_avx512", "isa_avx512bf16", "isa_amx"},
    ("aarch64", "arm64"): {"isa_neon", "isa_neonbf16"},
    ("riscv64", "ppc64le", ""): set[str](),
}
MACHINES = [(machine, own) for machines, own in BY_FAMILY.items() for machine in machines]


@pytest.mark.parametrize(("machine", "own"), MACHINES)
def test_the_sources_are_those_of_the_processor(monkeypatch: pytest.MonkeyPatch, machine: str, own: set[str]) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    sources = runpy.run_path(str(KERNELS / "setup.py"))["SOURCES"]
    of_others = set.union(*BY_FAMILY.values()) - own
    chosen = {Path(source).stem for source in sources}
    assert chosen >= ANYWHERE | own
    assert not chosen & of_others
    assert all((KERNELS / source).exists() for source in sources)


@pytest.mark.parametrize(("machine", "own"), MACHINES)
def test_the_status_knows_the_instruction_sets_that_are_compiled(
    monkeypatch: pytest.MonkeyPatch, machine: str, own: set[str]
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    names = {name for name, _ in _status.INSTRUCTION_SETS.get(machine, ())}
    assert names >= {source.removeprefix("isa_") for source in own}


def test_each_instruction_set_has_a_source_and_is_declared() -> None:
    """What is compiled somewhere is declared in kernel.h and known to ops.cpp."""
    declared = (KERNELS / "csrc" / "kernel.h").read_text()
    operators = (KERNELS / "csrc" / "ops.cpp").read_text()
    for path in (KERNELS / "csrc").glob("isa_*.cpp"):
        name = path.stem.removeprefix("isa_")
        assert re.search(rf"extern const Kernel (?:\w+, )*{name}\b", declared), name
        assert re.search(rf"&{name}\b", operators), name


@pytest.mark.parametrize(("features", "expected"), [("fp asimd bf16 i8mm", "neonbf16"), ("fp asimd crc32", "neon")])
def test_an_arm_processor_is_known_by_its_features(
    monkeypatch: pytest.MonkeyPatch, features: str, expected: str
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(_status, "library", lambda: Path("_C.so"))
    monkeypatch.delenv("QUANTSERVE_KERNELS_ISA", raising=False)
    monkeypatch.setattr(Path, "read_text", lambda _: f"processor\t: 0\nFeatures\t: {features}\nCPU part\t: 0xd40\n")
    assert _status.status.__wrapped__().instruction_set == expected


def test_make_arm_says_what_to_install() -> None:
    script = KERNELS / "tests" / "arm" / "run.py"
    done = subprocess.run([sys.executable, str(script)], env={"PATH": ""}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert re.fullmatch(r"make arm: \S*g\+\+.* not found\. Fix: apt-get install g\+\+.*\n", done.stderr), done.stderr
