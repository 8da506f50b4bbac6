"""Every format of docs/formats.md as its tool writes it: what a plugin must not claim unless the format is its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantserve.checkpoint import Checkpoint
from quantserve.checks.formats import FORMATS

N, K = 512, 256
Spec = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sample:
    """The headers of one format.

    Attributes:
        format: its key in `quantserve.checks.formats.FORMATS`, "" for unquantized files.
        quantization: ``quantization_config``; None for none.
        tensors: of a linear [N, K], by suffix; of experts by the whole rest of the name.
        config: further keys of config.json.
        quant_files: further JSON files.
    """

    format: str
    quantization: Mapping[str, Any] | None = None
    tensors: Mapping[str, Spec] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    quant_files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        """This project's plugin for it; "" where there is none."""
        return FORMATS[self.format].plugin if self.format else "fp16"

    def checkpoint(self) -> Checkpoint:
        """The headers as a checkpoint of one linear."""
        name = "model.layers.0.self_attn.q_proj"
        tensors = {f"{name}.{suffix}": spec for suffix, spec in self.tensors.items()}
        tensors |= {"model.embed_tokens.weight": ("BF16", (1024, K)), "model.norm.weight": ("BF16", (K,))}
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **self.config}
        if self.quantization is not None:
            config["quantization_config"] = dict(self.quantization)
        return Checkpoint.from_tensors(config, tensors, quant_files=self.quant_files)


def _method(name: str, **settings: object) -> dict[str, object]:
    return {"quant_method": name, **settings}


def _group(
    num_bits: int, kind: str, strategy: str, inputs: Mapping[str, object] | None = None, **more: object
) -> dict[str, object]:
    weights = {"num_bits": num_bits, "type": kind, "strategy": strategy, "symmetric": True, **more}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}}


GROUPS = _group(4, "int", "group", group_size=128)
WEIGHT = {"weight": ("BF16", (N, K))}
GPTQ = {"qweight": ("I32", (K // 8, N)), "qzeros": ("I32", (K // 128, N // 8)), "scales": ("F16", (K // 128, N)),
        "g_idx": ("I32", (K,))}  # fmt: skip
AWQ = {"qweight": ("I32", (K, N // 8)), "qzeros": ("I32", (K // 128, N // 8)), "scales": ("F16", (K // 128, N))}
FP8 = {"weight": ("F8_E4M3", (N, K)), "weight_scale": ("F32", ())}
MODELOPT_FP8 = {**FP8, "input_scale": ("F32", ())}
FP8_BLOCK = {"weight": ("F8_E4M3", (N, K)), "weight_scale_inv": ("F32", (N // 128, K // 128))}
PACKED = {"weight_packed": ("I32", (N, K // 8)), "weight_scale": ("BF16", (N, K // 128)), "weight_shape": ("I64", (2,))}
CT_NVFP4 = {"weight_packed": ("U8", (N, K // 2)), "weight_scale": ("F8_E4M3", (N, K // 16)),
            "weight_global_scale": ("F32", (1,))}  # fmt: skip
NVFP4 = {"weight": ("U8", (N, K // 2)), "weight_scale": ("F8_E4M3", (N, K // 16)), "weight_scale_2": ("F32", ()),
         "input_scale": ("F32", ())}  # fmt: skip
NF4 = {"weight": ("U8", (N * K // 2, 1)), "weight.absmax": ("F32", (N * K // 64,)), "weight.quant_map": ("F32", (16,)),
       "weight.quant_state.bitsandbytes__nf4": ("U8", (90,))}  # fmt: skip
INT8 = {"weight": ("I8", (N, K)), "weight_scale": ("F32", (N, 1))}
BNB8 = {"weight": ("I8", (N, K)), "SCB": ("F32", (N,)), "weight_format": ("U8", ())}
HQQ = {"W_q": ("U8", (N * K // 128, 64)), "scale": ("BF16", (N * K // 64, 1)), "zero": ("BF16", (N * K // 64, 1))}
SQUEEZELLM = {"qweight": ("I32", (K // 8, N)), "lookup_table": ("F32", (N, 16))}
INPUTS = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
HF_QUANT = "hf_quant_config.json"


def _modelopt(algorithm: str) -> dict[str, Any]:
    return {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": algorithm, "exclude_modules": ["lm_head"]}}


SAMPLES: Mapping[str, Sample] = {
    "unquantized": Sample("", None, WEIGHT),
    "gptq": Sample("gptq", _method("gptq", bits=4, group_size=128, sym=True, desc_act=False), GPTQ),
    "gptq, a file": Sample(
        "gptq", None, GPTQ, quant_files={"quantize_config.json": {"bits": 4, "group_size": 128, "desc_act": True}}
    ),
    "gptq, tensors": Sample("gptq", None, GPTQ),
    "gptq, upper case": Sample("gptq", _method("GPTQ", bits=4, group_size=128, sym=True, desc_act=False), GPTQ),
    "awq": Sample("awq", _method("awq", bits=4, group_size=128, zero_point=True, version="gemm"), AWQ),
    "awq, a file": Sample(
        "awq", None, AWQ,
        quant_files={"quant_config.json": {"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"}},
    ),
    "awq, tensors": Sample("awq", None, AWQ),
    "squeezellm": Sample("squeezellm", _method("squeezellm", wbits=4), SQUEEZELLM),
    "squeezellm, tensors": Sample("squeezellm", None, SQUEEZELLM),
    "fp8 per tensor": Sample("fp8", _method("fp8", activation_scheme="static"), FP8),
    "fp8 blocks": Sample(
        "fp8", _method("fp8", activation_scheme="dynamic", weight_block_size=[128, 128], fmt="e4m3"), FP8_BLOCK
    ),
    "fp8, tensors": Sample("fp8", None, FP8_BLOCK),
    "compressed-tensors W4A16": Sample(
        "compressed-tensors",
        _method("compressed-tensors", format="pack-quantized", ignore=["lm_head"], **GROUPS), PACKED,
    ),
    "compressed-tensors, an underscore": Sample(
        "compressed-tensors",
        _method("compressed_tensors", format="pack-quantized", ignore=["lm_head"], **GROUPS), PACKED,
    ),
    "compressed-tensors W8A8": Sample(
        "compressed-tensors",
        _method("compressed-tensors", format="int-quantized", **_group(8, "int", "channel", INPUTS)), INT8,
    ),
    "compressed-tensors FP8": Sample(
        "compressed-tensors",
        _method("compressed-tensors", format="float-quantized", **_group(8, "float", "tensor")), FP8,
    ),
    "compressed-tensors NVFP4": Sample(
        "compressed-tensors",
        _method(
            "compressed-tensors", format="nvfp4-pack-quantized", **_group(4, "float", "tensor_group", group_size=16)
        ),
        CT_NVFP4,
    ),
    "compressed-tensors, tensors": Sample("compressed-tensors", None, PACKED),
    "modelopt FP8": Sample("modelopt", _method("modelopt", quant_algo="FP8", ignore=["lm_head"]), MODELOPT_FP8),
    "modelopt FP8, a file": Sample("modelopt", None, MODELOPT_FP8, quant_files={HF_QUANT: _modelopt("FP8")}),
    "modelopt NVFP4": Sample("modelopt_fp4", _method("modelopt", quant_algo="NVFP4", ignore=["lm_head"]), NVFP4),
    "modelopt NVFP4, a file": Sample("modelopt_fp4", None, NVFP4, quant_files={HF_QUANT: _modelopt("NVFP4")}),
    "mxfp4 experts": Sample(
        "mxfp4", _method("mxfp4", modules_to_not_convert=["lm_head"]),
        {"experts.gate_up_proj_blocks": ("U8", (4, N, K // 32, 16)),
         "experts.gate_up_proj_scales": ("U8", (4, N, K // 32))},
    ),
    "bitsandbytes NF4": Sample(
        "bitsandbytes", _method("bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4"), NF4
    ),
    "bitsandbytes NF4, tensors": Sample("bitsandbytes", None, NF4),
    "bitsandbytes int8": Sample("bitsandbytes", _method("bitsandbytes", load_in_8bit=True), BNB8),
    "hqq": Sample(
        "hqq", _method("hqq", quant_config={"weight_quant_params": {"nbits": 4, "group_size": 64, "axis": 1}}), HQQ
    ),
    "hqq, tensors": Sample("hqq", None, HQQ),
    "quark": Sample("quark", _method("quark", export={"kv_cache_group": [], "pack_method": "order"}), INT8),
    "torchao": Sample("torchao", _method("torchao", quant_type={"default": {"_type": "Int8WeightOnlyConfig"}}), WEIGHT),
    "auto-round": Sample(
        "auto-round",
        _method("auto-round", bits=4, group_size=128, sym=True, packing_format="auto_round:auto_gptq"), GPTQ,
    ),
    "auto-round, old": Sample("intel/auto-round", _method("intel/auto-round", bits=4, group_size=128), GPTQ),
    "inc": Sample("inc", _method("inc", bits=4, group_size=128, sym=True), GPTQ),
    "fbgemm_fp8": Sample(
        "fbgemm_fp8", _method("fbgemm_fp8", activation_scale_ub=1200.0, modules_to_not_convert=[]),
        {"weight": ("F8_E4M3", (N, K)), "weight_scale": ("F32", (N, 1))},
    ),
    "fp_quant": Sample("fp_quant", _method("fp_quant", forward_dtype="mxfp4"), {"qweight": ("U8", (N, K // 2))}),
    "mxfp8": Sample("mxfp8", _method("mxfp8"), {"weight": ("F8_E4M3", (N, K)), "weight_scale": ("U8", (N, K // 32))}),
    "experts_int8": Sample("experts_int8", _method("experts_int8"), WEIGHT),
    "exl2": Sample("exl2", _method("exl2", bits=4.0), {"q_weight": ("I32", (K // 8, N)), "q_invperm": ("I16", (K,))}),
    "exl2, tensors": Sample("exl2", None, {"q_weight": ("I32", (K // 8, N)), "q_invperm": ("I16", (K,))}),
    "exl3": Sample(
        "exl3", _method("exl3", bits=3.0, head_bits=6),
        {"trellis": ("I16", (K // 16, N // 16, 48)), "suh": ("F16", (K,)), "svh": ("F16", (N,))},
    ),
    "exl3, tensors": Sample(
        "exl3", None, {"trellis": ("I16", (K // 16, N // 16, 48)), "suh": ("F16", (K,)), "svh": ("F16", (N,))}
    ),
    "aqlm": Sample(
        "aqlm", _method("aqlm", in_group_size=8, out_group_size=1, num_codebooks=1, nbits_per_codebook=16),
        {"codes": ("I16", (N, K // 8, 1)), "codebooks": ("F16", (1, 65536, 1, 8)), "scales": ("F16", (N, 1, 1, 1))},
    ),
    "aqlm, tensors": Sample(
        "aqlm", None,
        {"codes": ("I16", (N, K // 8, 1)), "codebooks": ("F16", (1, 65536, 1, 8)), "scales": ("F16", (N, 1, 1, 1))},
    ),
    "quip#": Sample("quip#", None, {"Qidxs": ("I64", (N // 16, K // 64)), "SU": ("F16", (K,)), "SV": ("F32", (N,))}),
    "qtip": Sample(
        "qtip", None, {"trellis": ("I16", (N * K // 256, 32)), "SU": ("F16", (K,)), "tlut": ("F16", (512, 2))}
    ),
    "vptq": Sample(
        "vptq", _method("vptq", config_for_layers={}),
        {"centroids.weight": ("BF16", (1, 65536 * 8)), "indices": ("I32", (1, N // 8, K))},
    ),
    "spqr": Sample(
        "spqr", _method("spqr", bits=3, beta1=16, beta2=16),
        {"dense_weights": ("I64", (64,)), "col_vals": ("I32", (9,))},
    ),
    "bitnet": Sample("bitnet", _method("bitnet"), {"weight": ("U8", (N // 4, K)), "weight_scale": ("BF16", (1,))}),
    "eetq": Sample("eetq", _method("eetq", weights="int8"), {"weight": ("I8", (K, N)), "weight_scales": ("F16", (N,))}),
    "quanto": Sample("quanto", _method("quanto", weights="int8"), {"weight._data": ("I8", (N, K))}),
    "higgs": Sample("higgs", _method("higgs", bits=4, p=2), {"weight": ("I16", (N // 8, K)), "tables": ("F16", (16,))}),
    "mlx": Sample(
        "mlx", None,
        {"weight": ("U32", (N, K // 8)), "scales": ("BF16", (N, K // 64)), "biases": ("BF16", (N, K // 64))},
        config={"quantization": {"group_size": 64, "bits": 4}},
    ),
}  # fmt: skip
"""Samples by name."""
