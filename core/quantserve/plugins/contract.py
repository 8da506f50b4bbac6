"""What a plugin must keep to: the shape of its hooks and of what they return.

Each ``*_breach`` gives the breach as one line for the plugin's author, "" when there is none. Each ``*_of`` turns what
a hook returned into plain data of bounded size, or raises `Breach`; `Hooks.call` runs it as the plugin's own code,
because it may iterate a plugin's generator or call methods of a plugin's class.
"""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import fields
from fractions import Fraction
from itertools import islice
from types import ModuleType
from typing import Any, Final, TypeVar, get_args

from quantserve import hookspecs
from quantserve.checkpoint.data import DTYPE_BITS
from quantserve.checks.skipped import SkipList
from quantserve.errors import unknown_name
from quantserve.finding import Finding, Severity
from quantserve.method import KernelProfile, Method, PerformanceProfile, QualityNote
from quantserve.plugins.foreign import Breach
from quantserve.scheme import Axis, Dim, Part, Scales, Scheme
from quantserve.text import harmless

HOOKS = {name: spec for name, spec in vars(hookspecs).items() if name.startswith("quantserve_")}
DEVICES = ("cuda", "rocm", "cpu")
DTYPES = ("float16", "bfloat16", "float32")
MOST_FINDINGS: Final = 1_000
"""Findings kept of one plugin for one model, errors first."""
MOST_READ: Final = 10_000
"""Findings read of one plugin; a generator is closed after so many."""
MOST_OFFENDERS: Final = 50
LONGEST_OFFENDER: Final = 200
LONGEST_LINE: Final = 300
LONGEST_NAME: Final = 64
MOST_SHARE: Final = {"bandwidth_share": 1.5, "flops_share": 6.0}
"""Largest shares of a kernel profile: what is measured may lie above the nominal figures, and tensor cores multiply
4-bit activations at 4 times their 16-bit rate."""
MOST_NAMES: Final = 100
"""Aliases, widths, devices or dtypes of a method."""
DEEPEST_KWARGS: Final = 100
"""Levels of objects and arrays in an engine argument of a plugin."""
LONGEST_VALUE: Final = 1 << 12
"""Characters of an environment variable of a plugin."""
LONGEST_KWARGS: Final = 1 << 20
"""Characters of a plugin's engine arguments as JSON."""

T = TypeVar("T")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}", re.ASCII)
_CODE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)+")


def module_breach(module: object) -> str:
    """What pluggy would let pass in silence: unmarked, misnamed, keyword-only and asynchronous hooks."""
    if not isinstance(module, ModuleType):
        return f"the entry point names a {type(module).__name__}, not a module"
    for name, function in vars(module).items():
        if not name.startswith("quantserve_"):
            continue
        if not inspect.isfunction(function):
            if name in HOOKS:
                return f"{name} is a {type(function).__name__}, not a function"
            continue
        if not hasattr(function, f"{hookspecs.PROJECT}_impl"):
            if name in HOOKS:
                return f"{name} lacks the @hookimpl decorator"
            continue
        if name not in HOOKS:
            return f"{name} is not a hook: {unknown_name('hook', name, HOOKS)}"
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            return f"{name} is asynchronous; hooks are plain functions"
        if reason := _signature_breach(name, function):
            return reason
    return ""


def _signature_breach(name: str, function: object) -> str:
    known = list(inspect.signature(HOOKS[name]).parameters)
    signature = inspect.signature(function)  # type: ignore[arg-type]
    for parameter in signature.parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            return f"{name}{signature}: parameter {parameter.name!r} must be a plain positional one"
        if parameter.name not in known:
            return f"{name}{signature}: unknown parameter {parameter.name!r}; the hook has {known}"
    return ""


def method_breach(method: object) -> str:
    """What is wrong with the value of ``quantserve_method``."""
    if not isinstance(method, Method):
        return f"quantserve_method returned {_kind(method)}, not quantserve.api.Method"
    for field in ("aliases", "bits", "devices", "dtypes", "families"):
        if not isinstance(value := getattr(method, field), tuple):
            return f"Method.{field} is {_kind(value)}, not a tuple: {value!r:.80}"
        if len(value) > MOST_NAMES:
            return f"Method.{field} has {len(value):,} entries; at most {MOST_NAMES}"
    if reason := _accepts_breach(method.accepts):
        return reason
    for field in ("name", "summary", "homepage"):
        if not isinstance(value := getattr(method, field), str):
            return f"Method.{field} is {_kind(value)}, not text: {value!r:.80}"
    if not method.summary or not method.summary.isprintable() or len(method.summary) > LONGEST_LINE:
        return f"Method.summary must be one line of text, at most {LONGEST_LINE} characters: {method.summary!r:.80}"
    if not method.homepage.isprintable() or len(method.homepage) > LONGEST_LINE:
        return f"Method.homepage must be an address: {method.homepage!r:.80}"
    if not isinstance(method.vllm_name, str | None) or method.vllm_name == "":
        return f"Method.vllm_name must be vLLM's name of the method, or None: {method.vllm_name!r}"
    if not method.bits or any(type(bits) is not int or not 1 <= bits <= 32 for bits in method.bits):
        return f"Method.bits must be integers from 1 to 32: {method.bits!r}"
    capability = method.minimum_capability
    if type(capability) is not int or not (capability == 0 or 10 <= capability < 1000):
        return f"Method.minimum_capability must be an integer, ten times the capability (75 is 7.5): {capability!r}"
    for field, known in (("devices", DEVICES), ("dtypes", DTYPES)):
        values = getattr(method, field)
        if not values or any(value not in known for value in values):
            return f"Method.{field} must be some of {', '.join(known)}: {values!r}"
    for name in method.names:
        if (
            not isinstance(name, str)
            or not name
            or name != name.lower()
            or len(name.split()) != 1
            or name != name.strip()
            or not name.isprintable()
            or len(name) > LONGEST_NAME
        ):
            return f"method name {name!r:.80} must be a lower-case word"
    if any(not isinstance(family, str) for family in method.families):
        return f"Method.families must be names, as model_type in config.json: {method.families!r:.80}"
    if type(method.api) is not int:
        return f"Method.api must be the number quantserve.api.VERSION: {method.api!r:.80}"
    repeated = [name for name, count in Counter(method.names).items() if count > 1]
    return f"method name {repeated[0]!r} is given twice" if repeated else ""


def _accepts_breach(accepts: object) -> str:
    """What is wrong with ``Method.accepts``: declared name -> device -> vLLM's arguments."""
    if not isinstance(accepts, Mapping):
        return f"Method.accepts is {_kind(accepts)}, not a mapping"
    if len(accepts) > MOST_NAMES:
        return f"Method.accepts has {len(accepts):,} entries; at most {MOST_NAMES}"
    for declared, devices in accepts.items():
        if not isinstance(declared, str) or declared != declared.lower() or not isinstance(devices, Mapping):
            return f"Method.accepts must map lower-case names to mappings of devices: {declared!r:.80}"
        for device, names in devices.items():
            if device not in DEVICES or not isinstance(names, tuple) or not all(isinstance(n, str) for n in names):
                return f"Method.accepts[{declared!r:.80}] must map devices to tuples of names: {device!r:.80}"
    return ""


def method_of(returned: object) -> Method:
    """The value of ``quantserve_method``."""
    return _plain(Method, returned, method_breach(returned))


def claim_of(returned: object) -> bool:
    """The value of ``quantserve_detect``."""
    if returned is not None and not isinstance(returned, bool):
        raise Breach(f"returned {_kind(returned)}, not True, False or None")
    return bool(returned)


def findings_of(returned: object, names: Iterable[str]) -> tuple[list[Finding], str]:
    """The value of ``quantserve_validate``: at most 1000 findings, and how many more there were, "" for none.

    Args:
        names: of the plugin and its method; a code begins with one of them.
    """
    if not isinstance(returned, Iterable) or isinstance(returned, str | bytes | Mapping):
        raise Breach(f"returned {_kind(returned)}, not findings")
    prefixes = tuple(code_of(name) + "-" for name in names)
    findings: list[Finding] = []
    given = iter(returned)
    try:
        for finding in islice(given, MOST_READ):
            findings.append(_finding_of(finding, prefixes))
    except Exception as error:
        if findings and not isinstance(error, Breach):
            first = f"{findings[0].severity.value} {findings[0].code}: {findings[0].message}"
            error.add_note(f"after {len(findings)} findings, first {first}")
        raise
    if len(findings) == MOST_READ and isinstance(given, Iterator) and hasattr(given, "close"):
        given.close()
    kept = findings
    if len(findings) > MOST_FINDINGS:
        kept = sorted(findings, key=lambda finding: finding.severity is not Severity.ERROR)[:MOST_FINDINGS]
    total = len(returned) if isinstance(returned, Sized) else len(findings)
    open_end = "+" if total == MOST_READ and not isinstance(returned, Sized) else ""
    return kept, f"{total - len(kept):,}{open_end}" if total > len(kept) else ""


def code_of(name: str) -> str:
    """The beginning of finding codes of a method or plugin."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def _finding_of(finding: object, prefixes: tuple[str, ...]) -> Finding:
    if not isinstance(finding, Finding):
        raise Breach(f"returned {_kind(finding)} among its findings")
    texts = [finding.code, finding.message, finding.fix]
    if not isinstance(finding.severity, Severity) or not all(isinstance(text, str) for text in texts):
        raise Breach(f"returned a finding whose fields are of the wrong types: {finding!r:.200}")
    if not isinstance(finding.offenders, tuple) or not all(isinstance(name, str) for name in finding.offenders):
        raise Breach(f"finding {finding.code}: offenders must be a tuple of text, got {finding.offenders!r:.200}")
    if not _CODE.fullmatch(finding.code) or not finding.code.startswith(prefixes):
        start = " or ".join(dict.fromkeys(prefixes))
        raise Breach(f"finding code {harmless(finding.code, 80)!r} must be kebab-case and begin with {start}")
    offenders = tuple(harmless(name, LONGEST_OFFENDER) for name in finding.offenders[:MOST_OFFENDERS])
    if more := len(finding.offenders) - len(offenders):
        offenders = (*offenders, f"and {more:,} more")
    return Finding(finding.severity, finding.code, finding.message, offenders, finding.fix)


def schemes_of(returned: Iterable[object]) -> list[Scheme | None]:
    """The values of ``quantserve_scheme`` for several linears; an object given for many of them is read once."""
    made: dict[int, tuple[object, Scheme]] = {}  # with the object, so that its id stays its own
    schemes: list[Scheme | None] = []
    for value in returned:
        if value is not None and id(value) not in made:
            made[id(value)] = (value, _scheme_of(value))
        schemes.append(None if value is None else made[id(value)][1])
    return schemes


def _scheme_of(scheme: object) -> Scheme:
    if not isinstance(scheme, Scheme):
        raise Breach(f"returned {_kind(scheme)}, not Scheme or None")
    if not isinstance(scheme.parts, Mapping) or not 0 < len(scheme.parts) <= MOST_NAMES:
        raise Breach(f"Scheme.parts must map suffixes to 1 to {MOST_NAMES} parts: {scheme.parts!r:.80}")
    parts: dict[str, Part | tuple[Part, ...]] = {}
    for suffix, given in islice(scheme.parts.items(), MOST_NAMES):
        if not isinstance(suffix, str) or not suffix.isprintable() or not 0 < len(suffix) <= LONGEST_NAME:
            raise Breach(f"Scheme.parts: a suffix must be text of at most {LONGEST_NAME} characters: {suffix!r:.80}")
        alternatives = given if isinstance(given, tuple) else (given,)
        if not 0 < len(alternatives) <= MOST_NAMES:
            raise Breach(f"Scheme.parts[{suffix!r}] must have 1 to {MOST_NAMES} alternatives")
        parts[suffix] = tuple(_part_of(part, suffix) for part in alternatives)
    numbers = [scheme.bits, scheme.activation_bits, *([] if scheme.kept is None else [scheme.kept])]
    if not all(value == 0 or _is_share(value, 64) for value in numbers):
        raise Breach(f"Scheme: bits, activation_bits and kept must be numbers, at most 64: {numbers!r:.80}")
    if type(scheme.group_size) is not int or not (scheme.group_size == -1 or 0 < scheme.group_size < 1 << 31):
        raise Breach(f"Scheme.group_size must be a positive integer, or -1 for all of K: {scheme.group_size!r:.60}")
    if scheme.scales not in get_args(Scales):
        raise Breach(f"Scheme.scales must be one of {', '.join(get_args(Scales))}: {scheme.scales!r:.60}")
    return Scheme(parts, scheme.bits, scheme.group_size, scheme.scales, scheme.activation_bits, scheme.kept)


def _part_of(part: object, suffix: str) -> Part:
    where = f"Scheme.parts[{suffix!r}]"
    if not isinstance(part, Part) or not isinstance(part.shape, tuple) or not isinstance(part.optional, bool):
        raise Breach(f"{where} must be a Part with a tuple as its shape: {part!r:.80}")
    shape = tuple(
        Dim(one.axis, one.per, one.partial, one.block, one.free) if isinstance(one, Dim) else one for one in part.shape
    )
    for one in shape:
        if isinstance(one, Dim):
            right = one.axis in get_args(Axis) and type(one.per) is Fraction and 0 < one.per < 1 << 31
            right = right and type(one.block) is int and 0 < one.block < 1 << 31
        else:
            right = one is None or (type(one) is int and one >= 0)
        if not right:
            raise Breach(f"{where}: a dimension is N(), K(), NK(), E(), an integer or None: {one!r:.80}")
    blocks = any(isinstance(one, Dim) and one.block > 1 for one in shape)
    dtypes = part.dtypes if isinstance(part.dtypes, tuple) else ()
    if not dtypes or not all(one in DTYPE_BITS or (blocks and _is_dtype(one)) for one in dtypes):
        raise Breach(
            f"{where}: dtypes must be a tuple of safetensors names (F16, I32, ...), or where a dimension has blocks, "
            f"of a reader's names: {part.dtypes!r:.80}"
        )
    return Part(shape, dtypes, part.optional)


def _is_dtype(name: object) -> bool:
    return isinstance(name, str) and name.isprintable() and 0 < len(name) <= LONGEST_NAME


def skip_list_of(returned: object) -> SkipList:
    """The value of ``quantserve_skip_list``."""
    if type(returned) is not SkipList:
        raise Breach(f"returned {_kind(returned)}, not SkipList or None")
    return returned


def kwargs_of(returned: object, reserved: frozenset[str]) -> dict[str, Any]:
    """The value of ``quantserve_engine_kwargs`` as plain JSON values; whether vLLM has the names is asked elsewhere."""
    if not isinstance(returned, Mapping):
        raise Breach(f"returned {_kind(returned)}, not a mapping of names")
    items = dict(islice(returned.items(), MOST_FINDINGS))
    if not all(isinstance(key, str) for key in items):
        raise Breach(f"returned {_kind(returned)}, not a mapping of names")
    if taken := sorted(reserved & set(items)):
        raise Breach(f"sets {', '.join(taken)}, which belong to the core")
    return {str(key): json_of(value, str(key), LONGEST_KWARGS) for key, value in items.items()}


def environment_of(returned: object, reserved: frozenset[str]) -> dict[str, str]:
    """The value of ``quantserve_environment``."""
    if not isinstance(returned, Mapping):
        raise Breach(f"returned {_kind(returned)}, not a mapping of names")
    items = dict(islice(returned.items(), MOST_FINDINGS))
    if reason := variables_breach(items):
        raise Breach(f"returned {reason}")
    if taken := sorted(name for name in items if name in reserved or name.startswith("QUANTSERVE_")):
        raise Breach(f"sets {', '.join(taken)}, which belong to the core")
    return {str(name): str(value) for name, value in items.items()}


def variables_breach(variables: object) -> str:
    """What is wrong with names and values of environment variables."""
    if not isinstance(variables, Mapping):
        return f"{_kind(variables)}, not a mapping of names"
    for name, value in variables.items():
        if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
            return f"a variable whose name is not letters, digits and underscores: {name!r:.80}"
        if not isinstance(value, str) or "\0" in value or len(value) > LONGEST_VALUE:
            return f"a value of {name} that is not text of at most {LONGEST_VALUE} characters: {value!r:.80}"
    return ""


def json_of(value: object, key: str, longest: int) -> Any:
    """The value as JSON gives it back."""
    try:
        text = json.dumps(value, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise Breach(f"returned a value that is not JSON: {key}: {str(error)[:200]}") from error
    if len(text) > longest:
        raise Breach(f"returned {len(text):,} characters of JSON for {key}; at most {longest:,}")
    made = json.loads(text)
    level, depth = [made], 0
    while level := [part for value in level for part in _parts(value)]:
        if (depth := depth + 1) > DEEPEST_KWARGS:
            raise Breach(f"returned a value nested more than {DEEPEST_KWARGS} levels deep for {key}")
    return made


def _parts(value: object) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def kernel_breach(profile: object) -> str:
    """What is wrong with the value of ``quantserve_kernel``."""
    if not isinstance(profile, KernelProfile):
        return f"returned {_kind(profile)}, not KernelProfile or None"
    for name in ("name", "source", "benchmark", "argument", "key"):
        if not isinstance(value := getattr(profile, name), str):
            return f"KernelProfile.{name} is {_kind(value)}, not text"
    for name in ("experts", "amx"):
        if not isinstance(value := getattr(profile, name), bool):
            return f"KernelProfile.{name} is {_kind(value)}, not True or False"
    if reason := variables_breach(profile.environment):
        return f"KernelProfile.environment has {reason}"
    if not isinstance(profile.alternatives, tuple):
        return f"KernelProfile.alternatives is {_kind(profile.alternatives)}, not a tuple"
    for other in profile.alternatives:
        if isinstance(other, KernelProfile) and other.alternatives:
            return "KernelProfile.alternatives must not have alternatives themselves"
        if reason := kernel_breach(other):
            return f"KernelProfile.alternatives: {reason}"
    if type(profile.k_multiple) is not int or not 1 <= profile.k_multiple <= 1 << 16:
        return f"KernelProfile.k_multiple must be a positive integer: {profile.k_multiple!r:.60}"
    for name in ("bits_per_weight", "uncertainty"):
        if not _is_share(value := getattr(profile, name), 64):
            return f"KernelProfile.{name} must be a positive number, at most 64: {value!r:.60}"
    for name in ("bandwidth_share", "flops_share"):
        table = getattr(profile, name)
        if (
            not isinstance(table, tuple)
            or not 0 < len(table) <= MOST_FINDINGS
            or not all(isinstance(p, tuple) and len(p) == 2 for p in table)
        ):
            return f"KernelProfile.{name} must be a tuple of (rows, share): {table!r:.80}"
        rows = [point[0] for point in table]
        if any(type(row) is not int or row < 1 for row in rows) or rows != sorted(set(rows)):
            return f"KernelProfile.{name}: rows must be positive integers that rise: {rows!r:.80}"
        most = MOST_SHARE[name]
        if not all(_is_share(point[1], most) for point in table):
            return f"KernelProfile.{name}: shares must be above 0 and at most {most:g}: {table!r:.80}"
    return ""


def kernel_of(returned: object) -> KernelProfile:
    """The value of ``quantserve_kernel``."""
    return _plain(KernelProfile, returned, kernel_breach(returned))


def profile_breach(profile: object) -> str:
    """What is wrong with the value of ``quantserve_performance``."""
    if not isinstance(profile, PerformanceProfile):
        return f"returned {_kind(profile)}, not PerformanceProfile or None"
    for name in ("source", "conditions", "itl_definition"):
        if not isinstance(value := getattr(profile, name), str) or not value:
            return f"PerformanceProfile.{name} is {_kind(value)}, not text"
    for name in ("e2e_ms", "ttft_ms", "itl_ms", "output_tokens_per_s"):
        if (value := getattr(profile, name)) is not None and not _is_share(value, 1e9):
            return f"PerformanceProfile.{name} must be a positive number, at most 1e9, or None: {value!r:.60}"
    caveats = profile.caveats
    if not isinstance(caveats, tuple) or len(caveats) > MOST_OFFENDERS or not all(isinstance(t, str) for t in caveats):
        return f"PerformanceProfile.caveats must be a tuple of at most {MOST_OFFENDERS} texts"
    return ""


def profile_of(returned: object) -> PerformanceProfile:
    """The value of ``quantserve_performance``."""
    return _plain(PerformanceProfile, returned, profile_breach(returned))


def quality_breach(note: object) -> str:
    """What is wrong with the value of ``quantserve_quality``."""
    if not isinstance(note, QualityNote):
        return f"returned {_kind(note)}, not QualityNote or None"
    if not (_is_share(note.perplexity, 1e6) and _is_share(note.baseline, 1e6)):
        return f"QualityNote: perplexities must be positive numbers: {note.perplexity!r:.40}, {note.baseline!r:.40}"
    if not all(isinstance(text, str) and text for text in (note.measured_on, note.source)):
        return "QualityNote: measured_on and source must be text"
    return ""


def quality_of(returned: object) -> QualityNote:
    """The value of ``quantserve_quality``."""
    return _plain(QualityNote, returned, quality_breach(returned))


def _is_share(value: object, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= most


def _plain(kind: type[T], value: Any, breach: str = "") -> T:
    """The value as an instance of `kind` itself with bounded texts: a subclass may override what the core calls."""
    if breach:
        raise Breach(breach)
    values = {field.name: getattr(value, field.name) for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: harmless(text) if isinstance(text, str) else text for name, text in values.items()})


def _kind(value: object) -> str:
    return type(value).__name__
