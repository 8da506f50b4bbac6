"""Which kernel an AWQ model gets on a CPU: quantserve's or vLLM's own."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from quantserve.api import Finding, Target, fastest_kernel

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

METHOD = "awq"  # vLLM's own
KERNEL_METHOD = "quantserve_awq"  # what `_vllm` registers; a config that names it gets quantserve's kernel
VLLM_ALIAS = "awq_vllm"  # what a config says to get vLLM's own on a CPU

# The kernel of a CPU with an instruction set, as its `quantization` argument; the first that the CPU has decides, and
# a calibration of the machine goes before. vLLM's has AMX, where one rough run on an Intel Xeon (one thread, 0.83
# billion parameters) took 193 ms for 64 tokens and made 120 tokens/s in batches of 16; quantserve's has none and took
# 1210 ms and made 48 tokens/s. On an AMD EPYC with AVX512-BF16 quantserve's is the faster (docs/performance.md).
BY_INSTRUCTION_SET = (("amx_int8", METHOD), ("amx_bf16", METHOD), ("", KERNEL_METHOD))
CALIBRATED = (f"{KERNEL_METHOD}-4", f"{METHOD}-4")
_ACTIVATIONS = "it rounds activations to 8 bits there unless VLLM_CPU_INT4_W4A8=0 is in runtime_env.env_vars"


@dataclass(frozen=True)
class Choice:
    """The kernel of the linears.

    Attributes:
        argument: the ``quantization`` argument that leads to it.
        findings: what a person must know of the choice.
    """

    argument: str
    findings: tuple[Finding, ...] = ()

    @property
    def own(self) -> bool:
        """Whether it is quantserve's."""
        return self.argument == KERNEL_METHOD


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
        return METHOD
    measured = fastest_kernel(target, CALIBRATED)
    return measured.key.removesuffix("-4") if measured else _by_instruction_set(target)


def choose(model: ModelConfig, target: Target, vllm_cannot: str = "") -> Choice:
    """The kernel of this model on this target.

    Args:
        vllm_cannot: why vLLM's kernel for CPUs cannot take this model; "" when it can.
    """
    if target.device != "cpu" or model.quantization == VLLM_ALIAS:
        return Choice(METHOD)
    if model.quantization == KERNEL_METHOD:
        return Choice(KERNEL_METHOD, _unusable())
    if reason := missing():
        return Choice(METHOD, () if target.has_amx else (_slow(reason),))
    argument = usual(target)
    if argument == METHOD and vllm_cannot:
        return Choice(KERNEL_METHOD)
    return Choice(argument, _said(argument, target))


def _by_instruction_set(target: Target) -> str:
    return next(kernel for name, kernel in BY_INSTRUCTION_SET if not name or name in target.features)


def _said(argument: str, target: Target) -> tuple[Finding, ...]:
    """An info where a measurement decided, or AMX."""
    ours, theirs = CALIBRATED
    other = VLLM_ALIAS if argument == KERNEL_METHOD else KERNEL_METHOD
    name = "quantserve's" if argument == KERNEL_METHOD else "vLLM's own"
    if measured := fastest_kernel(target, CALIBRATED):
        if argument == _by_instruction_set(target) == KERNEL_METHOD:
            return ()
        why = (
            f"the calibration of {measured.date} makes it the faster: {1e3 * measured.seconds[theirs]:.3g} ms for a "
            f"million weights with vLLM's, {1e3 * measured.seconds[ours]:.3g} ms with quantserve's (three requests of "
            "512 tokens in and 128 out)"
        )
        fix = f"set engine_kwargs.quantization to {other} for the other kernel"
    elif argument == METHOD:
        why = (
            "this CPU has AMX, which quantserve's kernel does not use; in one rough run on an Intel Xeon vLLM's took "
            "193 ms for 64 tokens and quantserve's 1210 ms"
        )
        fix = f"run `quantserve calibrate`, which measures both here, or set engine_kwargs.quantization to {other}"
    else:
        return ()
    note = f"; {_ACTIVATIONS}" if argument == METHOD and target.has_amx else ""
    message = f"{name} AWQ kernel for CPUs is used: {why}{note}"
    return (Finding.info("awq-kernel", message, ["engine_kwargs.quantization"], fix),)


def _unusable() -> tuple[Finding, ...]:
    if not (reason := missing()):
        return ()
    return (
        Finding.error(
            "awq-no-kernel",
            f"engine_kwargs.quantization is {KERNEL_METHOD}, and {reason}",
            ["engine_kwargs.quantization"],
            "install a C++ compiler and then 'quantserve-awq[engine]', or set engine_kwargs.quantization to "
            f"{VLLM_ALIAS}",
        ),
    )


def _slow(reason: str) -> Finding:
    return Finding.warning(
        "awq-slow-kernel",
        f"{reason}, so vLLM's own AWQ kernel for CPUs is used, which without AMX is slower than an unquantized model",
        ["engine_kwargs.quantization"],
        f"install a C++ compiler and then 'quantserve-awq[engine]'; or set engine_kwargs.quantization to {VLLM_ALIAS} "
        "if vLLM's is meant",
    )
