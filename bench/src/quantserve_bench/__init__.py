"""Load generator, metrics and reports for servers with OpenAI's API.

from quantserve.bench import Closed, Request, Target, run, run_blocking

requests = [Request(messages=[{"role": "user", "content": "Hello"}], max_tokens=64) for _ in range(100)]
results = run_blocking(run(Target("http://127.0.0.1:8000", "demo-awq"), requests, Closed(concurrency=16)))
print(measure(results).mean("ttft"))
"""

from quantserve.bench.client import Client, Live
from quantserve.bench.load import Closed, Load, Open, Rounds, Run, Timed, run, run_blocking
from quantserve.bench.measured import Measured, measure
from quantserve.bench.request import Request, Target
from quantserve.bench.result import Event, Failure, Kind, Result, Usage

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
