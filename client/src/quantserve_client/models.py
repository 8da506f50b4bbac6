"""What ``quantserve models`` does: a server's models, from ``/status`` of quantserve or from ``/v1/models``."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from rich.markup import escape

from quantserve.cli.output import COLOURS, console, print_json, table
from quantserve.finding import Severity
from quantserve.target import gib
from quantserve.text import harmless
from quantserve_bench.markdown import DASH, number
from quantserve_client.options import Address
from quantserve_client.server import Server

OURS = ("model", "method", "state", "requests", "weights", "context", "TTFT", "TPOT", "tok/s", "perplexity")
OTHERS = ("model", "owner", "context")
STATES = {"ready": "green", "starting": "yellow", "stopped": "yellow", "unhealthy": "red"}


def models(address: Address, *, as_json: bool) -> int:
    """Print them.

    Raises:
        EngineError, UsageError: see `Server.cards`.
    """
    status, cards = asyncio.run(_fetch(address))
    if as_json:
        print_json(status or {"object": "list", "data": cards})
        return 0
    out = console()
    if not status:
        rows = [[_text(card["id"]), _text(card.get("owned_by")), _context(card)] for card in cards]
        out.print(f"[bold]Models of {escape(address.url)}[/]", soft_wrap=True)
        out.print(table("", OTHERS, rows, wrap=("model",)))
        return 0
    known = status["models"]
    title = f"Models of {escape(address.url)}, quantserve {_text(status.get('version'))}"
    out.print(f"[bold]{title}; expected / observed, times in ms[/]", soft_wrap=True)
    out.print(table("", OURS, map(_row, known), wrap=("requests", "perplexity")))
    for model in known:
        for finding in _list(model.get("findings")):
            severity = finding.get("severity")
            colour = next((COLOURS[one] for one in Severity if one.value == severity), "cyan")
            where = f"{_text(model['id'])}: {_text(finding.get('message'))}"
            out.print(f"  [{colour}]{_text(severity)}[/] [bold]{_text(finding.get('code'))}[/] {where}", soft_wrap=True)
            if finding.get("fix"):
                out.print(f"    [green]fix[/] {_text(finding['fix'])}", soft_wrap=True)
        if adapters := _list(model.get("adapters"), str):
            out.print(f"  adapters of {_text(model['id'])}: {_text(', '.join(adapters))}", soft_wrap=True)
    return 0


async def _fetch(address: Address) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    async with Server(address) as server:
        status = await server.status()
        return status, [] if status else await server.cards()


def _row(model: Mapping[str, Any]) -> list[str]:
    expected, observed = _dict(model.get("expected")), _dict(model.get("observed"))
    state = str(model.get("state"))
    bits = model.get("bits")
    method = f"{_text(model.get('method'))} {number(bits) if isinstance(bits, int | float) else ''}"
    weights = model.get("weights_bytes")
    replicas = len(_list(model.get("replicas")))
    colour = STATES.get(state, "white")
    return [
        _text(model["id"]),
        method.strip(),
        f"[{colour}]{_text(state)}[/]" + (f", {replicas} replicas" if replicas > 1 else ""),
        f"{_number(model.get('ongoing'))} + {_number(model.get('queued'))} queued",
        gib(weights) if isinstance(weights, int) else DASH,
        _number(model.get("max_model_len")),
        *(f"{_number(expected.get(key))} / {_number(observed.get(key))}" for key in ("ttft_ms", "tpot_ms")),
        f"{_number(expected.get('tokens_per_s'))} / {_number(observed.get('tokens_per_s'))}",
        _quality(_dict(model.get("quality"))),
    ]


def _quality(quality: Mapping[str, Any]) -> str:
    ratio = quality.get("perplexity_ratio")
    if not isinstance(ratio, int | float):
        return DASH
    return f"{ratio:.3f}x" + ("" if quality.get("measured") else " published")


def _context(card: Mapping[str, Any]) -> str:
    return _number(card.get("max_model_len") or _dict(card.get("metadata")).get("max_model_len"))


def _number(value: object) -> str:
    return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else DASH


def _text(value: object) -> str:
    return DASH if value is None else escape(harmless(str(value), 500))


def _dict(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object, kind: type = dict) -> list[Any]:
    return [one for one in value if isinstance(one, kind)] if isinstance(value, list) else []
