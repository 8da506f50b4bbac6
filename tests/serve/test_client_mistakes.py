"""One engine whose tokenizer has ids without a row in the embedding: no request harms it, the client's field is named.

Every case that fails here on vLLM alone ended the engine, blocked it, or got status 500.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .server import START_S, model

MODEL = Path(__file__).parents[2] / "examples" / "demo-model" / "checkpoint"
ROWS = 4096
CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
ANSWER_S = 120
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


class Replica:
    """vLLM's app with its engine, in a thread with an event loop as in a replica."""

    def __init__(self, folder: Path) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.engine = self._run(self._start(folder), START_S)

    def _run(self, work: Any, seconds: float = ANSWER_S) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(seconds)

    @staticmethod
    async def _start(folder: Path) -> Any:
        from quantserve.config import load_object
        from quantserve.serve.app import plan_all
        from quantserve.serve.replica.vllm import server as vllm_app
        from quantserve.target import find_target

        frontend = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
        config = load_object({"models": [model("m", folder, frontend_kwargs=frontend)]}, "test")
        (plan,) = plan_all(config, find_target(None))
        return await vllm_app.start(plan)

    def ask(self, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        from quantserve.serve.asgi import ask

        status, answer = self._run(ask(self.engine.app, "POST", path, {"model": "m", **body}))
        return status, json.loads(answer) if answer.startswith(b"{") else {}

    def lives(self) -> bool:
        """Whether the engine still completes a request."""
        return self.ask(CHAT, messages=said("Hi"), max_tokens=2)[0] == 200 and not self.engine.dead

    def stop(self) -> None:
        self.engine.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    folder = tmp_path_factory.mktemp("model") / "m"
    shutil.copytree(MODEL, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "[PAD]"}))
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [2, ROWS + 1]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        made = Replica(folder)
        yield made
        made.stop()


def said(text: object) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


SHORT = {"max_tokens": 2}
WITHOUT_ROW: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETIONS, {"prompt": "a [PAD] b"}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", "a [PAD] b"]}, "prompt"),
    (COMPLETIONS, {"prompt": [1, 2, ROWS]}, "prompt[2]"),
    (COMPLETIONS, {"prompt": [[1], [1, ROWS + 1]]}, "prompt[1][1]"),
    (COMPLETIONS, {"prompt": [1, -1]}, "prompt[1]"),
    (COMPLETIONS, {"prompt": [1, 2**31]}, "prompt[1]"),
    (COMPLETIONS, {"prompt": [1, 2**64]}, "prompt[1]"),
    (COMPLETIONS, {"prompt": [1, ROWS], "stream": True}, "prompt[1]"),
    (COMPLETIONS, {"prompt": [1, ROWS], "echo": True, "logprobs": 1}, "prompt[1]"),
    (COMPLETIONS, {"prompt": [1, ROWS], "use_beam_search": True, "n": 2}, "prompt[1]"),
    (CHAT, {"messages": said("[PAD]")}, "messages"),
    (CHAT, {"messages": said("[PAD]"), "stream": True}, "messages"),
    (CHAT, {"messages": said([{"type": "text", "text": "[PAD]"}])}, "messages"),
    (CHAT, {"messages": [{"role": "system", "content": "[PAD]"}, *said("x")]}, "messages"),
    (CHAT, {"messages": said("x"), "kv_transfer_params": {"prompt_token_ids": [1, ROWS]}},
     "kv_transfer_params.prompt_token_ids[1]"),
    (CHAT, {"messages": said("x"), "bad_words": ["[PAD]"]}, "bad_words"),
    (CHAT, {"messages": said("x"), "stop_token_ids": [ROWS]}, "stop_token_ids"),
    (CHAT, {"messages": said("x"), "allowed_token_ids": [ROWS]}, "allowed_token_ids"),
    (CHAT, {"messages": said("x"), "logit_bias": {str(ROWS): 1}}, "logit_bias"),
    (CHAT, {"messages": said("x"), "logprobs": True, "logprob_token_ids": [ROWS]}, "logprob_token_ids"),
    ("/v1/chat/completions/batch", {"messages": [said("x"), said("[PAD]")]}, "messages"),
    (RESPONSES, {"input": "[PAD]"}, "input"),
    (RESPONSES, {"input": said("[PAD]")}, "input"),
    (RESPONSES, {"input": "x", "instructions": "[PAD]"}, "input"),
    (MESSAGES, {"messages": said("[PAD]")}, "messages"),
    (MESSAGES, {"messages": said("x"), "system": "[PAD]"}, "messages"),
    ("/generative_scoring", {"query": "a", "items": ["[PAD]"], "label_token_ids": [4]}, "query"),
    ("/generative_scoring", {"query": [1], "items": [[2], [ROWS]], "label_token_ids": [4]}, "items[1][0]"),
    ("/generative_scoring", {"query": "a", "items": ["b"], "label_token_ids": [ROWS]}, "label_token_ids"),
    ("/invocations", {"prompt": [ROWS]}, "prompt[0]"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param"), WITHOUT_ROW)
def test_an_id_without_a_row_is_a_client_error(replica: Replica, path: str, body: dict[str, Any], param: str) -> None:
    limits = {} if path in (RESPONSES, "/generative_scoring") else SHORT
    status, answer = replica.ask(path, **limits, **body)
    assert (status, answer["error"]["param"]) == (400, param), answer
    assert replica.lives()


def test_stops_of_the_model_without_a_row_are_left_out(replica: Replica) -> None:
    """generation_config.json has one; vLLM masks the scores of all stops until `min_tokens`."""
    assert replica.ask(CHAT, messages=said("x"), max_tokens=3, min_tokens=3)[0] == 200
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "boolean"}}}
    assert replica.ask(CHAT, messages=said("x"), max_tokens=9, response_format=schema)[0] == 200
    assert replica.lives()


@pytest.mark.parametrize(("name", "value"), [("top_k", 2**64), ("seed", 2**64), ("priority", -(2**64))])
def test_a_number_that_the_engine_cannot_get_is_a_client_error(replica: Replica, name: str, value: int) -> None:
    status, answer = replica.ask(CHAT, messages=said("x"), **{name: value})
    assert (status, answer["error"]["param"]) == (400, name)
    assert replica.lives()


def json_schema(schema: object) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def outputs(**wanted: Any) -> dict[str, Any]:
    return {"structured_outputs": wanted}


def tool(schema: object) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name, "parameters": found}}
             for name, found in (("other", {}), ("f", schema))]  # fmt: skip
    return {"tools": tools, "tool_choice": {"type": "function", "function": {"name": "f"}}}


def alternatives(count: int) -> str:
    """A regex that takes a minute to compile."""
    return "(" + "|".join(f"[a-z]{{{length}}}" for length in range(count)) + ")"


SCHEMA = "response_format.json_schema.schema"
LOOP = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
SLOW_PATTERN = {"type": "string", "pattern": "([a-z]{1,50}|[0-9]+)*x{3,500}"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    (json_schema({"$ref": "#"}), SCHEMA),
    (json_schema(LOOP), SCHEMA),
    (json_schema({"enum": []}), SCHEMA),
    (json_schema({"type": "integer", "minimum": -(10**30), "maximum": 10**30}), SCHEMA),
    (json_schema({"enum": ["x" * 20 + str(i) for i in range(50_000)]}), SCHEMA),
    (json_schema({"type": "object", "properties": {f"p{i}": SLOW_PATTERN for i in range(700)}}), SCHEMA),
    (outputs(grammar="root ::= root"), "structured_outputs.grammar"),
    (outputs(grammar="root ::= a\na ::= b\nb ::= a"), "structured_outputs.grammar"),
    (outputs(grammar="root ::= nothing"), "structured_outputs.grammar"),
    (outputs(grammar=" "), "structured_outputs.grammar"),
    (outputs(grammar="root ::= " + " ".join(["a"] * 3000) + "\na ::= [a-z]*"), "structured_outputs.grammar"),
    (outputs(regex="("), "structured_outputs.regex"),
    (outputs(regex=r"(a)\1"), "structured_outputs.regex"),
    (outputs(regex=alternatives(1800)), "structured_outputs.regex"),
    (outputs(choice=[]), "structured_outputs.choice"),
    (outputs(choice=["c" * 100 + str(i) for i in range(20_000)]), "structured_outputs.choice"),
    (outputs(json="{"), "structured_outputs.json"),
    (outputs(structural_tag="{}"), "structured_outputs.structural_tag"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=lambda part: str(part)[:60])
def test_a_grammar_that_cannot_be_compiled_is_a_client_error(
    replica: Replica, body: dict[str, Any], param: str
) -> None:
    status, answer = replica.ask(CHAT, messages=said("x"), **SHORT, **body)
    assert status == 400, answer
    assert answer["error"]["param"] == param, answer
    assert len(answer["error"]["message"]) < 1100
    assert replica.lives()


def test_other_requests_are_answered_while_a_grammar_is_checked(replica: Replica) -> None:
    pattern = outputs(regex=alternatives(1700))  # another than above: verdicts are kept
    slow: list[int] = []
    work = threading.Thread(target=lambda: slow.append(replica.ask(CHAT, messages=said("x"), **pattern)[0]))
    work.start()
    time.sleep(0.5)
    answered = 0
    while work.is_alive():
        assert replica.ask(CHAT, messages=said("x"), **SHORT, **outputs(choice=["a", f"b{answered}"]))[0] == 200
        answered += 1
    assert slow == [400]
    assert answered >= 2


def test_usual_schemas_pass(replica: Replica) -> None:
    item = {"type": "object", "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {}}}}
    schema = {"type": "object", "properties": {f"p{i}": item for i in range(50)}, "required": ["p0"]}
    for body in (json_schema(schema), tool(schema), outputs(regex=r"\d{4}-\d\d"), outputs(choice=["yes", "no"]),
                 outputs(grammar='root ::= "a" root | "b"'), {"response_format": {"type": "json_object"}}):  # fmt: skip
        status, answer = replica.ask(CHAT, messages=said("x"), **SHORT, **body)
        assert status == 200, answer
