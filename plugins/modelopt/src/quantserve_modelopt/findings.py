"""What is wrong with ModelOpt checkpoints, on either device."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

from quantserve.api import (
    Checkpoint,
    Finding,
    Linear,
    Target,
    check_fused_blocks,
    first_bytes,
    linears,
    modules,
    once,
    other_tensors,
)
from quantserve_modelopt.format import (
    ARGUMENTS,
    BLOCK,
    CHANNEL,
    FILE,
    FP8,
    GROUP,
    MIXED,
    NAMES,
    NVFP4,
    SIDE,
    W4A16,
    Settings,
    body,
    excludes,
)  # fmt: skip

SHOWN = 8
MOST_READ = 2000
"""Scales whose values are read at most."""
CAPABILITY = {NAMES[0]: 80, NAMES[2]: 80}
"""Lowest compute capability times ten of vLLM's methods that need more than 7.5."""
_CODES = ("F8_E4M3", "U8")


@once
def quantized(checkpoint: Checkpoint) -> list[str]:
    """The modules with a quantized weight."""
    return [name[:-7] for name, one in checkpoint.tensors.items() if name.endswith(".weight") and one.dtype in _CODES]


def file_findings(checkpoint: Checkpoint, *, cpu: bool) -> Iterator[Finding]:
    """config.json and hf_quant_config.json that contradict each other, or depend on each other on CPUs."""
    config, file = checkpoint.config.get("quantization_config"), checkpoint.quant_files.get(FILE)
    if not isinstance(config, Mapping) or file is None:
        return
    own, other, odd = body(config), body(file), []
    for key, key_of_file in (("quant_algo", "quant_algo"), ("group_size", "group_size"), ("ignore", "exclude_modules")):
        values = own.get(key), other.get(key_of_file)
        alike = [sorted(map(str, one)) if isinstance(one, list) else str(one).upper() for one in values]
        if all(values) and alike[0] != alike[1]:
            said = [str(one)[:60] for one in values]
            odd.append(f"{key} is {said[0]} in config.json, {key_of_file} {said[1]} in {FILE}")
    if odd:
        message = f"config.json and {FILE} disagree, and vLLM reads config.json. First: {odd[0]}"
        yield Finding.warning("modelopt-files-disagree", message, odd, f"correct one of them, or remove {FILE}")
    if cpu and str(own.get("quant_algo")).upper() == MIXED and "quantized_layers" not in own:
        message = f"quantized_layers is in {FILE} only, which is read on GPUs and not on CPUs"
        yield Finding.error("modelopt-settings", message, [FILE], "copy quantized_layers into config.json")


def list_findings(checkpoint: Checkpoint, config: Settings, *, cpu: bool) -> Iterator[Finding]:
    """Entries of the list of unquantized modules without a module, and an output layer against the list."""
    present = [*modules(checkpoint), "lm_head"]  # which a tied model does not store
    unused = [entry for entry in config.excluded if not any(excludes([entry], name) for name in present)]
    if unused:
        message = f"{len(unused)} entries of {config.key} name no module of the files. First: {unused[0]}"
        yield Finding.warning("modelopt-unused-entry", message, unused[:SHOWN], "check the spelling of the modules")
    heads = [name for name in quantized(checkpoint) if name.rpartition(".")[2] == "lm_head"]
    if not heads and not cpu and config.algorithm != MIXED and not excludes(config.excluded, "lm_head"):
        yield (Finding.error if other_tensors(checkpoint) else Finding.warning)(
            "modelopt-lm-head",
            f"the output layer is unquantized, and {config.key} does not name it: vLLM builds it quantized",
            ["lm_head"],
            f'add "lm_head" to {config.key}',
        )


def setting(config: Settings, linear: Linear) -> str | None:
    """The algorithm of a linear which can be a part of one layer; experts have a layer for gate and up."""
    return config.of(linear.name) if linear.parallel == "column" else None


def cpu_findings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """What quantserve's kernels do not compute, and what they compute in another way than a GPU."""
    if stacks := [linear.name for linear in linears(checkpoint) if linear.stacked]:
        yield Finding.error(
            "modelopt-stacked-experts",
            f"the experts of a layer are one tensor, which is served on GPUs only. First: {stacks[0]}",
            stacks[:SHOWN],
            "serve it on a GPU, or export it with a tensor for each expert",
        )
    if scales := [name for name in checkpoint.tensors if name.endswith(".input_scale")]:
        yield Finding.info(
            "modelopt-weights-only",
            f"activations keep 16 bits on CPUs, so {len(scales)} tensors input_scale are not used",
            scales[:SHOWN],
        )


def gpu_findings(checkpoint: Checkpoint, config: Settings, target: Target, ranks: int) -> Iterator[Finding]:
    """What vLLM's own methods overlook or refuse."""
    method, algorithms = ARGUMENTS[config.algorithm], config.algorithms()
    if target.device == "cuda" and (target.capability or 99) < (needed := CAPABILITY.get(method, 0)):
        yield Finding.error(
            "modelopt-capability",
            f"vLLM's method {method} needs compute capability {needed / 10}, above that of {target.name}",
            [target.name],
            "use a newer GPU",
        )
    if algorithms & {NVFP4, W4A16} and config.group_size != GROUP:
        message = f"group_size is {config.group_size}, and vLLM's kernels for NVFP4 read groups of {GROUP}"
        yield Finding.error("modelopt-group-size", message, ["group_size"], "quantize the model again in groups of 16")
    stored = set(quantized(checkpoint))
    blocks = [one for one in linears(checkpoint) if one.name in stored and config.of(one.name) == BLOCK]
    yield from check_fused_blocks(blocks, ranks, SIDE, code="modelopt-blocks")
    alone = {CHANNEL, BLOCK} if config.algorithm != MIXED else {CHANNEL}
    bad = [one.name for one in linears(checkpoint) if one.fused == "experts" and config.of(one.name) in alone]
    if bad:
        yield Finding.error(
            "modelopt-experts",
            f"vLLM reads one scale for each expert in FP8, and these have {' or '.join(alone & algorithms)}. "
            f"First: {bad[0]}",
            bad[:SHOWN],
            "quantize the model in FP8 or NVFP4, or serve it on a CPU",
        )
    inputs = [f"{name}.input_scale" for name in quantized(checkpoint) if config.of(name) in (FP8, NVFP4)]
    if missing := [name for name in inputs if name not in checkpoint.tensors]:
        yield Finding.error(
            "modelopt-input-scale",
            f"{len(missing)} linears have no input_scale, which vLLM does not report for {config.algorithm}. "
            f"First: {missing[0]}",
            missing[:SHOWN],
            "download the checkpoint again; weights in NVFP4 alone are W4A16_NVFP4",
        )
    yield from fused_findings(checkpoint)


def fused_findings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Parts of one layer with different second scales; read from local files, whose headers do not tell."""
    layers: dict[str, list[str]] = {}
    for linear in linears(checkpoint):
        if linear.fused and linear.parallel == "column":
            for name in linear.names:
                layer = name.rpartition(".")[0] if linear.fused == "experts" else linear.group
                layers.setdefault(layer, []).append(f"{name}.weight_scale_2")
    wanted = [name for names in layers.values() if len(names) > 1 for name in names][:MOST_READ]
    alone = [name for name in wanted if (one := checkpoint.tensors.get(name)) and (one.dtype, one.nbytes) == ("F32", 4)]
    values = {name: struct.unpack("<f", one)[0] for name, one in first_bytes(checkpoint, alone, 4).items() if one[3:]}
    odd = []
    for layer, names in layers.items():
        found = {name: values[name] for name in names if name in values}
        if len(set(found.values())) > 1:
            each = ", ".join(f"{name.split('.')[-2]} {value:.4g}" for name, value in found.items())
            odd.append(f"{layer}: {each}")
    if odd:
        yield Finding.warning(
            "modelopt-fused-scales",
            f"{len(odd)} layers are fused from parts with different weight_scale_2. vLLM takes one for all (the "
            f"largest, of experts that of gate), which multiplies the weights of the others. First: {odd[0]}",
            odd[:SHOWN],
            "export the model with a current nvidia-modelopt, which gives them one; on CPUs each keeps its own",
        )
