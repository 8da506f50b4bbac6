"""Renders and tokenizes short prompts on the event loop instead of in a thread; one of `patches.PATCHES`.

vLLM runs every chat template and every tokenization in a thread. For long prompts that keeps the streams of other
requests running. For short ones the two thread switches take longer than the work, and when many requests begin
together, all of them wait for the thread.
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
"""Longest short request in bytes: it takes 1 to 2 ms to tokenize, about as long as parsing and answering it."""
T = TypeVar("T")

_short: ContextVar[bool] = ContextVar("short", default=False)


class ShortPrompts:
    """Pure ASGI layer that marks short requests for `render_at_once`.

    Args:
        app: vLLM's app.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app; a request without Content-Length counts as long."""
        length = header(scope, b"content-length") if scope["type"] == "http" else b""
        _short.set(length.isdigit() and int(length) <= SHORT)
        await self.app(scope, receive, send)


def render_at_once(renderer: BaseRenderer[Any], *, templates: bool) -> None:
    """Make a vLLM renderer process short requests on the event loop instead of in its threads.

    Long requests still use its threads at the same time. Only Hugging Face's fast tokenizers are safe for that;
    renderers with other tokenizers are not changed.

    Args:
        renderer: of the engine's client.
        templates: whether to apply chat templates on the event loop, too. Safe for the model's own template, which the
            warm-up ran in a thread; a template in a request might never end.
    """
    if not isinstance(renderer, hf.HfRenderer) or not getattr(renderer.tokenizer, "is_fast", False):
        return
    changed = {"_tokenize_prompt_async": _at_once(renderer._tokenize_prompt, renderer._tokenize_prompt_async)}
    if templates:
        in_thread, with_timeout = renderer._apply_chat_template_async, renderer._render_with_timeout
        changed["_apply_chat_template_async"] = _at_once(hf.safe_apply_chat_template, in_thread)
        changed["_render_with_timeout"] = lambda work: work if _short.get() else with_timeout(work)
    vars(renderer).update(changed)  # all of them or, where one is missing, none


def _at_once(work: Callable[..., T], in_thread: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
    """A function that does the work directly for short requests, and in a thread for others."""

    async def choose(*args: Any, **kwargs: Any) -> T:
        return work(*args, **kwargs) if _short.get() else await in_thread(*args, **kwargs)

    return choose
