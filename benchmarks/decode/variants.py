"""What is compared: the table of variants. A new one is a new row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.console import BenchError

REFERENCE = "bf16"


@dataclass(frozen=True)
class Variant:
    """One column of bars.

    Attributes:
        name: what the command line and the tables call it.
        about: one line for the report.
        checkpoint: a key of `checkpoints.MAKERS`, or of `shapes.GGUF`.
        plugins: the vLLM general plugins its process loads, and no others.
        engine_args: arguments of `vllm.LLM` besides the common ones (`engine.COMMON`).
        planned: quantserve's plan gives the engine arguments and variables of the format.
        peer: llama.cpp instead of vLLM.
        default: whether it takes part when nobody names variants.
    """

    name: str
    about: str
    checkpoint: str
    plugins: tuple[str, ...] = ()
    engine_args: Mapping[str, object] = field(default_factory=dict)
    planned: bool = False
    peer: bool = False
    default: bool = True


def further(name: str, about: str, checkpoint: str, plugin: str) -> Variant:
    """A format that takes part when it is named, or with `all`."""
    return Variant(name, about, checkpoint, (plugin,), planned=True, default=False)


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("bf16", "vLLM, unquantized", "bf16"),
        Variant("awq-vllm", "vLLM's own AWQ on CPU", "awq", engine_args={"quantization": "awq"}),
        Variant("awq", "AWQ by quantserve-awq", "awq", ("awq",), planned=True),
        Variant(
            "squeezellm",
            "SqueezeLLM 4-bit by quantserve-squeezellm",
            "squeezellm-4",
            ("squeezellm",),
            {"quantization": "squeezellm"},
        ),
        Variant(
            "squeezellm-3",
            "SqueezeLLM 3-bit by quantserve-squeezellm",
            "squeezellm-3",
            ("squeezellm",),
            {"quantization": "squeezellm"},
            default=False,
        ),
        further("gptq", "GPTQ 4-bit, groups of 128", "gptq-4", "gptq"),
        further("w4a16", "compressed-tensors W4A16, groups of 128", "w4a16", "compressed-tensors"),
        further("hqq", "HQQ 4-bit, groups of 64", "hqq", "hqq"),
        further("nf4", "bitsandbytes NF4", "nf4", "bitsandbytes"),
        further("mxfp4", "compressed-tensors MXFP4", "mxfp4", "compressed-tensors"),
        further("nvfp4", "ModelOpt NVFP4", "nvfp4", "modelopt"),
        further("gguf-q4_0", "GGUF Q4_0 by quantserve-gguf", "q4_0", "gguf"),
        further("gguf-q4_k_m", "GGUF Q4_K_M by quantserve-gguf", "q4_k_m", "gguf"),
        further("gptq-8", "GPTQ 8-bit, groups of 128", "gptq-8", "gptq"),
        further("fp8", "FP8, a scale for each output channel", "fp8", "fp8"),
        further("fp8-block", "FP8, a scale for each 128 x 128 block", "fp8-block", "fp8"),
        Variant("llama.cpp", "llama.cpp, Q4_0", "q4_0", peer=True),
        Variant("llama.cpp-q4_k_m", "llama.cpp, Q4_K_M", "q4_k_m", peer=True, default=False),
    )
}


def choose(names: str | None) -> list[Variant]:
    """The variants of a comma list, in the order of the table; `all` is all, without a list the default ones.

    Raises:
        BenchError: an unknown name; lists the known ones.
    """
    if names is None:
        return [variant for variant in VARIANTS.values() if variant.default]
    if names == "all":
        return list(VARIANTS.values())
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in VARIANTS]
    if unknown or not wanted:
        listing = "\n".join(f"    {variant.name:<18}{variant.about}" for variant in VARIANTS.values())
        raise BenchError(f"unknown variant {', '.join(unknown) or '(none given)'}; known are\n{listing}")
    return [variant for variant in VARIANTS.values() if variant.name in wanted]
