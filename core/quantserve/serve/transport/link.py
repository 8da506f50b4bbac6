"""What both ends of the connection between gateway and replica have in common: see docs/wire.md."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from typing import Final, cast

from quantserve.serve.transport.frames import MAX_PAYLOAD, Bytes, Frames, Kind, ProtocolError, frame
from quantserve.text import harmless

TICKS: Final = 5
"""Pings per `silence_s`."""
HANGS: Final = 4
"""A process whose host responds and that sends nothing for so many `silence_s` counts as hung."""
HIGH_WATER: Final = 128 << 10
"""Bytes in the send buffer above which senders wait for their turn."""

_INFO: Final = struct.Struct("=16xI4xI28xI84xI80xI")
"""Of Linux's ``struct tcp_info``: ``tcpi_snd_mss`` (bytes), ``tcpi_unacked`` (segments), ``tcpi_last_ack_recv``
(milliseconds), ``tcpi_notsent_bytes`` and ``tcpi_snd_wnd`` (bytes; zero before Linux 5.4).
"""
_RESET: Final = struct.pack("ii", 1, 0)
"""``SO_LINGER``: discard the send buffer."""

logger = logging.getLogger(__name__)


class Link(asyncio.Protocol):
    """One end of a connection: splits what it receives into frames, sends, and detects that the peer is lost.

    A peer is lost in one of two ways. Its host has vanished: its kernel acknowledges nothing for `silence_s`, although
    a ping is sent `TICKS` times in that time. Or its process hangs: the kernel acknowledges, and the process sends
    nothing for `HANGS` times as long; until then it is slow. TCP_USER_TIMEOUT alone does not tell these apart: it also
    fails a connection whose peer acknowledges but does not read.

    Args:
        peer: name of the other end in messages: gateway or replica.
        silence_s: seconds.
        limit: largest payload that is accepted before the handshake is complete, in bytes.
        handshake_ticks: within so many ticks the handshake must be complete.

    Attributes:
        free: whether the send buffer has room; small frames are then sent without waiting for a turn.
        reason: why this end closed the connection; empty while it did not.
        silent: whether the reason is that the peer is lost.
    """

    def __init__(self, peer: str, silence_s: float, limit: int, handshake_ticks: int) -> None:
        self._peer = peer
        self._transport: asyncio.Transport | None = None
        self._frames = Frames(limit)
        self._turns = asyncio.Lock()
        self._writable = asyncio.Event()
        self._writable.set()
        self._introduced = False  # HELLO was sent or received
        self._established = False
        self._patience = handshake_ticks
        self._set_silence(silence_s)
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._heard = False
        self._quiet = 0
        self.free = True
        self.reason = ""
        self.silent = False

    def on_frame(self, kind: int, number: int, payload: bytes) -> None:
        """Handle a frame; PING and PONG as well, by `on_ping`.

        Raises:
            ProtocolError: the peer violated the protocol; the connection is closed.
        """
        raise NotImplementedError

    def _establish(self, silence_s: float) -> None:
        """The peer is known: accept frames of any kind, and ping."""
        self._introduced = self._established = True
        self._frames.limit = MAX_PAYLOAD
        self._patience = TICKS * HANGS
        self._set_silence(silence_s)
        self._wait()

    def on_ping(self, kind: int, payload: bytes) -> None:
        """Handle a frame with number 0 after the handshake: a PING or PONG.

        Raises:
            ProtocolError: it is another one, or comes before the end of the handshake.
        """
        if payload or not self._established or kind not in (Kind.PING, Kind.PONG):
            raise ProtocolError(f"a frame of kind {kind} without a request")
        if kind == Kind.PING and self.free:  # otherwise the buffered data shows the same
            self.send(Kind.PONG, 0)

    # --- sending

    @property
    def usable(self) -> bool:
        """Whether frames can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, kind: int, number: int, payload: Bytes = b"") -> None:
        """Send a frame now."""
        self.write(frame(kind, number, payload))

    async def send_in_turn(self, kind: Kind, number: int, payload: Bytes = b"") -> None:
        """Send a frame when the send buffer has room and it is this one's turn: first come, first served. Senders of
        many frames call it for each and so take turns.
        """
        async with self._turns:
            await self._writable.wait()
            self.send(kind, number, payload)
        await asyncio.sleep(0)

    def write(self, data: bytes) -> None:
        """Send encoded frames."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        """Close after sending what is buffered."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def fail(self, reason: str) -> None:
        """Close at once, and log the reason."""
        if self.usable:
            self.reason = harmless(reason)
            logger.warning("closed the connection to %s %s: %s", self._peer, self.address, self.reason)
            self.abort()

    def _discard(self) -> None:
        """Make the close send RST. Maybe only the peer's packets are lost, and it takes their repetition for signs of
        life: then a FIN, behind data that nothing acknowledges, would reach it too late.
        """
        assert self._transport is not None
        wire = self._transport.get_extra_info("socket")
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)

    @property
    def address(self) -> str:
        """Host and port of the peer."""
        address = self._transport.get_extra_info("peername") if self._transport is not None else None
        return f"{address[0]}:{address[1]}" if address else "(unknown address)"

    # --- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Set the buffers and socket options, and start the timer."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(HIGH_WATER)
        self._set_options()
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Handle the frames that are complete."""
        self._heard = True
        try:
            for kind, number, payload in self._frames.feed(data):
                self.on_frame(kind, number, payload)
        except ProtocolError as error:
            self.fail(f"protocol error: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        """Stop the timer, and let senders continue; what they send is dropped."""
        if self._timer is not None:
            self._timer.cancel()
        self._writable.set()
        if error is not None and not self.reason and not isinstance(error, ConnectionError):
            self.reason, self.silent = str(error), True

    def pause_writing(self) -> None:
        """The send buffer is full."""
        self._writable.clear()
        self.free = False

    def resume_writing(self) -> None:
        """The send buffer has room."""
        self._writable.set()
        self.free = True

    # --- liveness

    def _set_silence(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._tick_s = silence_s / TICKS
        if self._transport is not None:
            self._set_options()

    def _set_options(self) -> None:
        """TCP_USER_TIMEOUT, where this platform has it: the longest time without progress, even with a live peer."""
        if self._transport is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
            wire = self._transport.get_extra_info("socket")
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(HANGS * self._silence_s * 1000))

    def _wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._due = loop.time() + self._tick_s
        self._timer = loop.call_later(self._tick_s, self._tick)

    def _tick(self) -> None:
        """Ping, and close the connection of a lost peer.

        Silence is counted in ticks: while this event loop is blocked there are none, so that its own delay is not
        taken for the peer's silence.
        """
        blocked = asyncio.get_running_loop().time() - self._due > self._tick_s
        self._quiet = 0 if self._heard and self._established else self._quiet + 1
        self._heard = False
        unacknowledged = 0.0 if blocked else self._unacknowledged_s()
        if unacknowledged > self._silence_s - self._tick_s:
            self.silent = True
            self._discard()
            self.fail(f"its host acknowledged nothing for {unacknowledged:.1f} s")
        elif self._quiet >= self._patience:
            self.silent = True
            missing = "no sign of life" if self._established else "no complete handshake"
            self.fail(f"{missing} for {self._quiet * self._tick_s:g} s")
        elif self.usable:
            if self._introduced:
                self.send(Kind.PING, 0)
            self._wait()

    def _unacknowledged_s(self) -> float:
        """Seconds since the peer's kernel acknowledged something, if something is unacknowledged; otherwise 0.

        Data that fits the peer's window and was not even sent counts, too: this host has lost its address or its route.
        """
        if self._transport is None or self._transport.is_closing() or not hasattr(socket, "TCP_INFO"):
            return 0.0
        wire = self._transport.get_extra_info("socket")
        known = wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size).ljust(_INFO.size, b"\0")
        largest, segments, milliseconds, unsent, window = _INFO.unpack(known)
        stuck = segments or (unsent and window >= min(unsent, largest))
        return milliseconds / 1000 if stuck else 0.0
