"""What a plugin must keep to: the shape of its hooks and of what they return.

Each function gives the breach as one line for the plugin's author, "" when there is none.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping
from types import ModuleType

from quantserve import hookspecs
from quantserve.errors import unknown_name
from quantserve.finding import Finding, Severity
from quantserve.method import KernelProfile, Method, QualityNote

HOOKS = {name: spec for name, spec in vars(hookspecs).items() if name.startswith("quantserve_")}
DEVICES = ("cuda", "rocm", "cpu")
DTYPES = ("float16", "bfloat16", "float32")


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
    for field in ("aliases", "bits", "devices", "dtypes"):
        if not isinstance(value := getattr(method, field), tuple):
            return f"Method.{field} is {_kind(value)}, not a tuple: {value!r}"
    for field in ("name", "summary", "homepage"):
        if not isinstance(value := getattr(method, field), str):
            return f"Method.{field} is {_kind(value)}, not text: {value!r}"
    if len(method.summary.splitlines()) != 1:
        return "Method.summary must be one line of text"
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
        ):
            return f"method name {name!r} must be a lower-case word"
    repeated = [name for name, count in Counter(method.names).items() if count > 1]
    return f"method name {repeated[0]!r} is given twice" if repeated else ""


def findings_breach(findings: object) -> str:
    """What is wrong with the list made of what ``quantserve_validate`` returned."""
    if not isinstance(findings, list):
        return f"returned {_kind(findings)}, not findings"
    for finding in findings:
        if not isinstance(finding, Finding):
            return f"returned {_kind(finding)} among its findings"
        texts = [finding.code, finding.message, finding.fix]
        if not isinstance(finding.severity, Severity) or not all(isinstance(text, str) for text in texts):
            return f"returned a finding whose fields are of the wrong types: {finding!r:.200}"
        if not isinstance(finding.offenders, tuple) or not all(isinstance(name, str) for name in finding.offenders):
            return f"finding {finding.code}: offenders must be a tuple of text, got {finding.offenders!r:.200}"
    return ""


def kwargs_breach(kwargs: object, reserved: frozenset[str]) -> str:
    """What is wrong with the value of ``quantserve_engine_kwargs``, whether it is JSON apart."""
    if not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
        return f"returned {_kind(kwargs)}, not a mapping of names"
    if taken := sorted(reserved & set(kwargs)):
        return f"sets {', '.join(taken)}, which belong to the core"
    return ""


def kernel_breach(profile: object) -> str:
    """What is wrong with the value of ``quantserve_kernel``."""
    if not isinstance(profile, KernelProfile):
        return f"returned {_kind(profile)}, not KernelProfile or None"
    for name in ("name", "source", "benchmark"):
        if not isinstance(value := getattr(profile, name), str):
            return f"KernelProfile.{name} is {_kind(value)}, not text"
    if not isinstance(profile.experts, bool):
        return f"KernelProfile.experts is {_kind(profile.experts)}, not True or False"
    for name in ("bits_per_weight", "uncertainty"):
        if not _is_share(value := getattr(profile, name), 64):
            return f"KernelProfile.{name} must be a positive number, at most 64: {value!r:.60}"
    for name in ("bandwidth_share", "flops_share"):
        table = getattr(profile, name)
        if not isinstance(table, tuple) or not table or not all(isinstance(p, tuple) and len(p) == 2 for p in table):
            return f"KernelProfile.{name} must be a tuple of (rows, share): {table!r:.80}"
        rows = [point[0] for point in table]
        if any(type(row) is not int or row < 1 for row in rows) or rows != sorted(set(rows)):
            return f"KernelProfile.{name}: rows must be positive integers that rise: {rows!r:.80}"
        if not all(_is_share(point[1], 1.5) for point in table):
            return f"KernelProfile.{name}: shares must be above 0 and at most 1.5: {table!r:.80}"
    return ""


def quality_breach(note: object) -> str:
    """What is wrong with the value of ``quantserve_quality``."""
    if not isinstance(note, QualityNote):
        return f"returned {_kind(note)}, not QualityNote or None"
    if not (_is_share(note.perplexity, 1e6) and _is_share(note.baseline, 1e6)):
        return f"QualityNote: perplexities must be positive numbers: {note.perplexity!r:.40}, {note.baseline!r:.40}"
    if not all(isinstance(text, str) and text for text in (note.measured_on, note.source)):
        return "QualityNote: measured_on and source must be text"
    return ""


def _is_share(value: object, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= most


def _kind(value: object) -> str:
    return type(value).__name__
