"""Converts RayLLM 0.5 model configs, with a note for every key that changed its name, place or meaning.

Works on plain values before validation, so that the schema contains the current names only. Features without a
successor (the TensorRT-LLM and embedding engines, weight mirrors) are problems, not notes.
"""

from __future__ import annotations

from typing import Any, Final

from quantserve.config.engine_args import REMOVED, unverifiable
from quantserve.config.report import Report
from quantserve.config.source import KeyPath, Located, is_rayllm
from quantserve.system.homes import is_bucket

RAYLLM_CONTEXT: Final = 2048
"""Default of ``max_total_tokens`` in RayLLM."""

LARGE_BATCH: Final = 8192

ACCELERATORS: Final = {
    "a10": "A10G", "a10g": "A10G", "a100": "A100", "a100_40g": "A100", "a100_80g": "A100", "a100_80g_aws": "A100",
    "h100": "H100", "h200": "H200", "l4": "L4", "l40s": "L40S", "t4": "T4", "v100": "V100", "cpu": "",
}  # fmt: skip
"""RayLLM's ``accelerator_type_<name>`` -> Ray's name; "" if Ray detects no such resource."""

EMBEDDING_FIX: Final = (
    "remove type, optimize, max_batch_size and batch_wait_timeout_s, and set engine_kwargs: {runner: pooling}; "
    "vLLM serves the model at /v1/embeddings"
)
TRTLLM_FIX: Final = "set hf_model_id to the Hugging Face checkpoint, and remove type and the TensorRT-LLM keys"
_ENGINE_KEYS: Final = {
    "EmbeddingEngine": ("optimize", "max_batch_size", "batch_wait_timeout_s"),
    "TRTLLMEngine": (
        "model_local_path", "scheduler_policy", "logger_level", "max_num_sequences", "max_tokens_in_paged_kv_cache",
        "kv_cache_free_gpu_mem_fraction", "enable_trt_overlap",
    ),
}  # fmt: skip
_UNUSED_GENERATE_KWARGS: Final = {
    "return_token_type_ids": "is a tokenizer argument without effect on generation",
    "early_stopping": "belongs to beam search",
    "num_beams": "belongs to beam search",
    "pad_token_id": "is taken from the tokenizer",
    "eos_token_id": "is taken from the checkpoint; put further ids into stopping_sequences",
}


def migrate(doc: Located, report: Report) -> bool:
    """Rewrite the model in `doc` in place; False if its engine is no longer supported."""
    model = doc.value
    _drop_nulls(model, keep={("engine_config", "generation", "prompt_format")})
    work = _Migration(doc, report)
    engine = work.section("engine_config")
    if not work.engine_is_served(engine):
        return False
    rayllm = is_rayllm(model)
    work.engine(engine)
    work.engine_kwargs(work.section("engine_config", "engine_kwargs"), engine)
    work.generation(work.section("engine_config", "generation"))
    work.deployment()
    work.scaling()
    work.drop((), "multiplex_config", "RayLLM never used it")
    work.lora()
    if rayllm and "max_total_tokens" not in engine:
        engine["max_total_tokens"] = RAYLLM_CONTEXT
        report.note(
            doc,
            ("engine_config",),
            f"engine_config.max_total_tokens is missing: RayLLM's default {RAYLLM_CONTEXT} is used "
            "(without `type` or `model_type` the default is the checkpoint's context length)",
        )
    return True


def _drop_nulls(value: object, keep: set[KeyPath], path: KeyPath = ()) -> None:
    """Remove keys with a null value, except where null has a meaning, and inside free-form mappings."""
    if not isinstance(value, dict) or path[-1:] in (("engine_kwargs",), ("frontend_kwargs",), ("runtime_env",)):
        return
    for key in list(value):
        if value[key] is None and (*path, key) not in keep:
            del value[key]
        else:
            _drop_nulls(value.get(key), keep, (*path, key))


class _Migration:
    def __init__(self, doc: Located, report: Report) -> None:
        self.doc, self.report = doc, report

    def section(self, *path: str) -> dict[str, Any]:
        """The mapping at `path`; an empty one if it is missing or not a mapping."""
        value: Any = self.doc.value
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        return value if isinstance(value, dict) else {}

    def note(self, path: KeyPath, message: str) -> None:
        self.report.note(self.doc, path, message)

    def drop(self, path: tuple[str, ...], key: str, why: str) -> Any:
        """Remove a key that no longer has an effect, with a note."""
        section = self.section(*path)
        if key not in section:
            return None
        self.note((*path, key), f"`{self.doc.name(*path, key)}` is ignored: {why}")
        return section.pop(key)

    def rename(
        self, path: tuple[str, ...], old: str, new: str, into: tuple[str, ...] | None = None, quiet: bool = False
    ) -> None:
        """Move ``path.old`` to ``(into or path).new``; if both exist, that is a problem."""
        target_path = path if into is None else into
        source = self.section(*path)
        if old not in source:
            return
        target, value = self._ensure(target_path), source.pop(old)
        shown = new if into is None else self.doc.name(*target_path, new)
        if target is None:
            return
        if new in target:
            message = f"is the old name of `{shown}`, and both are set"
            self.report.problem(self.doc, (*path, old), message, f"remove `{old}`")
            return
        target[new] = value
        if not quiet:
            self.note((*path, old), f"`{old}` is now `{shown}`")
        self.doc.moved[(*target_path, new)] = (*path, old)

    def _ensure(self, path: tuple[str, ...]) -> dict[str, Any] | None:
        value: Any = self.doc.value
        for part in path:
            if not isinstance(value, dict):
                return None
            value = value.setdefault(part, {})
        return value if isinstance(value, dict) else None

    def engine_is_served(self, engine: dict[str, Any]) -> bool:
        kind = str(engine.get("type"))
        if kind not in _ENGINE_KEYS:
            if engine.get("model_type") == "embedding":
                kind = "EmbeddingEngine"
            else:
                return True
        name, fix = ("TensorRT-LLM", TRTLLM_FIX) if kind == "TRTLLMEngine" else ("embedding", EMBEDDING_FIX)
        present = [key for key in _ENGINE_KEYS[kind] if key in engine]
        lost = f"; these keys belong to it: {', '.join(present)}" if present else ""
        at = "type" if "type" in engine else "model_type"
        self.report.problem(
            self.doc,
            ("engine_config", at),
            f"RayLLM's {name} engine is not supported; vLLM is the only engine{lost}",
            fix,
        )
        return False

    def engine(self, engine: dict[str, Any]) -> None:
        at = ("engine_config",)
        rayllm = "type" in engine
        if engine.get("type", "VLLMEngine") == "VLLMEngine":
            self.drop(at, "type", "vLLM is the only engine")
        else:
            message = f"unknown engine {engine.pop('type')!r}"
            self.report.problem(self.doc, (*at, "type"), message, "remove the line; vLLM is the only engine")
        self.drop(at, "model_type", "the task of a model is detected from its checkpoint")
        for key in ("env_vars_to_propogate", "env_vars_to_propagate"):
            self.drop(at, key, "set the variables in engine_config.runtime_env.env_vars (HF_TOKEN is inherited)")
        if rayllm and "tokenizer_id" in engine:
            self.note((*at, "tokenizer_id"), "`tokenizer_id` takes effect now; RayLLM used it for embeddings only")
        for key in ("s3_mirror_config", "gcs_mirror_config"):
            if key in engine:
                self._mirror(engine, key)

    def _mirror(self, engine: dict[str, Any], key: str) -> None:
        """A bucket that RayLLM copied the weights from is the source of the model."""
        mirror = engine.pop(key)
        uri = mirror.get("bucket_uri") if isinstance(mirror, dict) else None
        at = ("engine_config", key)
        if not isinstance(uri, str) or not is_bucket(uri):
            self.report.problem(
                self.doc, at, "names no bucket: bucket_uri is missing, or begins with neither s3:// nor gs://",
                "set hf_model_id to the URL of the folder, s3://BUCKET/FOLDER",
            )  # fmt: skip
            return
        engine["hf_model_id"] = uri
        self.note(at, f"`{key}.bucket_uri` is now `hf_model_id: {uri}`; the bucket's credentials come from the shell")

    def lora(self) -> None:
        """Ray Serve LLM's ``lora_config``, whose adapters are found in a bucket when a request names one."""
        lora = self.section("lora_config")
        if "lora_config" not in self.doc.value:
            return
        self.doc.value.pop("lora_config")
        path = lora.get("dynamic_lora_loading_path")
        place = f"{str(path).rstrip('/')}/NAME" if path else "FOLDER"
        self.report.problem(
            self.doc,
            ("lora_config",),
            "adapters are not looked up when a request names them: they are checked before the start",
            f"list them: engine_config.adapters: [{{name: NAME, source: {place}}}]; max_num_adapters_per_replica is "
            "engine_kwargs.max_loras",
        )

    def engine_kwargs(self, kwargs: dict[str, Any], engine: dict[str, Any]) -> None:
        at = ("engine_config", "engine_kwargs")
        for key, why in REMOVED.items():
            self.drop(at, key, why)
        self.rename(at, "max_log_len", "max_log_len", into=("engine_config", "frontend_kwargs"))
        if "disable_log_requests" in kwargs:
            quiet = kwargs["disable_log_requests"]
            if isinstance(quiet, bool):
                kwargs["disable_log_requests"] = not quiet
                self.note((*at, "disable_log_requests"), f"`disable_log_requests: {str(quiet).lower()}` is now "
                          f"`enable_log_requests: {str(not quiet).lower()}`")  # fmt: skip
            self.rename(at, "disable_log_requests", "enable_log_requests", quiet=True)
        if kwargs.get("disable_log_stats") is True:
            self.note((*at, "disable_log_stats"), "`disable_log_stats: true` leaves /metrics without engine metrics")
        if "load_s3_path" in kwargs:
            kwargs.pop("load_s3_path")
            self.report.problem(
                self.doc,
                (*at, "load_s3_path"),
                "is a feature of Anyscale's private vLLM and does not exist in vLLM",
                "copy the weights to a folder and set hf_model_id to it; load_format: sharded_state reads "
                "weights that were saved per GPU",
            )
        budget, context = kwargs.get("max_num_batched_tokens"), engine.get("max_total_tokens")
        if type(budget) is int and budget > LARGE_BATCH:
            room = f" of up to {context} tokens" if type(context) is int else ""
            self.note(
                (*at, "max_num_batched_tokens"),
                f"`max_num_batched_tokens: {budget}` has a new meaning: in RayLLM's vLLM a whole prompt{room} had to "
                "fit; now it is the token budget of one engine step, and longer prompts are split into chunks. A large "
                "budget costs memory and delays other requests (usual: 2048 to 8192; without it vLLM chooses)",
            )
        for name in kwargs:
            if unverifiable(name):
                self.note(
                    (*at, name),
                    f"`{name}` is not an engine argument of vLLM 0.32; no vLLM is installed to check it against",
                )

    def generation(self, generation: dict[str, Any]) -> None:
        at = ("engine_config", "generation", "generate_kwargs")
        kwargs = generation.get("generate_kwargs")
        if isinstance(kwargs, dict):
            self.rename(at, "max_new_tokens", "max_tokens")
            for key, why in _UNUSED_GENERATE_KWARGS.items():
                self.drop(at, key, f"it {why}")
            sample = self.drop(at, "do_sample", "temperature controls sampling")
            if sample is False and kwargs.setdefault("temperature", 0) != 0:
                message = (
                    f"`do_sample: false` means greedy decoding, which contradicts temperature {kwargs['temperature']}"
                )
                self.report.problem(self.doc, (*at, "temperature"), message, "remove one of the two")
        stops = generation.get("stopping_sequences")
        if isinstance(stops, str | int) and not isinstance(stops, bool):
            generation["stopping_sequences"] = stops = [stops]
        for index, stop in enumerate(stops if isinstance(stops, list) else ()):
            value = stop[0] if isinstance(stop, list) and len(stop) == 1 else stop
            if isinstance(value, str) and value.isascii() and value.isdigit():
                generation["stopping_sequences"][index] = int(value[:18])
                self.note(
                    ("engine_config", "generation", "stopping_sequences", index),
                    f"stopping sequence {value[:18]!r} is used as a token id, like in RayLLM; "
                    "to stop at the text, move it to generate_kwargs.stop",
                )

    def deployment(self) -> None:
        at = ("deployment_config",)
        self.rename(at, "max_concurrent_queries", "max_ongoing_requests")
        scaling = (*at, "autoscaling_config")
        self.rename(scaling, "target_num_ongoing_requests_per_replica", "target_ongoing_requests")
        self.rename(scaling, "upscale_smoothing_factor", "upscaling_factor")
        self.rename(scaling, "downscale_smoothing_factor", "downscaling_factor")
        self._smoothing(self.section(*scaling), scaling)
        actor = (*at, "ray_actor_options")
        if "runtime_env" in self.section(*actor):
            self.rename(actor, "runtime_env", "runtime_env", into=("engine_config",))
        self._accelerators((*actor, "resources"))
        seqs = self.section("engine_config", "engine_kwargs").get("max_num_seqs")
        target = self.section(*scaling).get("target_ongoing_requests")
        if type(seqs) is int and isinstance(target, int | float) and target > seqs:
            self.note(
                (*scaling, "target_ongoing_requests"),
                f"target_ongoing_requests ({target:g}) exceeds max_num_seqs ({seqs}): requests will queue in the "
                "engine before a replica is added",
            )

    def _smoothing(self, scaling: dict[str, Any], path: tuple[str, ...]) -> None:
        if "smoothing_factor" not in scaling:
            return
        value = scaling.pop("smoothing_factor")
        self.note((*path, "smoothing_factor"), "`smoothing_factor` is now `upscaling_factor` and `downscaling_factor`")
        for new in ("upscaling_factor", "downscaling_factor"):
            if new not in scaling:
                scaling[new] = value
                self.doc.moved[(*path, new)] = (*path, "smoothing_factor")

    def scaling(self) -> None:
        at = ("scaling_config",)
        self.drop(at, "pg_timeout_s", "RayLLM never used it; Ray waits for resources and reports that")
        self._accelerators((*at, "resources_per_worker"))

    def _accelerators(self, path: tuple[str, ...]) -> None:
        resources = self.section(*path)
        for key in [name for name in resources if name.startswith("accelerator_type_")]:
            name = key.removeprefix("accelerator_type_")
            detected = ACCELERATORS.get(name.lower(), name.upper())
            if not detected:
                self.drop(path, key, "Ray has no such resource on CPU nodes")
                continue
            new = f"accelerator_type:{detected}"
            lost = " (without the memory size)" if name.lower().startswith("a100_") else ""
            self.note((*path, key), f"`{key}` is now `{new}`, which Ray detects automatically{lost}")
            self.rename(path, key, new, quiet=True)
