"""The tensors beside the quantized linears: embeddings, norms, lm_head, biases, and what nobody expects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from quantserve.checkpoint.data import DTYPE_BITS
from quantserve.checks.stored import FLOATS
from quantserve.checks.wording import are, have, named, shown
from quantserve.finding import Finding
from quantserve.model.architecture import Architecture, read_architecture
from quantserve.model.layers import (
    block_of,
    is_multimodal,
    linears,
    lm_head_name,
    other_tensors,
    split_block,
)
from quantserve.model.modules import CACHE_SCALES, module_of, modules
from quantserve.target import gib

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint, Tensor
    from quantserve.method import Method

# Buffers older transformers saved; vLLM drops them.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "attn.masked_bias")
_VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
_KIND = 3  # blocks that make a kind
_MAX_KINDS = 16  # kinds compared with each other, the most frequent and the rarest


def check_tensors(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Compare the files' tensors with those config.json implies, the weights of linears apart.

    Those are the method's (``check_linears``). Where the family is unknown, blocks are compared
    with each other instead.
    """
    architecture, problems = read_architecture(checkpoint)
    if not checkpoint.tensors:
        return
    if architecture is None:
        if not problems and checkpoint.tensors_complete:
            yield from _compare_blocks(checkpoint)
        return
    needed = other_tensors(checkpoint)
    yield from _check_missing(checkpoint, needed)
    yield from _check_shapes(checkpoint, needed, architecture)
    yield from _check_unknown(checkpoint, needed, architecture)


def _check_missing(checkpoint: Checkpoint, needed: Mapping[str, tuple[int, ...]]) -> Iterator[Finding]:
    present = modules(checkpoint)
    # A module stored in another form (a quantized lm_head) is its method's to check.
    missing = [name for name in needed if name not in checkpoint.tensors and not _other_form(name, present)]
    if missing and checkpoint.tensors_complete:
        yield Finding.error(
            "model-tensors-missing",
            f"{are(len(missing), 'tensor')} missing that config.json implies. vLLM does not report that and serves "
            f"uninitialised weights. First: {missing[0]}",
            named(missing),
            "download the checkpoint again; if it holds only the quantized linears, merge them with the base model "
            "(`quantserve convert --base MODEL`)",
        )


def _other_form(name: str, present: Mapping[str, Mapping[str, Tensor]]) -> bool:
    module, _, suffix = name.rpartition(".")
    return suffix == "weight" and bool(present.get(module, {}).keys() - {"weight", "bias"})


def _check_shapes(
    checkpoint: Checkpoint, needed: Mapping[str, tuple[int, ...]], architecture: Architecture
) -> Iterator[Finding]:
    vocabulary: list[str] = []
    misshapen: list[str] = []
    mistyped: list[str] = []
    present = modules(checkpoint)
    for name, shape in needed.items():
        tensor = checkpoint.tensors.get(name)
        if tensor is None or _other_form(name, present):
            continue
        if tensor.shape != shape:
            rows = name.endswith(_VOCABULARY) and tensor.shape[1:] == shape[1:]
            (vocabulary if rows else misshapen).append(f"{shown(tensor)}, expected {list(shape)}")
        if tensor.dtype not in FLOATS and tensor.dtype in DTYPE_BITS:  # a reader's own are its method's to judge
            mistyped.append(f"{name} {tensor.dtype}")
    if vocabulary:
        yield Finding.error(
            "vocabulary-mismatch",
            f"vocab_size is {architecture.vocab}, but {vocabulary[0]}",
            named(vocabulary),
            "set vocab_size in config.json to the number of rows, or use the config.json of these weights",
        )
    if misshapen:
        yield Finding.error(
            "model-tensors-wrong-shape",
            f"{have(len(misshapen), 'tensor')} another shape than config.json implies. First: {misshapen[0]}",
            named(misshapen),
            "use the config.json that belongs to these weights",
        )
    if mistyped:
        yield Finding.error(
            "model-tensors-wrong-dtype",
            f"{are(len(mistyped), 'tensor')} not in {', '.join(FLOATS)}, though no method quantizes such tensors. "
            f"First: {mistyped[0]}",
            named(mistyped),
            "store embeddings, norms and lm_head in float16 or bfloat16",
        )


def _check_unknown(
    checkpoint: Checkpoint, needed: Mapping[str, tuple[int, ...]], architecture: Architecture
) -> Iterator[Finding]:
    if is_multimodal(checkpoint) or not architecture.generates:
        return
    known = set(needed)
    known.add(lm_head_name(checkpoint))  # tied models may store it all the same; vLLM skips it
    paths = {name for linear in linears(checkpoint) for name in linear.names}
    unknown: list[str] = []
    biases: list[str] = []
    for name, tensor in checkpoint.tensors.items():
        module, _, suffix = name.rpartition(".")
        if name in known or name in paths or name.endswith(_IGNORED_SUFFIXES) or suffix in CACHE_SCALES:
            continue
        if suffix == "bias":
            biases.append(shown(tensor))
        elif module not in paths and not _of_a_linear(name, paths) and module + ".weight" not in known:
            unknown.append(shown(tensor))
    if unknown:
        beyond = any((block := block_of(name)) is not None and block[0] >= architecture.layers for name in unknown)
        hint = f" (num_hidden_layers is {architecture.layers})" if beyond else ""
        yield Finding.error(
            "unknown-tensors",
            f"{are(len(unknown), 'tensor')} no part of a {architecture.model_type} model{hint}. "
            f"vLLM stops at the first: {unknown[0]}",
            named(unknown),
            "use the config.json that belongs to these weights, or remove the tensors",
        )
    if biases:
        yield Finding.warning(
            "biases-ignored",
            f"{are(len(biases), 'bias tensor')} in the files, but config.json sets no such bias. "
            f"vLLM drops biases without a message; unless they are zero, the answers change. First: {biases[0]}",
            named(biases),
            "set attention_bias or mlp_bias in config.json if the model was trained with them",
        )


def _of_a_linear(name: str, paths: set[str]) -> bool:
    """Whether a path that is no linear's own tensor names one (``sparse_threshold.<linear>``, ``<linear>.a.b``)."""
    parts = name.split(".")
    if len(parts) > 32:
        return False
    tail = ".".join(parts[1:])
    return tail in paths or any(".".join(parts[:end]) in paths for end in range(len(parts) - 2, 2, -1))


def _compare_blocks(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Without a known family: a tensor that all blocks of one kind have and one block lacks is probably missing.

    Blocks are of one kind when they have the same tensors. Layers with a mixture and dense ones, attention and
    state-space layers, towers and multi-token prediction are each of their own kind, in any order. A block that has
    nothing else than a kind has, and nearly all of it, lacks the rest. Parts of blocks (``self_attn``) are compared
    likewise, so that a layer of a rare kind is compared in what it shares with the others.
    """
    towers: dict[str, dict[int, set[str]]] = {}
    vectors: set[tuple[str, str]] = set()
    for full_name, tensor in checkpoint.tensors.items():
        if (split := split_block(full_name)) is not None:
            tower, index, name = split
            towers.setdefault(tower, {}).setdefault(index, set()).add(name)
            if len(tensor.shape) < 2:
                vectors.add((tower, name))
    missing: set[tuple[str, int, str]] = set()
    compared = 0
    for tower, blocks in towers.items():
        compared += len(blocks) if len(blocks) > 1 else 0
        first = min(blocks)
        parts: dict[str, dict[int, set[str]]] = {}
        for index, names in blocks.items():
            for name in names:
                parts.setdefault(name.partition(".")[0], {}).setdefault(index, set()).add(name)
        for group in (blocks, *parts.values()):
            # The first block of some families has no norm or scale, as nothing precedes it (ModernBERT, Zaya).
            missing |= {(tower, i, name) for i, name in _lacking(group) if i != first or (tower, name) not in vectors}
    if missing:
        offenders = [f"{tower}{index}.{name}" for tower, index, name in sorted(missing)]
        yield Finding.warning(
            "blocks-differ",
            f"{are(len(offenders), 'tensor')} missing that other blocks of the same kind have "
            f"({compared} blocks compared). First: {offenders[0]}",
            named(offenders),
            "download the checkpoint again; vLLM does not report missing tensors of quantized models",
        )


def _lacking(blocks: Mapping[int, set[str]]) -> Iterator[tuple[int, str]]:
    """The tensors that blocks lack: the number of the block, and the name within it."""
    if len(blocks) <= _KIND:
        return
    kinds: dict[frozenset[str], list[int]] = {}
    for index, names in blocks.items():
        kinds.setdefault(frozenset(names), []).append(index)
    by_size = sorted(kinds, key=lambda kind: len(kinds[kind]), reverse=True)
    common = [kind for kind in by_size if len(kinds[kind]) >= _KIND][:_MAX_KINDS]
    for odd in by_size[-_MAX_KINDS:]:
        for kind in common:
            if not odd < kind or len(kinds[odd]) > max(1, len(kinds[kind]) // 10):
                continue
            lacks = kind - odd
            if len(_modules(lacks)) <= max(1, len(_modules(kind)) // 10):
                yield from ((index, name) for index in kinds[odd] for name in lacks)
                break


def _modules(names: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in names}


def check_size(checkpoint: Checkpoint, method: Method | None) -> Iterator[Finding]:
    """Say how much smaller the weights are, because vLLM's memory use will not show it."""
    every = linears(checkpoint) if method is not None and method.vllm_name is not None else ()
    if not every or not checkpoint.tensors or not checkpoint.tensors_complete:
        return
    architecture, _ = read_architecture(checkpoint)
    if architecture is None:
        return
    paths = {name for linear in every for name in linear.names}
    rest = sum(t.nbytes for name, t in checkpoint.tensors.items() if module_of(name, checkpoint) not in paths)
    stored, parameters = checkpoint.weight_bytes - rest, sum(linear.weights for linear in every)
    if stored >= 2 * parameters:
        return  # not quantized after all, which the method says
    yield Finding.info(
        "weights-size",
        f"Linear layers: {gib(stored)} ({8 * stored / parameters:.2f} bits/weight, "
        f"{100 * stored / (2 * parameters):.0f} % of float16). vLLM uses the memory saved for a larger KV cache, so "
        "total usage does not drop.",
    )
