"""The JSON Schema of config files, for editors and validators."""

from __future__ import annotations

from typing import Any

from quantserve.config.engine_args import ENGINE, FRONTEND, MOVED
from quantserve.config.explorer import ExplorerConfig
from quantserve.config.model import ModelConfig
from quantserve.config.schema import RUNTIME_ENV_KEYS, HttpConfig


def json_schema() -> dict[str, Any]:
    """The schema of today's app files and model files; RayLLM's old keys load, but are not in it."""
    from pydantic.json_schema import models_json_schema  # slow to import, and used by one command

    _, schema = models_json_schema(
        [(ModelConfig, "validation"), (HttpConfig, "validation"), (ExplorerConfig, "validation")],
        ref_template="#/$defs/{model}",
    )
    definitions: dict[str, Any] = schema["$defs"]
    engine = definitions["EngineConfig"]["properties"]
    engine["engine_kwargs"]["propertyNames"] = {"not": {"enum": sorted(MOVED)}}
    engine["engine_kwargs"]["properties"] = {name: {} for name in sorted(ENGINE - set(MOVED))}
    engine["frontend_kwargs"]["properties"] = {name: {} for name in sorted(FRONTEND - set(MOVED))}
    engine["frontend_kwargs"]["additionalProperties"] = False
    engine["runtime_env"]["anyOf"][0]["propertyNames"] = {"enum": sorted(RUNTIME_ENV_KEYS)}
    for definition in list(definitions.values()):
        for value in definition.get("properties", {}).values():
            if "$ref" in value:  # pydantic leaves the description with the section it refers to
                section = definitions[value["$ref"].rsplit("/", 1)[1]]
                value.setdefault("description", section["description"])
    model = {"$ref": "#/$defs/ModelConfig"}
    path = {"type": "string", "description": "Path of a model file or folder, checkpoint folder, or hub id."}
    definitions["App"] = {
        "title": "App",
        "description": "All models of one server.",
        "type": "object",
        "additionalProperties": False,
        "required": ["models"],
        "properties": {
            "models": {
                "description": "The models to serve.",
                "anyOf": [path, model, {"type": "array", "minItems": 1, "items": {"anyOf": [path, model]}}],
            },
            "http": {"$ref": "#/$defs/HttpConfig", "description": "Where the API listens."},
            "explorer": {"$ref": "#/$defs/ExplorerConfig", "description": "The web page at `/`."},
        },
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "quantserve config",
        "description": "A model file, or an app file that lists models.",
        "anyOf": [model, {"$ref": "#/$defs/App"}],
        "$defs": definitions,
    }
