"""Which method to choose: one model, all methods that could serve it on a target, and what to expect of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from math import isinf, log
from typing import Any, TypeVar

from quantserve.checkpoint import Checkpoint, open_checkpoint
from quantserve.checkpoint.quality import MeasuredQuality, measured_quality
from quantserve.checks.linear import check_shards
from quantserve.checks.memory import MemoryEstimate, estimate
from quantserve.checks.model import check_service
from quantserve.checks.parallel import check_parallel
from quantserve.checks.stored import Stored
from quantserve.config import ModelConfig
from quantserve.errors import CheckpointError, PluginError, UsageError
from quantserve.finding import Finding, Severity
from quantserve.method import KernelProfile, Method, PerformanceProfile, QualityNote
from quantserve.model.architecture import read_sizes
from quantserve.model.quantizable import projections
from quantserve.planning.compose import compose
from quantserve.planning.detection import own_copy
from quantserve.planning.expectation import Expectation, expectation, kernel_of, quality_of, width_of
from quantserve.plugins.claims import OURS
from quantserve.plugins.contract import profile_of
from quantserve.plugins.registry import Hooks, Plugin, Registry
from quantserve.predict.imagine import imagined
from quantserve.predict.machine import ENGINE_NOW
from quantserve.predict.prediction import Prediction
from quantserve.predict.shape import stored_bits_per_weight
from quantserve.predict.workload import Workload
from quantserve.target import Target, gib

RANKS = (1, 2, 4, 8)
T = TypeVar("T")


@dataclass(frozen=True)
class Candidate:
    """One method at one width for one model on one target.

    Attributes:
        key: ``awq-4``.
        plugin, method, bits: who serves it, and how wide.
        label: for people: the method's name, with the width where it has several.
        model: the config it would have, tensor parallel size included.
        checkpoint: the model's files where they are in this method, else imagined ones.
        in_files: whether it is the files' own method.
        memory: the estimate; None when sizes are unknown.
        refusal: why it cannot be served on this target; "" when it can.
        made: what predictions rest on; None when nothing can be predicted.
        published: the row of a published table for exactly this, at whatever tensor parallel size.
        quality: the cost in quality as published for another model; None when unknown.
        measured: what `quantserve quality` measured of these files; it counts before what was published.
        failure: a hook of the plugin that failed; nothing is predicted then.
    """

    key: str
    plugin: Plugin
    method: Method
    bits: int
    label: str
    model: ModelConfig
    checkpoint: Checkpoint
    in_files: bool
    memory: MemoryEstimate | None
    refusal: str
    made: Expectation | None
    published: PerformanceProfile | None
    quality: QualityNote | None
    measured: MeasuredQuality | None = None
    failure: PluginError | None = None

    @property
    def failed(self) -> str:
        """``failed: `` with the hook and the reason; "" when no hook failed."""
        return f"failed: {self.failure.stage}: {self.failure.reason}" if self.failure else ""

    @property
    def ranks(self) -> int:
        """Tensor parallel size."""
        return self.model.tensor_parallel_size

    @property
    def weights_bytes(self) -> int:
        """Weights on all devices; 0 when unknown."""
        return self.memory.weights_bytes * self.ranks if self.memory else 0

    def predict(self, workload: Workload) -> Prediction | None:
        """The prediction for a workload; None when the method cannot be served or predicted."""
        return self.made.predict(workload) if self.made and not self.refusal else None


@dataclass(frozen=True)
class Advice:
    """All methods for one model.

    Attributes:
        model: as it was given.
        checkpoint: its files.
        target: the hardware.
        candidates: one per method and width.
        notes: what is missing or was left out.
        installable: methods of this project that are not installed.
        named: whether the methods were chosen by the user.
    """

    model: ModelConfig
    checkpoint: Checkpoint
    target: Target
    candidates: Sequence[Candidate]
    notes: Sequence[str] = ()
    installable: Sequence[str] = field(default=())
    named: bool = False

    @property
    def exit_code(self) -> int:
        """3 when the plugin of the files' own method, or of a method the user chose, is defective."""
        failed = any(candidate.failure and (candidate.in_files or self.named) for candidate in self.candidates)
        return PluginError.exit_code if failed else 0


def advise(
    model: ModelConfig,
    registry: Registry,
    target: Target,
    *,
    methods: Sequence[str] = (),
    ranks: int | None = None,
    engine: str = ENGINE_NOW,
    as_published: bool = False,
) -> Advice:
    """Look at every installed method (or those named) for a model.

    Args:
        model: config of a folder with or without weights, or of a hub id.
        methods: names or aliases; all by default.
        ranks: tensor parallel size; by default the target's count where it was given (``4xa100-80g``), else the
            smallest at which the method fits.
        engine: which engine to predict for.
        as_published: where nothing else decides the tensor parallel size, take that of the published row.

    Raises:
        UsageError: an unknown method, or a model whose shape nobody here knows.
        CheckpointError: there is nothing to read.
        PluginError: every plugin is defective.
    """
    checkpoint = open_checkpoint(
        model.source, revision=model.revision, allow_pickle=model.allow_pickle, readers=registry.readers
    )
    if not checkpoint.config:
        why = next((f.message for f in checkpoint.problems if f.severity is Severity.ERROR), "config.json is missing")
        raise CheckpointError(f"{model.source}: {why}\n  fix: name a folder or hub id with a config.json")
    plugins = [registry.find_method(name) for name in methods] or [p for p in registry.plugins.values() if p.method]
    own, stored, defect = _own_method(model, registry, target, checkpoint)
    candidates = [
        candidate
        for plugin in dict.fromkeys(plugins)
        for candidate in _candidates(
            plugin, model, checkpoint, target, own, stored, defect, ranks, engine, as_published
        )
    ]
    if not any(candidate.made for candidate in candidates):
        if candidates and all(candidate.failure for candidate in candidates):
            raise next(candidate.failure for candidate in candidates if candidate.failure)
        kind = checkpoint.text_config.get("model_type") or "without model_type"
        raise UsageError(
            f"{model.source}: nothing can be predicted for a model of type {str(kind)[:40]!r}: config.json does not "
            "give the sizes of a decoder with attention (layers, hidden size, heads, vocabulary)\n"
            "  fix: name a model that generates text, or complete config.json"
        )
    notes = list(dict.fromkeys(note for candidate in candidates if candidate.made for note in candidate.made.notes))
    if not checkpoint.tensors:
        notes.append("no weights here: sizes follow from config.json and the method's bits")
    installable = [name for name in OURS if not methods and name not in registry.methods]
    return Advice(model, checkpoint, target, candidates, notes, installable, bool(methods))


def _own_method(
    model: ModelConfig, registry: Registry, target: Target, checkpoint: Checkpoint
) -> tuple[Plugin | None, Stored | None, PluginError | None]:
    """The plugin that serves the files as they are, how it stores their linears, and what is wrong with it.

    None for a bare config.json or files nobody claims.
    """
    if not checkpoint.tensors:
        return None, None, None
    try:
        composed = compose(model, registry, target)
        return composed.method_plugin, composed.stored, None
    except PluginError as error:
        plugin = registry.plugins.get(error.plugin)
        if plugin is None or plugin.method is None:
            raise
        return plugin, None, error


def _candidates(
    plugin: Plugin,
    model: ModelConfig,
    checkpoint: Checkpoint,
    target: Target,
    own: Plugin | None,
    stored: Stored | None,
    defect: PluginError | None,
    ranks: int | None,
    engine: str,
    as_published: bool,
) -> Iterator[Candidate]:
    method = plugin.method
    assert method is not None
    in_files = plugin is own
    stored = stored if in_files else None
    widths = (
        (width_of(method, stored_bits_per_weight(checkpoint, stored)),)
        if in_files
        else tuple(sorted(method.bits)[::-1])
    )
    for bits in widths:
        failures = [defect] if in_files and defect else []
        kernel = _asked(failures, partial(kernel_of, plugin, target, bits, engine))
        refusal = _unsupported(method, kernel, checkpoint, target) or ("" if in_files else _other(method, checkpoint))
        files = checkpoint if in_files else imagined(checkpoint, kernel.bits_per_weight if kernel else bits + 0.1)
        config = _with(model, method, ranks=1) if not in_files else model
        published, published_ranks = None, 0
        if bits == max(method.bits):
            found = _asked(failures, partial(_published, plugin, files, config, target))
            published, published_ranks = found or (None, 0)
        given = target.count > 1 or model.tensor_parallel_size > 1
        chosen = ranks or (published_ranks if as_published and not given else 0)
        if not chosen:
            chosen = 1 if refusal else _ranks(config, files, target, kernel, checkpoint, stored)
        config = _with(config, None if in_files else method, ranks=chosen)
        memory, findings = estimate(files, config, target, stored)
        findings += _checks(checkpoint, config, target, kernel, in_files)
        refusal = refusal or next((f.message for f in findings if f.severity is Severity.ERROR), "")
        made = None
        if kernel is not None:
            ask = partial(expectation, plugin, files, config, target, memory, bits=bits, engine=engine, stored=stored)
            made = _asked(failures, ask)
        quality = _asked(failures, partial(quality_of, plugin, bits))
        yield Candidate(
            key=f"{method.name}-{bits}",
            plugin=plugin,
            method=method,
            bits=bits,
            label=method.name if len(method.bits) == 1 else f"{method.name} {bits}-bit",
            model=config,
            checkpoint=files,
            in_files=in_files,
            memory=memory,
            refusal=refusal,
            made=None if failures else made,
            published=published,
            quality=quality,
            measured=measured_quality(checkpoint) if in_files else None,
            failure=next(iter(failures), None),
        )


def _asked(failures: list[PluginError], ask: Callable[[], T]) -> T | None:
    """What a plugin says; None when its hook fails, which is added to the failures."""
    try:
        return ask()
    except PluginError as error:
        failures.append(error)
        return None


def _checks(
    checkpoint: Checkpoint, model: ModelConfig, target: Target, kernel: KernelProfile | None, in_files: bool
) -> list[Finding]:
    """What `check` would refuse of this method on so many ranks: heads, widths, groups and architecture."""
    findings = [*check_parallel(checkpoint, model, target), *check_service(checkpoint, model)]
    if kernel is not None and not in_files:
        why = f"K on one rank must be a multiple of {kernel.k_multiple}"
        ranks = model.tensor_parallel_size
        findings += check_shards(projections(checkpoint), ranks, code="shards", why=why, k_multiple=kernel.k_multiple)
    return findings


def _with(model: ModelConfig, method: Method | None, ranks: int) -> ModelConfig:
    """The model served with another method and tensor parallel size; its engine arguments stay."""
    kwargs: dict[str, Any] = {**model.engine_kwargs, **({"quantization": method.name} if method else {})}
    return model.model_copy(
        update={
            "engine_config": model.engine_config.model_copy(update={"engine_kwargs": kwargs}),
            "scaling_config": model.scaling_config.model_copy(update={"num_workers": ranks}),
        }
    )


def _ranks(
    model: ModelConfig,
    checkpoint: Checkpoint,
    target: Target,
    kernel: KernelProfile | None,
    files: Checkpoint,
    stored: Stored | None,
) -> int:
    """The target's count, else the smallest tensor parallel size that fits and divides the model, else one."""
    if model.tensor_parallel_size > 1:
        return model.tensor_parallel_size
    if target.device == "cpu":
        return 1
    if target.count > 1:
        return target.count
    least = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    for ranks in RANKS if target.count == 0 else (1,):
        if least > ranks * target.memory_bytes:
            continue  # an estimate would look for what is larger, which takes time
        config = _with(model, None, ranks)
        memory, findings = estimate(checkpoint, config, target, stored)
        findings += _checks(files, config, target, kernel, in_files=False)
        if memory and memory.fits and not any(finding.severity is Severity.ERROR for finding in findings):
            return ranks
    return 1


def _unsupported(method: Method, kernel: KernelProfile | None, checkpoint: Checkpoint, target: Target) -> str:
    sizes = read_sizes(checkpoint)
    if kernel and not kernel.experts and sizes and sizes.experts:
        return f"{method.name} does not serve mixtures of experts"
    if target.device not in method.devices:
        return f"{method.name} runs on {', '.join(method.devices)}, not on {target.device}"
    lowest = method.minimum_capability
    if target.device == "cuda" and target.capability is not None and target.capability < lowest:
        return (
            f"{method.name} needs compute capability {lowest / 10:.1f}, {target.name} has {target.capability / 10:.1f}"
        )
    return ""


def _other(method: Method, checkpoint: Checkpoint) -> str:
    """Why no files of this model can be made for a method."""
    family = checkpoint.text_config.get("model_type")
    if not method.families or family in method.families:
        return ""
    return f"{method.name} serves {', '.join(method.families)}, and this model is {str(family)[:40]}"


def _published(
    plugin: Plugin, checkpoint: Checkpoint, model: ModelConfig, target: Target
) -> tuple[PerformanceProfile | None, int]:
    """The published row at this tensor parallel size, else at another one, and that size."""
    hooks = Hooks([plugin])
    for ranks in dict.fromkeys((model.tensor_parallel_size, *RANKS)):
        config = _with(model, None, ranks)
        asked = {"checkpoint": own_copy(checkpoint), "model": config, "target": target}
        profile = hooks.call(plugin, "quantserve_performance", profile_of, **asked)
        if profile is not None:
            return profile, ranks
    return None, 0


def capacity(memory: MemoryEstimate | None) -> str:
    """What is left for the KV cache, for people."""
    if memory is None:
        return "unknown"
    return f"{gib(memory.kv_cache_bytes)}, {memory.kv_tokens:,} tokens"


# --- ranking ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranked:
    """A candidate with its prediction for the workload in question."""

    candidate: Candidate
    prediction: Prediction

    @property
    def per_device(self) -> float:
        """Output tokens per second of the server, divided by its devices."""
        return self.prediction.tokens_per_s / self.candidate.ranks


ORDERS = ("throughput", "latency", "memory", "quality")


def ranked(advice: Advice, workload: Workload, order: str = "throughput") -> list[Ranked]:
    """The candidates that can be served, best first.

    Args:
        order: ``throughput`` (output tokens per second and device), ``latency`` (E2E), ``memory`` (weights on all
            devices) or ``quality`` (`loss_of`; unknown last). What is within 2 % counts as equal, and the smaller
            loss of quality comes first.
    """
    usable = [
        Ranked(candidate, prediction)
        for candidate in advice.candidates
        if (prediction := candidate.predict(workload)) is not None
    ]
    keys: dict[str, Callable[[Ranked], float]] = {
        "throughput": lambda item: -_level(item.per_device),
        "latency": lambda item: _level(item.prediction.e2e_ms),
        "memory": lambda item: _level(item.candidate.weights_bytes),
        "quality": lambda item: loss_of(item.candidate),
    }

    def key(item: Ranked) -> tuple[float, float, float, str]:
        return keys[order](item), loss_of(item.candidate), -item.per_device, item.candidate.key

    return sorted(usable, key=key)


def _level(value: float) -> int:
    """Steps of 2 %, so that differences below any model's accuracy do not decide."""
    return round(log(max(value, 1e-9)) / log(1.02))


def loss_of(candidate: Candidate) -> float:
    """Rise of perplexity as a share: measured, else 0 at 16 bits, else published, else infinite."""
    if candidate.measured:
        return candidate.measured.increase
    if candidate.bits >= 16:
        return 0.0
    return candidate.quality.increase if candidate.quality else float("inf")


def within_loss(advice: Advice, most: float) -> Advice:
    """The same advice, in which methods that lose more are refused, and those of which the loss is unknown.

    Args:
        most: rise of perplexity as a share.
    """
    return replace(advice, candidates=[_within_loss(candidate, most) for candidate in advice.candidates])


def _within_loss(candidate: Candidate, most: float) -> Candidate:
    loss = loss_of(candidate)
    if candidate.refusal or loss <= most:
        return candidate
    if isinf(loss):
        why = "its loss of quality is unknown; `quantserve quality` measures it"
    else:
        kind = "measured" if candidate.measured else "published"
        why = f"its perplexity is {100 * loss:.1f} % higher ({kind}), and {100 * most:g} % are allowed"
    return replace(candidate, refusal=why)


@dataclass(frozen=True)
class Stretch:
    """Concurrencies from `first` to `last` at which one method comes first by throughput."""

    first: int
    last: int
    label: str


def concurrencies(most: int) -> list[int]:
    """1, 2, 4, ... up to ``most``, which is always the last."""
    points = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    return [*points, most]


def leaders(advice: Advice, workload: Workload, most: int) -> list[Stretch]:
    """Who gives the most tokens per second and device at which concurrency, each change found to the client.

    Between two powers of two that have different leaders the change is searched by halving; a leader that only holds
    between them may be missed.
    """
    known: dict[int, str] = {}

    def leader(users: int) -> str:
        if users not in known:
            order = ranked(advice, workload.at(users))
            known[users] = order[0].candidate.label if order else ""
        return known[users]

    points = concurrencies(most)
    stretches = [Stretch(points[0], points[0], leader(points[0]))]
    for low, high in pairwise(points):
        after = leader(high)
        if after != stretches[-1].label:
            before = stretches[-1].label
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if leader(middle) == before else (low, middle)
            stretches[-1] = replace(stretches[-1], last=high - 1)
            stretches.append(Stretch(high, high, after))
    stretches[-1] = replace(stretches[-1], last=most)
    return stretches
