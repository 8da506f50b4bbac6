"""Deployment, scaling and HTTP sections of the config."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from quantserve.config.report import fault, got, unknown_key
from quantserve.config.section import Section

ACCELERATOR_SHARE = 0.001
"""Amount of ``accelerator_type:X`` that a worker requests; only a constraint on the node."""

RUNTIME_ENV_KEYS = (
    "env_vars", "pip", "uv", "conda", "working_dir", "py_modules", "py_executable", "excludes", "config",
    "container", "image_uri", "nsight", "worker_process_setup_hook",
)  # fmt: skip


class AutoscalingConfig(Section):
    """When Ray Serve adds and removes replicas of one model."""

    min_replicas: int = Field(default=1, ge=0, description="Fewest replicas; 0 scales to zero when idle.")
    initial_replicas: int | None = Field(default=None, ge=0, description="Replicas at the start; default min_replicas.")
    max_replicas: int = Field(default=10, ge=1, description="Most replicas.")
    target_ongoing_requests: float | None = Field(
        default=None,
        gt=0,
        le=100_000,
        description="Target number of requests in progress per replica: above it replicas are added, below it removed. "
        "Default: half of max_ongoing_requests.",
    )
    upscale_delay_s: float | None = Field(
        default=None, ge=0, description="Seconds of high load before replicas are added; default 30."
    )
    downscale_delay_s: float | None = Field(
        default=None, ge=0, description="Seconds of low load before replicas are removed; default 600."
    )
    downscale_to_zero_delay_s: float | None = Field(
        default=None,
        ge=0,
        description="Seconds without load before the last replica is removed; default downscale_delay_s.",
    )
    upscaling_factor: float | None = Field(
        default=None, gt=0, description="Factor on the number of replicas added at once; default 1."
    )
    downscaling_factor: float | None = Field(
        default=None, gt=0, description="Factor on the number of replicas removed at once; default 1."
    )
    look_back_period_s: float | None = Field(
        default=None, gt=0, description="Window in seconds over which the load is averaged; default 30."
    )
    metrics_interval_s: float | None = Field(
        default=None,
        gt=0,
        description="Seconds between load reports; default 10. Deprecated by Ray in favour of the variables "
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S and RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S.",
    )
    aggregation_function: Literal["mean", "max", "min"] | None = Field(
        default=None, description="How the load reports in the window are combined; default mean."
    )

    @model_validator(mode="after")
    def _ordered(self) -> AutoscalingConfig:
        low, first, high = self.min_replicas, self.initial_replicas, self.max_replicas
        if "max_replicas" not in self.model_fields_set:
            high = self.max_replicas = max(high, low, first or 0)
        if low > high:
            raise fault(f"must not exceed max_replicas ({high}), got {low}", at="min_replicas")
        if first is not None and not low <= first <= high:
            raise fault(
                f"must be between min_replicas ({low}) and max_replicas ({high}), got {first}",
                at="initial_replicas",
            )
        interval = self.metrics_interval_s or 10.0
        if self.look_back_period_s is not None and self.look_back_period_s <= interval:
            raise fault(
                f"must be longer than metrics_interval_s ({interval:g}), got {self.look_back_period_s:g}: "
                "the window must contain more than one report",
                at="look_back_period_s",
            )
        return self


class RayActorOptions(Section):
    """Ray resources of the replica process itself, in addition to those of its workers."""

    num_cpus: float | None = Field(default=None, ge=0, description="CPUs of the replica.")
    num_gpus: float | None = Field(default=None, ge=0, description="Must be 0: GPUs are given in scaling_config.")
    memory: float | None = Field(
        default=None, gt=0, description="Bytes of main memory that Ray reserves for the replica."
    )
    resources: dict[str, float] | None = Field(default=None, description="Custom resources of the replica.")
    accelerator_type: str | None = Field(default=None, description="Ray accelerator type of the node, e.g. A100.")
    label_selector: dict[str, str] | None = Field(default=None, description="Labels the node must have.")

    @field_validator("num_gpus")
    @classmethod
    def _no_gpus(cls, value: float | None) -> float | None:
        if value:
            raise fault(
                f"must be 0, got {value:g}: GPUs belong to the workers",
                fix="remove it and set scaling_config.num_gpus_per_worker",
            )
        return value


class BackpressureConfig(Section):
    """The response to requests when the queue is full."""

    status_code: Literal[429, 503] = Field(default=429, description="HTTP status of the refusal.")
    retry_after_s: float | None = Field(default=None, ge=0, description="Value of the Retry-After header, in seconds.")


class DeploymentConfig(Section):
    """The Ray Serve deployment of one model."""

    autoscaling_config: AutoscalingConfig | None = Field(default=None, description="Scale the replicas with the load.")
    num_replicas: int | None = Field(default=None, ge=1, description="A fixed number of replicas; default 1.")
    max_ongoing_requests: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="Most requests in progress on one replica; further ones wait in the gateway's queue. "
        "Default: engine_kwargs.max_num_seqs, else 256.",
    )
    max_queued_requests: int | None = Field(
        default=None,
        ge=-1,
        description="Most requests in the queue; further ones are refused; -1 for no limit. "
        "Default: max_ongoing_requests.",
    )
    backpressure_config: BackpressureConfig = Field(
        default_factory=lambda: BackpressureConfig(), description="The response to requests when the queue is full."
    )
    affinity: Literal["none", "session", "prefix"] = Field(
        default="none",
        description="Which requests stay on the same replica, to reuse its prefix cache: those of one session "
        "(header x-session-id, `user` or `prompt_cache_key`), or also those whose prompts begin alike.",
    )
    ray_actor_options: RayActorOptions | None = Field(default=None, description="Resources of the replica itself.")
    health_check_period_s: float | None = Field(
        default=None, gt=0, description="Seconds between health checks; default 10."
    )
    health_check_timeout_s: float | None = Field(
        default=None, gt=0, description="Seconds a health check may take; default 30."
    )
    graceful_shutdown_timeout_s: float | None = Field(
        default=None,
        ge=0,
        description="Drain timeout: seconds a stopping replica has to finish its requests; default 20.",
    )
    graceful_shutdown_wait_loop_s: float | None = Field(
        default=None, gt=0, description="Seconds between checks whether they are finished; default 2."
    )
    max_constructor_retry_count: int | None = Field(default=None, ge=1, description="Attempts to start a replica.")
    max_surge_percent: int | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Rolling update: new replicas, in percent, that may start while the old ones still serve. "
        "Default: 100 without GPUs; 0 with GPUs, because spare GPUs are not certain.",
    )
    logging_config: dict[str, Any] | None = Field(default=None, description="Ray Serve logging of the replica.")

    @model_validator(mode="before")
    @classmethod
    def _named_elsewhere(cls, value: object) -> object:
        for key in ("placement_group_bundles", "placement_group_strategy"):
            if isinstance(value, dict) and key in value:
                raise fault("is computed from scaling_config and cannot be set", at=key, fix=f"remove {key}")
        if isinstance(value, dict) and value.get("num_replicas") == "auto":
            raise fault(
                '"auto" means a target of 2 requests per replica in Ray Serve, too few for an engine that batches',
                at="num_replicas",
                fix="write an autoscaling_config; its defaults follow max_ongoing_requests",
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> DeploymentConfig:
        scaling = self.autoscaling_config
        if scaling and self.num_replicas is not None:
            raise fault("num_replicas and autoscaling_config exclude each other", at="num_replicas", fix="keep one")
        target, limit = scaling.target_ongoing_requests if scaling else None, self.max_ongoing_requests
        if target and limit and target > limit:
            raise fault(
                f"must not exceed max_ongoing_requests ({limit}), got {target:g}: "
                "a replica could never reach it, so no replicas would be added",
                at=("autoscaling_config", "target_ongoing_requests"),
                fix=f"set it to about {max(1, limit // 2)}",
            )
        return self

    def serve_options(self) -> dict[str, Any]:
        """Options for ``ray.serve.deployment``, without what the plan computes (placement groups)."""
        options: dict[str, Any] = self.model_dump(exclude_none=True, exclude={"affinity"})
        if not self.autoscaling_config:
            options.setdefault("num_replicas", 1)
        return options


class ScalingConfig(Section):
    """The workers of one replica."""

    num_workers: int = Field(
        default=1, ge=1, le=1024, description="Workers per replica; this is the tensor parallel size."
    )
    num_gpus_per_worker: float = Field(
        default=1,
        ge=0,
        description="GPUs per worker: 1, or a fraction to let models share a GPU (one worker only). Ignored on a CPU; "
        "0 is refused on a GPU.",
    )
    num_cpus_per_worker: float = Field(default=1, ge=0, description="CPUs that Ray reserves for each worker.")
    placement_strategy: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = Field(
        default="PACK", description="How Ray places the workers; STRICT_PACK keeps them on one node."
    )
    resources_per_worker: dict[str, float] | None = Field(default=None, description="Custom Ray resources per worker.")
    accelerator_type: str | None = Field(
        default=None, description="Run on nodes with this accelerator only, by Ray's name: A10G, L4, A100, H100..."
    )

    @model_validator(mode="after")
    def _placeable(self) -> ScalingConfig:
        share = self.num_gpus_per_worker
        if share > 1:
            raise fault(
                f"must be at most 1, got {share:g}", at="num_gpus_per_worker", fix="use more num_workers of 1 GPU each"
            )
        if 0 < share < 1 and self.num_workers > 1:
            raise fault(
                f"{self.num_workers} workers with {share:g} GPU each could share one GPU, which NCCL does not allow",
                at="num_gpus_per_worker",
                fix="use 1 GPU per worker, or one worker",
            )
        for name, amount in (self.resources_per_worker or {}).items():
            if amount < 0:
                raise fault(f"must not be negative, got {amount:g}", at=("resources_per_worker", name))
            if name in ("CPU", "GPU"):
                key = f"num_{name.lower()}s_per_worker"
                raise fault(f"{name} is set by {key}", at=("resources_per_worker", name), fix="move the value there")
        if self.accelerator_type:
            wanted = {f"accelerator_type:{self.accelerator_type}": ACCELERATOR_SHARE}
            self.resources_per_worker = {**wanted, **(self.resources_per_worker or {})}
        return self


class HttpLimits(Section):
    """Limits, timeouts and buffers of the gateway.

    Attributes:
        max_body_mb, max_buffered_mb: MiB. max_head_kb, client_buffer_kb: KiB. Fields that end in _s: seconds.
    """

    cors_origins: list[str] = Field(
        default_factory=list,
        description='Origins whose web pages may call the API, e.g. https://chat.example.org; ["*"] for every origin.',
    )
    access_log: str = Field(
        default="stderr",
        min_length=1,
        description="One JSON line per request: off, stderr, or a file relative to this file.",
    )
    max_connections: int = Field(
        default=4096,
        ge=1,
        le=1_000_000,
        description="Most open client connections; a further one takes the place of an idle one, or gets 503.",
    )
    max_head_kb: int = Field(
        default=64, ge=4, le=1024, description="Largest request line and headers in KiB; larger ones get 431."
    )
    max_body_mb: int = Field(default=16, ge=1, le=1024, description="Largest request body in MiB; larger ones get 413.")
    max_buffered_mb: int = Field(
        default=256,
        ge=1,
        le=65536,
        description="Most MiB of request bodies held in memory at one time; a request beyond that gets 503.",
    )
    max_json_values: int = Field(
        default=50_000,
        ge=1000,
        description="Most values of a JSON body (numbers, texts, lists, objects), about; ten token ids count as one.",
    )
    max_requests_per_key: int | None = Field(
        default=None,
        ge=1,
        description="Most requests of one API key in progress or queued; further ones get 429. Default: no limit.",
    )
    max_messages: int = Field(default=2048, ge=1, description="Most messages of one chat.")
    max_prompts: int = Field(default=2048, ge=1, description="Most prompts or inputs of one request.")
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Most output tokens of a request, and the default of chats; default: the context length.",
    )
    max_choices: int = Field(default=128, ge=1, description="Largest `n` and `best_of`.")
    max_stops: int = Field(
        default=64, ge=1, description="Most stop texts, stop token ids or `bad_words` of one request."
    )
    head_timeout_s: float = Field(
        default=10,
        ge=0.01,
        le=3600,
        description="Seconds for a client to send the head of its first request, or of a later one it has begun.",
    )
    body_timeout_s: float = Field(
        default=60, ge=0.01, le=3600, description="Seconds for a client to send the body of a request; then 408."
    )
    send_timeout_s: float = Field(
        default=60,
        ge=0.01,
        le=3600,
        description="Seconds a client may accept no data while a response waits; then it is disconnected.",
    )
    keep_alive_s: float = Field(
        default=120,
        ge=0,
        le=86400,
        description="Seconds an idle client connection stays open. Above the clients' own: Go keeps connections 90 s.",
    )
    request_timeout_s: float = Field(
        default=600, ge=0.01, le=86400, description="Request timeout in seconds, queue included; then 504."
    )
    queue_timeout_s: float = Field(
        default=30,
        ge=0,
        le=86400,
        description="Queue timeout: seconds a request may wait for a replica; then it is refused.",
    )
    drain_timeout_s: float = Field(
        default=20, ge=0, le=86400, description="Drain timeout: seconds for requests in progress to finish at shutdown."
    )
    connect_timeout_s: float = Field(
        default=5, ge=0.01, le=60, description="Seconds for a connection to a replica; then another replica is tried."
    )
    replica_timeout_s: float = Field(
        default=15,
        ge=2,
        le=600,
        description="Seconds until a replica whose host has vanished counts as lost; a hanging one after 4 times that.",
    )
    max_attempts: int = Field(
        default=3, ge=1, le=10, description="Most replicas a request is tried on, until a part of its response is sent."
    )
    client_buffer_kb: int = Field(
        default=256,
        ge=16,
        le=65536,
        description="KiB of a response buffered for a slow client; then the replica pauses it.",
    )
    health_cache_s: float = Field(
        default=1, ge=0, le=60, description="Seconds the result of a health check is reused by `/health`."
    )

    @model_validator(mode="after")
    def _room_for_a_body(self) -> HttpLimits:
        if self.max_buffered_mb < self.max_body_mb:
            raise fault(
                f"max_buffered_mb ({self.max_buffered_mb}) must not be smaller than max_body_mb ({self.max_body_mb})",
                at="max_buffered_mb",
                fix="raise max_buffered_mb or lower max_body_mb",
            )
        return self

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: list[str]) -> list[str]:
        for index, origin in enumerate(origins):
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#*@]+", origin):
                raise fault(
                    f"{origin[:80]!r} is not an origin; write SCHEME://HOST or SCHEME://HOST:PORT, without a path",
                    at=(index,),
                    fix='write e.g. https://chat.example.org, or "*" alone for every origin',
                )
        if "*" in origins and len(origins) > 1:
            raise fault('"*" allows every origin and makes the others redundant', fix='keep "*" or the others')
        return origins


class HttpConfig(HttpLimits):
    """Address, access, limits and timeouts of the API."""

    host: str = Field(default="127.0.0.1", min_length=1, description="Address to bind; 0.0.0.0 for every interface.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port; 0 picks a free one.")
    api_keys_file: str | None = Field(
        default=None,
        description="File with one API key per line; relative to this file. Reloaded when it changes.",
    )


def check_runtime_env(env: dict[str, Any]) -> dict[str, Any]:
    """Check a Ray runtime environment: known keys, text values, and no variable that quantserve sets itself."""
    for key in env:
        if key not in RUNTIME_ENV_KEYS:
            raise fault(unknown_key(key, list(RUNTIME_ENV_KEYS))[0], at=key)
    if len(several := [key for key in ("pip", "uv", "conda") if env.get(key)]) > 1:
        raise fault(f"{' and '.join(several)} exclude each other", at=several[1], fix="keep one")
    variables = env.get("env_vars") or {}
    if not isinstance(variables, dict):
        raise fault(f"must be a mapping (`NAME: value`), got {got(variables)}", at="env_vars")
    for name, value in variables.items():
        if not isinstance(value, str):
            at = ("env_vars", name)
            raise fault(f"must be text, got {got(value)}", at=at, fix="put the value in quotes")
    if "VLLM_PLUGINS" in variables:
        raise fault(
            "is set by quantserve to the plugins of this model",
            at=("env_vars", "VLLM_PLUGINS"),
            fix="list the plugin under `plugins:`",
        )
    return env
