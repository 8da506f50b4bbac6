"""What ``quantserve chat`` does."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any, Final

from rich.markup import escape

from quantserve.cli.output import console
from quantserve.errors import QuantserveError
from quantserve.system.homes import expand
from quantserve_bench.result import Event, Kind, Result
from quantserve_client.figures import line as figures_line
from quantserve_client.lines import request
from quantserve_client.options import Address, Generation
from quantserve_client.server import Server
from quantserve_client.terminal import visible, write

HELP: Final = """\
/reset        forget the conversation
/system TEXT  set the system prompt, without TEXT remove it, and forget the conversation
/save FILE    write the conversation as JSON, or as Markdown if FILE ends with .md
/help         print these lines
/quit         end; so does Ctrl-D"""


def chat(address: Address, model: str | None, generation: Generation, *, stats: bool) -> int:
    """Chat until the input ends; returns the exit code.

    On a terminal an answer that fails does not end the chat and the code is 0; in a pipe it is that of the last
    failure.

    Raises:
        EngineError, UsageError: the server does not answer, or the model has to be chosen.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - `input` edits lines and remembers them with it
    with asyncio.Runner() as runner:
        server = Server(address)
        try:
            (chosen,) = runner.run(server.choose((model,) if model else ()))
            return _Chat(runner, server, chosen, generation, stats).run()
        finally:
            runner.run(server.__aexit__())


class _Chat:
    """A conversation.

    Args:
        runner: runs the requests.
        server, model: who answers.
        generation: parameters; the system prompt can change.
        stats: print the figures of each answer.
    """

    def __init__(self, runner: asyncio.Runner, server: Server, model: str, generation: Generation, stats: bool) -> None:
        self._runner = runner
        self._server = server
        self._model = model
        self._generation = generation
        self._system = generation.system
        self._stats = stats
        self._messages: list[dict[str, Any]] = []
        self._interactive = sys.stdin.isatty()
        self._err = console(stderr=True)
        self._code = 0

    def run(self) -> int:
        """Read turns until the end; returns the exit code."""
        self._note(f"{self._model} at {self._server.address.url}; /help lists the commands, /quit ends")
        while (text := self._read()) is not None:
            if not text.strip():
                continue
            if text.startswith("/"):
                if not self._command(text.strip()):
                    break
            else:
                self._turn(text)
        return 0 if self._interactive else self._code

    def _read(self) -> str | None:
        """The next turn; None at the end of the input."""
        parts: list[str] = []
        while True:
            prompt = "" if not self._interactive else "... " if parts else "> "
            try:
                parts.append(input(prompt))
            except EOFError:
                if self._interactive:
                    print()
                return "\n".join(parts) if parts else None
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                print()
                self._note("/quit or Ctrl-D ends the chat")
                parts = []
                continue
            if any("\ud800" <= character <= "\udfff" for character in parts[-1]):
                self._say("the line is not UTF-8 and is left out")
                parts = []
                continue
            if not parts[-1].endswith("\\"):
                return "\n".join(parts)
            parts[-1] = parts[-1][:-1]

    def _turn(self, text: str) -> None:
        messages = [*self._messages, {"role": "user", "content": text}]
        system = [{"role": "system", "content": self._system}] if self._system else []
        asked = request([*system, *messages], Generation(**{**vars(self._generation), "system": None}))
        shown: list[str] = []
        content: list[str] = []  # reasoning is shown and does not belong into the conversation

        def show(event: Event) -> None:
            shown.append(event.text)
            if event.kind is Kind.CONTENT:
                content.append(event.text)
            write(event.text)

        try:
            result = self._runner.run(self._server.answer(asked, self._model, show))
        except KeyboardInterrupt:
            print()
            if not self._interactive:
                raise
            self._note("stopped")
            result = None
        if result is not None and not result.events and result.ok:
            shown.append(result.text)
            content.append(result.text)
            write(result.text)
        said = "".join(shown)
        if said and not said.endswith("\n") and result is not None:
            print()
        if result is not None and result.failure:
            self._fail(self._runner.run(self._server.explained(result.failure, self._model)))
        elif said or result is not None:
            self._messages = [*messages, {"role": "assistant", "content": "".join(content)}]
        if result is not None:
            self._figures(result)

    def _figures(self, result: Result) -> None:
        if self._stats and result.ok and (figures := figures_line(result)):
            self._note(figures)

    def _command(self, text: str) -> bool:
        """Run a command; returns False at the end of the chat."""
        name, _, rest = text.partition(" ")
        rest = rest.strip()
        if name in ("/quit", "/exit"):
            return False
        if name == "/reset":
            self._messages = []
            self._note("the conversation is forgotten")
        elif name == "/system":
            self._system, self._messages = rest or None, []
            self._note("system prompt set" if rest else "no system prompt; the server's default counts")
        elif name == "/save":
            self._save(rest)
        elif name == "/help":
            print(HELP)
        else:
            self._say(
                f"{name} is no command; a text that begins with / cannot be sent\n  fix: /help lists the commands"
            )
        return True

    def _save(self, name: str) -> None:
        if not name:
            self._say("/save needs the name of a file\n  fix: /save chat.json, or /save chat.md")
            return
        system = [{"role": "system", "content": self._system}] if self._system else []
        messages = [*system, *self._messages]
        if name.endswith(".md"):
            parts = [f"# Chat with {self._model}", *(f"**{one['role']}**\n\n{one['content']}" for one in messages)]
            text = "\n\n".join(parts) + "\n"
        else:
            text = json.dumps({"model": self._model, "messages": messages}, indent=2, ensure_ascii=False) + "\n"
        try:
            with Path(expand(name)).open("x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except FileExistsError:
            self._say(f"{name} exists and is not replaced\n  fix: give another name")
        except (OSError, ValueError) as error:
            self._say(
                f"{name} cannot be written: {getattr(error, 'strerror', None) or error}\n  fix: give another name"
            )
        else:
            self._note(f"wrote {name}")

    def _fail(self, error: QuantserveError) -> None:
        self._code = error.exit_code
        self._say(str(error))

    def _say(self, text: str) -> None:
        self._err.print(f"[red bold]error:[/] {escape(visible(text))}", soft_wrap=True)

    def _note(self, text: str) -> None:
        if self._interactive or text.startswith("wrote "):
            self._err.print(f"[dim]{escape(visible(text))}[/]", soft_wrap=True)
