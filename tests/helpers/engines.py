"""Real vLLM engines, and their greedy tokens against transformers'. Also the script of the process that forks them.

An engine runs in a process of its own, which is forked from one that has imported vLLM: a start takes the seconds of
the engine, without those of the imports. Its environment, its plugins and what vLLM changes in a process end with it.
What engines generate is compared with transformers on the dequantized weights in float32.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

PROMPTS = [[1, 17, 33, 42, 99], [2, 40, 201, 7, 8, 250, 64, 3, 129], [5], list(range(100, 140))]
HANGS_S = 500
"""After so long an engine is taken for hanging."""
ARGUMENTS: Mapping[str, Any] = {
    "skip_tokenizer_init": True,
    "max_model_len": 128,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 32 << 20,
}
"""Of ``LLM``, where a test gives none."""


@dataclass(frozen=True)
class Generation:
    """Greedy tokens of one prompt, with the log-probability the engine gave each."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Run:
    """What an engine generated for each prompt, and the output of its process."""

    generations: list[Generation]
    output: str


def generate(model: Path, plugin: str, out: Path | None = None, **engine_args: Any) -> list[Generation]:
    """Greedy tokens of `PROMPTS`.

    Args:
        model: a checkpoint folder.
        plugin: the vLLM plugin that the engine asks for.
        out: unused.
        engine_args: of ``LLM``.

    Raises:
        RuntimeError: the engine failed; its output.
    """
    return run(model, {"VLLM_PLUGINS": plugin}, **engine_args).generations


def run(
    model: Path,
    environment: Mapping[str, str],
    *,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    tokens: int = 16,
    **engine_args: Any,
) -> Run:
    """Start an engine, generate greedily, stop it.

    Args:
        model: a checkpoint folder.
        environment: the variables of vLLM, and others added to those of this process.
        prompts: token ids.
        tokens: how many each prompt gets.
        engine_args: of ``LLM``. Ranks are processes on the same cores.

    Raises:
        RuntimeError: the engine failed; its output.
    """
    with tempfile.TemporaryDirectory(prefix="engine-") as folder:
        log, out = Path(folder, "log"), Path(folder, "out.json")
        spec = {
            "environment": {**_surroundings(), **_binding(engine_args.get("tensor_parallel_size", 1)), **environment},
            "engine_args": {"model": str(model), **ARGUMENTS, **engine_args},
            "prompts": prompts,
            "tokens": tokens,
            "log": str(log),
            "out": str(out),
        }
        failure = _Forking.started().run(spec)
        output = log.read_text(errors="replace") if log.exists() else ""
        if failure:
            raise RuntimeError(f"engine failed: {failure}\n{output[-40000:]}")
        results = json.loads(out.read_text())
    return Run([Generation(list(prompt), *item) for prompt, item in zip(prompts, results, strict=True)], output)


def _binding(ranks: int) -> dict[str, str]:
    """By itself vLLM binds one rank to each NUMA node; several on one node need their cores named."""
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join((cores * ranks)[:ranks])} if ranks > 1 else {}


def _surroundings() -> dict[str, str]:
    """The variables of this process without vLLM's, which tests of layers leave there."""
    own = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    # vLLM would spawn the engine core, and that its worker; each would import everything again.
    own |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    # Threads of a small model cost more than they compute, most of all when the other core has work of its own.
    own |= {"OMP_NUM_THREADS": "1"}
    return {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")} | own


class _Forking:
    """A process that has imported vLLM and forks another for each engine. It ends with this one."""

    last: _Forking | None = None

    @classmethod
    def started(cls) -> _Forking:
        """The process of this test run; another when it has ended."""
        if cls.last is None or cls.last.process.poll() is not None:
            cls.last = cls()
        return cls.last

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_surroundings()
        )
        atexit.register(self.process.kill)

    def run(self, spec: Mapping[str, Any]) -> str:
        """Run an engine; returns why it failed, or nothing."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        answered = False
        try:
            print(json.dumps(spec), file=self.process.stdin, flush=True)
            if not select.select([self.process.stdout], [], [], HANGS_S)[0]:
                return f"it has not ended in {HANGS_S} s"
            code = self.process.stdout.readline().strip()
            answered = code != ""
            return {"": "the process that forks engines has ended", "0": ""}.get(code, f"exit code {code}")
        finally:
            if not answered:  # also after Ctrl-C and pytest's timeout: an answer must belong to the spec
                self.process.kill()
                self.process.wait()


def compare(plain: Path, generations: list[Generation], *, clear: float, close: float) -> None:
    """Hold every token against transformers in float32, which continues the engine's own text.

    Args:
        plain: the dequantized checkpoint.
        clear: by how much the two best logits differ where tokens must be equal; more than half of all must be clear.
        close: how far log-probabilities may differ.
    """
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    checked = total = 0
    for generation in generations:
        tokens = torch.tensor(generation.tokens)
        with torch.no_grad():
            logits = model(torch.tensor([generation.prompt + generation.tokens])).logits[0]
        logits = logits[len(generation.prompt) - 1 : -1]
        best = logits.topk(2)
        sure = best.values[:, 0] - best.values[:, 1] > clear
        assert torch.equal(tokens[sure], best.indices[:, 0][sure])
        expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        assert (expected - torch.tensor(generation.logprobs)).abs().max() < close
        checked, total = checked + int(sure.sum()), total + len(tokens)
    assert checked > total / 2, f"only {checked} of {total} positions are clear; the comparison says little"


def fork_engines(specs: TextIO, answers: TextIO) -> None:
    """Import what engines need, then fork one for each line of specs; answers with its exit code."""
    _die_with_parent()
    import vllm.entrypoints.llm
    import vllm.v1.executor.multiproc_executor
    import vllm.v1.worker.cpu_worker  # noqa: F401

    gc.collect()
    gc.freeze()  # engines collect garbage seven times as they start, and what was imported is none
    for line in specs:
        pid = os.fork()
        if not pid:
            _engine(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)


def _engine(spec: Mapping[str, Any]) -> None:
    """In the forked process: output to the log, the environment of the spec, one engine. Never returns."""
    code = 1
    try:
        _die_with_parent()
        os.environ.clear()
        os.environ.update(spec["environment"])
        with open(os.devnull) as nothing, open(spec["log"], "a") as log:
            for number, file in enumerate((nothing, log, log)):
                os.dup2(file.fileno(), number)
        Path(spec["out"]).write_text(json.dumps(_generate(spec)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _generate(spec: Mapping[str, Any]) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities for each prompt."""
    import multiprocessing

    import torch._dynamo.config
    from vllm import LLM, SamplingParams
    from vllm.v1.executor import multiproc_executor

    arguments = spec["engine_args"]
    # vLLM's platform for CPUs spawns the workers of ranks, which import everything again.
    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    if arguments.get("enforce_eager"):
        torch._dynamo.config.disable = True  # vLLM compiles a function of its sampler all the same
    engine = LLM(**arguments)
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in spec["prompts"]]
    sampling = SamplingParams(temperature=0, max_tokens=spec["tokens"], logprobs=0, ignore_eos=True, detokenize=False)
    results = []
    for request in engine.generate(prompts, sampling):
        out = request.outputs[0]
        steps = zip(out.logprobs or (), out.token_ids, strict=True)
        results.append((list(out.token_ids), [step[token].logprob for step, token in steps]))
    engine.llm_engine.engine_core.shutdown()
    return results


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # vLLM's log
        fork_engines(sys.stdin, answers)
