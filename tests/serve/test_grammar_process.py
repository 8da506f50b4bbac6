"""Schemas and grammars are compiled in a process with limits, whose verdict comes before the engine's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

MODEL = Path(__file__).parents[2] / "examples" / "demo-model" / "checkpoint"
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

SLOW_REGEX = "(" + "|".join(f"[a-z]{{{length}}}" for length in range(1800)) + ")"
LOOP = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
SLOW_SCHEMA = {
    "type": "object",
    "properties": {f"p{i}": {"type": "string", "pattern": "([a-z]{1,50}|[0-9]+)*x{3,500}"} for i in range(700)},
}
AMBIGUOUS = "root ::= " + " ".join(["a"] * 3000) + "\na ::= [a-z]*"


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[[Callable[[Any], Awaitable[Any]]], Any]]:
    """Runs an async function with one client of the process, which all tests share."""
    import xgrammar
    from transformers import AutoTokenizer

    from quantserve.serve.replica.vllm.structured_outputs import GrammarChecks

    def tokens() -> str:
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        return str(xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=4096).serialize_json())

    loop = asyncio.new_event_loop()
    checks = GrammarChecks(tokens)
    yield lambda work: loop.run_until_complete(work(checks))
    loop.run_until_complete(checks.stop())
    loop.close()


@pytest.mark.parametrize(
    ("kind", "text", "verdict"),
    [
        ("json", '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}', "ok"),
        ("json", json.dumps({"type": "string", "minLength": 1000, "maxLength": 100_000}), "ok"),
        ("regex", r"\d{4}-\d\d", "ok"),
        ("ebnf", 'root ::= "a" root | "b"', "ok"),
        ("ebnf", 'root ::= ""', "ok"),
        ("regex", "(", "failed"),
        ("json", '{"enum": []}', "failed"),
        ("tag", "{}", "failed"),
        ("json", '{"type": "array", "minItems": 9223372036854775808}', "failed"),
        ("tag", json.dumps({"structures": [{"begin": "<f>", "schema": {}, "end": "</f>"}], "triggers": ["<f"]}), "ok"),
        ("tag", json.dumps({"structures": [{"begin": "<f>", "schema": SLOW_SCHEMA, "end": "</f>"}],
                            "triggers": ["<f"]}), "expensive"),
        ("tag", json.dumps({"type": "structural_tag", "format": {
            "type": "json_schema", "json_schema": {**SLOW_SCHEMA, "title": "structures"}}}), "expensive"),
        ("json", '{"$ref": "#"}', "failed"),
        ("json", json.dumps(LOOP), "failed"),
        ("ebnf", "root ::= root", "failed"),
        ("regex", SLOW_REGEX, "expensive"),
        ("json", json.dumps(SLOW_SCHEMA), "expensive"),
        ("ebnf", AMBIGUOUS, "expensive"),
    ],
    ids=lambda part: str(part)[:40],
)  # fmt: skip
def test_verdicts(run: Any, kind: str, text: str, verdict: str) -> None:
    found, _ = run(lambda checks: checks.verdict(kind, text))
    assert found == verdict


def test_a_slow_grammar_does_not_delay_another(run: Any) -> None:
    async def both(checks: Any) -> list[str]:
        order: list[str] = []

        async def one(kind: str, text: str) -> None:
            order.append((await checks.verdict(kind, text))[0])

        slow = asyncio.create_task(one("regex", SLOW_REGEX + "x"))
        await asyncio.sleep(0.1)
        await one("regex", "abc")
        await slow
        return order

    assert run(both) == ["ok", "expensive"]


def test_a_client_that_leaves_does_not_disturb_the_next(run: Any) -> None:
    async def leave(checks: Any) -> str:
        task = asyncio.create_task(checks.verdict("regex", SLOW_REGEX + "y"))
        await asyncio.sleep(0.2)
        task.cancel()
        return str((await checks.verdict("ebnf", "root ::= root root"))[0])

    assert run(leave) == "failed"


def test_verdicts_are_kept(run: Any) -> None:
    async def twice(checks: Any) -> bool:
        first = await checks.verdict("regex", "kept")
        await checks.stop()
        assert await checks.verdict("regex", "kept") == first
        return checks.process.returncode is not None

    assert run(twice), "the process was started again"


def test_a_process_that_was_killed_is_started_again(run: Any) -> None:
    async def kill(checks: Any) -> str:
        await checks.verdict("regex", "a1")
        checks.process.kill()
        await checks.process.wait()
        return str((await checks.verdict("regex", "a2"))[0])

    assert run(kill) == "ok"


def test_reasons_are_without_the_inside_of_the_compiler(run: Any) -> None:
    _, reason = run(lambda checks: checks.verdict("json", '{"type": "array", "minItems": 9223372036854775808}'))
    assert reason == "minItems must be an integer"


def test_a_pattern_with_many_repetitions_compiles_in_the_engine() -> None:
    """With its cache of rules, xgrammar 0.2.8 cannot compile it."""
    from types import SimpleNamespace

    import xgrammar
    from transformers import AutoTokenizer
    from vllm.v1.structured_output.backend_types import StructuredOutputOptions
    from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

    from quantserve.serve.replica.vllm.rule_cache import compile_without_rule_cache

    compile_without_rule_cache()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    outputs = SimpleNamespace(disable_any_whitespace=False)
    config: Any = SimpleNamespace(structured_outputs_config=outputs, model_config=None, speculative_config=None)
    backend = XgrammarBackend(config, tokenizer=tokenizer, vocab_size=len(tokenizer))
    for pattern in ("^.{1,500}$", "^[a-z]{1,200}$", "^[a-z]{1,5}$"):
        schema = json.dumps({"type": "string", "pattern": pattern})
        grammar: Any = backend.compile_grammar(StructuredOutputOptions.JSON, schema)
        again: Any = backend.compile_grammar(StructuredOutputOptions.JSON, schema)
        assert isinstance(grammar.ctx, xgrammar.CompiledGrammar)
        assert not again.is_terminated()
