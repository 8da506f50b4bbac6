"""What a plugin registers about its quantization method."""

from __future__ import annotations

from dataclasses import asdict, dataclass


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
        homepage: where to read about it.
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

    @property
    def names(self) -> tuple[str, ...]:
        """The name followed by the aliases."""
        return (self.name, *self.aliases)

    def to_json(self) -> dict[str, object]:
        """Plain data for ``--json`` and the plan."""
        return asdict(self)


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
