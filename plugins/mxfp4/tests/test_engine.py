"""gpt-oss's experts through vLLM's layers and a vLLM engine on a CPU, against transformers on the same files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("vllm")
pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.fused_moe import config as moe_config
from vllm.model_executor.layers.quantization import get_quantization_config

import quantserve_mxfp4
from helpers.engines import compare, generate
from helpers.plain import write_plain
from helpers.vllm_layers import become, engine
from quantserve_kernels.vllm import experts

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(torch.cuda.is_available(), reason="MXFP4 stays on vLLM's kernels where there is a GPU"),
]
DATA = Path(__file__).parent / "data" / "gpt-oss"
PREFIX = "model.layers.0.mlp.experts"
EXPERTS, HIDDEN, WIDTH, CHOICES = 4, 96, 64, 2
STACKS = {"gate_up_proj": (2 * WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}


_engine = engine(quantserve_mxfp4.register, VLLM_PLUGINS="mxfp4")


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Let layers made from now on believe they are one rank of several."""

    def rank_of(rank: int, ranks: int) -> None:
        get_current_vllm_config().compilation_config.static_forward_context.clear()
        become(monkeypatch, rank, ranks)
        monkeypatch.setattr(moe_config, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(experts, "get_tensor_model_parallel_world_size", lambda: ranks)

    return rank_of


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """Of the first layer's experts."""
    files = load_file(DATA / "model.safetensors")
    return {name: tensor for name, tensor in files.items() if name.startswith(f"{PREFIX}.")}


def dequantized(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with the experts that transformers makes of them, [e, k, n] in float32."""
    made = {name: one.float() for name, one in tensors.items() if not name.endswith(("_blocks", "_scales"))}
    for name in [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]:
        made[name] = convert_moe_packed_tensors(
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dtype=torch.float32
        )
    return made


def routed(tensors: dict[str, Tensor], ranks: int = 1) -> Any:
    """vLLM's layer for the experts of gpt-oss with these weights."""
    get_current_vllm_config().compilation_config.static_forward_context.clear()
    config = get_quantization_config("mxfp4").from_config({"quant_method": "mxfp4"})
    config.maybe_update_config(str(DATA))
    layer = FusedMoEFactory(
        num_experts=EXPERTS, top_k=CHOICES, hidden_size=HIDDEN, intermediate_size=WIDTH, quant_config=config,
        prefix=PREFIX, activation="swigluoai", has_bias=True, tp_size=ranks,
    )  # fmt: skip
    renamed = config.get_checkpoint_weight_mapper().apply(tensors.items())
    list(layer.load_weights((name.removeprefix(f"{PREFIX}."), tensor) for name, tensor in renamed))
    layer.routed_experts.quant_method.process_weights_after_loading(layer.routed_experts)
    return layer.routed_experts


def test_other_engines_keep_vllms_method() -> None:
    from quantserve_kernels.vllm.asked import asked_for

    assert not asked_for("quantserve-mxfp4:mxfp4", {"VLLM_PLUGINS": "other"})
    format = get_quantization_config("mxfp4")
    assert format.__name__ == "Mxfp4"
    for declared in ("mxfp4", "gpt_oss_mxfp4"):
        assert format.override_quantization_method({"quant_method": declared}, None, hf_config=None) == "mxfp4"
    assert format.override_quantization_method({"quant_method": "awq"}, None, hf_config=None) is None


def test_weights_are_those_that_transformers_dequantizes(tensors: dict[str, Tensor]) -> None:
    """Bit for bit, with every scale that is none of NaN and overflow."""
    name, every = f"{PREFIX}.down_proj_scales", torch.arange(253, dtype=torch.uint8)
    tensors[name].view(-1)[: len(every)] = every
    layer, matrices = routed(tensors), dequantized(tensors)
    for stack, weight in (("gate_up_proj", layer.w13), ("down_proj", layer.w2)):
        expected = matrices[f"{PREFIX}.{stack}"].transpose(1, 2)
        assert torch.equal(weight.dequantize().view(expected.shape), expected)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("size", [1.0, 20.0])
def test_ranks_add_up_to_transformers_experts(
    tensors: dict[str, Tensor], ranks: int, size: float, as_rank: Callable[[int, int], None]
) -> None:
    """With inputs so large that gate and up are clamped, and without."""
    reference = GptOssExperts(GptOssConfig.from_pretrained(DATA))
    reference.load_state_dict({name.removeprefix(f"{PREFIX}."): one for name, one in dequantized(tensors).items()})
    drawn = torch.Generator().manual_seed(0)
    x = size * torch.randn(7, HIDDEN, generator=drawn)
    ids = torch.stack([torch.randperm(EXPERTS, generator=drawn)[:CHOICES] for _ in x]).to(torch.int32)
    weights = torch.rand(len(x), CHOICES, generator=drawn)
    total = torch.zeros_like(x)
    for rank in range(ranks):
        as_rank(rank, ranks)
        total += routed(tensors, ranks).forward_modular(x, weights, ids)
    with torch.no_grad():
        expected = reference(x, ids.long(), weights)
    assert (total - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(("exponent", "message"), [(255, "not finite"), (254, "infinity"), (253, "infinity")])
def test_scales_that_are_no_numbers_are_refused(tensors: dict[str, Tensor], exponent: int, message: str) -> None:
    tensors[f"{PREFIX}.down_proj_scales"][2, 5, 1] = exponent
    with pytest.raises(ValueError, match=rf"{PREFIX}\.down_proj: .*{message}"):
        routed(tensors)


@pytest.mark.parametrize("suffix", ["blocks", "scales", "bias"])
def test_a_tensor_that_never_arrives_is_named(tensors: dict[str, Tensor], suffix: str) -> None:
    del tensors[f"{PREFIX}.down_proj_{suffix}"]
    missing = r": the checkpoint lacks its bias" if suffix == "bias" else rf".*down_proj\.{suffix}"
    with pytest.raises(ValueError, match=rf"{PREFIX}\.down_proj{missing}"):
        routed(tensors)


def test_blocks_that_ranks_would_cut_are_refused(
    tensors: dict[str, Tensor], as_rank: Callable[[int, int], None]
) -> None:
    as_rank(0, 4)
    with pytest.raises(ValueError, match="multiples of 32, but 64 over 4 ranks is 16"):
        routed(tensors, 4)


def plain(folder: Path, destination: Path) -> Path:
    """The files with the experts that transformers makes of them."""
    return write_plain(folder, destination, dequantized(load_file(folder / "model.safetensors")))


@pytest.mark.slow
def test_an_engine_gives_the_tokens_of_transformers(tmp_path: Path) -> None:
    """With sinks, sliding windows and biases."""
    generations = generate(DATA, "mxfp4", dtype="float32", enforce_eager=True)
    compare(plain(DATA, tmp_path / "plain"), generations, clear=1e-3, close=1e-3)
