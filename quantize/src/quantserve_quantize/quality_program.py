"""What ``quantserve quality`` does once its options are known."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from quantserve.checkpoint import open_checkpoint
from quantserve.cli.convert_command import local_path
from quantserve.cli.output import console
from quantserve.config import ModelConfig
from quantserve.errors import UsageError
from quantserve_quantize import through_server, through_transformers
from quantserve_quantize.calibration import SHORTEST, encode, text_of
from quantserve_quantize.dequantized import Dequantized
from quantserve_quantize.draft import disk
from quantserve_quantize.measures import Scores, by_position, summary, worst
from quantserve_quantize.plots import draw
from quantserve_quantize.program import bars, quantizer_class
from quantserve_quantize.record import keep, opened
from quantserve_quantize.source import Weights, fingerprint

MOST_SAMPLES = 28
TEXT = "quality.txt"
AS_SERVED = "auto"
HEADINGS = ("model", "size", "bits", "perplexity", "over reference", "KL mean", "KL 99.9 %", "same top")


@dataclass(frozen=True)
class Asked:
    """The options of the command; see its help."""

    models: tuple[str, ...]
    reference: str
    text: Path | None
    length: int
    samples: int | None
    engine: bool
    dtype: str
    url: str | None
    tokenizer: str | None
    api_key: str | None


def run(asked: Asked, out: Path | None, as_json: bool) -> int:
    """Measure, print a table, and write the report."""
    if asked.engine and asked.url:
        raise UsageError("--engine and --url exclude each other\n  fix: leave one out")
    if asked.dtype != AS_SERVED and not asked.engine:
        raise UsageError(
            "--dtype is of --engine: transformers computes in float32, and a running server in its own dtype\n"
            "  fix: add --engine, or leave --dtype out"
        )
    err = console(stderr=True)
    if asked.url and not asked.tokenizer:
        raise UsageError(
            "--url needs the tokenizer of the models, to cut the text into tokens\n"
            "  fix: add --tokenizer with the folder or hub id of one of them"
        )
    if out is not None:
        with disk(out):
            out.mkdir(parents=True, exist_ok=True)
    where = local_path(asked.tokenizer or asked.reference)
    ids = encode(text_of(asked.text, TEXT), where)
    samples = cut(ids, asked)
    with bars(err) as progress:
        reference, scores = _scored(asked, samples, progress)
        report = reported(asked, samples, reference, scores, where, progress)
    if out is not None:
        with disk(out):
            (out / "quality.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            (out / "quality.md").write_text(markdown(report), encoding="utf-8")
            draw(scores, asked.length, out)
    if not asked.url:
        record(report, err)
    if as_json:
        click.echo(json.dumps(report))
    else:
        show(report)
        if out is not None:
            err.print(f"wrote {escape(str(out))}")
    return 0


def record(report: Mapping[str, Any], err: Console) -> None:
    """Keep the figures beside the weights; a folder that cannot be written is left without."""
    for model in report["models"]:
        try:
            if path := keep(report, model):
                err.print(f"recorded in {escape(str(path))}")
        except OSError as error:
            err.print(f"not recorded beside {escape(model['model'])}: {error.strerror or error}")


def cut(ids: Tensor, asked: Asked) -> Tensor:
    """The first samples of a text, int64 [samples, tokens].

    Raises:
        UsageError: it is too short.
    """
    there = len(ids) // asked.length
    count = min(there, MOST_SAMPLES) if asked.samples is None else asked.samples
    if there < max(count, 1):
        raise UsageError(
            f"{asked.text or 'the built-in text'} has {len(ids)} tokens, which make {there} samples of {asked.length}\n"
            f"  fix: give a longer text{', or a smaller --length or --samples' if len(ids) >= SHORTEST else ''}"
        )
    return ids[: count * asked.length].view(count, asked.length)


def _scored(asked: Asked, samples: Tensor, progress: Any) -> tuple[Scores, dict[str, Scores]]:
    if asked.url:
        from quantserve_bench.request import Target

        target = Target(asked.url, "", asked.api_key)

        def ask(model: str) -> through_server.Known:
            return through_server.known(target, model, samples, partial(progress, model))

        return through_server.score(asked.reference, list(asked.models), ask)
    if asked.engine:
        return through_server.score(
            asked.reference, list(asked.models), lambda model: _through_engine(model, asked.dtype, samples, progress)
        )
    models = {label: weights_of(label) for label in asked.models}
    return through_transformers.score(Weights(local_path(asked.reference)), models, samples, progress)


def weights_of(model: str) -> Weights:
    """The weights of an unquantized checkpoint, or those for which a quantized one stands."""
    folder = local_path(model)
    declared = open_checkpoint(str(folder)).quantization_config
    if not declared:
        return Weights(folder)
    method = str(declared.get("quant_method"))
    try:
        _, found = quantizer_class(method)
    except UsageError as error:
        raise UsageError(
            f"{folder}: its method {method!r} cannot be judged through transformers, as it has no quantizer\n"
            "  fix: add --engine, or --url of a server that serves it"
        ) from error
    return Dequantized(folder, found)


def _through_engine(model: str, dtype: str, samples: Tensor, progress: Any) -> through_server.Known:
    """Serve a model, alone, so that memory holds one at a time."""
    from quantserve_bench.server import Server

    kwargs: dict[str, Any] = {"enforce_eager": True, "max_num_seqs": 4}
    if dtype != AS_SERVED:
        kwargs["dtype"] = dtype
    engine = {"model_id": "model", "hf_model_id": str(local_path(model)), "max_total_tokens": samples.shape[1] + 1}
    config = ModelConfig.model_validate({"engine_config": {**engine, "engine_kwargs": kwargs}})
    with (
        tempfile.TemporaryDirectory() as scratch,
        Server([config], Path(scratch), lambda seconds: progress(f"starting {model}", int(seconds), 120)) as target,
    ):
        return through_server.known(target, "model", samples, partial(progress, model))


def reported(
    asked: Asked,
    samples: Tensor,
    reference: Scores,
    scores: Mapping[str, Scores],
    tokenizer: Path,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """All results as plain data."""
    from transformers import AutoTokenizer

    decode = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False).decode
    text = text_of(asked.text, TEXT)
    through = "server" if asked.url else "engine" if asked.engine else "transformers"
    if asked.dtype != AS_SERVED:
        through = f"{through} in {asked.dtype}"
    return {
        "reference": {
            "model": asked.reference,
            **({} if asked.url else files(asked.reference, progress)),
            **summary(reference, reference),
        },
        "through": through,
        "text": str(asked.text or "built-in"),
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "samples": samples.shape[0],
        "length": samples.shape[1],
        "models": [
            {
                "model": label,
                **({} if asked.url else files(label, progress)),
                **summary(score, reference),
                "worst": worst(score, samples, decode),
                "by_position": by_position(score, samples.shape[1]),
            }
            for label, score in scores.items()
        ],
    }


def files(model: str, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Bytes and hash of the weight files, and bits per weight of the quantized linears where the files say so."""
    checkpoint = opened(model)
    made: dict[str, Any] = {
        "bytes": checkpoint.weight_bytes,
        "sha256": fingerprint(checkpoint, partial(progress, model)),
    }
    if provenance := checkpoint.quant_files.get("quantserve.json"):
        made["bits_per_weight"] = provenance.get("bits_per_weight")
    return made


def rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The table's cells."""
    base = report["reference"]
    made = [[base["model"], "", "", f"{base['perplexity']:.3f}", "1", "", "", ""]]
    for model in report["models"]:
        made.append(
            [
                model["model"],
                f"{model['bytes'] / 2**20:.0f} MiB" if "bytes" in model else "",
                f"{model['bits_per_weight']:.2f}" if model.get("bits_per_weight") else "",
                f"{model['perplexity']:.3f}",
                f"{model['perplexity_ratio']:.4f}",
                f"{model['kl_mean']:.4f}",
                f"{model['kl_99.9']:.3f}",
                f"{100 * model['same_top']:.1f} %",
            ]
        )
    return made


def show(report: Mapping[str, Any]) -> None:
    """Print the table."""
    title = f"{report['samples']} x {report['length']} tokens of {report['text']}, through {report['through']}"
    table = Table(title=escape(title), title_justify="left")
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if number == 0 else "right")
    for row in rows(report):
        table.add_row(*map(escape, row))
    console().print(table)


def markdown(report: Mapping[str, Any]) -> str:
    """The table, the tokens that differ most, and the plot, as Markdown."""
    lines = [
        f"# Quality against {report['reference']['model']}",
        "",
        f"{report['samples']} x {report['length']} tokens of {report['text']}, through {report['through']}.",
        "",
        f"| {' | '.join(HEADINGS)} |",
        f"|---{'|---:' * (len(HEADINGS) - 1)}|",
        *(f"| {' | '.join(row)} |" for row in rows(report)),
        "",
        "![error by block and divergence by position](quality.svg)",
        "",
    ]
    for model in report["models"]:
        lines += [f"Largest divergences of {model['model']}:", "", "| nats | text before | token |", "|---:|---|---|"]
        lines += [
            f"| {row['divergence']:.2f} | {_code(row['before'])} | {_code(row['token'])} |" for row in model["worst"]
        ]
        lines.append("")
    return "\n".join(lines)


def _code(text: str) -> str:
    return "`" + text.replace("`", "'").replace("|", "\\|").replace("\n", " ") + "`"
