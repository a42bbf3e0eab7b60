"""What holds the project together: locks that agree, clean notebooks, a README that names what exists."""

import ast
import json
import re
import runpy
import subprocess
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from runner import ROOT, parameters

NOTEBOOKS = sorted(p for p in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
SOURCES = [p for p in NOTEBOOKS if p.parent.name != "helpers"]


def locked(name: str) -> dict[str, str]:
    """Package -> version of a lock for this Python; every line must be an exact pin."""
    pins = {}
    for line in (ROOT / f"requirements/{name}.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            requirement = Requirement(line)
            assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), f"{name}.txt: {line} is not an exact pin"
            if requirement.marker is None or requirement.marker.evaluate():
                pins[canonicalize_name(requirement.name)] = str(requirement.specifier)[2:]
    return pins


def declared(*extras: str) -> list[Requirement]:
    """Requirements of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(r) for r in project["dependencies"] + [r for e in extras for r in
                                                               project["optional-dependencies"][e]]]


@pytest.mark.parametrize("lock, extras", [("cpu", ["test"]), ("gpu", ["test", "gpu"])])
def test_the_lock_satisfies_pyproject(lock, extras):
    pins = locked(lock)
    for requirement in declared(*extras):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not in requirements/{lock}.txt: make lock"
        assert requirement.specifier.contains(pins[name]), f"{name}: {pins[name]} is not {requirement.specifier}"


def test_the_two_locks_agree_where_results_depend_on_it():
    cpu, gpu = locked("cpu"), locked("gpu")
    for name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "ray", "math-verify"):
        assert cpu[name] == gpu[name]


def test_conda_users_get_the_versions_of_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert "-r requirements/cpu.txt" in pip
    pins = locked("cpu")
    for line in pip:
        if not line.startswith("-"):
            requirement = Requirement(line)
            assert str(requirement.specifier) == "==" + pins[canonicalize_name(requirement.name)], line
    python = next(d for d in environment["dependencies"] if str(d).startswith("python="))
    supported = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert Requirement(f"python{supported}").specifier.contains(python.removeprefix("python=") + ".0")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_valid_and_in_order(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    ids = [c["id"] for c in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_source_notebooks_carry_no_outputs(path):
    code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert not any(c.outputs or c.execution_count for c in code)


# --- how the notebooks read -------------------------------------------------------------------------------------

def is_parameters(cell) -> bool:
    """Whether papermill puts a run's parameters behind this cell."""
    return "parameters" in cell.metadata.get("tags", [])


def lines(cell) -> list[str]:
    """The lines of a cell that are not blank."""
    return [line for line in cell.source.splitlines() if line.strip()]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_read_as_prose_with_code(path):
    cells = nbformat.read(path, as_version=4).cells
    assert all(c.source.strip() for c in cells), "an empty cell"
    code = [c for c in cells if c.cell_type == "code" and not is_parameters(c)]
    words = sum(len(c.source.split()) for c in cells if c.cell_type == "markdown")
    assert words >= 2 * sum(len(lines(c)) for c in code), "fewer than two words of prose for a line of code"
    for cell in code:
        assert len(lines(cell)) <= 25, f"cell {cell.id} has {len(lines(cell))} lines: split it"
    kinds = "".join("c" if c.cell_type == "code" else "." for c in cells)
    assert "ccccc" not in kinds, f"five cells of code in a row after cell {kinds.index('ccccc')}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_notebooks_open_with_question_answer_and_parameters(path):
    cells = nbformat.read(path, as_version=4).cells
    assert re.match(r"# .+\n\n\*\*Question\.\*\* .+\n\n\*\*Answer\.\*\* ", cells[0].source, re.S)
    found = [c for c in cells if is_parameters(c)]
    first = next(c for c in cells if c.cell_type == "code")
    assert found == [first], "the first cell of code is the one and only parameters cell"
    for line in found[0].source.splitlines():
        assert re.fullmatch(r"\w+ = .*\S +# \S.*", line), f"not one commented parameter: {line}"


def test_no_definition_stands_in_two_notebooks():
    known = {"simulate": "statistics"}  # of a study; that of theory simulates groups of completions
    places, tests = {}, ["tests", *(p.stem for p in (ROOT / "tests").glob("*.py"))]  # nor is code of the tests used
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                assert not re.search(rf"^\s*(from|import) ({'|'.join(tests)})\b", cell.source, re.M), path.stem
                for node in ast.walk(ast.parse(cell.source)):
                    if isinstance(node, ast.FunctionDef | ast.ClassDef) and known.get(node.name) != path.stem:
                        other = places.setdefault(node.name, path.stem)
                        assert other == path.stem, f"{node.name} is defined in {other} and in {path.stem}: to lib"


def test_executed_notebooks_were_executed_in_order():
    executed = subprocess.run(["git", "ls-files", "outputs/*.ipynb"], cwd=ROOT, capture_output=True, text=True).stdout
    for path in [*map(ROOT.joinpath, executed.split()), *(ROOT / "notebooks/helpers").glob("*.ipynb")]:
        code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        assert [c.execution_count for c in code] == list(range(1, len(code) + 1)), path.relative_to(ROOT)


def test_the_hook_and_the_lock_have_one_ruff():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    ruff = next(h for h in hooks if h["id"] == "ruff")
    assert ruff["additional_dependencies"] == [f"ruff=={locked('cpu')['ruff']}"]


def test_the_training_notebook_offers_every_parameter():
    cells = nbformat.read(ROOT / "notebooks/02_train.ipynb", as_version=4).cells
    cell = next(c for c in cells if is_parameters(c))
    names = set(re.findall(r"^(\w+) = \S+ +# \S", cell.source, re.M))  # one parameter a line, each with a comment
    # a channel of one's own (docs/recipe-channel.md) works without a line there
    assert names | parameters.ADDED_LATER == set(parameters.Params.model_fields)


def test_nothing_names_a_machine_or_a_registry():
    bad = re.compile(r"/(?:home|root|Users|work)/\w|/tmp/\w+/|pypi\.org|pythonhosted\.org")
    for folder in ("lib", "runner", "tests", "params", "docs", "notebooks", "outputs", "requirements"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".yaml", ".ipynb", ".csv", ".txt", ".html") and "runs" not in path.parts:
                if path.name == "test_project.py":
                    continue
                found = bad.search(path.read_text(errors="ignore"))
                assert not found, f"{path.relative_to(ROOT)}: {found[0]}"


def test_the_readme_names_what_exists():
    text = (ROOT / "README.md").read_text()
    endings = "ipynb|yaml|py|png|csv|html|txt"
    for name in re.findall(rf"(?:notebooks|params|outputs|lib|runner|requirements)/[\w./-]+\.(?:{endings})", text):
        if "out" not in name.split("/")[-1] and "<" not in name:
            assert (ROOT / name).exists(), name
    for target in re.findall(r"^\s*make (\w+)", text, re.M):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target


def test_the_start_page_opens_the_headline_study_and_lists_all():
    text = (ROOT / "notebooks/START.md").read_text()
    studies = re.findall(r"\]\(\.\./outputs/([\w.-]+)/04_analysis\.ipynb\)", text)
    headline = re.search(r"outputs/([\w.-]+)/figures", (ROOT / "README.md").read_text())[1]
    assert studies[0] == headline
    tracked = subprocess.run(["git", "ls-files", "outputs/*/04_analysis.ipynb"], cwd=ROOT, capture_output=True,
                             text=True).stdout.split()
    assert set(studies[1:]) == {path.split("/")[1] for path in tracked}


def test_pages_that_the_readme_links_are_on_the_site():
    conf = runpy.run_path(str(ROOT / "docs/conf.py"))
    links = re.findall(r"\]\((?!http)([^)#]+\.(?:md|ipynb))", (ROOT / "README.md").read_text())
    assert links and set(links) - set(conf["include_patterns"]) - set(conf["SHOWN"]) == set()


def test_names_of_pages_become_links_on_the_site():
    with_links = runpy.run_path(str(ROOT / "docs/conf.py"))["with_links"]
    text = ("## `03_eval`\n`03_eval`, `lib.noise`, [`01_data`](x.md), `docs/gpu.md`, `appendix/audit`\n"
            "```\n`03_eval`\n```\n")
    assert with_links(text, Path("outputs/channels/04_analysis.ipynb")) == (
        "## `03_eval`\n[`03_eval`](03_eval.ipynb), `lib.noise`, [`01_data`](x.md), [`docs/gpu.md`](../../docs/gpu.md), "
        "[`appendix/audit`](audit.ipynb)\n```\n`03_eval`\n```\n")  # those of the same study
    assert with_links("`01_data`", Path("docs/gpu.md")) == "[`01_data`](../outputs/tiny/01_data.ipynb)"
    assert with_links("`docs/gpu.md`", Path("docs/gpu.md")) == "`docs/gpu.md`"
    assert with_links("`03_eval`", Path("docs/gpu.md"), rendered=True) == "[`03_eval`](../outputs/tiny/03_eval.html)"


@cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names of the modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


@pytest.mark.parametrize("path", sorted((ROOT / "lib").glob("*.py")), ids=lambda p: p.stem)
def test_lib_knows_nothing_of_what_makes_runs_happen(path):
    forbidden = {"runner", "ray", "fcntl", "vllm"}
    assert not {name.split(".")[0] for name in imports(path)} & forbidden


@pytest.mark.parametrize("package", ["lib", "runner"])
def test_modules_import_without_a_circle(package):
    modules = {path.stem: path for path in (ROOT / package).glob("*.py") if path.stem != "__init__"}
    below = {name: {other for other in modules if f"{package}.{other}" in imports(path)}
             for name, path in modules.items()}
    TopologicalSorter(below).prepare()  # raises CycleError, which names the circle


def test_committed_tables_of_studies_are_complete():
    for folder in (ROOT / "outputs").glob("*/summary.csv"):
        for name in ("runs.csv", "eval.parquet", "metrics.parquet", "results.csv", "replay.csv", "04_analysis.ipynb"):
            assert (folder.parent / name).exists(), f"{folder.parent.name}/{name}"
        executed = json.loads((folder.parent / "04_analysis.ipynb").read_text())
        assert not any(o["output_type"] == "error" for c in executed["cells"] for o in c.get("outputs", []))
