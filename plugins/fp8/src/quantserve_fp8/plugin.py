"""The light module of the FP8 plugin: what `quantserve list`, `check` and `plan` ask.

GPUs are served by vLLM's own method, CPUs by quantserve's kernels, weights only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import gcd
from typing import TYPE_CHECKING, Any

from quantserve.api import (
    Checkpoint,
    Finding,
    KernelProfile,
    Linear,
    Method,
    Scheme,
    SkipList,
    Target,
    Tensor,
    check_fused_blocks,
    codebook_kernel,
    dtype_argument,
    hookimpl,
    kernel_findings,
    linears,
    modules,
    once,
    quantized_linears,
    shard_k,
)
from quantserve_fp8.format import block_of, scheme, skip_key, skipped

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

SHOWN = 8
SMALLEST_BLOCK = 32
"""vLLM's kernel for experts takes parts of blocks, no smaller ones than this."""
_WHERE = "quantization_config"
_CACHE = (".k_scale", ".v_scale", ".kv_scale")


@hookimpl
def quantserve_method() -> Method:
    """Describe FP8 as vLLM and this plugin serve it."""
    return Method(
        name="fp8",
        summary="8-bit floats (E4M3) with scales per tensor, output channel or 128 x 128 block",
        bits=(8,),
        vllm_name="fp8",
        minimum_capability=75,
        devices=("cuda", "rocm", "cpu"),
        dtypes=("float16", "bfloat16"),
        homepage="https://arxiv.org/abs/2209.05433",
    )


@hookimpl
def quantserve_detect(checkpoint: Checkpoint) -> bool:
    """Claim what declares FP8; where no config declares a method, FP8 weights with a scale beside them."""
    config = checkpoint.quantization_config
    if config is not None and (config.get("quant_method") or checkpoint.config.get("quantization_config") is None):
        return config.get("quant_method") == "fp8"  # hf_quant_config.json is modelopt's
    return any({"weight_scale", "weight_scale_inv"} & tensors.keys() for tensors in stored(checkpoint).values())


@hookimpl
def quantserve_scheme(checkpoint: Checkpoint, linear: Linear) -> Scheme | None:
    """One scheme for all linears; None where the config's and the files' differ, which a finding says."""
    return stored_scheme(checkpoint)


@hookimpl
def quantserve_skip_list(checkpoint: Checkpoint) -> SkipList:
    """The unquantized modules, by their whole names; what the files hold does not count in vLLM."""
    config = settings(checkpoint)
    return SkipList(skipped(config), "exact", headers="never", key=skip_key(config))


@hookimpl
def quantserve_validate(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Iterable[Finding]:
    """What is peculiar to FP8; the core compares the tensors with their scheme."""
    config, gpu = settings(checkpoint), target.device != "cpu"
    if not gpu:
        yield from kernel_findings("fp8", "FP8", target)
    if not stored(checkpoint) and checkpoint.tensors_complete:
        yield Finding.error(
            "fp8-not-quantized",
            "FP8 is declared or asked for, and no weight of the files is FP8: vLLM would round the weights to FP8 "
            "without a scale, or stop",
            [f"{_WHERE}.quant_method"],
            "serve the files as they are, without quantization_config, or with quantization: fp8_per_tensor, which "
            "quantizes while it loads",
        )
        return
    yield from settings_findings(config)
    yield from scale_findings(checkpoint, config)
    if not gpu:
        yield from stack_findings(checkpoint)
    if gpu:
        yield from gpu_findings(checkpoint, config)
        yield from block_findings(checkpoint, model)
    if scales := [name for name in checkpoint.tensors if name.endswith(_CACHE)]:
        asked = model.engine_kwargs.get("kv_cache_dtype", "auto")
        if not str(asked).startswith("fp8"):
            yield Finding.info(
                "fp8-kv-scales",
                f"{len(scales)} scales of an FP8 KV cache are not used, as kv_cache_dtype is {asked}",
                scales[:SHOWN],
                "set engine_kwargs.kv_cache_dtype to fp8 on a GPU for a cache of half the size",
            )


@hookimpl
def quantserve_engine_kwargs(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Mapping[str, object]:
    """The dtype where a CPU prefers another than the files'."""
    return dtype_argument(checkpoint, model, target, ("float16", "bfloat16"))


@hookimpl
def quantserve_quantizer() -> str:
    """Rounding to the nearest; needs torch and quantserve-quantize."""
    return "quantserve_fp8.quantizer:Fp8"


@hookimpl
def quantserve_kernel(target: Target, bits: int, engine: str) -> KernelProfile | None:
    """quantserve's kernel on CPUs; vLLM's on GPUs, as assumed."""
    if engine != "vllm-0.32" or target.device == "cpu":
        return codebook_kernel(target, bits, engine, 8.25, benchmark="quantserve_fp8._benchmark:make")
    native = target.device == "rocm" or (target.capability or 0) >= 89
    return KernelProfile(
        name="CUTLASS or DeepGEMM FP8 (vLLM)" if native else "Marlin FP8 (vLLM)",
        bits_per_weight=8.0,
        bandwidth_share=((1, 0.7), (64, 0.7), (256, 0.6)),
        flops_share=((1, 0.3), (64, 0.6), (512, 1.1), (4096, 1.3)) if native else ((1, 0.3), (64, 0.5), (2048, 0.6)),
        source="assumed, not measured",
        uncertainty=0.6,
    )


def settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The quantization config."""
    return checkpoint.quantization_config or {}


@once
def stored(checkpoint: Checkpoint) -> Mapping[str, Mapping[str, Tensor]]:
    """The tensors of the modules with FP8 weights of any kind, those of all experts of a layer in one included."""
    found = modules(checkpoint).items()
    return {name: every for name, every in found if "weight" in every and every["weight"].dtype.startswith("F8_")}


@once
def stored_scheme(checkpoint: Checkpoint) -> Scheme | None:
    """The scheme that vLLM reads by the config; None where the files hold another one, or the config says none."""
    config = settings(checkpoint)
    try:
        block = block_of(config)
    except ValueError:
        return None
    return None if not stored(checkpoint) or list(scale_findings(checkpoint, config)) else scheme(block)


def settings_findings(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Settings at which vLLM stops."""
    activations = config.get("activation_scheme", "missing")
    if activations not in ("static", "dynamic"):
        yield Finding.error(
            "fp8-activation-scheme",
            f"activation_scheme is {activations}; vLLM takes static and dynamic",
            [f"{_WHERE}.activation_scheme"],
            'set it to "dynamic", unless the files hold an input_scale for every linear',
        )
    try:
        block = block_of(config)
    except ValueError as error:
        yield Finding.error("fp8-block-size", str(error), [f"{_WHERE}.weight_block_size"], "correct the config")
        return
    if block is not None and activations == "static":
        yield Finding.error(
            "fp8-activation-scheme",
            "weight_block_size goes with activation_scheme dynamic only, and it is static",
            [f"{_WHERE}.activation_scheme"],
            'set it to "dynamic"',
        )


def scale_findings(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Scales under the name of the other kind: vLLM looks for one name, and leaves uninitialised what has the other."""
    blocks = config.get("weight_block_size") is not None
    right, wrong = ("weight_scale_inv", "weight_scale")[:: 1 if blocks else -1]
    every = stored(checkpoint).values()
    found = [tensors[wrong].name for tensors in every if wrong in tensors]
    if not found or any(right in tensors for tensors in every):
        return
    shape = list(checkpoint.tensors[found[0]].shape)
    said = f"weight_block_size {config['weight_block_size']}" if blocks else "no weight_block_size"
    yield Finding.error(
        "fp8-scale-name",
        f"the config has {said}, for which vLLM reads {right}, and the files hold {wrong} {shape}",
        found[:SHOWN],
        "remove weight_block_size"
        if blocks
        else "set weight_block_size to the blocks' size, such as [128, 128]"
        if len(shape) == 2 and shape[1] > 1
        else "rename the tensors to weight_scale",
    )


def gpu_findings(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterator[Finding]:
    """What vLLM's own method overlooks or refuses."""
    every = stored(checkpoint)
    missing = [f"{name}.input_scale" for name, tensors in every.items() if "input_scale" not in tensors]
    if missing and config.get("activation_scheme") == "static" and checkpoint.tensors_complete:
        yield Finding.error(
            "fp8-input-scale",
            f"activation_scheme is static, and {len(missing)} linears have no input_scale, which vLLM does not "
            f"report. First: {missing[0]}",
            missing[:SHOWN],
            'set activation_scheme to "dynamic"',
        )
    scales = [tensors["weight_scale"] for tensors in every.values() if "weight_scale" in tensors]
    if rows := [f"{one.name} {list(one.shape)}" for one in scales if len(one.shape) == 2]:
        yield Finding.error(
            "fp8-channel-scales",
            f"{len(rows)} linears have a scale for each output channel, and vLLM's fp8 method reads one a tensor. "
            f"First: {rows[0]}",
            rows[:SHOWN],
            "export the model as compressed-tensors, or serve it on a CPU",
        )
    if heads := [name for name in every if name.endswith("lm_head")]:
        yield Finding.error(
            "fp8-lm-head",
            "the output layer is FP8, and vLLM's fp8 method takes it for unquantized: its scale would be lost",
            heads,
            "leave lm_head unquantized",
        )
    if config.get("weight_block_size") is not None and str(checkpoint.config.get("model_type")).startswith("gemma4"):
        yield Finding.warning(
            "fp8-gemma4-blocks",
            "FP8 in blocks on Gemma 4 was reported to answer with wrong text (vllm issue 39407)",
            ["model_type"],
            "compare a few answers with the unquantized model, or use an export with scales per channel",
        )


def stack_findings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Experts in one tensor [e, k, n], which the kernels' side reads as [e, n, k]."""
    stacks = [(linear, stored(checkpoint).get(linear.name)) for linear in linears(checkpoint) if linear.stacked]
    shapes = [(one, tensors["weight"]) for one, tensors in stacks if tensors]
    if odd := [
        f"{tensor.name} {list(tensor.shape)}"
        for one, tensor in shapes
        if tensor.shape[1:] == (one.k, one.n) != (one.n, one.k)
    ]:
        yield Finding.error(
            "fp8-stacked-experts",
            f"{len(odd)} tensors of all experts of a layer are [experts, in, out], and CPUs are served [experts, out, "
            f"in]. First: {odd[0]}",
            odd[:SHOWN],
            "serve it on a GPU, or export it with a tensor for each expert",
        )


def block_findings(checkpoint: Checkpoint, model: ModelConfig) -> Iterator[Finding]:
    """Blocks that vLLM's layers cannot hold: it stops, or places scales over those of another part."""
    found, ranks = stored_scheme(checkpoint), model.tensor_parallel_size
    if found is None or found.scales != "block":
        return
    rows, columns = block_of(settings(checkpoint)) or (1, 1)
    every = quantized_linears(checkpoint, lambda linear: found)[0]
    yield from check_fused_blocks(every, ranks, rows, code="fp8-blocks")
    if model.engine_kwargs.get("enable_expert_parallel"):
        ranks = 1
    odd = []
    for linear in every:
        width = shard_k(linear, ranks)
        if linear.fused == "experts" and linear.parallel == "row" and (width % rows or (ranks > 1 and width % columns)):
            odd += [f"{linear.name}: {width} inputs a rank"] * (gcd(rows, columns, width, linear.n) < SMALLEST_BLOCK)
    if odd:
        yield Finding.error(
            "fp8-blocks",
            f"vLLM serves experts in blocks of {rows} x {columns}, or in parts of blocks down to {SMALLEST_BLOCK}, and "
            f"the width of {len(odd)} layers' experts is a multiple of neither. First: {odd[0]}",
            odd[:SHOWN],
            "set another scaling_config.num_workers, or engine_kwargs.enable_expert_parallel",
        )
