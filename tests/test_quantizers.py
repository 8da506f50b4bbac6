"""What both quantizers write of mixtures, towers and families with a dtype of their own passes the checks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")

from safetensors.torch import load_file

from helpers.checkpoints import Spec, make_llama
from helpers.composed import composed, errors
from helpers.quantized import awq, squeezellm
from quantserve.api import Checkpoint, quantizable
from quantserve.errors import UserError

METHODS: dict[str, Callable[..., None]] = {"awq": awq, "squeezellm": squeezellm}
MLP = [f"model.layers.{layer}.mlp.{name}.weight" for layer in (0, 1) for name in ("gate_proj", "up_proj", "down_proj")]
MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "intermediate_size": 512,
}


def mixtral(folder: Path) -> Path:
    """A Mixtral of two layers and two experts, its weights zero."""
    extra: dict[str, Spec] = {}
    for layer in (0, 1):
        block = f"model.layers.{layer}.block_sparse_moe."
        extra[block + "gate.weight"] = ("F16", (2, 256))
        for expert in (0, 1):
            for name, shape in (("w1", (512, 256)), ("w2", (256, 512)), ("w3", (512, 256))):
                extra[f"{block}experts.{expert}.{name}.weight"] = ("F16", shape)
    return make_llama(folder, config=MIXTRAL, drop=MLP, extra=extra)


def modules(folder: Path) -> set[str]:
    """The modules stored quantized."""
    return {name.removesuffix(".qweight") for name in load_file(folder / "model.safetensors") if "qweight" in name}


@pytest.mark.parametrize("method", METHODS)
def test_mixtures(tmp_path: Path, method: str) -> None:
    METHODS[method](mixtral(tmp_path / "m"), tmp_path / "out")
    written = modules(tmp_path / "out")
    assert any(name.endswith("self_attn.q_proj") for name in written)
    assert any(".experts." in name for name in written) == (method == "awq")
    assert {name.rpartition(".")[2] for name in written if ".experts." in name} <= {"w1", "w2", "w3"}
    assert not any(name.endswith((".gate", "lm_head")) for name in written)
    assert not errors(composed(tmp_path / "out", "a100-80g"))


@pytest.mark.parametrize("method", METHODS)
def test_towers_stay_as_they_are(tmp_path: Path, method: str) -> None:
    towers = {
        f"{tower}.{name}.weight": ("F16", (64, 64))
        for tower in ("vision_tower.vision_model.encoder.layers.0.self_attn", "audio_tower.layers.0.self_attn")
        for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    }
    towers["multi_modal_projector.layers.0.up_proj.weight"] = ("F16", (64, 64))
    config = {"model_type": "unheard_of", "architectures": ["UnheardOfForConditionalGeneration"]}
    METHODS[method](make_llama(tmp_path / "m", config=config, extra=towers), tmp_path / "out")
    written = modules(tmp_path / "out")
    assert len(written) == 14
    assert all(name.startswith("model.layers.") for name in written)
    found = errors(composed(tmp_path / "out", "a100-80g"))
    assert not {code for code in found if code.startswith(method)}


@pytest.mark.parametrize(
    ("model_type", "written"),
    [("gemma2", "bfloat16"), ("glm4", "bfloat16"), ("gemma3_text", "bfloat16"), ("llama", "float16")],
)
def test_awq_keeps_bfloat16_where_vllm_refuses_float16(tmp_path: Path, model_type: str, written: str) -> None:
    make_llama(
        tmp_path / "m", dtype="BF16", head_dim=64, config={"model_type": model_type, "architectures": ["UnheardOf"]}
    )
    awq(tmp_path / "m", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == written
    floats = {
        str(tensor.dtype) for tensor in load_file(tmp_path / "out" / "model.safetensors").values()
        if tensor.is_floating_point()
    }  # fmt: skip
    assert floats == {f"torch.{written}"}
    for target in ("cpu", "a100-80g"):
        found = composed(tmp_path / "out", target)
        assert not {code for code in errors(found) if code.startswith(("awq", "dtype"))}


def test_an_awq_group_that_does_not_fit_names_those_that_do(tmp_path: Path) -> None:
    smollm = make_llama(tmp_path / "m", hidden=576, heads=9, kv_heads=3, intermediate=1536)
    with pytest.raises(UserError, match=r"q_proj: K is 576, not a multiple of the group size 128") as raised:
        awq(smollm, tmp_path / "out")
    assert "--group-size 64 or 32, which works for all 14 linears" in str(raised.value)
    assert not (tmp_path / "out").exists()
    awq(smollm, tmp_path / "out", group_size=64)
    assert not errors(composed(tmp_path / "out", "a100-80g"))
    odd = make_llama(tmp_path / "odd", hidden=48, heads=3, kv_heads=3, intermediate=80)
    with pytest.raises(UserError, match="--group-size -1"):
        awq(odd, tmp_path / "again")


def test_awq_names_what_stays_unquantized(tmp_path: Path) -> None:
    left = [f"model.layers.{layer}.self_attn.q_a_proj" for layer in (0, 1)]
    extra: dict[str, Spec] = {f"{name}.weight": ("F16", (64, 256)) for name in left}
    config = {"model_type": "unheard_of", "architectures": ["UnheardOf"]}
    awq(make_llama(tmp_path / "m", config=config, extra=extra), tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["modules_to_not_convert"] == left
    assert not {code for code in errors(composed(tmp_path / "out", "a100-80g")) if code.startswith("awq")}


def test_stacked_experts_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    extra: dict[str, Spec] = {f"model.layers.{i}.block_sparse_moe.experts.w1": ("F16", (2, 512, 256)) for i in (0, 1)}
    folder = make_llama(tmp_path / "m", config=MIXTRAL, drop=MLP, extra=extra)
    with pytest.raises(UserError, match=r"(?s)12 linears that config.json describes.*not stacked"):
        awq(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_fused_layer_is_quantized_whole_or_not_at_all() -> None:
    names = ["self_attn.q_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.q_a_proj", "mlp.gate", "mlp.down_proj"]
    names += ["mamba.in_proj", "linear_attn.in_proj_qkvz"]
    shapes = {f"model.layers.0.{name}.weight": ("BF16", (64, 64)) for name in names}
    checkpoint = Checkpoint.from_tensors({"model_type": "unheard_of"}, shapes)
    assert {linear.name.rpartition(".")[2] for linear in quantizable(checkpoint)} == {"q_proj", "down_proj"}
