"""The tensors beside the quantized linears: embeddings, norms, lm_head, biases, and what nobody expects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from quantserve.architecture import Architecture, read_architecture
from quantserve.checks.linear import CACHE_SCALES, FLOATS, counted, named, shown
from quantserve.finding import Finding
from quantserve.layers import block_of, is_multimodal, linears, lm_head_name, modules, other_tensors
from quantserve.target import gib

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint, Tensor
    from quantserve.method import Method

# Buffers older transformers saved; vLLM drops them.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "attn.masked_bias")
_VOCABULARY = ("embed_tokens.weight", "lm_head.weight")


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
            f"{counted(len(missing), 'tensor')} that config.json implies missing, and vLLM would not notice: it serves "
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
    for name, shape in needed.items():
        tensor = checkpoint.tensors.get(name)
        if tensor is None:
            continue
        if tensor.shape != shape:
            rows = name.endswith(_VOCABULARY) and tensor.shape[1:] == shape[1:]
            (vocabulary if rows else misshapen).append(f"{shown(tensor)}, expected {list(shape)}")
        if tensor.dtype not in FLOATS:
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
            f"{counted(len(misshapen), 'tensor')} not of the shape config.json implies. First: {misshapen[0]}",
            named(misshapen),
            "use the config.json that belongs to these weights",
        )
    if mistyped:
        yield Finding.error(
            "model-tensors-wrong-dtype",
            f"{counted(len(mistyped), 'tensor')} not in {', '.join(FLOATS)}, though no method quantizes them. "
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
    paths = {linear.name for linear in linears(checkpoint)}
    unknown: list[str] = []
    biases: list[str] = []
    for name, tensor in checkpoint.tensors.items():
        module, _, suffix = name.rpartition(".")
        if name in known or name.endswith(_IGNORED_SUFFIXES) or suffix in CACHE_SCALES:
            continue
        if suffix == "bias":
            biases.append(shown(tensor))
        elif module not in paths and not _of_a_linear(name, paths) and module + ".weight" not in known:
            unknown.append(shown(tensor))
    if unknown:
        beyond = any((block := block_of(name)) is not None and block[0] >= architecture.layers for name in unknown)
        hint = f"; num_hidden_layers is {architecture.layers}" if beyond else ""
        yield Finding.error(
            "unknown-tensors",
            f"{counted(len(unknown), 'tensor')} no part of a {architecture.model_type} model{hint}; vLLM stops at the "
            f"first: {unknown[0]}",
            named(unknown),
            "use the config.json that belongs to these weights, or remove the tensors",
        )
    if biases:
        yield Finding.warning(
            "biases-ignored",
            f"{counted(len(biases), 'bias tensor')} in the files, but config.json asks for no such bias; vLLM drops "
            f"them silently, which changes the answers unless they are zero. First: {biases[0]}",
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
    """Without a known family: a tensor that most blocks have and one has not is probably missing."""
    blocks: dict[str, set[int]] = {}
    for name in checkpoint.tensors:
        block = block_of(name)
        if block is not None:
            blocks.setdefault(block[1], set()).add(block[0])
    everywhere = set().union(*blocks.values()) if blocks else set()
    missing = [
        f"{name[:160]} of block {index}"
        for name, having in sorted(blocks.items())
        if len(everywhere) >= 3 and len(having) >= len(everywhere) - max(1, len(everywhere) // 10)
        for index in sorted(everywhere - having)
    ]
    if missing:
        yield Finding.warning(
            "blocks-differ",
            f"{counted(len(missing), 'tensor')} that nearly all of {len(everywhere)} blocks have are missing. "
            f"First: {missing[0]}",
            named(missing),
            "download the checkpoint again; vLLM does not notice missing tensors of quantized models",
        )


def check_size(checkpoint: Checkpoint, method: Method | None) -> Iterator[Finding]:
    """Say how much smaller the weights are, because vLLM's memory use will not show it."""
    every = linears(checkpoint) if method is not None and method.vllm_name is not None else ()
    if not every or not checkpoint.tensors or not checkpoint.tensors_complete:
        return
    architecture, _ = read_architecture(checkpoint)
    if architecture is None:
        return
    paths = {linear.name for linear in every}
    rest = sum(t.nbytes for name, t in checkpoint.tensors.items() if name.rpartition(".")[0] not in paths)
    stored, parameters = checkpoint.weight_bytes - rest, sum(linear.n * linear.k for linear in every)
    if stored >= 2 * parameters:
        return  # not quantized after all, which the method says
    yield Finding.info(
        "weights-size",
        f"linears: {gib(stored)}, {8 * stored / parameters:.2f} bits a weight, "
        f"{stored / (2 * parameters):.0%} of float16; vLLM gives what is saved to the KV cache, "
        "so the memory it uses stays the same",
    )
