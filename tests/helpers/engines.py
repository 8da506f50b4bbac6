"""Real vLLM engines, and their greedy tokens against transformers', through the conformance kit's forked processes.

What engines generate is compared with transformers on the dequantized weights in float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantserve.testing import engines
from quantserve.testing.child import binding, forked

PROMPTS = [[1, 17, 33, 42, 99], [2, 40, 201, 7, 8, 250, 64, 3, 129], [5], list(range(100, 140))]
ARGUMENTS: Mapping[str, Any] = {
    "skip_tokenizer_init": True,
    "max_model_len": 128,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 32 << 20,
}
"""Of ``LLM``, where a test gives none."""


@dataclass(frozen=True)
class Generation:
    """Greedy tokens of one prompt, with the log-probability the engine gave each."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Run:
    """What an engine generated for each prompt, and the output of its process."""

    generations: list[Generation]
    output: str


def generate(model: Path, plugin: str, out: Path | None = None, **engine_args: Any) -> list[Generation]:
    """Greedy tokens of `PROMPTS`.

    Args:
        model: a checkpoint folder.
        plugin: the vLLM plugin that the engine asks for.
        out: unused.
        engine_args: of ``LLM``.

    Raises:
        RuntimeError: the engine failed; its output.
    """
    return run(model, {"VLLM_PLUGINS": plugin}, **engine_args).generations


def run(
    model: Path,
    environment: Mapping[str, str],
    *,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    tokens: int = 16,
    adapters: Sequence[Path | None] | None = None,
    **engine_args: Any,
) -> Run:
    """Start an engine, generate greedily, stop it.

    Args:
        model: a checkpoint folder.
        environment: the variables of vLLM, and others added to those of this process.
        prompts: token ids; they run together.
        tokens: how many each prompt gets.
        adapters: the folder of each prompt's LoRA adapter, None for none.
        engine_args: of ``LLM``. Ranks are processes on the same cores.

    Raises:
        RuntimeError: the engine failed; its output.
    """
    with tempfile.TemporaryDirectory(prefix="engine-") as folder:
        log = Path(folder, "log")
        arguments = {"model": str(model), **ARGUMENTS, **engine_args}
        environment = {**binding(engine_args.get("tensor_parallel_size", 1)), **environment}
        answer = forked(
            "generate",
            environment,
            log,
            engine=arguments,
            batches=[[list(one) for one in prompts]],
            tokens=tokens,
            adapters=[[str(one) if one else None for one in adapters]] if adapters else None,
        )
        output = log.read_text(errors="replace") if log.exists() else ""
    if answer.problem:
        raise RuntimeError(f"engine failed: {answer.problem}\n{output[-40000:]}")
    made = zip(prompts, answer.value[0], strict=True)
    return Run([Generation(list(prompt), *one) for prompt, one in made], output)


def compare(plain: Path, generations: list[Generation], *, clear: float, close: float, share: float = 0.5) -> None:
    """Hold every token against transformers in float32, which continues the engine's own text.

    Positions where a router hardly prefers one expert to another do not count, either.

    Args:
        plain: the dequantized checkpoint.
        clear: by how much the two best logits differ where tokens must be equal.
        close: how far log-probabilities may differ.
        share: of the tokens that must be clear.
    """
    made = [(one.tokens, one.logprobs) for one in generations]
    prompts = [one.prompt for one in generations]
    problems = engines.compare(str(plain), prompts, made, clear=clear, close=close, share=share)
    assert not problems, "; ".join(problems)
