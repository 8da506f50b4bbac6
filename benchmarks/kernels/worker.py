"""The process that measures, one per number of threads: started by the parent, answers with a JSON line per piece.

It has the environment of vLLM's CPU workers, so that vLLM's operators find what they have there: one OpenMP runtime
for torch, vLLM and us, and its threads bound to cores.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.decode.worker import Channel, cause
from benchmarks.kernels import errors, host
from benchmarks.kernels.bandwidth import PIECE, Memory
from benchmarks.kernels.contenders import Contender, Rotation, bytes_needed, forced, ours, torch_linear
from benchmarks.kernels.formats import FORMATS
from benchmarks.kernels.peers import Missing, Vllm
from benchmarks.kernels.results import READ, TORCH
from benchmarks.kernels.shapes import Shape
from benchmarks.kernels.timing import measure
from quantserve_kernels._ops import instruction_sets

MEMORY = 12 << 30  # bytes that may be used at most
AGREE = 0.02  # largest relative difference between our AWQ and vLLM's on the same weight


class Refused(Exception):
    """A shape cannot be measured; str(error) says why."""


def contenders(
    shape: Shape, command: Mapping[str, Any], vllm: Vllm | None, memory: Memory, isa: str
) -> list[Contender]:
    """Everyone who takes part at this shape.

    Raises:
        Refused: too little memory, or vLLM's operator and ours disagree on one weight.
    """
    formats, working_set = command["formats"], command["caches"] * host.last_level_cache()
    needed, free = bytes_needed(shape, formats, working_set), min(MEMORY, host.available_memory())
    if needed > free:
        raise Refused(f"needs {needed / 2**30:.1f} GiB, may use {free / 2**30:.1f}; name fewer formats")
    out = [Contender(READ, Rotation(memory.reads), PIECE, single=True), torch_linear(shape, working_set)]
    awq = None
    if vllm is not None:
        out += [vllm.bf16(shape, working_set), awq := vllm.awq(shape, working_set)]
    for name in formats:
        out.append(ours(name, FORMATS[name].make(shape.n, shape.k), working_set, isa))
        if name == "awq" and awq is not None:
            check_agreement(shape, out[-1], awq)
    return out


def check_agreement(shape: Shape, own: Contender, theirs: Contender) -> None:
    """Refused when two contenders with the same weight give different results."""
    x = torch.randn(2, shape.k, generator=torch.Generator().manual_seed(0)).bfloat16()
    a: Any = own.rotation.next()(x)
    b: Any = theirs.rotation.next()(x)
    difference = errors.relative(a, b.double())
    if not difference < AGREE:
        raise Refused(f"{own.name} and {theirs.name} differ by {difference:.1%} on the same weight")


def speed(channel: Channel, command: dict[str, Any]) -> None:
    """All shapes and batches on `threads` threads."""
    torch.set_num_threads(command["threads"])
    isas = instruction_sets()
    vllm, missing = None, None
    try:
        vllm = Vllm()
    except (Missing, ImportError) as error:
        missing = str(error)
    memory = Memory(command["threads"])
    bandwidth = {"method": memory.method, "candidates": memory.candidates}
    channel.send({"kind": "started", "isas": isas, "missing": missing, "bandwidth": bandwidth})
    quiet = host.Quiet()
    for shape in (Shape(**fields) for fields in command["shapes"]):
        try:
            everyone = contenders(shape, command, vllm, memory, isas[-1])
        except Refused as error:
            channel.send({"kind": "refused", "shape": dataclasses.asdict(shape), "reason": str(error)})
            continue
        for batch in command["batches"]:
            here = [one for one in everyone if batch == 1 or not one.single]
            channel.send({"kind": "cell", **cell(shape, batch, here, command)})
        if 1 in command["batches"]:
            own = [one for one in everyone if one.isa is not None]
            here = [one for one in everyone if one.name == TORCH] + own
            here += [other for one in own for other in forced(one, isas[:-1])]
            channel.send({"kind": "isa_cell", **cell(shape, 1, here, command)})
        everyone, own, here = [], [], []  # free this shape's copies before the next one's are made
    channel.send({"kind": "ended", "quiet": quiet.figures()})


def cell(shape: Shape, batch: int, contenders: Sequence[Contender], command: Mapping[str, Any]) -> dict[str, Any]:
    """One batch size of one shape."""
    x = torch.randn(batch, shape.k, generator=torch.Generator().manual_seed(batch)).bfloat16()
    taken = measure(contenders, x, command["rounds"], command["seconds"])
    return {
        "shape": dataclasses.asdict(shape),
        "batch": batch,
        "bytes": {one.name: one.nbytes for one in contenders},
        "seconds": {name: [round(value, 8) for value in values] for name, values in taken.items()},
    }


def accuracy(channel: Channel, command: dict[str, Any]) -> None:
    """The errors of all formats."""
    torch.set_num_threads(command["threads"])
    for found in errors.measure(command["formats"], instruction_sets()):
        channel.send({"kind": "errors", "errors": found})
    channel.send({"kind": "ended"})


def main() -> None:
    """Started by the parent with the command as JSON."""
    command = json.loads(sys.argv[1])
    channel = Channel()
    try:
        with torch.inference_mode():
            {"speed": speed, "accuracy": accuracy}[command["do"]](channel, command)
    except Exception as error:
        traceback.print_exc()
        channel.send({"kind": "failed", "error": cause(error)})


if __name__ == "__main__":
    main()
