"""lib.plots draws what the frames say, and lib.labels names it where there is room."""

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from nbclient import NotebookClient

from lib import labels, plots

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_a_notebook_shows_every_figure_once():
    draw = ("metrics = pd.DataFrame({'arm': 'clean', 'run_id': 'a', 'step': [1, 2], 'clean_mean': 0.5, "
            "'observed_mean': 0.5})\nfig = plots.training_curves(metrics)")
    own = "import matplotlib.pyplot as plt\nplt.plot([1, 2])"
    cells = ["import pandas as pd\nfrom lib import plots", draw, draw, own]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    NotebookClient(notebook, kernel_name="python3").execute()
    assert [sum("image/png" in o.data for o in c.outputs) for c in notebook.cells] == [0, 1, 1, 1]


def table():
    """Results of a clean arm, two flips and one mask, as the analysis makes them."""
    rows = pd.DataFrame({"arm": ["clean", "flip 0.2", "flip 0.4", "mask 0.4"],
                         "channel": ["clean", "flip", "flip", "mask"], "rate": [0, 0.2, 0.4, 0.4],
                         "named": False, "reference": "clean",
                         "J": [1, 0.6, 0.2, 0.6], "estimate": [0.8, 0.7, 0.5, 0.75]})
    rows["low"], rows["high"] = rows["estimate"] - 0.05, rows["estimate"] + 0.05
    rows["difference"] = rows["estimate"] - 0.8
    rows["difference_low"], rows["difference_high"] = rows["difference"] - 0.04, rows["difference"] + 0.04
    rows["p_holm"], rows["mde"] = [1, 0.03, 0.001, 0.2], 0.06
    return rows


def crowd(n=9):
    """A clean arm and n named arms of one J whose accuracies lie close together."""
    rows = pd.DataFrame({"arm": [f"arm number {i}" for i in range(n)], "channel": [f"noise {i}" for i in range(n)],
                         "rate": 0.3, "J": 0.4, "estimate": 0.6 + 0.002 * np.arange(n)})
    rows = pd.concat([table().iloc[:1], rows], ignore_index=True).assign(named=True)
    return rows.assign(low=rows["estimate"] - 0.01, high=rows["estimate"] + 0.01)


SEEDS = pd.DataFrame({"arm": ["clean", "clean", "flip 0.2"], "channel": ["clean", "clean", "flip"],
                      "rate": [0, 0, 0.2], "J": [1, 1, 0.6], "value": [0.79, 0.81, 0.71]})


def is_marked(line):
    """Whether a line of the axes has points."""
    return line.get_marker() not in ("None", None, "", "|")


def points(ax, faint=False):
    """The positions (x, y) of the points in the axes: the estimates, or the faint ones of single runs."""
    lines = [line for line in ax.lines if is_marked(line) and (line.get_markersize() < 4) == faint]
    return {(round(float(x), 6), round(float(y), 6)) for line in lines for x, y in zip(*line.get_data(), strict=True)}


def bars(ax):
    """The ends of all bars as ((x, y), (x, y)); a bar without bounds is left out."""
    segments = [path.vertices for c in ax.collections for path in c.get_paths() if len(path.vertices) == 2]
    return {tuple(map(tuple, s.round(6).tolist())) for s in segments if np.isfinite(s).all()}


def texts(ax):
    """The labels in the axes and where they stand, as (x, y) of the data."""
    return {text.get_text(): text.get_position() for text in ax.texts}


def names(ax):
    """The names of the rows from top to bottom."""
    assert ax.yaxis_inverted()
    return [t.get_text() for t in ax.get_yticklabels()]


def legend(fig):
    """The words of a figure's one legend."""
    return [t.get_text() for t in fig.legends[0].get_texts()]


# ---- accuracy over an axis of numbers


@pytest.mark.parametrize("draw, x", [(plots.noise_curve, "rate"), (plots.j_axis, "J")])
def test_accuracies_stand_at_their_own_numbers_with_their_intervals(draw, x):
    rows = table()
    ax = draw(rows, base=0.3).axes[0]
    assert points(ax) == set(zip(rows[x].round(6), rows["estimate"], strict=True))
    assert bars(ax) == {((v, round(low, 6)), (v, round(high, 6)))
                        for v, low, high in zip(rows[x], rows["low"], rows["high"], strict=True)}
    assert any(np.allclose(line.get_ydata(), 0.3) for line in ax.lines)


@pytest.mark.parametrize("draw, x", [(plots.noise_curve, "rate"), (plots.j_axis, "J")])
def test_every_run_is_a_faint_point(draw, x):
    ax = draw(table(), seeds=SEEDS).axes[0]
    assert points(ax, faint=True) == set(zip(SEEDS[x], SEEDS["value"], strict=True))


def test_only_a_channel_of_several_rates_has_a_line_and_it_begins_at_clean():
    ax = plots.noise_curve(table()).axes[0]
    lines = [line.get_xydata() for line in ax.lines if not is_marked(line) and len(line.get_xdata()) > 2]
    assert len(lines) == 1
    np.testing.assert_allclose(lines[0], [(0, 0.8), (0.2, 0.7), (0.4, 0.5)])


def test_channels_are_named_at_their_highest_rate():
    ax = plots.noise_curve(table(), base=0.3).axes[0]
    found = texts(ax)
    assert set(found) == {"clean", "flip", "mask", "base policy, before training"}
    for name, (x, y) in {"flip": (0.4, 0.5), "mask": (0.4, 0.75), "clean": (0, 0.8)}.items():
        pixels = ax.transData.transform([found[name], (x, y)])
        assert np.hypot(*(pixels[0] - pixels[1])) < 100, name
    leaders = [line.get_xydata()[0] for line in ax.lines if line.get_linewidth() == 0.6]
    assert {tuple(xy.round(6)) for xy in leaders} == {(0.4, 0.5), (0.4, 0.75), (0, 0.8)}


def test_named_arms_stand_under_their_names():
    rows = table().assign(named=[False, True, True, False], arm=["clean", "weak", "strong", "mask 0.4"])
    assert set(texts(plots.noise_curve(rows).axes[0])) == {"clean", "weak", "strong", "mask"}


@pytest.mark.parametrize("draw", [plots.noise_curve, plots.j_axis])
def test_labels_in_a_crowd_keep_apart_inside_and_in_order(draw):
    ax = draw(crowd()).axes[0]
    boxes = {t.get_text(): t.get_window_extent() for t in ax.texts}
    assert len(boxes) == 10
    for name, box in boxes.items():
        assert box.count_overlaps([other for text, other in boxes.items() if text != name]) == 0, name
        assert ax.bbox.contains(*box.min) and ax.bbox.contains(*box.max), name
    heights = [boxes[f"arm number {i}"].y0 for i in range(9)]
    assert heights == sorted(heights)


def test_controls_stand_apart_and_have_no_rate():
    control = table().iloc[[3]].assign(channel=["format only"], rate=0, J=np.nan, estimate=0.4)
    seeds = pd.DataFrame({"channel": ["format only"], "rate": [0.0], "value": [0.41]})
    ax = plots.noise_curve(pd.concat([table(), control], ignore_index=True), seeds=seeds).axes[0]
    (x,) = [x for x, y in points(ax) if y == 0.4]
    assert x > 1.2 * 0.4 and points(ax, faint=True) == {(x, 0.41)}
    assert max(ax.get_xticks()) <= 0.4 + 1e-6
    assert {"format only", "no one rate"} <= set(texts(ax))


def test_one_seed_draws_a_point_without_a_bar():
    ax = plots.noise_curve(table().assign(low=np.nan, high=np.nan)).axes[0]
    assert {y for _, y in points(ax)} == {0.8, 0.7, 0.5, 0.75} and not bars(ax)


def test_a_single_arm_keeps_its_axes_around_it():
    ax = plots.noise_curve(table().iloc[:1]).axes[0]
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    assert left < -0.01 and right > 0.01 and low < 0.75 and high > 0.85


def test_j_falls_to_the_right():
    left, right = plots.j_axis(table()).axes[0].get_xlim()
    assert left > right


def test_a_common_axis_needs_a_J_that_varies_and_alone():
    with pytest.raises(ValueError, match="J does not vary"):
        plots.j_axis(table().assign(J=[0.4, 1 - 0.6, 1 - 0.3 - 0.3, 0.4]))  # equal but for rounding
    with pytest.raises(ValueError, match="share a channel and a J"):
        plots.j_axis(table().assign(channel=["clean", "flip", "mask", "mask"], J=[1, 0.4, 0.2, 0.2]))
    assert len(points(plots.j_axis(table().assign(J=[1, 0.6, 0.2, np.nan])).axes[0])) == 3


def test_ticks_of_a_narrow_range_differ():
    rows = table().assign(estimate=[0.8, 0.801, 0.802, 0.8005], low=np.nan, high=np.nan)
    fig = plots.noise_curve(rows)
    fig.canvas.draw()
    ticks = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert len(set(ticks)) == len(ticks) > 3 and all(float(t) > 79 for t in ticks)


# ---- a row an arm


def test_arm_accuracies_are_sorted():
    ax = plots.arm_accuracies(table(), base=0.3, seeds=SEEDS).axes[0]
    assert names(ax) == ["clean", "mask 0.4", "flip 0.2", "flip 0.4"]
    assert points(ax) == {(0.8, 0), (0.75, 1), (0.7, 2), (0.5, 3)}
    assert points(ax, faint=True) == {(0.79, 0), (0.81, 0), (0.71, 2)}
    assert ((0.75, 0), (0.85, 0)) in bars(ax) and ((0.45, 3), (0.55, 3)) in bars(ax)
    assert any(np.allclose(line.get_xdata(), 0.3) for line in ax.lines)


def test_differences_are_sorted_and_only_what_is_significant_is_filled():
    fig = plots.paired_differences(table().iloc[1:])
    ax = fig.axes[0]
    assert names(ax) == ["mask 0.4", "flip 0.2", "flip 0.4"]
    filled = {line.get_xdata()[0]: line.get_markerfacecolor() != "white" for line in ax.lines if is_marked(line)}
    assert {round(x, 6): is_filled for x, is_filled in filled.items()} == {-0.05: False, -0.1: True, -0.3: True}
    assert bars(ax) == {((-0.09, 0), (-0.01, 0)), ((-0.14, 1), (-0.06, 1)), ((-0.34, 2), (-0.26, 2))}
    grey = [(patch.get_x(), patch.get_width()) for patch in ax.patches]
    np.testing.assert_allclose(grey, [(-0.06, 0.12)] * 3)
    assert [words.split(":")[0] for words in legend(fig)] == ["filled", "hollow", "grey"]
    assert ax.get_xlabel() == "difference from clean, percentage points"


def test_a_difference_without_a_test_is_hollow():
    ax = plots.paired_differences(table().iloc[1:2].assign(p_holm=np.nan, mde=np.nan)).axes[0]
    assert [line.get_markerfacecolor() for line in ax.lines if is_marked(line)] == ["white"]


def test_differences_from_several_references_have_a_panel_each():
    rows = table().iloc[1:].assign(reference=["clean | a=1", "flip 0.2 | a=1", "clean | a=1"])
    fig = plots.paired_differences(rows)
    assert [ax.get_title("left") for ax in fig.axes] == ["compared with clean", "compared with flip 0.2"]
    assert [names(ax) for ax in fig.axes] == [["mask 0.4", "flip 0.2"], ["flip 0.4"]]
    assert points(fig.axes[0]) == {(-0.05, 0), (-0.1, 1)} and points(fig.axes[1]) == {(-0.3, 0)}
    assert fig.axes[1].get_xlabel() == "difference from the reference, percentage points"
    ax = plots.paired_differences(rows.assign(reference="no noise")).axes[0]
    assert ax.get_xlabel() == "difference from no noise, percentage points"
    with_setting, named = (plots.paired_differences(rows.assign(reference="a | b", named=named)).axes[0]
                           for named in (False, True))
    assert with_setting.get_xlabel() == "difference from a, percentage points"
    assert named.get_xlabel() == "difference from a | b, percentage points"


def test_a_row_is_a_chain_of_difficulties():
    rows = pd.DataFrame({"arm": ["a", "a", "b", "b"], "named": False, "reference": "clean",
                         "difficulty": ["Level 2", "Level 1"] * 2, "difference": [-0.3, -0.1, -0.02, -0.05]})
    fig = plots.by_difficulty(rows.assign(low=rows["difference"] - 0.01, high=rows["difference"] + 0.01))
    ax = fig.axes[0]
    assert names(ax) == ["b", "a"] and legend(fig) == ["difficulty 1", "difficulty 2"]
    height = {x: y for x, y in points(ax)}
    assert round(height[-0.05]) == round(height[-0.02]) == 0 and round(height[-0.1]) == round(height[-0.3]) == 1
    assert height[-0.05] < height[-0.02] and height[-0.1] < height[-0.3]  # easy above hard
    assert ((-0.31, height[-0.3]), (-0.29, height[-0.3])) in bars(ax)
    chains = [sorted(line.get_xdata()) for line in ax.lines if not is_marked(line) and len(set(line.get_xdata())) > 1]
    assert sorted(chains) == [[-0.3, -0.1], [-0.05, -0.02]]


def test_theory_beside_measurement_draws_a_panel_a_quantity_and_a_row_an_arm():
    rows = pd.DataFrame([{"arm": f"{c}, named", "channel": c, "quantity": q, "predicted": x, "measured": x + 0.1,
                          "se": 0.05} for q in plots.QUANTITIES for c, x in (("flip", 0.2), ("mask", 0.4))])
    fig = plots.beside_theory(rows)
    titles = [ax.get_title("left").replace("\n", " ") for ax in fig.axes]
    assert titles == list(plots.QUANTITIES.values())
    assert names(fig.axes[0]) == ["flip, named", "mask, named"]
    for ax in fig.axes:
        assert points(ax) == {(0.3, 0), (0.5, 1)}
        assert bars(ax) == {((0.202, 0), (0.398, 0)), ((0.402, 1), (0.598, 1))}
        (predicted,) = [line.get_xydata() for line in ax.lines if line.get_marker() == "|"]
        np.testing.assert_allclose(predicted, [(0.2, 0), (0.4, 1)])


@pytest.mark.parametrize("value", [0.0, 0.4])
def test_theory_that_fits_but_for_rounding_is_drawn_as_fitting(value):
    rows = pd.DataFrame([{"arm": "clean", "channel": "clean", "quantity": q, "predicted": value + 1e-17,
                          "measured": value - 1e-16, "se": 0.0} for q in plots.QUANTITIES])
    left, right = plots.beside_theory(rows).axes[0].get_xlim()
    assert left <= 0 and right > value and right - left > 0.01


# ---- training, looks, files


def test_training_curves_mean_and_band():
    metrics = pd.DataFrame({"arm": "clean", "run_id": ["a", "a", "b", "b"], "step": [1, 2, 1, 2],
                            "clean_mean": [0.2, 0.4, 0.4, 0.8], "observed_mean": 0.5})
    ax = plots.training_curves(metrics).axes[0]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [0.3, 0.6])
    corners = {tuple(xy) for xy in ax.collections[0].get_paths()[0].vertices.round(6).tolist()}
    assert {(1, 0.2), (1, 0.4), (2, 0.4), (2, 0.8)} == corners
    assert ax.get_title("left") == "clean, 2 runs"


def test_training_curves_smooth_long_runs_and_hide_empty_panels():
    steps = np.arange(1, 61)
    metrics = pd.concat(pd.DataFrame({"arm": arm, "run_id": arm, "step": steps, "clean_mean": steps % 2,
                                      "observed_mean": 0.5}) for arm in "abcd")
    fig = plots.training_curves(metrics, ["b", "c", "d", "a"])
    assert [ax.get_title("left")[0] for ax in fig.axes if ax.get_visible()] == ["b", "c", "d", "a"]
    inner = fig.axes[0].lines[0].get_ydata()[1:-1]  # means over three steps of 0, 1, 0, 1, ...
    assert set(inner.round(3)) == {0.333, 0.667}


def test_kinds_differ_in_colour_and_in_shape_and_keep_both_at_every_noise_level():
    looks = [*plots.KINDS.values(), plots.OTHER]
    assert len({colour for colour, _ in looks}) == len({shape for _, shape in looks}) == len(looks)
    assert plots.look("flip") == plots.look("flip (group)") == plots.look("flip (prompt)")
    assert plots.look("asymmetric (b=0.45) (group)") == plots.look("asymmetric (b=0.1)") != plots.look("mask")


def test_noise_levels_differ_in_filling():
    channels = ["clean", "flip", "flip (group)", "flip (prompt)"]
    ax = plots.noise_curve(table().assign(channel=channels)).axes[0]
    drawn = [line for line in ax.lines if is_marked(line)]
    fillings = {(line.get_fillstyle(), line.get_markerfacecolor() == "white") for line in drawn[1:]}
    assert fillings == {("full", False), ("left", False), ("full", True)}


@pytest.mark.parametrize("draw", [plots.noise_curve, plots.j_axis, plots.arm_accuracies, plots.paired_differences])
def test_no_text_is_smaller_than_nine_points(draw):
    fig = draw(table())
    fig.canvas.draw()
    assert min(t.get_fontsize() for t in fig.findobj(matplotlib.text.Text) if t.get_text()) >= 9
    assert fig.get_figwidth() == 8


def test_saved_figures_are_the_same_bytes(tmp_path):
    first, second = (plots.save(plots.noise_curve(table()), tmp_path / f"{i}.png") for i in (1, 2))
    assert first.read_bytes() == second.read_bytes()
    assert b"Software" not in first.read_bytes() and b"matplotlib" not in first.read_bytes()


@given(arrays(float, st.integers(1, 12), elements=st.floats(-1e3, 1e3)), st.floats(0.1, 50))
def test_labels_spread_no_further_than_they_must(heights, distance):
    heights = np.sort(heights)
    moved = labels.spread(heights, distance)
    assert (np.diff(moved) >= distance - 1e-9).all()
    if (np.diff(heights) >= distance).all():
        np.testing.assert_allclose(moved, heights, atol=1e-9)
    assert moved.min() <= heights.max() and moved.max() >= heights.min()
