"""The core's checks of one model, in the order that puts causes before consequences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import NoneType
from typing import TYPE_CHECKING

from quantserve.checks.environment import check_environment
from quantserve.checks.method import check_declared_method, check_device, check_dtype
from quantserve.checks.packages import check_packages
from quantserve.checks.parallel import check_parallel
from quantserve.checks.tensors import check_size, check_tensors
from quantserve.families import VLLM, entry, section, section_path, service
from quantserve.finding import Finding
from quantserve.model.architecture import (
    FAMILIES,
    Architecture,
    class_names,
    model_type,
    read_architecture,
    short,
)
from quantserve.model.attention import attention_layers
from quantserve.model.context import context_limit
from quantserve.model.layers import block_prefix, split_block
from quantserve.system.environment import LONG_CONTEXT, engine_environment, is_on

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint
    from quantserve.config import ModelConfig
    from quantserve.method import Method
    from quantserve.target import Target


def check_model(
    checkpoint: Checkpoint, model: ModelConfig, target: Target, method: Method | None, dtype_by: str = ""
) -> list[Finding]:
    """Find everything wrong with a model that does not depend on how its method stores weights.

    Args:
        checkpoint: headers and JSON files; what reading them found is repeated first.
        model: the user's config of the model.
        target: the hardware to serve it on.
        method: the method that will serve it, None when none could be chosen.
        dtype_by: the plugin that set ``engine_kwargs.dtype``, "" when the config did or nobody.
    """
    # Whether a missing tokenizer matters depends on the config, which reading does not see.
    findings = [problem for problem in checkpoint.problems if problem.code != "tokenizer-missing"]
    if not checkpoint.config:
        told = checkpoint.container or any("config" in f.code or f.code == "weights-missing" for f in findings)
        return findings if told else [*findings, _no_config()]
    findings += _check_architecture(checkpoint, model)
    if method is not None:
        findings += check_declared_method(checkpoint, model, target, method)
        findings += check_device(target, method)
    findings += check_tensors(checkpoint)
    findings += check_dtype(checkpoint, model, target, method, dtype_by)
    findings += check_parallel(checkpoint, model, target)
    findings += _check_context(checkpoint, model, target)
    findings += _check_tokenizer(checkpoint, model)
    findings += check_size(checkpoint, method)
    findings += _check_queue(model)
    findings += check_environment(checkpoint, model, target)
    findings += check_packages(checkpoint, model, target)
    return findings


def _no_config() -> Finding:
    return Finding.error(
        "config-missing",
        "there is no config.json, or it is empty, so nothing is known about the model",
        ["config.json"],
        "copy config.json from the base model; SqueezeLLM files of LLaMA-1 need `quantserve convert --base MODEL`",
    )


def _check_architecture(checkpoint: Checkpoint, model: ModelConfig) -> Iterator[Finding]:
    if not class_names(checkpoint):
        yield Finding.error(
            "architectures-missing",
            "config.json has no architectures; vLLM does not know which model to build",
            ["architectures"],
            'add "architectures": ["LlamaForCausalLM"] (or the class of this model) to config.json',
        )
    architecture, problems = read_architecture(checkpoint)
    yield from problems
    told = {key for problem in problems for key in problem.offenders}
    yield from (finding for finding in _check_types(checkpoint) if not told & set(finding.offenders))
    if architecture is not None:
        yield from _check_defaults(checkpoint, architecture)
    yield from check_service(checkpoint, model)
    kind = model_type(checkpoint)
    if not problems and kind not in FAMILIES:
        yield Finding.info(
            "architecture-unknown",
            f"tensor names of model type {short(kind or '(none)')} are not known; missing and misshapen tensors are "
            "found by comparing its blocks with each other",
        )


# Every configuration class of transformers that has one of them refuses text and fractions.
_INTEGERS = (
    "max_position_embeddings", "vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads",
    "sliding_window",
)  # fmt: skip


def _check_types(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Values of a type that transformers' configuration class refuses: text for a number, a number for an object."""
    config = checkpoint.config
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        yield _bad_type("architectures", names, "a list of class names")
    section: object = config
    for key in section_path(config):
        section = section.get(key) if isinstance(section, Mapping) else None
        if section is not None and not isinstance(section, Mapping):
            yield _bad_type(key, section, "an object")
    known = entry(checkpoint.text_config.get("model_type")) or {}
    if not known.get("strict") or not isinstance(section, Mapping):
        return
    defaults = known.get("defaults", {})
    for key, value in section.items():
        wanted = ""
        if key in _INTEGERS and type(defaults.get(key)) is int and isinstance(value, (str, float)):
            wanted = "an integer"
        elif key in ("rope_scaling", "rope_parameters") and not isinstance(value, (Mapping, NoneType)):
            wanted = "an object"
        elif key == "layer_types" and not isinstance(value, (list, NoneType)):
            wanted = "a list with one kind a layer"
        if wanted:
            yield _bad_type(key, value, wanted)


def _bad_type(key: str, value: object, wanted: str) -> Finding:
    message = f"config.json: {key}: {short(value)} is not {wanted}"
    return Finding.error("config-bad-field", message, [key], f"correct {key} in config.json")


def _check_defaults(checkpoint: Checkpoint, architecture: Architecture) -> Iterator[Finding]:
    """A field config.json leaves out has the default of its class, which the files may contradict."""
    prefix = block_prefix(checkpoint)
    embedding = checkpoint.tensors.get(f"{prefix}embed_tokens.weight")
    query = checkpoint.tensors.get(f"{prefix}layers.0.self_attn.q_proj.weight")
    blocks = {
        block[1] for name in checkpoint.tensors if (block := split_block(name)) and block[0] == f"{prefix}layers."
    }
    rows = query.shape[0] if query and query.shape else None
    stored = {
        "num_hidden_layers": (architecture.layers, max(blocks) + 1 if blocks else None),
        "hidden_size": (architecture.hidden, embedding.shape[1] if embedding and len(embedding.shape) == 2 else None),
        "vocab_size": (architecture.vocab, embedding.shape[0] if embedding and embedding.shape else None),
        "num_attention_heads": (architecture.heads * architecture.head_dim, rows),
    }
    given = section(checkpoint.config)
    for key, (default, actual) in stored.items():
        if actual is None or default == actual or given.get(key) is not None:
            continue
        what = "head_dim x num_attention_heads" if key == "num_attention_heads" else key
        yield Finding.error(
            "config-missing-field",
            f"config.json has no {key}, so vLLM takes the default of {architecture.model_type} ({what} = {default}); "
            f"the files have {actual}",
            [key],
            "copy config.json from the base model (and keep its quantization_config)",
        )


def check_service(checkpoint: Checkpoint, model: ModelConfig) -> Iterator[Finding]:
    """Is there anything in vLLM that serves this architecture?"""
    names = class_names(checkpoint)
    if not names or model.engine_kwargs.get("load_format") == "mistral":
        return
    how, detail = service(names)
    shown = ", ".join(short(name) for name in names[:3])
    remote = isinstance(checkpoint.config.get("auto_map"), Mapping)
    trusted = model.engine_kwargs.get("trust_remote_code") is True
    custom = bool(model.plugins) or how == "plugin"
    known_type = entry(checkpoint.config.get("model_type")) is not None or not checkpoint.config.get("model_type")
    if how == "no longer":
        yield Finding.error(
            "architecture-unsupported",
            f"vLLM served {shown} until version {detail}; version {VLLM} does not",
            ["architectures"],
            "serve another model, or an export of this one for an architecture vLLM has (Llama, for example)",
        )
    elif how == "unknown" and not remote:
        severity = Finding.warning if custom else Finding.error
        yield severity(
            "architecture-unsupported",
            f"vLLM {VLLM} has no model class for {shown}, nor has transformers one that vLLM can run",
            ["architectures"],
            "correct architectures in config.json, or install the vLLM plugin that adds the class",
        )
    elif how == "transformers" and {"state", "both"} & set(attention_layers(checkpoint) or ()):
        yield Finding.error(
            "architecture-unsupported",
            f"vLLM {VLLM} has no model class for {shown}, and its Transformers backend cannot run state space or "
            "linear attention layers",
            ["architectures"],
            "serve another model",
        )
    elif how == "plugin":
        yield Finding.warning(
            "architecture-plugin",
            f"vLLM {VLLM} serves {shown} only with a plugin: {detail}",
            ["architectures"],
            "install the plugin, or serve another model",
        )
    elif not trusted and remote and (how == "unknown" or not known_type):
        what = "model class" if how == "unknown" else "configuration class"
        yield Finding.error(
            "remote-code",
            f"the {what} of {shown} is Python code in the checkpoint (auto_map); vLLM runs it only with "
            "trust_remote_code",
            ["auto_map"],
            "read that code; if you trust it, set engine_kwargs.trust_remote_code: true",
        )
    elif not known_type and not remote and not custom:
        yield Finding.error(
            "model-type-unknown",
            f"neither transformers nor vLLM {VLLM} has a configuration class for model_type "
            f"{short(checkpoint.config.get('model_type'))}",
            ["model_type"],
            "correct model_type in config.json",
        )


def _check_context(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Iterator[Finding]:
    asked, limit = model.max_model_len, context_limit(checkpoint, model)
    if not asked or limit.longest is None or asked <= limit.longest:
        return
    if is_on(engine_environment(model, target), LONG_CONTEXT):
        return
    scaled = f", RoPE factor {limit.factor:g} included" if limit.factor != 1 else ""
    yield Finding.error(
        "context-too-long",
        f"max_total_tokens ({asked:,}) exceeds the model's context length ({limit.longest:,} from {limit.key}{scaled})"
        "; vLLM refuses it",
        ["max_total_tokens"],
        f"set max_total_tokens to at most {limit.longest}",
    )


def _check_queue(model: ModelConfig) -> Iterator[Finding]:
    deployment = model.deployment_config
    if deployment.max_queued_requests == -1:
        yield Finding.warning(
            "queue-unbounded",
            "max_queued_requests is -1: under more load than the model can take, requests wait longer and longer "
            "instead of being refused, and every waiting one holds memory",
            ["max_queued_requests"],
            f"remove it; the default is max_ongoing_requests ({deployment.max_ongoing_requests})",
        )


def _check_tokenizer(checkpoint: Checkpoint, model: ModelConfig) -> Iterator[Finding]:
    if model.engine_config.tokenizer_id or model.engine_kwargs.get("skip_tokenizer_init"):
        return  # another tokenizer than the one that was read
    tokenizer = checkpoint.tokenizer
    if tokenizer.get("present") is False:
        yield Finding.error(
            "tokenizer-missing",
            "the checkpoint has no tokenizer files",
            ["tokenizer.json"],
            "copy tokenizer.json and tokenizer_config.json from the base model, or set engine_config.tokenizer_id",
        )
        return
    trusted = model.engine_kwargs.get("trust_remote_code") is True
    if tokenizer.get("is_remote_code") and "tokenizer.json" not in checkpoint.files and not trusted:
        yield Finding.warning(
            "remote-code-tokenizer",
            "the tokenizer is Python code in the checkpoint (auto_map), and there is no tokenizer.json; without "
            "trust_remote_code vLLM takes the usual tokenizer of the model type, which may not read these files",
            ["tokenizer_config.json"],
            "read that code; if you trust it, set engine_kwargs.trust_remote_code: true",
        )
    yield from _check_token_ids(checkpoint)
    generates = service(class_names(checkpoint))[1] in ("generate", "multimodal", "transformers")
    if tokenizer.get("has_chat_template") is False and not model.chat_template and generates:
        yield Finding.warning(
            "chat-template-missing",
            "neither the tokenizer nor the config has a chat template; /v1/chat/completions will answer 400, "
            "/v1/completions works",
            ["tokenizer_config.json"],
            "give generation.prompt_format in the model's config",
        )


def _check_token_ids(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Compare the ids the tokenizer can emit with the rows of the embedding."""
    tokenizer, rows = checkpoint.tokenizer, checkpoint.text_config.get("vocab_size")
    largest, base = tokenizer.get("max_token_id"), tokenizer.get("max_base_token_id")
    if not isinstance(largest, int) or type(rows) is not int or not 0 < rows <= largest:
        return
    only_added = isinstance(base, int) and base < rows
    severity = Finding.warning if only_added else Finding.error
    yield severity(
        "tokenizer-exceeds-vocabulary",
        f"the tokenizer has ids up to {largest}, the model embeddings for 0 to {rows - 1} (vocab_size {rows}); "
        + (
            "only added tokens lie beyond, and a prompt with one of them gets 400"
            if only_added
            else "the tokenizer belongs to another model"
        ),
        ["tokenizer.json", "vocab_size"],
        "use the tokenizer that belongs to the model, or remove the added tokens it was not trained with",
    )
