"""vLLM's own layers on files of transformers, against the weights that bitsandbytes itself dequantized."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("vllm")

import torch
from safetensors.torch import load_file
from vllm.model_executor.layers import linear

import quantserve_bitsandbytes
from helpers.engines import compare, generate
from helpers.plain import write_plain
from helpers.vllm_layers import FUSED, engine, load, ranks, weight_of
from quantserve_bitsandbytes._vllm import Bitsandbytes

pytestmark = pytest.mark.vllm

DATA = Path(__file__).parent / "data"
MODELS = ("nf4", "fp4", "int8")


_engine = engine(quantserve_bitsandbytes.register)
as_rank = pytest.fixture(ranks)


def _files(name: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Bitsandbytes]:
    """The tensors of a checkpoint, what bitsandbytes makes of its modules in float32, and the format of its config."""
    config = Bitsandbytes.from_config(json.loads((DATA / name / "config.json").read_text())["quantization_config"])
    config.packed_modules_mapping = FUSED
    return load_file(DATA / name / "model.safetensors"), load_file(DATA / f"{name}-dequantized.safetensors"), config


def _parts(tensors: dict[str, torch.Tensor], module: str) -> dict[str, torch.Tensor]:
    start = f"{module}."
    suffixes = {name.removeprefix(start): one for name, one in tensors.items() if name.startswith(start)}
    return {suffix: one for suffix, one in suffixes.items() if suffix != "weight_format"}


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_that_bitsandbytes_dequantizes(name: str) -> None:
    tensors, expected, config = _files(name)
    for module, weight in expected.items():
        n, k = weight.shape
        layer = linear.ReplicatedLinear(k, n, bias=False, quant_config=config, prefix=module)
        ours = weight_of(load(layer, {None: _parts(tensors, module)}))
        assert torch.allclose(ours, weight, rtol=1e-6, atol=1e-7)  # float32 in another order
        assert torch.equal(ours.half(), weight.half()) or (ours.half() != weight.half()).sum() < n * k / 1000


@pytest.mark.parametrize("name", MODELS)
def test_ranks_add_up_to_the_layer(name: str, as_rank: Callable[[int, int], None]) -> None:
    tensors, expected, config = _files(name)
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    qkv = [expected[f"{attention}.{one}_proj"] for one in "qkv"]
    for rank in range(2):
        as_rank(rank, 2)
        layer = linear.QKVParallelLinear(64, 32, 4, 2, bias=False, quant_config=config, prefix=f"{attention}.qkv_proj")
        ours = weight_of(load(layer, {one: _parts(tensors, f"{attention}.{one}_proj") for one in "qkv"}))
        assert torch.allclose(ours, torch.cat([one.chunk(2)[rank] for one in qkv]), rtol=1e-6, atol=1e-7)
        row = linear.RowParallelLinear(128, 64, bias=False, quant_config=config, prefix=f"{mlp}.down_proj")
        ours = weight_of(load(row, {None: _parts(tensors, f"{mlp}.down_proj")}))
        assert torch.allclose(ours, expected[f"{mlp}.down_proj"].chunk(2, dim=1)[rank], rtol=1e-6, atol=1e-7)


def test_more_than_one_block_of_the_second_quantization() -> None:
    """An absmax of the second level stands for 256 blocks, 16384 weights: here row 256 of 512 begins the second."""
    _, _, config = _files("nf4")
    n, k = 512, 64
    codes = torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8)
    state = {"quant_type": "nf4", "blocksize": 64, "shape": [n, k], "nested_blocksize": 256, "nested_offset": 0.25}
    table, nested = torch.linspace(-1, 1, 16), torch.linspace(0, 1, 256)
    absmax = torch.randint(0, 256, (n,), dtype=torch.uint8)
    parts = {
        "weight": codes,
        "weight.absmax": absmax,
        "weight.quant_map": table,
        "weight.nested_absmax": torch.tensor([2.0, 3.0]),
        "weight.nested_quant_map": nested,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    layer = linear.ReplicatedLinear(k, n, bias=False, quant_config=config, prefix="model.layers.0.fc")
    scales = nested[absmax.long()] * torch.tensor([2.0, 3.0]).repeat_interleave(256) + 0.25
    weight = table[torch.cat((codes >> 4, codes & 15), dim=1).long()].view(n, k) * scales[:, None]
    assert torch.allclose(weight_of(load(layer, {None: parts})), weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("change", "words"), [({"blocksize": 128}, "blocks of 128"), ({"shape": [64, 64]}, "shape")])
def test_a_state_of_another_linear_is_refused(change: dict[str, Any], words: str) -> None:
    tensors, _, config = _files("nf4")
    module, suffix = "model.layers.0.mlp.down_proj", "weight.quant_state.bitsandbytes__nf4"
    parts = _parts(tensors, module)
    state = json.loads(bytes(parts[suffix].tolist())) | change
    parts[suffix] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    layer = linear.ReplicatedLinear(128, 64, bias=False, quant_config=config, prefix=module)
    with pytest.raises(ValueError, match=rf"down_proj\.{suffix}: .*{words}"):
        load(layer, {None: parts})


def plain(name: str | Path, destination: Path) -> Path:
    """A checkpoint with the weights that bitsandbytes dequantized."""
    tensors, expected, _ = _files(name)
    weights = {key: one for key, one in tensors.items() if not any(key.startswith(f"{m}.") for m in expected)}
    weights |= {f"{module}.weight": weight for module, weight in expected.items()}
    return write_plain(DATA / name, destination, weights)


@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    generations = generate(DATA / "nf4", "bitsandbytes", dtype="float32", enforce_eager=True)
    compare(plain("nf4", tmp_path / "plain"), generations, clear=0.02, close=0.02)
