# ruff: noqa: E501
"""Every mistake in a model is one message: line, key path, what is wrong, what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pydantic import ValidationError

from quantserve.config import AppConfig, ModelConfig

LoadModel = Callable[[str], ModelConfig]
LoadError = Callable[[str], list[str]]

ENGINE = "engine_config: {model_id: a/b}\n"


def test_defaults_scale_and_fit_together(load_model: LoadModel) -> None:
    model = load_model(ENGINE)
    refused = {"backpressure_config": {"status_code": 429}}
    assert model.deployment_config.serve_options() == {
        "max_ongoing_requests": 256, "max_queued_requests": 256, "num_replicas": 1, **refused
    }  # fmt: skip
    assert (model.source, model.route, model.tensor_parallel_size) == ("a/b", "/a--b", 1)
    assert (model.max_model_len, model.quantization, model.dtype, model.chat_template) == (None, None, None, None)
    assert (model.request_defaults, model.allow_pickle, model.plugins, model.chat_enabled) == ({}, False, [], True)

    scaled = load_model(
        "engine_config: {model_id: a/b, engine_kwargs: {max_num_seqs: 48}}\n"
        "deployment_config: {autoscaling_config: {min_replicas: 0}}\n"
    )
    assert scaled.deployment_config.serve_options() == {
        "autoscaling_config": {"min_replicas": 0, "max_replicas": 10, "target_ongoing_requests": 24.0},
        "max_ongoing_requests": 48,
        "max_queued_requests": 48,
        **refused,
    }
    unbounded = load_model(ENGINE + "deployment_config: {max_queued_requests: -1}").deployment_config
    assert unbounded.serve_options()["max_queued_requests"] == -1


def test_normalised_values(load_model: LoadModel) -> None:
    model = load_model("engine_config: {model_id: a/b, engine_kwargs: {quantization: AWQ, dtype: half}}")
    assert (model.quantization, model.dtype) == ("awq", "float16")
    assert load_model("engine_config: {model_id: a/b, engine_kwargs: {dtype: auto}}").dtype is None


def test_where_and_accelerator_type(load_model: LoadModel) -> None:
    model = load_model("# comment\n\n" + ENGINE + "scaling_config: {accelerator_type: L4}\n")
    assert model.where.endswith("model.yaml:3")
    assert model.scaling_config.resources_per_worker == {"accelerator_type:L4": 0.001}
    again = ModelConfig.model_validate(model.model_dump(exclude_none=True))
    assert again.scaling_config == model.scaling_config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # unknown and missing keys
        ("engine_config: {model_idd: a/b}", "1: engine_config: `model_id` is missing"),
        ("engine_config:\n  model_id: a/b\n  revison: x", "3: engine_config.revison: unknown key `revison`; did you mean "
         "`revision`? (known: adapters, allow_pickle, "),
        (ENGINE + "scaling_config: {num_worker: 2}", "2: scaling_config.num_worker: unknown key `num_worker`; "
         "did you mean `num_workers`? (known: accelerator_type, num_cpus_per_worker, num_gpus_per_worker, num_workers, "
         "placement_strategy, resources_per_worker)"),
        (ENGINE + "deployment_config: {autoscaling_config: {min_replica: 2}}", "did you mean `min_replicas`? (known: aggr"),
        (ENGINE + "plugin: [x]", "2: plugin: unknown key `plugin`; did you mean `plugins`? (known: deployment_config, "),
        ("engin_config: {model_id: a}", "1: engin_config: no config: an app file has `models:`, a model has "
         "`engine_config:`, a Serve config `applications:`; unknown key `engin_config`; did you mean `engine_config`?"),
        ("deployment_config: {}", "1: `engine_config` is missing"),
        ("engine_config:", "1: `engine_config` is missing"),
        # types
        ("engine_config: {model_id: 7}", "engine_config.model_id: must be text, got the number 7; fix: put the value in"),
        ("engine_config: {model_id: a/b, revision: 0123}", "revision: must be text, got the number 83; fix: put the val"),
        ("engine_config: [a]", "1: engine_config: must be a mapping (`key: value`), got a list"),
        ("engine_config: {model_id: a, max_total_tokens: '4096'}", "max_total_tokens: must be a whole number, got the "
         "text '4096'; fix: write 4096 without quotes"),
        ("engine_config: {model_id: a, max_total_tokens: 4k}", "max_total_tokens: must be a whole number, got the text"),
        ("engine_config: {model_id: a, max_total_tokens: 1e3}", "got the text '1e3'; fix: write 1000 without quotes"),
        ("engine_config: {model_id: a, max_total_tokens: 0.5}", "max_total_tokens: must be a whole number, got the numbe"),
        ("engine_config: {model_id: a, max_total_tokens: yes}", "max_total_tokens: must be a whole number, got true"),
        ("engine_config: {model_id: a, max_total_tokens: 0}", "must be greater than or equal to 1, got the number 0"),
        ("engine_config: {model_id: a, allow_pickle: 1}", "allow_pickle: must be true or false, got the number 1"),
        (ENGINE + "plugins: mine", "2: plugins: must be a list, got the text 'mine'"),
        (ENGINE + "plugins: [a, a]", "2: plugins: a plugin is listed twice; fix: keep one"),
        (ENGINE + "enabled: 'no'", "2: enabled: must be true or false, got the text 'no'"),
        # ids
        ("engine_config: {model_id: ./x, hf_model_id: y}", "'./x' cannot be an id in the API"),
        ("engine_config: {model_id: /data/llama}", "fix: give the folder in hf_model_id and a plain name here"),
        ("engine_config: {model_id: ''}", "model_id: '' cannot be an id"),
        ("engine_config: {model_id: 'a b'}", "'a b' cannot be an id"),
        ("engine_config: {model_id: a//b}", "'a//b' cannot be an id"),
        ("engine_config: {model_id: 'a?b'}", "'a?b' cannot be an id"),
        ("engine_config: {model_id: a/b, hf_model_id: ' '}", "hf_model_id: must not be empty"),
        # engine arguments
        ("engine_config: {model_id: a, engine_kwargs: {tensor_parallel_size: 2}}", "tensor_parallel_size is set by "
         "scaling_config.num_workers; fix: move the value there"),
        ("engine_config: {model_id: a, engine_kwargs: {model: x}}", "model is set by engine_config.hf_model_id"),
        ("engine_config: {model_id: a, engine_kwargs: {served_model_name: x}}", "is set by engine_config.model_id"),
        ("engine_config: {model_id: a, engine_kwargs: {max_model_len: 9}}", "is set by engine_config.max_total_tokens"),
        ("engine_config: {model_id: a, engine_kwargs: {max_num_seq: 9}}", "vLLM has no engine argument `max_num_seq`; "
         "did you mean `max_num_seqs`"),
        ("engine_config: {model_id: a, engine_kwargs: {max_num_seqs: '9'}}", "max_num_seqs: must be a whole number of at "
         "least 1, got the text '9'"),
        ("engine_config: {model_id: a, engine_kwargs: {gpu_memory_utilization: 90}}", "must be a number above 0 and at "),
        ("engine_config: {model_id: a, engine_kwargs: {dtype: fp16}}", "unknown dtype 'fp16' (known: auto, half, float16"),
        ("engine_config: {model_id: a, engine_kwargs: {quantization: 4}}", "quantization: must be text, got the number 4"),
        ("engine_config: {model_id: a, engine_kwargs: {pipeline_parallel_size: 2}}", "no pipeline parallelism yet"),
        ("engine_config: {model_id: a, engine_kwargs: {tool_call_parser: x}}", "argument of vLLM's server, not of its "
         "engine; fix: move it to engine_config.frontend_kwargs"),
        ("engine_config: {model_id: a, engine_kwargs: {hf_token: x}}", "fix: set HF_TOKEN in the environment"),
        ("engine_config: {model_id: a, max_total_tokens: 4096, engine_kwargs: {enable_chunked_prefill: false, "
         "max_num_batched_tokens: 2048}}", "max_num_batched_tokens 2048 is less than max_total_tokens 4096"),
        ("engine_config: {model_id: a, frontend_kwargs: {port: 1}}", "port belongs to the server all models share"),
        ("engine_config: {model_id: a, frontend_kwargs: {chat_template: x}}", "engine_config.generation.chat_template"),
        ("engine_config: {model_id: a, frontend_kwargs: {tool_parser: x}}", "vLLM's server has no argument `tool_parser`"),
        ("engine_config: {model_id: a, frontend_kwargs: {enable_auto_tool_choice: true}}", "needs tool_call_parser"),
        # runtime environment
        ("engine_config: {model_id: a, runtime_env: {env_vars: {A: 1}}}", "1: engine_config.runtime_env.env_vars.A: must "
         "be text, got the number 1; fix: put the value in quotes"),
        ("engine_config: {model_id: a, runtime_env: {env_vars: {VLLM_PLUGINS: x}}}", "list the plugin under `plugins:`"),
        ("engine_config: {model_id: a, runtime_env: {envvars: {}}}", "unknown key `envvars`; did you mean `env_vars`?"),
        ("engine_config: {model_id: a, runtime_env: {pip: [x], conda: y}}", "pip and conda exclude each other"),
        # deployment
        (ENGINE + "deployment_config: {num_replicas: 2, autoscaling_config: {}}", "2: deployment_config.num_replicas: "
         "num_replicas and autoscaling_config exclude each other"),
        (ENGINE + "deployment_config: {num_replicas: auto}", '"auto" means a target of 2 requests per replica in Ray'),
        (ENGINE + "deployment_config: {placement_group_bundles: []}", "computed from scaling_config and cannot be set; fix"),
        (ENGINE + "deployment_config: {placement_group_strategy: PACK}", "is computed from scaling_config"),
        (ENGINE + "deployment_config: {ray_actor_options: {num_gpus: 1}}", "fix: remove it and set scaling_config.num_gp"),
        (ENGINE + "deployment_config: {autoscaling_config: {min_replicas: 3, max_replicas: 2}}", "2: deployment_config."
         "autoscaling_config.min_replicas: must not exceed max_replicas (2), got 3"),
        (ENGINE + "deployment_config: {autoscaling_config: {initial_replicas: 3, max_replicas: 2}}",
         "initial_replicas: must be between min_replicas (1) and max_replicas (2), got 3"),
        (ENGINE + "deployment_config: {max_ongoing_requests: 8, autoscaling_config: {target_ongoing_requests: 9}}",
         "autoscaling_config.target_ongoing_requests: must not exceed max_ongoing_requests (8), got 9: a replica could"),
        ("engine_config: {model_id: a, engine_kwargs: {max_num_seqs: 16}}\n"
         "deployment_config: {autoscaling_config: {target_ongoing_requests: 17}}", "2: deployment_config.autoscaling_config."
         "target_ongoing_requests: must not exceed engine_kwargs.max_num_seqs (16), got 17: a replica could never"),
        (ENGINE + "deployment_config: {autoscaling_config: {look_back_period_s: 5}}", "must be longer than metrics_interv"),
        (ENGINE + "deployment_config: {autoscaling_config: {target_ongoing_requests: 0}}", "must be greater than 0"),
        (ENGINE + "deployment_config: {backpressure_config: {status_code: 500}}", "must be one of 429, 503, got the numbe"),
        # scaling
        (ENGINE + "scaling_config: {num_workers: 0}", "must be greater than or equal to 1, got the number 0"),
        (ENGINE + "scaling_config: {num_gpus_per_worker: 2}", "must be at most 1, got 2; fix: use more num_workers of 1"),
        (ENGINE + "scaling_config: {num_workers: 2, num_gpus_per_worker: 0.5}", "2 workers with 0.5 GPU each could share"),
        (ENGINE + "scaling_config: {placement_strategy: PAKC}", "must be one of 'PACK', 'STRICT_PACK', 'SPREAD', 'STRICT_"
         "SPREAD', got the text 'PAKC'"),
        (ENGINE + "scaling_config: {resources_per_worker: {GPU: 1}}", "GPU is set by num_gpus_per_worker"),
        ("engine_config: {model_id: a, engine_kwargs: {gpu_memory_utilization: 0.9}}\n"
         "scaling_config: {num_gpus_per_worker: 0.5}", "1: engine_config.engine_kwargs.gpu_memory_utilization: "
         "must not exceed scaling_config.num_gpus_per_worker (0.5), got 0.9"),
        # generation
        ("engine_config: {model_id: a, generation: {generate_kwargs: {temprature: 1}}}", "did you mean `temperature`?"),
        ("engine_config: {model_id: a, generation: {generate_kwargs: {temperature: -0.1}}}", "temperature: must be "
         "greater than or equal to 0, got the number -0.1"),
        ("engine_config: {model_id: a, generation: {generate_kwargs: {stop: [x, '']}}}", "stop[1]: an empty text is not"),
        ("engine_config: {model_id: a, generation: {stopping_sequences: [x, [1, 2]]}}", "stopping_sequences[1]: must be a"
         " text or a single token id, got a sequence of 2 tokens"),
        ("engine_config: {model_id: a, generation: {stopping_sequences: [1.5]}}", "must be a text or a token id, got the "),
        ("engine_config: {model_id: a, generation: {stopping_sequences: [true]}}", "a text or a token id, got true"),
        ("engine_config: {model_id: a, generation: {stopping_sequences: [-1]}}", "negative token id never ends an"),
        ("engine_config: {model_id: a, generation: {prompt_format: null, chat_template: '{{ x }}'}}", "exclude each other"),
        ("engine_config: {model_id: a, generation: {chat_template: missing.jinja}}", "missing.jinja cannot be read"),
    ],
)  # fmt: skip
def test_mistakes(load_error: LoadError, text: str, expected: str) -> None:
    found = load_error(text)
    assert any(expected in line for line in found), found
    assert len(found) <= 2, found


def test_all_mistakes_of_a_file_at_once_in_the_order_of_its_lines(load_error: LoadError) -> None:
    found = load_error("""
        engine_config:
          model_id: 'a b'
          max_total_tokens: '1'
          engine_kwargs: {max_num_seq: 1, tensor_parallel_size: 2, dtype: int4}
        deployment_config:
          max_ongoing_request: 4
        scaling_config:
          num_gpus_per_worker: 2
    """)
    assert [line.split(":")[0] for line in found] == ["3", "4", "5", "5", "5", "7", "9"]


def test_python_construction_reports_the_same(load_app: Callable[[str], AppConfig]) -> None:
    with pytest.raises(ValidationError, match=r"must not exceed max_replicas \(2\), got 3"):
        ModelConfig.model_validate(
            {
                "engine_config": {"model_id": "a"},
                "deployment_config": {"autoscaling_config": {"min_replicas": 3, "max_replicas": 2}},
            }
        )
    assert load_app(ENGINE).models[0].located("x:1").where == "x:1"


def test_an_empty_section_means_its_defaults(load_model: LoadModel) -> None:
    text = "engine_config: {model_id: a, engine_kwargs: , generation: }\ndeployment_config:\nscaling_config:\n"
    assert load_model(text).deployment_config.num_replicas is None


def test_request_defaults(load_model: LoadModel) -> None:
    model = load_model("""
        engine_config:
          model_id: a
          generation:
            generate_kwargs: {temperature: 0, top_k: 5, stop: END, stop_token_ids: [9]}
            stopping_sequences: ["</s>", "b", "b", 2, [7], ["x"], 2]
    """)
    assert model.request_defaults == {
        "temperature": 0,
        "top_k": 5,
        "stop": ["</s>", "END", "b", "x"],
        "stop_token_ids": [2, 7, 9],
    }
    same = load_model("engine_config: {model_id: a, generation: {stopping_sequences: []}}")
    assert same.request_defaults == {}


def test_chat_template_from_text_and_file(load_model: LoadModel, write: Callable[..., object]) -> None:
    write("{{ messages[0]['content'] }}", "templates/x.jinja")
    from_file = load_model("engine_config: {model_id: a, generation: {chat_template: templates/x.jinja}}")
    in_line = load_model("engine_config: {model_id: a, generation: {chat_template: \"{{ messages[0]['content'] }}\"}}")
    assert from_file.chat_template == in_line.chat_template == "{{ messages[0]['content'] }}"
    assert from_file.request_defaults == {}
