"""Train the demo model: a Llama of 5.8 million parameters that answers questions about Python's standard library.

    python train.py --minutes 60 --output checkpoint

The learning rate follows the clock, so training ends after --minutes on any machine; a faster one sees more text.
An interrupted run goes on with --resume: its state is kept in OUTPUT.state, beside the output folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizer import ASSISTANT, BOS, END, PAD, SYSTEM, USER, VOCAB_SIZE, save_tokenizer, train_tokenizer
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from data import Entry, Pair, entries, epoch

Row = tuple[list[int], list[float]]  # token ids, and the weight of each token in the loss

MAX_POSITIONS = 1024
BATCH_TOKENS = 2048
QUESTION_WEIGHT = 0.1  # a question says little that can be learnt; the answer counts fully
PEAK_LEARNING_RATE = 3e-3
WARMUP = 0.02  # of the time
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You answer questions about Python.", "Answer briefly.")


def model_config(tokenizer: Tokenizer) -> LlamaConfig:
    """Every linear's K and N are multiples of 128, so that every group size and packing used in practice fits."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.token_to_id(PAD),
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(END),
    )


def encode(tokenizer: Tokenizer, conversation: list[Pair], system: str = "") -> Row:
    """A conversation as the chat template renders it, cut to MAX_POSITIONS tokens."""
    special: dict[str, int] = tokenizer.get_vocab()
    ids, weights = [special[BOS]], [0.0]

    def say(role: str, text: str, weight: float) -> None:
        body = [*tokenizer.encode(text, add_special_tokens=False).ids, special[END]]
        ids.extend([special[role], *body])
        weights.extend([0.0, *[weight] * len(body)])

    if system:
        say(SYSTEM, system, 0.0)
    for pair in conversation:
        say(USER, pair.question, QUESTION_WEIGHT)
        say(ASSISTANT, pair.answer, 1.0)
    return ids[:MAX_POSITIONS], weights[:MAX_POSITIONS]


def batches(
    tokenizer: Tokenizer, collection: list[Entry], seed: int, first_epoch: int
) -> Iterator[tuple[int, list[Row]]]:
    """Endless (epoch number, rows of similar length with BATCH_TOKENS tokens in all); each epoch has its own seed."""
    for number in itertools.count(first_epoch):
        rng = random.Random(seed * 1_000_003 + number)
        rows = []
        for conversation in epoch(collection, rng):
            rows.append(encode(tokenizer, conversation, rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.04 else ""))
        rows.sort(key=lambda row: len(row[0]) + rng.random() * 4)
        groups: list[list[Row]] = [[]]
        for row in rows:
            if groups[-1] and (len(groups[-1]) + 1) * len(row[0]) > BATCH_TOKENS:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups:
            yield number, group


def loss_of(model: LlamaForCausalLM, rows: list[Row]) -> tuple[torch.Tensor, float, float, int]:
    """(weighted mean loss to minimise, answers' summed loss, answers' token count, all tokens)."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    weights = torch.zeros(len(rows), length)
    for i, (row_ids, row_weights) in enumerate(rows):
        ids[i, : len(row_ids)] = torch.tensor(row_ids)
        weights[i, : len(row_ids)] = torch.tensor(row_weights)
    # Padding is on the right and the attention causal: no mask is needed.
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    weights = weights[:, 1:]
    used = weights > 0
    logits = model.lm_head(hidden[used])
    losses = functional.cross_entropy(logits.float(), ids[:, 1:][used], reduction="none")
    scale = weights[used]
    answers = scale == 1.0
    return (
        (losses * scale).sum() / scale.sum(),
        losses.detach()[answers].sum().item(),
        answers.sum().item(),
        ids.numel(),
    )


def save_checkpoint(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path, training: dict[str, Any]) -> None:
    """Write a complete Hugging Face folder in bfloat16, whole or not at all."""
    temporary = folder.with_name(folder.name + f".tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=False,
    )
    copy.save_pretrained(temporary)
    (temporary / "model.safetensors").chmod(0o644)  # written private to its owner
    save_tokenizer(tokenizer, temporary, MAX_POSITIONS)
    (temporary / "training.json").write_text(json.dumps(training, indent=2) + "\n")
    old = folder.with_name(folder.name + f".old-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def learning_rate(progress: float) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak; progress is the share of the time that has passed."""
    if progress < WARMUP:
        return PEAK_LEARNING_RATE * max(progress / WARMUP, 0.01)
    after = (progress - WARMUP) / (1 - WARMUP)
    return PEAK_LEARNING_RATE * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(after, 1.0))))


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, which reached the same early loss in 0.7 of AdamW's steps; AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=PEAK_LEARNING_RATE, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def train(output: Path, minutes: float, seed: int, threads: int, resume: bool, save_every: float) -> None:
    """Train for so many minutes (those before an interruption count) and write the checkpoint to output."""
    disable_progress_bar()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    collection = entries()
    tokenizer = train_tokenizer(collection)
    model = LlamaForCausalLM(model_config(tokenizer))
    optimizers = make_optimizers(model)
    state_file = output.with_name(output.name + ".state")
    done: dict[str, Any] = {"seconds": 0.0, "steps": 0, "tokens": 0, "epoch": 0, "loss": None}
    if resume and state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        done = state["done"]
        done["epoch"] += 1  # the interrupted epoch is not finished: the next has an order of its own
    print(
        f"{sum(p.numel() for p in model.parameters())} parameters, {len(collection)} entries, resumed at {done}",
        flush=True,
    )

    def save() -> None:
        summary = {"seed": seed, "minutes": minutes, "torch": torch.__version__, "threads": threads, **done}
        save_checkpoint(model, tokenizer, output, summary)
        partial = state_file.with_name(state_file.name + ".tmp")
        states = [optimizer.state_dict() for optimizer in optimizers]
        torch.save({"model": model.state_dict(), "optimizers": states, "done": done}, partial)
        partial.replace(state_file)

    save()
    budget = minutes * 60
    started = time.monotonic() - done["seconds"]
    last_save = last_report = time.monotonic()
    summed, counted = 0.0, 0.0
    for number, rows in batches(tokenizer, collection, seed, done["epoch"]):
        progress = (time.monotonic() - started) / budget
        if progress >= 1:
            break
        for group in itertools.chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
            group["lr"] = learning_rate(progress)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, answer_loss, answer_tokens, tokens = loss_of(model, rows)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        summed, counted = summed + answer_loss, counted + answer_tokens
        done["steps"] += 1
        done["tokens"] += tokens
        done["epoch"] = number
        now = time.monotonic()
        done["seconds"] = round(now - started, 1)
        if now - last_report >= 15:
            done["loss"] = round(summed / counted, 4)
            minute, speed = done["seconds"] / 60, done["tokens"] / done["seconds"]
            print(f"{minute:6.1f} min  epoch {number:3}  step {done['steps']:6}", end="  ")
            print(f"loss {done['loss']:.4f}  {speed:.0f} tokens/s", flush=True)
            summed, counted, last_report = 0.0, 0.0, now
        if now - last_save >= save_every * 60:
            save()
            last_save = time.monotonic()
    save()
    state_file.unlink()
    print(f"finished: {done}", flush=True)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, help="checkpoint folder to write (replaced when it exists)"
    )
    parser.add_argument("--minutes", type=float, default=60, help="wall-clock training time (default 60)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--save-every", type=float, default=4, metavar="MINUTES", help="minutes between saves (default 4)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT.state when it exists")
    options = parser.parse_args()
    train(options.output, options.minutes, options.seed, options.threads, options.resume, options.save_every)


if __name__ == "__main__":
    main()
