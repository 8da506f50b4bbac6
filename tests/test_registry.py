"""Discovery and isolation: every way a plugin can be broken is a row, and harms nobody else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.dists import METHOD, Site
from quantserve.errors import PluginError, UsageError
from quantserve.registry import Hooks, Registry

HOOK = "from quantserve.api import hookimpl\n@hookimpl\n"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.syspath_prepend(str(tmp_path))
    site = Site(tmp_path)
    yield site
    site.forget()


def load(site: Site, **environ: str) -> Registry:
    return Registry.load(environ, site.entry_points())


def only_failure(registry: Registry, stage: str) -> str:
    assert [failure.stage for failure in registry.failures] == [stage]
    return registry.failures[0].reason


def test_a_good_plugin_is_found_with_its_origin(site: Site) -> None:
    site.method("quantserve-good", "good", ("fine",), name="good", version="1.2.3")
    registry = load(site)
    plugin = registry.find_method("fine")
    assert (plugin.name, plugin.distribution, plugin.version) == ("good", "quantserve-good", "1.2.3")
    assert plugin is registry.find_plugin("good")
    assert not plugin.has_engine_side


@pytest.mark.parametrize(
    ("code", "stage", "reason"),
    [
        ("import nothing_of_that_name", "load", "nothing_of_that_name"),
        ("def broken(:", "load", "SyntaxError"),
        ("raise SystemExit(3)", "load", "SystemExit"),
        (HOOK + "def quantserve_valdate(checkpoint): ...", "hooks", "quantserve_validate"),
        (HOOK + "def quantserve_detect(chekpoint): ...", "hooks", "chekpoint"),
        (HOOK + "def quantserve_detect(*, checkpoint): ...", "hooks", "positional"),
        ("def quantserve_detect(checkpoint): ...", "hooks", "@hookimpl"),
        (HOOK + "def quantserve_method(): raise KeyError('bits')", "method", "bits"),
        (HOOK + "def quantserve_method(): return 'int8'", "method", "str"),
        (METHOD.format(name="Upper", aliases=()), "method", "'Upper'"),
        (METHOD.format(name="twice", aliases=("twice",)), "method", "'twice'"),
    ],
)  # fmt: skip
def test_a_broken_plugin_is_a_row_and_the_others_stay(site: Site, code: str, stage: str, reason: str) -> None:
    site.method("quantserve-good", "good", name="good")
    site.install("quantserve-bad", code, name="bad", version="0.9")
    registry = load(site)
    assert set(registry.plugins) == {"good"}
    assert reason in only_failure(registry, stage)
    with pytest.raises(PluginError, match=r"quantserve-bad 0\.9") as caught:
        registry.find_method("bad")
    assert caught.value.exit_code == 3


def test_two_distributions_with_one_entry_point_name_both_lose(site: Site) -> None:
    site.method("quantserve-one", "one", name="same")
    site.method("quantserve-two", "two", name="same", version="2.0")
    registry = load(site)
    assert not registry.plugins
    assert [failure.stage for failure in registry.failures] == ["duplicate", "duplicate"]
    assert all("quantserve-one 1.0 and quantserve-two 2.0" in failure.reason for failure in registry.failures)


def test_two_plugins_with_one_method_name_or_alias_both_lose(site: Site) -> None:
    site.method("quantserve-a", "a", ("shared",), name="a")
    site.method("quantserve-b", "shared", name="b")
    site.method("quantserve-c", "c", name="c")
    registry = load(site)
    assert set(registry.plugins) == {"c"}
    assert {failure.name for failure in registry.failures} == {"a", "b"}
    with pytest.raises(PluginError, match=r"quantserve-a 1\.0.*quantserve-b 1\.0"):
        registry.find_method("shared")


def test_an_engine_side_claimed_by_a_stranger_is_refused(site: Site) -> None:
    site.method("quantserve-mine", "mine", name="mine", engine={"mine": "os:getcwd"})
    site.method("quantserve-thief", "thief", name="thief", engine={"mine": "os:abort"})
    registry = load(site)
    assert set(registry.plugins) == {"thief"}
    assert "quantserve-mine and quantserve-thief" in only_failure(registry, "engine")


def test_vllm_plugins_names_exactly_what_is_composed(site: Site) -> None:
    site.method("quantserve-x", "x", name="x", engine={"x": "os:getcwd", "other": "os:abort"})
    site.method("quantserve-y", "y", name="y", engine={"y": "os:abort"})
    site.method("quantserve-z", "z", name="z")
    (site.path / "platform-1.0.dist-info").mkdir()
    (site.path / "platform-1.0.dist-info" / "METADATA").write_text("Name: platform\nVersion: 1.0\n")
    (site.path / "platform-1.0.dist-info" / "entry_points.txt").write_text(
        "[vllm.platform_plugins]\nnpu = os:getcwd\n[vllm.general_plugins]\nstray = os:abort\n"
    )
    registry = load(site)
    assert registry.vllm_plugins([registry.plugins["x"]]) == "npu,x"
    assert registry.vllm_plugins([registry.plugins["z"]]) == "npu"


def test_switches_from_outside(site: Site) -> None:
    site.method("quantserve-a", "a", name="a")
    site.method("quantserve-b", "b", name="b")
    assert set(load(site, QUANTSERVE_DISABLE="a").plugins) == {"b"}
    assert set(load(site, QUANTSERVE_PLUGINS="a").plugins) == {"a"}
    assert not load(site, QUANTSERVE_PLUGINS="").plugins
    with pytest.raises(UsageError, match="QUANTSERVE_DISABLE"):
        load(site, QUANTSERVE_DISABLE="a").find_method("a")
    assert "'bb'" in load(site, QUANTSERVE_DISABLE="bb").notes[0]


def test_a_switched_off_plugin_is_not_even_imported(site: Site) -> None:
    site.install("quantserve-bad", "raise RuntimeError", name="bad")
    assert not load(site, QUANTSERVE_DISABLE="bad").failures


def test_an_unknown_method_lists_the_known_ones(site: Site) -> None:
    site.method("quantserve-good", "good", name="good")
    with pytest.raises(UsageError, match=r"m\.yaml:3: unknown quantization method 'godo'; did you mean 'good'\?"):
        load(site).find_method("godo", "m.yaml:3")


def test_a_raising_hook_blames_its_plugin_and_keeps_the_others(site: Site) -> None:
    code = METHOD.format(name="{0}", aliases=()) + "\n@hookimpl\ndef quantserve_detect(checkpoint): {1}\n"
    site.install("quantserve-a", code.format("a", "raise RuntimeError('no config')"), name="a")
    site.install("quantserve-b", code.format("b", "return True"), name="b")
    registry = load(site)
    hooks = Hooks(list(registry.plugins.values()))
    with pytest.raises(PluginError, match=r"'a' of quantserve-a 1\.0 .*quantserve_detect.*no config"):
        hooks.call(registry.plugins["a"], "quantserve_detect", checkpoint=None)
    assert hooks.call(registry.plugins["b"], "quantserve_detect", checkpoint=None) is True
    assert hooks.call(registry.plugins["b"], "quantserve_performance", checkpoint=None, model=None, target=None) is None
