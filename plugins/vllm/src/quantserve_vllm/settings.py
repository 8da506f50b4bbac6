"""What vLLM 0.32 requires of the quantization config of each method, read from its ``from_config``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Config = Mapping[str, Any]
Wrong = tuple[str, str, str]
"""Key, what is wrong with it, and the fix."""

AGAIN = "export the model again with a version that writes it"
PACKINGS = ("auto_round:auto_gptq", "auto_round:auto_awq", "auto_round:fp8", "auto_round:llm_compressor")
BACKENDS = ("auto", "gptq", "gptq:marlin", "awq", "awq:marlin", "marlin")


def auto_round(config: Config) -> Iterator[Wrong]:
    """AutoRound: integers in GPTQ's or AWQ's packing, FP8 in blocks, MXFP4 and MXFP8."""
    if config.get("quant_method") == "intel/auto-round":
        yield "quant_method", "is 'intel/auto-round', which vLLM does not know", 'write "auto-round"'
    missing = [key for key in ("bits", "group_size") if key not in config]
    if missing:
        yield from ((key, "is missing", AGAIN) for key in missing)
        return
    bits, group, kind = config["bits"], config["group_size"], str(config.get("data_type", "int"))
    kind = "fp" if kind == "fp8" else kind
    blocks = isinstance(group, (list, tuple)) and len(group) == 2
    if bits not in range(2, 9):
        yield "bits", f"is {bits!r}", "quantize with 2 to 8 bits"
    if kind not in ("int", "fp") and "mx_fp" not in kind:
        yield "data_type", f"is {kind!r}", "export as int, fp (FP8 in blocks) or mx_fp"
        return
    packing = config.get("packing_format") or _packing(kind, bits, blocks)
    backend = config.get("backend", config.get("vllm_backend", "auto"))
    if backend not in BACKENDS:
        yield "backend", f"is {backend!r}", f"write one of {', '.join(BACKENDS)}"
    wanted = {"int": PACKINGS[:2], "fp": PACKINGS[2:3]}.get(kind, PACKINGS[3:])
    if packing not in wanted:
        yield "packing_format", f"is {packing!r}; for data_type {kind!r} vLLM takes {' or '.join(wanted)}", _REPACK
    if kind == "int":
        if not isinstance(group, int):
            yield "group_size", f"is {group!r}; integers need one number", "quantize with one number, such as 128"
        return
    if config.get("sym", True) is not True:
        yield "sym", f"is {config['sym']!r}; floating-point weights have no zero points", "quantize with sym true"
    if kind == "fp":
        if bits != 8:
            yield "bits", f"is {bits!r}; FP8 has 8", AGAIN
        if not blocks:
            yield "group_size", f"is {group!r}; FP8 needs the sizes of a block, such as [128, 128]", AGAIN
    else:
        if bits not in (4, 8):
            yield "bits", f"is {bits!r}; MX formats have 4 or 8", AGAIN
        if group != 32:
            yield "group_size", f"is {group!r}; MX formats have groups of 32", AGAIN


_REPACK = "export again: format='auto_round' (integers), 'llm_compressor' (MX formats)"


def _packing(kind: str, bits: object, blocks: bool) -> str:
    if kind == "fp" and bits == 8 and blocks:
        return PACKINGS[2]
    return PACKINGS[3] if "mx_fp" in kind else PACKINGS[0]


def quark(config: Config) -> Iterator[Wrong]:
    """Quark: the export section, the global and the layers' settings."""
    export = config.get("export")
    if not isinstance(export, Mapping):
        yield "export", "is missing", AGAIN
    elif not isinstance(export.get("kv_cache_group"), list):
        yield "export.kv_cache_group", "is no list", "write [] where the KV cache is not quantized"
    elif group := export["kv_cache_group"]:
        layers = config.get("layer_quant_config")
        if not isinstance(layers, Mapping) or not layers:
            yield "layer_quant_config", f"has no settings for the KV cache of {group[0]!r}", AGAIN
    for key in ("layer_type_quant_config", "global_quant_config"):
        if not isinstance(config.get(key), Mapping):
            yield key, "is missing", AGAIN
    if not isinstance(config.get("exclude"), list):
        yield "exclude", "is no list", "write [] where every linear is quantized"
    every = config.get("global_quant_config")
    if isinstance(every, Mapping):
        for key in ("output_tensors", "bias"):
            if every.get(key):
                yield f"global_quant_config.{key}", "is set; vLLM serves neither quantized outputs nor biases", AGAIN
        weight = every.get("weight")
        if isinstance(weight, Mapping) and weight.get("dtype") in ("int4", "uint4") and not every.get("input_tensors"):
            for key in ("group_size", "symmetric"):
                if key not in weight:
                    yield f"global_quant_config.weight.{key}", "is missing", AGAIN


def torchao(config: Config) -> Iterator[Wrong]:
    """Torchao: one serialized config under ``quant_type.default``."""
    kinds = config.get("quant_type")
    if not isinstance(kinds, Mapping):
        yield "quant_type", "is missing or no object (old files name a type in a text)", AGAIN
    elif list(kinds) != ["default"]:
        yield "quant_type", f"has the keys {', '.join(map(str, kinds)) or 'none'}; vLLM takes default alone", AGAIN
    elif not isinstance(kinds["default"], Mapping) or "_type" not in kinds["default"]:
        yield "quant_type.default", "has no _type, so that torchao cannot read it", AGAIN


def fbgemm_fp8(config: Config) -> Iterator[Wrong]:
    """FBGEMM FP8: two keys."""
    yield from _required(config, "modules_to_not_convert", "activation_scale_ub")


def fp_quant(config: Config) -> Iterator[Wrong]:
    """FP-Quant: four keys, MXFP4 or NVFP4."""
    yield from _required(config, "hadamard_group_size", "forward_dtype", "forward_method", "modules_to_not_convert")
    kind = config.get("forward_dtype", "mxfp4")
    if kind not in ("mxfp4", "nvfp4"):
        yield "forward_dtype", f"is {kind!r}", "quantize with mxfp4 or nvfp4"


def moe_wna16(config: Config) -> Iterator[Wrong]:
    """GPTQ or AWQ files for vLLM's kernel of experts."""
    bits, method = config.get("bits"), str(config.get("quant_method")).lower()
    if bits not in ((4, 8) if method == "gptq" else (4,)):
        yield "bits", f"is {bits!r}; moe_wna16 takes 4 (and 8 of GPTQ)", "leave engine_kwargs.quantization out"
    if method == "gptq" and config.get("desc_act") and config.get("group_size") != -1:
        yield "desc_act", "is true; moe_wna16 takes no act-order", "leave engine_kwargs.quantization out"


def auto_round_on_cpus(config: Config, amx: bool) -> str:
    """What of an AutoRound config vLLM has no CPU kernel for, "" for nothing."""
    kind, bits, sym = str(config.get("data_type", "int")), config.get("bits"), config.get("sym", True)
    if kind in ("fp", "fp8"):
        return "" if amx else "FP8 in blocks, and this CPU has no AMX"
    if kind != "int":
        return f"data_type {kind}"
    awq = str(config.get("packing_format", "")).endswith("awq")
    if (bits, sym) == (4, not awq):
        return ""
    return f"bits {bits} and sym {sym}; {'AWQ' if awq else 'GPTQ'} packing needs 4 bits and sym {not awq}"


def quark_on_cpus(config: Config, amx: bool) -> str:
    """What of a Quark config vLLM has no CPU kernel for, "" for nothing. Settings of single layers are not read."""
    weight, inputs = (_only(config["global_quant_config"].get(key)) for key in ("weight", "input_tensors"))
    kind = str(weight.get("dtype", ""))
    if kind.startswith(("fp4", "fp6", "mx")):
        return f"{kind} weights"
    if kind == "fp8_e4m3" and not amx and (weight.get("qscheme") == "per_block" or not inputs.get("is_dynamic")):
        return "FP8 in blocks or with stored scales of the activations, and this CPU has no AMX"
    return ""


def _only(value: object) -> Config:
    """A tensor's settings, of several the first."""
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, Mapping) else {}


def _required(config: Config, *keys: str) -> Iterator[Wrong]:
    yield from ((key, "is missing", f"write {key} into it, as the tool does") for key in keys if key not in config)


CHECKS: Mapping[str, Callable[[Config], Iterator[Wrong]]] = {
    "inc": auto_round,
    "quark": quark,
    "torchao": torchao,
    "fbgemm_fp8": fbgemm_fp8,
    "fp_quant": fp_quant,
    "moe_wna16": moe_wna16,
}
"""By vLLM's argument; the others have no settings that vLLM requires."""
