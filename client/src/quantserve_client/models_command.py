"""``quantserve models``: the options."""

from __future__ import annotations

from typing import Any

import click

from quantserve_client.options import address, server_options


@click.command("models")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: /status of quantserve, /v1/models of other servers.")
@server_options
def command(as_json: bool, **options: Any) -> int:
    """Show the models of a server: method, state, load, memory, expected beside observed speed.

    Of a server that is not quantserve, what its /v1/models tells.
    """
    from quantserve_client.models import models

    return models(address(options), as_json=as_json)
