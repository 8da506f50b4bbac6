"""Converts pydantic's validation errors of a request to one OpenAI error, without the client's input."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from quantserve.serve.asgi import Refused
from quantserve.serve.replica.vllm.client_fields import Path, iterated, known, origin, place, written

DETAILS: Final = re.compile(r"\s*\((?:parameter=[^\s,()]*(?:, value=.*)?|value=.*)\)\s*$", re.DOTALL)
"""What vLLM appends to its messages."""
LONGEST: Final = 1000
"""Of a message, in characters."""
_LONGEST_TEXT: Final = 300
_FIELDS: Final = 5
_WORDS: Final = (
    ("Input should be", "must be"),
    ("Input ", "value "),
    ("a valid dictionary", "an object"),
    ("a valid integer", "an integer"),
    ("a valid array", "a list"),
    ("a valid list", "a list"),
    ("a valid boolean", "true or false"),
    ("must be a valid bytes", "must be base64 text"),
    ("a valid ", "a "),
    ("iterable", "a list"),
)
"""pydantic's words, and those of JSON."""
_TEXTS: Final = {
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "dict_type": "must be an object",
    "dataclass_type": "must be an object",
    "is_instance_of": "has the wrong type",
    "is_subclass_of": "has the wrong type",
    "callable_type": "has the wrong type",
}
_WRONG_TYPES: Final = ("_type", "_parsing", "_instance_of", "_subclass_of")


@dataclass(frozen=True)
class _Problem:
    """One of pydantic's errors.

    Attributes:
        path: to the field.
        text: what is wrong with it.
        code: OpenAI's.
        constant: whether a constant such as a role was expected.
        missing: whether the field is missing.
        branches: for each union on the path to the field, outermost first: its path and the branch of this error.
    """

    path: Path
    text: str
    code: str
    constant: bool = False
    missing: bool = False
    branches: tuple[tuple[Path, str], ...] = ()


def invalid_request(errors: Sequence[Any], body: object = None) -> Refused:
    """Validation errors of a request as one OpenAI error.

    Args:
        errors: pydantic's, or plain texts.
        body: the client's parsed body.
    """
    found: list[_Problem] = []
    typed = [error for error in errors if isinstance(error, Mapping) and error["loc"]]
    start, part = origin(typed, body)
    relative = [{**error, "loc": error["loc"][error["loc"][0] == "body" :]} for error in typed]
    if not start and (path := iterated(relative, body)):
        return _refused([_Problem(path, "must be a list", "invalid_type")])
    for error in errors:
        if not isinstance(error, Mapping):
            if "media type" in (text := str(error)).lower():
                message = "The request body must be JSON. Set the header `Content-Type: application/json`."
                return Refused(415, message, code="unsupported_media_type")
            found.append(_Problem((), text, "invalid_value"))
        elif error["type"] == "json_invalid":
            reason = (error.get("ctx") or {}).get("error", "it cannot be decoded")
            where = next((f" at character {part}" for part in error["loc"] if isinstance(part, int)), "")
            return Refused(400, f"The request body is not valid JSON: {reason}{where}.", code="invalid_json")
        else:
            found.append(_problem(error, part, start))
    return _refused(_likeliest(found))


def wrong_fields(endpoint: Any, body: Any) -> list[Any]:
    """pydantic's errors of the fields of a body, each validated alone, without the validators of the whole.

    Args:
        endpoint: the route's function, with an annotation that is a pydantic model.
        body: the client's parsed body.
    """
    models = [hint for hint in getattr(endpoint, "__annotations__", {}).values() if hasattr(hint, "model_fields")]
    errors: list[Any] = []
    for name, field in models[0].model_fields.items() if models and isinstance(body, Mapping) else ():
        if name in body:
            try:
                TypeAdapter(field.annotation).validate_python(body[name])
            except ValidationError as error:
                errors += [{**one, "loc": (name, *one["loc"])} for one in error.errors()]
            except (AssertionError, AttributeError, LookupError, TypeError, RecursionError, ValueError):
                errors.append({"type": "wrong_type", "loc": (name,), "msg": "has the wrong type", "input": body[name]})
    return errors


def shortened(text: str, most: int = LONGEST) -> str:
    """A text of at most `most` characters, and dots if it was longer."""
    return text if len(text) <= most else text[:most] + "..."


def _refused(found: Sequence[_Problem]) -> Refused:
    problems: dict[Path, list[_Problem]] = {}
    for problem in found:
        if problem not in (same := problems.setdefault(problem.path, [])):
            same.append(problem)
    if not problems:
        return Refused(400, "The request is invalid.", code="invalid_value")
    first = list(problems.items())[:_FIELDS]
    texts = [_sentence(written(path), list(dict.fromkeys(p.text for p in same))) for path, same in first]
    more = f"; and {len(problems) - _FIELDS} more fields" if len(problems) > _FIELDS else ""
    path, same = first[0]
    return Refused(400, shortened("; ".join(texts) + more), param=written(path) or None, code=same[0].code)


def _problem(error: Mapping[str, Any], part: object, start: Path) -> _Problem:
    kind: str = error["type"]
    context = error.get("ctx") or {}
    found = place(error, part, start)
    problem = _Problem(found.path, "is missing", "missing_required_parameter", branches=found.branches)
    if kind == "missing":
        return replace(problem, missing=True)
    if kind == "extra_forbidden":
        return replace(problem, text="is not a known field", code="unknown_parameter")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        named = str(context.get("discriminator", "")).strip("'")
        path = (*found.path, named) if named.isidentifier() else found.path
        if kind == "union_tag_not_found":
            return replace(problem, path=path, missing=True)
        text = f"must be one of {context.get('expected_tags', '')}"
        return replace(problem, path=path, text=text, code="invalid_value", constant=True)
    cause = context.get("error")
    if (own := getattr(cause, "parameter", None)) and not found.path:
        problem = replace(problem, path=(known(str(own), part),))
    wrong_type = kind.endswith(_WRONG_TYPES) or kind == "int_from_float"
    code = "invalid_type" if wrong_type else "invalid_value"
    return replace(problem, text=_text(error, cause), code=code, constant=kind == "literal_error")


def _text(error: Mapping[str, Any], cause: object) -> str:
    if text := _TEXTS.get(error["type"]):
        return text
    if isinstance(cause, Exception):
        return shortened(DETAILS.sub("", str(cause)), _LONGEST_TEXT)
    text = str(error.get("msg", "is invalid")).removeprefix("Value error, ")
    for old, new in _WORDS:
        text = text.replace(old, new)
    return shortened(text, _LONGEST_TEXT)


def _likeliest(found: Sequence[_Problem]) -> list[_Problem]:
    """The errors of the most likely branch of each union.

    For a union pydantic reports the errors of every branch: eleven for a message without a role. The most likely branch
    is the one of the right type, then with the right constants, then with the fewest missing fields, then with the
    fewest errors.
    """
    left = list(found)
    for level in range(max((len(problem.branches) for problem in found), default=0)):
        badness: dict[object, dict[str, list[int]]] = {}
        for problem in left:
            if level < len(problem.branches):
                union, branch = problem.branches[level]
                counts = badness.setdefault((problem.branches[:level], union), {}).setdefault(branch, [0, 0, 0, 0])
                counts[0] |= problem.code == "invalid_type" and problem.path == union
                counts[1] += problem.constant
                counts[2] += problem.missing
                counts[3] += 1
        best = {union: min(branches.values()) for union, branches in badness.items()}
        left = [
            problem
            for problem in left
            if level >= len(problem.branches)
            or badness[key := (problem.branches[:level], problem.branches[level][0])][problem.branches[level][1]]
            == best[key]
        ]
    return left


def _sentence(param: str, texts: Sequence[str]) -> str:
    shown = [texts[0], *(text.removeprefix("must be ") for text in texts[1:4])] if _alike(texts) else texts[:4]
    text = " or ".join(shown) + (" or ..." if len(texts) > 4 else "")
    if not param:
        return f"The request body {text}" if text.startswith(("is ", "must ", "has ")) else text
    return f"`{param}` {text}" if text.startswith(("is ", "must ", "has ")) else f"`{param}`: {text}"


def _alike(texts: Sequence[str]) -> bool:
    return all(text.startswith("must be ") for text in texts)
