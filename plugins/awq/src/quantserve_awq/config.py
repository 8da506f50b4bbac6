"""The AWQ settings of a checkpoint: where they are written, which are missing, which vLLM cannot serve."""

from __future__ import annotations

from typing import Any

from quantserve.api import Finding, WrittenConfig

NAMES = ("awq", "auto_awq", "awq_marlin")
"""What files call the method."""
FILE_NAMES = ("quantize_config.json", "quant_config.json")
# Value -> spellings; vLLM looks for the first one first.
KEYS = {
    "bits": ("w_bit", "bits"),
    "group_size": ("q_group_size", "group_size"),
    "zero_point": ("zero_point",),
}
# ``version`` names a layout, or a kernel of AutoAWQ's for files in the gemm layout.
GEMM_VERSIONS = ("gemm", "exllama", "exllamav2", "ipex")
REFUSED = ("awq-bits", "awq-version")
"""Findings after which no tensor is compared: every one would be wrong."""
EXAMPLE = '{"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": true, "version": "gemm"}'


class Written(WrittenConfig):
    """AWQ's config."""

    names = NAMES
    files = FILE_NAMES

    def get(self, key: str) -> Any:
        """The value of ``bits``, ``group_size`` or ``zero_point`` under any of its spellings, else None."""
        return next((self.values[name] for name in KEYS[key] if name in self.values), None)

    @property
    def declares_method(self) -> bool:
        """Whether ``quant_method`` says something."""
        return bool(self.values.get("quant_method"))

    @property
    def group_size(self) -> int | None:
        """The group size when it is a usable one."""
        value = self.get("group_size")
        return value if is_integer(value) and (0 < value < 2**31 or value == -1) else None

    @property
    def symmetric(self) -> bool:
        """Whether the settings have ``zero_point: false``."""
        return self.get("zero_point") is False

    @property
    def skipped(self) -> tuple[str, ...]:
        """``modules_to_not_convert``."""
        value = self.values.get("modules_to_not_convert")
        return tuple(item for item in value if isinstance(item, str)) if isinstance(value, (list, tuple)) else ()


def is_integer(value: object) -> bool:
    """Whether a JSON value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def config_findings(written: Written) -> list[Finding]:
    """What is wrong with the settings themselves; the core has checked where they are."""
    findings = key_findings(written)
    bits = written.get("bits")
    version = str(written.values.get("version") or "gemm")[:40]
    if is_integer(bits) and bits != 4:
        findings.append(
            Finding.error(
                "awq-bits",
                f"{written.where} says {str(bits)[:40]} bits; vLLM serves AWQ with 4 bits only",
                [written.where],
                "use a 4-bit export of the model",
            )
        )
    if version.lower() not in GEMM_VERSIONS:
        findings.append(
            Finding.error(
                "awq-version",
                f"{written.where} says version {version}; vLLM reads every AWQ file as gemm and would misread this one",
                [f"{written.where}: version"],
                'export the model again with version "gemm"',
            )
        )
    return findings


def key_findings(written: Written) -> list[Finding]:
    """Keys that are missing or hold something else than they should."""
    missing, bad = [], []
    for key, spellings in KEYS.items():
        value = written.get(key)
        if not any(name in written.values for name in spellings):
            missing.append(" or ".join(reversed(spellings)))
        elif key == "group_size":
            if written.group_size is None:
                bad.append(f"group_size is {str(value)[:40]!r}, not a positive number or -1")
        elif not (isinstance(value, bool) if key == "zero_point" else is_integer(value)):
            bad.append(f"{key} is {str(value)[:40]!r}, not {'true or false' if key == 'zero_point' else 'a number'}")
    findings = []
    if missing:
        findings.append(
            Finding.error(
                "awq-missing-keys",
                f"{written.where} does not give {', '.join(missing)}; vLLM has no default for them",
                missing,
                f"complete it, for example {EXAMPLE}",
            )
        )
    if bad:
        findings.append(
            Finding.error("awq-bad-keys", f"{written.where}: {'; '.join(bad)}", bad, f"write it like {EXAMPLE}")
        )
    return findings
