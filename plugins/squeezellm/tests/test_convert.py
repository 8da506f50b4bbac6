"""The original .pt files, made here as their packer saves them, to safetensors checkpoints."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file

from helpers.plain import write_dequantized
from helpers.tiny_squeezellm import (
    llama_config,
    llama_state,
    original_state,
    projections,
    write_llama,
    write_original,
)
from quantserve.errors import CheckpointError, UsageError
from quantserve_squeezellm._convert import convert
from quantserve_squeezellm.quantizer import SqueezeLLM

Q0 = "model.layers.0.self_attn.q_proj"


def _quantization(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config


@pytest.mark.parametrize("wbits", [None, 4])
def test_a_whole_file_is_converted_tensor_by_tensor(tmp_path: Path, wbits: int | None) -> None:
    state = original_state(4)
    source = write_original(tmp_path / "hub", state, wbits, llama_config())
    steps: list[tuple[str, int, int]] = []
    convert(source, tmp_path / "out", allow_pickle=True, progress=lambda *step: steps.append(step))
    after = load_file(tmp_path / "out/model.safetensors")
    assert after.keys() == {name for name in state if "inv_freq" not in name}
    assert all(torch.equal(after[name], state[name]) and after[name].dtype == state[name].dtype for name in after)
    assert _quantization(tmp_path / "out") == {"quant_method": "squeezellm", "wbits": 4}
    assert (tmp_path / "out/tokenizer_config.json").exists()
    assert steps[-1][1] == steps[-1][2]


def test_the_sparse_parts_stay_and_what_carries_no_weights_goes(tmp_path: Path) -> None:
    state = original_state(3, sparse=True)
    source = write_original(tmp_path / "hub", state, 3, llama_config())
    convert(source / "sq-tiny.pt", tmp_path / "out", allow_pickle=True)
    after = load_file(tmp_path / "out/model.safetensors")
    dropped = {name for name in state if "inv_freq" in name or "startrows" in name or "threshold" in name}
    assert after.keys() == state.keys() - dropped
    assert all(torch.equal(after[name], state[name]) for name in after)
    nnz = state[f"sparse_threshold.{Q0}"]
    assert _quantization(tmp_path / "out")["sparse"][Q0] == {"nnz": nnz, "full_rows": 2}
    assert len(_quantization(tmp_path / "out")["sparse"]) == len(projections())


@pytest.mark.parametrize("pickled", [False, True])
def test_a_file_with_only_the_linears_takes_the_rest_from_its_base(tmp_path: Path, pickled: bool) -> None:
    state = original_state(4, whole=False)
    source = write_original(tmp_path / "hub", state)
    base = write_llama(tmp_path / "base", dtype=torch.float16)
    if pickled:
        torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"no config\.json beside it\n.*--base"):
        convert(source, tmp_path / "out", allow_pickle=True)
    (source / "config.json").write_text(json.dumps(llama_config()))
    with pytest.raises(UsageError, match=r"without \d+ other tensors.*embed_tokens.*--base"):
        convert(source, tmp_path / "out", allow_pickle=True)
    convert(source, tmp_path / "out", base=base, allow_pickle=True)
    after = load_file(tmp_path / "out/model.safetensors")
    plain = {name: tensor.half() for name, tensor in llama_state().items() if "_proj" not in name}
    assert after.keys() == state.keys() | plain.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in (state | plain).items())
    assert (tmp_path / "out/tokenizer_config.json").exists()


def test_pickles_are_read_only_when_allowed(tmp_path: Path) -> None:
    source = write_original(tmp_path / "hub", original_state(4), 4, llama_config())
    with pytest.raises(UsageError, match="--allow-pickle"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class _Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_nothing_runs(tmp_path: Path, legacy: bool) -> None:
    source = write_original(tmp_path / "hub", {"x": torch.zeros(1)}, 4, llama_config())
    state = {**original_state(4), "surprise": _Evil(tmp_path / "owned")}
    torch.save(state, source / "sq-tiny.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"sq-tiny\.pt"):
        convert(source, tmp_path / "out", allow_pickle=True)
    (source / "sq-tiny.pt").write_bytes(pickle.dumps(state["surprise"]))
    with pytest.raises(CheckpointError, match=r"sq-tiny\.pt"):
        convert(source, tmp_path / "out", allow_pickle=True)
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["half", "empty", "text", "no-pickle"])
def test_a_broken_file_is_one_clear_error(tmp_path: Path, damage: str) -> None:
    source = write_original(tmp_path / "hub", original_state(4), 4, llama_config())
    path = source / "sq-tiny.pt"
    if damage == "no-pickle":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("sq-tiny/version", "3")
    else:
        whole = path.read_bytes()
        path.write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "text": b"version https://git-lfs"}[damage])
    with pytest.raises(CheckpointError, match=r"sq-tiny\.pt") as error:
        convert(source, tmp_path / "out", allow_pickle=True)
    assert "\n" not in str(error.value)


def _without(suffix: str) -> dict[str, Any]:
    state = original_state(3, sparse=True)
    state.pop(f"{Q0}.{suffix}")
    return state


def _changed(name: str, value: Any) -> dict[str, Any]:
    state = original_state(3, sparse=True)
    state[name] = value(state[name]) if callable(value) else value
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: original_state(4), r"wbits is 3.*4-bit codes"),
        (lambda: _without("lookup_table"), r"q_proj has no lookup_table"),
        (lambda: _without("qweight"), r"q_proj\.\w+ has no .*q_proj\.qweight beside it"),
        (lambda: _without("cols"), r"q_proj\.cols is missing beside"),
        (lambda: _without("full_row_indices"), r"q_proj\.full_row_indices is missing"),
        (lambda: _changed(f"sparse_threshold.{Q0}", lambda nnz: nnz + 1), r"says \d+ nonzeros, the tensors hold"),
        (lambda: _changed(f"{Q0}.cols", lambda cols: cols + 300), r"q_proj: cols holds \d+\.\.\d+, expected 0\.\.255"),
        (lambda: _changed(f"{Q0}.rows", lambda rows: rows.flip(0)), r"q_proj: rows runs from"),
        (lambda: _changed(f"{Q0}.qweight", lambda words: words[:-1]), r"q_proj.*do not make a 3-bit layer"),
        (lambda: _changed(f"{Q0}.qweight", lambda words: words.long()), r"q_proj\.qweight is torch\.int64"),
        (
            lambda: _changed(f"{Q0}.qweight", lambda words: words[:21]),
            r"q_proj is \[256, 224\].*\[256, 256\]",
        ),
        (lambda: _changed(f"{Q0}.full_row_indices", torch.tensor([0, 256])), r"full_row_indices holds 0\.\.256"),
        (lambda: _changed("model.embed_tokens.weight", lambda w: w[:-1]), r"511 rows.*vocab_size 512"),
        (lambda: _changed("model.norm.weight", [1.0]), r"model\.norm\.weight is a list"),
        (lambda: {"model.norm.weight": torch.ones(4)}, r"no SqueezeLLM file"),
    ],
)
def test_tensors_that_do_not_fit_are_named_with_their_numbers(tmp_path: Path, state: Any, message: str) -> None:
    source = write_original(tmp_path / "hub", state(), 3, llama_config())
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "out", allow_pickle=True)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_missing_linear_is_named(tmp_path: Path) -> None:
    state = {name: value for name, value in original_state(4).items() if "layers.1.mlp.up_proj" not in name}
    source = write_original(tmp_path / "hub", state, 4, llama_config())
    with pytest.raises(CheckpointError, match=r"lacks 1 of the 14 linears.*layers\.1\.mlp\.up_proj"):
        convert(source, tmp_path / "out", allow_pickle=True)


def test_an_existing_destination_is_left_untouched(tmp_path: Path) -> None:
    source = write_original(tmp_path / "hub", original_state(4), 4, llama_config())
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("keep")
    with pytest.raises(UsageError, match="exists and is left as it is"):
        convert(source, tmp_path / "out", allow_pickle=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_which_file_is_meant_must_be_clear(tmp_path: Path) -> None:
    source = write_original(tmp_path / "hub", original_state(4), 4, llama_config())
    torch.save({}, source / "other.pt")
    with pytest.raises(CheckpointError, match=r"exactly one \.pt file, found other\.pt, sq-tiny\.pt"):
        convert(source, tmp_path / "out", allow_pickle=True)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        convert(tmp_path / "absent", tmp_path / "out", allow_pickle=True)


def test_a_base_of_another_model_or_quantized_is_refused(tmp_path: Path) -> None:
    source = write_original(tmp_path / "hub", original_state(4, whole=False))
    other = write_llama(tmp_path / "other", hidden_size=128)
    with pytest.raises(CheckpointError, match="same model"):
        convert(source, tmp_path / "out", base=other, allow_pickle=True)
    whole = write_original(tmp_path / "whole", original_state(4), 4, llama_config())
    convert(whole, tmp_path / "quantized", allow_pickle=True)
    with pytest.raises(CheckpointError, match="quantized already"):
        convert(source, tmp_path / "out", base=tmp_path / "quantized", allow_pickle=True)
    with pytest.raises(UsageError, match="no such folder"):
        convert(whole, tmp_path / "out", base=tmp_path / "absent", allow_pickle=True)


def test_dequantizing_gives_an_ordinary_float32_checkpoint(tmp_path: Path) -> None:
    state = original_state(3, sparse=True)
    source = write_original(tmp_path / "hub", state, 3, llama_config())
    convert(source, tmp_path / "out", allow_pickle=True)
    write_dequantized(tmp_path / "out", tmp_path / "plain", SqueezeLLM)
    after = load_file(tmp_path / "plain/model.safetensors")
    assert after.keys() == llama_state().keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    # Channel 0 holds no CSR entry: its codebook plus full row 1 is all there is.
    weight = after[f"{Q0}.weight"][0] - state[f"{Q0}.full_rows"][:, 1]
    assert (weight[:, None] - state[f"{Q0}.lookup_table"][0]).abs().amin(1).max() < 1e-6
