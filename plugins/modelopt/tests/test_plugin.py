"""What the ModelOpt plugin finds in good and bad checkpoints, and what it tells vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoints import REMOVE, variant
from helpers.composed import composed, findings, text, wrong
from quantserve.checkpoint import open_checkpoint

DATA = Path(__file__).parent / "data"
NAMES = ("fp8", "fp8-channel", "fp8-block", "mxfp8", "nvfp4", "w4a16", "mixed", "qwen3-moe")
LAYER = "model.layers.0"
Q, UP, DOWN = f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.up_proj", f"{LAYER}.mlp.down_proj"
Change = dict[str, Any]


def changed(
    folder: Path,
    source: str,
    *,
    quantization: Change | None = None,
    file: Change | None = None,
    config: Change | None = None,
    tensors: Change | None = None,
) -> Path:
    """The headers of a checkpoint with changes, and its hf_quant_config.json; what is None is left out."""
    changes = {key: REMOVE if value is None else value for key, value in (quantization or {}).items()}
    variant(folder, DATA / source, tensors, config, **changes)
    beside = json.loads((DATA / source / "hf_quant_config.json").read_text())
    settings = beside["quantization"] | (file or {})
    beside["quantization"] = {key: value for key, value in settings.items() if value is not None}
    (folder / "hf_quant_config.json").write_text(json.dumps(beside))
    return folder


# --- good checkpoints: the files of the tool ---------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", ["cpu", "b200"])
def test_files_of_the_tool(name: str, target: str) -> None:
    composition = composed(DATA / name, target)
    assert composition.method is not None
    assert composition.method.name == "modelopt"
    assert not wrong(DATA / name, target)
    assert not [
        one.code for one in composition.findings if one.severity.name == "WARNING" and "tokenizer" not in one.code
    ]
    assert composition.stored is not None
    assert len(composition.stored.quantized) == (14 if name == "qwen3-moe" else 7)


@pytest.mark.parametrize(
    ("name", "bits", "argument"),
    [
        ("fp8", 8, "modelopt"), ("fp8-block", 8, "modelopt"), ("mxfp8", 8, "modelopt_mxfp8"),
        ("nvfp4", 4, "modelopt_fp4"), ("w4a16", 4, "modelopt_fp4"), ("mixed", None, "modelopt_mixed"),
    ],
)  # fmt: skip
def test_what_vllm_is_told(name: str, bits: int | None, argument: str) -> None:
    gpu, cpu = composed(DATA / name, "h100"), composed(DATA / name, "cpu")
    assert gpu.engine_kwargs["quantization"].value == argument
    assert cpu.engine_kwargs["quantization"].value == "modelopt"
    assert "quantserve" in cpu.kernel
    assert gpu.stored is not None
    assert {scheme.bits for _, scheme in gpu.stored.quantized} == ({bits} if bits else {4, 8})


def test_the_declared_cache_is_the_plans() -> None:
    assert composed(DATA / "nvfp4", "h100").engine_kwargs["kv_cache_dtype"].value == "fp8_e4m3"
    assert composed(DATA / "nvfp4", "cpu").engine_kwargs["kv_cache_dtype"].value == "bfloat16"
    assert composed(DATA / "nvfp4", "cpu", kv_cache_dtype="fp8").engine_kwargs["kv_cache_dtype"].value == "fp8"
    assert "kv_cache_dtype" not in composed(DATA / "fp8", "h100").engine_kwargs


@pytest.mark.parametrize("target", ["cpu", "h100"])
def test_float16_files(tmp_path: Path, target: str) -> None:
    folder = changed(tmp_path / "m", "mxfp8", config={"dtype": "float16"})
    assert not wrong(folder, target)


def test_blocks_of_fused_parts(tmp_path: Path) -> None:
    """k of one head is half a block."""
    halves: Change = {}
    for one in "kv":
        halves[f"{LAYER}.self_attn.{one}_proj.weight"] = ("F8_E4M3", (64, 128))
        halves[f"{LAYER}.self_attn.{one}_proj.weight_scale"] = ("F32", (1, 1, 1, 1))
    folder = changed(tmp_path / "m", "fp8-block", config={"num_key_value_heads": 1}, tensors=halves)
    assert "N 64 is not a multiple of 128" in wrong(folder)["modelopt-blocks"].message
    assert not wrong(folder, "cpu")


# --- declared in the files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["modelopt_fp4", "ModelOpt"])
def test_other_names(tmp_path: Path, name: str) -> None:
    for target in ("cpu", "b200"):
        folder = changed(tmp_path / target, "nvfp4", quantization={"quant_method": name})
        assert not wrong(folder, target)


def test_the_old_file_alone(tmp_path: Path) -> None:
    config = {"quantization_config": None}
    for target in ("cpu", "b200"):
        assert not wrong(changed(tmp_path / target, "nvfp4", config=config), target)
    for name, algorithm in (("w4a16", "W4A16_NVFP4"), ("mxfp8", "MXFP8")):
        found = wrong(changed(tmp_path / name, name, config=config))  # vLLM: Unknown ModelOpt quant algo
        assert algorithm in text(found["modelopt-settings"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quant_algo": None}, "quant_algo"),
        ({"quant_algo": "NVFP4_AWQ"}, "NVFP4_AWQ"),
        ({"ignore": "lm_head"}, "ignore"),
        ({"group_size": "many"}, "group_size"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {}}, "quantized_layers"),
    ],
)
def test_settings_at_which_vllm_stops(tmp_path: Path, changes: Change, said: str) -> None:
    found = wrong(changed(tmp_path / "m", "nvfp4", quantization=changes))
    assert list(found) == ["modelopt-settings"]
    assert said in found["modelopt-settings"].message


def test_files_that_disagree(tmp_path: Path) -> None:
    folder = changed(tmp_path / "m", "nvfp4", file={"quant_algo": "FP8", "exclude_modules": ["model.embed_tokens"]})
    found = findings(composed(folder))["modelopt-files-disagree"]
    assert "quant_algo is NVFP4 in config.json, quant_algo FP8" in found.message
    assert len(found.offenders) == 2


def test_modules_of_a_mixture_in_the_old_file_only(tmp_path: Path) -> None:
    folder = changed(tmp_path / "m", "mixed", quantization={"quantized_layers": None})
    assert not wrong(folder, "h100")
    assert list(wrong(folder, "cpu")) == ["modelopt-settings"]


@pytest.mark.parametrize("target", ["cpu", "b200"])
def test_parts_of_one_layer_in_different_algorithms(tmp_path: Path, target: str) -> None:
    """An engine stops at them; o_proj and down_proj are layers of their own."""
    layers = json.loads((DATA / "mixed/config.json").read_text())["quantization_config"]["quantized_layers"]
    alike = layers | {DOWN: {"quant_algo": "FP8"}}
    assert "modelopt-mixed-layer" not in wrong(
        changed(tmp_path / "a", "mixed", quantization={"quantized_layers": alike}), target
    )
    split = layers | {Q: {"quant_algo": "NVFP4", "group_size": 16}}
    found = wrong(changed(tmp_path / "m", "mixed", quantization={"quantized_layers": split}), target)
    assert "qkv_proj: q_proj NVFP4; k_proj FP8; v_proj FP8" in found["modelopt-mixed-layer"].message


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_declared_over_bfloat16(tmp_path: Path, name: str) -> None:
    held = open_checkpoint(str(DATA / name)).tensors
    plain: Change = {one: None for one in held if "scale" in one}
    for key, tensor in held.items():
        if tensor.dtype in ("U8", "F8_E4M3") and key.endswith(".weight"):
            n, k = tensor.shape
            plain[key] = ("BF16", (n, 2 * k if tensor.dtype == "U8" else k))
    assert list(wrong(changed(tmp_path / "m", name, tensors=plain))) == ["modelopt-not-quantized"]


def test_the_algorithm_of_another_file(tmp_path: Path) -> None:
    found = wrong(changed(tmp_path / "m", "nvfp4", quantization={"quant_algo": "FP8"}))
    assert {"modelopt-wrong-dtype", "modelopt-unexpected-tensors"} <= found.keys()


# --- tensors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("nvfp4", "weight_scale_2"),
        ("nvfp4", "weight_scale"),
        ("mxfp8", "weight_scale"),
        ("qwen3-moe", "weight_scale_2"),
    ],
)
def test_a_scale_is_missing(tmp_path: Path, name: str, suffix: str) -> None:
    missing = f"{LAYER}.mlp.experts.1.up_proj.{suffix}" if name == "qwen3-moe" else f"{UP}.{suffix}"
    for target in ("cpu", "b200"):
        found = wrong(changed(tmp_path / target, name, tensors={missing: None}), target)
        assert missing in text(found["modelopt-missing-tensors"])


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_scales_of_activations_are_missing(tmp_path: Path, name: str) -> None:
    folder = changed(tmp_path / "m", name, tensors={f"{UP}.input_scale": None})
    assert f"{UP}.input_scale" in text(wrong(folder)["modelopt-input-scale"])
    assert not wrong(folder, "cpu")


def test_weights_only_need_no_scales_of_activations(tmp_path: Path) -> None:
    """vLLM takes NVFP4 for W4A16_NVFP4 where no group has activations."""
    weights = {"group_0": {"weights": {"num_bits": 4, "type": "float"}, "input_activations": None}}
    scales = {name: None for name in open_checkpoint(str(DATA / "nvfp4")).tensors if name.endswith("input_scale")}
    assert not wrong(changed(tmp_path / "m", "nvfp4", quantization={"config_groups": weights}, tensors=scales))


def test_groups_of_another_size(tmp_path: Path) -> None:
    held = open_checkpoint(str(DATA / "nvfp4")).tensors
    wide = {
        key: ("F8_E4M3", (one.shape[0], one.shape[1] // 2)) for key, one in held.items() if key.endswith("weight_scale")
    }
    folder = changed(tmp_path / "m", "nvfp4", quantization={"group_size": 32}, tensors=wide)
    assert list(wrong(folder)) == ["modelopt-group-size"]
    assert not wrong(folder, "cpu")
    assert "modelopt-wrong-shape" in wrong(changed(tmp_path / "n", "nvfp4", tensors=wide), "cpu")


def test_a_group_on_two_ranks(tmp_path: Path) -> None:
    assert not wrong(DATA / "nvfp4", ranks=2)
    assert "modelopt-group-splits-ranks" in wrong(DATA / "fp8-block", ranks=4)


@pytest.mark.parametrize(("suffix", "one"), [("weight_scale_2", True), ("weight_scale", False)])
def test_parts_of_a_fused_layer_with_different_scales(tmp_path: Path, suffix: str, one: bool) -> None:
    """Values are read for the second scale alone; FP8 is quantized again by vLLM."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    name = "nvfp4" if one else "fp8"
    folder = changed(tmp_path / "m", name)
    tensors = load_file(DATA / name / "model.safetensors")
    tensors[f"{Q}.{suffix}"] = tensors[f"{Q}.{suffix}"] * torch.tensor(2.0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = findings(composed(folder, "b200"))
    assert ("modelopt-fused-scales" in found) is one
    if one:
        assert "self_attn.qkv_proj: q_proj" in found["modelopt-fused-scales"].message
    assert "modelopt-fused-scales" not in findings(composed(folder, "cpu"))


# --- modules -----------------------------------------------------------------------------------------------------


def plain(name: str, n: int, k: int) -> Change:
    """A linear that is not quantized, in place of one in NVFP4."""
    gone = {f"{name}.{suffix}": None for suffix in ("weight_scale", "weight_scale_2", "input_scale")}
    return {f"{name}.weight": ("BF16", (n, k)), **gone}


@pytest.mark.parametrize(
    ("entry", "wrong_"), [(DOWN, False), ("*down_proj*", False), ("mlp.down", False), ("model.layers.1", True)]
)
def test_lists_and_files_agree(tmp_path: Path, entry: str, wrong_: bool) -> None:
    options = {"quantization": {"ignore": ["lm_head", entry]}, "tensors": plain(DOWN, 128, 256)}
    assert ("modelopt-skip-list" in wrong(changed(tmp_path / "m", "nvfp4", **options))) is wrong_


def test_a_quantized_layer_whose_name_begins_as_one_of_the_list(tmp_path: Path) -> None:
    folder = changed(tmp_path / "m", "nvfp4", quantization={"ignore": ["lm_head", "model.layers.0.self_attn.o"]})
    assert f"{LAYER}.self_attn.o_proj" in text(wrong(folder)["modelopt-skip-list"])


def test_an_entry_that_names_nothing(tmp_path: Path) -> None:
    folder = changed(tmp_path / "m", "nvfp4", quantization={"ignore": ["lm_head", "*.visual.*"]})
    assert findings(composed(folder))["modelopt-unused-entry"].offenders == ("*.visual.*",)


def test_the_output_layer(tmp_path: Path) -> None:
    unlisted = changed(tmp_path / "a", "nvfp4", quantization={"ignore": []})
    assert list(wrong(unlisted)) == ["modelopt-lm-head"]
    assert not wrong(unlisted, "cpu")
    head = {
        "lm_head.weight": ("U8", (64, 64)), "lm_head.weight_scale": ("F8_E4M3", (64, 8)),
        "lm_head.weight_scale_2": ("F32", ()), "lm_head.input_scale": ("F32", ()),
    }  # fmt: skip
    quantized = changed(tmp_path / "b", "nvfp4", quantization={"ignore": []}, tensors=head)
    tied = changed(
        tmp_path / "c", "nvfp4", quantization={"ignore": []}, tensors=head, config={"tie_word_embeddings": True}
    )
    for target in ("cpu", "b200"):
        assert not wrong(quantized, target)
        assert "modelopt-tied-lm-head" not in findings(composed(quantized, target))
        assert "modelopt-tied-lm-head" in findings(composed(tied, target))


def test_experts_that_vllm_reads_one_scale_of(tmp_path: Path) -> None:
    held = open_checkpoint(str(DATA / "qwen3-moe")).tensors
    made: Change = {}
    for key, one in held.items():
        if one.dtype == "U8":
            n, k = one.shape
            stem = key.removesuffix("weight")
            made |= {key: ("F8_E4M3", (n, 2 * k)), f"{stem}weight_scale": ("F32", (n,))}
            made |= {f"{stem}weight_scale_2": None, f"{stem}input_scale": None}
    channel = {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
    folder = changed(tmp_path / "m", "qwen3-moe", quantization=channel, tensors=made)
    assert list(wrong(folder)) == ["modelopt-experts"]
    assert not wrong(folder, "cpu")


def test_stacked_experts_are_for_gpus(tmp_path: Path) -> None:
    held = open_checkpoint(str(DATA / "qwen3-moe")).tensors
    made: Change = {key: None for key in held if ".experts." in key}
    for layer in (0, 1):
        for name, n, k in (("gate_up_proj", 256, 128), ("down_proj", 128, 128)):
            stem = f"model.layers.{layer}.mlp.experts.{name}"
            made |= {stem: ("U8", (4, n, k // 2)), f"{stem}_weight_scale": ("F8_E4M3", (4, n, k // 16))}
    assert "modelopt-stacked-experts" in wrong(changed(tmp_path / "m", "qwen3-moe", tensors=made), "cpu")


# --- devices and the cache ---------------------------------------------------------------------------------------


def test_compute_capability() -> None:
    assert not wrong(DATA / "nvfp4", "t4").keys() - {"bfloat16-unsupported", "dtype-narrowed"}
    assert "modelopt-capability" in wrong(DATA / "fp8", "t4")


def test_what_is_not_used_on_cpus() -> None:
    found = findings(composed(DATA / "nvfp4", "cpu"))
    assert found["modelopt-weights-only"].message.startswith("activations keep 16 bits on CPUs, so 7 ")
    assert found["modelopt-kv-scales"].message.startswith("2 scales")
    assert "modelopt-kv-scales" not in findings(composed(DATA / "nvfp4", "cpu", kv_cache_dtype="fp8"))
    assert "modelopt-kv-scales" not in findings(composed(DATA / "nvfp4", "h100"))


def test_a_cache_without_scales(tmp_path: Path) -> None:
    folder = changed(tmp_path / "m", "w4a16", quantization={"kv_cache_scheme": "FP8"})
    assert "1.0" in findings(composed(folder, "h100"))["modelopt-kv-scales"].message


def test_the_light_module_is_light() -> None:
    code = "import quantserve_modelopt.plugin, sys; assert not {'torch', 'vllm', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
