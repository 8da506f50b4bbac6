"""Broken plugins (`helpers.broken_plugins`): each is named where it is needed, and changes nothing for other models."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from importlib.abc import MetaPathFinder
from importlib.metadata import EntryPoints, entry_points
from pathlib import Path

import pytest

from helpers.broken_plugins import BROKEN, LATE, Broken, hook
from helpers.checkpoints import make_llama
from helpers.dists import METHOD, Site
from quantserve import api
from quantserve.cli.check_command import _as_json
from quantserve.cli.main import run
from quantserve.cli.sources import Outcome, outcomes
from quantserve.config import ModelConfig, load_object, model_from_source
from quantserve.errors import PluginError, UsageError
from quantserve.planning.advise import advise
from quantserve.planning.compose import compose
from quantserve.plugins import commands, foreign, pages
from quantserve.plugins.registry import ENGINE_GROUP, ENGINE_PLUGINS_VARIABLE, GROUP, Hooks, Registry
from quantserve.predict.workload import find_workload
from quantserve.serve.replica.vllm.engine_plugins import load_plugins
from quantserve.target import find_target

OURS = ("fp16", "awq", "squeezellm")
TARGET = "a100-80g"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelConfig]:
    """Small models: two of this project's methods, and one that declares the method ``broken``."""
    base = tmp_path_factory.mktemp("models")
    folders = {
        "fp16": make_llama(base / "fp16"),
        "awq": make_llama(base / "awq", "awq"),
        "broken": make_llama(base / "broken", config={"quantization_config": {"quant_method": "broken"}}),
    }
    return {name: model_from_source(str(folder)) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def alone(models: dict[str, ModelConfig]) -> dict[str, str]:
    """`check --json` of the models of this project with no other plugin."""
    return {name: checked(models[name], Registry.load({}, ours())) for name in ("fp16", "awq")}


def ours() -> EntryPoints:
    """The plugins of this project."""
    points = entry_points()
    return EntryPoints(p for group in (GROUP, ENGINE_GROUP) for p in points.select(group=group) if p.name in OURS)


def load(site: Site, environ: dict[str, str] | None = None) -> Registry:
    return Registry.load(environ or {}, EntryPoints([*ours(), *site.entry_points()]))


def outcome(model: ModelConfig, registry: Registry) -> Outcome:
    return next(outcomes([model], registry, find_target(TARGET)))


def checked(model: ModelConfig, registry: Registry) -> str:
    return json.dumps(_as_json(outcome(model, registry)))


def said(result: Outcome) -> str:
    """Everything `check` says about a model."""
    if result.composition is None:
        return str(result.error)
    return "\n".join(" ".join([f.code, f.message, *f.offenders, f.fix]) for f in result.composition.findings)


@pytest.fixture
def broken_registry(site: Site, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Registry:
    """All plugins of this project and one broken one."""
    broken: Broken = request.param
    monkeypatch.setenv(foreign.VARIABLE, broken.seconds)
    site.install("quantserve-broken", broken.module, name="broken", version="0.9")
    return load(site, {foreign.VARIABLE: broken.seconds})


def through(*doors: str) -> list[Broken]:
    return [broken for broken in BROKEN if broken.door in doors]


def every(cases: list[Broken]) -> pytest.MarkDecorator:
    ids = [broken.name for broken in cases]
    return pytest.mark.parametrize(
        ("broken_registry", "broken"), zip(cases, cases, strict=True), ids=ids, indirect=["broken_registry"]
    )


@every(through("check"))
def test_its_own_model_names_it_and_the_others_are_as_without_it(
    broken_registry: Registry, broken: Broken, models: dict[str, ModelConfig], alone: dict[str, str], tmp_path: Path
) -> None:
    model = models["broken"]
    if broken.file:
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / broken.file).write_bytes(b"")
        engine = {"model_id": "m", "hf_model_id": str(tmp_path / "m")}
        (model,) = load_object({"models": [{"engine_config": engine}]}, "test").models
    result = outcome(model, broken_registry)
    if broken.exit_code == 3:
        assert result.exit_code == 3, said(result)
        assert "'broken' of quantserve-broken 0.9" in said(result)
        assert all(character.isprintable() for character in said(result).replace("\n", ""))
    assert broken.says in said(result)
    assert len(said(result)) < 4_000_000
    for name, before in alone.items():
        assert checked(models[name], broken_registry) == before


@every(through("quantizer", "converter"))
def test_a_tool_that_is_none_names_its_plugin(
    broken_registry: Registry, broken: Broken, models: dict[str, ModelConfig], alone: dict[str, str]
) -> None:
    plugin = broken_registry.plugins["broken"]
    with pytest.raises(PluginError, match=r"'broken' of quantserve-broken 0\.9") as caught:
        plugin.load_callable(Hooks([plugin]).call(plugin, f"quantserve_{broken.door}"))
    assert broken.says in str(caught.value)
    for name, before in alone.items():
        assert checked(models[name], broken_registry) == before


@pytest.mark.parametrize("broken", through("command", "page"), ids=lambda broken: broken.name)
def test_what_comes_without_a_plugin_is_named(
    broken: Broken, site: Site, monkeypatch: pytest.MonkeyPatch, models: dict[str, ModelConfig], alone: dict[str, str]
) -> None:
    monkeypatch.setenv(foreign.VARIABLE, broken.seconds)
    name = broken.named or {"command": "broken", "page": pages.NAME}[broken.door]
    site.extension("quantserve-broken", broken.code, f"quantserve.{broken.door}s", name, broken.door, version="0.9")
    points = site.entry_points()
    (found,) = commands.find((), {}, {}, points) if broken.door == "command" else pages.find({}, points)
    with pytest.raises(PluginError, match=rf"{broken.door} '{name}' of quantserve-broken 0\.9") as caught:
        found.load()
    assert broken.says in str(caught.value)
    assert len(str(caught.value)) < 4_000
    monkeypatch.delenv(foreign.VARIABLE)
    for model, before in alone.items():
        assert checked(models[model], load(site)) == before


def test_the_table_is_long_and_has_no_defect_twice() -> None:
    assert len(BROKEN) >= 120
    assert len({broken.name for broken in BROKEN}) == len({(one.code, one.door) for one in BROKEN}) == len(BROKEN)


ASKED_FOR_ADVICE = ("kernel-", "performance-", "quality-")


@every([case for case in BROKEN if case.name.startswith((*ASKED_FOR_ADVICE, "detect-claims", "import-raises"))])
def test_predictions_of_the_others_go_on(
    broken_registry: Registry, broken: Broken, models: dict[str, ModelConfig]
) -> None:
    advice = advise(models["fp16"], broken_registry, find_target(TARGET))
    assert advice.exit_code == 0
    workload = find_workload("chat")
    predicted = {c.method.name for c in advice.candidates if c.predict(workload)}
    assert {"fp16", "awq", "squeezellm"} <= predicted
    failed = {c.method.name for c in advice.candidates if c.failed}
    assert failed == ({"broken"} if broken.name.startswith(ASKED_FOR_ADVICE) else set())


@pytest.mark.parametrize("command", ["profile", "recommend"])
def test_a_failing_hook_is_a_row(
    site: Site, models: dict[str, ModelConfig], capsys: pytest.CaptureFixture[str], command: str
) -> None:
    code = Broken("", hook("kernel(target, bits, engine): raise KeyError('share')"), "").module
    site.install("quantserve-broken", code, name="broken", version="0.9")
    asked = [command, models["fp16"].source, "--target", TARGET]
    assert run(asked) == 0
    shown = capsys.readouterr().out
    assert "failed, see" in shown
    assert (
        "broken failed: plugin 'broken' of quantserve-broken 0.9 failed at stage 'quantserve_kernel': KeyError" in shown
    )
    assert run([*asked, "--json"]) == 0
    methods = {method["method"]: method for method in json.loads(capsys.readouterr().out)["methods"]}
    assert methods["fp16"]["failed"] is None
    assert "'broken' of quantserve-broken 0.9 failed at stage 'quantserve_kernel'" in methods["broken"]["failed"]
    assert run([*asked, "--method", "fp16", "--method", "broken"]) == 3
    assert run([command, models["broken"].source, "--target", TARGET]) == 3


@pytest.fixture(scope="module")
def quiet(models: dict[str, ModelConfig]) -> tuple[list[str], bytes]:
    """A command, and its output without plugins from outside."""
    command = [sys.executable, "-m", "quantserve", "check", models["fp16"].source, "--json", "--target", TARGET]
    return command, subprocess.run(command, capture_output=True, timeout=300, check=True).stdout


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.write(1, b'noise')",
        "import subprocess; subprocess.run(['echo', 'noise'])",
        "import sys; sys.__stdout__.write('noise')",
        "import os; os.fork()",
        "import os; os.close(1)",
        "import os; os.close(2)",
        "import os; os.dup2(os.open('/dev/null', os.O_WRONLY), 1)",
    ],
)
def test_standard_output_stays_ours(tmp_path: Path, code: str, quiet: tuple[list[str], bytes]) -> None:
    hooks = METHOD.format(name="noisy", aliases=()) + hook(f"detect(checkpoint): {code}; return False")
    Site(tmp_path).install("noisy", f"{code}\n{hooks}", name="noisy")
    command, expected = quiet
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, env=environ, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, expected)


# --- names -------------------------------------------------------------------------------------------


def rows(registry: Registry) -> str:
    return "\n".join(f"{f.label} {f.stage}: {f.reason}; fix: {f.advice}" for f in registry.failures)


@pytest.mark.parametrize(
    ("method", "aliases", "name"),
    [
        ("awq", (), "mine"),  # the name of a method
        ("auto_awq", (), "mine"),  # the alias of a method
        ("mine", ("fp16", "awq", "sqllm"), "mine"),  # aliases
        ("mine", (), "awq"),  # the entry point of a plugin
        ("awq", ("fp16",), "awq"),
    ],
)
def test_a_newcomer_takes_no_name_of_ours(
    site: Site, models: dict[str, ModelConfig], alone: dict[str, str], method: str, aliases: tuple[str, ...], name: str
) -> None:
    site.method("newcomer", method, aliases, name=name)
    registry = load(site)
    for model, before in alone.items():
        assert checked(models[model], registry) == before
    assert {"fp16", "awq", "squeezellm", "auto_awq", "sqllm"} <= set(registry.methods)
    if method == "mine" and name == "mine":
        assert registry.methods["mine"].method.names == ("mine",)  # type: ignore[union-attr]
        assert "alias 'fp16' of mine (newcomer 1.0) is dropped" in registry.plugins["mine"].notes[0]
    else:
        assert "newcomer 1.0" in rows(registry)
        assert "uninstall newcomer" in rows(registry)
        assert "quantserve-awq 0.1.0" in rows(registry)


def test_the_distribution_named_for_a_method_keeps_it(site: Site) -> None:
    site.method("quantserve-nf4", "nf4", name="nf4")
    site.method("zeta", "nf4", name="zeta")
    registry = load(site)
    assert registry.methods["nf4"].distribution == "quantserve-nf4"
    assert "it belongs to nf4 (quantserve-nf4 1.0); fix: uninstall zeta, or QUANTSERVE_DISABLE=zeta" in rows(registry)
    with pytest.raises(PluginError, match="it belongs to nf4"):
        registry.find_plugin("zeta")


def test_where_nothing_distinguishes_two_plugins_both_are_named_with_both_fixes(site: Site) -> None:
    site.method("alpha", "nf4", name="a")
    site.method("beta", "nf4", name="b")
    registry = load(site)
    assert "nf4" not in registry.methods
    with pytest.raises(PluginError, match=r"a \(alpha 1\.0\) and b \(beta 1\.0\); neither") as caught:
        registry.find_method("nf4")
    assert "uninstall alpha or beta, or QUANTSERVE_DISABLE=a or QUANTSERVE_DISABLE=b" in str(caught.value)


def test_an_alias_of_two_plugins_belongs_to_neither_and_they_stay(site: Site) -> None:
    site.method("alpha", "a", ("shared",), name="a")
    site.method("beta", "b", ("shared",), name="b")
    registry = load(site)
    assert {"a", "b"} <= set(registry.methods)
    with pytest.raises(UsageError, match=r"alias of a \(alpha 1\.0\) and of b \(beta 1\.0\)"):
        registry.find_method("shared")


def test_two_distributions_with_one_entry_point_are_switched_off_by_distribution(site: Site) -> None:
    site.method("alpha", "a", name="same")
    site.method("beta", "b", name="same")
    registry = load(site)
    assert "QUANTSERVE_DISABLE=alpha or beta" in rows(registry)
    assert load(site, {"QUANTSERVE_DISABLE": "beta"}).plugins["same"].distribution == "alpha"
    assert load(site, {"QUANTSERVE_PLUGINS": "beta"}).plugins["same"].distribution == "beta"


@pytest.mark.parametrize("name", ["core", "config", "quantserve", "a,b", "x y", "-x"])
def test_an_entry_point_name_that_would_be_taken_for_another(site: Site, name: str) -> None:
    site.method("newcomer", "m", name=name)
    assert "the entry-point name" in rows(load(site))


# --- whose checkpoint it is ----------------------------------------------------------------------------


def test_a_switched_off_plugin_is_named(site: Site, models: dict[str, ModelConfig]) -> None:
    site.method("quantserve-nf4", "nf4", name="nf4")
    registry = load(site, {"QUANTSERVE_DISABLE": "nf4"})
    result = outcome(models["broken"], registry)
    assert result.exit_code == 1
    assert "nf4 (quantserve-nf4 1.0) is switched off: named in QUANTSERVE_DISABLE" in said(result)
    with pytest.raises(UsageError, match="remove it from QUANTSERVE_DISABLE"):
        registry.find_method("nf4")


def test_of_two_strangers_the_one_that_claims_everything_counts_least(
    site: Site, models: dict[str, ModelConfig]
) -> None:
    detect = "\n@hookimpl\ndef quantserve_detect(checkpoint): return {}\n"
    site.install("all", METHOD.format(name="all", aliases=()) + detect.format("True"), name="all")
    mine = "checkpoint.config['quantization_config']['quant_method'] == 'broken'"
    site.install("mine", METHOD.format(name="mine", aliases=()) + detect.format(mine), name="mine")
    composition = compose(models["broken"], load(site), find_target(TARGET))
    assert composition.method is not None
    assert composition.method.name == "mine"


def test_two_strangers_that_claim_one_checkpoint(site: Site, models: dict[str, ModelConfig]) -> None:
    mine = "checkpoint.config['quantization_config'].get('quant_method') == 'broken'"
    detect = f"\n@hookimpl\ndef quantserve_detect(checkpoint): return {mine}\n"
    for name in ("one", "two"):
        site.install(name, METHOD.format(name=name, aliases=()) + detect, name=name)
    found = said(outcome(models["broken"], load(site)))
    assert "method-ambiguous" in found
    assert "leave one plugin out: QUANTSERVE_DISABLE=one or QUANTSERVE_DISABLE=two" in found


def test_a_refused_model_names_who_else_claims_it(site: Site, tmp_path: Path) -> None:
    code = METHOD.format(name="dotted", aliases=()) + "\n@hookimpl\ndef quantserve_detect(checkpoint):\n"
    code += "    return any(name.endswith('.odd') for name in checkpoint.tensors)\n"
    site.install("dotted", code, name="dotted")
    folder = make_llama(tmp_path / "m", extra={"model.layers.0.self_attn.q_proj.odd": ("U8", (4,))})
    result = outcome(model_from_source(str(folder)), load(site))
    assert "method-also-claimed other plugins claim this checkpoint as well dotted (dotted 1.0)" in said(result)


# --- versions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requires", "says"),
    [
        ("quantserve>=2", "needs quantserve>=2, this is 0.1.0; fix: upgrade quantserve"),
        ("quantserve (>=0.1,<0.2)", ""),
        ("quantserve<0.1", "needs quantserve<0.1, this is 0.1.0; fix: upgrade newcomer"),
        ("quantserve==3.*; extra == 'x'", ""),
        ("quantserve-kernels>=9", ""),
        ("not a requirement !!", ""),
    ],
)
def test_the_version_of_quantserve_that_a_plugin_requires(site: Site, requires: str, says: str) -> None:
    site.install("newcomer", METHOD.format(name="m", aliases=()), name="m", requires=requires)
    found = rows(load(site))
    assert says in found if says else found == ""


def test_the_api_has_a_version() -> None:
    assert api.VERSION == api.Method("m", "s", (4,), None).api == 1


# --- time, signals, threads ------------------------------------------------------------------------------


def test_a_hook_that_did_not_end_is_not_called_again(
    site: Site, monkeypatch: pytest.MonkeyPatch, models: dict[str, ModelConfig]
) -> None:
    monkeypatch.setenv(foreign.VARIABLE, "0.2")
    detect = "import sys\ncalls = []\n" + hook("detect(checkpoint):\n    calls.append(1)\n    while True: pass")
    module = site.install("quantserve-broken", Broken("", detect, "").module, name="broken")
    registry = load(site)
    for _ in range(5):
        assert outcome(models["fp16"], registry).exit_code == 0
    assert sys.modules[module].calls == [1]


def test_the_limit_can_be_changed_and_switched_off() -> None:
    assert foreign.hook_seconds({}) == 10
    assert foreign.hook_seconds({foreign.VARIABLE: "2.5"}) == 2.5
    assert foreign.hook_seconds({foreign.VARIABLE: "0"}) == 0
    with pytest.raises(UsageError, match="QUANTSERVE_HOOK_TIMEOUT is 'soon'"):
        Registry.load({foreign.VARIABLE: "soon"}, EntryPoints([]))


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(100)"])
def test_outside_the_main_thread_a_call_ends_as_well(code: str) -> None:
    results: list[str] = []

    def work() -> None:
        with pytest.raises(foreign.Raised) as caught:
            foreign.run(lambda: exec(code), "a plugin", 0.2)
        results.append(foreign.reason(caught.value.error, ""))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(120)
    assert results == [f"{LATE} 0.2 s and was ended; QUANTSERVE_HOOK_TIMEOUT sets the limit"]


def test_what_a_call_gives_in_another_thread() -> None:
    results: list[object] = []

    def work() -> None:
        results.append(foreign.run(lambda: 7, "a plugin", 5))
        with pytest.raises(foreign.Raised) as caught:
            foreign.run(lambda: 1 // 0, "a plugin", 5)
        results.append(type(caught.value.error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(120)
    assert results == [7, ZeroDivisionError]


def test_ctrl_c_during_a_hook_is_the_users() -> None:
    with pytest.raises(KeyboardInterrupt):
        foreign.run(lambda: signal.raise_signal(signal.SIGINT), "a plugin", 10)
    with pytest.raises(foreign.Raised):
        foreign.run(lambda: exec("raise KeyboardInterrupt"), "a plugin", 10)


def test_handlers_and_timers_are_put_back() -> None:
    fired: list[float] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: fired.append(time.monotonic()))
    try:
        began = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        foreign.run(lambda: time.sleep(0.05), "a plugin", 10)
        interrupt = signal.getsignal(signal.SIGINT)
        while not fired and time.monotonic() - began < 60:
            time.sleep(0.01)
        assert fired[0] - began > 0.4
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_librarys_finder_that_removes_itself_is_no_fault_of_the_plugin() -> None:
    class Waiting(MetaPathFinder):
        def find_spec(self, fullname: str, path: object, target: object = None) -> None:
            if fullname == "no_such_module_to_wait_for":
                sys.meta_path.remove(self)

    def plugin() -> None:
        with contextlib.suppress(ImportError):
            importlib.import_module("no_such_module_to_wait_for")

    before = list(sys.meta_path)
    finder = Waiting()
    sys.meta_path.insert(0, finder)
    foreign.run(plugin, "a plugin", 10)
    assert sys.meta_path == before
    assert finder not in sys.meta_path


ENGINE_SIDES = [f"quantserve-{name}:{name}" for name in OURS if name != "fp16"]


@pytest.mark.vllm
@pytest.mark.parametrize("side", ENGINE_SIDES)
def test_our_engine_sides_load_in_a_process_that_has_imported_nothing_but_vllm(side: str) -> None:
    """As in the one in which vLLM inspects a model class, once on every machine."""
    variables = {ENGINE_PLUGINS_VARIABLE: side, "VLLM_PLUGINS": "quantserve"}
    code = "import vllm; from vllm.plugins import load_general_plugins; load_general_plugins()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


SWALLOWS = "while True:\n    try:\n        n = 0\n        while True: n += 1\n    except BaseException: pass"


@pytest.mark.parametrize(
    ("code", "returncode", "says"),
    [
        (SWALLOWS, 3, "plugin broken (dist 1) did not end"),
        ("sum(iter(int, 1))", 1, "Timeout"),
    ],
)
def test_what_cannot_be_ended_ends_the_process(tmp_path: Path, code: str, returncode: int, says: str) -> None:
    (tmp_path / "endless.py").write_text(code)
    program = "from quantserve.plugins import foreign; import importlib; foreign._GRACE_S = 2; "
    program += "foreign.run(lambda: importlib.import_module('endless'), 'plugin broken (dist 1)', 0.2)"
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env=environ, check=False
    )
    assert done.returncode == returncode, done.stderr
    assert says in done.stderr
    assert returncode == 3 or "endless.py" in done.stderr


def test_a_slow_import_is_named(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(foreign, "NOTICE_S", 0.1)
    monkeypatch.setitem(sys.modules, "ray", sys.modules.get("ray"))
    del sys.modules["ray"]
    (site.path / "ray.py").write_text("")
    site.install("slow", "import time, ray\ntime.sleep(1.1)\n" + METHOD.format(name="slow", aliases=()), name="slow")
    plugin = load(site).plugins["slow"]
    assert plugin.import_s > 1
    assert "loading plugin slow (slow 1.0) ...\n" in capsys.readouterr().err
    (note,) = plugin.notes
    assert note.startswith(f"importing plugin 'slow' of slow took {plugin.import_s:.1f} s and brought in ray, ")
    assert "in every command" in note


def test_with_debug_a_plugin_is_named_before_it_is_imported(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QUANTSERVE_DEBUG", "1")
    site.method("newcomer", "m", name="m")
    load(site)
    assert "importing plugin m (newcomer 1.0)\n" in capsys.readouterr().err


# --- the engine's side ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise RuntimeError('cannot register')", "RuntimeError: cannot register at engine_side.py:3"),
        ("raise SystemExit(1)", "SystemExit: 1"),
        ("print('hi'); os.environ.clear()", "in the environment; put back"),
        ("os.environ['VLLM_CPU_KVCACHE_SPACE'] = '400'", "set VLLM_CPU_KVCACHE_SPACE in the environment"),
        ("while True: pass", LATE),
    ],
)
def test_a_failing_register_is_named(site: Site, body: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (site.path / "engine_side.py").write_text(f"import os\ndef register():\n    {body}\n")
    site.method("quantserve-broken", "broken", name="broken", engine={"broken": "engine_side:register"})
    registry = load(site)
    variables = registry.engine_environment([registry.plugins["broken"], registry.plugins["fp16"]])
    assert variables["VLLM_PLUGINS"] == "quantserve"
    assert variables[ENGINE_PLUGINS_VARIABLE] == "quantserve-broken:broken"
    before = dict(os.environ)
    environ = {**variables, foreign.VARIABLE: "0.01" if says == LATE else "10"}
    with pytest.raises(
        PluginError, match=r"plugin 'broken' of quantserve-broken 1\.0 failed at stage 'register'"
    ) as caught:
        load_plugins(environ, site.entry_points())
    assert says in str(caught.value)
    assert dict(os.environ) == before


def test_an_engine_side_that_names_no_module(site: Site) -> None:
    site.method("quantserve-broken", "broken", name="broken", engine={"broken": "no module"})
    registry = load(site)
    with pytest.raises(PluginError, match="stage 'register': the entry point's value 'no module' is no 'module' or"):
        load_plugins(registry.engine_environment([registry.plugins["broken"]]), site.entry_points())


def test_a_strangers_engine_side_of_the_same_name_is_not_loaded(site: Site) -> None:
    (site.path / "good_side.py").write_text(
        "def register():\n    import sys\n    sys.modules[__name__].called = True\n"
    )
    site.method("quantserve-good", "good", name="good", engine={"good": "good_side:register"})
    site.method("thief", "thief", name="thief", engine={"good": "os:abort"})
    registry = load(site)
    assert {"good", "thief"} <= set(registry.plugins)
    load_plugins(registry.engine_environment([registry.plugins["good"]]), site.entry_points())
    assert sys.modules["good_side"].called


def test_an_engine_side_that_is_not_installed_there(site: Site) -> None:
    with pytest.raises(PluginError, match="not installed on this machine"):
        load_plugins({ENGINE_PLUGINS_VARIABLE: "quantserve-gone:gone"}, site.entry_points())


TOOLS = """
from quantserve_quantize import Quantizer, option
from dataclasses import dataclass

@dataclass(frozen=True)
class Options:
    pass

class Wrong(Quantizer):
    Options = Options

    def begin(self, checkpoint, linears):
        raise KeyError("scale")

def wrong(source, destination, **options):
    raise KeyError("scale")

def lost(source, destination, **options):
    raise FileNotFoundError(f"{source} holds no table")

def few(source):
    pass
"""


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("Wrong", 3, "KeyError: 'scale' at tools.py:"),
        ("wrong", 3, "KeyError: 'scale' at tools.py:"),
        ("few", 3, "few() got an unexpected keyword argument"),
        ("lost", 2, "holds no table"),
    ],
)
def test_a_tool_that_fails_is_named(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, code: int, message: str
) -> None:
    pytest.importorskip("torch")
    hooks = hook(f"quantizer(): return 'quantserve_broken_plugin.tools:{name}'")
    hooks += hook(f"converter(): return 'quantserve_broken_plugin.tools:{name}'")
    code_of = METHOD.format(name="broken", aliases=()) + hooks
    module = site.install("quantserve-broken", code_of, name="broken", version="0.9")
    package = site.path / module
    package.mkdir()
    package.with_suffix(".py").rename(package / "__init__.py")
    (package / "tools.py").write_text(TOOLS)
    model = make_llama(tmp_path / "m")
    commands = [["quantize", str(model), "--method", "broken", "--out", str(tmp_path / "out")]]
    commands += [["convert", str(model), str(tmp_path / "out"), "--method", "broken"]] if name != "Wrong" else []
    for command in commands:
        assert run(command) == code
        said = capsys.readouterr().err
        assert message in said
        assert "quantserve-broken 0.9" in said
        assert "bug in quantserve" not in said
