"""The light module of the MXFP4 plugin: what `quantserve list`, `check` and `plan` ask.

GPUs are served by vLLM's own method, CPUs by quantserve's kernels, weights only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from quantserve.api import (
    Checkpoint,
    Finding,
    KernelProfile,
    Linear,
    Method,
    Scheme,
    Target,
    check_shards,
    codebook_kernel,
    dtype_argument,
    hookimpl,
    kernel_findings,
    quantized_linears,
)
from quantserve_mxfp4.format import DECLARED, GROUP, SCHEME, STACKS, is_stack

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

DTYPES = ("bfloat16",)
SHOWN = 8
FAMILY = "gpt_oss"
SWIGLU = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}
"""The numbers of the activation that vLLM computes, whatever config.json says."""
SIZES = (
    "num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "num_local_experts", "num_attention_heads",
    "num_key_value_heads", "head_dim",
)  # fmt: skip
_BLOCKS, _ORIGINAL = "_blocks", ".mlp.mlp1_weight.blocks"


@hookimpl
def quantserve_method() -> Method:
    """Describe MXFP4 as vLLM and this plugin serve it."""
    return Method(
        name="mxfp4",
        summary="gpt-oss: experts of 4-bit floats (E2M1) in blocks of 32 with a power of two as scale",
        bits=(4,),
        vllm_name="mxfp4",
        aliases=DECLARED[1:],
        minimum_capability=80,
        devices=("cuda", "rocm", "cpu"),
        dtypes=DTYPES,
        families=(FAMILY,),
        homepage="https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf",
    )


@hookimpl
def quantserve_detect(checkpoint: Checkpoint) -> bool:
    """Claim what declares MXFP4; where no method is declared, blocks of experts, in OpenAI's own layout too."""
    if declared := (checkpoint.quantization_config or {}).get("quant_method"):
        return str(declared).lower() in DECLARED
    return bool(stacks(checkpoint)) or any(map(is_original, checkpoint.tensors))


@hookimpl
def quantserve_scheme(checkpoint: Checkpoint, linear: Linear) -> Scheme | None:
    """Experts are quantized, and nothing else."""
    return SCHEME if is_stack(linear.name) else None


@hookimpl
def quantserve_validate(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Iterable[Finding]:
    """What is peculiar to gpt-oss; the core compares the tensors with their scheme."""
    cpu = target.device == "cpu"
    if cpu:
        yield from kernel_findings("mxfp4", "MXFP4", target)
    if original := [name for name in checkpoint.tensors if is_original(name)]:
        yield Finding.error(
            "mxfp4-original-file",
            "these are OpenAI's own files, which vLLM does not load",
            original[:SHOWN],
            "serve the folder above `original`: it has the same weights under transformers' names",
        )
        return
    if not checkpoint.tensors_complete:
        return
    kind = checkpoint.text_config.get("model_type")
    quantized = stacks(checkpoint)
    if not quantized and (listed := [name for name, one in checkpoint.tensors.items() if is_listed(name, one.dtype)]):
        yield (Finding.error if cpu else Finding.warning)(
            "mxfp4-layout",
            f"each expert has tensors of its own, which {'is not served on CPUs' if cpu else 'is not checked here'}. "
            f"First: {listed[0]}",
            listed[:SHOWN],
            "serve the model on a GPU, or export it with llm-compressor" if cpu else "try it: vLLM may serve it",
        )
        return
    if not quantized:
        yield Finding.error(
            "mxfp4-not-quantized",
            f"MXFP4 is declared or asked for, and no tensor of the files is an expert in MXFP4 (experts.*{_BLOCKS}): "
            + ("vLLM stops at experts in 16 bits" if kind == FAMILY else "it quantizes no other linears"),
            ["quantization_config.quant_method"],
            "remove quantization_config and serve the files as they are, or download the MXFP4 files",
        )
        return
    if kind != FAMILY:
        yield Finding.error(
            "mxfp4-family",
            f"the experts are stored in blocks, which vLLM loads for {FAMILY} only, and model_type is {kind!r}",
            ["model_type"],
            "export the model with llm-compressor (MXFP4A16), or use the config.json that belongs to these files",
        )
        return
    yield from size_findings(checkpoint)
    given = {key: checkpoint.text_config.get(key, usual) for key, usual in SWIGLU.items()}
    if given != SWIGLU:
        yield Finding.error(
            "mxfp4-swiglu",
            f"the config has {given}, and vLLM computes the experts' activation with {SWIGLU} whatever it says",
            [key for key in SWIGLU if given[key] != SWIGLU[key]],
            "serve the model with transformers, or correct config.json",
        )
    if cpu and not model.engine_kwargs.get("enable_expert_parallel"):
        yield from check_shards(
            quantized_linears(checkpoint, lambda one: quantserve_scheme(checkpoint, one))[0],
            model.tensor_parallel_size,
            code="mxfp4-group-splits-ranks",
            why=f"blocks of {GROUP} inputs must stay on one rank on CPUs",
            k_multiple=GROUP,
        )


@hookimpl
def quantserve_engine_kwargs(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Mapping[str, object]:
    """The dtype where the files say another one."""
    return dtype_argument(checkpoint, model, target, DTYPES)


@hookimpl
def quantserve_kernel(target: Target, bits: int, engine: str) -> KernelProfile | None:
    """quantserve's kernel on CPUs, with scales in bfloat16; vLLM's on GPUs, as assumed."""
    if engine != "vllm-0.32" or target.device == "cpu":
        return codebook_kernel(target, bits, engine, 4 + 16 / GROUP, benchmark="quantserve_mxfp4._benchmark:make")
    return KernelProfile(
        name="MXFP4 experts (vLLM: FlashInfer, Triton, Marlin or AITER)",
        bits_per_weight=4 + 8 / GROUP,
        bandwidth_share=((1, 0.6), (64, 0.6), (256, 0.5)),
        flops_share=((1, 0.2), (64, 0.4), (2048, 0.6)),
        source="assumed, not measured",
        uncertainty=0.8,
    )


def is_original(name: str) -> bool:
    """Whether a tensor is one of OpenAI's own files."""
    return name.endswith(_ORIGINAL)


def is_listed(name: str, dtype: str) -> bool:
    """Whether a tensor holds 4-bit values of one expert, as no public export has them under this method's name."""
    return ".experts." in name and name.endswith(".weight") and dtype == "U8"


def stacks(checkpoint: Checkpoint) -> list[str]:
    """The tensors of blocks of experts."""
    return [name for name in checkpoint.tensors if is_stack(name.removesuffix(_BLOCKS)) and name.endswith(_BLOCKS)]


def size_findings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Tensors that are not what config.json implies; vLLM misses none of a quantized model. Scales are the core's."""
    tensors, wanted = checkpoint.tensors, sizes(checkpoint)
    if missing := [name for name in wanted if name not in tensors]:
        yield Finding.error(
            "mxfp4-missing-tensors",
            f"{len(missing)} tensors are missing, so vLLM stops or serves uninitialised weights. First: {missing[0]}",
            missing[:SHOWN],
            "download the checkpoint again",
        )
    shapes = {name: tensors[name].shape for name in wanted if name in tensors}
    odd = [f"{name} {list(has)}, expected {list(wanted[name])}" for name, has in shapes.items() if has != wanted[name]]
    if odd:
        yield Finding.error(
            "mxfp4-wrong-shape",
            f"{len(odd)} tensors have another shape than config.json implies. First: {odd[0]}",
            odd[:SHOWN],
            "use the config.json that belongs to these files",
        )


def sizes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors but the experts' scales, by name; empty where config.json lacks a size."""
    given = [checkpoint.text_config.get(key) for key in SIZES]
    if not all(type(size) is int and size > 0 for size in given):
        return {}
    layers, vocabulary, hidden, width, experts, heads, kv_heads, head = (size for size in given if type(size) is int)
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(min(layers, len(checkpoint.tensors))):
        block = f"model.layers.{layer}."
        found |= {f"{block}{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
        found[f"{block}self_attn.sinks"] = (heads,)
        for linear, n, k in (
            ("self_attn.q_proj", heads * head, hidden),
            ("self_attn.k_proj", kv_heads * head, hidden),
            ("self_attn.v_proj", kv_heads * head, hidden),
            ("self_attn.o_proj", hidden, heads * head),
            ("mlp.router", experts, hidden),
        ):
            found |= {f"{block}{linear}.weight": (n, k), f"{block}{linear}.bias": (n,)}
        for stack, n, k in zip(STACKS, (2 * width, hidden), (hidden, width), strict=True):
            name = f"{block}mlp.experts.{stack}"
            found |= {f"{name}{_BLOCKS}": (experts, n, k // GROUP, GROUP // 2), f"{name}_bias": (experts, n)}
    return found
