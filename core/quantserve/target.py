"""The hardware a model is checked against: this machine, or a named accelerator nobody has to own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from quantserve.errors import UsageError, unknown_name

GIB = 1 << 30
Device = Literal["cuda", "rocm", "cpu"]
_QUERY_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Target:
    """One kind of device, and how many of it there are.

    Attributes:
        name: ``a100-80g``, ``cpu``, or what this machine calls its device.
        device: what vLLM runs on.
        memory_bytes: per device; for a CPU the RAM of one NUMA node that this process may use.
        count: devices on the machine (NUMA nodes of a CPU); 0 is as many as a plan needs.
        capability: CUDA compute capability times ten (80 is 8.0), None off CUDA.
        bandwidth_bytes_per_s: memory bandwidth per device, None when unknown.
        flops_per_s: dense bfloat16 (float16 where there is none) per device, None when unknown.
        cores: CPU cores this process may use; 0 when the target is not a CPU.
        features: CPU instruction sets that matter here and may be used: avx2, avx512f, avx512_bf16, amx_bf16; of ARM
            asimd (NEON) and bf16 (bfdot, bfmmla).
        interconnect_bytes_per_s: between two devices of one machine, per direction; None when unknown.
    """

    name: str
    device: Device
    memory_bytes: int
    count: int = 0
    capability: int | None = None
    bandwidth_bytes_per_s: float | None = None
    flops_per_s: float | None = None
    cores: int = 0
    features: tuple[str, ...] = ()
    interconnect_bytes_per_s: float | None = None

    @property
    def is_here(self) -> bool:
        """Whether this is the machine itself, and not an accelerator of the table."""
        return self.name not in _KNOWN

    @property
    def prefers_bfloat16(self) -> bool:
        """Whether this is a CPU that multiplies bfloat16 itself, and float16 by emulation (x86) or in float32 (ARM)."""
        return self.device == "cpu" and bool({"avx512_bf16", "amx_bf16", "bf16"} & set(self.features))

    @property
    def has_amx(self) -> bool:
        """Whether this is a CPU with AMX tiles that this process may use."""
        return self.device == "cpu" and bool({"amx_bf16", "amx_int8"} & set(self.features))

    def to_json(self) -> dict[str, object]:
        """Plain data for ``--json`` and the plan."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.count} x {self.name}" if self.count > 1 else self.name


def gib(size: float) -> str:
    """Bytes as a person reads them: ``13.5 GiB``, ``24.6 MiB``."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _gpu(name: str, gib: float, capability: int | None, gb_per_s: float, tflops: float, link_gb_per_s: float) -> Target:
    device: Device = "cuda" if capability is not None else "rocm"
    link = link_gb_per_s * 1e9
    return Target(
        name, device, int(gib * GIB), 0, capability, gb_per_s * 1e9, tflops * 1e12, interconnect_bytes_per_s=link
    )


# Memory, bandwidth and dense (no sparsity) tensor rates from the vendors' data sheets: NVIDIA T4, V100
# (SXM2 32 GB), L4, A10G (AWS g5: 70 TFLOP/s measured dense float16), L40S, A100 (PCIe 40 GB, SXM 80 GB),
# H100 SXM, H200 SXM, B200 (HGX, per GPU); AMD Instinct MI300X. T4 and V100 have float16 only.
# The memory is what a driver reports, which is a little below the marketing number. The last number is the link
# between two devices in one direction, in GB/s: half of NVLink's or Infinity Fabric's total, else PCIe x16 (version
# 3: 16, version 4: 32).
_KNOWN: Mapping[str, Target] = MappingProxyType(
    {
        target.name: target
        for target in (
            _gpu("t4", 15.0, 75, 320, 65, 16),
            _gpu("v100", 32, 70, 900, 125, 150),
            _gpu("l4", 22.5, 89, 300, 121, 32),
            _gpu("a10g", 22.5, 86, 600, 70, 32),
            _gpu("l40s", 45.0, 89, 864, 362, 32),
            _gpu("a100-40g", 40, 80, 1555, 312, 300),
            _gpu("a100-80g", 80, 80, 2039, 312, 300),
            _gpu("h100", 79.6, 90, 3350, 989, 450),
            _gpu("h200", 140.4, 90, 4800, 989, 450),
            _gpu("b200", 179.0, 100, 8000, 2250, 900),
            _gpu("mi300x", 192, None, 5300, 1307, 448),
        )
    }
)


def known_targets() -> Mapping[str, Target]:
    """Targets by name: the accelerators of the table, and ``cpu`` for the processor of this machine."""
    return {**_KNOWN, "cpu": this_cpu()}


def find_target(name: str | None = None) -> Target:
    """The target of that name, or this machine for None.

    ``name`` may carry a number of devices: ``4xa100-80g``, ``a100-80g x4``, ``a100-80g*4``.

    Raises:
        UsageError: the name is unknown or the number is not in 1..1024; known names are listed.
    """
    if name is None:
        return this_gpu() or this_cpu()
    text = name.strip().lower()
    count = 0
    if match := re.fullmatch(r"(\d{1,6})\s*[x*]\s*(.+)", text):
        count, text = int(match[1]), match[2]
    elif match := re.fullmatch(r"(.+?)\s*(?:\s[x*]|\*)\s*(\d{1,6})", text):
        text, count = match[1], int(match[2])
    else:
        count = -1
    if count == 0 or count > 1024:
        raise UsageError(f"target {name!r}: the number of devices must be 1 to 1024")
    text = text.removeprefix("nvidia-").removeprefix("amd-")
    if text == "cpu":
        if count > 1:
            raise UsageError(f"target {name!r}: a CPU target is this machine; leave the number out")
        return this_cpu()
    if text not in _KNOWN:
        raise UsageError(unknown_name("target", text, [*_KNOWN, "cpu"]))
    return replace(_KNOWN[text], count=max(count, 0))


def is_named(target: Target, name: str) -> bool:
    """Whether a target is the device the table calls `name`, under that name or under its driver's."""
    return target.name == name or (name in _KNOWN and _is(target.name, _KNOWN[name]))


# --- this machine -------------------------------------------------------------------------------------


def this_gpu() -> Target | None:
    """The NVIDIA GPUs of this machine as one target (the smallest, counted), or None without any.

    Asks ``nvidia-smi`` rather than a GPU library, so nothing heavy is imported; a missing, failing or
    hanging one counts as none.
    """
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    rows = [row for line in run.stdout.splitlines() if (row := _parse_gpu(line)) is not None]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        indices = [int(item) for item in visible.split(",") if item.strip().isdigit()]
        named = [item for item in visible.split(",") if item.strip().startswith(("GPU-", "MIG-"))]
        rows = rows[: len(named)] if named else [rows[index] for index in indices if index < len(rows)]
    if not rows:
        return None
    smallest = min(rows, key=lambda row: row[1])
    name, memory, capability = smallest
    data = next((known for known in _KNOWN.values() if _is(name, known)), None)
    return Target(
        name=name,
        device="cuda",
        memory_bytes=memory,
        count=len(rows),
        capability=capability,
        bandwidth_bytes_per_s=data.bandwidth_bytes_per_s if data else None,
        flops_per_s=data.flops_per_s if data else None,
        interconnect_bytes_per_s=data.interconnect_bytes_per_s if data else None,
    )


def _parse_gpu(line: str) -> tuple[str, int, int] | None:
    """Name, bytes and capability of one ``NVIDIA H200, 143771, 9.0`` line; None when it is not one."""
    parts = [part.strip() for part in line.split(",")]
    match = re.fullmatch(r"(\d{1,3})\.(\d)", parts[-1]) if len(parts) == 3 else None
    if match is None or not parts[1].isdigit() or not parts[0]:
        return None
    return parts[0], int(parts[1]) << 20, int(match[1]) * 10 + int(match[2])


def _is(driver_name: str, known: Target) -> bool:
    """Whether the driver's ``NVIDIA A100-SXM4-80GB`` is the table's ``a100-80g``."""
    words = re.split(r"[^a-z0-9]+", driver_name.lower())
    chip, _, size = known.name.partition("-")
    return chip in words and (not size or f"{size}b" in words)


def this_cpu() -> Target:
    """The processor of this machine: RAM and cores within cgroup limits, and its vector extensions.

    A vLLM worker binds its memory to the NUMA node of its cores, so a node is what counts as a device.
    """
    nodes = _nodes()
    if len(nodes) < 2:
        nodes = [_ram()]  # virtual machines with a balloon understate their only node
    memory = min([*nodes, *(limit // len(nodes) for limit in _cgroup_memory_limits())])
    return Target("cpu", "cpu", memory, count=len(nodes), cores=_cores(), features=_cpu_features())


def _nodes() -> list[int]:
    """Bytes of RAM of each NUMA node that has cores; empty where Linux does not tell."""
    sizes = []
    for folder in sorted(Path("/sys/devices/system/node").glob("node[0-9]*")):
        match = re.search(r"MemTotal:\s+(\d+) kB", _read(str(folder / "meminfo")))
        if match and int(match[1]) and _read(str(folder / "cpulist")).strip():
            sizes.append(int(match[1]) * 1024)
    return sizes


def _ram() -> int:
    match = re.search(r"^MemTotal:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    if match:
        return int(match[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 8 * GIB


def _cgroup_memory_limits() -> list[int]:
    """Limits of this process's control group and its parents, both versions; none when unlimited."""
    limits = []
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", "", ""][:3]
        if controllers == "":
            root, file = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            root, file = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        folder = Path(path.lstrip("/"))
        # Inside a container the path may be the host's; the root then carries the container's limit.
        for part in (folder, *folder.parents):
            text = _read(str(root / part / file)).strip()
            if text.isdigit():
                limits.append(int(text))
    return limits


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = re.match(r"(\d+) (\d+)", _read("/sys/fs/cgroup/cpu.max"))
    if quota and int(quota[2]):
        cores = min(cores, max(1, -(-int(quota[1]) // int(quota[2]))))
    return cores


_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16")
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # of Linux on x86-64


def _cpu_features() -> tuple[str, ...]:
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    present = set(match[1].split()) if match else set()
    amx = any(name.startswith("amx") for name in present) and _may_use_amx()
    return tuple(name for name in _FEATURES if name in present and (amx or not name.startswith("amx")))


def _may_use_amx() -> bool:
    """Whether Linux gives this process AMX tiles, asked as the kernels ask: some sandboxes show the flag and refuse."""
    import ctypes

    try:
        failed = ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)
    except (OSError, AttributeError):
        return False
    return not failed


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
