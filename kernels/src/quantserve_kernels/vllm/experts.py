"""Experts of mixtures. While weights are loaded each expert is its linears; afterwards all of them are two weights.

An expert's projections are vLLM's own parallel linears with the model's quantization config. So whatever holds of a
linear holds of an expert: its scheme, skip lists, cuts for ranks, checks of what arrives, packing. `RoutedExperts`,
vLLM's layer for all experts of a rank, gets parameters without elements whose loaders pass each tensor on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight
from vllm.platforms import current_platform

from quantserve_kernels import Linear, PackedWeight, concatenate, experts
from quantserve_kernels._experts import ACTIVATIONS

W13, W2 = "w13", "w2"
"""vLLM's names of the two weights of an expert: gate over up, and down."""
INTERLEAVED = "swigluoai"
"""The activation whose gate and up alternate by row (gpt-oss)."""
SWIGLUOAI = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "swiglu_beta": 1.0}
"""Its numbers, which a layer of vLLM may give."""
_ALIKE = "quantize all experts of a layer in the same way"


class Names:
    """How a checkpoint calls the linears of a layer's experts.

    Args:
        layer: vLLM's layer.
        prefix: its name in the engine's model.
        stacked: whether the file has one tensor for all experts, gate and up in one, or a tensor for each linear.

    Attributes:
        linears: by vLLM's shard id, the last part of the module's name.
    """

    def __init__(self, layer: RoutedExperts, prefix: str, *, stacked: bool) -> None:
        self.prefix, self.stacked = prefix, stacked
        if stacked:
            self.linears = {W13: "gate_up_proj", W2: "down_proj"}
        else:
            names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
            self.linears = {shard: name for shard, name in zip(("w1", "w3", "w2"), names, strict=True) if name}

    def module(self, expert: int, shard: str) -> str:
        """The checkpoint's module of an expert (its number over all ranks)."""
        return (
            f"{self.prefix}.{self.linears[shard]}" if self.stacked else f"{self.prefix}.{expert}.{self.linears[shard]}"
        )


_STACK = r"\.experts\.(gate_up_proj|down_proj)"


def is_stack(name: str) -> bool:
    """Whether a tensor of a checkpoint is one for all experts of a layer."""
    return re.search(rf"{_STACK}(?:$|[._])", name) is not None


def stack_renaming(suffix: str) -> tuple[re.Pattern[str], str]:
    """How such tensors are renamed to the parameters of `ExpertsMethod`, before vLLM's models rename them.

    Files write ``gate_up_proj_scale`` or ``gate_up_proj.scale``, and ``gate_up_proj`` for its weight.
    """
    written = rf"[._]{re.escape(suffix)}"
    pattern = rf"{_STACK}(?:{written})?$" if suffix == "weight" else rf"{_STACK}{written}$"
    return re.compile(pattern), rf".experts.routed_experts.stacked_\1_{suffix.replace('.', '_')}"


def experts_method(
    layer: RoutedExperts,
    prefix: str,
    config: QuantizationConfig,
    served: Callable[[LinearBase], bool],
    *,
    stacked: bool = False,
) -> ExpertsMethod | None:
    """The method of a layer's experts; None where its linears are not quantized, or not for these kernels.

    Args:
        layer: vLLM's layer.
        prefix: its name in the engine's model.
        config: the quantization config of the model, which is asked for the method of every expert's linears.
        served: whether a linear of such a method is computed by these kernels.
        stacked: whether the file has one tensor for all experts.

    Raises:
        ValueError: some linears of the first expert are quantized and others are not, or the layer multiplies their
            results in a way that the kernel does not know; names them.
    """
    names = Names(layer, prefix, stacked=stacked)
    first = _linears(layer, names, config, 0)
    plain = [linear.prefix for linear in first.values() if isinstance(linear.quant_method, UnquantizedLinearMethod)]
    if plain and len(plain) < len(first):
        raise ValueError(
            f"{prefix}: {', '.join(plain)} is unquantized and the rest of the expert is not. Fix: {_ALIKE}"
        )
    if not all(map(served, first.values())):
        return None
    if reason := _refused(layer):
        raise ValueError(f"{prefix}: {reason}, which the kernel for experts does not compute. Fix: serve another model")
    return ExpertsMethod(layer.moe_config, names, config)


class ExpertsMethod(FusedMoEMethodBase):
    """The experts of one layer.

    Args:
        moe: vLLM's settings of the layer.
        names: of the checkpoint's modules.
        config: the quantization config of the model.
    """

    def __init__(self, moe: FusedMoEConfig, names: Names, config: QuantizationConfig) -> None:
        super().__init__(moe)
        self.names, self.config = names, config
        self.linears: list[dict[str, LinearBase]] = []  # of this rank's experts, by shard, while they are loaded
        self.biased: set[tuple[int, str]] = set()  # which of them got a bias

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make the linears of this rank's experts, and the layer's parameters, under the names that vLLM loads by.

        Raises:
            ValueError: this rank's share splits a word or a group of the format.
        """
        wanted = range(layer.global_num_experts)
        local = sorted((here, one) for one in wanted if (here := _local(layer, one)) >= 0)
        self.linears = [_linears(layer, self.names, self.config, expert) for _, expert in local]
        for shard in self.names.linears:
            for name in dict(self.linears[0][shard].named_parameters()):
                if self.names.stacked:
                    self._register(
                        layer, f"stacked_{self.names.linears[shard]}_{name}", self._load_stack(layer, name, shard)
                    )
                elif shard != "w3":
                    self._register(layer, f"{W2 if shard == W2 else W13}_{name}", self._load_one(layer, name))
        if self.names.stacked:
            layer.load_weights = _loading_stacks(layer)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Pack every linear, and put those of all experts into one weight each for gate and up, and for down.

        Raises:
            ValueError: a tensor never arrived or holds what no weight can be, or experts differ; names the linear.
        """
        engine = get_current_vllm_config_or_none()
        dummy = engine is not None and engine.load_config.load_format == "dummy"
        if dummy:
            for linear in self._all():
                for parameter in linear.parameters():
                    initialize_single_dummy_weight(parameter)
        for name in [name for name, _ in layer.named_parameters(recurse=False)]:
            delattr(layer, name)
        for linear in self._all():
            linear.quant_method.process_weights_after_loading(linear)
        rows = [shard for shard in self.names.linears if shard != W2]
        for weight, shards in ((W13, rows), (W2, [W2])):
            packed = _alike([linears[shard] for linears in self.linears for shard in shards])
            setattr(layer, weight, packed)
            layer.register_buffer(f"{weight}_bias", self._bias(shards, verify=not dummy), persistent=False)
        self.linears = []
        if self.names.stacked:
            del layer.load_weights

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """None: vLLM's own kernels for experts are not used."""

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Module | None,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """`x` [tokens, k] through `topk_ids` [tokens, choices], experts of all ranks, to [tokens, k] in x's dtype."""
        if layer.apply_router_weight_on_input:  # which vLLM does with one choice for a token only
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        if layer.expert_map is not None:  # -1 where another rank has the expert
            topk_ids = layer.expert_map[topk_ids]
        return experts(
            x,
            layer.w13,
            layer.w2,
            topk_ids,
            topk_weights,
            activation=layer.activation.value,
            w13_bias=layer.w13_bias,
            w2_bias=layer.w2_bias,
        )

    def _all(self) -> Iterable[LinearBase]:
        return (linear for linears in self.linears for linear in linears.values())

    def _register(self, layer: RoutedExperts, name: str, loader: Callable[..., Any]) -> None:
        parameter = Parameter(torch.empty(0), requires_grad=False)
        parameter.weight_loader = loader
        layer.register_parameter(name, parameter)

    def _load_one(self, layer: RoutedExperts, name: str) -> Callable[..., bool]:
        """The loader of a tensor of one expert, as vLLM's loading of mixtures calls it."""

        def load(
            param: Parameter,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool:
            here = _local(layer, expert_id)
            if here >= 0:
                self._load(here, shard_id, name, loaded_weight)
            return here >= 0

        return load

    def _load_stack(self, layer: RoutedExperts, name: str, shard: str) -> Callable[[Parameter, Tensor], None]:
        """The loader of a tensor [experts of all ranks, ...]."""

        def load(param: Parameter, loaded_weight: Tensor) -> None:
            if loaded_weight.ndim < 1 or loaded_weight.shape[0] != layer.global_num_experts:
                raise ValueError(
                    f"{self.names.module(0, shard)}: {name} has shape {list(loaded_weight.shape)}, expected "
                    f"[{layer.global_num_experts} (experts), ...]. Fix: config.json and the tensors must come from the "
                    "same model"
                )
            for expert, tensor in enumerate(loaded_weight.unbind()):
                if (here := _local(layer, expert)) >= 0:
                    self._load(here, shard, name, tensor)

        return load

    def _load(self, expert: int, shard: str, name: str, tensor: Tensor) -> None:
        parameter = getattr(self.linears[expert][shard], name)
        parameter.weight_loader(parameter, tensor)
        if name == "bias":
            self.biased.add((expert, shard))

    def _bias(self, shards: Sequence[str], *, verify: bool) -> Tensor | None:
        """The biases [experts, n] of these linears; None where they have none.

        Raises:
            ValueError: the model has biases, and some did not arrive.
        """
        wanted = [(expert, shard) for expert in range(len(self.linears)) for shard in shards]
        missing = [one for one in wanted if one not in self.biased]
        if self.moe.has_bias and missing and verify:
            expert, shard = missing[0]
            raise ValueError(
                f"{self.linears[expert][shard].prefix}: the checkpoint lacks its bias. Fix: download it again"
            )
        if len(missing) == len(wanted):
            return None
        linears = [self.linears[expert][shard] for expert, shard in wanted]
        # The ranks' results are added up, so one of them adds the bias of what is cut along K.
        mine = not isinstance(linears[0], RowParallelLinear) or linears[0].tp_rank == 0
        return torch.cat([linear.bias.data * mine for linear in linears]).view(len(self.linears), -1)


def _alike(linears: Sequence[LinearBase]) -> PackedWeight:
    """The packed linears one below the other."""
    first = linears[0]
    for one in linears:
        if (one.kernel.bits, one.kernel.group_size) != (first.kernel.bits, first.kernel.group_size):
            raise ValueError(f"{first.prefix} is {first.kernel} and {one.prefix} is {one.kernel}. Fix: {_ALIKE}")
        if getattr(one, "input_order", None) is not None:
            raise ValueError(f"{one.prefix} has inputs in an order of its own (act-order). Fix: quantize without it")
    try:
        return concatenate([_weight(one.kernel) for one in linears])
    except ValueError as error:
        raise ValueError(f"{first.prefix} and its like in other experts: {error}. Fix: {_ALIKE}") from error


def _weight(linear: Linear) -> PackedWeight:
    return PackedWeight(**{field.name: getattr(linear, field.name) for field in fields(PackedWeight)})


def _refused(layer: RoutedExperts) -> str:
    """What of a layer the kernel cannot compute; "" where it can."""
    if not current_platform.is_cpu():
        return "experts are on a GPU"
    if (name := layer.activation.value) not in ACTIVATIONS:
        return f"experts have the activation {name} (known: {', '.join(ACTIVATIONS)})"
    for name, usual in SWIGLUOAI.items():
        given = getattr(layer, name)
        if given is not None and not (layer.activation.value == INTERLEAVED and given == usual):
            return f"experts have {name} {given}"
    return ""


def _linears(layer: RoutedExperts, names: Names, config: QuantizationConfig, expert: int) -> dict[str, LinearBase]:
    """The linears of an expert on this rank, by shard.

    Raises:
        ValueError: the experts are cut in another way than linears.
    """
    moe = layer.moe_config
    ranks = moe.moe_parallel_config.tp_size
    if ranks not in (1, get_tensor_model_parallel_world_size()) or moe.moe_parallel_config.use_all2all_kernels:
        raise ValueError(
            f"{names.prefix}: experts are cut for {ranks} ranks and linears for "
            f"{get_tensor_model_parallel_world_size()}, as with data parallelism. Fix: data_parallel_size 1"
        )
    hidden, width = moe.hidden_dim, moe.intermediate_size_per_partition * ranks
    options = {
        "bias": True,
        "skip_bias_add": True,
        "params_dtype": layer.params_dtype,
        "quant_config": config,
        "disable_tp": ranks == 1,
    }
    made: dict[str, LinearBase] = {}
    for shard in names.linears:
        options["prefix"] = names.module(expert, shard)
        if shard == W2:
            made[shard] = RowParallelLinear(width, hidden, reduce_results=False, **options)
        elif shard == W13 and layer.activation.value != INTERLEAVED:
            made[shard] = MergedColumnParallelLinear(hidden, [width, width], **options)
        else:
            made[shard] = ColumnParallelLinear(hidden, 2 * width if shard == W13 else width, **options)
        made[shard].bias.data.zero_()
    return made


def _local(layer: RoutedExperts, expert: int) -> int:
    """The index on this rank of an expert, -1 where another rank has it."""
    return layer._map_global_expert_id_to_local_expert_id(expert)


def _loading_stacks(layer: RoutedExperts) -> Callable[[Iterable[tuple[str, Tensor]]], Iterable[str]]:
    """vLLM's loading of the layer, which knows stacked tensors of few layouts, with these added."""
    load = layer.load_weights

    def load_weights(weights: Iterable[tuple[str, Tensor]]) -> Iterable[str]:
        for name, tensor in weights:
            own = name.removeprefix("routed_experts.")
            if own.startswith("stacked_"):
                parameter = layer.get_parameter(own)
                parameter.weight_loader(parameter, tensor)
                yield own
            else:
                yield from load([(name, tensor)])

    return load_weights
