"""Two made-up formats in vLLM's own parallel layers, every rank of up to four, against float64 matrices.

`Affine` packs 4-bit codes along N, with a scale and a zero point per group. `Flat` stores all N x K codes in one
dimension, under suffixes with dots, with a codebook for each linear.
"""

from __future__ import annotations

import pickle
import random
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("quantserve")

import torch
from safetensors.torch import save_file
from torch import Tensor
from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
from vllm.lora.layers import RowParallelLinearWithLoRA
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.model_executor.models.utils import WeightsMapper

from helpers.vllm_layers import FUSED, become, load, surroundings
from quantserve.api import NK, K, N, Part, Scheme
from quantserve_kernels import PackedWeight, pack
from quantserve_kernels.vllm import CSR, Entries, Format, register

pytestmark = pytest.mark.vllm

HIDDEN, GROUP = 128, 32
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


class Affine(Format):
    """Codes int32 [k, n/8], the lowest nibble first; scales and zeros [k/32, n]; outliers anywhere."""

    name = "affine-of-the-tests"
    ragged = (("positions", "outliers"),)
    ignored = ("counts.", ".notes")

    def __init__(self, bits: Mapping[str, int] | None = None, **known: Any) -> None:
        super().__init__(**known)
        self.bits = bits or {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Affine:
        return cls(config.get("bits"), skipped=config.get("skip") or (), modules=config.get("outliers"))

    def scheme(self, module: str) -> Scheme | None:
        bits = self.bits.get(module.rpartition(".")[2], 4)
        return None if bits == 16 else Scheme(
            {
                "codes": Part((K(), N(8)), ("I32",)),
                "scales": Part((K(GROUP), N()), ("F16", "BF16", "F32")),
                "zeros": Part((K(GROUP), N()), ("U8",), optional=True),
                "positions": Part((None, 2), ("I64",), optional=True),
                "outliers": Part((None,), ("F32",), optional=True),
            },
            bits=bits,
            group_size=GROUP,
        )  # fmt: skip

    def promised(self, module: str) -> list[str]:
        return ["positions", "outliers"] if self.modules.get(module) else []

    def entries(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Entries:
        n_index, k_index = tensors["positions"].unbind(1)
        if n_index.numel() and int(n_index.max()) >= shape[0]:
            raise ValueError(f"positions holds out_feature {int(n_index.max())}, expected below {shape[0]}")
        return Entries(n_index, k_index, tensors["outliers"])

    def pack(self, tensors: Mapping[str, Tensor], sparse: CSR | None) -> PackedWeight:
        nibbles = [tensors["codes"] >> 4 * i & 15 for i in range(8)]
        codes = torch.stack(nibbles, dim=-1).flatten(1).t().to(torch.uint8)
        zeros = tensors["zeros"].t().to(tensors["scales"].dtype) if "zeros" in tensors else None
        table = torch.arange(16.0, device=codes.device)[None]
        scales = tensors["scales"].t()
        return pack(codes, table, bits=4, scales=scales, zeros=zeros, group_size=GROUP, sparse=sparse)


class Flat(Format):
    """A scale for 64 elements in a row; for each linear a codebook, factors for 64 in_features, and one for all."""

    name = "flat-of-the-tests"

    def scheme(self, module: str) -> Scheme:
        return Scheme(
            {
                "weight": Part((NK(2), 1), ("U8",)),
                "weight.absmax": Part((NK(64),), ("F32",)),
                "weight.book": Part((16,), ("F32",)),
                "weight.factors": Part((K(64),), ("F32",)),
                "weight.factor": (Part((), ("F32",)), Part((1,), ("F32",))),
            },
            bits=4,
            group_size=64,
        )

    def pack(self, tensors: Mapping[str, Tensor], sparse: CSR | None) -> PackedWeight:
        n = tensors["weight.factor"].shape[0]
        octets = tensors["weight"].reshape(n, -1)
        codes = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1)
        factors = tensors["weight.factors"] * tensors["weight.factor"][:, None]
        scales = tensors["weight.absmax"].reshape(n, -1) * factors
        return pack(codes, tensors["weight.book"], bits=4, scales=scales, group_size=64)


# --- checkpoints, and what they mean ---------------------------------------------------------------------------------


def affine(n: int, k: int, seed: int, *, outliers: int = 0, zeros: bool = True) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a linear, and its matrix [n, k] in float64."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=g)
    scales = (torch.rand(n, k // GROUP, generator=g) * 0.02 + 0.01).half()
    zero = torch.randint(0, 16, (n, k // GROUP), generator=g)
    shifted = codes.view(n, -1, GROUP) - (zero[:, :, None] if zeros else 0)
    matrix = (shifted.double() * scales.double()[:, :, None]).view(n, k)
    words = sum(codes.view(n // 8, 8, k)[:, i] << 4 * i for i in range(8))
    tensors = {"codes": words.t().to(torch.int32).contiguous(), "scales": scales.t().contiguous()}
    if zeros:
        tensors["zeros"] = zero.t().to(torch.uint8).contiguous()
    if outliers:
        flat = torch.randperm(n * k, generator=g)[:outliers]
        tensors["positions"] = torch.stack((flat // k, flat % k), dim=1)
        tensors["outliers"] = torch.randn(outliers, generator=g)
        matrix.view(-1)[flat] += tensors["outliers"].double()
    return tensors, matrix


def flat(n: int, k: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """The same of the other format."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=g)
    absmax, book = torch.rand(n * k // 64, generator=g) + 0.5, torch.randn(16, generator=g)
    factor, factors = torch.tensor(0.05 * seed), torch.rand(k // 64, generator=g)
    matrix = book.double()[codes].view(-1, 64) * absmax.double()[:, None] * factors.double().repeat(n)[:, None]
    matrix *= factor.double()
    pairs = codes.view(-1, 2)
    tensors = {
        "weight": (pairs[:, :1] | pairs[:, 1:] << 4).to(torch.uint8),
        "weight.absmax": absmax,
        "weight.book": book,
        "weight.factors": factors,
        "weight.factor": factor if seed % 2 else factor[None],
    }
    return tensors, matrix.view(n, k)


KINDS = {"affine": (Affine, affine), "flat": (Flat, flat)}


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    register(Affine, Flat)
    with surroundings(tmp_path_factory.mktemp("group")):
        yield


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    return partial(become, monkeypatch)


def made(kind: type[Format] = Affine, **config: Any) -> Format:
    format = kind.from_config(config)
    format.packed_modules_mapping = FUSED
    return format


def row(format: Format | None = None, n: int = 64, k: int = HIDDEN, **options: Any) -> Any:
    return linear.RowParallelLinear(
        k, n, quant_config=format or made(), prefix=f"{MLP}.down_proj", **{"bias": False, **options}
    )


def close(out: Tensor, x: Tensor, matrix: Tensor) -> None:
    torch.testing.assert_close(out.double(), x.double() @ matrix.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_attention_with_fewer_key_heads_than_ranks(kind: str, ranks: int, as_rank: Callable[..., None]) -> None:
    format, make = KINDS[kind]
    heads, kv_heads, size = 8, 2, 16
    made_of = {
        "q": make(heads * size, HIDDEN, 1),
        "k": make(kv_heads * size, HIDDEN, 2),
        "v": make(kv_heads * size, HIDDEN, 3),
    }
    x = torch.randn(3, HIDDEN)
    for rank in range(ranks):
        as_rank(rank, ranks)
        layer = linear.QKVParallelLinear(
            HIDDEN, size, heads, kv_heads, bias=False, quant_config=made(format), prefix=f"{ATTENTION}.qkv_proj"
        )
        load(layer, {shard: tensors for shard, (tensors, _) in made_of.items()})
        kv_ranks = min(ranks, kv_heads)
        kv = rank * kv_ranks // ranks
        q, k, v = (matrix for _, matrix in made_of.values())
        close(layer(x)[0], x, torch.cat((q.chunk(ranks)[rank], k.chunk(kv_ranks)[kv], v.chunk(kv_ranks)[kv])))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_add_up(kind: str, ranks: int, as_rank: Callable[..., None]) -> None:
    """Fused columns, then rows, whose partial sums are the whole."""
    format, make = KINDS[kind]
    (gate, gate_matrix), (up, up_matrix), (down, down_matrix) = (
        make(96, HIDDEN, 4),
        make(96, HIDDEN, 5),
        make(64, 256, 7),
    )
    x, wide, total = torch.randn(5, HIDDEN), torch.randn(5, 256), torch.zeros(5, 64)
    for rank in range(ranks):
        as_rank(rank, ranks)
        merged = linear.MergedColumnParallelLinear(
            HIDDEN, [96, 96], bias=False, quant_config=made(format), prefix=f"{MLP}.gate_up_proj"
        )
        load(merged, {0: gate, 1: up})
        close(merged(x)[0], x, torch.cat((gate_matrix.chunk(ranks)[rank], up_matrix.chunk(ranks)[rank])))
        layer = load(row(made(format), k=256, reduce_results=False), {None: down})
        total += layer(wide.chunk(ranks, dim=1)[rank])[0]
    close(total, wide, down_matrix)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_the_file_has_fused(kind: str, as_rank: Callable[..., None]) -> None:
    """Phi-3 stores qkv_proj and gate_up_proj as one linear each."""
    format, make = KINDS[kind]
    fused = made(format)
    fused.packed_modules_mapping = {}
    as_rank(1, 2)
    tensors, matrix = make(8 * 16 + 2 * 4 * 16, HIDDEN, 8)
    attention = linear.QKVParallelLinear(
        HIDDEN, 16, 8, 4, bias=False, quant_config=fused, prefix=f"{ATTENTION}.qkv_proj"
    )
    q, k, v = matrix.split((128, 64, 64))
    x = torch.randn(2, HIDDEN)
    close(load(attention, {None: tensors})(x)[0], x, torch.cat((q[64:], k[32:], v[32:])))
    tensors, matrix = make(192, HIDDEN, 9)
    merged = linear.MergedColumnParallelLinear(
        HIDDEN, [96, 96], bias=False, quant_config=fused, prefix=f"{MLP}.gate_up_proj"
    )
    close(load(merged, {None: tensors})(x)[0], x, torch.cat((matrix[48:96], matrix[144:])))


@pytest.mark.parametrize("kind", KINDS)
def test_column_and_replicated_layers(kind: str, as_rank: Callable[..., None]) -> None:
    format, make = KINDS[kind]
    tensors, matrix = make(64, HIDDEN, 10)
    x = torch.randn(2, HIDDEN)
    as_rank(1, 2)
    column = linear.ColumnParallelLinear(HIDDEN, 64, bias=False, quant_config=made(format), prefix="model.fc")
    close(load(column, {None: tensors})(x)[0], x, matrix[32:])
    everywhere = linear.ReplicatedLinear(HIDDEN, 64, bias=False, quant_config=made(format), prefix="model.gate")
    close(load(everywhere, {None: tensors})(x)[0], x, matrix)


def test_outliers_reach_the_rank_they_belong_to(as_rank: Callable[..., None]) -> None:
    parts = {
        "q": affine(128, HIDDEN, 11, outliers=90),
        "k": affine(32, HIDDEN, 12),
        "v": affine(32, HIDDEN, 13, outliers=20),
    }
    x = torch.randn(3, HIDDEN)
    q, _, v = (matrix for _, matrix in parts.values())
    k = parts["k"][1]
    for rank in range(4):
        as_rank(rank, 4)
        layer = linear.QKVParallelLinear(
            HIDDEN, 16, 8, 2, bias=False, quant_config=made(), prefix=f"{ATTENTION}.qkv_proj"
        )
        load(layer, {shard: tensors for shard, (tensors, _) in parts.items()})
        kv = rank // 2
        close(layer(x)[0], x, torch.cat((q.chunk(4)[rank], k.chunk(2)[kv], v.chunk(2)[kv])))
    tensors, matrix = affine(64, HIDDEN, 14, outliers=50)
    total = torch.zeros(3, 64)
    for rank in range(2):
        as_rank(rank, 2)
        total += load(row(reduce_results=False), {None: tensors})(x.chunk(2, dim=1)[rank])[0]
    close(total, x, matrix)


def test_scales_keep_the_dtype_of_the_file_and_x_may_have_any() -> None:
    tensors, matrix = affine(64, HIDDEN, 15)
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it loads
    try:
        layer = load(row(), {None: tensors})
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.kernel.scales.dtype == torch.float16
    x = torch.randn(2, HIDDEN)
    close(layer(x)[0], x, matrix)
    for dtype in (torch.float16, torch.bfloat16):
        out = layer(x.to(dtype))[0]
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), x.to(dtype).double() @ matrix.t(), rtol=0.02, atol=0.05)


class Thirds(Format):
    """Codes of 4 bits for a table that bfloat16 cannot hold, made without a dtype."""

    name = "thirds-of-the-tests"

    def scheme(self, module: str) -> Scheme | None:
        return Scheme({"codes": Part((N(), K()), ("U8",))}, bits=4)

    def arrange(self, suffix: str, tensor: Tensor, scheme: Scheme, shape: tuple[int, int]) -> Tensor:
        assert torch.tensor([1 / 3]).dtype == torch.float32
        return tensor

    def pack(self, tensors: Mapping[str, Tensor], sparse: CSR | None) -> PackedWeight:
        return pack(tensors["codes"], torch.tensor([[code / 3 for code in range(16)]]), bits=4)


def test_the_code_of_a_format_has_float32_as_default_while_vllm_loads_in_another_dtype() -> None:
    codes = torch.randint(0, 16, (64, HIDDEN), dtype=torch.uint8)
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it loads
    try:
        layer = linear.RowParallelLinear(HIDDEN, 64, bias=False, quant_config=Thirds(), prefix=f"{ATTENTION}.o_proj")
        load(layer, {None: {"codes": codes}})
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    x = torch.randn(2, HIDDEN)
    close(layer(x)[0], x, codes.double() / 3)


def test_optional_parts_may_be_absent() -> None:
    tensors, matrix = affine(64, HIDDEN, 16, zeros=False)
    x = torch.randn(2, HIDDEN)
    close(load(row(), {None: tensors})(x)[0], x, matrix)


def test_a_bias_is_added_and_an_infinite_one_is_refused() -> None:
    tensors, matrix = affine(64, HIDDEN, 17)
    layer = row(bias=True, params_dtype=torch.float16)
    layer.bias.data.copy_(torch.arange(64))
    x = torch.randn(2, HIDDEN)
    out = load(layer, {None: tensors})(x)[0]
    torch.testing.assert_close(out.double(), x.double() @ matrix.t() + torch.arange(64), rtol=1e-4, atol=1e-4)
    layer = row(bias=True, params_dtype=torch.float16)
    layer.bias.data.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"mlp\.down_proj: bias holds 64 values .* not finite in float16"):
        load(layer, {None: tensors})


def test_a_compiled_layer_is_one_graph() -> None:
    tensors, matrix = affine(64, HIDDEN, 18)
    layer = load(row(), {None: tensors})
    x = torch.randn(2, HIDDEN)
    compiled = torch.compile(lambda x: layer.quant_method.apply(layer, x) + 1, backend="eager", fullgraph=True)
    close(compiled(x) - 1, x, matrix)


def test_lora_finds_the_packed_codes() -> None:
    layer = load(row(), {None: affine(64, HIDDEN, 19)[0]})
    assert layer.qweight is layer.kernel.codes  # no second copy
    assert [name for name, _ in layer.named_parameters()] == []
    assert RowParallelLinearWithLoRA(layer).device.type == "cpu"


def test_a_packed_layer_does_not_move() -> None:
    layer = load(row(), {None: affine(64, HIDDEN, 20)[0]})
    with pytest.raises(ValueError, match=r"packed for cpu and cannot move to meta.*Fix"):
        layer.to("meta")
    x = torch.randn(2, HIDDEN)
    assert torch.equal(layer.half()(x)[0], layer(x)[0])


def test_dummy_weights() -> None:
    load_config = LoadConfig(load_format="dummy")
    for format, _ in KINDS.values():
        with set_current_vllm_config(VllmConfig(load_config=load_config)):
            layer = row(made(format))
            DummyModelLoader(load_config).load_weights(layer, None)
            layer.quant_method.process_weights_after_loading(layer)
        assert layer(torch.randn(2, HIDDEN))[0].isfinite().all()


def test_the_format_of_the_readme() -> None:
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL):
        exec(code, names)
    qweight = torch.randint(0, 256, (64, HIDDEN // 2), dtype=torch.uint8)
    scale = torch.rand(64, HIDDEN // 64).half()
    codes = torch.stack((qweight & 15, qweight >> 4), dim=-1).flatten(1).double()
    matrix = torch.where(codes < 8, codes, codes - 16) * scale.double().repeat_interleave(64, dim=1)
    x = torch.randn(2, HIDDEN)
    close(load(row(made(names["MyMethod"])), {None: {"qweight": qweight, "scale": scale}})(x)[0], x, matrix)


# --- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("scales"), r"down_proj: the checkpoint lacks model\.layers\.0\.mlp\.down_proj\.scales;.*Fix"),
        (lambda t: t.pop("outliers"), r"lacks .*down_proj\.outliers"),
        (lambda t: t.update(codes=t["codes"].long()), r"down_proj\.codes is torch\.int64, expected torch\.int32\. Fix"),
        (
            lambda t: t.update(scales=t["scales"].double()),
            r"torch\.float64, expected torch\.float16 or torch\.bfloat16",
        ),
        (lambda t: t.update(codes=t["codes"][:96]), r"down_proj\.codes has shape \[96, 8\], expected \[128, 8\] .*128"),
        (lambda t: t.update(scales=t["scales"][:, :60]), r"scales has shape \[4, 60\], expected \[4, 64\] .*64"),
        (lambda t: t["scales"][2, 3].fill_(float("nan")), r"down_proj: scales holds 1 values .*not finite"),
        (lambda t: t["positions"][0].fill_(64), r"down_proj: positions holds out_feature 64, expected below 64\. Fix"),
    ],
)
def test_a_wrong_or_missing_tensor_is_named_with_its_numbers(change: Callable[[Any], Any], message: str) -> None:
    tensors, _ = affine(64, HIDDEN, 21, outliers=5)
    change(tensors)
    with pytest.raises(ValueError, match=message):
        load(row(), {None: tensors})


def test_what_a_fused_layer_lacks_is_named_by_the_checkpoints_module() -> None:
    def qkv(**lacks: str) -> None:
        sizes = {"q": 128, "k": 32, "v": 32}
        parts = {shard: affine(n, HIDDEN, 22)[0] for shard, n in sizes.items()}
        for shard, suffix in lacks.items():
            del parts[shard][suffix]
        layer = linear.QKVParallelLinear(
            HIDDEN, 16, 8, 2, bias=False, quant_config=made(), prefix=f"{ATTENTION}.qkv_proj"
        )
        load(layer, parts)

    with pytest.raises(ValueError, match=r"lacks .*self_attn\.q_proj\.codes, .*self_attn\.v_proj\.scales;"):
        qkv(q="codes", v="scales")
    with pytest.raises(ValueError, match=r"lacks .*self_attn\.k_proj\.zeros;"):  # optional, but the others have them
        qkv(k="zeros")


def test_a_part_without_n_is_missed_for_each_module() -> None:
    (gate, _), (up, _) = flat(64, HIDDEN, 23), flat(64, HIDDEN, 24)
    del up["weight.book"]
    merged = linear.MergedColumnParallelLinear(
        HIDDEN, [64, 64], bias=False, quant_config=made(Flat), prefix=f"{MLP}.gate_up_proj"
    )
    with pytest.raises(ValueError, match=r"lacks .*mlp\.up_proj\.weight\.book;"):
        load(merged, {0: gate, 1: up})


def test_what_the_config_promises_must_come() -> None:
    format = made(outliers={"base.mlp.down_proj": 3, "base.mlp.up_proj": 3})
    format.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"base.": "model.layers.0."}))
    with pytest.raises(ValueError, match=r"down_proj\.positions, .*down_proj\.outliers"):
        load(row(format), {None: affine(64, HIDDEN, 25)[0]})


def test_ranks_that_split_a_group_or_a_word_are_refused(as_rank: Callable[..., None]) -> None:
    as_rank(0, 2)
    with pytest.raises(
        ValueError, match=r"down_proj: 4-bit affine.* in_features per rank .* 32, but 96 over 2 ranks is 48"
    ):
        row(k=96)
    with pytest.raises(ValueError, match=r"out_features per rank in multiples of 8, but 72 over 2 ranks is 36\. Fix"):
        linear.ColumnParallelLinear(HIDDEN, 72, bias=False, quant_config=made(), prefix="model.fc")
    as_rank(0, 1)
    with pytest.raises(ValueError, match=r"in_features in multiples of 32, but they are 100\. Fix: config\.json"):
        row(k=100)


# --- which layers are quantized --------------------------------------------------------------------------------------


def headers(folder: Path, *names: str) -> str:
    save_file({name: torch.zeros(1) for name in names}, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def is_plain(format: Format, name: str) -> bool:
    layer = linear.RowParallelLinear(HIDDEN, 64, bias=False, quant_config=format, prefix=name)
    return isinstance(layer.quant_method, linear.UnquantizedLinearMethod)


def attention(format: Format) -> Any:
    return linear.QKVParallelLinear(HIDDEN, 16, 8, 2, bias=False, quant_config=format, prefix=f"{ATTENTION}.qkv_proj")


def test_what_the_files_hold_plain_is_plain(tmp_path: Path) -> None:
    names = [f"{MLP}.down_proj.weight", f"{MLP}.up_proj.codes", f"{MLP}.gate_proj.weight", f"{MLP}.gate_proj.scales"]
    format = made()
    format.maybe_update_config(headers(tmp_path, *names))
    assert is_plain(format, f"{MLP}.down_proj")
    assert not is_plain(format, f"{MLP}.up_proj")
    assert not is_plain(format, f"{MLP}.gate_proj")  # damaged, which loading will say
    assert not is_plain(format, f"{MLP}.unknown")
    nested = made(Flat)
    nested.maybe_update_config(headers(tmp_path, "a.weight", "b.weight", "b.weight.absmax"))
    assert (is_plain(nested, "a"), is_plain(nested, "b")) == (True, False)
    nested.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"a.": "model.c."}))
    assert is_plain(nested, "model.c")
    save_file({"a.weight": torch.zeros(1, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    nested.maybe_update_config(str(tmp_path))
    assert not is_plain(nested, "a")  # codes without their scales


def test_a_scheme_of_none_is_plain() -> None:
    format = made(bits={"down_proj": 16})
    assert is_plain(format, f"{MLP}.down_proj")
    assert not is_plain(format, f"{MLP}.up_proj")


def test_the_usual_key_of_the_skip_list_is_read_without_a_from_config() -> None:
    assert Flat.from_config({"modules_to_not_convert": ["lm_head"]}).skipped == ["lm_head"]
    assert Flat.from_config({"modules_to_not_convert": None}).skipped == []


@pytest.mark.parametrize("match", ["substring", "exact", "suffix"])
def test_the_skip_list_matches_as_vllms_does(match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Affine, "match", match)
    layers = [
        f"model.layers.{i}.{name}"
        for i in (1, 11)
        for name in ("self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ]
    entries = [
        *(
            "q_proj",
            "k_proj",
            "v_proj",
            "qkv_proj",
            "down_proj",
            "mlp",
            "layers.1.",
            "model.layers.11.self_attn.qkv_proj",
        ),
        *(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")),
    ]
    chance, seen = random.Random(match), set()

    def judged(function: Callable[[], bool]) -> bool | None:
        try:
            return function()
        except ValueError:
            return None

    for _ in range(300):
        skip = chance.sample(entries, chance.randint(1, 3))
        format = made(skip=skip)
        for layer in layers:
            expected = judged(lambda: is_layer_skipped(layer, skip, FUSED, match_mode=match))  # noqa: B023
            assert judged(lambda: is_plain(format, layer)) is expected, (layer, skip)  # noqa: B023
            seen.add(expected)
    assert seen == {True, False, None}


def test_a_fused_layer_is_quantized_in_one_way_or_not_at_all(tmp_path: Path) -> None:
    half = (
        r"qkv_proj is one fused layer, but only .*\.k_proj of .*\.q_proj, .*\.k_proj, .*\.v_proj is unquantized\. Fix"
    )
    with pytest.raises(ValueError, match=half):
        attention(made(skip=["k_proj"]))
    format = made()
    format.maybe_update_config(headers(tmp_path, f"{ATTENTION}.k_proj.weight"))
    with pytest.raises(ValueError, match=half):
        attention(format)
    with pytest.raises(ValueError, match=r"one fused layer, .*q_proj 4 bits, .*k_proj 4 bits, .*v_proj 3 bits\. Fix"):
        attention(made(bits={"v_proj": 3}))


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_output_layer(ranks: int, tmp_path: Path, as_rank: Callable[..., None]) -> None:
    """104 entries, padded to 128."""
    tensors, matrix = affine(104, HIDDEN, 26, outliers=30)
    x, logits = torch.randn(3, HIDDEN), []
    for rank in range(ranks):
        as_rank(rank, ranks)
        format = made()
        format.maybe_update_config(headers(tmp_path, *(f"lm_head.{suffix}" for suffix in tensors)))
        head = load(ParallelLMHead(104, HIDDEN, quant_config=format, prefix="lm_head"), {None: tensors})
        logits.append(head.quant_method.apply(head, x))
    out = torch.cat(logits, dim=1)
    assert out.shape == (3, 128)
    close(out[:, :104], x, matrix)
    assert not out[:, 104:].any()
    with pytest.raises(ValueError, match=r"ties lm_head to the embedding.*Fix: set tie_word_embeddings to false"):
        head.tie_weights(head)


def test_the_output_layer_is_plain_unless_the_files_hold_it_quantized(tmp_path: Path) -> None:
    format = made()
    for names in ((), ("lm_head.weight",), ("lm_head.codes",)):
        format.maybe_update_config(headers(tmp_path, "other", *names))
        head = ParallelLMHead(104, HIDDEN, quant_config=format, prefix="lm_head")
        assert isinstance(head.quant_method, UnquantizedEmbeddingMethod)


# --- vLLM's registry -------------------------------------------------------------------------------------------------


def test_registering_again_changes_nothing() -> None:
    register(Affine, Flat)
    register(Affine)
    assert QUANTIZATION_METHODS.count(Affine.name) == 1
    assert get_quantization_config(Affine.name) is Affine
    assert Affine.override_quantization_method({"quant_method": "awq"}, None, hf_config=None) is None


def test_a_format_reaches_the_worker_processes(tmp_path: Path) -> None:
    format = made(skip=["down_proj"])
    format.maybe_update_config(headers(tmp_path, "a.weight"))
    copy = pickle.loads(pickle.dumps(format))
    assert is_plain(copy, f"{MLP}.down_proj")
    assert is_plain(copy, "a")


def test_names_of_the_file_on_their_way_to_the_parameters() -> None:
    format = made(Flat)
    row(format)
    named = ["model.fc.weight", "model.fc.weight.absmax", "model.fc.weight.factor"]
    assert [name for name, _ in format.get_checkpoint_weight_mapper().apply([(name, 0) for name in named])] == [
        "model.fc.weight", "model.fc.weight_absmax", "model.fc.weight_factor",
    ]  # fmt: skip
    kept = made().get_checkpoint_weight_mapper().apply([("counts.fc", 0), ("fc.notes", 0), ("fc.codes", 1)])
    assert list(kept) == [("fc.codes", 1)]
