"""What the HQQ plugin says of good and bad checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoints import Spec, read_header, variant
from helpers.composed import composed, errors, text

DATA = Path(__file__).parent / "data"
Q = "model.layers.1.self_attn.q_proj"


def _params(**changes: Any) -> dict[str, Any]:
    """The `quant_config` of uniform4 with other `weight_quant_params`."""
    config: dict[str, Any] = json.loads((DATA / "uniform4/config.json").read_text())["quantization_config"][
        "quant_config"
    ]
    config["weight_quant_params"] |= changes
    return config


@pytest.mark.parametrize(
    ("name", "target", "ranks"), [("uniform4", "cpu", 1), ("mixed", "cpu", 1), ("mixed", "a100-80g", 2)]
)
def test_files_of_hqq_have_no_errors(tmp_path: Path, name: str, target: str, ranks: int) -> None:
    composition = composed(variant(tmp_path / "m", DATA / name), target, ranks)
    assert composition.method is not None
    assert composition.method.name == "hqq"
    assert not errors(composition)
    assert composition.engine_kwargs["quantization"].value == "hqq"


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"axis": 0}, "quantization_config.quant_config: axis is 0; served is 1"),
        ({"nbits": 1}, "nbits is 1; served are 2, 3, 4 and 8"),
        ({"nbits": True}, "nbits is True"),
        ({"group_size": 12}, "group_size is 12; a multiple of 8"),
        ({"channel_wise": False}, "channel_wise is false"),
    ],
)
def test_settings_that_are_not_served(tmp_path: Path, params: dict[str, Any], words: str) -> None:
    found = errors(composed(variant(tmp_path / "m", DATA / "uniform4", quant_config=_params(**params)), "cpu"))
    assert list(found) == ["hqq-settings"]
    assert words in text(found["hqq-settings"])


def test_quantized_scales(tmp_path: Path) -> None:
    quant_config = {
        "weight_quant_params": {"nbits": 4, "group_size": 32, "axis": 1},
        "scale_quant_params": {"nbits": 8},
    }
    found = errors(composed(variant(tmp_path / "m", DATA / "uniform4", quant_config=quant_config), "cpu"))
    assert list(found) == ["hqq-settings"]


def test_another_width_or_group_than_the_files(tmp_path: Path) -> None:
    for at, params in enumerate(({"nbits": 2}, {"nbits": 8}, {"group_size": 64})):
        found = errors(composed(variant(tmp_path / f"{at}", DATA / "uniform4", quant_config=_params(**params)), "cpu"))
        assert "hqq-wrong-shape" in found or "hqq-packing" in found
    found = errors(composed(variant(tmp_path / "3", DATA / "uniform4", quant_config=_params(nbits=3)), "cpu"))
    assert "hqq-wrong-shape" in found
    found = errors(
        composed(variant(tmp_path / "float", DATA / "uniform4", quant_config=_params(view_as_float=True)), "cpu")
    )
    assert "hqq-wrong-shape" in found


def test_a_missing_tensor(tmp_path: Path) -> None:
    found = errors(composed(variant(tmp_path / "m", DATA / "uniform4", {f"{Q}.zero": None}), "cpu"))
    assert list(found) == ["hqq-missing-tensors"]
    assert f"{Q}.zero" in text(found["hqq-missing-tensors"])


def test_parts_of_a_fused_layer_of_two_widths(tmp_path: Path) -> None:
    config = json.loads((DATA / "mixed/config.json").read_text())["quantization_config"]["quant_config"]
    config["self_attn.v_proj"] = config["self_attn.o_proj"]
    found = errors(composed(variant(tmp_path / "m", DATA / "mixed", quant_config=config), "cpu"))
    assert "hqq-mixed-layer" in found
    assert "qkv_proj" in text(found["hqq-mixed-layer"])


def test_plain_weights_that_ask_for_quantization(tmp_path: Path) -> None:
    specs = read_header(DATA / "uniform4/model.safetensors")
    modules = {name.removesuffix(".W_q") for name in specs if name.endswith(".W_q")}
    gone: dict[str, Spec | None] = {name: None for name in specs if name.rpartition(".")[0] in modules}
    shapes = {"q": (128, 64), "k": (64, 64), "v": (64, 64), "o": (64, 128)}
    mlp = {"gate": (96, 64), "up": (96, 64), "down": (64, 96)}
    for layer in range(2):
        gone |= {f"model.layers.{layer}.self_attn.{one}_proj.weight": ("F16", size) for one, size in shapes.items()}
        gone |= {f"model.layers.{layer}.mlp.{one}_proj.weight": ("F16", size) for one, size in mlp.items()}
    assert list(errors(composed(variant(tmp_path / "m", DATA / "uniform4", gone), "cpu"))) == ["hqq-not-quantized"]


def test_the_first_kind_of_file_is_named(tmp_path: Path) -> None:
    config = json.loads((DATA / "uniform4/config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "qmodel.pt").write_bytes(b"PK")
    found = errors(composed(tmp_path, "cpu"))
    assert "save_to_safetensors" in found["hqq-original-file"].fix


def test_ranks_cut_words_and_not_groups(tmp_path: Path) -> None:
    """Codes of rows that are 64 apart share a byte, and two ranks have them; K 96 is three groups of 32."""
    found = errors(composed(variant(tmp_path / "m", DATA / "uniform4"), "a100-80g", 2))
    assert list(found) == ["hqq-group-splits-ranks"]
    assert found["hqq-group-splits-ranks"].offenders == tuple(
        f"model.layers.{layer}.mlp.down_proj: K 96/2 = 48 is not a multiple of 32" for layer in range(2)
    )


def test_the_light_module_is_light() -> None:
    code = "import quantserve_hqq.plugin, sys; assert not {'torch', 'vllm', 'ray'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
