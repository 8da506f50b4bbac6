"""llama.cpp in a process of its own, measured on command like `engine.py`.

Runs in llama.cpp's virtual environment: `-m benchmarks.decode.llama FILE THREADS`. Uses the C API, so that several
sequences decode in one batch and nothing of Python's is timed but the choice of the most probable token.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.decode.worker import Channel, Measure, MemoryWatch

MAX_LENGTH = 1024
MAX_TOKENS = 2048  # of one call, as vLLM's max_num_batched_tokens


class Llama:
    """A loaded model, and a context per number of sequences."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp  # type: ignore[import-not-found]

        self.api = llama_cpp
        self.threads = threads
        began = time.perf_counter()
        llama_cpp.llama_backend_init()
        with MemoryWatch() as memory:
            self.model = llama_cpp.llama_model_load_from_file(
                str(path).encode(), llama_cpp.llama_model_default_params()
            )
            load_s = time.perf_counter() - began
        if not self.model:
            raise RuntimeError("llama.cpp could not load the model; its log says why")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.contexts: dict[int, Any] = {}
        self.batch = llama_cpp.llama_batch_init(MAX_TOKENS, 0, 1)
        self.random = random.Random(0)
        self.context(1)
        self.ready = {"start_s": time.perf_counter() - began, "load_s": load_s, **memory.figures()}

    def context(self, sequences: int) -> Any:
        """An empty context for so many sequences."""
        api = self.api
        if sequences not in self.contexts:
            parameters = api.llama_context_default_params()
            parameters.n_ctx = sequences * MAX_LENGTH
            parameters.n_seq_max = sequences
            parameters.n_batch = MAX_TOKENS
            parameters.n_threads = parameters.n_threads_batch = self.threads
            self.contexts[sequences] = api.llama_init_from_model(self.model, parameters)
            if not self.contexts[sequences]:
                raise RuntimeError(f"llama.cpp could not make a context for {sequences} sequences")
        context = self.contexts[sequences]
        api.llama_memory_clear(api.llama_get_memory(context), False)
        return context

    def prefill(self, tokens: int) -> dict[str, Any]:
        """Milliseconds from a prompt of so many tokens to its first token, batch 1."""
        context, prompt = self.context(1), self.prompts(1, tokens)
        began = time.perf_counter()
        self.first_tokens(context, prompt)
        return {"value": 1000 * (time.perf_counter() - began)}

    def decode(self, batch: int, prompt: int, steps: int, seconds: float) -> dict[str, Any]:
        """Tokens per second of all sequences together, after their first token. Arguments as for vLLM's."""
        context = self.context(batch)
        ids = self.first_tokens(context, self.prompts(batch, prompt))
        done = 0
        began = time.perf_counter()
        while done < steps and (done < min(4, steps) or time.perf_counter() - began < seconds):
            entries = [(ids[i], prompt + done, i, True) for i in range(batch)]
            ids = self.run(context, entries)
            done += 1
        return {"value": batch * done / (time.perf_counter() - began), "steps": done}

    def prompts(self, batch: int, tokens: int) -> list[list[int]]:
        """Random prompts."""
        return [[self.random.randrange(3, self.vocab) for _ in range(tokens)] for _ in range(batch)]

    def first_tokens(self, context: Any, prompts: Sequence[Sequence[int]]) -> list[int]:
        """The token after each prompt."""
        return self.run(
            context,
            [
                (token, place, sequence, place == len(prompt) - 1)
                for sequence, prompt in enumerate(prompts)
                for place, token in enumerate(prompt)
            ],
        )

    def run(self, context: Any, entries: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """One call with entries (token, position, sequence, wanted); the most probable token after each wanted one."""
        import numpy as np

        batch = self.batch
        if len(entries) > MAX_TOKENS:
            raise ValueError(f"{len(entries)} tokens at once; {MAX_TOKENS} are the most")
        batch.n_tokens = len(entries)
        for i, (token, place, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, place, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        status = self.api.llama_decode(context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        chosen = []
        for i, (*_, wanted) in enumerate(entries):
            if wanted:
                logits = self.api.llama_get_logits_ith(context, i)
                chosen.append(int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax()))
        return chosen


def main(path: str, threads: str) -> None:
    """Answer commands about one file."""

    def start() -> tuple[dict[str, Any], dict[str, Measure]]:
        model = Llama(Path(path), int(threads))
        return model.ready, {"prefill": model.prefill, "decode": model.decode}

    Channel().run(start)


if __name__ == "__main__":
    main(*sys.argv[1:])
