"""A tokenizer of 97 whole words and a text of them, to calibrate tiny models with."""

from __future__ import annotations

from pathlib import Path

TEXT = " ".join(f"w{number % 97}" for number in range(4000))


def write_words(folder: Path) -> None:
    """Write the tokenizer beside a model; its ids are below 98."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0} | {f"w{number}": number + 1 for number in range(97)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
