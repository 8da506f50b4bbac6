"""Refuses prompts with a token id that has no row in the model's embedding.

vLLM accepts every id its tokenizer knows. A tokenizer may know more than the model has rows for (a padding token added
later, a special token named only in tokenizer_config.json), and looking such a row up ends the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMValidationError


def bound_token_ids(processor: Any) -> None:
    """Make a vLLM input processor check the ids of every prompt, text or ids, against the embedding.

    Placeholders of images and other media may lie beyond it, because their embeddings come from an encoder.

    Args:
        processor: ``AsyncLLM.input_processor``.
    """
    rows: int = processor.model_config.get_vocab_size()
    check: Callable[..., None] = processor._validate_model_input

    def check_and_bound(prompt_input: Any, prompt_type: Any) -> None:
        check(prompt_input, prompt_type=prompt_type)
        prompt = prompt_input
        ids = None if prompt["type"] == "embeds" else prompt["prompt_token_ids"]
        if not ids or max(ids) < rows:
            return
        media = [place for places in (prompt.get("mm_placeholders") or {}).values() for place in places]
        beyond = (index for index, token in enumerate(ids) if token >= rows)
        for index in beyond:
            if not any(place.offset <= index < place.offset + place.length for place in media):
                raise VLLMValidationError(
                    f"Token id {ids[index]} at position {index} has no embedding: the model has ids 0 to {rows - 1}.",
                    parameter="prompt",
                    value=ids[index],
                )

    processor._validate_model_input = check_and_bound
