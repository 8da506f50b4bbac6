"""``quantserve calibrate``."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import click
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from quantserve.cli.output import console, print_json, table
from quantserve.errors import UsageError
from quantserve.plugins.registry import Registry
from quantserve.predict.calibration import DISTURBED, Calibration, default_path, disturbance, save
from quantserve.system.homes import settle
from quantserve.target import this_cpu


@click.command("calibrate")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False),
              help="Output file; default: the file that predictions use.")  # fmt: skip
@click.option("--quick", is_flag=True, help="Measure fewer batch sizes.")
@click.option("--engine", "engine", is_flag=True, help="Also measure the cost of vLLM itself; takes some minutes.")
@click.option("--json", "as_json", is_flag=True, help="Print the measurements as JSON.")
def command(out: Path | None, quick: bool, engine: bool, as_json: bool) -> None:
    """Measure this machine's CPU, so that predictions for it rest on measurements.

    Memory bandwidth, bfloat16 products, and the kernel of every installed method at several batch sizes, with as many
    threads as vLLM would use. About a minute; keep the machine quiet meanwhile.
    """
    if find_spec("torch") is None:
        raise UsageError(
            "torch is not installed, which the measurement needs\n"
            "  fix: install the engine, `pip install 'quantserve[cpu]'`"
        )
    from quantserve.calibrate.measure import calibrate

    path = out or default_path()
    err = console(stderr=True)
    for note in settle(os.environ):  # for torch and vLLM
        err.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        measured = calibrate(Registry.load(), this_cpu(), quick=quick, progress=progress)
        if engine:
            from quantserve.calibrate.engine import with_engine

            measured = with_engine(measured, progress)
    save(measured, path)
    if as_json:
        print_json(measured.to_json())
    else:
        show(measured, path)


def show(measured: Calibration, path: Path) -> None:
    """A table of the kernels, and the rest in lines."""
    out = console()
    out.print(f"[bold]{escape(str(measured.machine['cpu']))}[/], {measured.threads} compute threads")
    out.print(
        f"  reads {measured.read_bytes_per_s / 1e9:.1f} GB/s, "
        f"multiplies {measured.matmul_flops_per_s / 1e9:.0f} GFLOP/s"
    )
    counts = sorted({rows for kernel in measured.kernels.values() for rows, _ in kernel})
    rows = [
        (key, escape(measured.about.get(key, "")), *(f"{1e12 * dict(kernel)[count]:.1f}" for count in counts))
        for key, kernel in measured.kernels.items()
    ]
    columns = ("kernel", "which", *(str(count) for count in counts))
    out.print(table("Picoseconds per weight, by rows of x", columns, rows, wrap=("which",)))
    for kind, costs in (("compiled", measured.engine), ("not compiled", measured.eager)):
        if costs is None:
            continue
        out.print(
            f"  vLLM, {kind}: {1e3 * costs.step_s:.2f} ms a step, {1e6 * costs.layer_s:.0f} us a layer, "
            f"{1e3 * costs.request_s:.2f} ms a sequence and step, {1e9 * costs.element_s:.2f} ns an activation"
        )
    if measured.engine is None:
        out.print("  vLLM's own costs were not measured (--engine does); defaults are used")
    if measured.disturbed > DISTURBED:
        out.print(f"  [yellow]note[/] {disturbance(measured)}", soft_wrap=True)
    for note in measured.notes:
        out.print(f"  [yellow]left out[/] {escape(note)}", soft_wrap=True)
    out.print(f"  {measured.seconds:.0f} s; written to {escape(str(path))}")
