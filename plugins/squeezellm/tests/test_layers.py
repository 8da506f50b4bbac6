"""vLLM's own parallel layers with our linear method, every rank of up to four, against slices of the dense weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("vllm")

import torch
from vllm.lora.layers import RowParallelLinearWithLoRA
from vllm.model_executor.layers import linear

import quantserve_squeezellm
from helpers.tiny_squeezellm import pack_by_the_book
from helpers.vllm_layers import FUSED, engine, load, ranks
from quantserve_squeezellm._packing import dequantize, to_csr
from quantserve_squeezellm._vllm import SqueezeLLM

pytestmark = pytest.mark.vllm

K = 128
ATTENTION = "model.layers.0.self_attn"
Layer = Callable[..., Any]


_engine = engine(quantserve_squeezellm.register)
as_rank = pytest.fixture(ranks)


def _tensors(bits: int, n: int, k: int, seed: int, sparse: bool = True) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n, k), generator=g)
    tensors = {
        "qweight": pack_by_the_book(codes.tolist(), bits),
        "lookup_table": torch.randn(n, 2**bits, generator=g),
    }
    if sparse:
        tensors |= to_csr(torch.randn(n, k, generator=g) * (torch.rand(n, k, generator=g) < 0.05))
        tensors["full_rows"] = torch.randn(k, 2, generator=g)
        tensors["full_row_indices"] = torch.tensor([n - 1, 1], dtype=torch.int32)
    return tensors


def _config(bits: int, **options: Any) -> SqueezeLLM:
    config = SqueezeLLM.from_config({"quant_method": "squeezellm", "wbits": bits, **options})
    config.packed_modules_mapping = FUSED
    return config


def _out(layer: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = layer.quant_method.apply(layer, x)
    return out


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_fused_attention_with_fewer_key_heads_than_ranks(bits: int, ranks: int, as_rank: Callable[..., None]) -> None:
    heads, kv_heads, size = 8, 2, 16
    parts = {
        "q": _tensors(bits, heads * size, K, 1),
        "k": _tensors(bits, kv_heads * size, K, 2, sparse=False),
        "v": _tensors(bits, kv_heads * size, K, 3),
    }
    weights = {shard: dequantize(tensors) for shard, tensors in parts.items()}
    x = torch.randn(3, K)
    for rank in range(ranks):
        as_rank(rank, ranks)
        layer = linear.QKVParallelLinear(
            K, size, heads, kv_heads, bias=False, quant_config=_config(bits), prefix=f"{ATTENTION}.qkv_proj"
        )
        out = _out(load(layer, parts), x)
        kv_ranks = min(ranks, kv_heads)
        kv = rank * kv_ranks // ranks
        expected = [weights["q"].chunk(ranks)[rank], weights["k"].chunk(kv_ranks)[kv], weights["v"].chunk(kv_ranks)[kv]]
        assert torch.allclose(out, x @ torch.cat(expected).t(), atol=1e-4)


@pytest.mark.parametrize("bits", [3, 4])
def test_merged_column_and_row_layers_add_up_over_ranks(bits: int, as_rank: Callable[..., None]) -> None:
    n, ranks = 96, 2
    up = {0: _tensors(bits, n, K, 4), 1: _tensors(bits, n, K, 5)}
    down = {None: _tensors(bits, n, K, 6)}
    x = torch.randn(5, K)
    gates, ups, total = [], [], torch.zeros(5, n)
    for rank in range(ranks):
        as_rank(rank, ranks)
        merged = linear.MergedColumnParallelLinear(
            K, [n, n], bias=False, quant_config=_config(bits), prefix="model.layers.0.mlp.gate_up_proj"
        )
        gate_part, up_part = _out(load(merged, up), x).chunk(2, dim=1)
        gates.append(gate_part)
        ups.append(up_part)
        row = linear.RowParallelLinear(
            K, n, bias=False, quant_config=_config(bits), prefix="model.layers.0.mlp.down_proj"
        )
        total += _out(load(row, down), x.chunk(ranks, dim=1)[rank])
    assert torch.allclose(torch.cat(gates, 1), x @ dequantize(up[0]).t(), atol=1e-4)
    assert torch.allclose(torch.cat(ups, 1), x @ dequantize(up[1]).t(), atol=1e-4)
    assert torch.allclose(total, x @ dequantize(down[None]).t(), atol=1e-4)


def test_a_plain_column_layer_and_a_replicated_one_on_the_last_rank(as_rank: Callable[..., None]) -> None:
    tensors = _tensors(4, 64, K, 7)
    x = torch.randn(2, K)
    as_rank(1, 2)
    column = linear.ColumnParallelLinear(K, 64, bias=False, quant_config=_config(4), prefix="model.layers.0.fc")
    assert torch.allclose(_out(load(column, {None: tensors}), x), x @ dequantize(tensors)[32:].t(), atol=1e-4)
    replicated = linear.ReplicatedLinear(K, 64, bias=False, quant_config=_config(4), prefix="model.layers.0.gate")
    assert torch.allclose(_out(load(replicated, {None: tensors}), x), x @ dequantize(tensors).t(), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sparse", [False, True])
def test_weights_rest_packed_and_in_full_precision_whatever_the_dtype(dtype: torch.dtype, sparse: bool) -> None:
    tensors = _tensors(4, 64, K, 8, sparse=sparse)
    torch.set_default_dtype(dtype)  # as vLLM does while it loads
    try:
        layer = load(_row(), {None: tensors})
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(layer.kernel.table, tensors["lookup_table"])
    held = sum(t.nbytes for t in [*layer.parameters(), *layer.buffers()])
    assert held == 64 * K // 2 + 4 * 64 * 16 + (8 * layer.kernel.vals.numel() + 4 * 65 if sparse else 0)
    x = torch.randn(2, K)
    assert torch.allclose(_out(layer, x), x @ dequantize(tensors).t(), atol=1e-4)
    assert _out(layer, x.to(dtype)).dtype == dtype


def test_lora_wraps_the_packed_layer() -> None:
    """vLLM's wrapper asks for `qweight`."""
    layer = load(_row(), {None: _tensors(4, 64, K, 9)})
    assert layer.qweight is layer.kernel.codes  # no second copy
    assert RowParallelLinearWithLoRA(layer).device.type == "cpu"


def test_a_bias_that_was_rounded_to_infinity_is_refused() -> None:
    name = "model.layers.3.mlp.down_proj"
    layer = linear.RowParallelLinear(K, 64, bias=True, quant_config=_config(4), params_dtype=torch.float16, prefix=name)
    layer.bias.data.copy_(torch.full((64,), 1e5))  # beyond float16
    with pytest.raises(ValueError, match=r"layers\.3\.mlp\.down_proj: bias holds 64 values .* not finite in float16"):
        load(layer, {None: _tensors(4, 64, K, 10)})


def _row(bits: int = 4, **options: Any) -> Any:
    name = "model.layers.0.mlp.down_proj"
    return linear.RowParallelLinear(K, 64, bias=False, quant_config=_config(bits, **options), prefix=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("lookup_table"), r"lacks model\.layers\.0\.mlp\.down_proj\.lookup_table"),
        (lambda t: t.pop("qweight"), r"lacks .*down_proj\.qweight"),
        (lambda t: t.pop("vals"), r"lacks .*down_proj\.vals"),
        (lambda t: t.pop("full_row_indices"), r"lacks .*down_proj\.full_row_indices"),
        (lambda t: t.update(lookup_table=torch.zeros(64, 8)), r"table has shape \[64, 8\], .* \[64, 16\] for 4 bits"),
        (
            lambda t: t.update(qweight=t["qweight"][:12]),
            r"qweight has shape \[12, 64\], .* \[16, 64\] .*in_features 128",
        ),
        (lambda t: t.update(qweight=t["qweight"].long()), r"torch\.int64, expected torch\.int32"),
        (lambda t: t.update(lookup_table=t["lookup_table"][:60]), r"shape \[60, 16\], .* \[64, 16\] .*out_features 64"),
        (lambda t: t.update(qweight=torch.cat([t["qweight"]] * 2, 1)), r"shape \[16, 128\], expected \[16, 64\]"),
        (lambda t: t.update(lookup_table=t["lookup_table"] * float("inf")), r"down_proj: table holds .* not finite"),
        (lambda t: t.update(cols=t["cols"] + 1), r"down_proj: cols holds"),
        (lambda t: t.update(full_rows=t["full_rows"].t()), r"down_proj: full_rows has shape \[2, 128\]"),
    ],
)
def test_a_wrong_or_missing_tensor_is_named_with_its_numbers(change: Callable[[Any], Any], message: str) -> None:
    tensors = _tensors(4, 64, K, 11)
    change(tensors)
    with pytest.raises(ValueError, match=message):
        load(_row(), {None: tensors})


def test_a_sparse_part_the_config_declares_must_come() -> None:
    declared = {"model.layers.0.mlp.down_proj": {"nnz": 3, "full_rows": 1}}
    with pytest.raises(ValueError, match=r"down_proj\.rows, .*down_proj\.full_rows"):
        load(_row(sparse=declared), {None: _tensors(4, 64, K, 12, sparse=False)})


@pytest.mark.parametrize(("bits", "k", "ranks"), [(4, 72, 2), (3, 96, 2)])
def test_a_rank_that_would_split_a_word_is_refused(bits: int, k: int, ranks: int, as_rank: Callable[..., None]) -> None:
    as_rank(0, ranks)
    with pytest.raises(ValueError, match=rf"{bits}-bit squeezellm needs .* {k} over {ranks} ranks is {k // ranks}"):
        linear.RowParallelLinear(k, 64, bias=False, quant_config=_config(bits), prefix="model.layers.0.mlp.down_proj")


@pytest.mark.parametrize("config", [{"wbits": 5}, {"wbits": "4"}, {"group_size": 128}])
def test_an_unknown_width_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"wbits"):
        SqueezeLLM.from_config(config)


def test_linears_left_unquantized_are_whole_groups() -> None:
    config = _config(4, modules_to_not_convert=["layers.3."])
    skipped = linear.RowParallelLinear(K, 64, bias=False, quant_config=config, prefix="model.layers.3.mlp.down_proj")
    assert isinstance(skipped.quant_method, linear.UnquantizedLinearMethod)
    config = _config(4, modules_to_not_convert=["k_proj"])
    with pytest.raises(ValueError, match=r"only .*k_proj of .*q_proj.*one fused layer|one fused layer.*k_proj"):
        linear.QKVParallelLinear(K, 16, 8, 2, bias=False, quant_config=config, prefix=f"{ATTENTION}.qkv_proj")


def test_registering_again_changes_nothing_and_foreign_checkpoints_are_not_claimed(tmp_path: Path) -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    quantserve_squeezellm.register()
    quantserve_squeezellm.register()
    assert QUANTIZATION_METHODS.count("squeezellm") == 1
    assert get_quantization_config("squeezellm") is SqueezeLLM
    for foreign in ({"quant_method": "awq", "bits": 4}, {"quant_method": "gptq", "wbits": 4}, {}):
        assert SqueezeLLM.override_quantization_method(foreign, None, hf_config=None) is None


def test_entries_of_original_files_that_carry_no_weights_are_dropped_while_loading() -> None:
    mapper = _config(4).get_checkpoint_weight_mapper()
    module = f"{ATTENTION}.q_proj"
    entries = [(f"sparse_threshold.{module}", 7), (f"{module}.startrows", 0), (f"{module}.rows", 1)]
    assert list(mapper.apply(entries)) == [(f"{module}.rows", 1)]
