"""What all tests share, those of the core in tests/ and those of plugins/*/tests."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Before anything imports Ray or vLLM: tests report to nobody, and neither a variable of the shell nor this machine's
# calibration changes what they see.
for name in [name for name in os.environ if name.startswith("VLLM_")]:
    del os.environ[name]
os.environ.update(RAY_USAGE_STATS_ENABLED="0", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
os.environ["QUANTSERVE_CALIBRATION"] = "/nonexistent/calibration.json"
# Threads of OpenMP that wait for each other spin. Beside another process that computes they take a processor from those
# they wait for, and a call of microseconds takes milliseconds.
os.environ["OMP_WAIT_POLICY"] = "passive"
# Python sources are compiled once, and not by each of the many processes that tests start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Readline of a process without a terminal says COLUMNS=80, which output would follow.
for name in ("QUANTSERVE_PLUGINS", "QUANTSERVE_DISABLE", "QUANTSERVE_DEBUG", "QUANTSERVE_API_KEYS", "COLUMNS", "LINES"):
    os.environ.pop(name, None)

# A package that vLLM's server imports silences the warnings of all others; where a replica undoes that, so do tests.
logging.getLogger("quantserve").setLevel(logging.WARNING)

# A shell ignores SIGINT in what it starts in the background, and nohup SIGHUP; processes of tests would inherit that.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

TOGETHER = ("tests/packaging/", "tests/serve/three_models/")
"""Folders whose conftest.py makes something expensive for all their files."""

# The same examples in every run: new ones are tried with `--hypothesis-profile=default`, not in somebody's build.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Hide from other tests the variables that vLLM sets in this process: a model's environment would count them."""
    engine = item.get_closest_marker("vllm") or item.get_closest_marker("ray")
    names = [] if engine else [name for name in os.environ if name.startswith("VLLM_")]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        return (yield)
    finally:
        os.environ.update(hidden)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The phases of `make test`; without the option every test runs, one after the other."""
    parser.addoption("--phase", choices=("beside", "alone"), help="only tests that may run beside others, or the rest")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no file without a test of the phase `alone` for that phase: importing all takes a minute."""
    alone = config.getoption("phase") == "alone" and collection_path.name.startswith("test_")
    return True if alone and collection_path.is_file() and b"mark.alone" not in collection_path.read_bytes() else None


@pytest.hookimpl(tryfirst=True)  # before `-m` is evaluated
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Select the tests of a phase; skip what needs a GPU where there is none, and say so."""
    phase = config.getoption("phase")
    if phase:
        parts: dict[bool, list[pytest.Item]] = {True: [], False: []}
        for item in items:
            parts[(item.get_closest_marker("alone") is not None) == (phase == "alone")].append(item)
        items[:] = parts[True]
        config.hook.pytest_deselected(items=parts[False])
    if phase == "beside":
        # Files with slow tests first, so that all processes end at about the same time.
        slow = {item.path for item in items if any(map(item.get_closest_marker, ("slow", "ray")))}
        items.sort(key=lambda item: item.path not in slow)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not gpu_answers():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A process takes a whole file or a folder of TOGETHER, so that what its tests share is made once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByUnit(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return next((folder for folder in TOGETHER if file.startswith(folder)), file)

    return ByUnit(config, log)


def gpu_answers() -> bool:
    """Whether an NVIDIA driver lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    asked = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return asked.returncode == 0 and "GPU" in asked.stdout
