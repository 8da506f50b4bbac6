"""The real engine, started as planned, against transformers in float32 on weights decoded by `test_files`' decoder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.composed import composed, errors

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

DATA = Path(__file__).parent / "data"
GROUP, BITS = 32, 3
ENGINE = """
import json, sys
from vllm import LLM, SamplingParams, TokensPrompt

if __name__ == "__main__":
    kwargs, prompts, tokens = json.loads(sys.argv[1])
    engine = LLM(skip_tokenizer_init=True, **kwargs)
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    outputs = engine.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], sampling)
    print("TOKENS", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


def stream(words: Tensor) -> Tensor:
    """Codes int64 [rows, c * 32 / bits] of int32 words [rows, c], bit by bit."""
    every = torch.stack([(words.long() >> bit) & 1 for bit in range(32)], -1).reshape(len(words), -1, BITS)
    return (every << torch.arange(BITS)).sum(-1)


def test_act_order_with_3_bits_and_zeros(tmp_path: Path) -> None:
    """AutoRound's file, with the groups of every input scattered as act-order scatters them."""
    folder = tmp_path / "m"
    shutil.copytree(DATA / "autoround-w3g32-asym", folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    tensors, plain = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(".g_idx")]:
        module, k = name.removesuffix(".g_idx"), len(tensors[name])
        tensors[name] = torch.randperm(k, generator=torch.Generator().manual_seed(k)).to(torch.int32) // GROUP
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "qweight":
            group = tensors[f"{module}.g_idx"].long()
            zeros = (stream(tensors[f"{module}.qzeros"]) + 1) % 2**BITS
            codes = stream(tensor.t()).t() - zeros[group]
            plain[f"{module}.weight"] = (codes.t() * tensors[f"{module}.scales"].float()[group].t()).contiguous()
        elif part == "weight":
            plain[name] = tensor.float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))

    composition = composed(folder, "cpu")
    assert not errors(composition)
    kwargs = {key: setting.value for key, setting in composition.engine_kwargs.items()}
    assert kwargs["quantization"] == "gptq_codebook"
    kwargs |= {"model": str(folder), "dtype": "float16", "max_model_len": 128}
    generator = torch.Generator().manual_seed(11)
    prompts = [torch.randint(3, 128, (length,), generator=generator).tolist() for length in (5, 17, 40)]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", ENGINE, json.dumps([kwargs, prompts, 32])],
        capture_output=True,
        text=True,
        timeout=500,
        env=environment | composition.engine_environment,
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-8000:]
    answers = json.loads(next(line for line in run.stdout.splitlines() if line.startswith("TOKENS")).split(" ", 1)[1])

    config.pop("quantization_config")
    reference = LlamaForCausalLM(LlamaConfig(**config)).float()
    reference.load_state_dict(plain)
    clear = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        best = logits.topk(2)
        sure = best.values[:, 0] - best.values[:, 1] > 0.1 * logits.std()
        clear += int(sure.sum())
        assert torch.equal(torch.tensor(answer)[sure], best.indices[:, 0][sure])
    assert clear >= 48  # of 96
