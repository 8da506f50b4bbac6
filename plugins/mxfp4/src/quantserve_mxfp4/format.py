"""MXFP4 experts as gpt-oss stores them, as data (OCP Microscaling Formats 1.0). Imports no torch."""

from __future__ import annotations

from quantserve.api import E, K, N, Part, Scheme

GROUP = 32
"""Inputs that share a scale; a block of them is 16 bytes, the first of two inputs in the low half."""
STACKS = ("gate_up_proj", "down_proj")
"""The linears of a layer's experts. Rows of gate and up alternate."""
DECLARED = ("mxfp4", "gpt_oss_mxfp4")
"""Values of ``quant_method``; vLLM writes the second into the config that it has read."""
SCHEME = Scheme(
    {"blocks": Part((E(), N(), K(GROUP), GROUP // 2), ("U8",)), "scales": Part((E(), N(), K(GROUP)), ("U8",))},
    bits=4,
    group_size=GROUP,
)
"""E2M1 values of a layer's experts and E8M0 scales, a byte e for the factor 2^(e - 127)."""


def is_stack(module: str) -> bool:
    """Whether a module is a linear of all experts of a layer."""
    parent, _, name = module.rpartition(".")
    return name in STACKS and parent.endswith(".experts")
