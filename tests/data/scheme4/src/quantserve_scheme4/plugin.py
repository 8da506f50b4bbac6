"""The light module: what `quantserve list`, `check` and `plan` ask."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

from quantserve.api import (
    DISABLED_KERNELS,
    NK,
    OUR_KERNEL,
    VLLM_KERNEL,
    BadContainer,
    Checkpoint,
    Contents,
    CpuKernels,
    Dim,
    E,
    Finding,
    K,
    KernelChoice,
    KernelProfile,
    Linear,
    Method,
    N,
    Part,
    Reader,
    Scheme,
    SkipList,
    Source,
    Target,
    Tensor,
    codebook_kernel,
    disabled_kernels,
    engine_environment,
    hookimpl,
    kernel_findings,
    linears,
    missing_kernels,
    once,
    rayllm_profile,
)

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

# Names this plugin imports and does not need; each has to stay.
NAMES = (CpuKernels, Dim, KernelChoice, disabled_kernels, missing_kernels, rayllm_profile)
SCHEME = Scheme(
    {
        "qweight": Part((N(), K(2)), ("U8",)),
        "scale": Part((N(), K(64)), ("F16",)),
        "notes": (Part((None,), ("U8", "I8"), optional=True), Part((), ("U8",), optional=True)),
    },
    bits=4,
    group_size=64,
    scales="group",
    activation_bits=16,
    kept=4.25,
)
# What no linear here has; the ways to say it have to stay.
OTHERS = Scheme(
    {
        "words": Part((E(), K(Fraction(32, 3)), N(128, partial=True)), ("I32",)),
        "flat": Part((NK(64, free=True), 1), ("F16",)),
        "blocks": Part((N(), K(block=256)), ("Q4_K",)),
    },
    bits=3,
)


@hookimpl
def quantserve_method() -> Method:
    """Describe the method."""
    return Method(
        name="scheme4",
        summary="4-bit weights, a scale for 64 inputs, in a scheme",
        bits=(4,),
        vllm_name="scheme4",
        minimum_capability=70,
        devices=("cuda", "rocm", "cpu"),
        dtypes=("float16", "bfloat16", "float32"),
        homepage="https://example.org/scheme4",
        api=1,
    )


@hookimpl
def quantserve_reader() -> Reader:
    """Files whose header is a line of JSON."""
    return Reader((".scheme4",), read)


def read(source: Source, names: tuple[str, ...]) -> Contents:
    """The tensors and the config of a container."""
    source.prefetch((name, 65536) for name in names)
    tensors = []
    for name in names:
        with source.open(name) as file:
            if file.read(4) != b"SCH4":
                raise BadContainer("it does not begin with SCH4")
            header = json.loads(file.read(int.from_bytes(file.read(4), "little")))
        for key, (dtype, shape, size) in header["tensors"].items():
            tensors.append(Tensor(key, dtype, tuple(shape), file=name, stored=size))
    tokenizer = {"present": True, "max_token_id": header["tokens"] - 1, "has_chat_template": True}
    return Contents(config=header["config"], tensors=tensors, tokenizer=tokenizer, metadata={"from": "scheme4"})


@hookimpl
def quantserve_detect(checkpoint: Checkpoint) -> bool:
    """Claim what declares itself as ours."""
    return settings(checkpoint).get("quant_method") == "scheme4"


@once
def settings(checkpoint: Checkpoint) -> Mapping[str, object]:
    """The quantization config."""
    return checkpoint.quantization_config or {}


@hookimpl
def quantserve_scheme(checkpoint: Checkpoint, linear: Linear) -> Scheme | None:
    """The same for every linear, the experts of a layer among them."""
    return SCHEME if linear.experts >= 0 and len(linear.names) >= 1 else None


@hookimpl
def quantserve_skip_list(checkpoint: Checkpoint) -> SkipList:
    """The modules that the config leaves unquantized."""
    return SkipList(settings(checkpoint).get("skip"), "exact", headers="never", key="skip")


@hookimpl
def quantserve_validate(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Iterable[Finding]:
    """What no scheme says."""
    yield from kernel_findings("scheme4", "scheme4", target)
    first = next(iter(linears(checkpoint)), None)
    if first is not None:
        where = checkpoint.container or ("safetensors",)
        yield Finding.info("scheme4-seen", f"{first.name} [{first.n}, {first.k}] of {', '.join(where)}")
    if engine_environment(model, target).get(DISABLED_KERNELS):
        yield Finding.warning("scheme4-kernels", f"{OUR_KERNEL} or {VLLM_KERNEL} may be switched off")


@hookimpl
def quantserve_environment(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> dict[str, str]:
    """A variable for the engine's processes."""
    return {"SCHEME4": "1"}


@hookimpl
def quantserve_kernel(
    target: Target, bits: int, engine: str, scheme: Scheme | None, experts: bool
) -> KernelProfile | None:
    """What the kernel reaches."""
    return codebook_kernel(target, bits, engine, 4.25 if scheme is None else scheme.kept or 4.25)
