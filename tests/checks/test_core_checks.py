"""Every finding of the core: one bad input for each code, and good inputs that give none."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoints import REMOVE, Spec, make_llama
from quantserve.checkpoint import Checkpoint, open_checkpoint
from quantserve.checks.model import check_model
from quantserve.config import ModelConfig
from quantserve.finding import Finding, Severity
from quantserve.method import Method
from quantserve.target import Target, find_target

AWQ = Method("awq", "4-bit", (4,), "awq", aliases=("awq_marlin",), minimum_capability=75)
FP16 = Method("fp16", "plain", (16,), None, dtypes=("float16", "bfloat16", "float32"))
FLOAT16_ONLY = Method("old", "float16 only", (4,), None, dtypes=("float16",))

Check = Callable[..., list[Finding]]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Check a small Llama; keywords of ``make_llama`` change the checkpoint, the others what it is served with."""

    def run(
        *,
        method: Method | None = FP16,
        target: str | Target = "a100-80g",
        ranks: int = 1,
        gpus: float = 1,
        tokens: int | None = None,
        engine_kwargs: Mapping[str, Any] | None = None,
        engine: Mapping[str, Any] | None = None,
        layout: str = "fp16",
        **checkpoint: Any,
    ) -> list[Finding]:
        folder = make_llama(tmp_path / "m", layout, **checkpoint)
        found = find_target(target) if isinstance(target, str) else target
        model = served(ranks, tokens, engine_kwargs, engine, gpus)
        return check_model(open_checkpoint(str(folder)), model, found, method)

    return run


def served(
    ranks: int = 1,
    tokens: int | None = None,
    engine_kwargs: Mapping[str, Any] | None = None,
    engine: Mapping[str, Any] | None = None,
    gpus: float = 1,
) -> ModelConfig:
    section = {
        "model_id": "m",
        "engine_kwargs": dict(engine_kwargs or {}),
        "max_total_tokens": tokens,
        **(engine or {}),
    }
    scaling = {"num_workers": ranks, "num_gpus_per_worker": gpus}
    return ModelConfig.model_validate({"engine_config": section, "scaling_config": scaling})


def the(findings: list[Finding], code: str) -> Finding:
    """The one finding of that code; everything found is shown when there is none."""
    matching = [finding for finding in findings if finding.code == code]
    assert len(matching) == 1, [(finding.code, finding.message) for finding in findings]
    assert matching[0].fix or matching[0].severity is Severity.INFO, "a finding says what to do"
    return matching[0]


def serious(findings: list[Finding]) -> list[str]:
    return [f"{finding.code}: {finding.message}" for finding in findings if finding.severity is not Severity.INFO]


# --- good inputs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["a100-80g", "t4", "cpu", "mi300x"])
@pytest.mark.parametrize(
    "checkpoint",
    [
        {},
        {"tie_word_embeddings": True},
        {"bias": ("q_proj", "k_proj", "v_proj", "o_proj")},
        {"head_dim": 32},
        {"shards": 3},
        {"dtype": "F32"},
        {"kv_heads": 1},
        {"extra": {"model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (32,))}},
        {"extra": {"model.layers.1.self_attn.k_proj.k_scale": ("F32", ())}},
        {"tie_word_embeddings": True, "extra": {"lm_head.weight": ("F16", (512, 256))}},
    ],
    ids=str,
)
def test_good_checkpoints_have_no_findings(check: Check, target: str, checkpoint: dict[str, Any]) -> None:
    method = replace(FP16, devices=("cuda", "rocm", "cpu"))
    assert serious(check(target=target, method=method, **checkpoint)) == []


def test_a_good_awq_checkpoint_has_only_its_size(check: Check) -> None:
    findings = check(layout="awq", method=AWQ)
    assert serious(findings) == []
    size = the(findings, "weights-size")
    # 4 bits, and per group of 128 a 16-bit scale and a 4-bit zero: 4.156 bits a weight.
    assert "(4.16 bits/weight, 26 % of float16)" in size.message


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_tensor_parallel_sizes_that_work(check: Check, ranks: int) -> None:
    assert serious(check(ranks=ranks)) == []


# --- config.json ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("hidden_size", "256", "'256' is not an integer"),
        ("hidden_size", 256.0, "256.0 is not an integer"),
        ("num_hidden_layers", True, "True is not an integer"),
        ("num_hidden_layers", 10**9, "1000000000 is beyond any model (limit 1024)"),
        ("num_hidden_layers", 10**400, "an integer of 1329 bits is beyond any model"),
        ("num_attention_heads", 0, "0 is not positive"),
        ("vocab_size", -5, "-5 is not positive"),
        ("num_attention_heads", 3, None),
        ("intermediate_size", ["x" * 500], "is not an integer"),
        ("num_key_value_heads", 3, "3 does not divide num_attention_heads 4"),
        ("tie_word_embeddings", "yes", "'yes' is not true or false"),
        ("head_dim", {}, "{} is not an integer"),
    ],
)
def test_unusable_fields(check: Check, key: str, value: Any, says: str | None) -> None:
    findings = check(config={key: value})
    if says is None:  # 256 % 3 != 0
        finding = next(f for f in findings if f.code == "config-bad-field" and f.offenders == ("hidden_size",))
        assert "256 is not divisible by num_attention_heads 3" in finding.message
        return
    finding = the(findings, "config-bad-field")
    assert says in finding.message
    assert finding.offenders == (key,)
    assert len(finding.message) < 300


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_a_missing_field_has_its_default_which_the_files_contradict(check: Check, key: str) -> None:
    finding = the(check(config={key: REMOVE}), "config-missing-field")
    assert finding.offenders == (key,)
    assert "takes the default of llama" in finding.message


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("max_position_embeddings", "4096", "'4096' is not an integer"),
        ("max_position_embeddings", 4096.5, "4096.5 is not an integer"),
        ("rope_scaling", "yarn", "is not an object"),
        ("rope_parameters", [1], "is not an object"),
        ("layer_types", "full_attention", "is not a list"),
        ("architectures", "LlamaForCausalLM", "is not a list of class names"),
        ("architectures", 7, "is not a list of class names"),
    ],
)
def test_a_value_of_a_type_that_transformers_refuses(check: Check, key: str, value: object, says: str) -> None:
    finding = the(check(config={key: value}), "config-bad-field")
    assert says in finding.message
    assert finding.offenders == (key,)


def test_a_missing_field_is_no_mistake_where_its_default_is_right(check: Check) -> None:
    assert serious(check(config={"tie_word_embeddings": REMOVE, "max_position_embeddings": REMOVE})) == []


def test_no_config_at_all() -> None:
    (finding,) = check_model(Checkpoint.from_tensors(), served(), find_target("t4"), FP16)
    assert finding.code == "config-missing"


def test_missing_architectures(check: Check) -> None:
    """vLLM takes the usual class of the model type, where there is one."""
    assert serious(check(config={"architectures": REMOVE})) == []
    findings = check(config={"architectures": REMOVE, "model_type": "nobody-knows"})
    assert "architectures" in the(findings, "architectures-missing").offenders


@pytest.mark.parametrize(("trusted", "codes"), [(False, ["remote-code-tokenizer"]), (True, [])])
def test_a_tokenizer_of_remote_code_warns(tmp_path: Path, trusted: bool, codes: list[str]) -> None:
    folder = make_llama(tmp_path / "m")
    (folder / "tokenizer.json").rename(folder / "tiktoken.model")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["tokens.Mine", None]}}))
    model = served()
    kwargs = {"trust_remote_code": True} if trusted else {}
    engine = model.engine_config.model_copy(update={"engine_kwargs": kwargs})
    model = model.model_copy(update={"engine_config": engine})
    findings = check_model(open_checkpoint(str(folder)), model, find_target("l4"), FP16)
    assert [finding.code for finding in findings if "remote" in finding.code] == codes


def test_an_unknown_family_is_compared_block_by_block(check: Check) -> None:
    config = {"architectures": ["OPTForCausalLM"], "model_type": "opt"}
    findings = check(config=config, layers=12, drop=["model.layers.7.mlp.up_proj.weight"])
    assert "'opt'" in the(findings, "architecture-unknown").message
    differ = the(findings, "blocks-differ")
    assert differ.offenders == ("model.layers.7.mlp.up_proj.weight",)
    assert "12 blocks" in differ.message


# --- method, device, dtype ------------------------------------------------------------------------------


@pytest.mark.parametrize(("declared", "target"), [("gptq", "a100-80g"), ("compressed-tensors", "cpu"), ("AWQX", "t4")])
def test_the_argument_contradicts_the_checkpoint(check: Check, declared: str, target: str) -> None:
    config = {"quantization_config": {"quant_method": declared}}
    finding = the(
        check(layout="awq", method=AWQ, target=target, config=config, engine_kwargs={"quantization": "awq"}),
        "method-mismatch",
    )
    assert repr(declared.lower()) in finding.message
    assert "engine_kwargs.quantization is 'awq'" in finding.message


def test_capitals_in_the_declared_method_do_not_matter(check: Check) -> None:
    assert serious(check(layout="awq", method=AWQ, config={"quantization_config": {"quant_method": "AWQ"}})) == []


@pytest.mark.parametrize(("target", "accepted"), [("a100-80g", True), ("mi300x", False), ("cpu", False)])
def test_a_method_says_which_arguments_vllm_takes_for_a_declared_one(check: Check, target: str, accepted: bool) -> None:
    marlin = replace(AWQ, vllm_name="auto_awq", accepts={"awq": {"cuda": ("auto_awq",)}})
    findings = check(layout="awq", method=marlin, target=target)
    if accepted:
        assert serious(findings) == []
    else:
        assert "'auto_awq'" in the(findings, "method-mismatch").message
    alone = replace(AWQ, vllm_name="auto_awq")  # the core knows no method by name
    assert "'auto_awq'" in the(check(layout="awq", method=alone, target=target), "method-mismatch").message


def test_a_declared_name_that_only_accepts_has_is_the_methods(check: Check) -> None:
    other = Method("own", "4-bit", (4,), "own_awq", minimum_capability=75, accepts={"awq": {"cuda": ("own_awq",)}})
    assert serious(check(layout="awq", method=other)) == []


def test_no_quant_method(check: Check) -> None:
    finding = the(
        check(layout="awq", method=AWQ, config={"quantization_config": {"bits": 4, "group_size": 128}}),
        "quant-method-missing",
    )
    assert "'bits', 'group_size'" in finding.message


def test_a_quantization_config_that_is_no_object(check: Check) -> None:
    assert "list" in the(check(config={"quantization_config": []}), "quantization-config-invalid").message


def test_no_quantization_config_anywhere(check: Check) -> None:
    finding = the(check(layout="awq", method=AWQ, config={"quantization_config": REMOVE}), "quant-config-missing")
    assert "quant_config.json" in finding.message


def test_one_quantization_config_beside_is_enough(check: Check) -> None:
    files = {"quant_config.json": {"w_bit": 4, "q_group_size": 128, "zero_point": True}}
    assert serious(check(layout="awq", method=AWQ, config={"quantization_config": REMOVE}, quant_files=files)) == []


def test_two_quantization_configs_beside(check: Check) -> None:
    files = {"quant_config.json": {"w_bit": 4}, "quantize_config.json": {"bits": 4}}
    finding = the(
        check(layout="awq", method=AWQ, config={"quantization_config": REMOVE}, quant_files=files),
        "quant-config-ambiguous",
    )
    assert finding.offenders == ("quant_config.json", "quantize_config.json")


@pytest.mark.parametrize(
    ("beside", "says"),
    [
        ({"w_bit": 4, "q_group_size": 128, "zero_point": True, "quant_method": "AWQ"}, ""),
        (
            {"w_bit": 4, "q_group_size": 64, "zero_point": False},
            "group_size is 128 and 64; zero_point is True and False",
        ),
        ({"bits": 8, "quant_method": "gptq"}, "quant_method is 'awq' and 'gptq'; bits is 4 and 8"),
        ({"bits": [4], "group_size": None, "damp_percent": 0.1}, ""),
    ],
)
def test_a_file_beside_config_json_says_something_else(check: Check, beside: dict[str, Any], says: str) -> None:
    found = check(layout="awq", method=AWQ, quant_files={"quant_config.json": beside})
    if says:
        assert says in the(found, "quant-config-disagree").message
    else:
        assert serious(found) == []


def test_hf_overrides_repair_the_declaration(check: Check) -> None:
    overrides = {"hf_overrides": {"quantization_config": {"quant_method": "awq", "bits": 4}}}
    assert serious(check(layout="awq", method=AWQ, config={"quantization_config": {}}, engine_kwargs=overrides)) == []


def test_device(check: Check) -> None:
    finding = the(check(layout="awq", method=AWQ, target="mi300x"), "device-unsupported")
    assert "cuda, cpu" in finding.message
    assert finding.offenders == ("mi300x",)


def test_capability(check: Check) -> None:
    message = the(check(layout="awq", method=AWQ, target="v100"), "capability-too-low").message
    assert "needs compute capability 7.5" in message
    assert "v100 has 7.0" in message


def test_bfloat16_before_ampere(check: Check) -> None:
    findings = check(dtype="BF16", target="t4", engine_kwargs={"dtype": "bfloat16"})
    assert "t4 has 7.5" in the(findings, "bfloat16-unsupported").message


def test_float32_turns_into_bfloat16_which_a_float16_method_cannot_run(check: Check) -> None:
    finding = the(check(dtype="F32", method=FLOAT16_ONLY), "dtype-unsupported")
    assert "in bfloat16, decided by vLLM (config.json has float32" in finding.message
    assert finding.fix == "set engine_kwargs.dtype to float16"
    assert serious(check(dtype="F32", method=FLOAT16_ONLY, engine_kwargs={"dtype": "half"})) == []
    assert serious(check(dtype="F32", method=FLOAT16_ONLY, target="t4")) == []


def test_float32_asked_for(check: Check) -> None:
    findings = check(layout="awq", method=AWQ, engine_kwargs={"dtype": "float32"})
    assert "decided by engine_kwargs.dtype" in the(findings, "dtype-unsupported").message


@pytest.mark.parametrize(("target", "kwargs"), [("t4", {}), ("a100-80g", {"dtype": "half"})])
def test_bfloat16_narrowed_to_float16(check: Check, target: str, kwargs: dict[str, Any]) -> None:
    finding = the(check(dtype="BF16", target=target, engine_kwargs=kwargs), "dtype-narrowed")
    assert finding.severity is Severity.WARNING
    assert "65504" in finding.message


def test_a_dtype_a_plugin_invented(tmp_path: Path) -> None:
    model = served()
    engine = model.engine_config.model_copy(update={"engine_kwargs": {"dtype": "int4"}})
    checkpoint = open_checkpoint(str(make_llama(tmp_path / "m")))
    findings = check_model(checkpoint, model.model_copy(update={"engine_config": engine}), find_target("l4"), FP16)
    assert "'int4'" in the(findings, "dtype-unknown").message


# --- tensors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
    ],
)
def test_missing_tensors_beside_the_linears(check: Check, name: str) -> None:
    finding = the(check(drop=[name]), "model-tensors-missing")
    assert finding.offenders == (name,)
    assert finding.message.startswith("1 tensor is missing")


def test_missing_bias(check: Check) -> None:
    names = [f"{part}_proj" for part in "qkvo"]
    finding = the(check(bias=names, drop=["model.layers.1.self_attn.v_proj.bias"]), "model-tensors-missing")
    assert finding.offenders == ("model.layers.1.self_attn.v_proj.bias",)


def test_many_missing_tensors_are_counted_and_the_first_named(check: Check) -> None:
    norms = [f"model.layers.{i}.input_layernorm.weight" for i in range(12)]
    finding = the(check(layers=12, drop=norms), "model-tensors-missing")
    assert finding.message.startswith("12 tensors")
    assert finding.offenders == (*norms[:8], "and 4 more")


def test_a_missing_shard_does_not_report_every_tensor_of_it(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    codes = {finding.code for finding in check_model(open_checkpoint(str(folder)), served(), find_target("l4"), FP16)}
    assert "model-tensors-missing" not in codes
    assert "shard-missing" in codes


@pytest.mark.parametrize(
    ("name", "spec", "code", "says"),
    [
        ("model.embed_tokens.weight", ("F16", (500, 256)), "vocabulary-mismatch", "vocab_size is 512, but"),
        ("lm_head.weight", ("F16", (520, 256)), "vocabulary-mismatch", "lm_head.weight [520, 256]"),
        ("model.embed_tokens.weight", ("F16", (512, 128)), "model-tensors-wrong-shape", "expected [512, 256]"),
        ("model.norm.weight", ("F16", (255,)), "model-tensors-wrong-shape", "[255], expected [256]"),
        ("model.norm.weight", ("I8", (256,)), "model-tensors-wrong-dtype", "model.norm.weight I8"),
    ],
)
def test_misfits(check: Check, name: str, spec: Spec, code: str, says: str) -> None:
    finding = the(check(override={name: spec}), code)
    assert says in finding.message
    assert finding.offenders[0].startswith(name)


def test_unknown_tensors(check: Check) -> None:
    finding = the(check(extra={"model.layers.0.mlp.router.weight": ("F16", (8, 256))}), "unknown-tensors")
    assert finding.offenders == ("model.layers.0.mlp.router.weight [8, 256]",)


def test_more_blocks_in_the_files_than_in_the_config(check: Check) -> None:
    finding = the(check(layers=3, config={"num_hidden_layers": 2}), "unknown-tensors")
    assert "num_hidden_layers is 2" in finding.message
    assert "model.layers.2." in finding.offenders[0]


def test_the_linears_own_tensors_are_left_to_the_method(check: Check) -> None:
    extra = {
        "sparse_threshold.model.layers.0.mlp.up_proj": ("I64", ()),
        "model.layers.0.mlp.up_proj.vals": ("F32", (5,)),
    }
    assert serious(check(layout="awq", method=AWQ, extra=extra)) == []


def test_biases_nobody_asked_for(check: Check) -> None:
    finding = the(check(bias=["q_proj"], config={"attention_bias": False}), "biases-ignored")
    assert finding.severity is Severity.WARNING
    assert finding.offenders[0] == "model.layers.0.self_attn.q_proj.bias [256]"


# --- vocabulary and tokenizer ---------------------------------------------------------------------------


def test_the_tokenizer_knows_more_than_the_model(check: Check) -> None:
    finding = the(check(added_tokens={"<pad>": 512}), "tokenizer-exceeds-vocabulary")
    assert "ids up to 512" in finding.message
    assert "0 to 511" in finding.message


def test_no_tokenizer(check: Check) -> None:
    assert the(check(tokenizer=False), "tokenizer-missing").severity is Severity.ERROR
    assert serious(check(tokenizer=False, engine={"tokenizer_id": "some/other"})) == []


def test_no_chat_template(check: Check) -> None:
    finding = the(check(chat_template=False), "chat-template-missing")
    assert finding.severity is Severity.WARNING
    assert serious(check(chat_template=False, engine={"generation": {"prompt_format": PROMPT_FORMAT}})) == []


PROMPT_FORMAT = {
    "system": "{instruction}\n",
    "assistant": "{instruction}",
    "trailing_assistant": "",
    "user": "[INST] {system}{instruction} [/INST]",
    "system_in_user": True,
    "default_system_message": "",
}

# --- context length and tensor parallelism ---------------------------------------------------------------


def test_context(check: Check) -> None:
    finding = the(check(tokens=4097), "context-too-long")
    assert "(4,097) exceeds the model's context length (4,096 from max_position_embeddings)" in finding.message
    assert serious(check(tokens=4096)) == []
    allowed = {"runtime_env": {"env_vars": {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}}}
    assert serious(check(tokens=5000, engine=allowed)) == []


def test_queue(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(make_llama(tmp_path / "m")))

    def found(**deployment: int) -> list[Finding]:
        model = ModelConfig.model_validate({"engine_config": {"model_id": "m"}, "deployment_config": deployment})
        return check_model(checkpoint, model, find_target("a100-80g"), FP16)

    finding = the(found(max_queued_requests=-1, max_ongoing_requests=48), "queue-unbounded")
    assert finding.severity is Severity.WARNING
    assert "max_ongoing_requests (48)" in finding.fix
    assert serious(found()) == serious(found(max_queued_requests=0)) == []


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "linear", "factor": 2.0}, 8192),
        ({"type": "dynamic", "factor": 4}, 16384),
        ({"rope_type": "yarn", "factor": 4.0}, 4096),
        ({"rope_type": "llama3", "factor": 8.0}, 4096),
        ({"rope_type": "linear", "factor": None}, 4096),
    ],
)
def test_rope_scaling_lengthens_the_context(check: Check, rope: dict[str, Any], longest: int) -> None:
    assert serious(check(tokens=longest, config={"rope_scaling": rope})) == []
    finding = the(check(tokens=longest + 1, config={"rope_scaling": rope}), "context-too-long")
    assert f"context length ({longest:,} from" in finding.message


@pytest.mark.parametrize(
    ("sizes", "ranks", "code", "says", "fix"),
    [
        ({"heads": 4, "kv_heads": 4}, 3, "heads-not-divisible", "4 % 3 = 1", "to 2"),
        (
            {"heads": 6, "kv_heads": 2, "hidden": 384, "intermediate": 768},
            3,
            "kv-heads-not-divisible",
            "3 % 2 = 1",
            "to 2",
        ),
        ({"intermediate": 513}, 2, "mlp-not-divisible", "intermediate_size 513", "to 1"),
        ({"intermediate": 512}, 8, "heads-not-divisible", "4 % 8 = 4", "to 4"),
        (
            {"heads": 6, "kv_heads": 6, "hidden": 384, "intermediate": 768, "vocab": 250},
            3,
            "vocabulary-not-divisible",
            "vocab_size 250, padded to 256, does not divide over 3 ranks (256 % 3 = 1)",
            "to 2",
        ),
    ],
)
def test_tensor_parallelism(check: Check, sizes: dict[str, Any], ranks: int, code: str, says: str, fix: str) -> None:
    finding = the(check(ranks=ranks, **sizes), code)
    assert says in finding.message
    assert finding.fix.endswith(fix)


def test_more_ranks_than_devices(check: Check) -> None:
    finding = the(check(ranks=4, target="2xa100-80g"), "too-few-devices")
    assert "needs 4 devices; the target has 2" in finding.message
    assert serious(check(ranks=4, target="4xa100-80g")) == []
    assert serious(check(ranks=2, target="cpu")) == []


@pytest.mark.parametrize("target", ["a100-80g", "mi300x"])
def test_a_gpu_target_without_a_share_of_it(check: Check, target: str) -> None:
    method = replace(FP16, devices=("cuda", "rocm"))
    finding = the(check(gpus=0, target=target, method=method), "no-gpu-share")
    assert finding.severity is Severity.ERROR
    assert f"the target {target} is a GPU, but scaling_config.num_gpus_per_worker is 0" in finding.message
    assert finding.offenders == ("scaling_config.num_gpus_per_worker",)
    for fix in ("to 1,", "such as 0.3", "--target cpu"):
        assert fix in finding.fix
    assert serious(check(gpus=0.3, target=target, method=method)) == []


@pytest.mark.parametrize("gpus", [0, 0.3, 1])
def test_a_cpu_target_takes_any_share_of_a_gpu(check: Check, gpus: float) -> None:
    assert serious(check(gpus=gpus, target="cpu")) == []


def test_what_reading_found_comes_first() -> None:
    problem = Finding.error("shard-missing", "gone")
    checkpoint = Checkpoint.from_tensors({"model_type": "llama"}, problems=[problem])
    assert check_model(checkpoint, served(), find_target("l4"), None)[0] is problem
