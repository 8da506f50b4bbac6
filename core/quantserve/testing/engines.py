"""vLLM engines, each in a process forked from one that has imported vLLM, and transformers beside them.

    python -m quantserve.testing.engines FD

A start takes the seconds of the engine, without those of the imports. The environment, the plugins and what vLLM
changes in a process end with it. `quantserve.testing.child.forked` asks for one of the functions of `FUNCTIONS`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

Generated = tuple[list[int], list[float]]
"""The tokens of one prompt, and the log-probability of each."""


def main() -> None:
    """Import what engines need, then fork a process for each line of stdin; answers with its exit code."""
    _end_with_parent()
    import transformers  # noqa: F401
    import vllm.entrypoints.llm
    import vllm.v1.executor.multiproc_executor
    import vllm.v1.worker.cpu_worker  # noqa: F401

    gc.collect()
    gc.freeze()  # engines collect garbage seven times as they start, and what was imported is none
    number = int(sys.argv[1])
    for line in sys.stdin:
        process = os.fork()
        if not process:
            os.close(number)
            _run(json.loads(line))
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        os.write(number, f"{code}\n".encode())


def _run(request: Mapping[str, Any]) -> None:
    """In the forked process: output to the log, the environment of the request, one function. Never returns."""
    code = 1
    try:
        _end_with_parent()
        os.environ.clear()
        os.environ.update(request["environment"])
        with open(os.devnull) as nothing, open(request["log"], "a") as log:
            for number, file in enumerate((nothing, log, log)):
                os.dup2(file.fileno(), number)
        made = FUNCTIONS[request["function"]](**request["arguments"])
        Path(request["out"]).write_text(json.dumps({"value": made}))
        code = 0
    except BaseException as error:
        traceback.print_exc()
        said = f"{type(error).__name__}: {error}"
        with suppress(OSError):
            Path(request["out"]).write_text(json.dumps({"error": said[:2000]}))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def generate(
    engine: Mapping[str, Any],
    batches: Sequence[Sequence[Sequence[int]]],
    tokens: int,
    adapters: Sequence[Sequence[str | None]] | None = None,
) -> list[list[Generated]]:
    """Start an engine and generate greedily.

    Args:
        engine: arguments of ``LLM``. Ranks are processes forked from this one.
        batches: of prompts, as token ids; the prompts of one run together.
        tokens: how many each prompt gets.
        adapters: for each batch and prompt the folder of its LoRA adapter, None for none.

    Returns:
        For each batch and prompt the tokens with their log-probabilities.
    """
    import torch._dynamo.config
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.v1.executor import multiproc_executor

    # vLLM's platform for CPUs spawns the workers of ranks, which import everything again.
    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    if engine.get("enforce_eager"):
        torch._dynamo.config.disable = True  # vLLM compiles a function of its sampler all the same
    started = LLM(**engine)
    sampling = SamplingParams(temperature=0, max_tokens=tokens, logprobs=0, ignore_eos=True, detokenize=False)
    folders = sorted({folder for batch in adapters or () for folder in batch if folder})
    loras = {folder: LoRARequest(folder, number, folder) for number, folder in enumerate(folders, start=1)}
    made = []
    for number, batch in enumerate(batches):
        prompts: Any = [{"prompt_token_ids": list(prompt)} for prompt in batch]
        chosen = [loras.get(folder or "") for folder in adapters[number]] if adapters else None
        answers = started.generate(prompts, sampling, use_tqdm=False, lora_request=chosen)
        outputs = [request.outputs[0] for request in answers]
        made.append(
            [
                (
                    list(out.token_ids),
                    [step[token].logprob for step, token in zip(out.logprobs or (), out.token_ids, strict=True)],
                )
                for out in outputs
            ]
        )
    started.llm_engine.engine_core.shutdown()
    return made


def compare(
    plain: str,
    prompts: Sequence[Sequence[int]],
    generated: Sequence[Generated],
    *,
    clear: float,
    close: float,
    share: float = 0.5,
    spread: bool = False,
) -> list[str]:
    """Hold every token against transformers in float32, which continues the engine's own text.

    Where a router hardly prefers the last expert that it chooses to the next, rounding chooses another, and with it
    another token, in transformers in bfloat16 too. Such positions do not count.

    Args:
        plain: folder of the dequantized checkpoint.
        prompts: token ids.
        generated: what the engine made of each.
        clear: by how much the two best logits differ where tokens must be equal. A quarter of it must lie between the
            logits of these experts.
        close: how far log-probabilities may differ.
        share: of the tokens that must be clear.
        spread: whether `clear` and `close` are in standard deviations of the logits over the vocabulary.

    Returns:
        What differs, a line each.
    """
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    problems: list[str] = []
    checked = total = 0
    experts = getattr(model.config, "num_experts_per_tok", None) or 0
    options = {"output_router_logits": True} if experts else {}
    for prompt, (tokens, logprobs) in zip(prompts, generated, strict=True):
        made = torch.tensor(tokens)
        with torch.no_grad():
            output = model(torch.tensor([[*prompt, *tokens]]), **options)
        own = slice(len(prompt) - 1, -1)
        logits, best = output.logits[0][own], output.logits[0][own].topk(2)
        unit = logits.std(-1).mean().item() if spread else 1.0
        steady = torch.ones(len(tokens), dtype=torch.bool)
        for scores in output.router_logits if experts else ():
            order = scores.view(-1, scores.shape[-1])[own].sort(descending=True).values
            steady &= (order[:, experts - 1 : experts] - order[:, experts : experts + 1] > unit * clear / 4).all(1)
        sure = steady & (best.values[:, 0] - best.values[:, 1] > unit * clear)
        wrong = (made != best.indices[:, 0]) & sure
        off = (logits.log_softmax(-1).gather(1, made[:, None])[:, 0] - torch.tensor(logprobs)).abs()
        far = off[steady].amax().item() if steady.any() else 0.0
        checked, total = checked + int(sure.sum()), total + len(tokens)
        what = f"prompt {[*prompt[:4]]} of {len(prompt)} tokens"
        if wrong.any():
            problems.append(f"{what}: {int(wrong.sum())} of {int(sure.sum())} clear tokens differ")
        if not far < unit * close:
            problems.append(f"{what}: a log-probability differs by {far:.3g}, and may by {unit * close:.3g}")
    if checked <= total * share:
        problems.append(f"only {checked} of {total} tokens are clear, so that the comparison says little")
    return problems


FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = {"generate": generate, "compare": compare}


def _end_with_parent() -> None:
    """End when the parent ends, where the system can do that (Linux)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    main()
