"""The formulas against a measured CPU: kernels measured alone, then models measured through vLLM.

Both on 2026-11-25 on one thread of an AMD EPYC, by `make bench-kernels` and `make bench-decode`: the kernels' times are
averages over the four linears of Llama-2 7B, the model is the synthetic Llama of 0.84 billion parameters, compiled. The
engine's default costs were fitted to these fifteen cells, so this shows that four numbers explain them, and fails when
a formula changes.
"""

from __future__ import annotations

import pytest

from helpers.predicted import LLAMA_7B, model
from quantserve.checkpoint import Checkpoint
from quantserve.predict.calibration import Calibration
from quantserve.predict.machine import linear_cost, machine_of
from quantserve.predict.prediction import PLAIN
from quantserve.predict.shape import read_shape
from quantserve.predict.step import Batch, batch_of, step_cost
from quantserve.target import this_cpu

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
PICOSECONDS = {
    "fp16-16": (56.4, 59.0, 66.5, 82.4, 112.3, 178.2, 296.6, 543.9, 2056.8),
    "awq-4": (14.1, 15.3, 28.7, 52.5, 88.3, 158.0, 301.1, 556.2, 2124.7),
    "squeezellm-4": (13.4, 14.7, 19.4, 37.2, 78.9, 152.2, 300.7, 552.4, 2116.2),
}
MODEL = LLAMA_7B | {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 15,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
# Milliseconds: a prompt of 64 and of 512 tokens, a decode step of 1, 4 and 16 sequences of about 56 tokens.
MEASURED = {
    "fp16-16": (232.1, 1641.8, 46.58, 55.40, 98.63),
    "awq-4": (230.8, 1698.3, 16.53, 31.15, 86.22),
    "squeezellm-4": (240.4, 1714.0, 16.18, 25.02, 79.84),
}
BATCHES: list[Batch] = [
    *(batch_of([(tokens, 0, True)]) for tokens in (64, 512)),
    *(batch_of([(1, 56, True)] * count) for count in (1, 4, 16)),
]


@pytest.mark.parametrize("key", MEASURED)
@pytest.mark.parametrize("cell", range(5), ids=["prompt-64", "prompt-512", "decode-1", "decode-4", "decode-16"])
def test_steps_within_ten_percent(key: str, cell: int) -> None:
    kernels = {
        name: tuple((rows, 1e-12 * value) for rows, value in zip(ROWS, values, strict=True))
        for name, values in PICOSECONDS.items()
    }
    target = this_cpu()
    machine = machine_of(target, Calibration("2026-11-25T00:00:00+00:00", {}, {}, 1, 41.6e9, 500e9, kernels))
    shape = read_shape(Checkpoint.from_tensors(MODEL), model(), target)
    assert shape is not None
    quantized, plain = linear_cost(machine, PLAIN, key), linear_cost(machine, PLAIN, "fp16-16")
    made = 1000 * step_cost(shape, machine, quantized, plain, BATCHES[cell]).total
    assert made == pytest.approx(MEASURED[key][cell], rel=0.1)
