"""Discovery and isolation: every way a plugin can be broken is a row, and harms nobody else."""

from __future__ import annotations

import os
import re

import pytest

from helpers.dists import METHOD, Site
from quantserve.errors import PluginError, UsageError
from quantserve.plugins.registry import Hooks, Registry

HOOK = "from quantserve.api import hookimpl\n@hookimpl\n"


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


def test_two_plugins_with_one_method_name_both_lose(site: Site) -> None:
    site.method("quantserve-a", "shared", name="a")
    site.method("quantserve-b", "shared", name="b")
    site.method("quantserve-c", "c", name="c")
    registry = load(site)
    assert set(registry.plugins) == {"c"}
    assert {failure.name for failure in registry.failures} == {"a", "b"}
    with pytest.raises(PluginError, match=r"quantserve-a 1\.0.*quantserve-b 1\.0"):
        registry.find_method("shared")


def test_a_name_beats_an_alias_and_both_plugins_stay(site: Site) -> None:
    site.method("quantserve-a", "a", ("shared",), name="a")
    site.method("quantserve-b", "shared", name="b")
    registry = load(site)
    assert registry.find_method("shared") is registry.plugins["b"]
    assert registry.methods.keys() == {"a", "shared"}
    assert registry.plugins["a"].notes == (
        "alias 'shared' of a (quantserve-a 1.0) is dropped: it belongs to b (quantserve-b 1.0)",
    )


def test_the_engine_environment_names_exactly_what_is_composed(site: Site) -> None:
    site.method("quantserve-x", "x", name="x", engine={"x": "os:getcwd", "other": "os:abort"})
    site.method("quantserve-y", "y", name="y", engine={"y": "os:abort"})
    site.method("quantserve-z", "z", name="z")
    (site.path / "platform-1.0.dist-info").mkdir()
    (site.path / "platform-1.0.dist-info" / "METADATA").write_text("Name: platform\nVersion: 1.0\n")
    (site.path / "platform-1.0.dist-info" / "entry_points.txt").write_text(
        "[vllm.platform_plugins]\nnpu = os:getcwd\n[vllm.general_plugins]\nstray = os:abort\n"
    )
    registry = load(site)
    assert registry.engine_environment([registry.plugins["x"]]) == {
        "VLLM_PLUGINS": "npu,quantserve",
        "QUANTSERVE_ENGINE_PLUGINS": "quantserve-x:x",
    }
    assert registry.engine_environment([registry.plugins["z"]]) == {"VLLM_PLUGINS": "npu"}
    assert registry.engine_environment([], own=True) == {"VLLM_PLUGINS": "npu,quantserve"}


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


GOOD_METHOD = "Method(name='bad', summary='a method', bits=(4,), vllm_name=None)"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("bits=4", "Method.bits is int, not a tuple"),
        ("bits=('4',)", "Method.bits must be integers"),
        ("bits=(True,)", "Method.bits must be integers"),
        ("bits=()", "Method.bits must be integers"),
        ("aliases='b'", "Method.aliases is str, not a tuple"),
        ("aliases=None", "Method.aliases is NoneType, not a tuple"),
        ("aliases=(7,)", "method name 7 must be a lower-case word"),
        ("aliases=({},)", "method name {} must be a lower-case word"),
        ("name=None", "Method.name is NoneType, not text"),
        ("name='two words'", "method name 'two words'"),
        ("summary='one\\ntwo'", "Method.summary must be one line"),
        ("summary=''", "Method.summary must be one line"),
        ("vllm_name=3", "Method.vllm_name"),
        ("devices=('gpu',)", "Method.devices must be some of cuda, rocm, cpu"),
        ("dtypes=('half',)", "Method.dtypes must be some of float16"),
        ("minimum_capability=7.5", "Method.minimum_capability"),
        ("minimum_capability=7", "Method.minimum_capability"),
    ],
)
def test_a_method_of_wrong_types_is_a_row(site: Site, change: str, reason: str) -> None:
    made = f"replace({GOOD_METHOD}, {change})"
    code = "from dataclasses import replace\nfrom quantserve.api import Method, hookimpl\n@hookimpl\n"
    site.install("quantserve-bad", f"{code}def quantserve_method(): return {made}", name="bad")
    assert reason in only_failure(load(site), "method")


@pytest.mark.parametrize(
    ("code", "stage", "reason"),
    [
        (HOOK + "async def quantserve_detect(checkpoint): return False", "hooks", "asynchronous"),
        ("from functools import partial\nquantserve_detect = partial(print)", "hooks", "partial, not a function"),
        ("import sys\nsys.exit('bye')", "load", "SystemExit: bye"),
        ("class Stop(BaseException): ...\nraise Stop('no')", "load", "Stop: no"),
        (HOOK + "def quantserve_method(): raise SystemExit(3)", "method", "SystemExit: 3"),
        (HOOK + "def quantserve_method(): raise GeneratorExit", "method", "GeneratorExit"),
        ("from quantserve_bad_plugin import nothing", "load", "nothing"),
    ],
)
def test_more_ways_to_be_broken(site: Site, code: str, stage: str, reason: str) -> None:
    site.method("quantserve-good", "good", name="good")
    site.install("quantserve-bad", code, name="bad")
    registry = load(site)
    assert reason in only_failure(registry, stage)
    assert set(registry.plugins) == {"good"}


@pytest.mark.parametrize(
    ("target", "stage", "reason"),
    [
        (":Plugin", "hooks", "names a type, not a module"),
        (":instance", "hooks", "names a Plugin, not a module"),
        (":function", "hooks", "names a function, not a module"),
        (":absent", "load", "absent"),
        (" and more", "load", "the entry point's value 'quantserve_bad_plugin and more' is no 'module' or"),
    ],
)
def test_an_entry_point_that_names_no_module(site: Site, target: str, stage: str, reason: str) -> None:
    code = "class Plugin: ...\ninstance = Plugin()\ndef function(): ...\n"
    module = site.install("quantserve-bad", code, name="bad")
    points = site.path / "quantserve_bad-1.0.dist-info" / "entry_points.txt"
    points.write_text(f"[quantserve.plugins]\nbad = {module}{target}\n")
    assert reason in only_failure(load(site), stage)


def test_of_two_entry_points_to_one_module_the_one_with_the_methods_name_stays(site: Site) -> None:
    module = site.method("quantserve-a", "a", name="a")
    (site.path / "quantserve_a-1.0.dist-info" / "entry_points.txt").write_text(
        f"[quantserve.plugins]\na = {module}\nb = {module}\n"
    )
    registry = load(site)
    assert set(registry.plugins) == {"a"}
    assert "a (quantserve-a 1.0) and b (quantserve-a 1.0); it belongs to a" in only_failure(registry, "names")


def test_what_a_plugin_prints_stays_out_of_stdout(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    code = "print('loading')\n" + METHOD.format(name="a", aliases=())
    code += "\n@hookimpl\ndef quantserve_detect(checkpoint):\n    print('detecting')\n    return True\n"
    site.install("quantserve-a", code, name="a")
    plugin = load(site).plugins["a"]
    assert Hooks([plugin]).call(plugin, "quantserve_detect", checkpoint=None) is True
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "loading\ndetecting\n"


@pytest.mark.parametrize("body", ["raise SystemExit(1)", "yield 1\n    raise KeyError('g')", "return map(int, ['x'])"])
def test_a_hook_that_stops_late_is_still_its_plugins_fault(site: Site, body: str) -> None:
    hook = f"@hookimpl\ndef quantserve_validate(checkpoint):\n    {body}\n"
    site.install("quantserve-a", METHOD.format(name="a", aliases=()) + hook, name="a")
    plugin = load(site).plugins["a"]
    with pytest.raises(PluginError, match="quantserve_validate"):
        Hooks([plugin]).call(plugin, "quantserve_validate", checkpoint=None, model=None, target=None)


@pytest.mark.parametrize(
    ("reference", "error", "reason"),
    [
        ("os.path:join", None, ""),
        ("os.path", PluginError, "not 'module:callable'"),
        (7, PluginError, "not 'module:callable'"),
        ("os.path:nothing", PluginError, "nothing"),
        ("os.path:sep", PluginError, "cannot be called"),
        ("os.missing:f", PluginError, "os.missing"),
        ("heavy_part:f", UsageError, "needs the package 'torch_of_that_name'"),
    ],
)
def test_loading_a_heavy_callable(site: Site, reference: object, error: type[Exception] | None, reason: str) -> None:
    site.method("quantserve-a", "a", name="a")
    (site.path / "heavy_part.py").write_text("import torch_of_that_name\ndef f(): ...\n")
    plugin = load(site).plugins["a"]
    if error is None:
        assert plugin.load_callable(reference) is os.path.join
    else:
        with pytest.raises(error, match=re.escape(reason)):
            plugin.load_callable(reference)


def test_an_unreadable_entry_points_file_harms_nobody(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.method("quantserve-good", "good-one", name="good-one")
    broken = site.path / "broken-1.0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Name: broken\nVersion: 1.0\n")
    (broken / "entry_points.txt").write_text("[quantserve.plugins]\nno equals sign\n")
    monkeypatch.delenv("QUANTSERVE_PLUGINS", raising=False)
    registry = Registry.load({})
    assert "good-one" in registry.plugins
    assert "entry_points.txt of broken cannot be read" in registry.notes[0]
