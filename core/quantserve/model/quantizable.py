"""The linears a quantizer may write: those its method's checks accept and vLLM builds with the method."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from quantserve.model.layers import linears
from quantserve.model.linear import Linear

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint

# Projections of attention and MLP. vLLM builds what else has two dimensions (routers, the projections of state spaces,
# the low-rank ones of latent attention) without the method in some families, so it stays as it is.
_LEAVES = frozenset(
    {
        "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj",
        "w1", "w2", "w3",
    }
)  # fmt: skip
# A block below a module of such a name is not the language model's.
_ELSEWHERE = re.compile(
    r"(?:^|\.|_)(?:vision|visual|image|video|audio|speech|encoder|tower|vit|vpm|apm|resampler|projector|talker|mtp)(?=$|\.|_)"
)


def quantizable(checkpoint: Checkpoint, *, experts: bool = True) -> tuple[Linear, ...]:
    """The attention and MLP projections of the decoder's blocks, in block order; every listed expert by itself.

    No router, no stacked experts, lm_head, vision or audio tower. Of a layer that vLLM fuses (q/k/v, gate/up) all parts
    or none.

    Args:
        experts: whether experts of mixtures are among them.
    """
    return tuple(one for linear in projections(checkpoint, experts) for one in linear.each() if not linear.stacked)


def projections(checkpoint: Checkpoint, experts: bool = True) -> tuple[Linear, ...]:
    """The same with the experts of a layer as one entry, stacked ones too."""
    every = linears(checkpoint)
    chosen = [linear for linear in every if _is_projection(linear.name) and (experts or linear.fused != "experts")]
    names = {linear.name for linear in chosen}
    split = {linear.group for linear in every if linear.fused and linear.name not in names}
    return tuple(linear for linear in chosen if not (linear.fused and linear.group in split))


def _is_projection(module: str) -> bool:
    return module.rpartition(".")[2] in _LEAVES and not _ELSEWHERE.search(module)
