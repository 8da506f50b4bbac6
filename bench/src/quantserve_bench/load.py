"""Load shapes, and `run`: requests sent in one of them.

results = await run(Target("http://127.0.0.1:8000", "demo"), requests, Closed(concurrency=16))
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import inf, sqrt
from time import perf_counter
from typing import Any, Final, TypeVar

from quantserve.system.open_files import raise_open_files
from quantserve_bench.client import Client, Live
from quantserve_bench.request import Request, Target
from quantserve_bench.result import Result

T = TypeVar("T")
RAW_LIMIT: Final = 256 << 20
"""Most bytes of undecoded answers; beyond it answers are decoded during the load."""
PAUSE_LIMIT_S: Final = 30.0
LAG_EVERY_S: Final = 0.05


@dataclass(frozen=True)
class Closed:
    """`concurrency` users, each sending its next request when the previous answer is complete.

    Attributes:
        concurrency: number of users.
        ramp_s: time over which the users start, evenly; 0 starts all at once.
    """

    concurrency: int
    ramp_s: float = 0.0


@dataclass(frozen=True)
class Rounds:
    """Groups of `concurrency` requests; each starts when the previous group is complete (old llmperf)."""

    concurrency: int


@dataclass(frozen=True)
class Open:
    """Requests at given times, independent of the answers.

    Attributes:
        rate: requests per second.
        rate_end: rate after `ramp_s`, changing linearly; None keeps `rate`.
        ramp_s: duration of the change.
        poisson: independent arrivals; False spaces them evenly.
        max_concurrency: further requests wait in the client; the wait is neither in TTFT nor in E2E, but reported.
        seed: of the arrivals.
    """

    rate: float
    rate_end: float | None = None
    ramp_s: float = 0.0
    poisson: bool = True
    max_concurrency: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Timed:
    """Requests at the times of a trace, in seconds from its start.

    Attributes:
        times: ascending, one per request.
        max_concurrency: as for `Open`.
    """

    times: Sequence[float]
    max_concurrency: int | None = None


Load = Closed | Rounds | Open | Timed


def describe(load: Load) -> str:
    """A load in a few words, for headings and file names."""
    match load:
        case Closed():
            return f"{load.concurrency} users" if load.concurrency != 1 else "1 user"
        case Rounds():
            return f"rounds of {load.concurrency}"
        case Open():
            to = "" if load.rate_end is None else f" to {load.rate_end:g}"
            return f"{load.rate:g}{to} req/s" + (" Poisson" if load.poisson else "")
        case Timed():
            return "trace"


@dataclass
class Run:
    """The results of one load, in the order in which the requests were sent.

    Attributes:
        load: the shape.
        results: one per request that was sent; iterating over the run gives these.
        began, ended: on the clock of `time.perf_counter`: before the first request, after the last answer.
        unix_time: `began` as Unix time.
        cpu_s: processor time this process used between the two.
        lag_mean_s, lag_max_s: delay of the event loop, which is the possible error of time stamps.
    """

    load: Load
    results: list[Result] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0
    unix_time: float = 0.0
    cpu_s: float = 0.0
    lag_mean_s: float = 0.0
    lag_max_s: float = 0.0

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    @property
    def duration_s(self) -> float:
        """Wall clock."""
        return self.ended - self.began

    @property
    def last_launch(self) -> float:
        """When the last request was sent."""
        return max((result.start for result in self.results), default=self.began)

    @property
    def client_share(self) -> float:
        """Share of one core that this process used; near 1 the client limits the results."""
        return self.cpu_s / self.duration_s if self.duration_s else 0.0


async def run(
    target: Target,
    requests: Iterable[Request],
    load: Load,
    *,
    timeout_s: float | None = 600.0,
    stall_s: float | None = None,
    max_duration_s: float | None = None,
    live: Live | None = None,
) -> Run:
    """Send requests in the shape of a load, wait for every answer, decode them.

    Requests of a sequence are encoded before the clock starts, those of an iterator when they are due. Every request
    sent is recorded. The soft limit of open files of this process is raised to the hard limit.

    Args:
        target: the server.
        requests: in order; an endless iterator needs `max_duration_s`.
        load: load shape.
        timeout_s: request timeout.
        stall_s: longest time without data within one request.
        max_duration_s: stop sending after this time; requests in flight are completed.
        live: counters to update for a display.
    """
    raise_open_files()
    client = Client(target, timeout_s, stall_s, live)
    supply = _Supply(target, requests)
    sender = _Sender(client, supply, max_duration_s or inf)
    await client.open(_users(load, supply.count))
    out = Run(load, unix_time=time.time())
    try:
        async with _lag(out):
            cpu = time.process_time()
            out.began = sender.began = perf_counter()
            await _SHAPES[type(load)](sender, load)
            out.ended = perf_counter()
            out.cpu_s = time.process_time() - cpu
    finally:
        client.close()
    out.results = sorted(sender.results, key=lambda result: result.number)
    for result in out.results:
        result.decode()
    return out


def run_blocking(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on uvloop, if it is installed, because it costs less per read."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if find_spec("uvloop"):
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work)


def arrivals(load: Open) -> Iterator[float]:
    """Send times of an open load, in seconds from its start; endless while the rate is above 0."""
    chance = random.Random(load.seed)
    expected = 0.0  # requests until now if none came by chance
    while True:
        time_s = _time_of(load, expected)
        if time_s == inf:
            return
        yield time_s
        expected += chance.expovariate(1.0) if load.poisson else 1.0


def _time_of(load: Open, expected: float) -> float:
    """When a load has sent `expected` requests: the inverse of the integral of its rate."""
    end = load.rate if load.rate_end is None else load.rate_end
    slope = (end - load.rate) / load.ramp_s if load.ramp_s else 0.0
    during = (load.rate + end) / 2 * load.ramp_s
    if expected > during or not load.ramp_s:
        return load.ramp_s + (expected - during) / end if end > 0 else inf
    root = sqrt(max(0.0, load.rate**2 + 2 * slope * expected))
    # The form of the quadratic's root that loses nothing when the slope is small.
    return 2 * expected / (load.rate + root) if load.rate + root else 0.0


class _Supply:
    """Requests and their encoded form, each returned once, in order."""

    def __init__(self, target: Target, requests: Iterable[Request]) -> None:
        self.count = len(requests) if isinstance(requests, Sequence) else None
        pairs = ((request, request.encode(target)) for request in requests)
        self._pairs = iter(list(pairs)) if self.count is not None else pairs

    def next(self) -> tuple[Request, bytes] | None:
        """The next request, None after the last."""
        return next(self._pairs, None)


class _Sender:
    """Takes requests from the supply, sends them, keeps the results."""

    def __init__(self, client: Client, supply: _Supply, max_duration_s: float) -> None:
        self.client = client
        self.results: list[Result] = []
        self.began = 0.0
        self._supply = supply
        self._max_duration_s = max_duration_s
        self._number = 0
        self._raw = 0

    def take(self) -> tuple[int, Request, bytes] | None:
        """The next request with its number; None when there is none or time is up."""
        if perf_counter() - self.began >= self._max_duration_s:
            return None
        pair = self._supply.next()
        if pair is None:
            return None
        self._number += 1
        return self._number - 1, *pair

    async def send(self, taken: tuple[int, Request, bytes], scheduled: float | None = None) -> Result:
        """Send what was taken."""
        number, request, wire = taken
        result = await self.client.send(request, wire, number, scheduled)
        self.results.append(result)
        self._raw += result.raw_bytes
        if self._raw > RAW_LIMIT:
            result.decode()
        return result


async def _closed(sender: _Sender, load: Closed) -> None:
    async def user(position: int) -> None:
        await asyncio.sleep(load.ramp_s * position / load.concurrency)
        while taken := sender.take():
            result = await sender.send(taken)
            if result.asked_to_wait_s:
                # Without waiting, refusals would use up all requests.
                await asyncio.sleep(min(PAUSE_LIMIT_S, result.asked_to_wait_s))

    await _all(user(position) for position in range(load.concurrency))


async def _rounds(sender: _Sender, load: Rounds) -> None:
    while True:
        group = [taken for _ in range(load.concurrency) if (taken := sender.take())]
        if not group:
            return
        await _all(sender.send(taken) for taken in group)


async def _open(sender: _Sender, load: Open) -> None:
    await _at(sender, arrivals(load), load.max_concurrency)


async def _timed(sender: _Sender, load: Timed) -> None:
    await _at(sender, iter(load.times), load.max_concurrency)


async def _at(sender: _Sender, times: Iterator[float], max_concurrency: int | None) -> None:
    slots = asyncio.Semaphore(max_concurrency) if max_concurrency else None

    async def one(taken: tuple[int, Request, bytes], due: float) -> None:
        if slots is None:
            await sender.send(taken, due)
            return
        async with slots:
            await sender.send(taken, due)

    async with asyncio.TaskGroup() as tasks:
        for time_s in times:
            due = sender.began + time_s
            while (wait := due - perf_counter()) > 0:  # a loop with coarse timers wakes up a little early
                await asyncio.sleep(wait)
            taken = sender.take()
            if taken is None:
                return
            tasks.create_task(one(taken, due))


async def _all(coroutines: Iterable[Coroutine[Any, Any, Any]]) -> None:
    """Run them together; when one fails the others are cancelled."""
    async with asyncio.TaskGroup() as tasks:
        for coroutine in coroutines:
            tasks.create_task(coroutine)


_SHAPES: Final[dict[type[Any], Callable[[_Sender, Any], Coroutine[Any, Any, None]]]] = {
    Closed: _closed,
    Rounds: _rounds,
    Open: _open,
    Timed: _timed,
}


def _users(load: Load, count: int | None) -> int:
    """Connections to open before the clock starts."""
    if isinstance(load, Open | Timed):
        return 1
    return min(load.concurrency, load.concurrency if count is None else count)


@asynccontextmanager
async def _lag(out: Run) -> AsyncIterator[None]:
    """Measure how late the event loop is while the block runs."""
    late: list[float] = []

    async def measure() -> None:
        while True:
            due = perf_counter() + LAG_EVERY_S
            await asyncio.sleep(LAG_EVERY_S)
            late.append(max(0.0, perf_counter() - due))

    task = asyncio.create_task(measure())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        out.lag_mean_s = sum(late) / len(late) if late else 0.0
        out.lag_max_s = max(late, default=0.0)
