"""Mixtures of experts are calibrated: every expert by the tokens routed to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file

from helpers.tokenizer import write_words
from quantserve_awq.quantizer import Awq, AwqOptions
from quantserve_quantize.dequantized import Dequantized
from quantserve_quantize.quantizer import FEWEST
from quantserve_quantize.run import Asked, blocks_of, quantize
from quantserve_quantize.skeleton import Skeleton, build
from quantserve_quantize.source import Weights
from quantserve_quantize.through_transformers import score
from quantserve_squeezellm.quantizer import SqueezeLLM, SqueezeLLMOptions

SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "vocab_size": 128, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights, saved by transformers."""
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(1)
    model: Any
    if request.param == "mixtral":
        config = MixtralConfig(**SIZES, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2)
        model = MixtralForCausalLM(config)
    else:
        moe = {"moe_intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 96}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **moe))
    for name, parameter in model.named_parameters():
        if not name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("mixture") / request.param
    model.save_pretrained(folder)
    write_words(folder, 97)
    (folder / "text.txt").write_text(" ".join(f"w{number * number % 97}" for number in range(4000)))
    return folder


def test_blocks_with_listed_experts_are_transformers_model(source: Path) -> None:
    from transformers import AutoModelForCausalLM

    samples = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(2))
    weights = Weights(source)
    reference, _ = score(weights, {}, samples, lambda *_: None)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        logs = model(samples).logits[:, :-1].log_softmax(-1)
    expected = -logs.gather(2, samples[:, 1:, None]).reshape(-1).double()
    torch.testing.assert_close(reference.loss, expected, atol=1e-5, rtol=1e-5)
    assert {name for name, _ in build(weights).named_parameters()} == set(weights.names)


METHODS = {
    "awq": lambda: Awq(AwqOptions(group_size=32)),
    "squeezellm": lambda: SqueezeLLM(SqueezeLLMOptions(experts=True)),
}


@pytest.mark.parametrize("method", METHODS)
def test_experts_are_weighted_by_their_own_tokens(method: str, source: Path, tmp_path: Path) -> None:
    quantizer = METHODS[method]()
    report = quantize(source, tmp_path / "out", quantizer, method, Asked(source / "text.txt", 8, 64))
    experts = {name: layer for name, layer in report["layers"].items() if ".experts." in name}
    count = len({name.partition(".experts.")[2].partition(".")[0] for name in experts})
    assert len(experts) == 2 * count * 3
    up = {name: layer["tokens"] for name, layer in experts.items() if name.endswith(("up_proj", ".w3"))}
    assert sum(up.values()) == 2 * 8 * 64 * 2  # layers, tokens, experts per token
    few = [name for name, layer in experts.items() if layer["tokens"] < FEWEST]
    assert report.get("few_tokens", []) == few
    assert all(0 < layer["output_error"] < 0.2 for layer in experts.values())
    provenance = json.loads((tmp_path / "out" / "quantserve.json").read_text())
    assert provenance["layers"] == report["layers"]

    plain = load_file(tmp_path / "out" / "model.safetensors")
    assert not any(name.endswith(".weight") and ".experts." in name for name in plain)
    samples = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(3))
    _, scores = score(
        Weights(source), {"out": Dequantized(tmp_path / "out", type(quantizer))}, samples, lambda *_: None
    )
    assert 0 < float(scores["out"].divergence.mean()) < 0.5


def test_an_expert_without_tokens_takes_those_of_its_layer(source: Path, tmp_path: Path) -> None:
    quantizer = SqueezeLLM(SqueezeLLMOptions(experts=True))
    report = quantize(source, tmp_path / "out", quantizer, "squeezellm", Asked(source / "text.txt", 1, 16))
    assert len(report["few_tokens"]) == sum(".experts." in name for name in report["layers"])
    assert "saw fewer than 128 tokens" in (tmp_path / "out" / "README.md").read_text()
    assert all(layer["output_error"] is not None for layer in report["layers"].values())


def test_the_skeleton_names_what_the_files_have(source: Path) -> None:
    weights = Weights(source)
    skeleton = Skeleton(weights, blocks_of(weights))
    block = skeleton.load(skeleton.blocks[0])
    assert not any(parameter.is_meta for parameter in block.parameters())
