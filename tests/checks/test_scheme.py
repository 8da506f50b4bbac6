"""What follows from a method's `Scheme`, for formats of every kind."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import pytest

from helpers.calls import calls
from helpers.checkpoints import LLAMA_70B, Spec, llama_tensors
from quantserve.api import NK, Checkpoint, E, Finding, K, Linear, N, Part, Scheme, SkipList, linears, modules
from quantserve.checks.scheme import check_schemes
from quantserve.checks.stored import Schemes, stored_linears

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip
UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"

AWQ = Scheme(
    {
        "qweight": Part((K(), N(8)), ("I32",)),
        "qzeros": Part((K(128), N(8)), ("I32",)),
        "scales": Part((K(128), N()), ("F16", "BF16")),
    },
    bits=4,
    group_size=128,
)
SCALE = (Part((), ("F32",)), Part((1,), ("F32",)), Part((N(), 1), ("F32", "BF16")))
FP8 = Scheme(
    {
        "weight": Part((N(), K()), ("F8_E4M3",)),
        "weight_scale": SCALE,
        "input_scale": Part((), ("F32",), optional=True),
    },
    bits=8,
    scales="channel",
    activation_bits=8,
)
BLOCKS = Scheme(
    {
        "weight": Part((N(), K()), ("F8_E4M3",)),
        "weight_scale_inv": Part((N(128, partial=True), K(128, partial=True)), ("F32",)),
    },
    bits=8,
    scales="block",
    activation_bits=8,
)
NF4 = Scheme(
    {
        "weight": Part((NK(2), 1), ("U8",)),
        "weight.absmax": Part((NK(64, partial=True),), ("F32",)),
        "weight.quant_map": Part((16,), ("F32",)),
        "weight.quant_state.bitsandbytes__nf4": Part((None,), ("U8",)),
    },
    bits=4,
    group_size=64,
)
LUT3 = Scheme(
    {
        "qweight": Part((K(Fraction(32, 3)), N()), ("I32",)),
        "lookup_table": Part((N(), 8), ("F32",)),
        "cols": Part((None,), ("I32",), optional=True),
    },
    bits=3,
    scales="none",
)
SCHEMES = {"awq": AWQ, "fp8": FP8, "blocks": BLOCKS, "nf4": NF4, "lut3": LUT3}


def tensors_of(scheme: Scheme, name: str, n: int, k: int, optional: bool = False) -> dict[str, Spec]:
    """The tensors of one linear, of the first alternatives; 100 where only the file knows a length."""
    found: dict[str, Spec] = {}
    for suffix in scheme.parts:
        part = scheme.alternatives(suffix)[0]
        if optional or not part.optional:
            sizes = part.sizes(n, k)
            found[f"{name}.{suffix}"] = (part.dtypes[0], tuple(100 if size is None else size for size in sizes))
    return found


def llama(scheme: Scheme, dense: tuple[str, ...] = (), config: Mapping[str, Any] = LLAMA) -> dict[str, Spec]:
    """A Llama in this scheme; linears whose path has one of these parts are bfloat16."""
    tensors: dict[str, Spec] = {n: s for n, s in llama_tensors("fp16").items() if not n.endswith("_proj.weight")}
    for linear in linears(Checkpoint.from_tensors(config)):
        for name in linear.names:
            if any(part in name for part in dense):
                tensors[f"{name}.weight"] = ("BF16", (linear.n, linear.k))
            else:
                tensors |= tensors_of(scheme, name, linear.n, linear.k)
    return tensors


def of(tensors: Mapping[str, Spec], config: Mapping[str, Any] = LLAMA) -> Checkpoint:
    every: dict[str, Any] = dict(tensors)
    return Checkpoint.from_tensors(config, every)


def check(checkpoint: Checkpoint, scheme: Scheme | Schemes, **options: Any) -> list[Finding]:
    schemes = (lambda linear: scheme) if isinstance(scheme, Scheme) else scheme
    return check_schemes(checkpoint, stored_linears(checkpoint, schemes), code="x", **options)


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


# --- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "shape", "n", "k", "experts"),
    [
        (Part((K(), N(8)), ("I32",)), (256, 64), 512, 256, 0),
        (Part((K(Fraction(32, 3)), N()), ("I32",)), (24, 64), 64, 256, 0),
        (Part((N(128, partial=True), K(128, partial=True)), ("F32",)), (2, 3), 200, 300, 0),
        (Part((NK(2), 1), ("U8",)), (8192, 1), 64, 256, 0),
        (Part((E(), N(), K(32), 16), ("U8",)), (4, 64, 8, 16), 64, 256, 4),
        (Part((None, N()), ("F16",)), (77, 64), 64, 256, 0),
    ],
)
def test_shapes_follow_from_n_and_k(part: Part, shape: tuple[int, ...], n: int, k: int, experts: int) -> None:
    assert part.fits(shape, n, k, experts)
    for axis in range(len(shape)):
        if part.shape[axis] is not None:
            assert not part.fits((*shape[:axis], shape[axis] + 1, *shape[axis + 1 :]), n, k, experts)
    assert not part.fits((*shape, 1), n, k, experts)


@pytest.mark.parametrize("name", ["awq", "fp8", "lut3"])
def test_n_and_k_follow_from_shapes(name: str) -> None:
    scheme = SCHEMES[name]
    tensors = modules(of(tensors_of(scheme, "m", 96, 384)))["m"]
    assert scheme.solve(tensors) == (96, 384)
    assert scheme.fits(tensors, 96, 384)
    assert not scheme.fits(tensors, 384, 96)


def test_a_flattened_weight_does_not_tell_them() -> None:
    assert NF4.solve(modules(of(tensors_of(NF4, "m", 96, 384)))["m"]) is None


# --- tensors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMES)
def test_good_checkpoints(name: str) -> None:
    scheme = SCHEMES[name]
    assert check(of(llama(scheme)), scheme) == []
    assert check(of(llama(scheme, ("layers.0.self_attn", "down_proj"))), scheme) == []
    every = linears(of({}))[4]
    whole = llama(scheme) | tensors_of(scheme, UP, every.n, every.k, optional=True)
    assert check(of(whole | {f"{UP}.bias": ("F16", (512,))}), scheme) == []


@pytest.mark.parametrize("name", SCHEMES)
def test_every_part_is_compared(name: str) -> None:
    scheme = SCHEMES[name]
    tensors = llama(scheme)
    for suffix in scheme.required():
        tensor = f"{UP}.{suffix}"
        finding = only(check(of({n: s for n, s in tensors.items() if n != tensor}), scheme))
        assert (finding.code, finding.offenders) == ("x-missing-tensors", (tensor,))
        dtype, shape = tensors[tensor]
        finding = only(check(of(tensors | {tensor: (dtype, (*shape, 7))}), scheme))
        assert finding.code == "x-wrong-shape"
        assert finding.offenders[0].startswith(f"{tensor} [")
        finding = only(check(of(tensors | {tensor: ("I64", shape)}), scheme))
        assert finding.code == "x-wrong-dtype"
        assert finding.offenders[0].startswith(f"{tensor} I64, expected ")


@pytest.mark.parametrize("name", SCHEMES)
def test_a_plain_part_of_a_fused_layer(name: str) -> None:
    scheme = SCHEMES[name]
    finding = only(check(of(llama(scheme, ("layers.1.self_attn.k_proj",))), scheme))
    assert finding.code == "x-partly-quantized"
    assert finding.offenders[0].startswith("model.layers.1.self_attn.qkv_proj: k_proj unquantized")


@pytest.mark.parametrize(("dtype", "shape"), [("F32", ()), ("F32", (1,)), ("F32", (512, 1)), ("BF16", (512, 1))])
def test_alternatives(dtype: str, shape: tuple[int, ...]) -> None:
    assert check(of(llama(FP8) | {f"{UP}.weight_scale": (dtype, shape)}), FP8) == []


def test_no_alternative_fits() -> None:
    finding = only(check(of(llama(FP8) | {f"{UP}.weight_scale": ("F32", (512,))}), FP8))
    assert finding.offenders == (f"{UP}.weight_scale [512], expected [] or [1] or [512, 1]",)
    finding = only(check(of(llama(FP8) | {f"{UP}.weight_scale": ("BF16", ())}), FP8))
    assert finding.offenders == (f"{UP}.weight_scale BF16, expected F32",)


def test_an_alternative_that_no_file_can_hold_fits_nothing() -> None:
    either = Part((N(), K(128)), ("F16",)), Part((N(), 1), ("F16",))
    scheme = Scheme({"weight": Part((N(), K()), ("I8",)), "scale": either}, bits=8, group_size=128)
    config = {**LLAMA, "intermediate_size": 500}
    tensors: dict[str, Spec] = {}
    for linear in linears(of({}, config)):
        tensors[f"{linear.name}.weight"] = ("I8", (linear.n, linear.k))
        tensors[f"{linear.name}.scale"] = ("F16", (linear.n, 1))
    assert check(of(tensors, config), scheme) == []
    finding = only(check(of(tensors | {f"{DOWN}.scale": ("F16", (256, 3))}, config), scheme))
    assert finding.offenders[0].startswith(f"{DOWN}.scale [256, 3], expected ")


def test_unexpected() -> None:
    finding = only(check(of(llama(AWQ) | {f"{UP}.g_idx": ("I32", (256,))}), AWQ))
    assert (finding.code, finding.offenders) == ("x-unexpected-tensors", (f"{UP}.g_idx [256]",))


def test_a_linear_may_have_a_scheme_of_its_own() -> None:
    """Mixed widths by module, and modules that the config leaves unquantized."""

    def schemes(linear: Linear) -> Scheme | None:
        return None if "self_attn" in linear.name else LUT3 if "layers.1." in linear.name else AWQ

    tensors = llama(AWQ, ("self_attn",))
    for linear in linears(of({})):
        if "layers.1.mlp" in linear.name:
            tensors = {n: s for n, s in tensors.items() if not n.startswith(linear.name)}
            tensors |= tensors_of(LUT3, linear.name, linear.n, linear.k)
    assert check(of(tensors), schemes) == []
    wrong = {finding.code for finding in check(of(tensors), lambda linear: schemes(linear) and AWQ)}
    assert wrong == {"x-missing-tensors", "x-wrong-shape", "x-unexpected-tensors"}
    q = "model.layers.0.self_attn.q_proj"
    quantized = {n: s for n, s in tensors.items() if not n.startswith(q)} | tensors_of(AWQ, q, 256, 256)
    finding = only(check(of(quantized), schemes))
    assert (finding.code, finding.offenders) == ("x-unexpected-tensors", (f"{q} (qweight, qzeros, scales)",))
    assert "1 linear is quantized in the files, and the quantization config leaves it out" in finding.message


def test_nothing_is_derived_without_a_scheme() -> None:
    assert check(of(llama(AWQ)), lambda linear: None, skip=SkipList(["lm_head"]), ranks=7) == []


def test_sizes_that_cannot_be_stored() -> None:
    config = {**LLAMA, "intermediate_size": 500}
    tensors = {n: s for n, s in llama(AWQ, ("mlp",), config).items() if "mlp" not in n}
    for linear in linears(of({}, config)):
        if "mlp" in linear.name:
            tensors |= {f"{linear.name}.{suffix}": ("I32", (2, 2)) for suffix in ("qweight", "qzeros")}
            tensors |= {f"{linear.name}.scales": ("F16", (2, 2))}
    finding = only(check(of(tensors, config), AWQ))
    assert finding.code == "x-packing"
    assert f"{UP}: N 500 is not a multiple of 8" in finding.offenders
    assert f"{DOWN}: K 500 is not a multiple of 128" in finding.offenders
    assert check(of(llama(BLOCKS, config=config), config), BLOCKS) == []  # the last block is a part of one


# --- modules that config.json does not describe -------------------------------------------------------------


def unknown(scheme: Scheme, **changes: Spec) -> Checkpoint:
    tensors: dict[str, Spec] = {"m.embed.weight": ("F16", (512, 256)), "m.layers.0.norm.weight": ("F16", (256,))}
    for index in range(2):
        for name, n, k in (("q_proj", 256, 256), ("k_proj", 64, 256), ("o_proj", 256, 256), ("mixer", 96, 256)):
            tensors |= tensors_of(scheme, f"m.layers.{index}.{name}", n, k)
    return of(tensors | changes, {"model_type": "new", "num_key_value_heads": 1})


def test_families_known_from_the_files_only() -> None:
    quantized = stored_linears(unknown(AWQ), lambda linear: AWQ).quantized
    assert [(one.name, one.n, one.k) for one, _ in quantized[:2]] == [
        ("m.layers.0.q_proj", 256, 256),
        ("m.layers.0.k_proj", 64, 256),
    ]
    assert check(unknown(AWQ), AWQ) == []
    changes: dict[str, Spec] = {"m.layers.1.mixer.scales": ("F16", (2, 80))}
    finding = only(check(unknown(AWQ, **changes), AWQ))
    assert finding.offenders == ("m.layers.1.mixer.scales [2, 80], expected [2, 96]",)


def test_their_ranks() -> None:
    finding = only(check(unknown(AWQ), AWQ, ranks=4))  # one kv head, and a module that nobody knows, stay whole
    assert finding.code == "x-group-splits-ranks"
    assert finding.offenders[0] == "m.layers.0.o_proj: K 256/4 = 64 is not a multiple of 128"


def test_a_quantized_lm_head() -> None:
    tensors = llama(AWQ)
    del tensors["lm_head.weight"]
    head = tensors_of(AWQ, "lm_head", 512, 256)
    assert check(of(tensors | head), AWQ, ranks=2) == []
    del head["lm_head.qzeros"]
    assert only(check(of(tensors | head), AWQ)).offenders == ("lm_head.qzeros",)
    shapeless: dict[str, Spec] = {"lm_head.qweight": ("I32", (5,))}
    assert only(check(of(tensors | shapeless), AWQ)).offenders == ("lm_head.qzeros", "lm_head.scales")


# --- the ranks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "width", "ranks", "code", "offender"),
    [
        ("awq", 384, 2, "x-group-splits-ranks", f"{DOWN}: K 384/2 = 192 is not a multiple of 128"),
        ("awq", 512, 8, "x-group-splits-ranks", f"{DOWN}: K 512/8 = 64 is not a multiple of 128"),
        ("lut3", 320, 4, "x-word-splits-ranks", f"{DOWN}: K 320/4 = 80 is not a multiple of 32"),
        ("blocks", 384, 2, "x-group-splits-ranks", f"{UP}: N 384/2 = 192 is not a multiple of 128"),
        ("blocks", 384, 2, "x-group-splits-ranks", f"{DOWN}: K 384/2 = 192 is not a multiple of 128"),
    ],
)
def test_words_groups_and_blocks(name: str, width: int, ranks: int, code: str, offender: str) -> None:
    config = {**LLAMA, "intermediate_size": width, "num_attention_heads": 8, "num_key_value_heads": 8}
    scheme = SCHEMES[name]
    checkpoint = of(llama(scheme, ("self_attn",), config), config)
    assert check(checkpoint, scheme) == []
    finding = only(check(checkpoint, scheme, ranks=ranks))
    assert finding.code == code
    assert offender in finding.offenders
    assert "tensor parallel size) to " in finding.fix


def test_an_alternative_that_is_not_stored_cuts_nothing() -> None:
    either = Part((N(), K(128)), ("F16",)), Part((N(), 1), ("F16",))
    scheme = Scheme({"weight": Part((N(), K()), ("I8",)), "scale": either}, bits=8, group_size=128)
    config = {**LLAMA, "intermediate_size": 384}
    grouped = llama(scheme, (), config)
    whole = {n: (d, (s[0], 1) if n.endswith(".scale") else s) for n, (d, s) in grouped.items()}
    assert only(check(of(grouped, config), scheme, ranks=2)).code == "x-group-splits-ranks"
    assert check(of(whole, config), scheme, ranks=2) == []


def test_experts_have_words_but_their_groups_are_their_kernels_business() -> None:
    config = {
        **LLAMA, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 2, "head_dim": 64,
        "moe_intermediate_size": 128, "num_key_value_heads": 4,
    }  # fmt: skip
    checkpoint = of(llama(AWQ, ("self_attn",), config), config)
    assert check(checkpoint, AWQ, ranks=2) == []  # 64 inputs of a group of 128
    finding = only(check(checkpoint, AWQ, ranks=32))
    assert finding.code == "x-word-splits-ranks"
    assert (
        finding.offenders[0]
        == "model.layers.0.mlp.experts.0.gate_proj: N 128/32 = 4 is not a multiple of 8 (and 1 more expert)"
    )
    assert check(checkpoint, AWQ, ranks=32, whole_experts=True) == []


def test_70b_is_quick() -> None:
    config = {
        **LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 32000,
    }  # fmt: skip
    sizes = {name: size for name, size in LLAMA_70B.items() if name != "shards"}
    checkpoint = of(llama_tensors("awq", **sizes), config)
    found: list[object] = []
    made = calls(lambda: found.extend(check(checkpoint, AWQ, ranks=4, skip=SkipList(["lm_head"]))))
    assert found == []
    assert made < 100 * len(checkpoint.tensors)
