"""vLLM's own layers without an engine: what they need around them, one rank of several, and loading."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear, vocab_parallel_embedding

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""What Llama's layers are fused from, as vLLM tells a quantization config."""


@contextmanager
def surroundings(folder: Path, **variables: str) -> Iterator[None]:
    """A config of vLLM and a group of one process.

    Args:
        folder: an empty one.
        variables: of the environment.
    """
    with pytest.MonkeyPatch.context() as environment, set_current_vllm_config(VllmConfig()):
        for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1", **variables}.items():
            environment.setenv(name, value)
        cleanup_dist_env_and_memory()  # of whatever this process did before
        init_distributed_environment(1, 0, f"file://{folder / 'store'}", 0, "gloo")
        initialize_model_parallel(1)
        try:
            yield
        finally:
            cleanup_dist_env_and_memory()


def engine(register: Callable[[], object] = lambda: None, **variables: str) -> Any:
    """A fixture that every test of a module uses: `surroundings`, with a plugin registered twice."""

    @pytest.fixture(scope="module", autouse=True)
    def registered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        with surroundings(tmp_path_factory.mktemp("group"), **variables):
            register()
            register()
            yield

    return registered


def ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """As a fixture, `become` for a test."""
    return partial(become, monkeypatch)


def become(monkeypatch: pytest.MonkeyPatch, rank: int, ranks: int) -> None:
    """Let layers made from now on believe they are one rank of several."""
    for module in (linear, vocab_parallel_embedding, parameter):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: ranks)


def load(layer: Any, parts: Mapping[Any, Mapping[str, Tensor]], *, without: str = "") -> Any:
    """Hand a layer checkpoint tensors by shard and suffix, as vLLM does, and end the loading.

    Args:
        layer: a linear of vLLM.
        parts: by shard id, None for a layer that is not fused.
        without: a suffix that never arrives.
    """
    for shard, tensors in parts.items():
        for suffix, tensor in tensors.items():
            if suffix != without:
                into = getattr(layer, suffix.replace(".", "_"))
                into.weight_loader(into, tensor, *(() if shard is None else (shard,)))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def weight_of(layer: Any) -> Tensor:
    """W [n, k] as the kernel multiplies with it: x is the identity."""
    out: Tensor = layer.quant_method.apply(layer, torch.eye(layer.kernel.k))
    return out.t()
