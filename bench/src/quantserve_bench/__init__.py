"""Load generator, metrics and reports for servers with OpenAI's API.

from quantserve_bench import Closed, Request, Target, measure, run, run_blocking

requests = [Request(messages=[{"role": "user", "content": "Hello"}], max_tokens=64) for _ in range(100)]
results = run_blocking(run(Target("http://127.0.0.1:8000", "demo-awq"), requests, Closed(concurrency=16)))
print(measure(results).mean("ttft"))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantserve_bench.client import Client, Live
    from quantserve_bench.load import Closed, Load, Open, Rounds, Run, Timed, run, run_blocking
    from quantserve_bench.measured import Measured, measure
    from quantserve_bench.request import Request, Target
    from quantserve_bench.result import Event, Failure, Kind, Result, Usage

__all__ = [
    "Client",
    "Closed",
    "Event",
    "Failure",
    "Kind",
    "Live",
    "Load",
    "Measured",
    "Open",
    "Request",
    "Result",
    "Rounds",
    "Run",
    "Target",
    "Timed",
    "Usage",
    "measure",
    "run",
    "run_blocking",
]

_MODULES = ("client", "load", "measured", "request", "result")


def __getattr__(name: str) -> Any:
    """Import what is asked for; `quantserve list` imports this package and needs none of it."""
    if name in __all__:
        for module in (import_module(f"{__name__}.{short}") for short in _MODULES):
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
