"""What is compared: the table of variants. A new one is a new row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.console import BenchError
from benchmarks.decode.shapes import GGUF

REFERENCE = "bf16"


@dataclass(frozen=True)
class Variant:
    """One column of bars.

    Attributes:
        name: what the command line and the tables call it.
        about: one line for the report.
        checkpoint: a key of `checkpoints.MAKERS`, or `shapes.GGUF`.
        plugins: the vLLM general plugins its process loads, and no others.
        engine_args: arguments of `vllm.LLM` besides the common ones (`engine.COMMON`).
        peer: llama.cpp instead of vLLM.
        default: whether it takes part when nobody names variants.
    """

    name: str
    about: str
    checkpoint: str
    plugins: tuple[str, ...] = ()
    engine_args: Mapping[str, object] = field(default_factory=dict)
    peer: bool = False
    default: bool = True


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("bf16", "vLLM, unquantized", "bf16"),
        Variant("awq-vllm", "vLLM's own AWQ on CPU", "awq", engine_args={"quantization": "awq"}),
        Variant("awq", "AWQ by quantserve-awq", "awq", ("awq",), {"quantization": "awq"}),
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
        Variant("llama.cpp", "llama.cpp, Q4_0", GGUF, peer=True),
    )
}


def choose(names: str | None) -> list[Variant]:
    """The variants of a comma list, in the order of the table; without a list the default ones.

    Raises:
        BenchError: an unknown name; lists the known ones.
    """
    if names is None:
        return [variant for variant in VARIANTS.values() if variant.default]
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in VARIANTS]
    if unknown or not wanted:
        listing = "\n".join(f"    {variant.name:<14}{variant.about}" for variant in VARIANTS.values())
        raise BenchError(f"unknown variant {', '.join(unknown) or '(none given)'}; known are\n{listing}")
    return [variant for variant in VARIANTS.values() if variant.name in wanted]
