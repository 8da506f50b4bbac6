"""The conformance kit itself: what it catches, how it reports, and that nothing a plugin does stops it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from helpers.dists import Site
from mutants.__main__ import caught, check, install, prepare
from mutants.defects import DEFECTS
from quantserve.cli.main import run
from quantserve.errors import UsageError
from quantserve.plugins import record
from quantserve.testing import CHECKS, Case, parametrize_with_checks, run_checks, write_llama
from quantserve.testing.subject import Subject

ROOT = Path(__file__).parents[2]
PLUGIN = """
from quantserve.api import *

SCHEME = Scheme(
    {"qweight": Part((N(), K()), ("I8",)), "scale": Part((N(), K(128)), ("F32",))}, bits=8, group_size=128
)

@hookimpl
def quantserve_method():
    return Method(name="mine", summary="a method", bits=(8,), vllm_name="mine", accepts={"mine": {"cuda": ("mine",)}})

@hookimpl
def quantserve_detect(checkpoint):
    return (checkpoint.quantization_config or {}).get("quant_method") == "mine"

@hookimpl
def quantserve_scheme(checkpoint, linear):
    return SCHEME

@hookimpl
def quantserve_validate(checkpoint, model, target):
    config = checkpoint.quantization_config or {}
    if config.get("bits") != 8:
        yield Finding.error("mine-bits", f"bits is {config.get('bits', 'missing')}", ["bits"], "make it 8")
    if not any(name.endswith(".qweight") for name in checkpoint.tensors):
        yield Finding.error("mine-not-quantized", "no linear is quantized", [], "serve it unquantized")
"""
_CONFIG = "config = checkpoint.quantization_config or {}"
VARYING = """def quantserve_validate(checkpoint, model, target):
    for n in range(2):
        if f"model.layers.{n}.self_attn.q_proj.scale" not in checkpoint.tensors:
            yield Finding.error(f"mine-lost-{n}", "a scale is lost", [], "find it")"""
CHECKPOINT = {"quant_method": "mine", "bits": 8}
QUICK = ("S01", "S04", "S05", "S09", "D01", "D03", "D04", "V", "P", "I01", "T02")


def outcomes(site: Site, code: str = PLUGIN, only: tuple[str, ...] = QUICK, **case: object) -> Mapping[str, str]:
    site.install("quantserve-mine", code, name="mine")
    report = run_checks(Case("mine", checkpoint=CHECKPOINT, **case), only=only)  # type: ignore[arg-type]
    return {one.check.id: one.outcome for one in report.results}


def failed(site: Site, old: str, new: str, **case: object) -> set[str]:
    assert old in PLUGIN
    return {id for id, one in outcomes(site, PLUGIN.replace(old, new), **case).items() if one == "failed"}


def test_a_good_plugin_passes(site: Site) -> None:
    found = outcomes(site)
    assert {id for id, one in found.items() if one != "passed"} == set()
    assert len(found) > 20


@pytest.mark.parametrize(
    ("old", "new", "check"),
    [
        ('("I8",)', '("I8", "U8")', "V04-wrong-dtype"),
        ('if config.get("bits") != 8', "if False", "V10-setting-value"),
        ("if not any(", "if False and any(", "V06-unquantized"),
        ('.get("quant_method") == "mine"', '.get("quant_method") != "x"', "D03-nothing"),
        ("(checkpoint.quantization_config or {})", "checkpoint.quantization_config", "D04-any-config"),
        ("f\"bits is {config.get('bits', 'missing')}\"", "'\\x1b[2J'", "T02-findings"),
        (
            "config = checkpoint.quantization_config or {}",
            "config = checkpoint.quantization_config",
            "V12-any-checkpoint",
        ),
        (
            "config = checkpoint.quantization_config or {}",
            "config = checkpoint.quantization_config or {}\n    checkpoint.config['seen'] = 1",
            "I01-arguments",
        ),
        ("def quantserve_validate(checkpoint, model, target):", VARYING, "V13-stable-codes"),
    ],
)
def test_a_defect_is_caught_by_its_check(site: Site, old: str, new: str, check: str) -> None:
    assert failed(site, old, new, only=(check,)) == {check}


def test_a_plugin_that_hangs_is_ended_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTSERVE_HOOK_TIMEOUT", "0.2")
    code = "    if not any(name.endswith"
    found = failed(site, code, "    if config.get('bits') == 9:\n        while True: pass\n" + code, only=("V",))
    assert "V10-setting-value" in found


def test_a_plugin_that_does_not_load_fails_one_check(site: Site) -> None:
    found = outcomes(site, "raise RuntimeError('at import')", only=("S01", "S02", "D", "V"))
    assert found["S01-loads"] == "failed"
    assert found["S02-light-import"] == "skipped"
    (problem,) = run_checks(Case("mine"), only=("S01",)).results[0].problems
    assert problem.startswith("load: RuntimeError: at import at ")
    assert "\\n" not in problem
    assert set(found.values()) == {"failed", "skipped"}
    site.install("quantserve-side", "raise OSError('at import')", name="side", engine={"side": "nowhere:register"})
    report = run_checks(Case("side"), only=("S1", "I"))
    assert {one.outcome for one in report.results} == {"skipped"}
    assert {"S11-register", "I03-engines"} <= {one.check.id for one in report.results}


def test_expected_failures_are_strict(site: Site) -> None:
    code = PLUGIN.replace('("I8",)', '("I8", "U8")')
    found = outcomes(
        site, code, only=("V03", "V04"), expected_failures={"V04-wrong-dtype": "w", "V03-wrong-shape": "w"}
    )
    assert found == {"V03-wrong-shape": "failed", "V04-wrong-dtype": "expected"}


def test_harmless_damages_are_strict(site: Site) -> None:
    harmless = {"tensor scale missing": "r", "config nothing removed": "r"}
    found = outcomes(site, only=("V02", "V14"), harmless=harmless)
    assert found == {"V02-missing": "failed", "V14-harmless": "failed"}


def test_capabilities_are_those_of_the_plugin(site: Site) -> None:
    found = outcomes(site, only=("S10", "P"), capabilities=("cpu", "cuda", "converter"))
    assert found == {"S10-capabilities": "failed"}


def test_reports(site: Site) -> None:
    site.install("quantserve-mine", PLUGIN.replace('("I8",)', '("I8", "U8")'), name="mine")
    report = run_checks(Case("mine", checkpoint=CHECKPOINT), only=("V04", "V05"))
    assert report.exit_code == 3
    suite = ElementTree.fromstring(report.to_junit())
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    (failure,) = suite.iter("failure")
    assert "fix:" in str(failure.text)
    made = json.loads(json.dumps(report.to_json()))
    assert [one["id"] for one in made["checks"]] == ["V04-wrong-dtype", "V05-further-tensors"]
    assert made["checks"][0]["fix"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case("nobodys"), "unknown plugin"),
        (Case("fp16", capabilities=("gpu",)), "unknown capability"),
        (Case("fp16", expected_failures={"V99": "r"}), "unknown check"),
        (Case("fp16", checkpoint=Path("/nonexistent")), "does not exist"),
        (Case("awq"), "give the case a checkpoint"),
    ],
)
def test_mistakes_in_a_case(case: Case, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run_checks(case, only=("V01",))


def test_the_command(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site.install("quantserve-mine", PLUGIN, name="mine")
    case = tmp_path / "case.py"
    case.write_text(f"from quantserve.testing import Case\nCASES = [Case('mine', checkpoint={CHECKPOINT})]\n")
    junit = tmp_path / "junit.xml"
    arguments = ["plugin", "check", "mine", "--case", str(case), "--only", "V", "--junit", str(junit)]
    assert run(arguments) == 0
    assert "V04-wrong-dtype" in capsys.readouterr().out
    assert ElementTree.fromstring(junit.read_text()).get("failures") == "0"
    assert run(["plugin", "check", "mine", "--only", "V01"]) == 3  # a checkpoint without bits
    assert run(["plugin", "check", "fp16", "--case", str(case)]) == 2
    assert "its cases: mine" in capsys.readouterr().err
    assert run(["plugin", "info", "mine", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["hooks"] == ["quantserve_method", "quantserve_detect", "quantserve_scheme", "quantserve_validate"]
    assert "quantserve plugin mine" in about["badge"]
    site.install("quantserve-bad", "raise OSError('disk')", name="bad")
    assert run(["plugin", "list", "--json"]) == 0
    health = {row["name"]: row["health"] for row in json.loads(capsys.readouterr().out)["plugins"]}
    assert (health["mine"], health["bad"]) == ("ok", "failed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--junit", "/nonexistent/a.xml"], "/nonexistent is no folder"),
        (["--junit", "/"], "it is a folder"),
        (["--record", "/nonexistent/conformance.json"], "/nonexistent is no folder"),
        (["--only", "Q02"], "none of the checks Q02 applies to 'mine'"),
        (["--only", "E01"], "run with --engine"),
        (["--only", "Z"], "unknown check"),
        (["--model", "/nonexistent"], "does not exist: /nonexistent"),
    ],
)
def test_mistakes_of_the_command(
    site: Site, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    site.install("quantserve-mine", PLUGIN, name="mine")
    assert run(["plugin", "check", "mine", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_the_name_of_a_distribution_is_explained(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.install("quantserve-mine", PLUGIN, name="mine")
    assert run(["plugin", "check", "quantserve-mine"]) == 2
    assert "it is a distribution; name its plugin mine" in capsys.readouterr().err


def test_a_record_is_for_all_checks_that_pass(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site.install("quantserve-mine", PLUGIN.replace('("I8",)', '("I8", "U8")'), name="mine")
    case, file = tmp_path / "case.py", tmp_path / "conformance.json"
    case.write_text(f"from quantserve.testing import Case\nCASE = Case('mine', checkpoint={CHECKPOINT})\n")
    arguments = ["plugin", "check", "mine", "--case", str(case), "--record", str(file)]
    assert run([*arguments, "--only", "V"]) == 2
    assert "leave out --only and --first" in capsys.readouterr().err
    assert run(arguments) == 3
    assert not file.exists()


def test_versions_that_were_proven_are_shown(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    module = site.install("quantserve-mine", PLUGIN, name="mine", version="0.3")
    package = site.path / module
    package.mkdir()
    package.with_suffix(".py").rename(package / "__init__.py")
    file = package / record.FILE

    def shown() -> tuple[dict[str, object], dict[str, object]]:
        assert run(["plugin", "info", "mine", "--json"]) == 0
        info = json.loads(capsys.readouterr().out)
        assert run(["plugin", "list", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["plugins"]
        return info, next(row for row in rows if row["name"] == "mine")

    info, row = shown()
    assert info["proven"] == row["proven"] == []
    assert "checks" not in str(info["badge"])
    here = record.run_here("0.3", "1.2", 40, engine=False)
    for vllm, version in (("0.32.0", "0.2"), ("0.9.1", "0.3"), ("0.10.0", "0.3"), ("0.9.1", "0.3")):
        record.write(file, "mine", replace(here, vllm=vllm, ray="2.60.0", version=version))
    info, row = shown()  # the run of version 0.2 is gone, and 0.9.1 is there once
    assert row["proven"] == ["vLLM 0.10.0, Ray 2.60.0, 40 checks"]
    assert [str(one).split(", ")[2] for one in info["proven"]] == ["vLLM 0.9.1", "vLLM 0.10.0"]  # type: ignore[attr-defined]
    assert "vLLM%200.10.0" in str(info["badge"])
    record.write(file, "mine", replace(here, vllm="0.33.0", version="0.4", engine=True))
    assert shown()[1]["proven"] == [f"{replace(here, vllm='0.33.0', engine=True).text}, in version 0.4"]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"runs": [7]}', '{"runs": 7}', "x" * 100_000, '{"runs": [{"vllm": "\\u001b[2J"}]}']
)
def test_a_record_that_is_none_is_a_note(site: Site, capsys: pytest.CaptureFixture[str], text: str) -> None:
    module = site.install("quantserve-mine", PLUGIN, name="mine")
    package = site.path / module
    package.mkdir()
    package.with_suffix(".py").rename(package / "__init__.py")
    (package / record.FILE).write_text(text)
    assert run(["plugin", "list", "--json"]) == 0
    row = next(one for one in json.loads(capsys.readouterr().out)["plugins"] if one["name"] == "mine")
    assert (row["health"], row["proven"]) == ("ok", [])
    assert "is no record of the conformance kit" in row["notes"][-1]
    assert run(["plugin", "info", "mine"]) == 0


def test_ids_are_stable_and_documented() -> None:
    page = (ROOT / "docs" / "conformance.md").read_text()
    for id, one in CHECKS.items():
        assert re.fullmatch(r"[A-Z]\d\d-[a-z-]+", id)
        assert one.text
        assert one.fix, id
        assert f"`{id}`" in page
    assert len({id[:3] for id in CHECKS}) == len(CHECKS)


def test_pytest_gets_one_test_for_each_check(site: Site) -> None:
    site.install("quantserve-mine", PLUGIN, name="mine")
    case = Case("mine", checkpoint=CHECKPOINT, expected_failures={"V02-missing": "r"})
    mark = parametrize_with_checks(case).mark  # type: ignore[attr-defined]
    by_id = {one.id: one for one in mark.args[1]}
    assert "mine-V01-good" in by_id
    assert not any(id.startswith("mine-E") for id in by_id)
    assert [one.name for one in by_id["mine-V02-missing"].marks] == ["xfail"]
    by_id["mine-V01-good"].values[0]()


def test_the_small_llama_can_be_read(tmp_path: Path) -> None:
    from quantserve.checkpoint import open_checkpoint

    found = open_checkpoint(str(write_llama(tmp_path / "m")))
    assert found.tensors_complete
    assert len(found.tensors) == 2 * 9 + 3


def test_engines_are_compared_with_the_reference_and_not_with_what_the_case_leaves(site: Site) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    from quantserve.testing.checks import engine

    def written(folder: Path) -> None:
        plain = write_llama(folder.with_name("plain"))  # beside the checkpoint, as quantizers' sources are
        tensors = load_file(plain / "model.safetensors")
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            n, k = tensors.pop(name).shape
            tensors[name.replace("weight", "qweight")] = torch.ones(n, k, dtype=torch.int8)
            tensors[name.replace("weight", "scale")] = torch.ones(n, k // 128)
        save_file(tensors, folder / "model.safetensors")
        config = json.loads((plain / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": CHECKPOINT}))

    def reference(folder: Path) -> Mapping[str, object]:
        tensors = load_file(folder / "model.safetensors")
        return {
            name.removesuffix(".qweight"): 7 * one.float() for name, one in tensors.items() if name.endswith("qweight")
        }

    site.install("quantserve-mine", PLUGIN, name="mine")
    subject = Subject(Case("mine", checkpoint=written, reference=reference))
    assert {"values", "layers"} <= subject.facts
    stored = load_file(engine._plain(subject) / "model.safetensors")
    assert stored["model.layers.1.mlp.down_proj.weight"].unique().tolist() == [7.0]
    assert {name.rpartition(".")[2] for name in stored} == {"weight"}
    needed = [tensor.name.rpartition(".")[2] for _, tensor in engine._needed(subject)]
    assert sorted(needed) == ["qweight", "scale"]


@pytest.mark.slow
def test_a_quantizer_that_is_a_class_runs_as_users_run_it(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    case = prepare("fp8", tmp_path / "prepared")
    wrong = [one for one in DEFECTS if one.file == "quantizer.py" and '"scale": scales' in one.new]
    for defect, code in ((None, 0), *((one, 3) for one in wrong)):
        folder = tmp_path / f"exit-{code}"
        install("fp8", folder, defect)
        found, said = check("fp8", folder, case, ("Q01",))
        assert found == code, said
    assert said.startswith("Q01-quantizer: quantserve_fp8.quantizer:Fp8: ")
    assert "at stage 'quantizer': KeyError: 'weight_scale' at quantizer.py:" in said


def test_the_mutants_follow_the_plugins(tmp_path: Path) -> None:
    """The text that each replaces is still there."""
    for number, defect in enumerate(DEFECTS):
        install(defect.plugin, tmp_path / str(number), defect)


def test_some_of_the_mutants(tmp_path: Path) -> None:
    """`make mutants` tries all of them."""
    case = prepare("fp8", tmp_path)
    assert not caught(None, "fp8", case, light=True)
    (defect,) = [one for one in DEFECTS if one.plugin == "fp8" and 'float("nan")' in one.new]
    assert "bits_per_weight" in caught(defect, "fp8", case, light=True)
