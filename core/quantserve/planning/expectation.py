"""What to expect of one model with one method: the plugin's kernel, the machine's numbers, and a prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quantserve.method import KernelProfile, Method, PerformanceProfile, QualityNote
from quantserve.model.context import context_length
from quantserve.model.engine_defaults import max_num_batched_tokens, max_num_seqs
from quantserve.model.layers import linears
from quantserve.model.modules import undescribed
from quantserve.plugins import contract
from quantserve.plugins.registry import Hooks, Plugin
from quantserve.predict.calibration import find_calibration
from quantserve.predict.machine import ENGINE_2023, ENGINE_NOW, LinearCost, Machine, linear_cost, machine_of
from quantserve.predict.prediction import Prediction, predict
from quantserve.predict.shape import Shape, read_shape, stored_bits_per_weight
from quantserve.predict.simulate import Limits
from quantserve.predict.workload import WORKLOADS, Workload
from quantserve.system.environment import includes

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint
    from quantserve.checks.memory import MemoryEstimate
    from quantserve.checks.stored import Stored
    from quantserve.config import ModelConfig
    from quantserve.scheme import Scheme
    from quantserve.target import Target

EXPECTED_WORKLOAD = WORKLOADS["llmperf"]
ALONE = WORKLOADS["single"]


@dataclass(frozen=True)
class Expectation:
    """Everything a prediction of one model with one method rests on.

    Attributes:
        shape: of the model on one rank.
        machine: its numbers.
        kernel: the method's.
        linears: the two put together.
        limits: of the scheduler.
        max_model_len: tokens of prompt and answer; 0 when unknown.
        notes: about the machine and its calibration.
    """

    shape: Shape
    machine: Machine
    kernel: KernelProfile
    linears: LinearCost
    limits: Limits
    max_model_len: int
    notes: tuple[str, ...] = ()

    @property
    def measured(self) -> bool:
        """Whether the kernel's times were measured on this machine."""
        return self.linears.measured is not None

    def predict(self, workload: Workload) -> Prediction:
        """One workload, shortened when the model's context is too short for it."""
        return predict(self.shape, self.machine, self.linears, fitted(workload, self.max_model_len), self.limits)


def expectation(
    plugin: Plugin,
    checkpoint: Checkpoint,
    model: ModelConfig,
    target: Target,
    memory: MemoryEstimate | None,
    *,
    bits: int | None = None,
    engine: str = ENGINE_NOW,
    hooks: Hooks | None = None,
    argument: object = None,
    environment: Mapping[str, str] | None = None,
    stored: Stored | None = None,
) -> Expectation | None:
    """What a model with the method of `plugin` can be predicted from; None when the plugin or the shape is unknown.

    Args:
        memory: estimate that says how many tokens the KV cache holds; None for no limit.
        bits: one of the method's; None is what the files hold.
        engine: ``vllm-0.32``, or ``vllm-0.2.2`` for the 2023 tables.
        argument, environment: the ``quantization`` argument and the variables of the plan, which choose among a
            method's kernels; None for its first.
        stored: the linears by their schemes, where the files are in the method's format.

    Raises:
        PluginError: the plugin's hook is defective.
    """
    shape = read_shape(checkpoint, model, target, stored)
    if shape is None or plugin.method is None:
        return None
    per_weight = stored_bits_per_weight(checkpoint, stored)
    width = bits or width_of(plugin.method, per_weight)
    kernel = kernel_of(plugin, target, width, engine, hooks, prevailing(stored), has_experts(checkpoint))
    if kernel is None:
        return None
    kernel = chosen(kernel, argument, environment)
    found = find_calibration(target)
    machine = machine_of(target, found.calibration, engine, eager=model.engine_kwargs.get("enforce_eager") is True)
    length = context_length(checkpoint, model) or 0
    old = engine == ENGINE_2023
    limits = Limits(
        sequences=256 if old else max_num_seqs(model, target),
        step_tokens=max(2560, length) if old else max_num_batched_tokens(model, target),
        cache_tokens=memory.kv_tokens if memory else 0,
        prefill_first=machine.engine.prefill_first,
        window=shape.window,
    )
    linears = linear_cost(machine, kernel, kernel_key(plugin.method, width, kernel), per_weight)
    notes = (*machine.notes, *([found.note] if found.note else []))
    if machine.source == "calibration" and linears.measured is None:
        notes = (*notes, f"{kernel.name}, {width} bits: this kernel is not in the calibration, shares are used")
    return Expectation(shape, machine, kernel, linears, limits, length, notes)


def kernel_key(method: Method, bits: int, kernel: KernelProfile) -> str:
    """The name of a kernel in a calibration: ``squeezellm-4``; of one of several, ``awq_codebook-4``."""
    return f"{kernel.key or kernel.argument or method.name}-{bits}"


def chosen(kernel: KernelProfile, argument: object, environment: Mapping[str, str] | None) -> KernelProfile:
    """Of a kernel and its alternatives the one that a plan with this argument and these variables leads to.

    That is the most particular of those whose argument and variables, if they give any, are the plan's.
    """
    fitting = [
        one
        for one in (kernel, *kernel.alternatives)
        if one.argument in ("", argument) and (environment is None or includes(environment, one.environment))
    ]
    return max(
        fitting, key=lambda one: (bool(one.argument), len(one.environment) if environment else 0), default=kernel
    )


def width_of(method: Method, stored: float | None) -> int:
    """The method's width that files with so many stored bits a weight have; its widest without files."""
    if stored is None:
        return max(method.bits)
    return max((bits for bits in method.bits if bits <= stored + 0.01), default=min(method.bits))


def kernel_of(
    plugin: Plugin,
    target: Target,
    bits: int,
    engine: str = ENGINE_NOW,
    hooks: Hooks | None = None,
    scheme: Scheme | None = None,
    experts: bool = False,
) -> KernelProfile | None:
    """Ask a method plugin for its kernel; None when it says nothing.

    Raises:
        PluginError: it raised, or returned something else.
    """
    hook, take = "quantserve_kernel", contract.kernel_of
    given = {"target": target, "bits": bits, "engine": engine, "scheme": scheme, "experts": experts}
    return (hooks or Hooks([plugin])).call(plugin, hook, take, **given)  # type: ignore[no-any-return]


def has_experts(checkpoint: Checkpoint) -> bool:
    """Whether the model is a mixture of experts."""
    return any(linear.fused == "experts" for linear in (*linears(checkpoint), *undescribed(checkpoint)))


def prevailing(stored: Stored | None) -> Scheme | None:
    """The scheme of most of the quantized weights."""
    weights: dict[int, tuple[int, Scheme]] = {}
    for linear, scheme in (*stored.quantized, *stored.unsized) if stored else ():
        before = weights.get(id(scheme), (0, scheme))[0]
        weights[id(scheme)] = (before + linear.weights, scheme)
    return max(weights.values(), key=lambda one: one[0])[1] if weights else None


def kernel_name(
    plugin: Plugin,
    checkpoint: Checkpoint,
    target: Target,
    hooks: Hooks,
    argument: object,
    environment: Mapping[str, str],
    stored: Stored | None,
) -> str:
    """The name of the kernel that a plan with these leads to; "" when the plugin gives none."""
    if plugin.method is None:
        return ""
    bits = width_of(plugin.method, stored_bits_per_weight(checkpoint, stored))
    kernel = kernel_of(plugin, target, bits, hooks=hooks, scheme=prevailing(stored), experts=has_experts(checkpoint))
    return chosen(kernel, argument, environment).name if kernel else ""


def quality_of(plugin: Plugin, bits: int) -> QualityNote | None:
    """Ask a method plugin for the published cost in quality; raises like `kernel_of`."""
    return Hooks([plugin]).call(  # type: ignore[no-any-return]
        plugin, "quantserve_quality", contract.quality_of, bits=bits
    )


def fitted(workload: Workload, max_model_len: int) -> Workload:
    """The workload with prompts and answers shortened alike until a request fits the context."""
    longest = workload.input_tokens + workload.output_tokens
    if not max_model_len or longest <= max_model_len:
        return workload
    part = max_model_len / longest
    tokens_in = max(1, int(workload.input_tokens * part))
    return replace(
        workload,
        input_tokens=tokens_in,
        output_tokens=max(1, max_model_len - tokens_in - 1),
        input_spread=workload.input_spread * part,
        output_spread=workload.output_spread * part,
        known=(),
    )


def as_profile(made: Expectation, prediction: Prediction, target: Target) -> PerformanceProfile:
    """A prediction as the plan and ``/v1/models`` show it."""
    workload = prediction.workload
    engine = made.machine.engine
    return PerformanceProfile(
        source=prediction.source,
        conditions=f"predicted for {workload} on {target}; {made.kernel.name}; estimated band: a factor of "
        f"{1 + prediction.uncertainty:.2f} either way",
        e2e_ms=_rounded(prediction.e2e_ms),
        ttft_ms=_rounded(prediction.ttft_ms),
        itl_ms=_rounded(prediction.itl_ms),
        output_tokens_per_s=_rounded(prediction.tokens_per_s_per_user),
        caveats=("throughput is per user", f"engine costs: {engine.source}", *made.notes),
    )


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
