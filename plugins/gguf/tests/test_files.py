"""What `quantserve check` says of .gguf files of gguf's own writer, and of the same with one thing broken."""

from __future__ import annotations

import io
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from quantserve.api import BadContainer
from quantserve.config import load_object
from quantserve.planning.compose import Composition, compose
from quantserve.plugins.registry import Registry
from quantserve.target import find_target
from quantserve_gguf.blocks import BY_NAME
from quantserve_gguf.families import Unserved, config_of
from quantserve_gguf.header import Value, read_header

DATA = Path(__file__).parent / "data"
FAMILIES = ("llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3")


@cache
def registry() -> Registry:
    return Registry.load({})


def composed(source: str | Path, ranks: int = 1) -> Composition:
    engine = {"model_id": "m", "hf_model_id": str(source)}
    models = [{"engine_config": engine, "scaling_config": {"num_workers": ranks}}]
    return compose(load_object({"models": models}, "test").models[0], registry(), find_target("cpu"))


def changed(tmp_path: Path, change: Callable[[bytes], bytes], name: str = "qwen2") -> Composition:
    path = tmp_path / "broken.gguf"
    path.write_bytes(change((DATA / f"{name}.gguf").read_bytes()))
    return composed(path)


def codes(composition: Composition) -> set[str]:
    return {finding.code for finding in composition.errors}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_file_has_no_errors(family: str) -> None:
    composition = composed(DATA / f"{family}.gguf")
    assert composition.errors == ()
    assert composition.method is not None
    assert composition.method.name == "gguf"
    assert composition.stored is not None
    assert {linear.name.rpartition(".")[2] for linear, _ in composition.stored.quantized} >= {"o_proj", "down_proj"}
    assert composition.checkpoint.tokenizer["max_token_id"] == composition.checkpoint.config["vocab_size"] - 1
    assert composition.checkpoint.tokenizer["has_chat_template"]


def test_the_types_of_a_mixed_file() -> None:
    composition = composed(DATA / "llama.gguf")
    assert composition.stored is not None
    kept = {linear.name: scheme.kept for linear, scheme in composition.stored.quantized}
    assert kept["model.layers.0.self_attn.q_proj"] == 12  # brought to the form of v_proj, with which it is fused
    assert kept["model.layers.1.mlp.up_proj"] == 12
    assert (kept["model.layers.1.self_attn.q_proj"], kept["model.layers.1.mlp.down_proj"]) == (10, 6)
    checkpoint = composition.checkpoint
    types = checkpoint.config["quantization_config"]["types"]
    assert types["model.layers.0.self_attn.q_proj"] == "Q4_K"
    assert types["model.layers.0.self_attn.v_proj"] == "Q6_K"
    assert types["lm_head"] == "Q6_K"
    assert "model.embed_tokens" not in types  # becomes floating point
    size = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert 0 < (DATA / "llama.gguf").stat().st_size - size < 20_000
    assert checkpoint.config["tie_word_embeddings"] is False


def test_a_file_without_an_output_layer_is_tied() -> None:
    checkpoint = composed(DATA / "qwen2.gguf").checkpoint
    assert "lm_head.weight" not in checkpoint.tensors
    assert checkpoint.config["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("family", "says"),
    [("qwen2", "K 96/2 = 48 is not a multiple of 32"), ("llama", "K 256/2 = 128 is not a multiple of 256")],
)
def test_ranks_get_whole_blocks(family: str, says: str) -> None:
    (finding,) = composed(DATA / f"{family}.gguf", ranks=2).errors
    assert finding.code == "gguf-word-splits-ranks"
    assert any(says in offender for offender in finding.offenders)


def test_one_of_several_files_is_chosen(tmp_path: Path) -> None:
    for name, source in (("tiny-Q8_0", "qwen2"), ("tiny-Q4_K_M", "llama")):
        shutil.copyfile(DATA / f"{source}.gguf", tmp_path / f"{name}.gguf")
    assert composed(f"{tmp_path}:Q4_K_M").checkpoint.config["model_type"] == "llama"
    assert composed(f"{tmp_path}:q8_0").checkpoint.config["model_type"] == "qwen2"


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (lambda raw: raw[:-2000], "gguf-truncated", "is cut off: it has"),
        (lambda raw: raw[:300], "header-invalid", "its header is cut off at byte 300"),
        (lambda raw: b"GGML" + raw[4:], "header-invalid", "not with GGUF"),
        (lambda raw: raw[:4] + b"\1\0\0\0" + raw[8:], "header-invalid", "is GGUF version 1"),
        (lambda raw: raw[:4] + b"\0\0\0\3" + raw[8:], "header-invalid", "is big-endian"),
        (lambda raw: raw[:8] + b"\xff" * 8 + raw[16:], "header-invalid", "claims 18,446,744,073,709,551,615 tensors"),
        (lambda raw: raw[:24] + b"\xff" * 8 + raw[32:], "header-invalid", "a text at byte 32 has"),
        (lambda raw: raw.replace(b"tokenizer.ggml.model", b"tokenizer.ggml.m0del"), "tokenizer-missing", ""),
        (lambda raw: raw.replace(b"\5\0\0\0\0\0\0\0qwen2", b"\5\0\0\0\0\0\0\0mamba"), "gguf-unserved", "'mamba'"),
        (lambda raw: raw.replace(b"blk.1.attn_output", b"blk.1.ssm_out_put"), "gguf-unknown-tensors", "ssm_out_put"),
        (lambda raw: raw.replace(b"blk.1.attn_output", b"blk.0.attn_output"), "header-invalid", "is in it twice"),
    ],
)  # fmt: skip
def test_what_is_broken_is_named(tmp_path: Path, change: Callable[[bytes], bytes], code: str, says: str) -> None:
    findings = {finding.code: finding.message for finding in changed(tmp_path, change).errors}
    assert code in findings
    assert says in findings[code]


def _retyped(raw: bytes, name: bytes, kind: int, offset: int | None = None) -> bytes:
    """The same file with another type, or offset, in the entry of a two-dimensional tensor."""
    at = raw.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4 + 16
    made = bytearray(raw)
    struct.pack_into("<I", made, at, kind)
    if offset is not None:
        struct.pack_into("<Q", made, at + 4, offset)
    return bytes(made)


@pytest.mark.parametrize(
    ("kind", "offset", "code", "says"),
    [
        (19, None, "gguf-unserved-type", "IQ1_S, which is not served here"),
        (77, None, "gguf-unserved-type", "type 77, which is not served here"),
        (12, None, "gguf-blocks", "no whole number of blocks"),  # 64 inputs in blocks of 256
        (8, 1 << 40, "gguf-truncated", "is cut off"),
        (8, 7, "header-invalid", "not a multiple of 32"),
        (8, 0, "header-invalid", "overlap at byte"),
    ],
)
def test_a_tensor_that_is_broken_is_named(tmp_path: Path, kind: int, offset: int | None, code: str, says: str) -> None:
    composition = changed(tmp_path, lambda raw: _retyped(raw, b"blk.1.attn_q.weight", kind, offset))
    findings = {finding.code: finding.message for finding in composition.errors}
    assert code in findings
    assert says in findings[code]
    assert len(findings) == 1  # nothing is called missing


def test_a_quantized_norm_is_named(tmp_path: Path) -> None:
    name = b"blk.1.attn_norm.weight"

    def change(raw: bytes) -> bytes:
        at = raw.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4 + 8
        return raw[:at] + struct.pack("<I", 8) + raw[at + 4 :]

    assert "gguf-quantized-norm" in codes(changed(tmp_path, change))


def test_a_part_without_the_others(tmp_path: Path) -> None:
    name, key = b"tokenizer.ggml.padding_token_id", b"split.count"
    raw = (DATA / "qwen2.gguf").read_bytes()
    at = raw.index(name) - 8
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<II", 4, 3)
    path = tmp_path / "tiny-00001-of-00003.gguf"
    path.write_bytes(raw[:at] + entry + raw[at + 8 + len(name) + 8 :])
    composition = composed(path)
    findings = {finding.code: finding for finding in composition.errors}
    assert "gguf-split" in findings
    assert "in 3 files, and 1 of them" in findings["gguf-split"].message
    assert "tiny-00002-of-00003.gguf" in findings["shard-missing"].offenders


def test_hostile_headers_end_quickly() -> None:
    """Lengths that claim more than there is are refused before anything of that size is read or allocated."""
    start = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a"
    huge = (
        struct.pack("<IIQ", 9, 8, 1 << 60),  # texts
        struct.pack("<IIQ", 9, 0, 1 << 60),  # bytes
        struct.pack("<IIQ", 9, 9, 1 << 60),  # arrays of arrays
        struct.pack("<IQ", 8, 1 << 60),  # a text
        struct.pack("<I", 99),
    )
    for value in huge:
        with pytest.raises(BadContainer):
            read_header(io.BytesIO(start + value + bytes(100)))


def test_the_scaling_of_llama_3_is_recovered() -> None:
    """The factors of transformers' own formula, as llama.cpp's converter stores them."""
    torch = pytest.importorskip("torch")
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
    }  # fmt: skip
    made = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=scaling, max_position_embeddings=131072)
    scaled, _ = rope.ROPE_INIT_FUNCTIONS["llama3"](made, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
    factors = tuple((plain / scaled).tolist())
    metadata: dict[str, Value] = {
        "general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 131072,
        "llama.embedding_length": 256, "llama.feed_forward_length": 512, "llama.attention.head_count": 4,
        "llama.rope.freq_base": 500000.0, "llama.vocab_size": 64,
    }  # fmt: skip
    found = config_of(metadata, {}, factors)["rope_scaling"]
    assert {**found, "factor": round(found["factor"], 3)} == {k: v for k, v in scaling.items() if k != "rope_theta"}
    with pytest.raises(Unserved, match="it has 31 factors of its rotary embedding"):
        config_of(metadata, {}, factors[1:])
    with pytest.raises(Unserved, match="factor 0 of its rotary embedding"):
        config_of(metadata, {}, (2.0, *factors[1:]))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("llama.expert_count", 8, "mixture of experts"),
        ("llama.attention.head_count", (4, 8), "where one integer is expected"),
        ("llama.rope.scaling.type", "longrope", "'longrope'"),
        ("llama.rope.dimension_count", 32, "rope.dimension_count is 32, and a head has 64"),
        ("llama.attention.value_length", 128, "value_length is 128"),
        ("llama.rope.freq_base", float("nan"), "freq_base is nan, where a number is expected"),
    ],
)
def test_features_that_are_not_served_are_named(key: str, value: object, says: str) -> None:
    metadata = read_header((DATA / "llama.gguf").open("rb")).metadata
    with pytest.raises(Unserved, match=says):
        config_of({**metadata, key: value}, {}, ())  # type: ignore[dict-item]


def test_every_served_type_says_what_the_engine_keeps() -> None:
    from quantserve_gguf.blocks import SCHEMES

    assert SCHEMES["Q8_0"].kept == 8.5
    assert SCHEMES["Q4_K"].kept == 6
    assert {name for name, kind in BY_NAME.items() if kind.quantized} == set(SCHEMES)


def test_the_light_module_is_light() -> None:
    code = "import quantserve_gguf.plugin, sys, json; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert not {"torch", "vllm", "ray", "numpy", "transformers", "pydantic"} & set(loaded)
