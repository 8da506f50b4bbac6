"""Which signals stop a server, and when a second one stops it at once; in processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import pytest

PROGRAM = """
import os, signal, sys, threading, time
threading.Thread(target=time.sleep, args=[100], daemon=True).start()  # a library's thread, which accepts signals
from quantserve.serve.signals import Stopped, StopSignal, shielded
stop = StopSignal(lambda: (print("at once", flush=True), os._exit(130)))
print("started", flush=True)
try:
    if "hang" in sys.argv:
        with shielded():  # as while Ray starts
            time.sleep(60 if "long" in sys.argv else 0.5)
        stop.check()
    elif "run" in sys.argv:
        stop.run(lambda: time.sleep(100))
    else:
        stop.wait(100)
except Stopped:
    print("stopped", flush=True)
if "drain" in sys.argv:
    time.sleep(100)
"""
APART_S = 0.7
"""Signals within 0.5 s are one."""


def run(
    arguments: Sequence[str], signals: Sequence[tuple[float | str, int]], ignored: str = ""
) -> tuple[int, list[str]]:
    """Send signals, each after a pause or a line of output with a pause of `APART_S`; returns exit code and output."""
    trap = ["sh", "-c", f'trap "" {ignored}; exec "$@"', "sh"] if ignored else []
    process = subprocess.Popen(
        [*trap, sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout
    try:
        assert process.stdout.readline() == "started\n"
        lines = []
        for after, number in signals:
            if isinstance(after, str):
                while not lines or lines[-1] != after:
                    lines.append(process.stdout.readline().rstrip())
                after = APART_S
            time.sleep(after)
            process.send_signal(number)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, lines + output.splitlines()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("waiting", ["wait", "run", "hang"])
def test_a_signal_stops(number: int, waiting: str) -> None:
    assert run([waiting], [(0, number)]) == (0, ["stopped"])


def test_a_second_signal_stops_at_once_even_while_the_main_thread_hangs() -> None:
    assert run(["hang", "long"], [(0, signal.SIGTERM), (3 * APART_S, signal.SIGINT)]) == (130, ["at once"])
    assert run(["drain"], [(0, signal.SIGHUP), ("stopped", signal.SIGTERM)]) == (130, ["stopped", "at once"])


def test_signals_of_one_event_count_once() -> None:
    """`timeout` sends SIGTERM twice; a terminal and its shell send SIGHUP each, systemd SIGHUP after SIGTERM."""
    signals = [(0.0, signal.SIGTERM), (0.0, signal.SIGTERM), ("stopped", signal.SIGHUP), (0.0, signal.SIGHUP)]
    assert run(["drain"], [*signals, (0.5, signal.SIGKILL)]) == (-signal.SIGKILL, ["stopped"])


def test_ignored_signals_stay_ignored() -> None:
    """As under nohup, and in the background jobs of scripts."""
    signals = [(0.0, signal.SIGHUP), (0.0, signal.SIGINT), (0.3, signal.SIGKILL)]
    assert run(["wait"], signals, ignored="HUP INT") == (-signal.SIGKILL, [])
    assert run(["wait"], [*signals[:2], (0.3, signal.SIGTERM)], ignored="HUP INT") == (0, ["stopped"])
