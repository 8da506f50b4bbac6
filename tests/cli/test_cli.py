"""The command line as a person meets it: exit codes, JSON, messages without tracebacks, and what is never imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoints, entry_points
from pathlib import Path
from typing import Any

import click
import pytest

from helpers.checkpoints import make_llama
from helpers.dists import METHOD, Site
from quantserve.cli.main import CLOSED_PIPE, COMMANDS, cli, run

HEAVY = ("torch", "vllm", "ray", "transformers", "numpy")


@pytest.fixture
def fp16(tmp_path: Path) -> Path:
    return make_llama(tmp_path / "model")


def refusal(capsys: pytest.CaptureFixture[str], arguments: Sequence[str], exit_code: int) -> str:
    """Run a command that must fail, and return its stderr and stdout, which hold no traceback."""
    assert run(list(arguments)) == exit_code
    captured = capsys.readouterr()
    text = captured.err + captured.out
    assert "Traceback" not in text
    assert text.strip()
    return " ".join(text.split())


def test_list_shows_the_three_methods_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    methods = {plugin["method"]["name"] for plugin in listed["plugins"] if plugin["method"]}
    assert {"fp16", "awq", "squeezellm"} <= methods
    assert listed["failures"] == []


def test_list_table_names_each_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in ("quantserve-fp16", "quantserve-awq", "quantserve-squeezellm"))


@pytest.mark.parametrize("method", ["fp16", "awq", "squeezellm"])
def test_check_accepts_a_good_checkpoint(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_llama(tmp_path / "model", method, hidden=512, intermediate=1024)
    assert run(["check", str(folder), "--target", "a100-80g", "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert model["method"] == method
    assert [finding for finding in model["findings"] if finding["severity"] == "error"] == []


def test_check_refuses_a_truncated_file_with_the_numbers(fp16: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = fp16 / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    text = refusal(capsys, ["check", str(fp16), "--target", "a100-80g"], 1)
    assert "model.safetensors" in text
    assert "file-truncated" in text


def test_check_continues_after_a_bad_model(fp16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = make_llama(tmp_path / "bad")
    (bad / "config.json").write_text("{")
    assert run(["check", str(bad), str(fp16), "--target", "a100-80g", "--json"]) == 1
    models = json.loads(capsys.readouterr().out)["models"]
    assert [model["exit_code"] for model in models] == [1, 0]


def test_plan_prints_engine_args_with_their_sources(fp16: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(fp16), "--target", "a100-80g", "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    assert plan["engine_args"]["model"] == str(fp16)
    assert plan["provenance"]["model"] == "config"
    assert plan["runtime_env"]["env_vars"]["VLLM_PLUGINS"] == ""


def test_plan_of_squeezellm_loads_its_engine_side_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_llama(tmp_path / "model", "squeezellm")
    assert run(["plan", str(folder), "--target", "a100-80g", "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    variables = plan["runtime_env"]["env_vars"]
    assert variables["VLLM_PLUGINS"] == "quantserve"
    assert variables["QUANTSERVE_ENGINE_PLUGINS"] == "quantserve-squeezellm:squeezellm"
    assert plan["engine_args"]["quantization"] == "squeezellm"


def test_schema_is_a_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert "engine_config" in json.dumps(schema)


def test_doctor_examines_everything_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--quick", "--json"]) in (0, 1)
    rows = {row["what"] for row in json.loads(capsys.readouterr().out)}
    assert {"methods", "hardware", "engine", "torch", "kernels", "Ray", "HAProxy", "port"} <= rows


@pytest.mark.parametrize(
    ("arguments", "exit_code", "says"),
    [
        (["chek"], 2, "did you mean 'check'?"),
        (["check"], 2, "Missing argument"),
        (["check", "--target", "a100", "MODEL"], 2, "a100-80g"),
        (["check", "no/such/folder/at/all"], 2, "no/such/folder"),
        (["check", "MODEL", "--quantization", "awqq"], 2, "did you mean 'awq'?"),
        (["check", "CONFIG", "--quantization", "awq"], 2, "bare MODEL only"),
        (["plan", "MODEL", "--max-model-len", "0"], 2, "--max-model-len"),
        (["serve", "MODEL", "--port", "70000"], 2, "70000"),
        (["convert", "MODEL"], 2, "DESTINATION"),
        (["convert", "MODEL", "MODEL"], 2, "exists already"),
        (["convert", "nowhere/at/all", "NEW"], 2, "no such file"),
        (["convert", "MODEL", "NEW", "--method", "fp16"], 2, "has no converter"),
        (["list", "--jsn"], 2, "--json"),
    ],
)
def test_a_users_mistake_has_one_clear_message(
    arguments: list[str], exit_code: int, says: str, fp16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "app.yaml"
    config.write_text(f"models: [{{engine_config: {{model_id: m, hf_model_id: {fp16}}}}}]\n")
    names = {"MODEL": str(fp16), "CONFIG": str(config), "NEW": str(tmp_path / "new")}
    assert says in refusal(capsys, [names.get(word, word) for word in arguments], exit_code)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    assert "Usage: quantserve " + name in capsys.readouterr().out


def light(arguments: list[str]) -> dict[str, Any]:
    """Run a command in a process of its own; say what it took, and fail if it imported anything heavy."""
    code = f"""
import sys, time, json, pathlib
from quantserve.cli.main import run
exit_code = run({arguments!r})
print(json.dumps({{
    "exit_code": exit_code,
    "processor_s": time.process_time(),
    # VmHWM: ru_maxrss of a child begins with its parent's.
    "peak_mib": int(pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024,
    "heavy": sorted(set(sys.modules) & {set(HEAVY)!r}),
    "modules": list(sys.modules),
}}), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    report: dict[str, Any] = json.loads(done.stderr.strip().splitlines()[-1])
    assert report["heavy"] == []
    assert report["exit_code"] == 0
    return report


def test_list_imports_nothing_heavy_and_nothing_that_judges_or_predicts() -> None:
    unused = {"pydantic", "yaml"} | {
        f"quantserve.{name}"
        for name in (
            "checks.model",
            "checks.memory",
            "checkpoint.pickle_machine",
            "predict.simulate",
            "planning",
            "config",
        )
    }
    assert not unused & set(light(["list"])["modules"])


def test_list_reads_the_installed_entry_points_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read: list[None] = []

    def counted() -> EntryPoints:
        read.append(None)
        return entry_points()

    monkeypatch.setattr("quantserve.plugins.entry_points.entry_points", counted)
    assert run(["list"]) == 0
    assert "bench" in capsys.readouterr().out
    assert len(read) == 1


def test_check_of_a_synthetic_70b_imports_nothing_heavy_and_stays_small(tmp_path: Path) -> None:
    """15 shards of headers; the weights are holes in sparse files."""
    folder = make_llama(
        tmp_path / "70b",
        "awq",
        layers=80,
        hidden=8192,
        intermediate=28672,
        heads=64,
        kv_heads=8,
        vocab=32000,
        shards=15,
    )
    report = light(["check", str(folder), "--target", "a100-80g", "--max-model-len", "4096"])
    assert report["peak_mib"] < 200


@pytest.mark.parametrize("width", ["80", "120"])
def test_tables_cut_no_words(
    width: str, fp16: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    assert run(["list"]) == 0
    assert run(["check", str(fp16), "--target", "a100-80g"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= int(width)
    for words in ("cuda 7.5+,", "auto_awq, awq_marlin", "x 4,096 tokens", "quantserve-compressed-tensors"):
        assert words in out
    assert "int8_per_channel_weight_only" in out
    assert " 2-4, 8 " in out


def test_plan_prints_migration_notes(fp16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "app.yaml"
    config.write_text(
        f"engine_config: {{model_id: m, hf_model_id: {fp16}}}\n"
        "deployment_config: {max_concurrent_queries: 7}\nscaling_config: {num_workers: 1}\n"
    )
    assert run(["plan", str(config), "--target", "a100-80g", "--json"]) == 0
    captured = capsys.readouterr()
    assert "max_ongoing_requests" in json.loads(captured.out)["notes"][0]
    assert captured.err == ""
    assert run(["plan", str(config), "--target", "a100-80g"]) == 0
    captured = capsys.readouterr()
    assert "max_ongoing_requests" in captured.err
    assert "note" not in captured.out


def test_errors_come_before_what_is_only_worth_knowing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_llama(tmp_path / "model", "awq", config={"quantization_config": {"quant_method": "awq", "bits": 4}})
    assert run(["check", str(folder), "--target", "a100-80g"]) == 1
    out = capsys.readouterr().out
    assert out.index("awq-missing-keys") < out.index("weights-size")


def test_plugins_that_are_switched_off_are_said_to_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QUANTSERVE_PLUGINS", "")
    assert run(["list"]) == 0
    out = capsys.readouterr().out
    assert "No plugin can be used" in out
    assert "switched off: awq (quantserve-awq): not named in QUANTSERVE_PLUGINS" in out
    assert run(["doctor", "--quick", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert rows[0] == {
        "what": "methods",
        "status": "fail",
        "detail": "no quantization plugin can be used",
        "fix": "pip install 'quantserve[all]'",
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help_text(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.help
    options = [option for option in command.params if isinstance(option, click.Option)]
    assert [option.opts[-1] for option in options if not (option.help or "").endswith((".", ")"))] == []


# --- where the output goes ----------------------------------------------------------------------------


def command(arguments: Sequence[str], redirect: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run quantserve in a shell, with its output redirected."""
    line = f'"$0" -m quantserve "$@" {redirect}'
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line, sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environ},
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("arguments", [["list"], ["list", "--json"], ["schema"], ["serve", "--help"]])
@pytest.mark.parametrize(
    ("redirect", "exit_code", "stderr"),
    [
        ("<&-", 0, ""),
        (">&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
        (">/dev/full", 2, "error: cannot write the output: No space left on device\n"),
        ("| true", CLOSED_PIPE, ""),
    ],
)
def test_an_output_that_takes_nothing(arguments: list[str], redirect: str, exit_code: int, stderr: str) -> None:
    done = command(arguments, redirect)
    assert (done.returncode, done.stderr) == (exit_code, stderr)


def test_a_bug_names_the_plugins_from_outside(tmp_path: Path) -> None:
    finder = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None): raise RuntimeError("finder")
sys.meta_path.insert(0, Finder())
"""
    Site(tmp_path).install("newcomer", finder + METHOD.format(name="m", aliases=()), name="m")
    done = command(["list"], "", PYTHONPATH=str(tmp_path))
    assert done.returncode == 70
    assert "A plugin can cause it as well. Run again with QUANTSERVE_DISABLE=m\n" in done.stderr


def test_files_never_get_the_number_of_a_closed_stream(fp16: Path) -> None:
    good, broken = command(["check", str(fp16)], "<&- >&-"), command(["check", str(fp16 / "none")], "<&- >&-")
    assert (good.returncode, broken.returncode) == (0, 2)


@pytest.mark.parametrize(("columns", "widest"), [("0", 120), ("-5", 120), ("wide", 120), ("9" * 30, 120), ("70", 70)])
def test_the_width_of_the_output(columns: str, widest: int) -> None:
    lines = command(["list"], "", COLUMNS=columns).stdout.splitlines()
    assert widest - 20 < max(map(len, lines)) <= widest
