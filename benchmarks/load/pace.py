"""A server that sends tokens at an exact pace and writes into each when it was sent.

Run as ``python -m benchmarks.load.pace TOKENS_PER_S``; prints its port. Clocks of two processes can be compared because
`time.perf_counter` is the machine's monotonic clock.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from time import perf_counter

PROMPT_TOKENS = 100
FRAME = {
    "id": "chatcmpl-0123456789abcdef0123456789abcdef",
    "object": "chat.completion.chunk",
    "created": 1_700_000_000,
    "model": "paced",
}


def event(value: Mapping[str, object]) -> bytes:
    """One chunk with one server-sent event, of about the size of vLLM's."""
    data = b"data: %s\n\n" % json.dumps({**FRAME, **value}, separators=(",", ":")).encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


def delta(text: str, **more: object) -> bytes:
    """A chat's event with a token."""
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None, **more}
    return event({"choices": [choice]})


class Paced(asyncio.Protocol):
    """One connection; answers each request with as many tokens as it asks for, one every `interval` seconds."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer when a request is whole."""
        self._buffer += data
        head, end, body = self._buffer.partition(b"\r\n\r\n")
        length = next(
            (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
        )
        if not end or len(body) < length:
            return
        self._buffer = b""
        tokens = int(json.loads(body[:length]).get("max_tokens", 1))
        self._transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
            + event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        )
        loop = asyncio.get_running_loop()
        due = loop.time() + self._interval
        loop.call_at(due, self._send, tokens, tokens, due)

    def _send(self, left: int, tokens: int, due: float) -> None:
        if self._transport.is_closing():
            return
        if left:
            self._transport.write(delta(f"{perf_counter():.6f} "))
            due += self._interval
            asyncio.get_running_loop().call_at(due, self._send, left - 1, tokens, due)
            return
        usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": tokens, "total_tokens": PROMPT_TOKENS + tokens}
        finish = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
        done = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
        self._transport.write(finish + event({"choices": [], "usage": usage}) + done)


async def main(tokens_per_s: float) -> None:
    """Serve until killed."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Paced(1 / tokens_per_s), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1])))
