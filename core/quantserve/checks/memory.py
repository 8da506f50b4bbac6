"""Will it fit: weights, KV cache and working memory of one model on one target, from headers only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

from quantserve.families import entry, section
from quantserve.finding import Finding
from quantserve.model.architecture import read_sizes
from quantserve.model.context import context_length
from quantserve.model.dtypes import DTYPE_BYTES, served_dtype
from quantserve.model.engine_defaults import (
    GPU_MEMORY_UTILIZATION,
    max_num_batched_tokens,
    max_num_seqs,
)
from quantserve.model.kv_cache import kv_cache
from quantserve.model.layers import (
    SPEECH_PARTS,
    block_prefix,
    linears,
    lm_head_name,
    other_tensors,
)
from quantserve.model.linear import Linear, shard_k, shard_n
from quantserve.model.lora import lora_bytes
from quantserve.model.modules import modules
from quantserve.once import once
from quantserve.scheme import Dim, Scheme
from quantserve.system.environment import KV_CACHE_SPACE, engine_environment, whole_number
from quantserve.target import GIB, Target, gib, known_targets

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint, Tensor
    from quantserve.checks.stored import Stored
    from quantserve.config import ModelConfig

# What a worker takes before it holds a weight: CUDA context, NCCL buffers and CUDA graphs of a GPU
# worker; interpreter, torch and compiled code of a CPU worker and its engine process.
_GPU_FIXED = GIB
# Part of the budget left free where models share a GPU. There the plan tells vLLM how large the KV cache is, because
# its own measurement counts what other engines allocate meanwhile. So nothing corrects this estimate, and _GPU_FIXED is
# one number for every model: it covers context and workspaces, while CUDA graphs and unpacked weights grow with it.
_SHARED_GPU_MARGIN = 0.1
_BLOCK = 16  # tokens of a KV cache block in vLLM, unless the user says otherwise
_CPU_FIXED = GIB
_CPU_USABLE = 0.9  # of RAM; the operating system, Ray and the gateway live in the rest
_FLOAT_DTYPES = ("F16", "BF16", "F32", "F64")
_MOST_PREDICTORS = 16  # layers for multi-token prediction behind those of the decoder
_RANKS = (1, 2, 4, 8, 16, 32, 64)
# How far an estimate may be off. Weights come from headers; working memory is a rule of thumb. The cache follows from
# config.json, less surely where tensor names are not known, and least where nobody here has the configuration class.
_WEIGHTS_OFF, _OVERHEAD_OFF = 0.02, 0.5
_CACHE_OFF, _CACHE_OFF_DERIVED, _CACHE_OFF_UNKNOWN = 0.02, 0.1, 0.5
# Cache size wished for on a CPU, where vLLM takes a fixed one: this many sequences of full length.
_CPU_SEQUENCES = 16


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """What one model needs on each rank (device), in bytes, and what that leaves for its KV cache.

    Attributes:
        ranks: tensor parallel size.
        weights_bytes: weights of the largest rank, in the form the files hold them (floating-point
            tensors in the served dtype).
        overhead_bytes: working memory: activations of one scheduler step, logits, and the fixed cost
            of a worker process.
        budget_bytes: what vLLM may use: memory x gpu_memory_utilization, or a CPU rank's share of a NUMA node's RAM.
        kv_bytes_per_token: KV cache of one token on one rank; 0 when config.json does not tell.
        kv_cache_bytes: left for the KV cache (on a CPU or a part of a GPU: what the plan asks vLLM to take).
        kv_tokens: tokens that fit the KV cache.
        max_model_len: context length estimated for; 0 when unknown.
        bytes_per_sequence: KV cache of one sequence of that length on one rank; 0 when unknown.
        sequences: sequences of that length that fit at once.
        cpu_kv_cache_gib: value for ``VLLM_CPU_KVCACHE_SPACE``, a whole number of GiB per rank.
        adapters_bytes: slots of LoRA adapters; 0 without ``enable_lora``.
        impossible: ``weights`` or ``cache`` when that does not fit even where every estimate is too high; else "".
        notes: how the numbers were found, where that is not obvious.
    """

    ranks: int
    weights_bytes: int
    overhead_bytes: int
    budget_bytes: int
    kv_bytes_per_token: int
    kv_cache_bytes: int
    kv_tokens: int
    max_model_len: int
    bytes_per_sequence: int
    sequences: float
    cpu_kv_cache_gib: int
    adapters_bytes: int = 0
    impossible: str = ""
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether weights and working memory leave room for at least one full-length sequence."""
        return self.kv_cache_bytes > 0 and (self.sequences >= 1 or not self.kv_bytes_per_token)

    def to_json(self) -> dict[str, object]:
        """Plain data for ``--json`` and the plan."""
        made = {**asdict(self), "fits": self.fits}
        del made["impossible"]  # the findings have it
        if not self.adapters_bytes:
            del made["adapters_bytes"]
        return made


def estimate(
    checkpoint: Checkpoint, model: ModelConfig, target: Target, stored: Stored | None = None
) -> tuple[MemoryEstimate | None, list[Finding]]:
    """Estimate the memory of a model on a target and say whether it fits.

    Args:
        stored: the linears by their schemes; without them quantized modules count as the files hold them.

    Returns None for the estimate when neither headers nor file sizes tell how large the weights are.
    """
    findings = list(_check_settings(model))
    if findings:
        return None, findings
    if not checkpoint.tensors and not _file_bytes(checkpoint):
        return None, []
    result = _estimate(checkpoint, model, target, model.tensor_parallel_size, stored)
    return result, list(_judge(result, checkpoint, model, target, stored))


def shares_gpu(model: ModelConfig, target: Target) -> bool:
    """Whether a model gets a part of a GPU, beside others."""
    return target.device != "cpu" and 0 < model.scaling_config.num_gpus_per_worker < 1


@once
def weights_per_rank(checkpoint: Checkpoint, ranks: int, dtype_bytes: int, stored: Stored | None = None) -> int:
    """Bytes of weights on the largest of ``ranks`` tensor-parallel ranks.

    Linears, embeddings and lm_head are split; norms, biases and small per-channel tensors of
    row-parallel linears are on every rank. Floating-point tensors are counted in the served dtype, linears whose
    scheme says what the engine keeps of them (`Scheme.kept`) as that.
    """
    if not checkpoint.tensors:
        return -(-_file_bytes(checkpoint) // ranks)
    shape = read_sizes(checkpoint)
    vocabulary = shape.vocab if shape else 0
    needed = other_tensors(checkpoint)
    total = 0
    for linear, scheme, tensors, count in _modules(checkpoint, stored):
        sizes = _bytes(list(tensors.values()), dtype_bytes)
        kept = scheme.kept if scheme else None
        if linear is not None and kept is not None:
            weights = shard_n(linear, ranks) * shard_k(linear, ranks) * (linear.experts if linear.stacked else 1)
            total += math.ceil(weights * kept / 8) * count
        for (suffix, tensor), size in zip(tensors.items(), sizes, strict=True):
            if linear is None:
                vocabulary_rows = bool(vocabulary) and tensor.shape[:1] == (vocabulary,)
                if vocabulary_rows or (not needed and len(tensor.shape) > 1):
                    size = -(-size // ranks)
            elif kept is not None and scheme is not None and suffix in scheme.parts:
                continue
            elif _is_cut(linear, scheme, suffix, tensor, large=size * 8 >= max(sizes)):
                share, whole = shard_n(linear, ranks) * shard_k(linear, ranks), linear.n * linear.k
                size = -(-size * share // whole)
            total += size * count
    return total


def _is_cut(linear: Linear, scheme: Scheme | None, suffix: str, tensor: Tensor, *, large: bool) -> bool:
    """Whether a rank has a part of a linear's tensor: where the scheme does not tell, along K of a `large` one."""
    parts = scheme.alternatives(suffix) if scheme is not None and suffix in scheme.parts else ()
    part = next((one for one in parts if len(one.shape) == len(tensor.shape)), None)
    if part is None or None in part.shape:
        return linear.parallel == "column" or large
    axes = ("n", "nk") if linear.parallel == "column" else ("k", "nk")
    return any(isinstance(one, Dim) and one.axis in axes for one in part.shape)


class _Module(NamedTuple):
    """A module, and how many others are like it.

    Attributes:
        linear: the linear, if it is one.
        scheme: how it is stored, where that is known.
        tensors: what the files hold of it, by suffix.
        number: modules like it, itself included.
    """

    linear: Linear | None
    scheme: Scheme | None
    tensors: Mapping[str, Tensor]
    number: int


@once
def _modules(checkpoint: Checkpoint, stored: Stored | None) -> list[_Module]:
    """The modules that differ."""
    split: dict[str, tuple[Linear, Scheme | None]] = {}
    every: list[tuple[Linear, Scheme | None]] = [(linear, None) for linear in linears(checkpoint)]
    for one in (*every, *(stored.quantized if stored else ())):
        split |= dict.fromkeys(one[0].names, one)
    left_out = _not_loaded(checkpoint)
    alike: dict[object, _Module] = {}
    for name, of_module in modules(checkpoint).items():
        known = split.get(name)
        linear, scheme = known if known else (None, None)
        tensors = {suffix: tensor for suffix, tensor in of_module.items() if tensor.name not in left_out}
        if not tensors:
            continue
        what = linear and (linear.n, linear.k, linear.parallel, linear.max_ranks, id(scheme))
        key = (what, *[(suffix, tensor.dtype, tensor.shape) for suffix, tensor in tensors.items()])
        alike[key] = _Module(linear, scheme, tensors, alike[key].number + 1 if key in alike else 1)
    return list(alike.values())


def _not_loaded(checkpoint: Checkpoint) -> frozenset[str]:
    """Tensors vLLM does not keep: the lm_head of a tied model, layers for multi-token prediction, and speech."""
    sizes = read_sizes(checkpoint)
    if sizes is None:
        return frozenset()
    # vLLM loads a stored lm_head, and ties it again when it equals the embeddings: not where a section says untied.
    untied = section(checkpoint.config).get("tie_word_embeddings") is False
    left = {lm_head_name(checkpoint)} if sizes.tied and not untied else set()
    beyond: tuple[str, ...] = ()
    if checkpoint.text_config.get("num_nextn_predict_layers"):
        beyond = tuple(f"{block_prefix(checkpoint)}layers.{sizes.layers + index}." for index in range(_MOST_PREDICTORS))
    starts = ("mtp.", *SPEECH_PARTS, *beyond)
    return frozenset(left | {name for name in checkpoint.tensors if name.startswith(starts)})


def _file_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the weight files, for those whose headers could not be read."""
    for endings in ((".safetensors",), (".bin", ".pt", ".pth")):
        sizes = [size for name, size in checkpoint.files.items() if name.endswith(endings) and size > 0]
        if sizes:
            return sum(sizes)
    return 0


def _bytes(tensors: Sequence[Tensor], dtype_bytes: int) -> list[int]:
    """Bytes of a module's tensors in the engine: of a quantized one as stored, else in the served dtype."""
    plain = all(tensor.dtype in _FLOAT_DTYPES for tensor in tensors)
    return [math.prod(tensor.shape) * dtype_bytes if plain else tensor.nbytes for tensor in tensors]


def _estimate(
    checkpoint: Checkpoint, model: ModelConfig, target: Target, ranks: int, stored: Stored | None
) -> MemoryEstimate:
    dtype_bytes = DTYPE_BYTES.get(served_dtype(checkpoint, model, target).name, 2)
    weights = weights_per_rank(checkpoint, ranks, dtype_bytes, stored)
    cache = kv_cache(checkpoint, model, ranks, dtype_bytes)
    length = context_length(checkpoint, model) or 0
    step = max_num_batched_tokens(model, target)
    overhead = _overhead(checkpoint, model, target, ranks, dtype_bytes, step, length)
    one_sequence = cache.bytes_of_sequence(length, step)
    adapters = lora_bytes(checkpoint, model, target, ranks, dtype_bytes)
    workers_of_a_node = -(-ranks // max(target.count, 1))
    if target.device == "cpu":
        budget = int(target.memory_bytes * _CPU_USABLE) // workers_of_a_node
        room = budget - weights - overhead - adapters
        gib = _cpu_cache_gib(model, target, room, one_sequence)
        left = gib * GIB if gib * GIB <= max(room, 0) else room
    else:
        budget = int(target.memory_bytes * _utilization(model))
        gib = 1
        given = model.engine_kwargs.get("kv_cache_memory_bytes")
        room = budget - weights - overhead - adapters
        left = min(given, room) if isinstance(given, int) else room
        if shares_gpu(model, target) and not isinstance(given, int):
            least = cache.bytes_of_sequence(_whole_blocks(model, length), step)
            left = min(room, max(least, room - int(budget * _SHARED_GPU_MARGIN)))
    left = max(left, 0)
    hard = int(target.memory_bytes / workers_of_a_node) if target.device == "cpu" else budget
    most = hard - int(weights * (1 - _WEIGHTS_OFF)) - int((overhead + adapters) * (1 - _OVERHEAD_OFF))
    sizes = read_sizes(checkpoint)
    configured = entry(checkpoint.text_config.get("model_type")) is not None
    off = _CACHE_OFF if sizes and sizes.known else _CACHE_OFF_DERIVED if configured else _CACHE_OFF_UNKNOWN
    impossible = "weights" if most <= 0 else "cache" if one_sequence * (1 - off) > most else ""
    return MemoryEstimate(
        ranks=ranks,
        weights_bytes=weights,
        overhead_bytes=overhead,
        budget_bytes=budget,
        kv_bytes_per_token=cache.bytes_per_token,
        kv_cache_bytes=left,
        kv_tokens=left // cache.bytes_per_token if cache.bytes_per_token else 0,
        max_model_len=length,
        bytes_per_sequence=one_sequence,
        sequences=math.floor(100 * left / one_sequence) / 100 if one_sequence else 0.0,
        cpu_kv_cache_gib=gib,
        adapters_bytes=adapters,
        impossible=impossible,
        notes=tuple(cache.notes),
    )


def _overhead(
    checkpoint: Checkpoint, model: ModelConfig, target: Target, ranks: int, dtype_bytes: int, step: int, length: int
) -> int:
    """Working memory of one rank: activations of a step of ``step`` tokens, float32 logits, fixed cost.

    A block's activations at their widest: residual and normed input (2 H), the qkv or gate_up output
    (whichever is wider, per rank) and its product; the sampler holds two copies of the logits.
    """
    fixed = _CPU_FIXED if target.device == "cpu" else _GPU_FIXED
    sizes = read_sizes(checkpoint)
    if sizes is None:
        return fixed
    tokens = min(step, max(length, 1) * max_num_seqs(model, target))
    inner = max(3 * sizes.intermediate, 4 * sizes.heads * sizes.head_dim) // ranks
    activations = tokens * (2 * sizes.hidden + inner) * dtype_bytes
    logits = 2 * min(max_num_seqs(model, target), tokens) * sizes.vocab * 4
    return fixed + activations + logits


def _cpu_cache_gib(model: ModelConfig, target: Target, room: int, one_sequence: int) -> int:
    """GiB of KV cache per rank: the user's, else 16 full sequences in at most half of what is free."""
    asked = _asked_cpu_gib(model, target)
    if asked:
        return asked
    least = -(-one_sequence // GIB)
    wish = -(-_CPU_SEQUENCES * one_sequence // GIB)
    return max(1, least, min(wish, room // 2 // GIB))


def _asked_cpu_gib(model: ModelConfig, target: Target) -> int:
    asked = whole_number(engine_environment(model, target).get(KV_CACHE_SPACE, ""))
    if asked is not None and 0 < asked < 1_000_000:
        return asked
    given = model.engine_kwargs.get("kv_cache_memory_bytes")
    return -(-given // GIB) if isinstance(given, int) else 0


def _whole_blocks(model: ModelConfig, tokens: int) -> int:
    """Tokens of the blocks that vLLM wants for one sequence: those that hold it, and one it keeps for itself."""
    asked = model.engine_kwargs.get("block_size")
    block = asked if isinstance(asked, int) and asked > 0 else _BLOCK
    return (-(-tokens // block) + 1) * block if tokens else 0


def _utilization(model: ModelConfig) -> float:
    value = model.engine_kwargs.get("gpu_memory_utilization")
    if isinstance(value, (int, float)):
        return float(value)
    return GPU_MEMORY_UTILIZATION * min(1.0, model.scaling_config.num_gpus_per_worker or 1.0)


def _check_settings(model: ModelConfig) -> Iterator[Finding]:
    kwargs = model.engine_kwargs
    value = kwargs.get("gpu_memory_utilization")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (number and 0 < float(str(value)) <= 1):
        yield _bad_setting("gpu_memory_utilization", value, "a number above 0 and at most 1")
    for key in ("max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes"):
        value = kwargs.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            yield _bad_setting(key, value, "a positive integer")
    length = model.max_model_len
    if length is not None and length < 1:
        yield _bad_setting("max_total_tokens", length, "a positive integer")


def _bad_setting(key: str, value: object, wanted: str) -> Finding:
    where = key if key == "max_total_tokens" else f"engine_kwargs.{key}"
    return Finding.error(
        "engine-setting", f"{where}: {value!r:.60} is not {wanted}", [where], f"set {where} to {wanted}"
    )


# --- judgement ------------------------------------------------------------------------------------------


def _judge(
    result: MemoryEstimate, checkpoint: Checkpoint, model: ModelConfig, target: Target, stored: Stored | None
) -> Iterator[Finding]:
    """An error where the model cannot fit whatever the estimate's uncertainty; a warning where it may not."""
    where = f"{target.name} ({gib(target.memory_bytes)})"
    need = result.weights_bytes + result.overhead_bytes + result.adapters_bytes
    each = " per rank" if result.ranks > 1 else ""
    asked = result.cpu_kv_cache_gib * GIB
    length = f"{result.max_model_len:,}-token sequence"
    sum_of = f"weights {gib(result.weights_bytes)} + working memory {gib(result.overhead_bytes)}"
    sum_of += f" + LoRA {gib(result.adapters_bytes)}" if result.adapters_bytes else ""
    if result.impossible == "weights" or result.kv_cache_bytes <= 0:
        severity, code = _severity(result, "memory-does-not-fit", "memory-tight")
        yield severity(
            code,
            f"{'The model does not fit' if result.impossible else 'The model may not fit'} {where}: {sum_of} = "
            f"{gib(need)}{each}, {gib(result.budget_bytes)} usable.",
            (),
            _larger(checkpoint, model, target, stored) or "use a quantized checkpoint or a larger target",
        )
    elif result.bytes_per_sequence and result.sequences < 1:
        severity, code = _severity(result, "kv-cache-too-small", "memory-tight")
        fits = result.kv_cache_bytes * result.max_model_len // result.bytes_per_sequence
        wider = _larger(checkpoint, model, target, stored)
        yield severity(
            code,
            f"KV cache {'too small' if result.impossible else 'may be too small'}: a {length} needs "
            f"{gib(result.bytes_per_sequence)}{each}, {gib(result.kv_cache_bytes)} is free (enough for {fits:,} "
            f"tokens) after {sum_of} of {gib(result.budget_bytes)} usable.",
            ("max_total_tokens",),
            f"set max_total_tokens to at most {max(fits, 1)}" + (f", or {wider}" if wider else ""),
        )
    elif target.device == "cpu" and asked > result.kv_cache_bytes:
        certain = asked + result.weights_bytes * (1 - _WEIGHTS_OFF) > target.memory_bytes
        yield (Finding.error if certain else Finding.warning)(
            "memory-does-not-fit" if certain else "memory-tight",
            f"A KV cache of {gib(asked)}{each} (VLLM_CPU_KVCACHE_SPACE) does not fit: {sum_of} leave "
            f"{gib(result.kv_cache_bytes)} of {gib(result.budget_bytes)} usable of {where}.",
            ("VLLM_CPU_KVCACHE_SPACE",),
            "lower VLLM_CPU_KVCACHE_SPACE, or use a machine with more memory",
        )
    elif result.bytes_per_sequence and result.sequences < 2:
        yield Finding.warning(
            "kv-cache-small",
            f"The KV cache of {gib(result.kv_cache_bytes)}{each} holds {result.sequences:.1f} sequences of "
            f"{result.max_model_len:,} tokens; concurrent long requests are preempted.",
            ("max_total_tokens",),
            "lower max_total_tokens, raise the tensor parallel size, or use a smaller weight format",
        )


def _severity(result: MemoryEstimate, certain: str, tight: str) -> tuple[Callable[..., Finding], str]:
    return (Finding.error, certain) if result.impossible else (Finding.warning, tight)


def _larger(checkpoint: Checkpoint, model: ModelConfig, target: Target, stored: Stored | None) -> str:
    """A fix that the numbers support: the smallest tensor parallel size, else the smallest GPU that fits."""
    options: list[str] = []
    sizes = read_sizes(checkpoint)
    heads = sizes.heads if sizes else 64
    if target.device != "cpu":
        for ranks in _RANKS:
            allowed = heads % ranks == 0 and (target.count == 0 or ranks <= target.count)
            if (
                ranks > model.tensor_parallel_size
                and allowed
                and _estimate(checkpoint, model, target, ranks, stored).fits
            ):
                options.append(f"set scaling_config.num_workers (tensor parallel size) to {ranks}")
                break
    others = [known for name, known in known_targets().items() if name not in ("cpu", target.name)]
    for known in sorted(others, key=lambda known: known.memory_bytes):
        if known.memory_bytes <= target.memory_bytes and target.device != "cpu":
            continue
        if known.device == "cuda" and _estimate(checkpoint, model, known, model.tensor_parallel_size, stored).fits:
            options.append(f"use a {known.name} ({gib(known.memory_bytes)})")
            break
    return " or ".join(options)
