"""A real vLLM engine in a process of its own, and its greedy tokens against transformers'. Also that process's script.

What the engine generates is compared with transformers on the dequantized weights in float32.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPTS = [[1, 17, 33, 42, 99], [2, 40, 201, 7, 8, 250, 64, 3, 129], [5], list(range(100, 140))]


@dataclass(frozen=True)
class Generation:
    """Greedy tokens of one prompt, with the log-probability the engine gave each."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


def generate(model: Path, plugin: str, out: Path, **engine_args: Any) -> list[Generation]:
    """Greedy tokens of `PROMPTS`.

    Args:
        model: a checkpoint folder.
        plugin: the vLLM plugin that the engine asks for.
        out: a file that is not there yet.
        engine_args: of ``LLM``.

    Raises:
        RuntimeError: the engine failed; its output.
    """
    spec = {"model": str(model), "engine_args": engine_args, "out": str(out)}
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_PLUGINS": plugin,
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(spec)],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, **variables},
    )
    if done.returncode or not out.exists():
        raise RuntimeError(f"engine failed with {done.returncode}:\n{done.stdout[-20000:]}\n{done.stderr[-20000:]}")
    return [Generation(prompt, *item) for prompt, item in zip(PROMPTS, json.loads(out.read_text()), strict=True)]


def compare(plain: Path, generations: list[Generation], *, clear: float, close: float) -> None:
    """Hold every token against transformers in float32, which continues the engine's own text.

    Args:
        plain: the dequantized checkpoint.
        clear: by how much the two best logits differ where tokens must be equal; more than half of all must be clear.
        close: how far log-probabilities may differ.
    """
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    checked = total = 0
    for generation in generations:
        tokens = torch.tensor(generation.tokens)
        with torch.no_grad():
            logits = model(torch.tensor([generation.prompt + generation.tokens])).logits[0]
        logits = logits[len(generation.prompt) - 1 : -1]
        best = logits.topk(2)
        sure = best.values[:, 0] - best.values[:, 1] > clear
        assert torch.equal(tokens[sure], best.indices[:, 0][sure])
        expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        assert (expected - torch.tensor(generation.logprobs)).abs().max() < close
        checked, total = checked + int(sure.sum()), total + len(tokens)
    assert checked > total / 2, f"only {checked} of {total} positions are clear; the comparison says little"


def main() -> None:
    """One engine; tokens and log-probabilities to a JSON file."""
    from vllm import LLM, SamplingParams

    spec = json.loads(sys.argv[1])
    engine = LLM(spec["model"], skip_tokenizer_init=True, max_model_len=128, max_num_seqs=8, **spec["engine_args"])
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    sampling = SamplingParams(temperature=0, max_tokens=16, logprobs=0, ignore_eos=True, detokenize=False)
    results = []
    for request in engine.generate(prompts, sampling):
        out = request.outputs[0]
        steps = zip(out.logprobs, out.token_ids, strict=True)
        results.append((list(out.token_ids), [step[token].logprob for step, token in steps]))
    Path(spec["out"]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
