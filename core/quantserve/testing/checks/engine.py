"""Engines: greedy tokens and log-probabilities against transformers. These start vLLM, and run only when asked for."""

from __future__ import annotations

import json
import random
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from quantserve.api import Tensor, modules
from quantserve.testing.check import Skip, check
from quantserve.testing.child import Answer, binding, forked
from quantserve.testing.subject import Subject, engine_available

BATCHES: Final = (1, 4, 20)
"""Prompts that run together. Those of the last have more rows than the kernels decode weights for each of."""
LENGTHS: Final = (5, 9, 1, 40)
TOKENS: Final = 12
ARGUMENTS: Final = {
    "skip_tokenizer_init": True,
    "max_model_len": 128,
    "max_num_seqs": max(BATCHES),
    "kv_cache_memory_bytes": 64 << 20,
}
"""Of every engine."""
ROUNDING: Final = {"float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}
"""Of a value in the dtype, as a share of it."""
CLOSE: Final = 40
"""How far log-probabilities may differ, in roundings of a standard deviation of the logits. transformers itself is 16
off in both 16-bit dtypes, for the kit's Llama of two layers."""
LEAST: Final = 1e-3
"""How far they may differ in any case, in standard deviations: float32's own sums, in another order."""
CLEAR: Final = 0.1
"""Share of the tokens of which the two best logits must differ by more than twice of that, to be compared."""
MOST_TENSORS: Final = 4
"""Tensors that are left out, one engine each."""


@check("E01-tokens", "values")
def tokens(subject: Subject) -> Iterator[str]:
    """An engine gives the greedy tokens and log-probabilities of transformers on the reference weights in float32, in
    every dtype that the method serves on a CPU, for batches of 1, 4 and 20 prompts.

    Fix: run the N checks first; then look at what the layers do not show: embeddings, biases, lm_head, experts.
    """
    served = _dtypes(subject)
    if not served:
        raise Skip("the checkpoint is refused on a CPU in every dtype of the method")
    for dtype in served:
        yield from (f"{dtype}: {problem}" for problem in _compared(subject, dtype, enforce_eager=True))


@check("E02-two-ranks", "values", "tensor-parallel")
def two_ranks(subject: Subject) -> Iterator[str]:
    """An engine on two ranks gives them as well.

    Fix: see P03; a tensor that is not cut must be whole on every rank.
    """
    if 2 not in subject.ranks:
        raise Skip("the checkpoint is refused on 2 ranks")
    yield from _compared(subject, _dtype(subject), enforce_eager=True, tensor_parallel_size=2)


@check("E03-compiled", "values")
def compiled(subject: Subject) -> Iterator[str]:
    """A compiled engine, vLLM's default, gives them as well.

    Fix: register custom operators with a fake implementation; keep no Python branch on the number of rows.
    """
    yield from _compared(subject, _dtype(subject), enforce_eager=False)


@check("E04-missing-tensors", "values", "method")
def missing_tensors(subject: Subject) -> Iterator[str]:
    """An engine stops where the files lack a tensor that `check` misses as well, and its log names the layer.

    Fix: see N04. Where vLLM's own method does not look, `check` is all that finds it: an expected failure.
    """
    if subject.good.container or not (some := list(_needed(subject))):
        raise Skip("no tensor can be left out of these files")
    for module, tensor in some[:MOST_TENSORS]:
        with tempfile.TemporaryDirectory(prefix="quantserve-") as folder:
            _write_without(subject, Path(folder), tensor.name)
            log = Path(folder, "log.txt")
            made = _generated(subject, Path(folder), _dtype(subject), log, enforce_eager=True)
            text = log.read_text(errors="replace") if log.exists() else ""
        block = (re.match(r".*?\.\d+(?=\.)", module) or [module])[0]
        if not made.problem:
            yield f"without {tensor.name} the engine starts, and computes something else"
        elif block not in text:
            yield f"without {tensor.name} the engine stops, and its log does not name {block}: {made.problem:.300}"


# --- engines ----------------------------------------------------------------------------------------------


def _dtypes(subject: Subject) -> list[str]:
    """The dtypes of the method in which the checkpoint has no errors on a CPU."""
    assert subject.method is not None
    return [dtype for dtype in subject.method.dtypes if not subject.on_cpu(dtype).errors]


def _dtype(subject: Subject) -> str:
    """The dtype that shows most: float32 where it is served."""
    served = _dtypes(subject)
    if not served:
        raise Skip("the checkpoint is refused on a CPU in every dtype of the method")
    return min(served, key=lambda dtype: ROUNDING[dtype])


def _generated(subject: Subject, model: Path, dtype: str, log: Path, **more: Any) -> Answer:
    """What an engine generates for each batch.

    Raises:
        Skip: there is no engine here.
    """
    if why := engine_available():
        raise Skip(why)
    planned = subject.on_cpu(dtype)
    kwargs = {name: setting.value for name, setting in planned.engine_kwargs.items()}
    return forked(
        "generate",
        {
            **binding(more.get("tensor_parallel_size", 1)),
            **planned.environment,
            **planned.engine_environment,
            "VLLM_DISABLE_COMPILE_CACHE": "1",  # what was compiled before says nothing about this plugin
        },
        log,
        engine={**ARGUMENTS, **kwargs, "model": str(model), "dtype": dtype, **more},
        batches=_batches(subject),
        tokens=TOKENS,
    )


def _batches(subject: Subject) -> list[list[list[int]]]:
    """Prompts of random tokens."""
    numbers, vocabulary = random.Random(0), int(subject.good.config.get("vocab_size") or 64)
    return [
        [[numbers.randrange(vocabulary) for _ in range(LENGTHS[index % len(LENGTHS)])] for index in range(size)]
        for size in BATCHES
    ]


def _compared(subject: Subject, dtype: str, **more: Any) -> list[str]:
    """Where an engine and transformers differ."""
    assert subject.folder is not None
    plain = _plain(subject)
    with tempfile.TemporaryDirectory(prefix="quantserve-") as folder:
        made = _generated(subject, subject.folder, dtype, Path(folder, "engine.txt"), **more)
        if made.problem:
            return [f"the engine: {made.problem}: {made.printed}"]
        close = max(LEAST, CLOSE * max(ROUNDING[dtype], subject.case.tolerance))
        compared = forked(
            "compare",
            {},
            Path(folder, "transformers.txt"),
            plain=str(plain),
            prompts=[prompt for batch in _batches(subject) for prompt in batch],
            generated=[one for batch in made.value for one in batch],
            clear=2 * close,
            close=close,
            share=CLEAR,
            spread=True,
        )
    return [f"transformers: {compared.problem}"] if compared.problem else compared.value


def _needed(subject: Subject) -> Iterator[tuple[str, Tensor]]:
    """A tensor for each suffix without which the checkpoint has an error, with its module."""
    present, seen = modules(subject.good), set()
    for linear in subject.quantized:
        for name in linear.names[:1]:
            for suffix, tensor in present.get(name, {}).items():
                if suffix in seen or suffix == "bias":
                    continue
                seen.add(suffix)
                tensors = {key: one for key, one in subject.good.tensors.items() if key != tensor.name}
                if subject.errors(replace(subject.good, tensors=tensors)):
                    yield name, tensor


def _write_without(subject: Subject, destination: Path, name: str) -> None:
    """The checkpoint without a tensor."""
    from safetensors.torch import load_file, save_file

    assert subject.folder is not None
    for file in subject.folder.iterdir():
        tensors = load_file(file) if file.suffix == ".safetensors" else {}
        if tensors.pop(name, None) is None:
            (destination / file.name).symlink_to(file.resolve())
        else:
            save_file(tensors, destination / file.name, {"format": "pt"})


def _plain(subject: Subject) -> Path:
    """The folder of the checkpoint with the reference weights in float32, as transformers reads it.

    Raises:
        Skip: a quantized linear is not among them.
    """
    import torch
    from safetensors.torch import load_file, save_file

    assert subject.folder is not None
    destination = subject.scratch / "plain"
    if destination.exists():
        return destination
    weights, present = subject.weights, modules(subject.good)
    names = {name for linear in subject.quantized for name in linear.names} if subject.arguments else set()
    if lacking := sorted(names - set(weights)):
        raise Skip(f"the reference has no {lacking[0]}, and {len(lacking) - 1} more")
    stored = {tensor.name for name in weights for suffix, tensor in present.get(name, {}).items() if suffix != "bias"}
    files = [] if subject.good.container else sorted(subject.folder.glob("*.safetensors"))
    tensors = {name: one for file in files for name, one in load_file(file).items()}
    plain = {name: one.float() for name, one in tensors.items() if name not in stored}
    stacks = {linear.name for linear in subject.quantized if linear.stacked}
    plain |= {
        name if name in stacks else f"{name}.weight": weight.to(torch.float32).contiguous()
        for name, weight in weights.items()
    }
    destination.mkdir()
    save_file(plain, destination / "model.safetensors", {"format": "pt"})
    config = {
        key: value for key, value in subject.good.config.items() if key not in ("quantization_config", "torch_dtype")
    }
    (destination / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return destination
