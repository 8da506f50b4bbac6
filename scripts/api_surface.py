"""The plugin API as data, held against tests/golden/api.json: what is taken away or changed has to raise its version.

    .venv/bin/python scripts/api_surface.py            # what differs from the golden file
    .venv/bin/python scripts/api_surface.py --write    # write it anew; refused where the version has to be raised

A key is a name (``Method``), a field (``Method.bits``), a method (``Scheme.fits()``) or a parameter
(``check_shards(fix)``, ``quantserve_detect(checkpoint)``); its value is the annotation and the default.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import inspect
import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantserve import api, testing
from quantserve.plugins.contract import HOOKS

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "api.json"
VERSIONS = ("VERSION", "MINOR")


def surface() -> dict[str, str]:
    """Everything that the API promises."""
    made: dict[str, str] = {}
    for module, prefix in ((api, ""), (testing, "testing.")):
        for name in module.__all__:
            if name not in VERSIONS:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)
                    value = getattr(module, name)
                made |= {f"{prefix}{key}": value for key, value in entries(name, value)}
    for name, hook in HOOKS.items():
        made |= parameters(name, hook)
    return dict(sorted(made.items()))


def entries(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """The keys of one public name."""
    if inspect.isclass(value):
        yield name, "enum" if issubclass(value, enum.Enum) else "class"
        yield from members(name, value)
    elif callable(value) and hasattr(value, "__name__"):
        yield from parameters(name, value).items()
    else:
        yield name, type(value).__name__


def members(name: str, value: type) -> Iterator[tuple[str, str]]:
    """Fields, methods and properties of a class."""
    if issubclass(value, enum.Enum):
        for one in value:
            yield f"{name}.{one.name}", repr(one.value)
        return
    fields = {field.name: field for field in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else {}
    for field in fields.values():
        yield f"{name}.{field.name}", field_text(field)
    for base in value.__mro__:
        if not base.__module__.startswith("quantserve"):
            break
        for key, member in vars(base).items():
            if key.startswith(("_", "model_post_init")) or key in fields:  # the latter is pydantic's
                continue
            if isinstance(member, property):
                yield f"{name}.{key}", "property"
            elif isinstance(member, (classmethod, staticmethod)) or inspect.isfunction(member):
                yield from parameters(f"{name}.{key}", getattr(value, key)).items()
    if not fields and "__init__" in vars(value) and not getattr(value, "_is_protocol", False):
        yield from parameters(name, value.__init__).items()


def field_text(field: dataclasses.Field[Any]) -> str:
    """The annotation and the default of a field."""
    annotation = field.type if isinstance(field.type, str) else field.type.__name__
    if field.default is not dataclasses.MISSING:
        return f"{annotation} = {default_text(field.default)}"
    return f"{annotation} = ..." if field.default_factory is not dataclasses.MISSING else annotation


def default_text(value: object) -> str:
    """A plain default as it is written; ``...`` for what a run decides, such as the environment."""
    return repr(value) if isinstance(value, str | int | float | tuple | None) else "..."


def parameters(name: str, function: Any) -> dict[str, str]:
    """A function and its parameters."""
    signature = inspect.signature(function)
    made = {f"{name}()": text(signature.return_annotation)}
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        default = "" if parameter.default is parameter.empty else f" = {default_text(parameter.default)}"
        only = ", keyword only" if parameter.kind is parameter.KEYWORD_ONLY else ""
        made[f"{name}({parameter.name})"] = f"{text(parameter.annotation)}{default}{only}"
    return made


def text(annotation: object) -> str:
    """An annotation as it is written."""
    if annotation is inspect.Signature.empty:
        return ""
    return annotation if isinstance(annotation, str) else repr(annotation)


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """What breaks plugins, and what they need not know: additions and changes."""
    breaks = [f"{key} is gone" for key in old if key not in new]
    others = [f"{key}: {value!r}, was {old[key]!r}" for key, value in new.items() if key in old and old[key] != value]
    for key, value in new.items():
        if key in old:
            continue
        owner = key.partition("(")[0] + "()" if "(" in key and not key.endswith("()") else key.rpartition(".")[0]
        needed = owner in old and " = " not in value and not key.endswith("()") and value != "property"
        hook = key.startswith("quantserve_")  # plugins leave out parameters that they do not need
        (breaks if needed and not hook else others).append(f"{key} is new" + (" and required" if needed else ""))
    return breaks, others


def problem(golden: Mapping[str, Any], version: tuple[int, int], new: Mapping[str, str]) -> str:
    """Why the version has to be raised, "" where it need not be."""
    breaks, others = differences(golden["surface"], new)
    major, minor = golden["version"]
    if breaks and version[0] <= major:
        return f"hookspecs.API_VERSION has to rise above {major}: {'; '.join(breaks)}"
    if others and version <= (major, minor):
        return f"hookspecs.API_MINOR has to rise above {minor}: {'; '.join(others)}"
    return ""


def main() -> int:
    """Compare, and write with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the golden file")
    options = parser.parse_args()
    version, new = (api.VERSION, api.MINOR), surface()
    golden: dict[str, Any] = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"version": [0, 0], "surface": {}}
    breaks, others = differences(golden["surface"], new)
    print("\n".join([*breaks, *others]) or "nothing differs")
    if why := problem(golden, version, new):
        print(why, file=sys.stderr)
        return 1
    if options.write:
        GOLDEN.write_text(json.dumps({"version": version, "surface": new}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
