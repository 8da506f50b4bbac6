"""Result files: llmperf's names and keys, tables, plots, and that a folder is whole or not there."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from quantserve.errors import UsageError
from quantserve_bench import Closed, Load
from quantserve_bench.llmperf import base_name
from quantserve_bench.markdown import number, report, seed_table
from quantserve_bench.measured import measure
from quantserve_bench.results import check_folder, document, folder_names, write
from quantserve_bench.served import Served
from quantserve_bench.session import Measurement, Settings
from quantserve_bench.verdicts import compare
from quantserve_bench.workloads import WORKLOADS

from .made import chat, made_run, refusal

SETTINGS = Settings(WORKLOADS["llmperf"], concurrencies=[2, 4], extra={"top_p": 0.9}, slo={"ttft": 300.0})
EXPECTED = {
    "source": "reference",
    "conditions": "a table | of 2023",
    "e2e_ms": 1000.0,
    "ttft_ms": 100.0,
    "itl_ms": 300.0,
    "output_tokens_per_s": 3.0,
    "caveats": ["old"],
}


def measurement(model: str = "org/model-AWQ", load: Load | None = None, errors: int = 1) -> Measurement:
    answers = [
        chat([(0.2, ["a"]), (0.4, ["b"]), (0.6, ["c"])], prompt=500 + i, start=0.1 * i, tail=0.1) for i in range(12)
    ]
    run = made_run([*answers, *(refusal(429, start=0.5) for _ in range(errors))], load or Closed(2))
    measured = measure(run, SETTINGS.slo)
    served = Served(model, "awq", 4, 2048, EXPECTED, {"version": "9.9"})
    return Measurement(served, run.load, run, measured, EXPECTED, compare(EXPECTED, measured), "words", ["a <warning>"])


def both() -> list[Measurement]:
    return [measurement(), measurement("fp16", Closed(4), errors=0)]


QUANTILES = [f"quantiles_p{p}" for p in (25, 50, 75, 90, 95, 99)]
LLMPERF_METRICS = [
    "inter_token_latency_s", "ttft_s", "end_to_end_latency_s", "request_output_throughput_token_per_s",
    "number_input_tokens", "number_output_tokens",
]  # fmt: skip
LLMPERF_KEYS = {
    "version", "name", "timestamp", "model", "mean_input_tokens", "stddev_input_tokens", "mean_output_tokens",
    "stddev_output_tokens", "num_concurrent_requests", "additional_sampling_params_top_p",
    "results_num_requests_started", "results_error_rate", "results_number_errors", "results_error_code_frequency",
    "results_mean_output_throughput_token_per_s", "results_num_completed_requests",
    "results_num_completed_requests_per_min",
    *(f"results_{m}_{s}" for m in LLMPERF_METRICS for s in [*QUANTILES, "mean", "min", "max", "stddev"]),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "out", both(), SETTINGS, {"gpu": "none"})
    return tmp_path / "out"


def test_llmperfs_files(folder: Path) -> None:
    base = folder / "org-model-AWQ-2-users" / "org-model-AWQ_550_150"
    summary = json.loads(Path(f"{base}_summary.json").read_text())
    assert set(summary) == LLMPERF_KEYS | {"gpu"}
    assert summary["results_ttft_s_mean"] == pytest.approx(0.2)
    assert summary["results_end_to_end_latency_s_quantiles_p99"] == pytest.approx(0.7)
    # llmperf divides by all chunks: role, three tokens, finish.
    assert summary["results_inter_token_latency_s_mean"] == pytest.approx(0.7 / 5)
    assert summary["results_request_output_throughput_token_per_s_mean"] == pytest.approx(3 / 0.7)
    assert summary["results_number_input_tokens_mean"] == 505.5
    assert summary["results_num_requests_started"] == 13
    assert summary["results_number_errors"] == 1
    assert json.loads(summary["results_error_code_frequency"]) == {"429": 1}
    assert summary["results_num_completed_requests"] == 12
    responses = json.loads(Path(f"{base}_individual_responses.json").read_text())
    assert len(responses) == 13
    assert {tuple(sorted(response)) for response in responses} == {
        ("end_to_end_latency_s", "error_code", "error_msg", "inter_token_latency_s", "number_input_tokens",
         "number_output_tokens", "number_total_tokens", "request_output_throughput_token_per_s", "ttft_s")
    }  # fmt: skip
    assert [response["error_code"] for response in responses].count(429) == 1


@pytest.mark.parametrize(
    ("model", "name"),
    [("meta-llama/Llama-2-7b", "meta-llama-Llama-2-7b_550_150"), ("a b//c--d", "a-b-c-d_550_150")],
)
def test_llmperfs_file_names(model: str, name: str) -> None:
    assert base_name(model, SETTINGS) == name


def test_the_folder_has_all_files(folder: Path) -> None:
    files = {path.name for path in folder.iterdir()}
    expected = {"results.json", "summary.csv", "requests.csv", "report.md", "report.html"}
    plots = {f"{name}.{kind}" for name in ("methods", "latency", "throughput") for kind in ("svg", "png")}
    assert files == expected | plots | {"org-model-AWQ-2-users", "fp16-4-users"}
    for name in ("methods", "latency", "throughput"):
        ElementTree.fromstring((folder / f"{name}.svg").read_text())
        assert (folder / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_results_json(folder: Path) -> None:
    values = json.loads((folder / "results.json").read_text())
    first = values["measurements"][0]
    assert first["metrics"]["ttft"]["p50"] == pytest.approx(200)
    assert first["totals"]["goodput_share"] == pytest.approx(12 / 13)
    assert first["error_codes"] == {"429": 1}
    assert first["vllm_bench_serve"]["completed"] == 12
    assert {verdict["key"] for verdict in first["verdicts"]} == {"e2e", "ttft", "normalized", "tokens_per_s"}
    assert values["settings"]["workload"]["name"] == "llmperf"
    assert values["metadata"] == {"gpu": "none"}
    assert set(values["definitions"]["metrics"]) >= set(first["metrics"])
    assert set(values["definitions"]["totals"]) >= set(first["totals"])


def test_csv(folder: Path) -> None:
    rows = list(csv.DictReader(io.StringIO((folder / "requests.csv").read_text())))
    assert len(rows) == 25
    assert float(rows[1]["start_s"]) == pytest.approx(0.1)
    assert float(rows[0]["ttft_s"]) == pytest.approx(0.2)
    assert rows[12]["error_code"] == "429"
    assert rows[12]["ttft_s"] == ""
    summary = list(csv.DictReader(io.StringIO((folder / "summary.csv").read_text())))
    assert {row["metric"] for row in summary} >= {"ttft", "tpot", "e2e", "output_tokens_per_s"}


def test_the_table_is_laid_out_as_rayllms() -> None:
    lines = seed_table([measurement()]).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == [
        "Model", "Method", "Mean E2E (ms)", "Mean TTFT (ms)", "Mean ITL (ms/token)", "Mean throughput (tok/s)",
    ]  # fmt: skip
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == [
        "org/model-AWQ", "awq 4 bit", "700", "200", "233", "4.29",
    ]  # fmt: skip
    assert "Load" in seed_table(both()).splitlines()[0]


def test_the_page_is_self_contained_and_escapes(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 3
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", page.replace('xlink:href="#', ""))
    assert "a &lt;warning&gt;" in page
    assert "<warning>" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    shared = {
        name
        for name in ids
        if ids.count(name) > 1
        and not re.match(
            r"(figure|axes|patch|text|line2d|matplotlib|xtick|ytick|legend|LineCollection|PathCollection|DejaVu)", name
        )
    }
    assert not shared


def test_the_markdown_report(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    assert "a table \\| of 2023" not in text.split("## Expected")[0]
    for line in ("## Expected beside measured", "](methods.svg)", "`peak_output_tokens_per_s`", "worse"):
        assert line in text
    # Every table has as many cells in each row as in its header.
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = block.splitlines()
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


def test_without_matplotlib_the_report_has_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("quantserve_bench.plots.importlib.util.find_spec", lambda name: None)
    write(tmp_path / "out", [measurement()], SETTINGS)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "plots need matplotlib" in page
    assert "<svg" not in page
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_failed_write_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", [measurement()], SETTINGS)
    before = (tmp_path / "out" / "results.json").read_text()

    def full(*_: Any) -> str:
        raise OSError("no space left on device")

    monkeypatch.setattr("quantserve_bench.results.requests_csv", full)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path / "out", both(), SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "results.json").read_text() == before


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    check_folder(tmp_path / "new" / "deep", overwrite=False)
    (tmp_path / "used").mkdir()
    check_folder(tmp_path / "used", overwrite=False)
    (tmp_path / "used" / "x").write_text("")
    with pytest.raises(UsageError, match="--overwrite"):
        check_folder(tmp_path / "used", overwrite=False)
    check_folder(tmp_path / "used", overwrite=True)
    with pytest.raises(UsageError, match="not a folder"):
        check_folder(tmp_path / "used" / "x", overwrite=True)


def test_a_run_of_errors_alone_can_be_written(tmp_path: Path) -> None:
    run = made_run([refusal(500), refusal(500)])
    alone = Measurement(Served("m"), run.load, run, measure(run), None, [], "", [])
    write(tmp_path / "out", [alone], SETTINGS)
    assert "| m     | -      |" in (tmp_path / "out" / "report.md").read_text()


def test_names_of_folders_differ() -> None:
    names = folder_names([measurement(), measurement(), measurement("a/b"), measurement("a-b")])
    assert len(set(names)) == 4
    assert all(re.fullmatch(r"[\w.-]+", name) for name in names)


def test_numbers() -> None:
    assert [number(value) for value in (None, 0.0, 3.0, 0.01234, 12.345, 123.45, 1234.5, 12345678.9)] == [
        "-", "0", "3", "0.0123", "12.3", "123", "1,234", "12,345,679",
    ]  # fmt: skip


def test_everything_written_is_plain_data() -> None:
    values = document(both(), SETTINGS, {})
    assert json.loads(json.dumps(values)) == values
    assert report(both(), values["settings"]).startswith("# Benchmark")
