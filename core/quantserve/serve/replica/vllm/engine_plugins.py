"""Loads the engine sides of a model's plugins in vLLM's processes; vLLM calls it as a general plugin.

vLLM itself would load every general plugin of the right name, from whichever distribution, and report a failing one
without a name. Here each is called under a guard: an exception, damage to the environment and a call that does not end
become an error that names plugin, distribution, version and the stage ``register``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import partial
from importlib.metadata import EntryPoints, entry_points

from quantserve.errors import PluginError
from quantserve.plugins import foreign
from quantserve.plugins.entry_points import origin, package_of, resolve
from quantserve.plugins.registry import ADAPTERS_VARIABLE, ENGINE_GROUP, ENGINE_PLUGINS_VARIABLE
from quantserve.serve.replica.vllm import patches

STAGE = "register"


def register() -> None:
    """Load the plugins of this model and apply the patches of the engine's processes."""
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()  # may set variables, for which no plugin is to blame
    load_plugins(os.environ)
    patches.apply("rule-cache")
    if on_cpu:
        patches.apply("sched-yield")
        patches.apply("gloo-device")
        patches.apply("token-ranks")
        if os.environ.get(ADAPTERS_VARIABLE):
            patches.apply("adapter-rows")
    if "quantserve_kernels.vllm.linear_kernels" in sys.modules:  # a plugin of this model brought them
        patches.apply("exact-scales")


def load_plugins(environ: Mapping[str, str], installed: EntryPoints | None = None) -> None:
    """Call ``register()`` of every plugin that ``QUANTSERVE_ENGINE_PLUGINS`` names.

    Raises:
        PluginError: one is not installed here, or failed.
    """
    points = entry_points(group=ENGINE_GROUP) if installed is None else installed.select(group=ENGINE_GROUP)
    for side in filter(None, environ.get(ENGINE_PLUGINS_VARIABLE, "").split(",")):
        distribution, _, name = side.partition(":")
        point = next((p for p in points if p.name == name and origin(p)[0] == distribution), None)
        if point is None:
            fix = f"install {distribution} on every node of the cluster"
            raise PluginError(name, distribution, "?", STAGE, "it is not installed on this machine", fix)
        version = origin(point)[1]
        what = f"plugin {name} ({distribution} {version}) at stage {STAGE!r}"
        seconds = foreign.hook_seconds(environ) * foreign.REGISTER_PARTS
        try:
            foreign.run(foreign.run(partial(resolve, point), what, seconds), what, seconds)
        except foreign.Raised as raised:
            reason = foreign.reason(raised.error, package_of(point))
            raise PluginError(name, distribution, version, STAGE, reason) from raised.error
