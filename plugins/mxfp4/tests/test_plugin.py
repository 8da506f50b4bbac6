"""What the MXFP4 plugin finds in good and bad checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoints import make_llama, read_header, write_safetensors, write_tokenizer
from helpers.composed import composed, errors, findings
from quantserve.api import Severity

DATA = Path(__file__).parent / "data" / "gpt-oss"
EXPERTS = "model.layers.1.mlp.experts"


def changed(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]] | None] | None = None, **config: Any) -> Path:
    """The data with other tensors (None: without one) and other keys of its config (None: without one)."""
    path.mkdir()
    every = {**read_header(DATA / "model.safetensors"), **(tensors or {})}
    write_safetensors(path / "model.safetensors", {name: spec for name, spec in every.items() if spec})
    known = json.loads((DATA / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps({key: value for key, value in known.items() if value is not None}))
    write_tokenizer(path, 256)
    return path


@pytest.mark.parametrize("target", ["h100", "mi300x", "cpu"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_good_checkpoint_has_no_errors(tmp_path: Path, target: str, ranks: int) -> None:
    composition = composed(changed(tmp_path / "m"), target, ranks)
    assert composition.method is not None
    assert composition.method.name == "mxfp4"
    assert not errors(composition)
    assert composition.stored is not None
    assert len(composition.stored.quantized) == 4


def test_blocks_stay_whole_on_the_ranks_of_a_cpu(tmp_path: Path) -> None:
    """vLLM pads what ranks have on GPUs; with whole experts on each rank nothing is cut."""
    sizes = {"num_key_value_heads": 4}
    shapes: dict[str, Any] = {}
    for layer in range(2):
        for part in ("weight", "bias"):
            for name in "kv":
                shape = (128, 96) if part == "weight" else (128,)
                shapes[f"model.layers.{layer}.self_attn.{name}_proj.{part}"] = ("BF16", shape)
    folder = changed(tmp_path / "m", shapes, **sizes)
    found = errors(composed(folder, "cpu", 4))
    assert list(found) == ["mxfp4-group-splits-ranks"]
    assert "K 64/4 = 16 is not a multiple of 32" in found["mxfp4-group-splits-ranks"].message
    assert not errors(composed(folder, "h100", 4))
    assert not errors(composed(folder, "cpu", 4, enable_expert_parallel=True))


def test_older_gpus_have_no_kernel(tmp_path: Path) -> None:
    assert "capability-too-low" in errors(composed(changed(tmp_path / "m"), "t4"))


def test_activations_are_bfloat16(tmp_path: Path) -> None:
    folder = changed(tmp_path / "m", dtype="float16")
    assert composed(folder).engine_kwargs["dtype"].value == "bfloat16"
    assert "dtype-unsupported" in errors(composed(folder, dtype="float16"))


@pytest.mark.parametrize("suffix", ["blocks", "scales", "bias"])
def test_a_tensor_is_missing(tmp_path: Path, suffix: str) -> None:
    name = f"{EXPERTS}.down_proj_{suffix}"
    written = name if suffix != "scales" else name.replace("_scales", ".scales")  # as a module's tensor
    finding = errors(composed(changed(tmp_path / "m", {name: None})))["mxfp4-missing-tensors"]
    assert {name, written} & set(finding.offenders)


@pytest.mark.parametrize("suffix", ["self_attn.sinks", "self_attn.q_proj.bias", "mlp.router.bias", "model.norm.weight"])
def test_a_tensor_beside_the_experts_is_missing_in_every_layer(tmp_path: Path, suffix: str) -> None:
    without = {name: None for name in read_header(DATA / "model.safetensors") if name.endswith(suffix)}
    finding = errors(composed(changed(tmp_path / "m", without)))["mxfp4-missing-tensors"]
    assert without.keys() == set(finding.offenders)


@pytest.mark.parametrize(
    ("suffix", "shape"),
    [("blocks", (4, 96, 3, 16)), ("blocks", (4, 96, 32)), ("scales", (4, 96, 3)), ("bias", (4, 64))],
)
def test_a_tensor_has_another_shape(tmp_path: Path, suffix: str, shape: tuple[int, ...]) -> None:
    name = f"{EXPERTS}.down_proj_{suffix}"
    dtype = "BF16" if suffix == "bias" else "U8"
    found = errors(composed(changed(tmp_path / "m", {name: (dtype, shape)})))
    assert "down_proj" in found["mxfp4-wrong-shape"].message


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_local_experts"])
def test_the_config_of_another_model(tmp_path: Path, key: str) -> None:
    assert "mxfp4-wrong-shape" in errors(composed(changed(tmp_path / "m", **{key: 128})))


def test_scales_of_another_dtype(tmp_path: Path) -> None:
    name = f"{EXPERTS}.down_proj_scales"
    assert "mxfp4-wrong-dtype" in errors(composed(changed(tmp_path / "m", {name: ("BF16", (4, 96, 2))})))


def dequantized(folder: Path, **config: Any) -> Path:
    """What transformers saves after ``Mxfp4Config(dequantize=True)``."""
    tensors: dict[str, Any] = {}
    for name in read_header(DATA / "model.safetensors"):
        if name.endswith("_blocks"):
            tensors[name.removesuffix("_blocks")] = ("BF16", (4, 96, 128) if "gate" in name else (4, 64, 96))
        if name.endswith(("_blocks", "_scales")):
            tensors[name] = None
    return changed(folder, tensors, **config)


def test_declared_over_16_bits(tmp_path: Path) -> None:
    finding = errors(composed(dequantized(tmp_path / "m")))["mxfp4-not-quantized"]
    assert "16 bits" in finding.message
    assert "remove quantization_config" in finding.fix
    plain = composed(dequantized(tmp_path / "plain", quantization_config=None))
    assert plain.method is not None
    assert plain.method.name == "fp16"
    assert not errors(plain)


def test_a_model_without_experts(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", config={"quantization_config": {"quant_method": "mxfp4"}})
    assert "no other linears" in errors(composed(folder))["mxfp4-not-quantized"].message


def test_blocks_in_another_family(tmp_path: Path) -> None:
    config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
    assert "'qwen3_moe'" in errors(composed(changed(tmp_path / "m", **config)))["mxfp4-family"].message


def test_experts_with_tensors_of_their_own(tmp_path: Path) -> None:
    """vLLM may serve them on GPUs."""
    tensors: dict[str, Any] = dict.fromkeys(read_header(DATA / "model.safetensors"))
    for name, shape in {"weight": (64, 48), "weight_scale": (64, 3)}.items():
        tensors[f"model.layers.0.mlp.experts.0.up_proj.{name}"] = ("U8", shape)
    folder = changed(tmp_path / "m", tensors, model_type="qwen3_moe")
    assert "mxfp4-layout" in errors(composed(folder, "cpu"))
    assert findings(composed(folder))["mxfp4-layout"].severity is Severity.WARNING


def test_the_files_of_openai(tmp_path: Path) -> None:
    folder = tmp_path / "original"
    folder.mkdir()
    blocks = {f"block.0.mlp.mlp1_weight.{part}": ("U8", shape) for part, shape in
              {"blocks": (4, 128, 3, 16), "scales": (4, 128, 3)}.items()}  # fmt: skip
    write_safetensors(folder / "model.safetensors", {**blocks, "embedding.weight": ("BF16", (256, 96))})
    (folder / "config.json").write_text(json.dumps({"num_experts": 4, "hidden_size": 96, "swiglu_limit": 7.0}))
    assert "folder above" in errors(composed(folder))["mxfp4-original-file"].fix


@pytest.mark.parametrize("key", ["swiglu_limit", "swiglu_alpha"])
def test_another_activation(tmp_path: Path, key: str) -> None:
    found = errors(composed(changed(tmp_path / "m", **{key: 1.0})))
    assert found["mxfp4-swiglu"].offenders == (key,)
    assert "mxfp4-swiglu" not in errors(composed(changed(tmp_path / "n", **{key: None})))


def test_undeclared_files_need_a_config(tmp_path: Path) -> None:
    found = errors(composed(changed(tmp_path / "m", quantization_config=None)))
    assert list(found) == ["quant-config-missing"]
    assert '"quant_method": "mxfp4"' in found["quant-config-missing"].fix


def test_the_light_module_is_light() -> None:
    code = "import quantserve_mxfp4.plugin, sys; assert not {'torch', 'vllm', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
