"""What a plugin does to other models, and to what it is given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import EntryPoints
from inspect import signature

from quantserve.errors import PluginError, QuantserveError
from quantserve.planning.detection import detect
from quantserve.plugins import foreign
from quantserve.plugins.entry_points import origin
from quantserve.plugins.registry import Registry
from quantserve.testing.check import check
from quantserve.testing.checks.seam import layer_problems
from quantserve.testing.quick import quick
from quantserve.testing.samples import SAMPLES, Sample
from quantserve.testing.subject import Subject


@check("I01-arguments", "loaded")
def arguments(subject: Subject) -> Iterator[str]:
    """The hooks change nothing of what they are given.

    Fix: copy before you change: `{**config}`.
    """
    config, files = copy.deepcopy((subject.good.config, subject.good.quant_files))
    method = subject.method
    for target in subject.targets:
        subject.composed(target=target)
    plugin, module = subject.loaded, subject.loaded.module
    for hook in ("quantserve_detect", "quantserve_skip_list", "quantserve_engine_kwargs", "quantserve_validate"):
        function = getattr(module, hook, None)
        if function is None:
            continue
        model, target = subject.model(), subject.targets[0]
        given = {"checkpoint": subject.good, "model": model, "target": target}
        kept = model.model_dump()
        plugin.run(hook, partial(_call, function, given), foreign.hook_seconds())
        if model.model_dump() != kept:
            yield f"{hook} changes the model's config"
        if (subject.good.config, subject.good.quant_files) != (config, files):
            yield f"{hook} changes the checkpoint's config"
            return
    if subject.method != method:
        yield "a hook changes the method"


def _call(function: Callable[..., object], given: Mapping[str, object]) -> None:
    """Call a hook with what it takes, and run a generator to its end."""
    returned = function(*(given[name] for name in signature(function).parameters))
    if isinstance(returned, Iterator):
        list(returned)


@check("I02-other-models", "method")
def other_models(subject: Subject) -> Iterator[str]:
    """Models in the formats of other installed plugins get the same method with this plugin as without.

    Fix: claim less (D02, D03), and no names of others (S03).
    """
    others = EntryPoints(point for point in subject.points if origin(point)[0] != subject.distribution)
    without, together = quick(Registry.load({}, others)), quick(Registry.load({}, subject.points))

    def owners(name: str) -> tuple[str, str]:
        after = _owner(together, SAMPLES[name])
        return after, _owner(without, SAMPLES[name]) if after in ("", subject.case.name) else after

    for name, made in subject.guard.each(owners, SAMPLES):
        if isinstance(made, PluginError):
            raise made
        after, before = made
        if before not in ("", after):
            yield f"the sample {name!r} is served by {before}, and with this plugin by {after or 'nobody'}"


def _owner(registry: Registry, sample: Sample) -> str:
    """The plugin that gets a sample; "" for none."""
    try:
        plugin = detect(sample.checkpoint(), registry).plugin
    except QuantserveError:  # another plugin's defect
        return ""
    return plugin.name if plugin else ""


@check("I03-engines", "engine-side")
def engines(subject: Subject) -> Iterator[str]:
    """`register()` leaves vLLM's other methods, its own kernels' table and this process as they are.

    Fix: register your method only; a method of vLLM's own is replaced in engines that ask for the plugin alone
    (`quantserve_kernels.vllm.serves_cpus`).
    """
    yield from layer_problems(subject, "engines")
