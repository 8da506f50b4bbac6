"""The types of tensors in GGUF files: elements and bytes of a block, and the codes that the kernels make of them.

Source: ggml.h and ggml-common.h of https://github.com/ggml-org/ggml.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from quantserve.api import K, N, Part, Scheme


@dataclass(frozen=True, slots=True)
class Blocks:
    """A type of tensor.

    Attributes:
        name: ``Q4_K``; of plain floats the name in safetensors, ``F16``.
        elements: of a row that are stored as one block.
        nbytes: of a block.
        bits: of a code as the kernels keep it; 0 where this plugin does not serve the type, 16 or 32 for plain floats.
        group: elements that share a scale.
        zeros: whether a group has a zero point of its own.
        scale: bits of a scale as the kernels keep it: 16 where it is the file's float16, 32 where it is a product.
    """

    name: str
    elements: int
    nbytes: int
    bits: int = 0
    group: int = 32
    zeros: bool = False
    scale: int = 32

    @property
    def quantized(self) -> bool:
        """Whether its tensors are codes that the kernels take."""
        return 0 < self.bits < 16


TYPES: Final = {
    0: Blocks("F32", 1, 4, 32),
    1: Blocks("F16", 1, 2, 16),
    30: Blocks("BF16", 1, 2, 16),
    2: Blocks("Q4_0", 32, 18, 4, scale=16),
    3: Blocks("Q4_1", 32, 20, 4, zeros=True),
    6: Blocks("Q5_0", 32, 22, 8, scale=16),
    7: Blocks("Q5_1", 32, 24, 8, zeros=True),
    8: Blocks("Q8_0", 32, 34, 8, scale=16),
    10: Blocks("Q2_K", 256, 84, 2, 16, zeros=True),
    11: Blocks("Q3_K", 256, 110, 3, 16),
    12: Blocks("Q4_K", 256, 144, 4, zeros=True),
    13: Blocks("Q5_K", 256, 176, 8, zeros=True),
    14: Blocks("Q6_K", 256, 210, 8, 16),
    20: Blocks("IQ4_NL", 32, 18, 4, scale=16),
    23: Blocks("IQ4_XS", 256, 136, 4),
    # Read, and refused by name: codes of several weights at once, and what few files have.
    16: Blocks("IQ2_XXS", 256, 66),
    17: Blocks("IQ2_XS", 256, 74),
    18: Blocks("IQ3_XXS", 256, 98),
    19: Blocks("IQ1_S", 256, 50),
    21: Blocks("IQ3_S", 256, 110),
    22: Blocks("IQ2_S", 256, 82),
    29: Blocks("IQ1_M", 256, 56),
    34: Blocks("TQ1_0", 256, 54),
    35: Blocks("TQ2_0", 256, 66),
    39: Blocks("MXFP4", 32, 17),
}  # fmt: skip
"""Types by their number in the file."""

BY_NAME: Final = {blocks.name: blocks for blocks in TYPES.values()}

FUSED: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""What vLLM fuses into one layer."""

MIXED: Final = Blocks("MIXED", 32, 0, 8, 16, zeros=True)
"""Linears that vLLM fuses and the file stores in different types, brought to one form: 8 bits, groups of 16."""


def kept_bits(blocks: Blocks) -> float:
    """Bits of a weight in the engine's memory: its code, its scale and its zero point."""
    return blocks.bits + blocks.scale * (1 + blocks.zeros) / blocks.group


SCHEMES: Final = {
    name: Scheme(
        {"weight": Part((N(), K(block=blocks.elements)), (name,))},
        bits=blocks.bits,
        group_size=blocks.group,
        scales="block",
        kept=kept_bits(blocks),
    )
    for name, blocks in BY_NAME.items()
    if blocks.quantized
}
"""How a linear is stored in the file, by type."""

BROUGHT: Final = {name: replace(scheme, kept=kept_bits(MIXED)) for name, scheme in SCHEMES.items()}
"""The same for linears that are computed as `MIXED`."""


def served_types(types: Mapping[str, str]) -> dict[str, str]:
    """The types of linears as they are computed: those that vLLM fuses and the file stores in several are `MIXED`."""
    made = dict(types)
    for module in types:
        parent, _, last = module.rpartition(".")
        for names in FUSED:
            together = [f"{parent}.{name}" for name in names] if last in names else []
            if len({types.get(name) for name in together}) > 1 and all(name in types for name in together):
                made[module] = MIXED.name
    return made
