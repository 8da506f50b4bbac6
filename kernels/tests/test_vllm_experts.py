"""vLLM's layers of experts on our kernel, every rank of up to two, against float64 matrices.

The experts of AWQ, GPTQ, AutoRound and compressed-tensors are loaded by vLLM's own methods for linears; those of the
made-up format `Nibbles` by `Format`, in tensors for each expert or in tensors for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("quantserve")

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from vllm.config import LoadConfig, get_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.fused_moe import config as moe_config

from helpers.vllm_layers import become, surroundings
from mixtures import BOOK, GROUP, Nibbles, Parts, nibbles
from quantserve_kernels.vllm import Format, experts, linear_kernels, register
from quantserve_kernels.vllm.expert_kernels import RoutedExperts
from test_linear_kernels import awq, compressed, config_of, gptq

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel for vLLM's own methods is on CPUs only"),
]

EXPERTS, CHOICES, HIDDEN, WIDTH = 4, 2, 128, 64
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
Matrices = dict[tuple[int, str], Tensor]
SHAPES = {GATE: (WIDTH, HIDDEN), UP: (WIDTH, HIDDEN), DOWN: (HIDDEN, WIDTH)}


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a vLLM layer needs around it: a config, a group of one process, and no kernel of vLLM's own."""
    linear_kernels.register()
    linear_kernels.keep_scales()
    register(Nibbles)
    folder = tmp_path_factory.mktemp("group")
    with surroundings(folder, VLLM_DISABLED_KERNELS="CPUWNA16LinearKernel,ZentorchWNA16LinearKernel"):
        yield


@pytest.fixture(autouse=True)
def _no_layers_yet() -> None:
    get_current_vllm_config().compilation_config.static_forward_context.clear()


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Let layers made from now on believe they are one rank of several."""

    def rank_of(rank: int, ranks: int) -> None:
        get_current_vllm_config().compilation_config.static_forward_context.clear()
        become(monkeypatch, rank, ranks)
        monkeypatch.setattr(moe_config, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(experts, "get_tensor_model_parallel_world_size", lambda: ranks)

    return rank_of


def mixture(config: Any, **options: Any) -> Any:
    """vLLM's layer for experts."""
    return FusedMoEFactory(
        **{
            "num_experts": EXPERTS,
            "top_k": CHOICES,
            "hidden_size": HIDDEN,
            "intermediate_size": WIDTH,
            "quant_config": config,
            "prefix": "model.layers.0.mlp.experts",
            **options,
        }
    )


def made(make: Callable[[int, int, int], tuple[Parts, Tensor]]) -> tuple[dict[str, Tensor], Matrices]:
    """The tensors of all experts by name, and their matrices in float64."""
    tensors, matrices = {}, {}
    for expert in range(EXPERTS):
        for at, (name, (n, k)) in enumerate(SHAPES.items()):
            parts, matrices[expert, name] = make(n, k, 10 * expert + at)
            tensors |= {f"{expert}.{name}.{suffix}": tensor for suffix, tensor in parts.items()}
    return tensors, matrices


def loaded(layer: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The layer's experts with their weights."""
    list(layer.load_weights(tensors.items()))
    layer.routed_experts.quant_method.process_weights_after_loading(layer.routed_experts)
    return layer.routed_experts


def silu(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def swigluoai(gate: Tensor, up: Tensor) -> Tensor:
    """As gpt-oss multiplies the two."""
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def expected(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    matrices: Matrices,
    activation: Callable[[Tensor, Tensor], Tensor] = silu,
    biases: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The mixture in float64."""
    total = torch.zeros(x.shape, dtype=torch.float64)
    for token, row in enumerate(x.double()):
        for expert, weight in zip(ids[token].tolist(), weights[token].double(), strict=True):
            bias = {
                name: biases[name][expert].double() if biases else torch.zeros(n) for name, (n, _) in SHAPES.items()
            }
            gate, up = (matrices[expert, name] @ row + bias[name] for name in (GATE, UP))
            total[token] += weight * (matrices[expert, DOWN] @ activation(gate, up) + bias[DOWN])
    return total


def tokens(count: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, and the experts of each with their weights."""
    made = torch.Generator().manual_seed(0)
    x = torch.randn(count, HIDDEN, generator=made).to(dtype)
    ids = torch.stack([torch.randperm(EXPERTS, generator=made)[:CHOICES] for _ in range(count)]).to(torch.int32)
    return x, ids, torch.rand(count, CHOICES, generator=made)


def result(routed: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return routed.forward_modular(x, weights, ids)


def close(y: Tensor, wanted: Tensor, x: Tensor) -> None:
    assert y.dtype == x.dtype
    relative = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[x.dtype]
    assert (y.double() - wanted).norm() < relative * wanted.norm()


# --- vLLM's own methods ----------------------------------------------------------------------------------------------

FORMATS = [
    ("awq", awq, {}),
    ("gptq", gptq, {}),
    ("inc", gptq, {}),
    ("compressed-tensors", compressed, {}),
    ("compressed-tensors", compressed, {"symmetric": False}),
    ("compressed-tensors", compressed, {"bits": 8}),
]


@pytest.mark.parametrize("group", [GROUP, -1])
@pytest.mark.parametrize(("method", "make", "options"), FORMATS)
def test_experts_of_vllms_methods(method: str, make: Any, options: dict[str, Any], group: int) -> None:
    tensors, matrices = made(lambda n, k, seed: make(n, group, seed, k=k, **options))
    routed = loaded(mixture(config_of(method, group, **options)), tensors)
    assert not list(routed.parameters())
    x, ids, weights = tokens()
    close(result(routed, x, ids, weights), expected(x, ids, weights, matrices), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 40])
def test_dtypes_and_numbers_of_tokens(dtype: torch.dtype, count: int) -> None:
    tensors, matrices = made(lambda n, k, seed: awq(n, GROUP, seed, k=k))
    routed = loaded(mixture(config_of("awq", GROUP), params_dtype=dtype), tensors)
    x, ids, weights = tokens(count, dtype)
    close(result(routed, x, ids, weights), expected(x, ids, weights, matrices), x)


def test_the_graph_is_whole() -> None:
    """vLLM compiles its models without a break."""
    tensors, _ = made(lambda n, k, seed: awq(n, GROUP, seed, k=k))
    routed = loaded(mixture(config_of("awq", GROUP)), tensors)
    compiled = torch.compile(result, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (1, 7):
        assert torch.equal(compiled(routed, *tokens(count)), result(routed, *tokens(count)))


@pytest.mark.parametrize(("method", "make"), [("awq", awq), ("gptq", gptq), ("compressed-tensors", compressed)])
def test_two_ranks_add_up(method: str, make: Any, as_rank: Callable[..., None]) -> None:
    tensors, matrices = made(lambda n, k, seed: make(n, GROUP, seed, k=k))
    x, ids, weights = tokens()
    total = torch.zeros_like(x)
    for rank in range(2):
        as_rank(rank, 2)
        total += result(loaded(mixture(config_of(method, GROUP), tp_size=2), tensors), x, ids, weights)
    close(total, expected(x, ids, weights, matrices), x)


def test_where_vllm_computes_linears_experts_are_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_DISABLED_KERNELS")
    if torch.cpu._is_amx_tile_supported():
        assert not isinstance(made_method("awq"), experts.ExpertsMethod)
        return
    with pytest.raises((NotImplementedError, ValueError), match=r"WNA16|moe_wna16"):
        made_method("awq")


def made_method(method: str) -> Any:
    return mixture(config_of(method, GROUP)).routed_experts.quant_method


@pytest.mark.skipif(torch.cpu._is_amx_tile_supported(), reason="vLLM has a kernel for these experts")
def test_what_compressed_tensors_cannot_build_as_linears_is_left_to_vllm() -> None:
    with pytest.raises(NotImplementedError, match="No WNA16 MoE backend") as raised:
        mixture(config_of("compressed-tensors", 48))
    assert isinstance(raised.value.__context__, ValueError)
    with pytest.raises(ValueError, match="groups of 48 do not divide K 128"):
        mixture(config_of("awq", 48))


def test_unquantized_experts_stay_vllms() -> None:
    config = config_of("awq", GROUP, modules_to_not_convert=["experts"])
    assert isinstance(mixture(config).routed_experts.quant_method, UnquantizedFusedMoEMethod)
    assert isinstance(mixture(config, prefix="other.experts").routed_experts, RoutedExperts)


def test_plain_stacks_of_a_format_stay_vllms(tmp_path: Path) -> None:
    sizes = {"gate_up_proj": (2 * WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
    format = nibbles_format({name: torch.zeros(EXPERTS, *size) for name, size in sizes.items()}, tmp_path)
    assert isinstance(mixture(format).routed_experts.quant_method, UnquantizedFusedMoEMethod)


# --- a format of our own ---------------------------------------------------------------------------------------------


def listed() -> tuple[dict[str, Tensor], Matrices]:
    return made(nibbles)


def stacks(matrices_of: Matrices | None = None, *, interleaved: bool = False) -> tuple[dict[str, Tensor], Matrices]:
    """One tensor for the gates and ups of all experts, below each other or in turn, and one for their downs."""
    tensors, matrices = listed()

    def both(suffix: str, expert: int) -> Tensor:
        gate, up = (tensors[f"{expert}.{name}.{suffix}"] for name in (GATE, UP))
        return torch.stack((gate, up), dim=1).flatten(0, 1) if interleaved else torch.cat((gate, up))

    made = {}
    for suffix in ("blocks", "scales"):
        made[f"gate_up_proj_{suffix}"] = torch.stack([both(suffix, expert) for expert in range(EXPERTS)])
        made[f"down_proj_{suffix}"] = torch.stack([tensors[f"{expert}.{DOWN}.{suffix}"] for expert in range(EXPERTS)])
    return made, matrices


def nibbles_format(tensors: Mapping[str, Tensor], folder: Path, **config: Any) -> Nibbles:
    """The format as it knows a checkpoint with these experts."""
    prefix = "model.layers.0.mlp.experts."
    save_file({prefix + name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    format = Nibbles.from_config(config)
    format.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    format.maybe_update_config(str(folder))
    return format


def through_mapper(format: Format, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that vLLM's loading of models gives them."""
    prefix = "model.layers.0.mlp.experts."
    mapper = format.get_checkpoint_weight_mapper()
    renamed = mapper.apply((prefix + name, tensor) for name, tensor in tensors.items())
    return {name.removeprefix(prefix): tensor for name, tensor in renamed}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("make", [listed, stacks])
def test_a_format_has_experts(make: Any, ranks: int, as_rank: Callable[..., None], tmp_path: Path) -> None:
    tensors, matrices = make()
    x, ids, weights = tokens()
    total = torch.zeros_like(x)
    for rank in range(ranks):
        as_rank(rank, ranks)
        format = nibbles_format(tensors, tmp_path)
        layer = mixture(format, tp_size=ranks)
        total += result(loaded(layer, through_mapper(format, tensors)), x, ids, weights)
    close(total, expected(x, ids, weights, matrices), x)


@pytest.mark.parametrize("ranks", [1, 2])
def test_stacks_of_gpt_oss(ranks: int, as_rank: Callable[..., None], tmp_path: Path) -> None:
    """Gates and ups in turn, biases, and an activation of its own."""
    tensors, matrices = stacks(interleaved=True)
    drawn = torch.Generator().manual_seed(9)
    biases = {name: torch.randn(EXPERTS, n, generator=drawn) for name, (n, _) in SHAPES.items()}
    tensors["gate_up_proj_bias"] = torch.stack((biases[GATE], biases[UP]), dim=2).flatten(1)
    tensors["down_proj_bias"] = biases[DOWN]
    x, ids, weights = tokens()
    total = torch.zeros_like(x)
    for rank in range(ranks):
        as_rank(rank, ranks)
        format = nibbles_format(tensors, tmp_path)
        layer = mixture(format, tp_size=ranks, activation="swigluoai", has_bias=True)
        total += result(loaded(layer, through_mapper(format, tensors)), x, ids, weights)
    close(total, expected(x, ids, weights, matrices, swigluoai, biases), x)


def test_biases_of_listed_experts() -> None:
    tensors, matrices = listed()
    drawn = torch.Generator().manual_seed(8)
    biases = {name: torch.randn(EXPERTS, n, generator=drawn) for name, (n, _) in SHAPES.items()}
    tensors |= {f"{expert}.{name}.bias": biases[name][expert] for expert in range(EXPERTS) for name in SHAPES}
    x, ids, weights = tokens()
    routed = loaded(mixture(Nibbles.from_config({})), tensors)
    close(result(routed, x, ids, weights), expected(x, ids, weights, matrices, biases=biases), x)


def test_ranks_with_whole_experts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expert parallelism: each rank has two of the four."""
    tensors, matrices = listed()
    x, ids, weights = tokens()
    total = torch.zeros_like(x)
    plain = moe_config.FusedMoEParallelConfig.make
    for rank in range(2):
        get_current_vllm_config().compilation_config.static_forward_context.clear()

        def parallel(*_: Any, rank: int = rank, **options: Any) -> Any:
            found = plain(**options)
            found.use_ep, found.ep_size, found.ep_rank = True, 2, rank
            return found

        monkeypatch.setattr(moe_config.FusedMoEParallelConfig, "make", parallel)
        routed = loaded(mixture(Nibbles.from_config({})), tensors)
        assert routed.w2.n == EXPERTS // 2 * HIDDEN
        total += result(routed, x, ids, weights)
    close(total, expected(x, ids, weights, matrices), x)


def test_codebooks_of_their_own() -> None:
    """A table for each linear becomes one for each output channel."""
    tensors, matrices = listed()
    for factor, (expert, name) in enumerate(matrices, start=1):
        tensors[f"{expert}.{name}.weight_book"] = BOOK * factor
        matrices[expert, name] *= factor
    format = Nibbles.from_config({})
    x, ids, weights = tokens()
    routed = loaded(mixture(format), tensors)
    close(result(routed, x, ids, weights), expected(x, ids, weights, matrices), x)


def test_dummy_weights_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_current_vllm_config(), "load_config", LoadConfig(load_format="dummy"))
    for config in (config_of("awq", GROUP), Nibbles.from_config({})):
        get_current_vllm_config().compilation_config.static_forward_context.clear()
        x, ids, weights = tokens()
        assert result(loaded(mixture(config), {}), x, ids, weights).isfinite().all()


# --- what must not load ----------------------------------------------------------------------------------------------


def test_a_tensor_of_an_expert_that_never_arrives_is_named(tmp_path: Path) -> None:
    tensors, _ = listed()
    del tensors["2.up_proj.scales"]
    with pytest.raises(ValueError, match=r"lacks model\.layers\.0\.mlp\.experts\.2\.up_proj\.scales"):
        loaded(mixture(Nibbles.from_config({})), tensors)
    stacked, _ = stacks()
    format = nibbles_format(stacked, tmp_path)
    layer = mixture(format, prefix="model.layers.1.mlp.experts")
    del stacked["down_proj_scales"]
    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\.mlp\.experts\.down_proj\.scales"):
        loaded(layer, through_mapper(format, stacked))


def test_scales_of_vllms_methods_that_never_arrive_are_named() -> None:
    tensors, _ = made(lambda n, k, seed: awq(n, GROUP, seed, k=k))
    del tensors["3.down_proj.scales"]
    with pytest.raises(ValueError, match=r"experts\.3\.down_proj: 256 of 256 values of scales never arrived"):
        loaded(mixture(config_of("awq", GROUP)), tensors)


def test_a_bias_that_the_model_has_must_arrive() -> None:
    tensors, _ = listed()
    with pytest.raises(ValueError, match=r"experts\.0\.gate_proj: the checkpoint lacks its bias"):
        loaded(mixture(Nibbles.from_config({}), has_bias=True), tensors)


def test_experts_are_quantized_whole() -> None:
    with pytest.raises(ValueError, match=r"experts\.0\.up_proj is unquantized and the rest of the expert is not"):
        mixture(config_of("awq", GROUP, modules_to_not_convert=["up_proj"]))


def test_experts_of_one_layer_are_alike() -> None:
    config = config_of("compressed-tensors", GROUP)
    other = config_of("compressed-tensors", GROUP, bits=8).target_scheme_map["Linear"]
    config.target_scheme_map = {r"re:.*experts\.1\..*": other, **config.target_scheme_map}
    tensors, _ = made(lambda n, k, seed: compressed(n, GROUP, seed, k=k, bits=8 if 10 <= seed < 20 else 4))
    with pytest.raises(ValueError, match=r"0\.gate_proj is .*bits=4.*experts\.1\.gate_proj is .*bits=8"):
        loaded(mixture(config), tensors)


def test_a_stack_of_another_model(tmp_path: Path) -> None:
    tensors, _ = stacks()
    format = nibbles_format(tensors, tmp_path)
    layer = mixture(format)
    tensors["down_proj_blocks"] = tensors["down_proj_blocks"][:3]
    with pytest.raises(ValueError, match=r"experts\.down_proj: blocks has shape \[3, .*expected \[4 \(experts\)"):
        loaded(layer, through_mapper(format, tensors))


def test_shares_that_split_a_group(as_rank: Callable[..., None]) -> None:
    as_rank(0, 4)
    with pytest.raises(ValueError, match=r"experts\.0\.down_proj: 4-bit .*in_features per rank in multiples of 32"):
        mixture(Nibbles.from_config({}), tp_size=4)
