"""A vLLM engine in a process of its own, measured on command.

The engine runs inside this process (VLLM_ENABLE_V1_MULTIPROCESSING=0): no front end beside it, and while it waits for a
command it does nothing at all. `environment()` does for it what vLLM otherwise does for its worker processes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.console import BUILD
from benchmarks.decode.worker import Channel, Measure, MemoryWatch

MAX_LENGTH = 1024
COMMON: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": MAX_LENGTH,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 2048,
    "enable_prefix_caching": False,
    "skip_tokenizer_init": True,
    "disable_log_stats": True,
    "seed": 0,
}


def environment(cores: Sequence[int], plugins: Sequence[str], kv_gib: int) -> dict[str, str]:
    """What the process must be started with, because OpenMP and the loader read it first.

    Args:
        cores: ids of the cores to compute on, one thread each.
        plugins: the general plugins to load.
        kv_gib: KV cache in GiB.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("VLLM_", "OMP_", "GOMP_", "KMP_"))}
    spec = importlib.util.find_spec("torch")
    libraries = Path(next(iter(spec.submodule_search_locations or ()))) / "lib" if spec else Path()
    return {
        **kept,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": ",".join(plugins),
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "VLLM_CACHE_ROOT": str(BUILD / "vllm-cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        # vLLM's own settings for its CPU workers (vllm/utils/ompmultiprocessing.py).
        "LD_PRELOAD": ":".join(str(path) for path in sorted(libraries.glob("libgomp*.so*"))[:1]),
        "OMP_NUM_THREADS": str(len(cores)),
        "GOMP_CPU_AFFINITY": " ".join(map(str, cores)),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1",
    }


class Engine:
    """A started `vllm.LLM`.

    Attributes:
        ready: seconds of the whole start (`start_s`, without imports) and of loading the weights (`load_s`), and the
            bytes loading took.
    """

    def __init__(self, model: str, arguments: Mapping[str, Any]) -> None:
        from vllm import LLM
        from vllm.v1.worker.cpu_worker import CPUWorker

        loaded: dict[str, Any] = {}
        load_model = CPUWorker.load_model

        def timed(worker: Any, *args: Any, **kwargs: Any) -> Any:
            with MemoryWatch() as memory:
                began = time.perf_counter()
                result = load_model(worker, *args, **kwargs)
                loaded["load_s"] = time.perf_counter() - began
            loaded.update(memory.figures())
            return result

        CPUWorker.load_model = timed
        began = time.perf_counter()
        self.llm = LLM(model=model, **{**COMMON, **arguments})
        self.ready = {"start_s": time.perf_counter() - began, **loaded}
        self.vocab = int(self.llm.llm_engine.model_config.get_vocab_size())
        self.random = random.Random(0)
        self.count = 0

    def prefill(self, tokens: int) -> dict[str, Any]:
        """Milliseconds from a prompt of so many tokens to its first token, batch 1."""
        self._add(1, tokens, 1)
        began = time.perf_counter()
        while self.llm.llm_engine.has_unfinished_requests():
            self.llm.llm_engine.step()
        return {"value": 1000 * (time.perf_counter() - began)}

    def decode(self, batch: int, prompt: int, steps: int, seconds: float) -> dict[str, Any]:
        """Tokens per second of all sequences together, once every one has its first token.

        Args:
            batch: sequences at once.
            prompt: tokens each begins with.
            steps: measure at most so many steps.
            seconds: and stop after so long, but not before 4 steps.
        """
        engine = self.llm.llm_engine
        started = self._add(batch, prompt, steps + 1)
        waiting = set(started)
        while waiting:
            waiting -= {output.request_id for output in engine.step() if output.outputs[0].token_ids}
        done = 0
        began = time.perf_counter()
        while engine.has_unfinished_requests() and (done < min(4, steps) or time.perf_counter() - began < seconds):
            engine.step()
            done += 1
        spent = time.perf_counter() - began
        engine.abort_request(started)
        while engine.has_unfinished_requests():
            engine.step()
        return {"value": batch * done / spent, "steps": done}

    def _add(self, batch: int, prompt: int, tokens: int) -> list[str]:
        from vllm import SamplingParams, TokensPrompt

        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        names = []
        for _ in range(batch):
            self.count += 1
            names.append(str(self.count))
            ids = [self.random.randrange(3, self.vocab) for _ in range(prompt)]
            self.llm.llm_engine.add_request(names[-1], TokensPrompt(prompt_token_ids=ids), params)
        return names


def main() -> None:
    """Started by the parent: `MODEL ARGUMENTS-AS-JSON`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("arguments", type=json.loads)
    options = parser.parse_args()

    def start() -> tuple[dict[str, Any], dict[str, Measure]]:
        engine = Engine(options.model, options.arguments)
        return engine.ready, {"prefill": engine.prefill, "decode": engine.decode}

    Channel().run(start)


if __name__ == "__main__":
    main()
