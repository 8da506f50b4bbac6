"""The k-means quantizer: optimal enough, exact where it can be, whole or nothing on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.checkpoints import make_llama
from helpers.quantized import squeezellm as quantize
from helpers.tiny_squeezellm import projections, write_llama
from quantserve.api import Linear
from quantserve.errors import CheckpointError, UsageError
from quantserve_kernels import unpack_stream
from quantserve_quantize import Statistics
from quantserve_quantize.draft import join
from quantserve_squeezellm import _packing
from quantserve_squeezellm._kmeans import codebooks, encode
from quantserve_squeezellm.quantizer import SqueezeLLM, SqueezeLLMOptions


def quantize_matrix(weight: torch.Tensor, bits: int, sparsity: float = 0.0) -> Any:
    """The tensors of one weight, by suffix, every weight of the same cost."""
    n, k = weight.shape
    quantizer = SqueezeLLM(SqueezeLLMOptions(bits=bits, sparsity=sparsity, sensitivity="none"))
    return quantizer.quantize(Linear("model.layers.0.mlp.up_proj", n, k, "column"), weight, Statistics()).tensors


def _best_cost(values: torch.Tensor, weights: torch.Tensor, clusters: int) -> float:
    """The cost of the best possible weighted 1-D clustering of [k] values, by dynamic programming over all cuts."""
    values, order = values.double().sort()
    weights = weights.double()[order]
    k = len(values)
    cost = torch.full((k + 1, k + 1), float("inf"), dtype=torch.float64)
    cost.fill_diagonal_(0.0)
    for i in range(k):  # clusters that begin at i, by their ends
        mass = weights[i:].cumsum(0)
        distance = values[i:] - values[i]
        cost[i, i + 1 :] = (weights[i:] * distance**2).cumsum(0) - (weights[i:] * distance).cumsum(0) ** 2 / mass
    best = cost[0]
    for _ in range(clusters - 1):
        best = (best[:, None] + cost).min(0).values
    return float(best[-1])


def _rows(kind: str, n: int, k: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(n, k, generator=g)
    if kind == "heavy tails":
        rows /= torch.randn(n, k, 3, generator=g).square().mean(2).sqrt()
    return (rows * 8).round() / 8 if kind == "few values" else rows


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "few values"])
@pytest.mark.parametrize(("k", "clusters"), [(128, 8), (768, 16)])
def test_codebooks_come_close_to_the_best_possible_clustering(kind: str, weighted: bool, k: int, clusters: int) -> None:
    rows = _rows(kind, 6, k)
    weights = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)) ** 4 if weighted else rows * 0 + 1
    table = codebooks(rows, clusters, weights if weighted else None)
    found = (weights * (rows - table.gather(1, encode(rows, table).long())) ** 2).double().sum(1)
    pairs = zip(rows, weights, strict=True)
    best = torch.tensor([_best_cost(*pair, clusters) for pair in pairs], dtype=torch.float64)
    assert (found >= best * (1 - 1e-5)).all()
    assert (found / best).max() < 1.01
    assert (found / best).mean() < 1.002


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([3, 4]), st.integers(1, 8), st.integers(1, 4), st.integers(0, 2**31), st.data())
def test_a_channel_with_few_values_survives_exactly(bits: int, n: int, blocks: int, seed: int, data: Any) -> None:
    g = torch.Generator().manual_seed(seed)
    different = data.draw(st.integers(1, 2**bits))
    palette = torch.randn(n, different, generator=g)
    weight = palette.gather(1, torch.randint(0, different, (n, 32 * blocks), generator=g))
    assert torch.equal(_packing.dequantize(quantize_matrix(weight, bits)), weight)


def test_every_code_is_the_nearest_codebook_entry_and_every_entry_the_mean_of_its_weights() -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(2))
    tensors = quantize_matrix(weight, 4)
    codes, table = unpack_stream(tensors["qweight"], 4).long(), tensors["lookup_table"]
    assert torch.equal((weight[:, :, None] - table[:, None]).abs().argmin(2), codes)
    for entry in range(16):
        mine = codes == entry
        assert mine.any(1).all()
        assert torch.allclose(table[:, entry], (weight * mine).sum(1) / mine.sum(1), atol=1e-5)


def test_the_largest_magnitudes_stay_exact_and_do_not_pull_the_codebook() -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(3))
    weight[5, 7], weight[9, 100] = 1e4, -1e4
    tensors = quantize_matrix(weight, 3, sparsity=0.5)
    count = round(32 * 128 * 0.005)
    assert tensors["vals"].numel() == count
    kept = weight.abs().view(-1).topk(count).indices
    back = _packing.dequantize(tensors)
    assert torch.allclose(back.view(-1)[kept], weight.view(-1)[kept], rtol=1e-6)
    assert tensors["lookup_table"].abs().max() < 5
    assert (back - weight).square().mean() < (_packing.dequantize(quantize_matrix(weight, 3)) - weight).square().mean()


@pytest.mark.parametrize(("bits", "sparsity"), [(4, 0.0), (3, 0.5)])
def test_refinement_lowers_the_error_of_the_outputs(bits: int, sparsity: float) -> None:
    """By the Hessian of each row, in float64: its costs, and the correlations of the inputs."""
    made = torch.Generator().manual_seed(4)
    x = torch.randn(2000, 40, generator=made) @ torch.randn(40, 256, generator=made)
    x += torch.randn(2000, 256, generator=made)
    hessian = x.t() @ x / len(x)
    weight, gradients = torch.randn(48, 256, generator=made), torch.randn(48, 256, generator=made) ** 2
    gradients[7], gradients[:, 30] = 0.0, 0.0
    size = hessian.diagonal().rsqrt()
    correlation = (hessian * size * size[:, None]).double()
    losses = {}
    for refine in (0, 2):
        options = SqueezeLLMOptions(bits=bits, sparsity=sparsity, refine=refine)
        statistics = Statistics(hessian=hessian, squares=hessian.diagonal(), gradients=gradients)
        linear = Linear("model.layers.0.mlp.up_proj", 48, 256, "column")
        found = SqueezeLLM(options).quantize(linear, weight, statistics)
        assert torch.equal(found.weight, _packing.dequantize(dict(found.tensors)))
        assert float((found.weight - weight)[7].norm()) < {3: 0.4, 4: 0.2}[bits] * float(weight[7].norm())
        error = (found.weight - weight).double() * gradients.double().sqrt()
        losses[refine] = float((error @ correlation * error).sum())
    assert losses[2] < 0.6 * losses[0]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "float", dtype=torch.bfloat16)
    for name in ("a", "b"):
        quantize(source, tmp_path / name, bits=4, sparsity=0.2)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize(("bits", "sparsity"), [(4, 0.0), (3, 0.45)])
def test_a_folder_becomes_a_checkpoint_with_everything_it_needs(tmp_path: Path, bits: int, sparsity: float) -> None:
    source = write_llama(tmp_path / "float", dtype=torch.bfloat16, bias=True)
    quantize(source, tmp_path / "out", bits=bits, sparsity=sparsity)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "squeezellm"
    assert config["quantization_config"]["wbits"] == bits
    assert (tmp_path / "out/tokenizer_config.json").exists()
    for module, (n, k) in projections().items():
        original = before.pop(f"{module}.weight").float()
        layer = {suffix: after.pop(f"{module}.{suffix}") for suffix in ("qweight", "lookup_table")}
        assert layer["qweight"].shape == (k * bits // 32, n)
        assert layer["lookup_table"].shape == (n, 2**bits)
        if sparsity:
            layer |= {suffix: after.pop(f"{module}.{suffix}") for suffix in ("rows", "cols", "vals")}
            assert config["quantization_config"]["sparse"][module] == {"nnz": layer["vals"].numel()}
        error = (_packing.dequantize(layer) - original).square().mean() / original.square().mean()
        assert error < {3: 0.04, 4: 0.012}[bits]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_sharded_source_is_read_and_large_outputs_are_sharded(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "float")
    whole = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    parts = [source / f"part-{number}" for number in range(len(whole))]
    for path, (name, tensor) in zip(parts, whole.items(), strict=True):
        save_file({name: tensor}, path)
    join(parts, source, shard_bytes=700_000)
    for path in parts:
        path.unlink()
    shards = sorted(source.glob("*.safetensors"))
    assert len(shards) > 3
    index = json.loads((source / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for name, file in index["weight_map"].items():
        with safe_open(source / file, "pt") as shard:
            assert torch.equal(shard.get_tensor(name), whole[name])
    quantize(source, tmp_path / "out")
    assert "model.layers.1.mlp.down_proj.qweight" in load_file(tmp_path / "out/model.safetensors")


def _damage(source: Path, **changes: Any) -> None:
    path = source / "model.safetensors"
    state = load_file(path)
    state.update(changes)
    save_file(state, path)


def test_what_cannot_be_quantized_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "float")
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="bits is 5"):
        quantize(source, out, bits=5)
    with pytest.raises(UsageError, match="sparsity is 100; expected 0 to 50"):
        quantize(source, out, sparsity=100)
    with pytest.raises(CheckpointError, match="no model folder"):
        quantize(tmp_path / "absent", out)
    odd = write_llama(tmp_path / "odd")
    _damage(odd, **{"model.layers.0.mlp.up_proj.weight": torch.zeros(8, 40)})
    with pytest.raises(CheckpointError, match=r"up_proj.weight of .* is \[8, 40\]; config.json makes it \[384, 256\]"):
        quantize(odd, out)
    narrow = make_llama(tmp_path / "narrow", hidden=48, heads=3, kv_heads=3, intermediate=96)
    with pytest.raises(UsageError, match=r"q_proj: K is 48, not a multiple of 32"):
        quantize(narrow, out)
    nan = write_llama(tmp_path / "nan")
    _damage(nan, **{"model.layers.1.mlp.up_proj.weight": torch.full((384, 256), float("nan"))})
    with pytest.raises(CheckpointError, match="NaN or infinities"):
        quantize(nan, out)
    quantize(source, tmp_path / "done")
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize(tmp_path / "done", out)
    stamp = (tmp_path / "done/model.safetensors").stat()
    with pytest.raises(UsageError, match="exists and is left as it is"):
        quantize(source, tmp_path / "done")
    assert (tmp_path / "done/model.safetensors").stat() == stamp
    broken = write_llama(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="safetensors"):
        quantize(broken, out)
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))
