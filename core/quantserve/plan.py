"""A composition becomes a plan: plain JSON that says exactly how one model will be run.

Nothing after the plan makes decisions: the serving side does what the plan says, `quantserve plan`
prints it, and tests compare it with golden files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel, ConfigDict

from quantserve.compose import Composition, Setting
from quantserve.errors import ConfigError, FindingsError
from quantserve.finding import Finding
from quantserve.memory import shares_gpu

# Ray asks for whole CPUs by default, which would keep three small models from sharing a laptop.
DEFAULT_CPUS_PER_CPU_REPLICA = 0.1
RESERVED_CPUS = 1
"""CPUs on which no engine computes, when several share a machine; as many as vLLM leaves free beside a single one."""
RESERVE = "VLLM_CPU_NUM_OF_RESERVED_CPU"
GPU_GRAIN = 1e-4
"""The smallest share of a GPU that Ray tells from another."""
OWN_ENGINE_PLUGIN = "quantserve"
"""Our own general plugin in vLLM's processes on a CPU: `quantserve.serve.engine_wait`."""


class Plan(BaseModel):
    """How one model is run; every value is JSON.

    Attributes:
        model_id: id in the API.
        source: checkpoint folder or hub id.
        method: the quantization method (`Method` as JSON).
        plugins: composed plugins with distribution and version, the method's first.
        target: the hardware planned for (`Target` as JSON).
        engine_args: vLLM ``EngineArgs``.
        provenance: who set each engine argument: ``core``, ``config`` or a plugin's name.
        frontend_args: arguments of vLLM's OpenAI server (tool parser and the like).
        chat_template: Jinja text that replaces the tokenizer's own, or None.
        request_defaults: fields a request gets when the client leaves them out.
        app_name, route_prefix: the Ray Serve application.
        deployment: options of the Ray Serve deployment.
        affinity: what keeps requests together on a replica: ``none``, ``session`` or ``prefix``.
        runtime_env: Ray runtime environment of the replica and everything it starts.
        memory: the estimate behind "it fits", bytes per device.
        expected: expected performance, or None.
        description, url: shown by ``/v1/models``.
        findings: warnings and remarks that did not refuse the model.
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
    memory: dict[str, Any] | None = None
    expected: dict[str, Any] | None = None
    description: str | None = None
    url: str | None = None
    findings: list[dict[str, Any]] = []

    @property
    def max_model_len(self) -> int | None:
        """Context length the engine is started with, when the config names one."""
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
    plan = Plan(
        model_id=model.model_id,
        source=model.source,
        method=method.to_json(),
        plugins=[{"name": p.name, "distribution": p.distribution, "version": p.version} for p in composition.plugins],
        target=asdict(composition.target),
        engine_args={key: settings[key].value for key in sorted(settings)},
        provenance={key: settings[key].source for key in sorted(settings)},
        frontend_args=dict(model.frontend_kwargs),
        chat_template=model.chat_template,
        request_defaults=dict(model.request_defaults),
        app_name=model.route.strip("/"),
        route_prefix=model.route,
        deployment=_deployment(composition),
        affinity=model.deployment_config.affinity,
        runtime_env=_runtime_env(composition),
        memory=composition.memory.to_json() if composition.memory else None,
        expected=composition.expected.to_json() if composition.expected else None,
        description=model.engine_config.model_description,
        url=model.engine_config.model_url,
        findings=[finding.to_json() for finding in composition.findings],
    )
    # Tuples become lists here, so that a plan equals itself after a trip through JSON.
    return Plan.model_validate_json(plan.model_dump_json())


def make_plans(compositions: Sequence[Composition]) -> list[Plan]:
    """Plan models that will run side by side; on a CPU they share its cores instead of binding to the same one.

    Raises:
        FindingsError: a composition has errors.
        ConfigError: a model reserves CPUs by something that is no number.
    """
    plans = [make_plan(composition) for composition in compositions]
    for plan in plans:
        ranks = plan.engine_args["tensor_parallel_size"]
        given = plan.runtime_env["env_vars"].get(RESERVE, "0")
        if not (given.isascii() and given.isdecimal()):
            where = "engine_config.runtime_env.env_vars"
            raise ConfigError(f'{plan.model_id}: {where}.{RESERVE} is {given!r}\n  fix: a number of CPUs, such as "1"')
        # vLLM binds rank i to NUMA node i, always to the same cores of it.
        if plan.target["device"] == "cpu" and (len(plans) > 1 or ranks > plan.target["count"]):
            env_vars = plan.runtime_env["env_vars"]
            env_vars.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            # Unbound, vLLM takes what OpenMP says, and Ray tells OpenMP the replica's small share of a CPU: one thread.
            reserved = int(env_vars.setdefault(RESERVE, str(RESERVED_CPUS)))
            threads = (plan.target["cores"] - reserved) // (len(plans) * ranks)
            env_vars.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
    return plans


def require_gpus(plans: Sequence[Plan]) -> None:
    """Refuse models that cannot all start on the GPUs of one machine; Ray would wait for more without an end.

    Raises:
        ConfigError: says what each model needs, and what there is.
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
    lines = [f"the models do not fit the GPUs at once: {gpus} here"]
    for model_id, count, shares in needs:
        of = f"{len(shares)} workers with {shares[0]:g} each" if len(shares) > 1 else f"{sum(shares):g}"
        lines.append(f"  {model_id}: {of}" + (f", {count} replicas" if count > 1 else ""))
    beside = -(-len(wanted) // gpus)  # on a GPU, if all get the same share
    lines.append(
        "  fix: serve fewer models or replicas"
        + (f", or give each scaling_config.num_gpus_per_worker: {100 // beside / 100:g}" if beside > 1 else "")
    )
    raise ConfigError("\n".join(lines))


def _first_replicas(plan: Plan) -> int:
    scaling = plan.deployment.get("autoscaling_config")
    if not scaling:
        return int(plan.deployment.get("num_replicas", 1))
    first = scaling.get("initial_replicas")
    return int(scaling.get("min_replicas", 1) if first is None else first)


def _gpus_of_replica(plan: Plan) -> list[float]:
    """The GPUs, or the share of one, that each process of a replica asks Ray for."""
    actor = plan.deployment["ray_actor_options"].get("num_gpus", 0)
    bundles = [bundle.get("GPU", 0) for bundle in plan.deployment.get("placement_group_bundles", [])]
    return [float(share) for share in (bundles or [actor]) if share]


def refusal(findings: dict[str, list[Finding]]) -> FindingsError:
    """The error that says which models are refused and why."""
    lines = [f"{len(findings)} model{'s' if len(findings) != 1 else ''} refused:"]
    for model_id, errors in findings.items():
        lines.append(f"  {model_id}: {', '.join(sorted({finding.code for finding in errors}))}")
    lines.append("  fix: `quantserve check` shows every finding with its numbers")
    return FindingsError("\n".join(lines), findings)


def _core_settings(composition: Composition) -> dict[str, Setting]:
    """What the core sets; a plugin or the user may have a say in all but the identity keys."""
    model, target = composition.model, composition.target
    tensor_parallel = model.tensor_parallel_size
    settings: dict[str, Setting] = {
        "model": Setting(model.source, "config"),
        "served_model_name": Setting([model.model_id], "config"),
        "tensor_parallel_size": Setting(tensor_parallel, "config"),
        "max_model_len": Setting(model.max_model_len, "config"),
        "tokenizer": Setting(model.engine_config.tokenizer_id, "config"),
        "revision": Setting(model.revision, "config"),
        "trust_remote_code": Setting(False, "core"),
    }
    if tensor_parallel > 1:
        # Ray places GPU workers over nodes; vLLM's Ray executor knows no CPU workers.
        settings["distributed_executor_backend"] = Setting("mp" if target.device == "cpu" else "ray", "core")
    safetensors = [name for name in composition.checkpoint.files if name.endswith(".safetensors")]
    if 0 < sum(name.startswith("consolidated") for name in safetensors) < len(safetensors):
        # vLLM would take the Mistral files it finds here, and not those that were checked.
        hf = Setting("hf", "core")
        settings |= {"load_format": hf, "config_format": hf, "tokenizer_mode": hf}
    if shares_gpu(model, target):
        share = model.scaling_config.num_gpus_per_worker
        settings["gpu_memory_utilization"] = Setting(round(0.92 * share, 4), "core")
        # Engines that start together would measure each other's memory; vLLM measures nothing when it is told the size.
        # It still asks at the start whether gpu_memory_utilization of the GPU is free.
        if composition.memory and composition.memory.kv_cache_bytes:
            settings["kv_cache_memory_bytes"] = Setting(composition.memory.kv_cache_bytes, "core")
    return settings


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
    given = dict(model.engine_config.runtime_env or {})
    env_vars = {"VLLM_PLUGINS": composition.vllm_plugins, "VLLM_NO_USAGE_STATS": "1"}
    if target.device == "cpu":
        env_vars["VLLM_PLUGINS"] = ",".join(sorted({OWN_ENGINE_PLUGIN, *composition.vllm_plugins.split(",")} - {""}))
    if target.device == "cpu" and composition.memory:
        env_vars["VLLM_CPU_KVCACHE_SPACE"] = str(composition.memory.cpu_kv_cache_gib)
    return {**given, "env_vars": {**env_vars, **given.get("env_vars", {})}}
