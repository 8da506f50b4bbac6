"""vLLM's own layers on files of hqq, against the weights that hqq itself dequantized."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("vllm")

import torch
from safetensors.torch import load_file
from vllm.model_executor.layers import linear

import quantserve_hqq
from helpers.engines import compare, generate
from helpers.plain import write_plain
from helpers.vllm_layers import FUSED, engine, load, ranks, weight_of
from quantserve_hqq._vllm import Hqq

pytestmark = pytest.mark.vllm

DATA = Path(__file__).parent / "data"
MODELS = ("uniform4", "mixed")
CODES = ("W_q", "scale", "zero")


_engine = engine(quantserve_hqq.register)
as_rank = pytest.fixture(ranks)


def _files(name: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Hqq]:
    """The tensors of a checkpoint, what hqq makes of its quantized modules, and the format of its config."""
    config = Hqq.from_config(json.loads((DATA / name / "config.json").read_text())["quantization_config"])
    config.packed_modules_mapping = FUSED
    return load_file(DATA / name / "model.safetensors"), load_file(DATA / f"{name}-dequantized.safetensors"), config


def _parts(tensors: dict[str, torch.Tensor], module: str) -> dict[str, torch.Tensor]:
    return {suffix: tensors[f"{module}.{suffix}"] for suffix in CODES}


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_that_hqq_dequantizes(name: str) -> None:
    tensors, expected, config = _files(name)
    for module, weight in expected.items():
        layer = linear.ReplicatedLinear(
            weight.shape[1], weight.shape[0], bias=False, quant_config=config, prefix=module
        )
        ours = weight_of(load(layer, {None: _parts(tensors, module)}))
        # hqq multiplies in float16: a rounding of the difference and one of the product.
        assert torch.allclose(ours, weight.float(), rtol=2**-10, atol=2**-12)
        assert not torch.equal(ours, torch.zeros_like(ours))


@pytest.mark.parametrize("name", MODELS)
def test_ranks_add_up_to_the_layer(name: str, as_rank: Callable[[int, int], None]) -> None:
    tensors, expected, config = _files(name)
    attention, k = "model.layers.1.self_attn", 64
    qkv = [expected[f"{attention}.{one}_proj"].float() for one in "qkv"]
    out = expected[f"{attention}.o_proj"].float()
    for rank in range(2):
        as_rank(rank, 2)
        layer = linear.QKVParallelLinear(k, 32, 4, 2, bias=False, quant_config=config, prefix=f"{attention}.qkv_proj")
        ours = weight_of(load(layer, {one: _parts(tensors, f"{attention}.{one}_proj") for one in "qkv"}))
        assert torch.allclose(ours, torch.cat([one.chunk(2)[rank] for one in qkv]), rtol=2**-10, atol=2**-12)
        row = linear.RowParallelLinear(128, k, bias=False, quant_config=config, prefix=f"{attention}.o_proj")
        ours = weight_of(load(row, {None: _parts(tensors, f"{attention}.o_proj")}))
        assert torch.allclose(ours, out.chunk(2, dim=1)[rank], rtol=2**-10, atol=2**-12)


def test_words_of_another_size_are_refused() -> None:
    tensors, _, config = _files("uniform4")
    module = "model.layers.0.mlp.down_proj"
    layer = linear.ReplicatedLinear(96, 64, bias=False, quant_config=config, prefix=module)
    parts = {**_parts(tensors, module), "W_q": _parts(tensors, "model.layers.0.self_attn.q_proj")["W_q"]}
    with pytest.raises(ValueError, match=r"down_proj\.W_q: 4 bits have words \[128, 32\], expected \[96, 32\]"):
        load(layer, {None: parts})


def test_settings_that_are_not_served_stop_the_engine() -> None:
    params = {"weight_quant_params": {"nbits": 4, "group_size": 64, "axis": 0}}
    with pytest.raises(ValueError, match=r"hqq: quant_config: axis is 0; served is 1"):
        Hqq.from_config({"quant_config": params})


def plain(name: str | Path, destination: Path) -> Path:
    """A checkpoint with the weights that hqq dequantized."""
    tensors, expected, _ = _files(name)
    weights = {key: one for key, one in tensors.items() if not any(key.startswith(f"{m}.") for m in expected)}
    weights |= {f"{module}.weight": weight for module, weight in expected.items()}
    return write_plain(DATA / name, destination, weights)


@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    generations = generate(DATA / "mixed", "hqq", dtype="float32", enforce_eager=True)
    compare(plain("mixed", tmp_path / "plain"), generations, clear=0.02, close=0.02)
