"""A good checkpoint damaged in one way at a time. Each damage has a name that `Case.harmless` can list.

Damages are made from what the files hold, not from what the plugin's scheme says of them: a scheme that calls a tensor
optional, or takes any shape, must not hide that the tensor is needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from quantserve.api import Checkpoint, Linear, Tensor, modules
from quantserve.checkpoint.data import DTYPE_BITS

EXTRA: Final = {"quantserve_extra": ("F32", (1,)), "g_idx": ("I32", (64,)), "weight.nested_absmax": ("F32", (4,))}
"""Tensors that no linear of the format should have: of no tool, and of other formats."""
FLOAT: Final = frozenset({"F16", "BF16", "F32", "F64"})
FUSED: Final = ("q_proj", "gate_proj")
"""First linears of what vLLM fuses."""


@dataclass(frozen=True)
class Damage:
    """One damage.

    Attributes:
        name: ``tensor scales missing``, ``config bits wrong value``: the same for every checkpoint of the format.
        where: a tensor or module that a finding should name, or "".
        detail: what exactly was changed.
        checkpoint: the damaged one.
    """

    name: str
    where: str
    detail: str
    checkpoint: Checkpoint


def tensor_damages(good: Checkpoint, quantized: list[Linear]) -> Iterator[Damage]:
    """Missing, misshapen, mistyped and further tensors, of one linear for each place in a layer.

    Args:
        good: the checkpoint.
        quantized: its linears that are quantized.
    """
    present = modules(good)
    every = _one_of_each(quantized)
    by_split = {linear.parallel: linear for linear in reversed(every)}  # shapes follow from it
    for linear in every:
        tensors = present.get(linear.name, {})
        for suffix, tensor in tensors.items():
            if suffix == "bias":
                continue
            name, label = tensor.name, f"tensor {suffix}"
            yield Damage(f"{label} missing", linear.name, f"without {name}", _without(good, name))
            if linear not in by_split.values():
                continue
            for shape in _shapes(tensor.shape):
                detail = f"{name} {list(shape)} for {list(tensor.shape)}"
                changed = _with(good, replace(tensor, shape=shape))
                yield Damage(f"{label} wrong shape", linear.name, detail, changed)
            for dtype in _dtypes(tensor.dtype):
                detail = f"{name} {dtype} for {tensor.dtype}"
                changed = _with(good, replace(tensor, dtype=dtype, stored=None))
                yield Damage(f"{label} wrong dtype", linear.name, detail, changed)
        for suffix, (dtype, shape) in EXTRA.items():
            if suffix not in tensors and not linear.stacked:
                extra = Tensor(f"{linear.name}.{suffix}", dtype, shape)
                yield Damage(f"tensor extra {suffix}", linear.name, f"with {extra.name}", _with(good, extra))
        yield Damage("linear missing", linear.name, f"without {linear.name}", _plain(good, [linear], weight=False))


def fused_damages(good: Checkpoint, quantized: list[Linear]) -> Iterator[Damage]:
    """A fused layer that is quantized in part, and a model in which nothing is quantized, against its config."""
    present = modules(good)
    quantized = [one for one in quantized if not _is_float(present.get(one.names[0], {}))]
    for leaf in FUSED:
        for linear in [one for one in quantized if one.name.endswith(leaf) and not one.experts][:1]:
            detail = f"{linear.name} as a plain weight"
            yield Damage("linear plain in a fused layer", linear.name, detail, _plain(good, [linear]))
    if quantized:
        yield Damage("all linears plain", "", "plain weights only", _plain(good, quantized))


def config_damages(good: Checkpoint) -> Iterator[Damage]:
    """Every setting of the quantization config removed, of a wrong type, and of a wrong value."""
    for outer, name, settings in _settings(good):
        for path, value in _leaves(settings):
            key = ".".join(part for part in path if not part.startswith("["))
            for kind, other in _values(value):
                changed = _changed(settings, path, other)
                made = (
                    replace(good, config={**good.config, name: changed})
                    if outer == "config"
                    else replace(good, quant_files={**good.quant_files, name: changed})
                )
                yield Damage(f"config {key} {kind}", "", f"{key} {_short(other)} for {_short(value)}", made)


def model_damages(good: Checkpoint) -> Iterator[Damage]:
    """A config.json that belongs to another model."""
    config = good.config
    section = next((key for key in ("text_config", "llm_config") if isinstance(config.get(key), Mapping)), "")
    inner = config[section] if section else config
    for key, factor, more in (("hidden_size", 2, 0), ("intermediate_size", 2, 0), ("num_hidden_layers", 1, 1)):
        if isinstance(inner.get(key), int):
            changed = {**inner, key: factor * inner[key] + more}
            made = {**config, section: changed} if section else changed
            detail = f"{key} {changed[key]} for {inner[key]}"
            yield Damage(f"model {key} of another model", "", detail, replace(good, config=made))


def odd_configs(good: Checkpoint) -> Iterator[Damage]:
    """JSON of any kind where the quantization config should be; a plugin may say anything but must not fail."""
    values: tuple[Any, ...] = (None, [], "text", 7, True, {}, {"quant_method": None}, {"quant_method": ["a"]})
    for value in values:
        made = {**good.config, "quantization_config": value}
        yield Damage("config odd", "", f"quantization_config {value!r}", replace(good, config=made, quant_files={}))
    other = {key: value for key, value in good.config.items() if key != "quantization_config"}
    elsewhere = replace(good, config={**other, "compression_config": {"bits": 4}}, quant_files={})
    yield Damage("config elsewhere", "", "settings without quant_method in compression_config", elsewhere)
    yield Damage("config empty", "", "an empty config.json", replace(good, config={}, quant_files={}))
    yield Damage("tensors none", "", "no tensors", replace(good, tensors={}))
    plain = {name: replace(tensor, shape=()) for name, tensor in good.tensors.items()}
    yield Damage("tensors scalar", "", "tensors without dimensions", replace(good, tensors=plain))
    flat = {name: replace(tensor, shape=(0, *tensor.shape)) for name, tensor in good.tensors.items()}
    yield Damage("tensors empty", "", "tensors with a further dimension of 0", replace(good, tensors=flat))


# --- making them ------------------------------------------------------------------------------------------


def _one_of_each(quantized: list[Linear]) -> list[Linear]:
    """The first linear of each name within a layer; the numbers of layers and experts do not count."""
    found: dict[str, Linear] = {}
    for linear in quantized:
        found.setdefault(".".join(part for part in linear.name.split(".") if not part.isdecimal()), linear)
    return list(found.values())


def _is_float(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a linear is a plain weight."""
    return {suffix for suffix in tensors if suffix != "bias"} == {"weight"} and tensors["weight"].dtype in FLOAT


def _with(good: Checkpoint, *tensors: Tensor) -> Checkpoint:
    return replace(good, tensors={**good.tensors, **{tensor.name: tensor for tensor in tensors}})


def _without(good: Checkpoint, *names: str) -> Checkpoint:
    return replace(good, tensors={name: one for name, one in good.tensors.items() if name not in names})


def _plain(good: Checkpoint, some: list[Linear], *, weight: bool = True) -> Checkpoint:
    """Some linears as a float weight, or gone."""
    present, removed, added = modules(good), [], []
    for linear in some:
        for name in linear.names:
            tensors = [tensor for suffix, tensor in present.get(name, {}).items() if suffix != "bias"]
            removed += [tensor.name for tensor in tensors]
            if weight:
                shape = (linear.experts, linear.n, linear.k) if linear.stacked else (linear.n, linear.k)
                added.append(Tensor(f"{name}.weight", "BF16", shape))
    return _with(_without(good, *removed), *added)


def _shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Each dimension longer by one, and twice as long; transposed where that differs."""
    made = [(*shape[:i], other, *shape[i + 1 :]) for i, size in enumerate(shape) for other in (size + 1, 2 * size)]
    return list(dict.fromkeys(one for one in [*made, shape[::-1]] if one != shape))


def _dtypes(dtype: str) -> tuple[str, ...]:
    """Dtypes that no reader takes for this one."""
    if dtype not in DTYPE_BITS:
        return ("I64", "F64")
    if dtype in FLOAT:
        return ("I16", "U8")
    return ("F32", {"I8": "U8", "U8": "I8", "I16": "I32"}.get(dtype, "I16"))


def _settings(good: Checkpoint) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Where the quantization configs are: the field of the checkpoint, the name in it, and the settings."""
    if good.container:
        return  # the reader has made them from what the file holds
    if isinstance(settings := good.config.get("quantization_config"), Mapping):
        yield "config", "quantization_config", settings
    else:
        for name, settings in good.quant_files.items():
            yield "quant_files", name, settings


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Paths of all settings; lists of mappings and mappings are entered. Modules' names in paths stay as they are."""
    if isinstance(value, Mapping) and value:
        for key in value:
            yield from _leaves(value[key], (*path, key))
    elif path:
        yield path, value


_GONE: Final = object()


def _values(value: Any) -> Iterator[tuple[str, Any]]:
    """What to put in the place of a setting, with the kind of damage. Empty ones say nothing that could be lost."""
    if value is None or value in ([], {}):
        return
    yield "removed", _GONE
    yield "wrong type", 7 if isinstance(value, str | list | bool) else "seven"
    if isinstance(value, bool):
        yield "wrong value", not value
    elif isinstance(value, int | float):
        yield from (("wrong value", other) for other in (value + 1, value - 1, -7))
    elif isinstance(value, str):
        yield "wrong value", "quantserve-none"
    elif isinstance(value, list) and value and all(type(one) is int for one in value):
        halves = [max(1, one // 2) for one in value]
        yield from (("wrong value", other) for other in (halves, [0 for _ in value], value[:-1]))


def _changed(settings: Mapping[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(json.dumps(settings))
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    if value is _GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return made


def _short(value: object) -> str:
    return "nothing" if value is _GONE else f"{value!r:.60}"
