"""Can the model be split over that many ranks, and does the target have them?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from quantserve.finding import Finding
from quantserve.model.architecture import Architecture, read_sizes
from quantserve.model.attention import attention_layers, mamba_heads, read_heads, size_of

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint
    from quantserve.config import ModelConfig
    from quantserve.target import Target

_VOCABULARY_MULTIPLE = 64  # vLLM pads the embedding to that many rows, whatever the number of ranks
_WORKERS = "scaling_config.num_workers"
_GPUS = "scaling_config.num_gpus_per_worker"


def check_parallel(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Iterator[Finding]:
    """Check the tensor parallel size against devices and the sizes vLLM splits, and that each rank gets a device."""
    ranks = model.tensor_parallel_size
    if target.device != "cpu" and target.count and ranks > target.count:
        yield Finding.error(
            "too-few-devices",
            f"tensor parallel size {ranks} needs {ranks} devices; the target has {target.count} ({target})",
            [_WORKERS],
            f"set {_WORKERS} to at most {target.count}, or choose a larger target",
        )
    if target.device != "cpu" and model.scaling_config.num_gpus_per_worker == 0:
        yield Finding.error(
            "no-gpu-share",
            f"the target {target.name} is a GPU, but {_GPUS} is 0, so Ray would give the model none",
            [_GPUS],
            f"set {_GPUS} to 1, or to a share such as 0.3 to put several models on one GPU; "
            "if the CPU is meant, use `--target cpu`",
        )
    if ranks <= 1:
        return
    rules = [*_head_rules(checkpoint), *_state_rules(checkpoint), *_width_rules(checkpoint)]
    fix = f"set {_WORKERS} to {_largest(lambda size: all(rule.works(size) for rule in rules), ranks)}"
    for rule in rules:
        if not rule.works(ranks):
            yield Finding.error(rule.code, rule.why(ranks), [rule.field, _WORKERS], fix)


class _Rule(NamedTuple):
    """What a number of ranks must fulfil: the finding's code and field, the condition, and the message."""

    code: str
    field: str
    works: Callable[[int], bool]
    why: Callable[[int], str]


def _divides(code: str, field: str, size: int, what: str) -> _Rule:
    return _Rule(
        code,
        field,
        lambda ranks: size % ranks == 0,
        lambda ranks: f"{what} over {ranks} ranks ({size} % {ranks} = {size % ranks})",
    )


def _head_rules(checkpoint: Checkpoint) -> Iterator[_Rule]:
    given, layers = read_heads(checkpoint), attention_layers(checkpoint)
    if given is None or (layers is not None and not {"full", "window", "both"} & set(layers)):
        return
    kv = given.kv
    heads = given.query
    yield _divides("heads-not-divisible", "num_attention_heads", heads, f"{heads} attention heads do not divide")
    if given.latent:
        return  # every rank keeps the whole latent vector
    yield _Rule(
        "kv-heads-not-divisible",
        "num_key_value_heads",
        lambda ranks: kv % ranks == 0 or ranks % kv == 0,
        lambda ranks: (
            f"{kv} key/value heads can be neither split over {ranks} ranks nor repeated on them: "
            f"{kv} % {ranks} = {kv % ranks}, {ranks} % {kv} = {ranks % kv}"
        ),
    )


def _state_rules(checkpoint: Checkpoint) -> Iterator[_Rule]:
    """Heads of linear attention, and heads and groups of Mamba 2."""
    config, layers = checkpoint.text_config, attention_layers(checkpoint)
    if layers is None or not {"state", "both"} & set(layers):
        return
    for key in ("linear_num_key_heads", "linear_num_value_heads"):
        if number := size_of(config, key):
            yield _divides("heads-not-divisible", key, number, f"{number} {key} do not divide")
    heads, groups = mamba_heads(config)
    if heads > 1:
        yield _divides("heads-not-divisible", "mamba_num_heads", heads, f"{heads} Mamba heads do not divide")
        if groups > 1:
            yield _divides("heads-not-divisible", "n_groups", groups, f"{groups} groups of Mamba heads do not divide")


def _width_rules(checkpoint: Checkpoint) -> Iterator[_Rule]:
    sizes = read_sizes(checkpoint)
    if sizes and sizes.known:
        for key, width in _widths(sizes).items():
            yield _divides("mlp-not-divisible", key, width, f"{key} {width} does not divide")
    vocabulary = size_of(checkpoint.text_config, "vocab_size")
    if vocabulary:
        rows = -(-vocabulary // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
        padded = f", padded to {rows}," if rows != vocabulary else ""
        yield _divides(
            "vocabulary-not-divisible", "vocab_size", rows, f"vocab_size {vocabulary}{padded} does not divide"
        )


def _widths(sizes: Architecture) -> dict[str, int]:
    """MLP widths by their field; only of families with known names, since others pad or replicate theirs."""
    widths = {"intermediate_size": sizes.intermediate}
    if sizes.experts:
        widths = {sizes.family.expert_width: sizes.expert_width}
        if len(sizes.expert_layers) < sizes.layers:
            widths["intermediate_size"] = sizes.intermediate
    return widths


def _largest(works: Callable[[int], bool], below: int) -> int:
    return next((size for size in range(min(below, 1024) - 1, 1, -1) if works(size)), 1)
