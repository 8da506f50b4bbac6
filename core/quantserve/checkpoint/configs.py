"""The JSON files of a checkpoint: config.json, quant configs, tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from quantserve.checkpoint.mistral import PARAMS, adapted, is_mistral_format
from quantserve.checkpoint.source import Source
from quantserve.checkpoint.text import BadJson, parse_json, shown, some
from quantserve.finding import Finding

MAX_JSON: Final = 64 * 2**20
"""Bytes of any JSON file that is read; the largest tokenizer.json around has 33 MB."""

MAX_REMOTE_TOKENIZER: Final = 20_000_000
_MERGES: Final = re.compile(rb'"merges"\s*:\s*\[')
_MERGES_LAST: Final = re.compile(rb"\]\s*\}\s*\}\s*\Z")
TOKENIZER_FILES: Final = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "tiktoken.model", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model",
)  # fmt: skip
ADAPTER: Final = "adapter_config.json"
_SPECIAL: Final = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")


def json_names(source: Source) -> list[str]:
    """The JSON files `read_configs` is going to read."""
    names = ["config.json", PARAMS, "tokenizer_config.json", "tokenizer.json", "added_tokens.json"]
    names += ["special_tokens_map.json", "sentence_bert_config.json", *_quant_names(source)]
    if "config.json" not in source.files:
        names.append(ADAPTER)
    if "tokenizer.json" not in source.files:
        names.append("vocab.json")
    return [name for name in names if name in source.files and not _too_far(source, name)]


def read_object(source: Source, name: str, code: str, fix: str) -> tuple[Mapping[str, Any] | None, list[Finding]]:
    """The JSON object in a file, or None and one error finding with this code."""
    if name not in source.files:
        return None, []
    label = shown(name)
    try:
        if source.files[name] > MAX_JSON:
            raise BadJson(f"it has {source.files[name]:,} bytes, the limit is {MAX_JSON:,}")
        with source.open(name) as file:
            raw = file.read(MAX_JSON + 1)
        if len(raw) > MAX_JSON:
            raise BadJson(f"it has more than {MAX_JSON:,} bytes")
        if raw.startswith(b"version https://git-lfs"):
            raise BadJson("it is a Git LFS pointer (fetch it with `git lfs pull`)")
        if not raw.strip():
            raise BadJson("it is empty")
        value = parse_json(_without_merges(raw) if name == "tokenizer.json" else raw)
        if not isinstance(value, dict):
            raise BadJson(f"it holds {_json_type(value)}, not an object")
    except BadJson as error:
        return None, [Finding.error(code, f"{label} is not valid: {error}", some([name]), fix)]
    except OSError as error:
        return None, [Finding.error(code, f"{label} cannot be read: {error.strerror or error}", some([name]), fix)]
    return value, []


def read_configs(
    source: Source,
) -> tuple[Mapping[str, Any], dict[str, Mapping[str, Any]], dict[str, Any], list[Finding]]:
    """config.json, quant files by name, tokenizer facts, findings."""
    config, findings = read_object(source, "config.json", "config-invalid", "correct config.json or fetch it again")
    if "config.json" not in source.files and is_mistral_format(source.files):
        params, findings = read_object(source, PARAMS, "config-invalid", f"correct {PARAMS} or fetch it again")
        config = adapted(params) if params is not None else None
    elif "config.json" not in source.files and not any(name.endswith(".gguf") for name in source.files):
        findings.append(_no_config(source))
    quant_files = {}
    for name in _quant_names(source):
        value, found = read_object(source, name, "quant-config-invalid", f"correct {shown(name)} or fetch it again")
        findings += found
        if value is not None:
            quant_files[name] = value
    tokenizer, found = _tokenizer(source)
    return config or {}, quant_files, tokenizer, findings + found


def _no_config(source: Source) -> Finding:
    adapter, _ = read_object(source, ADAPTER, "config-missing", "")
    if adapter is not None:
        base = adapter.get("base_model_name_or_path")
        of = f" {shown(base)}" if isinstance(base, str) else ""
        return Finding.error(
            "config-missing",
            f"config.json is missing: the files are a LoRA adapter ({ADAPTER}), not a model",
            (ADAPTER,),
            f"list it in engine_config.adapters of its base model{of}",
        )
    return Finding.error(
        "config-missing",
        "config.json is missing",
        ("config.json",),
        "copy config.json of the model these weights come from into the folder",
    )


def _without_merges(raw: bytes) -> bytes:
    """tokenizer.json without its merges where they come last, as usual: most of the file, and of no use here."""
    found = _MERGES.search(raw)
    if not found or b'"vocab"' not in raw[: found.start()] or not _MERGES_LAST.search(raw, len(raw) - 200):
        return raw
    return raw[: found.end()] + raw[raw.rindex(b"]") :]


def _quant_names(source: Source) -> list[str]:
    return [n for n in source.files if n.endswith(".json") and "quant" in n and not n.endswith(".index.json")]


def _too_far(source: Source, name: str) -> bool:
    return source.location in ("hub", "bucket") and source.files.get(name, 0) > MAX_REMOTE_TOKENIZER


def _json_type(value: object) -> str:
    names = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "true or false"}
    return names.get(type(value), "null")


def _tokenizer(source: Source) -> tuple[dict[str, Any], list[Finding]]:
    fix = "fetch the tokenizer files of the model again"
    config, findings = read_object(source, "tokenizer_config.json", "tokenizer-invalid", fix)
    present = any(
        name in TOKENIZER_FILES or name.endswith(".tiktoken") or name.startswith("tokenizer.model.v")
        for name in source.files
    )
    if not present:
        findings.append(
            Finding.warning(
                "tokenizer-missing",
                f"no tokenizer file ({', '.join(TOKENIZER_FILES)})",
                (),
                "copy the tokenizer files of the base model into the folder, or set engine_kwargs.tokenizer",
            )
        )
    ids: list[int] = []
    base: list[int] = []
    names: set[str] = set()
    main = "tokenizer.json" if "tokenizer.json" in source.files else "vocab.json"
    for name in (main, "added_tokens.json"):
        if _too_far(source, name):
            continue
        value, found = read_object(source, name, "tokenizer-invalid", fix)
        findings += found
        if value is None:
            continue
        known = _ids(value) if name == "tokenizer.json" else list(value.values())
        if known is None:
            findings.append(
                Finding.error(
                    "tokenizer-invalid", f"{name} has no model.vocab and added_tokens as expected", (name,), fix
                )
            )
        else:
            ids += _integers(known)
            names |= _token_names(value) if name == "tokenizer.json" else set(value)
            base += _integers(_base_ids(value)) if name == main else []
    decoder = (config or {}).get("added_tokens_decoder")
    if ids and isinstance(decoder, dict):
        ids += [int(key) for key in decoder if key.isdecimal() and len(key) < 10]
        names |= {str(token.get("content")) for token in decoder.values() if isinstance(token, dict)}
    special, found = read_object(source, "special_tokens_map.json", "tokenizer-invalid", fix)
    findings += found
    # A special token without an id is added behind all others when the tokenizer is loaded.
    added = [name for name in _special_tokens({**(special or {}), **(config or {})}) if name not in names]
    if ids and names:
        ids.append(max(ids) + len(added))
    sentence, _ = read_object(source, "sentence_bert_config.json", "tokenizer-invalid", fix)
    template = (config or {}).get("chat_template")
    auto_map = (config or {}).get("auto_map")
    facts = {
        "present": present,
        "is_remote_code": isinstance(auto_map, dict) and "AutoTokenizer" in auto_map,
        "max_token_id": max(ids, default=None),
        "max_base_token_id": max(base, default=None),
        "has_chat_template": bool(template)
        or any(name in source.files for name in ("chat_template.jinja", "chat_template.json", "tekken.json")),
        "max_seq_length": (sentence or {}).get("max_seq_length"),
        "model_max_length": (config or {}).get("model_max_length"),
    }
    return facts, findings


def _base_ids(tokenizer: Mapping[str, Any]) -> list[object]:
    """Ids of the vocabulary itself, added tokens apart."""
    if "model" not in tokenizer:
        return list(tokenizer.values())  # vocab.json
    return _ids({**tokenizer, "added_tokens": []}) or []


def _token_names(tokenizer: Mapping[str, Any]) -> set[str]:
    """Texts of all tokens in tokenizer.json."""
    vocab = tokenizer["model"]["vocab"]
    names = set(vocab) if isinstance(vocab, dict) else {str(piece[0]) for piece in vocab if isinstance(piece, list)}
    added = tokenizer.get("added_tokens") or []
    return names | {str(token.get("content")) for token in added if isinstance(token, dict)}


def _special_tokens(config: Mapping[str, Any]) -> list[str]:
    """Texts of the special tokens that tokenizer_config.json or special_tokens_map.json names, each once."""
    extra = config.get("additional_special_tokens")
    values = [config.get(key) for key in _SPECIAL] + (extra if isinstance(extra, list) else [])
    texts = [value.get("content") if isinstance(value, dict) else value for value in values]
    return list(dict.fromkeys(text for text in texts if isinstance(text, str) and text))


def _ids(tokenizer: Mapping[str, Any]) -> list[object] | None:
    """Ids in tokenizer.json: of `model.vocab` (an object of ids, or for Unigram a list in order) and added tokens."""
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens") or []
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict | list) or not isinstance(added, list):
        return None
    ids: list[object] = list(vocab.values()) if isinstance(vocab, dict) else [len(vocab) - 1] if vocab else []
    return ids + [token.get("id") for token in added if isinstance(token, dict)]


def _integers(values: Iterable[object]) -> list[int]:
    return [value for value in values if type(value) is int]
