"""Make the checkpoints of a shape: random bf16, and AWQ and SqueezeLLM of it. What exists is left alone.

Tensor by tensor, so that little memory is needed; each folder appears whole or not at all. The SqueezeLLM one gets
codebooks of normal quantiles instead of k-means, which would take an hour here: the speed is the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.console import say, shown
from benchmarks.decode import formats
from benchmarks.decode.shapes import Shape
from quantserve_awq.quantizer import Awq, AwqOptions
from quantserve_kernels import pack_stream
from quantserve_quantize.draft import write_folder
from quantserve_quantize.run import Asked, quantize
from quantserve_quantize.source import Weights
from quantserve_squeezellm._packing import quantization_config

SEED = 20261124
GROUP_SIZE = 128
STEPS_SHOWN = 4


def make(shape: Shape, kind: str) -> Path:
    """The checkpoint of one kind (a key of `MAKERS`), made if it is not there yet."""
    path = shape.checkpoint(kind)
    if path.exists():
        return path
    if kind != "bf16":
        make(shape, "bf16")
    say(f"making {shown(path)}")
    MAKERS[kind](shape, path)
    return path


def make_bf16(shape: Shape, path: Path) -> None:
    """Normal weights, scaled so that activations keep their size through the layers."""
    count = 3 + 9 * shape.layers

    def shown_weights() -> Iterator[tuple[str, Tensor]]:
        for done, named in enumerate(weights(shape), start=1):
            yield named
            progress("weights", done, count)

    write_folder(path, shown_weights(), {"config.json": json.dumps(shape.config(), indent=2)}, [])


def weights(shape: Shape) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model in bf16, one at a time; always the same ones."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(n: int, k: int, scale: float) -> Tensor:
        return torch.randn(n, k, generator=generator).mul_(scale).to(torch.bfloat16)

    yield "model.embed_tokens.weight", normal(shape.vocab, shape.hidden, 1.0)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", torch.ones(shape.hidden, dtype=torch.bfloat16)
        yield f"{prefix}.post_attention_layernorm.weight", torch.ones(shape.hidden, dtype=torch.bfloat16)
        for name, (n, k) in shape.projections().items():
            writes_residual = name.endswith(("o_proj", "down_proj"))
            scale = 1 / math.sqrt(k * (2 * shape.layers if writes_residual else 1))
            yield f"{prefix}.{name}.weight", normal(n, k, scale)
    yield "model.norm.weight", torch.ones(shape.hidden, dtype=torch.bfloat16)
    yield "lm_head.weight", normal(shape.vocab, shape.hidden, 1 / math.sqrt(shape.hidden))


def make_awq(shape: Shape, path: Path) -> None:
    """Rounded to nearest by the plugin's own quantizer."""
    plain = Awq(AwqOptions(group_size=GROUP_SIZE, scales="none", clip=False, refine=False))
    quantize(shape.checkpoint("bf16"), path, plain, "awq", Asked())


def make_squeezellm(bits: int) -> Callable[[Shape, Path], None]:
    """The maker for 3 or 4 bits: dense only, codebooks of normal quantiles per output channel."""

    def tensors(source: Weights) -> Iterator[tuple[str, Tensor]]:
        names = source.names
        for done, name in enumerate(names, start=1):
            if name.endswith("_proj.weight"):
                codes, table = quantile_codes(source.get(name), bits)
                yield name.removesuffix("weight") + "qweight", pack_stream(codes, bits)
                yield name.removesuffix("weight") + "lookup_table", table
            else:
                yield name, source.get(name)
            progress(f"SqueezeLLM {bits} bits", done, len(names))

    def make_it(shape: Shape, path: Path) -> None:
        config = {**shape.config(), "quantization_config": quantization_config(bits, {})}
        write_folder(
            path, tensors(Weights(shape.checkpoint("bf16"))), {"config.json": json.dumps(config, indent=2)}, []
        )

    return make_it


def quantile_codes(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes [n, k] and codebooks float32 [n, 2**bits] of a weight [n, k] whose channels are normal around zero."""
    entries = 2**bits
    deviation = weight.to(torch.float32).std(dim=1, keepdim=True)
    centres = torch.special.ndtri((torch.arange(entries, dtype=torch.float64) + 0.5) / entries).to(torch.float32)
    borders = torch.special.ndtri(torch.arange(1, entries, dtype=torch.float64) / entries).to(torch.float32)
    return torch.bucketize(weight / deviation, borders, out_int32=True), deviation * centres


def progress(what: str, done: int, total: int) -> None:
    """Every quarter of the way."""
    if done * STEPS_SHOWN // total != (done - 1) * STEPS_SHOWN // total:
        say(f"  {what}: {done} of {total} tensors")


MAKERS: dict[str, Callable[[Shape, Path], None]] = {
    "bf16": make_bf16,
    "awq": make_awq,
    "squeezellm-4": make_squeezellm(4),
    "squeezellm-3": make_squeezellm(3),
    **{kind: partial(formats.make_rounded, kind) for kind in formats.ROUNDED},
    **{kind: partial(formats.make_stored, kind) for kind in formats.STORED},
}
