"""`GET /status`: all models with plan, replicas, load, and expected and observed performance."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from quantserve import __version__
from quantserve.serve.asgi import Refused
from quantserve.serve.gateway.metrics.collect import MetricsEndpoint
from quantserve.serve.gateway.metrics.observed import expected_means
from quantserve.system.secrets import without_secrets

if TYPE_CHECKING:
    from quantserve.planning.plan import Plan
    from quantserve.serve.gateway.upstreams.pool import Pool

FRESH_S: Final = 5.0
"""Age of the engines' metrics up to which they are not fetched again."""
TARGET: Final = ("name", "device", "count", "memory_bytes")
PREDICTED: Final = ("roofline", "calibration")


def details(plan: Plan, adapters: Sequence[str]) -> dict[str, Any]:
    """The fields of a model in `/status` that do not change, as JSON without secrets."""
    memory = plan.memory or {}
    variables = plan.runtime_env.get("env_vars") or {}
    return {
        "id": plan.model_id,
        "method": plan.method.get("name"),
        "bits": plan.bits,
        "bits_per_weight": plan.bits_per_weight,
        "kernel": plan.kernel or None,
        "source": without_secrets(plan.source),
        "revision": plan.engine_args.get("revision"),
        "description": plan.description,
        "url": plan.url,
        "route": plan.route_prefix,
        "target": {name: plan.target.get(name) for name in TARGET},
        "dtype": plan.dtype,
        "tensor_parallel_size": plan.engine_args.get("tensor_parallel_size", 1),
        "max_model_len": plan.max_model_len or memory.get("max_model_len") or None,
        "weights_bytes": memory.get("weights_bytes"),
        "kv_cache_bytes": memory.get("kv_cache_bytes"),
        "kv_cache_tokens": memory.get("kv_tokens"),
        "plugins": plan.plugins,
        "findings": [
            {
                **{name: found.get(name) for name in ("code", "severity", "message")},
                "where": found.get("offenders") or [],
                **{name: found.get(name) for name in ("fix", "source")},
            }
            for found in plan.findings
        ],
        "engine_arguments": [
            {"name": name, "value": without_secrets(value, name), "set_by": plan.provenance.get(name, "core")}
            for name, value in plan.engine_args.items()
        ],
        "environment": [
            {
                "name": name,
                "value": without_secrets(value, name),
                "set_by": plan.environment_provenance.get(name, "core"),
            }
            for name, value in variables.items()
        ],
        "expected": _expected(plan),
        "quality": plan.quality,
        "adapters": list(adapters),
    }


def _expected(plan: Plan) -> dict[str, Any] | None:
    from quantserve.planning.expectation import EXPECTED_WORKLOAD  # not in the gateway's process

    if not plan.expected:
        return None
    source = plan.expected.get("source")
    return {
        **_milliseconds(expected_means(plan.expected)),
        "concurrency": EXPECTED_WORKLOAD.concurrency if source in PREDICTED else None,
        "conditions": plan.expected.get("conditions"),
        "source": source,
        "alone": _milliseconds(expected_means(plan.alone)) if plan.alone else None,
    }


def _milliseconds(means: Mapping[str, float]) -> dict[str, float | None]:
    """Means as the metrics have them, under the names of `/status`."""
    ttft, tpot = means.get("ttft_seconds"), means.get("tpot_seconds")
    return {
        "ttft_ms": _rounded(ttft and 1000 * ttft),
        "tpot_ms": _rounded(tpot and 1000 * tpot),
        "tokens_per_s": _rounded(means.get("output_tokens_per_second")),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


class Status:
    """ASGI app for ``GET /status``.

    Args:
        models: descriptions of the models; their ``details`` are sent as they are.
        pools: returns the models' pools.
        metrics: fetches the engines' metrics.
        clock: Unix seconds.
    """

    def __init__(
        self,
        models: Sequence[Mapping[str, Any]],
        pools: Callable[[], Iterable[Pool]],
        metrics: MetricsEndpoint,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._details = {str(model["card"]["id"]): model.get("details") or {} for model in models}
        self._started = min((model["card"].get("created") or 0 for model in models), default=0)
        self._pools = pools
        self._metrics = metrics
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request.

        Raises:
            Refused: 405, the method is not GET or HEAD.
        """
        if scope["method"] not in ("GET", "HEAD"):
            message = f"Method {scope['method']} is not allowed here; use GET."
            raise Refused(405, message, code="method_not_allowed", headers={"allow": "GET"})
        await self._metrics.refresh(FRESH_S)
        await JSONResponse(self.report(), headers={"cache-control": "no-store"})(scope, receive, send)

    def report(self) -> dict[str, Any]:
        """The body of the response."""
        return {
            "version": __version__,
            "time": self._clock(),
            "started": self._started,
            "models": [self._model(pool) for pool in self._pools()],
        }

    def _model(self, pool: Pool) -> dict[str, Any]:
        replicas = [
            {"id": replica.id, "state": replica.state, "ongoing": replica.ongoing} for replica in pool.replicas.values()
        ]
        return {
            "id": pool.model_id,
            **self._details.get(pool.model_id, {}),
            "state": pool.state,
            "replicas": replicas,
            "ongoing": pool.ongoing,
            "queued": len(pool.waiting),
            "limits": {"ongoing": pool.limits.ongoing, "queued": pool.limits.queued},
            "observed": self._observed(pool.model_id),
        }

    def _observed(self, model: str) -> dict[str, Any] | None:
        window = self._metrics.observed.window(model)
        if not window or not window.requests:
            return None
        return {
            **_milliseconds(self._metrics.observed.means(model)),
            "total_tokens_per_s": _rounded(window.tokens / window.seconds),
            "requests": int(window.requests),
            "window_s": round(window.seconds, 1),
        }
