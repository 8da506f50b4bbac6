"""``quantserve evaluate``: the options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quantserve_client.options import address, generation, generation_options, server_options

MATCHES = ("exact", "contains", "regex", "numeric")


@click.command("evaluate")
@click.argument("file", required=False, metavar="[FILE.jsonl]")
@click.option("--model", "models", multiple=True, metavar="ID", help="Model; repeat it to compare. Default: all.")
@click.option("--match", type=click.Choice(MATCHES), help="How answers are compared where a question does not say it.")
@click.option(
    "--judge", metavar="MODEL", help="Model that compares the answers of each pair of models, in both orders."
)
@click.option("--judge-url", metavar="URL", help="Server of the judge; default: --url.")
@click.option("--judge-api-key", envvar="QUANTSERVE_JUDGE_API_KEY", metavar="KEY",
              help="API key of --judge-url; better set QUANTSERVE_JUDGE_API_KEY.")  # fmt: skip
@click.option("-c", "--concurrency", type=click.IntRange(1, 1024), default=8, show_default=True,
              help="Requests at once.")  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N questions.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR",
              help="Folder of report and answers; with the same folder an interrupted run goes on.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@generation_options
@server_options
def command(**options: Any) -> int:
    """Score models on questions with reference answers, or let a judge compare them.

    Each line of FILE is a JSON object: prompt (or messages), reference (a text, a number or a list of right ones),
    match (exact, contains, regex, numeric), tolerance, id, category. Without FILE: 40 built-in questions. The
    temperature is 0 by default.

    Exit code: 4 if a question was not answered.
    """
    from quantserve_client.evaluate import Asked, evaluate

    server, parameters = address(options), generation(options)
    return evaluate(Asked(**options, address=server, generation=parameters))
