"""Results made by hand: what was read when, as `run` would have left it."""

from __future__ import annotations

from collections.abc import Sequence

from quantserve_bench import Closed, Load, Request, Result, Run
from quantserve_bench.wire import ResponseReader

from .fake_server import DONE, END, FINISH, ROLE, chunk, delta, head, usage, whole

ASK = Request(messages=[{"role": "user", "content": "Hi"}], max_tokens=8, input_tokens=100)


def result(reads: Sequence[tuple[float, bytes]], start: float = 0.0, number: int = 0, scheduled: float | None = None,
           request: Request = ASK) -> Result:  # fmt: skip
    """A result whose bytes came at these times after `start`."""
    out = Result(request, number, start if scheduled is None else scheduled, start)
    out._reads = [(start + at, data) for at, data in reads]
    out._reader = ResponseReader()
    for position, (_, data) in enumerate(out._reads):
        out._reader.feed(data, position)
    out.end = out._reads[-1][0]
    return out.decode()


def chat(
    tokens: Sequence[tuple[float, Sequence[str]]],
    prompt: int = 10,
    count: int | None = None,
    start: float = 0.0,
    number: int = 0,
    counted: bool = True,
    tail: float = 0.0,
    scheduled: float | None = None,
) -> Result:
    """A chat: the role with the head at half the time of the first token, tokens, finish with usage after the last.

    Args:
        tokens: when, and what came together.
        prompt, count: what the server says it counted; `count` defaults to the tokens given.
        start, number, scheduled: of the result.
        counted: whether the server says so.
        tail: how long after the last token the end comes.
    """
    first = tokens[0][0] if tokens else 0.2
    reads = [(first / 2, head() + chunk(ROLE))]
    reads += [(at, b"".join(chunk(delta(content=text)) for text in texts)) for at, texts in tokens]
    count = sum(len(texts) for _, texts in tokens) if count is None else count
    last = tokens[-1][0] if tokens else first
    end = chunk(FINISH) + (chunk(usage(prompt, count)) if counted else b"") + chunk(DONE) + END
    return result([*reads, (last + tail, end)], start, number, scheduled)


def refusal(status: int, start: float = 0.0, number: int = 0) -> Result:
    return result([(0.01, whole(status, {"error": {"message": f"refused with {status}"}}))], start, number)


def made_run(results: Sequence[Result], load: Load | None = None, ended: float | None = None) -> Run:
    """A run from time 0 that ended with the last answer, or at `ended`."""
    for number, item in enumerate(results):
        item.number = number
    end = max(item.end for item in results) if ended is None else ended
    return Run(load or Closed(1), list(results), 0.0, end, 1_700_000_000.0, 0.25 * end, 0.001, 0.004)
