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

from helpers.composed import composed, errors
from helpers.engines import compare, run
from helpers.plain import write_plain

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

DATA = Path(__file__).parent / "data"
GROUP, BITS = 32, 3


def stream(words: Tensor, bits: int) -> Tensor:
    """Codes int64 [rows, c * 32 / bits] of int32 words [rows, c], bit by bit."""
    every = torch.stack([(words.long() >> bit) & 1 for bit in range(32)], -1).reshape(len(words), -1, bits)
    return (every << torch.arange(bits)).sum(-1)


def plain(folder: Path, destination: Path) -> Path:
    """A checkpoint with all weights dequantized, by this file's decoder; zeros are stored less one."""
    tensors, weights = load_file(folder / "model.safetensors"), {}
    bits = json.loads((folder / "config.json").read_text())["quantization_config"]["bits"]
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "qweight":
            codes, scales = stream(tensor.t(), bits).t(), tensors[f"{module}.scales"].float()
            default = torch.arange(len(codes)) // (len(codes) // len(scales))
            group = tensors.get(f"{module}.g_idx", default).long()
            zeros = (stream(tensors[f"{module}.qzeros"], bits) + 1) % 2**bits
            weights[f"{module}.weight"] = ((codes - zeros[group]) * scales[group]).t()
        elif part == "weight":
            weights[name] = tensor
    return write_plain(folder, destination, weights)


def test_act_order_with_3_bits_and_zeros(tmp_path: Path) -> None:
    """AutoRound's file, with the groups of every input scattered as act-order scatters them."""
    folder = tmp_path / "m"
    shutil.copytree(DATA / "autoround-w3g32-asym", folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".g_idx")]:
        k = len(tensors[name])
        tensors[name] = torch.randperm(k, generator=torch.Generator().manual_seed(k)).to(torch.int32) // GROUP
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

    compare(plain(folder, tmp_path / "plain"), ended.generations, clear=0.1, close=0.1)
