"""A weight-only format as vLLM's quantization config: which layers it has, and what a plugin says of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from torch.nn import Module
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import _CUSTOMIZED_METHOD_TO_QUANT_CONFIG, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper
from vllm.transformers_utils.config import get_safetensors_params_metadata

from quantserve_kernels import PackedWeight, load
from quantserve_kernels.vllm.experts import experts_method, is_stack, stack_renaming
from quantserve_kernels.vllm.linear import FormatLinearMethod
from quantserve_kernels.vllm.loading import attribute
from quantserve_kernels.vllm.ragged import CSR, Entries, Tensors
from quantserve_kernels.vllm.scheme import DTYPES, Scheme, dtypes, of_one_expert

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What almost all of vLLM's models fuse."""
Packed = PackedWeight | tuple[PackedWeight, torch.Tensor | None]
"""A weight, or a weight and int64 [k]: it multiplies ``x[..., order]``."""


class Format(QuantizationConfig):
    """A format: a name, `scheme` and `pack`, and vLLM serves it. The other methods are for few formats.

    A linear is plain where `scheme` returns None, the skip list names it, or the files hold its ``weight`` and nothing
    of its scheme. The output layer is quantized where the files hold all that its scheme needs.

    Args:
        skipped: the checkpoint's list of unquantized modules; entries match as `match` says.
        modules: what the checkpoint's config says of single modules, by their names.

    Attributes:
        name: of the method, the value of ``quantization`` and of ``quant_method`` in config.json.
        config_files: other files that may hold the quantization config.
        capability: CUDA compute capability times ten, at least.
        dtypes: of activations.
        match: how the skip list names layers: anywhere in the name, the whole name, or its end after a dot.
        ragged: sets of optional tensors whose length only the file knows; those of a set come together, and `entries`
            reads them.
        ignored: tensors that carry no weights: suffixes (``.startrows``) and prefixes (``counts.``) of their names.
        modules: as given, under the engine's names once it has told them.
    """

    name: ClassVar[str]
    config_files: ClassVar[tuple[str, ...]] = ()
    capability: ClassVar[int] = 70
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.half, torch.bfloat16, torch.float32)
    match: ClassVar[Literal["substring", "exact", "suffix"]] = "substring"
    ragged: ClassVar[tuple[tuple[str, ...], ...]] = ()
    ignored: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *, skipped: Iterable[str] = (), modules: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.skipped = list(skipped)
        self.modules = dict(modules or {})
        self._stored: dict[str, str] = {}  # the checkpoint's tensors, as far as they are known: name -> dtype
        self._dotted: set[str] = set()  # suffixes with a dot, which no parameter can be called
        self._stacked = False  # whether the files have one tensor for all experts of a layer
        self._stacks: set[str] = set()  # suffixes of such tensors

    # --- what a plugin says ----------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Read the checkpoint's quantization config; ValueError with the fix where it is wrong.

        Here only the skip list is read, under the key ``modules_to_not_convert``.
        """
        return cls(skipped=config.get("modules_to_not_convert") or ())

    @abstractmethod
    def scheme(self, module: str) -> Scheme | None:
        """The stored tensors of the linear `module`, or None where it is plain.

        `module` is a module of the checkpoint: ``...q_proj`` and not ``...qkv_proj``, under the engine's prefix.
        Experts are asked for one by one, ``...experts.3.up_proj``. Where the file stacks them it is
        ``...experts.gate_up_proj`` and ``...experts.down_proj``, whose parts have the experts, `E`, in front.
        """

    def pack(self, tensors: Tensors, sparse: CSR | None) -> Packed:
        """Pack one layer for the kernels, with a function of `quantserve_kernels`.

        Args:
            tensors: by suffix, in the scheme's shapes for this rank's [n, k] and the dtypes of the file. A part without
                N comes with N in front, as fused linears each have their own: a scale () as [n], a codebook (16) as
                [n, 16]. Optional parts that did not come are absent.
            sparse: rows int32 [n + 1], cols int32 [nnz] and vals float32 [nnz] of this rank's share of the ragged
                parts; None where there are none.

        Returns:
            The weight; for act-order the weight and the order of its inputs, of `quantserve_kernels.input_order`.

        Raises:
            ValueError: the tensors hold what no weight can be; the layer's name is added.
        """
        raise NotImplementedError(f"{type(self).__name__} implements neither pack() nor pack_as()")

    def pack_as(self, scheme: Scheme, tensors: Tensors, sparse: CSR | None) -> Packed:
        """As `pack`, for formats whose schemes differ by linear; `scheme` is the layer's."""
        return self.pack(tensors, sparse)

    def entries(self, tensors: Tensors, shape: tuple[int, int]) -> Entries:
        """Read one complete set of ragged tensors of a linear [n, k]; ValueError where they do not fit it."""
        raise NotImplementedError(f"{type(self).__name__} names ragged tensors, but does not implement entries()")

    def arrange(self, suffix: str, tensor: torch.Tensor, scheme: Scheme, shape: tuple[int, int]) -> torch.Tensor:
        """Bring a file's tensor of a linear [n, k] into its shape in `scheme`, before ranks cut it; itself by default.

        For formats whose files mix what ranks have to cut. ValueError where the tensor does not fit the linear.
        """
        return tensor

    def promised(self, module: str) -> Iterable[str]:
        """The optional tensors that the config says `module` has."""
        return ()

    # --- what vLLM asks --------------------------------------------------------------------------

    @classmethod
    def get_name(cls) -> str:
        """Name of the method."""
        return cls.name

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Dtypes of activations."""
        return list(cls.dtypes)

    @classmethod
    def get_min_capability(cls) -> int:
        """CUDA compute capability times ten."""
        return cls.capability

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        """Other files that may hold the quantization config."""
        return list(cls.config_files)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Drop what carries no weights, and rename ``weight.absmax``, which no parameter can be called."""
        suffixes: dict[str, str | None] = {f".{suffix}": f".{attribute(suffix)}" for suffix in self._dotted}
        suffixes |= dict.fromkeys((name for name in self.ignored if name.startswith(".")), None)
        prefixes = dict.fromkeys((name for name in self.ignored if name.endswith(".")), None)
        return WeightsMapper(
            orig_to_new_regex=dict(stack_renaming(suffix) for suffix in self._stacks),
            orig_to_new_prefix=prefixes,
            orig_to_new_suffix=suffixes,
        )

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Learn what tensors there are from the safetensors headers."""
        headers = get_safetensors_params_metadata(model_name, revision=revision)
        self._stored = {name: str(tensor["dtype"]) for name, tensor in headers.items() if "dtype" in tensor}
        self._stacked = any(map(is_stack, self._stored))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Rename what is known by name as the engine's model renames it."""
        self.skipped = hf_to_vllm_mapper.apply_list(self.skipped)
        self.modules = hf_to_vllm_mapper.apply_dict(self.modules)
        self._stored = hf_to_vllm_mapper.apply_dict(self._stored)

    def get_quant_method(self, layer: Module, prefix: str) -> QuantizeMethodBase | None:
        """Ours for quantized linears, vLLM's own for plain ones, None for everything else.

        Raises:
            ValueError: the modules of a fused layer are stored in different ways; names them.
        """
        if isinstance(layer, RoutedExperts):
            return experts_method(layer, prefix, self, _is_packed, stacked=self._stacked)
        head = isinstance(layer, ParallelLMHead)
        if not head and not isinstance(layer, LinearBase):
            return None
        in_stack = self._stacked and prefix.rpartition(".")[0].endswith(".experts")
        modules = [prefix] if head or in_stack else self.checkpoint_modules(prefix)
        schemes = [self._scheme_of(module, prefix) for module in modules]
        plain = [module for module, scheme in zip(modules, schemes, strict=True) if scheme is None]
        if plain and len(plain) < len(modules):
            raise ValueError(
                f"{prefix} is one fused layer, but only {', '.join(plain)} of {', '.join(modules)} is unquantized. "
                "Fix: quantize all of them or none"
            )
        scheme = schemes[0]
        if scheme is None or (head and any(f"{prefix}.{suffix}" not in self._stored for suffix in scheme.required())):
            return None if head else UnquantizedLinearMethod()
        if any(other != scheme for other in schemes):
            each = ", ".join(f"{module} {one.bits:g} bits" for module, one in zip(modules, schemes, strict=True) if one)
            raise ValueError(
                f"{prefix} is one fused layer, but its modules are stored in different ways: {each}. "
                "Fix: quantize all of them in the same way"
            )
        self._dotted |= {suffix for suffix in scheme.parts if "." in suffix}
        if in_stack:
            self._stacks |= {*scheme.parts, "bias"}
        return FormatLinearMethod(self, scheme, modules)

    def checkpoint_modules(self, prefix: str) -> list[str]:
        """The checkpoint's modules fused into the engine's layer `prefix`; that name itself where nothing is fused.

        Some of vLLM's models tell what they fuse when their layers are made already (dense layers of Qwen3-MoE): then
        the files tell, if they hold the usual parts.
        """
        parent, _, last = prefix.rpartition(".")
        dot = f"{parent}." if parent else ""
        fused = self.packed_modules_mapping.get(last)
        if not fused:
            usual = FUSED.get(last, ())
            stored = usual and any(name.startswith(f"{dot}{usual[0]}.") for name in self._stored)
            fused = usual if stored else [last]
        return [f"{dot}{name}" for name in fused]

    def _scheme_of(self, module: str, layer: str) -> Scheme | None:
        """The scheme of a quantized module; None where it is plain."""
        if any(is_layer_skipped(name, self.skipped, match_mode=self.match) for name in (layer, module)):
            return None
        scheme = self.scheme(module)
        if scheme is not None and self._stacked:
            scheme = of_one_expert(scheme)
        return None if scheme is None or self._is_plain(module, scheme) else scheme

    def _is_plain(self, module: str, scheme: Scheme) -> bool:
        """Whether the files hold a floating point ``weight``, or stack of them, and nothing else of the scheme."""
        dtype = DTYPES.get(self._stored.get(f"{module}.weight", self._stored.get(module, "")))
        if dtype is None or any(f"{module}.{suffix}" in self._stored for suffix in scheme.parts if suffix != "weight"):
            return False
        return "weight" not in scheme.parts or (dtype.is_floating_point and dtype not in dtypes(scheme, "weight"))


def _is_packed(layer: Module) -> bool:
    return isinstance(layer.quant_method, FormatLinearMethod)


def register(*formats: type[Format]) -> None:
    """Make formats known to the vLLM of this process; safe to call any number of times."""
    load()
    for one in formats:
        if _CUSTOMIZED_METHOD_TO_QUANT_CONFIG.get(one.name) is not one:
            register_quantization_config(one.name)(one)
