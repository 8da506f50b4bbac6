"""Which kernel computes integer weights on a CPU: quantserve's or vLLM's own.

vLLM asks its own kernels for one that computes a layer, and then quantserve's, which a plugin's engine side adds with
``quantserve_kernels.vllm.register_linear_kernel``. The variable ``VLLM_DISABLED_KERNELS`` leaves kernels out by name.
With it the plan chooses, and a person overrules the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from quantserve.finding import Finding
from quantserve.method import KernelProfile
from quantserve.predict.calibration import Fastest, fastest_kernel
from quantserve.system.environment import DISABLED_KERNELS, disabled_kernels, engine_environment
from quantserve.target import Target

if TYPE_CHECKING:
    from quantserve.config import ModelConfig

OUR_KERNEL = "CodebookLinearKernel"
"""What vLLM calls quantserve's kernel for CPUs."""
VLLM_KERNEL = "CPUWNA16LinearKernel"
"""What vLLM calls its own kernel for CPUs."""
WITHOUT_THEIRS = {DISABLED_KERNELS: f"{VLLM_KERNEL},ZentorchWNA16LinearKernel"}
"""The variables that lead to quantserve's; the second of vLLM's kernels is one for AMD's package zentorch."""

# The kernel of a CPU with an instruction set; the first that the CPU has decides, and a calibration of the machine goes
# before. With AMX vLLM's took 193 ms for 64 tokens and made 120 tokens/s in batches of 16 in one rough run on an Intel
# Xeon (one thread, 0.83 billion parameters), quantserve's without AMX 1210 ms and 48 tokens/s; quantserve's with AMX
# was never timed, so vLLM's stays until a calibration measures both. On an AMD EPYC with AVX512-BF16 quantserve's is
# the faster (docs/performance.md).
BY_INSTRUCTION_SET = (("amx_int8", VLLM_KERNEL), ("amx_bf16", VLLM_KERNEL), ("", OUR_KERNEL))
_WHERE = "engine_config.runtime_env.env_vars"
_VARIABLE = f"{_WHERE}.{DISABLED_KERNELS}"
_ACTIVATIONS = f"it rounds activations to 8 bits there unless VLLM_CPU_INT4_W4A8=0 is in {_WHERE}"


@dataclass(frozen=True)
class KernelChoice:
    """The kernel of the linears.

    Attributes:
        own: whether it is quantserve's.
        environment: the variables that lead to it.
        findings: what a person must know of the choice.
    """

    own: bool
    environment: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class CpuKernels:
    """quantserve's kernel and vLLM's for the integer weights of one method.

    Attributes:
        method: the plugin's name, which starts the codes of its findings and its keys in a calibration: ``awq``.
        label: what messages call the format: ``AWQ``.
        install: what brings quantserve's kernel: ``quantserve-awq[engine]``.
    """

    method: str
    label: str
    install: str

    @property
    def keys(self) -> Mapping[str, str]:
        """The names of the two kernels in a calibration, without bits: `KernelProfile.key`."""
        return {OUR_KERNEL: f"{self.method}_codebook", VLLM_KERNEL: f"{self.method}_vllm"}

    def usual(self, target: Target, bits: int = 4) -> str:
        """The kernel of a CPU whatever the model: measured here, else by its instruction set."""
        if missing_kernels():
            return VLLM_KERNEL
        if no_vllm_kernel(target):
            return OUR_KERNEL
        measured = self._measured(target, bits)
        return next(one for one in self.keys if measured.key == self._key(one, bits)) if measured else _listed(target)

    def profile(
        self, target: Target, ours: KernelProfile, theirs: KernelProfile | None = None, bits: int = 4
    ) -> KernelProfile:
        """Of the kernel that a model usually gets, with the other one as its alternative, named for calibrations.

        Args:
            target: the CPU.
            ours: quantserve's.
            theirs: vLLM's; None for vLLM's kernel for 4 bits, as assumed from AWQ.
            bits: of a weight.
        """
        theirs = theirs or self._as_for_awq(ours, target)
        ours = replace(ours, key=self.keys[OUR_KERNEL], environment={DISABLED_KERNELS: VLLM_KERNEL})
        theirs = replace(theirs, key=self.keys[VLLM_KERNEL])
        if missing_kernels():
            return theirs
        if no_vllm_kernel(target):
            return ours
        first, second = (ours, theirs) if self.usual(target, bits) == OUR_KERNEL else (theirs, ours)
        return replace(first, alternatives=(second,))

    def choose(
        self, model: ModelConfig, target: Target, vllm_cannot: str = "", experts_cannot: str = "", bits: int = 4
    ) -> KernelChoice:
        """The kernel of this model on this target.

        Args:
            vllm_cannot: why vLLM's kernel for CPUs cannot take the linears; "" when it can.
            experts_cannot: why vLLM's kernel for CPUs cannot take experts; "" when it can. vLLM does not look at
                experts when it chooses the kernel of linears, and quantserve's takes experts only where it was chosen
                there.
            bits: of most weights.
        """
        if target.device != "cpu":
            return KernelChoice(own=False)
        reason = missing_kernels()
        environment = engine_environment(model, target)
        if DISABLED_KERNELS in environment:  # a person's choice
            left_out = disabled_kernels(environment)
            own = OUR_KERNEL not in left_out and not reason and bool(VLLM_KERNEL in left_out or vllm_cannot)
            variables = {DISABLED_KERNELS: environment[DISABLED_KERNELS]}
            return KernelChoice(own, variables, self._impossible(target, left_out, reason))
        if reason:
            return KernelChoice(False, {}, self._impossible(target, None, reason) or self._slow(target, reason))
        usual = self.usual(target, bits)
        if usual == OUR_KERNEL or vllm_cannot or experts_cannot:
            return KernelChoice(
                True, WITHOUT_THEIRS, self._said(OUR_KERNEL, target, bits) if usual == OUR_KERNEL else ()
            )
        return KernelChoice(False, {}, self._said(VLLM_KERNEL, target, bits))

    def _as_for_awq(self, ours: KernelProfile, target: Target) -> KernelProfile:
        """vLLM's kernel for 4 bits: quantserve-awq measures it and has the source of the numbers."""
        amx = target.has_amx
        return replace(
            ours,
            name=f"vLLM's {self.label} for CPUs" + " with AMX" * amx,
            bandwidth_share=((1, 0.4 if amx else 0.11),),
            flops_share=((1, 0.02), (16, 0.3), (64, 0.8), (512, 0.85)) if amx else ((1, 0.05), (16, 0.28), (512, 0.42)),
            source="assumed as for AWQ, which vLLM computes with the same kernel",
            benchmark="",
            amx=True,
            experts=amx,
            uncertainty=1.0,
        )

    def _key(self, kernel: str, bits: int) -> str:
        return f"{self.keys[kernel]}-{bits}"

    def _measured(self, target: Target, bits: int) -> Fastest | None:
        return fastest_kernel(target, [self._key(kernel, bits) for kernel in self.keys])

    def _said(self, chosen: str, target: Target, bits: int) -> tuple[Finding, ...]:
        """An info where a measurement decided, or AMX."""
        if measured := self._measured(target, bits):
            if chosen == _listed(target) == OUR_KERNEL:
                return ()
            ours, theirs = (1e3 * measured.seconds[self._key(kernel, bits)] for kernel in (OUR_KERNEL, VLLM_KERNEL))
            why = (
                f"the calibration of {measured.date} makes it the faster: {theirs:.3g} ms for a million weights with "
                f"vLLM's, {ours:.3g} ms with quantserve's (three requests of 512 tokens in and 128 out)"
            )
            fix = f"set {DISABLED_KERNELS} to {chosen} in {_WHERE} for the other kernel"
        elif chosen == VLLM_KERNEL:
            why = (
                "this CPU has AMX, with which quantserve's kernel was never timed; in one rough run on an Intel Xeon "
                "vLLM's took 193 ms for 64 tokens and quantserve's, without AMX, 1210 ms"
            )
            fix = (
                f"run `quantserve calibrate`, which measures both here, or set {DISABLED_KERNELS} to {VLLM_KERNEL} in "
                f"{_WHERE}"
            )
        else:
            return ()
        name = "quantserve's" if chosen == OUR_KERNEL else "vLLM's own"
        note = f"; {_ACTIVATIONS}" if chosen == VLLM_KERNEL and target.has_amx and bits == 4 else ""
        message = f"{name} {self.label} kernel for CPUs is used: {why}{note}"
        return (Finding.info(f"{self.method}-kernel", message, [_VARIABLE], fix),)

    def _impossible(self, target: Target, asked: frozenset[str] | None, reason: str) -> tuple[Finding, ...]:
        """An error where no kernel can be used, or vLLM asks first one that cannot.

        Args:
            asked: what a person leaves out; None for no choice.
            reason: why quantserve's kernel cannot be used.
        """
        left_out = asked or frozenset()
        only_avx2 = f"vLLM has no {self.label} kernel for CPUs without AVX-512 (vLLM issue 55613)"
        theirs = (
            f"{DISABLED_KERNELS} leaves vLLM's out"
            if VLLM_KERNEL in left_out
            else only_avx2
            if no_vllm_kernel(target)
            else ""
        )
        ours = f"{DISABLED_KERNELS} leaves quantserve's kernel out" if OUR_KERNEL in left_out else reason
        if not ours and asked is not None and VLLM_KERNEL not in left_out:
            ours = f"{DISABLED_KERNELS} does not leave vLLM's kernel out, which is asked before quantserve's"
        if not ours or not theirs:
            return ()
        compile_it = reason and OUR_KERNEL not in left_out
        fix = self._compile if compile_it else f"set {DISABLED_KERNELS} to {VLLM_KERNEL}, or leave it out"
        return (Finding.error(f"{self.method}-no-kernel", f"{ours}, and {theirs}", [_VARIABLE], fix),)

    def _slow(self, target: Target, reason: str) -> tuple[Finding, ...]:
        if target.has_amx:
            return ()
        return (
            Finding.warning(
                f"{self.method}-slow-kernel",
                f"{reason}, so vLLM's own {self.label} kernel for CPUs is used, which without AMX is slower than an "
                "unquantized model",
                [_VARIABLE],
                f"{self._compile}; or set {DISABLED_KERNELS} to {OUR_KERNEL} if vLLM's is meant",
            ),
        )

    @property
    def _compile(self) -> str:
        return f"install a C++ compiler and then '{self.install}'"


def missing_kernels() -> str:
    """Why quantserve's kernels cannot be used here; "" when they can."""
    if find_spec("quantserve_kernels") is None:
        return "quantserve-kernels is not installed"
    from quantserve_kernels import status

    found = status()
    return "" if found.native else f"quantserve-kernels is not compiled here ({found.reason})"


def no_vllm_kernel(target: Target) -> bool:
    """Whether vLLM is built without its kernel for this CPU, and such a model would end at its first token."""
    return "avx2" in target.features and "avx512f" not in target.features


def _listed(target: Target) -> str:
    return next(kernel for name, kernel in BY_INSTRUCTION_SET if not name or name in target.features)
