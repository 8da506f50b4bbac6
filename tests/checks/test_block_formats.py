"""Formats that store blocks of a row as one, in a container that a plugin reads: a scheme says how they are cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoints import llama_tensors
from helpers.dists import Site
from helpers.tiny import CONFIG, PLUGIN, header, write_tiny
from quantserve.api import Checkpoint, Finding, K, N, Part, Scheme, Tensor
from quantserve.checks.memory import weights_per_rank
from quantserve.checks.scheme import check_schemes
from quantserve.checks.stored import Stored, stored_linears
from quantserve.config import load_object
from quantserve.planning.compose import Composition, compose
from quantserve.plugins.registry import Registry
from quantserve.predict.shape import stored_bits_per_weight
from quantserve.target import find_target

# As GGUF stores them: [n, k] in elements, of which 256 (or 32) of a row are one block.
SIZES = {"Q4_K": (256, 144), "Q6_K": (256, 210), "Q8_0": (32, 34)}
GGUF = Scheme(
    {
        "weight": (
            Part((N(), K(block=256)), ("Q4_K", "Q6_K")),
            Part((N(), K(block=32)), ("Q8_0",)),
        )
    },
    bits=4,
    group_size=256,
    scales="block",
)
DOWN = "model.layers.0.mlp.down_proj"


def gguf(config: dict[str, Any] = CONFIG, **dtypes: str) -> Checkpoint:
    """A Llama in Q4_K; `dtypes` by the last part of a linear's name. The embedding is Q6_K, as usual."""
    tensors: dict[str, Tensor] = {}
    width = int(config["intermediate_size"])
    for name, (_, shape) in llama_tensors(intermediate=width).items():
        leaf = name.split(".")[-2]
        dtype = dtypes.get(leaf, "Q4_K") if "proj" in name else "Q6_K" if "embed" in name else "F32"
        elements, nbytes = SIZES.get(dtype, (1, 4))
        count = 1
        for size in shape:
            count *= size
        tensors[name] = Tensor(name, dtype, shape, "m.gguf", count // elements * nbytes)
    return Checkpoint(source="m", config=config, tensors=tensors)


def judged(checkpoint: Checkpoint, ranks: int = 1) -> tuple[list[Finding], Stored]:
    stored = stored_linears(checkpoint, lambda linear: GGUF)
    return check_schemes(checkpoint, stored, code="gguf", ranks=ranks), stored


def test_blocks_are_counted_by_the_readers_bytes() -> None:
    checkpoint = gguf(v_proj="Q6_K", k_proj="Q8_0")
    findings, stored = judged(checkpoint)
    assert findings == []
    assert len(stored.quantized) == 14
    whole = weights_per_rank(checkpoint, 1, 2, stored)
    floats = sum(tensor.nbytes for tensor in checkpoint.tensors.values() if tensor.dtype == "F32")
    assert whole == checkpoint.weight_bytes - floats // 2  # norms and lm_head in the served dtype
    all_q4, stored = gguf(), judged(gguf())[1]
    assert stored_bits_per_weight(all_q4, stored) == 144 * 8 / 256


def test_a_rank_gets_whole_blocks() -> None:
    assert judged(gguf(o_proj="Q8_0"), ranks=2)[0] == []  # K 512/2 = 256, and o_proj in blocks of 32
    findings, _ = judged(gguf(), ranks=4)
    (finding,) = findings
    assert finding.code == "gguf-word-splits-ranks"
    assert finding.offenders[0] == "model.layers.0.self_attn.o_proj: K 256/4 = 64 is not a multiple of 256"
    assert f"{DOWN}: K 512/4 = 128 is not a multiple of 256" in finding.offenders
    assert judged(gguf(o_proj="Q8_0", down_proj="Q8_0"), ranks=4)[0] == []


def test_a_width_without_whole_blocks_cannot_be_stored() -> None:
    config = {**CONFIG, "intermediate_size": 288}
    findings, _ = judged(gguf(config, down_proj="Q8_0"))
    assert findings == []  # 288 = 9 x 32
    scheme = Scheme({"weight": Part((N(), K(block=256)), ("Q4_K",))}, bits=4, group_size=256)
    checkpoint = gguf(config)
    (finding,) = check_schemes(checkpoint, stored_linears(checkpoint, lambda linear: scheme), code="gguf")
    assert (finding.code, finding.offenders[0]) == ("gguf-packing", f"{DOWN}: K 288 is not a multiple of 256")


@pytest.mark.parametrize(("dtype", "shape"), [("Q2_K", (256, 512)), ("Q4_K", (256, 256))])
def test_another_type_or_size_is_found(dtype: str, shape: tuple[int, ...]) -> None:
    checkpoint = gguf()
    name = f"{DOWN}.weight"
    tensors = {**checkpoint.tensors, name: Tensor(name, dtype, shape, "m.gguf", 1000)}
    (finding,) = judged(Checkpoint(source="m", config=CONFIG, tensors=tensors))[0]
    assert finding.code == ("gguf-wrong-dtype" if dtype == "Q2_K" else "gguf-wrong-shape")
    assert finding.offenders[0].startswith(name)


def test_linears_of_other_families_are_known_by_their_shapes() -> None:
    checkpoint = gguf({"model_type": "nobody-knows", "intermediate_size": 512})
    findings, stored = judged(checkpoint)
    assert findings == []
    assert {linear.name: (linear.n, linear.k) for linear, _ in stored.quantized}[DOWN] == (256, 512)


SCHEME = """
from quantserve.api import K, N, Part, Scheme

SCHEME = Scheme({"weight": Part((N(), K(block=32)), ("B4",))}, bits=4, group_size=32, scales="block")

@hookimpl
def quantserve_scheme(checkpoint, linear):
    return SCHEME
"""


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    path = tmp_path / "site"
    path.mkdir()
    monkeypatch.syspath_prepend(str(path))
    site = Site(path)
    site.install("quantserve-tiny", PLUGIN + SCHEME, name="tiny")
    yield Registry.load({}, site.entry_points())
    site.forget()


def composed(path: Path, registry: Registry, ranks: int = 1) -> Composition:
    engine = {"model_id": "m", "hf_model_id": str(path)}
    models = [{"engine_config": engine, "scaling_config": {"num_workers": ranks}}]
    return compose(load_object({"models": models}, "test").models[0], registry, find_target("a100-80g"))


def test_a_plugin_with_a_reader_and_a_scheme(tmp_path: Path, registry: Registry) -> None:
    """From the file's header to findings and bytes, with a dtype that safetensors does not have."""
    file = write_tiny(tmp_path / "m" / "model.tiny")
    composition = composed(file, registry)
    assert composition.findings == ()
    assert composition.stored is not None
    assert len(composition.stored.quantized) == 14
    assert stored_bits_per_weight(composition.checkpoint, composition.stored) == 18 * 8 / 32
    assert composition.memory is not None
    assert composition.memory.weights_bytes == composition.checkpoint.weight_bytes
    tensors = {**header()["tensors"], f"{DOWN}.weight": ["B4", [256, 256]]}
    broken = write_tiny(tmp_path / "b" / "model.tiny", tensors=tensors)
    codes = {finding.code for finding in composed(broken, registry).errors}
    assert "tiny-wrong-shape" in codes
