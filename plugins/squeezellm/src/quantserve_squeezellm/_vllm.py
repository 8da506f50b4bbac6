"""SqueezeLLM on vLLM: the quantization config and the linear method. Written against vLLM 0.32.

Config: `"quantization_config": {"quant_method": "squeezellm", "wbits": 4}` in config.json, or a quant_config.json with
`{"wbits": 4}` and `quantization="squeezellm"`. Optional keys: `modules_to_not_convert` (parts of module names), and
`sparse` ({module: {"nnz": int, "full_rows": int}}), which our converter and quantizer write: an entry whose tensors are
missing stops the engine, and vLLM's compile cache sees that two checkpoints differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn import Module, Parameter
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, QKVParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.utils import set_weight_attrs
from vllm.transformers_utils.config import get_safetensors_params_metadata

from quantserve_kernels import Linear, check_bias, from_squeezellm, load
from quantserve_squeezellm._format import BITS, csr, k_multiple
from quantserve_squeezellm._loading import SPARSE, LayerLoading, ShardId

METHOD = "squeezellm"


class SqueezeLLMConfig(QuantizationConfig):
    """vLLM's view of a SqueezeLLM checkpoint.

    Args:
        wbits: 3 or 4.
        modules_to_not_convert: linears whose name contains one of these stay unquantized.
        sparse: checkpoint module to what it declares beside the dense part.

    Raises:
        ValueError: any other width.
    """

    def __init__(
        self,
        wbits: int,
        modules_to_not_convert: Iterable[str] = (),
        sparse: Mapping[str, Mapping[str, int]] | None = None,
    ) -> None:
        super().__init__()
        if wbits not in BITS:
            raise ValueError(
                f"squeezellm: wbits is {wbits!r}; known widths are 3 and 4. Fix: correct the quantization config"
            )
        self.wbits = wbits
        self.modules_to_not_convert = list(modules_to_not_convert)
        self.sparse = {module: dict(declared) for module, declared in (sparse or {}).items()}
        self.unquantized: set[str] = set()  # modules the checkpoint's headers show to be plain

    def __repr__(self) -> str:
        return f"SqueezeLLMConfig(wbits={self.wbits}, modules_to_not_convert={self.modules_to_not_convert})"

    def get_name(self) -> str:
        """Name of the method."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Half, bfloat16 and float32: the codebooks stay float32 under each."""
        return [torch.half, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """CUDA compute capability 7.0 (Volta)."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Where the original checkpoints keep `wbits`."""
        return ["quant_config.json"]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SqueezeLLMConfig:
        """Read the quantization config; ValueError when `wbits` is absent or unknown."""
        wbits = config.get("wbits", config.get("bits"))
        if wbits is None:
            raise ValueError('squeezellm: the quantization config has no "wbits". Fix: add "wbits": 4 (or 3)')
        return cls(wbits, config.get("modules_to_not_convert") or (), config.get("sparse"))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim nothing: our checkpoints name their method themselves, and foreign ones are not ours."""
        return None

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Drop what carries no weights: thread start rows, and the counts original files keep beside the tensors."""
        return WeightsMapper(
            orig_to_new_prefix={"sparse_threshold.": None},
            orig_to_new_suffix={".startrows": None},
        )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Rename the modules we know by name to the engine's names."""
        self.modules_to_not_convert = hf_to_vllm_mapper.apply_list(self.modules_to_not_convert)
        self.sparse = hf_to_vllm_mapper.apply_dict(self.sparse)
        self.unquantized = set(hf_to_vllm_mapper.apply_list(sorted(self.unquantized)))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Learn from the safetensors headers which linears are not quantized."""
        suffixes: dict[str, set[str]] = {}
        for name in get_safetensors_params_metadata(model_name, revision=revision):
            module, _, suffix = name.rpartition(".")
            suffixes.setdefault(module, set()).add(suffix)
        self.unquantized = {module for module, has in suffixes.items() if "weight" in has and "qweight" not in has}

    def get_quant_method(self, layer: Module, prefix: str) -> QuantizeMethodBase | None:
        """Our method for quantized linears, vLLM's own for skipped ones, None for everything else."""
        if not isinstance(layer, LinearBase):
            return None
        return UnquantizedLinearMethod() if self._skipped(prefix) else SqueezeLLMLinearMethod(self)

    def checkpoint_modules(self, prefix: str) -> list[str]:
        """The checkpoint's modules fused into the engine's layer `prefix`; that name itself when nothing is fused."""
        parent, _, last = prefix.rpartition(".")
        fused = self.packed_modules_mapping.get(last) or [last]
        return [f"{parent}.{name}" if parent else name for name in fused]

    def _skipped(self, prefix: str) -> bool:
        modules = self.checkpoint_modules(prefix)
        skipped = [
            module
            for module in modules
            if module in self.unquantized or any(part in module for part in self.modules_to_not_convert)
        ]
        if skipped and len(skipped) < len(modules):
            raise ValueError(
                f"{prefix} is one fused layer, but only {', '.join(skipped)} of {', '.join(modules)} "
                "is unquantized. Fix: quantize all of them or none"
            )
        return bool(skipped)


class SqueezeLLMLinearMethod(LinearMethodBase):
    """One linear layer: packed codes, a float32 codebook per output channel, and perhaps sparse entries."""

    def __init__(self, config: SqueezeLLMConfig) -> None:
        self.config = config

    def create_weights(
        self,
        layer: Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register `qweight` int32 [k*bits/32, n], `lookup_table` float32 [n, 2**bits] and empty sparse placeholders.

        Raises:
            ValueError: this rank's share of the input features splits a packed word.
        """
        bits, k, n = self.config.wbits, input_size_per_partition, sum(output_partition_sizes)
        name = getattr(layer, "prefix", "") or type(layer).__name__
        if k % k_multiple(bits):
            raise ValueError(
                f"{name}: {bits}-bit SqueezeLLM needs in_features per rank in multiples of {k_multiple(bits)}, "
                f"but {input_size} over {input_size // k} ranks is {k}. Fix: a smaller tensor_parallel_size"
            )
        loading = LayerLoading(
            layer=layer,
            name=name,
            modules=_by_shard_id(layer, self.config.checkpoint_modules(name)),
            bits=bits,
            k=k,
            n=n,
            declared=self.config.sparse,
            base_loader=extra_weight_attrs.pop("weight_loader"),
        )
        qweight = Parameter(torch.zeros(k * bits // 32, n, dtype=torch.int32), requires_grad=False)
        table = Parameter(torch.full((n, 2**bits), float("nan"), dtype=torch.float32), requires_grad=False)
        layer.register_parameter("qweight", qweight)
        layer.register_parameter("lookup_table", table)
        set_weight_attrs(
            qweight,
            {"input_dim": 0, "output_dim": 1, "weight_loader": loading.dense_loader("qweight"), **extra_weight_attrs},
        )
        set_weight_attrs(
            table, {"output_dim": 0, "weight_loader": loading.dense_loader("lookup_table"), **extra_weight_attrs}
        )
        for suffix in SPARSE:
            dtype = torch.float32 if suffix in ("vals", "full_rows") else torch.int32
            placeholder = Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            layer.register_parameter(suffix, placeholder)
            set_weight_attrs(placeholder, {"weight_loader": loading.sparse_loader(suffix)})
        layer.squeezellm_loading = loading

    def process_weights_after_loading(self, layer: Module) -> None:
        """Check that everything arrived and pack it for the kernel, which takes the place of the loaded tensors.

        `qweight` is the packed codes from then on.

        Raises:
            ValueError: a tensor of this layer never arrived, or holds what no weight can be; names it.
        """
        engine = get_current_vllm_config_or_none()
        dummy = engine is not None and engine.load_config.load_format == "dummy"
        loading: LayerLoading = layer.squeezellm_loading
        n_index, k_index, values = loading.finish(verify=not dummy)
        device = layer.qweight.device
        sparse = csr(n_index, k_index, values, loading.n) if values.numel() else {}
        try:
            check_bias(getattr(layer, "bias", None))
            weight = from_squeezellm(
                layer.qweight.data,
                layer.lookup_table.data,
                tuple(sparse[name].to(device) for name in ("rows", "cols", "vals")) if sparse else None,
            )
        except ValueError as error:
            raise ValueError(f"{loading.name}: {error}. Fix: convert the checkpoint again") from error
        for name in ("qweight", "lookup_table", *SPARSE):
            delattr(layer, name)
        layer.kernel = Linear(weight)
        # vLLM's LoRA wrapper asks a quantized layer's `qweight` for its device, and does not wrap a layer without.
        layer.register_buffer("qweight", layer.kernel.codes, persistent=False)

    def apply(self, layer: Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x` [..., k] to [..., n] in x's dtype."""
        out: torch.Tensor = layer.kernel(x, bias)
        return out


def _by_shard_id(layer: Module, modules: list[str]) -> dict[ShardId, str]:
    if len(modules) == 1:
        return {None: modules[0]}
    return dict(zip("qkv" if isinstance(layer, QKVParallelLinear) else range(len(modules)), modules, strict=True))


def register() -> None:
    """Register the operators and the config with this process's vLLM; idempotent."""
    from vllm.model_executor.layers.quantization import _CUSTOMIZED_METHOD_TO_QUANT_CONFIG

    load()
    if _CUSTOMIZED_METHOD_TO_QUANT_CONFIG.get(METHOD) is not SqueezeLLMConfig:
        register_quantization_config(METHOD)(SqueezeLLMConfig)
