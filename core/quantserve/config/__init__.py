"""The config: what a person writes, read with file:line, migrated from RayLLM and checked."""

from quantserve.config.explorer import ExplorerConfig
from quantserve.config.generation import GenerateKwargs, Generation, PromptFormat
from quantserve.config.json_schema import json_schema
from quantserve.config.loading import is_model_source, load, load_object, model_from_source
from quantserve.config.model import AppConfig, EngineConfig, ModelConfig
from quantserve.config.schema import AutoscalingConfig, DeploymentConfig, HttpConfig, RayActorOptions, ScalingConfig

__all__ = [
    "AppConfig",
    "AutoscalingConfig",
    "DeploymentConfig",
    "EngineConfig",
    "ExplorerConfig",
    "GenerateKwargs",
    "Generation",
    "HttpConfig",
    "ModelConfig",
    "PromptFormat",
    "RayActorOptions",
    "ScalingConfig",
    "is_model_source",
    "json_schema",
    "load",
    "load_object",
    "model_from_source",
]
