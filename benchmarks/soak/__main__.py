"""The command line: `python -m benchmarks.soak`."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import benchmarks.soak as package
from benchmarks import program, report
from benchmarks.console import BUILD, say
from benchmarks.serving.processes import require_memory
from benchmarks.soak import judge, results
from benchmarks.soak.clients import Book, Users, mixed
from benchmarks.soak.faults import ORDER, Faults
from benchmarks.soak.server import MODELS, Sample, Server
from quantserve.system.open_files import raise_open_files
from quantserve_bench.load import run_blocking

SAMPLE_S: Final = 10.0
FEWEST_SAMPLES: Final = 60
"""A short run is sampled more often."""
SETTLE_S: Final = 30.0
"""Longest wait for the last requests, and then for the counters to fall to 0."""
PAUSE_S: Final = 1.0


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=package.__doc__)
    out.add_argument("--minutes", type=float, default=60.0, help="duration of the load; default 60")
    out.add_argument("--fault-every", type=float, default=60.0, metavar="S", help="seconds between faults; default 60")
    out.add_argument("--only", action="append", choices=sorted({name for name, _ in ORDER}), default=[],
                     metavar="FAULT", help="cause this fault only, e.g. 'client storm'; may be repeated")  # fmt: skip
    out.add_argument("--users", type=int, default=12, help="concurrent users; default 12")
    out.add_argument("--seed", type=int, default=0, help="of the order of the requests; default 0")
    out.add_argument(
        "--render", action="store_true", help="run nothing: write table and plot of OUT/results.json again"
    )
    out.add_argument("--out", type=Path, default=BUILD / "soak", help="default build/bench/soak")
    return out


class Soak:
    """One soak.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._server = Server(options.out)
        self._book = Book()
        self._kinds = mixed(self._server.target, list(MODELS))
        self._users = Users(self._server.target, self._kinds, self._book, options.seed)
        self._faults = Faults(self._server, self._users, say, options.only)
        self._samples: list[Sample] = []
        self._by_minute: list[dict[str, Any]] = []
        self._counted: dict[str, int] = dict.fromkeys(("answered", "refused", "left", "failed"), 0)
        self._began = 0.0
        self._busy: float | None = None

    def run(self) -> program.Found:
        """Start the server, load it, stop it, judge.

        Raises:
            BenchError: the server did not start.
        """
        require_memory(sum(replicas for _, replicas in MODELS.values()))
        raise_open_files()
        try:
            say("starting the server: 3 replicas")
            self._server.start()
            self._began = time.time()
            say(f"ready; load for {self._options.minutes:g} minutes, a fault every {self._options.fault_every:g} s")
            run_blocking(self._load())
            say("stopping the server")
            wrong = self._server.stop()
        finally:
            self._server.kill()
        found = self._found(wrong)
        program.write(self._options.out / "results.json", json.dumps(found, indent=1) + "\n")
        return found

    async def _load(self) -> None:
        deadline = time.time() + 60 * self._options.minutes
        async with asyncio.TaskGroup() as tasks:
            users = tasks.create_task(self._users.work(self._options.users, PAUSE_S))
            sampling = tasks.create_task(self._sample())
            await self._cause_faults(deadline)
            self._users.enough.set()
            await users
            sampling.cancel()
        await self._look()
        self._count()
        patience = time.monotonic() + SETTLE_S
        while (busy := await asyncio.to_thread(self._server.busy)) != 0 and time.monotonic() < patience:
            await asyncio.sleep(1)
        self._busy = busy

    async def _cause_faults(self, deadline: float) -> None:
        """Cause a fault in every interval, if the last one is over; the last interval has none."""
        every = self._options.fault_every
        due = time.time() + every / 2
        while due < deadline - every / 2:
            await asyncio.sleep(max(0.0, due - time.time()))
            await self._faults.one()
            due = max(due + every, time.time() + every / 4)
        await asyncio.sleep(max(0.0, deadline - time.time()))

    async def _sample(self) -> None:
        every = min(SAMPLE_S, 60 * self._options.minutes / FEWEST_SAMPLES)
        while True:
            await self._look()
            if self._samples[-1].at >= self._began + 60 * (len(self._by_minute) + 1):
                self._count()
            await asyncio.sleep(every)

    async def _look(self) -> None:
        calm = self._faults.calm
        sample = await asyncio.to_thread(self._server.sample, calm)
        sample.calm = calm and self._faults.calm
        self._samples.append(sample)

    def _count(self) -> None:
        """A row of the table: requests since the last one, and what the server uses now."""
        sample, before = self._samples[-1], self._counted
        self._counted = {result: self._book.total(result) for result in before}
        counts = {result: self._counted[result] - before[result] for result in before}
        minute = round((sample.at - self._began) / 60, 1)
        self._by_minute.append({"minute": minute, **counts, "roles": asdict(sample)["roles"]})
        say(self._line(counts, sample))

    def _line(self, counts: dict[str, int], sample: Sample) -> str:
        uses = ", ".join(f"{role} {use.private >> 20} MiB {use.fds} fds" for role, use in sample.roles.items())
        return f"{counts['answered']} answered, {counts['refused']} refused, {counts['failed']} failed; {uses}"

    def _found(self, wrong: list[str]) -> program.Found:
        faults = self._faults.done
        with self._server.access_log.open(encoding="utf-8") as lines:
            log, replicas = judge.logged(self._book, lines, faults)
        judgements = [
            judge.loaded(self._book, sorted({kind.name for kind in self._kinds})),
            judge.lost(self._book, faults, replicas),
            log,
            judge.recovered(faults),
            judge.idle(self._busy),
            *(one for name in judge.QUANTITIES for one in judge.flat(self._samples, name)),
            judge.reaped(self._samples),
            judge.stopped(wrong),
        ]
        return {
            "machine": report.machine(),
            "began": self._began,
            "minutes": self._options.minutes,
            "users": self._options.users,
            "judgements": judge.to_json(judgements),
            "by_minute": self._by_minute,
            "faults": [asdict(fault) for fault in faults],
            "requests": self._book.to_json(),
            "samples": [asdict(sample) for sample in self._samples],
        }


def main() -> int:
    """Run it; exit code 1 if a judgement fails."""
    options = parser().parse_args()
    if options.minutes <= 0 or options.fault_every <= 0 or options.users < 1:
        print("soak: --minutes, --fault-every and --users must be above 0", file=sys.stderr)
        return 2
    failed: list[str] = []

    def measure() -> program.Found:
        found = Soak(options).run()
        failed.extend(judgement["name"] for judgement in found["judgements"] if judgement["sound"] is False)
        return found

    code = program.run("soak", options, measure, results.table, results.plot, "nothing was judged")
    return code or int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
