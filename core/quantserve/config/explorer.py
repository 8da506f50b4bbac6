"""The section ``explorer`` of an app file: the web page at ``/``."""

from __future__ import annotations

import re
from typing import Final

from pydantic import Field, field_validator

from quantserve.config.report import fault
from quantserve.config.section import Section

VOTES_FILE: Final = "explorer-votes.sqlite3"


class ExplorerConfig(Section):
    """The web page that shows the models side by side (distribution quantserve-explorer)."""

    enabled: bool = Field(default=True, description="Whether `/` shows the page, if it is installed.")
    votes: bool = Field(
        default=False, description="Whether clients may vote for the better answer of a comparison, and see the votes."
    )
    blind: bool = Field(default=False, description="Hide the names of the models until a vote is cast.")
    votes_file: str = Field(
        default=VOTES_FILE, min_length=1, description="SQLite database of the votes; relative to this file."
    )
    price_per_hour: float | None = Field(
        default=None, ge=0, description="Price of the machine per hour, from which the page computes costs."
    )
    currency: str = Field(default="USD", description="Currency of the price: a code or a sign.")
    grafana_url: str | None = Field(default=None, description="Address of a Grafana dashboard, which the page links.")

    @field_validator("currency")
    @classmethod
    def _short(cls, value: str) -> str:
        if not 0 < len(value) <= 8 or not value.isprintable():
            raise fault(f"must be 1 to 8 characters, got {value[:40]!r}", fix="write a code such as EUR")
        return value

    @field_validator("grafana_url")
    @classmethod
    def _web_address(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"https?://[^\s\"'<>\\]{1,2000}", value):
            raise fault(f"must begin with http:// or https://, got {value[:80]!r}")
        return value
