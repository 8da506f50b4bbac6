"""How a plugin is installed, imported and asked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from quantserve.hookspecs import API_VERSION
from quantserve.planning.compose import Composition
from quantserve.plugins.entry_points import named_for
from quantserve.plugins.registry import ENGINE_GROUP, GROUP
from quantserve.testing.case import CAPABILITIES
from quantserve.testing.check import Skip, check
from quantserve.testing.child import ask
from quantserve.testing.subject import Subject, engine_available

_IMPORT: Final = """
import importlib, time
import quantserve.api
before, began = set(sys.modules), time.process_time()
module, _, name = sys.argv[1].partition(":")
importlib.import_module(module)
took = time.process_time() - began
heavy = sorted({name.partition(".")[0] for name in set(sys.modules) - before} & set(sys.argv[2].split(",")))
answer([heavy, took])
"""
_BESIDE: Final = """
from quantserve.plugins.registry import Registry
registry = Registry.load()
name = sys.argv[1]
failures = [f'{f.stage}: {f.reason}' for f in registry.failures if f.name == name]
plugin = registry.plugins.get(name)
notes = [note for note in plugin.notes if "is dropped" in note or "does not read" in note] if plugin else []
answer(failures or notes or ([] if plugin else [f"{name} is not among the plugins: {sorted(registry.plugins)}"]))
"""
HEAVY: Final = ("torch", "vllm", "ray", "transformers", "numpy", "pydantic", "safetensors", "triton")
SLOWEST: Final = 1.0
"""Seconds of processor time of an import."""


@check("S01-loads")
def loads(subject: Subject) -> Iterator[str]:
    """The plugin is imported, and its hooks, its method and its reader keep their contracts.

    Fix: the line says what the registry refused; `help(quantserve.hookspecs)` has the contracts.
    """
    if subject.plugin is None:
        yield subject.why


@check("S02-light-import")
def light_import(subject: Subject) -> Iterator[str]:
    """A fresh process that imports the light module imports no torch, vLLM, Ray, numpy or pydantic, within a second.

    Fix: import `quantserve.api` and the standard library only; `ModelConfig` under TYPE_CHECKING, and what is heavy in
    another module that the hooks name as text.
    """
    answer = ask(_IMPORT, subject.point.value, ",".join(HEAVY))
    if answer.problem:
        if subject.plugin is None:
            raise Skip("the plugin does not load")
        yield f"importing {subject.point.value} in a process of its own: {answer.problem}"
        return
    heavy, took = answer.value
    if heavy:
        yield f"importing {subject.point.value} brings in {', '.join(heavy)}"
    if took > SLOWEST:
        yield f"importing {subject.point.value} takes {took:.1f} s of processor time"


@check("S03-beside-others", "loaded")
def beside_others(subject: Subject) -> Iterator[str]:
    """Beside every other installed plugin, in a fresh process, it loads and keeps all its names, aliases and suffixes.

    Fix: choose names that no other plugin has, and call the distribution quantserve-NAME.
    """
    answer = ask(_BESIDE, subject.case.name, environ={"QUANTSERVE_PLUGINS": "", "QUANTSERVE_DISABLE": ""})
    yield from [answer.problem] if answer.problem else answer.value


@check("S04-hooks", "loaded")
def hooks(subject: Subject) -> Iterator[str]:
    """Every hook, asked about the good checkpoint on each device, keeps its contract: types, names, plain JSON, time.

    Fix: the line names the hook and the value; docs/plugins.md has a section for each hook.
    """
    for target in subject.targets:
        subject.composed(target=target)
    yield from ()


@check("S05-same-answers", "loaded")
def same_answers(subject: Subject) -> Iterator[str]:
    """Asked twice, the hooks give the same findings, engine arguments and variables.

    Fix: decide from the arguments alone; keep no state between calls, and no sets in texts.
    """
    for target in subject.targets:
        first, second = (_said(subject.composed(replace(subject.good), target)) for _ in range(2))
        for one, two in zip(first, second, strict=True):
            if one != two:
                yield f"{one} and then {two}"


def _said(composition: Composition) -> list[str]:
    findings = [finding.to_json() for finding in composition.findings]
    return [str(findings), str(composition.engine_kwargs), str(composition.variables), str(composition.stored)]


@check("S06-entry-points")
def entry_points(subject: Subject) -> Iterator[str]:
    """An engine side has the name of the light module in both groups, and every one of the distribution has one.

    Fix: give the entry points of `quantserve.plugins` and `vllm.general_plugins` the same name.
    """
    mine = {
        group: {p.name for p in subject.points.select(group=group) if p.dist and p.dist.name == subject.distribution}
        for group in (GROUP, ENGINE_GROUP)
    }
    if only := mine[ENGINE_GROUP] - mine[GROUP]:
        yield f"{ENGINE_GROUP} has {', '.join(sorted(only))}, which {GROUP} lacks: no model would ever load it"
    method = subject.method
    if method and method.vllm_name and not subject.sides and not _known_to_vllm(method.vllm_name):
        yield f"vLLM does not have {method.vllm_name!r}, and {ENGINE_GROUP} has no entry point {subject.case.name!r}"


def _known_to_vllm(name: str) -> bool:
    from quantserve.families import quantization_methods

    return name in quantization_methods()


@check("S07-distribution")
def distribution(subject: Subject) -> Iterator[str]:
    """The distribution is called quantserve-NAME, requires quantserve below its next version, and names its licence.

    Fix: in pyproject.toml: `dependencies = ["quantserve>=0.1,<0.2"]`, `license`, `requires-python`.
    """
    dist = subject.point.dist
    if dist is None:
        yield "the entry point has no distribution"
        return
    if not named_for(subject.distribution, subject.case.name):
        yield f"the distribution is called {subject.distribution!r}, not quantserve-{subject.case.name}"
    lines = [line for line in dist.requires or () if re.match(r"quantserve(?![\w.-])", line)]
    if not lines:
        yield "the distribution does not require quantserve"
    elif not any("<" in line or "~=" in line or "==" in line for line in lines):
        yield f"{lines[0]!r} has no upper bound, so that a version with another API would be installed with it"
    for keys in (("License-Expression", "License"), ("Requires-Python",), ("Summary",)):
        if not any(key in dist.metadata for key in keys):
            yield f"the metadata has no {keys[0]}"


@check("S08-typed")
def typed(subject: Subject) -> Iterator[str]:
    """The package has a file py.typed, so that type checkers read its annotations.

    Fix: add an empty file `py.typed` beside `__init__.py`, and see that the wheel holds it.
    """
    package = subject.point.module.partition(".")[0]
    spec = find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if folders and not any(Path(folder, "py.typed").exists() for folder in folders):
        yield f"{package} has no py.typed"


@check("S09-api-version", "method")
def api_version(subject: Subject) -> Iterator[str]:
    """The method is for the API of this kit, and it has the name of its entry point.

    Fix: `Method(api=...)` is `quantserve.api.VERSION` of the version that the plugin was written for.
    """
    method = subject.method
    assert method is not None
    if method.api != API_VERSION:
        yield f"Method.api is {method.api}, and the kit's version is {API_VERSION}"
    if subject.case.name not in method.names:
        yield f"the entry point {subject.case.name!r} is none of the method's names {list(method.names)}"


@check("S10-capabilities", "loaded")
def capabilities(subject: Subject) -> Iterator[str]:
    """The capabilities of the case are those that the method and the hooks tell.

    Fix: correct the case, or `Method.devices` and the hooks.
    """
    declared = subject.case.capabilities
    if declared is not None:
        told = {*CAPABILITIES} - {"experts", "tensor-parallel"}
        for name in sorted((set(declared) ^ subject.told) & told):
            where, other = ("case", "plugin") if name in declared else ("plugin", "case")
            yield f"the {where} has the capability {name!r}, and the {other} does not"
    if "experts" in subject.facts and not any(linear.experts for linear in subject.quantized):
        yield "the case has the capability 'experts', and its checkpoint has no quantized experts"


@check("S11-register", "engine-side")
def register(subject: Subject) -> Iterator[str]:
    """`register()` can be called twice, makes vLLM know the method, and leaves environment and folder alone.

    Fix: register only what is not registered yet, as `quantserve_kernels.vllm.register` does.
    """
    yield from layer_problems(subject, "register")


@check("S12-override", "engine-side")
def override(subject: Subject) -> Iterator[str]:
    """`override_quantization_method` accepts `hf_config`, and claims no checkpoint that declares another method.

    Fix: give it the parameters `(hf_quant_cfg, user_quant, hf_config=None)`; return None for other methods.
    """
    yield from layer_problems(subject, "override")


def layer_problems(subject: Subject, name: str) -> list[str]:
    """What the process with vLLM found under a name.

    Raises:
        Skip: the plugin does not load, there is no vLLM, or nothing was there to be checked.
    """
    if subject.plugin is None:
        raise Skip("the plugin does not load")
    if why := engine_available():
        raise Skip(why)
    answer = subject.layers
    if answer.problem:
        return [f"in a process with vLLM: {answer.problem}"]
    found: list[str] | None = answer.value.get(name)
    if found is None:
        raise Skip("nothing to check with these layers")
    return found
