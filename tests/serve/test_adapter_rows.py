"""On a CPU, vLLM's operations for LoRA leave tokens without an adapter as they are."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("vllm")

import torch

from quantserve.serve.replica.vllm import patches
from quantserve.serve.replica.vllm.adapter_rows import OPERATIONS

pytestmark = pytest.mark.vllm

SLOTS = torch.tensor([1, -1, 0, -1])
"""Of four tokens, two of them without an adapter."""


@pytest.fixture(autouse=True)
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for name in OPERATIONS:
        for module in (lora_ops, punica_cpu):
            monkeypatch.setattr(module, name, getattr(module, name))  # to restore it
    assert patches.apply("adapter-rows")


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [tokens, K]; A [slots, 1, rank, K]; B [slots, 1, N, rank]."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 8), (2, 1, 3, 8), (2, 1, 5, 3))
    return tuple(torch.randn(*shape, generator=generator) for shape in shapes)  # type: ignore[return-value]


def by_hand(scale: float) -> torch.Tensor:
    x, a, b = tensors()
    rows = [
        scale * b[slot, 0] @ a[slot, 0] @ one if slot >= 0 else torch.zeros(5)
        for one, slot in zip(x, SLOTS, strict=True)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("prefill", [True, False])
def test_a_linear_of_a_mixed_batch(prefill: bool) -> None:
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    x, a, b = tensors()
    wrapper = PunicaWrapperCPU(16, 16, "cpu")
    names = [None, 7, 9]
    mapping = tuple(names[slot + 1] or 0 for slot in SLOTS.tolist())
    wrapper.update_metadata(LoRAMapping(mapping, mapping, is_prefill=prefill), [7, 9], 2, 100)
    y = torch.ones(4, 5)
    wrapper.add_lora_linear(y, x, (a,), (b,), 0.5, (5,))
    torch.testing.assert_close(y, 1 + by_hand(0.5))


def test_the_output_layer_of_a_mixed_batch() -> None:
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    x, a, b = tensors()
    wrapper = PunicaWrapperCPU(16, 16, "cpu")
    mapping = (9, 0, 7, 0)
    wrapper.update_metadata(LoRAMapping(mapping, mapping, is_prefill=True), [7, 9], 2, 100)
    y = torch.zeros(4, 5)
    wrapper.add_lora_logits(y, x, a, b, 2.0)
    torch.testing.assert_close(y, by_hand(2.0))
