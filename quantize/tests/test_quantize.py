"""Runs of `quantize` on a tiny model: what is written, what survives a kill, and what is refused."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file, save_file

from helpers.tiny_squeezellm import projections, write_llama
from helpers.tokenizer import write_words
from quantserve.errors import CheckpointError, UsageError
from quantserve_quantize.run import Asked, quantize
from quantserve_squeezellm.quantizer import SqueezeLLM, SqueezeLLMOptions

TEXT = " ".join(f"w{number % 97}" for number in range(4000))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_llama(tmp_path_factory.mktemp("source") / "tiny", dtype=torch.bfloat16)
    write_words(folder, 97)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def run(
    source: Path, out: Path, text: Path | None, resume: bool = False, asked: Any = None, **options: Any
) -> dict[str, Any]:
    given = asked or Asked(text, samples=4, length=32)
    return quantize(source, out, SqueezeLLM(SqueezeLLMOptions(**options)), "squeezellm", given, resume)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    "options", [{"sensitivity": "none"}, {"sensitivity": "inputs", "bits": 3}, {"sparsity": 0.5}], ids=str
)
def test_every_tensor_is_there_and_errors_are_those_of_the_files(
    source: Path, text: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    report = run(source, tmp_path / "out", text, **options)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    config = json.loads((tmp_path / "out/config.json").read_text())
    bits = options.get("bits", 4)
    assert config["quantization_config"]["wbits"] == bits
    assert config["hidden_size"] == json.loads((source / "config.json").read_text())["hidden_size"]
    for module in projections():
        weight = before.pop(f"{module}.weight").float()
        parts = {name: after.pop(name) for name in list(after) if name.startswith(f"{module}.")}
        found = decoded({name.rpartition(".")[2]: tensor for name, tensor in parts.items()}, bits)
        error = float((weight - found).norm() / weight.norm())
        assert report["layers"][module]["weight_error"] == pytest.approx(error, rel=1e-4)
        assert error < 0.25
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    provenance = json.loads((tmp_path / "out/quantserve.json").read_text())
    assert provenance["options"] == {**SqueezeLLMOptions().__dict__, **options}
    assert "tokenizer.json" in digests(tmp_path / "out")
    assert ("calibration" in provenance) == (options.get("sensitivity") != "none")


def decoded(tensors: dict[str, Any], bits: int) -> Any:
    """The weight in plain loops over words, by the format's definition."""
    words, table = tensors["qweight"].to(torch.int64) & 0xFFFFFFFF, tensors["lookup_table"]
    k = words.shape[0] * 32 // bits
    stream = words.t()  # [n, words]
    codes = torch.stack([_code(stream, index * bits, bits) for index in range(k)], dim=1)
    weight = table.gather(1, codes)
    if "cols" in tensors:
        rows, cols, values = tensors["rows"].tolist(), tensors["cols"].tolist(), tensors["vals"].tolist()
        for n in range(len(rows) - 1):
            for entry in range(rows[n], rows[n + 1]):
                weight[n, cols[entry]] += values[entry]
    return weight


def _code(stream: Any, start: int, bits: int) -> Any:
    word, shift = divmod(start, 32)
    value = stream[:, word] >> shift
    if shift + bits > 32:
        value = value | stream[:, word + 1] << (32 - shift)
    return value & (2**bits - 1)


def test_calibration_lowers_the_error_of_the_outputs(source: Path, text: Path, tmp_path: Path) -> None:
    """Statistics of a run with other clusters judge both results: plain k-means, and k-means weighted by inputs."""
    plain = run(source, tmp_path / "plain", text, sensitivity="none", bits=3)
    weighted = run(source, tmp_path / "weighted", text, sensitivity="inputs", bits=3)
    assert all(layer["output_error"] is None for layer in plain["layers"].values())
    errors = [layer["output_error"] for layer in weighted["layers"].values()]
    assert all(0 < error < 0.5 for error in errors)


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
from pathlib import Path
from quantserve_quantize import draft, run
from quantserve_squeezellm.quantizer import SqueezeLLM, SqueezeLLMOptions

write, left = draft.Draft.write, {left}

def dying(self, part, tensors, about):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    write(self, part, tensors, about)

draft.Draft.write = dying
asked = run.Asked(Path({text!r}), 4, 32)
run.quantize(Path({source!r}), Path({out!r}), SqueezeLLM(SqueezeLLMOptions()), "squeezellm", asked)
"""


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_killed_run_goes_on_to_the_same_bytes(source: Path, text: Path, tmp_path: Path, left: int) -> None:
    run(source, tmp_path / "whole", text)
    out = tmp_path / "out"
    code = KILLED.format(path=sys.path, left=left, source=str(source), out=str(out), text=str(text))
    died = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not out.exists()
    with pytest.raises(UsageError, match="holds a run that did not end\n  fix: add --resume"):
        run(source, out, text)
    with pytest.raises(UsageError, match=r"asked for something else: options differ"):
        run(source, out, text, resume=True, bits=3)
    run(source, out, text, resume=True)
    assert digests(out) == digests(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_full_disk_is_said_and_the_run_can_be_resumed(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(UsageError, match=r"(?s)cannot write .*--resume"):
            run(source, tmp_path / "out", text)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "out").exists()
    run(source, tmp_path / "out", text, resume=True)
    assert (tmp_path / "out/model.safetensors").exists()


def test_two_processes_do_not_work_on_one_output(source: Path, text: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import fcntl; f = open({str(partial / 'lock')!r}, 'w'); fcntl.flock(f, 2); print(flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout
    holder.stdout.readline()
    try:
        with pytest.raises(UsageError, match="in use by another process"):
            run(source, tmp_path / "out", text, sensitivity="none")
    finally:
        holder.kill()
        holder.wait()


def damaged(source: Path, to: Path, **changes: Any) -> Path:
    import shutil

    shutil.copytree(source, to)
    state = load_file(to / "model.safetensors")
    state.update(changes)
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, to / "model.safetensors")
    return to


def test_bad_sources_are_refused_and_leave_nothing(source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    name = "model.layers.1.mlp.up_proj.weight"
    nan = load_file(source / "model.safetensors")[name].clone()
    nan[3, 5] = float("nan")
    with pytest.raises(CheckpointError, match=r"up_proj.weight of .* holds 1 NaN"):
        run(damaged(source, tmp_path / "nan", **{name: nan}), out, text, sensitivity="none")
    with pytest.raises(CheckpointError, match=r"no weight of 1 linears.*up_proj"):
        run(damaged(source, tmp_path / "absent", **{name: None}), out, text)
    cut = damaged(source, tmp_path / "cut")
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError):
        run(cut, out, text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        run(tmp_path, out, text)
    run(source, tmp_path / "done", text, sensitivity="none")
    with pytest.raises(CheckpointError, match="quantized already"):
        run(tmp_path / "done", out, text)
    with pytest.raises(UsageError, match="exists and is left as it is"):
        run(source, tmp_path / "done", text)
    assert not out.exists()


def test_inputs_that_overflow_are_refused(source: Path, text: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.v_proj.weight"
    huge = load_file(source / "model.safetensors")[name] * 1e30
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.o_proj: its inputs are NaN or infinite"):
        run(damaged(source, tmp_path / "huge", **{name: huge}), tmp_path / "out", text, sensitivity="inputs")


def test_bad_texts_are_refused(source: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("w1 w2 w3")
    with pytest.raises(UsageError, match=r"has 3 tokens, which make 0 samples of 32; 4 are asked"):
        run(source, tmp_path / "out", short)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        run(source, tmp_path / "out", tmp_path / "binary")
    with pytest.raises(UsageError, match="cannot read"):
        run(source, tmp_path / "out", tmp_path / "absent.txt")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_seed_chooses_the_samples(source: Path, text: Path, tmp_path: Path) -> None:
    made = [
        run(source, tmp_path / f"out{seed}{turn}", text, asked=Asked(text, 4, 32, seed), sensitivity="inputs")
        for turn, seed in enumerate((1, 1, 2))
    ]
    assert made[0]["layers"] == made[1]["layers"]
    assert made[0]["layers"] != made[2]["layers"]
