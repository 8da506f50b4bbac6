"""A prompt with a token id that has no embedding is refused before it reaches the engine, which it would end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

MODEL = Path(__file__).parents[2] / "examples" / "demo-model" / "checkpoint"
ROWS = 4096
pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """vLLM's input processor for the demo model whose tokenizer_config.json names a special token nobody trained."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.renderers import renderer_from_config
    from vllm.v1.engine.input_processor import InputProcessor

    from quantserve.serve.replica.vllm.token_ids import bound_token_ids

    folder = tmp_path_factory.mktemp("model") / "m"
    shutil.copytree(MODEL, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "[PAD]"}))
    config = AsyncEngineArgs(model=str(folder), enforce_eager=True).create_engine_config()
    renderer = renderer_from_config(config)
    made = InputProcessor(config, renderer)
    bound_token_ids(made)
    yield made
    renderer.shutdown()


def check(processor: Any, **prompt: Any) -> None:
    processor._validate_model_input({"type": "token", **prompt}, prompt_type="decoder")


def test_the_tokenizer_emits_an_id_without_an_embedding(processor: Any) -> None:
    """Without the bound vLLM accepts it: this is the request that ended engines."""
    ids = processor.renderer.tokenizer("a [PAD] b")["input_ids"]
    assert max(ids) == ROWS
    processor.renderer.validate_token_ids(ids)


@pytest.mark.parametrize("ids", [[5, ROWS], [ROWS], [ROWS + 1], [1, 2, 10**6]])
def test_ids_without_an_embedding_are_refused(processor: Any, ids: list[int]) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=r"no embedding: the model has ids 0 to 4095|out of vocabulary"):
        check(processor, prompt_token_ids=ids)


def test_ids_with_an_embedding_pass(processor: Any) -> None:
    check(processor, prompt_token_ids=[0, 1, ROWS - 1])


def test_placeholders_of_media_may_lie_beyond(processor: Any) -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.multimodal.inputs import PlaceholderRange

    places = {"image": [PlaceholderRange(offset=1, length=2)]}
    processor.mm_encoder_cache_size = 100
    check(processor, type="multimodal", prompt_token_ids=[5, ROWS, ROWS, 5], mm_placeholders=places)
    with pytest.raises(VLLMValidationError, match="at position 3"):
        check(processor, type="multimodal", prompt_token_ids=[5, ROWS, ROWS, ROWS], mm_placeholders=places)
