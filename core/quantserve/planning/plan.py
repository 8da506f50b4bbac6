"""Turns a composition into a plan: plain JSON with everything that decides how one model is run.

No decisions are made after the plan: serving executes it, `quantserve plan` prints it, and tests compare it with golden
files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from typing import Any

from pydantic import BaseModel, ConfigDict

from quantserve.checkpoint import Checkpoint
from quantserve.checkpoint.adapter import Adapter
from quantserve.checkpoint.downloads import folder_of, wanted
from quantserve.checks.memory import shares_gpu
from quantserve.config import ModelConfig
from quantserve.errors import ConfigError, FindingsError
from quantserve.finding import Finding
from quantserve.planning.adapters import lora_modules
from quantserve.planning.compose import Composition
from quantserve.planning.facts import facts
from quantserve.planning.settings import Setting
from quantserve.system.environment import (
    KV_CACHE_SPACE,
    RESERVE,
    THREADS_BIND,
    carried,
    engine_environment,
    with_environment,
)
from quantserve.system.homes import is_bucket, parted

# Ray's default is whole CPUs, with which three small models could not share a laptop.
DEFAULT_CPUS_PER_CPU_REPLICA = 0.1
RESERVED_CPUS = 1
"""CPUs that the engines leave free when several share a machine; vLLM leaves as many beside a single engine."""
GPU_GRAIN = 1e-4
"""Ray's resolution of GPU fractions."""


class Plan(BaseModel):
    """How one model is run; every value is JSON.

    Attributes:
        model_id: id in the API.
        source: checkpoint folder or hub id.
        method: the quantization method (`Method` as JSON).
        plugins: composed plugins with distribution and version, the method's first.
        target: the hardware planned for (`Target` as JSON).
        engine_args: vLLM ``EngineArgs``.
        provenance: source of each engine argument: ``core``, ``config`` or a plugin's name.
        frontend_args: arguments of vLLM's OpenAI server (tool parser, LoRA adapters and the like).
        chat_template: Jinja text that replaces the tokenizer's own, or None.
        request_defaults: default values of request fields.
        app_name, route_prefix: the Ray Serve application.
        deployment: options of the Ray Serve deployment.
        affinity: which requests stay together on a replica: ``none``, ``session`` or ``prefix``.
        runtime_env: Ray runtime environment of the replica and its child processes.
        environment_provenance: source of each variable in it that a plugin or the config sets.
        kernel: name of the quantized linears' kernel; "" when the method plugin gives none.
        memory: memory estimate, bytes per device.
        bits, bits_per_weight: width of the quantized weights, and stored bits of one; None when the files do not tell.
        dtype: of activations; None when unknown.
        expected: expected performance, or None.
        alone: the prediction for one request at a time, where `expected` is one.
        quality: what quantizing lost, as `quantserve.planning.facts.quality` gives it.
        downloads: files of buckets and adapters that `quantserve.checkpoint.downloads.fetch` brings to the machine
            before the engine starts.
        description, url: shown by ``/v1/models``.
        findings: warnings and notes on the model.
    """

    model_config = ConfigDict(extra="forbid")

    version: int = 1
    model_id: str
    source: str
    method: dict[str, Any]
    plugins: list[dict[str, str]]
    target: dict[str, Any]
    engine_args: dict[str, Any]
    provenance: dict[str, str]
    frontend_args: dict[str, Any] = {}
    chat_template: str | None = None
    request_defaults: dict[str, Any] = {}
    app_name: str
    route_prefix: str
    deployment: dict[str, Any]
    affinity: str = "none"
    runtime_env: dict[str, Any]
    environment_provenance: dict[str, str] = {}
    kernel: str = ""
    memory: dict[str, Any] | None = None
    bits: int | None = None
    bits_per_weight: float | None = None
    dtype: str | None = None
    expected: dict[str, Any] | None = None
    alone: dict[str, Any] | None = None
    quality: dict[str, Any] | None = None
    downloads: list[dict[str, Any]] = []
    description: str | None = None
    url: str | None = None
    findings: list[dict[str, Any]] = []

    @property
    def max_model_len(self) -> int | None:
        """Context length of the engine, if the config sets one."""
        return self.engine_args.get("max_model_len")


def make_plan(composition: Composition) -> Plan:
    """Plan a composition that has no error findings.

    Raises:
        FindingsError: the composition has errors.
    """
    model, method = composition.model, composition.method
    if composition.errors or method is None:
        raise refusal({model.model_id: list(composition.errors)})
    settings = {**_core_settings(composition), **composition.engine_kwargs}
    settings = {key: setting for key, setting in settings.items() if setting.value is not None}
    opened: list[Checkpoint | Adapter] = [composition.checkpoint, *composition.adapters]
    plan = Plan(
        model_id=model.model_id,
        source=model.source,
        method=method.to_json(),
        plugins=[{"name": p.name, "distribution": p.distribution, "version": p.version} for p in composition.plugins],
        target=asdict(composition.target),
        engine_args={key: settings[key].value for key in sorted(settings)},
        provenance={key: settings[key].source for key in sorted(settings)},
        frontend_args={**model.frontend_kwargs, **lora_modules(composition.adapters, model.model_id)},
        chat_template=model.chat_template,
        request_defaults=dict(model.request_defaults),
        app_name=_app_name(model),
        route_prefix=model.route,
        deployment=_deployment(composition),
        affinity=model.deployment_config.affinity,
        runtime_env=_runtime_env(composition),
        environment_provenance={name: composition.variables[name].source for name in sorted(composition.variables)},
        kernel=composition.kernel,
        memory=composition.memory.to_json() if composition.memory else None,
        expected=composition.expected.to_json() if composition.expected else None,
        alone=composition.alone.to_json() if composition.alone else None,
        **facts(composition),
        downloads=[files for one in opened if (files := wanted(one)) is not None],
        description=model.engine_config.model_description,
        url=model.engine_config.model_url,
        findings=[finding.to_json() for finding in composition.findings],
    )
    # Tuples become lists here, so that a plan equals itself after a trip through JSON.
    return Plan.model_validate_json(plan.model_dump_json())


def make_plans(compositions: Sequence[Composition]) -> list[Plan]:
    """Plan models that run side by side; on a CPU their threads share the cores instead of binding to the same ones.

    Raises:
        FindingsError: a composition has errors.
    """
    plans = [make_plan(composition) for composition in compositions]
    for plan in plans:
        ranks = plan.engine_args["tensor_parallel_size"]
        # vLLM binds rank i to the same cores of NUMA node i in every engine.
        if plan.target["device"] == "cpu" and (len(plans) > 1 or ranks > plan.target["count"]):
            env_vars = plan.runtime_env["env_vars"]
            env_vars.setdefault(THREADS_BIND, "nobind")
            # Unbound, vLLM uses OMP_NUM_THREADS, which Ray derives from the replica's CPU share: one thread.
            reserved = int(env_vars.setdefault(RESERVE, str(RESERVED_CPUS)))
            threads = (plan.target["cores"] - reserved) // (len(plans) * ranks)
            env_vars.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
    return plans


def require_gpus(plans: Sequence[Plan]) -> None:
    """Refuse models that do not fit the GPUs of one machine together; Ray would wait for more GPUs forever.

    Raises:
        ConfigError: with the GPUs that each model needs and those of the machine.
    """
    if not plans or plans[0].target["device"] == "cpu" or not plans[0].target["count"]:
        return
    needs = [(plan.model_id, _first_replicas(plan), _gpus_of_replica(plan)) for plan in plans]
    gpus = plans[0].target["count"]
    free = [1.0] * gpus
    wanted = sorted((share for _, count, shares in needs for share in shares * count), reverse=True)
    for share in wanted:
        gpu = next((i for i, left in enumerate(free) if share <= left + GPU_GRAIN), None)
        if gpu is None:
            break
        free[gpu] -= share
    else:
        return
    total = sum(wanted)
    short = "" if total > gpus else ", and these shares cannot be combined on them"
    lines = [f"not enough GPUs: the models need {total:g} and this machine has {gpus}{short}"]
    for model_id, count, shares in needs:
        of = f"{len(shares)} workers with {shares[0]:g} GPU each" if len(shares) > 1 else f"{sum(shares):g} GPU"
        lines.append(f"  {model_id}: {of}" + (f", {count} replicas" if count > 1 else ""))
    beside = -(-len(wanted) // gpus)  # on a GPU, if all get the same share
    lines.append(
        "  fix: serve fewer models or replicas"
        + (
            f", or set num_gpus_per_worker: {100 // beside / 100:g} to put {beside} workers on a GPU"
            if beside > 1
            else ""
        )
    )
    raise ConfigError("\n".join(lines))


def _first_replicas(plan: Plan) -> int:
    scaling = plan.deployment.get("autoscaling_config")
    if not scaling:
        return int(plan.deployment.get("num_replicas", 1))
    first = scaling.get("initial_replicas")
    return int(scaling.get("min_replicas", 1) if first is None else first)


def _gpus_of_replica(plan: Plan) -> list[float]:
    """GPUs, or the fraction of one, that each process of a replica requests."""
    actor = plan.deployment["ray_actor_options"].get("num_gpus", 0)
    bundles = [bundle.get("GPU", 0) for bundle in plan.deployment.get("placement_group_bundles", [])]
    return [float(share) for share in (bundles or [actor]) if share]


def refusal(findings: dict[str, list[Finding]]) -> FindingsError:
    """The error that lists the refused models with the codes of their findings."""
    lines = [f"{len(findings)} model{'s' if len(findings) != 1 else ''} refused:"]
    for model_id, errors in findings.items():
        lines.append(f"  {model_id}: {', '.join(sorted({finding.code for finding in errors}))}")
    lines.append("  fix: `quantserve check` shows every finding with its numbers")
    return FindingsError("\n".join(lines), findings)


def _core_settings(composition: Composition) -> dict[str, Setting]:
    """Engine arguments set by the core; plugins and users may override all but the identity keys."""
    model, target = composition.model, composition.target
    tensor_parallel = model.tensor_parallel_size
    name, revision = _identity(model, composition.checkpoint)
    settings: dict[str, Setting] = {
        "model": Setting(name, "config"),
        "served_model_name": Setting([model.model_id], "config"),
        "tensor_parallel_size": Setting(tensor_parallel, "config"),
        "max_model_len": Setting(model.max_model_len, "config"),
        "tokenizer": Setting(model.engine_config.tokenizer_id, "config"),
        "revision": Setting(revision, "config"),
        "trust_remote_code": Setting(False, "core"),
    }
    if tensor_parallel > 1:
        # Ray can place GPU workers on several nodes; vLLM's Ray executor does not support CPU workers.
        settings["distributed_executor_backend"] = Setting("mp" if target.device == "cpu" else "ray", "core")
    files = composition.checkpoint.files
    safetensors = [name for name in files if name.endswith(".safetensors")]
    if 0 < sum(name.startswith("consolidated") for name in safetensors) < len(safetensors):
        # vLLM would take the Mistral files it finds here, and not those that were checked.
        hf = Setting("hf", "core")
        tekken = "tekken.json" in files and "tokenizer.json" not in files
        tokenizer = Setting("mistral", "core") if tekken else hf
        settings |= {"load_format": hf, "config_format": hf, "tokenizer_mode": tokenizer}
    if shares_gpu(model, target):
        share = model.scaling_config.num_gpus_per_worker
        settings["gpu_memory_utilization"] = Setting(round(0.92 * share, 4), "core")
        # Engines that start together would count each other's memory; with a given size vLLM does not measure.
        # It still asks at the start whether gpu_memory_utilization of the GPU is free.
        if composition.memory and composition.memory.kv_cache_bytes:
            settings["kv_cache_memory_bytes"] = Setting(composition.memory.kv_cache_bytes, "core")
    return settings


def _identity(model: ModelConfig, checkpoint: Checkpoint) -> tuple[str, str | None]:
    """What vLLM loads, and its revision: a folder, a container file, or a hub id with the choice of a file."""
    if is_bucket(checkpoint.source):
        folder = folder_of(checkpoint)
        assert folder is not None
        return str(folder / checkpoint.container[0] if checkpoint.container else folder), None
    if checkpoint.location == "local":
        files = [str(checkpoint.path / name) for name in checkpoint.container] if checkpoint.path else []
        return (*files, model.source)[0], model.revision
    place, choice = parted(model.source)
    repository, _, revision = place.partition("@")
    return f"{repository}:{choice}" if choice else repository, revision or model.revision


def _app_name(model: ModelConfig) -> str:
    """Name of the Ray Serve application: the route, or ASCII with a hash of it; Ray's metrics take ASCII only."""
    name = model.route.strip("/")
    if name.isascii():
        return name
    kept = "".join(char for char in name if char.isascii()).strip("-._")
    return "-".join(filter(None, [kept, sha256(name.encode()).hexdigest()[:12]]))


def _deployment(composition: Composition) -> dict[str, Any]:
    model, target = composition.model, composition.target
    options: dict[str, Any] = model.deployment_config.serve_options()
    actor: dict[str, Any] = dict(options.pop("ray_actor_options", {}) or {})
    scaling = model.scaling_config
    resources = dict(scaling.resources_per_worker or {})
    workers = model.tensor_parallel_size
    if target.device == "cpu":
        cpus = scaling.num_cpus_per_worker
        given = "num_cpus_per_worker" in scaling.model_fields_set
        actor.setdefault("num_cpus", cpus * workers if given else DEFAULT_CPUS_PER_CPU_REPLICA)
        if resources:
            actor.setdefault("resources", resources)
    elif workers == 1:
        actor.setdefault("num_cpus", scaling.num_cpus_per_worker)
        actor.setdefault("num_gpus", scaling.num_gpus_per_worker)
        if resources:
            actor.setdefault("resources", resources)
    else:
        actor.setdefault("num_cpus", 1)
        worker = {"CPU": scaling.num_cpus_per_worker, "GPU": scaling.num_gpus_per_worker, **resources}
        first = {"CPU": actor["num_cpus"], **actor.get("resources", {})}
        options["placement_group_bundles"] = [first, *({**worker} for _ in range(workers))]
        options["placement_group_strategy"] = scaling.placement_strategy
    options["ray_actor_options"] = actor
    return options


def _runtime_env(composition: Composition) -> dict[str, Any]:
    model, target = composition.model, composition.target
    planned = {**composition.engine_environment, "VLLM_NO_USAGE_STATS": "1"}
    # The shell's variables that were judged are part of the plan, so that the engine has them on every node.
    environment = composition.environment
    judged = carried(engine_environment(with_environment(model, environment), target), target)
    if target.device == "cpu" and composition.memory:
        judged[KV_CACHE_SPACE] = str(composition.memory.cpu_kv_cache_gib)
    env_vars = {**planned, **environment, **judged}
    return {**(model.engine_config.runtime_env or {}), "env_vars": env_vars}
