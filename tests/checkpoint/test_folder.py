"""Folders: which files count, the index, config and tokenizer files, and what cannot be a model at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.calls import calls
from helpers.checkpoints import CHAT_TEMPLATE, LLAMA_70B, REMOVE, make_llama, write_header, write_safetensors
from quantserve.checkpoint import Checkpoint, Tensor, open_checkpoint
from quantserve.errors import CheckpointError
from quantserve.finding import Finding

INDEX = "model.safetensors.index.json"


def found(folder: Path, **kwargs: Any) -> dict[str, Finding]:
    """The problems of a folder by code, each at most once."""
    problems = open_checkpoint(str(folder), **kwargs).problems
    by_code = {problem.code: problem for problem in problems}
    assert len(by_code) == len(problems), problems
    assert all(problem.message.isprintable() for problem in problems)
    return by_code


def cost(folder: Path) -> int:
    """Calls of functions to open a folder."""
    return calls(lambda: open_checkpoint(str(folder)))


def edit(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not REMOVE}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_llama(tmp_path / "m", "awq", shards=3)


# --- good folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fp16", "awq", "squeezellm"])
@pytest.mark.parametrize("shards", [1, 4])
def test_good_folder(tmp_path: Path, method: str, shards: int) -> None:
    folder = make_llama(tmp_path / "m", method, shards=shards, quant_files={"quant_config.json": {"wbits": 4}})
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.problems == ()
    assert (checkpoint.location, checkpoint.path, checkpoint.tensors_complete) == ("local", folder, True)
    facts = ("present", "max_token_id", "max_base_token_id", "has_chat_template")
    assert checkpoint.tokenizer["is_remote_code"] is False
    assert [checkpoint.tokenizer[fact] for fact in facts] == [True, 511, 511, True]
    assert checkpoint.quant_files == {"quant_config.json": {"wbits": 4}}
    assert checkpoint.torch_dtype == "float16"
    assert (checkpoint.quantization_config or {}).get("quant_method") == (None if method == "fp16" else method)
    assert checkpoint.weight_bytes == sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert {tensor.file for tensor in checkpoint.tensors.values()} <= set(checkpoint.files)
    json.dumps(checkpoint.to_json())


def test_quantization_config_is_found_where_vllm_finds_it() -> None:
    outer, inner = {"quant_method": "awq"}, {"quant_method": "gptq"}
    modelopt = {"hf_quant_config.json": {"producer": {"name": "modelopt"}}}
    made = Checkpoint.from_tensors
    assert (
        made({"quantization_config": outer, "text_config": {"quantization_config": inner}}).quantization_config == outer
    )
    assert made({"text_config": {"quantization_config": inner}}).quantization_config == inner
    assert made({"compression_config": outer}).quantization_config == outer
    assert made({}, quant_files=modelopt).quantization_config == modelopt["hf_quant_config.json"]
    assert made({"quantization_config": outer}, quant_files=modelopt).quantization_config == outer
    assert made({}, quant_files={"quant_config.json": {"wbits": 4}}).quantization_config is None
    assert made({"quantization_config": "awq"}).quantization_config is None


@pytest.mark.parametrize(
    ("config", "dtype"),
    [({"torch_dtype": "bfloat16"}, "bfloat16"), ({"dtype": "torch.float32"}, "float32"), ({"dtype": "half"}, "float16"),
     ({"text_config": {"dtype": "bfloat16"}}, "bfloat16"), ({}, None), ({"dtype": 7}, None)],
)  # fmt: skip
def test_dtype_of_the_config(config: dict[str, Any], dtype: str | None) -> None:
    assert Checkpoint.from_tensors(config).torch_dtype == dtype


def test_checkpoints_for_plugin_tests() -> None:
    checkpoint = Checkpoint.from_tensors({"hidden_size": 4}, {"a.weight": ("F16", [4, 4])}, other={"n": 3})
    assert checkpoint.tensors == {"a.weight": Tensor("a.weight", "F16", (4, 4))}
    assert (checkpoint.weight_bytes, checkpoint.other, checkpoint.text_config) == (32, {"n": 3}, {"hidden_size": 4})
    assert "model.safetensors" in checkpoint.files


# --- which files, and the index ---------------------------------------------------------------------------------------


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    problem = found(sharded)["shard-missing"]
    assert problem.offenders == ("model-00002-of-00003.safetensors",)
    assert "1 of 3 files" in problem.message


def test_missing_shard_and_index(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    (sharded / INDEX).unlink()
    problems = found(sharded)
    assert set(problems) == {"index-missing", "shard-missing"}
    assert problems["shard-missing"].offenders == ("model-00002-of-00003.safetensors",)


def test_index_alone(sharded: Path) -> None:
    for file in sharded.glob("*.safetensors"):
        file.unlink()
    assert set(found(sharded)) == {"shard-missing"}


def test_tensor_in_index_but_not_in_shard(sharded: Path) -> None:
    table = json.loads((sharded / INDEX).read_text())["weight_map"]
    edit(sharded / INDEX, weight_map=table | {"ghost": "model-00001-of-00003.safetensors"})
    assert found(sharded)["index-tensor-missing"].offenders == ("ghost",)


def test_tensor_in_shard_but_not_in_index(sharded: Path) -> None:
    table = json.loads((sharded / INDEX).read_text())["weight_map"]
    del table["lm_head.weight"]
    edit(sharded / INDEX, weight_map=table)
    assert found(sharded)["index-tensor-unlisted"].offenders == ("lm_head.weight",)


def test_tensor_in_another_shard_than_the_index_says(sharded: Path) -> None:
    table = json.loads((sharded / INDEX).read_text())["weight_map"]
    edit(sharded / INDEX, weight_map=table | {"lm_head.weight": "model-00001-of-00003.safetensors"})
    problems = found(sharded)
    assert set(problems) == {"index-mismatch"}
    assert problems["index-mismatch"].severity == "warning"


@pytest.mark.parametrize(
    ("file", "code"),
    [("../secret.safetensors", "path-escape"), ("/etc/passwd", "path-escape"), ("a/../../b.safetensors", "path-escape"),
     ("..\\b.safetensors", "path-escape"), ("C:\\b.safetensors", "path-escape"), ("", "path-escape"),
     ("x\0.safetensors", "path-escape"), ("sub/b.safetensors", "shard-subfolder"), ("b.bin", "shard-missing")],
)  # fmt: skip
def test_index_that_names_other_places(sharded: Path, file: str, code: str) -> None:
    write_safetensors(sharded.parent / "secret.safetensors", {"stolen": ("F16", (1,))})
    table = json.loads((sharded / INDEX).read_text())["weight_map"]
    edit(sharded / INDEX, weight_map=table | {"stolen": file})
    checkpoint = open_checkpoint(str(sharded))
    assert [problem.code for problem in checkpoint.problems] == [code]
    assert checkpoint.problems[0].severity == "error"
    assert "stolen" not in checkpoint.tensors


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"{nonsense", b'{"weight_map": []}', b'{"weight_map": {"a": 7}}', b"\xff\xfe", b"[" * 100_000],
)
def test_invalid_index(sharded: Path, content: bytes) -> None:
    (sharded / INDEX).write_bytes(content)
    checkpoint = open_checkpoint(str(sharded))
    assert [problem.code for problem in checkpoint.problems] == ["index-invalid"]
    assert checkpoint.tensors


def test_stray_weight_sets(sharded: Path) -> None:
    write_safetensors(sharded / "model.safetensors", {"old": ("F16", (1,))})
    write_safetensors(sharded / "consolidated.safetensors", {"old": ("F16", (1,))})
    (sharded / "pytorch_model.bin").write_bytes(b"old")
    (sharded / "training_args.bin").write_bytes(b"args")
    checkpoint = open_checkpoint(str(sharded))
    said = [(problem.code, problem.severity.value, problem.offenders) for problem in checkpoint.problems]
    assert said == [
        ("mistral-format", "info", ("consolidated.safetensors",)),
        ("stray-weights", "warning", ("model.safetensors",)),
        ("pickle-ignored", "info", ("pytorch_model.bin",)),
    ]
    assert "old" not in checkpoint.tensors


def test_duplicate_tensors_without_index(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m")
    write_safetensors(folder / "other.safetensors", {"lm_head.weight": ("F16", (1,)), "new": ("F16", (1,))})
    problems = found(folder)
    assert set(problems) == {"index-missing", "duplicate-tensor"}
    assert "model.safetensors" in problems["duplicate-tensor"].message
    assert "other.safetensors" in problems["duplicate-tensor"].message


def test_only_consolidated_weights_are_the_weights(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.tensors
    assert checkpoint.problems == ()


@pytest.mark.parametrize("name", ["model.gguf", "tf_model.h5"])
def test_no_weights(tmp_path: Path, name: str) -> None:
    folder = make_llama(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / name)
    assert name in found(folder)["weights-missing"].offenders


# --- unusual files ----------------------------------------------------------------------------------------------------


def test_links(sharded: Path) -> None:
    elsewhere = sharded.parent / "store"
    elsewhere.mkdir()
    (sharded / "model-00002-of-00003.safetensors").rename(elsewhere / "x")
    (sharded / "model-00002-of-00003.safetensors").symlink_to(elsewhere / "x")
    problems = found(sharded)
    assert set(problems) == {"symlink-outside"}
    assert problems["symlink-outside"].severity == "warning"
    (elsewhere / "x").unlink()
    assert set(found(sharded)) == {"file-unreadable", "shard-missing"}


def test_pipes_and_folders_are_not_opened(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m")
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()
    problems = found(folder)
    assert problems["file-unreadable"].offenders == ("pipe.safetensors", "tokenizer.json")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permissions(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m")
    (folder / "model.safetensors").chmod(0)
    assert set(found(folder)) == {"file-unreadable"}


def test_file_names_that_are_no_text(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m")
    (folder / os.fsdecode(b"\xff\x1b[2J.safetensors")).write_bytes(b"")
    problems = found(folder)
    assert "\\udcff\\x1b[2J" in problems["header-truncated"].message
    json.dumps(open_checkpoint(str(folder)).to_json())


# --- config and tokenizer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "part"),
    [(b"", "empty"), (b"[]", "an array"), (b'{"a": 1,\n "b": }', "2:7"), (b"\xff", "byte 0"),
     (b"\xef\xbb\xbf{}", "BOM"),
     (b"[" * 100_000, "deeply"), (b'{"a": 1' + b"0" * 9000 + b"}", "digits"), (b"null", "null"),
     (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull")],
)  # fmt: skip
def test_invalid_config(tmp_path: Path, content: bytes, part: str) -> None:
    folder = make_llama(tmp_path / "m")
    (folder / "config.json").write_bytes(content)
    (folder / "quant_config.json").write_bytes(content)
    problems = found(folder)
    assert set(problems) == {"config-invalid", "quant-config-invalid"}
    assert part in problems["config-invalid"].message
    assert open_checkpoint(str(folder)).config == {}


def test_missing_config(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m")
    (folder / "config.json").unlink()
    assert set(found(folder)) == {"config-missing"}


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m")
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    problem = found(folder)["config-missing"]
    assert "LoRA adapter" in problem.message
    assert "org/base" in problem.fix


def test_an_index_left_beside_a_whole_file(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m")
    table = {"model.norm.weight": "model-00001-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    assert "or delete model.safetensors.index.json if" in found(folder)["shard-missing"].fix


def test_highest_token_id(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", added_tokens={"<|pad|>": 515})
    assert open_checkpoint(str(folder)).tokenizer["max_token_id"] == 515
    edit(folder / "tokenizer_config.json", added_tokens_decoder={"600": {"content": "<|x|>"}, "junk": {}})
    assert open_checkpoint(str(folder)).tokenizer["max_token_id"] == 600
    unigram = {"model": {"type": "Unigram", "vocab": [["a", 0.0], ["b", 0.0]]}, "added_tokens": None}
    (folder / "tokenizer.json").write_text(json.dumps(unigram))
    edit(folder / "tokenizer_config.json", added_tokens_decoder=REMOVE)
    # <s>, </s> and <unk> of tokenizer_config.json are in no vocabulary, so loading adds them behind "b".
    assert open_checkpoint(str(folder)).tokenizer["max_token_id"] == 4
    edit(folder / "tokenizer_config.json", bos_token=REMOVE, eos_token=REMOVE, unk_token=REMOVE, pad_token=REMOVE)
    assert open_checkpoint(str(folder)).tokenizer["max_token_id"] == 1
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text('{"a": 0, "b": 41}')
    (folder / "added_tokens.json").write_text('{"c": 42}')
    assert open_checkpoint(str(folder)).tokenizer["max_token_id"] == 42


@pytest.mark.parametrize("indent", [None, 2])
def test_large_tokenizer_is_quick(tmp_path: Path, indent: int | None) -> None:
    folder = make_llama(tmp_path / "m", vocab=128_000, added_tokens={"<|eot|>": 128_009})
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["vocab"]['"merges": ['] = 128_001
    data["model"]["vocab"]["merges"] = 128_002
    data["model"]["merges"] = [[f"]}}{i}", '"]'] for i in range(280_000)]
    for model in (data["model"], dict(reversed(data["model"].items()))):
        (folder / "tokenizer.json").write_text(json.dumps(data | {"model": model}, indent=indent))
        assert open_checkpoint(str(folder)).tokenizer["max_token_id"] == 128_009
    (folder / "tokenizer.json").write_text(json.dumps(data, indent=indent))
    assert cost(folder) < 10_000  # of 280,000 merges
    (folder / "tokenizer.json").write_text(json.dumps(data, indent=indent)[:-100])
    assert set(found(folder)) == {"tokenizer-invalid"}


def test_chat_template(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", chat_template=False)
    assert open_checkpoint(str(folder)).tokenizer["has_chat_template"] is False
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    assert open_checkpoint(str(folder)).tokenizer["has_chat_template"] is True


def test_missing_and_invalid_tokenizer(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", tokenizer=False)
    problems = found(folder)
    assert set(problems) == {"tokenizer-missing"}
    assert problems["tokenizer-missing"].severity == "warning"
    for content in (b"{}", b'{"model": 7}', b"nonsense", b'{"model": {"vocab": {}}, "added_tokens": 1}'):
        (folder / "tokenizer.json").write_bytes(content)
        assert set(found(folder)) == {"tokenizer-invalid"}


# --- what cannot be a model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "parts"),
    [("{0}/lama", ("no model folder", "llama")), ("{0}/nowhere/llama", ("'nowhere'", "llama")),
     ("{0}/llama/model.safetensors", ("is a file", "{0}/llama")), ("{0}/x.gguf", ("GGUF",)),
     ("{0}/models", ("neither config.json nor weights", "llama")), ("{0}/empty", ("it holds no files",)),
     ("./nowhere", ("./nowhere",)), ("~nobody-of-that-name/m", ("fix",)), ("x" * 5000, ("fix",)), ("", ("",)),
     ("https://huggingface.co/org/name/tree/main", ("a URL", "fix: name it org/name")),
     ("ftp://bucket/org/name", ("a URL", "fix: download the model, and name its folder"))],
)  # fmt: skip
def test_no_model_here(tmp_path: Path, source: str, parts: tuple[str, ...]) -> None:
    make_llama(tmp_path / "llama")
    make_llama(tmp_path / "models" / "llama")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source.format(tmp_path))
    assert "fix:" in str(caught.value)
    assert len(str(caught.value)) < 1500
    for part in parts:
        assert part.format(tmp_path) in str(caught.value)


def test_relative_and_home_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_llama(tmp_path / "org" / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in ("org/model", "./org/model", "~/org/model"):
        assert open_checkpoint(source).problems == ()


# --- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["awq", "squeezellm"])
def test_70b_is_quick(tmp_path: Path, method: str) -> None:
    folder = make_llama(tmp_path / "m", method, **LLAMA_70B)
    tensors = len(open_checkpoint(str(folder)).tensors)
    assert tensors > 1200
    assert cost(folder) < 100 * tensors


def test_70b_is_light(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", "squeezellm", **LLAMA_70B, sparse=0.0045)
    program = (
        "import re, sys; from quantserve.checkpoint import open_checkpoint; c = open_checkpoint(sys.argv[1]);"
        "assert len(c.tensors) > 2500 and not c.problems;"
        "assert not {'torch', 'numpy', 'vllm', 'ray', 'huggingface_hub', 'httpx2'} & set(sys.modules);"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100_000


# --- anything at all --------------------------------------------------------------------------------------------------

anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-9, 2**70), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
fields = st.sampled_from(
    ["weight_map", "metadata", "quantization_config", "text_config", "dtype", "model", "vocab", "added_tokens", "id",
     "added_tokens_decoder", "chat_template", "compression_config"]
)  # fmt: skip
shaped = st.dictionaries(fields, st.one_of(anything, st.dictionaries(fields, anything, max_size=3)), max_size=4)
contents = st.one_of(
    st.binary(max_size=60),
    st.one_of(anything, shaped).map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass")),
)
json_files = st.sampled_from(
    ["config.json", INDEX, "quant_config.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"]
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(json_files, contents, min_size=1, max_size=4))
def test_any_json_is_read_without_an_exception(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any-json"
    make_llama(folder, layers=1)
    for name in ("quant_config.json", "added_tokens.json", INDEX):
        (folder / name).unlink(missing_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    checkpoint = open_checkpoint(str(folder))
    checkpoint.to_json()
    assert checkpoint.quantization_config is None or isinstance(checkpoint.quantization_config, dict)
    assert checkpoint.torch_dtype is None or isinstance(checkpoint.torch_dtype, str)
    for problem in checkpoint.problems:
        assert problem.message.isprintable()
        assert len(problem.message) < 2000


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_any_source_is_a_checkpoint_error(source: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        from huggingface_hub import constants

        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        if Path(source).name in {"", ".", ".."} or "\0" in source or not Path(source).is_dir():
            with pytest.raises(CheckpointError, match="fix:"):
                open_checkpoint(source)


def test_oversized_json_is_not_read(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m")
    with (folder / "config.json").open("r+b") as file:
        file.truncate(10 * 2**30)
    assert "limit" in found(folder)["config-invalid"].message


def test_100_mb_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m")
    write_header(folder / "model.safetensors", b"{}", 2**38, declared_length=2**37)
    assert set(found(folder)) == {"header-oversized"}
