"""Composition: the plugins a model names, their findings, and engine kwargs with provenance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from helpers.checkpoints import make_llama
from helpers.dists import METHOD, Site
from quantserve.config import model_from_source
from quantserve.errors import PluginError, UsageError
from quantserve.planning.compose import Composition, compose
from quantserve.planning.plan import make_plan
from quantserve.planning.settings import Setting
from quantserve.plugins.registry import Registry
from quantserve.target import find_target

Make = Callable[..., Composition]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    path = tmp_path / "site"
    path.mkdir()
    monkeypatch.syspath_prepend(str(path))
    site = Site(path)
    yield site
    site.forget()


@pytest.fixture
def make(site: Site, tmp_path: Path) -> Make:
    """Compose a small fp16 model with the plugins installed in `site`."""
    folder = make_llama(tmp_path / "model")

    def build(
        plugins: tuple[str, ...] = (), env_vars: Mapping[str, str] | None = None, **engine_kwargs: object
    ) -> Composition:
        model = model_from_source(str(folder))
        engine = model.engine_config.model_copy(
            update={"engine_kwargs": engine_kwargs, "runtime_env": {"env_vars": env_vars or {}}}
        )
        model = model.model_copy(update={"plugins": list(plugins), "engine_config": engine})
        return compose(model, Registry.load({}, site.entry_points()), find_target("a100-80g"))

    return build


def plugin(method: str, *hooks: str) -> str:
    """Code of a plugin with a method and further hooks, each ``name(parameters): body``."""
    return METHOD.format(name=method, aliases=()) + "".join(f"\n@hookimpl\ndef quantserve_{hook}\n" for hook in hooks)


DETECTS = "detect(checkpoint): return True"


def helper(*hooks: str) -> str:
    """Code of a plugin that is no method."""
    return "from quantserve.api import *\n" + "".join(f"\n@hookimpl\ndef quantserve_{hook}\n" for hook in hooks)


def environment(values: str) -> str:
    return f"environment(checkpoint, model, target): return {values}"


def kwargs(values: str) -> str:
    return f"engine_kwargs(checkpoint, model, target): return {values}"


def test_detection_chooses_the_one_plugin_that_claims(site: Site, make: Make) -> None:
    site.install("quantserve-a", plugin("a", "detect(checkpoint): return False"), name="a")
    site.install("quantserve-b", plugin("b", "detect(checkpoint): return bool(checkpoint.config)"), name="b")
    composed = make()
    assert composed.method is not None
    assert composed.method.name == "b"


def test_two_claims_are_an_error_that_names_both(site: Site, make: Make) -> None:
    site.install("quantserve-a", plugin("a", DETECTS), name="a")
    site.install("quantserve-b", plugin("b", DETECTS), name="b")
    (error,) = [finding for finding in make().errors if finding.code == "method-ambiguous"]
    assert error.offenders == ("a (quantserve-a 1.0)", "b (quantserve-b 1.0)")


def test_no_claim_is_an_error_that_lists_what_is_installed(site: Site, make: Make) -> None:
    site.install("quantserve-a", plugin("a"), name="a")
    (error,) = [finding for finding in make().errors if finding.code == "method-not-detected"]
    assert "installed methods: a" in error.message


def test_a_raising_detect_only_matters_when_nobody_else_claims(site: Site, make: Make) -> None:
    site.install("quantserve-bad", plugin("bad", "detect(checkpoint): raise OSError('disk')"), name="bad")
    with pytest.raises(PluginError, match=r"quantserve-bad 1\.0.*quantserve_detect.*disk"):
        make()
    site.install("quantserve-good", plugin("good", DETECTS), name="good")
    composed = make()
    assert composed.method is not None
    assert composed.method.name == "good"


def test_findings_are_concatenated_and_say_who_said_them(site: Site, make: Make) -> None:
    finding = "validate(checkpoint, model, target): yield Finding.warning('a-odd', target.name)"
    site.install("quantserve-a", plugin("a", DETECTS) + helper(finding), name="a")
    site.install("house-policy", helper("validate(model): return [Finding.error('house-policy-id', model.model_id)]"))
    composed = make(("house-policy",))
    said = {(finding.source, finding.code) for finding in composed.findings}
    assert {("a", "a-odd"), ("house-policy", "house-policy-id")} <= said
    assert [error.code for error in composed.errors] == ["house-policy-id"]


@pytest.mark.parametrize(
    ("hook", "reason"),
    [
        ("validate(checkpoint): raise ZeroDivisionError('group size')", "group size"),
        ("validate(checkpoint):\n    yield Finding.info('a-b', 'b')\n    raise RuntimeError('late')", "late"),
        ("validate(checkpoint): return ['no group size']", "str among its findings"),
        ("validate(checkpoint): return 7", "int, not findings"),
        (kwargs("['dtype']"), "list, not a mapping"),
        (kwargs("{'model': 'other'}"), "model, which belong to the core"),
        (kwargs("{'dtype': object()}"), "not JSON"),
        ("performance(checkpoint): return 53.4", "float, not PerformanceProfile"),
    ],
)
def test_a_plugins_defect_is_a_plugin_error(site: Site, make: Make, hook: str, reason: str) -> None:
    site.install("quantserve-a", plugin("a", DETECTS) + helper(hook), name="a")
    with pytest.raises(PluginError, match=reason) as caught:
        make()
    assert (caught.value.plugin, caught.value.distribution) == ("a", "quantserve-a")


def test_plugins_that_disagree_are_both_named_unless_the_user_decides(site: Site, make: Make) -> None:
    site.install("quantserve-a", plugin("a", DETECTS, kwargs("{'block_size': 16, 'seed': 1}")), name="a")
    site.install("kv-policy", helper(kwargs("{'block_size': 32, 'seed': 1}")))
    (error,) = make(("kv-policy",)).errors
    assert error.code == "plugins-conflict"
    assert error.message == "a sets block_size=16 and kv-policy sets block_size=32"
    composed = make(("kv-policy",), block_size=64)
    assert not composed.errors
    assert (composed.engine_kwargs["block_size"].value, composed.engine_kwargs["block_size"].source) == (64, "config")
    assert composed.engine_kwargs["seed"].source == "a"


def test_plugins_that_disagree_on_a_variable(site: Site, make: Make) -> None:
    site.install("quantserve-a", plugin("a", DETECTS, environment("{'MKL_X': '1', 'ONE': 'a'}")), name="a")
    site.install("policy", helper(environment("{'MKL_X': '2', 'ONE': 'a', 'TWO': 'b'}")))
    (error,) = make(("policy",)).errors
    assert error.code == "plugins-conflict"
    assert error.message == "a sets MKL_X='1' and policy sets MKL_X='2'"
    assert "engine_config.runtime_env.env_vars" in error.fix
    composed = make(("policy",), {"MKL_X": "3", "THREE": "c"})
    assert not composed.errors
    assert composed.variables == {
        "MKL_X": Setting("3", "config"),
        "ONE": Setting("a", "a"),
        "TWO": Setting("b", "policy"),
        "THREE": Setting("c", "config"),
    }
    plan = make_plan(composed)
    assert {name: plan.runtime_env["env_vars"][name] for name in composed.variables} == composed.environment
    assert plan.environment_provenance == {"MKL_X": "config", "ONE": "a", "THREE": "config", "TWO": "policy"}


def test_checks_see_the_variables_of_plugins(site: Site, make: Make) -> None:
    site.install("quantserve-a", plugin("a", DETECTS, environment("{'VLLM_PORT': 'tcp://1'}")), name="a")
    assert [error.code for error in make().errors] == ["environment-invalid"]
    assert not make((), {"VLLM_PORT": "8"}).errors


TWO_KERNELS = """kernel(target):
    from dataclasses import replace
    first = KernelProfile("first", 4.0, ((1, 0.5),), ((1, 0.5),), "test", key="one")
    return replace(first, alternatives=(replace(first, name="second", key="two", environment={"LEAVE_OUT": "first"}),))
"""


def test_the_plan_names_the_kernel_that_its_variables_lead_to(site: Site, make: Make) -> None:
    head = "from quantserve.api import KernelProfile\n"
    site.install("quantserve-a", head + plugin("a", DETECTS, TWO_KERNELS), name="a")
    site.install("policy", helper(environment("{'LEAVE_OUT': 'first'}")))
    for composed, name in ((make(), "first"), (make(("policy",)), "second"), (make((), {"LEAVE_OUT": ""}), "first")):
        assert composed.expected is not None
        assert make_plan(composed).kernel == composed.kernel == name
        assert f"; {name};" in composed.expected.conditions


def test_the_kernel_hook_sees_the_scheme_of_most_weights(site: Site, make: Make) -> None:
    schemes = (
        "scheme(checkpoint, linear):\n    from quantserve.api import K, N, Part, Scheme\n"
        "    small = 'k_proj' in linear.name\n"
        "    return Scheme({'weight': Part((N(), K()), ('F16', 'BF16'))}, bits=8, activation_bits=16 if small else 8)"
    )
    kernel = (
        "kernel(scheme, experts):\n"
        "    from quantserve.api import KernelProfile\n"
        "    name = f'{scheme.activation_bits} {experts}'\n"
        "    return KernelProfile(name, 8, ((1, 1.0),), ((1, 2.5),), 'assumed')"
    )
    site.install("quantserve-a", plugin("a", DETECTS, schemes, kernel), name="a")
    composed = make()
    assert composed.kernel == "8 False"
    assert composed.expected is not None


def overrides(**fields: object) -> str:
    return kwargs(repr({"hf_overrides": fields}))


def test_hf_overrides_of_several_plugins_and_the_user_are_one(site: Site, make: Make) -> None:
    ours = overrides(rope_parameters={"rope_type": "yarn"}, bos_token_id=1)
    site.install("quantserve-a", plugin("a", DETECTS, ours), name="a")
    site.install("policy", helper(overrides(rope_parameters={"factor": 4.0}, bos_token_id=1)))
    composed = make(("policy",), hf_overrides={"eos_token_id": 2})
    assert not composed.errors
    setting = composed.engine_kwargs["hf_overrides"]
    assert setting.value == {
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert setting.sources == ("a", "policy", "config")


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"rope": {"type": "linear"}}, "hf_overrides.rope.type='linear'"),
        ({"rope": None}, "hf_overrides.rope=None"),
    ],
)
def test_hf_overrides_conflict_where_they_differ_unless_the_user_decides(
    site: Site, make: Make, theirs: dict[str, object], message: str
) -> None:
    site.install("quantserve-a", plugin("a", DETECTS, overrides(rope={"type": "yarn"})), name="a")
    site.install("policy", helper(overrides(**theirs)))
    (error,) = make(("policy",)).errors
    assert error.code == "plugins-conflict"
    assert error.message == f"a sets hf_overrides.rope.type='yarn' and policy sets {message}"
    composed = make(("policy",), hf_overrides={"rope": {"type": "dynamic"}})
    assert not composed.errors
    assert composed.engine_kwargs["hf_overrides"].value == {"rope": {"type": "dynamic"}}


def test_a_model_that_names_what_is_not_installed(site: Site, make: Make) -> None:
    site.install("quantserve-a", plugin("a", DETECTS), name="a")
    with pytest.raises(UsageError, match=r"unknown plugin 'policy' \(known: a\)"):
        make(("policy",))
    with pytest.raises(UsageError, match=r"unknown quantization method 'nf4'.*\n.*install the plugin that serves it"):
        make(quantization="nf4")
    with pytest.raises(UsageError, match=r"did you mean 'a'\? .*\n  fix: correct the name"):
        make(quantization="aa")
    with pytest.raises(UsageError, match=r"unknown quantization method 'awq'.*\n.*pip install 'quantserve\[awq\]'"):
        make(quantization="awq")


def test_a_plugin_no_model_names_is_never_called(site: Site, make: Make) -> None:
    site.install("quantserve-a", plugin("a", DETECTS), name="a")
    site.install("bystander", helper("validate(checkpoint): raise RuntimeError", kwargs("{'seed': 3}")))
    composed = make()
    assert "seed" not in composed.engine_kwargs
    assert [plugin.name for plugin in composed.plugins] == ["a"]


@pytest.mark.parametrize(
    ("hook", "reason"),
    [
        ("validate(checkpoint): return 'all good'", "returned str, not findings"),
        ("validate(checkpoint): return ['all good']", "returned str among its findings"),
        ("validate(checkpoint): return [Finding('error', 'c', 'm')]", "fields are of the wrong types"),
        ("validate(checkpoint): return [Finding.error('c', None)]", "fields are of the wrong types"),
        ("validate(checkpoint): return [Finding.error('c', 'm', [1])]", "offenders must be a tuple of text"),
        ("engine_kwargs(checkpoint): return ['seed']", "returned list, not a mapping"),
        ("engine_kwargs(checkpoint): return 0", "returned int, not a mapping"),
        ("engine_kwargs(checkpoint): return {'seed': object()}", "not JSON"),
        ("engine_kwargs(checkpoint): yield 'seed'", "returned generator, not a mapping"),
        ("environment(checkpoint): return 'A=1'", "returned str, not a mapping"),
        ("environment(checkpoint): return {'A': 1}", "a value of A that is not text"),
        ("environment(checkpoint): return {'A': chr(0)}", "a value of A that is not text"),
        ("environment(checkpoint): return {'A=B': '1'}", "a variable whose name is not letters"),
        ("environment(checkpoint): return {'VLLM_PLUGINS': 'x'}", "VLLM_PLUGINS, which belong to the core"),
        ("environment(checkpoint): return {'QUANTSERVE_X': 'x'}", "QUANTSERVE_X, which belong to the core"),
        ("performance(checkpoint): return 7", "returned int, not PerformanceProfile"),
        ("performance(checkpoint): return PerformanceProfile('reference', {1})", "conditions is set, not text"),
        ("kernel(target): return 7", "returned int, not KernelProfile"),
        ("detect(checkpoint): return 'yes'", "returned str, not True, False or None"),
    ],
)
def test_a_hook_that_returns_the_wrong_thing(site: Site, make: Make, hook: str, reason: str) -> None:
    code = "from quantserve.api import Finding, PerformanceProfile\n"
    code += plugin("a", hook) if hook.startswith("detect") else plugin("a", DETECTS, hook)
    site.install("quantserve-a", code, name="a")
    with pytest.raises(PluginError, match=reason):
        make()


def test_a_plugin_that_changes_its_arguments_changes_nobody_elses(site: Site, make: Make) -> None:
    spoil = "engine_kwargs(checkpoint, model): checkpoint.config.clear(); model.engine_config.engine_kwargs['seed'] = 7"
    site.install("quantserve-a", plugin("a", DETECTS, spoil), name="a")
    composed = make()
    assert composed.checkpoint.config["model_type"] == "llama"
    assert "seed" not in composed.engine_kwargs
    assert not composed.errors


def test_a_switched_off_plugin_is_named_when_the_checkpoint_needs_it(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.method("quantserve-awq", "awq", name="awq")
    registry = Registry.load({"QUANTSERVE_DISABLE": "awq"}, site.entry_points())
    model = model_from_source(str(make_llama(tmp_path / "model", "awq")))
    with pytest.raises(UsageError, match=r"'awq' .* is switched off: named in QUANTSERVE_DISABLE"):
        compose(model, registry, find_target("a100-80g"))


@pytest.mark.parametrize(
    ("target", "dtype", "decided", "fix"),
    [
        ("t4", None, "decided by vLLM", "use a GPU with compute capability 8.0"),
        ("a100-80g", None, "decided by plugin 'awq'", "compare its answers with those of the unquantized model"),
        ("a100-80g", "half", "decided by engine_kwargs.dtype", "set engine_kwargs.dtype to auto"),
    ],
)
def test_who_narrowed_the_dtype(tmp_path: Path, target: str, dtype: str | None, decided: str, fix: str) -> None:
    folder = make_llama(tmp_path / "m", "awq", dtype="BF16", hidden=512, intermediate=1024, group_size=256)
    model = model_from_source(str(folder))
    if dtype:
        model.engine_config.engine_kwargs["dtype"] = dtype
    composed = compose(model, Registry.load({}), find_target(target))
    (finding,) = [finding for finding in composed.findings if finding.code == "dtype-narrowed"]
    assert decided in finding.message
    assert finding.fix.startswith(fix)


def test_files_that_cannot_be_read_are_the_one_thing_to_say(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"\0" * 4)
    composed = compose(model_from_source(str(folder)), Registry.load({}), find_target("a100-80g"))
    assert [error.code for error in composed.errors] == ["header-truncated"]
