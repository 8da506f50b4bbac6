"""How long `quantserve check` takes for a 70B-size checkpoint of each format, and what it imports.

The files are headers with holes for data, in 15 shards with an index and a tokenizer of 128,256 tokens; gpt-oss has the
sizes of its 120B model. Each check is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import report
from benchmarks.console import BenchError
from quantserve.api import Checkpoint, Linear, Scheme, linears
from quantserve.plugins.registry import Registry
from quantserve.testing.samples import SAMPLES, Sample

Spec = tuple[str, tuple[int, ...]]
SHARDS, TOKENS = 15, 128_256
WIDTHS = {"U8": 1, "I8": 1, "F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8}
HEAVY = ("torch", "vllm", "ray", "transformers", "numpy")
CHOSEN = (
    "unquantized", "gptq", "awq", "squeezellm", "fp8 blocks", "compressed-tensors W4A16", "compressed-tensors W8A8",
    "compressed-tensors FP8", "compressed-tensors NVFP4", "modelopt FP8", "modelopt NVFP4", "bitsandbytes NF4",
    "bitsandbytes int8", "hqq",
)  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 80, "vocab_size": TOKENS,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_hidden_layers": 36, "vocab_size": 201088,
    "num_local_experts": 128, "num_experts_per_tok": 4, "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
    "layer_types": ["sliding_attention", "full_attention"] * 18, "sliding_window": 128,
}  # fmt: skip
PROGRAM = """
import sys, time
start = time.perf_counter()
from quantserve.cli.main import run
run(["check", sys.argv[1], "--target", sys.argv[2], "--json"])
end = time.perf_counter()
print(end - start, time.process_time(), *[name for name in sys.argv[3:] if name in sys.modules], file=sys.stderr)
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(prog="python -m benchmarks.check", description=(__doc__ or "").partition("\n")[0])
    out.add_argument("--times", type=int, default=5, help="the best of so many; default 5")
    out.add_argument("--target", default="cpu", help="default cpu")
    out.add_argument("--only", default="", help="a part of a format's name")
    return out


def sized(sample: Sample, scheme: Scheme | None) -> Mapping[str, Any]:
    """What gives each stored tensor of a linear its shape: by suffix a `Part`, or the sample's own `Spec`."""
    found: dict[str, Any] = {}
    for suffix, (dtype, shape) in sample.tensors.items():
        parts = scheme.alternatives(suffix) if scheme and suffix in scheme.parts else ()
        fitting = [part for part in parts if part.fits(shape, 512, 256)]
        found[suffix] = (dtype, fitting[0] if fitting else shape)
    return found


def scheme_of(sample: Sample, registry: Registry) -> Scheme | None:
    """The scheme of a sample's only linear, from its plugin."""
    checkpoint = sample.checkpoint()
    module = registry.plugins[sample.owner].module
    linear = Linear("model.layers.0.self_attn.q_proj", 512, 256, "column", "qkv_proj")
    hook = getattr(module, "quantserve_scheme", None)
    return hook(checkpoint, linear) if hook else None


def quantized(sample: Sample, registry: Registry) -> dict[str, Spec]:
    """The tensors of a Llama of 70B weights as a sample's tool stores them."""
    config = {**LLAMA, "quantization_config": None}
    plain: dict[str, Spec] = {
        "model.embed_tokens.weight": ("BF16", (TOKENS, 8192)),
        "model.norm.weight": ("BF16", (8192,)),
    }
    plain["lm_head.weight"] = ("BF16", (TOKENS, 8192))
    for layer in range(80):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            plain[f"model.layers.{layer}.{norm}.weight"] = ("BF16", (8192,))
    parts = sized(sample, scheme_of(sample, registry))
    for linear in linears(Checkpoint.from_tensors(config, {})):
        for suffix, (dtype, part) in parts.items():
            shape = part.sizes(linear.n, linear.k) if hasattr(part, "sizes") else part
            if suffix == "weight" and not hasattr(part, "sizes"):
                shape = (linear.n, linear.k)
            own = sample.tensors[suffix][1]
            sizes = tuple(one if one is not None else usual for one, usual in zip(shape, own, strict=True))
            plain[f"{linear.name}.{suffix}"] = (dtype, sizes)
    return plain


def gpt_oss() -> dict[str, Spec]:
    """The tensors of gpt-oss 120B."""
    made: dict[str, Spec] = {
        "model.embed_tokens.weight": ("BF16", (201088, 2880)),
        "lm_head.weight": ("BF16", (201088, 2880)),
        "model.norm.weight": ("BF16", (2880,)),
    }
    for layer in range(36):
        block = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            made[f"{block}.{norm}.weight"] = ("BF16", (2880,))
        for name, n, k in (("q", 4096, 2880), ("k", 512, 2880), ("v", 512, 2880), ("o", 2880, 4096)):
            made[f"{block}.self_attn.{name}_proj.weight"] = ("BF16", (n, k))
            made[f"{block}.self_attn.{name}_proj.bias"] = ("BF16", (n,))
        made[f"{block}.self_attn.sinks"] = ("BF16", (64,))
        made[f"{block}.mlp.router.weight"], made[f"{block}.mlp.router.bias"] = ("BF16", (128, 2880)), ("BF16", (128,))
        for name, n in (("gate_up_proj", 5760), ("down_proj", 2880)):
            made[f"{block}.mlp.experts.{name}_blocks"] = ("U8", (128, n, 90, 16))
            made[f"{block}.mlp.experts.{name}_scales"] = ("U8", (128, n, 90))
            made[f"{block}.mlp.experts.{name}_bias"] = ("BF16", (128, n))
    return made


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Spec], files: Mapping[str, Any]) -> None:
    """A checkpoint whose data are holes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    words = {f"word{number}": number for number in range(int(config["vocab_size"]))}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": words, "merges": []}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    names, where = list(tensors), {}
    size = -(-len(names) // SHARDS)
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names[shard * size : (shard + 1) * size]:
            dtype, shape = tensors[name]
            start, end = end, end + prod(shape) * WIDTHS[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
            where[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + end)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_gguf(file: Path) -> int:
    """Llama 70B as Q4_K in one file, with a tokenizer; the data are a hole. Returns the number of tensors."""
    tensors = [
        ("token_embd.weight", (8192, TOKENS)),
        ("output.weight", (8192, TOKENS)),
        ("output_norm.weight", (8192,)),
    ]
    for layer in range(80):
        sizes = {"attn_q": (8192, 8192), "attn_k": (8192, 1024), "attn_v": (8192, 1024), "attn_output": (8192, 8192)}
        sizes |= {"ffn_gate": (8192, 28672), "ffn_up": (8192, 28672), "ffn_down": (28672, 8192)}
        tensors += [(f"blk.{layer}.{name}.weight", size) for name, size in sizes.items()]
        tensors += [(f"blk.{layer}.{name}.weight", (8192,)) for name in ("attn_norm", "ffn_norm")]
    numbers = {"block_count": 80, "context_length": 8192, "embedding_length": 8192, "feed_forward_length": 28672}
    numbers |= {"attention.head_count": 64, "attention.head_count_kv": 8, "vocab_size": TOKENS}

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    pairs = [text("general.architecture") + struct.pack("<I", 8) + text("llama")]
    pairs += [text(f"llama.{key}") + struct.pack("<II", 4, value) for key, value in numbers.items()]
    pairs.append(text("llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, 1e-5))
    pairs.append(text("tokenizer.ggml.model") + struct.pack("<I", 8) + text("gpt2"))
    words = b"".join(text(f"word{number}") for number in range(TOKENS))
    pairs.append(text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, TOKENS) + words)
    infos, at = [], 0
    for name, shape in tensors:
        kind = 12 if len(shape) == 2 else 0
        infos.append(text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, at))
        at += -(-(prod(shape) * 144 // 256 if kind else prod(shape) * 4) // 32) * 32
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join(pairs) + b"".join(infos)
    with file.open("wb") as out:
        out.write(head + bytes(-len(head) % 32))
        out.truncate(len(head) + -len(head) % 32 + at)
    return len(tensors)


def models(folder: Path, only: str) -> Iterator[tuple[str, int, Path]]:
    """Every format with the number of its tensors and its checkpoint, one at a time."""
    registry = Registry.load({})
    for name in CHOSEN:
        if only in name:
            sample = SAMPLES[name]
            config = {**LLAMA, **sample.config}
            if sample.quantization is not None:
                config["quantization_config"] = dict(sample.quantization)
            tensors = quantized(sample, registry)
            write(folder / name, config, tensors, sample.quant_files)
            yield name, len(tensors), folder / name
    if only in "mxfp4 (gpt-oss)":
        config = {**GPT_OSS, "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
        write(folder / "mxfp4", config, gpt_oss(), {})
        yield "mxfp4 (gpt-oss)", len(gpt_oss()), folder / "mxfp4"
    if only in "gguf Q4_K":
        yield "gguf Q4_K", write_gguf(folder / "model.gguf"), folder / "model.gguf"


class Checked(NamedTuple):
    """A run of `quantserve check`.

    Attributes:
        seconds: without the start of the interpreter.
        cpu: processor seconds of the whole process.
        heavy: which of `HEAVY` it imported.
        errors: codes of its findings.
    """

    seconds: float
    cpu: float
    heavy: list[str]
    errors: list[str]


def check(model: Path, target: str) -> Checked:
    """Run it in a process of its own.

    Raises:
        BenchError: the check did not end.
    """
    command = [sys.executable, "-c", PROGRAM, str(model), target, *HEAVY]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        seconds, cpu, *heavy = ended.stderr.splitlines()[-1].split()
        (found,) = json.loads(ended.stdout)["models"]
    except (ValueError, IndexError):
        raise BenchError(f"check of {model.name} failed:\n{ended.stdout}{ended.stderr}") from None
    errors = sorted({one["code"] for one in found["findings"] if one["severity"] == "error"})
    return Checked(float(seconds), float(cpu), heavy, errors)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    options = parser().parse_args(arguments)
    print(report.machine_line(report.machine()))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, tensors, model in models(Path(folder), options.only):
            every = [check(model, options.target) for _ in range(options.times)]
            seconds, cpu = min(one.seconds for one in every), min(one.cpu for one in every)
            said = [", ".join(names) or "none" for names in (every[0].heavy, every[0].errors)]
            rows.append([name, f"{tensors:,}", f"{seconds:.2f} s", f"{cpu:.2f} s", *said])
            print(*rows[-1], file=sys.stderr, flush=True)
    print(report.markdown_table(["format", "tensors", "time", "processor time", "heavy imports", "errors"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
