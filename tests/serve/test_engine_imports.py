"""An engine core's process starts before it is asked for, and is the process that was asked for in every respect."""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from helpers.checkpoints import make_llama
from quantserve.cli.main import run
from quantserve.serve.replica.vllm import spawned_imports as engine_imports
from quantserve.serve.replica.vllm.spawned_imports import Spare, SparedContext, start_spare
from tests.serve.server import until

CHILDREN = 60.0
"""Seconds that a process gets to start or to end."""
WHILE_IMPORTED = gc.get_threshold()
"""Thresholds of the garbage collector while this process imported the module of its task."""


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    before = psutil.Process().children()
    command_line = multiprocessing.spawn.get_command_line
    yield
    multiprocessing.spawn.get_command_line = command_line
    left = [one for one in psutil.Process().children() if one not in before and "tracker" not in str(one.cmdline())]
    assert not left


def _report(file: Path, wanted: str) -> None:
    from decimal import Decimal

    facts = (
        os.getpid(),
        os.environ.get(wanted),
        multiprocessing.current_process().name,
        WHILE_IMPORTED,
        gc.get_threshold(),
    )
    file.write_text(repr((*facts, "poplib" in sys.modules, str(Decimal(1)))))


def _started(context: multiprocessing.context.BaseContext, file: Path, name: str = "one") -> tuple[object, ...]:
    process = context.Process(target=_report, args=(file, "QUANTSERVE_TEST"), name=name)
    process.start()
    process.join(CHILDREN)
    assert process.exitcode == 0
    pid, *facts = eval(file.read_text())
    assert pid == process.pid
    return pid, *facts


def test_the_next_process_is_the_spare_with_the_environment_of_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTSERVE_TEST", "before")
    start_spare(["poplib"])
    spare = engine_imports._spares[-1].pid
    monkeypatch.setenv("QUANTSERVE_TEST", "now")
    pid, *facts = _started(SparedContext(), tmp_path / "first", name="EngineCore")
    thresholds = [engine_imports.RARELY, engine_imports.USUAL]
    assert (pid, facts) == (spare, ["now", "EngineCore", *thresholds, True, "1"])


def test_without_a_spare_a_process_is_spawned_as_usual(tmp_path: Path) -> None:
    facts = _started(SparedContext(), tmp_path / "second")[1:]
    assert facts == (None, "one", engine_imports.USUAL, engine_imports.USUAL, False, "1")


def test_a_removed_variable_is_removed_in_the_spare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTSERVE_TEST", "before")
    start_spare([])
    monkeypatch.delenv("QUANTSERVE_TEST")
    assert _started(SparedContext(), tmp_path / "file")[1] is None


def _answer(pipe: Connection) -> None:
    pipe.send(os.getpid())


def test_a_process_that_inherits_a_pipe_is_started_anew(tmp_path: Path) -> None:
    start_spare([])
    spare = engine_imports._spares[-1].pid
    context = SparedContext()
    here, there = context.Pipe()
    process = context.Process(target=_answer, args=(there,))
    process.start()
    try:
        assert here.poll(CHILDREN)
        assert here.recv() == process.pid != spare
    finally:
        process.join(CHILDREN)
    assert not psutil.pid_exists(spare)


def test_a_spare_that_died_is_replaced(tmp_path: Path) -> None:
    start_spare([])
    spare = engine_imports._spares[-1].pid
    os.kill(spare, signal.SIGKILL)
    until(lambda: psutil.Process(spare).status() == psutil.STATUS_ZOMBIE, CHILDREN)
    assert _started(SparedContext(), tmp_path / "file")[0] != spare


def test_an_unused_spare_can_be_dismissed() -> None:
    start_spare([])
    spare = engine_imports._spares[-1].pid
    engine_imports.dismiss_spares()
    assert not psutil.pid_exists(spare)
    engine_imports.dismiss_spares()  # there is none left


def test_a_failing_import_in_the_spare_is_ignored(tmp_path: Path) -> None:
    start_spare(["no_such_module_anywhere", "poplib"])
    assert _started(SparedContext(), tmp_path / "file")[5] is True


def test_the_end_of_a_spare_is_seen(tmp_path: Path) -> None:
    start_spare([])
    process = SparedContext().Process(target=time.sleep, args=(60,))
    process.start()
    assert process.is_alive()
    process.kill()
    process.join(CHILDREN)
    assert process.exitcode == -signal.SIGKILL


def _start_and_die(file: Path) -> None:
    spare = Spare([])
    file.write_text(str(spare.pid))
    os._exit(0)


def test_a_spare_ends_with_its_parent(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_start_and_die, args=(tmp_path / "pid",))
    process.start()
    process.join(CHILDREN)
    spare = int((tmp_path / "pid").read_text())
    until(lambda: not psutil.pid_exists(spare) or psutil.Process(spare).status() == psutil.STATUS_ZOMBIE, CHILDREN)


def test_spawned_processes_collect_rarely_while_they_import_and_as_usual_when_they_run(tmp_path: Path) -> None:
    engine_imports.hurry_children()
    facts = _started(multiprocessing.get_context("spawn"), tmp_path / "file")
    assert facts[3:5] == (engine_imports.RARELY, engine_imports.USUAL)


def _parent(file: Path) -> None:
    _started(multiprocessing.get_context("spawn"), file)


@pytest.mark.parametrize("spare", [False, True])
@pytest.mark.parametrize("hurried", [False, True])
def test_the_processes_of_spawned_processes_begin_in_the_same_way(tmp_path: Path, hurried: bool, spare: bool) -> None:
    """An engine core spawns the workers."""
    if hurried:
        engine_imports.hurry_children()
    if spare:
        start_spare([])
    process = SparedContext().Process(target=_parent, args=(tmp_path / "file",))
    process.start()
    process.join(CHILDREN)
    assert process.exitcode == 0
    imported, ran = eval((tmp_path / "file").read_text())[3:5]
    assert (imported, ran) == (engine_imports.RARELY if hurried else engine_imports.USUAL, engine_imports.USUAL)


def test_thresholds_that_a_module_sets_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sets_thresholds.py").write_text(
        "import gc\ngc.set_threshold(5000)\ndef run(file): file.write_text(repr(gc.get_threshold()[0]))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    engine_imports.hurry_children()
    task = importlib.import_module("sets_thresholds").run
    gc.set_threshold(*engine_imports.USUAL)
    process = multiprocessing.get_context("spawn").Process(target=task, args=(tmp_path / "file",))
    process.start()
    process.join(CHILDREN)
    assert (tmp_path / "file").read_text() == "5000"


def test_the_imports_of_the_replica_itself_end_with_the_usual_thresholds() -> None:
    with engine_imports.collecting_rarely():
        assert gc.get_threshold() == engine_imports.RARELY
    assert gc.get_threshold() == engine_imports.USUAL


def _plugins_loaded(file: Path) -> None:
    from vllm import plugins

    plugins.load_general_plugins()
    file.write_text(repr((os.environ["VLLM_PLUGINS"], WHILE_IMPORTED, gc.get_threshold())))


@pytest.mark.vllm
@pytest.mark.parametrize("target", ["a100-80g", "cpu"])
def test_an_engine_process_of_any_plan_collects_as_usual(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Spawned as vLLM spawns it, with the plan's environment; a GPU's plan does not load our plugin."""
    from vllm.utils.system_utils import get_mp_context

    assert run(["plan", str(make_llama(tmp_path / "model")), "--target", target, "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    for name, value in plan["runtime_env"]["env_vars"].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    engine_imports.hurry_children()
    process = get_mp_context().Process(target=_plugins_loaded, args=(tmp_path / "file",), name="EngineCore")
    process.start()
    process.join(120)
    found = eval((tmp_path / "file").read_text())
    assert found == ("" if target != "cpu" else "quantserve", engine_imports.RARELY, engine_imports.USUAL)


@pytest.mark.vllm
def test_the_process_manager_of_vllm_starts_the_engine_core_in_the_spare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.engine import core, utils

    monkeypatch.setattr(utils, "get_mp_context", utils.get_mp_context)
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.setattr(core.EngineCoreProc, "run_engine_core", _core)
    start_spare([])
    spare = engine_imports._spares[-1].pid
    engine_imports.use_spares(utils)
    config = SimpleNamespace(
        shutdown_timeout=0,
        parallel_config=SimpleNamespace(data_parallel_size=1, assigned_physical_gpu_ids=None, numa_bind=False),
    )
    manager = utils.CoreEngineProcManager(
        local_engine_count=1,
        start_index=0,
        local_start_index=0,
        vllm_config=config,
        local_client=True,
        handshake_address=str(tmp_path / "file"),
        executor_class=object,
        log_stats=False,
    )
    (process,) = manager.processes
    process.join(120)
    assert (process.pid, process.exitcode) == (spare, 0)
    assert (tmp_path / "file").read_text() == str(spare)


def _core(handshake_address: str, **_: object) -> None:
    Path(handshake_address).write_text(str(os.getpid()))
