"""Which kernel an AWQ model gets on a CPU: quantserve's or vLLM's own.

vLLM asks its own kernels for one that computes a layer, and then quantserve's, which `register` of this package adds.
The variable `DISABLED` leaves kernels out by name. With it the plan chooses, and a person overrules the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING

from quantserve.api import Finding, Target, disabled_kernels, engine_environment, fastest_kernel

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

DISABLED = "VLLM_DISABLED_KERNELS"
OURS, THEIRS = "CodebookLinearKernel", "CPUWNA16LinearKernel"
"""What vLLM calls the two: quantserve's kernel, and its own for CPUs."""
KEYS = {OURS: "awq_codebook", THEIRS: "awq_vllm"}
"""Their names in a calibration."""
WITHOUT_THEIRS = {DISABLED: f"{THEIRS},ZentorchWNA16LinearKernel"}
"""The variables that lead to quantserve's; the second of vLLM's kernels is one for AMD's package zentorch."""

# The kernel of a CPU with an instruction set; the first that the CPU has decides, and a calibration of the machine goes
# before. vLLM's has AMX, where one rough run on an Intel Xeon (one thread, 0.83 billion parameters) took 193 ms for 64
# tokens and made 120 tokens/s in batches of 16; quantserve's has none and took 1210 ms and made 48 tokens/s. On an AMD
# EPYC with AVX512-BF16 quantserve's is the faster (docs/performance.md).
BY_INSTRUCTION_SET = (("amx_int8", THEIRS), ("amx_bf16", THEIRS), ("", OURS))
_WHERE = "engine_config.runtime_env.env_vars"
_COMPILE = "install a C++ compiler and then 'quantserve-awq[engine]'"
_ACTIVATIONS = f"it rounds activations to 8 bits there unless VLLM_CPU_INT4_W4A8=0 is in {_WHERE}"
_ONLY_AVX2 = "vLLM has no AWQ kernel for CPUs without AVX-512 (vLLM issue 55613)"


@dataclass(frozen=True)
class Choice:
    """The kernel of the linears.

    Attributes:
        own: whether it is quantserve's.
        environment: the variables that lead to it.
        findings: what a person must know of the choice.
    """

    own: bool
    environment: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()


def missing() -> str | None:
    """Why quantserve's kernels cannot be used here, None when they can."""
    if find_spec("quantserve_kernels") is None:
        return "quantserve-kernels is not installed"
    from quantserve_kernels import status

    found = status()
    return None if found.native else f"quantserve-kernels is not compiled here ({found.reason})"


def usual(target: Target) -> str:
    """The kernel of a CPU whatever the model: measured here, else by its instruction set."""
    if missing():
        return THEIRS
    if no_vllm_kernel(target):
        return OURS
    measured = fastest_kernel(target, [f"{key}-4" for key in KEYS.values()])
    return next(one for one, key in KEYS.items() if measured.key == f"{key}-4") if measured else _by_features(target)


def no_vllm_kernel(target: Target) -> bool:
    """Whether vLLM is built without its kernel for this CPU, and such a model would end at its first token."""
    return "avx2" in target.features and "avx512f" not in target.features


def choose(model: ModelConfig, target: Target, vllm_cannot: str = "", experts_cannot: str = "") -> Choice:
    """The kernel of this model on this target.

    Args:
        vllm_cannot: why vLLM's kernel for CPUs cannot take the linears; "" when it can.
        experts_cannot: why vLLM's kernel for CPUs cannot take experts; "" when it can. vLLM does not look at experts
            when it chooses the kernel of linears, and quantserve's takes experts only where it was chosen there.
    """
    if target.device != "cpu":
        return Choice(own=False)
    reason = missing()
    environment = engine_environment(model, target)
    if DISABLED in environment:  # a person's choice
        left_out = disabled_kernels(environment)
        own = OURS not in left_out and not reason and bool(THEIRS in left_out or vllm_cannot)
        return Choice(own, {DISABLED: environment[DISABLED]}, _impossible(target, left_out, reason))
    if reason:
        return Choice(False, {}, _impossible(target, None, reason) or _slow(target, reason))
    if usual(target) == OURS or vllm_cannot or experts_cannot:
        return Choice(True, WITHOUT_THEIRS, _said(OURS, target) if usual(target) == OURS else ())
    return Choice(False, {}, _said(THEIRS, target))


def _by_features(target: Target) -> str:
    return next(kernel for name, kernel in BY_INSTRUCTION_SET if not name or name in target.features)


def _said(chosen: str, target: Target) -> tuple[Finding, ...]:
    """An info where a measurement decided, or AMX."""
    if measured := fastest_kernel(target, [f"{key}-4" for key in KEYS.values()]):
        if chosen == _by_features(target) == OURS:
            return ()
        ours, theirs = (1e3 * measured.seconds[f"{KEYS[kernel]}-4"] for kernel in (OURS, THEIRS))
        why = (
            f"the calibration of {measured.date} makes it the faster: {theirs:.3g} ms for a million weights with "
            f"vLLM's, {ours:.3g} ms with quantserve's (three requests of 512 tokens in and 128 out)"
        )
        fix = f"set {DISABLED} to {chosen} in {_WHERE} for the other kernel"
    elif chosen == THEIRS:
        why = (
            "this CPU has AMX, which quantserve's kernel does not use; in one rough run on an Intel Xeon vLLM's took "
            "193 ms for 64 tokens and quantserve's 1210 ms"
        )
        fix = f"run `quantserve calibrate`, which measures both here, or set {DISABLED} to {THEIRS} in {_WHERE}"
    else:
        return ()
    name = "quantserve's" if chosen == OURS else "vLLM's own"
    note = f"; {_ACTIVATIONS}" if chosen == THEIRS and target.has_amx else ""
    message = f"{name} AWQ kernel for CPUs is used: {why}{note}"
    return (Finding.info("awq-kernel", message, [f"{_WHERE}.{DISABLED}"], fix),)


def _impossible(target: Target, asked: frozenset[str] | None, reason: str | None) -> tuple[Finding, ...]:
    """An error where no kernel can be used, or vLLM asks first one that cannot.

    Args:
        asked: what a person leaves out; None for no choice.
        reason: why quantserve's kernel cannot be used.
    """
    left_out = asked or frozenset()
    theirs = f"{DISABLED} leaves vLLM's out" if THEIRS in left_out else _ONLY_AVX2 if no_vllm_kernel(target) else ""
    ours = f"{DISABLED} leaves quantserve's kernel out" if OURS in left_out else reason
    if not ours and asked is not None and THEIRS not in left_out:
        ours = f"{DISABLED} does not leave vLLM's kernel out, which is asked before quantserve's"
    if not ours or not theirs:
        return ()
    fix = _COMPILE if reason and OURS not in left_out else f"set {DISABLED} to {THEIRS}, or leave it out"
    return (Finding.error("awq-no-kernel", f"{ours}, and {theirs}", [f"{_WHERE}.{DISABLED}"], fix),)


def _slow(target: Target, reason: str) -> tuple[Finding, ...]:
    if target.has_amx:
        return ()
    return (
        Finding.warning(
            "awq-slow-kernel",
            f"{reason}, so vLLM's own AWQ kernel for CPUs is used, which without AMX is slower than an unquantized "
            "model",
            [f"{_WHERE}.{DISABLED}"],
            f"{_COMPILE}; or set {DISABLED} to {OURS} if vLLM's is meant",
        ),
    )
