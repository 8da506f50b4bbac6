"""``quantserve schema``."""

from __future__ import annotations

import click

from quantserve.cli.output import print_json
from quantserve.config import json_schema


@click.command("schema")
def command() -> None:
    """Print the JSON Schema of the config, for editors and validators."""
    print_json(json_schema())
