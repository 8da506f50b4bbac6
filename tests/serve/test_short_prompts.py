"""Short prompts become tokens without vLLM's threads, long ones with them, and both become the same tokens."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from quantserve.serve.asgi import request_scope

MODEL = Path(__file__).parents[2] / "examples" / "demo-model" / "checkpoint"
SHORT = "What is a deque?"
LONG = "What is a deque? " * 140


@pytest.fixture(scope="module")
def config() -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs

    return AsyncEngineArgs(model=str(MODEL), enforce_eager=True).create_engine_config()


@pytest.fixture
def renderer(config: Any) -> Any:
    from vllm.renderers import renderer_from_config

    made = renderer_from_config(config)
    yield made
    made.shutdown()


class Threads:
    """How often work was given to a thread."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.asked = 0
        submit = ThreadPoolExecutor.submit

        def counted(pool: ThreadPoolExecutor, *args: Any, **kwargs: Any) -> Any:
            self.asked += 1
            return submit(pool, *args, **kwargs)

        patch.setattr(ThreadPoolExecutor, "submit", counted)


def tokens(renderer: Any, text: str, length: int | None) -> list[int]:
    """Of a chat with one message, in a request with Content-Length."""
    from vllm.renderers import ChatParams

    from quantserve.serve.replica.vllm.short_prompts import ShortPrompts

    found: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        messages = [{"role": "user", "content": text}]
        as_vllm_asks = ChatParams(chat_template_kwargs={"add_generation_prompt": True, "tokenize": False})
        _, (prompt,) = await renderer.render_chat_async([messages], as_vllm_asks)
        found.extend(prompt["prompt_token_ids"])

    async def nothing(*message: Any) -> Any:
        raise AssertionError

    headers = [] if length is None else [(b"content-length", b"%d" % length)]
    scope = request_scope("POST", "/v1/chat/completions", headers, b"")
    asyncio.run(ShortPrompts(app)(scope, nothing, nothing))
    return found


@pytest.mark.vllm
def test_only_long_requests_use_threads_and_the_tokens_are_the_same(
    renderer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantserve.serve.replica.vllm.short_prompts import render_at_once

    usual = tokens(renderer, SHORT, 100), tokens(renderer, LONG, 5000)
    render_at_once(renderer, templates=True)
    threads = Threads(monkeypatch)
    assert tokens(renderer, SHORT, 100) == usual[0]
    assert threads.asked == 0
    assert tokens(renderer, LONG, 5000) == usual[1]
    assert threads.asked == 2  # the chat template and the tokens
    assert tokens(renderer, SHORT, None) == usual[0]
    assert threads.asked == 4


@pytest.mark.vllm
def test_templates_in_requests_are_rendered_in_threads(renderer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantserve.serve.replica.vllm.short_prompts import render_at_once

    usual = tokens(renderer, SHORT, 100)
    render_at_once(renderer, templates=False)
    threads = Threads(monkeypatch)
    assert tokens(renderer, SHORT, 100) == usual
    assert threads.asked == 1


@pytest.mark.vllm
def test_a_tokenizer_that_threads_may_not_share_is_left_alone(renderer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantserve.serve.replica.vllm.short_prompts import render_at_once

    monkeypatch.setattr(type(renderer.tokenizer), "is_fast", False)
    render_at_once(renderer, templates=True)
    threads = Threads(monkeypatch)
    assert tokens(renderer, SHORT, 100)
    assert threads.asked == 2
