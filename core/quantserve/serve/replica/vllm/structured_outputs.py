"""Bounds the schemas and grammars of clients, and names their field in the errors of vLLM.

vLLM parses them on the event loop of all streams, compiles them one after the other in the engine core without a limit
on time or memory, and answers status 500 if one does not compile.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import sys
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.utils.mistral import is_mistral_tokenizer
from vllm.v1.structured_output.utils import choice_as_grammar, grammar_is_likely_lark

from quantserve.serve.replica.vllm.grammar_process import COMPILE_S, EXPENSIVE, FAILED

FIELD: Final = "structured_outputs"
"""vLLM's name; the client's is found in its request."""
LONGEST: Final = 128 << 10
"""Of a schema or grammar, in characters."""
KNOWN: Final = 1024
"""Verdicts that are kept."""
AT_ONCE: Final = 2
"""Grammars that are checked at a time."""
MODULE: Final = "quantserve.serve.replica.vllm.grammar_process"

logger = logging.getLogger(__name__)


def bound_structured_outputs(engine: Any) -> None:
    """Make an engine's client check schemas and grammars in a process with limits before the engine gets them.

    Args:
        engine: vLLM's ``AsyncLLM``. The process starts with the first such request.
    """
    add, generate = engine.add_request, engine.generate
    checks = GrammarChecks(lambda: _tokens(engine.model_config))
    backend: str = engine.vllm_config.structured_outputs_config.backend

    async def add_request(request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = getattr(params, "structured_outputs", None)
        if wanted is None:
            return await add(request_id, prompt, params, *args, **kwargs)
        kind, text = grammar_of(wanted)
        if len(text) > LONGEST:
            raise _refused(f"The schema or grammar is too long: the limit is {LONGEST} characters.")
        if kind and backend in ("auto", "xgrammar"):
            await checks.check(kind, text)
        try:
            return await add(request_id, prompt, params, *args, **kwargs)
        except VLLMValidationError as error:
            if error.parameter or not _came_from_grammar(error):
                raise
            raise _refused(str(error)) from None
        except Exception as error:
            if not _came_from_grammar(error):
                raise
            raise _refused(f"The schema or grammar cannot be compiled: {str(error)[:500]}") from None

    def start(prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any) -> AsyncGenerator[Any, None]:
        outputs: AsyncGenerator[Any, None] = generate(prompt, sampling_params, request_id, **kwargs)
        return outputs if sampling_params.structured_outputs is None else _with_compile_errors(outputs)

    engine.add_request, engine.generate = add_request, start
    if backend == "auto" and not is_mistral_tokenizer(engine.renderer.tokenizer):
        _keep_to_xgrammar(engine.engine_core)


def _keep_to_xgrammar(core: Any) -> None:
    """Make the engine core compile all grammars with xgrammar.

    It has one backend, that of its first request: one schema for which vLLM would choose another one would choose it
    for all later requests, whose grammars were checked with xgrammar.
    """
    send = core.add_request_async

    async def add_request_async(request: Any) -> None:
        wanted = getattr(request.sampling_params, "structured_outputs", None)
        if wanted is not None and wanted._backend:
            wanted._backend = "xgrammar"
        await send(request)

    core.add_request_async = add_request_async


async def _with_compile_errors(outputs: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """The outputs of a request; an error before the first token means that the engine cannot compile its grammar."""
    async for output in outputs:
        for choice in output.outputs:
            if choice.finish_reason == "error" and not choice.token_ids:
                raise _refused("The schema or grammar cannot be compiled. It may refer to itself without an end.")
        yield output


def _refused(text: str) -> VLLMValidationError:
    return VLLMValidationError(text, parameter=FIELD)


def _came_from_grammar(error: BaseException) -> bool:
    """Whether vLLM raised an error while it validated a schema or grammar."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code is SamplingParams._validate_structured_outputs.__code__:
            return True
        trace = trace.tb_next
    return False


def grammar_of(wanted: StructuredOutputsParams) -> tuple[str, str]:
    """The kind and the text of a grammar as xgrammar gets it; the kind is empty if there is nothing to check."""
    if wanted.json is not None:
        return "json", wanted.json if isinstance(wanted.json, str) else json.dumps(wanted.json)
    if wanted.regex is not None:
        return "regex", wanted.regex
    if wanted.choice:
        return "ebnf", choice_as_grammar(wanted.choice)
    if wanted.grammar is not None:
        return "lark" if grammar_is_likely_lark(wanted.grammar) else "ebnf", wanted.grammar
    if wanted.structural_tag is not None:
        return "tag", wanted.structural_tag
    return "", ""


def _tokens(model_config: Any) -> str:
    """xgrammar's description of the tokenizer, as vLLM's engine core makes it."""
    import xgrammar
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(model_config=model_config)
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=model_config.get_vocab_size())
    return str(info.serialize_json())


class GrammarChecks:
    """A client of `grammar_process`, which starts it when it is needed.

    Args:
        tokens: makes the first line of its input.

    Attributes:
        process: the running process.
    """

    def __init__(self, tokens: Callable[[], str]) -> None:
        self._tokens = tokens
        self.process: asyncio.subprocess.Process | None = None
        self._starting = asyncio.Lock()
        self._places = asyncio.Semaphore(AT_ONCE)
        self._ids = itertools.count()
        self._waiting: dict[int, asyncio.Future[tuple[str, str]]] = {}
        self._known: OrderedDict[tuple[str, str], tuple[str, str]] = OrderedDict()
        self._reader: asyncio.Task[None] | None = None

    async def check(self, kind: str, text: str) -> None:
        """Check a grammar.

        Raises:
            VLLMValidationError: it does not compile, or takes too much time or memory.
        """
        verdict, reason = await self.verdict(kind, text)
        if verdict == FAILED:
            raise _refused(f"The schema or grammar cannot be compiled: {reason}")
        if verdict == EXPENSIVE:
            raise _refused(
                "The schema or grammar is too complex: compiling it or applying it takes too long "
                f"(limit: {COMPILE_S:g} s of CPU time). Use fewer alternatives, repetitions and recursive rules."
            )

    async def verdict(self, kind: str, text: str) -> tuple[str, str]:
        """The verdict on a grammar and its reason; both empty if the process failed."""
        key = (kind, text)
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        # The compilation goes on when the client leaves, and keeps its place.
        try:
            verdict = await asyncio.shield(asyncio.create_task(self._compiled(kind, text)))
        except Exception as error:  # xgrammar does not know every tokenizer
            logger.error("a grammar was not checked: %s", error)
            return "", ""
        self._known[key] = verdict
        if len(self._known) > KNOWN:
            self._known.popitem(last=False)
        return verdict

    async def _compiled(self, kind: str, text: str) -> tuple[str, str]:
        async with self._places:
            process = await self._started()
            job = next(self._ids)
            answer = self._waiting[job] = asyncio.get_running_loop().create_future()
            try:
                assert process.stdin
                process.stdin.write(json.dumps([job, kind, text]).encode() + b"\n")
                await process.stdin.drain()
                return await answer
            finally:
                del self._waiting[job]

    async def stop(self) -> None:
        """End the process, which also ends with this one."""
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    async def _started(self) -> asyncio.subprocess.Process:
        async with self._starting:
            if self.process is None or self.process.returncode is not None:
                tokens = await asyncio.to_thread(self._tokens)
                self.process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    MODULE,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    limit=1 << 20,
                )
                assert self.process.stdin
                self.process.stdin.write(tokens.encode() + b"\n")
                self._reader = asyncio.create_task(self._read(self.process))
            return self.process

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout
        while line := await process.stdout.readline():
            job, verdict, reason = json.loads(line)
            if (answer := self._waiting.get(job)) and not answer.done():
                answer.set_result((verdict, reason))
        await process.wait()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(ConnectionResetError(f"{MODULE} ended with code {process.returncode}"))
