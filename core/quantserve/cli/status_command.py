"""``quantserve status``: the servers of this user on this machine."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, Final

import click
from rich.markup import escape

from quantserve.cli.output import console, print_json, table
from quantserve.system.servers import Server, running
from quantserve.text import harmless

ASK_S: Final = 5.0
LARGEST: Final = 64 << 20
KEY: Final = "QUANTSERVE_API_KEY"
COLOURS: Final = {"ready": "green", "ok": "green", "starting": "yellow", "stopping": "yellow", "degraded": "yellow"}
COLUMNS: Final = ("pid", "url", "state", "up", "models", "started with", "log")


@click.command("status")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> int:
    """Show the servers that this user runs on this machine, in the foreground or with --detach.

    The state of each model comes from the server; one with API keys tells it if QUANTSERVE_API_KEY has one of them.
    """
    servers = running()
    with ThreadPoolExecutor(8) as pool:
        seen = list(zip(servers, pool.map(_look, servers), strict=True))
    if as_json:
        print_json([_json(server, *states) for server, states in seen])
        return 0
    out = console()
    if not seen:
        out.print("no server of this user runs on this machine")
        return 0
    rows = [
        [
            str(server.pid),
            escape(server.url),
            _coloured(state),
            uptime(time.time() - server.started),
            "\n".join(f"{escape(name)} {_coloured(models.get(name, ''))}".strip() for name in server.models),
            escape(" ".join(server.sources)),
            escape(server.log),
        ]
        for server, (state, models) in seen
    ]
    out.print(table("Servers of this user on this machine", COLUMNS, rows, wrap=("models", "started with", "log")))
    return 0


def uptime(seconds: float) -> str:
    """A duration in two units, such as ``3 h 5 min``."""
    whole = max(0, int(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (whole % 60, "s")]
    first = next((index for index, (count, _) in enumerate(parts) if count), len(parts) - 1)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2] if count) or "0 s"


def _look(server: Server) -> tuple[str, dict[str, str]]:
    """State of a server, and of its models as far as it tells."""
    if server.state != "ready":
        return server.state, {}
    code, answer = _ask(server, "/status")
    if code == 200 and isinstance(answer, dict) and isinstance(answer.get("models"), list):
        states = {str(m.get("id")): str(m.get("state")) for m in answer["models"] if isinstance(m, dict)}
        bad = [state for state in states.values() if state == "unhealthy"]
        return ("down" if len(bad) == len(states) else "degraded") if bad or server.failed else "ready", states
    code, answer = _ask(server, "/health")
    status = answer.get("status") if isinstance(answer, dict) else None
    return (harmless(str(status), 40) if status else "no answer" if code is None else f"HTTP {code}"), {}


def _ask(server: Server, path: str) -> tuple[int | None, Any]:
    key = os.environ.get(KEY, "")
    usable = key.isascii() and key.isprintable() and key
    request = urllib.request.Request(server.url + path, headers={"Authorization": f"Bearer {key}"} if usable else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this machine needs no proxy
    try:
        with opener.open(request, timeout=ASK_S) as response:
            code, body = response.status, response.read(LARGEST)
    except urllib.error.HTTPError as error:
        with error:
            code, body = error.code, error.read(LARGEST)
    except (OSError, ValueError):
        return None, None
    except Exception as error:  # http.client's errors have no other base
        if not type(error).__module__.startswith("http"):
            raise
        return None, None
    try:
        return code, json.loads(body)
    except (ValueError, RecursionError):
        return code, None


def _json(server: Server, state: str, models: dict[str, str]) -> dict[str, Any]:
    hidden = ("start_ticks", "boot", "pids", "host")
    known = {name: value for name, value in asdict(server).items() if name not in hidden}
    return {
        **known,
        "state": state,
        "uptime_s": time.time() - server.started,
        "models": [{"id": name, "state": models.get(name)} for name in server.models],
    }


def _coloured(state: str) -> str:
    colour = COLOURS.get(state, "red")
    return f"[{colour}]{escape(state)}[/]" if state else ""
