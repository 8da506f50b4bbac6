"""Descendants of the server: orphans are reaped, and killing leaves none."""

from __future__ import annotations

import subprocess
import sys

ORPHAN = (
    "import subprocess as s, sys; "
    "print(s.Popen(['sleep', sys.argv[1]], start_new_session=True, stdout=s.DEVNULL, stderr=s.DEVNULL).pid)"
)

KILL = f"""
import psutil, subprocess, sys
from quantserve.serve.driver.processes import Processes
processes = Processes()
orphan = psutil.Process(int(subprocess.run([sys.executable, "-c", {ORPHAN!r}, "100"], capture_output=True).stdout))
child = psutil.Popen(["sh", "-c", "trap '' TERM; sleep 100; true"])
processes.kill()
print(orphan.is_running(), child.is_running(), psutil.Process().children())
"""
SHARED = """
import subprocess, sys
from quantserve.serve.driver.processes import Processes
processes = Processes()
work = "import time; from multiprocessing.shared_memory import SharedMemory as S; shared = S(create=True, size=9); "
work += "print(shared.name, flush=True); time.sleep(100)"
child = subprocess.Popen([sys.executable, "-c", work], stdout=subprocess.PIPE, text=True)
name = child.stdout.readline().strip()
processes.kill()
from multiprocessing.shared_memory import SharedMemory
try:
    SharedMemory(name)
except FileNotFoundError:
    print("removed")
"""
REAP = f"""
import psutil, subprocess, sys, time
from quantserve.serve.driver import processes
processes.REAP_AFTER_S = processes.REAP_EVERY_S = 0.2
ours = subprocess.Popen(["sh", "-c", "exit 3"])
processes.Processes()
orphan = int(subprocess.run([sys.executable, "-c", {ORPHAN!r}, "0"], capture_output=True).stdout)
print(ours.wait())
deadline = time.monotonic() + 120
while psutil.pid_exists(orphan) and time.monotonic() < deadline:
    time.sleep(0.1)
print(psutil.pid_exists(orphan))
"""


def output(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300).stdout


def test_killing_ends_orphans_and_processes_that_ignore_signals() -> None:
    assert output(KILL) == "False False []\n"


def test_shared_memory_of_killed_processes_is_removed() -> None:
    assert output(SHARED) == "removed\n"


def test_orphans_are_reaped_and_the_exit_codes_of_children_are_kept() -> None:
    assert output(REAP) == "3\nFalse\n"
