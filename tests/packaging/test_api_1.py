"""Plugins written for every version of the plugin API keep working: 1.0, before there were schemes, and 1.1.

tests/data/old4 and tests/data/scheme4 are frozen: where a test here fails, the API has to change back, not the plugin.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoints import Spec, linear_shapes, make_llama, nbytes, read_header
from quantserve import api
from quantserve.cli.main import run
from quantserve.plugins.registry import Registry

DATA = Path(__file__).parents[1] / "data"
SOURCE, SOURCE_1 = DATA / "old4", DATA / "scheme4"
SHAPES = linear_shapes(2, 256, 512, 4, 2, 64)
UP = "model.layers.0.mlp.up_proj"
STATED = {"quantization_config": {"quant_method": "old4"}}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that pip has installed the plugins into."""
    base = tmp_path_factory.mktemp("api-1")
    folders = [shutil.copytree(source, base / source.name) for source in (SOURCE, SOURCE_1)]
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--target", str(base / "site"), *map(str, folders)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return base / "site"


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(site))
    yield
    for name in [name for name in sys.modules if name.startswith(("quantserve_old4", "quantserve_scheme4"))]:
        del sys.modules[name]


@pytest.fixture
def ask(installed: None, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command; its exit code and what it prints as JSON."""

    def ask(*arguments: object) -> tuple[int, Any]:
        code = run([*map(str, arguments), "--json"])
        printed = capsys.readouterr()
        return code, json.loads(printed.out) if printed.out else printed.err

    return ask


def write(path: Path, *, without: tuple[str, ...] = (), config: dict[str, Any] | None = None, **changed: Spec) -> Path:
    """A small Llama in the plugin's format."""
    tensors: dict[str, Spec] = {}
    for name, (n, k) in SHAPES.items():
        tensors |= {f"{name}.qweight": ("U8", (n, k // 2)), f"{name}.scale": ("F16", (n, k // 64))}
    tensors |= {f"{UP}.{suffix}": spec for suffix, spec in changed.items()}
    tensors = {name: spec for name, spec in tensors.items() if name not in without}
    dense = [f"{name}.weight" for name in SHAPES]
    return make_llama(path, drop=dense, extra=tensors, config={**STATED, **(config or {})})


@pytest.mark.parametrize(("source", "count"), [(SOURCE, 31), (SOURCE_1, 33)], ids=["1.0", "1.1"])
def test_every_name_of_version_1_is_there(source: Path, count: int) -> None:
    text = (source / "src" / f"quantserve_{source.name}" / "plugin.py").read_text()
    names = re.search(r"from quantserve\.api import \((.*?)\)", text, re.S)
    assert names
    found = {name.strip() for name in names[1].split(",") if name.strip()}
    assert len(found) == count
    assert found <= set(api.__all__)
    assert api.VERSION == 1


def test_list(ask: Any) -> None:
    code, report = ask("list")
    assert code == 0
    assert "old4" not in [failure["name"] for failure in report["failures"]]
    (row,) = [plugin for plugin in report["plugins"] if plugin["name"] == "old4"]
    assert (row["distribution"], row["version"], row["engine_side"]) == ("quantserve-old4", "1.0", True)
    assert (row["method"]["name"], row["method"]["bits"], row["notes"]) == ("old4", [4], [])


def test_check_and_plan(ask: Any, tmp_path: Path) -> None:
    model = write(tmp_path / "m")
    code, report = ask("check", model, "--target", "a100-80g")
    (checked,) = report["models"]
    assert (code, checked["method"], checked["plugins"]) == (0, "old4", ["old4"])
    assert {finding["code"] for finding in checked["findings"]} == {"old4-share", "weights-size"}
    code, report = ask("plan", model, "--target", "a100-80g")
    (plan,) = report["plans"] if isinstance(report, dict) and "plans" in report else report
    assert code == 0
    assert plan["engine_args"]["quantization"] == "old4"
    variables = plan["runtime_env"]["env_vars"]
    assert variables["QUANTSERVE_ENGINE_PLUGINS"] == "quantserve-old4:old4"


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"without": (f"{UP}.scale",)}, "old4-missing-tensors"),
        ({"scale": ("F16", (512, 5))}, "old4-wrong-shape"),
        ({"scale": ("F32", (512, 4))}, "old4-wrong-dtype"),
        ({"zeros": ("F16", (512, 4))}, "old4-unexpected-tensors"),
        ({"weight": ("F16", (512, 256)), "without": (f"{UP}.qweight", f"{UP}.scale")}, "old4-partly-quantized"),
        ({"config": {"quantization_config": {"quant_method": "old4", "skip": ["model.layers.0.mlp.down_proj"]}}},
         "old4-skip-list"),
        ({"config": {"quantization_config": {"quant_method": "ancient4", "skip": 7}}}, "old4-skip-list"),
        ({"notes": ("U8", (3,))}, ""),
    ],
)  # fmt: skip
def test_check_of_damaged_files(ask: Any, tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    code, report = ask("check", write(tmp_path / "m", **changes), "--target", "a100-80g")
    (checked,) = report["models"]
    errors = {finding["code"] for finding in checked["findings"] if finding["severity"] == "error"}
    assert (code, found in errors) == ((1, True) if found else (0, False)), checked["findings"]
    with_it = {"old4-again-partly-quantized", "old4-skip-list"} if "weight" in changes else set()
    assert errors == {found, *with_it} - {""}


def test_groups_over_ranks(ask: Any, tmp_path: Path) -> None:
    model = {"engine_config": {"model_id": "m", "hf_model_id": str(write(tmp_path / "m"))}}
    (tmp_path / "m.json").write_text(json.dumps({**model, "scaling_config": {"num_workers": 8}}))
    code, report = ask("check", tmp_path / "m.json", "--target", "8xa100-80g")
    assert code == 1
    assert "old4-group-splits-ranks" in {finding["code"] for finding in report["models"][0]["findings"]}


@pytest.mark.parametrize("command", ["profile", "recommend"])
def test_its_kernel_is_predicted(ask: Any, tmp_path: Path, command: str) -> None:
    code, report = ask(command, write(tmp_path / "m"), "--target", "a100-80g")
    assert code == 0
    (row,) = [method for method in report["methods"] if method["method"].startswith("old4")]
    assert row["failed"] is None
    assert "5.62" in json.dumps(row) or command == "profile"


def test_convert(ask: Any, tmp_path: Path) -> None:
    model = write(tmp_path / "m")
    assert run(["convert", str(model), str(tmp_path / "out"), "--method", "old4"]) == 0
    assert (tmp_path / "out" / "config.json").is_file()


def test_quantize(ask: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The quantizer is a function, as in 1.0."""
    model, out = make_llama(tmp_path / "m"), tmp_path / "out"
    command = ["quantize", str(model), "--method", "old4", "--out", str(out)]
    assert run(command) == 0
    assert (out / "config.json").is_file()
    assert run(command) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.vllm
def test_their_engine_sides_compute(site: Path) -> None:
    """vLLM builds their methods, and their use of quantserve_kernels is right: y = x W^T against float64."""
    code = """
import torch
from quantserve_old4 import register
from vllm.model_executor.layers.quantization import get_quantization_config
register(); register()
method = __import__("quantserve_old4.engine").engine.Old4LinearMethod()
assert get_quantization_config("old4").__name__ == "Old4Config"
layer = torch.nn.Module()
method.create_weights(layer, 128, [48, 16], 128, 64, torch.bfloat16)
torch.manual_seed(0)
layer.qweight.data.random_(0, 256)
layer.scale.data.uniform_(0.01, 0.02)
codes = torch.stack((layer.qweight & 15, layer.qweight >> 4), -1).flatten(1).double() - 8
weight = codes * layer.scale.double().repeat_interleave(64, 1)
method.process_weights_after_loading(layer)
x = torch.randn(3, 128, dtype=torch.bfloat16)
expected = x.double() @ weight.T
error = (method.apply(layer, x).double() - expected).abs().max() / expected.abs().max()
assert error < 0.01, error

# The plugin of 1.1.
import quantserve_scheme4
quantserve_scheme4.register(); quantserve_scheme4.register()
made = get_quantization_config("scheme4").from_config({})
words = torch.randint(0, 256, (48, 64), dtype=torch.uint8)
scale = torch.rand(48, 2).half()
codes = torch.stack((words & 15, words >> 4), -1).flatten(1).float() - 8
weight = codes * scale.float().repeat_interleave(64, 1)
assert torch.equal(made.pack({"qweight": words, "scale": scale}, None).dequantize().float(), weight)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(site), "VLLM_PLUGINS": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_registry_keeps_it_beside_ours(installed: None) -> None:
    registry = Registry.load({})
    assert registry.find_method("older4").distribution == "quantserve-old4"


# --- 1.1 ---------------------------------------------------------------------------------------------


def write_scheme4(path: Path, **changed: Spec | None) -> Path:
    """The same model in the other plugin's format; None leaves a tensor out."""
    tensors: dict[str, Spec] = {}
    for name, (n, k) in SHAPES.items():
        tensors |= {f"{name}.qweight": ("U8", (n, k // 2)), f"{name}.scale": ("F16", (n, k // 64))}
    changes = {f"{UP}.{suffix}": spec for suffix, spec in changed.items()}
    tensors = {name: spec for name, spec in {**tensors, **changes}.items() if spec}
    config = {"quantization_config": {"quant_method": "scheme4"}}
    return make_llama(path, drop=[f"{name}.weight" for name in SHAPES], extra=tensors, config=config)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, ""),
        ({"notes": ("U8", (3,))}, ""),
        ({"scale": None}, "scheme4-missing-tensors"),
        ({"scale": ("F16", (512, 5))}, "scheme4-wrong-shape"),
        ({"scale": ("F32", (512, 4))}, "scheme4-wrong-dtype"),
        ({"zeros": ("F16", (512, 4))}, "scheme4-unexpected-tensors"),
    ],
)
def test_a_scheme_of_1_1_is_checked(ask: Any, tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    code, report = ask("check", write_scheme4(tmp_path / "m", **changes), "--target", "a100-80g")
    (checked,) = report["models"]
    assert checked["plugins"] == ["scheme4"]
    errors = {finding["code"] for finding in checked["findings"] if finding["severity"] == "error"}
    assert (code, errors) == ((1, {found}) if found else (0, set())), checked["findings"]
    assert "scheme4-seen" in {finding["code"] for finding in checked["findings"]}


def test_a_plan_of_1_1(ask: Any, tmp_path: Path) -> None:
    code, report = ask("plan", write_scheme4(tmp_path / "m"), "--target", "a100-80g")
    (plan,) = report["plans"] if isinstance(report, dict) and "plans" in report else report
    assert code == 0
    assert plan["engine_args"]["quantization"] == "scheme4"
    variables = plan["runtime_env"]["env_vars"]
    assert (variables["SCHEME4"], variables["QUANTSERVE_ENGINE_PLUGINS"]) == ("1", "quantserve-scheme4:scheme4")
    code, report = ask("profile", tmp_path / "m", "--target", "a100-80g")
    (row,) = [method for method in report["methods"] if method["method"].startswith("scheme4")]
    assert (code, row["failed"]) == (0, None)


def test_a_container_of_1_1(ask: Any, tmp_path: Path) -> None:
    folder = write_scheme4(tmp_path / "m")
    tensors = {
        name: [dtype, shape, nbytes((dtype, shape))]
        for name, (dtype, shape) in read_header(folder / "model.safetensors").items()
    }
    config = json.loads((folder / "config.json").read_text())
    header = json.dumps({"tensors": tensors, "tokens": config["vocab_size"], "config": config}).encode()
    size = sum(tensor[2] for tensor in tensors.values())
    file = tmp_path / "whole.scheme4"
    file.write_bytes(b"SCH4" + len(header).to_bytes(4, "little") + header + bytes(size))
    code, report = ask("check", file, "--target", "a100-80g")
    (checked,) = report["models"]
    assert (code, checked["method"]) == (0, "scheme4"), checked["findings"]
    (seen,) = [finding for finding in checked["findings"] if finding["code"] == "scheme4-seen"]
    assert "of whole.scheme4" in seen["message"]
    file.write_bytes(b"SCH5" + file.read_bytes()[4:])
    code, report = ask("check", file, "--target", "a100-80g")
    assert code == 1
    assert "it does not begin with SCH4" in json.dumps(report)
