"""Processes leave the CPUs to those that compute."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantserve.serve.cpus import NICEST, STEP_BACK, keep_off, step_back

CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
pytestmark = pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs and a system that binds processes to them")

REPLICA = """
import os, subprocess, sys, threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
sleep = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
core = subprocess.Popen(sleep, stdout=subprocess.PIPE)
reserved, *bound = map(int, sys.argv[1:])
workers = [subprocess.Popen(["taskset", "-c", str(cpu), *sleep], stdout=subprocess.PIPE) for cpu in bound]
for process in (core, *workers):
    process.stdout.readline()
from quantserve.serve.cpus import leave_to_workers
print(sorted(leave_to_workers(reserved)))
mine = [os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")]
print([sorted(mask) for mask in mine])
print(sorted(os.sched_getaffinity(core.pid)), *[sorted(os.sched_getaffinity(worker.pid)) for worker in workers])
for process in (core, *workers):
    process.kill()
"""


def replica(*bound: int, reserved: int = 1) -> list[str]:
    """A replica with workers bound to these CPUs: returns those found, the CPUs of its threads and of its children."""
    command = [sys.executable, "-c", REPLICA, str(reserved), *map(str, bound)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return out.stdout.splitlines()


def test_a_replica_and_the_engine_core_leave_the_workers_cpus() -> None:
    found, threads, family = replica(CPUS[0])
    assert found == str([CPUS[0]])
    rest = CPUS[1:]
    assert threads == str([rest, rest])
    assert family == f"{rest} {[CPUS[0]]}"


@pytest.mark.parametrize("bound", [(), CPUS])
def test_affinity_is_unchanged_without_bound_or_free_cpus(bound: tuple[int, ...]) -> None:
    found, threads, family = replica(*bound, reserved=0)
    assert found == "[]"
    assert threads == str([CPUS, CPUS])
    assert family == " ".join(map(str, [CPUS, *([cpu] for cpu in bound)]))


def test_only_the_replica_is_kept_off_when_engines_share_the_cpus() -> None:
    found, threads, family = replica(reserved=1)
    assert found == str(CPUS[:-1])
    assert threads == str([CPUS[-1:], CPUS[-1:]])
    assert family == str(CPUS)
    assert replica(reserved=len(CPUS)) == ["[]", str([CPUS, CPUS]), str(CPUS)]


def test_affinity_is_restored_when_no_cpu_is_bound() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        keep_off(process.pid, CPUS[:1])
        assert os.sched_getaffinity(process.pid) == set(CPUS[1:])
        keep_off(process.pid, [])
        assert os.sched_getaffinity(process.pid) == set(CPUS)
        keep_off(process.pid, CPUS)  # none left
        assert os.sched_getaffinity(process.pid) == set(CPUS)
    finally:
        process.communicate(b"\n")
    assert not Path(f"/proc/{process.pid}").exists()
    keep_off(process.pid, [])  # it has left: nothing happens


PATIENT = """
import subprocess, sys, threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
print(flush=True)
input()
look = "import os; print(os.getpriority(os.PRIO_PROCESS, 0), sorted(os.sched_getaffinity(0)))"
child = subprocess.Popen([sys.executable, "-c", look])
child.wait()
"""


@pytest.mark.parametrize("but_first", [False, True])
def test_niceness_and_affinity_of_a_process_and_its_children(but_first: bool) -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    nicer = min(NICEST, own + STEP_BACK)
    with subprocess.Popen(
        [sys.executable, "-c", PATIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        step_back(process.pid, but_first=but_first)
        keep_off(process.pid, CPUS[:1], but_first=but_first)
        threads = sorted(int(thread.name) for thread in Path(f"/proc/{process.pid}/task").iterdir())
        first, *others = [os.getpriority(os.PRIO_PROCESS, thread) for thread in threads]
        *_, last = [sorted(os.sched_getaffinity(thread)) for thread in threads]
        out, _ = process.communicate("\n", timeout=300)
    assert first == (own if but_first else nicer)
    assert out.strip() == f"{first} {CPUS if but_first else CPUS[1:]}"
    assert others == [nicer]
    assert last == CPUS[1:]
    step_back(process.pid)  # it has left: nothing happens
