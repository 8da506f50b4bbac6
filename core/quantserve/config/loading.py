"""From what a person names (files, folders, models) to an `AppConfig`."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from quantserve.config.explorer import ExplorerConfig
from quantserve.config.model import AppConfig, ModelConfig
from quantserve.config.paths import (
    EMPTY,
    LORA,
    WANTED,
    config_files,
    folder_id,
    is_checkpoint,
    is_container,
    is_hub_id,
    not_found,
    resolved,
    resolved_file,
)
from quantserve.config.rayllm.migrate import EMBEDDING_FIX, TRTLLM_FIX, migrate
from quantserve.config.report import Report, got, unknown_key
from quantserve.config.schema import HttpConfig
from quantserve.config.source import SUFFIXES, Located, from_object, parse, read
from quantserve.errors import CheckpointError, ConfigError
from quantserve.system.homes import expand, is_bucket, parted, snapshot_in

IMPORT_PATH: Final = "quantserve.serve.app:build"
RAYLLM_IMPORT_PATHS: Final = ("rayllm.backend:router_application", "rayllm.backend:llm_application")

_MODEL_KEYS: Final = tuple(ModelConfig.model_fields)
_APP_KEYS: Final = ("models", "http", "explorer")
_SERVE_KEYS: Final = (
    "applications", "http_options", "proxy_location", "grpc_options", "logging_config", "controller_options",
    "tracing_config", "target_capacity",
)  # fmt: skip
_APPLICATION_KEYS: Final = (
    "name", "route_prefix", "import_path", "args", "runtime_env", "deployments", "logging_config", "host", "port",
    "autoscaling_policy", "external_scaler_enabled",
)  # fmt: skip


def load(sources: Sequence[str | Path]) -> AppConfig:
    """Load app files, model files, folders of them (recursively) and bare models.

    A bare model is a folder with a ``config.json``, a hub id ``org/name`` or a URL of a bucket; it gets defaults.

    Raises:
        ConfigError: with file:line, what is wrong and the fix; all problems of all files at once.
    """
    if isinstance(sources, str | Path):
        sources = [sources]
    loader = _Loader()
    for given in sources:
        loader.named(str(given), str(given), [Path()], None)
    return loader.app()


def load_object(obj: object, where: str) -> AppConfig:
    """Load an app or model given as plain values, such as the ``args`` of a Ray Serve application.

    Args:
        obj: a dict with ``models``, or one model.
        where: what to call it in messages.

    Raises:
        ConfigError: what is wrong and the fix.
    """
    loader = _Loader()
    loader.document(from_object(obj, where, Path()))
    return loader.app()


def is_model_source(source: str | Path) -> bool:
    """Whether `source` names a bare model (checkpoint folder, hub id or URL of a bucket), not a config."""
    place, choice = parted(str(source))
    path = expand(place)
    if path.is_dir():
        return bool(choice) or is_checkpoint(snapshot_in(path))
    if path.exists():
        return is_container(path)
    return is_bucket(str(source)) or is_hub_id(str(source), [Path()])


def model_from_source(
    source: str | Path,
    *,
    quantization: str | None = None,
    tensor_parallel_size: int | None = None,
    max_model_len: int | None = None,
    allow_pickle: bool | None = None,
) -> ModelConfig:
    """A model with defaults for a checkpoint folder, hub id or URL of a bucket.

    Raises:
        ConfigError: `source` is neither, or an argument is out of range.
    """
    if not is_model_source(source):
        raise ConfigError(not_found(str(source), [Path()]))
    engine: dict[str, Any] = {"model_id": str(source)}
    place, choice = parted(str(source))
    path = expand(place)
    if path.exists():
        path = snapshot_in(path)
        real = path.resolve() if path.is_dir() else path.parent.resolve() / path.name  # a cached file is a link
        chosen = f":{choice}" if choice else ""
        engine = {"model_id": folder_id(path) + chosen, "hf_model_id": str(real) + chosen}
    elif is_bucket(str(source)):
        chosen = f":{choice}" if choice else ""
        engine = {"model_id": folder_id(Path("/", place.partition("://")[2])) + chosen, "hf_model_id": str(source)}
    if quantization:
        engine["engine_kwargs"] = {"quantization": quantization}
    if max_model_len is not None:
        engine["max_total_tokens"] = max_model_len
    if allow_pickle:
        engine["allow_pickle"] = True
    scaling = {} if tensor_parallel_size is None else {"num_workers": tensor_parallel_size}
    values = {"engine_config": engine, "scaling_config": scaling}
    report = Report()
    try:
        return ModelConfig.model_validate(values).located(str(source))
    except ValidationError as error:
        report.invalid(Located(values, str(source)), error, ModelConfig)
        raise ConfigError("\n".join(report.problems)) from None


class _Loader:
    """Collects models, notes and problems over all sources."""

    def __init__(self) -> None:
        self.report = Report()
        self.models: list[ModelConfig] = []
        self.disabled = 0
        self.http: tuple[HttpConfig, Located] | None = None
        self.explorer: tuple[ExplorerConfig, Located] | None = None
        self._seen: set[Path] = set()

    def app(self) -> AppConfig:
        """Everything loaded, or one error with every problem."""
        self._unique()
        self.report.raise_problems()
        if not self.models:
            why = f"all {self.disabled} models have `enabled: false`" if self.disabled else "no models are given"
            fix = "set `enabled: true` for one of them" if self.disabled else WANTED
            raise ConfigError(f"nothing to serve: {why}\n  fix: {fix}")
        http = self.http[0] if self.http else HttpConfig()
        explorer = self.explorer[0] if self.explorer else ExplorerConfig()
        return AppConfig(models=self.models, http=http, explorer=explorer, notes=self.report.notes)

    def _unique(self) -> None:
        seen: dict[str, ModelConfig] = {}
        for model in self.models:
            first = seen.setdefault(model.route, model)
            if first is model:
                continue
            same = "the id of another model"
            if first.model_id != model.model_id:
                same = f"the route {model.route} of {first.model_id!r}"
            self.report.problems.append(
                f"{model.where}: {model.model_id!r} has {same}, at {first.where}\n"
                "  fix: give each model its own engine_config.model_id, and folders of one name commands of their own"
            )
        names = {model.model_id: model for model in self.models}
        for model in self.models:
            for adapter in model.adapters:
                first = names.setdefault(adapter.name, model)
                if first is not model:
                    what = "is an id" if adapter.name == first.model_id else "is the name of an adapter"
                    self.report.problems.append(
                        f"{model.where}: the adapter name {adapter.name!r} {what} of the model at {first.where}\n"
                        "  fix: give every model and every adapter a name of its own"
                    )

    def named(self, text: str, label: str, folders: Sequence[Path], origin: Located | None) -> None:
        """Load what a string names: a path (tried in each of `folders`), a hub id, or inline YAML."""
        try:
            if not text.strip():
                raise ConfigError(f"{label}: an empty name" if origin else "an empty name is no config and no model")
            for folder in folders:
                path = folder / expand(text) if "\n" not in text and len(text) < 1024 else None
                if path is not None and path.exists():
                    self._path(path, f"{label}: {path}" if origin else str(path), label if origin else str(path))
                    return
            place, choice = parted(text) if "\n" not in text and len(text) < 1024 else (text, "")
            for path in (folder / expand(place) for folder in folders if choice):
                if path.is_dir():
                    self.models.append(model_from_source(f"{path}:{choice}").located(label))
                    return
            if origin and ("\n" in text or ": " in text or text.lstrip().startswith("{")):
                self._inline(text, label, folders[0])
            elif is_bucket(text) or is_hub_id(text, folders):
                self.models.append(model_from_source(text).located(label))
            else:
                raise ConfigError(f"{label}: {not_found(text, folders)}" if origin else not_found(text, folders))
        except (ConfigError, CheckpointError) as error:
            self.report.problems.append(_with_fix(str(error)))
        except PermissionError as error:
            fix = f"let user {os.getuid()} read it, with every folder above it"
            self.report.problems.append(f"{label}: {error.strerror}\n  fix: {fix}")
        except (OSError, ValueError) as error:  # a name the file system refuses, such as one with a NUL
            self.report.problems.append(_with_fix(f"{label}: {text[:80]!r} is no path: {error}"))

    def _inline(self, text: str, label: str, folder: Path) -> None:
        doc = parse(text, f"{label} (inline)", folder)
        if not isinstance(doc.value, dict):
            raise ConfigError(f"{label}: {text[:60]!r} is neither an existing path nor the YAML of a model")
        self.document(doc)

    def _path(self, path: Path, label: str, where: str) -> None:
        if path.is_dir() and is_checkpoint(snapshot_in(path)):
            self.models.append(model_from_source(path).located(where))
        elif (path / "adapter_config.json").is_file():
            raise ConfigError(f"{label}: {LORA}")
        elif path.is_dir():
            files = config_files(path)
            if not files:
                raise ConfigError(f"{label}: {EMPTY}")
            for file in files:
                self._file(file)
        elif path.suffix.lower() in SUFFIXES:
            self._file(path)
        elif is_container(path):
            self.models.append(model_from_source(path).located(where))
        else:
            weights = path.suffix in (".safetensors", ".bin", ".pt")
            fix = f"\n  fix: name the folder, {path.parent}" if weights else ""
            raise ConfigError(f"{label}: not a config file ({', '.join(SUFFIXES)}){fix}")

    def _file(self, path: Path) -> None:
        """Load a file, once even if links or folders lead to it again."""
        try:
            if (real := Path(os.path.realpath(path))) in self._seen:  # resolve() raises on a loop of links
                return
            self._seen.add(real)
            self.document(read(path))
        except ConfigError as error:
            self.report.problems.append(_with_fix(str(error)))

    def document(self, doc: Located) -> None:
        """Load one parsed file: a model, an app file or a Ray Serve config."""
        value = doc.value
        self.report.notes += [note for note in doc.repeated if note not in self.report.notes]
        if value is None:
            self.report.problem(doc, (), "an empty file, a config is expected", WANTED)
        elif not isinstance(value, dict):
            self.report.problem(doc, (), f"a mapping (`key: value`) is expected, got {got(value)}", WANTED)
        elif "applications" in value:
            self._serve_config(doc)
        elif any(key in value for key in ("models", "embedding_models", "trtllm_models")):
            self._app(doc)
        elif any(key in value for key in _MODEL_KEYS):
            self._model(doc)
        elif any(key in value for key in ("model_type", "architectures")):
            where = f"the folder, {doc.folder}" if doc.folder and doc.folder != Path() else "its folder"
            self.report.problem(doc, (), "the config.json of a checkpoint, not a config of a server", f"name {where}")
        else:
            key = next(iter(value), None)
            known = ["models", "applications", *_MODEL_KEYS]
            found = f"; {unknown_key(key, known)[0]}" if key else ""
            message = (
                "no config: an app file has `models:`, a model has `engine_config:`, a Serve config `applications:`"
            )
            fix = "begin a file with one of these keys, or name another file" if key else WANTED
            self.report.problem(doc, (key,) if key else (), message + found, fix)

    def _app(self, doc: Located) -> None:
        for key in doc.value:
            if key == "embedding_models":
                self.report.problem(
                    doc, (key,), "RayLLM's embedding engine is gone", f"list them in `models`; {EMBEDDING_FIX}"
                )
            elif key == "trtllm_models":
                self.report.problem(doc, (key,), "TensorRT-LLM is not served", f"list them in `models`; {TRTLLM_FIX}")
            elif key not in _APP_KEYS:
                self.report.problem(doc, (key,), *unknown_key(key, list(_APP_KEYS)))
        if doc.value.get("http") is not None:
            self._http(doc.at("http"))
        if doc.value.get("explorer") is not None:
            self._explorer(doc.at("explorer"))
        if "models" in doc.value:
            self._models(doc.at("models"))

    def _models(self, doc: Located) -> None:
        value = doc.value
        if value is None or value == [] or value == "":
            self.report.problem(doc, (), "no models are given", "list paths, folders, hub ids or models")
        for entry in [doc.at(index) for index in range(len(value))] if isinstance(value, list) else [doc]:
            if isinstance(entry.value, str) and entry.value:
                folders = [entry.folder or Path(), Path()]
                self.named(entry.value, entry.where(), list(dict.fromkeys(folders)), entry)
            elif isinstance(entry.value, dict):
                self._model(entry)
            elif entry.value not in (None, "") or isinstance(value, list):
                self.report.problem(entry, (), f"a path, folder, hub id or model is expected, got {got(entry.value)}")

    def _model(self, doc: Located) -> None:
        problems, notes = len(self.report.problems), len(self.report.notes)
        doc = replace(doc, value=copy.deepcopy(doc.value), moved={})
        model = None
        if migrate(doc, self.report):
            try:
                model = ModelConfig.model_validate(doc.value)
                self._resolve(model, doc)
            except ValidationError as error:
                self.report.invalid(doc, error, ModelConfig)
        self.report.sort(problems, notes)
        if model is None or len(self.report.problems) > problems:
            return
        if model.enabled:
            self.models.append(model.located(doc.where("engine_config")))
        else:
            self.disabled += 1

    def _resolve(self, model: ModelConfig, doc: Located) -> None:
        """Make paths in the model absolute; they start at its file, or else at the working directory."""
        engine = model.engine_config
        beside = (doc.folder or Path()) / engine.model_id
        if engine.hf_model_id is None and is_checkpoint(beside):
            engine.hf_model_id = str(beside.resolve())
        if engine.hf_model_id is not None:
            engine.hf_model_id = resolved(engine.hf_model_id, doc.folder)
            if Path(engine.hf_model_id).is_absolute():
                try:
                    engine.hf_model_id = str(snapshot_in(Path(engine.hf_model_id)))
                except CheckpointError as error:
                    self.report.problem(doc, ("engine_config", "hf_model_id"), *str(error).split("\n  fix: "))
                    return
        for adapter in engine.adapters:
            adapter.source = resolved(adapter.source, doc.folder)
        if engine.tokenizer_id is not None:
            engine.tokenizer_id = resolved(engine.tokenizer_id, doc.folder)
        template = engine.generation.chat_template
        if template is not None and not any(char in template for char in "{\n"):
            at = ("engine_config", "generation", "chat_template")
            path = Path(resolved(template, doc.folder))
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                self.report.problem(doc, at, f"the chat template {path} cannot be read: {error}")
                return
            engine.generation.chat_template = text

    def _http(self, doc: Located) -> None:
        try:
            http = HttpConfig.model_validate(doc.value)
        except ValidationError as error:
            self.report.invalid(doc, error, HttpConfig)
            return
        if http.api_keys_file:
            http.api_keys_file = resolved_file(http.api_keys_file, doc.folder)
        if http.access_log not in ("off", "stderr"):
            http.access_log = resolved_file(http.access_log, doc.folder)
        if self.http and self.http[0] != http:
            self.report.problem(doc, (), f"differs from `http` at {self.http[1].where()}", "keep one")
        self.http = (http, doc)

    def _explorer(self, doc: Located) -> None:
        try:
            explorer = ExplorerConfig.model_validate(doc.value)
        except ValidationError as error:
            self.report.invalid(doc, error, ExplorerConfig)
            return
        explorer.votes_file = os.path.abspath((doc.folder or Path()) / expand(explorer.votes_file))
        if self.explorer and self.explorer[0] != explorer:
            self.report.problem(doc, (), f"differs from `explorer` at {self.explorer[1].where()}", "keep one")
        self.explorer = (explorer, doc)

    def _serve_config(self, doc: Located) -> None:
        for key in doc.value:
            if key not in _SERVE_KEYS:
                self.report.problem(doc, (key,), *unknown_key(key, list(_SERVE_KEYS)))
            elif key not in ("applications", "http_options"):
                self.report.note(doc, (key,), f"`{key}` acts under `serve deploy` only")
        options = doc.value.get("http_options")
        if isinstance(options, dict):
            kept = {key: options[key] for key in ("host", "port") if key in options}
            self._http(replace(doc.at("http_options"), value=kept))
            for key in options.keys() - kept.keys():
                self.report.note(doc, ("http_options", key), f"`http_options.{key}` acts under `serve deploy` only")
        applications = doc.value["applications"]
        if not isinstance(applications, list) or not applications:
            self.report.problem(doc, ("applications",), f"a list of applications is expected, got {got(applications)}")
            return
        for index in range(len(applications)):
            self._application(doc.at("applications", index))

    def _application(self, doc: Located) -> None:
        value = doc.value
        if not isinstance(value, dict):
            self.report.problem(doc, (), f"an application is a mapping, got {got(value)}")
            return
        for key in value:
            if key not in _APPLICATION_KEYS:
                self.report.problem(doc, (key,), *unknown_key(key, list(_APPLICATION_KEYS)))
        path = value.get("import_path")
        if path in RAYLLM_IMPORT_PATHS:
            self.report.note(doc, ("import_path",), f"import_path `{path}` is now `{IMPORT_PATH}`")
        elif path != IMPORT_PATH:
            message = f"import_path {path!r} is no application of quantserve" if path else "`import_path` is missing"
            self.report.problem(doc, ("import_path",) if path else (), message, f"use import_path: {IMPORT_PATH}")
            return
        for key in ("deployments", "runtime_env"):
            if value.get(key):
                self.report.note(doc, (key,), f"`{key}` of an application acts under `serve deploy` only")
        args = value.get("args")
        if not isinstance(args, Mapping) or not args:
            self.report.problem(doc, ("args",) if "args" in value else (), "`args: {models: [...]}` is expected")
            return
        self._app(doc.at("args"))


def _with_fix(problem: str) -> str:
    """A problem with a source, and what to name instead where it does not say what to do."""
    return problem if "\n  fix: " in problem else f"{problem}\n  fix: {WANTED}"
