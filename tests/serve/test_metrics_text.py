"""Texts of replicas, merged into one."""

from __future__ import annotations

import math

import pytest

from quantserve.serve.gateway.metrics.text import merge, totals

from .prometheus_texts import EARLIER, LATER, all_samples, families, samples


class TestMerge:
    LABELS = {"model": "demo", "method": "awq", "replica": "r1"}

    def test_a_real_text_keeps_every_value_and_gains_labels(self) -> None:
        before, merged = all_samples(EARLIER), merge(b"", [(self.LABELS, EARLIER)])
        after = samples(merged)
        assert len(before) == len(after) > 250
        for sample in before:
            renamed = {("exported_method" if key == "method" else key): text for key, text in sample.labels.items()}
            key = (sample.name, frozenset({**renamed, **self.LABELS}.items()))
            assert after[key] == sample.value or math.isnan(sample.value)

    def test_families_stay_in_one_piece_with_their_types(self) -> None:
        texts = [({**self.LABELS, "replica": name}, text) for name, text in (("r1", EARLIER), ("r2", LATER))]
        merged = merge(b"# HELP own Ours.\n# TYPE own gauge\nown 1\n", texts)
        found, real = families(merged), families(EARLIER)
        assert list(found) == ["own", *real]
        for name, family in real.items():
            assert (found[name].type, found[name].documentation) == (family.type, family.documentation)
            assert len(found[name].samples) == 2 * len(family.samples)

    def test_samples_of_processes_have_distinct_labels(self) -> None:
        own = b"# TYPE process_open_fds gauge\nprocess_open_fds 7\n"
        merged = merge(own, [({"replica": name}, EARLIER) for name in "ab"])
        assert [s.labels for s in families(merged)["process_open_fds"].samples] == [
            {}, {"replica": "a"}, {"replica": "b"}
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("line", "name", "labels", "number", "time_s"),
        [
            ("plain 1", "plain", {}, 1, None),
            ("plain\t2.5 1700000000000", "plain", {}, 2.5, 1_700_000_000),
            ("empty{} NaN", "empty", {}, math.nan, None),
            ('one{a="x"} +Inf', "one", {"a": "x"}, math.inf, None),
            ('spaced {a="x" , b="y", } 3 1700000000000', "spaced", {"a": "x", "b": "y"}, 3, 1_700_000_000),
            (r'tricky{a="q\"} # {\\",b="n\nl"} 4', "tricky", {"a": 'q"} # {\\', "b": "n\nl"}, 4, None),
            (r'clash{model="x\\",a="model=\"y\""} 5', "clash", {"exported_model": "x\\", "a": 'model="y"'}, 5, None),
            ('twice{exported_model="a",model="b"} 6', "twice",
             {"exported_model": "a", "exported_exported_model": "b"}, 6, None),
            ('submodel{mymodel="x"} 7', "submodel", {"mymodel": "x"}, 7, None),
            ('hit{le="1"} 8 # {trace_id="a"} 0.5 1700000000.0', "hit", {"le": "1"}, 8, None),
            ('bare 9 # {trace_id="a"} 0.5', "bare", {}, 9, None),
            ('timed{le="1"} 8 1700000000000 # {trace_id="}"} 0.5', "timed", {"le": "1"}, 8, 1_700_000_000),
        ],
    )  # fmt: skip
    def test_lines(self, line: str, name: str, labels: dict[str, str], number: float, time_s: float | None) -> None:
        added = {"model": 'a"b\\c\nd', "replica": "r"}
        merged = merge(b"", [(added, f"{line}\n".encode())])
        (sample,) = all_samples(merged)
        assert (sample.name, sample.labels, sample.timestamp) == (name, {**labels, **added}, time_s)
        assert sample.value == number or (math.isnan(number) and math.isnan(sample.value))
        assert b" # " not in merged.replace(rb"\"} # {", b""), "an exemplar was left"

    def test_only_invalid_lines_are_dropped(self) -> None:
        comments = b"<html>\n# EOF\n# just a comment\n\n"
        lines = b'open{a="x 1\nno{a="x"} number\nno{a="x"}\nno\n{} 2\n9lives 3\ngood 4\ngood{a="cut o'
        assert samples(merge(b"", [({"model": "m"}, comments + lines)])) == {("good", frozenset({("model", "m")})): 4.0}

    def test_a_family_that_changed_its_type_does_not_spoil_the_text(self) -> None:
        old = b"# TYPE x gauge\nx 1\n"
        new = b'# HELP x New.\n# TYPE x histogram\nx_bucket{le="+Inf"} 2\nx_sum 2\nx_count 2\n# TYPE y gauge\ny 3\n'
        merged = merge(b"", [({"replica": "a"}, old), ({"replica": "b"}, new)])
        assert set(samples(merged)) == {("x", frozenset({("replica", "a")})), ("y", frozenset({("replica", "b")}))}

    def test_samples_that_do_not_follow_their_declaration_find_it(self) -> None:
        text = b'# TYPE h histogram\n# TYPE g gauge\ng 1\nh_bucket{le="+Inf"} 2\nh_sum 2\nh_count 2\n'
        found = families(merge(b"", [({"replica": "a"}, text)]))
        assert (len(found["h"].samples), found["h"].type, len(found["g"].samples)) == (3, "histogram", 1)

    def test_totals(self) -> None:
        text = b'a_sum 1\na_sum{x="} 9"} 2 1700000000000\na_sum_more 50\nb_a_sum 60\n# a_sum 70\na_sum{y="z"} 4'
        assert totals(text, ["a_sum", "gone"]) == {"a_sum": 7.0}
