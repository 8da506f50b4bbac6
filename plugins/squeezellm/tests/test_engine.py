"""The real engine on converted and quantized checkpoints, against transformers on the dequantized float32 weights.

Four engine starts cover 3 and 4 bits, dense and sparse with full rows, one and two ranks, eager and compiled, float32
and bfloat16, experts, both places for `wbits`, biases, and a layer left unquantized; a fifth start must fail.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("vllm")
pytest.importorskip("transformers")

import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers.engines import Generation, compare, generate
from helpers.plain import write_dequantized
from helpers.quantized import squeezellm as quantize
from helpers.tiny_squeezellm import (
    LAYERS,
    llama_config,
    original_state,
    write_llama,
    write_original,
)
from quantserve_squeezellm._convert import convert
from quantserve_squeezellm.quantizer import SqueezeLLM

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def _compare(checkpoint: Path, generations: list[Generation], clear: float, close: float) -> None:
    """Compare with transformers on the dequantized weights."""
    plain = checkpoint.parent / f"{checkpoint.name}-float32"
    if not plain.exists():
        write_dequantized(checkpoint, plain, SqueezeLLM)
    compare(plain, generations, clear=clear, close=close)


@pytest.fixture(scope="module")
def sparse3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 3-bit dense-and-sparse original with full rows, whose last block keeps a plain down_proj, converted."""
    folder = tmp_path_factory.mktemp("sparse3")
    state = original_state(3, sparse=True)
    plain = f"model.layers.{LAYERS - 1}.mlp.down_proj"
    state = {name: value for name, value in state.items() if plain not in name}
    state[f"{plain}.weight"] = torch.randn(256, 384, generator=torch.Generator().manual_seed(5)) * 384**-0.5
    write_original(folder / "hub", state, 3, llama_config())
    convert(folder / "hub", folder / "model", allow_pickle=True)
    return folder / "model"


@pytest.fixture(scope="module")
def sparse3_one_rank(sparse3: Path) -> list[Generation]:
    return generate(sparse3, "squeezellm", dtype="float32")


def test_3_bit_dense_and_sparse_compiled(sparse3: Path, sparse3_one_rank: list[Generation]) -> None:
    _compare(sparse3, sparse3_one_rank, clear=1e-3, close=1e-3)


def test_two_ranks_give_the_tokens_of_one(sparse3: Path, sparse3_one_rank: list[Generation]) -> None:
    generations = generate(sparse3, "squeezellm", dtype="float32", tensor_parallel_size=2, enforce_eager=True)
    _compare(sparse3, generations, clear=1e-3, close=1e-3)
    assert [g.tokens for g in generations] == [g.tokens for g in sparse3_one_rank]


def test_4_bit_dense_with_biases_and_only_a_quant_config_file(tmp_path: Path) -> None:
    write_llama(tmp_path / "float", bias=True)
    quantize(tmp_path / "float", tmp_path / "model", bits=4)
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/quant_config.json").write_text(json.dumps({"wbits": config.pop("quantization_config")["wbits"]}))
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    generations = generate(tmp_path / "model", "squeezellm", quantization="squeezellm", dtype="bfloat16")
    _compare(tmp_path / "model", generations, clear=0.3, close=0.15)


def test_4_bit_experts_with_sparse_parts_compiled_on_two_ranks(tmp_path: Path) -> None:
    """Attention and the experts of a mixture; in float32, where its plain router chooses as in the reference."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 2}
    config = transformers.Qwen3MoeConfig(
        vocab_size=512, initializer_range=0.09, max_position_embeddings=256, **sizes, **heads
    )
    transformers.Qwen3MoeForCausalLM(config).float().save_pretrained(tmp_path / "float")
    quantize(tmp_path / "float", tmp_path / "model", bits=4, sparsity=0.5, experts=True)
    generations = generate(tmp_path / "model", "squeezellm", dtype="float32", tensor_parallel_size=2)
    _compare(tmp_path / "model", generations, clear=1e-3, close=1e-3)


def test_a_missing_tensor_stops_the_engine_and_is_named(sparse3: Path, tmp_path: Path) -> None:
    shutil.copytree(sparse3, tmp_path / "model")
    state = load_file(sparse3 / "model.safetensors")
    for name in ("mlp.up_proj.lookup_table", "self_attn.k_proj.rows", "self_attn.k_proj.cols", "self_attn.k_proj.vals"):
        del state[f"model.layers.1.{name}"]
    save_file(state, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"lacks model\.layers\.1\.self_attn\.k_proj\.rows"):
        generate(tmp_path / "model", "squeezellm", dtype="float32", enforce_eager=True)
