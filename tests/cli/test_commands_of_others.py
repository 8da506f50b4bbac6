"""Commands of other distributions: found, run, and broken in every way without harm to anything else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.shell_completion import BashComplete

from helpers.dists import Site
from quantserve.cli.main import CLOSED_PIPE, COMMANDS, EXTRAS, cli, run
from quantserve.plugins import commands

HELLO = """
import click

@click.command()
@click.argument("name", default="you")
def command(name):
    \"\"\"Greet somebody.\"\"\"
    click.echo(f"hello {name}")
"""
BODY = "import click, os, sys\n@click.command()\ndef command():\n    "
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2066]")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A place on sys.path with one good command, ``hello``."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    site = Site(tmp_path)
    site.command("quantserve-hello", HELLO, name="hello", version="2.5")
    yield site
    site.forget()


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, str]]:
    """What `quantserve list --json` says of commands, by distribution."""
    capsys.readouterr()
    assert run(["list", "--json"]) == 0
    return {row["distribution"]: row for row in json.loads(capsys.readouterr().out)["commands"]}


def failing(capsys: pytest.CaptureFixture[str], exit_code: int, *arguments: str) -> str:
    """Run a command that must fail; its stderr, in one line, without a traceback."""
    capsys.readouterr()
    assert run(list(arguments)) == exit_code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert not UNSAFE.search(captured.err)
    return " ".join(captured.err.split())


# --- found -------------------------------------------------------------------------------------------


def test_a_command_is_listed_documented_and_run(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(capsys)["quantserve-hello"] == {
        "name": "hello",
        "distribution": "quantserve-hello",
        "version": "2.5",
        "state": "ok",
        "reason": "",
        "fix": "",
    }
    assert run(["list"]) == 0
    assert re.search(r"hello +│ quantserve-hello 2.5 +│ ok", capsys.readouterr().out)
    assert run(["--help"]) == 0
    assert re.search(r"hello +A command of quantserve-hello 2.5\.", capsys.readouterr().out)
    assert run(["hello", "-h"]) == 0
    text = capsys.readouterr().out
    assert "Usage: quantserve hello [OPTIONS] [NAME]" in text
    assert "Greet somebody." in text
    assert run(["hello", "there"]) == 0
    assert capsys.readouterr().out == "hello there\n"
    assert "did you mean 'hello'?" in failing(capsys, 2, "helo")
    assert "No such option '--loud'" in failing(capsys, 2, "hello", "--loud")


def test_a_group_is_a_command(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    code = """
import click

@click.group()
def command(): ...

@command.command()
def seven(): return 7
"""
    site.command("more", code, name="more")
    assert run(["more", "seven"]) == 7
    assert "No such command 'eight'" in failing(capsys, 2, "more", "eight")


@pytest.mark.parametrize("arguments", [["--help"], ["schema"], ["list", "--help"], ["hello"], ["bench", "--help"]])
def test_no_command_is_imported_but_the_one_that_runs(tmp_path: Path, site: Site, arguments: list[str]) -> None:
    site.command("witness", f"open({str(tmp_path / 'imported')!r}, 'w')", name="witness")
    assert run(arguments) == 0
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("arguments", [["schema"], ["schema", "--help"]])
def test_a_command_of_quantserve_looks_for_no_others(arguments: list[str]) -> None:
    code = f"import sys; from quantserve.cli.main import run; run({arguments}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert "quantserve.plugins.commands" not in done.stdout.splitlines()[-1].split()


# --- exit codes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "exit_code", "says"),
    [
        ("pass", 0, ""),
        ("return 5", 5, ""),
        ("return 'text'", 0, ""),
        ("return True", 0, ""),
        ("sys.exit(6)", 6, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('gone \\x1b[2J')", 1, "gone \\x1b[2J"),
        ("click.get_current_context().exit(9)", 9, ""),
        ("raise click.UsageError('not so')", 2, "Error: not so"),
        ("raise click.ClickException('no \\x1b]0;PWNED')", 1, "Error: no \\x1b]0;PWNED"),
        ("raise KeyboardInterrupt", 130, "interrupted"),
        ("from quantserve.errors import UsageError; raise UsageError('no')", 2, "error: no"),
        ("from quantserve.errors import EngineError; raise EngineError('no')", 4, "error: no"),
    ],
)
def test_how_a_command_ends(
    site: Site, body: str, exit_code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    site.command("third", BODY + body, name="third")
    assert says in failing(capsys, exit_code, "third")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("{}['key \\x1b[31m']", "KeyError: 'key \\x1b[31m' at third_command.py:4"),
        ("raise type('Odd', (Exception,), {'__str__': lambda self: 1 / 0})", "Odd at third_command.py:4"),
        ("open('/no/such/file')", "FileNotFoundError"),
        ("1 / 0", "ZeroDivisionError: division by zero at third_command.py:4"),
        ("def f(): f()\n    f()", "RecursionError: maximum recursion depth exceeded"),
    ],
)
def test_an_unexpected_exception_is_a_defect_of_its_distribution(
    site: Site, body: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    site.command("third", BODY + body, name="third", version="0.3")
    text = failing(capsys, 3, "third")
    assert text.startswith("error: command 'third' of third 0.3 failed at stage 'run': ")
    assert says in text
    assert "fix: upgrade or uninstall third" in text
    assert "bug in quantserve" not in text


def test_an_exception_of_our_own_command_is_a_bug_of_quantserve(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("quantserve_bench.program.bench", lambda **options: 1 / 0)
    assert "This is a bug in quantserve" in failing(capsys, 70, "bench")


@pytest.mark.parametrize(
    ("body", "redirect", "exit_code", "stderr"),
    [
        ("[click.echo('x' * 9999) for _ in range(99)]", "| true", CLOSED_PIPE, ""),
        ("import rich; [rich.print('x' * 60) for _ in range(2000)]", "| true", CLOSED_PIPE, ""),
        ("click.echo('x')", ">/dev/full", 2, "error: cannot write the output: No space left on device\n"),
        ("raise OSError(28, 'No space', 'there')", "", 2, "error: cannot write there: No space\n"),
    ],
)
def test_an_output_that_takes_nothing(site: Site, body: str, redirect: str, exit_code: int, stderr: str) -> None:
    site.command("third", BODY + body, name="third")
    path = os.pathsep.join([str(site.path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'"$0" -m quantserve third {redirect}', sys.executable],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (exit_code, stderr)


# --- broken -------------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[str, str]] = {
    "no module": ("import a_module_nobody_has", "ModuleNotFoundError: No module named 'a_module_nobody_has'"),
    "raises": ("raise ValueError('not today')", "ValueError: not today at third_command.py:1"),
    "exits": ("import sys; sys.exit(0)", "SystemExit: 0"),
    "exits with text": ("raise SystemExit('bye')", "SystemExit: bye"),
    "interrupts": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "aborts": ("import click; raise click.Abort", "Abort"),
    "usage": ("import click; raise click.UsageError('mine')", "UsageError: mine"),
    "syntax": ("def broken(:", "SyntaxError"),
    "no attribute": ("other = 1", "has no attribute 'command'"),
    "a function": ("def command(): ...", "is a function, not a click command"),
    "a text": ("command = 'third'", "is a str, not a click command"),
    "nothing": ("command = None", "is a NoneType, not a click command"),
    "a class": ("import click\nclass command(click.Command): ...", "is a type, not a click command"),
    "lies": (
        "class Lie:\n    @property\n    def __class__(self): raise RuntimeError('no class')\ncommand = Lie()",
        "RuntimeError: no class",
    ),
    "loops": ("while True: pass", "did not end within 0.6 s"),
    "sleeps": ("import time; time.sleep(60)", "did not end within 0.6 s"),
    "recursion": ("def f(): f()\nf()", "RecursionError"),
    "environment": ("import os; os.environ['VLLM_PLUGINS'] = 'x'\n" + HELLO, "set VLLM_PLUGINS in the environment"),
    "folder": ("import os; os.chdir('/')\n" + HELLO, "changed the working folder"),
    "path": ("import sys; sys.path.clear()\n" + HELLO, "from sys.path; put back"),
    "patches": ("import quantserve.errors as e; e.one_line = None\n" + HELLO, "replaced quantserve.errors.one_line"),
    "escapes": ("raise ValueError('\\x1b[2J \\u202e gone \\x00')", r"ValueError: \x1b[2J \u202e gone \x00"),
    "unreadable": ("raise type('Odd', (BaseException,), {'__str__': lambda self: 1 / 0})", "Odd"),
    "forks": ("import os\nif os.fork() == 0: raise ValueError\nos.wait(); raise ValueError('parent')", "parent"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_command_is_a_row_and_an_error_when_it_runs(
    site: Site, kind: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code, reason = BROKEN[kind]
    site.command("third", code, name="third", version="0.3")
    monkeypatch.setenv("QUANTSERVE_HOOK_TIMEOUT", "0.1" if kind in ("loops", "sleeps") else "10")
    rows = listed(capfd)
    assert rows["quantserve-hello"]["state"] == "ok"
    row = rows["third"]
    assert (row["name"], row["version"], row["state"]) == ("third", "0.3", "failed")
    assert reason in row["reason"]
    assert row["fix"] == "upgrade or uninstall third, or leave it out with QUANTSERVE_DISABLE=third"
    site.forget()
    assert run(["list"]) == 0
    table = capfd.readouterr().out
    assert "failed: " in table
    assert not UNSAFE.search(table)
    assert run(["--help"]) == 0
    assert re.search(r"third +A command of third 0.3\.", capfd.readouterr().out)
    assert run(["hello"]) == 0
    assert capfd.readouterr().out == "hello you\n"
    site.forget()
    for arguments in (["third"], ["third", "--help"]):
        text = failing(capfd, 3, *arguments)
        assert text.startswith("error: command 'third' of third 0.3 failed at stage 'load': ")
        assert " ".join(reason.split()) in text
        site.forget()


@pytest.mark.parametrize("value", ["third_command", "no such thing!", ":", "third_command:a b", "third_command:"])
def test_an_entry_point_that_names_no_command(site: Site, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    site.command("third", HELLO, name="third", value=value)
    assert listed(capsys)["third"]["state"] == "failed"
    failing(capsys, 3, "third")


def test_output_of_an_import_does_not_reach_standard_output(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    site.command("loud", "import os; print('noise'); os.write(1, b'noise')" + HELLO, name="loud")
    assert listed(capfd)["loud"]["state"] == "ok"
    site.forget()
    assert run(["loud"]) == 0
    assert capfd.readouterr().out == "hello you\n"


def test_an_import_that_ends_the_process_is_named_with_debug(site: Site) -> None:
    site.command("third", "import os; os._exit(0)", name="third")
    path = os.pathsep.join([str(site.path), os.environ.get("PYTHONPATH", "")])
    environ = {**os.environ, "PYTHONPATH": path, "QUANTSERVE_DEBUG": "1"}

    def ended(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "quantserve", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, env={**environ, **more}, timeout=300, check=False
        )

    assert ended("list").stderr.splitlines()[-1] == "importing command third (third 1.0)"
    assert ended("hello").stdout == "hello you\n"
    assert "disabled" in ended("list", QUANTSERVE_DISABLE="third").stdout


@pytest.mark.parametrize(
    ("requires", "says"),
    [
        ("quantserve>=9", "needs quantserve>=9, this is"),
        ("quantserve<0.1", "needs quantserve<0.1, this is"),
        ("quantserve>=0.1", ""),
        ("not a requirement at all", ""),
    ],
)
def test_the_version_of_quantserve_that_a_command_requires(
    site: Site, requires: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    site.command("third", HELLO, name="third", requires=requires)
    row = listed(capsys)["third"]
    assert row["state"] == ("failed" if says else "ok")
    assert says in row["reason"]
    assert run(["third"]) == (3 if says else 0)


def test_a_distribution_whose_entry_points_cannot_be_read(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.command("third", HELLO, name="third")
    next(site.path.glob("third-*/entry_points.txt")).write_text("[quantserve.commands]\nno equals sign\n")
    assert listed(capsys)["quantserve-hello"]["state"] == "ok"
    assert run(["hello"]) == 0
    assert run(["--help"]) == 0


def test_completion_leaves_out_what_is_broken(site: Site) -> None:
    site.command("third", "raise ValueError", name="third")
    names = {item.value for item in BashComplete(cli, {}, "quantserve", "_X").get_completions([], "")}
    assert {*COMMANDS, *EXTRAS, "hello"} <= names
    assert "third" not in names


def test_completion_succeeds(site: Site) -> None:
    environ = {**os.environ, "_QUANTSERVE_COMPLETE": "bash_complete", "COMP_WORDS": "quantserve sch", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "quantserve"], capture_output=True, text=True, env=environ, timeout=300, check=False
    )
    assert (done.returncode, done.stdout) == (0, "plain,schema\n")


# --- names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_a_name_of_quantserve_cannot_be_taken(
    site: Site, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site.command(f"quantserve-{name}", f"open({str(tmp_path / 'imported')!r}, 'w')\n{HELLO}", name=name)
    row = listed(capsys)[f"quantserve-{name}"]
    assert row["state"] == "failed"
    assert row["reason"] == f"{name!r} is a command of quantserve itself"
    assert run([name, "--help"]) == 0
    assert "Greet somebody" not in capsys.readouterr().out
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("name", EXTRAS)
def test_the_name_of_another_distribution_of_this_project_cannot_be_taken(
    site: Site, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site.command("third", HELLO, name=name)
    rows, owner = listed(capsys), f"quantserve-{EXTRAS[name][0]}"
    assert rows["third"]["reason"] == f"{name!r} is the command of {owner}"
    assert rows[owner]["state"] == "ok"
    monkeypatch.setenv("QUANTSERVE_DISABLE", owner)
    assert "is switched off" in failing(capsys, 2, name)
    assert run(["--help"]) == 0
    assert "Not installed" not in capsys.readouterr().out
    # Where only the newcomer is installed it does not get the name either.
    alone = site.entry_points()
    monkeypatch.setattr(commands, "installed", lambda groups: (alone, []))
    assert f"{owner} is not installed fix: pip install 'quantserve[{EXTRAS[name][0]}]'" in failing(capsys, 2, name)
    assert run(["--help"]) == 0
    assert f"Not installed: pip install 'quantserve[{EXTRAS[name][0]}]'" in " ".join(capsys.readouterr().out.split())


def test_two_distributions_with_one_name(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site.command("one", HELLO, name="twice")
    site.command("two", HELLO.replace("hello {", "good day {"), name="twice")
    rows = listed(capsys)
    reason = "entry-point name 'twice' is claimed by one 1.0 and two 1.0; neither is used"
    assert rows["one"]["reason"] == rows["two"]["reason"] == reason
    assert rows["one"]["fix"] == "uninstall one or two, or QUANTSERVE_DISABLE=one or two"
    assert reason in failing(capsys, 3, "twice")
    assert run(["--help"]) == 0
    assert "twice" not in capsys.readouterr().out
    monkeypatch.setenv("QUANTSERVE_DISABLE", "one")
    assert {name: row["state"] for name, row in listed(capsys).items() if row["name"] == "twice"} == {
        "one": "disabled",
        "two": "ok",
    }
    assert run(["twice"]) == 0
    assert capsys.readouterr().out == "good day you\n"


def test_the_distribution_named_for_a_command_keeps_it(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.command("third", HELLO.replace("hello {", "good day {"), name="hello")
    rows = listed(capsys)
    assert rows["quantserve-hello"]["state"] == "ok"
    assert "it belongs to quantserve-hello" in rows["third"]["reason"]
    assert run(["hello"]) == 0
    assert capsys.readouterr().out == "hello you\n"


def test_a_switched_off_command_says_so(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTSERVE_DISABLE", "hello")
    assert listed(capsys)["quantserve-hello"]["state"] == "disabled"
    assert "switched off: named in QUANTSERVE_DISABLE fix: remove it" in failing(capsys, 2, "hello")
    assert run(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []


@pytest.mark.parametrize("name", ["core", "--help", "\x1b[2J", "a b", "\u202ebad", "x" * 65, "naïve", "a/b", "[bold]"])
def test_a_name_that_nobody_can_type_safely(site: Site, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    site.command("third", HELLO, name=name)
    assert listed(capsys)["third"]["state"] == "failed"
    for arguments in (["list"], ["--help"]):
        assert run(arguments) == 0
        assert not UNSAFE.search(capsys.readouterr().out)
    assert run([name]) in (0, 2, 3)
    captured = capsys.readouterr()
    assert not UNSAFE.search(captured.out + captured.err)
    assert "hello" not in captured.out.splitlines()[:1]


def test_metadata_cannot_command_the_terminal(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.command("third", HELLO, name="third", version="1\x1b[2J\u202e")
    for arguments in (["list"], ["list", "--json"], ["--help"], ["third"]):
        assert run(arguments) == 0
        assert not UNSAFE.search(capsys.readouterr().out)


def test_what_find_returns_is_plain(site: Site) -> None:
    """Without an environment of its own it reads what is installed, and imports nothing."""
    found: list[Any] = commands.find(COMMANDS, EXTRAS, {}, site.entry_points())
    assert [(command.name, command.origin, command.ours, command.refusal) for command in found] == [
        ("hello", "quantserve-hello 2.5", False, None)
    ]
