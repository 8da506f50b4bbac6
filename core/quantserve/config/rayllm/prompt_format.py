"""Converts RayLLM's ``prompt_format`` to a Jinja chat template, by these rules:

1. The system message moves to the front; two system messages are an error.
2. With ``system_in_user`` it is written into the first user message instead, and is not stripped.
3. Without a system message ``default_system_message`` is used, or empty tags with
   ``add_system_tags_even_if_message_is_empty``; an explicit empty message is dropped unless that flag is set.
4. ``strip_whitespace`` strips every message.
5. Messages of other roles (tool) are skipped. ``developer``, the newer name of ``system``, counts as system.
6. ``trailing_assistant`` ends the prompt if ``add_generation_prompt`` is set.

The texts are Python format strings, as in RayLLM: ``{{`` means one brace. ``trailing_assistant`` and
``default_system_message`` are used literally. RayLLM let the tokenizer add its special tokens to the finished prompt,
so requests need ``add_special_tokens: true``; a template cannot detect whether the tokenizer adds a BOS.
"""

from __future__ import annotations

from string import Formatter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantserve.config.generation import PromptFormat

TWO_SYSTEM_MESSAGES = "Only one system message can be specified."
CHAT_DISABLED = "This model does not support chat completions. Use the completions endpoint instead."
NOT_TEXT = "This model supports plain-text messages only."

Part = tuple[str, str]
"""A piece of a parsed text: ("text", literal) or ("field", name)."""


def parse_text(text: str, allowed: frozenset[str]) -> list[Part]:
    """Split a format string into literal texts and fields.

    Raises:
        ValueError: unbalanced braces, a field that is not allowed, or no ``{instruction}``.
    """
    names = " or ".join(f"{{{name}}}" for name in sorted(allowed))
    literal_brace = "write {{ or }} for a brace that is part of the prompt"
    try:
        pieces = list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{str(error).lower()}; {literal_brace}") from None
    parts: list[Part] = []
    for literal, name, spec, conversion in pieces:
        if literal:
            parts.append(("text", literal))
        if name is None:
            continue
        if name not in allowed or spec or conversion:
            written = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ValueError(f"unknown placeholder {{{written}}} (known: {names}); {literal_brace}")
        parts.append(("field", name))
    if ("field", "instruction") not in parts:
        raise ValueError("must contain the placeholder {instruction} for the message")
    return parts


def literal(text: str) -> str:
    """`text` as a Jinja string literal in ASCII, escaped so that no template syntax in it is evaluated."""
    escaped = text.encode("unicode_escape").decode("ascii").replace("'", "\\'")
    return f"'{escaped}'"


def disabled_template() -> str:
    """The template for ``prompt_format: null``, which raises an error for every chat request."""
    return f"{{{{- raise_exception({literal(CHAT_DISABLED)}) -}}}}"


def chat_template(form: PromptFormat) -> str:
    """The Jinja template that is equivalent to `form`."""
    system, user, assistant = (
        parse_text(text, frozenset(fields))
        for text, fields in (
            (form.system, {"instruction"}),
            (form.user, {"instruction", "system"} if form.system_in_user else {"instruction"}),
            (form.assistant, {"instruction"}),
        )
    )
    default = form.default_system_message
    tags = form.add_system_tags_even_if_message_is_empty
    fallback = literal(default) if default or tags else "none"
    strip = " | trim" if form.strip_whitespace else ""
    lines = [
        "{%- set prompt = namespace(system=none) -%}",
        "{%- for message in messages -%}",
        "{%- if message['role'] in ['system', 'developer'] -%}",
        "{%- if prompt.system is not none -%}",
        f"{{{{- raise_exception({literal(TWO_SYSTEM_MESSAGES)}) -}}}}",
        "{%- endif -%}",
        "{%- set prompt.system = message['content'] or '' -%}",
        f"{{%- if prompt.system is not string -%}}{{{{- raise_exception({literal(NOT_TEXT)}) -}}}}{{%- endif -%}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        f"{{%- if prompt.system is none -%}}{{%- set prompt.system = {fallback} -%}}",
    ]
    if not tags:
        lines.append("{%- elif not prompt.system -%}{%- set prompt.system = none -%}")
    lines.append("{%- endif -%}")
    if not form.system_in_user:
        shown = _output(system, {"instruction": f"(prompt.system{strip})"})
        lines.append(f"{{%- if prompt.system is not none -%}}{shown}{{%- endif -%}}")
    lines += [
        "{%- for message in messages -%}",
        "{%- if message['role'] in ['user', 'assistant'] -%}",
        "{%- set text = message['content'] or '' -%}",
        f"{{%- if text is not string -%}}{{{{- raise_exception({literal(NOT_TEXT)}) -}}}}{{%- endif -%}}",
        f"{{%- set text = text{strip} -%}}",
        "{%- if message['role'] == 'user' -%}",
    ]
    fields = {"instruction": "text"}
    if form.system_in_user:
        inner = " ~ ".join(_terms(system, {"instruction": "prompt.system"}))
        lines.append(f"{{%- set tagged = ({inner}) if prompt.system is not none else '' -%}}")
        lines.append("{%- set prompt.system = none -%}")
        fields["system"] = "tagged"
    lines += [
        _output(user, fields),
        "{%- else -%}",
        _output(assistant, {"instruction": "text"}),
        "{%- endif -%}",
        "{%- endif -%}",
        "{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}{{{{- {literal(form.trailing_assistant)} -}}}}{{%- endif -%}}",
    ]
    return "\n".join(lines)


def _terms(parts: list[Part], fields: dict[str, str]) -> list[str]:
    return [literal(value) if kind == "text" else fields[value] for kind, value in parts]


def _output(parts: list[Part], fields: dict[str, str]) -> str:
    return f"{{{{- {' ~ '.join(_terms(parts, fields))} -}}}}"
