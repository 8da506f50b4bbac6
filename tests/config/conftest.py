from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from quantserve.config import AppConfig, ModelConfig, load
from quantserve.errors import ConfigError

Write = Callable[..., Path]
LoadModel = Callable[[str], ModelConfig]
LoadError = Callable[[str], list[str]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file under the test's folder; the text is dedented."""

    def write_file(text: str, name: str = "model.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text), encoding="utf-8")
        return path

    return write_file


@pytest.fixture
def load_app(write: Write) -> Callable[[str], AppConfig]:
    """Load one file with this text."""
    return lambda text: load([write(text)])


@pytest.fixture
def load_model(load_app: Callable[[str], AppConfig]) -> LoadModel:
    """Load one model with this text."""

    def load_one(text: str) -> ModelConfig:
        (model,) = load_app(text).models
        return model

    return load_one


@pytest.fixture
def load_error(write: Write, tmp_path: Path) -> LoadError:
    """The problems of a file with this text: each begins with LINE, fixes are on the same line."""

    def errors(text: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load([write(text)])
        joined = str(caught.value).replace("\n  fix: ", "; fix: ")
        return [line.removeprefix(f"{tmp_path}/model.yaml:") for line in joined.splitlines()]

    return errors
