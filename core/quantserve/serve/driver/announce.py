"""What `quantserve serve` prints."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from quantserve.planning.plan import Plan
from quantserve.system.addresses import base_url
from quantserve.text import escaped


def say(line: str) -> None:
    """Print a line, if somebody reads it."""
    try:
        print(escaped(line, "\n"), flush=True)
    except OSError:  # the terminal or the pipe is gone, while there is still a server to stop
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())  # a line that cannot be written would change the exit code
        os.close(null)


def announce(
    ready: Sequence[Plan],
    wanted: int,
    host: str,
    port: int,
    keys: bool,
    stop: str = "Press Ctrl-C to stop.",
    page: bool = False,
) -> None:
    """Print the addresses and a request to try.

    Args:
        ready: the models that are served.
        wanted: number of models that were to be served.
        host, port: the listening address.
        keys: whether requests need a key.
        stop: how to stop the server.
        page: whether there is a page at ``/``.
    """
    base = base_url(host, port)
    first = ready[0]
    together = ["all models"] if wanted > 1 else []
    width = max(map(len, [*together, *(plan.model_id for plan in ready)]))
    say("Ready:")
    for name in together:
        say(f"  {name:{width}}  {base}/v1")
    for plan in ready:
        say(f"  {plan.model_id:{width}}  {base}{plan.route_prefix}/v1")
    if page:
        say(f"Explorer: {base}/")
    body = {"model": first.model_id, "messages": [{"role": "user", "content": "What does str.join do?"}]}
    key = ' -H "Authorization: Bearer $KEY"' if keys else ""
    say("Try:")
    say(f"  curl {base}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{json.dumps(body)}'")
    say(stop)
