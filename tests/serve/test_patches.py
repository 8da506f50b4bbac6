"""Patches fit what is installed, are skipped where it changed, and vLLM calls what they change."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.checkpoints import make_llama
from quantserve.errors import EngineError, UsageError
from quantserve.serve.replica.vllm import patches
from quantserve.serve.replica.vllm.patches import PATCHES, VARIABLE, Patch

from .server import BIN, serve

ROOT = Path(__file__).parents[2]
OPTIONAL = sorted(name for name, patch in PATCHES.items() if not patch.safety)
SAFETY = sorted(name for name, patch in PATCHES.items() if patch.safety)


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_fits_the_installed_packages(name: str) -> None:
    assert patches.misfit(PATCHES[name]) == ""


def test_patches_are_judged_without_importing_what_they_change() -> None:
    code = (
        "import sys; from quantserve.serve.replica.vllm import patches; "
        "[patches.misfit(one) for one in patches.PATCHES.values()]; "
        "print({'vllm', 'torch', 'ray', 'starlette'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_every_patch_is_applied_at_one_place() -> None:
    source = "".join(path.read_text() for path in (ROOT / "core/quantserve/serve").rglob("*.py"))
    assert sorted(re.findall(r'patches\.apply\("([\w-]+)"', source)) == sorted(PATCHES)


CHANGED = {
    "token-ids": ("v1/engine/input_processor.py", "_validate_model_input(", "_check("),
    "short-prompts": ("renderers/base.py", "_tokenize_prompt_async", "_tokenize"),
    "adapter-rows": ("lora/ops/torch_ops/lora_ops.py", "bgmv_shrink(inputs, lora_a_weights,", "shrink(lora_a_weights,"),
    "sched-yield": ("distributed/device_communicators/shm_broadcast.py", "sched_yield()", "os.sched_yield()"),
    "token-ranks": ("v1/sample/sampler.py", "token_ranks = batched_count_greater_than(", "token_ranks = ranks("),
    "exact-scales": ("model_executor/layers/quantization/auto_awq.py", "self.kernel = kernel", "made = kernel"),
    "spare-process": ("v1/engine/utils.py", "context = get_mp_context()", 'context = get_context("spawn")'),
}


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("gone", [False, True])
def test_a_vllm_that_changed_is_recognized(name: str, gone: bool, tmp_path: Path) -> None:
    path, old, new = CHANGED[name]
    spec = find_spec("vllm")
    assert spec is not None
    installed = Path(next(iter(spec.submodule_search_locations or ())))
    file = tmp_path / "vllm" / path
    file.parent.mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").touch()
    if not gone:
        text = (installed / path).read_text()
        assert old in text
        file.write_text(text.replace(old, new))
    code = f"from quantserve.serve.replica.vllm import patches; print(patches.misfit(patches.PATCHES[{name!r}]))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    module = path.removesuffix(".py").replace("/", ".")
    assert re.fullmatch(rf"vllm [\w.+]+ has no .+ (in|of) vllm\.{module}:?[\w.]*\n", done.stdout)


def changed(patch: Patch) -> Patch:
    """The patch as it would be if the package no longer had what it relies on."""
    return dataclasses.replace(patch, relies_on=(*patch.relies_on, (patch.relies_on[0][0], "no such text")))


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_patch_that_does_not_fit_is_skipped_with_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(PATCHES, name, changed(PATCHES[name]))
    monkeypatch.setattr(patches.pkgutil, "resolve_name", pytest.fail)
    assert patches.apply(name) is False
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith(f"skipped: patch {name} cannot be applied: ")
    assert re.search(r"(vllm|torch|starlette|fastapi|Python) \d[\w.+]+ has no `no such text` in ", record.message)
    assert record.message.endswith(PATCHES[name].without)
    assert "\n" not in record.message


@pytest.mark.parametrize("name", SAFETY)
def test_a_safety_patch_that_does_not_fit_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PATCHES, name, changed(PATCHES[name]))
    with pytest.raises(EngineError, match=rf"safety patch {name} .* has no `no such text` in .*\n  fix: .*{VARIABLE}"):
        patches.apply(name)


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_that_fails_counts_as_one_that_does_not_fit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        PATCHES, name, dataclasses.replace(PATCHES[name], apply="quantserve.serve.replica.vllm.patches:gone")
    )
    if name in SAFETY:
        with pytest.raises(EngineError, match="AttributeError"):
            patches.apply(name)
    else:
        assert patches.apply(name) is False


def test_patches_are_switched_off_by_name(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert patches.switched_off({}) == patches.switched_off({VARIABLE: " , "}) == frozenset()
    assert patches.switched_off({VARIABLE: "none"}) == set(OPTIONAL)
    assert patches.switched_off({VARIABLE: "gloo-device, sched-yield"}) == {"gloo-device", "sched-yield"}
    assert patches.switched_off({VARIABLE: ",".join(["none", *SAFETY])}) == set(PATCHES)
    monkeypatch.setenv(VARIABLE, "token-ids")
    assert patches.apply("token-ids", object()) is False
    assert "QUANTSERVE_PATCHES switches patch token-ids off: such a prompt ends the engine" in caplog.text


def test_an_unknown_name_is_an_error_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "gloo-devices")
    with pytest.raises(
        UsageError,
        match=r"QUANTSERVE_PATCHES: unknown patch 'gloo-devices'; did you mean 'gloo-device'\? \(known:.*none",
    ):
        patches.apply("sched-yield")


def test_a_safety_patch_that_is_switched_off_is_a_risk() -> None:
    assert patches.risks({}) == patches.risks({VARIABLE: "none"}) == []
    (risk,) = patches.risks({VARIABLE: "none,token-ids"})
    assert risk.startswith("QUANTSERVE_PATCHES switches the safety patch token-ids off: such a prompt ends the engine")


@pytest.mark.parametrize("given", [True, False])
def test_serve_refuses_an_unknown_name_before_it_starts_ray(given: bool, tmp_path: Path) -> None:
    variables = {VARIABLE: "glue"}
    entry = {"engine_config": {"model_id": "m", "hf_model_id": str(make_llama(tmp_path / "m"))}}
    if given:
        entry["engine_config"]["runtime_env"] = {"env_vars": variables}
    (tmp_path / "app.yaml").write_text(yaml.safe_dump({"models": [entry]}))
    command = [BIN / "quantserve", "serve", tmp_path / "app.yaml", "--port", "0"]
    environment = os.environ | ({} if given else variables)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "QUANTSERVE_PATCHES: unknown patch 'glue'" in done.stderr
    assert "Starting Ray" not in done.stdout


@pytest.mark.ray
@pytest.mark.vllm
def test_models_are_served_without_the_patches(demo: Path) -> None:
    """AWQ, whose kernel has a patch of its own."""
    folder = tempfile.mkdtemp(prefix="qs-", dir="/tmp")  # Ray's sockets need a short path
    server = serve(demo / "awq", "--max-model-len", "256", RAY_TMPDIR=folder, **{VARIABLE: "none"})
    try:
        server.ready()
        chat = {"model": "awq", "messages": [{"role": "user", "content": "What is a deque?"}], "max_tokens": 8}
        assert server.request("POST", "/v1/chat/completions", chat).status_code == 200
        streamed = server.request("POST", "/v1/chat/completions", {**chat, "stream": True})
        assert streamed.text.rstrip().endswith("data: [DONE]")
        assert server.request("POST", "/v1/chat/completions", {**chat, "n": "many"}).status_code == 400
        logs = "".join(
            path.read_text(errors="replace") for path in Path(folder).glob("ray/session_*/logs/worker-*.err")
        )
        off = set(re.findall(rf"{VARIABLE} switches patch ([\w-]+) off", logs))
        assert off == set(OPTIONAL)
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def config() -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs

    model = ROOT / "examples" / "demo-model" / "checkpoint"
    return AsyncEngineArgs(model=str(model), enforce_eager=True).create_engine_config()


@pytest.mark.vllm
def test_vllm_checks_every_prompt_with_the_patched_method(config: Any) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers import renderer_from_config
    from vllm.v1.engine.input_processor import InputProcessor

    renderer = renderer_from_config(config)
    try:
        processor = InputProcessor(config, renderer)
        rows = config.model_config.get_vocab_size()
        renderer.validate_token_ids = lambda ids: None  # vLLM's own check knows the tokenizer, not the embedding
        prompt = {"type": "token", "prompt_token_ids": [1, rows]}
        processor.process_inputs("unpatched", prompt, SamplingParams(), ("generate",))
        assert patches.apply("token-ids", processor)
        with pytest.raises(VLLMValidationError, match="position 1 has no embedding"):
            processor.process_inputs("patched", prompt, SamplingParams(), ("generate",))
    finally:
        renderer.shutdown()


@pytest.mark.vllm
def test_vllms_app_answers_invalid_requests_with_the_patched_handlers(config: Any) -> None:
    import asyncio
    import json

    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from quantserve.serve.asgi import ask

    def answer(patched: bool) -> Any:
        app = build_app(make_arg_parser(FlexibleArgumentParser()).parse_args([]), ("generate",), config.model_config)
        if patched:
            assert patches.apply("error-handlers", app)
        status, body = asyncio.run(ask(app, "POST", "/v1/completions", {"prompt": "a", "n": "many"}))
        assert status == 400
        return json.loads(body)["error"]

    assert answer(False)["code"] == 400
    assert answer(True)["code"] == "invalid_type"
