"""A model, a machine and a workload become latencies, with what they rest on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from quantserve.method import KernelProfile
from quantserve.predict.machine import LinearCost, Machine, linear_cost
from quantserve.predict.shape import Shape
from quantserve.predict.simulate import Limits, Run, simulate
from quantserve.predict.step import Batch, StepCost, batch_of, step_cost
from quantserve.predict.workload import Workload

# What a prompt's and lm_head's 16-bit products reach where no plugin says it: vendors' GEMM libraries.
PLAIN = KernelProfile(
    name="16-bit GEMM",
    bits_per_weight=16.0,
    bandwidth_share=((1, 0.82), (64, 0.82), (512, 0.7)),
    flops_share=((1, 0.5), (256, 0.6), (2048, 0.7)),
    source="assumed: what vendors' GEMM libraries usually reach",
)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Means per request of one workload, as `docs/prediction.md` defines them.

    Attributes:
        workload: what was simulated.
        ttft_ms: from sending to the first token.
        tpot_ms: (last token - first token) / (tokens - 1); 0 when no request has two tokens.
        e2e_ms: from sending to the last token.
        itl_ms: E2E / tokens, with TTFT in it: the "ITL" of the 2023 tables.
        tokens_per_s_per_user: mean of tokens / E2E.
        tokens_per_s: output tokens of all requests / duration.
        requests_per_min: finished.
        most_running: requests the engine had in progress at once, at most.
        decode_step: where the time of one decode step goes, with all clients in the middle of their answers.
        uncertainty: half the width of the band, as a share of each number.
        source: ``roofline`` or ``calibration``.
    """

    workload: Workload
    ttft_ms: float
    tpot_ms: float
    e2e_ms: float
    itl_ms: float
    tokens_per_s_per_user: float
    tokens_per_s: float
    requests_per_min: float
    most_running: int
    decode_step: StepCost
    uncertainty: float
    source: str

    def band(self, value: float) -> tuple[float, float]:
        """From where to where a number may lie: divided and multiplied by 1 + uncertainty."""
        return value / (1 + self.uncertainty), value * (1 + self.uncertainty)

    def to_json(self) -> dict[str, object]:
        """Plain data for ``--json``."""
        numbers = {
            name: round(value, 4)
            for name, value in asdict(self).items()
            if isinstance(value, float) and name != "uncertainty"
        }
        return {
            "workload": self.workload.to_json(),
            **numbers,
            "most_running": self.most_running,
            "decode_step_ms": {**self.decode_step.to_json(), "total": round(1000 * self.decode_step.total, 4)},
            "uncertainty": self.uncertainty,
            "source": self.source,
        }


def predict(
    shape: Shape,
    machine: Machine,
    quantized: LinearCost,
    workload: Workload,
    limits: Limits,
    plain: LinearCost | None = None,
) -> Prediction:
    """Predict one workload.

    Args:
        shape: of the model on one rank.
        quantized: what the method's kernel takes on this machine.
        limits: of the scheduler.
        plain: of lm_head; measured or a usual GEMM by default.
    """
    head = plain or linear_cost(machine, PLAIN, "fp16-16")

    def seconds(batch: Batch) -> float:
        return step_cost(shape, machine, quantized, head, batch).total

    run = simulate(workload, limits, seconds, machine.engine.arrival_s)
    together = min(workload.concurrency, run.most_running)
    middle = workload.input_tokens + workload.output_tokens / 2
    step = step_cost(shape, machine, quantized, head, batch_of([(1, middle, True)] * together, limits.window))
    uncertainty = machine.uncertainty if quantized.measured else max(machine.uncertainty, quantized.profile.uncertainty)
    source = machine.source if quantized.measured or machine.source == "roofline" else "roofline"
    return _summary(run, workload, machine.engine.arrival_s, step, uncertainty, source)


def _summary(
    run: Run, workload: Workload, arrival_s: float, step: StepCost, uncertainty: float, source: str
) -> Prediction:
    requests = run.requests
    e2e = [request.last - request.arrival + arrival_s for request in requests]
    ttft = [request.first - request.arrival + arrival_s for request in requests]
    tpot = [(r.last - r.first) / (r.produced - 1) for r in requests if r.produced > 1]
    tokens = [request.produced for request in requests]
    return Prediction(
        workload=workload,
        ttft_ms=1000 * _mean(ttft),
        tpot_ms=1000 * _mean(tpot) if tpot else 0.0,
        e2e_ms=1000 * _mean(e2e),
        itl_ms=1000 * _mean([time / count for time, count in zip(e2e, tokens, strict=True)]),
        tokens_per_s_per_user=_mean([count / time for time, count in zip(e2e, tokens, strict=True)]),
        tokens_per_s=sum(tokens) / run.duration,
        requests_per_min=60 * len(requests) / run.duration,
        most_running=run.most_running,
        decode_step=step,
        uncertainty=uncertainty,
        source=source,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
