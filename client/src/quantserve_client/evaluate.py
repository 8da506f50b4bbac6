"""What ``quantserve evaluate`` does: ask all models all questions, score the answers, report."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from quantserve.cli.output import console, print_json
from quantserve.errors import EngineError, QuantserveError, UsageError, unknown_name
from quantserve_bench.plots import can_plot
from quantserve_bench.request import Request
from quantserve_bench.result import Failure
from quantserve_client import judge
from quantserve_client.answers import Answers, key_of
from quantserve_client.lines import request
from quantserve_client.options import Address, Generation
from quantserve_client.questions import BUILT_IN, Question, fingerprint, read
from quantserve_client.report import Report, Score, show, write
from quantserve_client.scoring import is_right
from quantserve_client.server import Server

REFUSALS_SHOWN = 5
FATAL = frozenset({401, 403, 404, "refused", "dns", "certificate", "tls", "proxy", "connect-timeout", "connect"})
"""Failures that all requests will have, unless one was answered."""


@dataclass(frozen=True)
class Asked:
    """The options of the command; see its help."""

    file: str | None
    models: tuple[str, ...]
    match: str | None
    judge: str | None
    judge_url: str | None
    judge_api_key: str | None
    concurrency: int
    limit: int | None
    out: Path | None
    as_json: bool
    address: Address
    generation: Generation

    @property
    def judge_address(self) -> Address:
        """The judge's server; it gets the key of `address` only if it is the same server."""
        url = self.judge_url or self.address.url
        key = self.judge_api_key or (self.address.api_key if url == self.address.url else None)
        return replace(self.address, url=url, api_key=key)


def evaluate(asked: Asked) -> int:
    """Evaluate; returns the exit code.

    Raises:
        EngineError, UsageError: a server does not answer, or refuses; options or questions are wrong.
    """
    if (asked.judge_url or asked.judge_api_key) and not asked.judge and asked.judge_url:
        raise UsageError("--judge-url is the server of a judge\n  fix: name the judge's model with --judge")
    questions = read(asked.file or str(BUILT_IN), asked.match, bool(asked.judge))[: asked.limit]
    err = console(stderr=True)
    with Answers(asked.out, lambda text: err.print(f"[yellow]note[/] {escape(text)}", soft_wrap=True)) as answers:
        report = asyncio.run(_run(asked, questions, answers, err))
    if asked.out is not None:
        write(report, asked.out)
    if asked.as_json:
        print_json(report.to_json())
    else:
        show(report, console())
    if asked.out is not None:
        plots = "" if can_plot() else "; a plot needs matplotlib: pip install 'quantserve-client[plots]'"
        err.print(f"wrote {escape(str(asked.out))}{escape(plots)}", soft_wrap=True)
    return EngineError.exit_code if report.unanswered else 0


async def _run(asked: Asked, questions: Sequence[Question], answers: Answers, err: Console) -> Report:
    temperature = asked.generation.temperature
    generation = replace(asked.generation, temperature=0.0 if temperature is None else temperature)
    async with Server(asked.address) as server:
        served = await server.model_ids()
        models = list(dict.fromkeys(asked.models)) or served
        for name in models:
            if name not in served:
                raise UsageError(unknown_name("model", name, served))
        if asked.judge and len(models) < 2:
            raise UsageError("a judge compares two models or more\n  fix: name them with --model")
        requests = {q.id: request(list(q.messages), generation, stream=False) for q in questions}
        work = [(model, requests[q.id]) for q in questions for model in models]
        await _ask_all(server, work, answers, asked, err, "answers")
    texts = {
        (model, q.id): answers[key]["text"]
        for model in models
        for q in questions
        if (key := key_of(model, requests[q.id])) in answers
    }
    comparisons = []
    if asked.judge:
        comparisons = await _judge(asked, asked.judge, questions, models, texts, answers, err)
    return Report(
        source=asked.file or "built-in",
        questions=questions,
        fingerprint=fingerprint(list(questions)),
        generation=generation,
        scores=[_score(model, questions, texts) for model in models],
        judge=asked.judge,
        comparisons=comparisons,
    )


def _score(model: str, questions: Sequence[Question], texts: dict[tuple[str, str], str]) -> Score:
    right = {
        q.id: is_right(texts[model, q.id], q.match, q.references, q.tolerance)
        for q in questions
        if q.references and (model, q.id) in texts
    }
    given = {q.id: texts[model, q.id] for q in questions if (model, q.id) in texts}
    return Score(model, right, given)


async def _judge(
    asked: Asked,
    model: str,
    questions: Sequence[Question],
    models: Sequence[str],
    texts: dict[tuple[str, str], str],
    answers: Answers,
    err: Console,
) -> list[judge.Comparison]:
    """Compare each pair of models."""
    how = Generation(max_tokens=judge.MAX_TOKENS, temperature=0.0, seed=asked.generation.seed)
    pairs = list(combinations(models, 2))
    cases: dict[tuple[str, str, str], tuple[Request, Request]] = {}
    for first, second in pairs:
        for q in questions:
            if (first, q.id) in texts and (second, q.id) in texts:
                one, other = texts[first, q.id], texts[second, q.id]
                cases[first, second, q.id] = (
                    request(judge.messages(q, one, other), how, stream=False),
                    request(judge.messages(q, other, one), how, stream=False),
                )
    async with Server(asked.judge_address) as server:
        await server.choose((model,))
        work = [(model, one) for both in cases.values() for one in both]
        await _ask_all(server, work, answers, asked, err, "judgements")

    def verdicts(first: str, second: str, q: Question) -> tuple[str | None, str | None] | None:
        both = cases.get((first, second, q.id))
        keys = [key_of(model, one) for one in both or ()]
        if not keys or not all(key in answers for key in keys):
            return None
        return judge.verdict(answers[keys[0]]["text"]), judge.verdict(answers[keys[1]]["text"])

    return [judge.compared(a, b, [verdicts(a, b, q) for q in questions]) for a, b in pairs]


async def _ask_all(
    server: Server, work: Sequence[tuple[str, Request]], answers: Answers, asked: Asked, err: Console, what: str
) -> None:
    """Ask what is not answered yet, some at a time.

    Raises:
        EngineError, UsageError: the first failure, if all further requests would fail, too.
    """
    todo = list({key: (model, one) for model, one in work if (key := key_of(model, one)) not in answers}.items())
    known = len({key_of(model, one) for model, one in work}) - len(todo)
    if known:
        err.print(f"{known} {what} are there already")
    gate = asyncio.Semaphore(asked.concurrency)
    failures: list[tuple[str, Failure]] = []
    answered: list[str] = []
    with _progress(err, what, len(todo)) as advance:

        async def one(key: str, model: str, asked_for: Request) -> None:
            async with gate:
                result = await server.patient_answer(asked_for, model)
                if result.failure is None:
                    answered.append(key)
                    try:
                        answers.add(key, {"model": model, "text": result.text, "finish_reason": result.finish_reason})
                    except OSError as error:
                        fix = "free some space, then the same command goes on from here"
                        raise _Fatal(UsageError(f"--out {asked.out}: {error.strerror}\n  fix: {fix}")) from None
                else:
                    failures.append((model, result.failure))
                    if result.failure.code in FATAL and not answered:
                        raise _Fatal(await server.explained(result.failure, model))
                advance()

        try:
            async with asyncio.TaskGroup() as group:
                for key, (model, asked_for) in todo:
                    group.create_task(one(key, model, asked_for))
        except* _Fatal as fatal:
            raise _first(fatal).error from None
    for model, failure in failures[:REFUSALS_SHOWN]:
        err.print(f"[red bold]error:[/] {escape(model)}: {escape(str(server.error(failure)))}", soft_wrap=True)
    if len(failures) > REFUSALS_SHOWN:
        err.print(f"... and {len(failures) - REFUSALS_SHOWN} more")


class _Fatal(Exception):
    def __init__(self, error: QuantserveError) -> None:
        super().__init__(str(error))
        self.error = error


def _first(group: BaseExceptionGroup[_Fatal]) -> _Fatal:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


class _progress:
    """A bar on a terminal; calling what it gives moves it by one."""

    def __init__(self, err: Console, what: str, total: int) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=err,
            disable=not err.is_terminal or not total,
        )
        self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> Callable[[], Any]:
        self._bar.start()
        return lambda: self._bar.advance(self._task)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
