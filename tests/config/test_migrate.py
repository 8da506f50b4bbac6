# ruff: noqa: E501
"""RayLLM 0.5 configs load, keep their meaning, and say what changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from quantserve.config import AppConfig, ModelConfig, load
from quantserve.errors import ConfigError

Write = Callable[..., Path]
LoadApp = Callable[[str], AppConfig]
LoadModel = Callable[[str], ModelConfig]
LoadError = Callable[[str], list[str]]

COMPLETE = """\
deployment_config:
  autoscaling_config:
    min_replicas: 1
    initial_replicas: 2
    max_replicas: 8
    target_num_ongoing_requests_per_replica: 24
    metrics_interval_s: 10.0
    look_back_period_s: 30.0
    smoothing_factor: 0.6
    upscale_smoothing_factor: 0.9
    downscale_smoothing_factor: 0.5
    downscale_delay_s: 300.0
    upscale_delay_s: 15.0
  max_concurrent_queries: 64
  ray_actor_options:
    num_cpus: 1
    num_gpus: 0
    resources:
      accelerator_type_a10: 0.01
engine_config:
  model_id: meta-llama/Llama-2-7b-chat-hf
  hf_model_id: meta-llama/Llama-2-7b-chat-hf
  type: VLLMEngine
  model_type: text-generation
  tokenizer_id: meta-llama/Llama-2-7b-hf
  model_url: https://huggingface.co/meta-llama/Llama-2-7b-chat-hf
  model_description: Llama-2
  s3_mirror_config: null
  gcs_mirror_config:
  engine_kwargs:
    quantization: awq
    trust_remote_code: true
    max_num_batched_tokens: 65536
    max_num_seqs: 64
    gpu_memory_utilization: 0.95
    swap_space: 4
    max_paddings: 256
    worker_use_ray: true
    engine_use_ray: false
    max_log_len: 64
    disable_log_requests: true
    disable_log_stats: false
  max_total_tokens: 4096
  runtime_env:
    env_vars: {HF_HUB_ENABLE_HF_TRANSFER: "1"}
  env_vars_to_propogate: [HUGGING_FACE_HUB_TOKEN]
  generation:
    prompt_format:
      system: "<<SYS>>\\n{instruction}\\n<</SYS>>\\n\\n"
      assistant: " {instruction} </s><s>"
      trailing_assistant: ""
      user: "[INST] {system}{instruction} [/INST]"
      default_system_message: ""
      system_in_user: true
      add_system_tags_even_if_message_is_empty: false
      strip_whitespace: true
    generate_kwargs: {do_sample: true, temperature: 0.4, top_p: 0.9, return_token_type_ids: false, max_new_tokens: 99}
    stopping_sequences: ["<unk>", 2, [13], "50256"]
scaling_config:
  num_workers: 2
  num_gpus_per_worker: 1
  num_cpus_per_worker: 8
  placement_strategy: "STRICT_PACK"
  resources_per_worker:
    accelerator_type_a100_80g: 0.01
    my_resource: 2
  pg_timeout_s: 600
multiplex_config: {max_num_models_per_replica: 4}
enabled: true
"""
"""Every key of RayLLM 0.5's vLLM model schema."""


def test_complete_schema_loads_and_keeps_its_meaning(load_model: LoadModel) -> None:
    model = load_model(COMPLETE)
    assert model.deployment_config.serve_options() == {
        "autoscaling_config": {
            "min_replicas": 1,
            "initial_replicas": 2,
            "max_replicas": 8,
            "target_ongoing_requests": 24.0,
            "upscale_delay_s": 15.0,
            "downscale_delay_s": 300.0,
            "upscaling_factor": 0.9,
            "downscaling_factor": 0.5,
            "look_back_period_s": 30.0,
            "metrics_interval_s": 10.0,
        },
        "max_ongoing_requests": 64,
        "max_queued_requests": 64,
        "backpressure_config": {"status_code": 429},
        "ray_actor_options": {"num_cpus": 1.0, "num_gpus": 0.0, "resources": {"accelerator_type:A10G": 0.01}},
    }
    assert model.engine_kwargs == {
        "quantization": "awq",
        "trust_remote_code": True,
        "max_num_batched_tokens": 65536,
        "max_num_seqs": 64,
        "gpu_memory_utilization": 0.95,
        "enable_log_requests": False,
        "disable_log_stats": False,
    }
    assert model.frontend_kwargs == {"max_log_len": 64}
    assert (model.tensor_parallel_size, model.max_model_len) == (2, 4096)
    assert model.scaling_config.resources_per_worker == {"accelerator_type:A100": 0.01, "my_resource": 2}
    assert model.request_defaults == {
        "max_tokens": 99,
        "temperature": 0.4,
        "top_p": 0.9,
        "stop": ["<unk>"],
        "stop_token_ids": [2, 13, 50256],
        "add_special_tokens": True,
    }
    assert model.engine_config.runtime_env == {"env_vars": {"HF_HUB_ENABLE_HF_TRANSFER": "1"}}
    assert model.engine_config.tokenizer_id == "meta-llama/Llama-2-7b-hf"


def test_every_change_is_noted_with_its_line(load_app: LoadApp, tmp_path: Path) -> None:
    notes = [note.removeprefix(f"{tmp_path}/model.yaml:") for note in load_app(COMPLETE).notes]
    lines = COMPLETE.splitlines()
    expected = {
        "target_num_ongoing_requests_per_replica": "is now `target_ongoing_requests`",
        "smoothing_factor": "is now `upscaling_factor` and `downscaling_factor`",
        "upscale_smoothing_factor": "is now `upscaling_factor`",
        "downscale_smoothing_factor": "is now `downscaling_factor`",
        "max_concurrent_queries": "`max_concurrent_queries` is now `max_ongoing_requests`",
        "accelerator_type_a10": "is now `accelerator_type:A10G`, which Ray detects automatically",
        "type": "is ignored: vLLM is the only engine",
        "model_type": "is ignored",
        "tokenizer_id": "takes effect now",
        "max_num_batched_tokens": "has a new meaning: in RayLLM's vLLM a whole prompt of up to 4096 tokens had to fit",
        "swap_space": "is ignored: vLLM recomputes",
        "max_paddings": "is ignored",
        "worker_use_ray": "is ignored",
        "engine_use_ray": "is ignored",
        "max_log_len": "is now `engine_config.frontend_kwargs.max_log_len`",
        "disable_log_requests": "`disable_log_requests: true` is now `enable_log_requests: false`",
        "env_vars_to_propogate": "set the variables in engine_config.runtime_env.env_vars",
        "accelerator_type_a100_80g": "`accelerator_type:A100`, which Ray detects automatically (without the memory size)",
        "pg_timeout_s": "is ignored: RayLLM never used it",
        "multiplex_config": "is ignored: RayLLM never used it",
    }
    for key, text in expected.items():
        line = next(n for n, content in enumerate(lines, 1) if content.strip().startswith(f"{key}:"))
        assert any(note.startswith(f"{line}: ") and text in note for note in notes), (key, line, notes)
    generate = next(n for n, content in enumerate(lines, 1) if "generate_kwargs" in content)
    assert sum(note.startswith(f"{generate}: ") for note in notes) == 3
    assert any("'50256' is used as a token id" in note for note in notes)
    assert len(notes) == len(expected) + 4
    assert [int(note.split(":")[0]) for note in notes] == sorted(int(note.split(":")[0]) for note in notes)


def test_todays_file_has_no_notes(load_app: LoadApp) -> None:
    assert load_app("engine_config: {model_id: a, engine_kwargs: {max_num_batched_tokens: 8192}}").notes == []


@pytest.mark.parametrize(
    ("old", "new", "section"),
    [
        ("max_concurrent_queries: 5", "max_ongoing_requests: 6", "deployment_config: {%s}"),
        ("target_num_ongoing_requests_per_replica: 5", "target_ongoing_requests: 6",
         "deployment_config: {autoscaling_config: {%s}}"),
        ("upscale_smoothing_factor: 1", "upscaling_factor: 2", "deployment_config: {autoscaling_config: {%s}}"),
        ("accelerator_type_a10: 1", '"accelerator_type:A10G": 2', "scaling_config: {resources_per_worker: {%s}}"),
    ],
)  # fmt: skip
def test_old_and_new_name_together(load_error: LoadError, old: str, new: str, section: str) -> None:
    (found,) = load_error("engine_config: {model_id: a}\n" + section % f"{old}, {new}")
    assert "is the old name of" in found
    assert "both are set" in found


def test_mistake_under_an_old_name_is_shown_under_that_name(load_error: LoadError) -> None:
    (found,) = load_error("engine_config: {model_id: a}\ndeployment_config:\n\n  max_concurrent_queries: many\n")
    assert found == ("4: deployment_config.max_concurrent_queries: must be a whole number, got the text 'many'")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{model_id: a, type: TRTLLMEngine, model_local_path: /x, scheduler_policy: MAX_UTILIZATION}",
         "1: engine_config.type: RayLLM's TensorRT-LLM engine is not supported; vLLM is the only engine; these keys belong "
         "to it: model_local_path, scheduler_policy; fix: set hf_model_id to the Hugging Face checkpoint"),
        ("{model_id: a, type: EmbeddingEngine, optimize: onnx, max_batch_size: 4, batch_wait_timeout_s: 0.1}",
         "embedding engine is not supported; vLLM is the only engine; these keys belong to it: optimize, max_batch_size, "
         "batch_wait_timeout_s; "
         "fix: remove type, optimize, max_batch_size and batch_wait_timeout_s, and set engine_kwargs: {runner: pooling}"),
        ("{model_id: a, model_type: embedding}", "1: engine_config.model_type: RayLLM's embedding engine is not"),
        ("{model_id: a, type: SGLang}", "1: engine_config.type: unknown engine 'SGLang'; fix: remove the line"),
        ("{model_id: a, s3_mirror_config: {s3_sync_args: []}}", "1: engine_config.s3_mirror_config: names no bucket"),
        ("{model_id: a, engine_kwargs: {load_s3_path: x}}", "a feature of Anyscale's private vLLM"),
        ("{model_id: a, engine_kwargs: {disable_log_requests: true, enable_log_requests: true}}", "both are set"),
        ("{model_id: a, generation: {generate_kwargs: {do_sample: false, temperature: 0.5}}}", "means greedy decoding"),
    ],
)  # fmt: skip
def test_features_without_a_successor_are_errors(load_error: LoadError, text: str, expected: str) -> None:
    (found,) = load_error("engine_config: " + text)
    assert expected in found


def test_context_of_a_rayllm_file(load_app: LoadApp) -> None:
    app = load_app("engine_config: {model_id: a, type: VLLMEngine}")
    assert app.models[0].max_model_len == 2048
    assert any("RayLLM's default 2048 is used" in note for note in app.notes)
    assert load_app("engine_config: {model_id: a}").models[0].max_model_len is None


def test_smoothing_yields_to_the_specific_factor(load_model: LoadModel) -> None:
    model = load_model(
        "engine_config: {model_id: a}\n"
        "deployment_config: {autoscaling_config: {smoothing_factor: 0.6, downscale_smoothing_factor: 0.2}}"
    )
    scaling = model.deployment_config.autoscaling_config
    assert scaling is not None
    assert (scaling.upscaling_factor, scaling.downscaling_factor) == (0.6, 0.2)


def test_greedy_and_disabled_chat(load_model: LoadModel) -> None:
    model = load_model(
        "engine_config: {model_id: a, generation: {prompt_format: null, generate_kwargs: {do_sample: false}}}"
    )
    assert model.request_defaults == {"temperature": 0}
    assert not model.chat_enabled
    assert "does not support chat" in (model.chat_template or "")


def test_runtime_env_of_the_replica_moves(load_model: LoadModel) -> None:
    model = load_model(
        "engine_config: {model_id: a}\n"
        "deployment_config: {ray_actor_options: {runtime_env: {env_vars: {A: b}}, num_cpus: 2}}"
    )
    assert model.engine_config.runtime_env == {"env_vars": {"A": "b"}}
    assert model.deployment_config.serve_options()["ray_actor_options"] == {"num_cpus": 2.0}


def test_a_target_beyond_the_batch_is_noted(load_app: LoadApp) -> None:
    app = load_app(
        "engine_config: {model_id: a, engine_kwargs: {max_num_seqs: 64}}\n"
        "deployment_config: {max_ongoing_requests: 3000, autoscaling_config: {target_ongoing_requests: 200}}"
    )
    assert any("target_ongoing_requests (200) exceeds max_num_seqs (64)" in note for note in app.notes)


def test_cpu_accelerator_is_dropped(load_app: LoadApp) -> None:
    app = load_app("engine_config: {model_id: a}\nscaling_config: {resources_per_worker: {accelerator_type_cpu: 0.01}}")
    assert app.models[0].scaling_config.resources_per_worker == {}
    assert len(app.notes) == 1


SERVE_CONFIG = """\
applications:
- name: ray-llm
  route_prefix: /
  import_path: rayllm.backend:router_application
  args:
    models: ./models
"""


def test_serve_config_layout(write: Write) -> None:
    write("engine_config: {model_id: one}", "models/one.yaml")
    write("engine_config: {model_id: two}", "models/deep/two.yml")
    write('{"engine_config": {"model_id": "three"}}', "models/deep/three.json")
    write("engine_config: {model_id: unused}\nenabled: false", "models/off.yaml")
    app = load([write(SERVE_CONFIG, "serve.yaml")])
    assert sorted(model.model_id for model in app.models) == ["one", "three", "two"]
    (note,) = app.notes
    assert "serve.yaml:4: import_path `rayllm.backend:router_application` is now `quantserve.serve.app:build`" in note


def test_serve_config_with_http_and_inline_models(write: Write) -> None:
    text = """
        http_options: {host: 0.0.0.0, port: 8123, request_timeout_s: 5}
        proxy_location: EveryNode
        applications:
        - name: a
          import_path: quantserve.serve.app:build
          args:
            models:
            - engine_config: {model_id: one}
            - |
              engine_config:
                model_id: two
    """
    app = load([write(text)])
    assert [model.model_id for model in app.models] == ["one", "two"]
    assert (app.http.host, app.http.port) == ("0.0.0.0", 8123)
    assert len(app.notes) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("applications: []", "1: applications: a list of applications is expected"),
        ("applications: [3]", "1: applications[0]: an application is a mapping, got the number 3"),
        ("applications: [{name: x}]", "1: applications[0]: `import_path` is missing; fix: use import_path: quantserve.ser"),
        ("applications: [{import_path: my.app}]", "applications[0].import_path: import_path 'my.app' is no application"),
        ("applications: [{import_path: 'quantserve.serve.app:build'}]", "`args: {models: [...]}` is expected"),
        ("applications: [{import_path: 'quantserve.serve.app:build', arg: {}}]", "unknown key `arg`; did you mean `args`"),
        ("applications: [{import_path: 'rayllm.backend:router_application', args: {embedding_models: x}}]",
         "applications[0].args.embedding_models: RayLLM's embedding engine is gone; fix: list them in `models`"),
        ("applications: [{import_path: 'rayllm.backend:router_application', args: {trtllm_models: x}}]",
         "applications[0].args.trtllm_models: TensorRT-LLM is not served"),
        ("application: []\nmodels: []", "unknown key `application`"),
    ],
)  # fmt: skip
def test_broken_serve_configs(load_error: LoadError, text: str, expected: str) -> None:
    found = load_error(text)
    assert any(expected in line for line in found), found


LIGHTGPT = (
    "engine_config:\n  model_id: amazon/LightGPT\n  type: VLLMEngine\n  generation:\n    prompt_format:\n"
    '      system: "{instruction}\\n"\n      assistant: "{instruction}"\n      trailing_assistant: ""\n'
    '      user: "{instruction}"\n      default_system_message: "Below is"\n      default_system_message: ""\n'
)
"""RayLLM's own amazon--LightGPT.yaml gives one key twice."""


def test_a_key_given_twice_in_rayllms_layout_counts_the_last_time_as_there(write: Write) -> None:
    config = load([write(LIGHTGPT)])
    form = config.models[0].engine_config.generation.prompt_format
    assert form is not None
    assert (
        form.default_system_message
        == yaml.safe_load(LIGHTGPT)["engine_config"]["generation"]["prompt_format"]["default_system_message"]
    )
    (note,) = [note for note in config.notes if "given twice" in note]
    assert re.search(r":11: .*default_system_message: given twice, first on line 10; the last one counts", note)


def test_duplicate_keys_are_read_like_in_pyyaml(write: Write) -> None:
    text = LIGHTGPT + "  max_total_tokens: 1\n  max_total_tokens: 512\n  stop: [a]\n"
    text = text.replace("  stop: [a]\n", "engine_config: {type: VLLMEngine, model_id: b, max_total_tokens: x}\n")
    with pytest.raises(ConfigError, match=r":14: engine_config.max_total_tokens: must be a whole number"):
        load([write(text)])


def test_a_key_given_twice_in_our_layout_is_refused(write: Write) -> None:
    with pytest.raises(
        ConfigError, match=r":10: .*default_system_message: given twice, first on line 9\n  fix: keep one"
    ):
        load([write(LIGHTGPT.replace("  type: VLLMEngine\n", ""))])


@pytest.mark.parametrize("key", ["s3_mirror_config", "gcs_mirror_config"])
def test_a_mirror_is_the_source(load_app: LoadApp, key: str) -> None:
    uri = f"{'s3' if key[0] == 's' else 'gs'}://bucket/folder"
    app = load_app(f"engine_config: {{model_id: a, {key}: {{bucket_uri: '{uri}', extra_files: []}}}}")
    assert app.models[0].source == uri
    assert f"`{key}.bucket_uri` is now `hf_model_id: {uri}`" in app.notes[0]


def test_adapters_of_ray_serve_llm_are_to_be_listed(load_error: LoadError) -> None:
    lora = "{dynamic_lora_loading_path: 's3://bucket/loras', max_num_adapters_per_replica: 4}"
    (said,) = load_error(f"engine_config: {{model_id: a}}\nlora_config: {lora}")
    assert "lora_config: adapters are not looked up when a request names them" in said
    assert "engine_config.adapters: [{name: NAME, source: s3://bucket/loras/NAME}]" in said
