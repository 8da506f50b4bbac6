"""One way to serve one entry, checked as `quantserve check` does, and where that differs from what is expected."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from corpus.entries import Case, Entry
from quantserve.checks.memory import MemoryEstimate
from quantserve.config import load_object
from quantserve.errors import QuantserveError
from quantserve.finding import Severity
from quantserve.planning.compose import Composition, compose
from quantserve.plugins.registry import Registry
from quantserve.target import GIB, find_target

# ``not-estimated`` in a case's ``may`` is no code: the KV cache may be left unestimated.
ALWAYS_MAY = ("kv-cache-small", "memory-tight", "symlink-outside")
"""Warnings that any case may have: they depend on the estimate of working memory, which nobody here knows better."""

STEP = 16384
"""Tokens a sliding window may keep beyond itself: those of one scheduler step, at most, and a block."""

ENCODER_TOKENS = 1500
"""Of an encoder-decoder's audio, whose keys and values a sequence keeps beside its own."""


@dataclass
class Row:
    """What was found, and the differences to what is expected."""

    entry: Entry
    case: Case
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    memory: MemoryEstimate | None = None


def judge(entry: Entry, case: Case, folder: Path, registry: Registry) -> Row:
    """Compose the model and compare."""
    row = Row(entry, case)
    engine: dict[str, object] = {"model_id": "m", "hf_model_id": str(folder)}
    kwargs = dict(case.kwargs)
    if "max_model_len" in kwargs:
        engine["max_total_tokens"] = kwargs.pop("max_model_len")
    for key in ("allow_pickle",):
        if key in kwargs:
            engine[key] = kwargs.pop(key)
    engine["engine_kwargs"] = kwargs
    try:
        app = load_object({"models": [{"engine_config": engine, "scaling_config": {"num_workers": case.tp}}]}, "corpus")
        composition = compose(app.models[0], registry, find_target(case.target))
    except QuantserveError as error:
        row.errors = [type(error).__name__]
        row.differences += _codes(case, row)
        row.differences += _mentions(case, str(error))
        return row
    row.memory = composition.memory
    row.errors = sorted({f.code for f in composition.findings if f.severity is Severity.ERROR})
    row.warnings = sorted({f.code for f in composition.findings if f.severity is Severity.WARNING})
    row.differences += _codes(case, row)
    row.differences += _mentions(
        case, " ".join(f"{f.message} {' '.join(f.offenders)} {f.fix}" for f in composition.errors)
    )
    row.differences += _numbers(entry, case, composition)
    return row


def _codes(case: Case, row: Row) -> Iterator[str]:
    wanted = [code.split("|") for code in case.errors]
    warned = [code.split("|") for code in case.warnings]
    allowed = {*case.may, *ALWAYS_MAY, *[code for codes in [*wanted, *warned] for code in codes]}
    for codes in wanted:
        if not set(codes) & set(row.errors):
            yield f"error {' or '.join(codes)} is not there"
    for code in row.errors:
        if code not in allowed:
            yield f"error {code}"
    for codes in warned:
        if not set(codes) & set(row.warnings):
            yield f"warning {' or '.join(codes)} is not there"
    for code in row.warnings:
        if code not in allowed:
            yield f"warning {code}"


def _mentions(case: Case, text: str) -> Iterator[str]:
    for wanted in case.mentions:
        if wanted.lower() not in text.lower():
            yield f"the errors do not mention {wanted!r}"


def _numbers(entry: Entry, case: Case, composition: Composition) -> Iterator[str]:
    memory = composition.memory
    truth = {**entry.vllm, **case.numbers}
    if memory is None or case.errors not in ((), ("method-not-detected",)):
        return  # of a checkpoint that is refused, the numbers do not matter
    asked = case.kwargs.get("max_model_len")
    context = truth.get("context")
    if context and not asked and memory.max_model_len != context:
        yield f"context {memory.max_model_len}, vLLM {context}"
    weights = truth.get("weights")
    if weights and case.tp == 1 and not case.errors and not _near(memory.weights_bytes, weights, 0.03):
        yield f"weights {memory.weights_bytes / GIB:.2f} GiB, vLLM {weights / GIB:.2f}"
    if layers := truth.get("kv"):
        yield from _kv(truth, layers, case, memory, asked or context or memory.max_model_len)


def _kv(
    truth: dict[str, object], layers: Sequence[Sequence[object]], case: Case, memory: MemoryEstimate, tokens: int
) -> Iterator[str]:
    """The KV cache of a token, where a token costs the same on every layer, and that of a whole sequence."""
    heads = int(str(truth.get("kv_heads") or 1))
    token = least = most = 0.0
    for kind, count, size, window in layers:
        number, each = int(str(count)), float(str(size))
        if kind == "state":
            most += 2 * number * each  # vLLM pads it to a page of the attention layers
            continue
        if kind == "CrossAttention":
            most += number * each * ENCODER_TOKENS
            continue
        if kind not in ("MLAAttention", "SlidingWindowMLA"):
            each *= max(1, heads // case.tp) / heads
        token += number * each
        width = int(str(window)) if window else tokens
        least += number * each * min(tokens, width)
        most += number * each * min(tokens, width + STEP if window else width)
    if not token:
        if memory.kv_bytes_per_token:
            yield f"KV cache {memory.kv_bytes_per_token} bytes a token, vLLM none"
        return
    if memory.kv_bytes_per_token and not _near(memory.kv_bytes_per_token, token, 0.02):
        yield f"KV cache {memory.kv_bytes_per_token} bytes a token, vLLM {token:.0f}"
    if memory.bytes_per_sequence and not least * 0.95 <= memory.bytes_per_sequence <= most * 1.1:
        yield (
            f"KV cache {memory.bytes_per_sequence / GIB:.2f} GiB a sequence of {memory.max_model_len}, "
            f"vLLM {least / GIB:.2f} to {most / GIB:.2f}"
        )
    if not memory.kv_bytes_per_token and "not-estimated" not in case.may:
        yield "KV cache not estimated"


def _near(found: float, wanted: float, share: float) -> bool:
    return abs(found - wanted) <= share * wanted


def table(rows: Iterable[Row], everything: bool = True) -> str:
    """Rows as text: model, case, expected, found, context, KV bytes per token, weights, differences below."""
    head = ("model", "case", "expected", "found", "context", "KV B/token", "GiB", "")
    lines = [head]
    notes: dict[int, list[str]] = {}
    rows = list(rows)
    for row in rows:
        if not everything and not row.differences:
            continue
        memory = row.memory
        numbers = ("-", "-", "-")
        if memory:
            numbers = (str(memory.max_model_len), str(memory.kv_bytes_per_token), f"{memory.weights_bytes / GIB:.1f}")
        notes[len(lines)] = row.differences
        expected = ", ".join(row.case.errors) or "served"
        found = ", ".join(row.errors) or "served"
        lines.append(
            (row.entry.name, str(row.case), expected, found, *numbers, "WRONG" if row.differences else "right")
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = []
    for index, line in enumerate(lines):
        text.append("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        text += [f"    {note}" for note in notes.get(index, ())]
    wrong = sum(bool(row.differences) for row in rows)
    models = len({row.entry.name for row in rows})
    refused = sum(bool(row.case.errors) for row in rows)
    text.append(
        f"{models} checkpoints, {len(rows)} cases, {refused} of them to be refused: "
        f"{len(rows) - wrong} right, {wrong} wrong"
    )
    return "\n".join(text)
