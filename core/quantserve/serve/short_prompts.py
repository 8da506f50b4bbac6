"""Short prompts become tokens where they arrive.

vLLM hands every chat template and every tokenization to a thread. That keeps long prompts from stopping the streams of
other requests, but for a short one the way to the thread and back takes longer than the work, and while many requests
begin at once all of them wait for it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any, Final, TypeVar

from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.renderers import hf
from vllm.renderers.base import BaseRenderer

from quantserve.serve.asgi import header

SHORT: Final = 4096
"""Bytes of a request whose tokens take 1 or 2 ms; the server reads and answers it for as long."""
T = TypeVar("T")

_short: ContextVar[bool] = ContextVar("short", default=False)


class ShortPrompts:
    """Pure ASGI layer that tells `render_at_once` which requests are short.

    Args:
        app: vLLM's app.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app; a request that does not say its length is a long one."""
        length = header(scope, b"content-length") if scope["type"] == "http" else b""
        _short.set(length.isdigit() and int(length) <= SHORT)
        await self.app(scope, receive, send)


def render_at_once(renderer: BaseRenderer[Any], *, templates: bool) -> None:
    """Let a renderer of vLLM's do short requests without its threads from now on.

    Long ones still use threads beside it, which only fast tokenizers of Hugging Face allow; others are left alone.

    Args:
        renderer: of the engine's client.
        templates: whether to apply chat templates at once, too: that of the model, which has been tried in a thread by
            then. One that comes with a request may take for ever, which only a thread can be left to do.
    """
    if not isinstance(renderer, hf.HfRenderer) or not getattr(renderer.tokenizer, "is_fast", False):
        return
    renderer._tokenize_prompt_async = _at_once(renderer._tokenize_prompt, renderer._tokenize_prompt_async)
    if templates:
        in_thread, with_timeout = renderer._apply_chat_template_async, renderer._render_with_timeout
        renderer._apply_chat_template_async = _at_once(hf.safe_apply_chat_template, in_thread)
        renderer._render_with_timeout = lambda work: work if _short.get() else with_timeout(work)


def _at_once(work: Callable[..., T], in_thread: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
    """What does the work itself for a short request, and leaves it to a thread for others."""

    async def choose(*args: Any, **kwargs: Any) -> T:
        return work(*args, **kwargs) if _short.get() else await in_thread(*args, **kwargs)

    return choose
