"""``quantserve plan``."""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.markup import escape

from quantserve.cli.check_command import print_notes, print_report
from quantserve.cli.output import console, kv_cache, print_json, table
from quantserve.cli.sources import choose_target, load_sources, outcomes, source_options
from quantserve.planning.plan import Plan, make_plans
from quantserve.plugins.registry import Registry
from quantserve.system.secrets import without_secrets
from quantserve.target import gib


@click.command("plan")
@source_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(sources: tuple[str, ...], target_name: str | None, as_json: bool, **bare: object) -> int:
    """Print exactly how models would be run.

    Engine arguments with who set each of them, placement, runtime environment, memory and expected performance.
    """
    app = load_sources(sources, **bare)  # type: ignore[arg-type]
    target = choose_target(target_name)
    results = list(outcomes(app.models, Registry.load(), target))
    refused = [result for result in results if result.exit_code]
    plans = make_plans([r.composition for r in results if r.composition and not r.exit_code])
    if refused:
        print_report(console(stderr=True), refused, target, app.notes)
    elif not as_json:
        print_notes(console(stderr=True), app.notes)
    if as_json:
        print_json(
            {
                "notes": app.notes,
                "plans": [plan.model_dump() for plan in plans],
                "refused": [r.model.model_id for r in refused],
            }
        )
    else:
        out = console()
        for plan in plans:
            print_plan(out, plan)
    return max((result.exit_code for result in results), default=0)


def print_plan(out: Console, plan: Plan) -> None:
    """One plan for people."""
    rows = [(escape(key), escape(json.dumps(value)), plan.provenance[key]) for key, value in plan.engine_args.items()]
    title = f"{plan.model_id} ({plan.method['name']}) on {plan.target['name']}"
    out.print(table(escape(title), ("engine argument", "value", "set by"), rows))
    facts = {
        "plugins": ", ".join(f"{p['name']} ({p['distribution']} {p['version']})" for p in plan.plugins),
        "route": plan.route_prefix,
        "deployment": json.dumps(plan.deployment),
        "kernel": plan.kernel,
        "environment": json.dumps(without_secrets(plan.runtime_env)),
        "variables": ", ".join(f"{name} set by {source}" for name, source in plan.environment_provenance.items()),
        "adapters": ", ".join(f"{one['name']} ({one['path']})" for one in plan.frontend_args.get("lora_modules") or []),
        "downloads": ", ".join(f"{one['source']} ({gib(sum(one['files'].values()))})" for one in plan.downloads),
        "request defaults": json.dumps(plan.request_defaults) if plan.request_defaults else "",
        "memory": _memory(plan),
        "expected": _expected(plan),
    }
    for name, text in facts.items():
        if text:
            out.print(f"  [bold]{name:16}[/] {escape(text)}", soft_wrap=True)
    out.print()


def _memory(plan: Plan) -> str:
    if not plan.memory:
        return ""
    memory = plan.memory
    parts = {"weights": "weights_bytes", "overhead": "overhead_bytes", "LoRA": "adapters_bytes", "of": "budget_bytes"}
    sizes = ", ".join(f"{name} {gib(memory[key])}" for name, key in parts.items() if key in memory)
    return f"{sizes} per device; KV cache {memory['kv_bytes_per_token'] / 1024:.0f} KiB a token, {kv_cache(memory)}"


def _expected(plan: Plan) -> str:
    if not plan.expected:
        return "not known"
    e = plan.expected
    return (
        f"TTFT {e['ttft_ms']} ms, ITL {e['itl_ms']} ms [{e['itl_definition']}], "
        f"{e['output_tokens_per_s']} tok/s per user ({e['source']}: {e['conditions']})"
    )
