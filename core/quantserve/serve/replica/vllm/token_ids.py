"""Refuses requests with a token id that has no row in the model's embedding.

vLLM accepts every id its tokenizer knows. A tokenizer may know more than the model has rows for (a padding token added
later, a special token named only in tokenizer_config.json), and looking such a row up ends the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from vllm.exceptions import VLLMValidationError
from vllm.utils.async_utils import make_async

INTEGERS: Final = range(-(2**63), 2**63)
"""The integers that vLLM can send to its engine."""


def bound_token_ids(processor: Any) -> None:
    """Make a vLLM input processor check the ids of every request against the embedding.

    All prompts pass `_validate_model_input`, whether they were text, ids, messages or a mix of ids and embeddings.
    Placeholders of images and other media may lie beyond the embedding, because their embeddings come from an encoder.
    All requests pass `process_inputs`, which has the ids of bad words and of stops; vLLM checks the other fields with
    token ids itself.

    Args:
        processor: ``AsyncLLM.input_processor``.
    """
    rows: int = processor.model_config.get_vocab_size()
    check: Callable[..., None] = processor._validate_model_input
    process: Callable[..., Any] = processor.process_inputs

    def check_and_bound(prompt_input: Any, prompt_type: Any) -> None:
        check(prompt_input, prompt_type=prompt_type)
        for index in _beyond(prompt_input.get("prompt_token_ids") or (), rows):
            if not _embedded(prompt_input, index):
                token = prompt_input["prompt_token_ids"][index]
                raise VLLMValidationError(
                    f"Token id {token} at position {index} has no embedding: the model has ids 0 to {rows - 1}.",
                    parameter="prompt",
                    value=token,
                )

    def process_and_bound(*args: Any, **kwargs: Any) -> Any:
        request = process(*args, **kwargs)
        if request.sampling_params is not None:
            _bound_sampling(request.sampling_params, rows)
        return request

    processor._validate_model_input = check_and_bound
    processor.process_inputs = process_and_bound
    processor.process_inputs_async = make_async(process_and_bound, executor=processor.renderer._executor)


def _beyond(ids: Sequence[int], rows: int) -> Iterable[int]:
    """The positions of ids without a row."""
    if not ids or (max(ids) < rows and min(ids) >= 0):
        return ()
    return (index for index, token in enumerate(ids) if not 0 <= token < rows)


def _embedded(prompt: Any, index: int) -> bool:
    """Whether the embedding at a position does not come from the model's rows."""
    if prompt["type"] == "embeds":
        is_id = prompt.get("is_token_ids")
        return is_id is None or not bool(is_id[index])
    media = (place for places in (prompt.get("mm_placeholders") or {}).values() for place in places)
    return any(place.offset <= index < place.offset + place.length for place in media)


def _bound_sampling(params: Any, rows: int) -> None:
    """Check a request's own copy of its sampling parameters.

    The model's own stops may lie beyond its rows. It never emits them, so they are left out.
    """
    for name in ("top_k", "seed", "min_tokens", "priority"):
        value = getattr(params, name, None)
        if isinstance(value, int) and value not in INTEGERS:
            raise VLLMValidationError(f"{name} must be a 64-bit integer.", parameter=name)
    params._all_stop_token_ids = {token for token in params._all_stop_token_ids if 0 <= token < rows}
    params.stop_token_ids = [token for token in params.stop_token_ids or () if 0 <= token < rows]
    for word in params.bad_words_token_ids or ():
        for index in _beyond(word, rows):
            text = f"A bad word has token id {word[index]}, which the model cannot emit: it has ids 0 to {rows - 1}."
            raise VLLMValidationError(text, parameter="bad_words", value=word[index])
