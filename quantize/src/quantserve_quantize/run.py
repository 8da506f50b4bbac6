"""A run: read, calibrate, quantize and write block by block, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from quantserve.api import Linear, quantizable
from quantserve.errors import CheckpointError, UsageError
from quantserve_quantize import calibration
from quantserve_quantize.card import card
from quantserve_quantize.draft import Draft, must_be_new, save_whole
from quantserve_quantize.gradients import squared
from quantserve_quantize.quantizer import FEWEST, Block, Need, Quantizer, Statistics
from quantserve_quantize.skeleton import Skeleton, run_block
from quantserve_quantize.source import Weights

Progress = Callable[[str, int, int], None]
"""Called with what is done, how much of it is done, and how much there is."""
_BLOCK = re.compile(r"(.*?\.\d+)\.")
REST = "rest"
"""The part with the tensors outside the blocks."""


@dataclass(frozen=True)
class Asked:
    """What a run is asked for, beside the quantizer's options.

    Attributes:
        text: the calibration text; None for the built-in one.
        samples: number of calibration samples.
        length: tokens of a sample.
        seed: of what is random.
    """

    text: Path | None = None
    samples: int = 64
    length: int = 512
    seed: int = 0


def quantize(
    folder: Path,
    destination: Path,
    quantizer: Quantizer,
    method: str,
    asked: Asked,
    resume: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Quantize a checkpoint into a new folder, which appears when it is whole.

    The same source, options and seed give the same bytes, also after a run was stopped and resumed.

    Args:
        folder: an unquantized checkpoint in safetensors.
        destination: must not exist.
        quantizer: of the method.
        method: its name, for messages and provenance.
        asked: calibration and seed.
        resume: go on with a run that was stopped.
        progress: see `Progress`.

    Returns:
        What ``quantserve.json`` of the destination holds.

    Raises:
        UsageError: the destination exists, an option does not fit, or the disk is full.
        CheckpointError: the source cannot be quantized.
    """
    must_be_new(destination)
    weights = Weights(folder)
    linears = chosen(weights, quantizer, method)
    torch.manual_seed(asked.seed)
    calibrated = bool(quantizer.needs)
    samples = calibration.read(asked.text, folder, asked.samples, asked.length, asked.seed) if calibrated else None
    about = {
        "method": method,
        "options": dataclasses.asdict(quantizer.options),
        "source": folder.name,
        "source_sha256": weights.fingerprint(partial(progress, "reading the source")),
        "versions": versions(),
        "seed": asked.seed,
    }
    if samples:
        about["calibration"] = {
            "text": Path(samples.source).name,
            "text_sha256": samples.digest,
            "samples": asked.samples,
            "length": asked.length,
        }
    draft = Draft(destination, about, resume)
    parts = parted(weights, linears)
    steps = _Steps(weights, linears, quantizer, draft, samples.ids if samples else None, progress)
    done: dict[str, dict[str, Any]] = {}
    for number, (part, names) in enumerate(parts.items()):
        progress("quantizing", number, len(parts))
        known = draft.done(part)
        if known is None:
            try:
                tensors, known = steps.make(part, names)
            except CheckpointError:
                draft.discard()
                raise
            draft.write(part, tensors, known)
        done[part] = known
    progress("quantizing", len(parts), len(parts))
    layers = {name: layer for known in done.values() for name, layer in known["layers"].items()}
    config = quantizer.quantization_config({name: layer["config"] for name, layer in layers.items()})
    report = {
        **about,
        "bits_per_weight": sum(layer["bytes"] for layer in layers.values())
        * 8
        / sum(linear.n * linear.k for linear in linears.values()),
        "layers": {
            name: {key: value for key, value in layer.items() if key != "config"} for name, layer in layers.items()
        },
    }
    if few := [name for name, layer in layers.items() if layer.get("tokens", FEWEST) < FEWEST]:
        report["few_tokens"] = few
    files = {
        "config.json": _json({**model_config(weights, quantizer), "quantization_config": config}),
        "quantserve.json": _json(report),
        "README.md": card(report),
    }
    progress("writing", 0, 1)
    draft.finish(parts, files, [path for path in weights.companions() if path.name not in files])
    return report


def chosen(weights: Weights, quantizer: Quantizer, method: str) -> dict[str, Linear]:
    """The linears to quantize, by path.

    Raises:
        CheckpointError: there are none, or their weights are missing.
        UsageError: the quantizer cannot quantize one.
    """
    linears = {linear.name: linear for linear in quantizable(weights.checkpoint, experts=quantizer.experts)}
    if not linears:
        raise CheckpointError(
            f"{weights.folder} has no linear that {method} quantizes: no projection of attention or MLP"
        )
    if absent := [name for name in linears if f"{name}.weight" not in weights.files]:
        raise CheckpointError(
            f"{weights.folder} has no weight of {len(absent)} linears that config.json describes. First: {absent[0]}\n"
            "  fix: use the whole checkpoint; experts must be stored one by one, not stacked in one tensor"
        )
    for name, linear in linears.items():
        found = weights.checkpoint.tensors[f"{name}.weight"].shape
        if found != (linear.n, linear.k):
            raise CheckpointError(
                f"{name}.weight of {weights.folder} is {list(found)}; config.json makes it [{linear.n}, {linear.k}]\n"
                "  fix: take config.json and weights of one model"
            )
    quantizer.begin(weights.checkpoint, list(linears.values()))
    refused = [(name, reason) for name, linear in linears.items() if (reason := quantizer.refusal(linear))]
    if refused:
        raise UsageError(
            f"{method} cannot quantize {len(refused)} of {len(linears)} linears. {refused[0][0]}: {refused[0][1]}"
        )
    return linears


def parted(weights: Weights, linears: Mapping[str, Linear]) -> dict[str, list[str]]:
    """The tensors of each part: one for every block that has a linear, and the rest."""
    blocks = dict.fromkeys(match[1] for name in linears if (match := _BLOCK.match(name)))
    parts: dict[str, list[str]] = {f"{number:05}": [] for number in range(len(blocks))}
    part_of = dict(zip(blocks, parts, strict=True))
    parts[REST] = []
    for name in weights.names:
        match = _BLOCK.match(name)
        parts[part_of.get(match[1], REST) if match else REST].append(name)
    return parts


def blocks_of(weights: Weights) -> list[str]:
    """Paths of the decoder blocks that have a linear."""
    names = (linear.name for linear in quantizable(weights.checkpoint, experts=False))
    return list(dict.fromkeys(match[1] for name in names if (match := _BLOCK.match(name))))


def versions() -> dict[str, str]:
    """Of what the result depends on."""
    packages = ("quantserve", "quantserve-quantize", "torch", "transformers")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def model_config(weights: Weights, quantizer: Quantizer) -> dict[str, Any]:
    """The source's config.json, with the dtype of the new files."""
    config = json.loads((weights.folder / "config.json").read_text(encoding="utf-8"))
    if quantizer.dtype:
        for section in (config, config.get("text_config")):
            if isinstance(section, dict):
                key = "dtype" if "dtype" in section else "torch_dtype"
                if section is config or key in section:
                    section[key] = quantizer.dtype
    return config


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


class _Steps:
    """Makes the parts one after the other; what calibration carries from block to block is kept in the draft."""

    def __init__(
        self,
        weights: Weights,
        linears: Mapping[str, Linear],
        quantizer: Quantizer,
        draft: Draft,
        samples: Tensor | None,
        progress: Progress,
    ) -> None:
        self.weights = weights
        self.linears = linears
        self.quantizer = quantizer
        self.draft = draft
        self.samples = samples
        self.progress = progress
        self.blocks = list(dict.fromkeys(match[1] for name in linears if (match := _BLOCK.match(name))))
        self.skeleton: Skeleton | None = None
        self.hidden: list[Tensor] = []
        self.arguments: dict[str, dict[str, Any]] = {}
        self.gradients: dict[str, Tensor] = {}

    def make(self, part: str, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors of a part, and what is known of its linears."""
        if part == REST or self.samples is None:
            return self._streamed(names)
        return self._calibrated(int(part), names)

    def _streamed(self, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        layers: dict[str, Any] = {}
        for name in names:
            module = name.removesuffix(".weight")
            if module in self.linears and name.endswith(".weight"):
                self._quantize(module, self.weights.finite(name), Statistics(), tensors, layers)
            else:
                tensors[name] = self._kept(name, self.weights.get(name))
        return tensors, {"layers": layers}

    def _calibrated(self, number: int, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        path = self.blocks[number]
        skeleton = self._start(number)
        module = skeleton.load(path)
        linears = {name: linear for name, linear in self.linears.items() if name.startswith(f"{path}.")}
        before = {
            name: parameter.data.clone()
            for name, parameter in module.named_parameters()
            if f"{path}.{name}".removesuffix(".weight") not in linears
        }

        def run(hidden: Tensor) -> Tensor:
            return run_block(module, hidden, self.arguments[path])

        block = Block(path, module, linears, {name: Statistics() for name in linears}, self.hidden, run)
        with torch.no_grad():
            measure(block, self.quantizer.needs - {Need.GRADIENTS})
            self.quantizer.prepare(block)
            for name in linears:
                gradients = self.gradients.get(name)
                block.statistics[name].gradients = gradients if gradients is not None and gradients.any() else None
            tensors: dict[str, Tensor] = {}
            layers: dict[str, Any] = {}
            for name in linears:
                parameter = block.module_of(name).weight
                parameter.data = self._quantize(name, parameter.data, block.statistics[name], tensors, layers)
            for name in names:
                leaf = name.removeprefix(f"{path}.")
                if name.removesuffix(".weight") in linears:
                    continue
                stored = self.weights.get(name)
                changed = leaf in before and not torch.equal(before[leaf], module.get_parameter(leaf).data)
                value = module.get_parameter(leaf).data if changed else stored
                tensors[name] = self._kept(name, value if self.quantizer.dtype else value.to(stored.dtype))
            self.hidden = [run(hidden) for hidden in self.hidden]
        skeleton.unload(path)
        # What this block needs stays until its part is written: a run that is stopped here repeats the block.
        save_whole(self.draft.extra(f"hidden-{number + 1:05}"), {"hidden": torch.stack(self.hidden)})
        self.draft.extra(f"hidden-{number - 1:05}").unlink(missing_ok=True)
        return tensors, {"layers": layers}

    def _start(self, number: int) -> Skeleton:
        """The skeleton, with hidden states before the block."""
        if self.skeleton is None:
            assert self.samples is not None
            self._load_gradients()
            self.skeleton = Skeleton(self.weights, self.blocks)
            self.hidden, self.arguments = self.skeleton.embed(self.samples)
            kept = self.draft.extra(f"hidden-{number:05}")
            if number:
                self.hidden = list(load_file(kept)["hidden"])
        return self.skeleton

    def _load_gradients(self) -> None:
        if Need.GRADIENTS not in self.quantizer.needs:
            return
        assert self.samples is not None
        path = self.draft.extra("gradients")
        if not path.exists():
            report = partial(self.progress, "gradients")
            save_whole(path, squared(self.weights, self.samples, list(self.linears), report))
        self.gradients = load_file(path)

    def _quantize(
        self, name: str, weight: Tensor, statistics: Statistics, tensors: dict[str, Tensor], layers: dict[str, Any]
    ) -> Tensor:
        made = self.quantizer.quantize(self.linears[name], weight, statistics)
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in made.tensors.items()}
        layers[name] = {
            "weight_error": relative(weight - made.weight, weight),
            "output_error": output_error(weight, made.weight, statistics),
            "bytes": sum(tensor.nbytes for tensor in made.tensors.values()),
            "config": dict(made.config),
        }
        if statistics.tokens is not None and self.linears[name].fused == "experts":
            layers[name]["tokens"] = statistics.tokens
        return made.weight

    def _kept(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor in the dtype of the output."""
        if not self.quantizer.dtype or not tensor.is_floating_point():
            return tensor
        narrow = tensor.to(getattr(torch, self.quantizer.dtype))
        if not bool(torch.isfinite(narrow).all()):
            raise CheckpointError(
                f"{name} of {self.weights.folder} does not fit {self.quantizer.dtype}: its largest value is "
                f"{tensor.abs().max().item():g}\n  fix: choose bfloat16"
            )
        return narrow


def relative(error: Tensor, of: Tensor) -> float:
    """The Frobenius norm of an error, over that of what it is an error of."""
    return float(error.double().norm() / of.double().norm().clamp_min(1e-300))


def output_error(weight: Tensor, quantized: Tensor, statistics: Statistics) -> float | None:
    """The root of the mean squared error of the output, over that of the output; None without statistics of inputs."""
    error = (weight - quantized).double()
    if statistics.hessian is not None:
        hessian = statistics.hessian.double()
        return float(
            (((error @ hessian) * error).sum() / ((weight.double() @ hessian) * weight.double()).sum())
            .clamp_min(0)
            .sqrt()
        )
    if statistics.squares is not None:
        squares = statistics.squares.double()
        return float(((error**2 @ squares).sum() / (weight.double() ** 2 @ squares).sum()).sqrt())
    return None


def measure(block: Block, needs: frozenset[Need]) -> None:
    """Run a block over its inputs and note the statistics of its linears; fused ones share theirs, as their inputs.

    An expert that sees fewer than `FEWEST` tokens gets the statistics of all experts of its layer.
    """
    first_of: dict[str, str] = {}
    for name, linear in block.linears.items():
        first_of.setdefault(_input_of(linear), name)
    sums: dict[str, Tensor] = {}
    tokens = dict.fromkeys(first_of, 0)
    handles = []
    for taken, name in first_of.items():

        def note(module: Any, inputs: tuple[Tensor, ...], taken: str = taken) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            found = x.T @ x if Need.HESSIAN in needs else x.square().sum(0)
            sums[taken] = sums[taken] + found if taken in sums else found
            tokens[taken] += len(x)

        handles.append(block.module_of(name).register_forward_pre_hook(note))
    for hidden in block.inputs if needs else ():
        block.run(hidden)
    for handle in handles:
        handle.remove()
    for name, linear in block.linears.items():
        own = _input_of(linear)
        block.statistics[name].tokens = tokens[own] if needs else None
        alike = [own]
        if tokens[own] < FEWEST and linear.fused == "experts":
            alike = [_input_of(other) for other in block.linears.values() if _alike(other, linear)]
        parts = [one for one in dict.fromkeys(alike) if one in sums]
        if not parts:
            continue
        total = reduce(torch.add, (sums[one] for one in parts))
        if not bool(total.isfinite().all()):
            raise CheckpointError(
                f"{name}: its inputs are NaN or infinite in float32 when the model reads the calibration text\n"
                "  fix: use a model that works; `quantserve serve` of the source shows whether it does"
            )
        mean = total / sum(tokens[one] for one in parts)
        statistics = block.statistics[name]
        statistics.hessian = mean if mean.ndim == 2 else None
        statistics.squares = mean.diagonal().clone() if mean.ndim == 2 else mean


def _input_of(linear: Linear) -> str:
    """The same for linears that take the same input."""
    if linear.fused != "experts":
        return linear.group
    return linear.name if linear.parallel == "row" else linear.name.rpartition(".")[0]


def _alike(one: Linear, other: Linear) -> bool:
    """Whether both are experts of a layer, and take inputs of one kind."""
    return one.fused == "experts" and (one.group, one.parallel) == (other.group, other.parallel)
