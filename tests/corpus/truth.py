"""What the installed vLLM makes of a checkpoint folder, found without memory: the model is made on the meta device."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR", TRANSFORMERS_VERBOSITY="error", VLLM_PLUGINS="")

from corpus.entries import Entry
from corpus.patterns import Spec

_TORCH = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16",
    "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "U32": "uint32", "BOOL": "bool",
    "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


def of(entry: Entry, folder: Path) -> dict[str, Any]:
    """The truth about one entry.

    Keys: ``refused`` (vLLM's error, first line) where the config is not taken; else ``context`` (tokens, default
    max_model_len), ``dtype``, ``runner``, ``heads``, ``kv_heads``, ``head_size``, ``vocab``, and of the model itself
    ``kv`` ([kind, layers, bytes per token and layer, window] for a tensor parallel size of 1; for states bytes per
    sequence), ``weights`` (bytes of its parameters), ``load`` (``ok`` or what loading the files' tensors raised) and
    ``tp`` (size -> ``ok`` or what making the model with it raised). Stored truths may also have ``read``: keys that
    could not be computed without a GPU and were written from reading vLLM's source.
    """
    found: dict[str, Any] = {}
    try:
        config = model_config(folder)
    except Exception as error:
        return {"refused": _line(error)}
    arch = config.model_arch_config
    found |= {
        "context": config.max_model_len,
        "dtype": str(config.dtype).removeprefix("torch."),
        "runner": config.runner_type,
        "class": config._model_info.architecture,
        "heads": arch.total_num_attention_heads,
        "kv_heads": arch.total_num_kv_heads,
        "head_size": arch.head_size,
        "vocab": arch.vocab_size,
    }
    sizes = sorted({case.tp for case in entry.cases} | {1})
    tp = {}
    for ranks in sizes:
        try:
            model, vllm_config = make(folder, ranks)
            tp[str(ranks)] = "ok"
        except Exception as error:
            tp[str(ranks)] = _line(error)
            if ranks == 1 and "quantization_config" in entry.data["config"]:
                found |= _unquantized(entry, folder)
            continue
        if ranks == 1:
            found["kv"] = _kv(vllm_config)
            found["weights"] = sum(p.numel() * p.element_size() for p in model.parameters())
            if not found["class"].startswith("Transformers"):  # whose loader wants real tensors
                try:
                    found["load"] = _load(model, entry.tensors)
                except Exception as error:
                    found["load"] = _line(error)
        del model
    found["tp"] = tp
    return found


def _unquantized(entry: Entry, folder: Path) -> dict[str, Any]:
    """The KV cache of a model whose quantization this machine has no kernel for: that of the same model without it."""
    config = {key: value for key, value in entry.data["config"].items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config))
    try:
        return {"kv": _kv(make(folder)[1])}
    except Exception:
        return {}
    finally:
        (folder / "config.json").write_text(json.dumps(entry.data["config"]))


def model_config(folder: Path) -> Any:
    """vLLM's ModelConfig of a folder, as the engine makes it without arguments."""
    return _arguments(folder).create_model_config()


def make(folder: Path, ranks: int = 1) -> tuple[Any, Any]:
    """The model of a folder on the meta device, as the first of `ranks` ranks, and its VllmConfig."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel, parallel_state
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = _arguments(folder).create_engine_config()
    heads = config.model_config.model_arch_config.total_num_attention_heads
    if heads % ranks:
        raise ValueError(
            f"Total number of attention heads ({heads}) must be divisible by tensor parallel size ({ranks})."
        )
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"file://{tempfile.mktemp()}", 0, "gloo")
        parallel_state.destroy_model_parallel()
        initialize_model_parallel(1, 1)  # anew: there is an expert parallel group only for mixtures
        group = parallel_state.get_tp_group()
        config.parallel_config.tensor_parallel_size = ranks
        group.world_size = ranks
        try:
            with set_default_torch_dtype(config.model_config.dtype), torch.device("meta"):
                return initialize_model(vllm_config=config), config
        finally:
            group.world_size = 1


def _arguments(folder: Path) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import registry

    def inspect(lazy: Any) -> Any:  # vLLM does it in a process of its own, which takes ten seconds
        return registry._ModelInfo.from_model_cls(lazy.load_model_cls())

    registry._LazyRegisteredModel.inspect_model_cls = inspect
    return EngineArgs(model=str(folder), enforce_eager=True, skip_tokenizer_init=True)


def _load(model: Any, tensors: Mapping[str, Spec]) -> str:
    import torch

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, (dtype, shape) in tensors.items():
            yield name, torch.empty(shape, dtype=getattr(torch, _TORCH[dtype]), device="meta")

    with torch.device("meta"):
        loaded = model.load_weights(weights())
    missing = {name for name, _ in model.named_parameters()} - set(loaded or ())
    if loaded is not None and missing:
        kinds = Counter(".".join(part for part in name.split(".") if not part.isdecimal()) for name in missing)
        return "not in the files: " + ", ".join(f"{name} ({count})" for name, count in list(kinds.items())[:8])
    return "ok"


def _kv(vllm_config: Any) -> list[list[Any]]:
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.kv_cache_interface import MambaSpec

    kinds: Counter[tuple[Any, ...]] = Counter()
    for layer in vllm_config.compilation_config.static_forward_context.values():
        if not isinstance(layer, AttentionLayerBase):
            continue
        if getattr(layer, "kv_sharing_target_layer_name", None):
            kinds["shared", 0, None] += 1
            continue
        spec = layer.get_kv_cache_spec(vllm_config)
        if spec is None:
            kinds["none", 0, None] += 1
        elif isinstance(spec, MambaSpec):
            kinds["state", spec.page_size_bytes, None] += 1
        else:
            kind = type(spec).__name__.removesuffix("Spec")
            window = getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None)
            kinds[kind, spec.real_page_size_bytes / spec.block_size, window] += 1
    return [[kind, count, round(size), window] for (kind, size, window), count in kinds.items()]


def _line(error: Exception) -> str:
    text = re.sub(r"\S*/tmp\S*/model\b", "MODEL", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:240]}"
