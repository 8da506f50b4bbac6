"""Models and machines with round numbers, for cases that can be worked by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantserve.checkpoint import Checkpoint
from quantserve.config import ModelConfig, load_object
from quantserve.method import KernelProfile
from quantserve.planning.expectation import Expectation, expectation, kernel_of
from quantserve.plugins.registry import Registry
from quantserve.predict.imagine import imagined
from quantserve.predict.machine import ENGINE_NOW, EngineCost, Machine
from quantserve.target import find_target

LLAMA_7B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "torch_dtype": "float16",
}
LLAMA_13B = LLAMA_7B | {
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
LLAMA_70B = LLAMA_7B | {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
MIXTRAL = LLAMA_7B | {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
MISTRAL = LLAMA_7B | {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "max_position_embeddings": 32768,
}
QWEN = LLAMA_7B | {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "torch_dtype": "bfloat16",
}
# Two layers of 8 features: every matrix can be counted on paper.
TINY = LLAMA_7B | {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "intermediate_size": 16,
    "vocab_size": 10,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

# One byte a second and one FLOP a second, so that seconds are bytes and FLOPs.
UNIT = Machine(
    bandwidth=1.0,
    flops=1.0,
    link=1.0,
    attention_bandwidth=1.0,
    attention_flops=1.0,
    engine=EngineCost(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
)


def flat(bits: float, bandwidth: float = 1.0, flops: float = 1.0) -> KernelProfile:
    """A kernel with the same shares at every batch size."""
    return KernelProfile("flat", bits, ((1, bandwidth),), ((1, flops),), "test")


def model(ranks: int = 1, **engine_kwargs: object) -> ModelConfig:
    """A model config that says no more than this."""
    value = {
        "engine_config": {"model_id": "m", "hf_model_id": "somewhere", "engine_kwargs": engine_kwargs},
        "scaling_config": {"num_workers": ranks},
    }
    return load_object({"models": [value]}, "test").models[0]


def expected(
    config: dict[str, Any],
    method: str,
    target: str,
    ranks: int = 1,
    engine: str = ENGINE_NOW,
    bits: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Expectation:
    """What predictions of a model that nobody has in files rest on."""
    plugin = Registry.load({}).find_method(method)
    assert plugin.method is not None
    hardware = find_target(target)
    width = bits or max(plugin.method.bits)
    kernel = kernel_of(plugin, hardware, width, engine)
    assert kernel is not None
    files = imagined(Checkpoint.from_tensors(config), kernel.bits_per_weight)
    made = expectation(plugin, files, model(ranks), hardware, None, bits=width, engine=engine, environment=environment)
    assert made is not None
    return made
