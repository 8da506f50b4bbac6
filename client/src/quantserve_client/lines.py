"""Reads text files by line with limits: prompts, and JSON objects whose mistakes are named with file:line."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

from quantserve.errors import UsageError
from quantserve.system.homes import expand
from quantserve_bench.request import Request
from quantserve_client.options import Generation

LONGEST_LINE: Final = 4 << 20
"""Bytes of a line; a longer one is no prompt."""
LONGEST_INPUT: Final = 16 << 20
STDIN: Final = "-"
ROLES: Final = ("system", "developer", "user", "assistant", "tool")


def lines(name: str) -> Iterator[tuple[str, str]]:
    """Lines of a file, or of standard input for ``-``, that are not blank, each with its place ``FILE:LINE``.

    Raises:
        UsageError: it cannot be read, is not UTF-8, or has a line that is too long.
    """
    with _opened(name) as (file, shown):
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
            place = f"{shown}:{number}"
            if len(line) > LONGEST_LINE:
                raise UsageError(
                    f"{place}: a line of more than {LONGEST_LINE >> 20} MiB\n  fix: is it the right file? Put one "
                    "prompt on each line"
                )
            text = _text(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, place).strip("\r\n")
            if text.strip():
                yield place, text


def objects(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects of a file in JSON lines, each with its place.

    Raises:
        UsageError: as `lines`; or a line is no JSON object.
    """
    for place, line in lines(name):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply or too long a number"
            column = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            raise UsageError(
                f"{place}{column}: not JSON: {reason}\n  fix: write one JSON object on each line"
            ) from None
        if isinstance(value, str):
            value = {"prompt": value}
        if not isinstance(value, dict):
            raise UsageError(
                f'{place}: a JSON object is expected, this is {line[:60]}\n  fix: write {{"prompt": "..."}}'
            )
        yield place, value


def whole_input() -> str:
    """All of standard input, as one prompt.

    Raises:
        UsageError: it is empty, too long or not UTF-8.
    """
    data = sys.stdin.buffer.read(LONGEST_INPUT + 1)
    if len(data) > LONGEST_INPUT:
        raise UsageError(f"standard input is longer than {LONGEST_INPUT >> 20} MiB\n  fix: give a shorter prompt")
    text = _text(data, "standard input").rstrip("\r\n")
    if not text.strip():
        raise UsageError("standard input is empty\n  fix: pipe a prompt into the command, or write it as an argument")
    return text


def prompts(name: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """The prompts of a file: JSON objects with ``prompt`` or ``messages`` in .jsonl, else one on each line.

    Returns:
        For each the text to show and the messages.

    Raises:
        UsageError: the file cannot be used, or has no prompt.
    """
    if name.endswith((".jsonl", ".ndjson")):
        found = [messages_of(value, place) for place, value in objects(name)]
    else:
        found = [(text, [{"role": "user", "content": text}]) for _, text in lines(name)]
    if not found:
        raise UsageError(f"{_shown(name)} has no prompt\n  fix: put one prompt on each line")
    return found


def messages_of(value: dict[str, Any], place: str) -> tuple[str, list[dict[str, Any]]]:
    """Text and messages of an object with ``prompt`` or ``messages``.

    Raises:
        UsageError: it has neither or both, or one of another form.
    """
    prompt, messages = value.get("prompt"), value.get("messages")
    if (prompt is None) == (messages is None):
        which = "both `prompt` and `messages`" if prompt is not None else "neither `prompt` nor `messages`"
        raise UsageError(f'{place}: {which}\n  fix: write one of them, such as {{"prompt": "..."}}')
    if messages is None:
        if not isinstance(prompt, str) or not prompt.strip():
            raise UsageError(f"{place}: `prompt` is {json.dumps(prompt)[:60]}, a text is expected")
        return prompt, [{"role": "user", "content": prompt}]
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"{place}: `messages` is {json.dumps(messages)[:60]}, a list of messages is expected")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise UsageError(
                f"{place}: `messages[{index}]` needs a `role`, one of {', '.join(ROLES)}\n"
                '  fix: write {"role": "user", "content": "..."}'
            )
    last = messages[-1].get("content")
    return (last if isinstance(last, str) else json.dumps(last)), messages


def request(messages: list[dict[str, Any]], generation: Generation, stream: bool = True) -> Request:
    """The request of some messages.

    Raises:
        UsageError: ``completion`` is set, and there is more than one message, or one that is no text.
    """
    common: dict[str, Any] = {
        "max_tokens": generation.max_tokens,
        "temperature": generation.temperature,
        "extra": generation.extra,
        "stream": stream,
    }
    if generation.completion:
        if len(messages) > 1 or generation.system or not isinstance(messages[0].get("content"), str):
            raise UsageError("--completion takes one text, without messages or --system\n  fix: leave --completion out")
        return Request(prompt=messages[0]["content"], **common)
    system = [{"role": "system", "content": generation.system}] if generation.system else []
    return Request(messages=[*system, *messages], **common)


@contextmanager
def _opened(name: str) -> Iterator[tuple[BinaryIO, str]]:
    if name == STDIN:
        yield sys.stdin.buffer if hasattr(sys.stdin, "buffer") else io.BytesIO(), "standard input"
        return
    path = expand(name)
    try:
        with Path(path).open("rb") as file:
            yield file, name
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{name}: cannot be read: {reason}\n  fix: name a file with one prompt on each line") from None


def _text(line: bytes, place: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{place}: not UTF-8 at byte {error.start}\n  fix: save it as UTF-8") from None


def _shown(name: str) -> str:
    return "standard input" if name == STDIN else name
