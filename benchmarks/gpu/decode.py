"""A decode loop in plain torch: one token for each sequence a step, all of a model's layers, random weights.

Only for timing. The KV cache has a fixed size and the position does not advance: every step writes the last place and
attends to all. The rotary embedding is left out, in every variant alike; so are what a server does between two steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

from benchmarks.console import say
from benchmarks.gpu import device
from benchmarks.gpu.formats import CUBLAS, FOUR, THREE
from benchmarks.gpu.state import State
from benchmarks.gpu.weights import STD, Weight, clone, make, multiply, normal
from benchmarks.kernels.results import seconds, speedup
from benchmarks.kernels.shapes import MODELS, Shape

VARIANTS = (CUBLAS, FOUR, THREE)  # of the linears in the layers; the lm_head is bfloat16 in all
BATCHES = (1, 4, 16)
ROUNDS = 5
STEPS = 50  # of a round


@dataclass(frozen=True)
class Model:
    """Its sizes; `linears` are those of a layer, by name qkv, o, gate_up and down."""

    layers: int
    heads: int
    head_size: int
    vocabulary: int
    linears: tuple[Shape, ...]

    @property
    def hidden(self) -> int:
        """Features between layers."""
        return self.heads * self.head_size


LLAMA_7B = Model(32, 32, 128, 32000, MODELS["7b"])
Layers = Sequence[Mapping[str, Weight]]


@dataclass(frozen=True)
class Shared:
    """What the variants have in common: embedding and head [vocabulary, hidden], norm [hidden], all bfloat16."""

    embedding: Tensor
    head: Tensor
    norm: Tensor


def make_shared(model: Model, where: str) -> Shared:
    """Random ones."""
    table, head = (normal(model.vocabulary, model.hidden, device=where, seed=seed).mul_(STD) for seed in (4, 5))
    return Shared(table, head, torch.ones(model.hidden, device=where, dtype=torch.bfloat16))


def make_layers(name: str, model: Model, where: str) -> Layers:
    """The linears of all layers: the same numbers in each, in memory of its own."""
    first = {shape.layer: make(name, shape, where)[0] for shape in model.linears}
    return [first, *({layer: clone(weight) for layer, weight in first.items()} for _ in range(model.layers - 1))]


def make_caches(model: Model, batch: int, context: int, where: str) -> list[Tensor]:
    """Keys and values [batch, 2, heads, context, head_size] of every layer."""
    first = normal(batch, 2, model.heads, context, model.head_size, device=where)
    return [first, *(first.clone() for _ in range(model.layers - 1))]


def step(model: Model, shared: Shared, layers: Layers, caches: Sequence[Tensor], tokens: Tensor) -> None:
    """Replace tokens int64 [batch] by the next ones."""

    def norm(x: Tensor) -> Tensor:
        return rms_norm(x, (model.hidden,), shared.norm, 1e-5)

    hidden = embedding(tokens, shared.embedding)
    for layer, cache in zip(layers, caches, strict=True):
        heads = multiply(norm(hidden), layer["qkv"]).view(len(tokens), 3, model.heads, 1, model.head_size)
        cache[:, :, :, -1:].copy_(heads[:, 1:])
        attended = scaled_dot_product_attention(heads[:, 0], cache[:, 0], cache[:, 1])
        hidden = hidden + multiply(attended.reshape(len(tokens), model.hidden), layer["o"])
        gate, up = multiply(norm(hidden), layer["gate_up"]).chunk(2, dim=-1)
        hidden = hidden + multiply(silu(gate) * up, layer["down"])
    tokens.copy_(linear(norm(hidden), shared.head).argmax(-1))


def measure(state: State, model: Model, context: int, where: str) -> None:
    """Every variant at every batch, into `decode` of the results.

    Raises:
        OutOfTimeError: what was measured is in the results.
    """
    variants: dict[str, Layers] = {}
    for name in VARIANTS:
        state.check_time()
        layers = state.attempt(f"decode loop: {name}", make_layers, name, model, where)
        if layers is not None:
            variants[name] = layers
            nbytes = sum(weight.nbytes for layer in layers for weight in layer.values())
            say(f"decode loop, {name}: {nbytes / 1e9:.2f} GB of linears")
    shared = make_shared(model, where)
    found = state.found["decode"] = {"context": context, "layers": model.layers, "steps": STEPS, "cells": []}
    for batch in BATCHES:
        state.check_time()
        caches = state.attempt(f"decode loop, batch {batch}", make_caches, model, batch, context, where)
        if caches is None:
            break
        replays = {}
        for name, layers in variants.items():
            tokens = torch.zeros(batch, dtype=torch.int64, device=where)
            call = partial(step, model, shared, layers, caches, tokens)
            replay = state.attempt(f"decode loop, batch {batch}: {name}", device.capture, [call])
            if replay is not None:
                replays[name] = replay
        cell = {"batch": batch, "seconds": device.times(replays, ROUNDS, STEPS)}
        found["cells"].append(cell)
        state.save()
        for name in replays:
            ratio = speedup(cell, name, CUBLAS)
            said = "" if ratio is None else f", {ratio:.2f}x"
            say(f"decode loop, batch {batch}, {name}: {1e3 * seconds(cell, name):.2f} ms per step{said}")
