"""``quantserve quality``. The module is light, as ``quantserve list`` imports it."""

from __future__ import annotations

from pathlib import Path

import click

from quantserve_quantize.command import imported


@click.command("quality")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--reference", required=True, metavar="BASE", help="The unquantized model; with --url its id.")
@click.option("--text", metavar="FILE", type=click.Path(path_type=Path), help="Text; default: Shakespeare's sonnets.")
@click.option("--length", type=click.IntRange(16, 100_000), default=512, show_default=True, help="Tokens of a sample.")
@click.option("--samples", type=click.IntRange(1, 100_000), help="Samples; default: all of the text, at most 28.")
@click.option("--engine", is_flag=True, help="Serve the models with vLLM and read their log-probabilities.")
@click.option("--dtype", type=click.Choice(("auto", "float32", "bfloat16", "float16")), default="auto",
              show_default=True, help="With --engine: what it computes in; auto: as it is served.")  # fmt: skip
@click.option("--url", metavar="URL", help="Ask a running server; MODEL and BASE are ids of its models.")
@click.option("--tokenizer", metavar="MODEL", help="Where the tokenizer is; needed with --url.")
@click.option("--api-key", metavar="KEY", envvar="QUANTSERVE_API_KEY", help="For --url; or set QUANTSERVE_API_KEY.")
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Folder for JSON, Markdown, plot.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    models: tuple[str, ...],
    reference: str,
    text: Path | None,
    length: int,
    samples: int | None,
    engine: bool,
    dtype: str,
    url: str | None,
    tokenizer: str | None,
    api_key: str | None,
    out: Path | None,
    as_json: bool,
) -> int:
    """Measure what quantized models lost: perplexity, KL divergence and agreement with the model they were made from.

    Runs through transformers in float32, block by block, for methods with a quantizer; with --engine or --url through
    vLLM for every method, where divergences are lower bounds from the 20 most probable tokens.
    """
    program = imported("quality_program")
    asked = program.Asked(models, reference, text, length, samples, engine, dtype, url, tokenizer, api_key)
    done: int = program.run(asked, out, as_json)
    return done
