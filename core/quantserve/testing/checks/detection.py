"""Which checkpoints a plugin claims."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from quantserve.api import Checkpoint, Tensor
from quantserve.errors import PluginError
from quantserve.planning.detection import own_copy
from quantserve.plugins.contract import claim_of
from quantserve.plugins.registry import Hooks
from quantserve.testing.check import check
from quantserve.testing.damages import odd_configs
from quantserve.testing.samples import SAMPLES
from quantserve.testing.subject import Subject


def claims(subject: Subject, checkpoint: Checkpoint) -> bool:
    """Whether the plugin claims it; raises PluginError."""
    plugin = subject.quick.plugins[subject.case.name]
    hooks = Hooks([plugin])
    return bool(
        subject.guard(lambda: hooks.call(plugin, "quantserve_detect", claim_of, checkpoint=own_copy(checkpoint)))
    )


@check("D01-own", "method")
def own(subject: Subject) -> Iterator[str]:
    """The plugin claims the good checkpoint, and users get its method without naming it.

    Fix: return True in `quantserve_detect` for what the files declare or hold.
    """
    if not claims(subject, subject.good):
        yield "quantserve_detect does not claim the good checkpoint"
    elif subject.composed().method_plugin is None:
        yield "the good checkpoint is claimed and gets no method: " + "; ".join(e.message for e in subject.errors())


@check("D02-others", "method")
def others(subject: Subject) -> Iterator[str]:
    """The plugin claims no sample of another format: `quantserve.testing.SAMPLES` has one of every format known.

    Fix: look at `quant_method`, and at tensors only where no method is declared. `Case.formats` lists formats of others
    that the plugin serves as well.
    """
    method = subject.method
    assert method is not None
    mine = {subject.case.name, *method.names, *method.accepts, *subject.case.formats}
    strangers = {
        name: sample
        for name, sample in SAMPLES.items()
        if not mine & {sample.format, sample.owner} and (sample.format or "fp16" not in mine)
    }
    for name, claimed in subject.guard.each(lambda name: claims(subject, strangers[name].checkpoint()), strangers):
        if isinstance(claimed, PluginError):
            raise claimed
        if claimed:
            yield f"quantserve_detect claims the sample {name!r}"


@check("D03-nothing", "method")
def nothing(subject: Subject) -> Iterator[str]:
    """The plugin claims neither an empty checkpoint nor one that declares a method that nobody has.

    Fix: claim nothing by exclusion; say what the format has.
    """
    embedding = {"model.embed_tokens.weight": Tensor("model.embed_tokens.weight", "F16", (8, 8))}
    declared = {"quantization_config": {"quant_method": "quantserve-none", "bits": 4, "group_size": 128}}
    for what, one in {
        "an empty checkpoint": Checkpoint.from_tensors({}),
        "a method that nobody has": Checkpoint("made-up", config=declared, tensors=embedding),
        "its own tensors under a method that nobody has": replace(
            subject.good, config={**subject.good.config, **declared}, quant_files={}, container=()
        ),
    }.items():
        if claims(subject, one):
            yield f"quantserve_detect claims {what}"


@check("D04-any-config", "method")
def any_config(subject: Subject) -> Iterator[str]:
    """`quantserve_detect` answers for any JSON in the place of the quantization config, and for tensors of any shape.

    Fix: `checkpoint.quantization_config` may be None, and every value in it of any type.
    """
    for damage in odd_configs(subject.good):
        claims(subject, damage.checkpoint)
    yield from ()
