"""The ``generation`` section: chat template and default values of request fields."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from quantserve.config.rayllm.prompt_format import chat_template, disabled_template, parse_text
from quantserve.config.report import fault, got
from quantserve.config.section import Section


class PromptFormat(Section):
    """RayLLM's prompt format: builds a prompt from messages, for models without their own chat template."""

    system: str = Field(description="Text of the system message; {instruction} is replaced by the message.")
    assistant: str = Field(description="Text of an assistant message; {instruction} is replaced by the message.")
    trailing_assistant: str = Field(description="Text at the end of the prompt, before the model's answer.")
    user: str = Field(
        description="Text of a user message; {instruction} is replaced by the message and, with system_in_user, "
        "{system} by the system text."
    )
    default_system_message: str = Field(default="", description="System message of conversations without one.")
    system_in_user: bool = Field(
        default=False, description="Put the system text into the first user message, at {system}."
    )
    add_system_tags_even_if_message_is_empty: bool = Field(
        default=False, description="Write the system text around an empty message if there is no system message."
    )
    strip_whitespace: bool = Field(default=True, description="Strip whitespace around every message.")

    @field_validator("system", "assistant")
    @classmethod
    def _takes_instruction(cls, text: str) -> str:
        try:
            parse_text(text, frozenset({"instruction"}))
        except ValueError as error:
            raise fault(str(error)) from None
        return text

    @model_validator(mode="after")
    def _user_takes_system(self) -> PromptFormat:
        fields = {"instruction", "system"} if self.system_in_user else {"instruction"}
        try:
            parts = parse_text(self.user, frozenset(fields))
        except ValueError as error:
            fix = "set system_in_user: true, or remove {system}" if "{system}" in self.user else ""
            raise fault(str(error), at="user", fix=fix) from None
        if self.system_in_user and ("field", "system") not in parts:
            raise fault("system_in_user is true, so user must contain the placeholder {system}", at="user")
        return self


class GenerateKwargs(Section):
    """Default values of request fields, for clients that leave them out."""

    max_tokens: int | None = Field(default=None, ge=1, description="Most tokens to generate.")
    min_tokens: int | None = Field(default=None, ge=0, description="Fewest tokens to generate.")
    temperature: float | None = Field(
        default=None, ge=0, description="Sampling temperature; 0 always takes the most likely token."
    )
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="Sample from the most likely tokens with this total probability."
    )
    top_k: int | None = Field(
        default=None, ge=-1, description="Sample from this many most likely tokens; -1 or 0 means all."
    )
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="Lowest probability of a token, relative to the most likely one."
    )
    presence_penalty: float | None = Field(
        default=None, ge=-2, le=2, description="Penalty on tokens that have occurred."
    )
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, description="Penalty per occurrence of a token.")
    repetition_penalty: float | None = Field(default=None, gt=0, description="Above 1 discourages repetition.")
    length_penalty: float | None = Field(default=None, description="Exponent on the length in beam search.")
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1, description="Seed of the sampler.")
    stop: list[str] | None = Field(default=None, description="Texts that end the answer.")
    stop_token_ids: list[int] | None = Field(default=None, description="Token ids that end the answer.")
    bad_words: list[str] | None = Field(default=None, description="Texts that must not be generated.")
    logit_bias: dict[str, float] | None = Field(default=None, description="Bias by token id.")
    include_stop_str_in_output: bool | None = Field(default=None, description="Keep the stop text in the answer.")
    ignore_eos: bool | None = Field(default=None, description="Continue after the end-of-sequence token.")
    skip_special_tokens: bool | None = Field(default=None, description="Omit special tokens from the answer.")
    spaces_between_special_tokens: bool | None = Field(default=None, description="Put spaces between special tokens.")
    add_special_tokens: bool | None = Field(default=None, description="Let the tokenizer add its special tokens (BOS).")
    truncate_prompt_tokens: int | None = Field(
        default=None, ge=-1, description="Keep only this many tokens at the end of the prompt."
    )
    vllm_xargs: dict[str, Any] | None = Field(default=None, description="Extra arguments for logits processors.")

    @field_validator("stop", mode="before")
    @classmethod
    def _one_text_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("stop", "bad_words")
    @classmethod
    def _not_empty(cls, values: list[str] | None) -> list[str] | None:
        if values and "" in values:
            raise fault("an empty text is not allowed: it would end every answer at once", at=(values.index(""),))
        return values


class Generation(Section):
    """Chat template and request defaults of one model."""

    prompt_format: PromptFormat | None = Field(
        default=None,
        description="RayLLM's prompt format. Without it the tokenizer's own chat template is used; null disables chat.",
    )
    chat_template: str | None = Field(
        default=None, description="Jinja chat template: the text, or the path of a .jinja file. Excludes prompt_format."
    )
    generate_kwargs: GenerateKwargs = Field(
        default_factory=lambda: GenerateKwargs(), description="Default values of request fields."
    )
    stopping_sequences: list[Any] = Field(
        default_factory=list,
        description="Texts or token ids that end every answer.",
        json_schema_extra={"items": {"type": ["string", "integer"]}},
    )

    @field_validator("stopping_sequences")
    @classmethod
    def _texts_and_ids(cls, values: list[Any]) -> list[Any]:
        result: list[str | int] = []
        for index, given in enumerate(values):
            value = given
            if isinstance(value, list):
                if len(value) != 1:
                    raise fault(
                        f"must be a text or a single token id, got a sequence of {len(value)} tokens",
                        at=(index,),
                        fix="write the text of these tokens",
                    )
                value = value[0]
            if isinstance(value, bool) or not isinstance(value, str | int):
                raise fault(f"must be a text or a token id, got {got(value)}", at=(index,))
            if value == "" or (isinstance(value, int) and value < 0):
                raise fault("an empty text or a negative token id never ends an answer", at=(index,), fix="remove it")
            result.append(value)
        return result

    @model_validator(mode="after")
    def _one_template(self) -> Generation:
        if self.chat_template is not None and "prompt_format" in self.model_fields_set:
            raise fault("prompt_format and chat_template exclude each other", at="chat_template", fix="keep one")
        return self

    @property
    def chat_enabled(self) -> bool:
        """False when ``prompt_format`` is null."""
        return self.prompt_format is not None or "prompt_format" not in self.model_fields_set

    def template(self) -> str | None:
        """The chat template to serve with; None means the tokenizer's own."""
        if not self.chat_enabled:
            return disabled_template()
        return chat_template(self.prompt_format) if self.prompt_format else self.chat_template

    def request_defaults(self) -> dict[str, Any]:
        """Default values by request field; stops without duplicates."""
        given = self.generate_kwargs
        defaults: dict[str, Any] = given.model_dump(exclude_none=True)
        stops = [*(given.stop or ()), *(item for item in self.stopping_sequences if isinstance(item, str))]
        ids = [*(given.stop_token_ids or ()), *(item for item in self.stopping_sequences if isinstance(item, int))]
        for key, values in (("stop", sorted(set(stops))), ("stop_token_ids", sorted(set(ids)))):
            defaults.pop(key, None)
            if values:
                defaults[key] = values
        if self.prompt_format:
            # RayLLM tokenized the finished prompt, which added the tokenizer's BOS; vLLM's chat route does not.
            defaults.setdefault("add_special_tokens", True)
        return defaults
