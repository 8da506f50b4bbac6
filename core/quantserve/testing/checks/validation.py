"""A good checkpoint has no errors, and a damaged one has."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from itertools import product
from pathlib import Path

from quantserve.api import Finding, Linear, once
from quantserve.checkpoint import open_checkpoint
from quantserve.errors import PluginError, QuantserveError
from quantserve.testing.check import check
from quantserve.testing.damages import (
    Damage,
    config_damages,
    fused_damages,
    model_damages,
    odd_configs,
    tensor_damages,
)
from quantserve.testing.subject import Subject


@once
def all_damages(subject: Subject) -> list[Damage]:
    """Every damage of the good checkpoint."""
    good = subject.good
    made = [*tensor_damages(good, subject.quantized), *fused_damages(good, subject.quantized)]
    return [*made, *config_damages(good), *model_damages(good)]


def refused(subject: Subject, damage: Damage) -> list[Finding]:
    """The errors of a damaged checkpoint that the good one does not have, on the first device with any."""
    for target in subject.targets:
        known = {(one.code, one.message) for one in subject.errors(target=target)}
        found = subject.errors(damage.checkpoint, target)
        if new := [one for one in found if (one.code, one.message) not in known]:
            return new
    return []


def judged(subject: Subject, kinds: Callable[[str], bool], *, named: bool = False) -> Iterator[str]:
    """What is wrong with the verdicts on the damages whose names are of these kinds."""
    some = [damage for damage in all_damages(subject) if kinds(damage.name)]
    for damage, found in subject.guard.each(partial(refused, subject), some):
        reason = next((why for p, why in subject.case.harmless.items() if fnmatchcase(damage.name, p)), None)
        if isinstance(found, PluginError):
            yield f"{damage.name} ({damage.detail}): {found.stage}: {found.reason}"
            continue
        codes = ", ".join(dict.fromkeys(finding.code for finding in found))
        if reason is None and not found:
            yield f"{damage.name} ({damage.detail}): no error"
        elif reason is not None and found:
            yield f"{damage.name} ({damage.detail}): the case calls it harmless ({reason}), and it is refused: {codes}"
        elif named and found and reason is None and not any(_names(finding, damage) for finding in found):
            yield f"{damage.name} ({damage.detail}): {codes} names neither the tensor nor its module"
        if damage.name.endswith("removed"):
            for one in (one for one in found if re.search(r"\bNone\b", one.message)):
                yield f"{damage.name}: {one.code} calls it None, and should call it missing: {one.message}"


def _names(finding: Finding, damage: Damage) -> bool:
    """Whether a finding names the module, or its parent; one that nobody claims any more has nothing to name."""
    text = " ".join([finding.message, *finding.offenders])
    return damage.where.rpartition(".")[0] in text or finding.code == "method-not-detected"


@check("V01-good", "loaded")
def good(subject: Subject) -> Iterator[str]:
    """The good checkpoint has no errors on any device that the plugin declares.

    Fix: correct the checkpoint of the case, or the findings.
    """
    for target in subject.targets:
        for finding in subject.errors(target=target):
            yield f"on {target.device}: {finding.code}: {finding.message}"


@check("V02-missing", "method")
def missing(subject: Subject) -> Iterator[str]:
    """Every tensor of a quantized linear that is missing is an error which names the linear: vLLM would serve noise.

    Fix: give the tensor as a `Part` of the scheme that is not optional.
    """
    yield from judged(subject, lambda name: name.endswith("missing"), named=True)


@check("V03-wrong-shape", "method")
def wrong_shape(subject: Subject) -> Iterator[str]:
    """Every tensor of a quantized linear with another length of a dimension is an error which names the linear.

    Fix: give the dimensions of the `Part` as `N()`, `K()` and numbers; None accepts any length.
    """
    yield from judged(subject, lambda name: name.endswith("wrong shape"), named=True)


@check("V04-wrong-dtype", "method")
def wrong_dtype(subject: Subject) -> Iterator[str]:
    """Every tensor of a quantized linear in a dtype that holds something else is an error which names the linear.

    Fix: give the `Part` the dtypes that the format has, and no others.
    """
    yield from judged(subject, lambda name: name.endswith("wrong dtype"), named=True)


@check("V05-further-tensors", "method")
def further_tensors(subject: Subject) -> Iterator[str]:
    """A tensor in a linear that the format does not have is an error: it belongs to a variant that is served wrong.

    Fix: `quantserve_scheme` finds them; without a scheme compare the names yourself.
    """
    yield from judged(subject, lambda name: name.startswith("tensor extra"), named=True)


@check("V06-unquantized", "method")
def unquantized(subject: Subject) -> Iterator[str]:
    """A fused layer that is quantized in part is an error, and so is a quantization config over plain weights.

    Fix: a `Scheme` finds the first; `quantserve_validate` says the second: `NAME-not-quantized`.
    """
    yield from judged(subject, lambda name: "plain" in name)


@check("V07-other-model", "method")
def other_model(subject: Subject) -> Iterator[str]:
    """A config.json of another model is an error: other sizes, more layers.

    Fix: let the shapes in the scheme follow from N and K.
    """
    yield from judged(subject, lambda name: name.startswith("model "))


@check("V08-setting-removed", "method")
def setting_removed(subject: Subject) -> Iterator[str]:
    """Every setting of the quantization config that is removed is an error, which does not call it None.

    Fix: report it in `quantserve_validate`, as missing. Settings with the same default, or that nothing reads, go into
    `Case.harmless` with the reason.
    """
    yield from judged(subject, lambda name: name.startswith("config ") and name.endswith("removed"))


@check("V09-setting-type", "method")
def setting_type(subject: Subject) -> Iterator[str]:
    """Every setting of the quantization config with a value of another type is an error, and no exception.

    Fix: compare with the values that the format knows, and report others.
    """
    yield from judged(subject, lambda name: name.startswith("config ") and name.endswith("wrong type"))


@check("V10-setting-value", "method")
def setting_value(subject: Subject) -> Iterator[str]:
    """Every setting of the quantization config with another value is an error: other widths, groups, algorithms.

    Fix: compare the settings with each other and with the tensors' shapes.
    """
    yield from judged(subject, lambda name: name.startswith("config ") and name.endswith("wrong value"))


@check("V11-damaged-files", "files")
def damaged_files(subject: Subject) -> Iterator[str]:
    """Cut files, and files that begin with other bytes, are findings, and no exception of a hook or reader.

    Fix: a reader raises `BadContainer`; hooks say only what is certain where `tensors_complete` is False.
    """
    folder = subject.folder
    assert folder is not None
    with tempfile.TemporaryDirectory(prefix="quantserve-") as made:
        copy = Path(made, "copy")
        for what, change in _file_damages(folder):
            shutil.rmtree(copy, ignore_errors=True)
            copy.mkdir()
            for file in [folder] if folder.is_file() else [one for one in folder.iterdir() if one.is_file()]:
                shutil.copy(file, copy / file.name)
            change(copy)
            try:
                opened = open_checkpoint(str(copy), readers=subject.registry.readers)
                found = [*opened.problems, *subject.errors(opened)]
            except PluginError as error:
                yield f"{what}: {error.stage}: {error.reason}"
                continue
            except QuantserveError:
                continue
            if not any(finding.severity.value == "error" for finding in found):
                yield f"{what}: no error"


def _file_damages(folder: Path) -> Iterator[tuple[str, Callable[[Path], object]]]:
    weights = max([folder] if folder.is_file() else [f for f in folder.iterdir() if f.is_file()], key=_size)
    size = _size(weights)
    for left in (0, 4, 8, 100, size // 2, size - 1):
        yield f"{weights.name} cut to {left} bytes", partial(_cut, weights.name, left)
    yield f"{weights.name} with another beginning", partial(_overwrite, weights.name)
    yield f"{weights.name} missing", lambda copy: (copy / weights.name).unlink()


def _size(file: Path) -> int:
    return file.stat().st_size


def _cut(name: str, left: int, folder: Path) -> None:
    with (folder / name).open("rb+") as opened:
        opened.truncate(left)


def _overwrite(name: str, folder: Path) -> None:
    with (folder / name).open("rb+") as opened:
        opened.write(bytes(range(64)))


@check("V12-any-checkpoint", "loaded")
def any_checkpoint(subject: Subject) -> Iterator[str]:
    """No hook fails for a config of any JSON, for no tensors, and for tensors without dimensions.

    Fix: hooks report what is wrong as findings and raise nothing; a config may hold anything.
    """
    every = product(odd_configs(subject.good), subject.targets)
    for (damage, target), made in subject.guard.each(
        lambda one: subject.composed(one[0].checkpoint, one[1], named=True), every
    ):
        if isinstance(made, PluginError):
            yield f"{damage.detail}, on {target.device}: {made.stage}: {made.reason}"


@check("V13-stable-codes", "method")
def stable_codes(subject: Subject) -> Iterator[str]:
    """The same damage in another layer has the same codes; every error says what to do.

    Fix: name layers, tensors and numbers in the message and its offenders; give `fix`.
    """
    by_name: dict[str, set[frozenset[str]]] = {}
    for linears in _first_and_last(subject):
        for damage in tensor_damages(subject.good, linears):
            if damage.name.endswith("missing"):
                try:
                    found = subject.guard(partial(refused, subject, damage))
                except PluginError:
                    continue  # another check says it
                by_name.setdefault(damage.name, set()).add(frozenset(finding.code for finding in found))
                yield from _without_fix(found)
    for name, sets in by_name.items():
        if len(sets) > 1:
            yield f"{name}: {' or '.join(sorted(', '.join(sorted(codes)) or 'no error' for codes in sets))}"


def _first_and_last(subject: Subject) -> Iterable[list[Linear]]:
    some = [linear for linear in subject.quantized if not linear.experts]
    leaf = some[0].name.rpartition(".")[2] if some else ""
    alike = [linear for linear in some if linear.name.endswith(leaf)]
    return [[alike[0]], [alike[-1]]] if len(alike) > 1 else []


def _without_fix(found: list[Finding]) -> Iterator[str]:
    for finding in found:
        if not finding.fix:
            yield f"{finding.code} has no fix"


@check("V14-harmless", "method")
def harmless(subject: Subject) -> Iterator[str]:
    """Every pattern of `Case.harmless` names a damage of this checkpoint.

    Fix: remove the pattern, or correct it.
    """
    names = {damage.name for damage in all_damages(subject)}
    for pattern in subject.case.harmless:
        if not any(fnmatchcase(name, pattern) for name in names):
            yield f"{pattern!r} names none of {', '.join(sorted(names))}"
