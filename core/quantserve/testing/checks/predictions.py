"""Predictions: finite, positive, sane, in the right units."""

from __future__ import annotations

from collections.abc import Iterator

from quantserve.api import KernelProfile, PerformanceProfile, QualityNote
from quantserve.plugins.contract import kernel_of, profile_of, quality_of
from quantserve.plugins.registry import Hooks
from quantserve.target import Target, known_targets
from quantserve.testing.check import check
from quantserve.testing.subject import Subject


def kernels(subject: Subject) -> Iterator[tuple[str, int, KernelProfile]]:
    """The kernel profiles of every device and width, alternatives among them; raises PluginError."""
    method = subject.method
    if method is None or "kernel" not in subject.facts:
        return
    hooks = Hooks([subject.loaded])
    for target in subject.targets:
        for bits in method.bits:
            for engine in ("vllm-0.32", "vllm-0.2.2"):
                for experts in (False, True):
                    profile = hooks.call(
                        subject.loaded, "quantserve_kernel", kernel_of,
                        target=target, bits=bits, engine=engine, scheme=None, experts=experts,
                    )  # fmt: skip
                    for one in (profile, *profile.alternatives) if profile else ():
                        yield f"{one.name!r} on {target.device}, {bits} bits", bits, one


def performances(subject: Subject) -> Iterator[tuple[Target, PerformanceProfile]]:
    """What the plugin gives as measured of the good checkpoint, on all known targets; raises PluginError."""
    if "performance" not in subject.facts:
        return
    model = subject.model()
    for target in known_targets().values():
        found = Hooks([subject.loaded]).call(
            subject.loaded, "quantserve_performance", profile_of, checkpoint=subject.good, model=model, target=target
        )
        if found:
            yield target, found


def qualities(subject: Subject) -> Iterator[tuple[int, QualityNote]]:
    """The notes on quality of every width; raises PluginError."""
    method = subject.method
    for bits in method.bits if method and "quality" in subject.facts else ():
        if note := Hooks([subject.loaded]).call(subject.loaded, "quantserve_quality", quality_of, bits=bits):
            yield bits, note


@check("R01-kernels", "kernel")
def kernel_profiles(subject: Subject) -> Iterator[str]:
    """Kernel profiles are sane: stored bits are the codes' and at most 8 more, shares of memory's rate reach 1, an
    uncertainty is at most 1, and a source is named.

    Fix: `bits_per_weight` counts scales and zeros; shares are 0.6 and not 60; `quantserve calibrate` measures them.
    """
    for what, bits, profile in kernels(subject):
        if not bits <= profile.bits_per_weight <= max(bits + 8, 32):
            yield f"{what}: bits_per_weight is {profile.bits_per_weight:g}"
        if profile.uncertainty > 1:
            yield f"{what}: uncertainty is {profile.uncertainty:g}, which is a share"
        if max(share for _, share in profile.bandwidth_share) > 1.2:
            yield f"{what}: a bandwidth_share is above 1.2: {profile.bandwidth_share}"
        if max(share for _, share in profile.bandwidth_share) < 0.02:
            yield f"{what}: bandwidth shares are below 2 %: {profile.bandwidth_share}"
        if not profile.source or not profile.name:
            yield f"{what}: the profile names no source or no kernel"


@check("R02-stored-bits", "method", "scheme")
def stored_bits(subject: Subject) -> Iterator[str]:
    """The widths of the schemes are the method's, and a profile's stored bits at most 1.5 times those of the files.

    Fix: `Scheme.bits`, `Method.bits` and `KernelProfile.bits_per_weight` tell the same.
    """
    method, stored = subject.method, subject.composed().stored
    assert method is not None
    quantized = stored.quantized if stored else ()
    for bits in {scheme.bits for _, scheme in quantized if scheme.bits < 16} - set(method.bits):
        yield f"a scheme has {bits:g} bits, and the method has {list(method.bits)}"
    weights = sum(linear.weights for linear, _ in quantized)
    width = {round(scheme.bits) for _, scheme in quantized}
    if not weights or len(width) > 1 or len(quantized) != len(subject.quantized):
        return
    # The tensors of stacked experts may continue the module's name: ``experts.gate_up_proj_blocks``.
    begins = tuple(
        f"{name}{mark}"
        for linear, _ in quantized
        for name in linear.names
        for mark in ("._" if linear.stacked else ".")
    )
    held = sum(one.nbytes for name, one in subject.good.tensors.items() if name.startswith(begins))
    for what, bits, profile in kernels(subject):
        if bits in width and profile.bits_per_weight > 1.5 * 8 * held / weights:
            yield f"{what}: bits_per_weight is {profile.bits_per_weight:g}, and the files hold {8 * held / weights:.2f}"
            return


@check("R03-performance", "performance")
def performance(subject: Subject) -> Iterator[str]:
    """Measured figures agree with each other: the first token is no later than the last, and tokens per second is 1000
    divided by the milliseconds of a token within a factor of 3.

    Fix: times are milliseconds of a request, `output_tokens_per_s` is that of one user.
    """
    for target, one in performances(subject):
        if one.e2e_ms and one.ttft_ms and one.ttft_ms > one.e2e_ms:
            yield f"on {target}: ttft_ms {one.ttft_ms:g} is later than e2e_ms {one.e2e_ms:g}"
        if one.itl_ms and one.output_tokens_per_s and not 1 / 3 < one.itl_ms * one.output_tokens_per_s / 1000 < 3:
            yield f"on {target}: itl_ms {one.itl_ms:g} and output_tokens_per_s {one.output_tokens_per_s:g} disagree"


@check("R04-quality", "quality")
def quality(subject: Subject) -> Iterator[str]:
    """A perplexity is between the baseline less 5 % and 10 times the baseline, and it falls with the width.

    Fix: `perplexity` is of the quantized model, `baseline` of the 16-bit one.
    """
    found = dict(qualities(subject))
    for bits, note in found.items():
        if not -0.05 < note.increase < 9:
            yield f"{bits} bits: perplexity {note.perplexity:g}, baseline {note.baseline:g}"
    for low, high in zip(sorted(found), sorted(found)[1:], strict=False):
        one, other = found[low], found[high]
        if one.measured_on == other.measured_on and one.perplexity < other.perplexity:
            yield f"{low} bits have perplexity {one.perplexity:g}, and {high} bits {other.perplexity:g}"
