"""The benchmark of quality: its variants are options that quantizers have, its texts are long enough."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import click
import pytest

from benchmarks import quality
from benchmarks.console import BenchError
from benchmarks.quality import KNOWN, VARIANTS, chosen, shortened, write_texts


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_a_method_with_options_that_it_has(name: str) -> None:
    pytest.importorskip("torch")
    from quantserve_quantize.program import method_options, quantizer_class

    method, *given = VARIANTS[name].split()
    _, quantizer = quantizer_class(method)
    command = click.Command("quantize", params=list(method_options(method)), callback=lambda **options: options)
    options = command.main(given, standalone_mode=False)
    quantizer(quantizer.Options(**options))


def test_names_are_chosen_by_their_beginning() -> None:
    assert chosen("") == list(KNOWN)
    assert chosen("llama") == ["llama-q4_k_m", "llama-iq3_s"]
    assert chosen("squeezellm-3, fp8") == ["squeezellm-3", "squeezellm-3-sparse", "fp8"]
    with pytest.raises(BenchError, match="unknown variant q8; known: squeezellm-4"):
        chosen("fp8,q8")


def test_texts_are_long_enough_and_share_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "CALIBRATION_BYTES", 100_000)  # the whole takes seconds
    made = write_texts(tmp_path)
    evaluation, calibration = ((tmp_path / f"{name}.txt").read_text() for name in ("evaluation", "calibration"))
    assert made["calibration"]["sha256"] == sha256(calibration.encode()).hexdigest()
    assert 50_000 < len(evaluation.encode()) <= 56_100
    assert "From fairest creatures" in evaluation
    assert 99_000 < len(calibration.encode()) <= 100_000
    assert "From fairest creatures" not in calibration


def test_a_text_is_cut_at_the_end_of_a_line() -> None:
    assert shortened("eins\nzwölf\ndrei", 11) == "eins"
    assert shortened("eins\nzwölf\ndrei", 12) == "eins\nzwölf"
    assert shortened("eins", 4) == "eins"
