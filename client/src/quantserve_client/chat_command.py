"""``quantserve chat``: the options."""

from __future__ import annotations

from typing import Any

import click

from quantserve_client.options import address, generation, generation_options, server_options


@click.command("chat")
@click.argument("model", required=False)
@generation_options
@click.option("--stats", is_flag=True, help="Print TTFT, TPOT, tok/s and tokens after each answer.")
@server_options
def command(model: str | None, stats: bool, **options: Any) -> int:
    """Chat with MODEL; default: the server's only model.

    \b
    /reset        forget the conversation
    /system TEXT  set the system prompt, without TEXT remove it, and forget the conversation
    /save FILE    write the conversation as JSON, or as Markdown if FILE ends with .md
    /help         print these lines
    /quit         end; so does Ctrl-D

    A line that ends with \\ goes on in the next one. Ctrl-C stops an answer, and not the chat; the part that came stays
    in the conversation. In a pipe each line is a turn.
    """
    from quantserve_client.chat import chat

    return chat(address(options), model, generation(options), stats=stats)
