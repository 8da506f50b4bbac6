"""What is read from a JSON text without building it is what Python's parser, which vLLM uses, reads."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantserve.serve.asgi import Refused
from quantserve.serve.json_fields import (
    STEP,
    FieldReader,
    check_text,
    first,
    is_list_of_lists,
    is_token_ids,
    items,
    number,
    spliced,
)

NAMES = ("n", "model", "messages")
MANY = 10**9
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
)
pairs = st.lists(st.tuples(st.sampled_from((*NAMES, "N", "mod", "\x00", 'a"n"')) | st.text(), values), max_size=8)


def dumped(found: list[tuple[str, Any]], *, ascii: bool) -> bytes:
    """An object that may have a key several times."""
    fields = (f"{json.dumps(key, ensure_ascii=ascii)} :{json.dumps(value, ensure_ascii=ascii)}" for key, value in found)
    return (" {" + ", ".join(fields) + "}\n").encode("utf-8", "surrogatepass")


@settings(deadline=None)
@given(pairs, st.booleans())
def test_fields_are_read_as_by_the_json_module(found: list[tuple[str, Any]], ascii: bool) -> None:
    body = dumped(found, ascii=ascii)
    expected = json.loads(body)
    check_text(body, MANY)
    read = FieldReader(NAMES).read(body)
    assert {name: json.loads(bytes(raw)) for name, raw in read.items()} == {
        name: value for name, value in expected.items() if name in NAMES
    }
    added = json.loads(spliced(body, {"n": 3, "x": [1.5]}))
    assert added == {**expected, "n": 3, "x": [1.5]}


@settings(deadline=None)
@given(
    st.integers(0, 40), st.integers(0, 8), st.sampled_from(["\\ud83d\\ude00", "\\\\", '\\"', "\\n", "é", "9", "-1e5"])
)
def test_where_a_text_is_cut_makes_no_difference(before: int, more: int, unit: str) -> None:
    text = ("x" * (STEP - before) + unit * (more + 12)).encode()
    check_text(b'{"x": "' + text + b'"}', 10)
    number_there = b"1" * (20 - before % 3)
    body = b'{"x": [' + b" " * (STEP - before) + number_there + b", " * 2
    if int(number_there) >= 2**64:
        with pytest.raises(Refused, match="64 bits"):
            check_text(body, 10)
    else:
        check_text(body, 10)


@pytest.mark.parametrize("where", [0, STEP - 6, STEP - 3, STEP, 3 * STEP + 1])
@pytest.mark.parametrize(
    ("unit", "fine"),
    [
        (rb"\ud83d\ude00", True), (rb"\ud83d", False), (rb"\ude00", False), (rb"\ude00\ud83d", False),
        (rb"\\ud83d", True), (rb"\\\ud83d", False), (rb"\ud83d\\ude00", False), (rb"\ud83d\ude00\ude00", False),
        ("é".encode(), True), (b"\xe9", False), (b"\xed\xa0\x80", False), (b"\xf0\x9f\x98\x80", True),
    ],
)  # fmt: skip
def test_text_that_is_not_unicode(unit: bytes, fine: bool, where: int) -> None:
    body = b'{"x": "' + b"y" * where + unit + b'z"}'
    if fine:
        check_text(body, 10)
    else:
        with pytest.raises(Refused, match=r"not valid Unicode|must be UTF-8"):
            check_text(body, 10)


def test_numbers_within_texts_and_fractions_are_not_judged() -> None:
    check_text(b'{"x": ["' + b"9" * 50 + b'", 0.' + b"1" * 50 + b", 1e5, -9223372036854775808]}", 10)


def test_space_before_the_first_item_is_skipped_in_steps() -> None:
    """A regular expression would hold the interpreter for the time that it takes to go there and back."""
    raw = FieldReader(["x"]).read(b'{"x": [' + b" " * (16 << 20) + b'"a"]}')["x"]
    alone = FieldReader(["x"]).read(b'{"x": "' + b" " * (16 << 20) + b'"}')["x"]
    began = time.process_time()
    for _ in range(10):
        assert not is_token_ids(raw)
        assert not is_list_of_lists(raw)
        assert not is_token_ids(alone)
    assert time.process_time() - began < 3


def test_large_text_takes_a_time_in_proportion() -> None:
    """Hostile texts do not take much longer per byte than others."""

    def seconds(unit: bytes) -> float:
        body = b'{"x": "' + unit * ((4 << 20) // len(unit)) + b'"}'
        began = time.process_time()
        check_text(body, MANY)
        return time.process_time() - began

    usual = seconds(b"word ")
    for unit in (b"\\\\", b'\\"', rb"\ud83d\ude00", b"9", b"[],"):
        assert seconds(unit) < 100 * usual + 1


@pytest.mark.parametrize(
    ("text", "value"),
    [("5", 5), ('"5"', 5), ('" 5 "', 5), ("5.0", 5), ('"5.0"', 5), ("true", 1), ('"1_000"', 1000), ("null", 0),
     ('"1e3"', 0), ("[5]", 0), ("{}", 0), ('"x"', 0), ("5.5", 5.5), ('"' + " " * 200 + '5"', float("inf"))],
)  # fmt: skip
def test_numbers(text: str, value: float) -> None:
    assert number(FieldReader(["n"]).read(f'{{"n": {text}}}'.encode())["n"]) == value


def test_lists() -> None:
    def raw(text: str) -> Any:
        return FieldReader(["x"]).read(f'{{"x": {text}}}'.encode())["x"]

    assert [len(items(raw(text), 5)) for text in ("[]", "[1,[2,3],{}]", "7", '"[1]"')] == [0, 3, 0, 0]
    long = raw("[" + "1,   " * 50_000 + "1]")
    assert [len(items(long, most)) for most in (5, 2048, 60_000)] == [6, 2049, 50_001]
    assert [len(items(raw(f"[{' ' * (1 << 17)}{text}]"), 2)) for text in ("", "1", "1,2", "1,2,3")] == [0, 1, 2, 3]
    assert len(items(long, 10**9)) == 50_001  # no type with a field for each possible item
    spaces = " \n" * (1 << 17)
    assert [is_token_ids(raw(f"[{spaces}{text}]")) for text in ("1", "-1", '"1"', "[1]", "")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert [is_list_of_lists(raw(f"[{spaces}{text}]")) for text in ("[]", "1", "")] == [True, False, False]
    assert [bytes(found) if (found := first(raw(text))) else None for text in ('[{"a": 1}, 2]', "[]", "7")] == [
        b'{"a": 1}', None, None,
    ]  # fmt: skip
    assert [is_token_ids(raw(text)) for text in ("[1]", "[ -1]", "[[1]]", '["1"]', "[]", "1")] == [
        True, True, False, False, False, False,
    ]  # fmt: skip
