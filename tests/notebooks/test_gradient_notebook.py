"""notebooks/appendix/gradient at a small size: it runs, and every published arm has its cosine."""

import re

import nbformat
import pandas as pd
import pytest

from lib import report
from runner import ROOT


@pytest.fixture(scope="module")
def executed(kernel, workspace, tmp_path_factory):
    """The notebook on few problems, with the workspace's base policy: it is right often enough to have a gradient."""
    out = tmp_path_factory.mktemp("gradient") / "gradient.ipynb"
    kernel.execute("appendix/gradient", out, base_seeds="0", prompts=64, resamples=10, draws=10,
                   temperatures="1.0", train_steps=2, projected=4)
    return nbformat.read(out, 4)


def text_of(notebook, cell):
    """All that a cell shows, as plain text."""
    outputs = next(c for c in notebook.cells if c.id == cell).outputs
    return "\n".join(o.get("text", "") + str(o.get("data", {}).get("text/plain", "")) for o in outputs)


def test_every_published_arm_has_its_cosine(executed, workspace):
    cosines = pd.read_csv(workspace / "outputs/gradient/cosines.csv")
    assert set(cosines.study) == {"tiny", "channels", "controls", "group_size", "mitigations"}
    assert (cosines.cosine.abs() < 1).all() and (cosines.low <= cosines.high).all()
    channels = cosines[cosines.study == "channels"].set_index("arm").cosine
    assert channels["clean"] == channels.max() > channels["mask .6, rollout"] > channels["flip .3, group"] > 0


def test_arms_with_a_kl_term_are_covered_and_those_with_two_steps_a_batch_are_not(executed, workspace):
    cosines = pd.read_csv(workspace / "outputs/gradient/cosines.csv")
    controls = cosines[cosines.study == "controls"].set_index("arm").cosine
    assert controls["clean, beta=0.05, 1 steps a batch"] == controls["clean, beta=0.0, 1 steps a batch"] > 0
    assert not controls.index.str.contains("2 steps").any() and "format only" not in controls
    assert "KL, beta .05" in set(cosines[cosines.study == "mitigations"].arm)


def test_checkpoints_of_both_runs_are_measured(executed):
    assert all(name in text_of(executed, "along") for name in ("clean", "flip .3", "share right"))


def test_the_committed_studies_get_their_verdicts(executed):
    assert "holds" in text_of(executed, "verdicts") and "rank correlation" in text_of(executed, "verdict-ranks")


def test_no_output_is_an_error(executed):
    assert not [o for c in executed.cells for o in c.get("outputs", []) if o.output_type == "error"]


def test_the_results_page_has_the_published_cosines():
    measured = report.step_cosines(ROOT / "outputs/channels")
    lines = (ROOT / "docs/results.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    shown = {row[0]: re.findall(r"\.\d\d", row[5]) for row in rows if len(row) == 7}
    shown = {name: cosines for name, cosines in shown.items() if cosines}
    assert len(shown) == 6
    for name, cosines in shown.items():
        arms = {"clean": ["clean"], "asymmetric": ["asymmetric .15/.45, rollout", "asymmetric .15/.45, group"]}.get(
            name, [f"{name}, rollout", f"{name}, group"])
        assert cosines == [f"{measured[arm]:.2f}"[1:] for arm in arms[:len(cosines)]], name
