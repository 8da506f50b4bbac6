"""The hooks `quantserve_scheme` and `quantserve_skip_list`, from a plugin's module to the findings of its model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.checkpoints import Spec, linear_shapes, make_llama
from helpers.dists import METHOD, Site
from quantserve.config import model_from_source
from quantserve.errors import PluginError
from quantserve.planning.compose import Composition, compose
from quantserve.plugins.registry import Registry
from quantserve.target import find_target

HEAD = (
    METHOD.format(name="mine", aliases=())
    + """
from fractions import Fraction
from functools import lru_cache
from quantserve.api import *

@hookimpl
def quantserve_detect(checkpoint):
    return (checkpoint.quantization_config or {}).get("quant_method") == "mine"

CALLS = []
"""
)
SCHEME = 'Scheme({"codes": Part((N(), K()), ("I8",)), "scale": Part((N(),), ("F32",))}, bits=8, scales="channel")'
CONSTANT = f"SCHEME = {SCHEME}\n@hookimpl\ndef quantserve_scheme(checkpoint, linear): return SCHEME\n"
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Composition]]:
    """Compose a Llama stored as ``codes`` and ``scale`` with a plugin of this code."""
    monkeypatch.syspath_prepend(str(tmp_path))
    site = Site(tmp_path)

    def check(code: str, drop: tuple[str, ...] = (), **settings: object) -> Composition:
        site.install("quantserve-mine", HEAD + code, name="mine")
        shapes = linear_shapes(2, 256, 512, 4, 2, 64)
        tensors: dict[str, Spec] = {}
        for name, (n, k) in shapes.items():
            tensors |= {f"{name}.codes": ("I8", (n, k)), f"{name}.scale": ("F32", (n,))}
        tensors = {name: spec for name, spec in tensors.items() if name not in drop}
        folder = make_llama(
            tmp_path / "model",
            drop=[f"{name}.weight" for name in shapes],
            extra=tensors,
            config={"quantization_config": {"quant_method": "mine", **settings}},
        )
        return compose(model_from_source(str(folder)), Registry.load({}, site.entry_points()), find_target("a100-80g"))

    yield check
    site.forget()


def codes(composition: Composition) -> set[str]:
    return {finding.code for finding in composition.errors}


def test_the_core_derives_the_findings(check: Callable[..., Composition]) -> None:
    composition = check(CONSTANT, drop=(f"{UP}.scale",))
    (finding,) = composition.errors
    assert (finding.code, finding.offenders, finding.source) == ("mine-missing-tensors", (f"{UP}.scale",), "mine")


def test_a_plugin_may_ask_for_less(check: Callable[..., Composition]) -> None:
    """Parameters may be left out from the right, and what depends on the checkpoint is computed once."""
    code = f"""
@once
def made(checkpoint):
    CALLS.append(checkpoint)
    return {SCHEME}

@hookimpl
def quantserve_scheme(checkpoint): return made(checkpoint)

@hookimpl
def quantserve_validate(): return [Finding.info("mine-calls", f"{{len(CALLS)}} calls")]
"""
    composition = check(code)
    assert not composition.errors
    assert "1 calls" in next(finding.message for finding in composition.findings if finding.code == "mine-calls")


@pytest.mark.parametrize(("listed", "found"), [(["lm_head"], set()), (["o_proj"], {"mine-skip-list"})])
def test_the_list_of_unquantized_modules(check: Callable[..., Composition], listed: list[str], found: set[str]) -> None:
    hook = "@hookimpl\ndef quantserve_skip_list(checkpoint): return SkipList(checkpoint.quantization_config['skip'])\n"
    assert codes(check(CONSTANT + hook, skip=listed)) == found


def test_a_method_without_the_hook_has_no_such_findings(check: Callable[..., Composition]) -> None:
    assert not codes(check("", drop=(f"{UP}.scale",)))


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ("'int8'", "returned str, not Scheme or None"),
        ("Scheme({}, bits=8)", "Scheme.parts must map suffixes to 1 to 100 parts"),
        ("Scheme({7: Part((), ('F16',))}, bits=8)", "a suffix must be text"),
        ("Scheme({'w': ()}, bits=8)", "must have 1 to 100 alternatives"),
        ("Scheme({'w': 'F16'}, bits=8)", "must be a Part"),
        ("Scheme({'w': Part([N()], ('F16',))}, bits=8)", "must be a Part with a tuple"),
        ("Scheme({'w': Part((N(),), 'F16')}, bits=8)", "dtypes must be a tuple"),
        ("Scheme({'w': Part((N(),), ('float16',))}, bits=8)", "dtypes must be a tuple"),
        ("Scheme({'w': Part((N(0),), ('F16',))}, bits=8)", "a dimension is N(), K(), NK(), E()"),
        ("Scheme({'w': Part((1.5,), ('F16',))}, bits=8)", "a dimension is N(), K(), NK(), E()"),
        ("Scheme({'w': Part((Dim('m'),), ('F16',))}, bits=8)", "a dimension is N(), K(), NK(), E()"),
        ("Scheme({'w': Part((N(),), ('F16',))}, bits='8')", "bits, activation_bits and kept must be numbers"),
        ("Scheme({'w': Part((N(),), ('F16',))}, bits=8, group_size=0)", "Scheme.group_size must be"),
        ("Scheme({'w': Part((N(),), ('F16',))}, bits=8, scales='rows')", "Scheme.scales must be one of"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_what_is_no_scheme_is_the_plugins_defect(check: Callable[..., Composition], returned: str, says: str) -> None:
    with pytest.raises(PluginError) as raised:
        check(f"@hookimpl\ndef quantserve_scheme(checkpoint, linear): return {returned}\n")
    assert "quantserve-mine" in str(raised.value)
    assert says in str(raised.value)


def test_what_is_no_list_is_the_plugins_defect(check: Callable[..., Composition]) -> None:
    with pytest.raises(PluginError, match="returned list, not SkipList"):
        check(CONSTANT + "@hookimpl\ndef quantserve_skip_list(checkpoint): return ['lm_head']\n")


def test_all_linears_together_have_the_time_of_one_hook(
    check: Callable[..., Composition], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTSERVE_HOOK_TIMEOUT", "0.3")
    slow = CONSTANT.replace("return SCHEME", "\n    import time; time.sleep(0.1)\n    return SCHEME")
    with pytest.raises(PluginError, match=r"did not end within 0\.3 s"):
        check(slow)
