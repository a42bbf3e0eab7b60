"""The notebooks around the runs of a study: data and policies before, evaluation after them."""

import os
import time
from pathlib import Path

from rich.console import Console

from runner import BUILT_HERE, ROOT, dataset, files, plan, runs, studies, targets
from runner.parameters import Params


def run_notebook(name: str, target: Path, console: Console, **parameters):
    """Execute notebooks/<name>.ipynb into `target`. RuntimeError says where it stopped."""
    import papermill

    target.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        papermill.execute_notebook(
            f"notebooks/{name}.ipynb", os.path.relpath(target), parameters,
            kernel_name="python3", progress_bar=False, cwd=str(ROOT))
    except papermill.PapermillExecutionError as e:
        raise RuntimeError(
            f"{name} stopped: {e.ename}: {e.evalue}\nsee {dataset.shown(target)}") from None
    console.print(f"{name}: {time.monotonic() - began:.0f} s")


def make_inputs(grid: list[Params], folder: Path, console: Console):
    """Make the data and the base policies that a grid needs and that this project can make."""
    for alike in plan.by_inputs(grid):
        make_data(alike[0].data_dir, folder, console)
        make_policy(alike[0], folder, console)


def make_data(data_dir: str, folder: Path, console: Console):
    """Execute 01_data if the data are not there, and are of a source that it knows."""
    try:
        dataset.read_manifest(data_dir)
    except FileNotFoundError:
        if data_dir not in dataset.SOURCES:
            raise
        local_copy = os.environ.get("MATH_DIR") if data_dir == "math" else None
        run_notebook("01_data", folder / "01_data.ipynb", console,
                     source=data_dir, math_dir=local_copy)


def make_policy(p: Params, folder: Path, console: Console):
    """Execute 01b_warm_start if the base policy is not there, and is one that it makes."""
    try:
        runs.check_inputs(p)
    except FileNotFoundError:
        if p.model not in BUILT_HERE:
            raise
        console.print("01b_warm_start makes the base policy, once: two to five minutes on two "
                      "cores for the tiny one")
        run_notebook("01b_warm_start", folder / f"01b_warm_start-s{p.base_seed}.ipynb", console,
                     profile=p.profile, base_seed=p.base_seed)


def evaluate_and_analyse(name: str, profile: str, console: Console):
    """Bring the tables of a study, its analysis and the page of it up to date."""
    study, grid = targets.load(name, profile)
    folder = targets.folder_of(name, profile)
    read = fingerprint(study, grid, "03_eval")
    update("03_eval", folder, read, console, study=name, profile=profile)
    read = fingerprint(study, grid, "03_eval", "04_analysis")
    executed = update("04_analysis", folder, read, console, study=folder.name)
    if executed or not (folder / "04_analysis.html").exists():
        to_html(folder / "04_analysis.ipynb")


def update(notebook: str, folder: Path, read: str, console: Console, **parameters) -> bool:
    """Execute a notebook unless it read the same last time; returns whether it was executed."""
    stamp = folder / f".{notebook}"
    if stamp.exists() and stamp.read_text() == read:
        console.print(f"{notebook} is up to date: nothing to do.")
        return False
    run_notebook(notebook, folder / f"{notebook}.ipynb", console, **parameters)
    files.write_atomically(stamp, read)
    return True


def fingerprint(study: studies.Study, grid: list[Params], *notebooks: str) -> str:
    """A digest of all that these notebooks read: study, finished runs, data, and their code."""
    sources = [*sorted(ROOT.glob("lib/*.py")), *sorted(ROOT.glob("runner/*.py")),
               *(ROOT / f"notebooks/{name}.ipynb" for name in notebooks)]
    code = [files.sha256(path) for path in sources]
    data = sorted({dataset.data_hash(p.data_dir) for p in grid})
    return files.digest([study.model_dump(), _states(grid), data, code], 64)


def _states(grid: list[Params]) -> dict[str, str]:
    """{run_id: status} of a grid; of finished runs, what DONE says instead."""
    states = plan.statuses(grid)
    for p in grid:
        if states[p.folder.name] == "done":
            states[p.folder.name] = (p.folder / "DONE").read_text()
    return states


# Of jupyterlab's page: no script from elsewhere, and figures with the words that describe them.
PAGE = """
{% extends 'lab/index.html.j2' %}
{% block html_head_js %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block data_png scoped %}
{% set png = 'image/png' %}
<div class="jp-RenderedImage jp-OutputArea-output"><img
  alt="{{ output | get_metadata('alt', png) | e }}"
  width="{{ output | get_metadata('width', png) }}"
  src="data:image/png;base64,{{ output.data[png] }}"></div>
{% endblock %}
"""


def to_html(notebook: Path) -> Path:
    """Render an executed notebook beside itself, without code and what is about code.

    The page needs no network.
    """
    import nbformat
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    about_code = {"enabled": True, "remove_cell_tags": ["about-code"]}
    exporter = HTMLExporter(raw_template=PAGE, exclude_input=True,
                            config=Config({"TagRemovePreprocessor": about_code}))
    title = {"metadata": {"name": f"{notebook.parent.name}: analysis"}}
    body, _ = exporter.from_notebook_node(nbformat.read(notebook, 4), title)
    page = notebook.with_suffix(".html")
    page.write_text(body)
    return page
