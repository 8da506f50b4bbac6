"""Text that is no config gets one clear message with file:line, and values mean what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantserve.config import load
from quantserve.errors import ConfigError

MODEL = "engine_config: {model_id: a/b}\n"


def message(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        load([path])
    return str(caught.value).removeprefix(str(path))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", ": an empty file, a config is expected"),
        (b"# only a comment\n", ": an empty file, a config is expected"),
        (b"- a\n- b\n", ":1: a mapping (`key: value`) is expected, got a list\n  fix: name a config file"),
        (b"just text\n", ":1: a mapping (`key: value`) is expected, got the text 'just text'"),
        (b"42\n", ":1: a mapping (`key: value`) is expected, got the number 42"),
        (b"\0\0\0", ":1: a NUL byte, so this is not a text file"),
        (b"a: 1\nb: \xff\n", ":2: byte 0xff is not UTF-8\n  fix: save the file as UTF-8"),
        ("a: ä\n".encode("utf-16"), ":1: UTF-16 text\n  fix: save the file as UTF-8"),
        (b"a:\n\tb: 1\n", ":2: not valid YAML: a tab where YAML wants spaces\n  fix: indent with spaces"),
        (b"a: \x07\n", ":1: character U+0007 is not allowed"),
        (b"a: b: c\n", ":1: not valid YAML: mapping values are not allowed here"),
        (
            b"a: [1, 2\nb: 3\n",
            ":2: not valid YAML: while parsing a flow sequence, expected ',' or ']', but got ':'\n  fix: ",
        ),
        (b"a: 1\n---\nb: 2\n", ":2: not valid YAML: a second document begins here (`---`)"),
        (b'a: "\\UFFFFFFFF"\n', ": not valid YAML"),
        (b"a: *nothing\n", ":1: not valid YAML: found undefined alias"),
        (b"a: !!python/object/apply:os.system [ls]\n", ":1: the tag !!python/object/apply:os.system is refused"),
        (b"a: !local x\n", ":1: the tag !local is refused"),
        (b"a: !!binary aGk=\n", ":1: the tag !!binary is refused"),
        (b"a: !!int x\n", ":1: 'x' is no integer of at most 300 digits"),
        (b"a: .nan\n", ":1: '.nan' is no finite number below 1e300"),
        (b"a: -.inf\n", ":1: '-.inf' is no finite number below 1e300"),
        (b"a: 1.0e+999\n", ":1: '1.0e+999' is no finite number below 1e300"),
        (b"a: " + b"9" * 5000 + b"\n", ":1: '9999"),
        (b"a: 0x" + b"f" * 5000 + b"\n", ":1: '0xff"),
        (
            b'engine_config: {model_id: a, revision: "\\ud800"}\n',
            ": engine_config.revision: half of a surrogate pair",
        ),
        (b"1: x\n", ":1: YAML reads the key '1' as 1\n  fix: put the key in quotes"),
        (b"on: x\n", ":1: YAML reads the key 'on' as True\n  fix: put the key in quotes"),
        (b"? [a]\n: x\n", ":1: a key must be text, not a list or mapping"),
        (b"<<: 3\n", ":1: `<<` takes a mapping or a list of mappings"),
        (b"a: &a [*a]\n", ":1: nested deeper than 40 levels, or an alias that contains itself"),
        (b"a: " + b"[" * 100 + b"]" * 100, ":1: nested deeper than 40 levels"),
        (b"[" * 100_000, ": nested deeper than 40 levels"),
        (b"{a: " * 20_000, ": nested deeper than 40 levels"),
        (b"#" * 300_000, ": larger than 256 KiB, so this is not a config file"),
    ],
)
def test_broken_text(tmp_path: Path, data: bytes, expected: str) -> None:
    found = message(tmp_path / "model.yaml", data)
    assert found.startswith(expected), found


def test_a_flood_of_problems_is_cut_short(tmp_path: Path) -> None:
    found = message(tmp_path / "model.yaml", b"a: b\n" * 1000)
    assert len(found.splitlines()) == 41
    assert found.endswith("and 979 more problems")


def test_alias_expansion_is_bounded(tmp_path: Path) -> None:
    levels = ["a0: &a0 [" + ", ".join(["x"] * 9) + "]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    found = message(tmp_path / "model.yaml", "\n".join(levels).encode())  # 9 ** 12 values; pytest's timeout ends it
    assert "more than 50000 values once aliases are expanded" in found


def test_duplicate_keys_name_both_lines(tmp_path: Path) -> None:
    text = "engine_config:\n  model_id: a/b\n  revision: x\n  model_id: c/d\nengine_config: {}\n"
    assert message(tmp_path / "m.yaml", text.encode()).splitlines() == [
        ":4: engine_config.model_id: given twice, first on line 2",
        "  fix: keep one",
        f"{tmp_path}/m.yaml:5: engine_config: given twice, first on line 1",
        "  fix: keep one",
    ]


def test_values_that_yaml_1_1_would_change_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(MODEL[:-2] + ", revision: 2024-01-31, model_description: 1:30}\n")
    engine = load([path]).models[0].engine_config
    assert (engine.revision, engine.model_description) == ("2024-01-31", "1:30")


def test_bom_and_merge_keys_and_aliases(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_bytes(
        b"\xef\xbb\xbfmodels:\n"
        b"- &one {engine_config: &e {model_id: a/b, max_total_tokens: 128}, scaling_config: {num_workers: 2}}\n"
        b"- <<: *one\n  engine_config: {<<: *e, model_id: c/d}\n"
    )
    first, second = load([path]).models
    assert (second.model_id, second.max_model_len, second.tensor_parallel_size) == ("c/d", 128, 2)
    assert first.model_id == "a/b"


def test_json_files(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    description = 'tab\tquote" \U0001f600'
    value = {"engine_config": {"model_id": "a/b", "model_description": description}}
    path.write_text(json.dumps(value, indent="\t"))
    assert load([path]).models[0].engine_config.model_description == description

    for text, expected in [
        ('{"engine_config": {"model_id": "a", "model_id": "b"}}', ":1: engine_config.model_id: given twice"),
        ('{\n"engine_config": {"modelid": "a"}}', ":2: engine_config.modelid: unknown key `modelid`"),
        ('{"engine_config": NaN}', ": NaN is not a number a config can hold"),
        ("{\n'a': 1}", ":2: not valid JSON"),
        ("[" * 50_000, ": nested deeper than 40 levels"),
        ('{"a": ' + "1" * 5000 + "}", ": not valid JSON"),
        ('{"engine_config": {"model_id": "\\ud800"}}', ": engine_config.model_id: half of a surrogate pair"),
    ]:
        found = message(path, text.encode())
        assert expected in found, found


def test_not_a_regular_file(tmp_path: Path) -> None:
    import os

    path = tmp_path / "pipe.yaml"
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="not a regular file"):
        load([path])
