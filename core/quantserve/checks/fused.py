"""Whether the files, the skip list and the layers vLLM builds agree on what is quantized."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from quantserve.checks.skipped import SkipList
from quantserve.checks.wording import are, by_experts, counted, named
from quantserve.families import service
from quantserve.finding import Finding
from quantserve.model.architecture import class_names
from quantserve.model.layers import block_of, block_prefix, is_multimodal, other_tensors
from quantserve.model.linear import Linear
from quantserve.model.modules import engine_layers

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint

# Classes of vLLM that fuse q_a_proj and kv_a_proj_with_mqa; some other families do not.
_FUSES_QKV_A = ("DeepseekV2For", "DeepseekV3For", "DeepseekV32For")
# What its own classes fuse in every decoder, but for these.
_FUSED = frozenset({"qkv_proj", "gate_up_proj"})
_SEPARATE = frozenset({"LagunaForCausalLM"})
# Classes of vLLM whose routers are built with the quantization method, so that a list must name them.
ROUTERS_OF_THE_METHOD = frozenset(
    {
        "K2HorizonForCausalLM",
        "Lfm2MoeForCausalLM",
        "Qwen3MoeForCausalLM",
        "Qwen3OmniMoeForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
    }
)
_ROUTERS = (".mlp.gate.weight", ".feed_forward.gate.weight")
# Linears that vLLM builds with the quantization method in the decoder of every family.
_DECODER_LINEARS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj"})


def is_known(checkpoint: Checkpoint) -> bool:
    """Whether the linears follow from config.json, and not from the files."""
    return bool(other_tensors(checkpoint))


def fuses(checkpoint: Checkpoint, layer: str) -> bool:
    """Whether vLLM certainly builds a fused layer of this name, and not its parts one by one."""
    classes = class_names(checkpoint)
    if layer.endswith(".fused_qkv_a_proj"):
        return any(name.startswith(_FUSES_QKV_A) for name in classes)
    how = service(classes)
    if "transformers" in how:
        return False  # that backend decides by the model's code
    own = how[0] == "served" and not _SEPARATE.intersection(classes)
    return is_known(checkpoint) or (own and _in_decoder(checkpoint, _FUSED)(layer))


def check_fused_groups(dense: Iterable[str], all_linears: Iterable[Linear], *, code: str) -> list[Finding]:
    """Find fused modules (q/k/v, gate/up, experts) of which only a part is quantized.

    Args:
        dense: names of the linears stored unquantized; of listed experts that of the entry is enough.
        all_linears: every linear of the model.
        code: prefix of the code ``-partly-quantized``.
    """
    layers: dict[str, list[str]] = {}
    names = set(dense)
    for linear in all_linears:
        layers.setdefault(linear.group, []).extend([linear.name] if linear.fused else [])
        if not names.isdisjoint(linear.names):
            names.add(linear.name)
    return check_partly_quantized(names, layers, code, lambda layer: True)


def check_partly_quantized(
    dense: Collection[str], layers: Mapping[str, Sequence[str]], code: str, certain: Callable[[str], bool]
) -> list[Finding]:
    """As `check_fused_groups`, for vLLM's layers and their parts; a warning where no layer is certain to be fused."""
    split: dict[str, str] = {}
    for layer, parts in layers.items():
        unquantized = [part for part in parts if part in dense]
        if 0 < len(unquantized) < len(parts):
            experts = layer.endswith(".experts")
            shown = [part[len(layer) + 1 :] if experts else part.rpartition(".")[2] for part in unquantized[:4]]
            further = f" and {len(unquantized) - 4} more" if len(unquantized) > 4 else ""
            others = counted(len(parts) - len(unquantized), "other part")
            split[layer] = f"{layer}: {', '.join(shown)}{further} unquantized, {others} quantized"
    if not split:
        return []
    sure = any(certain(layer) for layer in split)
    return [
        (Finding.error if sure else Finding.warning)(
            f"{code}-partly-quantized",
            f"{are(len(split), 'fused layer')} quantized in part. vLLM builds each as one layer"
            f"{'' if sure else ' in most families'}, quantized or not. First: {next(iter(split.values()))}",
            named(list(split.values())),
            "quantize all parts of the layer, or leave all of them unquantized and list them in modules_to_not_convert",
        )
    ]


def check_skip_list(checkpoint: Checkpoint, skip: SkipList, dense: Sequence[Linear], code: str) -> Iterator[Finding]:
    """Compare a skip list with the files: vLLM builds a layer unquantized or not by the list, and then loads the files.

    Args:
        dense: the linears stored unquantized; all others count as quantized.
        code: prefix of the code ``-skip-list``.
    """
    if skip.problem:
        message = f"{skip.key} of the quantization config {skip.problem}"
        fix = "write it as a list of module names"
        yield Finding.error(f"{code}-skip-list", message, [skip.key], fix)
        return
    layers = engine_layers(checkpoint)
    judged = _judged(checkpoint, skip, layers)
    known = is_known(checkpoint)
    # Which other linears of an unknown family vLLM builds with the method is not known.
    certain = (lambda name: True) if known else _in_decoder(checkpoint, _DECODER_LINEARS)
    plain = {name for linear in dense for name in linear.names}
    skipped = (name for layer, skips in judged.items() if skips for name in layers[layer] or (layer,))
    listed = [name for name in skipped if name not in plain and certain(name)]
    unlisted: list[str] = []
    if skip or skip.headers == "never":
        unlisted = [name for one in dense if judged.get(one.group) is False for name in one.names if certain(name)]
    elif skip.headers == "if_empty":
        # vLLM compares the layer's name with those of the files' modules, and no module is called "experts".
        unlisted = [name for one in dense if one.fused == "experts" for name in one.names if certain(name)]
    partly = [layer for layer, skips in judged.items() if skips is None]
    routers = _unlisted_routers(checkpoint, skip)
    if skip.headers == "also":
        partly, unlisted, routers = [], [], []
    if partly:
        yield (Finding.error if any(fuses(checkpoint, layer) for layer in partly) else Finding.warning)(
            f"{code}-skip-list",
            f"{skip.key} names a part of {counted(len(partly), 'fused layer')}; vLLM needs all parts or "
            f"none. First: {partly[0]}",
            named(partly),
            "list all parts of the layer (q_proj, k_proj and v_proj), or none",
        )
    if names := [*routers, *unlisted]:
        yield (Finding.error if known or routers else Finding.warning)(
            f"{code}-skip-list",
            f"{are(len(names), 'linear layer')} unquantized in the files but not named by {skip.key}. "
            f"vLLM builds {'it' if len(names) == 1 else 'them'} quantized. First: {names[0]}",
            named(by_experts(names)),
            f"add them to {skip.key} of the quantization config",
        )
    if listed:
        yield (Finding.error if known else Finding.warning)(
            f"{code}-skip-list",
            f"{are(len(listed), 'linear layer')} quantized in the files but named by {skip.key}. "
            f"vLLM builds {'it' if len(listed) == 1 else 'them'} unquantized. First: {listed[0]}",
            named(by_experts(listed)),
            f"remove them from {skip.key} of the quantization config",
        )


def _judged(checkpoint: Checkpoint, skip: SkipList, layers: Mapping[str, Sequence[str]]) -> Mapping[str, bool | None]:
    """What vLLM makes of every layer; layers are left out where that depends on how it renames modules."""
    judged = skip.judge(layers)
    if not is_multimodal(checkpoint):
        return judged
    # vLLM puts the decoder of most multimodal models under language_model., and renames entries that begin alike.
    renamed = {_renamed(layer): [_renamed(part) for part in parts] for layer, parts in layers.items()}
    again = skip.judge(renamed)
    return {layer: skips for layer, skips in judged.items() if again.get(_renamed(layer)) is skips}


def _renamed(name: str) -> str:
    if name.startswith("model.language_model."):
        return "language_model.model." + name.removeprefix("model.language_model.")
    return "language_model." + name if name.startswith("model.") else name


def _unlisted_routers(checkpoint: Checkpoint, skip: SkipList) -> list[str]:
    if not skip or not ROUTERS_OF_THE_METHOD.intersection(class_names(checkpoint)):
        return []
    modules = [name.removesuffix(".weight") for name in checkpoint.tensors if name.endswith(_ROUTERS)]
    return [name for name in modules if skip.skips(name) is False and skip.skips(_renamed(name)) is False]


def _in_decoder(checkpoint: Checkpoint, leaves: frozenset[str]) -> Callable[[str], bool]:
    """Whether a module of one of these names is one of the decoder: not of a tower or of multi-token prediction."""
    prefix = block_prefix(checkpoint) + "layers."
    layers = checkpoint.text_config.get("num_hidden_layers")
    count = layers if isinstance(layers, int) else 0

    def inside(name: str) -> bool:
        block = block_of(name + ".")
        decoder = block is not None and block[0] < count and name.startswith(prefix)
        return decoder and name.rpartition(".")[2] in leaves

    return inside
