"""A real engine, as planned but eager, against transformers in float32 on weights decoded by `test_files`' decoder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.composed import composed, errors
from helpers.engines import run

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

DATA = Path(__file__).parent / "data"
GROUP, BITS = 32, 3


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
    generator = torch.Generator().manual_seed(11)
    prompts = [torch.randint(3, 128, (length,), generator=generator).tolist() for length in (5, 17, 40)]
    kwargs |= {"dtype": "float16", "enforce_eager": True}
    ended = run(folder, composition.engine_environment, prompts=prompts, tokens=32, **kwargs)

    config.pop("quantization_config")
    reference = LlamaForCausalLM(LlamaConfig(**config)).float()
    reference.load_state_dict(plain)
    clear = 0
    for prompt, answer in ((one.prompt, one.tokens) for one in ended.generations):
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        best = logits.topk(2)
        sure = best.values[:, 0] - best.values[:, 1] > 0.1 * logits.std()
        clear += int(sure.sum())
        assert torch.equal(torch.tensor(answer)[sure], best.indices[:, 0][sure])
    assert clear >= 48  # of 96
