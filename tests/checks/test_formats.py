"""Every format of docs/formats.md, as its tool writes it: one plugin claims it, or a refusal names what serves it.

A plugin that is not installed here counts as one that a user lacks: the refusal has to say which to install.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from quantserve.checks.formats import FORMATS
from quantserve.families import quantization_methods
from quantserve.planning.detection import detect
from quantserve.plugins.claims import OURS
from quantserve.plugins.registry import Hooks, Registry
from quantserve.testing import SAMPLES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.load({})


@pytest.mark.parametrize("name", SAMPLES)
def test_every_format_has_one_claimant_or_a_refusal_that_helps(name: str, registry: Registry) -> None:
    sample = SAMPLES[name]
    checkpoint = sample.checkpoint()
    candidates = [plugin for plugin in registry.plugins.values() if plugin.method]
    hooks = Hooks(candidates)
    claimants = [p.name for p in candidates if hooks.call(p, "quantserve_detect", bool, checkpoint=checkpoint)]
    detected = detect(checkpoint, registry)
    if sample.owner in registry.plugins:
        assert claimants == [sample.owner]
        assert detected.plugin is not None
        assert detected.plugin.name == sample.owner
        return
    assert claimants == []
    (finding,) = detected.findings
    known = FORMATS[sample.format]
    assert finding.code == "method-not-detected"
    assert known.title in finding.message
    assert known.tool in finding.message
    if known.elsewhere:
        assert known.elsewhere in finding.message
        assert known.elsewhere in finding.fix
    elif sample.owner in OURS:
        assert f"pip install 'quantserve[{sample.owner}]'" in finding.fix
    elif sample.format in quantization_methods():
        assert "serves it by itself" in finding.message
        assert f"quantserve-{sample.owner}" not in finding.message  # there is none to install


def test_a_plugin_that_a_user_lacks_is_named_with_the_command() -> None:
    registry = Registry.load({"QUANTSERVE_PLUGINS": "fp16"})
    for name, sample in SAMPLES.items():
        declared = (sample.checkpoint().quantization_config or {}).get("quant_method")
        if sample.owner not in OURS or sample.owner == "fp16" or declared:
            continue  # a declared method whose plugin is switched off is another message
        (finding,) = detect(sample.checkpoint(), registry).findings
        assert finding.fix.startswith(f"`pip install 'quantserve[{sample.owner}]'`"), name


def test_every_format_is_here() -> None:
    assert {sample.format for sample in SAMPLES.values()} >= FORMATS.keys() - {"gguf"}  # a container: see the readers


def test_the_documentation_has_every_format_and_plugin() -> None:
    page = (ROOT / "docs" / "formats.md").read_text()
    missing = [one.title for one in FORMATS.values() if not re.search(rf"\b{re.escape(one.title)}", page)]
    missing += [name for name in OURS if f"(../plugins/{name}/README.md)" not in page]
    assert not missing


def test_the_documentation_names_every_tensor_of_a_served_format() -> None:
    page = (ROOT / "docs" / "formats.md").read_text()
    served = [sample for sample in SAMPLES.values() if sample.owner in OURS]
    suffixes = {suffix.removeprefix("experts.") for sample in served for suffix in sample.tensors}
    assert not [suffix for suffix in sorted(suffixes) if f"`{suffix}`" not in page]


def test_no_name_belongs_to_two_plugins(registry: Registry) -> None:
    """Of plugins from outside the registry settles that; this project's own must not need it."""
    said = [plugin.module.quantserve_method() for plugin in registry.plugins.values() if plugin.name in OURS]
    names = [name for method in said for name in method.names]
    assert sorted(names) == sorted(set(names))
