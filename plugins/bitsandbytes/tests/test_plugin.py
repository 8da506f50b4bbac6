"""What the bitsandbytes plugin says of good and bad checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoints import REMOVE, Spec, make_llama, variant
from helpers.composed import composed, errors, findings, text
from quantserve_bitsandbytes import plugin

DATA = Path(__file__).parent / "data"
Q = "model.layers.1.self_attn.q_proj"
ONLINE = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize(("target", "ranks"), [("cpu", 1), ("a100-80g", 2)])
def test_files_of_transformers_have_no_errors(tmp_path: Path, name: str, target: str, ranks: int) -> None:
    composition = composed(variant(tmp_path / "m", DATA / name), target, ranks)
    assert composition.method is not None
    assert composition.method.name == "bitsandbytes"
    assert not errors(composition)
    assert composition.engine_kwargs["quantization"].value == "bitsandbytes"
    assert ("bitsandbytes-weight-only" in findings(composition)) is (name == "int8")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bnb_4bit_quant_type": "af4"}, "bnb_4bit_quant_type is 'af4'; known are nf4 and fp4"),
        ({"bnb_4bit_quant_storage": "int64"}, "bnb_4bit_quant_storage is 'int64'"),
        ({"load_in_8bit": True}, "load_in_4bit is True and load_in_8bit True"),
        ({"load_in_4bit": False, "_load_in_4bit": False}, "load_in_4bit is False and load_in_8bit False"),
        ({"bnb_4bit_quant_type": "fp4"}, "it says fp4, and the files hold nf4"),
        ({"load_in_4bit": False, "_load_in_4bit": False, "load_in_8bit": True}, "says int8, and the files hold nf4"),
    ],
)
def test_settings_that_are_not_served(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    found = errors(composed(variant(tmp_path / "m", DATA / "nf4", **changes), "cpu"))
    assert list(found) == ["bitsandbytes-settings"]
    assert words in text(found["bitsandbytes-settings"])


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"bnb_4bit_use_double_quant": False}, "bitsandbytes-wrong-dtype"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bitsandbytes-wrong-shape"),
    ],
)
def test_settings_of_other_files(tmp_path: Path, changes: dict[str, Any], code: str) -> None:
    assert code in errors(composed(variant(tmp_path / "m", DATA / "nf4", **changes), "cpu"))


def test_a_missing_tensor(tmp_path: Path) -> None:
    found = errors(composed(variant(tmp_path / "m", DATA / "nf4", {f"{Q}.weight.nested_absmax": None}), "cpu"))
    assert list(found) == ["bitsandbytes-missing-tensors"]
    found = errors(composed(variant(tmp_path / "8", DATA / "int8", {f"{Q}.SCB": None}), "cpu"))
    assert "bitsandbytes-missing-tensors" in found


def test_ranks_cut_no_block(tmp_path: Path) -> None:
    found = errors(composed(variant(tmp_path / "m", DATA / "nf4"), "a100-80g", 4))
    assert "bitsandbytes-group-splits-ranks" in found  # o_proj: K 128 over 4 ranks is half a block
    assert "not a multiple of 64" in text(found["bitsandbytes-group-splits-ranks"])


def test_plain_weights_that_ask_for_quantization(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_llama(tmp_path / "m", config={"quantization_config": ONLINE})
    found = errors(composed(folder, "a100-80g"))
    assert list(found) == ["bitsandbytes-online"]
    assert "vllm-bnb-plugin" in found["bitsandbytes-online"].fix
    monkeypatch.setattr(plugin, "_theirs", lambda target: target.device != "cpu")
    composition = composed(folder, "a100-80g")
    assert not errors(composition)
    assert composition.engine_kwargs["load_format"].value == "bitsandbytes"
    assert list(errors(composed(folder, "cpu"))) == ["bitsandbytes-online"]


def test_their_plugin_does_not_split_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "_theirs", lambda target: target.device != "cpu")
    folder = variant(tmp_path / "m", DATA / "nf4")
    assert list(errors(composed(folder, "a100-80g", 2))) == ["bitsandbytes-plugin-ranks"]
    assert not errors(composed(folder, "cpu", 2))


def test_blocks_that_go_on_in_the_next_row(tmp_path: Path) -> None:
    """K 96: a row and a half are 144 weights in two blocks and a quarter."""
    n, k = 64, 96
    down = f"{Q.removesuffix('self_attn.q_proj')}mlp.down_proj"
    made: dict[str, Spec | None] = {
        f"{down}.weight": ("U8", (n * k // 2, 1)),
        f"{down}.weight.absmax": ("U8", (n * k // 64,)),
        f"{down}.weight.quant_map": ("F32", (16,)),
        f"{down}.weight.nested_absmax": ("F32", (1,)),
        f"{down}.weight.nested_quant_map": ("F32", (256,)),
        f"{down}.weight.quant_state.bitsandbytes__nf4": ("U8", (160,)),
    }
    folder = variant(tmp_path / "m", DATA / "nf4", made)
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": k}
    (folder / "config.json").write_text(json.dumps(config))
    assert "bitsandbytes-block" in errors(composed(folder, "cpu"))


def test_tensors_without_a_declared_method(tmp_path: Path) -> None:
    composition = composed(variant(tmp_path / "m", DATA / "nf4", quant_method=REMOVE), "cpu")
    assert composition.method is not None
    assert composition.method.name == "bitsandbytes"


def test_the_light_module_is_light() -> None:
    code = "import quantserve_bitsandbytes.plugin, sys; assert not {'torch', 'vllm', 'ray'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
