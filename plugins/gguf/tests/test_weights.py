"""Weights out of .gguf files against gguf's own dequantization, and models of them against transformers' own reader.

The files and the references are those of ``data/make_data.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("vllm")

import torch
import transformers
from safetensors.torch import load_file

from quantserve_gguf import _decode
from quantserve_gguf._folder import folder_of
from quantserve_gguf._vllm import SCHEMES, Gguf
from quantserve_gguf._weights import weights
from quantserve_gguf.blocks import BY_NAME, served_types

DATA = Path(__file__).parent / "data"
BLOCKS = load_file(DATA / "blocks.safetensors")
REFERENCE = load_file(DATA / "reference.safetensors")
TYPES = sorted(_decode.DECODERS)


def blocks_of(name: str) -> torch.Tensor:
    return BLOCKS[f"{name}.blocks"].unflatten(1, (-1, BY_NAME[name].nbytes))


@pytest.mark.parametrize("name", TYPES)
def test_blocks_stand_for_what_gguf_says(name: str) -> None:
    expected = BLOCKS[f"{name}.values"]
    assert torch.equal(_decode.dequantized(name, blocks_of(name)), expected)


@pytest.mark.parametrize("name", TYPES)
def test_the_kernels_weight_is_that_of_the_file(name: str) -> None:
    """Bit for bit; with zero points within the rounding of (code - zero) x scale, also in groups of one value."""
    expected = BLOCKS[f"{name}.values"]
    tolerance = float(expected.abs().max()) * 2e-7 if BY_NAME[name].zeros else 0.0
    own = _decode.packed(name, blocks_of(name))
    brought = _decode.pack_mixed(**_decode.mixed(name, blocks_of(name)))
    assert (own.bits, brought.bits) == (BY_NAME[name].bits, 8)
    for weight in (own, brought):
        assert (weight.dequantize() - expected).abs().max() <= tolerance


def test_a_rank_gets_blocks_and_every_type_has_a_parameter() -> None:
    assert SCHEMES.keys() == {*TYPES, "MIXED"}
    for name in TYPES:
        (part,) = SCHEMES[name].alternatives(name)
        assert part.sizes(3, 512) == tuple(blocks_of(name).shape)


def test_fused_linears_of_several_types_get_one_form() -> None:
    types = {"a.q_proj": "Q4_K", "a.k_proj": "Q4_K", "a.v_proj": "Q6_K", "m.up_proj": "Q4_K", "m.gate_proj": "Q4_K"}
    served = served_types({**types, "m.down_proj": "Q6_K"})
    assert [served[f"a.{one}_proj"] for one in "qkv"] == ["MIXED"] * 3
    assert (served["m.up_proj"], served["m.gate_proj"], served["m.down_proj"]) == ("Q4_K", "Q4_K", "Q6_K")
    made = Gguf.from_config({"types": types})
    assert made.scheme("a.q_proj") is SCHEMES["MIXED"]
    assert made.scheme("a.o_proj") is None


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3"])
def test_config_names_and_order_of_weights(tmp_path: Path, family: str) -> None:
    """A model of transformers with our config and weights gives the logits of transformers' own reader."""
    folder = folder_of(str(DATA / f"{family}.gguf"), None, tmp_path)
    assert folder is not None
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with (DATA / f"{family}.gguf").open("rb") as file:
        state = dict(weights(file, config, {}, torch.float32))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    with torch.no_grad():
        logits = model(REFERENCE["tokens"][None]).logits[0]
    torch.testing.assert_close(logits, REFERENCE[family], rtol=1e-4, atol=1e-4)


def test_the_folder_is_made_once_and_has_the_tokenizer(tmp_path: Path) -> None:
    file = str(DATA / "llama.gguf")
    folder = folder_of(file, None, tmp_path)
    assert folder is not None
    assert folder_of(file, None, tmp_path) == folder
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert (folder / "llama.gguf").resolve() == DATA / "llama.gguf"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("that</s>").input_ids == [1, 56, 29, 48, 2]  # the start token, the merge "th", a special token
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == [2]


def test_a_file_that_cannot_be_served_makes_no_folder(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes((DATA / "qwen2.gguf").read_bytes()[:-2000])
    with pytest.raises(ValueError, match="is cut off"):
        folder_of(str(broken), None, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
