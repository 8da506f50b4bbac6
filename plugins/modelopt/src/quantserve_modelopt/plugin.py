"""The light module of the ModelOpt plugin: what `quantserve list`, `check` and `plan` ask.

GPUs are served by vLLM's own methods, CPUs by quantserve's kernels, weights only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from quantserve.api import (
    Checkpoint,
    Finding,
    KernelProfile,
    Linear,
    Method,
    Scheme,
    SkipList,
    Target,
    check_mixed_layers,
    codebook_kernel,
    hookimpl,
    kernel_findings,
    method_dtype,
    once,
    served_dtype,
)
from quantserve_modelopt.findings import (
    SHOWN,
    cpu_findings,
    file_findings,
    gpu_findings,
    list_findings,
    quantized,
    setting,
)  # fmt: skip
from quantserve_modelopt.format import (
    ARGUMENTS,
    FILE,
    GROUP,
    MIXED,
    MXFP8,
    NAMES,
    Settings,
    body,
    excludes,
    read,
    scheme,
)

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

DEVICES = ("cuda", "rocm", "cpu")
CACHES = {"FP8": "fp8_e4m3", "NVFP4": "nvfp4"}
"""What vLLM makes of a declared KV cache."""
_CACHE = (".k_scale", ".v_scale")


@hookimpl
def quantserve_method() -> Method:
    """Describe ModelOpt as vLLM and this plugin serve it."""
    return Method(
        name=NAMES[0],
        summary="NVIDIA ModelOpt: FP8, MXFP8, NVFP4 and mixtures of them",
        bits=(4, 8),
        vllm_name=NAMES[0],
        aliases=NAMES[1:],
        minimum_capability=75,
        devices=DEVICES,
        dtypes=("float16", "bfloat16"),
        homepage="https://github.com/NVIDIA/Model-Optimizer",
        accepts={name: dict.fromkeys(DEVICES, (NAMES[0],)) for name in NAMES[1:]},
    )


@hookimpl
def quantserve_detect(checkpoint: Checkpoint) -> bool:
    """Claim what declares ModelOpt in either file; where nothing is declared, NVFP4's two scales."""
    config = checkpoint.quantization_config
    if config is None:
        return any(name.endswith(".weight_scale_2") for name in checkpoint.tensors)
    return config["quant_method"] in NAMES if config.get("quant_method") else FILE in checkpoint.quant_files


@hookimpl
def quantserve_scheme(checkpoint: Checkpoint, linear: Linear) -> Scheme | None:
    """By algorithm; None where the settings are wrong, no weight is quantized or a mixture leaves this one out."""
    config = settings(checkpoint)
    if isinstance(config, str) or not quantized(checkpoint):
        return None
    algorithm = config.of(linear.name)
    excluded = config.algorithm == MIXED and excludes(config.excluded, linear.group)
    return scheme(algorithm, config.group_size) if algorithm and not excluded else None


@hookimpl
def quantserve_skip_list(checkpoint: Checkpoint) -> SkipList | None:
    """The list of unquantized modules; None for mixtures, which leave unquantized whatever they do not name."""
    config = settings(checkpoint)
    if isinstance(config, str) or config.algorithm == MIXED:
        return None
    return SkipList(config.excluded, "wildcard", headers="never", key=config.key)


@hookimpl
def quantserve_validate(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Iterable[Finding]:
    """What is peculiar to ModelOpt; the core compares the tensors with their schemes."""
    cpu, config = target.device == "cpu", settings(checkpoint)
    where = ["quantization_config" if checkpoint.config.get("quantization_config") else FILE]
    if cpu:
        yield from kernel_findings(NAMES[0], "ModelOpt", target)
    yield from file_findings(checkpoint, cpu=cpu)
    if isinstance(config, str):
        fix = "correct the config, or export the model again with a current nvidia-modelopt"
        yield Finding.error("modelopt-settings", config, where, fix)
    elif checkpoint.tensors_complete and not quantized(checkpoint):
        message = f"{config.algorithm} is declared, and no weight of the files is quantized"
        fix = f"serve the files without quantization_config and {FILE}, or export the quantized model"
        yield Finding.error("modelopt-not-quantized", message, where, fix)
    elif checkpoint.tensors_complete:
        yield from list_findings(checkpoint, config, cpu=cpu)
        yield from check_mixed_layers(checkpoint, lambda one: setting(config, one), code="modelopt-mixed-layer")
        ranks = model.tensor_parallel_size
        yield from cpu_findings(checkpoint) if cpu else gpu_findings(checkpoint, config, target, ranks)
        default = CACHES.get(config.cache, "auto") if not cpu else "auto"
        yield from cache_findings(checkpoint, config, str(model.engine_kwargs.get("kv_cache_dtype", default)))


@hookimpl
def quantserve_engine_kwargs(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Mapping[str, object]:
    """On GPUs the method and cache that vLLM finds by itself; on CPUs a cache of 16 bits. The dtype where needed."""
    config, gpu = settings(checkpoint), target.device != "cpu"
    if isinstance(config, str):
        return {}
    made: dict[str, object] = {"quantization": ARGUMENTS[config.algorithm]} if gpu else {}
    dtypes = ("bfloat16",) if gpu and config.algorithm == MXFP8 else ("float16", "bfloat16")
    dtype = method_dtype(checkpoint, model, target, dtypes)
    if dtype:
        made["dtype"] = dtype
    if config.cache:
        own = dtype or served_dtype(checkpoint, model, target).name
        made["kv_cache_dtype"] = CACHES[config.cache] if gpu else own
    return made


@hookimpl
def quantserve_kernel(target: Target, bits: int, engine: str) -> KernelProfile | None:
    """quantserve's kernel on CPUs; vLLM's on GPUs, as assumed."""
    four = bits == 4
    if engine != "vllm-0.32" or target.device == "cpu":
        kept = 4 + 32 / GROUP if four else 8.0
        return codebook_kernel(target, bits, engine, kept, benchmark="quantserve_modelopt._benchmark:make")
    native = target.device == "rocm" or (target.capability or 0) >= (100 if four else 89)
    fast = ((1, 0.3), (64, 0.6), (512, 1.1), (4096, 2.2 if four else 1.3))
    return KernelProfile(
        name=f"{'NVFP4' if four else 'FP8'} (vLLM: FlashInfer, CUTLASS)" if native else "Marlin (vLLM)",
        bits_per_weight=4.5 if four else 8.0,
        bandwidth_share=((1, 0.7), (64, 0.7), (256, 0.6)),
        flops_share=fast if native else ((1, 0.3), (64, 0.5), (2048, 0.6)),
        source="assumed, not measured",
        uncertainty=0.8,
    )


@once
def settings(checkpoint: Checkpoint) -> Settings | str:
    """The settings that vLLM reads; a text where it would stop at them."""
    config, file = checkpoint.quantization_config or {}, checkpoint.quant_files.get(FILE)
    if config and not config.get("quant_method"):
        found = f"quant_algo {body(config).get('quant_algo')!r} of producer {config.get('producer')!r}"
        return f"without quant_method vLLM reads FP8 and NVFP4 of producer modelopt only, and this is {found}"
    mixed = str(body(config).get("quant_algo")).upper() == MIXED
    try:  # vLLM takes the file where config.json lacks the modules of a mixture
        return read(file if file and mixed and "quantized_layers" not in body(config) else config)
    except ValueError as error:
        return str(error)


def cache_findings(checkpoint: Checkpoint, config: Settings, cache: str) -> Iterator[Finding]:
    """Scales of the KV cache against the cache that is served."""
    scales = [name for name in checkpoint.tensors if name.endswith(_CACHE)]
    small = cache.startswith(("fp8", "nvfp4"))
    if scales and not small:
        why = "" if config.cache else ", as the config declares no kv_cache_quant_algo"
        message = f"{len(scales)} scales of a quantized KV cache are not used: the cache keeps 16 bits{why}"
        fix = "set engine_kwargs.kv_cache_dtype to fp8 for a cache of half the size"
        yield Finding.info("modelopt-kv-scales", message, scales[:SHOWN], fix)
    elif small and not scales:
        message = f"the KV cache is {cache}, and the files have no k_scale and v_scale, for which vLLM takes 1.0"
        fix = "set engine_kwargs.kv_cache_dtype to bfloat16 for a cache of 16 bits"
        yield Finding.info("modelopt-kv-scales", message, ["engine_kwargs.kv_cache_dtype"], fix)
