"""Tiny mixtures for tests, quantized and plain: Mixtral in AWQ, Qwen3-MoE and gpt-oss in the made-up `Nibbles`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from quantserve.api import E, K, N, Part, Scheme
from quantserve_kernels import PackedWeight, pack
from quantserve_kernels.vllm import CSR, Format

GROUP, EXPERTS, HIDDEN, WIDTH, LAYERS, HEADS, HEAD, VOCAB = 32, 8, 128, 64, 2, 4, 32, 512
BOOK = torch.tensor([-8.0, -6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Parts = dict[str, Tensor]


class Nibbles(Format):
    """Codes uint8 [n, k/2], the lower half of a byte first; a scale for 32 inputs; a table for all or for a linear."""

    name = "nibbles-of-the-tests"

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Nibbles:
        return cls(skipped=config.get("skip") or ())

    def scheme(self, module: str) -> Scheme:
        stack = (E(),) if module.endswith(("experts.gate_up_proj", "experts.down_proj")) else ()
        parts = {
            "blocks": Part((*stack, N(), K(2)), ("U8",)),
            "scales": Part((*stack, N(), K(GROUP)), ("F32",)),
            "weight.book": Part((16,), ("F32",), optional=True),
        }
        return Scheme(parts, bits=4, group_size=GROUP)

    def pack(self, tensors: Mapping[str, Tensor], sparse: CSR | None) -> PackedWeight:
        octets = tensors["blocks"]
        codes = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1)
        table = tensors.get("weight.book", BOOK[None])
        return pack(codes, table.to(codes.device), bits=4, scales=tensors["scales"], group_size=GROUP)


def nibbles(n: int, k: int, seed: int) -> tuple[Parts, Tensor]:
    """The tensors of a linear, and its matrix [n, k] in float64."""
    made = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=made)
    scales = (torch.rand(n, k // GROUP, generator=made) + 0.5) * 0.3 * k**-0.5
    matrix = BOOK.double()[codes] * scales.double().repeat_interleave(GROUP, 1)
    return {"blocks": (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8), "scales": scales}, matrix


def awq(n: int, k: int, seed: int) -> tuple[Parts, Tensor]:
    """The same as AutoAWQ stores it."""
    made = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=made)
    zeros = torch.randint(5, 11, (n, k // GROUP), generator=made)
    scales = ((torch.rand(n, k // GROUP, generator=made) + 0.5) * 0.2 * k**-0.5).half()
    matrix = (codes - zeros.repeat_interleave(GROUP, 1)).double() * scales.double().repeat_interleave(GROUP, 1)

    def words(values: Tensor) -> Tensor:
        fields = values.t().reshape(values.shape[1], n // 8, 8)
        word = sum(fields[..., column] << 4 * at for at, column in enumerate(AWQ_ORDER))
        return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)

    return {"qweight": words(codes), "qzeros": words(zeros), "scales": scales.t().contiguous()}, matrix


def write(folder: Path, family: str) -> tuple[Path, Path]:
    """A quantized checkpoint and the plain one, float32, that it means."""
    make, config, state = FAMILIES[family]
    quantized, plain = state(make)
    for name, tensors in (("quantized", quantized), ("plain", plain)):
        path = folder / name
        path.mkdir(parents=True)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path / "model.safetensors")
        written = dict(config) if name == "quantized" else {key: v for key, v in config.items() if key[:5] != "quant"}
        (path / "config.json").write_text(json.dumps(written))
    return folder / "quantized", folder / "plain"


class _State:
    """Tensors under both their forms."""

    def __init__(self, make: Callable[[int, int, int], tuple[Parts, Tensor]]) -> None:
        self.make = make
        self.quantized: dict[str, Tensor] = {}
        self.plain: dict[str, Tensor] = {}
        self.drawn = torch.Generator().manual_seed(7)
        self.seed = 0

    def both(self, name: str, *shape: int, scale: float = 1.0, shift: float = 0.0) -> None:
        tensor = torch.randn(*shape, generator=self.drawn) * scale + shift
        self.quantized[name] = self.plain[name] = tensor

    def linear(self, name: str, n: int, k: int) -> None:
        parts, matrix = self.drawn_linear(n, k)
        self.quantized |= {f"{name}.{suffix}": tensor for suffix, tensor in parts.items()}
        self.plain[f"{name}.weight"] = matrix.float()

    def drawn_linear(self, n: int, k: int) -> tuple[Parts, Tensor]:
        self.seed += 1
        return self.make(n, k, self.seed)

    def block(self, layer: str, *, biases: bool = False) -> None:
        for norm in ("input_layernorm", "post_attention_layernorm"):
            self.both(f"{layer}.{norm}.weight", HIDDEN, scale=0.1, shift=1)
        shapes = {"q": (HEADS * HEAD, HIDDEN), "k": (2 * HEAD, HIDDEN), "v": (2 * HEAD, HIDDEN)}
        for name, (n, k) in {**shapes, "o": (HIDDEN, HEADS * HEAD)}.items():
            module = f"{layer}.self_attn.{name}_proj"
            if biases:
                self.both(f"{module}.weight", n, k, scale=k**-0.5)
                self.both(f"{module}.bias", n, scale=0.1)
            else:
                self.linear(module, n, k)

    def ends(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        self.both("model.embed_tokens.weight", VOCAB, HIDDEN)
        self.both("model.norm.weight", HIDDEN, scale=0.1, shift=1)
        self.both("lm_head.weight", VOCAB, HIDDEN, scale=0.3)
        return self.quantized, self.plain


def _listed(make: Any, block: str, router: str, names: tuple[str, str, str], norms: bool) -> Any:
    state = _State(make)
    for at in range(LAYERS):
        layer = f"model.layers.{at}"
        state.block(layer)
        if norms:
            for norm in ("q_norm", "k_norm"):
                state.both(f"{layer}.self_attn.{norm}.weight", HEAD, scale=0.1, shift=1)
        state.both(f"{layer}.{block}.{router}.weight", EXPERTS, HIDDEN, scale=0.5)
        for expert in range(EXPERTS):
            for name, (n, k) in zip(names, ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)), strict=True):
                state.linear(f"{layer}.{block}.experts.{expert}.{name}", n, k)
    return state.ends()


def _mixtral(make: Any) -> Any:
    return _listed(make, "block_sparse_moe", "gate", ("w1", "w3", "w2"), norms=False)


def _qwen3_moe(make: Any) -> Any:
    return _listed(make, "mlp", "gate", ("gate_proj", "up_proj", "down_proj"), norms=True)


def _gpt_oss(make: Any) -> Any:
    """Gates and ups in turn by row; transformers has the plain experts transposed."""
    state = _State(make)
    for at in range(LAYERS):
        layer = f"model.layers.{at}"
        state.block(layer, biases=True)
        state.both(f"{layer}.self_attn.sinks", HEADS)
        state.both(f"{layer}.mlp.router.weight", EXPERTS, HIDDEN, scale=0.5)
        state.both(f"{layer}.mlp.router.bias", EXPERTS, scale=0.1)
        for name, (n, k) in {"gate_up_proj": (2 * WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}.items():
            made = [state.drawn_linear(n, k) for _ in range(EXPERTS)]
            module = f"{layer}.mlp.experts.{name}"
            for suffix in ("blocks", "scales"):
                state.quantized[f"{module}_{suffix}"] = torch.stack([parts[suffix] for parts, _ in made])
            state.plain[module] = torch.stack([matrix.float().t() for _, matrix in made])
            state.both(f"{module}_bias", EXPERTS, n, scale=0.1)
    return state.ends()


_COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": HEAD,
    "num_hidden_layers": LAYERS,
    "num_experts_per_tok": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "float32",
}
_NIBBLES = {"quant_method": Nibbles.name, "skip": ["self_attn.q_norm", "lm_head"]}
FAMILIES: dict[str, tuple[Any, dict[str, Any], Callable[[Any], Any]]] = {
    "mixtral": (
        awq,
        {
            **_COMMON,
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "intermediate_size": WIDTH,
            "num_local_experts": EXPERTS,
            "sliding_window": None,
            "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True,
                                    "version": "gemm"},
        },
        _mixtral,
    ),
    "qwen3_moe": (
        nibbles,
        {
            **_COMMON,
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "intermediate_size": WIDTH,
            "moe_intermediate_size": WIDTH,
            "num_experts": EXPERTS,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "quantization_config": _NIBBLES,
        },
        _qwen3_moe,
    ),
    "gpt_oss": (
        nibbles,
        {
            **_COMMON,
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "intermediate_size": WIDTH,
            "num_local_experts": EXPERTS,
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"],
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 128,
                "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            },
            "quantization_config": {**_NIBBLES, "skip": ["self_attn", "attn", "router", "lm_head"]},
        },
        _gpt_oss,
    ),
}  # fmt: skip
