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
from typing import TYPE_CHECKING, Any

import click

from quantserve import __version__
from quantserve.errors import QuantserveError, UsageError, one_line, unknown_name
from quantserve.text import LONGEST_ERROR, harmless

if TYPE_CHECKING:
    from quantserve.plugins.commands import Command

COMMANDS = {
    "list": "Show the installed quantization methods and commands, and what failed to load.",
    "check": "Check models from file headers, without loading weights or using a GPU.",
    "plan": "Print how models would be run: engine arguments, placement, memory.",
    "serve": "Check, plan and serve models behind an OpenAI-compatible API.",
    "status": "Show the servers that this user runs on this machine.",
    "stop": "Stop a server that this user runs on this machine.",
    "profile": "Print the expected performance of a model: published numbers and a prediction.",
    "recommend": "Rank the quantization methods for a model, a target and a workload.",
    "calibrate": "Measure this machine, to base predictions on its real speed.",
    "convert": "Convert foreign checkpoint files to a safetensors folder.",
    "schema": "Print the JSON Schema of the config.",
    "doctor": "Check this machine: engine, torch, kernels, Ray, HAProxy, GPU, plugins.",
    "plugin": "Show the installed plugins, and check that one keeps its contracts.",
    "new-plugin": "Write a complete distribution for a new plugin or command.",
}
EXTRAS = {
    "query": ("client", "Ask one or several models, and see their answers side by side."),
    "chat": ("client", "Chat with a model."),
    "models": ("client", "Show the models of a server."),
    "evaluate": ("client", "Score models on questions with reference answers, or by a judge."),
    "bench": ("bench", "Measure models under load, and compare with the expected performance."),
    "quantize": ("quantize", "Make a quantized checkpoint of an unquantized one."),
    "quality": ("quantize", "Measure what quantized models lost against the model they were made from."),
}
"""Commands that come with an extra and the distribution ``quantserve-EXTRA``: name -> (extra, what it does)."""
INTERNAL_ERROR = 70  # sysexits.h EX_SOFTWARE: a bug in quantserve
CLOSED_PIPE = 128 + signal.SIGPIPE  # as of any program that the signal ends, so that no script takes it for success
OTHERS, RUNNING = f"{__name__}.others", f"{__name__}.running"  # keys of click's `Context.meta`
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
OUTPUT_ERRORS = (errno.EPIPE, *DISK_ERRORS)


class LazyGroup(click.Group):
    """A command group that imports the module of a command only to run it, so that `list` stays fast.

    Commands of other distributions are looked up when a name is no command of quantserve, and for `--help`.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands."""
        usable = (command.name for command in _others(ctx) if not command.refusal)
        return list(dict.fromkeys((*COMMANDS, *EXTRAS, *usable)))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, or None if it does not exist.

        Raises:
            PluginError: it is another distribution's, and defective.
            UsageError: it is not installed, or switched off.
        """
        if cmd_name in COMMANDS:
            command: click.Command = import_module(f"quantserve.cli.{cmd_name.replace('-', '_')}_command").command
            return command
        try:
            return _load(ctx, cmd_name)
        except QuantserveError:
            if ctx.resilient_parsing:  # completion in a shell asks for every command
                return None
            raise

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Like click's, but the error suggests the closest command."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            known = self.list_commands(ctx)
            if args[0] not in (*known, *(command.name for command in _others(ctx))):
                ctx.fail(unknown_name("command", args[0], known))
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what another distribution's code raises unexpectedly is a defect of that distribution.

        Raises:
            PluginError: the code raised what neither click nor quantserve handles.
        """
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit, EOFError, QuantserveError):
            raise
        except SystemExit as error:
            if RUNNING in ctx.meta and not isinstance(error.__context__, BrokenPipeError):
                raise click.exceptions.Exit(_exit_code(error)) from error
            raise
        except Exception as error:
            command: Command | None = ctx.meta.get(RUNNING)
            if command is None or command.ours or (isinstance(error, OSError) and error.errno in OUTPUT_ERRORS):
                raise
            raise command.blame(error) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        installed = {command.name for command in _others(ctx) if command.ours}
        rows = list(COMMANDS.items())
        for name, (extra, text) in EXTRAS.items():
            rows.append(
                (name, text if name in installed else f"{text} Not installed: pip install 'quantserve[{extra}]'")
            )
        for command in _others(ctx):
            if not (command.ours or command.refusal):
                rows.append((command.name, f"A command of {command.origin}."))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _others(ctx: click.Context) -> list[Command]:
    """Commands of other distributions; read once."""
    if OTHERS not in ctx.meta:
        from quantserve.plugins.commands import find

        ctx.meta[OTHERS] = find(COMMANDS, EXTRAS)
    others: list[Command] = ctx.meta[OTHERS]
    return others


def _load(ctx: click.Context, name: str) -> click.Command | None:
    """Another distribution's command; None if there is none.

    Raises:
        PluginError, UsageError: see `LazyGroup.get_command`.
    """
    found = sorted((c for c in _others(ctx) if c.name == name), key=lambda c: (c.refusal is not None, not c.ours))
    if name in EXTRAS and not any(command.ours for command in found):
        extra = EXTRAS[name][0]
        raise UsageError(f"quantserve-{extra} is not installed\n  fix: pip install 'quantserve[{extra}]'")
    if not found:
        return None
    ctx.meta[RUNNING] = found[0]
    return found[0].load()


def _exit_code(error: SystemExit) -> int:
    """The exit code of ``sys.exit(...)`` in a command; a text is printed."""
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    click.echo(harmless(str(error.code), LONGEST_ERROR, keep="\n"), err=True)
    return 1


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
    except SystemExit as error:
        if not error.code:  # from click's completion for shells
            return 0
        _drop_output()  # from click and rich, where the reader of the output (head, less) has closed the pipe
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
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


def plugins_from_outside() -> list[str]:
    """Names of the installed plugins that are not this project's, as far as they can be read."""
    with suppress(Exception):
        from quantserve.plugins.claims import OURS
        from quantserve.plugins.entry_points import named_for, origin, unusable_name
        from quantserve.plugins.registry import GROUP

        points = [point for point in entry_points(group=GROUP) if not unusable_name(point.name)]
        return sorted({p.name for p in points if p.name not in OURS or not named_for(origin(p)[0], p.name)})
    return []


def _drop_output() -> None:
    """Prevent a second error when Python flushes the output at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
