"""The core's checks of one model, in the order that puts causes before consequences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from quantserve.architecture import FAMILIES, class_names, model_type, read_architecture, short
from quantserve.checks.method import check_declared_method, check_device, check_dtype
from quantserve.checks.parallel import check_parallel
from quantserve.checks.tensors import check_size, check_tensors
from quantserve.engine_defaults import longest_context, rope_factor
from quantserve.finding import Finding

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
        return findings if any("config" in f.code for f in findings) else [*findings, _no_config()]
    findings += _check_architecture(checkpoint)
    if method is not None:
        findings += check_declared_method(checkpoint, model, target, method)
        findings += check_device(target, method)
    findings += check_tensors(checkpoint)
    findings += check_dtype(checkpoint, model, target, method, dtype_by)
    findings += check_parallel(checkpoint, model, target)
    findings += _check_context(checkpoint, model)
    findings += _check_tokenizer(checkpoint, model)
    findings += check_size(checkpoint, method)
    findings += _check_queue(model)
    return findings


def _no_config() -> Finding:
    return Finding.error(
        "config-missing",
        "there is no config.json, or it is empty, so nothing is known about the model",
        ["config.json"],
        "copy config.json from the base model; SqueezeLLM files of LLaMA-1 need `quantserve convert --base MODEL`",
    )


def _check_architecture(checkpoint: Checkpoint) -> Iterator[Finding]:
    if not class_names(checkpoint):
        yield Finding.error(
            "architectures-missing",
            "config.json has no architectures; vLLM does not know which model to build",
            ["architectures"],
            'add "architectures": ["LlamaForCausalLM"] (or the class of this model) to config.json',
        )
    _, problems = read_architecture(checkpoint)
    yield from problems
    kind = model_type(checkpoint)
    if not problems and kind not in FAMILIES:
        yield Finding.info(
            "architecture-unknown",
            f"the tensors of model type {short(kind or '(none)')} are not known by name (known: "
            f"{', '.join(sorted(FAMILIES))}); missing and misshapen tensors are found only by comparing its blocks",
        )


def _check_context(checkpoint: Checkpoint, model: ModelConfig) -> Iterator[Finding]:
    asked, longest = model.max_model_len, longest_context(checkpoint)
    if not asked or not longest or asked <= longest or _environment(model).get("VLLM_ALLOW_LONG_MAX_MODEL_LEN") == "1":
        return
    factor = rope_factor(checkpoint.text_config)
    scaled = f", RoPE factor {factor:g} included" if factor != 1 else ""
    yield Finding.error(
        "context-too-long",
        f"max_total_tokens {asked} is more than the {longest} tokens the model was made for{scaled}; vLLM refuses it",
        ["max_total_tokens"],
        f"set max_total_tokens to at most {longest}",
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


def _environment(model: ModelConfig) -> dict[str, object]:
    variables = (model.engine_config.runtime_env or {}).get("env_vars")
    return dict(variables) if isinstance(variables, dict) else {}


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
    largest, vocabulary = tokenizer.get("max_token_id"), checkpoint.text_config.get("vocab_size")
    if isinstance(largest, int) and type(vocabulary) is int and 0 < vocabulary <= largest:
        yield Finding.error(
            "tokenizer-exceeds-vocabulary",
            f"the tokenizer has ids up to {largest}, the model embeddings for 0 to {vocabulary - 1} (vocab_size "
            f"{vocabulary}); a request with such a token stops the engine",
            ["tokenizer.json", "vocab_size"],
            "use the tokenizer that belongs to the model, or remove the added tokens it was not trained with",
        )
    generates = not any(name.endswith(("Model", "Classification")) for name in class_names(checkpoint))
    if tokenizer.get("has_chat_template") is False and not model.chat_template and generates:
        yield Finding.warning(
            "chat-template-missing",
            "neither the tokenizer nor the config has a chat template; /v1/chat/completions will answer 400, "
            "/v1/completions works",
            ["tokenizer_config.json"],
            "give generation.prompt_format in the model's config",
        )
