"""Packed weights stay on the device they are laid out for, and every kernel refuses what does not fit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import quantserve_kernels as kernels
from kernel_cases import affine, codebook
from quantserve_kernels import _fallback, _ops, _weight
from quantserve_kernels._checks import check_linear, layout_of

NAMES = ("x", "codes", "table", "scales", "zeros", "rows", "cols", "vals", "bias", "bits", "n", "k", "group_size")


def _layer() -> tuple[torch.nn.Module, kernels.Linear, torch.Tensor]:
    layer = kernels.Linear(affine(6, 64, 4, 32, sparse=0.1).weight)
    return torch.nn.Sequential(torch.nn.LayerNorm(64), layer), layer, torch.randn(3, 64)


@pytest.mark.parametrize(
    "move",
    [
        lambda model: model.to("meta"),
        lambda model: model.to("meta", torch.float16),
        lambda model: model.to_empty(device="meta"),
        lambda model: model._apply(lambda tensor: tensor.to("meta")),
    ],
)
def test_a_move_to_another_device_is_refused(move: Callable[[Any], Any]) -> None:
    model, layer, x = _layer()
    expected = layer(x)
    with pytest.raises(ValueError, match=r"is packed for cpu and cannot move to meta.* Fix: move the checkpoint's"):
        move(model)
    assert torch.equal(layer(x), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_move_to_a_gpu_that_is_not_there_raises() -> None:
    with pytest.raises((RuntimeError, AssertionError)):
        _layer()[0].cuda()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_change_of_dtype_leaves_the_packed_tensors_as_they_are(dtype: torch.dtype) -> None:
    model, layer, x = _layer()
    expected = layer(x)
    for changed in (model.to(dtype), model.to("cpu", dtype), model.half(), model.bfloat16(), model.double()):
        assert changed[1].table.dtype == torch.float32
        assert torch.equal(changed[1](x), expected)
    assert model[0].weight.dtype == torch.float64


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: layer.to("cpu"),
        lambda layer: layer.share_memory(),
        lambda layer: _saved(layer),
    ],
)
def test_copies_are_as_good(copied: Callable[[Any], Any]) -> None:
    _, layer, x = _layer()
    assert torch.equal(copied(layer)(x), layer(x))
    assert layer.state_dict() == {}


def _saved(layer: Any) -> Any:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _gpu_weight(kind: str, monkeypatch: pytest.MonkeyPatch) -> kernels.PackedWeight:
    """As `pack` makes it on a GPU, by the packers that run on any device."""
    if kind == "words":
        pytest.importorskip("triton")
    with monkeypatch.context() as patch:
        patch.setattr(_weight, "_layout_for", lambda *_: kind)
        return codebook(21, 136, 3, sparse=0.1).weight if kind == "tensor cores" else affine(21, 96, 3, 32).weight


@pytest.mark.parametrize("kind", ["words", "tensor cores"])
def test_gpu_weights_are_refused_on_a_cpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _gpu_weight(kind, monkeypatch)
    assert weight.layout == layout_of(weight.codes) == kind
    with pytest.raises(ValueError, match=r"codes are packed for GPUs .*Fix: move the checkpoint's tensors and pack"):
        kernels.linear(torch.randn(2, weight.k), weight)
    with pytest.raises(ValueError, match="packed for a GPU, and only CPU weights can be dequantized"):
        weight.dequantize()


def _on_gpu(weight: kernels.PackedWeight) -> dict[str, Any]:
    """The operator's arguments as tensors without data that call themselves CUDA's."""
    arguments = {"x": torch.randn(2, weight.k), "bias": torch.randn(weight.n)}
    arguments |= {name: getattr(weight, name) for name in NAMES if name not in arguments}
    with FakeTensorMode():
        return {
            name: torch.empty(value.shape, dtype=value.dtype, device="cuda:0") if torch.is_tensor(value) else value
            for name, value in arguments.items()
        }


def _as(value: Any, **changes: Any) -> Any:
    with FakeTensorMode():
        shape = changes.pop("shape", value.shape)
        return torch.empty(shape, **{"dtype": value.dtype, "device": value.device, **changes})


@pytest.mark.parametrize("kind", ["words", "tensor cores"])
def test_what_fits_passes_the_checks_of_the_gpu_kernels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = _on_gpu(_gpu_weight(kind, monkeypatch))
    assert check_linear(*(arguments[name] for name in NAMES)) == kind


@pytest.mark.parametrize("kind", ["words", "tensor cores"])
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda x: _as(x, shape=(2, 7)), r"x has shape \[2, 7\]"),
        ("x", lambda x: _as(x, dtype=torch.float64), r"x is torch\.float64; known"),
        ("x", lambda x: _as(x, device="cpu"), r"is on cuda:0 and x on cpu"),
        ("codes", lambda codes: _as(codes, shape=(*codes.shape[:-1], 5)), r"codes has shape"),
        ("codes", lambda codes: _as(codes, dtype=torch.int64), r"codes is torch\.int64"),
        ("codes", lambda codes: _as(codes, device="cpu"), r"codes are packed for GPUs and are on cpu.*Fix"),
        ("codes", lambda codes: _as(codes, dtype=torch.uint8, shape=(4608,)), r"codes are packed for CPUs .* cuda:0"),
        (
            "codes",
            lambda codes: _as(codes, shape=codes.shape[::-1]).permute(*range(codes.ndim)[::-1]),
            "not contiguous",
        ),
        ("table", lambda table: _as(table, shape=(5, 8)), r"table has shape \[5, 8\], expected \[21, 8\]"),
        ("table", lambda table: _as(table, dtype=torch.float16), r"table is torch\.float16"),
        ("table", lambda table: _as(table, device="cpu"), r"table is on cpu and x on cuda:0"),
        ("bias", lambda bias: _as(bias, shape=(20,)), r"bias has shape \[20\], expected \[21\]"),
        ("bias", lambda bias: _as(bias, device="cuda:1"), r"bias is on cuda:1 and x on cuda:0"),
        ("bits", lambda bits: 4, r"table has shape|codes has shape"),
        ("n", lambda n: 22, r"has shape"),
        ("n", lambda n: 2**31, r"below 2\^31"),
        ("group_size", lambda group: 40, r"group_size 40 does not divide k"),
    ],
)
def test_the_gpu_kernels_refuse_what_the_cpu_ones_do(
    kind: str, name: str, change: Callable[[Any], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = _on_gpu(_gpu_weight(kind, monkeypatch))
    arguments[name] = change(arguments[name])
    with pytest.raises((ValueError, TypeError), match=message):
        _ops._cuda_linear(*(arguments[name] for name in NAMES))


@pytest.mark.parametrize(
    ("kind", "name", "change", "message"),
    [
        ("words", "scales", lambda scales: _as(scales, shape=(3, 21)), r"scales has shape \[3, 21\], expected \[21"),
        ("words", "scales", lambda scales: None, r"zeros need scales"),
        ("words", "zeros", lambda zeros: _as(zeros, dtype=torch.float32), r"zeros is torch\.float32"),
        ("tensor cores", "rows", lambda rows: _as(rows, shape=(21,)), r"rows has shape \[21\], expected \[22\]"),
        ("tensor cores", "cols", lambda cols: _as(cols, dtype=torch.int64), r"cols is torch\.int64"),
        ("tensor cores", "cols", lambda cols: None, r"rows, cols and vals come together"),
        ("tensor cores", "vals", lambda vals: _as(vals, shape=(3,)), r"vals has shape \[3\]"),
        ("tensor cores", "scales", lambda _: torch.ones(21, 1), r"tensor cores, which take no scales"),
    ],
)  # fmt: skip
def test_the_gpu_kernels_refuse_side_data_that_does_not_fit(
    kind: str, name: str, change: Callable[[Any], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = _on_gpu(_gpu_weight(kind, monkeypatch))
    arguments[name] = change(arguments[name])
    with pytest.raises((ValueError, TypeError), match=message):
        _ops._cuda_linear(*(arguments[name] for name in NAMES))


@pytest.mark.parametrize("bits", kernels.BITS)
def test_a_scale_per_channel_becomes_a_codebook_only_where_it_must(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 bits go to Triton, which takes the scales: a codebook per channel would be 1 KiB a channel."""
    pytest.importorskip("triton")
    made = {}
    for kind in ("words", "tensor cores") if bits < 8 else ("words",):
        monkeypatch.setattr(_weight, "_layout_for", lambda *_, kind=kind: kind)
        made[kind] = affine(16, 64, bits, -1).weight
    assert made["words"].table.shape == (1, 2**bits)
    assert made["words"].scales.shape == made["words"].zeros.shape == (16, 1)
    if bits < 8:
        assert made["tensor cores"].table.shape == (16, 2**bits)
        assert made["tensor cores"].scales is None


def test_the_plain_torch_operator_checks_its_arguments_too() -> None:
    w = affine(6, 64, 4, 32).weight
    arguments = [torch.randn(2, 64), *(getattr(w, name, None) for name in NAMES[1:])]
    assert torch.equal(_ops._plain_linear(*arguments), _fallback.codebook_linear(*arguments))
    with pytest.raises(ValueError, match=r"codes has shape \[7\]"):
        _ops._plain_linear(arguments[0], torch.zeros(7, dtype=torch.uint8), *arguments[2:])
