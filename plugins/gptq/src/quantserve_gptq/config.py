"""The GPTQ settings of a checkpoint and of each of its linears. Both sides of the plugin read them here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantserve.api import Finding, Scheme, WrittenConfig
from quantserve_gptq.format import gptq_scheme

NAMES = ("gptq", "auto_gptq", "gptq_marlin")
"""What files call the method."""
FILE_NAME = "quantize_config.json"
BITS = (2, 3, 4, 8)
VERSIONS = {"gptq": 1, "gptq_v2": 0}
"""``checkpoint_format`` -> what is added to a stored zero: version 1 stores zeros minus 1."""
TYPES = {"bits": int, "group_size": int, "sym": bool, "desc_act": bool}
EXAMPLE = '{"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": true, "desc_act": false}'


@dataclass(frozen=True)
class Settings:
    """How one linear is quantized.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: inputs that share a scale and a zero; -1 for all of them.
        sym: whether every zero is the middle code, 2 ** (bits - 1).
        desc_act: whether inputs were quantized in the order of their activations, so that ``g_idx`` scatters groups
            over K. With one group for all inputs the order does not matter.
    """

    bits: int
    group_size: int
    sym: bool
    desc_act: bool

    def __str__(self) -> str:
        """For messages."""
        groups = "whole rows" if self.group_size == -1 else f"groups of {self.group_size}"
        return f"{self.bits} bits, {groups}{'' if self.sym else ', asymmetric'}{', act-order' if self.desc_act else ''}"

    @property
    def scheme(self) -> Scheme:
        """The tensors of the linear."""
        return gptq_scheme(self.bits, self.group_size, ordered=self.desc_act)


class Written(WrittenConfig):
    """GPTQ's config."""

    names = NAMES
    files = (FILE_NAME,)

    @property
    def version(self) -> str:
        """``checkpoint_format``; version 1 where it is not given."""
        if self.values.get("is_marlin_format") is True:
            return "marlin"
        return str(self.values.get("checkpoint_format") or "gptq").lower()

    @property
    def zero_offset(self) -> int:
        """What is added to a stored zero."""
        return VERSIONS[self.version]

    @property
    def rules(self) -> Mapping[str, Any]:
        """``dynamic``: a pattern with ``+:`` or ``-:`` in front -> settings of the modules it matches."""
        rules = self.values.get("dynamic")
        return rules if isinstance(rules, Mapping) else {}

    def of(self, module: str) -> Settings | None:
        """The settings of a module; None where a rule leaves it unquantized.

        The first rule that matches from the start of the name decides, as in GPTQModel and vLLM.
        """
        rule: Mapping[str, Any] = {}
        for pattern, values in self.rules.items():
            if re.match(pattern[2:] if pattern[:2] in ("+:", "-:") else pattern, module):
                if pattern.startswith("-:"):
                    return None
                rule = values
                break
        one = {**self.values, **rule}
        desc_act = bool(one.get("desc_act")) and one["group_size"] != -1 and not self.values.get("static_groups")
        return Settings(one["bits"], one["group_size"], one["sym"], desc_act)


def config_findings(written: Written) -> list[Finding]:
    """What is wrong with the settings themselves; after any of these no tensor is compared."""
    problems = [
        *_problems(written.values, tuple(TYPES)),
        *(problem for pattern, rule in written.rules.items() for problem in _rule_problems(pattern, rule)),
    ]
    findings = [
        Finding.error("gptq-settings", f"{written.where}: {problem}", [written.where], f"write it like {EXAMPLE}")
        for problem in problems
    ]
    if written.version not in VERSIONS:
        message = f"{written.where}: checkpoint_format {written.version[:40]!r}; known are {' and '.join(VERSIONS)}"
        fix = "export the model again with checkpoint_format gptq"
        findings.append(Finding.error("gptq-version", message, [f"{written.where}: checkpoint_format"], fix))
    pack_dtype = written.values.get("pack_dtype", "int32")
    if str(pack_dtype).removeprefix("torch.") != "int32":
        message = f"{written.where}: pack_dtype {str(pack_dtype)[:40]!r}; vLLM and this plugin read int32 words"
        fix = "export the model again with pack_dtype int32"
        findings.append(Finding.error("gptq-pack-dtype", message, [f"{written.where}: pack_dtype"], fix))
    return findings


def _problems(values: Mapping[str, Any], needed: tuple[str, ...]) -> Iterator[str]:
    """What is missing, of another type than it should be, or out of range."""
    if missing := [key for key in needed if key not in values]:
        yield f"{', '.join(missing)} missing; vLLM has no default for them"
    for key, kind in TYPES.items():
        value = values.get(key)
        if key in values and type(value) is not kind:
            yield f"{key} is {str(value)[:40]!r}, not {'true or false' if kind is bool else 'a whole number'}"
        elif key == "bits" and key in values and value not in BITS:
            yield f"bits is {str(value)[:40]}; GPTQ is served with {', '.join(map(str, BITS))}"
        elif key == "group_size" and key in values and not (value == -1 or 0 < value < 2**31):  # type: ignore[operator]
            yield f"group_size is {str(value)[:40]}, not a positive number or -1"


def _rule_problems(pattern: str, rule: Any) -> Iterator[str]:
    try:
        re.compile(pattern[2:] if pattern[:2] in ("+:", "-:") else pattern)
    except re.error as error:
        yield f"dynamic rule {pattern[:80]!r} is no regular expression ({error})"
    if pattern.startswith("-:"):
        return
    if not isinstance(rule, Mapping):
        yield f"dynamic rule {pattern[:80]!r} is {str(rule)[:40]!r}, not an object of settings"
    else:
        yield from (f"dynamic rule {pattern[:80]!r}: {problem}" for problem in _problems(rule, ()))
