"""Containers that a plugin reads: chosen from folders and the hub, damaged, and read by plugins that are defective."""

from __future__ import annotations

import json
import random
from importlib.metadata import EntryPoints, entry_points
from pathlib import Path

import pytest

from helpers.checkpoints import make_llama
from helpers.dists import Site
from helpers.hub import COMMIT, Hub
from helpers.tiny import PLUGIN, header, packed, write_tiny
from quantserve.checkpoint import Checkpoint, open_checkpoint
from quantserve.cli.main import run
from quantserve.config import load_object, model_from_source
from quantserve.errors import CheckpointError, PluginError, UsageError
from quantserve.planning.advise import advise
from quantserve.planning.compose import Composition, compose
from quantserve.planning.plan import make_plan
from quantserve.plugins import foreign, readers
from quantserve.plugins.registry import GROUP, Registry
from quantserve.target import find_target

REPO = "org/model"
TARGET = find_target("a100-80g")
NAMES = ("m-Q4_K.tiny", "m-Q4_K_M.tiny", "m-Q8_0.tiny")


@pytest.fixture
def registry(site: Site) -> Registry:
    site.install("quantserve-tiny", PLUGIN, name="tiny")
    return registered(site)


def registered(site: Site) -> Registry:
    """The plugins of the site, and fp16."""
    ours = [point for point in entry_points(group=GROUP) if point.name == "fp16"]
    return Registry.load({}, EntryPoints([*ours, *site.entry_points()]))


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A folder of three models."""
    for name in NAMES:
        write_tiny(tmp_path / "three" / name)
    return tmp_path / "three"


def read(source: object, registry: Registry, **kwargs: object) -> Checkpoint:
    return open_checkpoint(str(source), readers=registry.readers, **kwargs)  # type: ignore[arg-type]


def composed(source: object, registry: Registry) -> Composition:
    engine = {"model_id": "m", "hf_model_id": str(source)}
    return compose(load_object({"models": [{"engine_config": engine}]}, "test").models[0], registry, TARGET)


def codes(checkpoint: Checkpoint) -> list[str]:
    return [problem.code for problem in checkpoint.problems]


def refused(source: object, registry: Registry) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(source, registry)
    assert "\n  fix: " in str(caught.value)
    return str(caught.value)


# --- read -------------------------------------------------------------------------------------------------------------


def test_config_tensors_and_tokenizer_come_from_the_header(tmp_path: Path, registry: Registry) -> None:
    file = write_tiny(tmp_path / "m" / "model.tiny")
    for source in (tmp_path / "m", file):
        checkpoint = read(source, registry)
        assert checkpoint.problems == ()
        assert checkpoint.config == header()["config"]
        assert checkpoint.metadata == {"author": "somebody"}
        assert checkpoint.container == ("model.tiny",)
        assert (checkpoint.tokenizer["present"], checkpoint.tokenizer["max_token_id"]) == (True, 511)
        up = checkpoint.tensors["model.layers.1.mlp.up_proj.weight"]
        assert (up.dtype, up.shape, up.file, up.nbytes) == ("B4", (512, 256), "model.tiny", 512 * 256 // 32 * 18)
        json.dumps(checkpoint.to_json())


def test_such_a_model_is_checked_planned_and_ranked(tmp_path: Path, registry: Registry) -> None:
    file = write_tiny(tmp_path / "m" / "model.tiny")
    composition = composed(tmp_path / "m", registry)
    assert composition.findings == ()
    assert [plugin.name for plugin in composition.plugins] == ["tiny"]
    assert composition.memory is not None
    stored = read(file, registry).weight_bytes
    assert stored * 0.9 < composition.memory.weights_bytes < stored * 1.3
    plan = make_plan(composition)
    assert plan.engine_args["model"] == str(file)
    assert plan.engine_args["load_format"] == "tiny"
    assert {c.method.name for c in advise(model_from_source(str(file)), registry, TARGET).candidates} >= {"tiny"}


def test_the_plugin_joins_the_method_of_another(tmp_path: Path, site: Site) -> None:
    """A plugin without a method only reads; the unquantized model in its file is served as fp16."""
    code = PLUGIN.replace("@hookimpl\ndef quantserve_method", "def no_method")
    site.install("quantserve-tiny", code.replace("@hookimpl\ndef quantserve_detect", "def no_detect"), name="tiny")
    plain = header()
    config = {key: value for key, value in plain["config"].items() if key != "quantization_config"}
    tensors = {name: ("F16", shape) for name, (_, shape) in plain["tensors"].items()}
    write_tiny(tmp_path / "m" / "model.tiny", config=config, tensors=tensors)
    with (tmp_path / "m" / "model.tiny").open("ab") as data:
        data.truncate(2**24)
    composition = composed(tmp_path / "m", registered(site))
    assert [plugin.name for plugin in composition.plugins] == ["fp16", "tiny"]
    assert not composition.errors
    assert composition.engine_kwargs["load_format"].value == "tiny"


def test_files_beside_it_count_where_the_header_is_silent(tmp_path: Path, registry: Registry) -> None:
    folder = make_llama(tmp_path / "m", config={"hidden_size": 256})
    (folder / "model.safetensors").unlink()
    write_tiny(folder / "model.tiny", config={})
    checkpoint = read(folder, registry)
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.problems == ()
    assert checkpoint.container == ("model.tiny",)


def test_safetensors_come_first(tmp_path: Path, site: Site) -> None:
    """No reader is asked where the core reads the weights itself, so a defective one harms nobody."""
    site.install("quantserve-tiny", PLUGIN.replace("    source.prefetch", "    raise KeyError\n    source.prefetch"))
    folder = make_llama(tmp_path / "m")
    write_tiny(folder / "model.tiny")
    assert read(folder, registered(site)).container == ()
    assert not composed(folder, registered(site)).errors
    with pytest.raises(PluginError):
        read(folder / "model.tiny", registered(site))


# --- one of several ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("{}:Q4_K", "m-Q4_K.tiny"), ("{}:q4_k_m", "m-Q4_K_M.tiny"), ("{}:m-Q8_0.tiny", "m-Q8_0.tiny"),
        ("{}/m-Q4_K.tiny", "m-Q4_K.tiny"), ("{}:Q8_0", "m-Q8_0.tiny"), ("{}/:Q8_0", "m-Q8_0.tiny"),
    ],
)  # fmt: skip
def test_a_choice(three: Path, registry: Registry, source: str, file: str) -> None:
    checkpoint = read(source.format(three), registry)
    assert checkpoint.container == (file,)
    assert {tensor.file for tensor in checkpoint.tensors.values()} == {file}
    assert make_plan(composed(source.format(three), registry)).engine_args["model"] == str(three / file)


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("{}", ("it holds 3 models: m-Q4_K.tiny, m-Q4_K_M.tiny, m-Q8_0.tiny", "fix: name one, such as {}:m-Q4_K.tiny")),
        ("{}:Q5", ("no model in it is called 'Q5'; it holds m-Q4_K.tiny", "{}:m-Q4_K.tiny")),
        ("{}:m", ("3 models in it fit 'm'",)), ("{}:Q4", ("no model in it is called 'Q4'",)),
        ("{}:.*", ("no model in it is called '.*'",)), ("{}:\x1b[2J", ("\\x1b[2J",)),
        ("{}/m-Q6.tiny", ("no model folder",)), ("{}x:Q4_K", ("no model folder",)),
    ],
)  # fmt: skip
def test_a_choice_that_fits_no_one(three: Path, registry: Registry, source: str, parts: tuple[str, ...]) -> None:
    message = refused(source.format(three), registry)
    for part in parts:
        assert part.format(three) in message
    assert message.replace("\n", "").isprintable()


def test_files_with_numbers_are_one_model(tmp_path: Path, registry: Registry) -> None:
    for part in range(3):
        write_tiny(tmp_path / "m" / f"m-Q8_0-{part + 1:05d}-of-00003.tiny", part, 3)
    write_tiny(tmp_path / "m" / "m-Q4_0.tiny")
    whole = read(f"{tmp_path / 'm'}:Q4_0", registry)
    for source in (f"{tmp_path / 'm'}:Q8_0", tmp_path / "m" / "m-Q8_0-00002-of-00003.tiny"):
        checkpoint = read(source, registry)
        assert (checkpoint.tensors.keys(), checkpoint.problems) == (whole.tensors.keys(), ())
        assert len(checkpoint.container) == 3
    (tmp_path / "m" / "m-Q8_0-00002-of-00003.tiny").unlink()
    checkpoint = read(f"{tmp_path / 'm'}:Q8_0", registry)
    assert checkpoint.problems[0].offenders == ("m-Q8_0-00002-of-00003.tiny",)
    assert codes(checkpoint) == ["shard-missing"]
    assert not checkpoint.tensors_complete


def test_an_existing_path_wins(tmp_path: Path, registry: Registry) -> None:
    write_tiny(tmp_path / "m:Q8_0" / "model.tiny")
    write_tiny(tmp_path / "m" / "m-Q8_0.tiny")
    assert read(tmp_path / "m:Q8_0", registry).container == ("model.tiny",)


def test_on_the_command_line(
    three: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Registry, "load", lambda *_: registry)
    monkeypatch.chdir(three.parent)
    for source, name in (("three:Q8_0", "three:Q8_0"), ("three/m-Q4_K.tiny", "m-Q4_K.tiny")):
        assert run(["check", source, "--target", "a100-80g", "--json"]) == 0
        (model,) = json.loads(capsys.readouterr().out)["models"]
        assert (model["model_id"], model["method"]) == (name, "tiny")
        assert run(["profile", source, "--target", "a100-80g"]) in (0, 2)
        capsys.readouterr()
    assert run(["check", "three", "--target", "a100-80g"]) == 2
    assert "it holds 3 models" in capsys.readouterr().out
    (three / "notes.txt").write_text("a text")
    assert run(["check", "three/notes.txt"]) == 2
    assert "not a config file" in capsys.readouterr().err
    (three / "m.yaml").write_text("engine_config: {model_id: a, hf_model_id: './:Q4_K'}")
    assert run(["check", "three/m.yaml", "--target", "a100-80g"]) == 0


# --- no plugin --------------------------------------------------------------------------------------------------------


def test_without_the_plugin(three: Path, site: Site) -> None:
    registry = registered(site)
    holds = "it holds m-Q4_K.tiny, m-Q4_K_M.tiny, m-Q8_0.tiny"
    assert holds in refused(three, registry)
    message = refused(f"{three}:Q4_K", registry)
    assert f"none here is of a kind that an installed plugin reads; {holds}" in message
    assert "`quantserve list` shows the plugins that failed" in message
    assert "no installed plugin reads TINY files" in refused(three / NAMES[0], registry)


def test_gguf_without_its_plugin(tmp_path: Path, registry: Registry) -> None:
    """Readers of other files change nothing about them."""
    folder = make_llama(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "m-Q4_K_M.gguf")
    checkpoint = read(folder, registry)
    assert codes(checkpoint) == ["weights-missing"]
    assert "m-Q4_K_M.gguf" in checkpoint.problems[0].message
    assert "pip install 'quantserve[gguf]'" in checkpoint.problems[0].fix
    assert "no installed plugin reads GGUF files: `pip install 'quantserve[gguf]'`" in refused(
        folder / "m-Q4_K_M.gguf", registry
    )
    assert "m-Q4_K_M.gguf" in refused(f"{folder}:Q4_K_M", registry)


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_from_the_hub_by_its_header_alone(hub: Hub, three: Path, registry: Registry) -> None:
    for name in NAMES:
        with (three / name).open("ab") as file:
            file.truncate(2**28)
    hub.repos[REPO] = three
    hub.revisions = ("main", "old")
    for source, model in ((f"{REPO}:Q4_K_M", f"{REPO}:Q4_K_M"), (f"{REPO}@old:Q4_K_M", f"{REPO}:Q4_K_M")):
        hub.seen.clear()
        checkpoint = read(source, registry)
        assert (checkpoint.location, checkpoint.revision, checkpoint.container) == ("hub", COMMIT, ("m-Q4_K_M.tiny",))
        assert checkpoint.tensors == read(f"{three}:Q4_K_M", registry).tensors
        assert checkpoint.problems == ()
        assert hub.sent < 200_000
        assert not [seen for seen in hub.seen if "Q8_0" in seen.path]
        plan = make_plan(composed(source, registry))
        assert (plan.engine_args["model"], plan.engine_args.get("revision")) == (
            model,
            "old" if "@" in source else None,
        )
    assert "it holds 3 models" in refused(REPO, registry)
    assert "no revision 'new'" in refused(f"{REPO}@new:Q4_K", registry)


def test_a_mirror_without_sizes(hub: Hub, three: Path, registry: Registry) -> None:
    hub.repos[REPO], hub.hide_sizes = three, True
    assert read(f"{REPO}:Q8_0", registry).problems == ()


def test_a_failing_hub_is_no_defect_of_the_plugin(hub: Hub, three: Path, registry: Registry) -> None:
    hub.repos[REPO] = three
    hub.status["m-Q8_0.tiny"] = (403, "GatedRepo")
    assert "gated or private" in refused(f"{REPO}:Q8_0", registry)
    hub.status["m-Q8_0.tiny"] = (404, "EntryNotFound")
    checkpoint = read(f"{REPO}:Q8_0", registry)
    assert "file-unreadable" in codes(checkpoint)
    assert not checkpoint.tensors_complete


def test_a_snapshot_in_the_cache(hub: Hub, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "cache" / "models--org--model"
    write_tiny(repository / "snapshots" / COMMIT / "m-Q8_0.tiny")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for source in (f"{REPO}:Q8_0", f"{REPO}@{COMMIT}:Q8_0", REPO):
        checkpoint = read(source, registry)
        assert (checkpoint.location, checkpoint.container, checkpoint.problems) == ("cache", ("m-Q8_0.tiny",), ())
    assert make_plan(composed(f"{REPO}:Q8_0", registry)).engine_args["model"] == f"{REPO}:Q8_0"
    assert "its cached snapshot lacks Q4_K" in refused(f"{REPO}:Q4_K", registry)
    assert "not in the HF cache" in refused(f"{REPO}@old:Q8_0", registry)
    assert "not in the HF cache" in refused(f"{REPO}@../../x:Q8_0", registry)


# --- damaged files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "code", "part"),
    [
        (b"", "header-invalid", "begins with b''"),
        (b"GGUF\0\0\0\0", "header-invalid", "b'GGUF'"),
        (b"TINY\xff\xff\xff\xff{}", "header-invalid", "more than 268,435,456 bytes"),
        (b"TINY\xff\0\0\0{}", "header-invalid", "2 of 255 bytes"),
        (packed(b"[" * 100_000), "header-invalid", "not valid"),
        (packed({}), "header-invalid", "'config'"),
        (packed(header(author=7)), "header-invalid", "the author is no text"),
        (packed(header(author="")), "file-truncated", "its tensors take"),
        (packed(header(tensors={"a": ["B4", [-1]]})), "header-invalid", "tensor a has the shape [-1]"),
        (packed(header(tensors={"a": ["B4", [2**62, 2**62]]})), "header-invalid", "has the shape"),
        (packed(header(tensors={"a": ["F16", [1] * 99]})), "header-invalid", "99 dimensions"),
        (packed(header(tensors={"a" * 501: ["F16", [1]]})), "header-invalid", "501 characters"),
        (packed(header(tensors={"": ["F16", [1]]})), "header-invalid", "0 characters"),
        (packed(header(tensors={"a\x1b[2J": ["F16", [-1]]})), "header-invalid", "a\\x1b[2J"),
        (packed(header(tokenizer={"present": True, "max_token_id": -1})), "header-invalid", "max_token_id is -1"),
        (packed(header(author="a" * 70_000_000)), "header-invalid", "characters, the limit is"),
    ],
)  # fmt: skip
def test_a_damaged_file(tmp_path: Path, registry: Registry, content: bytes, code: str, part: str) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.tiny").write_bytes(content)
    checkpoint = read(tmp_path / "m", registry)
    problem = next(problem for problem in checkpoint.problems if problem.code == code)
    assert part in problem.message
    assert "model.tiny" in problem.message
    assert problem.offenders == ("model.tiny",)
    assert "config-missing" not in codes(checkpoint)
    assert composed(tmp_path / "m", registry).errors


def test_the_plugins_own_findings_bear_its_name(tmp_path: Path, registry: Registry) -> None:
    write_tiny(tmp_path / "m" / "model.tiny", author="")
    (finding,) = composed(tmp_path / "m", registry).findings
    assert (finding.code, finding.source) == ("tiny-no-author", "tiny")


def test_too_many_tensors(tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_TENSORS", 5)
    write_tiny(tmp_path / "m" / "model.tiny")
    checkpoint = read(tmp_path / "m", registry)
    assert codes(checkpoint) == ["checkpoint-too-large"]
    assert not checkpoint.tensors_complete


def test_a_tensor_in_two_files(tmp_path: Path, registry: Registry) -> None:
    for part in (1, 2):
        write_tiny(tmp_path / "m" / f"m-0000{part}-of-00002.tiny")
    (problem,) = read(tmp_path / "m", registry).problems
    assert "model.embed_tokens.weight is in it twice" in problem.message


def test_random_damage_is_never_the_plugins(tmp_path: Path, registry: Registry) -> None:
    file = write_tiny(tmp_path / "m" / "model.tiny")
    good = file.read_bytes()[: len(packed(header()))]
    chance = random.Random(7)
    for _ in range(60):
        made = bytearray(good)
        for _ in range(chance.randint(1, 6)):
            made[chance.randrange(chance.choice((12, 600, len(made))))] = chance.choice(
                b'\0\xff[]{}",:-9' + bytes([chance.randrange(256)])
            )
        file.write_bytes(made[: chance.choice((len(made), chance.randrange(len(made))))])
        assert composed(tmp_path / "m", registry).errors


# --- defective plugins ------------------------------------------------------------------------------------------------

GOOD = "Contents({'a': 1}, [Tensor('a', 'F16', (8,), names[0])])"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise KeyError('general.name')", "KeyError: 'general.name' at quantserve_tiny_plugin.py:"),
        ("raise OSError('mine')", "OSError: mine"),
        ("raise SystemExit(1)", "SystemExit: 1"),
        ("while True: pass", "did not end within 1.2 s"),
        ("import time; time.sleep(60)", "did not end within 1.2 s"),
        ("import os; os.environ['VLLM_PLUGINS'] = 'x'; return " + GOOD, "set VLLM_PLUGINS"),
        ("return None", "returned NoneType, not Contents"),
        ("return {}", "returned dict, not Contents"),
        ("return Contents(config=7)", "Contents.config is int, not a mapping"),
        ("return Contents(config={'a': object()})", "returned a value that is not JSON: config"),
        ("return Contents(tensors={'a': 1})", "Contents.tensors is dict, not tensors"),
        ("return Contents(tensors=[7])", "returned int among its tensors, not Tensor"),
        ("return Contents(tensors=[Tensor(7, 'F16', (8,), names[0])])", "name and dtype must be text"),
        ("return Contents(tensors=[Tensor('a', 'F16', [8], names[0])])", "and shape a tuple"),
        ("return Contents(tensors=[Tensor('a', 'F16', (8.0,), names[0])])", "must be integers"),
        ("return Contents(tensors=[Tensor('a', 'F16', (8,))])", "'model.safetensors' is none of those given"),
        ("return Contents(tensors=[Tensor('a', 'Q4', (8,), names[0])])", "so `stored` must give its bytes"),
        ("return Contents(tensors=(1 / 0 for _ in range(3)))", "ZeroDivisionError"),
        ("return Contents(tokenizer=[1])", "Contents.tokenizer is list"),
        ("return Contents(tokenizer={'present': 1})", "Contents.tokenizer['present'] must be bool: 1"),
        ("return Contents(tokenizer={'eos': 1})", "unknown fact 'eos' (known: present, "),
        ("return Contents(metadata={'a': 1})", "Contents.metadata must map text to text"),
        ("return Contents(problems=7)", "returned int, not findings"),
        ("return Contents(problems=(Finding.error('awq-x', 'm'),))", "must be kebab-case and begin with tiny-"),
        ("return source.open('../../etc/passwd')", "the checkpoint has no file '../../etc/passwd'"),
        ("source.files['x'] = 1", "TypeError: 'mappingproxy'"),
    ],
)  # fmt: skip
def test_a_defective_reader(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch, body: str, says: str) -> None:
    monkeypatch.setenv(foreign.VARIABLE, "0.2" if says.startswith("did not end") else "10")
    site.install("quantserve-tiny", f"{PLUGIN}\ndef read(source, names):\n    {body}\n", name="tiny")
    registry = registered(site)
    assert not registry.failures
    write_tiny(tmp_path / "m" / "model.tiny")
    with pytest.raises(PluginError) as caught:
        composed(tmp_path / "m", registry)
    assert says in str(caught.value)
    assert "'tiny' of quantserve-tiny 1.0 failed at stage 'quantserve_reader'" in str(caught.value)
    assert not composed(make_llama(tmp_path / "plain"), registry).errors


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ("7", "returned int, not Reader or None"),
        ("Reader('.tiny', read)", "Reader.suffixes must be a tuple"),
        ("Reader((), read)", "must be a tuple of 1 to 100"),
        ("Reader(('tiny',), read)", "'tiny' must be a dot"),
        ("Reader(('.safetensors',), read)", "*.safetensors files are read by the core itself"),
        ("Reader(('.tiny',), 7)", "Reader.read is int"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_reader_that_is_none_is_a_row(site: Site, returned: str, says: str) -> None:
    site.install("quantserve-tiny", PLUGIN.replace('Reader((".tiny",), read)', returned), name="tiny")
    registry = registered(site)
    (failure,) = registry.failures
    assert (failure.name, failure.stage) == ("tiny", "reader")
    assert says in failure.reason
    assert "fp16" in registry.plugins
    assert registry.readers == ()


def test_two_plugins_of_one_suffix(tmp_path: Path, site: Site) -> None:
    write_tiny(tmp_path / "m" / "model.tiny")
    for name in ("one", "two"):
        site.install(f"quantserve-{name}", PLUGIN.replace('name="tiny"', f'name="{name}"'), name=name)
    registry = registered(site)
    assert {"one", "two"} <= registry.plugins.keys()
    assert any("*.tiny files are claimed by one" in note for note in registry.plugins["one"].notes)
    with pytest.raises(
        UsageError, match=r"claimed by one .* and two .*; neither reads them\n  fix: .*QUANTSERVE_DISABLE"
    ):
        composed(tmp_path / "m", registry)
    site.install("quantserve-tiny", PLUGIN, name="tiny")
    registry = registered(site)
    assert composed(tmp_path / "m", registry).method_plugin is registry.plugins["tiny"]
    assert any("they belong to tiny (quantserve-tiny 1.0)" in note for note in registry.plugins["two"].notes)
