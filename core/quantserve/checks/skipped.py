"""Lists of modules that a quantization config leaves unquantized, matched as vLLM 0.32 matches them.

vLLM compares the name of the layer it builds, not the names of the tensors: q, k and v are one ``qkv_proj``, all
experts of a block one ``experts``. A list that does not name the fused layer must name all of its parts, or none.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import translate
from typing import Literal

Match = Literal["substring", "exact", "suffix", "regex", "wildcard"]
"""How a method compares a layer's name with an entry of its list.

- ``substring``: the entry is anywhere in the name (AWQ).
- ``exact``: the entry is the name (FP8, MXFP4).
- ``suffix``: the entry is the name, or its end after a dot.
- ``regex``: the entry is the name, or ``re:`` and a pattern that matches from its start (compressed-tensors).
- ``wildcard``: the entry is anywhere in the name, or a wildcard (``*mlp.gate*``) that matches it; of the parts of a
  fused layer it is the whole name (ModelOpt).
"""

Headers = Literal["if_empty", "never", "also"]
"""Whether a method takes what the files hold unquantized for listed.

- ``if_empty``: when the list has no entries (AWQ, GPTQ).
- ``never``: not at all (FP8).
- ``also``: whatever the list holds (SqueezeLLM).
"""

# Beyond these a list is not judged, so that no list and no pattern takes long.
_MAX_COMPARISONS = 10_000_000
_MAX_SECONDS = 2.0
_MAX_NAME = 200
_MAX_CHOICES = 3  # repetitions and groups of one pattern
_MAX_ALTERNATIVES = 40


class SkipList:
    """A list of unquantized modules as a config holds it, whatever that is.

    Attributes:
        entries: what vLLM compares names with; empty when there is no list.
        headers: whether the files count too.
        problem: why vLLM stops at the value, or "".
        key: what the quantization config calls the list, for messages.
    """

    def __init__(
        self,
        value: object,
        match: Match = "substring",
        headers: Headers = "if_empty",
        key: str = "modules_to_not_convert",
    ) -> None:
        self.entries, self.problem = _entries(value, match)
        self.headers = headers
        self.key = key
        self._match = match
        self._named = _comparison(self.entries, match)

    def __bool__(self) -> bool:
        return bool(self.entries)

    def skips(self, layer: str, parts: Sequence[str] = ()) -> bool | None:
        """Whether vLLM builds a layer unquantized.

        Args:
            layer: path of the layer vLLM builds (`Linear.group`): ``model.layers.0.self_attn.qkv_proj``.
            parts: paths of the modules it is fused from (``...q_proj``); empty when it is not fused.

        Returns:
            None when the list names some parts and not others, which vLLM refuses, or when it cannot be judged.
        """
        named = self._named
        if named is None:
            return None
        if layer.endswith(".experts"):
            # Experts are one layer for every method; compressed-tensors asks for those of expert 0.
            parts = [part for part in parts if part.startswith(f"{layer}.0.")] if self._match == "regex" else ()
        if self._match in ("exact", "wildcard") and "experts" in layer and not parts:
            listed = any("experts" in entry and layer in entry for entry in self.entries)
            return listed or (self._match == "wildcard" and named(layer))
        if self._match == "wildcard" and parts and layer not in self.entries:
            whole = {part in self.entries for part in parts}
            return None if len(whole) > 1 else True in whole or named(layer)
        if not parts or named(layer):
            return named(layer)
        results = {named(part) for part in parts}
        return results.pop() if len(results) == 1 else None

    def judge(self, layers: Mapping[str, Sequence[str]]) -> Mapping[str, bool | None]:
        """The result of `skips` for every layer (`engine_layers`); empty when that would take long."""
        if self._named is None or len(layers) * len(self.entries) > _MAX_COMPARISONS:
            return {}
        result: dict[str, bool | None] = {}
        end = time.monotonic() + _MAX_SECONDS
        for layer, parts in layers.items():
            if self._match == "regex" and (len(layer) > _MAX_NAME or time.monotonic() > end):
                return {}
            result[layer] = self.skips(layer, parts)
        return result


def _entries(value: object, match: Match) -> tuple[tuple[str, ...], str]:
    """The entries of a list, and why vLLM stops at it."""
    if not value:
        return (), ""  # null, false, 0 and an empty list are no list
    if isinstance(value, str):
        return (), f"is the text {value[:60]!r}; vLLM takes each character for an entry"
    if not isinstance(value, Iterable):
        return (), f"is {str(value)[:60]}; vLLM needs a list"
    entries = list(value)  # of an object, vLLM reads the keys
    odd = [entry for entry in entries if not isinstance(entry, str)]
    if odd and match in ("substring", "regex", "wildcard"):
        return (), f"holds {str(odd[0])[:60]}, which is no text"
    return tuple(dict.fromkeys(entry for entry in entries if isinstance(entry, str))), ""


def _comparison(entries: Sequence[str], match: Match) -> Callable[[str], bool] | None:
    """A function that compares a name with all entries; None when a pattern may take long or cannot be compiled."""
    if match == "substring":
        return lambda name: any(entry in name for entry in entries)
    if match == "wildcard":
        wildcards = [re.compile(translate(entry)) for entry in entries if any(sign in entry for sign in "*?[")]
        return lambda name: any(entry in name for entry in entries) or any(one.match(name) for one in wildcards)
    names = set(entries)
    if match == "exact":
        return names.__contains__
    if match == "suffix":
        return lambda name: any(name[start:] in names for start in _component_starts(name))
    patterns = []
    for pattern in (entry[3:] for entry in entries if entry.startswith("re:")):
        if not _is_quick(pattern):
            return None
        try:
            patterns.append(re.compile(pattern))
        except re.error:
            return None
    return lambda name: name in names or any(pattern.match(name) for pattern in patterns)


def _is_quick(pattern: str) -> bool:
    """Whether matching a name of `_MAX_NAME` characters takes milliseconds at most, judged by the pattern's text."""
    plain = pattern.replace("(?:", "(")
    choices = sum(plain.count(character) for character in "*+?{(")
    hard = re.search(r"\)[*+?{]|\(\?|\\[1-9]", plain)
    return len(pattern) <= _MAX_NAME and choices <= _MAX_CHOICES and plain.count("|") <= _MAX_ALTERNATIVES and not hard


def _component_starts(name: str) -> list[int]:
    return [0, *(index + 1 for index, letter in enumerate(name) if letter == ".")]
