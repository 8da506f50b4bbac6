"""``quantserve query``: the options."""

from __future__ import annotations

from typing import Any

import click

from quantserve_client.options import address, completion_option, generation, generation_options, server_options


@click.command("query")
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option(
    "--model", "models", multiple=True, metavar="ID", help="Model to ask; repeat it to compare. Default: the only one."
)
@click.option("--file", "files", multiple=True, metavar="FILE",
              help="Prompts: a line each, or .jsonl with prompt or messages; - for standard input.")  # fmt: skip
@generation_options
@completion_option
@click.option("--stats", is_flag=True, help="Print TTFT, TPOT, tok/s and tokens per model to standard error.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object per answer, a line each (JSON lines).")
@server_options
def command(prompts: tuple[str, ...], models: tuple[str, ...], files: tuple[str, ...], stats: bool, as_json: bool,
            **options: Any) -> int:  # fmt: skip
    """Ask one or several models, and see their answers stream side by side.

    All models get a PROMPT at the same time; prompts follow one after another. "-" is a prompt from standard input. In
    a pipe the answers are printed one below the other. Works with every server that has OpenAI's API.

    Exit codes: 2 if a request was refused, 4 if an answer failed.
    """
    from quantserve_client.query import query

    return query(address(options), models, prompts, files, generation(options), stats=stats, as_json=as_json)
