"""Every format of docs/formats.md, as its tool writes it: one plugin claims it, or a refusal names what serves it.

A plugin that is not installed here counts as one that a user lacks: the refusal has to say which to install.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from quantserve.checkpoint import Checkpoint
from quantserve.checks.formats import FORMATS
from quantserve.families import quantization_methods
from quantserve.planning.detection import detect
from quantserve.plugins.claims import OURS
from quantserve.plugins.registry import Hooks, Registry

ROOT = Path(__file__).parents[2]
N, K = 512, 256
Spec = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """One format as its tool writes it.

    Attributes:
        format: its key in `FORMATS`, "" for unquantized files.
        quantization: ``quantization_config``; None for none.
        tensors: of a linear [N, K], by suffix; of experts by the whole rest of the name.
        config: further keys of config.json.
        quant_files: further JSON files.
        plugin: who claims it; "" for nobody.
    """

    format: str
    quantization: Mapping[str, Any] | None = None
    tensors: Mapping[str, Spec] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    quant_files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    plugin: str = "same"

    @property
    def owner(self) -> str:
        if self.plugin != "same":
            return self.plugin
        return FORMATS[self.format].plugin if self.format else "fp16"

    def checkpoint(self) -> Checkpoint:
        name = "model.layers.0.self_attn.q_proj"
        tensors = {f"{name}.{suffix}": spec for suffix, spec in self.tensors.items()}
        tensors |= {"model.embed_tokens.weight": ("BF16", (1024, K)), "model.norm.weight": ("BF16", (K,))}
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **self.config}
        if self.quantization is not None:
            config["quantization_config"] = dict(self.quantization)
        return Checkpoint.from_tensors(config, tensors, quant_files=self.quant_files)


def method(name: str, **settings: object) -> dict[str, object]:
    return {"quant_method": name, **settings}


def group(num_bits: int, kind: str, strategy: str, **more: object) -> dict[str, object]:
    weights = {"num_bits": num_bits, "type": kind, "strategy": strategy, "symmetric": True, **more}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}}


WEIGHT = {"weight": ("BF16", (N, K))}
GPTQ = {"qweight": ("I32", (K // 8, N)), "qzeros": ("I32", (K // 128, N // 8)), "scales": ("F16", (K // 128, N)),
        "g_idx": ("I32", (K,))}  # fmt: skip
AWQ = {"qweight": ("I32", (K, N // 8)), "qzeros": ("I32", (K // 128, N // 8)), "scales": ("F16", (K // 128, N))}
FP8 = {"weight": ("F8_E4M3", (N, K)), "weight_scale": ("F32", ())}
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
HF_QUANT = "hf_quant_config.json"


def modelopt(algorithm: str) -> dict[str, Any]:
    return {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": algorithm, "exclude_modules": ["lm_head"]}}


CASES: Mapping[str, Case] = {
    "unquantized": Case("", None, WEIGHT),
    "gptq": Case("gptq", method("gptq", bits=4, group_size=128, sym=True, desc_act=False), GPTQ),
    "gptq, a file": Case(
        "gptq", None, GPTQ, quant_files={"quantize_config.json": {"bits": 4, "group_size": 128, "desc_act": True}}
    ),
    "gptq, tensors": Case("gptq", None, GPTQ),
    "gptq, upper case": Case("gptq", method("GPTQ", bits=4, group_size=128, sym=True, desc_act=False), GPTQ),
    "awq": Case("awq", method("awq", bits=4, group_size=128, zero_point=True, version="gemm"), AWQ),
    "awq, a file": Case(
        "awq", None, AWQ,
        quant_files={"quant_config.json": {"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"}},
    ),
    "awq, tensors": Case("awq", None, AWQ),
    "squeezellm": Case("squeezellm", method("squeezellm", wbits=4), SQUEEZELLM),
    "squeezellm, tensors": Case("squeezellm", None, SQUEEZELLM),
    "fp8 per tensor": Case("fp8", method("fp8", activation_scheme="static"), FP8),
    "fp8 blocks": Case(
        "fp8", method("fp8", activation_scheme="dynamic", weight_block_size=[128, 128], fmt="e4m3"), FP8_BLOCK
    ),
    "fp8, tensors": Case("fp8", None, FP8_BLOCK),
    "compressed-tensors W4A16": Case(
        "compressed-tensors",
        method("compressed-tensors", format="pack-quantized", ignore=["lm_head"], **group(4, "int", "group")), PACKED,
    ),
    "compressed-tensors, an underscore": Case(
        "compressed-tensors",
        method("compressed_tensors", format="pack-quantized", ignore=["lm_head"], **group(4, "int", "group")), PACKED,
    ),
    "compressed-tensors W8A8": Case(
        "compressed-tensors", method("compressed-tensors", format="int-quantized", **group(8, "int", "channel")), INT8
    ),
    "compressed-tensors FP8": Case(
        "compressed-tensors", method("compressed-tensors", format="float-quantized", **group(8, "float", "tensor")), FP8
    ),
    "compressed-tensors NVFP4": Case(
        "compressed-tensors",
        method("compressed-tensors", format="nvfp4-pack-quantized", **group(4, "float", "tensor_group", group_size=16)),
        CT_NVFP4,
    ),
    "compressed-tensors, tensors": Case("compressed-tensors", None, PACKED),
    "modelopt FP8": Case("modelopt", method("modelopt", quant_algo="FP8", ignore=["lm_head"]), FP8),
    "modelopt FP8, a file": Case("modelopt", None, FP8, quant_files={HF_QUANT: modelopt("FP8")}),
    "modelopt NVFP4": Case("modelopt_fp4", method("modelopt", quant_algo="NVFP4", ignore=["lm_head"]), NVFP4),
    "modelopt NVFP4, a file": Case("modelopt_fp4", None, NVFP4, quant_files={HF_QUANT: modelopt("NVFP4")}),
    "mxfp4 experts": Case(
        "mxfp4", method("mxfp4", modules_to_not_convert=["lm_head"]),
        {"experts.gate_up_proj_blocks": ("U8", (4, N, K // 32, 16)),
         "experts.gate_up_proj_scales": ("U8", (4, N, K // 32))},
    ),
    "bitsandbytes NF4": Case(
        "bitsandbytes", method("bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4"), NF4
    ),
    "bitsandbytes NF4, tensors": Case("bitsandbytes", None, NF4),
    "bitsandbytes int8": Case("bitsandbytes", method("bitsandbytes", load_in_8bit=True), BNB8),
    "hqq": Case("hqq", method("hqq", quant_config={"weight_quant_params": {"nbits": 4, "group_size": 64}}), HQQ),
    "hqq, tensors": Case("hqq", None, HQQ),
    "quark": Case("quark", method("quark", export={"kv_cache_group": [], "pack_method": "order"}), INT8),
    "torchao": Case("torchao", method("torchao", quant_type={"default": {"_type": "Int8WeightOnlyConfig"}}), WEIGHT),
    "auto-round": Case(
        "auto-round",
        method("auto-round", bits=4, group_size=128, sym=True, packing_format="auto_round:auto_gptq"), GPTQ,
    ),
    "auto-round, old": Case("intel/auto-round", method("intel/auto-round", bits=4, group_size=128), GPTQ),
    "inc": Case("inc", method("inc", bits=4, group_size=128, sym=True), GPTQ),
    "fbgemm_fp8": Case(
        "fbgemm_fp8", method("fbgemm_fp8", activation_scale_ub=1200.0, modules_to_not_convert=[]),
        {"weight": ("F8_E4M3", (N, K)), "weight_scale": ("F32", (N, 1))},
    ),
    "fp_quant": Case("fp_quant", method("fp_quant", forward_dtype="mxfp4"), {"qweight": ("U8", (N, K // 2))}),
    "mxfp8": Case("mxfp8", method("mxfp8"), {"weight": ("F8_E4M3", (N, K)), "weight_scale": ("U8", (N, K // 32))}),
    "experts_int8": Case("experts_int8", method("experts_int8"), WEIGHT),
    "exl2": Case("exl2", method("exl2", bits=4.0), {"q_weight": ("I32", (K // 8, N)), "q_invperm": ("I16", (K,))}),
    "exl2, tensors": Case("exl2", None, {"q_weight": ("I32", (K // 8, N)), "q_invperm": ("I16", (K,))}),
    "exl3": Case(
        "exl3", method("exl3", bits=3.0, head_bits=6),
        {"trellis": ("I16", (K // 16, N // 16, 48)), "suh": ("F16", (K,)), "svh": ("F16", (N,))},
    ),
    "exl3, tensors": Case(
        "exl3", None, {"trellis": ("I16", (K // 16, N // 16, 48)), "suh": ("F16", (K,)), "svh": ("F16", (N,))}
    ),
    "aqlm": Case(
        "aqlm", method("aqlm", in_group_size=8, out_group_size=1, num_codebooks=1, nbits_per_codebook=16),
        {"codes": ("I16", (N, K // 8, 1)), "codebooks": ("F16", (1, 65536, 1, 8)), "scales": ("F16", (N, 1, 1, 1))},
    ),
    "aqlm, tensors": Case(
        "aqlm", None,
        {"codes": ("I16", (N, K // 8, 1)), "codebooks": ("F16", (1, 65536, 1, 8)), "scales": ("F16", (N, 1, 1, 1))},
    ),
    "quip#": Case("quip#", None, {"Qidxs": ("I64", (N // 16, K // 64)), "SU": ("F16", (K,)), "SV": ("F32", (N,))}),
    "qtip": Case(
        "qtip", None, {"trellis": ("I16", (N * K // 256, 32)), "SU": ("F16", (K,)), "tlut": ("F16", (512, 2))}
    ),
    "vptq": Case(
        "vptq", method("vptq", config_for_layers={}),
        {"centroids.weight": ("BF16", (1, 65536 * 8)), "indices": ("I32", (1, N // 8, K))},
    ),
    "spqr": Case(
        "spqr", method("spqr", bits=3, beta1=16, beta2=16), {"dense_weights": ("I64", (64,)), "col_vals": ("I32", (9,))}
    ),
    "bitnet": Case("bitnet", method("bitnet"), {"weight": ("U8", (N // 4, K)), "weight_scale": ("BF16", (1,))}),
    "eetq": Case("eetq", method("eetq", weights="int8"), {"weight": ("I8", (K, N)), "weight_scales": ("F16", (N,))}),
    "quanto": Case("quanto", method("quanto", weights="int8"), {"weight._data": ("I8", (N, K))}),
    "higgs": Case("higgs", method("higgs", bits=4, p=2), {"weight": ("I16", (N // 8, K)), "tables": ("F16", (16,))}),
    "mlx": Case(
        "mlx", None,
        {"weight": ("U32", (N, K // 8)), "scales": ("BF16", (N, K // 64)), "biases": ("BF16", (N, K // 64))},
        config={"quantization": {"group_size": 64, "bits": 4}},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.load({})


@pytest.mark.parametrize("name", CASES)
def test_every_format_has_one_claimant_or_a_refusal_that_helps(name: str, registry: Registry) -> None:
    case = CASES[name]
    checkpoint = case.checkpoint()
    candidates = [plugin for plugin in registry.plugins.values() if plugin.method]
    hooks = Hooks(candidates)
    claimants = [p.name for p in candidates if hooks.call(p, "quantserve_detect", bool, checkpoint=checkpoint)]
    detected = detect(checkpoint, registry)
    if case.owner in registry.plugins:
        assert claimants == [case.owner]
        assert detected.plugin is not None
        assert detected.plugin.name == case.owner
        return
    assert claimants == []
    (finding,) = detected.findings
    known = FORMATS[case.format]
    assert finding.code == "method-not-detected"
    assert known.title in finding.message
    assert known.tool in finding.message
    if known.elsewhere:
        assert known.elsewhere in finding.message
        assert known.elsewhere in finding.fix
    elif case.owner in OURS:
        assert f"pip install 'quantserve[{case.owner}]'" in finding.fix
    elif case.format in quantization_methods():
        assert "serves it by itself" in finding.message
        assert f"quantserve-{case.owner}" not in finding.message  # there is none to install


def test_a_plugin_that_a_user_lacks_is_named_with_the_command() -> None:
    registry = Registry.load({"QUANTSERVE_PLUGINS": "fp16"})
    for name, case in CASES.items():
        declared = (case.checkpoint().quantization_config or {}).get("quant_method")
        if case.owner not in OURS or case.owner == "fp16" or declared:
            continue  # a declared method whose plugin is switched off is another message
        (finding,) = detect(case.checkpoint(), registry).findings
        assert finding.fix.startswith(f"`pip install 'quantserve[{case.owner}]'`"), name


def test_every_format_is_here() -> None:
    assert {case.format for case in CASES.values()} >= FORMATS.keys() - {"gguf"}  # a container: see the readers


def test_the_documentation_has_every_format_and_plugin() -> None:
    page = (ROOT / "docs" / "formats.md").read_text()
    missing = [one.title for one in FORMATS.values() if not re.search(rf"\b{re.escape(one.title)}", page)]
    missing += [name for name in OURS if f"(../plugins/{name}/README.md)" not in page]
    assert not missing


def test_no_name_belongs_to_two_plugins(registry: Registry) -> None:
    """Of plugins from outside the registry settles that; this project's own must not need it."""
    said = [plugin.module.quantserve_method() for plugin in registry.plugins.values() if plugin.name in OURS]
    names = [name for method in said for name in method.names]
    assert sorted(names) == sorted(set(names))
