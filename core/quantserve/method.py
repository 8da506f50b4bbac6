"""What a plugin registers about its quantization method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, slots=True)
class Method:
    """A quantization method, as ``quantserve_method`` returns it.

    Attributes:
        name: lower-case name used in configs (``engine_kwargs.quantization``).
        summary: one line for ``quantserve list``.
        bits: weight widths the method serves.
        vllm_name: value of vLLM's ``quantization`` engine argument; None passes none.
        aliases: further names a config may use.
        minimum_capability: lowest CUDA compute capability times ten (75 is 7.5); 0 is any.
        devices: device types it runs on, of ``cuda``, ``rocm``, ``cpu``.
        dtypes: activation dtypes it supports, of ``float16``, ``bfloat16``, ``float32``.
        accepts: for a ``quant_method`` that files declare, by device: the further ``quantization`` arguments vLLM takes
            for it. Files that declare a name in here are the method's, even if it is none of its own names.
        homepage: where to read about it.
        families: the ``model_type`` of every family it can be used for; empty for any. `recommend` leaves it out of
            others; what the files of a model hold is the business of ``quantserve_validate``.
        api: version of the plugin API the plugin was written for (``quantserve.api.VERSION`` of that time).
    """

    name: str
    summary: str
    bits: tuple[int, ...]
    vllm_name: str | None
    aliases: tuple[str, ...] = ()
    minimum_capability: int = 0
    devices: tuple[str, ...] = ("cuda", "cpu")
    dtypes: tuple[str, ...] = ("float16", "bfloat16")
    homepage: str = ""
    api: int = 1
    accepts: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict, hash=False)
    families: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The name followed by the aliases."""
        return (self.name, *self.aliases)

    def to_json(self) -> dict[str, object]:
        """Plain data for ``--json`` and the plan."""
        return {name: value for name, value in asdict(self).items() if name not in ("api", "accepts", "families")}


@dataclass(frozen=True, slots=True)
class PerformanceProfile:
    """Expected performance of one model on one target, and where the numbers come from.

    Latencies are means in milliseconds per request; ``itl_ms`` follows ``itl_definition``;
    ``output_tokens_per_s`` is per user. None means not known.

    Attributes:
        source: ``reference`` (a published table), ``roofline`` or ``calibration`` (this machine).
        conditions: hardware, engine version and workload the numbers hold for.
        itl_definition: which inter-token latency this is; the 2023 tables divide E2E by tokens.
        caveats: what a reader must know before comparing.
    """

    source: str
    conditions: str
    e2e_ms: float | None = None
    ttft_ms: float | None = None
    itl_ms: float | None = None
    output_tokens_per_s: float | None = None
    itl_definition: str = "E2E / output tokens (TTFT included)"
    caveats: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Plain data for ``--json``, the plan and ``/v1/models``."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class KernelProfile:
    """What the linears of a method reach on one kind of device, as ``quantserve_kernel`` returns it.

    A share is given for some numbers of rows of x (tokens computed at once) and interpolated between them, both on
    logarithmic scales; outside it stays what it is at the ends. A linear then takes the longer of
    ``packed bytes / (bandwidth x share)`` and ``2 x rows x n x k / (FLOP/s x share)``.

    Attributes:
        name: the kernel, for people: ``Marlin (vLLM)``.
        bits_per_weight: stored bits of a weight, scales and zeros included; the files' own number wins over it.
        bandwidth_share: (rows, share of the device's memory bandwidth), rising rows.
        flops_share: (rows, share of the device's dense 16-bit rate), rising rows.
        source: where the shares come from: a paper, a table, or that they are assumed.
        uncertainty: how far the time of a linear may be off, as a share of it.
        benchmark: ``module:callable`` that `quantserve calibrate` calls as ``callable(n, k, bits)`` for a function of
            x [rows, k] in bfloat16 and the bytes of weight it reads; "" when there is none.
        experts: whether it serves the experts of a mixture as well.
        k_multiple: what K of a linear on one rank has to be a multiple of: the size of a group, or the codes of a word.
        amx: whether it multiplies with AMX where a CPU has that; the rate of other kernels is lower there.
        argument: vLLM's ``quantization`` argument that leads to this kernel, where a method has several; "" else.
        alternatives: the method's other kernels on this device; ``calibrate`` measures them too, and a plan with their
            ``argument`` and ``environment`` is predicted with them.
        key: its name in a calibration, where a method has several kernels; "" is the argument or the method's name.
        environment: the variables of ``quantserve_environment`` that lead to this kernel, where a method has several.
    """

    name: str
    bits_per_weight: float
    bandwidth_share: tuple[tuple[int, float], ...]
    flops_share: tuple[tuple[int, float], ...]
    source: str
    uncertainty: float = 0.35
    benchmark: str = ""
    experts: bool = True
    k_multiple: int = 1
    amx: bool = True
    argument: str = ""
    alternatives: tuple[KernelProfile, ...] = ()
    key: str = ""
    environment: Mapping[str, str] = field(default_factory=dict, hash=False)

    def to_json(self) -> dict[str, object]:
        """Plain data for ``--json``."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class QualityNote:
    """What quantizing costs in quality, as published for one model.

    Attributes:
        perplexity, baseline: of the quantized and of the 16-bit model on the same text.
        measured_on: model and text, ``Llama-2 7B, WikiText-2``.
        source: where it was published.
    """

    perplexity: float
    baseline: float
    measured_on: str
    source: str

    @property
    def increase(self) -> float:
        """By how much the perplexity rises, as a share of the baseline."""
        return self.perplexity / self.baseline - 1

    def to_json(self) -> dict[str, object]:
        """Plain data for ``--json``."""
        return {**asdict(self), "increase": round(self.increase, 4)}
