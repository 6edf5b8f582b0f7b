"""The report page: self-contained, true to its numbers, escaped."""

import importlib
import random
import re
import sys

import numpy as np
import pytest

from speechbrain_mpq.evaluation.bit_plots import (
    SUBLAYERS,
    bits_per_cluster,
    sensitivity_map,
)
from speechbrain_mpq.evaluation.curves import (
    convergence,
    pareto,
    predicted_and_measured,
    trace_errors,
)
from speechbrain_mpq.evaluation.examples import marked_words
from speechbrain_mpq.evaluation.marks import compare
from speechbrain_mpq.evaluation.media import equal_loudness, loudest_magnitude
from speechbrain_mpq.evaluation.metrics import summarise
from speechbrain_mpq.evaluation.plots import top_view, training_curve
from speechbrain_mpq.evaluation.report import write_report, write_table
from speechbrain_mpq.evaluation.verdict import verdict

NASTY = "<script>alert('x & y')</script>"


def make_metrics(system, bits, errors, **more):
    """Metrics with `errors` wrong words of 10 in every item."""
    items = [
        {
            "id": f"{index}",
            "angle": (5, 30, 60, 120)[index % 4],
            "si_snr": 7.25 + index % 4,
            "si_snr_mixture": 0.5,
            "pesq": 2.125,
            "reference": " ".join("abcdefghij"),
            "hypothesis": " ".join("x" * errors + "abcdefghij"[errors:]),
        }
        for index in range(8)
    ]
    return {"system": system, "bits": bits, **summarise(items), **more}


def make_example(**more):
    rng = np.random.default_rng(0)
    signals = {
        name: rng.standard_normal(1600) for name in ("mixture", "target", "kl")
    }
    return {
        "id": "item-7",
        "doa_target": 40.0,
        "doa_interferer": 110.0,
        "angle": 70.0,
        "sample_rate": 16000,
        "reference": "set nine now",
        "signals": signals,
        "hypotheses": {"mixture": "", "kl": "set five now"},
        "si_snr": {"mixture": 0.5, "kl": 8.75},
        **more,
    }


def make_clusters(blocks=2):
    names = [
        f"mask_net.tcn_0_{block}.{sublayer}"
        for block in range(blocks)
        for sublayer in SUBLAYERS
    ]
    names = ["mask_net.conv_in", *names, "mask_net.conv_out"]
    return {name: {"bits": 4, "parameters": 10} for name in names}


def make_plan(clusters):
    return {"average_bits": 4.5, "bytes": 3000, "clusters": clusters}


def make_scores(clusters):
    row = {"2": 3.0, "4": 0.5, "8": 0.0}
    return {
        "method": "kl",
        "clusters": {name: {"scores": row} for name in clusters},
    }


def written(path, *arguments, **keywords):
    write_report(path, *arguments, **keywords)
    return path.read_text(encoding="utf-8")


def test_page_is_self_contained(tmp_path):
    clusters = make_clusters()
    html = written(
        tmp_path / "report.html",
        [make_metrics("kl", 4, 2), make_metrics("fp32", 32, 1)],
        make_plan(clusters),
        make_scores(clusters),
        [make_example()],
        [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0}],
    )
    assert "http" not in html and "<script" not in html and "url(" not in html
    addresses = re.findall(r'(?:src|srcset|href)="([^"]{5})', html)
    # 4 figures and a top view in two themes, 3 spectrograms, 3 sounds.
    assert addresses == ["data:"] * (5 * 2 + 6)
    assert html.count("<audio") == 3
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_page_shows_the_numbers(tmp_path):
    systems = [
        make_metrics("kl", 4, 2, average_bits=4.03, model_bytes=3 * 2**20),
        make_metrics("fp32", 32, 1, model_bytes=12 * 2**20),
    ]
    html = written(
        tmp_path / "report.html",
        systems,
        make_plan(make_clusters()),
        None,
        [make_example()],
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
        [make_metrics(NASTY, 4, 1, corpus=NASTY)],
        make_plan({NASTY: {"bits": 2, "parameters": 3}}),
        {"method": NASTY, "clusters": {NASTY: {"scores": {"2": 1.0}}}},
        [example],
        [{NASTY: 1.0}],
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
    html = written(tmp_path / "report.html", [make_metrics("fp32", 32, 1)])
    assert "<h1>" in html and "Look and listen" not in html


def test_broken_signals_are_named_and_nothing_is_written(tmp_path):
    example = make_example(signals={"kl": np.full(1600, np.nan)})
    with pytest.raises(ValueError, match="item-7: kl holds NaN"):
        write_report(
            tmp_path / "report.html",
            [make_metrics("kl", 4, 1)],
            examples=[example],
        )
    assert not list(tmp_path.iterdir())


def test_verdict_follows_the_test():
    fp32 = make_metrics("fp32", 32, 1)
    for z, p, words in (
        (0.5, 0.6, "no significant change"),
        (3.0, 0.003, "significantly more word errors"),
        (-3.0, 0.003, "significantly fewer word errors"),
    ):
        test = {"against": "fp32", "z": z, "p": p, "segments": 50}
        headline, sentences = verdict(
            [make_metrics("kl", 4, 2, mapsswe=test), fp32]
        )
        assert words in headline
        outcome = "is not significant" if p > 0.05 else "is significant"
        assert outcome in sentences[-1]
    untested = verdict([make_metrics("kl", 4, 2), fp32])
    assert "word error rate +10.0 points" in untested[0]
    assert "not tested" in untested[1][-1]


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


def test_known_names_are_drawn_by_block():
    axes = bits_per_cluster(make_clusters(3)).axes[0]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["in", "1-1", "1-2", "1-3", "out"]
    heights = [bar.get_height() for bar in axes.patches if bar.get_height()]
    assert heights == [4] * (3 * 7 + 2)


def test_other_names_are_drawn_in_order():
    clusters = {
        name: {"bits": bits, "parameters": 1}
        for name, bits in (("rnn.weight_ih_l0", 8), ("att", 3), ("fc", 1))
    }
    axes = bits_per_cluster(clusters).axes[0]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == list(clusters)
    assert [bar.get_height() for bar in axes.patches] == [8, 3, 1]
    # One foreign name among known ones is no reason to drop it.
    mixed = {**make_clusters(1), "lips.fc": {"bits": 2, "parameters": 1}}
    assert len(bits_per_cluster(mixed).axes[0].patches) == len(mixed)


def test_sensitivity_leaves_out_what_has_no_logarithm():
    image = sensitivity_map(make_scores(make_clusters())).axes[0].images[0]
    table = image.get_array()
    assert table.shape == (3, 16)
    assert table[0, 0] == 3.0 and table[1, 5] == 0.5
    assert table.mask[2].all() and not table.mask[:2].any()


def test_three_levels_are_1_6_bits(tmp_path):
    clusters = {"a": {"bits": 1.6, "parameters": 5}}
    row = {"scores": {"1.6": 2.0, "2": 1.0, "16": 0.1}}
    axes = sensitivity_map({"clusters": {"a": row}}).axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["1.6 bit", "2 bit", "16 bit"]
    axes = bits_per_cluster(clusters).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "1",
        "1.6",
    ]


def test_sensitivity_of_nothing_positive(tmp_path):
    scores = {"clusters": {"a": {"scores": {"2": -1.0}}}}
    html = written(
        tmp_path / "a.html", [make_metrics("kl", 4, 1)], scores=scores
    )
    assert "Method: not named" in html


def test_training_curve_takes_numbers_and_dicts():
    line = training_curve([3.0, 2.0]).axes[0].lines[0]
    assert line.get_xydata().tolist() == [[1, 3], [2, 2]]
    curve = [{"epoch": 5, "loss": 3.0}, {"epoch": 6, "valid": 1.0}]
    panels = training_curve(curve).axes
    assert [axes.get_title(loc="left") for axes in panels] == ["loss", "valid"]
    assert panels[1].lines[0].get_xydata().tolist() == [[6, 1]]


def test_top_view_points_where_the_speakers_are():
    axes = top_view(0, 90).axes[0]
    ends = {
        line.get_label(): line.get_xydata()[0].round(6).tolist()
        for line in axes.lines
        if "°" in line.get_label()
    }
    assert ends == {"target 0°": [0.93, 0], "interferer 90°": [0, 0.93]}


def test_signals_get_one_loudness():
    rng = np.random.default_rng(1)
    noise = rng.standard_normal(100)
    scaled = equal_loudness({"a": noise, "b": 1e-3 * noise, "c": np.zeros(100)})
    assert np.allclose(scaled["a"], scaled["b"])
    assert np.abs(scaled["a"]).max() == pytest.approx(0.9)
    assert not scaled["c"].any()
    assert loudest_magnitude([scaled["c"]], 16000) > 0
    with pytest.raises(ValueError, match="a is not"):
        equal_loudness({"a": np.zeros((2, 3))})


def test_marked_words_are_escaped():
    assert marked_words("a", "<b>") == "<mark>&lt;b&gt; <s>a</s></mark>"
    assert marked_words("a <b>", "a") == "a <del>&lt;b&gt;</del>"


def sized(system, bits, size, si_snr, seed=1):
    """Metrics of which only the average and the size matter."""
    average = {"si_snr": si_snr, "pesq": 2.0, "wer": 30 - si_snr}
    return {
        "system": system,
        "bits": bits,
        "seed": seed,
        "model_bytes": size,
        "average": average,
    }


def test_pareto_shows_sizes_and_the_chosen_point():
    runs = [
        sized("kl", 4, 4096, 8.5),
        sized("kl", 4, 4096, 8.7, seed=2),
        sized("kl", 2, 2048, 6.0),
        sized("uniform", 4, 4096, 8.0),
        sized("fp32", 32, 32768, 9.0),
        sized("unknown", 4, None, 9.0),
    ]
    points = [{"bytes": 2048, "score": 3.0}, {"bytes": 4096, "score": 1.0}]
    figure = pareto(runs, {"points": points, "chosen": points[1]})
    quality, words, predicted = figure.axes
    lines = {line.get_label(): line for line in quality.lines}
    assert lines["kl"].get_xydata().tolist() == [[2, 6], [4, 8.6]]
    assert lines["fp32"].get_ydata()[0] == 9
    assert "unknown" not in lines
    (ring,) = [line for line in quality.lines if line.get_ms() == 14]
    assert ring.get_xydata().tolist() == [[4, 8.6]]
    assert [text.get_text() for text in words.texts] == ["4", "2", "4"]
    assert predicted.lines[-1].get_xydata().tolist() == [[4, 1]]
    without = pareto(runs, own=False)
    assert len(without.axes) == 2
    assert not [x for x in without.axes[0].lines if x.get_ms() == 14]


def test_predicted_and_measured_copes_with_what_has_no_logarithm():
    rows = [
        {"plan": "a", "predicted": -1.0, "measured": 0.5},
        {"plan": "b", "predicted": None, "measured": 0.5},
    ]
    axes = predicted_and_measured(rows).axes[0]
    assert axes.get_xscale() == "linear"
    assert [text.get_text() for text in axes.texts] == ["a"]


def test_convergence_of_a_residual_that_vanishes():
    rows = [
        {"iteration": i, "primal_residual": r, "valid_loss": -8.0}
        for i, r in ((1, 0.5), (2, 0.0))
    ]
    rows.append({**rows[-1], "iteration": 3, "valid_loss": None})
    residual, loss = convergence(rows).axes
    assert residual.get_yscale() == "linear"
    assert loss.lines[0].get_xydata().tolist() == [[1, -8], [2, -8]]


def test_traces_below_zero_are_hollow():
    traces = {
        "a": {"trace": 5.0, "standard_error": 1.0},
        "b": {"trace": -2.0, "standard_error": 3.0},
    }
    hollow = trace_errors(traces).axes[0].lines[-1]
    assert hollow.get_xydata().tolist() == [[1, 3]]


def test_page_with_everything_optional(tmp_path):
    clusters = make_clusters()
    scores = make_scores(clusters)
    row = {"trace": 1.0, "standard_error": 0.5}
    scores["details"] = {"traces": dict.fromkeys(clusters, row)}
    points = [{"bytes": 2048, "score": 3.0}]
    html = written(
        tmp_path / "report.html",
        [make_metrics("kl", 4, 2, model_bytes=3000)],
        make_plan(clusters),
        scores,
        neighbours=[make_metrics("uniform", 4, 3, model_bytes=3000)],
        ceiling={"am_gm_db": 9.25, "limited_db": 6.0, "planned_db": 5.75},
        pareto={"points": points, "chosen": points[0]},
        additivity=[{"plan": "kl 4", "predicted": 1.0, "measured": 1.5}],
        admm=[{"iteration": 1, "primal_residual": 0.1, "valid_loss": -8.0}],
    )
    for shown in (
        *("Size against quality", "at most 9.2 dB less damage"),
        *("Within the candidate bits it is 6.0 dB", "do 5.8 dB less"),
        *("Hessian trace", "Predicted and measured", "Convergence of ADMM"),
    ):
        assert shown in html, shown


def test_table_page_escapes_and_shows_differences(tmp_path):
    runs = [
        make_metrics(system, 4, errors, seed=seed, model_bytes=1000)
        for system, errors in ((NASTY, 1), ("uniform", 2))
        for seed in (1, 2)
    ]
    write_table(tmp_path / "table.html", runs)
    html = (tmp_path / "table.html").read_text("utf-8")
    assert "<script" not in html and "&lt;script&gt;" in html
    assert "Differences at equal bytes" in html
    assert "<td>+10.0 ± 0.0</td>" in html
