"""``quantserve``: the command group, and the only place where errors become exit codes."""

from __future__ import annotations

import errno
import gc
import io
import os
import signal
import sys
from contextlib import suppress
from importlib import import_module
from importlib.metadata import entry_points

import click

from quantserve import __version__
from quantserve.errors import QuantserveError, UsageError, one_line, unknown_name
from quantserve.text import LONGEST_ERROR, harmless

COMMANDS = {
    "list": "Show the installed quantization methods, and plugins that failed to load.",
    "check": "Check models from file headers, without loading weights or using a GPU.",
    "plan": "Print how models would be run: engine arguments, placement, memory.",
    "serve": "Check, plan and serve models behind an OpenAI-compatible API.",
    "profile": "Print the expected performance of a model: published numbers and a prediction.",
    "recommend": "Rank the quantization methods for a model, a target and a workload.",
    "calibrate": "Measure this machine, to base predictions on its real speed.",
    "bench": "Measure models under load, and compare with the expected performance.",
    "convert": "Convert foreign checkpoint files to a safetensors folder.",
    "schema": "Print the JSON Schema of the config.",
    "doctor": "Check this machine: engine, torch, kernels, Ray, HAProxy, GPU, plugins.",
}
INTERNAL_ERROR = 70  # sysexits.h EX_SOFTWARE: a bug in quantserve
CLOSED_PIPE = 128 + signal.SIGPIPE  # as of any program that the signal ends, so that no script takes it for success
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


class LazyGroup(click.Group):
    """A command group that imports the module of a command only to run it, so that `list` stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Command names in the order of first use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, or None if it does not exist."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"quantserve.cli.{cmd_name}_command").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Like click's, but the error suggests the closest command."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(unknown_name("command", args[0], COMMANDS))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="quantserve")
def cli() -> None:
    """Serve quantized LLMs from a config file.

    Exit codes: 0 success, 1 findings of severity error, 2 wrong usage or config, 3 plugin defect,
    4 the engine or Ray failed, 70 bug in quantserve.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    gc.set_threshold(100_000)  # default thresholds cost a third of the time for the 36,000 linears of a large mixture
    open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # the locale may lack a character of a name
    sys.exit(run(arguments))


def open_standard_streams() -> None:
    """Connect closed standard streams to the null device, so that no file opened later gets the number of one."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115 - it stays open
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code; errors are printed to stderr."""
    debug = bool(os.environ.get("QUANTSERVE_DEBUG"))
    try:
        result = cli.main(args=arguments, prog_name="quantserve", standalone_mode=False)
    except click.exceptions.Exit as signal:
        return signal.exit_code
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        click.echo(harmless(shown.getvalue(), LONGEST_ERROR, keep="\n"), err=True, nl=False)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except QuantserveError as error:
        if debug:
            raise
        click.secho("error: ", fg="red", bold=True, err=True, nl=False)
        click.echo(str(error), err=True)
        return error.exit_code
    except SystemExit:  # from click and rich, where the reader of the output (head, less) has closed the pipe
        _drop_output()
        return CLOSED_PIPE
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            _drop_output()
            click.echo(f"error: cannot write {error.filename or 'the output'}: {error.strerror}", err=True)
            return UsageError.exit_code
        click.echo(f"internal error: {one_line(error)}", err=True)
        click.echo(
            "  This is a bug in quantserve. Run again with QUANTSERVE_DEBUG=1 and report the traceback.", err=True
        )
        if names := ",".join(plugins_from_outside()):
            click.echo(f"  A plugin can cause it as well. Run again with QUANTSERVE_DISABLE={names}", err=True)
        return INTERNAL_ERROR
    return result if isinstance(result, int) else 0


def plugins_from_outside() -> list[str]:
    """Names of the installed plugins that are not this project's, as far as they can be read."""
    with suppress(Exception):
        from quantserve.plugins.claims import OURS, named_for, unusable_name
        from quantserve.plugins.plugin import origin
        from quantserve.plugins.registry import GROUP

        points = [point for point in entry_points(group=GROUP) if not unusable_name(point.name)]
        return sorted({p.name for p in points if p.name not in OURS or not named_for(origin(p)[0], p.name)})
    return []


def _drop_output() -> None:
    """Prevent a second error when Python flushes the output at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
