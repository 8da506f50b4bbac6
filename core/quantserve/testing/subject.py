"""The plugin under test, loaded, with its good checkpoint and what the checks ask about both."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from importlib.metadata import EntryPoints
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from quantserve.api import Checkpoint, Finding, Linear, Scheme, Severity, linears, modules
from quantserve.checkpoint import open_checkpoint
from quantserve.config import ModelConfig, model_from_source
from quantserve.errors import UsageError, unknown_name
from quantserve.method import Method
from quantserve.planning.compose import Composition, compose
from quantserve.plugins.contract import schemes_of
from quantserve.plugins.entry_points import installed, origin
from quantserve.plugins.registry import ENGINE_GROUP, GROUP, GROUPS, Hooks, Plugin, Registry
from quantserve.target import GIB, Target, find_target
from quantserve.testing.case import CAPABILITIES, Case
from quantserve.testing.child import Answer, worker
from quantserve.testing.quick import Guard, quick
from quantserve.testing.tiny import TOKENIZER, llama_config, llama_tensors, quantized_tensors

TARGETS: Final = {"cpu": "cpu", "cuda": "h100", "rocm": "mi300x"}
"""The targets by device on which plugins are asked."""
SOURCE: Final = "quantserve/conformance"
"""Source of all models; their headers have been read."""
MODEL: Final = (1024, 2048)
"""Hidden and intermediate size of the checkpoint that the kit writes without values."""


class Subject:
    """One plugin under test.

    Args:
        case: what its author says.

    Attributes:
        points: the entry points of this environment.
        registry: of this plugin alone, so that no other one takes part; with fp16 where it is no method.
        quick: the same without the guard of each hook; used under `guard`.
        plugin: None where it does not load; `why` then says the reason.

    Raises:
        UsageError: no such plugin is installed, or the case is wrong.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.points, _ = installed(GROUPS)
        mine = [point for point in self.points.select(group=GROUP) if point.name == case.name]
        if not mine:
            every = self.points.select(group=GROUP)
            theirs = sorted(point.name for point in every if origin(point)[0] == case.name)
            fix = f"it is a distribution; name its plugin {' or '.join(theirs)}" if theirs else ""
            raise UsageError(
                f"{unknown_name('plugin', case.name, {point.name for point in every})}\n"
                f"  fix: {fix or 'correct the name, or install the plugin first'}"
            )
        if odd := set(case.capabilities or ()) - set(CAPABILITIES):
            raise UsageError(unknown_name("capability", min(odd), CAPABILITIES))
        self.point = mine[0]
        self.distribution, self.version = origin(self.point)
        sides = [p for p in self.points.select(group=ENGINE_GROUP) if origin(p)[0] == self.distribution]
        self.registry = Registry.load({}, EntryPoints([*mine, *sides]))
        self.plugin = self.registry.plugins.get(case.name)
        if self.plugin and not self.plugin.method:  # a method is needed beside it
            plain = [point for point in self.points.select(group=GROUP) if point.name == "fp16"]
            self.registry = Registry.load({}, EntryPoints([*mine, *sides, *plain]))
        failures = [failure for failure in self.registry.failures if failure.name == case.name]
        self.why = f"{failures[0].stage}: {failures[0].reason}" if failures else ""
        self.quick = quick(self.registry)
        self._folder = tempfile.TemporaryDirectory(prefix="quantserve-")
        self._judged: dict[tuple[int, str, int], tuple[Checkpoint, Composition]] = {}

    @property
    def loaded(self) -> Plugin:
        """The plugin; checks are asked only where it loads."""
        assert self.plugin is not None
        return self.plugin

    @cached_property
    def guard(self) -> Guard:
        """For code that calls the plugin of `quick`."""
        return Guard(self.loaded)

    @property
    def method(self) -> Method | None:
        """Its method."""
        return self.plugin.method if self.plugin else None

    @property
    def sides(self) -> list[str]:
        """Entry points of its distribution in vLLM's group, ``module:callable`` by name of this plugin only."""
        return [
            point.value
            for point in self.points.select(group=ENGINE_GROUP)
            if point.name == self.case.name and origin(point)[0] == self.distribution
        ]

    def implements(self, hook: str) -> bool:
        """Whether it has a hook."""
        return bool(self.plugin) and hasattr(self.loaded.module, hook)

    # --- what it is capable of ---------------------------------------------------------------------------

    @cached_property
    def told(self) -> frozenset[str]:
        """Capabilities that its method and hooks tell."""
        tools = {name for name in ("converter", "quantizer", "reader") if self.implements(f"quantserve_{name}")}
        return frozenset({*tools, *(self.method.devices if self.method else ("cpu", "cuda"))})

    @cached_property
    def facts(self) -> frozenset[str]:
        """Capabilities, and what else the checks need: ``method``, ``scheme``, ``kernel``, ``files``, ``values`` (a
        written checkpoint and a reference, on a CPU), and ``layers`` where vLLM's layers take those of one linear.
        """
        declared = self.case.capabilities
        facts = set(self.told | {"tensor-parallel"} if declared is None else declared)
        facts |= {name for name in ("method", "scheme", "kernel", "performance", "quality") if self._has(name)}
        facts |= {"loaded"} if self.plugin else set()
        facts |= {"engine-side"} if self.sides else set()
        written = self.case.checkpoint is not None and not isinstance(self.case.checkpoint, Mapping)
        facts |= {"files"} if written else set()
        if written and self.method and self.case.reference and "cpu" in facts:
            facts.add("values")
            facts |= {"layers"} if self.method.vllm_name and "reader" not in facts else set()
        return frozenset(facts)

    def _has(self, name: str) -> bool:
        return self.implements(f"quantserve_{name}") and (name != "method" or self.method is not None)

    @property
    def targets(self) -> list[Target]:
        """One target for each of its devices, with memory enough."""
        found = (find_target(TARGETS[device]) for device in TARGETS if device in self.facts)
        return [replace(target, memory_bytes=max(64 * GIB, target.memory_bytes)) for target in found]

    # --- its checkpoint ----------------------------------------------------------------------------------

    @cached_property
    def folder(self) -> Path | None:
        """The files of the good checkpoint; None for one without values.

        Raises:
            UsageError: the case's function failed, or there is nothing at its path.
        """
        given = self.case.checkpoint
        if given is None or isinstance(given, Mapping):
            return None
        if isinstance(given, Path):
            if not given.exists():
                raise UsageError(
                    f"the good checkpoint of {self.case.name!r} does not exist: {given}\n"
                    "  fix: correct the path in Case.checkpoint, or that of --model"
                )
            return given
        folder = self.scratch / "case" / "checkpoint"  # functions write beside it
        folder.mkdir(parents=True)
        try:
            given(folder)
        except Exception as error:
            raise UsageError(
                f"the function that writes the checkpoint of {self.case.name!r} failed: {error}"
            ) from error
        return folder

    @cached_property
    def good(self) -> Checkpoint:
        """The headers of the good checkpoint, with a tokenizer.

        Raises:
            UsageError: nothing could be read, or the plugin gives no scheme for it.
        """
        if self.folder is None:
            return self._written()
        found = open_checkpoint(str(self.folder), readers=self.registry.readers)
        if not found.tensors:
            said = "; ".join(problem.message for problem in found.problems)
            raise UsageError(f"{self.folder} holds no checkpoint: {said or 'it has no tensors'}")
        problems = tuple(problem for problem in found.problems if not problem.code.startswith("tokenizer"))
        return replace(
            found, tokenizer=found.tokenizer if found.tokenizer.get("present") else TOKENIZER, problems=problems
        )

    def _written(self) -> Checkpoint:
        """A Llama with the tensors of the plugin's scheme."""
        settings = self.case.checkpoint
        if settings is None and self.method and self.method.vllm_name:
            settings = {"quant_method": self.method.name}
        config = llama_config(*MODEL) | ({"torch_dtype": "bfloat16"} if self.method else {})
        config |= {"quantization_config": dict(settings)} if isinstance(settings, Mapping) and settings else {}
        tensors, empty = llama_tensors(config, "BF16"), Checkpoint.from_tensors(config)
        blocks = [linear for linear in linears(empty) if ".layers." in linear.name]
        schemes = self.schemes(empty, blocks)
        if self.method and not any(schemes):
            raise UsageError(
                f"the kit cannot write a checkpoint of {self.case.name!r}: quantserve_scheme gives no scheme for the "
                f"quantization_config {config.get('quantization_config')!r:.200}\n"
                "  fix: give the case a checkpoint, or name one with --model"
            )
        for linear, scheme in zip(blocks, schemes, strict=True):
            if scheme is not None:
                del tensors[f"{linear.name}.weight"]
                try:
                    tensors |= quantized_tensors(linear, scheme)
                except ValueError as error:
                    raise UsageError(
                        f"the kit cannot write a checkpoint of {self.case.name!r}: {error}\n"
                        "  fix: give the case a checkpoint, or name one with --model"
                    ) from error
        return Checkpoint.from_tensors(config, tensors, tokenizer=TOKENIZER)

    def schemes(self, checkpoint: Checkpoint, every: Iterable[Linear]) -> list[Scheme | None]:
        """What ``quantserve_scheme`` gives; raises PluginError."""
        found = list(every)
        given = Hooks([self.loaded]).call_each(
            self.loaded, "quantserve_scheme", schemes_of, "linear", found, checkpoint=checkpoint
        )
        return given or [None] * len(found)

    # --- what is said of a checkpoint --------------------------------------------------------------------

    def model(self, ranks: int = 1, *, named: bool = False) -> ModelConfig:
        """What a user writes: nothing but a source, and the plugin where it has no method."""
        method = self.method.name if named and self.method else None
        made = model_from_source(SOURCE, quantization=method, tensor_parallel_size=ranks)
        return made if self.method else made.model_copy(update={"plugins": [self.case.name]})

    def composed(
        self,
        checkpoint: Checkpoint | None = None,
        target: Target | None = None,
        ranks: int = 1,
        *,
        named: bool = False,
    ) -> Composition:
        """What `quantserve check` finds of a checkpoint, the good one by default; raises PluginError.

        Args:
            checkpoint: to judge.
            target: the first of `targets` by default.
            ranks: tensor parallel size.
            named: whether the config names the method, so that nothing has to be claimed.
        """
        checkpoint, target = checkpoint or self.good, target or self.targets[0]
        key = (id(checkpoint), target.name, ranks)
        if key not in self._judged:
            model, watched = self.model(ranks, named=named), checkpoint is self.good and ranks == 1
            registry = self.registry if watched else self.quick

            def composed() -> Composition:
                return compose(model, registry, target, opened=checkpoint, predict=False)

            made = composed() if watched else self.guard(composed)
            if named or checkpoint is not self.good:
                return made
            self._judged[key] = (checkpoint, made)
        return self._judged[key][1]

    def errors(
        self, checkpoint: Checkpoint | None = None, target: Target | None = None, ranks: int = 1
    ) -> list[Finding]:
        """The errors among what `composed` finds."""
        return [one for one in self.composed(checkpoint, target, ranks).findings if one.severity is Severity.ERROR]

    @cached_property
    def quantized(self) -> list[Linear]:
        """The quantized linears of the good checkpoint; without schemes those with more than a float ``weight``."""
        if stored := self.composed().stored:
            return [linear for linear, _ in stored.quantized]
        present = modules(self.good)
        return [one for one in linears(self.good) if set(present.get(one.names[0], {})) - {"weight", "bias"}]

    # --- its weights, and vLLM's layers ------------------------------------------------------------------

    @property
    def scratch(self) -> Path:
        """A folder for files, which goes with this object."""
        return Path(self._folder.name)

    @cached_property
    def weights(self) -> Mapping[str, Any]:
        """The reference weights by module."""
        assert self.case.reference is not None
        assert self.folder is not None
        return self.case.reference(self.folder)

    def on_cpu(self, dtype: str) -> Composition:
        """What becomes of the good checkpoint in a dtype on a CPU, as a user would set it."""
        cpu = next(target for target in self.targets if target.device == "cpu")
        model = self.model()
        engine = model.engine_config
        kwargs = {**engine.engine_kwargs, "dtype": dtype}
        model = model.model_copy(update={"engine_config": engine.model_copy(update={"engine_kwargs": kwargs})})
        return compose(model, self.registry, cpu, opened=self.good, predict=False)

    @cached_property
    def layers(self) -> Answer:
        """What the worker found about vLLM's side: problems by the name of the check."""
        folder, reference = "", ""
        if "layers" in self.facts and any(not linear.experts for linear in self.quantized):
            from safetensors.torch import save_file

            folder, reference = str(self.folder), str(self.scratch / "reference.safetensors")
            weights = {name: weight.detach().float().contiguous() for name, weight in self.weights.items()}
            save_file(weights, reference)
        return worker().ask(
            {
                "side": self.sides[0] if self.sides else "",
                "plugin": f"{self.distribution}:{self.case.name}",
                "methods": self.arguments,
                "declared": str((self.good.quantization_config or {}).get("quant_method", "")),
                "settings": self.good.quantization_config or {},
                "folder": folder,
                "reference": reference,
                "tolerance": self.case.tolerance,
                "environment": self.variables,
                "dtypes": list(self.method.dtypes) if self.method else [],
                "linears": [
                    {"name": one.name, "n": one.n, "k": one.k, "parallel": one.parallel}
                    for one in linears(self.good)
                    if not one.experts
                ],
                "ranks": self.ranks if folder and "tensor-parallel" in self.facts else [],
            }
        )

    @property
    def variables(self) -> dict[str, str]:
        """Variables of the engine's processes that the plugin sets for the good checkpoint on a CPU."""
        cpu = [target for target in self.targets if target.device == "cpu"]
        return self.composed(target=cpu[0]).environment if cpu else {}

    @cached_property
    def arguments(self) -> list[str]:
        """Values of vLLM's argument ``quantization`` on a CPU: of the good checkpoint, and of the method."""
        cpu = next((target for target in self.targets if target.device == "cpu"), None)
        setting = self.composed(target=cpu).engine_kwargs.get("quantization") if cpu else None
        names = [setting.value if setting else None, self.method.vllm_name if self.method else None]
        return [name for name in dict.fromkeys(names) if isinstance(name, str)]

    @cached_property
    def ranks(self) -> list[int]:
        """Tensor parallel sizes above 1 at which the good checkpoint has no errors on its first device."""
        return [ranks for ranks in (2, 4, 8) if not self.errors(ranks=ranks)]


def engine_available() -> str:
    """Why there is no engine in this environment; "" where there is one."""
    missing = [name for name in ("vllm", "torch", "safetensors") if find_spec(name) is None]
    return f"{' and '.join(missing)} not installed" if missing else ""
