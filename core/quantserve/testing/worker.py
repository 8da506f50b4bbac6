"""The process with vLLM's layers, which answers requests as JSON, one a line (`quantserve.testing.child.Worker`).

    python -m quantserve.testing.worker FD

It makes vLLM's own linear layers on a CPU, hands them the checkpoint's tensors as vLLM does, and compares what they
compute with the reference, in float64.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import tempfile
import traceback
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers import quantization

ROWS: Final = (1, 3, 17, 64)
FUSED: Final = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
OTHERS: Final = ("awq", "gptq", "fp8", "compressed-tensors", "bitsandbytes", "modelopt", "gguf")
"""Methods of vLLM's own, or of plugins, that a plugin must leave alone unless they are its own."""
TOLERANCE: Final = {"float32": 2e-5, "bfloat16": 1.2e-2, "float16": 1.6e-3}
"""Largest error of an output as a share of the sum of |x| |w|: three roundings of the dtype, and float32's own sums."""
SAMPLE: Final = 4
"""Linears that are computed, the first of each name in a layer."""

Problems = dict[str, list[str]]


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(int(sys.argv[1]), "w")
    with tempfile.TemporaryDirectory(prefix="quantserve-") as folder, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        initialize_model_parallel(1)
        for line in sys.stdin:
            answers.write(json.dumps(answered(json.loads(line))) + "\n")
            answers.flush()


def answered(request: Mapping[str, Any]) -> Problems:
    """Problems by the name of the check; a name is absent where there was nothing to check."""
    found: Problems = {}
    kept = dict(os.environ)
    os.environ.update(VLLM_PLUGINS="quantserve", QUANTSERVE_ENGINE_PLUGINS=request["plugin"], **request["environment"])
    try:
        _answer(request, found)
    finally:
        os.environ.clear()
        os.environ.update(kept)
    return found


def _answer(request: Mapping[str, Any], found: Problems) -> None:
    if request["side"]:
        found["engines"], found["register"] = [], []
        _register(request, found)
        found["override"] = list(_override(request))
    if request["folder"]:
        try:
            layers = Layers(request)
        except Exception as error:
            found["weights"] = found["layers"] = found["missing"] = [f"the layers cannot be made: {_said(error)}"]
        else:
            found |= layers.problems()


def _said(error: BaseException) -> str:
    """An exception in a line, with the innermost place."""
    frame = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" at {Path(frame[0].filename).name}:{frame[0].lineno}" if frame else ""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}{where}"


# --- register() -------------------------------------------------------------------------------------------


def _register(request: Mapping[str, Any], found: Problems) -> None:
    """Call it in an engine that asks for another plugin, and then twice in one that asks for it."""
    module, _, name = str(request["side"]).partition(":")
    own = {*request["methods"], request["declared"], "quantserve"}
    before, every, environ, folder = _classes(own), _classes(set()), dict(os.environ), os.getcwd()
    os.environ.update(VLLM_PLUGINS="other", QUANTSERVE_ENGINE_PLUGINS="")
    try:
        register = getattr(import_module(module), name)
        register()
        found["engines"] += [
            f"engines that do not ask for the plugin lose vLLM's {method!r}"
            for method, one in _classes(set()).items()
            if one != every.get(method, one) and every[method].startswith("vllm.")
        ]
        os.environ.update(environ)
        register()
        register()
    except BaseException as error:
        found["register"].append(_said(error))
        return
    finally:
        for key in set(os.environ) - set(environ):
            found["register"].append(f"register() sets {key} in the environment")
            del os.environ[key]
        for key in set(environ) - set(os.environ):
            found["register"].append(f"register() removes {key} from the environment")
        os.environ.update(environ)
        if os.getcwd() != folder:
            found["register"].append(f"register() changes the working folder to {os.getcwd()}")
            os.chdir(folder)
    found["engines"] += [
        f"vLLM's method {method!r} was {one} and is {after} after register()"
        for method, one in before.items()
        if (after := _classes(own).get(method)) != one
    ]
    for method in request["methods"]:
        try:
            quantization.get_quantization_config(method)
        except Exception as error:
            found["register"].append(f"after register() vLLM does not know {method!r}: {_said(error)}")


def _classes(without: set[str]) -> dict[str, str]:
    """Where the classes of methods are defined that do not belong to the plugin."""
    made = {}
    for method in OTHERS:
        with suppress(Exception):
            if method not in without:
                one = quantization.get_quantization_config(method)
                made[method] = f"{one.__module__}.{one.__qualname__}"
    return made


def _override(request: Mapping[str, Any]) -> Iterator[str]:
    """Signature, and what it says of checkpoints that declare other methods."""
    for method in request["methods"]:
        with suppress(Exception):
            one = quantization.get_quantization_config(method)
            if one.__module__.startswith("vllm."):
                continue
            function = one.override_quantization_method
            try:
                inspect.signature(function).bind({}, None, hf_config=None)
            except TypeError as error:
                yield f"{one.__qualname__}.override_quantization_method{inspect.signature(function)}: {error}"
                continue
            for other in (
                {"quant_method": "quantserve-none"},
                {"quant_method": "awq", "bits": 4},
                {"quant_method": ""},
            ):
                if other["quant_method"] in (request["declared"], *request["methods"]):
                    continue
                try:
                    said = function(dict(other), None, hf_config=None)
                except Exception as error:
                    yield f"override_quantization_method({other}) raises {_said(error)}"
                    continue
                if said is not None:
                    yield f"override_quantization_method({other}) returns {said!r}, which claims another's checkpoint"


# --- layers -----------------------------------------------------------------------------------------------


class Layers:
    """Layers of one checkpoint.

    Args:
        request: the folder, the reference, the method, and the linears as the core knows them.
    """

    def __init__(self, request: Mapping[str, Any]) -> None:
        self.folder, self.method = Path(request["folder"]), request["methods"][0] if request["methods"] else ""
        self.dtypes, self.ranks = request["dtypes"], request["ranks"]
        self.tolerance: float = request["tolerance"]
        self.settings: dict[str, Any] = dict(request["settings"])
        self.reference = {name: weight.double() for name, weight in load_file(request["reference"]).items()}
        tensors = {
            name: one for file in sorted(self.folder.glob("*.safetensors")) for name, one in load_file(file).items()
        }
        self.parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self.packed: dict[str, Tensor] = {}
        every = {one["name"]: one for one in request["linears"]}
        for module in sorted(every, key=len, reverse=True):
            for name in [name for name in tensors if name.startswith(f"{module}.")]:
                self.parts[module][name.removeprefix(f"{module}.")] = tensors.pop(name)
        leaves: dict[str, Any] = {}
        for name, one in every.items():
            if name in self.reference:
                leaves.setdefault(name.rpartition(".")[2], one)
        self.linears = list(leaves.values())
        if not self.linears:
            raise ValueError(f"the reference has none of {', '.join(list(every)[:4])}")

    def problems(self) -> Problems:
        """What is wrong, by check; "weights" only where the plugin packs for quantserve's kernels."""
        some, pair = self.linears[:SAMPLE], self._pair()
        found: Problems = {"layers": [], "missing": []}
        for one in some:
            found["layers"] += _tried(one["name"], self._one(one))
            found["missing"] += _tried(one["name"], self._missing(one))
        if self.packed:
            weights = [
                _tried(name, _unequal(name, one, self.reference[name], self.tolerance))
                for name, one in self.packed.items()
            ]
            found["weights"] = list(chain.from_iterable(weights))
        if pair:
            found["fused"] = _tried(pair[0]["name"], self._fused(pair))
        if self.ranks:
            every = [(one, ranks) for ranks in self.ranks for one in some]
            shards = [_tried(f"{one['name']} on {ranks} ranks", self._shards(one, ranks)) for one, ranks in every]
            found["shards"] = list(chain.from_iterable(shards))
        return found

    def config(self, packed: list[Any]) -> Any:
        """The plugin's quantization config; what its `pack` gives is appended to `packed`."""
        made = quantization.get_quantization_config(self.method).from_config(dict(self.settings))
        made.packed_modules_mapping = FUSED
        made.maybe_update_config(str(self.folder))
        original = getattr(made, "pack_as", None)
        if original is not None:

            def pack_as(*given: Any) -> Any:
                packed.append(original(*given))
                return packed[-1]

            made.pack_as = pack_as
        return made

    def layer(self, one: Mapping[str, Any], dtype: str, packed: list[Any]) -> Any:
        """An empty layer for a linear."""
        kind = vllm_linear.RowParallelLinear if one["parallel"] == "row" else vllm_linear.ColumnParallelLinear
        return kind(
            one["k"], one["n"], bias=False, quant_config=self.config(packed), prefix=one["name"],
            params_dtype=getattr(torch, dtype),
        )  # fmt: skip

    def fill(self, layer: Any, parts: Mapping[str, Tensor], shard: Any = None, without: str = "") -> None:
        """Hand a layer the tensors of one linear."""
        for suffix, tensor in parts.items():
            into = getattr(layer, suffix, None)
            into = getattr(layer, suffix.replace(".", "_"), None) if into is None else into
            if into is not None and suffix not in (without, "bias"):
                into.weight_loader(into, tensor.clone(), *(() if shard is None else (shard,)))

    def _one(self, one: Mapping[str, Any]) -> Iterator[str]:
        """One layer in every dtype; its packed weight is kept."""
        name, weight = one["name"], self.reference[one["name"]]
        if tuple(weight.shape) != (one["n"], one["k"]):
            yield f"{name}: the reference is {list(weight.shape)}, the linear [{one['n']}, {one['k']}]"
            return
        for dtype in self.dtypes:
            packed: list[Any] = []
            layer = self.layer(one, dtype, packed)
            self.fill(layer, self.parts[name])
            layer.quant_method.process_weights_after_loading(layer)
            if packed and hasattr(packed[0], "dequantize"):
                self.packed.setdefault(name, packed[0].dequantize())
            yield from self._outputs(name, layer, weight, dtype)

    def _outputs(self, name: str, layer: Any, weight: Tensor, dtype: str) -> Iterator[str]:
        for rows in ROWS:
            x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(rows)).to(
                getattr(torch, dtype)
            )
            out = layer.quant_method.apply(layer, x)
            if out.shape != (rows, weight.shape[0]) or out.dtype != x.dtype:
                yield f"{name}: {rows} rows of {dtype} give {list(out.shape)} in {out.dtype}"
                return
            scale = x.double().abs() @ weight.abs().t()
            slack = self.tolerance * weight.abs().max() * x.double().abs().sum(1, keepdim=True)
            error = ((out.double() - x.double() @ weight.t()).abs() - slack) / scale.clamp(min=1e-30)
            if not (error := error.max().item()) <= TOLERANCE[dtype]:
                yield (
                    f"{name}: {rows} rows of {dtype} differ from the reference by {error:.2g} of the sum of |x| |w|, "
                    f"and may by {TOLERANCE[dtype]:g}"
                )
                return

    def _missing(self, one: Mapping[str, Any]) -> Iterator[str]:
        """Each tensor left out must stop the loading."""
        for suffix in self.parts[one["name"]]:
            layer = self.layer(one, self.dtypes[0], [])
            if not hasattr(layer, suffix) and not hasattr(layer, suffix.replace(".", "_")):
                continue
            try:
                self.fill(layer, self.parts[one["name"]], without=suffix)
                layer.quant_method.process_weights_after_loading(layer)
            except Exception as error:
                if one["name"] not in str(error):
                    yield f"without {one['name']}.{suffix} the error does not name the layer: {_said(error)}"
                continue
            weight = self.reference[one["name"]]
            if suffix == "bias" or not list(self._outputs(one["name"], layer, weight, self.dtypes[0])):
                continue  # it is not needed
            yield f"without {one['name']}.{suffix} the layer is loaded without an error, and computes something else"

    def _pair(self) -> list[Mapping[str, Any]] | None:
        """Gate and up of one layer."""
        found = {one["name"].rpartition(".")[2]: one for one in self.linears}
        pair = [found[leaf] for leaf in FUSED["gate_up_proj"] if leaf in found]
        alike = len(pair) == 2 and pair[0]["name"].rpartition(".")[0] == pair[1]["name"].rpartition(".")[0]
        return pair if alike else None

    def _fused(self, pair: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        name, dtype = f"{pair[0]['name'].rpartition('.')[0]}.gate_up_proj", self.dtypes[0]
        layer = vllm_linear.MergedColumnParallelLinear(
            pair[0]["k"], [one["n"] for one in pair], bias=False, quant_config=self.config([]), prefix=name,
            params_dtype=getattr(torch, dtype),
        )  # fmt: skip
        for shard, one in enumerate(pair):
            self.fill(layer, self.parts[one["name"]], shard)
        layer.quant_method.process_weights_after_loading(layer)
        yield from self._outputs(name, layer, torch.cat([self.reference[one["name"]] for one in pair]), dtype)

    def _shards(self, one: Mapping[str, Any], ranks: int) -> Iterator[str]:
        axis, size = (1, one["k"]) if one["parallel"] == "row" else (0, one["n"])
        for rank in sorted({0, 1, ranks - 1}):
            with _rank(rank, ranks):
                layer = self.layer(one, self.dtypes[0], [])
                self.fill(layer, self.parts[one["name"]])
                layer.quant_method.process_weights_after_loading(layer)
                share = self.reference[one["name"]].narrow(axis, rank * size // ranks, size // ranks)
                name = f"{one['name']} on rank {rank} of {ranks}"
                yield from self._outputs(name, layer, share, self.dtypes[0])


def _tried(name: str, code: Iterator[str]) -> list[str]:
    """The problems that code gives, and the exception that it raises as one of them."""
    found: list[str] = []
    try:
        found += code
    except Exception as error:
        found.append(f"{name}: {_said(error)}")
    return found


def _unequal(name: str, packed: Tensor, weight: Tensor, tolerance: float) -> Iterator[str]:
    """Where the packed weight is not the reference in float32; -0 is 0, and NaN is never right."""
    wrong = ~((packed.double() - weight).abs() <= tolerance * weight.abs().max())
    if wrong.any():
        n, k = (int(index) for index in wrong.nonzero()[0])
        yield (
            f"{name}: {int(wrong.sum()):,} of {wrong.numel():,} weights differ, first [{n}, {k}]: "
            f"{packed[n, k].item()!r}, reference {weight[n, k].item()!r}"
        )


@contextmanager
def _rank(rank: int, ranks: int) -> Iterator[None]:
    """Layers made meanwhile believe they are one rank of several."""
    with ExitStack() as stack:
        for module in (vllm_linear, parameter):
            for name, value in (
                ("get_tensor_model_parallel_rank", rank),
                ("get_tensor_model_parallel_world_size", ranks),
            ):
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, lambda value=value: value)
        yield


if __name__ == "__main__":
    main()
