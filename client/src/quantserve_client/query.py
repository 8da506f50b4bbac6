"""What ``quantserve query`` does."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.markup import escape

from quantserve.cli.output import console
from quantserve.errors import QuantserveError, UsageError
from quantserve_bench.result import Result
from quantserve_client.display import Blocks, Columns, Display, JsonLines
from quantserve_client.figures import Expected, expected_of
from quantserve_client.figures import stats as stats_table
from quantserve_client.lines import STDIN, prompts, request, whole_input
from quantserve_client.options import Address, Generation
from quantserve_client.server import Server


def query(
    address: Address,
    models: tuple[str, ...],
    texts: Sequence[str],
    files: Sequence[str],
    generation: Generation,
    *,
    stats: bool,
    as_json: bool,
) -> int:
    """Ask, show the answers; returns the exit code.

    Args:
        address: of the server.
        models: ids; empty for the only one.
        texts: prompts; ``-`` is standard input as a whole.
        files: of further prompts.
        generation: parameters.
        stats: print the figures.
        as_json: print JSON lines.
    """
    asked = _prompts(texts, files)
    requests = [request(messages, generation) for _, messages in asked]
    out, err = console(), console(stderr=True)
    results: list[tuple[str, Result]] = []
    expected: dict[str, Expected] = {}

    async def run() -> int:
        code = 0
        async with Server(address) as server:
            chosen = await server.choose(models)
            for (text, _), one in zip(asked, requests, strict=True):
                display = _display(out, chosen, text, len(asked) > 1, as_json)
                with display:
                    jobs = [_ask(server, display, one, model, n) for n, model in enumerate(chosen)]
                    answers = await asyncio.gather(*jobs)
                results.extend(zip(chosen, answers, strict=True))
                for model, answer in zip(chosen, answers, strict=True):
                    if answer.failure:
                        error = await server.explained(answer.failure, model)
                        _complain(err, model, error)
                        code = max(code, error.exit_code)
            if stats:
                with suppress(QuantserveError):  # the answers are there; the figures beside them may be missing
                    expected.update(expected_of(await server.status()))
        return code

    try:
        return asyncio.run(run())
    finally:
        if stats and results:
            err.print(stats_table(results, expected))


async def _ask(server: Server, display: Display, one: Any, model: str, number: int) -> Result:
    result = await server.answer(one, model, lambda event: display.show(number, event.text), number)
    display.end(number, result)
    return result


def _prompts(texts: Sequence[str], files: Sequence[str]) -> list[tuple[str, list[dict[str, Any]]]]:
    if [*texts, *files].count(STDIN) > 1:
        raise UsageError("standard input (-) is named twice\n  fix: name it once")
    found = []
    for text in texts:
        said = whole_input() if text == STDIN else text
        if not said.strip():
            raise UsageError("a prompt is empty\n  fix: write a text, or leave it out")
        found.append((said, [{"role": "user", "content": said}]))
    for name in files:
        found += prompts(name)
    if not found:
        raise UsageError('nothing to ask\n  fix: write a prompt, as in `quantserve query "What is GPTQ?"`, or --file')
    return found


def _display(out: Console, models: Sequence[str], prompt: str, several: bool, as_json: bool) -> Display:
    if as_json:
        return JsonLines(models, prompt)
    if out.is_terminal and len(models) > 1:
        return Columns(out, models, prompt if several else "")
    return Blocks(models, prompt if several else "")


def _complain(err: Console, model: str, error: QuantserveError) -> None:
    err.print(f"[red bold]error:[/] {escape(model)}: {escape(str(error))}", soft_wrap=True)
