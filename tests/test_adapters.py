"""LoRA adapters on quantized weights: requests with none, one and another adapter in one batch of a real engine.

The reference is transformers in float32 on the dequantized weights, into which B A of the adapter is merged.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("vllm")
pytest.importorskip("transformers")

from helpers.adapters import ATTENTION, merge, write_adapter
from helpers.composed import composed
from helpers.engines import PROMPTS, Generation, compare, run
from helpers.plain import write_dequantized
from helpers.quantized import awq, squeezellm
from helpers.tiny_squeezellm import write_llama
from quantserve_awq.quantizer import Awq
from quantserve_squeezellm.quantizer import SqueezeLLM

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

METHODS = {
    "awq": (awq, Awq, {"group_size": 32}),
    "squeezellm": (squeezellm, SqueezeLLM, {"bits": 3, "sparsity": 0.5}),
}
CLEAR, CLOSE = 0.1, 0.1
"""Of float16 against float32: logits of tokens that must be equal, and log-probabilities."""


@pytest.mark.parametrize("method", METHODS)
def test_every_request_of_a_batch_has_its_own_adapter(method: str, tmp_path: Path) -> None:
    quantize, quantizer, options = METHODS[method]
    float32 = write_llama(tmp_path / "float32")
    quantize(float32, tmp_path / "model", **options)
    every = write_adapter(tmp_path / "every", float32, size=0.35, seed=1)
    some = write_adapter(tmp_path / "some", float32, rank=4, targets=ATTENTION[:3], size=0.5, use_rslora=True, seed=2)
    plain: dict[Path | None, Path] = {None: write_dequantized(tmp_path / "model", tmp_path / "plain", quantizer)}
    plain |= {adapter: merge(plain[None], adapter, tmp_path / f"{adapter.name}-merged") for adapter in (every, some)}

    composition = composed(
        tmp_path / "model", "cpu", dtype="float16", enforce_eager=True, enable_lora=True, max_loras=2, max_lora_rank=8
    )
    arguments = {key: setting.value for key, setting in composition.engine_kwargs.items()}
    adapters = [adapter for _ in PROMPTS for adapter in plain]
    ended = run(
        tmp_path / "model",
        composition.engine_environment,
        prompts=[prompt for prompt in PROMPTS for _ in plain],
        adapters=adapters,
        max_num_seqs=len(adapters),
        **arguments,
    )

    made: dict[Path | None, list[Generation]] = {adapter: [] for adapter in plain}
    for adapter, generation in zip(adapters, ended.generations, strict=True):
        made[adapter].append(generation)
    for adapter, generations in made.items():
        for other, reference in plain.items():
            if adapter == other:
                compare(reference, generations, clear=CLEAR, close=CLOSE)
            else:  # the comparison tells the adapters apart
                with pytest.raises(AssertionError, match="clear tokens differ"):
                    compare(reference, generations, clear=CLEAR, close=CLOSE)
