"""Tensor parallelism of 1 to 8 ranks."""

from __future__ import annotations

from collections.abc import Iterator

from quantserve.testing.check import check
from quantserve.testing.checks.seam import layer_problems
from quantserve.testing.subject import Subject

RANKS = range(1, 9)


@check("P01-every-size", "tensor-parallel", "method")
def every_size(subject: Subject) -> Iterator[str]:
    """For 1 to 8 ranks a checkpoint is served or refused, on every device; where it is served on many, it is on fewer.

    Fix: a number of ranks is refused for what a rank would cut (`check_shards`, or the dimensions of the scheme).
    """
    for target in subject.targets:
        fits = [ranks for ranks in RANKS if not subject.errors(target=target, ranks=ranks)]
        for ranks in fits:
            for fewer in RANKS:
                if ranks % fewer == 0 and fewer not in fits:
                    codes = {finding.code for finding in subject.errors(target=target, ranks=fewer)}
                    yield f"on {target.device} {ranks} ranks are served, and {fewer} refused: {', '.join(codes)}"


@check("P02-memory", "tensor-parallel", "method")
def memory(subject: Subject) -> Iterator[str]:
    """The weights of a rank are at least the whole divided by the ranks, and less than the whole.

    Fix: the dimensions of the scheme say what is cut: N and K are, numbers are not.
    """
    whole = subject.composed().memory
    for ranks in RANKS[1:]:
        one = subject.composed(ranks=ranks).memory if not subject.errors(ranks=ranks) else None
        if whole and one and not whole.weights_bytes / ranks <= one.weights_bytes * 1.001 < 1.001 * whole.weights_bytes:
            yield f"{one.weights_bytes:,} bytes on each of {ranks} ranks, of {whole.weights_bytes:,}"


@check("P03-shards", "tensor-parallel", "layers")
def shards(subject: Subject) -> Iterator[str]:
    """On every rank of 2, 4 and 8 that has no error, vLLM's layers compute the rank's share of the reference.

    Fix: where the share cannot be loaded, the check has to refuse these ranks; else correct the cut.
    """
    yield from layer_problems(subject, "shards")
