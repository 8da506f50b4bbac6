"""What all sections of a config have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of the config: unknown keys, text for numbers and numbers for text are errors."""

    # Validators are built at first use: commands that load no config, such as `list`, start without them.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)
