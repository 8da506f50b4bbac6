"""Plans are plain JSON; what they say for known configs is kept in golden files.

To renew the files after an intended change: ``UPDATE_GOLDEN=1 pytest tests/test_plan.py``, then read the diff.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.checkpoints import make_llama, write_safetensors
from quantserve.config import load, load_object, model_from_source
from quantserve.errors import ConfigError, FindingsError
from quantserve.planning.compose import compose
from quantserve.planning.plan import Plan, make_plan, make_plans, require_gpus
from quantserve.plugins.registry import Registry
from quantserve.target import find_target

GOLDEN = Path(__file__).parent / "golden"

CASES = {
    "fp16-a100": ("fp16", "a100-80g", "{}"),
    "awq-a100": ("awq", "a100-80g", "{engine_kwargs: {quantization: awq, max_num_seqs: 64}}"),
    "awq-tp2-a100": ("awq", "2xa100-80g", "{engine_kwargs: {quantization: awq}}"),
    "squeezellm-l4": (
        "squeezellm",
        "l4",
        "{generation: {stopping_sequences: ['END'], generate_kwargs: {top_p: 0.9}}}",
    ),
}


def plan_of(tmp_path: Path, method: str, target: str, engine: str) -> Plan:
    make_llama(tmp_path / "model", method, hidden=512, intermediate=1024)
    workers = 2 if target.startswith("2x") else 1
    config = tmp_path / "model.yaml"
    config.write_text(
        f"""
engine_config:
  model_id: org/model
  hf_model_id: ./model
  max_total_tokens: 512
deployment_config:
  autoscaling_config: {{min_replicas: 1, max_replicas: 8, target_ongoing_requests: 24}}
  max_ongoing_requests: 64
scaling_config: {{num_workers: {workers}, num_gpus_per_worker: 1, num_cpus_per_worker: 8}}
""".replace("  max_total_tokens: 512\n", "  max_total_tokens: 512\n" + _indented(engine))
    )
    (model,) = load([config]).models
    return make_plan(compose(model, Registry.load({}), find_target(target)))


def _indented(flow: str) -> str:
    import yaml

    text = yaml.safe_dump(yaml.safe_load(flow)) if flow != "{}" else ""
    return "".join(f"  {line}\n" for line in text.splitlines())


@pytest.mark.parametrize("name", CASES)
def test_plan_matches_its_golden_file(name: str, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, *CASES[name])
    text = plan.model_dump_json(indent=2).replace(str(tmp_path), "TMP") + "\n"
    golden = GOLDEN / f"{name}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert json.loads(text) == json.loads(golden.read_text())


def test_a_plan_survives_json(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, *CASES["awq-a100"])
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_a_model_with_errors_cannot_be_planned(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"\x10")
    (model,) = load([folder]).models
    composition = compose(model, Registry.load({}), find_target("a100-80g"))
    with pytest.raises(FindingsError, match=r"refused.*\n.*header-truncated") as caught:
        make_plan(composition)
    assert caught.value.exit_code == 1


def test_the_weights_that_were_checked_are_those_that_are_served(tmp_path: Path) -> None:
    """vLLM by itself prefers Mistral's own files when both sets are in one folder."""
    folder = make_llama(tmp_path / "m", shards=2)
    alone = make_plan(compose(model_from_source(str(folder)), Registry.load({}), find_target("a100-80g")))
    assert "load_format" not in alone.engine_args
    write_safetensors(folder / "consolidated.safetensors", {"layers.0.attention.wq.weight": ("F16", (256, 256))})
    plan = make_plan(compose(model_from_source(str(folder)), Registry.load({}), find_target("a100-80g")))
    formats = {key: plan.engine_args[key] for key in ("load_format", "config_format", "tokenizer_mode")}
    assert set(formats.values()) == {"hf"}
    assert plan.provenance["load_format"] == "core"


@pytest.mark.parametrize(("models", "bound", "threads"), [(1, None, None), (2, "nobind", "7"), (40, "nobind", "1")])
def test_models_side_by_side_share_a_processor(
    tmp_path: Path, models: int, bound: str | None, threads: str | None
) -> None:
    make_llama(tmp_path / "model", "fp16", hidden=512, intermediate=1024)
    config = model_from_source(str(tmp_path / "model"), max_model_len=512)
    composition = compose(config, Registry.load({}), replace(find_target("cpu"), cores=16, memory_bytes=1 << 36))
    for plan in make_plans([composition] * models):
        env_vars = plan.runtime_env["env_vars"]
        assert env_vars.get("VLLM_CPU_OMP_THREADS_BIND") == bound
        assert env_vars.get("OMP_NUM_THREADS") == threads
        assert env_vars.get("VLLM_CPU_NUM_OF_RESERVED_CPU") == (bound and "1")


def test_the_user_can_set_the_number_of_reserved_cpus(tmp_path: Path) -> None:
    make_llama(tmp_path / "model", "fp16", hidden=512, intermediate=1024)
    target = replace(find_target("cpu"), cores=16, memory_bytes=1 << 36)

    def plans(reserved: str, models: int = 2) -> list[Plan]:
        config = model_from_source(str(tmp_path / "model"), max_model_len=512)
        env_vars = {"VLLM_CPU_NUM_OF_RESERVED_CPU": reserved}
        engine = config.engine_config.model_copy(update={"runtime_env": {"env_vars": env_vars}})
        composition = compose(config.model_copy(update={"engine_config": engine}), Registry.load({}), target)
        return make_plans([composition] * models)

    assert {plan.runtime_env["env_vars"]["OMP_NUM_THREADS"] for plan in plans("4")} == {"6"}
    for models in (1, 2):
        with pytest.raises(FindingsError, match="environment-invalid"):
            plans("few", models)


def shared(tmp_path: Path, target: str, share: float, **engine_kwargs: object) -> Plan:
    make_llama(tmp_path / "model", "fp16", hidden=512, intermediate=1024)
    config = {
        "engine_config": {"model_id": "m", "hf_model_id": str(tmp_path / "model"), "engine_kwargs": engine_kwargs},
        "scaling_config": {"num_gpus_per_worker": share},
    }
    (model,) = load_object({"models": [config]}, "test").models
    return make_plan(compose(model, Registry.load({}), find_target(target)))


@pytest.mark.parametrize("target", ["h100", "mi300x"])
def test_models_that_share_a_gpu_get_an_explicit_cache_size(tmp_path: Path, target: str) -> None:
    plan = shared(tmp_path, target, 0.3)
    assert plan.memory is not None
    assert plan.engine_args["gpu_memory_utilization"] == 0.276
    assert plan.engine_args["kv_cache_memory_bytes"] == plan.memory["kv_cache_bytes"]
    taken = plan.memory["kv_cache_bytes"] + plan.memory["weights_bytes"] + plan.memory["overhead_bytes"]
    assert taken / plan.memory["budget_bytes"] == pytest.approx(0.9, rel=1e-6)
    assert {plan.provenance[key] for key in ("gpu_memory_utilization", "kv_cache_memory_bytes")} == {"core"}
    assert plan.deployment["ray_actor_options"]["num_gpus"] == 0.3


def test_a_model_with_a_gpu_to_itself_lets_vllm_measure(tmp_path: Path) -> None:
    assert not {"gpu_memory_utilization", "kv_cache_memory_bytes"} & shared(tmp_path, "h100", 1).engine_args.keys()


def test_the_users_memory_settings_win_on_a_shared_gpu(tmp_path: Path) -> None:
    asked = shared(tmp_path, "h100", 0.3, kv_cache_memory_bytes=1 << 30)
    assert asked.engine_args["kv_cache_memory_bytes"] == 1 << 30
    assert asked.provenance["kv_cache_memory_bytes"] == "config"
    assert asked.memory is not None
    assert asked.memory["kv_cache_bytes"] == 1 << 30
    less = shared(tmp_path, "h100", 0.3, gpu_memory_utilization=0.2)
    assert (less.engine_args["gpu_memory_utilization"], less.provenance["gpu_memory_utilization"]) == (0.2, "config")
    assert less.memory is not None
    assert less.engine_args["kv_cache_memory_bytes"] == less.memory["kv_cache_bytes"] < 0.2 * 80 * 2**30
    assert less.provenance["kv_cache_memory_bytes"] == "core"


@pytest.mark.parametrize("share", [0, 0.3])
def test_gpu_shares_are_ignored_on_a_cpu(tmp_path: Path, share: float) -> None:
    assert shared(tmp_path, "cpu", share) == shared(tmp_path, "cpu", 1)


def test_no_share_of_a_gpu_is_refused_on_one(tmp_path: Path) -> None:
    with pytest.raises(FindingsError, match="no-gpu-share"):
        shared(tmp_path, "h100", 0)


def together(tmp_path: Path, target: str, *models: str) -> list[Plan]:
    """Plans of models side by side; each is named by its scaling and deployment config."""
    make_llama(tmp_path / "model", "fp16", hidden=512, intermediate=1024)
    compositions = []
    for number, settings in enumerate(models):
        config = tmp_path / f"{number}.yaml"
        config.write_text(f"engine_config: {{model_id: m{number}, hf_model_id: ./model}}\n{settings}\n")
        (model,) = load([config]).models
        compositions.append(compose(model, Registry.load({}), find_target(target)))
    return make_plans(compositions)


HALF = "scaling_config: {num_gpus_per_worker: 0.5}"
MORE = "scaling_config: {num_gpus_per_worker: 0.6}"


@pytest.mark.parametrize(
    ("target", "models"),
    [
        ("1xa100-80g", ["", ""]),
        ("1xa100-80g", ["", "scaling_config: {num_gpus_per_worker: 0.1}"]),
        ("1xa100-80g", [f"{HALF}\ndeployment_config: {{num_replicas: 3}}"]),
        ("2xa100-80g", [MORE, MORE, MORE]),  # 1.8 of 2, but no GPU has room for two
        (
            "3xa100-80g",
            ["scaling_config: {num_workers: 2}", "deployment_config: {autoscaling_config: {min_replicas: 2}}"],
        ),
    ],
)
def test_models_that_cannot_all_start_are_refused(tmp_path: Path, target: str, models: list[str]) -> None:
    message = rf"not enough GPUs: the models need [\d.]+ and this machine has {target[0]}\b.*\n  m0: .*\n"
    with pytest.raises(ConfigError, match=message):
        require_gpus(together(tmp_path, target, *models))


def test_the_share_that_fits_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_gpus_per_worker: 0\.33 to put 3 workers on a GPU$"):
        require_gpus(together(tmp_path, "1xa100-80g", HALF, HALF, HALF))
    require_gpus(together(tmp_path, "1xa100-80g", *["scaling_config: {num_gpus_per_worker: 0.33}"] * 3))


@pytest.mark.parametrize(
    ("target", "models"),
    [
        ("1xa100-80g", [HALF, HALF]),
        ("1xa100-80g", ["scaling_config: {num_gpus_per_worker: 0.1}"] * 10),
        ("2xa100-80g", [MORE, HALF, "scaling_config: {num_gpus_per_worker: 0.4}"]),
        ("1xa100-80g", ["", "deployment_config: {autoscaling_config: {min_replicas: 0}}"]),  # starts when asked
        ("a100-80g", ["", ""]),  # nobody said how many there are
        ("cpu", ["", ""]),
    ],
)
def test_models_that_can_all_start_are_not(tmp_path: Path, target: str, models: list[str]) -> None:
    require_gpus(together(tmp_path, target, *models))


@pytest.mark.parametrize("method", ["awq", "squeezellm", "fp16"])
def test_the_dtype_of_activations_is_that_of_the_engine_argument(tmp_path: Path, method: str) -> None:
    """AWQ gives vLLM bfloat16 for a float16 checkpoint where the CPU multiplies that in hardware."""
    plan = plan_of(tmp_path, method, "cpu", "{}")
    assert plan.dtype == plan.engine_args.get("dtype", "float16")
