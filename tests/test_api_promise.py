"""The plugin API changes with its version only, and what will go says so at the author's line before."""

from __future__ import annotations

import importlib.util
import json
import re
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helpers.dists import Site
from quantserve import api, hookspecs
from quantserve.plugins.registry import Registry

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "api.json"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("api_surface", ROOT / "scripts" / "api_surface.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_version_was_raised_with_the_api(script: ModuleType) -> None:
    golden = json.loads(GOLDEN.read_text())
    version = (api.VERSION, api.MINOR)
    assert script.problem(golden, version, script.surface()) == ""
    assert (golden["version"], golden["surface"]) == (list(version), script.surface()), (
        "run scripts/api_surface.py --write"
    )


def test_the_documentation_has_this_version() -> None:
    version = f"{api.VERSION}.{api.MINOR}"
    assert f"this is API {version}" in str(api.__doc__)
    assert f"now {version}." in (ROOT / "docs" / "plugins.md").read_text()
    assert f"## {version}\n" in (ROOT / "docs" / "api-changes.md").read_text()


@pytest.mark.parametrize(
    ("change", "version", "says"),
    [
        (lambda new: None, (1, 5), ""),
        (lambda new: new.pop("Scheme.bits"), (1, 6), "API_VERSION has to rise above 1: Scheme.bits is gone"),
        (lambda new: new.pop("quantserve_detect(checkpoint)"), (1, 5), "quantserve_detect(checkpoint) is gone"),
        (lambda new: new.pop("Scheme.bits"), (2, 0), ""),
        (
            lambda new: new.update({"Method.bits": "int"}),
            (1, 5),
            "API_MINOR has to rise above 5: Method.bits: 'int', was",
        ),
        (lambda new: new.update({"Method.bits": "int"}), (1, 6), ""),
        (lambda new: new.update({"Method.colour": "str = ''"}), (1, 5), "Method.colour is new"),
        (lambda new: new.update({"Method.colour": "str = ''"}), (1, 6), ""),
        (lambda new: new.update({"Method.colour": "str"}), (1, 6), "API_VERSION has to rise above 1: Method.colour is"),
        (lambda new: new.update({"check_shards(more)": "int"}), (1, 6), "check_shards(more) is new and required"),
        (lambda new: new.update({"check_shards(more)": "int = 1"}), (1, 6), ""),
        (lambda new: new.update({"quantserve_detect(more)": "int"}), (1, 6), ""),
        (
            lambda new: new.update({"quantserve_new()": "int"}),
            (1, 5),
            "API_MINOR has to rise above 5: quantserve_new()",
        ),
        (lambda new: new.update({"Scheme.colour": "property"}), (1, 6), ""),
    ],
)
def test_what_needs_which_version(script: ModuleType, change: Any, version: tuple[int, int], says: str) -> None:
    new = dict(script.surface())
    change(new)
    found = script.problem({"version": [1, 5], "surface": script.surface()}, version, new)
    assert says in found
    assert bool(says) == bool(found)


def test_the_surface_is_that_of_the_api(script: ModuleType) -> None:
    """It has every public name, every hook's parameters and every field of what plugins make and get."""
    surface = script.surface()
    names = {re.split(r"[.(]", key)[0] for key in surface if not key.startswith("testing.")}
    assert {*api.__all__} - {"VERSION", "MINOR"} <= names
    fields = {f"{kind}.{name}" for kind in ("Method", "Scheme", "Linear", "Finding") for name in fields_of(kind)}
    assert fields <= surface.keys()
    assert surface["Method.aliases"] == "tuple[str, ...] = ()"
    assert {"quantserve_kernel(experts)", "check_shards(code)", "testing.Case.reference"} <= surface.keys()


def fields_of(kind: str) -> list[str]:
    return list(getattr(api, kind).__dataclass_fields__)


def test_the_changelog_for_authors_has_every_version() -> None:
    text = (ROOT / "docs" / "api-changes.md").read_text()
    versions = re.findall(r"^## (\d+)\.(\d+)$", text, re.MULTILINE)
    assert [tuple(map(int, version)) for version in versions] == [
        (api.VERSION, minor) for minor in range(api.MINOR, -1, -1)
    ]


def test_the_changelog_for_authors_names_what_came_after_1_0() -> None:
    text = (ROOT / "docs" / "api-changes.md").read_text()
    old = (ROOT / "tests/data/old4/src/quantserve_old4/plugin.py").read_text()
    assert [name for name in api.__all__ if not re.search(rf"\b{name}\b", old) and f"`{name}`" not in text] == []


def test_a_name_that_has_aged_warns_at_the_line_that_imports_it(site: Site) -> None:
    site.install("old", "from quantserve.api import Part\nfrom quantserve.api import Expected, check_linears\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        registry = Registry.load({}, site.entry_points())
    assert registry.failures == ()
    said = {(Path(one.filename).name, one.lineno, str(one.message).partition(" is ")[0]) for one in caught}
    assert {("old_plugin.py", 2, f"quantserve.api.{name}") for name in ("Expected", "check_linears")} <= said
    assert "since API 1.2 and goes with version 2: write Part" in " ".join(str(one.message) for one in caught)


def test_a_hook_that_has_aged_warns_at_the_line_that_implements_it(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hook has, so far: pluggy's `warn_on_impl` is what a hook gets then."""
    warning = DeprecationWarning("quantserve_quality is deprecated since API 1.9: nobody asks")
    monkeypatch.setitem(hookspecs.quantserve_quality.quantserve_spec, "warn_on_impl", warning)  # type: ignore[attr-defined]
    site.install(
        "old", "from quantserve.api import hookimpl\n\n@hookimpl\ndef quantserve_quality(bits):\n    return None\n"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        registry = Registry.load({}, site.entry_points())
    assert registry.failures == ()
    found = [one for one in caught if one.message is warning]
    assert found
    assert {(Path(one.filename).name, one.lineno in (3, 4)) for one in found} == {("old_plugin.py", True)}


def test_the_names_that_have_aged_are_the_same_objects() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert api.Expected is api.Part
        assert callable(api.check_linears)
        assert callable(api.check_fused_groups)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        api.nothing  # type: ignore[attr-defined]  # noqa: B018
