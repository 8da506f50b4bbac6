"""LoRA adapters that are served beside a model, and what vLLM's arguments may say of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field, field_validator

from quantserve.config.paths import usable_id
from quantserve.config.report import Fault, fault
from quantserve.config.section import Section
from quantserve.config.source import KeyPath


class AdapterConfig(Section):
    """A LoRA adapter that is served beside its model, under a name of its own."""

    name: str = Field(description="Id of the adapter in the API.", examples=["sql-writer"])
    source: str = Field(
        description="Folder with adapter_config.json, Hugging Face id, or an s3:// or gs:// URL. Relative to this file."
    )
    revision: str | None = Field(
        default=None, description="Branch, tag or commit on the hub, default main; of a bucket the revision of `plan`."
    )

    @field_validator("name")
    @classmethod
    def _usable_in_a_url(cls, value: str) -> str:
        return usable_id(value)

    @field_validator("source", "revision")
    @classmethod
    def _not_blank(cls, value: str | None) -> str | None:
        if value is not None and (not value.strip() or "\n" in value):
            raise fault("must not be empty or have several lines")
        return value


def adapter_faults(
    adapters: Sequence[AdapterConfig], model_id: str, engine: Mapping[str, Any], frontend: Mapping[str, Any]
) -> Iterator[Fault]:
    """What contradicts the adapters of one model: names given twice, and arguments of vLLM."""
    at: KeyPath
    seen = {model_id: "the id of the model"}
    for index, adapter in enumerate(adapters):
        if adapter.name in seen:
            at = ("adapters", index, "name")
            yield at, f"{adapter.name!r} is {seen[adapter.name]} already", "give every adapter a name of its own"
        seen.setdefault(adapter.name, f"the name of adapters[{index}]")
    if adapters and engine.get("enable_lora") is False:
        at = ("engine_kwargs", "enable_lora")
        yield at, "false contradicts `adapters`", "remove enable_lora; it follows from `adapters`"
    if adapters and frontend.get("lora_modules"):
        at = ("frontend_kwargs", "lora_modules")
        yield at, "and `adapters` both name adapters", "move them to `adapters`, where they are checked"
    most, kept = engine.get("max_loras"), engine.get("max_cpu_loras")
    if isinstance(most, int) and isinstance(kept, int) and kept < most:
        at = ("engine_kwargs", "max_cpu_loras")
        yield at, f"must not be less than max_loras ({most}), got {kept}", f"set it to {most} or more"
