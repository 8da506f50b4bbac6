"""LoRA adapters against their model, from headers: what vLLM refuses, ignores or would compute wrongly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoints import Spec, make_llama, write_safetensors
from helpers.hub import COMMIT, serve_hub
from quantserve.checkpoint import Checkpoint
from quantserve.checks.adapters import check_adapters
from quantserve.config import load_object
from quantserve.errors import CheckpointError
from quantserve.finding import Finding
from quantserve.planning.compose import Composition, compose
from quantserve.planning.plan import make_plan
from quantserve.plugins.registry import Registry
from quantserve.target import find_target

HIDDEN, INNER = 256, 512
FILES = {"adapter_config.json", "adapter_model.safetensors"}
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("base") / "m")


def pair(module: str, rank: int = 8, n: int = HIDDEN, k: int = HIDDEN) -> dict[str, Spec]:
    """The tensors of one module."""
    stem = f"base_model.model.{module}"
    return {f"{stem}.lora_A.weight": ("F32", (rank, k)), f"{stem}.lora_B.weight": ("F32", (n, rank))}


def write(folder: Path, tensors: Mapping[str, Spec] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    given = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"], **config}
    kept = {key: value for key, value in given.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(kept))
    every = {**pair(Q), **pair(DOWN, k=INNER)} if tensors is None else tensors
    write_safetensors(folder / "adapter_model.safetensors", every)
    return folder


def checked(base: Path, *sources: Path | str, target: str = "a100-80g", **engine: Any) -> Composition:
    adapters = [{"name": f"a{index}", "source": str(source)} for index, source in enumerate(sources)]
    ranks = engine.pop("num_workers", 1)
    model = {
        "engine_config": {"model_id": "m", "hf_model_id": str(base), "adapters": adapters, **engine},
        "scaling_config": {"num_workers": ranks},
    }
    app = load_object({"models": [model]}, "test")
    return compose(app.models[0], Registry.load(), find_target(target))


def of_adapters(composition: Composition) -> dict[str, Finding]:
    return {
        one.code: one for one in composition.findings if one.message.startswith("adapter '") or "adapter" in one.code
    }


def test_a_good_adapter_has_no_findings_and_sets_the_arguments(base: Path, tmp_path: Path) -> None:
    first = write(tmp_path / "first")
    second = write(tmp_path / "second", {**pair(Q, 20)}, r=20, use_rslora=True)
    composition = checked(base, first, second)
    assert of_adapters(composition) == {}
    plan = make_plan(composition)
    lora = {key: plan.engine_args[key] for key in ("enable_lora", "max_loras", "max_cpu_loras", "max_lora_rank")}
    assert lora == {"enable_lora": True, "max_loras": 2, "max_cpu_loras": 2, "max_lora_rank": 32}
    assert {plan.provenance[key] for key in lora} == {"core"}
    assert plan.frontend_args["lora_modules"] == [
        {"name": "a0", "path": str(first), "base_model_name": "m"},
        {"name": "a1", "path": str(second), "base_model_name": "m"},
    ]
    assert plan.downloads == []


def test_the_config_wins_and_many_adapters_share_slots(base: Path, tmp_path: Path) -> None:
    adapters = [write(tmp_path / str(index)) for index in range(10)]
    plan = make_plan(checked(base, *adapters))
    assert (plan.engine_args["max_loras"], plan.engine_args["max_cpu_loras"]) == (8, 10)
    plan = make_plan(checked(base, *adapters, engine_kwargs={"max_loras": 2, "max_lora_rank": 64}))
    assert (plan.engine_args["max_loras"], plan.engine_args["max_cpu_loras"]) == (2, 10)
    assert (plan.engine_args["max_lora_rank"], plan.provenance["max_lora_rank"]) == (64, "config")


@pytest.mark.parametrize(
    ("config", "code", "said"),
    [
        ({"peft_type": "IA3"}, "adapter-unsupported", "it is of PEFT's type 'IA3'"),
        ({"r": None}, "adapter-invalid", "it has r: nothing"),
        ({"r": 0}, "adapter-invalid", "the rank r is 0"),
        ({"lora_alpha": "16"}, "adapter-invalid", "it has lora_alpha: '16'"),
        ({"use_dora": True}, "adapter-unsupported", "DoRA (use_dora)"),
        ({"lora_bias": True}, "adapter-unsupported", "biases of its own (lora_bias)"),
        ({"bias": "all"}, "adapter-unsupported", "it has biases (bias: 'all')"),
        ({"modules_to_save": ["lm_head"]}, "adapter-unsupported", "whole modules (modules_to_save: lm_head)"),
        ({"init_lora_weights": "pissa"}, "adapter-unsupported", "it was begun with 'pissa'"),
        ({"layer_replication": [[0, 2]]}, "adapter-unsupported", "replicated layers"),
        ({"r": 600}, "adapter-rank", "its rank is 600, more than max_lora_rank 512"),
        ({"rank_pattern": {"q_proj": 1024}}, "adapter-rank", "its rank is 1024"),
        ({"base_model_name_or_path": "meta-llama/Llama-3.1-8B"}, "adapter-base-differs", "Llama-3.1-8B, and the model"),
    ],
)
def test_configs(base: Path, tmp_path: Path, config: dict[str, Any], code: str, said: str) -> None:
    finding = of_adapters(checked(base, write(tmp_path / "a", **config)))[code]
    assert finding.message.startswith("adapter 'a0': ")
    assert said in finding.message
    assert finding.severity == ("warning" if code == "adapter-base-differs" else "error")


def test_a_rank_above_the_configs(base: Path, tmp_path: Path) -> None:
    found = of_adapters(checked(base, write(tmp_path / "a", pair(Q, 20), r=20), engine_kwargs={"max_lora_rank": 16}))
    assert "its rank is 20, more than max_lora_rank 16" in found["adapter-rank"].message
    assert "set max_lora_rank to 32" in found["adapter-rank"].fix


@pytest.mark.parametrize("name", ["org/m", "org/M-AWQ", "someone/m-GPTQ-Int4-g128", "/tmp/train/m2", "org/m-hf"])
def test_names_of_one_model(base: Path, tmp_path: Path, name: str) -> None:
    assert of_adapters(checked(base, write(tmp_path / "a", base_model_name_or_path=name))) == {}


@pytest.mark.parametrize(
    ("tensors", "code", "said"),
    [
        (pair("model.layers.7.self_attn.q_proj"), "adapter-module-missing", "model.layers.7.self_attn.q_proj"),
        (pair("model.layers.0.self_attn.qq_proj"), "adapter-module-missing", "1 module of 1"),
        (pair(Q, n=128), "adapter-wrong-shape", "q_proj.lora_B.weight [128, 8], expected [256, 8]"),
        (pair(Q, k=128), "adapter-wrong-shape", "q_proj.lora_A.weight [8, 128], expected [8, 256]"),
        (pair(Q, rank=4), "adapter-wrong-shape", "lora_A.weight [4, 256], expected [8, 256]"),
        (dict([*pair(Q).items()][:1]), "adapter-incomplete", "q_proj.lora_B"),
        (
            {**pair(Q), f"base_model.model.{Q}.lora_magnitude_vector": ("F32", (256,))},
            "adapter-unsupported",
            "1 tensor that is neither lora_A nor lora_B",
        ),
        (
            {**pair(Q), "base_model.model.model.embed_tokens.base_layer.weight": ("F32", (4, 4))},
            "adapter-embedding-ignored",
            "a changed embedding",
        ),
    ],
)
def test_tensors(base: Path, tmp_path: Path, tensors: dict[str, Spec], code: str, said: str) -> None:
    finding = of_adapters(checked(base, write(tmp_path / "a", tensors)))[code]
    assert said in " ".join((finding.message, *finding.offenders))


def test_ranks_of_single_modules(base: Path, tmp_path: Path) -> None:
    tensors = {**pair(Q, 4), **pair(DOWN, k=INNER)}
    assert of_adapters(checked(base, write(tmp_path / "a", tensors, rank_pattern={r"layers\.0\..*q_proj": 4}))) == {}


def test_embeddings_and_the_output_layer(base: Path, tmp_path: Path) -> None:
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    stem = "base_model.model.model.embed_tokens"
    good: dict[str, Spec] = {
        f"{stem}.lora_embedding_A": ("F32", (8, vocabulary)),
        f"{stem}.lora_embedding_B": ("F32", (HIDDEN, 8)),
        **pair("lm_head", n=vocabulary),
    }
    assert of_adapters(checked(base, write(tmp_path / "good", good))) == {}
    wrong: dict[str, Spec] = {**good, f"{stem}.lora_embedding_A": ("F32", (8, vocabulary + 1))}
    assert set(of_adapters(checked(base, write(tmp_path / "wrong", wrong)))) == {"adapter-wrong-shape"}


def test_pickles_need_permission(base: Path, tmp_path: Path) -> None:
    import torch

    folder = write(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({name: torch.zeros(*shape) for name, (_, shape) in pair(Q).items()}, folder / "adapter_model.bin")
    refused = of_adapters(checked(base, folder))["pickle-weights"]
    assert refused.severity == "error"
    assert "safe_serialization=True" in refused.fix
    allowed = of_adapters(checked(base, folder, allow_pickle=True))
    assert set(allowed) == {"pickle-allowed"}


def test_what_is_not_there(base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("x")
    found = checked(base, tmp_path / "empty").errors
    assert {one.code for one in found} == {"adapter-invalid"}
    assert "adapter_config.json is missing" in found[0].message
    with pytest.raises(CheckpointError, match=r"adapter 'a0': no model folder .*gone"):
        checked(base, tmp_path / "gone")


def test_memory_of_the_slots(base: Path, tmp_path: Path) -> None:
    """Slots x rank x (N + K) of every linear, embedding and output layer, in the served dtype; twice on a CPU."""
    adapter = write(tmp_path / "a")
    config = json.loads((base / "config.json").read_text())
    kv = HIDDEN * config["num_key_value_heads"] // config["num_attention_heads"]
    per_layer = 2 * (HIDDEN + HIDDEN) + 2 * (kv + HIDDEN) + 3 * (HIDDEN + INNER)
    expected = 8 * (2 * per_layer + 2 * (config["vocab_size"] + HIDDEN)) * 2
    gpu, cpu = checked(base, adapter).memory, checked(base, adapter, target="cpu").memory
    assert gpu is not None
    assert cpu is not None
    assert (gpu.adapters_bytes, cpu.adapters_bytes) == (expected, 2 * expected)
    without = checked(base).memory
    assert without is not None
    assert without.kv_cache_bytes - gpu.kv_cache_bytes == expected
    assert "adapters_bytes" not in without.to_json()


def test_ranks_share_an_adapter(base: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path / "a")
    assert of_adapters(checked(base, adapter, num_workers=2)) == {}
    one = write(tmp_path / "one", pair(Q, 1), r=1)
    found = of_adapters(checked(base, one, num_workers=2, engine_kwargs={"fully_sharded_loras": True}))
    assert "max_lora_rank 1 is not a multiple of the 2 ranks" in found["adapter-rank"].message


def test_experts_and_large_vocabularies() -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 64}
    mixture = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4, **sizes}
    model = load_object(
        {"models": [{"engine_config": {"model_id": "m", "engine_kwargs": {"enable_lora": True}}}]}, "test"
    )
    for config, target, expected in (
        ({**mixture, "vocab_size": 1000}, "cpu", ["adapter-experts"]),
        ({**mixture, "vocab_size": 1000}, "a100-80g", []),
        ({**mixture, "vocab_size": 262_144}, "a100-80g", ["adapter-vocabulary"]),
    ):
        checkpoint = Checkpoint.from_tensors({"num_key_value_heads": 2, **config})
        found = check_adapters((), checkpoint, model.models[0], find_target(target))
        assert [one.code for one in found] == expected


def test_an_adapter_of_the_hub_is_pinned(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with serve_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        hub.repos["org/sql"] = write(tmp_path / "a")
        plan = make_plan(checked(base, "org/sql"))
        assert {seen.path.rpartition("/")[2] for seen in hub.seen if "resolve" in seen.path} == FILES
    (download,) = plan.downloads
    snapshot = str(tmp_path / "cache" / "models--org--sql" / "snapshots" / COMMIT)
    assert (download["source"], download["revision"], download["folder"]) == ("org/sql", COMMIT, snapshot)
    assert set(download["files"]) == FILES
    assert plan.frontend_args["lora_modules"][0]["path"] == snapshot
