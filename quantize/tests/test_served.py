"""What each quantizer writes of the demo model passes `check`, and an engine generates what its weights say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("vllm")

from helpers.composed import composed, errors
from helpers.engines import compare, run
from helpers.environments import ROOT
from helpers.plain import write_plain
from quantserve_quantize.dequantized import Dequantized
from quantserve_quantize.program import quantizer_class
from quantserve_quantize.run import Asked, quantize
from quantserve_quantize.source import Weights

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

DEMO = ROOT / "examples/demo-model"
ASKED = Asked(DEMO / "calibration.txt", samples=4, length=64)
METHODS: dict[str, dict[str, Any]] = {
    "awq": {},
    "squeezellm": {"sparsity": 0.45},
    "gptq": {"group_size": 64},
    "fp8": {},
    "bitsandbytes": {},
    "hqq": {},
}
QUESTIONS = ("What does str.join do?", "What is collections.Counter?", "What does json.dumps do?")


@pytest.mark.parametrize("method", METHODS)
def test_greedy_tokens_are_those_of_the_weights(method: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source, out = DEMO / "checkpoint", tmp_path / "out"
    _, kind = quantizer_class(method)
    quantize(source, out, kind(kind.Options(**METHODS[method])), method, ASKED)
    composition = composed(out, "cpu")
    assert not errors(composition)
    weights = Dequantized(out, kind)
    plain = write_plain(out, tmp_path / "plain", {name: weights.finite(name) for name in Weights(source).names})

    tokenizer = AutoTokenizer.from_pretrained(source)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        for text in QUESTIONS
    ]
    arguments = {name: setting.value for name, setting in composition.engine_kwargs.items()}
    exact = "float32" in (composition.method.dtypes if composition.method else ())
    arguments |= {"dtype": "float32"} if exact else {}
    ended = run(out, composition.engine_environment, prompts=prompts, tokens=24, **arguments, enforce_eager=True)
    near = 0.02 if exact else 0.3
    compare(plain, ended.generations, clear=near, close=near)
