"""notebooks/appendix/gradient at a small size: it runs, and every published arm has its cosine."""

import nbformat
import pandas as pd
import pytest
from conftest import papermill


@pytest.fixture(scope="module")
def executed(workspace, tmp_path_factory):
    """The notebook on few problems, with a base policy that is right often enough to have a gradient."""
    out = tmp_path_factory.mktemp("gradient")
    papermill(workspace, "01b_warm_start", out / "01b.ipynb", base_seed=1, right_steps=600, careless_steps=20,
              samples=2)
    papermill(workspace, "appendix/gradient", out / "gradient.ipynb", base_seeds="1", prompts=48, resamples=10,
              draws=10, train_steps=3)
    return nbformat.read(out / "gradient.ipynb", 4)


def text_of(notebook, cell):
    """All that a cell shows, as plain text."""
    outputs = next(c for c in notebook.cells if c.id == cell).outputs
    return "\n".join(o.get("text", "") + str(o.get("data", {}).get("text/plain", "")) for o in outputs)


def test_every_published_arm_has_its_cosine(executed, workspace):
    cosines = pd.read_csv(workspace / "outputs/gradient/cosines.csv")
    assert set(cosines.study) == {"channels", "controls", "group_size", "mitigations"}
    assert (cosines.cosine.abs() < 1).all()
    channels = cosines[cosines.study == "channels"].set_index("arm").cosine
    assert channels["clean"] == channels.max() > channels["mask .6, rollout"] > channels["flip .3, group"] > 0


def test_checkpoints_of_both_runs_are_measured(executed):
    assert all(name in text_of(executed, "along") for name in ("clean", "flip .3", "share right"))


def test_the_committed_studies_get_their_verdicts(executed):
    assert "holds" in text_of(executed, "verdicts") and "rank correlation" in text_of(executed, "verdict-ranks")


def test_no_output_is_an_error(executed):
    assert not [o for c in executed.cells for o in c.get("outputs", []) if o.output_type == "error"]
