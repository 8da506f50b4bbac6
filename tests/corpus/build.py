"""Write the computed parts of corpus entries: ``tensors`` from transformers, ``vllm`` from vLLM, on the meta device.

    PYTHONPATH=tests HF_HUB_OFFLINE=1 .venv/bin/python -m corpus.build [--tensors] [--truth] [--compare] [NAME...]

Entries with ``build`` get their tensors from transformers: the class of ``architectures`` (or ``build.class``) is made
from the config (``build.config`` merged in; ``build.text``: from its text_config), its state dict is renamed as public
checkpoints are (transformers' own conversion, reversed, then ``build.rename``) and changed by ``build.drop``,
``build.add`` and ``build.dtype``; ``build.untied`` keeps a tied lm_head. Other entries without ``from`` were written by
hand. Without NAME, only entries that lack a part get it. ``--compare`` writes nothing: it computes both parts anew and
tells where they differ from what is stored.

Multimodal models need torchvision, and mixtures in FP8 or AWQ a machine that vLLM has kernels for: what cannot be made
here is said in the entry's ``vllm.tp``.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from corpus import entries, truth
from corpus.patterns import Spec, fold, unfold

_SAFETENSORS = {
    "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.int64": "I64", "torch.uint8": "U8",
    "torch.int32": "I32", "torch.bool": "BOOL", "torch.float8_e4m3fn": "F8_E4M3",
}  # fmt: skip


def tensors(data: dict[str, Any]) -> dict[str, Spec]:
    """Name -> (dtype, shape) of the checkpoint that transformers would have saved for this config."""
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    recipe = data["build"]
    config = copy.deepcopy(data["config"])  # transformers writes into it
    config = config["text_config"] if recipe.get("text") else config
    config.pop("quantization_config", None)
    config.update(recipe.get("config", {}))
    made = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    if not made.dtype and made.get_text_config().dtype:
        made.dtype = made.get_text_config().dtype  # as a composite config may spell it
    cls = getattr(transformers, recipe.get("class") or config["architectures"][0])
    with torch.device("meta"):
        model = cls._from_config(made, attn_implementation="eager") if hasattr(cls, "_from_config") else cls(made)
    once = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}  # blocks that are shared, once
    state = {name: tensor for name, tensor in model.state_dict().items() if name in once or recipe.get("untied")}
    state = revert_weight_conversion(model, state)
    tied = set(getattr(model, "_tied_weights_keys", None) or {}) if tie(made) else set()
    result: dict[str, Spec] = {}
    for name, tensor in state.items():
        if any(re.search(key, name) for key in tied) and not recipe.get("untied"):
            continue
        for pattern, replacement in recipe.get("rename", ()):
            name = re.sub(pattern, replacement, name)
        if any(re.search(pattern, name) for pattern in recipe.get("drop", ())):
            continue
        dtype = _SAFETENSORS[str(tensor.dtype)]
        result[name] = (recipe.get("dtype", dtype) if dtype in ("F32", "F16", "BF16") else dtype, tuple(tensor.shape))
    return result | unfold(recipe.get("add", {}))


def tie(config: Any) -> bool:
    """Whether the embeddings are the output projection."""
    text = config.get_text_config()
    return bool(getattr(config, "tie_word_embeddings", False) or getattr(text, "tie_word_embeddings", False))


def main(argv: list[str]) -> int:
    """Build what is asked for; returns the number of entries that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensors", action="store_true")
    parser.add_argument("--truth", action="store_true")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args(argv)
    if options.compare:
        return _compare([name.replace("/", "--") for name in options.names] or entries.names())
    both = not options.tensors and not options.truth
    failed = 0
    wanted = [name.replace("/", "--") for name in options.names] or entries.names()
    for name in wanted:
        data = entries.raw(name)
        if (options.tensors or both) and "build" in data and (options.names or not data.get("tensors")):
            try:
                data["tensors"] = fold(tensors(data))
                _save(name, data)
                print(f"{name}: {len(data['tensors'])} patterns", flush=True)
            except Exception:
                failed += 1
                print(f"{name}: tensors:\n{traceback.format_exc(limit=-4)}", flush=True)
                continue
    for name in wanted:
        data = entries.raw(name)
        if (options.truth or both) and (options.names or not data.get("vllm")) and not data.get("by_hand"):
            data["vllm"] = _truth(name)
            _save(name, data)
            print(f"{name}: {data['vllm']}", flush=True)
    return failed


def _compare(names: list[str]) -> int:
    """Print the differences between what is stored and what is computed now; returns how many there are."""
    # Tensors first: vLLM changes classes of transformers.
    built = [(name, "tensors", fold(tensors(entries.raw(name)))) for name in names if "build" in entries.raw(name)]
    differences = 0
    for name, part, now in [*built, *((name, "vllm", _truth(name)) for name in names)]:
        stored = entries.raw(name).get(part, {})
        for key in {**stored, **now}:
            if stored.get(key) != now.get(key) and key not in stored.get("read", ["read"]):
                print(f"{name}: {part}.{key}: stored {stored.get(key)}, now {now.get(key)}", flush=True)
                differences += 1
    return differences


def _truth(name: str) -> dict[str, Any]:
    entries.forget()
    entry = entries.read(name)
    with tempfile.TemporaryDirectory() as folder:
        return json.loads(json.dumps(truth.of(entry, entry.write(Path(folder) / "model"))))  # type: ignore[no-any-return]


def _save(name: str, data: dict[str, Any]) -> None:
    order = ["model", "provenance", "note", "from", "build", "config", "files", "tokenizer", "shards", "weights"]
    last = ["tensors", "vllm", "cases"]
    keys = [*order, *[key for key in data if key not in order + last], *last]
    (entries.FOLDER / f"{name}.json").write_text(entries.dump({key: data[key] for key in keys if key in data}))


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
