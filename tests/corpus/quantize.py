"""What quantizers write in place of a linear's ``weight``: names, dtypes and shapes, nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from corpus.patterns import Spec

_NO_LINEAR = re.compile(r"embed|norm|\bgate\b|router|shared_expert_gate|conv1d|\bwpe\b|\bwte\b|class_embedding")
_BLOCK = re.compile(r"\.(?:layers|h|blocks|layer)\.\d+\.")


def quantize(tensors: Mapping[str, Spec], method: str, **options: Any) -> dict[str, Spec]:
    """Replace the weights of linears in blocks.

    Args:
        method: a key of `LAYOUTS`.
        options: ``skip``, parts of names that stay as they are; ``lm_head``, whether it is quantized too; the rest
            goes to the layout (``group_size``, ``bits``).
    """
    skip = tuple(options.pop("skip", ()))
    heads = options.pop("lm_head", False)
    layout = LAYOUTS[method]
    result: dict[str, Spec] = {}
    for name, spec in tensors.items():
        linear = len(spec[1]) == 2 and name.endswith(".weight") and not _NO_LINEAR.search(name)
        wanted = linear and (_BLOCK.search(name) or (heads and name.endswith("lm_head.weight")))
        if wanted and not any(part in name for part in skip):
            n, k = spec[1]
            result |= layout(name.removesuffix(".weight"), n, k, spec[0], **options)
        else:
            result[name] = spec
    return result


def _up(n: int, by: int) -> int:
    return -(-n // by)


def _awq(name: str, n: int, k: int, dtype: str, group_size: int = 128, bits: int = 4, scales: str = "F16") -> Any:
    groups = 1 if group_size == -1 else k // group_size
    return {
        f"{name}.qweight": ("I32", (k, n * bits // 32)),
        f"{name}.qzeros": ("I32", (groups, n * bits // 32)),
        f"{name}.scales": (scales, (groups, n)),
    }


def _awq_gemv(name: str, n: int, k: int, dtype: str, group_size: int = 128) -> Any:
    width = _up(_up(k // group_size, 8), {128: 1, 64: 2, 32: 4}[group_size]) * {128: 1, 64: 2, 32: 4}[group_size]
    return {
        f"{name}.qweight": ("I32", (n, k // 8)),
        f"{name}.qzeros": ("I32", (n, width)),
        f"{name}.scales": ("F16", (n, width * 8)),
    }


def _awq_gemv_fast(name: str, n: int, k: int, dtype: str, group_size: int = 128) -> Any:
    width = _up(k // group_size, 8) * 8
    return {
        f"{name}.qweight": ("I16", (n // 4, k)),
        f"{name}.qzeros": ("F16", (width, n)),
        f"{name}.scales": ("F16", (width, n)),
    }


def _gptq(name: str, n: int, k: int, dtype: str, group_size: int = 128, bits: int = 4) -> Any:
    groups = 1 if group_size == -1 else _up(k, group_size)
    return {
        f"{name}.qweight": ("I32", (k * bits // 32, n)),
        f"{name}.qzeros": ("I32", (groups, n * bits // 32)),
        f"{name}.scales": ("F16", (groups, n)),
        f"{name}.g_idx": ("I32", (k,)),
    }


def _squeezellm(name: str, n: int, k: int, dtype: str, bits: int = 4) -> Any:
    return {f"{name}.lookup_table": ("F32", (n, 2**bits)), f"{name}.qweight": ("I32", (k * bits // 32, n))}


def _fp8_block(name: str, n: int, k: int, dtype: str) -> Any:
    return {
        f"{name}.weight": ("F8_E4M3", (n, k)),
        f"{name}.weight_scale_inv": ("F32", (_up(n, 128), _up(k, 128))),
    }


def _fp8_channel(name: str, n: int, k: int, dtype: str) -> Any:
    return {f"{name}.weight": ("F8_E4M3", (n, k)), f"{name}.weight_scale": ("BF16", (n, 1))}


def _fp8_tensor(name: str, n: int, k: int, dtype: str) -> Any:
    scales: dict[str, Spec] = {f"{name}.weight_scale": ("F32", ()), f"{name}.input_scale": ("F32", ())}
    return {f"{name}.weight": ("F8_E4M3", (n, k)), **scales}


def _int8(name: str, n: int, k: int, dtype: str) -> Any:
    return {f"{name}.weight": ("I8", (n, k)), f"{name}.weight_scale": ("BF16", (n, 1))}


def _packed(name: str, n: int, k: int, dtype: str, group_size: int = 128) -> Any:
    return {
        f"{name}.weight_packed": ("I32", (n, k // 8)),
        f"{name}.weight_scale": ("BF16", (n, k // group_size)),
        f"{name}.weight_shape": ("I64", (2,)),
    }


def _nvfp4(name: str, n: int, k: int, dtype: str) -> Any:
    return {
        f"{name}.weight": ("U8", (n, k // 2)),
        f"{name}.weight_scale": ("F8_E4M3", (n, k // 16)),
        f"{name}.weight_scale_2": ("F32", ()),
        f"{name}.input_scale": ("F32", ()),
    }


def _nf4(name: str, n: int, k: int, dtype: str) -> Any:
    return {
        f"{name}.weight": ("U8", (n * k // 2, 1)),
        f"{name}.weight.absmax": ("U8", (n * k // 64,)),
        f"{name}.weight.nested_absmax": ("F32", (_up(n * k // 64, 256),)),
        f"{name}.weight.nested_quant_map": ("F32", (256,)),
        f"{name}.weight.quant_map": ("F32", (16,)),
        f"{name}.weight.quant_state.bitsandbytes__nf4": ("U8", (160,)),
    }


def _mlx(name: str, n: int, k: int, dtype: str, group_size: int = 64, bits: int = 4) -> Any:
    return {
        f"{name}.weight": ("U32", (n, k * bits // 32)),
        f"{name}.scales": ("F16", (n, k // group_size)),
        f"{name}.biases": ("F16", (n, k // group_size)),
    }


def _exl2(name: str, n: int, k: int, dtype: str, groups: int = 32) -> Any:
    return {
        f"{name}.q_weight": ("I32", (k // 8, n)),
        f"{name}.q_scale": ("I32", (groups, n // 8)),
        f"{name}.q_scale_max": ("F16", (groups,)),
        f"{name}.q_groups": ("I16", (2 * groups,)),
        f"{name}.q_invperm": ("I32", (k,)),
    }


def _hqq(name: str, n: int, k: int, dtype: str, group_size: int = 64) -> Any:
    groups = n * k // group_size
    return {
        f"{name}.W_q": ("U8", (groups // 2, group_size)),
        f"{name}.scale": ("F16", (groups, 1)),
        f"{name}.zero": ("F16", (groups, 1)),
        f"{name}.shape": ("I64", (2,)),
        f"{name}.nbits": ("I32", ()),
    }


def _bitnet(name: str, n: int, k: int, dtype: str) -> Any:
    return {f"{name}.weight": ("U8", (n // 4, k)), f"{name}.weight_scale": ("BF16", (1,))}


LAYOUTS: dict[str, Callable[..., dict[str, Spec]]] = {
    "awq": _awq, "awq-gemv": _awq_gemv, "awq-gemv-fast": _awq_gemv_fast, "gptq": _gptq, "squeezellm": _squeezellm,
    "fp8-block": _fp8_block, "fp8-channel": _fp8_channel, "fp8-tensor": _fp8_tensor, "int8": _int8, "packed": _packed,
    "nvfp4": _nvfp4, "nf4": _nf4, "mlx": _mlx, "exl2": _exl2, "hqq": _hqq, "bitnet": _bitnet,
}  # fmt: skip
"""Layouts by name; each gives the tensors of one linear of shape [n, k]."""
