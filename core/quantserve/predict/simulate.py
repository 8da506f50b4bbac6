"""The scheduler, step by step: who waits, who computes its prompt, who decodes, and when each token comes out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quantserve.predict.step import Batch, batch_of
from quantserve.predict.workload import Workload


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine admits.

    Attributes:
        sequences: at once (max_num_seqs).
        step_tokens: tokens of one step (max_num_batched_tokens).
        cache_tokens: tokens the KV cache holds; 0 when unknown.
        prefill_first: whole prompts before anything decodes, instead of chunks beside it.
        window: of sliding-window layers; 0 without.
    """

    sequences: int
    step_tokens: int
    cache_tokens: int = 0
    prefill_first: bool = False
    window: int = 0


@dataclass(slots=True)
class Request:
    """One request on its way; times in seconds since the beginning.

    Attributes:
        prompt, wanted: tokens in and out.
        arrival: when the engine gets it.
        computed: tokens in the KV cache.
        produced: tokens that came out.
        first, last: when the first and the last did.
    """

    prompt: int
    wanted: int
    arrival: float
    computed: float = 0
    produced: int = 0
    first: float = 0.0
    last: float = 0.0

    @property
    def missing(self) -> float:
        """Prompt tokens not yet computed."""
        return self.prompt - self.computed if not self.produced else 0


@dataclass(frozen=True, slots=True)
class Run:
    """What a simulated run gave: the finished requests, how long it took, and the most that ran at once."""

    requests: Sequence[Request]
    duration: float
    most_running: int


class _Engine:
    def __init__(self, limits: Limits, seconds: Callable[[Batch], float]) -> None:
        self.limits, self.seconds = limits, seconds
        self.now = 0.0
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.reserved = 0
        self.most = 0

    def admit(self) -> None:
        """Take waiting requests in order while a place and room for their whole length are free."""
        limits = self.limits
        while self.waiting and self.waiting[0].arrival <= self.now and len(self.running) < limits.sequences:
            size = self.waiting[0].prompt + self.waiting[0].wanted
            # A request larger than the cache runs alone: what is refused is said elsewhere.
            if limits.cache_tokens and self.running and self.reserved + size > limits.cache_tokens:
                break
            self.reserved += size
            self.running.append(self.waiting.popleft())
        self.most = max(self.most, len(self.running))

    def step(self) -> list[Request]:
        """One step, or as many equal ones as nothing changes in; gives the requests that finish."""
        prompts = [request for request in self.running if request.missing]
        if prompts:
            return self._mixed(prompts)
        return self._decode()

    def _mixed(self, prompts: Sequence[Request]) -> list[Request]:
        decoding = [] if self.limits.prefill_first else [r for r in self.running if r.produced]
        budget = self.limits.step_tokens - len(decoding)
        parts: list[tuple[float, float, bool]] = [(1, r.computed, True) for r in decoding]
        given: list[tuple[Request, float]] = []
        for request in prompts:
            chunk = min(request.missing, max(budget, 0))
            whole = chunk == request.missing
            if self.limits.prefill_first and not whole:
                if given:
                    break
                chunk, whole = request.missing, True  # longer than the budget: it still runs, alone
            if chunk <= 0:
                break
            given.append((request, chunk))
            parts.append((chunk, request.computed, whole))
            budget -= int(chunk)
        self.now += self.seconds(batch_of(parts, self.limits.window))
        for request in decoding:
            self._give(request, 1)
        for request, chunk in given:
            request.computed += chunk
            if request.computed >= request.prompt:
                request.first = request.last = self.now
                request.produced = 1
        return self._finish()

    def _decode(self) -> list[Request]:
        """Every running request is given tokens until one finishes or the next request arrives."""
        steps = min(request.wanted - request.produced for request in self.running)
        middle = batch_of(((1, r.computed + (steps - 1) / 2, True) for r in self.running), self.limits.window)
        each = self.seconds(middle)
        places = len(self.running) < self.limits.sequences
        if self.waiting and places and self.waiting[0].arrival > self.now:
            until = int((self.waiting[0].arrival - self.now) / each) + 1
            if until < steps:
                steps = until
                middle = batch_of(((1, r.computed + (steps - 1) / 2, True) for r in self.running), self.limits.window)
                each = self.seconds(middle)
        self.now += steps * each
        for request in self.running:
            self._give(request, steps)
        return self._finish()

    def _give(self, request: Request, tokens: int) -> None:
        request.computed += tokens
        request.produced += tokens
        request.last = self.now

    def _finish(self) -> list[Request]:
        done = [request for request in self.running if request.produced >= request.wanted]
        if done:
            self.running = [request for request in self.running if request.produced < request.wanted]
            self.reserved -= sum(request.prompt + request.wanted for request in done)
        return done


def simulate(workload: Workload, limits: Limits, seconds: Callable[[Batch], float], arrival_s: float = 0.0) -> Run:
    """Run a workload against a scheduler whose steps take `seconds(batch)`.

    Clients send their next request when the last one is answered (or, in rounds, when all are). Between a client and
    the engine lie ``arrival_s`` seconds, which every request pays once before it arrives.
    """
    todo = deque(workload.lengths())
    engine = _Engine(limits, seconds)
    finished: list[Request] = []
    in_flight = 0

    def send() -> None:
        nonlocal in_flight
        if todo:
            prompt, wanted = todo.popleft()
            engine.waiting.append(Request(prompt, wanted, engine.now + arrival_s))
            in_flight += 1

    for _ in range(workload.concurrency):
        send()
    while in_flight:
        engine.admit()
        if not engine.running:
            engine.now = engine.waiting[0].arrival
            continue
        done = engine.step()
        finished += done
        in_flight -= len(done)
        if not workload.rounds:
            for _ in done:
                send()
        elif not in_flight:
            for _ in range(workload.concurrency):
                send()
    return Run(finished, engine.now, engine.most)
