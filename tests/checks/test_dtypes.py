"""The dtype vLLM runs a model in: every spelling, device and model type, and against vLLM's own decision."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helpers.checkpoints import make_llama
from helpers.composed import composed, errors, findings
from helpers.predicted import model
from quantserve.checkpoint import Checkpoint
from quantserve.model.dtypes import NO_FLOAT16, method_dtype, misspelt_dtype, served_dtype, stored_dtype
from quantserve.target import GIB, Target, find_target

PLAIN_CPU = Target("cpu", "cpu", 16 * GIB, count=1, cores=4, features=("avx2", "avx512f"))
BF16_CPU = replace(PLAIN_CPU, features=("avx2", "avx512f", "avx512_bf16"))
A100, T4, MI300 = find_target("a100-80g"), find_target("t4"), find_target("mi300x")


def checkpoint(model_type: str = "llama", tensors: tuple[str, ...] = (), **config: Any) -> Checkpoint:
    """A checkpoint with tensors of these dtypes."""
    files = {f"t{index}": (dtype, (4, 4)) for index, dtype in enumerate(tensors)}
    return Checkpoint.from_tensors({"model_type": model_type, **config}, files)


@pytest.mark.parametrize(
    ("config", "tensors", "stored"),
    [
        ({"torch_dtype": "half"}, (), "float16"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, ("F32",), "bfloat16"),
        ({"dtype": None, "torch_dtype": "float16"}, (), "float16"),
        ({"torch_dtype": "float"}, (), "float32"),
        ({"text_config": {"torch_dtype": "float16"}}, ("BF16",), "float16"),
        ({"torch_dtype": "bfloat16", "text_config": {"torch_dtype": "float16"}}, (), "bfloat16"),
        ({"vision_config": {"dtype": "bfloat16"}, "text_config": {}}, (), "bfloat16"),
        ({"decoder": {"torch_dtype": "float16"}}, (), "float16"),
        ({}, ("I32", "F16"), "float16"),
        ({}, ("F32", "BF16", "I32"), "float32"),
        ({}, ("I32",), None),
        ({}, (), None),
    ],
)
def test_the_stored_dtype_in_every_spelling(config: dict[str, Any], tensors: tuple[str, ...], stored: str) -> None:
    assert stored_dtype(checkpoint(tensors=tensors, **config)) == stored


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ({"torch_dtype": "torch.float16"}, "torch_dtype"),
        ({"dtype": "bf16"}, "dtype"),
        ({"torch_dtype": "auto"}, "torch_dtype"),
        ({"dtype": "float16", "text_config": {"torch_dtype": "Float16"}}, "text_config.torch_dtype"),
    ],
)
def test_a_dtype_torch_does_not_have_is_an_error(tmp_path: Path, config: dict[str, Any], path: str) -> None:
    folder = make_llama(tmp_path / "m", config=config)
    assert errors(composed(folder))["config-dtype-unknown"].offenders == (path,)
    for name in ("half", "double", "float8_e4m3fn", "int8"):
        assert misspelt_dtype(checkpoint(torch_dtype=name)) is None


# What auto becomes: model type, stored, target -> served.
AUTO = [
    ("llama", "float16", A100, "float16"),
    ("llama", "bfloat16", T4, "float16"),
    ("llama", "float32", T4, "float16"),
    ("llama", "float32", A100, "bfloat16"),
    ("llama", None, MI300, "bfloat16"),
    ("llama", "float16", BF16_CPU, "float16"),
    ("gemma2", "float16", A100, "bfloat16"),
    ("gemma3", "float16", PLAIN_CPU, "bfloat16"),
    ("gemma3_text", "bfloat16", T4, "float32"),
    ("glm4", "float16", MI300, "bfloat16"),
    ("paligemma", "float16", A100, "float16"),
    ("llama", "float64", A100, "bfloat16"),
    ("llama", "int8", A100, "bfloat16"),
]


@pytest.mark.parametrize(("model_type", "stored", "target", "served"), AUTO)
def test_auto(model_type: str, stored: str | None, target: Target, served: str) -> None:
    made = checkpoint(model_type, torch_dtype=stored)
    assert served_dtype(made, model(), target).name == served
    assert served_dtype(made, model(dtype="auto"), target).name == served


@pytest.mark.parametrize(
    ("arguments", "files", "architecture", "served"),
    [
        ({}, (), "Qwen3ForCausalLM", "bfloat16"),
        ({}, ("modules.json",), "Qwen3ForCausalLM", "float16"),
        ({}, (), "BertModel", "float16"),
        ({}, (), "Qwen3ForSequenceClassification", "float16"),
        ({"runner": "generate"}, ("modules.json",), "Qwen3ForCausalLM", "bfloat16"),
        ({"runner": "pooling"}, (), "Qwen3ForCausalLM", "float16"),
        ({"convert": "embed"}, (), "Qwen3ForCausalLM", "float16"),
    ],
)
def test_embedders_and_classifiers_in_float32(
    arguments: dict[str, str], files: tuple[str, ...], architecture: str, served: str
) -> None:
    config = {"model_type": "qwen3", "architectures": [architecture], "torch_dtype": "float32"}
    made = Checkpoint.from_tensors(config, files=dict.fromkeys(files, 1))
    assert served_dtype(made, model(**arguments), A100).name == served


@pytest.mark.parametrize(
    ("model_type", "stored", "target", "dtypes", "argument"),
    [
        ("llama", "float16", A100, ("float16", "bfloat16"), None),
        ("llama", "float16", BF16_CPU, ("float16", "bfloat16"), "bfloat16"),
        ("llama", "float16", PLAIN_CPU, ("float16", "bfloat16"), None),
        ("llama", "float16", BF16_CPU, ("float16",), None),
        ("llama", "bfloat16", A100, ("float16",), "float16"),
        ("gemma2", "bfloat16", A100, ("float16",), None),  # nothing fits: the core reports it
        ("gemma2", "float16", A100, ("float16", "bfloat16"), None),
        ("gemma2", "float16", T4, ("float16", "bfloat16", "float32"), None),
        ("llama", "bfloat16", A100, ("float32",), "float32"),
    ],
)
def test_what_a_method_asks_for(
    model_type: str, stored: str, target: Target, dtypes: tuple[str, ...], argument: str | None
) -> None:
    made = checkpoint(model_type, torch_dtype=stored)
    assert method_dtype(made, model(), target, dtypes) == argument
    assert method_dtype(made, model(dtype="auto"), target, dtypes) is None
    assert method_dtype(made, model(dtype="float32"), target, dtypes) is None


@pytest.mark.parametrize("model_type", sorted(NO_FLOAT16))
@pytest.mark.parametrize("method", ["fp16", "awq", "squeezellm"])
@pytest.mark.parametrize("target", ["cpu", "a100-80g"])
def test_no_plugin_plans_float16_where_vllm_refuses_it(
    tmp_path: Path, model_type: str, method: str, target: str
) -> None:
    folder = make_llama(tmp_path / "m", method, config={"model_type": model_type})
    composition = composed(folder, target)
    dtype = composition.engine_kwargs.get("dtype")
    assert dtype is None or dtype.value == "bfloat16"
    assert "dtype-refused-by-model" not in findings(composition)
    asked = errors(composed(folder, target, dtype="half"))["dtype-refused-by-model"]
    assert model_type in asked.message
    assert "bfloat16" in asked.fix


def test_a_model_that_no_dtype_of_the_method_runs(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", "awq", config={"model_type": "gemma2"})
    found = errors(composed(folder, "t4"))["dtype-unsupported"]
    assert "float32" in found.message
    assert "use another method" in found.fix


# --- against the installed vLLM -----------------------------------------------------------------------

MODEL_TYPES = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3",
    "gemma3_text", "gemma3n", "glm", "glm4", "glm4_moe", "phi3", "cohere", "cohere2", "granite", "olmo2", "starcoder2",
    "falcon", "bert", "paligemma", "qwen2_5_vl", "deepseek_v3", "gpt_oss", "smollm3", "jamba", "exaone4",
)  # fmt: skip
STORED = ("float16", "half", "bfloat16", "float32", "float", "double", "float8_e4m3fn", "int8", None)
ASKED = ("auto", "half", "float16", "bfloat16", "float32", "float")


@pytest.mark.vllm
@pytest.mark.parametrize("target", [A100, T4, MI300, PLAIN_CPU, find_target("v100")], ids=lambda t: t.name)
def test_every_decision_is_vllms(target: Target, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """vLLM's own function, on configs as transformers loads them, for 3,240 combinations."""
    import torch
    from transformers import PreTrainedConfig
    from vllm.config import model as theirs

    monkeypatch.setitem(sys.modules, "vllm._C_stable_libtorch", ModuleType("stub"))  # the CPU build has none
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import Platform

    class Pretended:
        def __init__(self) -> None:
            kind = CudaPlatformBase if target.device == "cuda" else Platform
            self.supported_dtypes = kind.supported_dtypes.fget(self)

        def has_device_capability(self, capability: int) -> bool:
            return (target.capability or 0) >= capability

        def is_cpu(self) -> bool:
            return False

        def get_device_name(self) -> str:
            return target.name

        def get_device_capability(self) -> None:
            return None

    if target.device != "cpu":
        monkeypatch.setattr(theirs, "current_platform", Pretended())
    assert frozenset(theirs._FLOAT16_NOT_SUPPORTED_MODELS) == NO_FLOAT16
    folder = str(tmp_path)  # without files, so that nothing is asked of the hub
    models = {
        (asked, pooling): model(dtype=asked, runner="pooling" if pooling else "generate")
        for asked, pooling in product(ASKED, (False, True))
    }
    for model_type, stored, asked, pooling in product(MODEL_TYPES, STORED, ASKED, (False, True)):
        config = PreTrainedConfig(**({} if stored is None else {"torch_dtype": stored}))
        config.model_type = model_type
        try:
            truth: torch.dtype | None = theirs._get_and_verify_dtype(folder, config, asked, is_pooling_model=pooling)
        except ValueError:
            truth = None
        made = checkpoint(model_type, torch_dtype=stored)
        ours = served_dtype(made, models[asked, pooling], target)
        case = (model_type, stored, asked, pooling, target.name)
        assert ours.refused == (truth is None), case
        assert truth is None or f"torch.{ours.name}" == str(truth), case


@pytest.mark.vllm
def test_every_spelling_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    import torch
    from vllm.transformers_utils.config import get_config
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    gemma = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
    spellings: list[dict[str, Any]] = [
        {"model_type": "llama", key: value}
        for key in ("dtype", "torch_dtype")
        for value in ("float16", "half", "float", "bfloat16", "double", "torch.float16", "bf16", "auto", "Half", "int8")
    ]
    spellings += [
        {"model_type": "llama", "dtype": "bfloat16", "torch_dtype": "float16"},
        gemma | {"text_config": {"model_type": "gemma3_text", "torch_dtype": "float16"}},
        gemma | {"vision_config": {"torch_dtype": "float16"}},
        gemma | {"torch_dtype": "bfloat16", "text_config": {"model_type": "gemma3_text", "torch_dtype": "float16"}},
        gemma | {"text_config": {"model_type": "gemma3_text", "torch_dtype": "fp16"}},
    ]
    for number, config in enumerate(spellings):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        made = Checkpoint.from_tensors(config)
        try:
            loaded = get_config(folder, trust_remote_code=False)
        except AttributeError:
            assert misspelt_dtype(made), config
            continue
        assert misspelt_dtype(made) is None, config
        found = ModelArchConfigConvertorBase.get_torch_dtype(loaded, str(folder), revision=None, config_format="hf")
        assert found == getattr(torch, stored_dtype(made) or "float32"), config
