"""Any config.json and any headers give findings: never an exception, never a hang."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from helpers.checkpoints import llama_tensors
from quantserve.api import Expected, check_linears
from quantserve.checkpoint import Checkpoint
from quantserve.checks.memory import estimate
from quantserve.checks.model import check_model
from quantserve.config import ModelConfig
from quantserve.finding import Finding
from quantserve.method import Method
from quantserve.target import find_target

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "head_dim": 64,
    "max_position_embeddings": 4096, "torch_dtype": "float16", "tie_word_embeddings": False, "sliding_window": None,
    "rope_scaling": None, "quantization_config": {"quant_method": "awq"}, "text_config": None, "layer_types": None,
    "attention_bias": False, "mlp_bias": False, "num_experts": 4, "moe_intermediate_size": 64, "kv_lora_rank": None,
    "num_local_experts": 2, "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": None,
}  # fmt: skip
JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 3, 10**9, 10**18, 10**300, 1.5, float("nan"), float("inf"), "", "4096", "x" * 5000, [],
    [None], [1, "a", {}], {}, {"quant_method": 7}, {"rope_type": "linear", "factor": "big"}, {"factor": float("inf")},
    {"type": None, "factor": -3}, {"hidden_size": 3}, "\ud800", "mixtral", "qwen3_moe", "phi3", "gemma2", "opt",
]  # fmt: skip
METHOD = Method("awq", "4-bit", (4,), "awq")


def everything(checkpoint: Checkpoint, ranks: int, target: str) -> list[Finding]:
    model = ModelConfig.model_validate({"engine_config": {"model_id": "m"}, "scaling_config": {"num_workers": ranks}})
    found = find_target(target)
    findings = check_model(checkpoint, model, found, METHOD)
    findings += estimate(checkpoint, model, found)[1]
    return findings + check_linears(checkpoint, lambda linear: {"w": Expected((linear.n, None), ("F16",))}, code="x")


@pytest.mark.parametrize("key", sorted(BASE))
@pytest.mark.parametrize("target", ["cpu", "t4"])
def test_every_field_with_every_kind_of_junk(key: str, target: str) -> None:
    tensors: dict[str, Any] = dict(llama_tensors("awq"))
    start = time.process_time()
    for value in JUNK:
        for finding in everything(Checkpoint.from_tensors({**BASE, key: value}, tensors), 2, target):
            assert len(finding.message) < 1000
            assert len(finding.offenders) <= 9
    assert time.process_time() - start < 10


def test_many_fields_at_once() -> None:
    chance = random.Random(1)
    for _ in range(300):
        config = {key: chance.choice(JUNK) if chance.random() < 0.3 else value for key, value in BASE.items()}
        tensors: dict[str, Any] = dict(llama_tensors("awq"))
        for name in chance.sample(sorted(tensors), 5):
            spec = (chance.choice(["F16", "I32", "Q7"]), chance.choice([(), (0,), (0, 0), (2**40, 2**40), (1,) * 20]))
            tensors[
                chance.choice([name, "a" * 10_000, f"{name}{'b' * 10_000}", "." * 500, "layers.9999999999999.x", ""])
            ] = spec
        checkpoint = Checkpoint.from_tensors(config, tensors)
        for finding in everything(checkpoint, chance.choice([1, 2, 7]), chance.choice(["cpu", "l4"])):
            assert len(finding.message) < 2000
            assert all(len(offender) < 1000 for offender in finding.offenders)
