"""Talks to a server with OpenAI's API: answers as they stream, and its models.

Answers and their times are those of quantserve-bench (`Result`, `timing_of`), so that a TTFT means the same in every
command. The transport is httpx, which follows the proxies of the environment; `quantserve bench` has a transport of its
own that decodes nothing while it measures.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any, Final, Self
from urllib.parse import urlsplit

import httpx

from quantserve import __version__
from quantserve.errors import EngineError, QuantserveError, UsageError, one_line, unknown_name
from quantserve.system.addresses import is_loopback
from quantserve_bench.causes import connect_failure, with_fix
from quantserve_bench.request import Request, Target
from quantserve_bench.result import BODY_SHOWN, Event, Failure, Result, error_message
from quantserve_bench.wire import MessageReader, ProtocolError
from quantserve_client.options import Address

CONNECT_S: Final = 10.0
LARGEST_BODY: Final = 64 << 20
"""Longest answer that is no stream, in bytes."""
ASK_S: Final = 30.0
RETRY_CODES: Final = (429, 503)
TRIES: Final = 8
LONGEST_WAIT_S: Final = 60.0
WEB_PAGE: Final = "a web page, no answer of OpenAI's API"
CANCELLED: Final = Failure("cancelled", "interrupted")

Show = Callable[[Event], None]


class _DisplayError(Exception):
    """What shows an answer failed, such as a closed pipe; its cause is no failure of the server."""


def _guarded(show: Show | None) -> Show:
    def guarded(event: Event) -> None:
        try:
            if show:
                show(event)
        except OSError as error:
            raise _DisplayError from error

    return guarded


class Server:
    """A server; an async context manager.

    Args:
        address: of the server.
        connections: most connections at once.

    Raises:
        UsageError: the URL or the API key is invalid.
    """

    def __init__(self, address: Address, connections: int = 100) -> None:
        self.address = address
        self.target = Target(address.url, "", address.api_key)
        parts = urlsplit(address.url)
        self._base = f"{parts.scheme}://{parts.netloc}{self.target.root}"
        headers = {"User-Agent": f"quantserve-client/{__version__}", "Accept": "text/event-stream, application/json"}
        if address.api_key:
            headers["Authorization"] = f"Bearer {address.api_key}"
        try:
            self._http = httpx.AsyncClient(
                headers=headers,
                timeout=httpx.Timeout(address.stall_s, connect=min(CONNECT_S, address.timeout_s), pool=None),
                limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
                trust_env=not is_loopback(self.target.host),  # no proxy reaches this machine's own address
                verify=ssl.create_default_context() if self.target.tls else False,
            )
        except (ValueError, httpx.InvalidURL, ImportError) as error:  # a proxy of the environment
            raise UsageError(
                f"the proxy settings of the environment cannot be used: {one_line(error)}\n"
                "  fix: correct HTTP_PROXY, HTTPS_PROXY or ALL_PROXY, or add the host to NO_PROXY"
            ) from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def answer(self, request: Request, model: str, show: Show | None = None, number: int = 0) -> Result:
        """The answer of a model; failures are in the result, not raised.

        Args:
            request: what to ask.
            model: its id.
            show: called with each event of the stream as it comes.
            number: goes into the result.
        """
        now = perf_counter()
        result = Result(request, number, now, now)
        try:
            async with asyncio.timeout(self.address.timeout_s):
                await self._receive(result, model, _guarded(show))
        except _DisplayError as error:
            raise error.__cause__ or error from None
        except TimeoutError:
            limit = f"{self.address.timeout_s:g} s, the limit of --timeout"
            result.failure = Failure("timeout", f"no complete answer within {limit}")
        except ProtocolError as error:
            result.failure = Failure("protocol", str(error))
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError, UnicodeError) as error:
            result.failure = self._failure(error)
        except asyncio.CancelledError:
            result.failure = CANCELLED
            raise
        finally:
            if result.failure is not None:
                result.text = result.text or "".join(event.text for event in result.events)
            result.end = result.end or perf_counter()
        return result

    async def patient_answer(self, request: Request, model: str, number: int = 0) -> Result:
        """`answer`, sent again where the server is busy (429, 503), after the time it asks for.

        At most `TRIES` times, and as long as ``timeout_s`` has not passed since the first.
        """
        began = perf_counter()
        for attempt in range(TRIES):
            result = await self.answer(request, model, number=number)
            if not (result.failure and result.failure.code in RETRY_CODES):
                break
            wait = min(LONGEST_WAIT_S, result.retry_after_s or 2.0**attempt / 2)
            if attempt + 1 == TRIES or perf_counter() - began + wait > self.address.timeout_s:
                break
            await asyncio.sleep(wait)
        return result

    async def ask(self, path: str) -> tuple[int, Any]:
        """Status and body of a GET request; the body is JSON, or text where it is none.

        Raises:
            EngineError: the server does not respond.
            UsageError: it refuses the API key.
        """
        try:
            async with asyncio.timeout(min(ASK_S, self.address.timeout_s)):
                # Its own connection: a kept one may be closed by the server just when it is used again.
                async with self._http.stream("GET", self._base + path, headers={"connection": "close"}) as response:
                    body = await _whole(response)
        except TimeoutError:
            raise EngineError(
                f"no response from {self.address.url} within {ASK_S:g} s\n  fix: correct --url, or try again later"
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL, ProtocolError, OSError, UnicodeError) as error:
            raise self.error(self._failure(error)) from None
        if response.status_code in (401, 403):
            raise self.error(Failure(response.status_code, error_message(body)))
        try:
            return response.status_code, json.loads(body)
        except (ValueError, RecursionError):
            return response.status_code, error_message(body)

    async def model_ids(self) -> list[str]:
        """Ids of its models, from ``/v1/models``.

        Raises:
            EngineError, UsageError: as `ask`; or it has no such API.
        """
        return [str(card["id"]) for card in await self.cards()]

    async def cards(self) -> list[dict[str, Any]]:
        """The entries of ``/v1/models``.

        Raises:
            EngineError, UsageError: as `ask`; or it has no such API.
        """
        status, answer = await self.ask("/v1/models")
        data = answer.get("data") if isinstance(answer, dict) else None
        if status != 200 or not isinstance(data, list):
            raise UsageError(
                f"{self.address.url} has no OpenAI-compatible API: GET {self.target.root}/v1/models returned status "
                f"{status}{_said(answer)}\n  fix: correct --url; it is the address before /v1"
            )
        return [card for card in data if isinstance(card, dict) and "id" in card]

    async def status(self) -> dict[str, Any] | None:
        """The answer of quantserve's ``/status``, with models that have an id; None where the server is another one.

        Raises:
            EngineError: see `ask`.
        """
        try:
            code, answer = await self.ask("/status")
        except UsageError:  # another server may refuse a path that it does not have; /v1/models decides
            return None
        if code != 200 or not isinstance(answer, dict) or not isinstance(answer.get("models"), list):
            return None
        return {**answer, "models": [model for model in answer["models"] if isinstance(model, dict) and "id" in model]}

    async def choose(self, names: tuple[str, ...]) -> list[str]:
        """The named models, as they are; without names the only one of the server.

        Raises:
            EngineError, UsageError: as `model_ids`; or it has several models or none.
        """
        if names:
            return list(dict.fromkeys(names))
        ids = await self.model_ids()
        if len(ids) == 1:
            return ids
        if not ids:
            raise UsageError(f"{self.address.url} serves no models\n  fix: start one on it, or correct --url")
        raise UsageError(f"{self.address.url} serves several models: {', '.join(ids)}\n  fix: choose with --model")

    async def explained(self, failure: Failure, model: str) -> QuantserveError:
        """The error of a failed answer; of an unknown model with the names that the server has."""
        if failure.code == 404:
            try:
                ids = await self.model_ids()
            except QuantserveError:
                return self.error(failure)
            if model not in ids:
                return UsageError(unknown_name("model", model, ids) + "\n  fix: choose one of them with --model")
        return self.error(failure)

    def error(self, failure: Failure) -> QuantserveError:
        """What a person is told of a failure, with a fix; an `UsageError` where the request has to change."""
        code, message = failure.code, failure.message
        url = self.address.url
        if code in (401, 403):
            missing = "" if self.address.api_key else "; none was sent"
            return UsageError(
                f"{url} refused the API key (status {code}{missing}): {message}\n"
                f"  fix: set the variable {_variable(self.address)}"
            )
        if code == 404:
            return UsageError(
                f"{url} returned status 404: {message}\n  fix: correct --url or --model; see `quantserve models`"
            )
        if isinstance(code, int) and code < 400:
            return UsageError(f"{url} returned status {code}: {message}\n  fix: correct --url")
        if isinstance(code, int) and 400 <= code < 500 and code not in (408, 429):
            return UsageError(f"{url} refused the request (status {code}): {message}")
        if code in RETRY_CODES:
            return EngineError(f"{url} is busy (status {code}): {message}\n  fix: try again later")
        if isinstance(code, int):
            fix = "the log of the server has the cause"
            fix = f"correct --url, if it is another server; else {fix}" if message == WEB_PAGE else fix
            return EngineError(f"{url} failed (status {code}): {message}\n  fix: {fix}")
        if code in FIXES:
            return EngineError(f"{url}: {message}\n  fix: {FIXES[code]}")
        return EngineError(with_fix(f"{url}: {message}", code))

    async def _receive(self, result: Result, model: str, show: Show) -> None:
        request = result.request
        content = json.dumps(request.body(model)).encode()  # ASCII: a lone surrogate of a file cannot be encoded
        headers = {"Content-Type": "application/json"}
        async with self._http.stream("POST", self._base + request.path, content=content, headers=headers) as response:
            result.status, result.head = response.status_code, perf_counter()
            if response.status_code != 200:
                body = await _whole(response)
                result.retry_after_s = _seconds(response.headers.get("retry-after"))
                words = error_message(body) or response.reason_phrase
                if "html" in response.headers.get("content-type", ""):
                    words = WEB_PAGE
                if place := response.headers.get("location"):
                    words = f"it redirects to {place}"
                result.failure = Failure(response.status_code, words)
            elif "text/event-stream" in response.headers.get("content-type", ""):
                await _stream(result, response, show)
            else:
                result.take_answer(await _whole(response))

    def _failure(self, error: Exception) -> Failure:
        """The failure of a transport error."""
        if isinstance(error, ProtocolError):
            return Failure("protocol", str(error))
        if isinstance(error, httpx.ConnectTimeout):
            return Failure("connect-timeout", f"cannot connect within {CONNECT_S:g} s")
        if isinstance(error, httpx.TimeoutException):
            return Failure("stalled", f"no data for {self.address.stall_s:g} s, the limit of --stall")
        if isinstance(error, httpx.ProxyError):
            return Failure("proxy", f"the proxy of the environment refused: {one_line(error)}")
        if isinstance(error, httpx.ConnectError | OSError):
            causes = [cause for cause in _causes(error) if isinstance(cause, OSError)]
            told = next((cause for cause in causes if cause.errno), causes[-1] if causes else None)
            return connect_failure(self.target, told) if told else Failure("connect", one_line(error))
        if isinstance(error, httpx.RemoteProtocolError):
            return Failure("closed", f"the server broke the connection: {str(error)[:BODY_SHOWN]}")
        if isinstance(error, httpx.NetworkError):
            return Failure("reset", f"the connection was lost: {one_line(error)}")
        return Failure("protocol", one_line(error))


FIXES: Final = {
    "timeout": "raise --timeout, or lower --max-tokens",
    "stalled": "raise --stall, or look at the log of the server",
    "connect-timeout": "start the server, or correct --url; write http:// if the server has no TLS",
    "connect": "start the server, or correct --url",
    "proxy": "correct HTTP_PROXY or HTTPS_PROXY, or add the host to NO_PROXY",
    "closed": "look at the log of the server; an address that needs https:// ends connections like this, too",
    "reset": "look at the log of the server; an address that needs https:// ends connections like this, too",
    "protocol": "correct --url, if the server has no OpenAI-compatible API; else report it to its makers",
    "incomplete": "look at the log of the server; a proxy in between may have cut the answer",
    "error": "the log of the server has the cause",
}
"""Code of a failure -> what to do; `causes.FIXES` has the others."""


async def _stream(result: Result, response: httpx.Response, show: Show) -> None:
    reader, read = MessageReader(), 0
    async for data in response.aiter_bytes():
        at = result.end = perf_counter()
        for message in reader.feed(data, read):
            event = result.take(message, at)
            if event:
                show(event)
        read += 1
    for message in reader.end(read):
        result.take(message, perf_counter())
    result.finish()


async def _whole(response: httpx.Response) -> bytes:
    parts, size = [], 0
    async for data in response.aiter_bytes():
        parts.append(data)
        size += len(data)
        if size > LARGEST_BODY:
            raise ProtocolError(f"an answer is longer than {LARGEST_BODY >> 20} MiB")
    return b"".join(parts)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and those it stands for."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        if isinstance(seen, BaseExceptionGroup):
            for part in seen.exceptions:
                yield from _causes(part)
        seen = seen.__cause__ or seen.__context__


def _seconds(value: str | None) -> float | None:
    try:
        return max(0.0, float(value)) if value else None
    except ValueError:  # a date
        return None


def _said(answer: object) -> str:
    text = answer if isinstance(answer, str) else ""
    return "" if not text or text.lstrip().startswith("<") else f": {text[:200]}"


def _variable(address: Address) -> str:
    return "QUANTSERVE_API_KEY to one that the server accepts"
