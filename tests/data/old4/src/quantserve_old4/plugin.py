"""The light module: what `quantserve list`, `check` and `plan` ask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from quantserve.api import (
    VERSION,
    Checkpoint,
    Expected,
    Fastest,
    Finding,
    KernelProfile,
    Linear,
    Method,
    PerformanceProfile,
    PublishedRun,
    QualityNote,
    Severity,
    SkipList,
    Target,
    Tensor,
    check_fused_groups,
    check_linears,
    check_shards,
    fastest_kernel,
    hookimpl,
    linears,
    method_dtype,
    modules,
    other_tensors,
    published_profile,
    quantizable,
    quantized_linears,
    refuses_float16,
    served_dtype,
    shard_k,
    shard_n,
)

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

GROUP = 64
DTYPES = ("float16", "bfloat16")
# Names this plugin imports and does not need; each has to stay.
NAMES = (Fastest, PublishedRun, Tensor, fastest_kernel, published_profile, quantizable, refuses_float16, served_dtype)


@hookimpl
def quantserve_method() -> Method:
    """Name the method; vLLM will know it by the same name, once ``register`` has run."""
    return Method(
        name="old4",
        summary="4-bit weights, a scale for 64 inputs",
        bits=(4,),
        vllm_name="old4",
        aliases=("older4",),
        minimum_capability=70,
        devices=("cuda", "cpu"),
        dtypes=DTYPES,
        homepage="https://example.org/old4",
        api=1,
        accepts={"ancient4": {"cpu": ("old4",), "cuda": ("old4",)}},
    )


@hookimpl
def quantserve_detect(checkpoint: Checkpoint) -> bool:
    """Claim what declares itself as ours."""
    return (checkpoint.quantization_config or {}).get("quant_method") in ("old4", "older4", "ancient4")


@hookimpl
def quantserve_validate(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Iterable[Finding]:
    """Compare all tensors with the layout and the skip list, and ask for whole groups on every rank."""
    skip = SkipList((checkpoint.quantization_config or {}).get("skip"), "exact", headers="never", key="skip")
    yield from check_linears(checkpoint, layout, code="old4", skipped=skip)
    quantized, dense = quantized_linears(checkpoint, layout)
    yield from check_shards(
        quantized, model.tensor_parallel_size, code="old4-group-splits-ranks", why="a group of 64", k_multiple=GROUP
    )
    # check_linears has found them as well: the same code, and findings of one code may come twice.
    yield from check_fused_groups([linear.name for linear in dense], linears(checkpoint), code="old4-again")
    stored = modules(checkpoint)
    if quantized and not any("qweight" in stored.get(linear.name, {}) for linear in quantized):
        yield Finding(Severity.ERROR, "old4-nothing", "no linear has a qweight", ("qweight",), "quantize the model")
    first = next(iter(quantized), None)
    if first is not None and first.k:
        ranks = model.tensor_parallel_size
        share = f"{shard_n(first, ranks)} x {shard_k(first, ranks)}"
        yield Finding.info("old4-share", f"API {VERSION}: a rank has {share} of {first.name}")
    if (dtype := model.dtype) and dtype not in DTYPES:
        yield Finding.error("old4-dtype", f"dtype {dtype}", ["engine_kwargs.dtype"], f"one of {', '.join(DTYPES)}")
    if not other_tensors(checkpoint):
        yield Finding.info("old4-unknown-family", "the core does not know this family")


@hookimpl
def quantserve_engine_kwargs(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Mapping[str, object]:
    """The method, and the dtype where the target prefers another."""
    dtype = method_dtype(checkpoint, model, target, DTYPES)
    return {"quantization": "old4", **({"dtype": dtype} if dtype else {})}


@hookimpl
def quantserve_performance(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> PerformanceProfile | None:
    """Nobody measured it."""
    return None


@hookimpl
def quantserve_kernel(target: Target, bits: int, engine: str) -> KernelProfile | None:
    """What the kernel reaches."""
    if engine != "vllm-0.32":
        return None
    return KernelProfile(
        name="old kernel",
        bits_per_weight=4.25,
        bandwidth_share=((1, 0.9), (64, 0.8)),
        flops_share=((1, 0.3), (16, 0.7), (512, 0.95)),
        source="assumed",
        experts=False,
        amx=False,
        k_multiple=GROUP,
        alternatives=(
            KernelProfile(
                name="older kernel",
                bits_per_weight=4.25,
                bandwidth_share=((1, 0.5),),
                flops_share=((1, 0.3),),
                source="assumed",
                argument="older4",
            ),
        ),
    )


@hookimpl
def quantserve_quality(bits: int) -> QualityNote | None:
    """The perplexity of an imagined paper."""
    return QualityNote(perplexity=5.62, baseline=5.47, measured_on="Llama-2 7B, WikiText-2", source="a paper")


@hookimpl
def quantserve_quantizer() -> str:
    """Where the quantizer is; it may import torch."""
    return "quantserve_old4.quantize:quantize"


@hookimpl
def quantserve_converter() -> str:
    """Where the converter is; it may import torch."""
    return "quantserve_old4.quantize:convert"


def layout(linear: Linear) -> Mapping[str, Expected]:
    """The tensors of one linear, by suffix."""
    return {
        "qweight": Expected((linear.n, linear.k // 2), ("U8",)),
        "scale": Expected((linear.n, linear.k // GROUP), ("F16",)),
        "notes": Expected((None,), ("U8", "I8"), optional=True),
    }
