"""One model and the registry become a composition: its plugins, findings and merged engine kwargs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from quantserve.checkpoint import Checkpoint, open_checkpoint, overridden
from quantserve.checkpoint.adapter import Adapter
from quantserve.checks.adapters import check_adapters
from quantserve.checks.memory import MemoryEstimate, estimate
from quantserve.checks.model import check_model
from quantserve.checks.scheme import check_schemes
from quantserve.checks.stored import Stored, stored_linears
from quantserve.config import ModelConfig
from quantserve.finding import Finding, Severity
from quantserve.method import Method, PerformanceProfile
from quantserve.model.layers import linears
from quantserve.model.modules import modules, undescribed
from quantserve.once import once, share
from quantserve.planning.adapters import lora_arguments, open_adapters
from quantserve.planning.detection import Detected, detect, own_copy
from quantserve.planning.expectation import ALONE, EXPECTED_WORKLOAD, as_profile, expectation, kernel_name
from quantserve.planning.plugin_arguments import checked, unsafe
from quantserve.planning.settings import CORE, Setting, Settings
from quantserve.plugins.contract import (
    code_of,
    environment_of,
    findings_of,
    kwargs_of,
    profile_of,
    schemes_of,
    skip_list_of,
)
from quantserve.plugins.registry import Hooks, Plugin, Registry
from quantserve.system.environment import configured_environment, with_environment
from quantserve.target import Target

CORE_KEYS = frozenset({"model", "served_model_name", "tensor_parallel_size", "max_model_len", "tokenizer", "revision"})
CORE_VARIABLES = frozenset({"VLLM_PLUGINS", "VLLM_WORKER_MULTIPROC_METHOD"})


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
        variables: merged environment variables of the model's processes with their provenance.
        kernel: name of the quantized linears' kernel, as the method plugin gives it; "" when it gives none.
        findings: core's and the plugins', in that order.
        stored: the linears by their schemes; None when the method has no schemes.
        memory: what it will need; None when the config is too broken to tell.
        expected: what the method plugin knows was measured of exactly this, else what is predicted; None when neither.
        alone: what is predicted for one request at a time, where `expected` is a prediction.
        engine_environment: variables with which this model's processes load the plugins' engine sides, and no others.
        adapters: the LoRA adapters served beside the model.
    """

    model: ModelConfig
    checkpoint: Checkpoint
    target: Target
    method_plugin: Plugin | None
    plugins: tuple[Plugin, ...]
    engine_kwargs: Mapping[str, Setting]
    variables: Mapping[str, Setting]
    kernel: str
    findings: tuple[Finding, ...]
    stored: Stored | None
    memory: MemoryEstimate | None
    expected: PerformanceProfile | None
    alone: PerformanceProfile | None
    engine_environment: Mapping[str, str]
    adapters: tuple[Adapter, ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        """The merged environment variables without their provenance."""
        return {name: str(setting.value) for name, setting in self.variables.items()}

    @property
    def method(self) -> Method | None:
        """The method of the method plugin."""
        return self.method_plugin.method if self.method_plugin else None

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that refuse the model."""
        return tuple(finding for finding in self.findings if finding.severity is Severity.ERROR)


def compose(
    model: ModelConfig,
    registry: Registry,
    target: Target,
    *,
    opened: Checkpoint | None = None,
    predict: bool = True,
) -> Composition:
    """Read the model's headers, choose its method and ask every composed plugin.

    Args:
        model: its config.
        registry: the plugins.
        target: the hardware.
        opened: its headers, where they have been read.
        predict: whether to predict its performance.

    Raises:
        UsageError: the config names a method or plugin that is not installed.
        CheckpointError: the checkpoint cannot be found or read at all.
        PluginError: a plugin this model needs is defective.
    """
    extra = [registry.find_plugin(name, model.where) for name in model.plugins]
    named = registry.find_method(model.quantization, model.where) if model.quantization else None
    opened = opened or open_checkpoint(
        model.source, revision=model.revision, allow_pickle=model.allow_pickle, readers=registry.readers
    )
    if reader := registry.reader_plugin(opened.container):
        extra.append(reader)
    adapters = open_adapters(model)
    checkpoint = overridden(opened, model.engine_kwargs.get("hf_overrides"))
    detected = Detected(named) if named else detect(checkpoint, registry)
    method_plugin = detected.plugin
    findings = [finding.said_by("core") for finding in detected.findings]

    plugins = tuple(dict.fromkeys([method_plugin, *extra] if method_plugin else extra))
    hooks = Hooks(plugins)
    method = method_plugin.method if method_plugin else None
    kwargs, conflicts = _merge_kwargs(
        hooks, checkpoint, model, target, method, lora_arguments(adapters, model.engine_kwargs)
    )
    variables, unsettled = _merge_variables(hooks, checkpoint, model, target)
    environment = {name: str(setting.value) for name, setting in variables.items()}
    effective = with_environment(with_kwargs(model, kwargs), environment)
    checkpoint = overridden(opened, effective.engine_kwargs.get("hf_overrides"))
    dtype = kwargs.get("dtype")
    dtype_by = dtype.source if dtype and dtype.source != "config" else ""
    checked_model = check_model(checkpoint, effective, target, method, dtype_by)
    findings += [finding if finding.source else finding.said_by("core") for finding in checked_model]
    findings += [one.said_by("core") for one in check_adapters(adapters, checkpoint, effective, target)]
    stored = None
    if method_plugin and method:
        said, stored = _check_schemes(hooks, method_plugin, method, checkpoint, effective)
        findings += said
    for plugin in plugins:
        findings += _validate(hooks, plugin, checkpoint, model, target)
    findings += _unsafe(kwargs, plugins)

    memory, said = estimate(checkpoint, effective, target, stored)
    if any(finding.code == "architecture-unsupported" for finding in findings):
        said = []  # nothing would run it
    expected = _expected(hooks, method_plugin, checkpoint, model, target) if predict else None
    argument = kwargs["quantization"].value if "quantization" in kwargs else None
    alone = None
    if predict and expected is None and method_plugin and memory and memory.fits:
        expected, alone = _predicted(
            hooks, method_plugin, checkpoint, effective, target, memory, argument, environment, stored
        )
    findings += [*conflicts, *unsettled, *(finding.said_by("core") for finding in said)]
    if detected.others and any(finding.severity is Severity.ERROR for finding in findings):
        findings.append(_also_claimed(detected.others))
    return Composition(
        model=model,
        checkpoint=checkpoint,
        target=target,
        method_plugin=method_plugin,
        plugins=plugins,
        engine_kwargs=kwargs,
        variables=variables,
        kernel=kernel_name(method_plugin, checkpoint, target, hooks, argument, environment, stored)
        if method_plugin
        else "",
        findings=tuple(findings),
        stored=stored,
        memory=memory,
        expected=expected,
        alone=alone,
        engine_environment=registry.engine_environment(
            plugins, own=target.device == "cpu", adapters=bool(effective.engine_kwargs.get("enable_lora"))
        ),
        adapters=adapters,
    )


def _also_claimed(others: Sequence[Plugin]) -> Finding:
    """A refused model may be in the format of a plugin that came second."""
    return Finding.info(
        "method-also-claimed",
        "other plugins claim this checkpoint as well",
        [plugin.label for plugin in others],
        "name the method in engine_kwargs.quantization if it is in the format of one of them",
    ).said_by("core")


def _ask(
    hooks: Hooks,
    plugin: Plugin,
    hook: str,
    take: Callable[[Any], Any],
    checkpoint: Checkpoint,
    model: ModelConfig,
    target: Target,
) -> Any:
    """Call one hook with copies, so that a plugin that changes its arguments changes nobody else's."""
    own = model.model_copy(deep=True)
    return hooks.call(plugin, hook, take, checkpoint=_copy_for(hooks, plugin, checkpoint), model=own, target=target)


def _copy_for(hooks: Hooks, plugin: Plugin, checkpoint: Checkpoint) -> Checkpoint:
    """One copy for all hooks of a plugin, so that what it computes once stays computed.

    What nobody can change it shares with the core: in a large mixture it costs a second.
    """
    copies, key = _copies(hooks), (plugin.name, id(checkpoint))
    if key not in copies:
        copies[key] = (checkpoint, own_copy(checkpoint))
        share(checkpoint, copies[key][1], linears, modules, undescribed)
    return copies[key][1]


@once
def _copies(hooks: Hooks) -> dict[tuple[str, int], tuple[Checkpoint, Checkpoint]]:
    return {}


def _check_schemes(
    hooks: Hooks, plugin: Plugin, method: Method, checkpoint: Checkpoint, model: ModelConfig
) -> tuple[list[Finding], Stored | None]:
    """How the method stores each linear, and what follows from that."""
    if not checkpoint.tensors_complete:
        return [], None  # which is the one thing to say
    every = (*linears(checkpoint), *undescribed(checkpoint))
    own = _copy_for(hooks, plugin, checkpoint)
    schemes = hooks.call_each(plugin, "quantserve_scheme", schemes_of, "linear", every, checkpoint=own)
    if schemes is None:
        return [], None
    by_name = dict(zip((linear.name for linear in every), schemes, strict=True))
    stored = stored_linears(checkpoint, lambda linear: by_name[linear.name])
    found = check_schemes(
        checkpoint,
        stored,
        code=code_of(method.name),
        skip=hooks.call(plugin, "quantserve_skip_list", skip_list_of, checkpoint=own),
        ranks=model.tensor_parallel_size,
        whole_experts=bool(model.engine_kwargs.get("enable_expert_parallel")),
    )
    return [finding.said_by(plugin.name) for finding in found], stored


def _validate(
    hooks: Hooks, plugin: Plugin, checkpoint: Checkpoint, model: ModelConfig, target: Target
) -> list[Finding]:
    names = [*(plugin.method.names if plugin.method else ()), plugin.name]
    take = partial(findings_of, names=names)
    findings, more = _ask(hooks, plugin, "quantserve_validate", take, checkpoint, model, target) or ([], "")
    said = [finding.said_by(plugin.name) for finding in findings]
    if more:
        message = (
            f"plugin {plugin.label} gave {more} more findings; the first {len(said):,} are shown, errors before others"
        )
        said.append(Finding.warning("findings-cut", message).said_by("core"))
    return said


def _merge_kwargs(
    hooks: Hooks,
    checkpoint: Checkpoint,
    model: ModelConfig,
    target: Target,
    method: Method | None,
    lora: Mapping[str, object],
) -> tuple[dict[str, Setting], list[Finding]]:
    """Merge what core, plugins and the user want; the user wins, plugins that disagree are named."""
    settings = Settings(
        "engine_kwargs", {key: value for key, value in model.engine_kwargs.items() if key != "quantization"}
    )
    if method and method.vllm_name:
        settings.add(CORE, {"quantization": method.vllm_name})
    settings.add(CORE, lora)
    for plugin in hooks.plugins:
        settings.add(plugin.name, _plugin_kwargs(hooks, plugin, checkpoint, model, target))
    return settings.merged(), settings.conflicts


def _merge_variables(
    hooks: Hooks, checkpoint: Checkpoint, model: ModelConfig, target: Target
) -> tuple[dict[str, Setting], list[Finding]]:
    """The same for environment variables."""
    hook, take = "quantserve_environment", partial(environment_of, reserved=CORE_VARIABLES)
    settings = Settings("engine_config.runtime_env.env_vars", configured_environment(model))
    for plugin in hooks.plugins:
        settings.add(plugin.name, _ask(hooks, plugin, hook, take, checkpoint, model, target) or {})
    return settings.merged(), settings.conflicts


def _plugin_kwargs(
    hooks: Hooks, plugin: Plugin, checkpoint: Checkpoint, model: ModelConfig, target: Target
) -> Mapping[str, object]:
    hook = "quantserve_engine_kwargs"
    take = partial(kwargs_of, reserved=CORE_KEYS)
    kwargs, wrong = checked(_ask(hooks, plugin, hook, take, checkpoint, model, target) or {})
    if wrong:
        raise plugin.defect(hook, wrong)
    return kwargs


def _unsafe(kwargs: Mapping[str, Setting], plugins: Sequence[Plugin]) -> Iterator[Finding]:
    """Warn of arguments with which a plugin makes vLLM run code; the user's own are the user's decision."""
    for plugin in plugins:
        own = {key: setting.value for key, setting in kwargs.items() if plugin.name in setting.sources}
        for key, what in unsafe(own):
            yield Finding.warning(
                "plugin-unsafe-argument",
                f"plugin {plugin.label} sets the engine argument {key}: {what}",
                [f"engine_kwargs.{key}"],
                f"set {key.partition('.')[0]} in engine_kwargs, which wins, or leave the plugin out",
            ).said_by("core")


def with_kwargs(model: ModelConfig, kwargs: Mapping[str, Setting]) -> ModelConfig:
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
    return _ask(hooks, plugin, hook, profile_of, checkpoint, model, target)  # type: ignore[no-any-return]


def _predicted(
    hooks: Hooks,
    plugin: Plugin,
    checkpoint: Checkpoint,
    model: ModelConfig,
    target: Target,
    memory: MemoryEstimate,
    argument: object,
    environment: Mapping[str, str],
    stored: Stored | None,
) -> tuple[PerformanceProfile | None, PerformanceProfile | None]:
    """For `EXPECTED_WORKLOAD`, and for one request at a time."""
    made = expectation(
        plugin, checkpoint, model, target, memory,
        hooks=hooks, argument=argument, environment=environment, stored=stored,
    )  # fmt: skip
    if made is None:
        return None, None
    several, alone = (as_profile(made, made.predict(load), target) for load in (EXPECTED_WORKLOAD, ALONE))
    return several, alone
