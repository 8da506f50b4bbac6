"""Turns Ray Serve's application status into one line of text per event."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

_OURS = re.compile(r"EngineError: (.+)")
_ANY = re.compile(r"^((?:[A-Za-z_][\w.]*\.)?\w*(?:Error|Exception|Exit|Interrupt)\b.*)$", re.MULTILINE)
_LONGEST: Final = 600


def cause(message: str) -> str:
    """The line of a deployment's failure message that has the cause, without the traceback."""
    for pattern in (_OURS, _ANY):
        if found := pattern.findall(message):
            return str(found[-1]).strip()[:_LONGEST]
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1][:_LONGEST] if lines else "no cause reported"


class Progress:
    """Tracks applications from starting to ready or failed, and later between ready and unhealthy.

    Args:
        names: of the applications, in the order they are shown.
        logs: folder of the logs.
    """

    def __init__(self, names: Sequence[str], logs: str) -> None:
        self.logs = logs
        self._began = time.monotonic()
        self._state = dict.fromkeys(names, "starting")
        self._remarks: dict[str, str] = {}
        self._width = max(map(len, names), default=0)

    @property
    def starting(self) -> list[str]:
        """The applications that are still starting."""
        return [name for name, state in self._state.items() if state == "starting"]

    @property
    def ready(self) -> list[str]:
        """The applications that are serving, including unhealthy ones."""
        return [name for name, state in self._state.items() if state in ("ready", "unhealthy")]

    @property
    def failed(self) -> list[str]:
        """The applications that failed to start."""
        return [name for name, state in self._state.items() if state == "failed"]

    def update(self, applications: Mapping[str, Any]) -> Iterator[str]:
        """Process ``serve.status().applications``; yields one line per change."""
        for name, before in self._state.items():
            overview = applications.get(name)
            if overview is None or before == "failed":
                continue
            status = str(getattr(overview.status, "value", overview.status))
            deployments = [deployment.message for deployment in overview.deployments.values()]
            now = {"RUNNING": "ready", "DEPLOY_FAILED": "failed", "UNHEALTHY": "unhealthy"}.get(status, before)
            if now == before:
                yield from self._remark(name, deployments)
                continue
            self._state[name] = now
            seconds = time.monotonic() - self._began
            if now == "ready":
                yield self._line(name, f"ready in {seconds:.1f} s" if before == "starting" else "ready again")
            else:
                reason = cause("\n".join([*deployments, *([] if any(deployments) else [overview.message])]))
                yield self._line(name, f"{now}: {reason}")

    def _remark(self, name: str, messages: Sequence[str]) -> Iterator[str]:
        """The reason of a slow start, such as missing resources; reported once."""
        message = next((message for message in messages if "taken more than" in message), "")
        if message and self._state[name] == "starting" and name not in self._remarks:
            self._remarks[name] = message
            if "initialize" not in message:
                yield self._line(name, " ".join(message.split())[:_LONGEST])

    def _line(self, name: str, text: str) -> str:
        return f"  {name:{self._width}}  {text}"
