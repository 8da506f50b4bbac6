"""The environment is judged as the engine will have it: the shell's under the config's, and the shell's only here."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.checkpoints import make_llama
from quantserve.checkpoint import open_checkpoint
from quantserve.checks import environment as module
from quantserve.checks.environment import check_environment
from quantserve.config import ModelConfig
from quantserve.errors import FindingsError
from quantserve.finding import Finding, Severity
from quantserve.planning.compose import Composition, compose
from quantserve.planning.plan import make_plan, make_plans
from quantserve.plugins.registry import Registry
from quantserve.system.environment import engine_environment
from quantserve.target import Target, find_target

CPU = replace(find_target("cpu"), memory_bytes=1 << 36, cores=16)
L4 = find_target("l4")


def model(path: Path | str = "m", **env_vars: str) -> ModelConfig:
    engine = {"model_id": "m", "hf_model_id": str(path), "max_total_tokens": 512, "runtime_env": {"env_vars": env_vars}}
    return ModelConfig.model_validate({"engine_config": engine})


Findings = Callable[..., dict[str, Finding]]


@pytest.fixture
def findings(tmp_path: Path) -> Findings:
    """Findings about an environment, by the variable they name."""
    checkpoint = open_checkpoint(str(make_llama(tmp_path / "m")))

    def found(shell: dict[str, str], target: Target = CPU, location: str = "local", **given: str) -> dict[str, Finding]:
        said = check_environment(replace(checkpoint, location=location), model(**given), target, shell)
        return {name: finding for finding in said for name in finding.offenders}

    return found


@pytest.fixture
def composed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Composition]:
    """A composition made under variables of the shell."""
    make_llama(tmp_path / "m", "fp16", hidden=512, intermediate=1024)

    def make(shell: dict[str, str], target: Target = CPU, tokens: int = 512, **given: str) -> Composition:
        for name, value in shell.items():
            monkeypatch.setenv(name, value)
        config = model(tmp_path / "m", **given)
        engine = config.engine_config.model_copy(update={"max_total_tokens": tokens})
        return compose(config.model_copy(update={"engine_config": engine}), Registry.load({}), target)

    return make


def test_the_config_overrides_the_shell_as_ray_does() -> None:
    shell = {"VLLM_A": "shell", "VLLM_B": "shell", "HOME": "/root", "N": "7"}
    given = model(VLLM_B="config", VLLM_C="${N}", VLLM_D="$N-${UNKNOWN}-$UNKNOWN")
    expanded = {"VLLM_B": "config", "VLLM_C": "7", "VLLM_D": "7--$UNKNOWN"}
    assert engine_environment(given, CPU, shell) == {"VLLM_A": "shell", **expanded}
    assert "VLLM_A" not in engine_environment(given, L4, shell)


def test_references_are_expanded_as_ray_expands_them(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = pytest.importorskip("ray._private.utils")
    monkeypatch.setenv("N", "7")
    values = {"VLLM_C": "${N}", "VLLM_D": "$N-${UNKNOWN}-$UNKNOWN", "VLLM_E": "100%"}
    expected = engine_environment(model(**values), CPU, {"N": "7"})
    for name in values:
        monkeypatch.setenv(name, "")
    utils.update_envs(values)
    assert {name: os.environ[name] for name in values} == expected


def test_the_shells_kv_cache_size_is_taken(composed: Callable[..., Composition]) -> None:
    made = composed({"VLLM_CPU_KVCACHE_SPACE": "7"})
    assert made.memory is not None
    assert made.memory.cpu_kv_cache_gib == 7
    assert make_plan(made).runtime_env["env_vars"]["VLLM_CPU_KVCACHE_SPACE"] == "7"
    again = composed({}, VLLM_CPU_KVCACHE_SPACE="3")
    assert make_plan(again).runtime_env["env_vars"]["VLLM_CPU_KVCACHE_SPACE"] == "3"


@pytest.mark.parametrize("value", ["", "0", "many"])
def test_a_kv_cache_size_of_the_shell_that_is_none_is_replaced(
    value: str, composed: Callable[..., Composition]
) -> None:
    plain = make_plan(composed({})).runtime_env["env_vars"]["VLLM_CPU_KVCACHE_SPACE"]
    made = composed({"VLLM_CPU_KVCACHE_SPACE": value})
    assert make_plan(made).runtime_env["env_vars"]["VLLM_CPU_KVCACHE_SPACE"] == plain


@pytest.mark.parametrize("value", ["1", "true", " True "])
def test_a_long_context_that_the_shell_allows(value: str, composed: Callable[..., Composition]) -> None:
    name = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
    assert "context-too-long" in {finding.code for finding in composed({}, tokens=5000).errors}
    made = composed({name: value}, tokens=5000)
    assert made.errors == ()
    assert make_plan(made).runtime_env["env_vars"][name] == value  # on every node
    assert "context-too-long" in {finding.code for finding in composed({name: "0"}, tokens=5000).errors}
    elsewhere = composed({name: value}, target=L4, tokens=5000)
    assert "context-too-long" in {finding.code for finding in elsewhere.errors}
    assert any(name in finding.message for finding in elsewhere.findings if finding.code == "environment-unused")


def test_the_shells_threads_stay_when_models_share_the_cpu(composed: Callable[..., Composition]) -> None:
    made = composed({"VLLM_CPU_OMP_THREADS_BIND": "0-3", "VLLM_CPU_NUM_OF_RESERVED_CPU": "4"})
    for plan in make_plans([made, made]):
        assert plan.runtime_env["env_vars"]["VLLM_CPU_OMP_THREADS_BIND"] == "0-3"
        assert plan.runtime_env["env_vars"]["OMP_NUM_THREADS"] == "6"
    assert {f.code for f in composed({}, target=L4).findings if f.code.startswith("environment")} == {
        "environment-unused"
    }
    env_vars = make_plan(composed({}, target=L4)).runtime_env["env_vars"]
    assert not any(name.startswith("VLLM_CPU") for name in env_vars)


def test_what_is_not_used_is_said(findings: Findings) -> None:
    shell = {"VLLM_PLUGINS": "mine", "VLLM_API_KEY": "secret", "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CACHE_ROOT": "/x"}
    said = findings(shell, VLLM_CACHE_ROOT="/y")
    assert set(said) == {"VLLM_PLUGINS", "VLLM_API_KEY", "VLLM_CACHE_ROOT"}
    assert {finding.severity for finding in said.values()} == {Severity.INFO}
    assert "plugins of the model" in said["VLLM_PLUGINS"].message
    assert "'/y'" in said["VLLM_CACHE_ROOT"].message
    assert "secret" not in str(said)
    on_gpu = findings({"VLLM_CPU_KVCACHE_SPACE": "4"}, replace(L4, name="NVIDIA L4"))
    assert "CPUs only" in on_gpu["VLLM_CPU_KVCACHE_SPACE"].message
    assert "is not this machine" in findings({"VLLM_CPU_KVCACHE_SPACE": "4"}, L4)["VLLM_CPU_KVCACHE_SPACE"].message
    assert findings({"VLLM_CACHE_ROOT": "/x", "VLLM_LOGGING_LEVEL": "DEBUG", "PATH": "/bin"}) == {}


@pytest.mark.parametrize("value", ["few", "", "1.5", "-1"])
def test_a_number_of_reserved_cpus_that_is_none_is_refused(value: str, composed: Callable[..., Composition]) -> None:
    for made in (composed({"VLLM_CPU_NUM_OF_RESERVED_CPU": value}), composed({}, VLLM_CPU_NUM_OF_RESERVED_CPU=value)):
        (error,) = made.errors
        assert error.code == "environment-invalid"
        assert repr(value) in error.message
        with pytest.raises(FindingsError, match="environment-invalid"):
            make_plan(made)


def test_numbers_that_vllm_refuses(findings: Findings) -> None:
    port = findings({"VLLM_PORT": "tcp://10.0.0.1:8000"})["VLLM_PORT"]
    assert (port.severity, port.code) == (Severity.ERROR, "environment-invalid")
    assert "Kubernetes" in port.fix
    assert findings({"VLLM_CPU_KVCACHE_SPACE": "2.5"})["VLLM_CPU_KVCACHE_SPACE"].severity is Severity.WARNING
    assert findings({}, VLLM_CPU_KVCACHE_SPACE="2.5")["VLLM_CPU_KVCACHE_SPACE"].severity is Severity.ERROR
    assert findings({"VLLM_CPU_KVCACHE_SPACE": ""}) == {}


def test_names_that_vllm_does_not_have(findings: Findings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_known", lambda: frozenset({"VLLM_CACHE_ROOT"}))
    said = findings({"VLLM_ATTENTION_BACKEND": "X", "VLLM_CACHE_ROOT": "/x"}, VLLM_CASH_ROOT="/y")
    assert "engine_kwargs.attention_backend" in said["VLLM_ATTENTION_BACKEND"].fix
    assert said["VLLM_ATTENTION_BACKEND"].severity is Severity.INFO
    assert said["VLLM_CASH_ROOT"].severity is Severity.WARNING
    assert len(said) == 2
    monkeypatch.setattr(module, "_known", frozenset)  # no vLLM here
    assert findings({"VLLM_ATTENTION_BACKEND": "X"}) == {}


@pytest.mark.slow
def test_known_names_are_those_of_the_installed_vllm() -> None:
    envs = pytest.importorskip("vllm.envs")
    assert set(envs.environment_variables) <= module._known() | {
        name for name in envs.environment_variables if not name.startswith("VLLM_")
    }


def test_modelscope(findings: Findings, monkeypatch: pytest.MonkeyPatch) -> None:
    on = {"VLLM_USE_MODELSCOPE": "True"}
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert findings(on)["VLLM_USE_MODELSCOPE"].severity is Severity.ERROR
    assert findings({"VLLM_USE_MODELSCOPE": "0"}) == {}
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    assert findings(on) == {}
    assert findings(on, location="hub")["VLLM_USE_MODELSCOPE"].severity is Severity.WARNING
