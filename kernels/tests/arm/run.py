"""Cross-compile the ARM kernels and run them under QEMU, the portable one beside them: `make arm`.

harness.cpp compares them with float64, on an emulated processor with bfloat16 instructions and on one without. The
operators need torch: where it is installed they are compiled with the headers that are there, and not run. An ARM
machine takes its own compiler and needs no QEMU; what its processor lacks is then not run.

`--count` prints how many instructions a weight takes instead. QEMU tells nothing about time.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

KERNELS = Path(__file__).resolve().parents[2]
BUILD = Path("build", "arm")
HARNESS = Path("tests", "arm", "harness.cpp")
ON_ARM = platform.machine() in ("aarch64", "arm64")
COMPILER = "g++" if ON_ARM else "aarch64-linux-gnu-g++"
QEMU = "qemu-aarch64"
# Instruction sets that each processor must be found to have, the best last.
PROCESSORS = {"max": ["portable", "neon", "neonbf16"], "cortex-a72": ["portable", "neon"]}
# Where `--count` looks: bits, group (0: a codebook per channel), rows of x.
COUNTED = [(bits, group, m) for bits, group in ((4, 0), (3, 0), (8, 0), (4, 128)) for m in (1, 2, 4, 16)]
CHANNELS, DEPTH = 16, 2048  # of a counted product


def setup_script() -> ModuleType:
    """kernels/setup.py, with this folder for its objects."""
    spec = importlib.util.spec_from_file_location("kernels_setup", "setup.py")
    assert spec is not None
    assert spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    vars(setup)["OBJECTS"] = BUILD
    return setup


def build() -> Path:
    """Compile what has changed and link the harness; compile the operators too if torch is installed."""
    setup = setup_script()
    BUILD.mkdir(parents=True, exist_ok=True)
    flags: dict[str, list[str]] = setup.sources("aarch64")
    operators = [source for source in flags if not Path(source).name.startswith("isa_")]
    linked = [source for source in flags if source not in operators]
    flags[str(HARNESS)] = ["-std=c++20", "-O2", "-Wall"]

    def compiled(source: str, includes: Sequence[str] = ()) -> str:
        return str(setup.make_object(source, [COMPILER, *flags[source], *includes], "none"))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, [*linked, str(HARNESS)]))
        if importlib.util.find_spec("torch"):
            from torch.utils.cpp_extension import include_paths

            headers = [f"-isystem{path}" for path in include_paths()]
            list(pool.map(lambda source: compiled(source, headers), operators))
        else:
            print(f"torch is not installed: not compiled: {', '.join(operators)}")
    harness = BUILD / "harness"
    setup.run([COMPILER, "-static", *objects, "-o", str(harness)], "link")
    return harness


def check(harness: Path) -> None:
    """Run all checks on each processor."""
    for processor, expected in PROCESSORS.items():
        print(f"\n{'this processor' if ON_ARM else processor}:", flush=True)
        command = [str(harness)] if ON_ARM else [QEMU, "-cpu", processor, str(harness)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        print(done.stdout, end="", flush=True)
        if done.returncode:
            sys.exit(f"make arm: the harness ended with exit code {done.returncode}")
        found = [line.partition(":")[0] for line in done.stdout.splitlines()]
        if ON_ARM:
            return
        if found != expected:
            sys.exit(f"make arm: {processor} has {', '.join(expected)}; found {', '.join(found)}")


def instructions(harness: Path, arguments: list[str]) -> Counter[str]:
    """How often each instruction, by mnemonic, is executed in a run of the harness."""
    log = BUILD / "trace"
    command = [QEMU, "-cpu", "max", "-d", "in_asm,exec,nochain", "-D", str(log), str(harness), *arguments]
    subprocess.run(command, check=True)
    blocks: dict[int, list[str]] = {}
    executed: Counter[int] = Counter()
    block: list[str] = []
    with log.open(errors="replace") as lines:
        for line in lines:
            if found := re.match(r"Trace \d+: \S+ \[\w+/(\w+)/", line):
                executed[int(found[1], 16)] += 1
            elif line.startswith("IN:"):
                block = []
            elif found := re.match(r"(0x\w+):\s+\w+\s+(\S+)", line):
                if not block:
                    blocks[int(found[1], 16)] = block
                block.append(found[2])
    log.unlink()
    total: Counter[str] = Counter()
    for start, times in executed.items():
        for mnemonic in blocks[start]:
            total[mnemonic] += times
    return total


def count(harness: Path) -> None:
    """Print instructions per weight: those that a second multiplication by the same x adds."""
    print(f"{'':12}{'bits':>6}{'group':>7}{'rows':>6}{'instructions per weight':>25}")
    for kernel in PROCESSORS["max"][1:]:
        for bits, group, m in COUNTED:
            one, two = (
                instructions(harness, ["count", kernel, *map(str, (bits, group, m, DEPTH, products))])
                for products in (1, 2)
            )
            per_weight = (two.total() - one.total()) / (CHANNELS * DEPTH)
            print(f"{kernel:12}{bits:6}{group or '-':>7}{m:6}{per_weight:25.2f}", flush=True)


def main() -> None:
    """Build, then check or count."""
    os.chdir(KERNELS)
    missing = [tool for tool in (COMPILER, *([] if ON_ARM else [QEMU])) if not shutil.which(tool)]
    if missing:
        sys.exit(
            f"make arm: {' and '.join(missing)} not found. "
            f"Fix: apt-get install {'g++' if ON_ARM else 'g++-aarch64-linux-gnu qemu-user'} (Debian, Ubuntu)"
        )
    harness = build()
    if "--count" in sys.argv[1:]:
        count(harness)
    else:
        check(harness)


if __name__ == "__main__":
    main()
