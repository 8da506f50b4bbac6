"""A process that compiles clients' grammars with limits on CPU time and memory, before an engine does it without them.

``python -m quantserve.serve.replica.vllm.grammar_process`` reads xgrammar's tokenizer information from the first
line of its input, and a job from each further one: ``[id, kind, text]``. It answers a job with the line
``[id, verdict, reason]``.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, Final

COMPILE_S: Final = 5.0
"""Limit of CPU time of a job."""
PARSE_S: Final = 0.25
"""Limit of CPU time to parse a grammar, which vLLM does on the event loop of all streams."""
STEP_S: Final = 0.1
"""Limit of CPU time to find the allowed tokens, which vLLM does between two steps of the engine."""
STEPS: Final = 12
MEMORY_BYTES: Final = 2 << 30
OK: Final = "ok"
FAILED: Final = "failed"
EXPENSIVE: Final = "expensive"
_ORIGIN: Final = re.compile(r"^\[[\d:]+\] \S+:\d+: ")
"""Time and line of xgrammar's source in its messages."""


def main() -> None:
    """Read jobs until the end of the input."""
    import xgrammar

    os.nice(5)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    tokens = xgrammar.TokenizerInfo.deserialize_json(sys.stdin.readline())
    for line in sys.stdin:
        if os.fork() == 0:
            _supervise(line, tokens)


def _supervise(line: str, tokens: Any) -> None:
    """Run a job in a child process; write the answer also if the child was killed."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    job, kind, text = json.loads(line)
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        os.close(read)
        os.write(write, json.dumps(_limited(kind, text, tokens)).encode()[:4096])
        os._exit(0)
    os.close(write)
    answer = os.read(read, 4096)
    os.waitpid(pid, 0)
    verdict, reason = json.loads(answer) if answer else (EXPENSIVE, "")
    os.write(1, json.dumps([job, verdict, reason]).encode() + b"\n")
    os._exit(0)


def _limited(kind: str, text: str, tokens: Any) -> tuple[str, str]:
    seconds = int(time.process_time() + COMPILE_S) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm") as file:
        memory = int(file.read().split()[0]) * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    try:
        return _judged(kind, text, tokens)
    except MemoryError:
        return EXPENSIVE, ""


def _judged(kind: str, text: str, tokens: Any) -> tuple[str, str]:
    import xgrammar

    compiler = xgrammar.GrammarCompiler(tokens, max_threads=1, cache_enabled=False)
    actions: dict[str, tuple[Callable[[str], Any], Callable[[str], Any]]] = {
        "json": (xgrammar.Grammar.from_json_schema, compiler.compile_json_schema),
        "regex": (xgrammar.Grammar.from_regex, compiler.compile_regex),
        "ebnf": (xgrammar.Grammar.from_ebnf, compiler.compile_grammar),
        "lark": (xgrammar.Grammar.from_lark, compiler.compile_lark),
        "tag": (_tag(xgrammar.Grammar.from_structural_tag), _tag(compiler.compile_structural_tag)),
    }
    parse, compile_ = actions[kind]
    start = time.process_time()
    try:
        parse(text)
    except MemoryError:
        raise
    except Exception as error:
        return FAILED, _reason(error)
    if time.process_time() - start > PARSE_S:
        return EXPENSIVE, ""
    try:
        return _stepped(compile_(text), tokens.vocab_size)
    except MemoryError:
        raise
    except Exception as error:
        return FAILED, _reason(error)


def _tag(make: Callable[..., Any]) -> Callable[[str], Any]:
    """A function of xgrammar for structural tags, also for their old form, as vLLM calls it."""
    import xgrammar

    def read(text: str) -> Any:
        tag = json.loads(text)
        if "structures" not in tag:
            return make(text)
        items = [
            xgrammar.StructuralTagItem(begin=one["begin"], schema=json.dumps(one["schema"]), end=one["end"])
            for one in tag["structures"]
        ]
        return make(items, tag["triggers"])

    return read


def _reason(error: Exception) -> str:
    return _ORIGIN.sub("", str(error)).strip()[:500]


def _stepped(compiled: Any, size: int) -> tuple[str, str]:
    """The verdict on the first steps of an output."""
    import xgrammar

    mask = xgrammar.allocate_token_bitmask(1, size)
    for last in (False, True):
        matcher = xgrammar.GrammarMatcher(compiled)
        for step in range(STEPS):
            start = time.process_time()
            matcher.fill_next_token_bitmask(mask, 0)
            token = _allowed(mask[0].tolist(), last)
            if token is None and step == 0:
                return FAILED, "no text fits it"
            going_on = token is not None and matcher.accept_token(token) and not matcher.is_terminated()
            if time.process_time() - start > STEP_S:
                return EXPENSIVE, ""
            if not going_on:
                break
    return OK, ""


def _allowed(words: list[int], last: bool) -> int | None:
    """The first or the last token of a bitmask of 32-bit words."""
    order = range(len(words) - 1, -1, -1) if last else range(len(words))
    for index in order:
        if word := words[index] & 0xFFFFFFFF:
            return 32 * index + (word.bit_length() - 1 if last else (word & -word).bit_length() - 1)
    return None


if __name__ == "__main__":
    main()
