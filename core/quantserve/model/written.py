"""The quantization config of a checkpoint, and where a person finds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint
    from quantserve.config import ModelConfig


@dataclass(frozen=True)
class WrittenConfig:
    """A quantization config and where it stands. A plugin subclasses it with the method's names, files and settings.

    Attributes:
        names: what files call the method; the first where they do not say.
        files: ends of the names of other files that may hold the config, such as ``quantize_config.json``.
        where: ``config.json``, the file's name, or ``hf_overrides`` of the model config.
        values: the mapping as written, with ``hf_overrides`` in it.
    """

    names: ClassVar[tuple[str, ...]] = ()
    files: ClassVar[tuple[str, ...]] = ()

    where: str
    values: Mapping[str, Any]

    @classmethod
    def read(cls, checkpoint: Checkpoint, model: ModelConfig | None = None) -> Self | None:
        """The config that counts; None where there is none.

        Args:
            checkpoint: as a hook gets it, with ``hf_overrides`` in its config.
            model: tells whether they set anything of it.
        """
        if checkpoint.quantization_config is not None:
            overrides = model.engine_kwargs.get("hf_overrides") if model else None
            changed = isinstance(overrides, Mapping) and "quantization_config" in overrides
            return cls("hf_overrides" if changed else "config.json", checkpoint.quantization_config)
        found = [name for name in checkpoint.quant_files if cls.files and name.endswith(cls.files)]
        return cls(min(found), checkpoint.quant_files[min(found)]) if found else None

    @property
    def method(self) -> str:
        """``quant_method``, or the method's own name where that is not given."""
        return str(self.values.get("quant_method") or self.names[0]).lower()
