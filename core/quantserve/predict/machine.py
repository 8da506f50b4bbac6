"""The numbers of a machine and of the engine on it: what turns bytes, FLOPs and steps into seconds.

Two engines are known. ``vllm-0.32`` is the one quantserve serves with. ``vllm-0.2.2`` is the one of the 2023 tables,
kept so that the formulas can be held against them; nothing is predicted for today with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import exp, log
from typing import TYPE_CHECKING, Literal

from quantserve.method import KernelProfile

if TYPE_CHECKING:
    from quantserve.predict.calibration import Calibration
    from quantserve.target import Target

ENGINE_NOW = "vllm-0.32"
ENGINE_2023 = "vllm-0.2.2"
Source = Literal["roofline", "calibration"]


@dataclass(frozen=True, slots=True)
class EngineCost:
    """What the engine takes beside the matrices, in seconds.

    Attributes:
        step_s: of every step: scheduling, preparing inputs, sampling.
        layer_s: of every layer in every step: launches and operators that do not grow with the batch.
        request_s: of every sequence in every step.
        element_s: of one activation element outside the matrices; 0 when memory bandwidth decides.
        rank_step_s: of every step when several ranks have to agree.
        link_s: latency of one all-reduce.
        arrival_s: of every request once: HTTP, tokenizer, process boundary.
        prefill_first: whole prompts run before anything decodes (2023); otherwise prompts are cut into chunks
            that share their steps with decoding.
        source: where these constants come from.
    """

    step_s: float
    layer_s: float
    request_s: float
    element_s: float
    rank_step_s: float
    link_s: float
    arrival_s: float
    prefill_first: bool = False
    source: str = ""


# Assumptions, not measurements: vLLM replays CUDA graphs, so a layer costs some launches of about 2 us.
_GPU = EngineCost(1.0e-3, 15e-6, 10e-6, 0.0, 0.3e-3, 20e-6, 6e-3, source="assumed for vLLM 0.32 with CUDA graphs")
# From docs/performance.md: a compiled Llama of 15 layers on one thread of an AMD EPYC (Zen 5), what remains of its
# steps and prefills when the measured kernels are taken off.
_CPU = EngineCost(
    1.6e-3, 50e-6, 0.3e-3, 0.35e-9, 2e-3, 60e-6, 8e-3, source="default, from one AMD EPYC with vLLM 0.32 on one thread"
)
# Without torch.compile each operator of a layer is a call from Python.
_GPU_EAGER = replace(_GPU, layer_s=120e-6, source="assumed for vLLM 0.32 without CUDA graphs")
_CPU_EAGER = replace(
    _CPU, layer_s=250e-6, element_s=0.7e-9, source="assumed for vLLM 0.32 on a CPU without torch.compile"
)
# Eager Python and Ray between the ranks. step_s, layer_s and rank_step_s are fitted to the three FP16 rows of RayLLM's
# table, so those rows test the rest of the formulas, not these constants.
_OLD = EngineCost(
    1.5e-3, 110e-6, 0.1e-3, 0.0, 10e-3, 60e-6, 20e-3, prefill_first=True, source="fitted to the FP16 rows of 2023"
)

# Bytes per second and 16-bit FLOP/s of one thread, for a processor nobody has measured. ARM's rates (bf16, asimd) are
# estimates: two thirds of what two 128-bit pipes at 2.7 GHz multiply, with bfmmla and with float32 FMA.
_THREAD_BANDWIDTH = 25e9
_SOCKET_BANDWIDTH = 120e9
_THREAD_FLOPS = (
    ("amx_bf16", 800e9),
    ("avx512_bf16", 350e9),
    ("avx512f", 100e9),
    ("avx2", 50e9),
    ("bf16", 115e9),
    ("asimd", 29e9),
    ("", 10e9),
)
# What a kernel without AMX reaches of the rate of a processor that has AMX, at shares of 1. From one rough run on an
# Intel Xeon: bfloat16 products reached 843 GFLOP/s a thread with AMX, quantserve's kernels 100.
_WITHOUT_AMX = 0.122


@dataclass(frozen=True, slots=True)
class Machine:
    """One device and its engine.

    Attributes:
        bandwidth: bytes per second read from memory.
        flops: dense 16-bit FLOP/s.
        without_amx: share of `flops` that is there for kernels without AMX; 1 where the machine has none.
        link: bytes per second between two ranks, per direction.
        attention_bandwidth, attention_flops: shares of both that attention reaches.
        engine: costs beside the arithmetic.
        kernels: measured seconds per weight by number of rows, by kernel key (``awq-4``).
        calls: measured seconds of one call beside that, by kernel key.
        source: ``calibration`` when bandwidth, FLOP/s and kernels were measured here.
        uncertainty: of everything that no kernel profile covers, as a share.
        notes: what a reader must know about these numbers.
    """

    bandwidth: float
    flops: float
    link: float
    attention_bandwidth: float
    attention_flops: float
    engine: EngineCost
    kernels: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    calls: Mapping[str, float] = field(default_factory=dict)
    source: Source = "roofline"
    uncertainty: float = 0.35
    notes: tuple[str, ...] = ()
    without_amx: float = 1.0


def machine_of(
    target: Target, calibration: Calibration | None = None, engine: str = ENGINE_NOW, *, eager: bool = False
) -> Machine:
    """The numbers of a target: measured ones for this machine when it was calibrated, else the table's.

    Args:
        calibration: used for a CPU target; None without one.
        engine: ``vllm-0.32`` or ``vllm-0.2.2``.
        eager: whether the model is served without torch.compile and CUDA graphs (``enforce_eager``).
    """
    if target.device == "cpu":
        return _cpu(target, calibration, eager)
    notes = []
    bandwidth, flops = target.bandwidth_bytes_per_s, target.flops_per_s
    uncertainty = 0.35
    if bandwidth is None or flops is None:
        bandwidth, flops, uncertainty = bandwidth or 1e12, flops or 200e12, 0.7
        notes.append(f"{target.name} is in no table: 1 TB/s and 200 TFLOP/s assumed")
    return Machine(
        bandwidth=bandwidth,
        flops=flops,
        link=target.interconnect_bytes_per_s or 32e9,
        attention_bandwidth=0.6,
        attention_flops=0.35,
        engine=_OLD if engine == ENGINE_2023 else _GPU_EAGER if eager else _GPU,
        uncertainty=uncertainty,
        notes=tuple(notes),
    )


def _cpu(target: Target, calibration: Calibration | None, eager: bool) -> Machine:
    assumed = _CPU_EAGER if eager else _CPU
    without_amx = _WITHOUT_AMX if target.has_amx else 1.0
    if calibration is not None:
        measured = calibration.eager if eager else calibration.engine
        return Machine(
            bandwidth=calibration.read_bytes_per_s,
            flops=calibration.matmul_flops_per_s,
            link=10e9,
            attention_bandwidth=0.7,
            attention_flops=0.3,
            engine=measured or assumed,
            kernels=calibration.kernels,
            calls=calibration.calls,
            source="calibration",
            uncertainty=0.2,
            notes=calibration.notes,
            without_amx=without_amx,
        )
    threads = threads_of(target.cores)
    per_thread = next(rate for feature, rate in _THREAD_FLOPS if not feature or feature in target.features)
    return Machine(
        bandwidth=min(_THREAD_BANDWIDTH * threads, _SOCKET_BANDWIDTH),
        flops=per_thread * threads,
        link=10e9,
        attention_bandwidth=0.7,
        attention_flops=0.3,
        engine=assumed,
        uncertainty=1.0,
        notes=("this processor was not measured, its bandwidth and rate are guesses: run `quantserve calibrate`",),
        without_amx=without_amx,
    )


def threads_of(cores: int) -> int:
    """Compute threads vLLM uses on a CPU of so many cores: all but the one it keeps for its front end."""
    return max(1, cores - 1)


def share_at(table: Sequence[tuple[int, float]], rows: float) -> float:
    """The value at ``rows``, interpolated between the logarithms of the table's points and flat outside them."""
    first, last = table[0], table[-1]
    if rows <= first[0]:
        return first[1]
    if rows >= last[0]:
        return last[1]
    for (low, before), (high, after) in pairwise(table):
        if rows <= high:
            part = log(rows / low) / log(high / low)
            return exp(log(before) + part * (log(after) - log(before)))
    return last[1]


def measured_at(table: Sequence[tuple[int, float]], rows: float) -> float:
    """Seconds per weight at ``rows``: interpolated, and proportional to the rows beyond the last measured one."""
    most, slowest = table[-1]
    return slowest * rows / most if rows > most else share_at(table, rows)


@dataclass(frozen=True, slots=True)
class LinearCost:
    """Seconds of one linear with one kernel.

    Attributes:
        machine: where it runs.
        profile: the kernel's shares of the roofline.
        bits_per_weight: stored.
        measured: seconds per weight by rows, in place of the shares.
        call_s: measured seconds of a call beside that.
    """

    machine: Machine
    profile: KernelProfile
    bits_per_weight: float
    measured: Sequence[tuple[int, float]] | None = None
    call_s: float = 0.0

    def seconds(self, rows: float, n: int, k: int, bits: float | None = None) -> float:
        """x [rows, k] times W [n, k]; 0 without rows.

        Args:
            bits: of a weight of this linear, where it differs; a measured time is taken in proportion to the bits.
        """
        if rows <= 0:
            return 0.0
        bits = bits or self.bits_per_weight
        if self.measured:
            return self.call_s + n * k * measured_at(self.measured, rows) * bits / self.bits_per_weight
        nbytes = n * k * bits / 8
        read = nbytes / (self.machine.bandwidth * share_at(self.profile.bandwidth_share, rows))
        rate = self.machine.flops * (1.0 if self.profile.amx else self.machine.without_amx)
        multiply = 2 * rows * n * k / (rate * share_at(self.profile.flops_share, rows))
        return max(read, multiply)


def linear_cost(machine: Machine, profile: KernelProfile, key: str, bits_per_weight: float | None = None) -> LinearCost:
    """The cost of a kernel on a machine.

    Args:
        key: of the calibration: method or kernel and bits, ``squeezellm-4``.
        bits_per_weight: what the files hold; the profile's without.
    """
    bits = bits_per_weight or profile.bits_per_weight
    return LinearCost(machine, profile, bits, machine.kernels.get(key), machine.calls.get(key, 0.0))
