"""Can the model be split over that many ranks, and does the target have them?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from quantserve.architecture import Architecture, read_sizes
from quantserve.attention import read_heads
from quantserve.finding import Finding

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint
    from quantserve.config import ModelConfig
    from quantserve.target import Target

_WORKERS = "scaling_config.num_workers"
_GPUS = "scaling_config.num_gpus_per_worker"


def check_parallel(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Iterator[Finding]:
    """Check the tensor parallel size against attention heads, kv heads, MLP width and devices, and that ranks get one.

    The vocabulary needs no check: vLLM pads it.
    """
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
    given = read_heads(checkpoint)
    if given is None or ranks <= 1:
        return
    heads, kv_heads = given.query, given.kv
    if given.latent:
        kv_heads = heads  # every rank keeps the whole latent vector
    sizes = read_sizes(checkpoint)
    widths = _widths(sizes) if sizes and sizes.known else {}

    def works(size: int) -> bool:
        return (
            heads % size == 0
            and (kv_heads % size == 0 or size % kv_heads == 0)
            and all(width % size == 0 for width in widths.values())
        )

    fix = f"set {_WORKERS} to {_largest(works, ranks)}"
    if heads % ranks:
        yield Finding.error(
            "heads-not-divisible",
            f"{heads} attention heads do not divide over {ranks} ranks ({heads} % {ranks} = {heads % ranks})",
            ["num_attention_heads", _WORKERS],
            fix,
        )
    if kv_heads % ranks and ranks % kv_heads:
        yield Finding.error(
            "kv-heads-not-divisible",
            f"{kv_heads} key/value heads can be neither split over {ranks} ranks nor repeated on them: "
            f"{kv_heads} % {ranks} = {kv_heads % ranks}, {ranks} % {kv_heads} = {ranks % kv_heads}",
            ["num_key_value_heads", _WORKERS],
            fix,
        )
    for key, width in widths.items():
        if width % ranks:
            yield Finding.error(
                "mlp-not-divisible",
                f"{key} {width} does not divide over {ranks} ranks ({width} % {ranks} = {width % ranks})",
                [key, _WORKERS],
                fix,
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
