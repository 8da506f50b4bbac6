"""vLLM's routes that clients may use, as data; written for vLLM 0.32 and compared with it by a test.

Everything else of vLLM's server (profiling, sleep, weight updates, LoRA loading, scaling, fault tolerance, the token
interface between vLLM's own nodes) controls the engine and is closed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
RESPONSES: Final = "/v1/responses"
OUTPUT_TOKENS: Final = {
    CHAT: ("max_completion_tokens", "max_tokens"),
    "/v1/chat/completions/batch": ("max_completion_tokens", "max_tokens"),
    COMPLETIONS: ("max_tokens",),
    RESPONSES: ("max_output_tokens",),
    "/v1/messages": ("max_tokens",),
    "/cohere/v2/chat": ("max_tokens",),
    "/invocations": ("max_completion_tokens", "max_tokens"),
    "/v1/audio/transcriptions": ("max_completion_tokens",),
    "/v1/audio/translations": ("max_completion_tokens",),
}
"""By path that generates tokens: the fields for their number. If several are given, vLLM uses the first."""
UNBOUNDED: Final = frozenset({CHAT, "/v1/chat/completions/batch", RESPONSES, "/cohere/v2/chat", "/invocations"})
"""Paths where a request without such a field gets as many tokens as fit into the context."""
INPUT_TOKENS: Final = ("/v2/embed",)
"""Paths where ``max_tokens`` is the number of input tokens that are used."""
TOKEN_IDS: Final = {
    COMPLETIONS: ("prompt",),
    "/v1/embeddings": ("input",),
    "/pooling": ("input",),
    "/classify": ("input",),
    "/detokenize": ("tokens",),
    "/generative_scoring": ("query", "items"),
}
"""By path, the fields that take lists of token ids."""
FORMS: Final = frozenset({"/v1/audio/transcriptions", "/v1/audio/translations"})
"""Paths that take multipart forms instead of JSON."""
CLIENT_PATHS: Final = frozenset({
    *OUTPUT_TOKENS,
    "/v1/messages/count_tokens", "/v1/systemone", "/generative_scoring",
    "/v1/embeddings", "/v2/embed", "/pooling", "/classify", "/tokenize", "/detokenize", "/tokenizer_info",
    "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank",
    "/v1/chat/completions/render", "/v1/completions/render", "/v1/responses/render", "/v1/messages/render",
    "/cohere/v2/chat/render", "/v1/chat/completions/derender", "/v1/completions/derender",
    "/ping", "/version", "/load", "/metrics",
})  # fmt: skip
"""Paths of vLLM's server that clients may use, beside those of one response."""
_ONE_RESPONSE: Final = re.compile(r"/v1/responses/[^/]+(?:/cancel)?")
_SLASHES: Final = re.compile(r"/{2,}")


def is_client_path(path: str) -> bool:
    """Whether clients may use this path of vLLM's server; ``path`` may also be a template of its API schema."""
    return path in CLIENT_PATHS or _ONE_RESPONSE.fullmatch(path) is not None


def local_path(scope: Mapping[str, Any]) -> str:
    """The normalized path of an ASGI scope below the mount point, whether or not the server removed the prefix."""
    root = scope.get("root_path", "")
    path: str = scope["path"]
    return normalized(f"/{path[len(root) :] if root and path.startswith(root) else path}")


def normalized(path: str) -> str:
    """The path without repeated slashes and without a slash at its end; vLLM would redirect, and lose the prefix."""
    return _SLASHES.sub("/", path).rstrip("/") or "/"
