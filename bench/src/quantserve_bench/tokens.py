"""Counts tokens with the served model's tokenizer: over the server's API, or from a tokenizer file."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, Protocol, cast

from quantserve.errors import EngineError, UsageError, one_line
from quantserve.system.homes import expand
from quantserve_bench.causes import FIXES, connect_failure, with_fix
from quantserve_bench.request import Target
from quantserve_bench.result import error_message

TIMEOUT_S: Final = 30.0
CHARACTERS_PER_TOKEN: Final = 4.0
"""Estimate for English text with the tokenizers of large models, used without a tokenizer."""


class Tokenizer(Protocol):
    """The tokenizer interface of workloads; without special tokens."""

    name: str
    """Source of the token counts, for the report."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""


class Session:
    """Small JSON requests to a server over one connection; not for measurements.

    Args:
        target: the server; its model is not used.
        timeout_s: per request.
    """

    def __init__(self, target: Target, timeout_s: float = TIMEOUT_S) -> None:
        self._target = target
        self._timeout_s = timeout_s
        cls = http.client.HTTPSConnection if target.tls else http.client.HTTPConnection
        self._connection = cls(target.host, target.port, timeout=timeout_s)

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
        """Status and body of a request; the body is JSON, or text where it is none.

        Raises:
            EngineError: the server does not respond.
        """
        headers = {"Content-Type": "application/json", **self._target.headers}
        if self._target.api_key:
            headers["Authorization"] = f"Bearer {self._target.api_key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            self._connection.request(method, self._target.root + path, data, headers)
            response = self._connection.getresponse()
            raw = response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise EngineError(f"no response from {self._target.url}: {self._cause(error)}") from None
        try:
            return response.status, json.loads(raw)
        except ValueError:
            return response.status, error_message(raw)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _cause(self, error: OSError | http.client.HTTPException) -> str:
        if isinstance(error, TimeoutError):
            return f"none within {self._timeout_s:g} s\n  fix: {FIXES['refused']}"
        if isinstance(error, http.client.HTTPException | ConnectionResetError):
            kind = "http" if self._target.tls else "https"
            return f"{one_line(error)}\n  fix: correct --url; perhaps it begins with {kind}://"
        failure = connect_failure(self._target, error)
        return with_fix(failure.message, failure.code if failure.code in FIXES else "refused")


class ServerTokenizer:
    """vLLM's ``/tokenize`` and ``/detokenize``."""

    def __init__(self, target: Target) -> None:
        self.name = "the server's /tokenize"
        self._model = target.model
        self._session = Session(target)
        self.encode = lru_cache(4096)(self._encode)

    def _encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
            EngineError: the server does not tokenize.
        """
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        status, answer = self._session.ask("POST", "/tokenize", body)
        if status != 200 or not isinstance(answer, dict) or not isinstance(answer.get("tokens"), list):
            raise EngineError(f"/tokenize returned status {status}: {answer}")
        return cast("list[int]", answer["tokens"])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids.

        Raises:
            EngineError: the server does not detokenize.
        """
        status, answer = self._session.ask("POST", "/detokenize", {"model": self._model, "tokens": list(ids)})
        if status != 200 or not isinstance(answer, dict) or not isinstance(answer.get("prompt"), str):
            raise EngineError(f"/detokenize returned status {status}: {answer}")
        return cast("str", answer["prompt"])


class FileTokenizer:
    """A ``tokenizer.json``, read by the ``tokenizers`` library.

    Args:
        path: the file, or a folder with it.

    Raises:
        UsageError: the library is missing, or the file is none.
    """

    def __init__(self, path: str) -> None:
        try:
            from tokenizers import Tokenizer as Fast
        except ImportError:
            raise UsageError("--tokenizer needs the tokenizers package\n  fix: pip install tokenizers") from None
        file = expand(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        try:
            self._tokenizer = Fast.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise UsageError(
                f"--tokenizer {path}: {one_line(error)}\n  fix: give the path of a tokenizer.json"
            ) from None
        self.name = file.name

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


def find_tokenizer(target: Target, file: str | None) -> Tokenizer | None:
    """The tokenizer file if one is given, else the server's tokenizer, else None.

    Raises:
        UsageError: the file cannot be used.
        EngineError: the server does not respond.
    """
    if file:
        return FileTokenizer(file)
    session = Session(target)
    try:
        status, answer = session.ask("POST", "/tokenize", {"model": target.model, "prompt": "a"})
    finally:
        session.close()
    usable = status == 200 and isinstance(answer, dict) and "tokens" in answer
    return ServerTokenizer(target) if usable else None


def count_tokens(tokenizer: Tokenizer | None, text: str) -> int:
    """Tokens of a text; estimated from its length without a tokenizer."""
    return len(tokenizer.encode(text)) if tokenizer else max(1, round(len(text) / CHARACTERS_PER_TOKEN))
