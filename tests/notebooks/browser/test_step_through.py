"""A person steps through the project: `make lab` in Chromium, every main notebook by Run All Cells.

`make browser-test` runs this; `make test` does not (it needs a browser). The project's own files stay as they are: the
notebooks are copies, in a workspace with small data, two short runs and their evaluation.
"""

import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import requests
from playwright.sync_api import sync_playwright

from runner import ROOT

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync")
STUDY = """
title: Two short runs
arms:
  - {}
  - label_flip_rate: 0.25
fixed: {max_steps: 20, eval_interval: 10, save_steps: 10, eval_problems: 16}
seeds: [0]
use_selected: false
eval_samples: 64
"""
SHORT = {"base_seed": 0, "seed": 0, "max_steps": 20, "eval_interval": 10,
         "save_steps": 10, "eval_problems": 16}
TOKEN = "browser-test"
PATIENCE = 600  # seconds for one notebook on a busy machine
PROGRESS = re.compile(r"step +\d+/\d+|\w+ answers: step \d+ of \d+|base-s0: \d+ of \d+ runs")
IN_VIEW = "all => all.map(e => e.getBoundingClientRect()).some(r => r.top > 90 && r.bottom < innerHeight - 25)"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A workspace that is also JupyterLab's root: copies of the notebooks and the start page."""
    work = tmp_path_factory.mktemp("work")
    shutil.copytree(ROOT / "notebooks", work / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (work / "short.yaml").write_text(STUDY)
    return work


@pytest.fixture(scope="module")
def lab(work):
    """The address of a server that `make lab` started; at the end nothing of it may be left."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = f"--no-browser --port={port} --ServerApp.port_retries=0 --IdentityProvider.token={TOKEN}"
    own = {name: str(work / ".jupyter" / name.lower()) for name in  # not the settings of whoever runs the test
           ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR",
            "JUPYTERLAB_WORKSPACES_DIR")}
    env = {k: v for k, v in os.environ.items() if k not in ("PYTEST_CURRENT_TEST", "MAKEFLAGS", "MAKELEVEL")}
    with (work / "lab.log").open("w") as log:
        server = subprocess.Popen(["make", "lab", f"OPTIONS={options} --ServerApp.root_dir={work}"], cwd=ROOT,
                                  env=env | own | {"GRPO_NOISE_WORK": str(work)}, stdout=log, stderr=log)
    address, family = f"http://127.0.0.1:{port}", []
    try:
        wait_for(lambda: server.poll() is not None or answers(address), PATIENCE, "JupyterLab to start")
        assert server.poll() is None, (work / "lab.log").read_text()[-3000:]
        yield address
        family = psutil.Process(server.pid).children(recursive=True)
        requests.post(f"{address}/api/shutdown", headers={"Authorization": f"token {TOKEN}"}, timeout=30)
        server.wait(PATIENCE)
        _, left = psutil.wait_procs(family, timeout=120)
        assert not left, f"JupyterLab left processes behind: {left}"
    finally:
        if server.poll() is None:
            family = [*psutil.Process(server.pid).children(recursive=True), psutil.Process(server.pid)]
        for process in filter(psutil.Process.is_running, family):
            process.kill()


def answers(address):
    """Does the server answer?"""
    try:
        return requests.get(f"{address}/api", timeout=5).ok
    except requests.ConnectionError:
        return False


def wait_for(condition, seconds, what):
    """Poll until the condition holds."""
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, f"waited {seconds} s for {what}"
        time.sleep(0.3)


@pytest.fixture(scope="module")
def page(lab):
    """A page in Chromium as large as a laptop's. It may talk to the server only."""
    chrome = os.environ.get("CHROME") or next(filter(None, map(shutil.which, NAMES)), None)
    if not chrome or not Path(chrome).exists():
        pytest.fail(f"no Chromium found (looked for {', '.join(NAMES)}): install one, on Debian with `apt-get "
                    "install chromium`, or say where it is: make browser-test CHROME=/path/to/chrome", pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chrome, args=FLAGS.split())
        page = browser.new_page(viewport={"width": 1440, "height": 860})
        elsewhere = []
        page.on("request", lambda r: elsewhere.append(r.url) if r.url.startswith("http") and lab not in r.url else None)
        page.on("dialog", lambda d: d.accept())
        page.set_default_timeout(1000 * PATIENCE / 3)
        yield page
        browser.close()
    assert not elsewhere, f"the browser was sent elsewhere: {elsewhere[:5]}"


@pytest.fixture
def open_notebook(page, lab, work):
    """A function that opens a notebook; its kernel ends with the test."""
    yield lambda name: Notebook(page, lab, work, name)
    page.goto("about:blank")
    token = {"Authorization": f"token {TOKEN}"}
    for kernel in requests.get(f"{lab}/api/kernels", headers=token, timeout=30).json():
        requests.delete(f"{lab}/api/kernels/{kernel['id']}", headers=token, timeout=60)


class Notebook:
    """One notebook, open in the browser."""

    def __init__(self, page, lab, work, name):
        self.page, self.lab, self.file = page, lab, work / f"notebooks/{name}.ipynb"
        page.goto(f"{lab}/lab/tree/notebooks/{name}.ipynb?token={TOKEN}&reset")
        self.panel = page.locator(".jp-NotebookPanel:visible")
        self.panel.locator(".jp-CodeCell").first.wait_for()
        wait_for(self.has_kernel, PATIENCE, f"a kernel for {name}")
        self.state("idle").wait_for()
        self.seen = []  # lines and paragraphs of progress, as they changed
        self.in_view = False  # whether such a paragraph was on the screen while a notebook ran

    def has_kernel(self):
        """Whether a kernel waits and the page is connected to it. The kernel's light is "idle" before that as well."""
        token = {"Authorization": f"token {TOKEN}"}
        sessions = requests.get(f"{self.lab}/api/sessions", headers=token, timeout=60).json()
        kernels = [s["kernel"] for s in sessions if s["path"].endswith(self.file.name)]
        named = self.panel.locator(".jp-Toolbar-kernelName").get_by_text("Python 3").count()
        return named and any(k["connections"] and k["execution_state"] == "idle" for k in kernels)

    def state(self, name):
        """The kernel's light in the toolbar."""
        return self.panel.locator(f".jp-Notebook-ExecutionIndicator[data-status='{name}']")

    def set(self, **parameters):
        """Type parameters at the end of the parameters cell, as a person would."""
        index = next(i for i, c in enumerate(self.cells()) if "parameters" in c.metadata.get("tags", []))
        editor = self.panel.locator(f".jp-Cell[data-windowed-list-index='{index}'] .cm-content")
        editor.click()
        self.page.keyboard.press("Control+End")
        self.page.keyboard.insert_text("".join(f"\n{name} = {value!r}" for name, value in parameters.items()))

    def run_all(self):
        """Run → Run All Cells, watched until every cell has run or one failed; then saved. Returns the cells."""
        before = self.prompts()
        self.menu("Run", "Run All Cells")
        wait_for(lambda: self.prompts() != before, PATIENCE, f"{self.file.name} to begin")

        def finished():
            text = " ".join(self.panel.locator(".jp-OutputArea-output").all_text_contents())
            now = PROGRESS.findall(text)
            self.seen += [now] if now not in self.seen else []
            line = self.panel.locator(".jp-RenderedMarkdown.jp-OutputArea-output").filter(has_text=PROGRESS)
            self.in_view = self.in_view or line.evaluate_all(IN_VIEW)
            return self.state("idle").count() and not self.panel.get_by_text("[*]:", exact=True).count()

        wait_for(finished, PATIENCE, f"{self.file.name} to finish")
        self.look()
        before = self.file.stat().st_mtime_ns
        self.page.keyboard.press("Control+s")
        wait_for(lambda: self.file.stat().st_mtime_ns != before and self.cells(), PATIENCE,
                 f"{self.file.name} to be saved")
        return [c for c in self.cells() if c.cell_type == "code"]

    def cells(self):
        """The cells of the file, or none while it is only half written."""
        try:
            return nbformat.read(self.file, as_version=4).cells
        except nbformat.reader.NotJSONError:
            return []

    def prompts(self):
        """What stands before each cell of code: [ ], [*], or how many were executed before it."""
        return self.panel.locator(".jp-InputPrompt").all_text_contents()

    def look(self):
        """Scroll from top to bottom and keep a picture of every screenful, for people."""
        window = self.panel.locator(".jp-WindowedPanel-outer").first
        for i in range(window.evaluate("e => Math.ceil(e.scrollHeight / e.clientHeight)")):
            window.evaluate(f"e => e.scrollTo(0, {i} * e.clientHeight)")
            self.page.wait_for_timeout(200)
            self.page.screenshot(path=self.file.with_name(f"{self.file.stem}-{i:02}.png"))

    def menu(self, *path):
        """Click through the menu bar."""
        self.page.locator(".lm-MenuBar-item").get_by_text(path[0], exact=True).click()
        enabled = self.page.locator(".lm-Menu-item:not(.lm-mod-disabled)")
        enabled.get_by_text(path[1], exact=True).click()


def check(notebook, cells, figures=0):
    """No cell failed, was left out or warned; every figure is on the page."""
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error", f"{cell.id}: {output.ename}: {output.evalue}"
            assert output.get("name") != "stderr", f"{cell.id}: {output.text}"
    counts = [c.execution_count for c in cells]
    assert counts == list(range(counts[0], counts[0] + len(cells))), counts
    widths = notebook.panel.locator(".jp-OutputArea-output img").evaluate_all("all => all.map(i => i.naturalWidth)")
    assert len(widths) == sum("image/png" in o.get("data", {}) for c in cells for o in c.outputs)
    assert len(widths) >= figures and all(w > 200 for w in widths), widths


def test_the_start_page_opens_and_its_links_lead_somewhere(page, lab):
    page.goto(f"{lab}/?token={TOKEN}")  # the address that `make lab` opens
    start = page.locator(".jp-MarkdownViewer")
    start.get_by_role("heading", name="Start here").wait_for()
    targets = re.findall(r"\]\(([^)#]+)\)", (ROOT / "notebooks/START.md").read_text())
    missing = [t for t in targets if not t.startswith("http") and not (ROOT / "notebooks" / t).exists()]
    assert len(targets) >= 10 and not missing
    assert not page.locator(".jp-Dialog").count()  # no question about news
    start.get_by_role("link", name="01_data").first.click()
    page.locator(".jp-NotebookPanel:visible").get_by_role("heading", name="01 · Data").wait_for()


def test_data(open_notebook):
    notebook = open_notebook("01_data")
    notebook.set(n_train=900, n_test=60)
    check(notebook, notebook.run_all())


def test_warm_start_shows_its_progress(open_notebook):
    notebook = open_notebook("01b_warm_start")
    notebook.set(right_steps=150, careless_steps=20, samples=2)
    check(notebook, notebook.run_all())
    assert notebook.in_view and len(notebook.seen) >= 2, notebook.seen  # however fast the machine is
    ends = {"right answers: step 150 of 150", "careless answers: step 20 of 20"}
    assert ends <= set(notebook.seen[-1]), notebook.seen


def test_train_shows_progress_and_a_figure_and_runs_again_with_other_parameters(open_notebook):
    notebook = open_notebook("02_train")
    notebook.set(**SHORT)
    check(notebook, notebook.run_all(), figures=1)
    assert notebook.in_view
    lines = [len(now) for now in notebook.seen]
    assert len(lines) >= 2 and lines == sorted(lines), lines
    notebook.set(label_flip_rate=0.25)  # in the same kernel
    check(notebook, notebook.run_all(), figures=1)
    assert len(list((notebook.file.parents[1] / "outputs/runs").glob("*/DONE"))) == 2


def test_evaluation_shows_its_progress(open_notebook, work):
    notebook = open_notebook("03_eval")
    notebook.set(study=str(work / "short.yaml"))
    check(notebook, notebook.run_all())
    assert notebook.in_view and len(notebook.seen) >= 2 and notebook.seen[-1] == ["base-s0: 2 of 2 runs"], notebook.seen


def test_analysis_shows_its_figures(open_notebook):
    notebook = open_notebook("04_analysis")
    notebook.set(study="short")
    cells = notebook.run_all()
    check(notebook, cells, figures=3)
    assert "Mixed code" not in str([c.outputs for c in cells])  # both runs came from one kernel
