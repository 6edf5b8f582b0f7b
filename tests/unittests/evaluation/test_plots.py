"""The report's plots: what is drawn where, and what cannot be drawn."""

import pytest
from helpers import make_clusters, make_scores, report_metrics, written

from speechbrain_mpq.evaluation.plots import (
    bits_per_cluster,
    convergence,
    look,
    pareto,
    predicted_and_measured,
    sensitivity_map,
    top_view,
    trace_errors,
    training_curve,
)

pytestmark = pytest.mark.usefixtures("planned_pictures")


def test_known_names_are_drawn_by_block():
    axes = bits_per_cluster(make_clusters(3)).axes[0]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    blocks = [f"tcn_0_{number}" for number in range(3)]
    assert labels == ["conv_in", *blocks, "conv_out"]
    assert [bar.get_height() for bar in axes.patches] == [4] * (3 * 7 + 2)


def test_areas_of_bars_are_bytes():
    clusters = {
        "mask_net.conv_in": {"bits": 2, "parameters": 400},
        "mask_net.tcn_0_0.d_conv": {"bits": 8, "parameters": 100},
    }
    for narrow in (False, True):
        bars = bits_per_cluster(clusters, narrow).axes[0].patches
        areas = [bar.get_width() * bar.get_height() for bar in bars]
        assert areas == [800, 800] and bars[1].get_x() == 400


def test_a_system_looks_the_same_everywhere():
    runs = [sized("kl", 4, 4096, 8.5), sized("uniform", 4, 4096, 8.0)]
    for some in (runs, runs[::-1], [*runs, sized("best", 4, 4096, 8.9)]):
        lines = {line.get_label(): line for line in pareto(some).axes[0].lines}
        for run in some:
            style, line = look(run), lines[run["system"]]
            assert line.get_color() == style["color"]
            assert line.get_marker() == style["marker"]
    colours = {look(sized(name, 4, 1, 1))["color"] for name in ("kl", "hes")}
    assert len(colours) == 2


def test_sizes_have_ticks():
    runs = [sized("kl", bits, bits * 1024, 8) for bits in (2, 3, 4, 8)]
    for narrow in (False, True):
        axes = pareto(runs, narrow=narrow).axes[0]
        assert [tick.get_text() for tick in axes.get_xticklabels()] == [
            *("2", "3", "4", "8")
        ]


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
    mixed = {**make_clusters(2), "lips.fc": {"bits": 2, "parameters": 9}}
    axes = bits_per_cluster(mixed).axes[0]
    assert len(axes.patches) == len(mixed)
    assert axes.get_xticklabels()[-1].get_text() == "lips.fc"


def test_blocks_of_any_network_are_drawn_as_blocks():
    parts = ("self_att", "ffn", "norm")
    clusters = {
        f"encoder.layers.{n}.{part}": {"bits": 4, "parameters": 5}
        for n in range(2)
        for part in parts
    }
    axes = bits_per_cluster(clusters).axes[0]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["layers.0", "layers.1"]
    colours = [bar.get_facecolor() for bar in axes.patches]
    assert colours[:3] == colours[3:] and len(set(colours)) == 3
    (legend,) = axes.figure.legends
    shown = [text.get_text().split()[0] for text in legend.get_texts()]
    assert shown == list(parts)


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
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1.6"]


def test_sensitivity_of_nothing_positive(tmp_path):
    scores = {"clusters": {"a": {"scores": {"2": -1.0}}}}
    html = written(
        tmp_path / "a.html", [report_metrics("kl", 4, 1)], scores=scores
    )
    assert "Method: not named" in html


def test_training_curve_takes_numbers_and_dicts():
    line = training_curve([3.0, 2.0]).axes[0].lines[0]
    assert line.get_xydata().tolist() == [[1, 3], [2, 2]]
    curve = [{"epoch": 5, "loss": 3.0}, {"epoch": 6, "valid": 1.0}]
    panels = training_curve(curve).axes
    assert [axes.get_title(loc="left") for axes in panels] == ["loss", "valid"]
    assert panels[1].lines[0].get_xydata().tolist() == [[6, 1]]


def test_top_view_of_a_planar_array_is_the_full_circle():
    axes = top_view(300, 90).axes[0]
    assert axes.get_ylim()[0] < -1
    assert "270°" in [text.get_text() for text in axes.texts]
    target = next(
        line for line in axes.lines if line.get_label().startswith("target")
    )
    assert target.get_ydata()[0] < 0 < target.get_xdata()[0]


def test_top_view_points_where_the_speakers_are():
    axes = top_view(0, 90).axes[0]
    ends = {
        line.get_label(): line.get_xydata()[0].round(6).tolist()
        for line in axes.lines
        if "°" in line.get_label()
    }
    assert ends == {"target 0°": [0.93, 0], "interferer 90°": [0, 0.93]}


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
    assert [text.get_text() for text in words.texts] == ["4", "2"]
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
