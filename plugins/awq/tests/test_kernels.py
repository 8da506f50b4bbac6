"""Which kernel serves AWQ on a CPU, what experts need, and what linears of unknown families are checked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import quantserve_kernels
from helpers.checkpoints import REMOVE, make_llama, quantized_linear
from helpers.composed import composed, errors, findings, text
from helpers.predicted import LLAMA_7B, expected, model
from quantserve.api import DISABLED_KERNELS, OUR_KERNEL, VLLM_KERNEL, Checkpoint, Finding, ModelConfig, Target
from quantserve.predict.calibration import Calibration, fastest_kernel, fingerprint, save
from quantserve.predict.cpu_kernels import BY_INSTRUCTION_SET
from quantserve.predict.workload import WORKLOADS
from quantserve.system.environment import with_environment
from quantserve.target import GIB, find_target
from quantserve_awq import plugin, speed
from quantserve_kernels import Status

EPYC = Target("cpu", "cpu", 64 * GIB, count=1, cores=2, features=("avx2", "avx512f", "avx512_bf16"))
XEON = replace(EPYC, features=(*EPYC.features, "amx_bf16", "amx_int8"))
OURS, THEIRS, DISABLED = OUR_KERNEL, VLLM_KERNEL, DISABLED_KERNELS
AVX2 = replace(EPYC, features=("avx2",))


def said(
    checkpoint: Checkpoint, target: Target, ranks: int = 1, left_out: str | None = None, **engine_kwargs: object
) -> dict[str, Finding]:
    """What the plugin alone finds; `left_out` is the user's value of vLLM's variable."""
    found = plugin.quantserve_validate(checkpoint, asked(ranks, left_out, **engine_kwargs), target)
    return {finding.code: finding for finding in found}


def asked(ranks: int = 1, left_out: str | None = None, **engine_kwargs: object) -> ModelConfig:
    made = model(ranks, **engine_kwargs)
    return made if left_out is None else with_environment(made, {DISABLED: left_out})


def given(checkpoint: Checkpoint, target: Target, left_out: str | None = None) -> str:
    """The kernel that the plan's variable leads to: the first that vLLM asks and it does not leave out."""
    variables = plugin.quantserve_environment(checkpoint, asked(left_out=left_out), target)
    disabled = variables.get(DISABLED, "").split(",")
    if left_out is not None:
        assert variables == {DISABLED: left_out}
    return next(name for name in (THEIRS, OURS) if name not in disabled)


@pytest.fixture
def small(tmp_path: Path) -> Checkpoint:
    return composed(make_llama(tmp_path / "m", "awq")).checkpoint


# --- the kernel of a CPU ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left_out", "target", "name", "codes"),
    [
        (None, EPYC, OURS, set()),
        (None, XEON, THEIRS, {"awq-kernel"}),
        (None, AVX2, OURS, set()),
        (OURS, XEON, THEIRS, set()),
        (THEIRS, XEON, OURS, set()),
        ("", XEON, THEIRS, set()),
        ("Other", EPYC, THEIRS, set()),
        ("Other", AVX2, THEIRS, {"awq-no-kernel"}),
        (f"Other,{OURS}", EPYC, THEIRS, set()),
        (f"Other,{THEIRS}", EPYC, OURS, set()),
        (f"Other, {THEIRS}", EPYC, THEIRS, set()),  # vLLM takes the space for a part of the name
        (OURS, AVX2, THEIRS, {"awq-no-kernel"}),
    ],
)
def test_amx_gets_vllms_kernel_unless_a_person_leaves_it_out(
    small: Checkpoint, left_out: str | None, target: Target, name: str, codes: set[str]
) -> None:
    assert given(small, target, left_out) == name
    found = said(small, target, left_out=left_out)
    assert found.keys() - {"awq-dtype"} == codes
    if "awq-kernel" in codes:
        assert all(words in found["awq-kernel"].message for words in ("AMX", "1210 ms", "8 bits"))
        assert "quantserve calibrate" in found["awq-kernel"].fix


def test_every_instruction_set_has_a_kernel() -> None:
    assert BY_INSTRUCTION_SET[-1][0] == ""
    assert {name for _, name in BY_INSTRUCTION_SET} <= {OURS, THEIRS}


def calibrated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: Target, **tables: tuple[float, float, float, float]
) -> None:
    """A calibration of this target: picoseconds per weight at 1, 4, 16 and 512 rows by kernel."""
    kernels = {
        f"{speed.KERNELS.keys.get(name, name)}-4": tuple(
            (rows, 1e-12 * value) for rows, value in zip((1, 4, 16, 512), values, strict=True)
        )
        for name, values in tables.items()
    }
    made = Calibration(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=fingerprint(target),
        versions={},
        threads=1,
        read_bytes_per_s=10e9,
        matmul_flops_per_s=800e9,
        kernels=kernels,
    )
    path = tmp_path / "calibration.json"
    save(made, path)
    monkeypatch.setenv("QUANTSERVE_CALIBRATION", str(path))


FAST, SLOW = (50.0, 60.0, 100.0, 1000.0), (60.0, 120.0, 370.0, 10_000.0)


@pytest.mark.parametrize(
    ("target", "tables", "name", "said_so"),
    [
        (XEON, {OURS: FAST, THEIRS: SLOW}, OURS, True),
        (XEON, {OURS: SLOW, THEIRS: FAST}, THEIRS, True),
        (EPYC, {OURS: SLOW, THEIRS: FAST}, THEIRS, True),
        (EPYC, {OURS: FAST, THEIRS: SLOW}, OURS, False),  # as without a calibration
        (XEON, {OURS: FAST}, THEIRS, True),  # only one was measured
    ],
)
def test_a_calibration_decides(
    small: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: Target,
    tables: dict[str, tuple[float, float, float, float]],
    name: str,
    said_so: bool,
) -> None:
    calibrated(monkeypatch, tmp_path, target, **tables)
    assert given(small, target) == name
    assert ("awq-kernel" in said(small, target)) == said_so
    assert given(small, target, OURS) == THEIRS
    if len(tables) == 2 and said_so:
        assert "calibration of 20" in said(small, target)["awq-kernel"].message
    other = XEON if target is EPYC else EPYC  # not its calibration
    assert given(small, other) == (THEIRS if other is XEON else OURS)


def test_the_work_that_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrated(monkeypatch, tmp_path, EPYC, a=(1, 2, 4, 100), b=(2, 2, 4, 57))
    found = fastest_kernel(EPYC, ("a-4", "b-4"))
    assert found is not None
    # 3 x 512 rows, 8 x 16, 32 x 4, 128 x 1
    assert found.seconds["a-4"] == pytest.approx(1e-6 * (3 * 100 + 8 * 4 + 32 * 2 + 128 * 1))
    assert found.seconds["b-4"] == pytest.approx(1e-6 * (3 * 57 + 8 * 4 + 32 * 2 + 128 * 2))
    assert found.key == "b-4"
    assert fastest_kernel(EPYC, ("a-4", "c-4")) is None
    assert fastest_kernel(find_target("a100-80g"), ("a-4", "b-4")) is None


@pytest.mark.parametrize("left_out", [f"{OURS},{THEIRS}", f"{THEIRS},Other,{OURS}"])
def test_a_model_without_a_kernel_is_refused(small: Checkpoint, left_out: str) -> None:
    finding = said(small, EPYC, left_out=left_out)["awq-no-kernel"]
    assert "leaves quantserve's kernel out" in finding.message
    assert "leaves vLLM's out" in finding.message
    assert finding.fix == f"set {DISABLED} to {THEIRS}, or leave it out"


def test_shapes_vllms_kernel_cannot_take_stay_with_ours(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", "awq", intermediate=48, group_size=16)
    checkpoint = composed(folder).checkpoint
    assert given(checkpoint, XEON) == OURS
    assert "awq-cpu-alignment" in said(checkpoint, XEON, left_out=OURS)


def test_our_kernel_where_it_is_not_compiled(small: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantserve_kernels, "status", lambda: Status(False, "torch", "no compiler"))
    for target, left_out, why in ((EPYC, THEIRS, f"{DISABLED} leaves vLLM's out"), (AVX2, None, "without AVX-512")):
        message = said(small, target, left_out=left_out)["awq-no-kernel"].message
        assert "no compiler" in message
        assert why in message
    assert not said(small, XEON).keys() & {"awq-slow-kernel", "awq-no-kernel"}
    profile = speed.kernel(XEON, 4, "vllm-0.32")
    assert profile is not None
    assert (profile.key, profile.alternatives) == ("awq_vllm", ())


def test_the_shells_variable_counts_on_this_machine(small: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DISABLED, OURS)
    here = find_target("cpu")
    assert plugin.quantserve_environment(small, asked(), here) == {DISABLED: OURS}
    assert plugin.quantserve_environment(small, asked(), find_target("a100-80g")) == {}


# --- prediction with AMX --------------------------------------------------------------------------------


def seconds(target: Target, left_out: str, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Predicted seconds of a prompt of 512 tokens and of a decode step, of Llama-2 7B."""
    monkeypatch.setattr("helpers.predicted.find_target", lambda name: target)
    made = expected(LLAMA_7B, "awq", "cpu", environment={DISABLED: left_out})
    prediction = made.predict(WORKLOADS["single"])
    return prediction.ttft_ms / 1e3, prediction.decode_step.linears


@pytest.mark.parametrize("made", ["amx", "avx512bf16"])
def test_our_kernel_is_predicted_and_named_with_what_it_was_given(made: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with AMX, and a system that grants its tiles or not."""
    from quantserve.predict.machine import linear_cost, machine_of

    found = Status(True, made, note="" if made == "amx" else "refused")
    monkeypatch.setattr(quantserve_kernels, "status", lambda: found)
    first = speed.kernel(XEON, 4, "vllm-0.32")
    assert first is not None
    assert first.key == speed.KERNELS.keys[THEIRS]  # ours was not timed: vLLM's until a calibration
    (ours,) = first.alternatives
    assert ours.name == f"quantserve-kernels ({found.regimes})"
    assert ours.amx == (made == "amx")
    plain = linear_cost(machine_of(XEON), speed.CODEBOOK, "none")
    cost = linear_cost(machine_of(XEON), ours, "none")
    few, many = (cost.seconds(rows, 4096, 4096) / plain.seconds(rows, 4096, 4096) for rows in (2, 512))
    assert few == pytest.approx(1, rel=0.15)
    if made == "amx":
        assert many < 0.3
        assert ours.uncertainty == 1.0
        assert "estimated" in ours.source
    else:
        assert many == 1


def test_without_amx_our_kernel_is_not_predicted_at_the_rate_of_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rough run on a Xeon: about 10,257 ps a weight at 512 rows with ours, vLLM's several times faster."""
    from quantserve.predict.machine import linear_cost, machine_of

    one = machine_of(XEON)
    weights = 4096 * 4096
    ours = linear_cost(one, speed.CODEBOOK, "none")
    theirs = linear_cost(one, speed.VLLM_AMX, "none")
    assert ours.seconds(512, 4096, 4096) / weights == pytest.approx(10_257e-12, rel=0.25)
    assert ours.seconds(16, 4096, 4096) / weights == pytest.approx(366e-12, rel=0.25)
    assert 5 < ours.seconds(64, 4096, 4096) / theirs.seconds(64, 4096, 4096) < 9
    without = machine_of(EPYC)
    assert linear_cost(without, speed.CODEBOOK, "none").seconds(512, 4096, 4096) < ours.seconds(512, 4096, 4096)


@pytest.mark.parametrize("other", ["", "Other,"])
def test_the_plan_is_predicted_with_the_kernel_it_leads_to(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = (seconds(XEON, other + left_out, monkeypatch)[0] for left_out in (THEIRS, OURS))
    assert ours > 3 * theirs


# --- experts ------------------------------------------------------------------------------------------


def mixture(width: int = 768, hidden: int = 2048, group: int = 128, **changes: Any) -> Checkpoint:
    """A mixture of an unknown family with two experts, quantized with AWQ."""
    tensors = {}
    for expert in range(2):
        path = f"model.layers.0.mlp.experts.{expert}."
        for name, n, k in (("gate_proj", width, hidden), ("up_proj", width, hidden), ("down_proj", hidden, width)):
            tensors |= quantized_linear(
                path + name, n, k, "awq", bits=4, group_size=group, dtype="F16", sparse=0, full_rows=0
            )
    quantization = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    config = {"model_type": "unheard_of", "architectures": ["UnheardOfForCausalLM"], "torch_dtype": "bfloat16"}
    config["quantization_config"] = {**quantization, **changes.pop("quantization", {})}
    return Checkpoint.from_tensors({**config, **changes}, tensors | changes.pop("tensors", {}))


A100, MI300 = find_target("a100-80g"), find_target("mi300x")


@pytest.mark.parametrize(
    ("options", "target", "ranks", "code", "words"),
    [
        ({}, A100, 2, None, ()),  # 768 / 2 = 384, three groups
        ({}, A100, 4, "awq-experts-slow", ("192", "cut to 64")),
        ({}, A100, 8, "awq-experts-slow", ("96", "cut to 32")),
        ({}, A100, 16, "awq-experts-group", ("48", "divides both")),
        ({"hidden": 2112, "group": 64}, A100, 1, "awq-experts-slow", ("2112",)),
        ({"group": 256, "width": 1024}, A100, 1, "awq-experts-slow", ("groups of 256",)),
        ({"group": 64}, A100, 4, None, ()),
        ({"group": -1}, A100, 1, "awq-experts-group", ("group_size -1",)),
        ({}, MI300, 1, "awq-experts-slow", ("ROCm",)),
        ({}, EPYC, 1, None, ()),
        ({}, EPYC, 2, None, ()),
        ({}, EPYC, 4, "awq-experts-group", ("192", "group of 128")),
        ({"group": -1}, EPYC, 1, None, ()),
        ({"group": -1}, EPYC, 2, "awq-experts-group", ("384", "all inputs")),
        ({}, XEON, 1, None, ()),
        ({"hidden": 2112, "group": 64}, XEON, 1, None, ()),
        ({"scoring_func": "sigmoid"}, XEON, 1, None, ()),
    ],
)
def test_experts_by_vllms_rules(
    options: dict[str, Any], target: Target, ranks: int, code: str | None, words: Iterable[str]
) -> None:
    found = said(mixture(**options), target, ranks)
    mine = {name for name in found if "experts" in name}
    assert mine == ({code} if code else set())
    assert "awq-group-splits-ranks" not in found
    assert all(word in text(found[str(code)]) for word in words)


@pytest.mark.parametrize(
    ("options", "target", "left_out", "words"),
    [
        ({}, EPYC, OURS, ("AMX",)),
        ({}, EPYC, "Other", ("AMX",)),  # vLLM chooses its own for linears, and has none for experts
        ({}, XEON, OURS, None),
        ({"hidden": 2112, "group": 64}, XEON, OURS, ("2112",)),
        ({"scoring_func": "sigmoid"}, XEON, OURS, ("sigmoid",)),
    ],
)
def test_experts_on_vllms_kernel_for_cpus(
    options: dict[str, Any], target: Target, left_out: str, words: Iterable[str] | None
) -> None:
    found = said(mixture(**options), target, left_out=left_out)
    assert ("awq-cpu-experts" in found) == (words is not None)
    assert all(word in text(found["awq-cpu-experts"]) for word in words or ())


@pytest.mark.parametrize(("options", "name"), [({}, THEIRS), ({"scoring_func": "sigmoid"}, OURS)])
def test_with_amx_a_mixture_that_vllm_cannot_serve_gets_our_kernel(options: dict[str, Any], name: str) -> None:
    assert given(mixture(**options), XEON) == name


def test_expert_parallelism_leaves_experts_whole() -> None:
    assert "awq-experts-slow" in said(mixture(), A100, 4)
    assert not said(mixture(), A100, 4, enable_expert_parallel=True).keys() & {"awq-experts-slow", "awq-experts-group"}


def test_the_fallback_reads_other_keys() -> None:
    old = {"quantization": {"w_bit": 4, "q_group_size": 128, "bits": None, "group_size": None}}
    checkpoint = mixture(**old)
    quantization = {k: v for k, v in checkpoint.config["quantization_config"].items() if v is not None}
    checkpoint = replace(checkpoint, config={**checkpoint.config, "quantization_config": quantization})
    assert "awq-experts-keys" in said(checkpoint, A100, 4)
    assert "awq-experts-keys" not in said(checkpoint, A100, 2)


def test_profiles_of_cpus_say_whether_they_serve_experts() -> None:
    for target, serves in ((EPYC, {OURS: True, THEIRS: False}), (XEON, {OURS: True, THEIRS: True})):
        profile = speed.kernel(target, 4, "vllm-0.32")
        assert profile is not None
        keys = {speed.KERNELS.keys[name]: value for name, value in serves.items()}
        assert {one.key: one.experts for one in (profile, *profile.alternatives)} == keys


# --- families that core does not know -----------------------------------------------------------------


def unknown(tmp_path: Path, **options: Any) -> Path:
    """An AWQ checkpoint whose family no table has; its config gives no sizes."""
    config = {"model_type": "unheard_of", "architectures": ["UnheardOfForCausalLM"]}
    config |= dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "head_dim"), REMOVE)
    return make_llama(tmp_path / "m", "awq", config={**config, **options.pop("config", {})}, **options)


DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("options", "ranks", "code", "words"),
    [
        ({"intermediate": 29568, "hidden": 1024, "heads": 8, "kv_heads": 8}, 8, "awq-group-splits-ranks", "29568/8"),
        ({"intermediate": 384}, 2, "awq-group-splits-ranks", "K 384/2 = 192"),
        ({"intermediate": 264, "group_size": 8}, 2, "awq-word-splits-ranks", "N 264/2 = 132"),
        ({"drop": [f"{DOWN}.qzeros"]}, 1, "awq-missing-tensors", f"{DOWN}.qzeros"),
        ({"override": {f"{DOWN}.scales": ("F16", (4, 248))}}, 1, "awq-wrong-shape", f"{DOWN}.scales [4, 248]"),
        ({"group_size": 64, "config": {"quantization_config": {
            "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}}}, 1, "awq-group-size", "of 64"),
    ],
)  # fmt: skip
def test_linears_of_an_unknown_family_are_checked(
    tmp_path: Path, options: dict[str, Any], ranks: int, code: str, words: str
) -> None:
    found = errors(composed(unknown(tmp_path, **options), ranks=ranks))
    assert words in text(found[code])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_good_checkpoint_of_an_unknown_family(tmp_path: Path, ranks: int) -> None:
    assert not {code for code in errors(composed(unknown(tmp_path), ranks=ranks)) if code.startswith("awq")}


def test_key_value_heads_are_replicated_beyond_their_number(tmp_path: Path) -> None:
    folder = unknown(tmp_path, hidden=512, heads=8, kv_heads=2, head_dim=64, intermediate=1024)
    assert not {code for code in errors(composed(folder, ranks=8)) if code.startswith("awq-word")}


# --- files without zero points ------------------------------------------------------------------------


def test_symmetric_files_are_slow_on_gpus_and_fine_on_cpus(tmp_path: Path) -> None:
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": False, "version": "gemm"}
    config = {"quantization_config": quantization}
    folder = make_llama(tmp_path / "m", "awq", dtype="BF16", config=config)
    composition = composed(folder, "a100-80g")
    assert not errors(composition)
    assert "auto-round" in findings(composition)["awq-zero-point"].message
    assert composition.engine_kwargs["dtype"].value == "float16"  # vLLM's plain kernel computes in nothing else
    assert list(errors(composed(folder, "a100-80g", dtype="bfloat16"))) == ["awq-plain-kernel-dtype"]
    for target in (EPYC, XEON, MI300):
        assert "awq-zero-point" not in said(composition.checkpoint, target)
    gemma = make_llama(tmp_path / "g", "awq", dtype="BF16", config={**config, "model_type": "gemma2"})
    assert "float16 only" in errors(composed(gemma, "a100-80g"))["awq-plain-kernel-dtype"].message
