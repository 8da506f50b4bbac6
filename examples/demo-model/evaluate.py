"""Held-out perplexity of a checkpoint folder, and its answers to a few questions.

    python evaluate.py checkpoint

Works on any folder that transformers can load, so also on a dequantized export. Perplexity is per token of the answer
(its end included), given the question, on the two held-out sets of `data.held_out_pairs`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import Pair, entries, held_out_pairs

SAMPLE_QUESTIONS = (
    "What does str.join do?",
    "How do I use os.path.join?",
    "What is collections.Counter?",
    "What does the append method of list do?",
    "What does json.dumps do?",
    "How does random.shuffle work?",
    "What is the itertools module?",
    "What is the signature of sorted?",
    "How do I join two or more pathname components?",
    "Who are you?",
    "What is the capital of France?",
)


def perplexity(model: Any, tokenizer: Any, pairs: Sequence[Pair]) -> float:
    """exp of the mean negative log-likelihood of the answers' tokens, one question at a time as a user would ask it."""
    total, count = 0.0, 0
    for pair in pairs:
        question = [{"role": "user", "content": pair.question}]
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
        answer = [*tokenizer.encode(pair.answer, add_special_tokens=False), tokenizer.eos_token_id]
        ids = torch.tensor([prompt + answer])
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
        total += functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item()
        count += len(answer)
    return math.exp(total / count)


def answer(model: Any, tokenizer: Any, question: str, max_tokens: int = 120) -> str:
    """The greedy answer to one question."""
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=max_tokens, do_sample=False)
    return str(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


def evaluate(folder: Path, limit: int) -> dict[str, Any]:
    """{"perplexity": {set: value}, "pairs": {set: count}, "answers": {question: answer}}, computed in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    held_out = {}
    for name, pairs in held_out_pairs(entries()).items():
        step = max(1, math.ceil(len(pairs) / limit)) if limit else 1
        held_out[name] = pairs[::step]
    return {
        "perplexity": {name: round(perplexity(model, tokenizer, pairs), 3) for name, pairs in held_out.items()},
        "pairs": {name: len(pairs) for name, pairs in held_out.items()},
        "answers": {question: answer(model, tokenizer, question) for question in SAMPLE_QUESTIONS},
    }


def main() -> None:
    """Read the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder with config.json, weights and tokenizer")
    parser.add_argument(
        "--limit", type=int, default=0, help="use about so many questions of each held-out set (default all)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with torch.inference_mode():
        result = evaluate(options.checkpoint, options.limit)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for name, value in result["perplexity"].items():
        print(f"held-out {name:9} perplexity {value:8.3f} over {result['pairs'][name]} questions")
    for question, text in result["answers"].items():
        print(f"\n> {question}\n{text}")


if __name__ == "__main__":
    main()
