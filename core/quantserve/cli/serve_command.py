"""``quantserve serve``."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Final

import click

from quantserve.cli.check_command import print_report
from quantserve.cli.output import console
from quantserve.cli.sources import Outcome, choose_target, load_sources, outcomes, source_options
from quantserve.errors import QuantserveError, UsageError
from quantserve.planning.plan import make_plans, refusal, require_gpus
from quantserve.plugins.registry import Registry

SERVING: Final = ("vllm", "ray", "starlette", "uvicorn", "httptools", "uvloop", "msgspec", "prometheus_client")
"""Modules that serving imports and checking does not."""


@click.command("serve")
@source_options
@click.option("--host", help="Address to listen on; default 127.0.0.1.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port; 0 picks a free one; default 8000.")
@click.option("--api-keys-file", metavar="FILE", help="File with one API key per line; or set QUANTSERVE_API_KEYS.")
@click.option("--detach", is_flag=True, help="Serve in the background: return when the models are ready.")
@click.option("--log", metavar="FILE", help="Log of --detach; default: a new file in ~/.cache/quantserve/logs.")
@click.option("--no-explorer", is_flag=True, help="Show no web page at /.")
@click.option("--keep-going", is_flag=True,
              help="Serve the other models if some are refused, and exit with 0 if some fail.")  # fmt: skip
def command(
    sources: tuple[str, ...],
    target_name: str | None,
    host: str | None,
    port: int | None,
    api_keys_file: str | None,
    no_explorer: bool,
    keep_going: bool,
    detach: bool,
    log: str | None,
    **bare: object,
) -> int:
    """Check, plan and serve models behind an OpenAI-compatible API.

    All models are at /v1, selected by the "model" field of a request; each one is also at /MODEL_ID/v1. Press Ctrl-C to
    stop; `quantserve status` and `quantserve stop` know the server, too.
    """
    if log and not detach:
        raise UsageError("--log is the log of --detach\n  fix: add --detach, or leave --log out")
    detached = None
    if detach:
        from quantserve.serve.driver.detach import detach as start

        started = start(log)
        if isinstance(started, int):
            return started
        detached = started
    app = load_sources(sources, **bare)  # type: ignore[arg-type]
    target = choose_target(target_name)
    results = list(outcomes(app.models, Registry.load(), target))
    print_report(console(stderr=True), results, target, app.notes)
    refused = [result for result in results if result.exit_code]
    served = [result.composition for result in results if result.composition and not result.exit_code]
    if refused and (not keep_going or not served):
        raise _refusal(refused)
    plans = make_plans(served)
    require_gpus(plans)
    given = {"host": host, "port": port, "api_keys_file": api_keys_file}
    http = app.http.model_copy(update={key: value for key, value in given.items() if value is not None})

    _require_engine()
    from quantserve.serve.driver.run import serve_plans

    explorer = None if no_explorer else app.explorer
    return serve_plans(plans, http, keep_going=keep_going, sources=sources, detached=detached, explorer=explorer)


def _require_engine() -> None:
    """Refuse to serve if only the dependencies of checking are installed."""
    missing = [name for name in SERVING if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"serving needs packages that are not installed: {', '.join(missing)}\n"
            "  fix: pip install 'quantserve[cpu]', or 'quantserve[cuda]' with an NVIDIA GPU"
        )


def _refusal(refused: list[Outcome]) -> QuantserveError:
    """The error to exit with when models are refused: the one with the highest exit code."""
    gravest = max(refused, key=lambda result: result.exit_code)
    if gravest.error:
        return gravest.error
    return refusal({r.model.model_id: list(r.composition.errors) for r in refused if r.composition})
