# ruff: noqa: E501
"""prompt_format renders as RayLLM did, through the Jinja that transformers and vLLM use."""

from __future__ import annotations

from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import ValidationError

from quantserve.config import Generation, PromptFormat

Message = dict[str, Any]

BRACKETS = {
    "system": "[system] {instruction} [/system] ",
    "assistant": "[assistant] {instruction} [/assistant] ",
    "trailing_assistant": "[assistant]",
    "user": "[user] {instruction} [/user] ",
}
LLAMA: dict[str, Any] = {
    "system": "<<SYS>>\n{instruction}\n<</SYS>>\n\n",
    "assistant": " {instruction} </s><s>",
    "trailing_assistant": "",
    "user": "[INST] {system}{instruction} [/INST]",
    "system_in_user": True,
}
MISTRAL = {**LLAMA, "system": "{instruction} + ", "assistant": "{instruction}</s> "}

# The chat templates that Meta and Mistral AI published with their first tokenizers, which RayLLM's formats imitate.
HF_LLAMA = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
HF_MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
)


def render_jinja(template: str, messages: list[Message], add_generation_prompt: bool = True) -> str:
    """As transformers renders chat templates."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = raise_exception
    compiled = environment.from_string(template)
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    return str(compiled.render(messages=messages, add_generation_prompt=add_generation_prompt, **tokens))


def render(form: dict[str, Any], messages: list[Message], add_generation_prompt: bool = True) -> str:
    template = Generation(prompt_format=PromptFormat(**form)).template()
    assert template is not None
    assert template.isascii()
    return render_jinja(template, messages, add_generation_prompt)


def rayllm(form: dict[str, Any], messages: list[Message]) -> str:
    """RayLLM's six rendering rules, written down independently."""
    in_user = form.get("system_in_user", False)
    tags = form.get("add_system_tags_even_if_message_is_empty", False)

    def strip(text: str) -> str:
        return text.strip() if form.get("strip_whitespace", True) else text

    systems: list[str] = [message["content"] for message in messages if message["role"] == "system"]
    if len(systems) > 1:
        raise ValueError("two system messages")
    default = form.get("default_system_message", "")
    system = systems[0] if systems else default if default or tags else None
    if system == "" and not tags:
        system = None
    out = ""
    if system is not None and not in_user:
        out += str(form["system"]).format(instruction=strip(system))
    for message in messages:
        text = message["content"]
        if message["role"] == "user" and in_user:
            inner = "" if system is None else form["system"].format(instruction=system)
            out += form["user"].format(instruction=strip(text), system=inner)
            system = None
        elif message["role"] in ("user", "assistant"):
            out += form[message["role"]].format(instruction=strip(text))
    return out + str(form["trailing_assistant"])


def talk(*turns: str) -> list[Message]:
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": names[turn[0]], "content": turn[1:]} for turn in turns]


@pytest.mark.parametrize(
    ("options", "turns", "expected"),
    [
        ({}, ["uh1"], "[user] h1 [/user] [assistant]"),
        ({}, ["sh1", "uh2"], "[system] h1 [/system] [user] h2 [/user] [assistant]"),
        ({}, ["uh1", "ah2", "uh3"], "[user] h1 [/user] [assistant] h2 [/assistant] [user] h3 [/user] [assistant]"),
        ({}, ["uh1", "sh2"], "[system] h2 [/system] [user] h1 [/user] [assistant]"),
        ({}, ["s", "uh1"], "[user] h1 [/user] [assistant]"),
        ({}, ["uh1", "tignored", "ah2"], "[user] h1 [/user] [assistant] h2 [/assistant] [assistant]"),
        ({"default_system_message": "Test"}, ["uh1"], "[system] Test [/system] [user] h1 [/user] [assistant]"),
        ({"default_system_message": "Test"}, ["sh1", "uh2"], "[system] h1 [/system] [user] h2 [/user] [assistant]"),
        ({"default_system_message": "Test"}, ["s", "uh2"], "[user] h2 [/user] [assistant]"),
        ({"add_system_tags_even_if_message_is_empty": True}, ["uh1"], "[system]  [/system] [user] h1 [/user] [assistant]"),
        ({}, ["uh1 ", "a h2"], "[user] h1 [/user] [assistant] h2 [/assistant] [assistant]"),
        ({"strip_whitespace": False}, ["uh1 ", "a h2"], "[user] h1  [/user] [assistant]  h2 [/assistant] [assistant]"),
    ],
)  # fmt: skip
def test_rules(options: dict[str, Any], turns: list[str], expected: str) -> None:
    assert render({**BRACKETS, **options}, talk(*turns)) == expected
    assert rayllm({**BRACKETS, **options}, talk(*turns)) == expected


@pytest.mark.parametrize(
    ("options", "turns", "expected"),
    [
        ({}, ["uh1"], "[INST] h1 [/INST]"),
        ({}, ["sh1", "uh2"], "[INST] <<SYS>>\nh1\n<</SYS>>\n\nh2 [/INST]"),
        ({}, ["uh1", "sh2"], "[INST] <<SYS>>\nh2\n<</SYS>>\n\nh1 [/INST]"),
        ({}, ["s h1 ", "uh2", "ah3", "uh4"], "[INST] <<SYS>>\n h1 \n<</SYS>>\n\nh2 [/INST] h3 </s><s>[INST] h4 [/INST]"),
        ({"default_system_message": "T"}, ["uh1", "ah2", "uh3"],
         "[INST] <<SYS>>\nT\n<</SYS>>\n\nh1 [/INST] h2 </s><s>[INST] h3 [/INST]"),
        ({"add_system_tags_even_if_message_is_empty": True}, ["uh1"], "[INST] <<SYS>>\n\n<</SYS>>\n\nh1 [/INST]"),
    ],
)  # fmt: skip
def test_system_in_user(options: dict[str, Any], turns: list[str], expected: str) -> None:
    assert render({**LLAMA, **options}, talk(*turns)) == expected
    assert rayllm({**LLAMA, **options}, talk(*turns)) == expected


CONVERSATIONS = [
    ["uh1"],
    ["sh1", "uh2"],
    ["uh1", "ah2", "uh3"],
    ["sh1", "uh2", "ah3", "uh4"],
    ["uh1", "ah2", "uh3", "ah4", "uh5"],
    ["sh1", "uh2", "ah3", "uh4", "ah5", "uh6"],
]


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_same_prompt_as_the_published_templates(turns: list[str]) -> None:
    """The tokenizer adds the BOS (add_special_tokens), which the published templates write themselves."""
    assert "<s>" + render(LLAMA, talk(*turns)) == render_jinja(HF_LLAMA, talk(*turns))
    if turns[0][0] == "u":
        assert "<s>" + render(MISTRAL, talk(*turns)) == render_jinja(HF_MISTRAL, talk(*turns))
    assert Generation(prompt_format=PromptFormat(**LLAMA)).request_defaults() == {"add_special_tokens": True}


def test_trailing_assistant_only_when_an_answer_is_asked_for() -> None:
    assert render(BRACKETS, talk("uh1"), add_generation_prompt=False) == "[user] h1 [/user] "


def test_two_system_messages_and_other_errors() -> None:
    with pytest.raises(jinja2.TemplateError, match="Only one system message can be specified"):
        render(BRACKETS, talk("sa", "ub", "sc"))
    with pytest.raises(jinja2.TemplateError, match="plain-text messages only"):
        render(BRACKETS, [{"role": "user", "content": [{"type": "image_url"}]}])
    disabled = Generation.model_validate({"prompt_format": None}).template()
    with pytest.raises(jinja2.TemplateError, match="does not support chat completions"):
        render_jinja(disabled or "", talk("ua"))


def test_developer_is_system_and_a_missing_content_is_empty() -> None:
    messages = [{"role": "developer", "content": "d"}, {"role": "user", "content": "u"}, {"role": "assistant"}]
    assert render(BRACKETS, messages) == ("[system] d [/system] [user] u [/user] [assistant]  [/assistant] [assistant]")


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"user": "no placeholder"}, "must contain the placeholder"),
        ({"system": ""}, "must contain the placeholder"),
        ({"assistant": "{instruction"}, "expected '}' before end of string"),
        ({"assistant": "{instruction} {"}, "single '{' encountered"),
        ({"assistant": "{instruction!r}"}, "unknown placeholder {instruction!r} (known: {instruction})"),
        ({"assistant": "{instruction.x}"}, "unknown placeholder {instruction.x}"),
        ({"assistant": "{} {instruction}"}, "unknown placeholder {}"),
        ({"system": "{system} {instruction}"}, "unknown placeholder {system} (known: {instruction})"),
        ({"user": "{system}{instruction}"}, "unknown placeholder {system} (known: {instruction})"),
        ({"system_in_user": True}, "user must contain the placeholder {system}"),
    ],
)
def test_placeholders(form: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        PromptFormat(**{**BRACKETS, **form})
    assert expected in str(caught.value)


NASTY = ["{{ 7*7 }}", "{% raw %}", "{# x #}", "'", '"', "\\", "\\n", "\n", "\r\n", "\t", "\0", "é", "\U0001f600", "{", "}",
         "{{", "}}", "{%", "-%}", "{instruction}", "{system}", "  ", "</s>", "\u2028", "#", "'+x+'"]  # fmt: skip
texts = st.lists(st.sampled_from(NASTY) | st.text(max_size=5), max_size=4).map("".join)


def fields(*names: str) -> st.SearchStrategy[str]:
    """Texts around the given placeholders, with literal braces doubled as format strings want."""
    escaped = texts.map(lambda text: text.replace("{", "{{").replace("}", "}}"))
    placeholders = [f"{{{name}}}" for name in names]
    return st.tuples(*[escaped for _ in range(len(names) + 1)]).map(
        lambda parts: parts[0] + "".join(place + part for place, part in zip(placeholders, parts[1:], strict=True))
    )


@st.composite
def forms(draw: st.DrawFn) -> dict[str, Any]:
    in_user = draw(st.booleans())
    return {
        "system": draw(fields("instruction")),
        "assistant": draw(fields("instruction")),
        "user": draw(fields("system", "instruction") if in_user else fields("instruction")),
        "trailing_assistant": draw(texts),
        "default_system_message": draw(texts),
        "system_in_user": in_user,
        "add_system_tags_even_if_message_is_empty": draw(st.booleans()),
        "strip_whitespace": draw(st.booleans()),
    }


turns = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool", "system"]), "content": texts}),
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(form=forms(), messages=turns)
def test_equals_rayllms_rules(form: dict[str, Any], messages: list[Message]) -> None:
    try:
        expected = rayllm(form, messages)
    except ValueError:
        with pytest.raises(jinja2.TemplateError, match="Only one system message"):
            render(form, messages)
        return
    assert render(form, messages) == expected
