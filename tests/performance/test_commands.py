"""`quantserve profile` and `recommend` as a person meets them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from cli.test_cli import light, refusal
from helpers.checkpoints import make_llama
from helpers.predicted import LLAMA_7B, LLAMA_70B, MISTRAL, MIXTRAL, QWEN
from quantserve.checkpoint import open_checkpoint
from quantserve.cli.main import run
from quantserve.config import model_from_source
from quantserve.planning.advise import advise, concurrencies, leaders, ranked
from quantserve.plugins.registry import Registry
from quantserve.predict.workload import WORKLOADS
from quantserve.target import find_target, known_targets

Bare = Callable[[dict[str, Any]], Path]
LARGE = [name for name in known_targets() if name not in ("t4", "v100", "a10g", "l4")]


@pytest.fixture(autouse=True)
def uncalibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTSERVE_CALIBRATION", str(tmp_path / "none.json"))


@pytest.fixture
def bare(tmp_path: Path) -> Bare:
    """A folder with a config.json and nothing else."""

    def made(config: dict[str, Any]) -> Path:
        folder = tmp_path / "bare"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return made


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert run([str(word) for word in arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_published_rows_stand_beside_predictions(bare: Bare, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "profile", bare(LLAMA_70B), "--target", "a100-80g", "--json")
    methods = {method["key"]: method for method in found["methods"]}
    assert methods["fp16-16"]["published"]["e2e_ms"] == 8048
    assert methods["fp16-16"]["tensor_parallel_size"] == 4
    assert methods["awq-4"]["published"]["ttft_ms"] == 2174
    assert methods["squeezellm-4"]["published"] is None
    now = methods["fp16-16"]["predicted_2023_workload"]
    assert now["e2e_ms"] == pytest.approx(now["ttft_ms"] + 139 * now["tpot_ms"], rel=0.01)
    assert now["itl_ms"] == pytest.approx(now["e2e_ms"] / 140, rel=0.01)
    assert now["e2e_ms"] < 8048


def test_profile_prints_the_table_of_2023(bare: Bare, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["profile", str(bare(LLAMA_7B)), "--target", "a100-80g", "--explain"]) == 0
    out = capsys.readouterr().out
    for words in ("Mean E2E", "Mean TTFT", "Mean ITL", "published 2023", "42372", "18.81", "roofline", "lm_head"):
        assert words in out
    assert "one request after the other" in out
    assert max(map(len, out.splitlines())) <= 250


@pytest.mark.parametrize(
    ("config", "target"),
    list(zip(cycle((LLAMA_7B, MISTRAL, QWEN, MIXTRAL)), LARGE, strict=False)),
    ids=lambda one: one if isinstance(one, str) else str(one["model_type"]),
)
def test_every_family_and_every_target(
    config: dict[str, Any], target: str, bare: Bare, capsys: pytest.CaptureFixture[str]
) -> None:
    load = ("--concurrency", "1,16", "--input-tokens", "100", "--output-tokens", "20")
    found = printed(capsys, "profile", bare(config), "--target", target, *load, "--json")
    for method in found["methods"]:
        if method["refusal"] or method["method"] == "vllm":  # which describes no kernel
            continue
        one, many = method["predicted"]
        assert one["source"] == "roofline"
        assert many["tokens_per_s"] > one["tokens_per_s"] > 0
        assert many["ttft_ms"] > one["ttft_ms"] > 0
        assert one["tokens_per_s"] == pytest.approx(one["tokens_per_s_per_user"], rel=1e-3)


def test_files_give_the_method_and_its_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_llama(tmp_path / "m", "squeezellm", hidden=512, intermediate=1024, bits=3)
    found = printed(capsys, "profile", folder, "--target", "cpu", "--json")
    mine = [method for method in found["methods"] if method["in_files"]]
    assert [method["key"] for method in mine] == ["squeezellm-3"]


def test_the_config_file_itself_is_as_good_as_its_folder(bare: Bare, capsys: pytest.CaptureFixture[str]) -> None:
    folder = bare(LLAMA_7B)
    options = ("--target", "l4", "--method", "awq", "--json")
    of_folder = printed(capsys, "recommend", folder, *options)
    of_file = printed(capsys, "recommend", folder / "config.json", *options)
    assert of_folder["methods"] == of_file["methods"]


def test_quantization_wins_alone_and_loses_its_lead_in_crowds(bare: Bare) -> None:
    """A100: weights are read 4 times as fast with AWQ; from some number of clients on arithmetic decides."""
    model = model_from_source(str(bare(LLAMA_7B)))
    advice = advise(model, Registry.load({}), find_target("a100-80g"), methods=["fp16", "awq"])
    stretches = leaders(advice, WORKLOADS["chat"], 256)
    assert [stretch.label for stretch in stretches] == ["awq", "fp16"]
    assert (stretches[0].first, stretches[-1].last) == (1, 256)
    change = stretches[1].first
    assert stretches[0].last == change - 1
    for users, label in ((change - 1, "awq"), (change, "fp16")):
        assert ranked(advice, WORKLOADS["chat"].at(users))[0].candidate.label == label


def test_what_does_not_fit_says_why(bare: Bare, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "recommend", bare(LLAMA_70B), "--target", "1xa100-80g", "--json")
    refused = {method["key"]: method["refusal"] for method in found["methods"]}
    assert "128.5 GiB" in refused["fp16-16"]
    assert refused["awq-4"] is None
    larger = LLAMA_70B | {"num_hidden_layers": 160}  # 2 bits of it are too much, too
    text = refusal(capsys, ["recommend", str(bare(larger)), "--target", "1xl4"], 1)
    assert "no installed method can serve" in text
    assert "22.5 GiB" in text


def test_squeezellm_serves_no_experts(bare: Bare, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "recommend", bare(MIXTRAL), "--target", "h200", "--json")
    refused = {method["key"]: method["refusal"] for method in found["methods"]}
    assert "mixtures of experts" in refused["squeezellm-4"]
    assert refused["awq-4"] is refused["fp16-16"] is None


def test_methods_of_other_families_are_refused(bare: Bare, capsys: pytest.CaptureFixture[str]) -> None:
    olmo = LLAMA_70B | {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}
    found = printed(capsys, "recommend", bare(olmo), "--target", "h200", "--json")
    refused = {method["key"]: method["refusal"] for method in found["methods"]}
    assert refused["mxfp4-4"] == "mxfp4 serves gpt_oss, and this model is olmo2"
    assert refused["gguf-4"].startswith("gguf serves mistral, gemma3, llama")
    assert refused["gptq-4"] is None


@pytest.mark.parametrize("order", ["throughput", "latency", "memory", "quality"])
def test_orders(order: str, bare: Bare, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "recommend", bare(LLAMA_7B), "--target", "a100-80g", "--by", order, "--json")
    first = min((one for one in found["methods"] if one["place"]), key=lambda method: method["place"])
    wanted = {"throughput": "awq-4", "latency": "awq-4", "memory": "gptq-2", "quality": "fp16-16"}
    assert first["key"] == wanted[order]


def test_quality_is_published_or_unknown(bare: Bare, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recommend", str(bare(LLAMA_7B)), "--target", "a100-80g"]) == 0
    out = capsys.readouterr().out
    assert "+2.4%" in out
    assert "arXiv 2306.00978" in out


def measured(folder: Path, **changes: object) -> None:
    """A record of `quantserve quality` beside the weights: 8 % more perplexity."""
    record = {
        "perplexity": 10.8, "baseline": 10, "kl_mean": 0.08, "same_top": 0.9, "tokens": 14308, "samples": 28,
        "length": 512, "text": "eval.txt", "text_sha256": "0", "reference": "base", "reference_sha256": "0",
        "weights_sha256": "0", "through": "transformers", "date": "2026-11-30",
        "weight_bytes": open_checkpoint(str(folder)).weight_bytes, **changes,
    }  # fmt: skip
    (folder / "measured-quality.json").write_text(json.dumps(record))


def test_what_was_measured_of_these_files_counts_before_what_was_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_llama(tmp_path / "m", "awq", hidden=512, intermediate=1024)
    asked = ["recommend", str(folder), "--target", "a100-80g"]
    published = {one["key"]: one for one in printed(capsys, *asked, "--json")["methods"]}["awq-4"]
    assert published["measured_quality"] is None
    measured(folder)
    own = {one["key"]: one for one in printed(capsys, *asked, "--json")["methods"]}["awq-4"]
    assert own["measured_quality"]["increase"] == 0.08
    assert own["quality"] == published["quality"]
    assert run(asked) == 0
    out = capsys.readouterr().out
    assert "awq: measured of these files: 28 x 512 tokens of eval.txt against base, through transformers" in out
    assert "squeezellm 4-bit: published for " in out

    by_quality = printed(capsys, *asked, "--by", "quality", "--json")["methods"]
    places = {one["key"]: one["place"] for one in by_quality if one["place"]}
    assert places["fp16-16"] == 1
    assert places["squeezellm-4"] < places["awq-4"]  # published +1.8 %, measured +8 %


@pytest.mark.parametrize(
    "changes", [{"weight_bytes": 1}, {"perplexity": "12"}, {"baseline": 0}, {"tokens": None}, {"kl_mean": 10**400}]
)
def test_a_record_of_other_weights_does_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object]
) -> None:
    folder = make_llama(tmp_path / "m", "awq")
    measured(folder, **changes)
    found = printed(capsys, "recommend", folder, "--target", "a100-80g", "--method", "awq", "--json")
    assert found["methods"][0]["measured_quality"] is None


def test_a_largest_loss_leaves_methods_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_llama(tmp_path / "m", "awq", hidden=512, intermediate=1024)
    measured(folder)
    asked = ["recommend", folder, "--target", "a100-80g", "--json", "--max-loss"]

    def refusals(percent: str) -> dict[str, str | None]:
        return {one["key"]: one["refusal"] for one in printed(capsys, *asked, percent)["methods"]}

    assert refusals("8.1")["awq-4"] is None
    strict = refusals("5")
    assert strict["awq-4"] == "its perplexity is 8.0 % higher (measured), and 5 % are allowed"
    assert strict["fp16-16"] is None
    assert "unknown; `quantserve quality` measures it" in (strict["gguf-4"] or "")
    text = refusal(capsys, ["recommend", str(folder), "--target", "a100-80g", "--method", "awq", "--max-loss", "1"], 1)
    assert "8.0 % higher (measured), and 1 % are allowed" in text


def test_the_plot_is_an_svg_with_a_line_for_each_method(
    bare: Bare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "plot.svg"
    asked = ("recommend", bare(LLAMA_7B), "--target", "a100-80g")
    ranked = [method["key"] for method in printed(capsys, *asked, "--json")["methods"] if method["place"]]
    assert {"awq-4", "fp16-16", "squeezellm-4", "squeezellm-3"} <= set(ranked)
    assert run([*map(str, asked), "--plot", str(plot)]) == 0
    root = ET.parse(plot).getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{space}polyline")) == len(ranked)
    texts = [text.text for text in root.iter(f"{space}text")]
    assert {"awq", "fp16", "squeezellm 4-bit", "squeezellm 3-bit", "clients"} <= set(texts)
    for line in root.findall(f"{space}polyline"):
        points = [tuple(map(float, point.split(","))) for point in line.get("points", "").split()]
        assert len(points) == len(concurrencies(256))
        assert all(0 <= x <= 760 and 0 <= y <= 440 for x, y in points)


@pytest.mark.parametrize(("method", "target"), [("fp16", "cpu"), ("awq", "2xa100-80g"), ("squeezellm", "cpu")])
def test_the_written_config_is_accepted(
    method: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_llama(tmp_path / "m", method, hidden=512, intermediate=1024)
    config = tmp_path / "model.yaml"
    assert run(["recommend", str(folder), "--target", target, "--write", str(config)]) == 0
    assert f"# {method}" in config.read_text()
    assert run(["check", str(config), "--target", target]) == 0
    capsys.readouterr()
    assert "exists already" in refusal(capsys, ["recommend", str(folder), "--write", str(config)], 2)


def test_methods_that_are_not_installed_are_named(
    bare: Bare, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QUANTSERVE_DISABLE", "awq")
    assert run(["recommend", str(bare(LLAMA_7B)), "--target", "l40s"]) == 0
    assert "quantserve[awq]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["profile", "MODEL", "--target", "a100"], "a100-80g"),
        (["profile", "MODEL", "--method", "awqq"], "did you mean 'awq'?"),
        (["profile", "MODEL", "--concurrency", "1,x"], "1,4,16"),
        (["profile", "MODEL", "--concurrency", "0"], "1 to 4096"),
        (["profile", "no/such/folder/at/all"], "no/such/folder"),
        (["recommend", "MODEL", "--workload", "chatt"], "did you mean 'chat'?"),
        (["recommend", "MODEL", "--plot", "no/such/folder/plot.svg"], "does not exist"),
        (["recommend", "STRANGE"], "does not give the sizes of a decoder with attention"),
        (["profile", "BROKEN"], "config.json"),
    ],
)
def test_mistakes(
    arguments: list[str], says: str, bare: Bare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strange, broken = tmp_path / "strange", tmp_path / "broken"
    strange.mkdir()
    broken.mkdir()
    (strange / "config.json").write_text(json.dumps(LLAMA_7B | {"model_type": "mamba", "architectures": ["Mamba"]}))
    (broken / "config.json").write_text("{")
    names = {"MODEL": str(bare(LLAMA_7B)), "STRANGE": str(strange), "BROKEN": str(broken)}
    assert says in refusal(capsys, [names.get(word, word) for word in arguments], 2)


def test_both_are_light(bare: Bare) -> None:
    folder = str(bare(LLAMA_70B))
    for command in ("profile", "recommend"):
        report = light([command, folder, "--target", "a100-80g"])
        assert report["processor_s"] < 4  # it takes a second; the limit catches what became slow
