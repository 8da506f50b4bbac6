"""The AWQ quantizer: what it writes, that its folds change nothing, what it refuses, and vLLM's answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    PreTrainedConfig,
    StableLmConfig,
)

from helpers.checkpoints import make_llama
from helpers.composed import composed, errors
from helpers.engines import run
from helpers.quantized import awq
from helpers.tokenizer import write_words
from quantserve.api import DISABLED_KERNELS, OUR_KERNEL, VLLM_KERNEL
from quantserve.errors import UsageError
from quantserve_awq.quantizer import Awq, AwqOptions
from quantserve_quantize import Quantized, Statistics
from quantserve_quantize.dequantized import Dequantized
from quantserve_quantize.run import Asked, quantize

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
LARGER = SMALL | {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "head_dim": 64,
    "max_position_embeddings": 512,
}


def make_model(folder: Path, config: PreTrainedConfig, deviation: float = 0.12, dtype: Any = torch.float16) -> Path:
    """A model with random weights, some inputs of its linears much larger than others, and a tokenizer of words."""
    generator = torch.Generator().manual_seed(5)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * deviation
        if "norm" in name and parameter.ndim == 1:
            parameter.data[::7] += 4
    model.to(dtype).save_pretrained(folder)
    write_words(folder, 97)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    numbers = torch.randint(97, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"w{number}" for number in numbers))
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("small") / "model", LlamaConfig(**SMALL))


class Noting(Awq):
    """Keeps the weights for which the tensors are meant to stand."""

    def __init__(self, options: AwqOptions) -> None:
        super().__init__(options)
        self.weights: dict[str, torch.Tensor] = {}

    def quantize(self, linear: Any, weight: torch.Tensor, statistics: Statistics) -> Quantized:
        made = super().quantize(linear, weight, statistics)
        self.weights[linear.name] = made.weight
        return made


class Unrounded(Awq):
    """Writes the weights as they are after scaling, as an unquantized checkpoint in float32."""

    def quantize(self, linear: Any, weight: torch.Tensor, statistics: Statistics) -> Quantized:
        return Quantized({"weight": weight}, weight)


def asked(text: Path) -> Asked:
    return Asked(text, samples=8, length=32)


def independent(folder: Path, module: str) -> np.ndarray[Any, Any]:
    """The weight of a linear, float32 [n, k], read nibble by nibble."""
    tensors = load_file(folder / "model.safetensors")
    words, zeros, scales = (tensors[f"{module}.{part}"].numpy() for part in ("qweight", "qzeros", "scales"))
    k, n = words.shape[0], words.shape[1] * 8
    weight = np.empty((n, k), np.float32)
    for channel in range(n):
        shift = np.uint32(4 * (0, 4, 1, 5, 2, 6, 3, 7)[channel % 8])
        code = words[:, channel // 8].view(np.uint32) >> shift & np.uint32(15)
        zero = zeros[:, channel // 8].view(np.uint32) >> shift & np.uint32(15)
        per_group = code.reshape(len(zeros), -1).astype(np.float32) - zero[:, None].astype(np.float32)
        weight[channel] = (per_group * scales[:, channel, None].astype(np.float32)).reshape(-1)
    return weight


@pytest.mark.parametrize("options", [{}, {"group_size": -1}, {"clip": False}, {"scales": "none"}, {"refine": False}])
def test_the_files_stand_for_the_weights_of_the_quantizer(
    small: Path, text: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    quantizer = Noting(AwqOptions(**{"group_size": 32, **options}))
    quantize(small, tmp_path / "out", quantizer, "awq", asked(text))
    assert len(quantizer.weights) == 2 * len(PROJECTIONS)
    for module, weight in quantizer.weights.items():
        assert np.array_equal(independent(tmp_path / "out", module), weight.numpy())
    assert not errors(composed(tmp_path / "out", "a100-80g"))


@pytest.mark.parametrize(
    ("config", "folded"),
    [
        (LlamaConfig(**SMALL), ["input_layernorm", "post_attention_layernorm"]),
        (LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True), ["input_layernorm", "post_attention_layernorm"]),
        (StableLmConfig(**SMALL), ["input_layernorm", "post_attention_layernorm"]),  # norms have a bias
        (Gemma3TextConfig(**SMALL), ["input_layernorm", "pre_feedforward_layernorm"]),  # norms multiply by 1 + w
        (Olmo2Config(**SMALL), []),  # norms come after the linears
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_folds_keep_the_output(text: Path, tmp_path: Path, config: PreTrainedConfig, folded: list[str]) -> None:
    """Before rounding, every architecture answers as it did; scales went where its structure allows."""
    dtype = torch.bfloat16 if "gemma" in config.model_type else torch.float16
    source = make_model(tmp_path / "model", config, dtype=dtype)
    quantize(source, tmp_path / "out", Unrounded(AwqOptions(group_size=32)), "awq", asked(text))
    settings = json.loads((tmp_path / "out/config.json").read_text())
    del settings["quantization_config"]
    (tmp_path / "out/config.json").write_text(json.dumps(settings))
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    for layer in (0, 1):
        norms = {f"model.layers.{layer}.{norm}.weight" for norm in folded}
        assert {name for name in changed if f".{layer}." in name and "norm.weight" in name} == norms
        assert {f"model.layers.{layer}.mlp.{one}_proj.weight" for one in ("up", "down")} < changed
        assert {f"model.layers.{layer}.self_attn.{one}_proj.weight" for one in ("v", "o")} < changed
    ids = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
            for folder in (source, tmp_path / "out")
        )
    biased = any(name.endswith(".bias") for name in changed)  # and rounded to float16 again
    assert (found - expected).abs().max() < (1e-2 if biased else 1e-4) * expected.std()


def test_scales_clipping_and_refinement_lower_the_error(small: Path, text: Path, tmp_path: Path) -> None:
    ids = torch.randint(97, (8, 32), generator=torch.Generator().manual_seed(2))

    def error(**options: Any) -> float:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        quantize(small, out, Awq(AwqOptions(group_size=32, **options)), "awq", asked(text))
        with torch.no_grad():
            return float((dequantized(out)(ids).logits - dequantized(small)(ids).logits).square().mean())

    plain = error(scales="none", clip=False, refine=False)
    assert error(scales="none", refine=False) < 0.95 * plain
    scaled = error(clip=False, refine=False)
    assert scaled < 0.8 * plain
    paper = error(refine=False)
    assert paper < scaled
    assert error() < paper


def dequantized(folder: Path) -> LlamaForCausalLM:
    """transformers' model, in float32, of a checkpoint or of the weights for which a quantized one stands."""
    weights = Dequantized(folder, Awq)
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**settings)).float().eval()
    model.load_state_dict({name: weights.finite(name) for name in model.state_dict()})
    return model


def test_plain_rounding_needs_no_text(small: Path, tmp_path: Path) -> None:
    awq(small, tmp_path / "out", group_size=32)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
    }
    assert config.get("dtype", config.get("torch_dtype")) == "float16"
    before, after = load_file(small / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in PROJECTIONS:
            assert torch.equal(after[name], tensor)
            continue
        step = after[f"{module}.scales"].float().T.repeat_interleave(32, 1)
        distance = (torch.from_numpy(independent(tmp_path / "out", module)) - tensor.float()).abs()
        assert (distance <= step * 1.01).all()
        assert distance.mean() < 0.26 * step.mean()
    assert "calibration" not in json.loads((tmp_path / "out/quantserve.json").read_text())


def test_what_cannot_be_quantized_is_refused(small: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="group_size is 96; expected one of 32, 64, 128, -1"):
        awq(small, out, group_size=96)
    with pytest.raises(UsageError, match=r"(?s)down_proj: K is 96, not a multiple .* 64\n.*--group-size 32, which"):
        awq(small, out, group_size=64)
    odd = make_llama(tmp_path / "odd", hidden=36, heads=3, kv_heads=3, intermediate=96)
    with pytest.raises(UsageError, match="N is 36, not a multiple of the 8 codes in a word"):
        awq(odd, out, group_size=-1)
    assert not out.exists()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[int, Path]:
    """Checkpoints large enough for answers with clear preferences, by group size."""
    folder = tmp_path_factory.mktemp("served")
    source = make_model(folder / "model", LlamaConfig(**LARGER))
    made = {group: folder / str(group) for group in (64, 128)}
    for group, out in made.items():
        quantize(source, out, Awq(AwqOptions(group_size=group)), "awq", asked(text))
    return made


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "options", "sure"),
    [
        (OUR_KERNEL, {"dtype": "float16", "enforce_eager": True}, 0.15),
        (OUR_KERNEL, {}, 0.3),  # as planned: compiled, and in bfloat16 where the CPU multiplies that itself
        (OUR_KERNEL, {"dtype": "float16", "enforce_eager": True, "tensor_parallel_size": 2}, 0.15),
        (VLLM_KERNEL, {"dtype": "float16", "enforce_eager": True}, 0.15),
    ],
    ids=["ours", "ours-compiled", "ours-two-ranks", "vllms"],
)
def test_vllm_answers_like_transformers_in_float32(
    served: dict[int, Path], kernel: str, options: dict[str, object], sure: float
) -> None:
    # Half of down_proj's 384 inputs is no whole number of groups of 128.
    folder = served[64 if options.get("tensor_parallel_size") else 128]
    generator = torch.Generator().manual_seed(11)
    prompts = [torch.randint(3, 512, (length,), generator=generator).tolist() for length in (5, 17, 40, 64)]
    composition = composed(folder, "cpu")
    kwargs = {key: setting.value for key, setting in composition.engine_kwargs.items()} | options
    assert kwargs["quantization"] == "awq"
    environment = composition.engine_environment | {
        DISABLED_KERNELS: OUR_KERNEL if kernel == VLLM_KERNEL else VLLM_KERNEL
    }
    ended = run(folder, environment, prompts=prompts, tokens=32, max_model_len=256, seed=0, **kwargs)
    assert f"Using {kernel} for mixed-precision linear" in ended.output
    if kernel == OUR_KERNEL:
        assert "Quantized linear layers: " in ended.output

    reference = dequantized(folder)
    clear = 0
    for prompt, answer in ((one.prompt, one.tokens) for one in ended.generations):
        assert len(answer) == 32
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        best = logits.topk(2)
        gaps = best.values[:, 0] - best.values[:, 1]
        for token, expected, gap in zip(answer, best.indices[:, 0].tolist(), gaps.tolist(), strict=True):
            if gap > sure * logits.std():
                clear += 1
                assert token == expected
    assert clear >= (64 if sure < 0.2 else 32)  # of 128
