"""The report page: self-contained, true to its numbers and tests, escaped."""

import importlib
import random
import re
import sys

import numpy as np
import pytest
from helpers import (
    NASTY,
    make_clusters,
    make_example,
    make_plan,
    make_scores,
    report_metrics,
    written,
)

from speechbrain_mpq.evaluation.page import (
    _equal_loudness,
    _loudest_magnitude,
    _marked_words,
)
from speechbrain_mpq.evaluation.report import (
    Evidence,
    _verdict,
    write_report,
    write_table,
)
from speechbrain_mpq.evaluation.results_table import compare

pytestmark = pytest.mark.usefixtures("planned_pictures")


def test_page_is_self_contained(tmp_path, pictures):
    clusters = make_clusters()
    html = written(
        tmp_path / "report.html",
        [report_metrics("kl", 4, 2), report_metrics("fp32", 32, 1)],
        plan=make_plan(clusters),
        scores=make_scores(clusters),
        examples=[make_example()],
        training_curve=[{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0}],
    )
    assert "http" not in html and "<script" not in html and "url(" not in html
    addresses = re.findall(r'(?:src|srcset|href)="([^"]{5})', html)
    # 4 figures in two themes and widths, a top view, spectrograms, sounds.
    assert addresses == ["data:"] * (4 * 4 + 2 + 6)
    drawn = re.findall(r'"data:image/png;base64,iVBOR', html)  # PNG's start
    assert len(drawn) == 4 * 4 + 2 + 3
    assert html.count("<audio") == 3
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_page_shows_the_numbers(tmp_path):
    systems = [
        report_metrics("kl", 4, 2, average_bits=4.03, model_bytes=3 * 2**20),
        report_metrics("fp32", 32, 1, model_bytes=12 * 2**20),
    ]
    html = written(
        tmp_path / "report.html",
        systems,
        plan=make_plan(make_clusters()),
        examples=[make_example()],
    )
    for shown in (
        "kl 4.03 bit: 4.0 times smaller",
        ">7.25(2.12)</td>",
        "<td>10.25(2.12)</td>",
        "<td>8.75(2.12)</td>",
        "<td>20.0</td>",
        "+10.0 points WER, +0.00 dB SI-SNR",
        "16 clusters, 4.5 bits per parameter",
        "<td>100.0 %</td>",
        "item-7: speakers 70° apart",
        "8.8 dB",
        "1 error in 3 words",
        "3 errors in 3 words",
    ):
        assert shown in html, shown
    assert "Sensitivity" not in html


def test_text_is_escaped(tmp_path):
    signals = {NASTY: np.ones(1600)}
    example = make_example(
        id=NASTY,
        reference=NASTY,
        signals=signals,
        hypotheses={NASTY: NASTY + " &amp;"},
    )
    html = written(
        tmp_path / "report.html",
        [report_metrics(NASTY, 4, 1, corpus=NASTY)],
        plan=make_plan({NASTY: {"bits": 2, "parameters": 3}}),
        scores={
            "method": NASTY,
            "clusters": {NASTY: {"scores": {"2": 1.0}}},
        },
        examples=[example],
        training_curve=[{NASTY: 1.0}],
    )
    assert "<script" not in html
    assert "&lt;script&gt;alert(" in html
    assert "<ins>&amp;amp;</ins>" in html


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "speechbrain_mpq.evaluation.report")
    with pytest.raises(ImportError, match=r"speechbrain_mpq\[evaluate\]"):
        importlib.import_module("speechbrain_mpq.evaluation.report")


def test_page_without_anything_optional(tmp_path):
    html = written(tmp_path / "report.html", [report_metrics("fp32", 32, 1)])
    assert "<h1>" in html and "Look and listen" not in html


def test_broken_signals_are_named_and_nothing_is_written(tmp_path):
    example = make_example(signals={"kl": np.full(1600, np.nan)})
    with pytest.raises(ValueError, match="item-7: kl holds NaN"):
        write_report(
            tmp_path / "report.html",
            [report_metrics("kl", 4, 1)],
            Evidence(examples=[example]),
        )
    assert not list(tmp_path.iterdir())


def test_signals_get_one_loudness():
    rng = np.random.default_rng(1)
    noise = rng.standard_normal(100)
    scaled = _equal_loudness(
        {"a": noise, "b": 1e-3 * noise, "c": np.zeros(100)}
    )
    assert np.allclose(scaled["a"], scaled["b"])
    assert np.abs(scaled["a"]).max() == pytest.approx(0.9)
    assert not scaled["c"].any()
    assert _loudest_magnitude([scaled["c"]], 16000) > 0
    with pytest.raises(ValueError, match="a is not"):
        _equal_loudness({"a": np.zeros((2, 3))})


def test_marked_words_are_escaped():
    assert _marked_words("a", "<b>") == "<mark>&lt;b&gt; <s>a</s></mark>"
    assert _marked_words("a <b>", "a") == "a <del>&lt;b&gt;</del>"


def test_page_with_everything_optional(tmp_path):
    clusters = make_clusters()
    scores = make_scores(clusters)
    row = {"trace": 1.0, "standard_error": 0.5}
    scores["details"] = {"traces": dict.fromkeys(clusters, row)}
    points = [{"bytes": 2048, "score": 3.0}]
    html = written(
        tmp_path / "report.html",
        [report_metrics("kl", 4, 2, model_bytes=3000)],
        plan=make_plan(clusters),
        scores=scores,
        neighbours=[report_metrics("uniform", 4, 3, model_bytes=3000)],
        ceiling={"am_gm_db": 9.25, "limited_db": 6.0, "planned_db": 5.75},
        pareto={"points": points, "chosen": points[0]},
        additivity=[{"plan": "kl 4", "predicted": 1.0, "measured": 1.5}],
        admm=[{"iteration": 1, "primal_residual": 0.1, "valid_loss": -8.0}],
    )
    for shown in (
        *("Size against quality", "at most 9.2 dB less than uniform"),
        *("Within the candidate bits it is 6.0 dB", "plan loses 5.8 dB less"),
        *("Hessian trace", "Predicted and measured", "Convergence of ADMM"),
    ):
        assert shown in html, shown


def test_table_page_escapes_and_shows_differences(tmp_path):
    runs = [
        report_metrics(system, 4, errors, seed=seed, model_bytes=1000)
        for system, errors in ((NASTY, 1), ("uniform", 2))
        for seed in (1, 2)
    ]
    write_table(tmp_path / "table.html", runs)
    html = (tmp_path / "table.html").read_text("utf-8")
    assert "<script" not in html and "&lt;script&gt;" in html
    assert "Differences at equal bytes" in html
    assert "<td>+10.0 ± 0.0</td>" in html


def test_verdict_follows_the_test():
    fp32 = report_metrics("fp32", 32, 1)
    for z, p, words in (
        (0.5, 0.6, "word error rate -29.2 to +49.2 points (95 % interval"),
        (0.0, 1.0, "no difference in word errors shown"),
        (3.0, 0.003, "significantly more word errors"),
        (-3.0, 0.003, "significantly fewer word errors"),
    ):
        test = {"against": "fp32", "z": z, "p": p, "segments": 50}
        headline, sentences = _verdict(
            [report_metrics("kl", 4, 2, mapsswe=test), fp32]
        )
        assert words in headline
        outcome = "is not significant" if p > 0.05 else "is significant"
        assert outcome in sentences[-1]
    untested = _verdict([report_metrics("kl", 4, 2), fp32])
    assert "word error rate +10.0 points" in untested[0]
    assert "not tested" in untested[1][-1]


def test_no_change_is_said_only_of_a_narrow_interval():
    fp32 = report_metrics("fp32", 32, 1)
    kl = report_metrics("kl", 4, 1)
    for block in kl["buckets"].values():
        block["wer"] += 0.3
    for z, words in (
        (0.9, "no significant change in word errors"),
        (0.5, "word error rate -0.9 to +1.5 points"),
    ):
        test = {"against": "fp32", "z": z, "p": 0.5, "segments": 50}
        headline, _ = _verdict([{**kl, "mapsswe": test}, fp32])
        assert words in headline


def test_comparison_is_computed_from_items():
    chance = random.Random(0)
    words = "abcdefghij"
    items = {"kl": [], "uniform": []}
    for index in range(30):
        for system, rate in (("kl", 0.1), ("uniform", 0.5)):
            heard = [w if chance.random() > rate else "x" for w in words]
            items[system].append(
                {
                    "id": index,
                    "angle": 5,
                    "reference": " ".join(words),
                    "hypothesis": " ".join(heard),
                }
            )
    pair = [{"system": s, "bits": 4, "items": x} for s, x in items.items()]
    test = compare(*pair)
    assert test["against"] == "uniform"
    assert test["z"] < -2 and test["p"] < 0.05
    assert compare({**pair[0], "items": None}, pair[1]) is None
