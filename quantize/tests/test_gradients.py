"""Squared gradients against transformers' own loss."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from transformers import AutoModelForCausalLM

from helpers.tiny_squeezellm import write_llama
from quantserve.api import quantizable
from quantserve_quantize.gradients import squared
from quantserve_quantize.source import Weights


def _weight_per_token(linear: torch.nn.Linear, tokens: int) -> torch.Tensor:
    """Give every token a copy of the weight, [tokens, n, k]: a copy's gradient is that of its token."""
    copies = linear.weight.detach().expand(tokens, -1, -1).clone().requires_grad_(True)
    linear.forward = lambda x: torch.einsum("tnk,btk->btn", copies, x)  # type: ignore[method-assign]
    return copies


def test_squares_are_those_of_each_tokens_gradient(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "float")
    weights = Weights(folder)
    names = [linear.name for linear in quantizable(weights.checkpoint, experts=False)]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    samples = torch.randint(0, model.config.vocab_size, (3, 24), generator=torch.Generator().manual_seed(0))
    expected = {name: torch.zeros_like(model.get_submodule(name).weight) for name in names}
    copies = {name: _weight_per_token(model.get_submodule(name), samples.shape[1]) for name in names}
    for sample in samples:
        model.zero_grad()
        model(input_ids=sample[None], labels=sample[None]).loss.backward()
        for name in names:
            grad = copies[name].grad
            assert grad is not None
            expected[name] += (grad**2).sum(0) / len(samples)
            copies[name].grad = None
    done: list[int] = []
    found = squared(weights, samples, names, lambda number, total: done.append(number))
    assert done == [1, 2, 3]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name].double(), value, rtol=1e-3, atol=1e-6 * float(value.max())), name
