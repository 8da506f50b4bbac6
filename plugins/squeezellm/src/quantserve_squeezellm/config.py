"""The SqueezeLLM settings of a checkpoint: what is written where, and what is wrong with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from quantserve.api import Checkpoint, Finding, WrittenConfig
from quantserve_squeezellm.format import BITS

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

NAMES = ("squeezellm", "sqllm")
"""What files call the method."""
FILE_NAME = "quant_config.json"


@dataclass(frozen=True)
class Settings(WrittenConfig):
    """What is known about a checkpoint's quantization.

    Attributes:
        table_bits: widths of the lookup tables in the files: bits -> number of linears.
    """

    names = NAMES
    files = (FILE_NAME,)

    table_bits: Mapping[int, int] = field(default_factory=dict)

    @property
    def declared_bits(self) -> Any:
        """``wbits`` (or ``bits``) as written, None when absent."""
        return self.values.get("wbits", self.values.get("bits"))

    @property
    def bits(self) -> int | None:
        """The width: of the tables, else as declared; None when neither tells."""
        if self.table_bits:
            return max(self.table_bits, key=lambda bits: self.table_bits[bits])
        return self.declared_bits if self.declared_bits in BITS else None


def read_settings(checkpoint: Checkpoint, model: ModelConfig | None = None) -> Settings:
    """The settings that count, and the widths of the files' lookup tables; without settings an empty mapping."""
    table_bits: Counter[int] = Counter()
    for name, tensor in checkpoint.tensors.items():
        if name.endswith(".lookup_table") and len(tensor.shape) == 2:
            table_bits.update(bits for bits in BITS if tensor.shape[1] == 2**bits)
    written = Settings.read(checkpoint, model) or Settings("config.json", {})
    return replace(written, table_bits=table_bits)


def config_findings(settings: Settings) -> list[Finding]:
    """What is wrong with the settings themselves; the core has checked where they are."""
    declared = settings.declared_bits
    known = f"the lookup tables have {2 ** (settings.bits or 0)} entries, which is {settings.bits} bits"
    if declared is None:
        return [
            Finding.error(
                "squeezellm-missing-wbits",
                f"{settings.where} does not give wbits" + (f"; {known}" if settings.table_bits else ""),
                [settings.where],
                f'add to it "wbits": {settings.bits or 4}',
            )
        ]
    if isinstance(declared, bool) or declared not in BITS:
        message = f"{settings.where} says wbits {str(declared)[:40]!r}; SqueezeLLM has 3 and 4"
    elif settings.table_bits and declared != settings.bits:
        message = f"{settings.where} says wbits {declared}, but {known}"
    else:
        return []
    fix = f"set wbits to {settings.bits} if these are the right weights" if settings.table_bits else "correct it"
    return [Finding.error("squeezellm-bits", message, [f"{settings.where}: wbits"], fix)]
