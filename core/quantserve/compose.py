"""One model and the registry become a composition: its plugins, findings and merged engine kwargs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from quantserve.checkpoint import Checkpoint, open_checkpoint
from quantserve.checks import check_model
from quantserve.config import ModelConfig
from quantserve.contract import findings_breach, kwargs_breach
from quantserve.errors import PluginError, unknown_name
from quantserve.expectation import EXPECTED_WORKLOAD, as_profile, expectation
from quantserve.finding import Finding, Severity
from quantserve.memory import MemoryEstimate, estimate
from quantserve.method import Method, PerformanceProfile
from quantserve.registry import Hooks, Plugin, Registry, how_to_install
from quantserve.target import Target

CORE_KEYS = frozenset({"model", "served_model_name", "tensor_parallel_size", "max_model_len", "tokenizer", "revision"})


@dataclass(frozen=True, slots=True)
class Setting:
    """One engine argument and who set it: ``core``, ``config`` or a plugin's name."""

    value: object
    source: str


@dataclass(frozen=True)
class Composition:
    """Everything known about one model before a GPU is touched.

    Attributes:
        model: its config.
        checkpoint: its headers.
        target: the hardware it is checked for.
        method_plugin: the plugin that serves its method; None when no method could be chosen,
            which the findings then say.
        plugins: all composed plugins, the method plugin first.
        engine_kwargs: merged engine arguments with their provenance.
        findings: core's and the plugins', in that order.
        memory: what it will need; None when the config is too broken to tell.
        expected: what the method plugin knows was measured of exactly this, else what is predicted; None when neither.
        vllm_plugins: value of ``VLLM_PLUGINS`` for this model's processes.
    """

    model: ModelConfig
    checkpoint: Checkpoint
    target: Target
    method_plugin: Plugin | None
    plugins: tuple[Plugin, ...]
    engine_kwargs: Mapping[str, Setting]
    findings: tuple[Finding, ...]
    memory: MemoryEstimate | None
    expected: PerformanceProfile | None
    vllm_plugins: str

    @property
    def method(self) -> Method | None:
        """The method of the method plugin."""
        return self.method_plugin.method if self.method_plugin else None

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that refuse the model."""
        return tuple(finding for finding in self.findings if finding.severity is Severity.ERROR)


def compose(model: ModelConfig, registry: Registry, target: Target) -> Composition:
    """Read the model's headers, choose its method and ask every composed plugin.

    Raises:
        UsageError: the config names a method or plugin that is not installed.
        CheckpointError: the checkpoint cannot be found or read at all.
        PluginError: a plugin this model needs is defective.
    """
    extra = [registry.find_plugin(name, model.where) for name in model.plugins]
    named = registry.find_method(model.quantization, model.where) if model.quantization else None
    checkpoint = open_checkpoint(model.source, revision=model.revision, allow_pickle=model.allow_pickle)
    findings: list[Finding] = []
    method_plugin = named
    if method_plugin is None:
        method_plugin, said = _detect(checkpoint, registry)
        findings += said

    plugins = tuple(dict.fromkeys([method_plugin, *extra] if method_plugin else extra))
    hooks = Hooks(plugins)
    method = method_plugin.method if method_plugin else None
    kwargs, conflicts = _merge_kwargs(hooks, checkpoint, model, target, method)
    effective = _with_kwargs(model, kwargs)
    dtype = kwargs.get("dtype")
    dtype_by = dtype.source if dtype and dtype.source != "config" else ""
    findings += [finding.said_by("core") for finding in check_model(checkpoint, effective, target, method, dtype_by)]
    for plugin in plugins:
        findings += _validate(hooks, plugin, checkpoint, model, target)

    memory, said = estimate(checkpoint, effective, target)
    expected = _expected(hooks, method_plugin, checkpoint, model, target)
    if expected is None and method_plugin and memory and memory.fits:
        expected = _predicted(hooks, method_plugin, checkpoint, effective, target, memory)
    return Composition(
        model=model,
        checkpoint=checkpoint,
        target=target,
        method_plugin=method_plugin,
        plugins=plugins,
        engine_kwargs=kwargs,
        findings=(*findings, *conflicts, *(finding.said_by("core") for finding in said)),
        memory=memory,
        expected=expected,
        vllm_plugins=registry.vllm_plugins(plugins),
    )


def _detect(checkpoint: Checkpoint, registry: Registry) -> tuple[Plugin | None, list[Finding]]:
    """The one plugin that claims the checkpoint, or findings that say why there is none."""
    candidates = [plugin for plugin in registry.plugins.values() if plugin.method]
    hooks = Hooks(candidates)
    claimants: list[Plugin] = []
    defects: list[PluginError] = []
    for plugin in candidates:
        try:
            said = hooks.call(plugin, "quantserve_detect", checkpoint=_own_copy(checkpoint))
            if said is not None and not isinstance(said, bool):
                raise plugin.defect("quantserve_detect", f"returned {type(said).__name__}, not True, False or None")
            if said:
                claimants.append(plugin)
        except PluginError as error:
            defects.append(error)
    if len(claimants) == 1:
        return claimants[0], []
    if len(claimants) > 1:
        names = [f"{p.name} ({p.distribution} {p.version})" for p in claimants]
        fix = "name the method in engine_kwargs.quantization"
        message = f"{len(claimants)} plugins claim this checkpoint"
        return None, [Finding.error("method-ambiguous", message, names, fix).said_by("core")]
    if defects:
        raise defects[0]
    declared = (checkpoint.quantization_config or {}).get("quant_method")
    known = sorted(registry.methods)
    if isinstance(declared, str) and declared:
        # A broken or switched-off plugin that would have served the declared method is the real cause: say so.
        registry.why_unusable(declared.lower())
        message = f"the checkpoint declares {unknown_name('quantization method', declared[:80], known)}"
        fix = how_to_install(declared)
    elif not checkpoint.tensors and any(problem.severity is Severity.ERROR for problem in checkpoint.problems):
        return None, []  # nothing could be read, which the problems say
    else:
        message = f"no installed plugin recognises this checkpoint (installed methods: {', '.join(known) or 'none'})"
        fix = "name the method in engine_kwargs.quantization, or install its plugin"
    return None, [Finding.error("method-not-detected", message, (), fix).said_by("core")]


def _ask(hooks: Hooks, plugin: Plugin, hook: str, checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Any:
    """Call one hook with copies, so that a plugin that changes its arguments changes nobody else's."""
    own = model.model_copy(deep=True)
    return hooks.call(plugin, hook, checkpoint=_own_copy(checkpoint), model=own, target=target)


def _own_copy(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with read-only tensors and files and a config of its own."""
    try:
        config, quant_files = json.loads(json.dumps([checkpoint.config, checkpoint.quant_files]))
    except (TypeError, ValueError, RecursionError):
        return checkpoint  # nested to the limit of the stack, or built in a test from what is no JSON
    return replace(
        checkpoint,
        config=config,
        quant_files=quant_files,
        tensors=MappingProxyType(checkpoint.tensors),
        files=MappingProxyType(checkpoint.files),
    )


def _validate(
    hooks: Hooks, plugin: Plugin, checkpoint: Checkpoint, model: ModelConfig, target: Target
) -> list[Finding]:
    hook = "quantserve_validate"
    findings = _ask(hooks, plugin, hook, checkpoint, model, target)
    if findings is None:
        return []
    listed = list(findings) if isinstance(findings, tuple | set | frozenset) else findings
    if reason := findings_breach(listed):
        raise plugin.defect(hook, reason)
    return [finding.said_by(plugin.name) for finding in listed]


def _merge_kwargs(
    hooks: Hooks, checkpoint: Checkpoint, model: ModelConfig, target: Target, method: Method | None
) -> tuple[dict[str, Setting], list[Finding]]:
    """Merge what core, plugins and the user want; the user wins, plugins that disagree are named."""
    merged: dict[str, Setting] = {}
    conflicts: list[Finding] = []
    users = {key: value for key, value in model.engine_kwargs.items() if key != "quantization"}
    if method and method.vllm_name:
        merged["quantization"] = Setting(method.vllm_name, "core")
    for plugin in hooks.plugins:
        for key, value in _plugin_kwargs(hooks, plugin, checkpoint, model, target).items():
            present = merged.get(key)
            if present and present.source != "core" and present.value != value and key not in users:
                message = f"{present.source} sets {key}={present.value!r} and {plugin.name} sets {key}={value!r}"
                fix = f"set {key} in engine_kwargs, which wins, or drop one of the two plugins"
                conflicts.append(
                    Finding.error("plugins-conflict", message, (present.source, plugin.name), fix).said_by("core")
                )
            elif not present or present.source == "core":
                merged[key] = Setting(value, plugin.name)
    merged.update({key: Setting(value, "config") for key, value in users.items()})
    return {key: setting for key, setting in merged.items() if setting.value is not None}, conflicts


def _plugin_kwargs(
    hooks: Hooks, plugin: Plugin, checkpoint: Checkpoint, model: ModelConfig, target: Target
) -> Mapping[str, object]:
    hook = "quantserve_engine_kwargs"
    kwargs = _ask(hooks, plugin, hook, checkpoint, model, target)
    if kwargs is None:
        return {}
    if reason := kwargs_breach(kwargs, CORE_KEYS):
        raise plugin.defect(hook, reason)
    _must_be_json(plugin, hook, dict(kwargs))
    return dict(kwargs)


def _must_be_json(plugin: Plugin, hook: str, value: object) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise plugin.defect(hook, f"returned a value that is not JSON: {error}") from error


def _with_kwargs(model: ModelConfig, kwargs: Mapping[str, Setting]) -> ModelConfig:
    """The model as vLLM will see it: what plugins set (a dtype, hf_overrides) counts in the core's checks."""
    values = {key: setting.value for key, setting in kwargs.items() if key != "quantization"}
    merged = {**model.engine_kwargs, **values}
    return model.model_copy(update={"engine_config": model.engine_config.model_copy(update={"engine_kwargs": merged})})


def _expected(
    hooks: Hooks, plugin: Plugin | None, checkpoint: Checkpoint, model: ModelConfig, target: Target
) -> PerformanceProfile | None:
    if plugin is None:
        return None
    hook = "quantserve_performance"
    profile = _ask(hooks, plugin, hook, checkpoint, model, target)
    if profile is not None and not isinstance(profile, PerformanceProfile):
        raise plugin.defect(hook, f"returned {type(profile).__name__}, not PerformanceProfile or None")
    if profile is not None:
        _must_be_json(plugin, hook, profile.to_json())
    return profile


def _predicted(
    hooks: Hooks, plugin: Plugin, checkpoint: Checkpoint, model: ModelConfig, target: Target, memory: MemoryEstimate
) -> PerformanceProfile | None:
    made = expectation(plugin, checkpoint, model, target, memory, hooks=hooks)
    return as_profile(made, made.predict(EXPECTED_WORKLOAD), target) if made else None
