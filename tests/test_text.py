"""Text from files, plugins and clients: whatever it holds, a terminal, a log and JSON get it harmless."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.checkpoints import make_llama, write_header
from helpers.dists import Site
from quantserve.cli.main import run
from quantserve.errors import CheckpointError, PluginError, one_line
from quantserve.finding import Finding
from quantserve.serve.gateway.middleware.access_log import AccessLog
from quantserve.serve.gateway.middleware.trace import Trace
from quantserve.text import LogFormatter, escaped, harmless, to_json

NASTY = {
    "clear screen": "\x1b[2J",
    "title": "\x1b]0;PWNED\x07",
    "C1 control": "\x9b31m",
    "delete": "\x7f",
    "null": "\x00",
    "backspace": "\x08\r",
    "new line": "x\n  error   fake (core) all is well",
    "next line": "\x85",
    "line separator": "\u2028\u2029",
    "right to left": "\u202egnp.exe",
    "isolates": "\u2066\u2069",
    "zero width": "a\u200b\u200c\u200d\u2060",
    "byte order mark": "\ufeff",
    "tags": "\U000e0041\U000e007f",
    "half of a pair": "\ud800",
    "byte of no encoding": os.fsdecode(b"\xff"),
    "variation selector": "\ufe0f\U000e0100",
    "filler": "\u3164\u2800",
    "private": "\ue000",
}
ALL = " ".join(NASTY.values())
UNREADABLE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\U000e0000-\U000e0fff]"
)
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def is_harmless(text: str) -> bool:
    return not UNREADABLE.search(text) and text.encode("utf-8") is not None


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_every_way_to_print_is_harmless(text: str) -> None:
    finding = Finding.error(text, text, [text], text).said_by(text)
    shown = [finding.code, finding.message, *finding.offenders, finding.fix, finding.source]
    shown += [harmless(text), one_line(ValueError(text))]
    assert all(is_harmless(each) and "\n" not in each for each in shown)
    assert is_harmless(str(CheckpointError(text)))
    error = PluginError(text, text, text, text, text)
    assert is_harmless(str(error) + error.reason + error.distribution)
    assert str(error).count("\n") == 1  # its own, before the fix
    assert to_json([text]).isascii()
    assert is_harmless(to_json([text]))


def test_readable_text_stays_as_it_is() -> None:
    for text in ("model.layers.0.q_proj", "modèle/模型-7B", "a\\b 'c' \"d\"", "日本語", "😀", ""):
        assert harmless(text) == text
        assert json.loads(to_json(text)) == text


@given(st.text(st.characters(exclude_categories=[])))
def test_escaping_twice_changes_nothing(text: str) -> None:
    once = harmless(text, 60)
    assert harmless(once, 60) == once
    assert len(once) <= 60
    assert is_harmless(once)
    assert is_harmless(escaped(text, keep="\n"))
    whole = to_json({text: text})
    assert whole.isascii()
    ((key, value),) = json.loads(whole).items()
    assert key == value
    assert is_harmless(whole)
    if not any("\ud800" <= c <= "\udfff" for c in text):
        assert value == text


def test_length_is_bounded_and_named() -> None:
    finding = Finding.error("code", "m" * 10_000_000, ["o" * 10_000_000], "f" * 10_000_000)
    assert len(finding.message) == 2000
    assert finding.message.endswith("... (10,000,000 characters)")
    assert len(finding.offenders[0]) == 500
    assert len(harmless("\x1b" * 1_000_000)) == 2000
    assert len(str(CheckpointError("e" * 10_000_000))) == 100_000


def test_a_finding_with_fields_of_wrong_types_is_left_for_the_contract() -> None:
    finding = Finding.error(5, None, 7 and [1], {})  # type: ignore[arg-type, list-item]
    assert (finding.code, finding.message, finding.offenders) == (5, None, (1,))


# --- the command line -------------------------------------------------------------------------------------------------


def evil_checkpoint(folder: Path) -> Path:
    """A Llama with one tensor per nasty name (those UTF-8 can hold, which a header must)."""
    model = make_llama(folder)
    weights = model / "model.safetensors"
    raw = weights.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    end = len(raw) - 8 - length
    for text in NASTY.values():
        if not re.search("[\ud800-\udfff]", text):
            header[text + ".weight"] = {"dtype": "F16", "shape": [2, 2], "data_offsets": [end, end + 8]}
            end += 8
    write_header(weights, header, end)
    return model


PLUGIN = """
from quantserve.api import Finding, Method, hookimpl

TEXT = {text!r}

@hookimpl
def quantserve_method():
    return Method(name="evil", summary="a test method", bits=(8,))

@hookimpl
def quantserve_detect(checkpoint):
    return False

@hookimpl
def quantserve_validate(checkpoint, model, target):
    return [Finding.warning("evil-" + TEXT, TEXT, [TEXT, "x" + TEXT], TEXT)]
"""


def quantserve(*arguments: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[bytes]:
    variables = {
        **os.environ,
        **environment,
        "PYTHONPATH": os.pathsep.join([*([str(path)] if path else []), *sys.path]),
    }
    return subprocess.run(
        [sys.executable, "-m", "quantserve", *arguments], env=variables, capture_output=True, timeout=60
    )


LOCALES: list[dict[str, str]] = [
    {},
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


@pytest.mark.parametrize("locale", LOCALES, ids=["UTF-8", "ASCII", "C"])
@pytest.mark.parametrize("command", ["check", "plan"])
def test_names_of_tensors_and_texts_of_plugins(tmp_path: Path, command: str, locale: dict[str, str]) -> None:
    site = tmp_path / "site"
    site.mkdir()
    Site(site).install("evil-plugin", PLUGIN.format(text=ALL))
    model = evil_checkpoint(tmp_path / "model")
    healthy = make_llama(tmp_path / "healthy")
    text = quantserve(command, str(model), str(healthy), path=site, **locale)
    assert text.returncode == 1, text.stderr
    printed = (text.stdout + text.stderr).decode("utf-8")
    assert is_harmless(printed)
    assert not re.search(r"^ +error +fake", printed, re.MULTILINE)
    machine = quantserve(command, str(model), str(healthy), "--json", path=site, **locale)
    assert machine.returncode == 1, machine.stderr
    assert machine.stdout.isascii()
    json.loads(machine.stdout)


def test_a_finding_of_a_plugin_harms_no_other_model(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    Site(site).install("evil-plugin", PLUGIN.format(text=ALL), name="evil")
    evil, healthy = make_llama(tmp_path / "evil"), make_llama(tmp_path / "healthy")
    (tmp_path / "two.yaml").write_text(
        f"models:\n- engine_config: {{model_id: a, hf_model_id: {evil}, engine_kwargs: {{quantization: evil}}}}\n"
        f"- engine_config: {{model_id: b, hf_model_id: {healthy}}}\n"
    )
    done = quantserve("check", str(tmp_path / "two.yaml"), "--json", path=site)
    assert done.returncode in (0, 3), done.stderr
    first, second = json.loads(done.stdout)["models"]
    assert second["exit_code"] == 0
    assert [f["code"] for f in first.get("findings", ()) if f["source"] == "evil"] or "evil" in first["error"]
    assert is_harmless(quantserve("check", str(tmp_path / "two.yaml"), path=site).stdout.decode())


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_names_on_the_command_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", f"./no/{text}"]) == 2
    assert run(["check", f"--{text}"]) == 2
    assert run([text]) == 2
    captured = capsys.readouterr()
    assert is_harmless(captured.out + captured.err)


def test_a_path_that_is_no_text(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model")
    odd = os.fsencode(tmp_path) + b"/caf\xe9\x1b[2J"
    os.rename(folder, odd)
    for options in ((), ("--json",)):
        done = quantserve("check", os.fsdecode(odd), *options)
        assert done.returncode == 0, done.stderr
        assert is_harmless(done.stdout.decode())
    (model,) = json.loads(done.stdout)["models"]
    assert model["source"].endswith("caf\\udce9\x1b[2J")


def test_colours_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run(["check", str(evil_checkpoint(tmp_path / "m"))]) == 1
    printed = capsys.readouterr().out
    assert COLOUR.search(printed)
    assert is_harmless(COLOUR.sub("", printed))


# --- the serving side -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_the_log_gets_one_line_per_record(text: str) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LogFormatter("%(levelname)s %(message)s"))
    logger = logging.Logger("test")
    logger.addHandler(handler)
    logger.error("%s failed", text)
    assert is_harmless(stream.getvalue())
    assert stream.getvalue().count("\n") == 1
    try:
        raise ValueError(text)
    except ValueError:
        logger.exception("it failed")
    assert is_harmless(stream.getvalue())
    assert "Traceback" in stream.getvalue()


def test_the_access_log_gets_one_line_per_request(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = AccessLog(str(path))
    for text in NASTY.values():
        log(Trace(text, "GET", f"/v1/{text}", model=text))
    log.flush()
    lines = path.read_bytes().splitlines()
    assert len(lines) == len(NASTY)
    assert all(line.isascii() and is_harmless(line.decode()) and json.loads(line)["path"] for line in lines)
