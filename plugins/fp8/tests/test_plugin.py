"""What the FP8 plugin finds in good and bad checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoints import make_llama, read_header, variant, write_safetensors
from helpers.composed import composed, errors, findings

DATA = Path(__file__).parent / "data" / "qwen3-moe-fp8"
SIZES = {"q_proj": (512, 512), "k_proj": (256, 512), "v_proj": (256, 512), "o_proj": (512, 512)}
SIZES |= {"gate_proj": (1024, 512), "up_proj": (1024, 512), "down_proj": (512, 1024)}
NAMES = [
    (f"model.layers.{layer}.{'self_attn' if name in ('q_proj', 'k_proj', 'v_proj', 'o_proj') else 'mlp'}.{name}", size)
    for layer in range(2)
    for name, size in SIZES.items()
]
Q = NAMES[0][0]


def fp8(
    path: Path, scale: str = "block", *, changes: dict[str, Any] | None = None, kv_heads: int = 4, **options: Any
) -> Path:
    """A Llama whose linears are FP8, with scales of a kind: block, tensor, channel or none."""
    extra: dict[str, Any] = dict(options.pop("extra", {}))
    override = {}
    for name, (n, k) in NAMES:
        n = 64 * kv_heads if name.endswith(("k_proj", "v_proj")) else n
        override[f"{name}.weight"] = ("F8_E4M3", (n, k))
        if scale == "block":
            extra[f"{name}.weight_scale_inv"] = ("F32", (-(-n // 128), k // 128))
        elif scale != "none":
            extra[f"{name}.weight_scale"] = ("F32", () if scale == "tensor" else (n, 1))
    config: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    config |= {"weight_block_size": [128, 128]} if scale == "block" else {}
    config = {key: value for key, value in (config | (changes or {})).items() if value is not None}
    override |= options.pop("override", {})
    return make_llama(
        path,
        hidden=512,
        intermediate=1024,
        heads=8,
        kv_heads=kv_heads,
        dtype="BF16",
        extra=extra,
        override=override,
        config={"quantization_config": config},
        **options,
    )


@pytest.mark.parametrize("target", ["h100", "cpu"])
@pytest.mark.parametrize(("scale", "ranks"), [("block", 1), ("block", 2), ("tensor", 4)])
def test_good_checkpoints_have_no_errors(tmp_path: Path, scale: str, ranks: int, target: str) -> None:
    composition = composed(fp8(tmp_path / "m", scale), target, ranks)
    assert composition.method is not None
    assert composition.method.name == "fp8"
    assert not errors(composition)


def test_what_transformers_wrote(tmp_path: Path) -> None:
    composition = composed(DATA, "cpu")
    assert composition.method is not None
    assert composition.method.name == "fp8"
    assert not set(errors(composition)) - {"tokenizer-missing"}


def test_a_rank_gets_whole_blocks(tmp_path: Path) -> None:
    found = errors(composed(fp8(tmp_path / "m"), "h100", 4))
    assert "64 is not a multiple of 128" in found["fp8-group-splits-ranks"].message.replace("256/4 = ", "")


@pytest.mark.parametrize(("kv_heads", "target", "refused"), [(1, "h100", True), (1, "cpu", False), (2, "h100", False)])
def test_parts_of_a_fused_layer_are_whole_blocks(tmp_path: Path, kv_heads: int, target: str, refused: bool) -> None:
    found = errors(composed(fp8(tmp_path / "m", kv_heads=kv_heads), target))
    assert ("fp8-blocks" in found) == refused
    if refused:
        assert "k_proj: N 64 is not a multiple of 128" in found["fp8-blocks"].message


@pytest.mark.parametrize("turned", [False, True])
def test_all_experts_in_one_tensor(tmp_path: Path, turned: bool) -> None:
    tensors = {name: one for name, one in read_header(DATA / "model.safetensors").items() if ".experts." not in name}
    for layer in range(2):
        for name, n, k in (("gate_up_proj", 256, 128), ("down_proj", 128, 128)):
            stack, shape = f"model.layers.{layer}.mlp.experts.{name}", (k, n) if turned else (n, k)
            tensors[stack] = ("F8_E4M3", (4, *shape))
            tensors[f"{stack}_weight_scale_inv"] = ("F32", (4, *(size // 128 for size in shape)))
    folder = variant(tmp_path / "m", DATA)
    write_safetensors(folder / "model.safetensors", tensors)
    composition = composed(folder, "cpu")
    assert [code for code in errors(composition) if code.startswith("fp8")] == ["fp8-stacked-experts"] * turned
    assert composition.stored is not None
    assert sum(linear.stacked for linear, _ in composition.stored.quantized) == 4


def test_blocks_on_gemma_4(tmp_path: Path) -> None:
    for scale, warned in (("block", True), ("tensor", False)):
        folder = fp8(tmp_path / scale, scale)
        config = json.loads((folder / "config.json").read_text()) | {"model_type": "gemma4"}
        (folder / "config.json").write_text(json.dumps(config))
        assert ("fp8-gemma4-blocks" in findings(composed(folder, "h100"))) == warned


def test_scales_are_missing(tmp_path: Path) -> None:
    assert f"{Q}.weight_scale" in errors(composed(fp8(tmp_path / "m", "none")))["fp8-missing-tensors"].message


def test_declared_over_bfloat16(tmp_path: Path) -> None:
    folder = make_llama(
        tmp_path / "m",
        dtype="BF16",
        config={"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}},
    )
    assert "fp8-not-quantized" in errors(composed(folder))


def test_the_other_kind_of_fp8(tmp_path: Path) -> None:
    every = read_header(DATA / "model.safetensors")
    other = {name: ("F8_E5M2", shape) for name, (dtype, shape) in every.items() if dtype == "F8_E4M3"}
    found = errors(composed(variant(tmp_path / "m", DATA, other)))
    assert found.keys() == {"fp8-wrong-dtype"}
    assert "F8_E5M2, expected F8_E4M3" in found["fp8-wrong-dtype"].message


def test_one_linear_that_is_bfloat16_with_a_scale(tmp_path: Path) -> None:
    down = {"model.layers.1.mlp.down_proj.weight": ("BF16", (512, 1024))}
    assert "fp8-wrong-dtype" in errors(composed(fp8(tmp_path / "m", "tensor", override=down)))


@pytest.mark.parametrize("key", ["ignored_layers", "modules_to_not_convert"])
def test_the_list_of_unquantized_modules_has_whole_names(tmp_path: Path, key: str) -> None:
    down = "model.layers.1.mlp.down_proj"
    for entry, wrong in ((down, False), ("down_proj", True)):
        folder = fp8(tmp_path / entry, "tensor", changes={key: [entry]})
        tensors = {f"{down}.weight": ("BF16", (512, 1024))}
        rewrite(folder, tensors, without=f"{down}.weight_scale")
        assert ("fp8-skip-list" in errors(composed(folder))) is wrong


def rewrite(folder: Path, tensors: dict[str, Any], without: str) -> None:
    """Change tensors of a checkpoint of one file."""
    from helpers.checkpoints import write_safetensors

    file = folder / "model.safetensors"
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    every = {n: (v["dtype"], tuple(v["shape"])) for n, v in header.items() if n not in ("__metadata__", without)}
    write_safetensors(file, {**every, **tensors})


@pytest.mark.parametrize(
    ("scale", "changes", "fix"),
    [("block", {"weight_block_size": None}, "[128, 128]"), ("tensor", {"weight_block_size": [128, 128]}, "remove")],
)
def test_scales_of_the_other_kind(tmp_path: Path, scale: str, changes: dict[str, Any], fix: str) -> None:
    found = errors(composed(fp8(tmp_path / "m", scale, changes=changes)))
    assert fix in found["fp8-scale-name"].fix
    assert "fp8-missing-tensors" not in found


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"activation_scheme": None}, "fp8-activation-scheme"),
        ({"activation_scheme": "block"}, "fp8-activation-scheme"),
        ({"activation_scheme": "static"}, "fp8-activation-scheme"),
        ({"weight_block_size": 128}, "fp8-block-size"),
        ({"weight_block_size": [128, 0]}, "fp8-block-size"),
    ],
)
def test_settings_at_which_vllm_stops(tmp_path: Path, changes: dict[str, Any], code: str) -> None:
    assert code in errors(composed(fp8(tmp_path / "m", changes=changes)))


def test_static_activations_need_their_scales_on_gpus(tmp_path: Path) -> None:
    folder = fp8(tmp_path / "m", "tensor", changes={"activation_scheme": "static"})
    assert "fp8-input-scale" in errors(composed(folder, "h100"))
    assert not errors(composed(folder, "cpu"))
    scales = {f"{name}.input_scale": ("F32", (1,)) for name, _ in NAMES}
    folder = fp8(tmp_path / "n", "tensor", changes={"activation_scheme": "static"}, extra=scales)
    assert not errors(composed(folder, "h100"))


def test_scales_of_channels_are_for_cpus(tmp_path: Path) -> None:
    folder = fp8(tmp_path / "m", "channel")
    assert "fp8-channel-scales" in errors(composed(folder, "h100"))
    assert not errors(composed(folder, "cpu"))


def test_an_output_layer_in_fp8(tmp_path: Path) -> None:
    options: dict[str, Any] = {"override": {"lm_head.weight": ("F8_E4M3", (512, 512))}}
    folder = fp8(tmp_path / "m", "tensor", extra={"lm_head.weight_scale": ("F32", ())}, **options)
    assert "fp8-lm-head" in errors(composed(folder, "h100"))
    assert not errors(composed(folder, "cpu"))


def test_scales_of_the_cache_that_are_not_used(tmp_path: Path) -> None:
    scales = {f"model.layers.0.self_attn.{name}_scale": ("F32", (1,)) for name in "kv"}
    folder = fp8(tmp_path / "m", "tensor", extra=scales)
    assert "fp8-kv-scales" in findings(composed(folder, "h100"))
    assert "fp8-kv-scales" not in findings(composed(folder, "h100", kv_cache_dtype="fp8"))


def test_the_light_module_is_light() -> None:
    code = "import quantserve_fp8.plugin, sys; assert not {'torch', 'vllm', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
