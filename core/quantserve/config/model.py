"""`ModelConfig`, one model, and `AppConfig`, all models of one server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from quantserve.config.adapters import AdapterConfig, adapter_faults
from quantserve.config.engine_args import LORA_RANKS, SINGLE, engine_argument_problem, frontend_argument_problem
from quantserve.config.explorer import ExplorerConfig
from quantserve.config.generation import Generation
from quantserve.config.paths import usable_id
from quantserve.config.report import Fault, fault, faults, got
from quantserve.config.schema import DeploymentConfig, HttpConfig, ScalingConfig, check_runtime_env
from quantserve.config.section import Section

DTYPES = {
    "auto": "auto",
    "half": "float16",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float": "float32",
    "float32": "float32",
}
DEFAULT_MAX_ONGOING_REQUESTS = 256
_COUNTS = ("max_num_seqs", "max_num_batched_tokens", "block_size", "max_loras", "max_cpu_loras")


class EngineConfig(Section):
    """What is loaded and how the engine runs it."""

    model_id: str = Field(description="Id of the model in the API.", examples=["TheBloke/Llama-2-7B-chat-AWQ"])
    hf_model_id: str | None = Field(
        default=None,
        description="Hugging Face id, folder, or s3:// or gs:// URL of the weights; default model_id. Relative to this "
        "file.",
    )
    revision: str | None = Field(
        default=None, description="Branch, tag or commit on the hub, default main; of a bucket the revision of `plan`."
    )
    tokenizer_id: str | None = Field(default=None, description="Hugging Face id or folder of another tokenizer.")
    model_url: str | None = Field(default=None, description="Home page of the model, shown by /v1/models.")
    model_description: str | None = Field(default=None, description="A sentence about the model, shown by /v1/models.")
    max_total_tokens: int | None = Field(
        default=None, ge=1, description="Context length, prompt and answer together; default what the checkpoint says."
    )
    engine_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="vLLM engine arguments by their Python names, e.g. quantization, max_num_seqs, dtype. "
        "They win over what plugins ask for.",
    )
    frontend_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of vLLM's OpenAI server, e.g. enable_auto_tool_choice and tool_call_parser.",
    )
    generation: Generation = Field(default_factory=lambda: Generation(), description="Prompting and request defaults.")
    runtime_env: dict[str, Any] | None = Field(
        default=None,
        description="Ray runtime environment of the replica and its workers: env_vars, pip, working_dir... Its "
        "env_vars win over what plugins ask for.",
    )
    adapters: list[AdapterConfig] = Field(
        default_factory=list, description="LoRA adapters served beside the model, each under its own name."
    )
    allow_pickle: bool = Field(
        default=False, description="Read .bin and .pt weights, with an unpickler that builds tensors and nothing else."
    )

    @field_validator("model_id")
    @classmethod
    def _usable_in_a_url(cls, value: str) -> str:
        return usable_id(value)

    @field_validator("hf_model_id", "tokenizer_id", "revision")
    @classmethod
    def _not_blank(cls, value: str | None) -> str | None:
        if value is not None and (not value.strip() or "\n" in value):
            raise fault("must not be empty or have several lines")
        return value

    @field_validator("runtime_env")
    @classmethod
    def _usable_runtime_env(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return check_runtime_env(value) if value else None

    @field_validator("frontend_kwargs")
    @classmethod
    def _frontend_arguments(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        found = [(name, *said) for name in kwargs if (said := frontend_argument_problem(name))[0]]
        if kwargs.get("enable_auto_tool_choice") and not kwargs.get("tool_call_parser"):
            fix = "name the parser for this model's calls, e.g. tool_call_parser: hermes"
            found.append(("enable_auto_tool_choice", "needs tool_call_parser", fix))
        if found:
            raise faults(found)
        return kwargs

    @field_validator("engine_kwargs")
    @classmethod
    def _engine_arguments(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        found = [(name, *said) for name in kwargs if (said := engine_argument_problem(name))[0]]
        found += [
            (name, f"no {kind} parallelism yet", "use scaling_config.num_workers")
            for name, kind in SINGLE.items()
            if kwargs.get(name) not in (None, 1)
        ]
        normalised, wrong = _checked(kwargs)
        if found or wrong:
            raise faults([*found, *wrong])
        return {**kwargs, **normalised}

    @model_validator(mode="after")
    def _adapters_fit(self) -> EngineConfig:
        found = list(adapter_faults(self.adapters, self.model_id, self.engine_kwargs, self.frontend_kwargs))
        if found:
            raise faults(found)
        return self

    @model_validator(mode="after")
    def _batch_holds_a_prompt(self) -> EngineConfig:
        kwargs, context = self.engine_kwargs, self.max_total_tokens
        budget = kwargs.get("max_num_batched_tokens")
        if kwargs.get("enable_chunked_prefill") is False and budget and context and budget < context:
            raise fault(
                f"max_num_batched_tokens {budget} is less than max_total_tokens {context}, and without chunked prefill "
                "a prompt has to fit into one step",
                at=("engine_kwargs", "max_num_batched_tokens"),
                fix="remove enable_chunked_prefill: false",
            )
        return self


def _checked(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    """The values quantserve itself relies on, normalised, and what is wrong with them."""
    result: dict[str, Any] = {}
    wrong: list[Fault] = []
    for name in (*_COUNTS, "max_lora_rank"):
        value = kwargs.get(name)
        if value is not None and (type(value) is not int or value < 1):
            wrong.append((name, f"must be a whole number of at least 1, got {got(value)}", ""))
        elif value is not None and name == "max_lora_rank" and value not in LORA_RANKS:
            wrong.append((name, f"must be one of {', '.join(map(str, LORA_RANKS))}, got {value}", ""))
    share = kwargs.get("gpu_memory_utilization")
    if share is not None and (isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1):
        wrong.append(("gpu_memory_utilization", f"must be a number above 0 and at most 1, got {got(share)}", ""))
    for name in ("quantization", "dtype"):
        value = kwargs.get(name)
        if isinstance(value, str) and value.strip():
            result[name] = value.strip().lower()
        elif value is not None:
            wrong.append((name, f"must be text, got {got(value)}", ""))
    if (dtype := result.get("dtype")) is not None:
        result["dtype"] = DTYPES.get(dtype)
        if dtype not in DTYPES:
            wrong.append(("dtype", f"unknown dtype {dtype!r} (known: {', '.join(DTYPES)})", ""))
    return result, wrong


class ModelConfig(Section):
    """One model: what is loaded, how it is deployed and over how many devices."""

    engine_config: EngineConfig = Field(description="What is loaded and how the engine runs it.")
    deployment_config: DeploymentConfig = Field(
        default_factory=lambda: DeploymentConfig(), description="Replicas, queues and health checks."
    )
    scaling_config: ScalingConfig = Field(
        default_factory=lambda: ScalingConfig(), description="Devices of one replica."
    )
    plugins: list[str] = Field(
        default_factory=list, description="Further plugins composed into this model, beside its method's."
    )
    enabled: bool = Field(default=True, description="false: the file is checked and then left out.")

    _where: str = PrivateAttr(default="<python>")

    @model_validator(mode="after")
    def _across_sections(self) -> ModelConfig:
        kwargs, deployment, gpus = self.engine_config.engine_kwargs, self.deployment_config, self.scaling_config
        if len(set(self.plugins)) != len(self.plugins):
            raise fault("a plugin is listed twice", at="plugins", fix="keep one")
        share, used = gpus.num_gpus_per_worker, kwargs.get("gpu_memory_utilization")
        if 0 < share < 1 and used is not None and used > share:
            raise fault(
                f"must not exceed scaling_config.num_gpus_per_worker ({share:g}), got {used:g}: "
                "models that share the GPU would run out of memory",
                at=("engine_config", "engine_kwargs", "gpu_memory_utilization"),
                fix="remove gpu_memory_utilization; it then follows num_gpus_per_worker",
            )
        limit = deployment.max_ongoing_requests or kwargs.get("max_num_seqs") or DEFAULT_MAX_ONGOING_REQUESTS
        deployment.max_ongoing_requests = limit
        if deployment.max_queued_requests is None:
            deployment.max_queued_requests = limit
        scaling = deployment.autoscaling_config
        if scaling and scaling.target_ongoing_requests is None:
            scaling.target_ongoing_requests = float(max(1, limit // 2))
        elif scaling and scaling.target_ongoing_requests and scaling.target_ongoing_requests > limit:
            raise fault(
                f"must not exceed engine_kwargs.max_num_seqs ({limit}), got {scaling.target_ongoing_requests:g}: "
                "a replica could never reach it, so no replicas would be added",
                at=("deployment_config", "autoscaling_config", "target_ongoing_requests"),
                fix=f"set it to about {max(1, limit // 2)}, or set max_ongoing_requests",
            )
        return self

    @property
    def model_id(self) -> str:
        """Id in the API."""
        return self.engine_config.model_id

    @property
    def source(self) -> str:
        """Checkpoint folder or hub id."""
        return self.engine_config.hf_model_id or self.engine_config.model_id

    @property
    def revision(self) -> str | None:
        """Branch, tag or commit on the hub."""
        return self.engine_config.revision

    @property
    def quantization(self) -> str | None:
        """The method the config names, in lower case; None means it is detected."""
        value = self.engine_config.engine_kwargs.get("quantization")
        return str(value) if value else None

    @property
    def tensor_parallel_size(self) -> int:
        """Devices that share every layer."""
        return self.scaling_config.num_workers

    @property
    def max_model_len(self) -> int | None:
        """Context length in tokens; None means what the checkpoint says."""
        return self.engine_config.max_total_tokens

    @property
    def dtype(self) -> str | None:
        """float16, bfloat16 or float32; None means what the checkpoint says."""
        value = self.engine_config.engine_kwargs.get("dtype")
        return None if value in (None, "auto") else str(value)

    @property
    def engine_kwargs(self) -> dict[str, Any]:
        """The user's vLLM engine arguments."""
        return self.engine_config.engine_kwargs

    @property
    def frontend_kwargs(self) -> dict[str, Any]:
        """The user's arguments for vLLM's OpenAI server."""
        return self.engine_config.frontend_kwargs

    @property
    def chat_template(self) -> str | None:
        """Jinja text that replaces the tokenizer's own template, or None."""
        return self.engine_config.generation.template()

    @property
    def chat_enabled(self) -> bool:
        """False when ``prompt_format: null`` turned chat off; the template then refuses as well."""
        return self.engine_config.generation.chat_enabled

    @property
    def request_defaults(self) -> dict[str, Any]:
        """Request fields and the values they get when a client leaves them out."""
        return self.engine_config.generation.request_defaults()

    @property
    def adapters(self) -> list[AdapterConfig]:
        """The LoRA adapters served beside the model."""
        return self.engine_config.adapters

    @property
    def allow_pickle(self) -> bool:
        """Whether .bin and .pt weights may be read."""
        return self.engine_config.allow_pickle

    @property
    def route(self) -> str:
        """Route prefix of the model's own application."""
        return "/" + self.model_id.replace("/", "--")

    @property
    def where(self) -> str:
        """``file:line`` of the model, or who made it."""
        return self._where

    def located(self, where: str) -> ModelConfig:
        """This model, remembering where it was written."""
        self._where = where
        return self


class AppConfig(BaseModel):
    """All models of one server.

    Attributes:
        models: the enabled ones; ids and routes are unique.
        http: where the API listens.
        explorer: the web page at ``/``.
        notes: what was migrated, dropped or looks unintended: ``file:line: ...``.
    """

    model_config = ConfigDict(extra="forbid", defer_build=True)

    models: list[ModelConfig] = Field(description="The models to serve.")
    http: HttpConfig = Field(default_factory=lambda: HttpConfig(), description="Where the API listens.")
    explorer: ExplorerConfig = Field(default_factory=lambda: ExplorerConfig(), description="The web page at `/`.")
    notes: list[str] = Field(default_factory=list, description="Remarks from loading.")
