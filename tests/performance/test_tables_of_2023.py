"""The formulas against RayLLM's table of 2023, with the constants of its engine.

The engine's constants were fitted to the FP16 rows and the kernels to the 7B rows (see the sources of the profiles), so
this shows that one set of constants explains all rows, not that they were foreseen.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from helpers.predicted import LLAMA_7B, LLAMA_13B, LLAMA_70B, expected
from quantserve.predict.machine import ENGINE_2023
from quantserve.predict.workload import WORKLOADS

# Output tokens (E2E x tok/s) and decode-only ms per token ((E2E - TTFT) / (tokens - 1)) derived from the table.
ROWS = [
    (LLAMA_7B, 1, "fp16", 172, 362, 16.7),
    (LLAMA_7B, 1, "awq", 195, 994, 16.2),
    (LLAMA_13B, 1, "fp16", 141, 644, 26.6),
    (LLAMA_13B, 1, "awq", 138, 1695, 28.8),
    (LLAMA_70B, 4, "fp16", 139, 1073, 50.6),
    (LLAMA_70B, 4, "awq", 143, 2174, 54.6),
    (LLAMA_7B, 1, "squeezellm", 387, 13857, 73.9),
    (LLAMA_13B, 1, "squeezellm", 360, 21676, 118.7),
]
IDS = [f"{method}-{config['num_hidden_layers']}-layers" for config, _, method, *_ in ROWS]


@pytest.mark.parametrize(("config", "ranks", "method", "tokens", "ttft", "decode"), ROWS, ids=IDS)
def test_rows_within_thirty_percent(
    config: dict[str, Any], ranks: int, method: str, tokens: int, ttft: float, decode: float
) -> None:
    workload = replace(WORKLOADS["rayllm-2023"], output_tokens=tokens)
    prediction = expected(config, method, "a100-80g", ranks, ENGINE_2023, bits=16 if method == "fp16" else 4).predict(
        workload
    )
    assert prediction.tpot_ms == pytest.approx(decode, rel=0.3)
    assert prediction.ttft_ms == pytest.approx(ttft, rel=0.3)


@pytest.mark.parametrize("config", [LLAMA_7B, LLAMA_13B])
def test_squeezellm_of_2023_is_not_todays(config: dict[str, Any]) -> None:
    workload = WORKLOADS["rayllm-2023"]
    old = expected(config, "squeezellm", "a100-80g", engine=ENGINE_2023, bits=4).predict(workload)
    new = expected(config, "squeezellm", "a100-80g", bits=4).predict(workload)
    assert old.tpot_ms > 5 * new.tpot_ms
