"""Experts as modules of their own, named as the files name them; transformers stacks those of a layer in one tensor.

Calibration then sees linears like any others, each of which is given the tokens routed to its expert.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

LEAVES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""Names of gate, up and down, by family."""
RENAMED = ("mlp", "block_sparse_moe")
"""What transformers calls the mixture of a block, and what the files of Mixtral's family call it."""


class Experts(nn.Module):
    """The experts of a layer, each with three linears.

    Args:
        stacked: transformers' module for them, which has their sizes and the activation.
        names: of gate, up and down.
    """

    def __init__(self, stacked: Any, names: tuple[str, str, str]) -> None:
        super().__init__()
        count, double, hidden = stacked.gate_up_proj.shape
        self._apply_gate = stacked._apply_gate
        self._names = names
        for number in range(count):
            expert = nn.Module()
            for name, n, k in zip(
                names, (double // 2, double // 2, hidden), (hidden, hidden, double // 2), strict=True
            ):
                expert.add_module(name, nn.Linear(k, n, bias=False, device="meta"))
            self.add_module(str(number), expert)

    def forward(self, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """The sum of each token's experts.

        Args:
            hidden: [tokens, hidden].
            chosen: numbers of each token's experts, [tokens, experts per token].
            shares: what each adds, of the same shape.
        """
        out = torch.zeros_like(hidden)
        for number, expert in self.named_children():
            tokens, place = torch.where(chosen == int(number))
            if not len(tokens):
                continue
            gate, up, down = (getattr(expert, name) for name in self._names)
            taken = hidden[tokens]
            made = down(self._apply_gate(torch.cat((gate(taken), up(taken)), dim=-1)))
            out.index_add_(0, tokens, made * shares[tokens, place, None].to(made.dtype))
        return out


def list_experts(model: nn.Module, stored: Collection[str]) -> None:
    """Replace stacked experts by `Experts`, where the files list them.

    Args:
        model: of transformers, its parameters on the meta device.
        stored: the tensors of the files.
    """
    for path, module in list(model.named_modules()):
        if not _is_stack(module):
            continue
        home = path.rpartition(".")[0]
        block, _, leaf = home.rpartition(".")
        for name in dict.fromkeys((leaf, RENAMED[1] if leaf == RENAMED[0] else leaf)):
            for names in LEAVES:
                if f"{block}.{name}.experts.0.{names[0]}.weight" in stored:
                    model.get_submodule(home).experts = Experts(module, names)
                    _rename(model.get_submodule(block), leaf, name)


def _is_stack(module: nn.Module) -> bool:
    """Whether it has gate and up of all experts in one tensor [e, 2 * n, k], one after the other, and no bias."""
    parameters = {name for name, _ in module.named_parameters(recurse=False)}
    layout = [getattr(module, name, None) for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated")]
    return parameters == {"gate_up_proj", "down_proj"} and layout == [True, False, False, True]


def _rename(block: nn.Module, old: str, new: str) -> None:
    """Register a module of a block under another name; the block's own code finds it under the old one."""
    if old != new:
        module = block._modules.pop(old)
        block.__dict__[old] = module
        block.add_module(new, module)
