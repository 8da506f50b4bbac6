"""What the compressed-tensors plugin finds in good and bad checkpoints, and what it tells vLLM."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import quantserve_kernels
from helpers.checkpoints import variant, write_safetensors
from helpers.composed import composed, findings, text, wrong
from quantserve.api import DISABLED_KERNELS
from quantserve.checkpoint import open_checkpoint
from quantserve_compressed_tensors.config import ENGINE
from quantserve_kernels import Status

DATA = Path(__file__).parent / "data"
NAMES = ("mixed", "odd", "w8a8", "fp8", "fp8-block", "nvfp4", "mxfp4", "mixture")
Q = "model.layers.1.self_attn.q_proj"
Change = dict[str, Any]


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the kernels are compiled."""
    monkeypatch.setattr(quantserve_kernels, "status", lambda: Status(native=True, reason="", instruction_set="avx2"))


def changed(folder: Path, source: str, *, group: Change | None = None, **changes: Any) -> Path:
    """The headers of a checkpoint with changes of a group, and those of `variant`."""
    variant(folder, DATA / source, **changes)
    if group is not None:
        made = json.loads((folder / "config.json").read_text())
        merge(made["quantization_config"]["config_groups"]["group_0"], group)
        (folder / "config.json").write_text(json.dumps(made))
    return folder


def merge(into: Change, changes: Change) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)


# --- good checkpoints: the files of llm-compressor ---------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", ["cpu", "b200"])
def test_files_of_llm_compressor(name: str, target: str) -> None:
    composition = composed(DATA / name, target)
    assert composition.method is not None
    assert composition.method.name == "compressed-tensors"
    # k_proj has 64 outputs, and vLLM's fused layer takes whole blocks of 128.
    assert list(wrong(DATA / name, target)) == ["compressed-tensors-blocks"] * (name == "fp8-block" and target != "cpu")
    own = target == "cpu" and name not in ("mixed", "w8a8")
    assert ("compressed-tensors-engine" in findings(composition)) == own
    assert composition.engine_kwargs["quantization"].value == (ENGINE if own else "compressed-tensors")
    assert composition.stored is not None
    assert len(composition.stored.quantized) == 14
    assert not composition.stored.plain


def test_a_linear_has_the_scheme_of_its_group() -> None:
    stored = composed(DATA / "mixed").stored
    assert stored is not None
    found = {
        linear.name.rpartition(".")[2]: (scheme.bits, scheme.group_size, "weight_zero_point" in scheme.parts)
        for linear, scheme in stored.quantized
    }
    assert found["q_proj"] == found["o_proj"] == (4, 32, True)
    assert found["up_proj"] == (8, -1, False)
    assert found["down_proj"] == (4, 32, False)


@pytest.mark.parametrize("name", NAMES)
def test_ranks(name: str) -> None:
    blocks = name == "fp8-block"  # q_proj has 64 output channels on each of two ranks
    codes = ["compressed-tensors-group-splits-ranks", "compressed-tensors-blocks"]
    assert list(wrong(DATA / name, ranks=2)) == codes * blocks


def test_a_group_that_ranks_would_split(tmp_path: Path) -> None:
    wide = changed(tmp_path / "m", "mixed")
    config = json.loads((wide / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_2"]["weights"]["group_size"] = 256
    (wide / "config.json").write_text(json.dumps(config))
    held = {name: (one.dtype, one.shape) for name, one in open_checkpoint(str(wide)).tensors.items()}
    held |= {f"model.layers.{index}.mlp.down_proj.weight_scale": ("BF16", (128, 1)) for index in (0, 1)}
    write_safetensors(wide / "model.safetensors", held)
    assert not wrong(wide)
    assert "down_proj" in text(wrong(wide, ranks=2)["compressed-tensors-group-splits-ranks"])


def test_layers_that_no_target_matches_are_unquantized(tmp_path: Path) -> None:
    """vLLM builds them so, and the list ignore need not name them."""
    only = {"targets": ["re:.*mlp.*"]}
    names = [f"model.layers.{index}.self_attn.{part}_proj" for index in (0, 1) for part in "qkvo"]
    shapes = {name: (64 if name[-6] in "kv" else 128, 128) for name in names}
    plain: Change = {f"{name}.weight": ("BF16", shape) for name, shape in shapes.items()}
    plain |= {f"{name}.weight_scale": None for name in names}
    assert not wrong(changed(tmp_path / "good", "fp8", group=only, tensors=plain))
    found = wrong(changed(tmp_path / "bad", "fp8", group=only))
    assert found.keys() == {"compressed-tensors-unexpected-tensors"}
    assert "8 linears are quantized in the files, and the quantization config leaves them out" in text(*found.values())
    assert "self_attn" in text(*found.values())


def test_unquantized_layers_must_be_ignored(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj"
    plain = {f"{name}.weight": ("BF16", (128, 256)), f"{name}.weight_scale": None}
    found = wrong(changed(tmp_path / "bad", "fp8", tensors=plain))
    assert "named by ignore" in found["compressed-tensors-skip-list"].message
    ignore = {"ignore": ["lm_head", "re:.*layers.0.mlp.down_proj"]}
    assert not wrong(changed(tmp_path / "good", "fp8", tensors=plain, **ignore))


# --- bad ones ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "changes", "code", "words"),
    [
        ("mixed", {"tensors": {f"{Q}.weight_zero_point": None}}, "missing-tensors", "weight_zero_point"),
        ("mixed", {"group": {"weights": {"symmetric": True}}}, "unexpected-tensors", "weight_zero_point"),
        ("mixed", {"group": {"weights": {"group_size": 64}}}, "wrong-shape", "weight_scale"),
        ("mixed", {"group": {"weights": {"num_bits": 8}}}, "wrong-shape", "weight_packed"),
        ("mixed", {"tensors": {f"{Q}.weight_g_idx": ("I32", (128,))}}, "unexpected-tensors", "weight_g_idx"),
        ("mixed", {"group": {"weights": {"actorder": "group"}}}, "missing-tensors", "weight_g_idx"),
        ("odd", {"tensors": {f"{Q}.weight_packed": ("I32", (128, 14))}}, "wrong-shape", "[128, 12] or [128, 13]"),
        (
            "mixture",
            {"group": {"targets": [r"re:.*self_attn\.[kvo]_proj$"]}},
            "mixed-layer",
            "k_proj group_0; v_proj",
        ),
        ("mixed", {"group": {"weights": {"group_size": None}}}, "bad-keys", "group_size"),
        ("mixed", {"group": {"targets": ["Linear"]}}, "targets", "the last one (group_2)"),
        ("mixed", {"group": {"format": "dense"}}, "scheme", "format dense"),
        ("mixed", {"group": {"targets": "Linear"}}, "bad-keys", "targets"),
        ("w8a8", {"group": {"input_activations": None}}, "scheme", "int-quantized"),
        ("w8a8", {"group": {"weights": {"symmetric": False}}}, "scheme", "int-quantized"),
        ("w8a8", {"tensors": {f"{Q}.weight": ("F32", (128, 128))}}, "wrong-dtype", "F32, expected I8"),
        ("fp8", {"tensors": {f"{Q}.weight_scale": ("F32", (2, 1))}}, "wrong-shape", "weight_scale"),
        ("fp8", {"config_groups": {}}, "bad-keys", "config_groups"),
        (
            "fp8",
            {"sparsity_config": {"format": "sparse-24-bitmask", "targets": ["Linear"]}},
            "sparse",
            "2:4",
        ),
        ("nvfp4", {"tensors": {f"{Q}.weight_global_scale": None}}, "missing-tensors", "weight_global_scale"),
        (
            "fp8",
            {"kv_cache_scheme": {"type": "int", "num_bits": 8, "strategy": "tensor"}},
            "kv-cache",
            "FP8",
        ),
        (
            "w8a8",
            {"tensors": {"lm_head.weight": ("I8", (512, 128)), "lm_head.weight_scale": ("BF16", (512, 1))}},
            "lm-head",
            "no target names it",
        ),
    ],
)
def test_bad_checkpoints(tmp_path: Path, source: str, changes: Change, code: str, words: str) -> None:
    found = wrong(changed(tmp_path / "m", source, **changes))
    assert f"compressed-tensors-{code}" in found
    assert words in text(found[f"compressed-tensors-{code}"])
    assert found[f"compressed-tensors-{code}"].fix


def test_files_without_quantized_tensors(tmp_path: Path) -> None:
    plain: Change = {}
    for name, one in open_checkpoint(str(DATA / "fp8")).tensors.items():
        plain[name] = None if name.endswith("_scale") else ("BF16", one.shape)
    assert list(wrong(changed(tmp_path / "m", "fp8", tensors=plain))) == ["compressed-tensors-not-quantized"]


def test_patterns_that_may_take_long_are_not_judged(tmp_path: Path) -> None:
    slow = changed(tmp_path / "m", "fp8", group={"targets": ["re:(a+)+$", "Linear"]})
    assert "compressed-tensors-targets" in findings(composed(slow))


def test_a_quantized_output_layer_that_is_tied(tmp_path: Path) -> None:
    head = {"lm_head.weight": ("I8", (512, 128)), "lm_head.weight_scale": ("BF16", (512, 1))}
    folder = changed(tmp_path / "m", "w8a8", config={"tie_word_embeddings": True}, tensors=head)
    assert not wrong(folder)
    assert "embedding" in findings(composed(folder))["compressed-tensors-tied-lm-head"].message


def test_norms_of_gemma(tmp_path: Path) -> None:
    gemma = {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}
    old = changed(tmp_path / "old", "mixed", config=gemma, version="0.12.2")
    assert "2102" in text(findings(composed(old))["compressed-tensors-offset-norms"])
    new = changed(tmp_path / "new", "mixed", config=gemma)
    assert "compressed-tensors-offset-norms" not in findings(composed(new))


def test_scales_of_a_cache_that_are_not_used(tmp_path: Path) -> None:
    held = {"model.layers.0.self_attn.k_scale": ("F32", (1,))}
    assert (
        "not used"
        in findings(composed(changed(tmp_path / "m", "fp8", tensors=held)))["compressed-tensors-kv-cache"].message
    )


# --- devices -----------------------------------------------------------------------------------------------------


def test_mxfp4_weights_keep_16_bit_activations_on_blackwell(tmp_path: Path) -> None:
    assert composed(DATA / "mxfp4", "b200").environment == {DISABLED_KERNELS: "FlashInferMxFp4LinearKernel"}
    assert not composed(DATA / "mxfp4", "h100").environment
    four = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "dynamic": True}
    rounded = changed(tmp_path / "m", "mxfp4", group={"input_activations": four})
    assert not composed(rounded, "b200").environment


@pytest.mark.parametrize(("name", "own"), [("mixed", True), ("w8a8", False)])
def test_the_kernel_on_cpus(name: str, own: bool) -> None:
    composition = composed(DATA / name, "cpu")
    assert composition.engine_kwargs["quantization"].value == "compressed-tensors"
    assert (DISABLED_KERNELS in composition.environment) == own


def test_without_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 bits need quantserve's kernels, which are then plain torch."""
    missing = Status(native=False, reason="no compiler", instruction_set="")
    monkeypatch.setattr(quantserve_kernels, "status", lambda: missing)
    found = composed(DATA / "mixed", "cpu")
    assert found.engine_kwargs["quantization"].value == ENGINE
    assert "no compiler" in findings(found)["compressed-tensors-plain-torch"].message
    assert composed(DATA / "w8a8", "cpu").engine_kwargs["quantization"].value == "compressed-tensors"


def test_act_order_and_older_words_are_for_the_engine_side_on_every_device(tmp_path: Path) -> None:
    folder = changed(tmp_path / "m", "odd")
    assert composed(folder, "h100").engine_kwargs["quantization"].value == "compressed-tensors"
    held = {name: (one.dtype, one.shape) for name, one in open_checkpoint(str(folder)).tensors.items()}
    for name, (dtype, shape) in held.items():
        bits, per = {12: (3, 10), 24: (6, 5)}.get(shape[-1], (0, 0)) if name.endswith("weight_packed") else (0, 0)
        if bits:
            held[name] = (dtype, (shape[0], -(-shape[1] * 32 // bits // per)))
        elif name.endswith("weight_zero_point") and "self_attn" in name:
            held[name] = (dtype, (-(-shape[0] * 32 // 3 // 10), shape[1]))
    write_safetensors(folder / "model.safetensors", held)
    assert not wrong(folder, "h100")
    assert "leave some unused" in findings(composed(folder, "h100"))["compressed-tensors-engine"].message

    ordered = changed(tmp_path / "n", "mixed", group={"weights": {"actorder": "group"}})
    held = {name: (one.dtype, one.shape) for name, one in open_checkpoint(str(ordered)).tensors.items()}
    modules = {name.rpartition(".")[0] for name in held if "self_attn" in name}
    write_safetensors(ordered / "model.safetensors", held | {f"{one}.weight_g_idx": ("I32", (128,)) for one in modules})
    for target in ("h100", "cpu"):
        assert not wrong(ordered, target)
        assert composed(ordered, target).engine_kwargs["quantization"].value == ENGINE
    assert "o_proj" in text(wrong(ordered, "cpu", ranks=2)["compressed-tensors-act-order"])


def test_detection_by_tensors(tmp_path: Path) -> None:
    folder = changed(tmp_path / "m", "mixed")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    composition = composed(folder)
    assert composition.method is not None
    assert composition.method.name == "compressed-tensors"
    assert "quant-config-missing" in wrong(folder)


def test_the_light_module_imports_nothing_heavy() -> None:
    heavy = "[name for name in ('torch', 'vllm', 'ray', 'pydantic') if name in sys.modules]"
    code = f"import quantserve_compressed_tensors.plugin, sys; print({heavy})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_register_may_be_called_twice() -> None:
    from quantserve_compressed_tensors import register

    register()
    register()
