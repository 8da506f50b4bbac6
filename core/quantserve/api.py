"""The one door for plugin authors.

Everything a plugin's light module needs is here, and nothing else in ``quantserve`` is promised to
stay. Importing this module imports no torch, vLLM or Ray. `ModelConfig` brings pydantic, so a light
module imports it for its annotations only, under ``TYPE_CHECKING``, and `quantserve list` stays fast.

A plugin implements some of these functions, each with the decorator ``@hookimpl``; parameters may be left out from the
right. ``help(quantserve.hookspecs)`` says when each is called and what it returns.

    quantserve_method()                                     the method's name, bits, devices
    quantserve_reader()                                     files other than safetensors, and how they are read
    quantserve_detect(checkpoint)                           whether a checkpoint is in this format
    quantserve_scheme(checkpoint, linear)                   how a linear is stored
    quantserve_skip_list(checkpoint)                        what the config leaves unquantized
    quantserve_validate(checkpoint, model, target)          what else is wrong with it
    quantserve_engine_kwargs(checkpoint, model, target)     vLLM's arguments
    quantserve_environment(checkpoint, model, target)       variables of the model's processes
    quantserve_performance(checkpoint, model, target)       what was measured
    quantserve_kernel(target, bits, engine, scheme, experts)   what the kernel reaches
    quantserve_quality(bits)                                what it costs in quality
    quantserve_quantizer()                                  "module:callable" that quantizes
    quantserve_converter()                                  "module:callable" that converts foreign files

`VERSION` is the version of all this; a plugin may say which it was written for with ``Method(api=1)``. `MINOR` counts
what was added since: this is API 1.3. Names that have aged warn where they are imported, at the author's line.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING

from quantserve.checkpoint import Checkpoint, Tensor, open_checkpoint
from quantserve.checkpoint.containers import BadContainer, Contents, Reader
from quantserve.checkpoint.peek import first_bytes
from quantserve.checkpoint.source import Source
from quantserve.checks.linear import check_fused_blocks, check_mixed_layers, check_shards, quantized_linears
from quantserve.checks.skipped import SkipList
from quantserve.finding import Finding, Severity
from quantserve.hookspecs import API_MINOR as MINOR
from quantserve.hookspecs import API_VERSION as VERSION
from quantserve.hookspecs import hookimpl
from quantserve.method import KernelProfile, Method, PerformanceProfile, QualityNote
from quantserve.model.dtypes import dtype_argument, method_dtype, refuses_float16, served_dtype
from quantserve.model.layers import linears, other_tensors
from quantserve.model.linear import Linear, shard_k, shard_n
from quantserve.model.modules import modules
from quantserve.model.quantizable import quantizable
from quantserve.model.written import WrittenConfig
from quantserve.once import once
from quantserve.predict.calibration import Fastest, fastest_kernel
from quantserve.predict.codebook import (
    CODEBOOK_DTYPES,
    codebook_kernel,
    codebook_method,
    kernel_findings,
    marlin_kernel,
)
from quantserve.predict.cpu_kernels import OUR_KERNEL, VLLM_KERNEL, CpuKernels, KernelChoice, missing_kernels
from quantserve.predict.published import PublishedRun, published_profile, rayllm_profile
from quantserve.scheme import NK, Dim, E, K, N, Part, Scheme
from quantserve.system.environment import DISABLED_KERNELS, disabled_kernels, engine_environment
from quantserve.target import Target

if TYPE_CHECKING:
    from quantserve.checks.fused import check_fused_groups
    from quantserve.checks.linear import Expected, check_linears
    from quantserve.config import ModelConfig

__all__ = [
    "CODEBOOK_DTYPES",
    "DISABLED_KERNELS",
    "MINOR",
    "NK",
    "OUR_KERNEL",
    "VERSION",
    "VLLM_KERNEL",
    "BadContainer",
    "Checkpoint",
    "Contents",
    "CpuKernels",
    "Dim",
    "E",
    "Expected",
    "Fastest",
    "Finding",
    "K",
    "KernelChoice",
    "KernelProfile",
    "Linear",
    "Method",
    "ModelConfig",
    "N",
    "Part",
    "PerformanceProfile",
    "PublishedRun",
    "QualityNote",
    "Reader",
    "Scheme",
    "Severity",
    "SkipList",
    "Source",
    "Target",
    "Tensor",
    "WrittenConfig",
    "check_fused_blocks",
    "check_fused_groups",
    "check_linears",
    "check_mixed_layers",
    "check_shards",
    "codebook_kernel",
    "codebook_method",
    "disabled_kernels",
    "dtype_argument",
    "engine_environment",
    "fastest_kernel",
    "first_bytes",
    "hookimpl",
    "kernel_findings",
    "linears",
    "marlin_kernel",
    "method_dtype",
    "missing_kernels",
    "modules",
    "once",
    "open_checkpoint",
    "other_tensors",
    "published_profile",
    "quantizable",
    "quantized_linears",
    "rayllm_profile",
    "refuses_float16",
    "served_dtype",
    "shard_k",
    "shard_n",
]


_AGED = {
    "Expected": ("quantserve.checks.linear", "1.2", "write Part"),
    "check_linears": ("quantserve.checks.linear", "1.2", "implement quantserve_scheme"),
    "check_fused_groups": ("quantserve.checks.fused", "1.2", "implement quantserve_scheme"),
}
"""Names that stay for all of version 1: where they are, since when they are deprecated, and what to do instead."""


def __getattr__(name: str) -> object:
    if name == "ModelConfig":
        from quantserve.config import ModelConfig

        return ModelConfig
    if name in _AGED:
        module, since, instead = _AGED[name]
        message = f"quantserve.api.{name} is deprecated since API {since} and goes with version {VERSION + 1}: "
        warnings.warn(message + instead, DeprecationWarning, stacklevel=2)
        found: object = getattr(import_module(module), name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
