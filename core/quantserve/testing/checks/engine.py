"""Engines: greedy tokens against transformers. These start vLLM, and run only when asked for."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from quantserve.api import modules
from quantserve.testing.check import Skip, check
from quantserve.testing.child import ask
from quantserve.testing.subject import Subject, engine_available

PROMPTS: Final = [[1, 17, 33, 42, 99], [2, 40, 7, 8, 64, 3, 29], [5], list(range(20, 60))]
TOKENS: Final = 16
CLEAR: Final = 0.3
"""By how much the two best logits differ where tokens must be equal."""
CLOSE: Final = {"float32": 0.05, "bfloat16": 0.3, "float16": 0.3}
"""How far log-probabilities may differ."""

_ENGINE: Final = """
import os
spec = json.loads(sys.argv[1])
from vllm import LLM, SamplingParams
engine = LLM(skip_tokenizer_init=True, max_model_len=128, max_num_seqs=8, **spec["engine"])
sampling = SamplingParams(temperature=0, max_tokens=spec["tokens"], logprobs=0, ignore_eos=True, detokenize=False)
made = []
for one in engine.generate([{"prompt_token_ids": prompt} for prompt in spec["prompts"]], sampling):
    out = one.outputs[0]
    made.append([list(out.token_ids), [s[t].logprob for s, t in zip(out.logprobs, out.token_ids)]])
answer(made)
"""
_COMPARE: Final = """
import torch, transformers
spec = json.loads(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(spec["plain"], dtype=torch.float32)
problems, checked, total = [], 0, 0
for prompt, (tokens, logprobs) in zip(spec["prompts"], spec["made"]):
    tokens = torch.tensor(tokens)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens.tolist()])).logits[0][len(prompt) - 1 : -1]
    best = logits.topk(2)
    sure = best.values[:, 0] - best.values[:, 1] > spec["clear"]
    wrong = (tokens != best.indices[:, 0]) & sure
    expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    far = (expected - torch.tensor(logprobs)).abs().max().item()
    checked, total = checked + int(sure.sum()), total + len(tokens)
    if wrong.any():
        problems.append(f"prompt {prompt[:4]}: {int(wrong.sum())} of {int(sure.sum())} clear tokens differ")
    if not far < spec["close"]:
        problems.append(f"prompt {prompt[:4]}: a log-probability differs by {far:.3g}, and may by {spec['close']}")
if checked <= total / 4:
    problems.append(f"only {checked} of {total} tokens are clear, so the comparison says little: use larger weights")
answer(problems)
"""


@check("E01-tokens", "layers")
def tokens(subject: Subject) -> Iterator[str]:
    """An engine gives the greedy tokens and log-probabilities of transformers on the reference weights in float32.

    Fix: run the N checks first; then look at what the layers do not show: embeddings, biases, lm_head, experts.
    """
    yield from _compared(subject, enforce_eager=True)


@check("E02-two-ranks", "layers", "tensor-parallel")
def two_ranks(subject: Subject) -> Iterator[str]:
    """An engine on two ranks gives them as well.

    Fix: see P03; a tensor that is not cut must be whole on every rank.
    """
    if 2 not in subject.ranks:
        raise Skip("the checkpoint is refused on 2 ranks")
    yield from _compared(subject, enforce_eager=True, tensor_parallel_size=2)


@check("E03-compiled", "layers")
def compiled(subject: Subject) -> Iterator[str]:
    """A compiled engine, vLLM's default, gives them as well.

    Fix: register custom operators with a fake implementation; keep no Python branch on the number of rows.
    """
    yield from _compared(subject, enforce_eager=False)


def _compared(subject: Subject, **more: Any) -> list[str]:
    if why := engine_available():
        raise Skip(why)
    folder, method = subject.folder, subject.method
    assert folder is not None
    assert method is not None
    cpu = next(target for target in subject.targets if target.device == "cpu")
    composition = subject.composed(target=cpu)
    dtype = "float32" if "float32" in method.dtypes else method.dtypes[-1]
    kwargs = {name: setting.value for name, setting in composition.engine_kwargs.items()}
    engine = {**kwargs, "model": str(folder), "dtype": dtype, **more}
    variables = {**composition.environment, **composition.engine_environment, "VLLM_CPU_KVCACHE_SPACE": "1"}
    variables |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    spec = {"engine": engine, "prompts": PROMPTS, "tokens": TOKENS}
    made = ask(_ENGINE, json.dumps(spec), environ=variables, parts=60, bounded=False)
    if made.problem:
        return [f"the engine: {made.problem}"]
    with tempfile.TemporaryDirectory(prefix="quantserve-") as plain:
        _write_plain(subject, folder, Path(plain))
        spec = {"plain": plain, "prompts": PROMPTS, "made": made.value, "clear": CLEAR, "close": CLOSE[dtype]}
        compared = ask(_COMPARE, json.dumps(spec), parts=60)
    return [f"transformers: {compared.problem}"] if compared.problem else compared.value


def _write_plain(subject: Subject, folder: Path, destination: Path) -> None:
    """The checkpoint with the reference weights in float32.

    Raises:
        Skip: a quantized linear is not among them.
    """
    import torch
    from safetensors.torch import load_file, save_file

    assert subject.case.reference is not None
    weights = subject.case.reference(folder)
    names = {name for linear in subject.quantized for name in linear.names}
    if lacking := sorted(names - set(weights)):
        raise Skip(f"the reference has no {lacking[0]}, and {len(lacking) - 1} more")
    present = modules(subject.good)
    stored = {tensor.name for name in weights for suffix, tensor in present.get(name, {}).items() if suffix != "bias"}
    tensors = {name: one for file in sorted(folder.glob("*.safetensors")) for name, one in load_file(file).items()}
    plain = {name: one.float() for name, one in tensors.items() if name not in stored}
    plain |= {f"{name}.weight": weight.to(torch.float32).contiguous() for name, weight in weights.items()}
    save_file(plain, destination / "model.safetensors", {"format": "pt"})
    config = {
        key: value for key, value in subject.good.config.items() if key not in ("quantization_config", "torch_dtype")
    }
    (destination / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
