"""Config files: an app, or a ConfigError that begins with the place. Text of YAML that PyYAML reads as plain values is
read alike, where the reader has no rule of its own.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from fuzzing import Target
from quantserve.config import load_object
from quantserve.config.source import parse
from quantserve.errors import ConfigError

ROOT = Path(__file__).parents[2]
WHOLE = [
    path.read_text(encoding="utf-8") for path in (ROOT / "models/demo.yaml", *sorted(ROOT.glob("models/*/*.yaml")))
]
SMALL = [
    "models: [org/name]\n",
    "models:\n- engine_config:\n    model_id: a\n    hf_model_id: org/x\n    engine_kwargs: {dtype: float16}\n",
    "engine_config: {model_id: a, generation: {stopping_sequences: [a, 1], prompt_format: {user: '{instruction}'}}}\n",
    "models:\n- engine_config: &a {model_id: b, type: VLLMEngine}\n  scaling_config: {num_workers: 2}\n"
    "- engine_config: {<<: *a, model_id: c}\n",
    "http: {port: 9000, access_log: off}\nmodels:\n- org/a\n- engine_config: {model_id: b, max_total_tokens: 4_096}\n",
    "applications:\n- {name: a, route_prefix: /, import_path: 'rayllm.backend:router_application', args: {models: ["
    "org/x, {engine_config: {model_id: b}, deployment_config: {max_concurrent_queries: 3, autoscaling_config: "
    "{min_replicas: 1}}, scaling_config: {num_workers: 1, resources_per_worker: {x: 1}}}]}}\n",
]
SNIPPETS = [
    "{", "}", "[", "]", ":", "- ", "\n", "\t", "&a ", "*a", "<<: *a", "<<: ", "!!int ", "!!python/name:os.system ",
    "!x ", "'", '"', "|\n", ">-\n", "? ", ", ", "null", "~", "true", "off", ".nan", "-.inf", "1e9", "0x1f", "0o7",
    "017", "1:30", "1_000", "2001-01-01", "=", "\x00", "\ufeff", "\x1b[2J", "\x85", "\u2028", "é", "---\n", "...\n",
    "%YAML 1.1\n", "%TAG ! x\n", "#", "@", "`", "models: ", "engine_config: ", "type: TRTLLMEngine\n",
    "{instruction}", "enabled: false\n", "9" * 400, "\\ud800", '"\\ud800"', '"\\x1b"', "!!binary aGk=", "!!set {a}",
    "!!omap [a: 1]", "!!timestamp 2001-01-01", "!!float x", "!!int ''", "!!bool x", "&a [*a, *a]",
]  # fmt: skip


def make(chance: random.Random) -> tuple[str, bool]:
    """Text, and whether it is JSON."""
    text = chance.choice(WHOLE if chance.random() < 0.05 else SMALL)
    as_json = chance.random() < 0.2
    if as_json:
        try:
            text = json.dumps(yaml.safe_load(text), default=str)
        except yaml.YAMLError:
            as_json = False
    for _ in range(chance.randint(0, 6)):
        at = chance.randrange(len(text) + 1)
        match chance.randrange(6):
            case 0 | 1:
                text = text[:at] + chance.choice(SNIPPETS) + text[at:]
            case 2:
                text = text[:at] + text[at + chance.randint(1, 30) :]
            case 3:
                lines = text.splitlines(keepends=True) or ["x"]
                lines.insert(chance.randrange(len(lines) + 1), " " * chance.randint(0, 4) + chance.choice(lines))
                text = "".join(lines)
            case 4:
                text = (
                    text[:at] + chr(chance.choice([chance.randrange(128), chance.randrange(0xD7FF)])) + text[at + 1 :]
                )
            case _:
                opening = chance.choice(["[", "{a: ", "- ", "? "])
                text = text[:at] + opening * (3000 if chance.random() < 0.02 else chance.choice([2, 30])) + text[at:]
    return text[:20_000], as_json


def judge(given: tuple[str, bool]) -> str:
    """Parse the text, compare it with PyYAML, and load it."""
    text, as_json = given
    message = ""
    try:
        found = parse(text, "file.yaml", as_json=as_json)
    except ConfigError as error:
        message = str(error)
    if message:
        assert message.startswith("file.yaml")
        return "no config text"
    if not as_json and len(text) < 600:
        compare(text, found.value)
    try:
        app = load_object(found.value, "object")
    except ConfigError as error:
        message = str(error)
    if message:
        assert message.startswith(("object", "nothing to serve")), message
        return "refused"
    for model in app.models:
        assert model.chat_template != ""
        assert isinstance(model.request_defaults, dict)
        model.deployment_config.serve_options()
    return "accepted"


def compare(text: str, value: Any) -> None:
    """The value against PyYAML's, where that has only what JSON has; dates and base 60 are text here."""
    try:
        known = yaml.load(text, Loader=Plain)
    except (yaml.YAMLError, ValueError, TypeError):
        return
    assert repr(known) == repr(value), f"{known!r:.300} is read as {value!r:.300}"


class Plain(yaml.SafeLoader):
    """PyYAML's own safe loader, dates and numbers of base 60 left as text."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> Any:
        """An integer, unless a colon makes it one of base 60."""
        return node.value if ":" in node.value else super().construct_yaml_int(node)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> Any:
        """A fraction, unless a colon makes it one of base 60."""
        return node.value if ":" in node.value else super().construct_yaml_float(node)


for kind, method in (
    ("int", Plain.construct_yaml_int),
    ("float", Plain.construct_yaml_float),
    ("timestamp", Plain.construct_yaml_str),
    ("value", Plain.construct_yaml_str),
):
    Plain.add_constructor(f"tag:yaml.org,2002:{kind}", method)

TARGET = Target("configs", make, judge)
