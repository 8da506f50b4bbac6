"""Which plugin serves a checkpoint whose config names no method.

The plugin whose method has or accepts the declared ``quant_method`` is asked first, and its claim is enough. Otherwise
every plugin is asked. Of several claims those of plugins that claim a made-up checkpoint as well do not count, and a
method of this project comes before others, so that a newcomer which claims too much takes down no method.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from quantserve.checkpoint import Checkpoint, Tensor
from quantserve.checks.formats import FORMATS, format_of, format_title, plugin_of, who_serves
from quantserve.errors import PluginError, unknown_name
from quantserve.finding import Finding, Severity
from quantserve.plugins.claims import OURS, is_ours
from quantserve.plugins.contract import claim_of
from quantserve.plugins.registry import Hooks, Plugin, Registry, how_to_install

HOOK = "quantserve_detect"
NOBODYS = "quantserve-no-such-method"


@dataclass(frozen=True)
class Detected:
    """What detection came to.

    Attributes:
        plugin: the one that serves the checkpoint, None when there is none.
        findings: why there is none.
        others: plugins that claim it as well and came second.
    """

    plugin: Plugin | None
    findings: tuple[Finding, ...] = ()
    others: tuple[Plugin, ...] = ()


def detect(checkpoint: Checkpoint, registry: Registry) -> Detected:
    """Choose the plugin that serves a checkpoint.

    Raises:
        PluginError: the plugin that would serve it is defective.
        UsageError: it is switched off.
    """
    candidates = [plugin for plugin in registry.plugins.values() if plugin.method]
    hooks = Hooks(candidates)
    given = (checkpoint.quantization_config or {}).get("quant_method")
    declared = given.strip().lower() if isinstance(given, str) else ""
    owner = registry.methods.get(declared) or _that_accepts(candidates, declared)
    if owner and _claims(hooks, owner, checkpoint):
        return Detected(owner)

    claimants: list[Plugin] = []
    defects: list[PluginError] = []
    for plugin in candidates:
        if plugin is owner:
            continue
        try:
            if _claims(hooks, plugin, checkpoint):
                claimants.append(plugin)
        except PluginError as error:
            defects.append(error)
    if len(claimants) > 1:
        claimants = [plugin for plugin in claimants if not _claims_anything(hooks, plugin, checkpoint)] or claimants
    if len(claimants) == 1:
        return Detected(claimants[0])
    if claimants:
        ours = [plugin for plugin in claimants if is_ours(plugin)]
        if len(ours) == 1:
            return Detected(ours[0], others=tuple(plugin for plugin in claimants if plugin is not ours[0]))
        return Detected(None, (_ambiguous(claimants),))
    if defects and not declared:
        raise defects[0]
    if declared:
        # A broken or switched-off plugin that would have served the declared method is the real cause: say so.
        registry.why_unusable(declared)
    elif not checkpoint.tensors and any(problem.severity is Severity.ERROR for problem in checkpoint.problems):
        return Detected(None)  # nothing could be read, which the problems say
    return Detected(None, (_not_detected(registry, checkpoint, str(given) if declared else "", defects),))


def _that_accepts(candidates: Sequence[Plugin], declared: str) -> Plugin | None:
    """The one plugin whose method takes files that declare this name, though it has another."""
    found = [p for p in candidates if p.method and declared in (p.method.vllm_name, *p.method.accepts)]
    return found[0] if declared and len(found) == 1 else None


def own_copy(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with read-only tensors and files and a config of its own, for one hook."""
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
        metadata=MappingProxyType(checkpoint.metadata),
    )


def _claims(hooks: Hooks, plugin: Plugin, checkpoint: Checkpoint) -> bool:
    return bool(hooks.call(plugin, HOOK, claim_of, checkpoint=own_copy(checkpoint)))


def _claims_anything(hooks: Hooks, plugin: Plugin, checkpoint: Checkpoint) -> bool:
    """Whether a plugin claims a checkpoint that declares a method of nobody."""
    config = {**checkpoint.config, "quantization_config": {"quant_method": NOBODYS}}
    name = "model.embed_tokens.weight"
    made_up = replace(checkpoint, config=config, quant_files={}, tensors={name: Tensor(name, "F16", (8, 8))})
    try:
        return _claims(hooks, plugin, made_up)
    except PluginError:
        return False


def _ambiguous(claimants: Sequence[Plugin]) -> Finding:
    disable = " or ".join(f"QUANTSERVE_DISABLE={plugin.name}" for plugin in claimants if not is_ours(plugin))
    return Finding.error(
        "method-ambiguous",
        f"{len(claimants)} plugins claim this checkpoint",
        [plugin.label for plugin in claimants],
        "name the method in engine_kwargs.quantization" + (f", or leave one plugin out: {disable}" if disable else ""),
    )


def _not_detected(registry: Registry, checkpoint: Checkpoint, declared: str, defects: Sequence[PluginError]) -> Finding:
    known = sorted(registry.methods)
    form = format_of(checkpoint)
    if form and form[0] not in registry.methods:
        name, where = form
        message = (
            f"the checkpoint is in the {format_title(name)} format ({name!r} by {where}), which no installed plugin "
            f"serves (installed methods: {', '.join(known) or 'none'})"
        )
        if who := who_serves(name, OURS):
            message += f"; {who}"
        elsewhere = name in FORMATS and FORMATS[name].elsewhere
        fix = (
            f"serve it with {elsewhere}, or choose another format of this model"
            if elsewhere
            else how_to_install(plugin_of(name))
        )
    elif owner := registry.methods.get(declared.strip().lower()):
        message = f"the checkpoint declares the method {declared[:80]!r}, but {owner.label} does not claim it"
        fix = f"name the method in engine_kwargs.quantization, or ask the author of {owner.distribution} why"
    elif declared:
        message = f"the checkpoint declares {unknown_name('quantization method', declared[:80], known)}"
        fix = how_to_install(declared)
    else:
        message = f"no installed plugin recognises this checkpoint (installed methods: {', '.join(known) or 'none'})"
        fix = "name the method in engine_kwargs.quantization, or install its plugin"
    absent = [
        *(f"{failure.label} failed at stage {failure.stage!r}: {failure.reason}" for failure in registry.failures),
        *(f"{error.plugin} ({error.distribution} {error.version}) failed: {error.reason}" for error in defects),
        *(f"{entry.label} is switched off: {entry.reason}" for entry in registry.disabled),
    ]
    if absent:
        message += f"; {len(absent)} installed plugins could not be asked"
        fix += "; or repair or switch on the plugin of this format among those listed"
    return Finding.error("method-not-detected", message, absent, fix)
