"""What vLLM takes beside the matrices: two small models of random weights, and what remains of their steps.

Run as a module it is the child that holds the engine: ``python -m quantserve.calibrate.engine FOLDER``. It is
compiled, as quantserve serves models, or eager.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantserve.calibrate.measure import Progress, Watch, typical
from quantserve.checkpoint import Checkpoint
from quantserve.config import load_object
from quantserve.errors import EngineError, UsageError
from quantserve.predict.calibration import Calibration
from quantserve.predict.machine import EngineCost, linear_cost, machine_of
from quantserve.predict.prediction import PLAIN
from quantserve.predict.shape import Shape, read_shape
from quantserve.predict.step import Batch, batch_of, step_cost
from quantserve.system.homes import temporary_folder
from quantserve.target import this_cpu

LAYERS = (2, 10)
DECODES = (1, 4, 16)
PROMPTS = (64, 512)
CONTEXT = 64
STEPS = 24
DOUBT = 0.03
_START_S = 600.0


@dataclass(frozen=True, slots=True)
class Point:
    """One measured step: of a model with so many layers, what it computed, in seconds."""

    layers: int
    batch: Batch
    seconds: float


def config_of(layers: int) -> dict[str, Any]:
    """config.json of a small Llama, too large for the cache of a processor."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 32000,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def with_engine(calibration: Calibration, progress: Progress) -> Calibration:
    """The calibration with vLLM's costs, compiled and not: vLLM is started on two small models for each.

    Raises:
        UsageError: vLLM is not installed.
        EngineError: it did not run.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UsageError("vLLM is not installed\n  fix: leave out --engine, or `pip install 'quantserve[cpu]'`")
    runs = [(eager, layers) for eager in (False, True) for layers in LAYERS]
    points: dict[bool, list[Point]] = {False: [], True: []}
    for index, (eager, layers) in enumerate(runs):
        kind = "not compiled" if eager else "compiled"
        progress(f"vLLM, {layers} layers of random weights, {kind}", index, len(runs))
        points[eager] += measured(layers, calibration.threads, eager)
    return replace(
        calibration, engine=fit(calibration, points[False]), eager=fit(calibration, points[True], eager=True)
    )


def measured(layers: int, threads: int, eager: bool) -> list[Point]:
    """The steps of one small model, from an engine in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="quantserve-calibrate-", dir=temporary_folder()) as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config_of(layers)))
        log = Path(folder) / "engine.log"
        with log.open("w") as errors:
            line = [sys.executable, "-m", "quantserve.calibrate.engine", folder, *(["eager"] if eager else [])]
            try:
                done = subprocess.run(
                    line, env=environment(threads), stdout=subprocess.PIPE, stderr=errors, timeout=_START_S, check=False
                )
            except subprocess.TimeoutExpired:
                raise EngineError(f"vLLM did not finish within {_START_S:.0f} s") from None
        last = done.stdout.decode(errors="replace").strip().splitlines()[-1:]
        if done.returncode or not last:
            said = [text for text in log.read_text(errors="replace").splitlines() if text.strip()][-1:]
            raise EngineError(f"vLLM ended with code {done.returncode}: {''.join(said)[:300]}")
    found = json.loads(last[0])
    decodes = [
        Point(layers, batch_of([(1, CONTEXT + STEPS / 2, True)] * int(batch)), seconds)
        for batch, seconds in found["decode"].items()
    ]
    prompts = [
        Point(layers, batch_of([(int(tokens), 0, True)]), seconds) for tokens, seconds in found["prompt"].items()
    ]
    return decodes + prompts


def environment(threads: int) -> dict[str, str]:
    """What the process must be started with, because OpenMP reads it first; as vLLM does for its CPU workers."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("VLLM_", "OMP_", "GOMP_", "KMP_"))}
    spec = importlib.util.find_spec("torch")
    libraries = Path(next(iter(spec.submodule_search_locations or ()))) / "lib" if spec else Path()
    return {
        **kept,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": "",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": ":".join(str(path) for path in sorted(libraries.glob("libgomp*.so*"))[:1]),
        "OMP_NUM_THREADS": str(threads),
        "GOMP_CPU_AFFINITY": " ".join(map(str, sorted(os.sched_getaffinity(0))[:threads])),
    }


def fit(calibration: Calibration, points: Sequence[Point], *, eager: bool = False) -> EngineCost:
    """The costs that explain best what remains of the steps when matrices and attention are taken off.

    Least squares of relative errors over a step, a layer, a sequence and an activation element. Ten points do not tell
    the four apart when they are noisy, so each is also drawn a little to the usual cost: being twice that weighs as
    much as an error of `DOUBT` in one point. What comes out negative is set to zero and the rest is found again.
    """
    machine = machine_of(this_cpu(), replace(calibration, engine=None, eager=None), eager=eager)
    nothing = replace(machine, engine=EngineCost(0.0, 0.0, 0.0, 1e-30, 0.0, 0.0, machine.engine.arrival_s))
    plain = linear_cost(nothing, PLAIN, "fp16-16")
    rows, rest = [], []
    for point in points:
        shape = shape_of(point.layers)
        known = step_cost(shape, nothing, plain, plain, point.batch).total
        elements = point.batch.tokens * shape.vector_elements
        rows.append([1.0, float(point.layers), point.batch.sequences, elements * 1e-6])
        rest.append(point.seconds - known)
    weight = torch.tensor([1 / point.seconds for point in points], dtype=torch.float64)
    usual = machine.engine
    pull = [DOUBT / cost for cost in (usual.step_s, usual.layer_s, usual.request_s, usual.element_s * 1e6)]
    matrix = torch.cat([torch.tensor(rows, dtype=torch.float64) * weight[:, None], torch.tensor(pull).double().diag()])
    target = torch.cat([torch.tensor(rest, dtype=torch.float64) * weight, torch.full((4,), DOUBT).double()])
    kept = list(range(matrix.shape[1]))
    values = [0.0] * matrix.shape[1]
    while kept:
        solution = torch.linalg.lstsq(matrix[:, kept], target[:, None]).solution[:, 0].tolist()
        negative = [place for place, value in zip(kept, solution, strict=True) if value < 0]
        if not negative:
            for place, value in zip(kept, solution, strict=True):
                values[place] = value
            break
        kept = [place for place in kept if place not in negative]
    step, layer, request, element = values
    return replace(
        machine.engine,
        step_s=step,
        layer_s=layer,
        request_s=request,
        element_s=max(element * 1e-6, 1e-15),
        source=f"measured on this machine with vLLM on {calibration.date}",
    )


def shape_of(layers: int) -> Shape:
    """The shape of a small model."""
    value = {"engine_config": {"model_id": "m", "hf_model_id": "m"}}
    model = load_object({"models": [value]}, "calibrate").models[0]
    shape = read_shape(Checkpoint.from_tensors(config_of(layers)), model, this_cpu())
    assert shape is not None
    return shape


# --- the child: holds the engine ------------------------------------------------------------------------


def child(folder: str, eager: bool) -> dict[str, dict[int, float]]:
    """Seconds of decode steps by batch and of prompts by tokens."""
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(
        model=folder,
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=16,
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        enforce_eager=eager,
        disable_log_stats=True,
        seed=0,
    )
    engine = llm.llm_engine
    chance = random.Random(0)
    names = iter(range(1 << 30))

    def add(count: int, tokens_in: int, tokens_out: int) -> list[str]:
        params = SamplingParams(temperature=0, max_tokens=tokens_out, ignore_eos=True, detokenize=False)
        added = []
        for _ in range(count):
            name = str(next(names))
            ids = [chance.randrange(3, 32000) for _ in range(tokens_in)]
            engine.add_request(name, TokensPrompt(prompt_token_ids=ids), params)
            added.append(name)
        return added

    watch = Watch(torch.get_num_threads())

    def finish() -> None:
        while engine.has_unfinished_requests():
            engine.step()

    def prompt(tokens: int) -> float:
        taken = []
        for _ in range(9):
            add(1, tokens, 1)
            taken.append(watch.timed(finish))
        return typical(taken[1:])

    def decode(batch: int) -> list[float]:
        waiting = set(add(batch, CONTEXT, STEPS + 2))
        while waiting:
            waiting -= {output.request_id for output in engine.step() if output.outputs[0].token_ids}
        taken = [watch.timed(engine.step) for _ in range(STEPS)]
        finish()
        return taken

    for warm in (1, 16):
        decode(warm)
    return {
        "decode": {batch: typical([*decode(batch), *decode(batch), *decode(batch)]) for batch in DECODES},
        "prompt": {tokens: prompt(tokens) for tokens in PROMPTS},
    }


if __name__ == "__main__":
    print("\n" + json.dumps(child(sys.argv[1], "eager" in sys.argv[2:])), flush=True)
