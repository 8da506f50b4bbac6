"""vLLM's own layers on blocks of .gguf files, one rank and two, against gguf's own dequantization."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("vllm")

import torch
from safetensors.torch import load_file
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import linear
from vllm.model_executor.model_loader import get_model_loader

import quantserve_gguf
from helpers.vllm_layers import FUSED, engine, load, ranks
from quantserve_gguf._decode import mixed
from quantserve_gguf._vllm import Gguf, GgufLoader
from quantserve_gguf.blocks import BY_NAME

pytestmark = pytest.mark.vllm

BLOCKS = load_file(Path(__file__).parent / "data/blocks.safetensors")


_engine = engine(quantserve_gguf.register)
as_rank = pytest.fixture(ranks)


def weight_of(name: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks and values of a weight [n, 512]: the rows of the data, repeated."""
    rows = torch.arange(n) % 3
    return BLOCKS[f"{name}.blocks"].unflatten(1, (-1, BY_NAME[name].nbytes))[rows], BLOCKS[f"{name}.values"][rows]


def config_of(types: dict[str, str]) -> Gguf:
    config = Gguf.from_config({"types": types})
    config.packed_modules_mapping = FUSED
    config.maybe_update_config("")
    return config


def computed(layer: Any) -> torch.Tensor:
    """W [n, k] as the kernel multiplies with it: x is the identity."""
    out: torch.Tensor = layer.quant_method.apply(layer, torch.eye(layer.kernel.k))
    return out.t()


def assert_same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert (ours - expected).abs().max() <= expected.abs().max() * 1e-6


@pytest.mark.parametrize("name", ["Q4_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL"])
def test_a_rank_computes_its_inputs(name: str, as_rank: Callable[[int, int], None]) -> None:
    blocks, values = weight_of(name, 24)
    for rank in range(2):
        as_rank(rank, 2)
        config = config_of({"a.o_proj": name})
        layer = linear.RowParallelLinear(512, 24, bias=False, quant_config=config, prefix="a.o_proj")
        assert_same(computed(load(layer, {None: {name: blocks}})), values.chunk(2, dim=1)[rank])


@pytest.mark.parametrize("v", ["Q4_K", "Q6_K"])
def test_a_rank_computes_its_heads(v: str, as_rank: Callable[[int, int], None]) -> None:
    """q, k and v of one type, and v of another, as in Q4_K_M."""
    parts = {"q": weight_of("Q4_K", 64), "k": weight_of("Q4_K", 32), "v": weight_of(v, 32)}
    types = {"a.q_proj": "Q4_K", "a.k_proj": "Q4_K", "a.v_proj": v}
    for rank in range(2):
        as_rank(rank, 2)
        config = config_of(types)
        layer = linear.QKVParallelLinear(512, 16, 4, 2, bias=False, quant_config=config, prefix="a.qkv_proj")
        tensors = {
            shard: {"Q4_K": blocks} if v == "Q4_K" else mixed(types[f"a.{shard}_proj"], blocks)
            for shard, (blocks, _) in parts.items()
        }
        expected = torch.cat([values.chunk(2)[rank] for _, values in parts.values()])
        assert_same(computed(load(layer, tensors)), expected)


def test_a_rank_must_have_whole_blocks(as_rank: Callable[[int, int], None]) -> None:
    as_rank(0, 4)
    with pytest.raises(ValueError, match="in_features per rank in multiples of 256, but 512 over 4 ranks is 128"):
        linear.RowParallelLinear(512, 24, bias=False, quant_config=config_of({"a.o_proj": "Q4_K"}), prefix="a.o_proj")


def test_what_the_config_does_not_name_is_plain() -> None:
    layer = linear.ReplicatedLinear(512, 24, bias=False, quant_config=config_of({"a.o_proj": "Q4_K"}), prefix="b")
    assert type(layer.quant_method) is linear.UnquantizedLinearMethod


def test_vllm_knows_the_loader_and_its_arguments_open_files_once() -> None:
    from vllm.config.load import LoadConfig

    assert type(get_model_loader(LoadConfig(load_format="gguf"))) is GgufLoader
    assert not hasattr(EngineArgs.create_engine_config.__wrapped__, "__wrapped__")
