"""A tokenizer of whole words, for calibration texts of tests."""

from __future__ import annotations

from pathlib import Path


def write_words(folder: Path, count: int) -> None:
    """The words ``w0``, ``w1``, ... have the ids from 1 on; everything else is 0."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0} | {f"w{number}": number + 1 for number in range(count)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
