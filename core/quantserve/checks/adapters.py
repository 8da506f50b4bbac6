"""LoRA adapters against their model: what vLLM 0.32 refuses, ignores, or would compute wrongly."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Final

from quantserve.checkpoint.data import Tensor
from quantserve.checks.wording import counted, named, shown
from quantserve.config.engine_args import LORA_RANKS
from quantserve.finding import Finding
from quantserve.model.architecture import read_architecture, read_sizes
from quantserve.model.layers import is_multimodal, linears, split_block
from quantserve.model.modules import modules
from quantserve.once import once
from quantserve.text import harmless

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint
    from quantserve.checkpoint.adapter import Adapter
    from quantserve.config import ModelConfig
    from quantserve.target import Target

_TENSOR: Final = re.compile(r"(?:base_model\.model\.)?(.+)\.(?:(lora_[AB])\.weight|(lora_embedding_[AB]))$")
_HEADS: Final = ("score", "classifier")
"""Modules that vLLM takes whole from an adapter (``modules_to_save``), of classifiers."""
_RESIZED: Final = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
_KEPT_INITS: Final = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Values of ``init_lora_weights`` that leave the base model's weights as they are."""
_MOST_VOCABULARY: Final = 258_048
_UNSUPPORTED: Final = {
    "use_dora": "DoRA (use_dora), which scales the rows of the base model's weights",
    "lora_bias": "biases of its own (lora_bias)",
    "alora_invocation_tokens": "activation by tokens (alora_invocation_tokens)",
    "layer_replication": "replicated layers (layer_replication)",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "use_qalora": "QALoRA (use_qalora)",
}
"""What PEFT writes into adapter_config.json and vLLM 0.32 refuses."""
_WORDS: Final = re.compile(
    r"awq|gptq|squeezellm|gguf|hqq|bnb|nf4|fp8|fp4|nvfp4|mxfp4|int[48]|[2348]bits?|w\d+a\d+|g\d+|q\d\w*|hf|quantized|"
    r"marlin|autoround|dynamic|quant|fp16|bf16|safetensors"
)
"""Parts of a model's name that say how its weights are stored."""


def largest_rank(adapter: Adapter) -> int:
    """The largest rank that adapter_config.json gives a module; 0 where it gives none."""
    config = adapter.config
    pattern = config.get("rank_pattern")
    every = [config.get("r"), *(pattern.values() if isinstance(pattern, Mapping) else ())]
    return max((rank for rank in every if type(rank) is int), default=0)


def check_adapters(
    adapters: Sequence[Adapter], checkpoint: Checkpoint, model: ModelConfig, target: Target
) -> Iterator[Finding]:
    """Check every adapter, and what `enable_lora` asks of the model.

    Args:
        adapters: their headers.
        checkpoint: the model's headers.
        model: with the engine arguments that hold.
        target: the hardware.
    """
    if adapters or model.engine_kwargs.get("enable_lora"):
        yield from _check_model(checkpoint, model, target)
    for adapter in adapters:
        found = [*adapter.problems]
        if adapter.config:
            found += _check_config(adapter, model)
            found += _check_base(adapter, model)
            found += _check_tensors(adapter, checkpoint)
        prefix = f"adapter {adapter.name!r}: "
        yield from (replace(finding, message=prefix + finding.message) for finding in found)


def _check_model(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Iterator[Finding]:
    if target.device == "cpu" and any(linear.experts for linear in linears(checkpoint)):
        yield Finding.error(
            "adapter-experts",
            "vLLM 0.32 has no experts with LoRA on CPUs, and it wraps every layer of a model: the start would fail",
            ["adapters"],
            "serve the model without adapters, merge an adapter into the weights, or use a GPU",
        )
    sizes = read_sizes(checkpoint)
    if sizes and sizes.vocab > _MOST_VOCABULARY:
        yield Finding.warning(
            "adapter-vocabulary",
            f"the vocabulary has {sizes.vocab:,} tokens; vLLM 0.32 refuses LoRA with more than {_MOST_VOCABULARY:,} "
            "where its model class wraps the output layer",
            ["vocab_size"],
            "merge the adapter into the weights if the start fails",
        )
    ranks, rank = model.tensor_parallel_size, model.engine_kwargs.get("max_lora_rank")
    if model.engine_kwargs.get("fully_sharded_loras") and type(rank) is int and rank % ranks:
        yield Finding.error(
            "adapter-rank",
            f"max_lora_rank {rank} is not a multiple of the {ranks} ranks that share it (fully_sharded_loras)",
            ["engine_kwargs.fully_sharded_loras"],
            "remove fully_sharded_loras, or set a max_lora_rank that divides",
        )


def _check_config(adapter: Adapter, model: ModelConfig) -> Iterator[Finding]:
    config = adapter.config
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        yield _unsupported("peft_type", f"it is of PEFT's type {_brief(kind)}; vLLM serves LORA alone")
        return
    wanted = {"r": (int,), "lora_alpha": (int, float), "target_modules": (list, str)}
    wrong = [key for key, types in wanted.items() if type(config.get(key)) not in types]
    if wrong:
        has = ", ".join(f"{key}: {_brief(config.get(key))}" for key in wrong)
        yield _invalid(f"adapter_config.json needs a rank, a scale and the modules it is for; it has {has}", wrong)
        return
    if config["r"] < 1:
        yield _invalid(f"the rank r is {config['r']}, less than 1", ["r"])
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, Mapping):
            yield _invalid(f"{key} is {_brief(config[key])}, not an object", [key])
    for key, what in _UNSUPPORTED.items():
        if config.get(key):
            yield _unsupported(key, f"it has {what}; vLLM 0.32 refuses it")
    if config.get("bias", "none") != "none":
        yield _unsupported("bias", f"it has biases (bias: {_brief(config['bias'])}); vLLM 0.32 refuses them")
    saved = config.get("modules_to_save") or []
    other = [str(one) for one in saved if one not in _HEADS] if isinstance(saved, list) else [str(saved)]
    if other:
        yield _unsupported(
            "modules_to_save",
            f"it holds whole modules (modules_to_save: {', '.join(other[:8])}); vLLM takes "
            f"{' and '.join(_HEADS)} alone",
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _KEPT_INITS:
        yield _unsupported(
            "init_lora_weights",
            f"it was begun with {_brief(init)}, which changes the base model's weights as PEFT loads it; vLLM 0.32 "
            "refuses it",
            "convert it to plain LoRA: `save_pretrained(FOLDER, path_initial_model_for_weight_conversion=...)`",
        )
    rank, most = largest_rank(adapter), model.engine_kwargs.get("max_lora_rank")
    if rank > LORA_RANKS[-1] or (type(most) is int and rank > most):
        limit = min(LORA_RANKS[-1], most) if type(most) is int else LORA_RANKS[-1]
        larger = next((one for one in LORA_RANKS if one >= rank), None)
        yield Finding.error(
            "adapter-rank",
            f"its rank is {rank}, more than max_lora_rank {limit}",
            ["engine_kwargs.max_lora_rank"],
            f"set max_lora_rank to {larger}, or remove it" if larger else "merge the adapter into the weights",
        )


def _check_base(adapter: Adapter, model: ModelConfig) -> Iterator[Finding]:
    """Whether it was trained for another model, as far as names tell."""
    base = adapter.config.get("base_model_name_or_path")
    if not isinstance(base, str) or base.count("/") != 1 or base.startswith(("/", ".", "~")):
        return  # nothing, or a folder on the machine where it was trained
    sources = [model.source, model.model_id]
    if not any(_kin(base, source) for source in sources):
        yield Finding.warning(
            "adapter-base-differs",
            f"it was trained for {harmless(base, 200)}, and the model is {model.source}",
            ["base_model_name_or_path"],
            "make sure that the model has the weights of that one, quantized or not",
        )


def _kin(base: str, source: str) -> bool:
    """Whether two names can be of one model: equal, or one with more words, apart from how weights are stored."""
    ours, theirs = ({*re.split(r"[-_.\s:@]+", PurePath(name).name.lower())} for name in (source, base))
    ours, theirs = ({word for word in words if not _WORDS.fullmatch(word)} for words in (ours, theirs))
    return not ours or not theirs or ours <= theirs or theirs <= ours


def _check_tensors(adapter: Adapter, checkpoint: Checkpoint) -> Iterator[Finding]:
    halves: dict[str, dict[str, Tensor]] = {}
    unknown, resized = [], []
    for name, tensor in adapter.tensors.items():
        if match := _TENSOR.match(name):
            halves.setdefault(match[1], {})[(match[2] or match[3])[-1]] = tensor
        elif name.endswith(_RESIZED):
            resized.append(name)
        elif name.split(".")[-2:-1] != ["score"] and name.split(".")[-2:-1] != ["classifier"]:
            unknown.append(name)
    if unknown:
        yield Finding.error(
            "adapter-unsupported",
            f"vLLM refuses {counted(len(unknown), 'tensor')} that {'is' if len(unknown) == 1 else 'are'} neither "
            f"lora_A nor lora_B: {unknown[0]}",
            named(unknown),
            "train it without modules_to_save, DoRA and biases, or merge it into the weights",
        )
    if resized:
        yield Finding.warning(
            "adapter-embedding-ignored",
            "it was trained with a changed embedding, which vLLM does not load: tokens that were added have none",
            named(resized),
            "merge the adapter into the weights if the vocabulary was extended",
        )
    lone = [f"{module}.lora_{half}" for module, parts in halves.items() for half in {"A", "B"} - parts.keys()]
    if lone:
        yield Finding.error(
            "adapter-incomplete",
            f"{counted(len(lone), 'half')} missing of {counted(len(halves), 'pair')} of lora_A and lora_B: {lone[0]}",
            named(sorted(lone)),
            "save the adapter again",
        )
    yield from _check_modules(halves, checkpoint)
    yield from _check_shapes(adapter, halves, checkpoint)


def _check_modules(halves: Mapping[str, Mapping[str, Tensor]], checkpoint: Checkpoint) -> Iterator[Finding]:
    """The modules that the model does not have: vLLM refuses unknown kinds, and ignores a layer too many."""
    if not linears(checkpoint) or not halves:
        return
    there = _shapes(checkpoint)
    absent = [module for module in halves if _found(module, there) is None and not _stack(module)]
    if not absent:
        return
    certain = read_architecture(checkpoint)[0] is not None and not is_multimodal(checkpoint)
    yield (Finding.error if certain else Finding.warning)(
        "adapter-module-missing",
        f"{counted(len(absent), 'module')} of {len(halves)} that it changes {'is' if len(absent) == 1 else 'are'} not "
        f"in the model: {absent[0]}. vLLM refuses unknown names and ignores layers beyond the model's",
        named(absent),
        "serve the adapter with the model that it was trained for",
    )


def _check_shapes(
    adapter: Adapter, halves: Mapping[str, Mapping[str, Tensor]], checkpoint: Checkpoint
) -> Iterator[Finding]:
    there = _shapes(checkpoint)
    wrong = []
    for module, parts in halves.items():
        n, k = _found(module, there) or (0, 0)
        rank = _rank(adapter.config, module)
        for half, tensor in parts.items():
            expected = (rank, k) if half == "A" else (n, rank)
            fits = tuple(want or size for want, size in zip(expected, tensor.shape, strict=False)) == tensor.shape
            if not fits and not _stack(module):
                sizes = ", ".join(str(size) if size else "any" for size in expected)
                wrong.append(f"{shown(tensor)}, expected [{sizes}]")
    if wrong:
        yield Finding.error(
            "adapter-wrong-shape",
            f"{counted(len(wrong), 'tensor')} of {len(adapter.tensors)} with the wrong shape; lora_A is [rank, K], "
            f"lora_B [N, rank]: {wrong[0]}",
            named(wrong),
            "serve the adapter with the model that it was trained for",
        )


@once
def _shapes(checkpoint: Checkpoint) -> Mapping[str, tuple[int, int]]:
    """N and K of every module by its path, and by the part of the path that begins with the block; 0 for unknown."""
    found: dict[str, tuple[int, int]] = dict.fromkeys(modules(checkpoint), (0, 0))
    for linear in linears(checkpoint):
        found |= dict.fromkeys(linear.names, (linear.n, linear.k))
    if sizes := read_sizes(checkpoint):
        ends = {"lm_head": (sizes.vocab, sizes.hidden), "embed_tokens": (sizes.hidden, sizes.vocab)}
        found |= ends | {name: ends[leaf] for name in found if (leaf := name.rpartition(".")[2]) in ends}
    return found | {_inner(name): size for name, size in found.items()}


def _found(module: str, there: Mapping[str, tuple[int, int]]) -> tuple[int, int] | None:
    for name in (module, _inner(module), module.rpartition(".")[2]):
        if name in there:
            return there[name]
    return None


def _inner(module: str) -> str:
    """``layers.7.mlp.up_proj``, which PEFT and checkpoints put behind different prefixes."""
    parts = split_block(module + ".")
    return f"layers.{parts[1]}.{parts[2].rstrip('.')}" if parts else module


def _stack(module: str) -> bool:
    """Whether the tensors of a module hold all experts of a layer, in layouts of their own."""
    return module.endswith((".experts", ".experts.base_layer"))


def _rank(config: Mapping[str, Any], module: str) -> int:
    """The rank of a module as PEFT finds it: the first key of ``rank_pattern`` that its path ends with, else ``r``."""
    pattern = config.get("rank_pattern")
    for key, rank in (pattern if isinstance(pattern, Mapping) else {}).items():
        try:
            if type(rank) is int and re.fullmatch(rf"(?:.*\.)?(?:{key})", module):
                return rank
        except re.error:
            continue
    rank = config.get("r")
    return rank if type(rank) is int and rank > 0 else 0


def _invalid(message: str, keys: Sequence[str]) -> Finding:
    return Finding.error("adapter-invalid", message, keys, "save the adapter again with PEFT")


def _unsupported(key: str, message: str, fix: str = "merge the adapter into the weights and serve that") -> Finding:
    return Finding.error("adapter-unsupported", message, [key], fix)


def _brief(value: object) -> str:
    return "nothing" if value is None else harmless(repr(value), 80)
