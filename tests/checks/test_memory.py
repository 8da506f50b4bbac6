"""Memory estimates against cases worked by hand, and what they say when a model does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoints import LLAMA_7B, LLAMA_70B, llama_tensors, make_llama
from quantserve.checkpoint import Checkpoint
from quantserve.checks.memory import MemoryEstimate, estimate, weights_per_rank
from quantserve.config import ModelConfig, load_object
from quantserve.finding import Finding, Severity
from quantserve.planning.compose import compose
from quantserve.plugins.registry import Registry
from quantserve.target import GIB, Target, find_target

KIB = 1024
MIB = 1 << 20


def llama(sizes: dict[str, int], method: str = "fp16", **config: Any) -> Checkpoint:
    shapes: dict[str, Any] = {key: value for key, value in sizes.items() if key != "shards"}
    data = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16",
        "hidden_size": sizes["hidden"], "intermediate_size": sizes["intermediate"],
        "num_hidden_layers": sizes["layers"], "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"], "vocab_size": sizes["vocab"], "max_position_embeddings": 4096,
    }  # fmt: skip
    return Checkpoint.from_tensors({**data, **config}, llama_tensors(method, **shapes))


def served(ranks: int = 1, tokens: int | None = None, **engine_kwargs: Any) -> ModelConfig:
    engine = {"model_id": "m", "max_total_tokens": tokens, "engine_kwargs": engine_kwargs}
    return ModelConfig.model_validate({"engine_config": engine, "scaling_config": {"num_workers": ranks}})


def of(checkpoint: Checkpoint, model: ModelConfig, target: str | Target) -> tuple[MemoryEstimate, list[Finding]]:
    result, findings = estimate(checkpoint, model, find_target(target) if isinstance(target, str) else target)
    assert result is not None
    return result, findings


def cpu(gib: float) -> Target:
    return Target("cpu", "cpu", int(gib * GIB), 1, cores=2)


@pytest.mark.parametrize("method", ["awq", "squeezellm"])
def test_parts_of_a_quantized_linear_stay_as_stored(method: str) -> None:
    """Float32 tables are no weights that become float16; float32 embeddings are."""
    checkpoint = llama(
        {"layers": 2, "hidden": 256, "intermediate": 512, "heads": 4, "kv_heads": 2, "vocab": 512}, method
    )
    assert weights_per_rank(checkpoint, 1, 2) == checkpoint.weight_bytes
    embeddings = 512 * 256
    wide = replace(checkpoint.tensors["model.embed_tokens.weight"], dtype="F32")
    wider = replace(checkpoint, tensors={**checkpoint.tensors, wide.name: wide})
    assert wider.weight_bytes == checkpoint.weight_bytes + 2 * embeddings
    assert weights_per_rank(wider, 1, 2) == checkpoint.weight_bytes


# 2 (K and V) x layers x kv heads x head_dim x bytes: 2*32*32*128*2 = 512 KiB; 2*80*8*128*2 = 320 KiB.
@pytest.mark.parametrize(
    ("sizes", "ranks", "kwargs", "expected"),
    [
        (LLAMA_7B, 1, {}, 512 * KIB),
        (LLAMA_7B, 2, {}, 256 * KIB),
        (LLAMA_7B, 1, {"kv_cache_dtype": "fp8"}, 256 * KIB),
        (LLAMA_7B, 1, {"kv_cache_dtype": "fp8_per_token_head"}, 2 * 32 * 32 * (128 + 4)),
        (LLAMA_70B, 1, {}, 320 * KIB),
        (LLAMA_70B, 8, {}, 40 * KIB),
        (LLAMA_70B, 16, {}, 40 * KIB),  # 8 kv heads on 16 ranks: one each, twice
        (LLAMA_7B, 1, {"dtype": "float32"}, 1024 * KIB),
    ],
)
def test_kv_cache_per_token(sizes: dict[str, int], ranks: int, kwargs: dict[str, Any], expected: int) -> None:
    result, _ = of(llama(sizes), served(ranks, **kwargs), "h200")
    assert result.kv_bytes_per_token == expected


def test_weights_of_llama_2_7b() -> None:
    # 6,738,415,616 parameters in float16.
    result, findings = of(llama(LLAMA_7B), served(), "a100-80g")
    assert result.weights_bytes == 2 * 6_738_415_616
    assert result.fits
    assert findings == []


def test_float32_files_are_held_in_the_served_dtype() -> None:
    checkpoint = llama(LLAMA_7B, torch_dtype="float32")
    result, _ = of(checkpoint, served(), "a100-80g")
    assert result.weights_bytes == 2 * 6_738_415_616


def test_ranks_split_the_weights_except_the_norms() -> None:
    norms = 2 * 65 * 4096
    result, _ = of(llama(LLAMA_7B), served(2), "a100-80g")
    assert result.weights_bytes == (2 * 6_738_415_616 - norms) // 2 + norms


def test_awq_is_a_quarter() -> None:
    result, _ = of(llama(LLAMA_7B, "awq"), served(), "a100-80g")
    # 6,476,005,376 linear weights at 4 + 20/128 bits, the rest in float16.
    linears = 6_476_005_376
    assert result.weights_bytes == int(linears * (4 + 20 / 128) / 8) + 2 * (6_738_415_616 - linears)


def test_a_70b_in_float16_does_not_fit_one_a100() -> None:
    result, findings = of(llama(LLAMA_70B), served(), "a100-80g")
    (finding,) = findings
    assert not result.fits
    assert finding.code == "memory-does-not-fit"
    assert finding.severity is Severity.ERROR
    assert "weights 128.5 GiB" in finding.message
    assert "does not fit a100-80g (80.0 GiB)" in finding.message
    assert "73.6 GiB usable" in finding.message
    assert "num_workers (tensor parallel size) to 2" in finding.fix
    assert "mi300x" not in finding.fix, "fixes stay with the same kind of device"
    assert "b200" in finding.fix


def test_the_fix_of_a_counted_target_stays_within_its_devices() -> None:
    (finding,) = of(llama(LLAMA_70B), served(), "1xa100-80g")[1]
    assert "num_workers" not in finding.fix
    assert "b200" in finding.fix


def test_the_proposed_tensor_parallel_size_fits() -> None:
    assert of(llama(LLAMA_70B), served(2), "a100-80g")[0].fits
    assert of(llama(LLAMA_70B), served(2), "a100-80g")[1] == []


def test_too_little_room_for_one_sequence() -> None:
    checkpoint = llama(LLAMA_7B, max_position_embeddings=131072)
    result, findings = of(checkpoint, served(), "l4")
    (finding,) = findings
    assert finding.code == "kv-cache-too-small"
    assert "a 131,072-token sequence needs 64.0 GiB" in finding.message
    assert f"enough for {result.kv_tokens:,} tokens" in finding.message
    assert f"to at most {result.kv_tokens}" in finding.fix
    assert of(checkpoint, served(tokens=result.kv_tokens), "l4")[0].fits


def test_room_for_one_sequence_but_not_two() -> None:
    result, findings = of(llama(LLAMA_7B), served(), "a10g")
    assert 1 < result.sequences < 4
    fewer, warned = of(llama(LLAMA_7B, max_position_embeddings=8192), served(), "a10g")
    assert 1 <= fewer.sequences < 2
    assert [finding.code for finding in warned] == ["kv-cache-small"]
    assert findings == []


def test_gpu_memory_utilization_counts() -> None:
    half, _ = of(llama(LLAMA_7B), served(gpu_memory_utilization=0.5), "a100-80g")
    assert half.budget_bytes == 40 * GIB


def part_of(share: float, **engine_kwargs: Any) -> ModelConfig:
    engine = {"model_id": "m", "engine_kwargs": engine_kwargs}
    return ModelConfig.model_validate({"engine_config": engine, "scaling_config": {"num_gpus_per_worker": share}})


def test_a_tenth_of_a_part_of_a_gpu_stays_free() -> None:
    half, findings = of(llama(LLAMA_7B), part_of(0.5), "a100-80g")
    assert findings == []
    assert half.budget_bytes == int(80 * GIB * 0.46)
    room = half.budget_bytes - half.weights_bytes - half.overhead_bytes
    assert half.kv_cache_bytes == room - half.budget_bytes // 10
    whole, _ = of(llama(LLAMA_7B), served(), "a100-80g")
    assert whole.kv_cache_bytes == whole.budget_bytes - whole.weights_bytes - whole.overhead_bytes
    less, _ = of(llama(LLAMA_7B), part_of(0.5, gpu_memory_utilization=0.4), "a100-80g")
    assert less.kv_cache_bytes == int(80 * GIB * 0.4) - less.weights_bytes - less.overhead_bytes - int(8 * GIB * 0.4)
    asked, _ = of(llama(LLAMA_7B), part_of(0.5, kv_cache_memory_bytes=19 * GIB), "a100-80g")
    assert asked.kv_cache_bytes == 19 * GIB


@pytest.mark.parametrize(("kwargs", "tokens"), [({}, 4112 + 16), ({"block_size": 64}, 4160 + 64)])
def test_a_part_of_a_gpu_holds_one_sequence_if_there_is_room(kwargs: dict[str, int], tokens: int) -> None:
    """4097 tokens are whole blocks, and vLLM keeps one for itself."""
    checkpoint = llama(LLAMA_7B, max_position_embeddings=4097)
    probe, _ = of(checkpoint, part_of(0.5), "a100-80g")
    used = probe.weights_bytes + probe.overhead_bytes
    least = tokens * 512 * KIB
    for room, left in ((least + MIB, least), (least, least), (least - MIB, least - MIB), (2 * least, None)):
        target = Target("gpu", "cuda", -(-2 * (used + room) * 100 // 92), 1, capability=80)
        result, _ = of(checkpoint, part_of(0.5, **kwargs), target)
        assert result.kv_cache_bytes == pytest.approx(left or room - (used + room) // 10, abs=8)


def test_a_cpu_does_not_care_about_a_part_of_a_gpu() -> None:
    assert of(llama(LLAMA_7B), part_of(0.3), cpu(64)) == of(llama(LLAMA_7B), part_of(1), cpu(64))


def test_a_cpu_gets_whole_gib_of_kv_cache() -> None:
    tiny = {"layers": 4, "hidden": 256, "intermediate": 512, "heads": 4, "kv_heads": 4, "vocab": 512}
    assert of(llama(tiny), served(), cpu(8))[0].cpu_kv_cache_gib == 1
    # 4096 tokens of 512 KiB are 2 GiB; 16 such sequences would be 32 GiB of the 31 GiB half that is free.
    result, findings = of(llama(LLAMA_7B), served(), cpu(86))
    assert findings == []
    assert result.cpu_kv_cache_gib == 31
    assert result.kv_cache_bytes == 31 * GIB


def test_ranks_on_a_cpu_are_spread_over_numa_nodes() -> None:
    one = of(llama(LLAMA_7B), served(2), Target("cpu", "cpu", 40 * GIB, 1))[0]
    two = of(llama(LLAMA_7B), served(2), Target("cpu", "cpu", 40 * GIB, 2))[0]
    assert (one.budget_bytes, two.budget_bytes) == (18 * GIB, 36 * GIB)


def test_the_users_cpu_cache_size_wins() -> None:
    engine = {"model_id": "m", "runtime_env": {"env_vars": {"VLLM_CPU_KVCACHE_SPACE": "3"}}}
    model = ModelConfig.model_validate({"engine_config": engine})
    assert of(llama(LLAMA_7B), model, cpu(64))[0].cpu_kv_cache_gib == 3
    assert of(llama(LLAMA_7B), served(kv_cache_memory_bytes=5 * GIB), cpu(64))[0].cpu_kv_cache_gib == 5


def test_more_cpu_cache_asked_for_than_there_is() -> None:
    result, (finding,) = of(llama(LLAMA_7B), served(kv_cache_memory_bytes=50 * GIB), cpu(32))
    assert finding.code == "memory-does-not-fit"
    assert "A KV cache of 50.0 GiB" in finding.message
    assert result.kv_cache_bytes < 32 * GIB


def test_a_model_larger_than_ram() -> None:
    (finding,) = of(llama(LLAMA_7B), served(), cpu(8))[1]
    assert finding.code == "memory-does-not-fit"
    assert "weights 12.6 GiB" in finding.message
    assert "does not fit cpu (8.0 GiB)" in finding.message


def test_a_sliding_window_keeps_only_the_window() -> None:
    full = llama(LLAMA_7B, model_type="mistral", max_position_embeddings=131072, sliding_window=None)
    windowed = llama(LLAMA_7B, model_type="mistral", max_position_embeddings=131072, sliding_window=4096)
    assert not of(full, served(), "l4")[0].fits
    result, _ = of(windowed, served(), "l4")
    assert result.fits
    assert "sliding window of 4096" in result.notes[0]


def test_latent_attention() -> None:
    config = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_hidden_layers": 61, "model_type": "deepseek_v3"}
    checkpoint = Checkpoint.from_tensors(config, {"model.layers.0.mlp.up_proj.weight": ("BF16", (64, 64))})
    result, _ = of(checkpoint, served(8), "h200")
    assert result.kv_bytes_per_token == 61 * 576 * 2


def test_unknown_numbers_are_not_guessed() -> None:
    checkpoint = Checkpoint.from_tensors({"model_type": "x"}, {"a.weight": ("F16", (64, 64))})
    result, findings = of(checkpoint, served(), "l4")
    assert result.kv_bytes_per_token == 0
    assert "not estimated" in result.notes[0]
    assert findings == []
    assert estimate(Checkpoint.from_tensors({"model_type": "x"}), served(), find_target("l4")) == (None, [])


def test_weights_without_headers_are_counted_by_file_size() -> None:
    checkpoint = Checkpoint.from_tensors({"model_type": "llama"}, files={"a.pt": 7 * GIB, "b.bin": -1, "c.json": 5})
    assert of(checkpoint, served(), "a100-80g")[0].weights_bytes == 7 * GIB


def test_a_setting_a_plugin_got_wrong() -> None:
    model = served()
    for key, value in {"gpu_memory_utilization": 1.5, "max_num_seqs": "many", "kv_cache_memory_bytes": 0}.items():
        engine = model.engine_config.model_copy(update={"engine_kwargs": {key: value}})
        changed = model.model_copy(update={"engine_config": engine})
        result, (finding,) = estimate(llama(LLAMA_7B), changed, find_target("l4"))
        assert result is None
        assert finding.code == "engine-setting"
        assert finding.offenders == (f"engine_kwargs.{key}",)


def test_what_may_not_fit_is_a_warning_and_what_cannot_fit_an_error() -> None:
    """Working memory is a rule of thumb, so the estimate refuses only beyond its uncertainty."""
    probe, _ = of(llama(LLAMA_7B), served(), "a100-80g")
    need = probe.weights_bytes + probe.overhead_bytes
    for budget, severity in ((need - MIB, Severity.WARNING), (probe.weights_bytes // 2, Severity.ERROR)):
        target = Target("gpu", "cuda", int(budget / 0.92), 1, capability=80)
        (finding,) = of(llama(LLAMA_7B), served(tokens=64), target)[1]
        assert finding.severity is severity


def test_an_unknown_type_is_refused_only_far_beyond_the_estimate() -> None:
    config = {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096, "vocab_size": 32000}
    tensors = {"model.layers.0.mlp.up_proj.weight": ("BF16", (64, 64))}
    for model_type, severity in (("llama-like-nobody-knows", Severity.WARNING), ("opt", Severity.ERROR)):
        lengths = {"max_position_embeddings": 60_000, "model_type": model_type}
        (finding,) = of(Checkpoint.from_tensors({**config, **lengths}, tensors), served(), "l4")[1]
        code = "memory-tight" if severity is Severity.WARNING else "kv-cache-too-small"
        assert (finding.severity, finding.code) == (severity, code)


def test_the_lm_head_of_a_tied_model_and_prediction_layers_are_not_counted() -> None:
    base = llama(LLAMA_7B, tie_word_embeddings=True)
    stored = {t.name: (t.dtype, t.shape) for t in base.tensors.values()}
    extra = {"lm_head.weight": ("F16", (32000, 4096)), "model.layers.32.eh_proj.weight": ("F16", (4096, 8192))}
    config = {**base.config, "num_nextn_predict_layers": 1}
    weights = {
        name: of(Checkpoint.from_tensors(config, {**stored, **more}), served(), "a100-80g")[0].weights_bytes
        for name, more in (("without", {}), ("with", extra))
    }
    assert weights["with"] == weights["without"]


@pytest.mark.vllm
def test_a_rank_has_the_parameters_that_vllm_makes(tmp_path: Path) -> None:
    """Codes, zeros and scales of groups are cut along K in row-parallel linears, as the scheme says."""
    from corpus import truth

    folder = make_llama(tmp_path / "m", "awq")
    engine = {"model_id": "m", "hf_model_id": str(folder)}
    app = load_object({"models": [{"engine_config": engine, "scaling_config": {"num_workers": 2}}]}, "test")
    composition = compose(app.models[0], Registry.load(), find_target("a100-80g"))
    model, _ = truth.make(folder, 2)
    assert composition.memory is not None
    made = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert composition.memory.weights_bytes == made
