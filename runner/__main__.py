"""A whole study: `python -m runner tiny --profile tiny` runs every notebook that is not up to date.

01_data, 01b_warm_start, the grid of 02_train, 03_eval, 04_analysis; at the end the table of results and where the
rendered notebooks are. `make study` calls this.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from runner import BUILT_HERE, ROOT, dataset, files, pack, parameters, runs, studies, sweep


def execute(notebook: str, folder: Path, console: Console, name: str | None = None, **parameters):
    """Execute notebooks/<notebook>.ipynb with papermill and keep it in `folder`. RuntimeError says where it stopped."""
    import papermill

    target = folder / f"{name or notebook}.ipynb"
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        papermill.execute_notebook(f"notebooks/{notebook}.ipynb", os.path.relpath(target), parameters,
                                   kernel_name="python3", progress_bar=False, cwd=str(ROOT))
    except papermill.PapermillExecutionError as e:
        raise RuntimeError(f"{notebook} stopped: {e.ename}: {e.evalue}\nsee {dataset.shown(target)}") from None
    console.print(f"{notebook}: {time.monotonic() - began:.0f} s")


def prepare(grid: list[parameters.Params], folder: Path, console: Console) -> None:
    """Data and base policies that the grid needs, made if they are not there."""
    for data_dir in sorted({p.data_dir for p in grid}):
        try:
            dataset.read_manifest(data_dir)
        except FileNotFoundError:
            if data_dir not in dataset.SOURCES:
                raise
            local_copy = os.environ.get("MATH_DIR") if data_dir == "math" else None
            execute("01_data", folder, console, source=data_dir, math_dir=local_copy)
    for p in {p.base_seed: p for p in grid}.values():
        try:
            runs.check_inputs(p)
        except FileNotFoundError:
            if p.model not in BUILT_HERE:
                raise
            execute("01b_warm_start", folder, console, f"01b_warm_start-s{p.base_seed}", profile=p.profile,
                    base_seed=p.base_seed)


def state(study: studies.Study, grid: list[parameters.Params], *notebooks: str) -> str:
    """A digest of everything that evaluation and analysis read: the study, finished runs, data, notebooks and lib."""
    finished = {parameters.run_id(p): (p.folder / "DONE").read_text() if runs.status(p.folder) == "done" else
                runs.status(p.folder) for p in grid}
    sources = [*sorted((ROOT / "lib").glob("*.py")), *(ROOT / f"notebooks/{n}.ipynb" for n in notebooks)]
    hashes = [files.sha256(path) for path in sources]
    data = sorted({dataset.data_hash(p.data_dir) for p in grid})
    return files.digest([study.model_dump(), finished, data, hashes], 64)


def to_html(notebook: Path) -> Path:
    """Render an executed notebook beside itself, without code and what is about code. The page needs no network."""
    import nbformat
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    page, scripts = notebook.with_suffix(".html"), ("html_head_js", "html_head_js_mathjax", "html_head_js_mermaidjs")
    template = "{% extends 'lab/index.html.j2' %}" + "".join(f"{{% block {s} %}}{{% endblock %}}" for s in scripts)
    template += """{% block data_png scoped %}{% set png = 'image/png' %}
        <div class="jp-RenderedImage jp-OutputArea-output"><img alt="{{ output | get_metadata('alt', png) | e }}"
        width="{{ output | get_metadata('width', png) }}"
        src="data:image/png;base64,{{ output.data[png] }}"></div>{% endblock %}"""  # lab's has no alt
    config = Config({"TagRemovePreprocessor": {"enabled": True, "remove_cell_tags": ["about-code"]}})
    exporter = HTMLExporter(raw_template=template, exclude_input=True, config=config)
    title = {"metadata": {"name": f"{notebook.parent.name}: analysis"}}
    page.write_text(exporter.from_notebook_node(nbformat.read(notebook, 4), title)[0])
    return page


def print_results(folder: Path, console: Console, about: parameters.Params):
    """The table of results and where to read more."""
    table = Table("arm", "J", "seeds", "accuracy", "95 % interval", "difference", "95 % interval", "Holm p", "from",
                  title=f"{folder.name}: {about.model}, prompt template {about.prompt_template}")
    for r in pd.read_csv(folder / "results.csv").itertuples():
        compared, J = pd.notna(r.difference_low), f"{r.J:.2f}" if pd.notna(r.J) else ""
        interval = f"{r.low:.3f} to {r.high:.3f}" if pd.notna(r.low) else "one seed: none"
        table.add_row(r.arm, J, str(r.seeds), f"{r.estimate:.3f}", interval,
                      *((f"{r.difference:+.3f}", f"{r.difference_low:+.3f} to {r.difference_high:+.3f}",
                         f"{r.p_holm:.2g}", r.reference) if compared else ("", "", "", "")))
    console.print(table)
    rendered = [folder / "04_analysis.ipynb", folder / "04_analysis.html"]
    for path in rendered + sorted((folder / "figures").glob("*.png")):
        console.print(dataset.shown(path))


def main(argv=None) -> int:
    """Run the command; exit status 1 if a run failed, 2 if something was refused, 130 if stopped."""
    parser = argparse.ArgumentParser(prog="python -m runner", description=__doc__.splitlines()[0],
                                     epilog=sweep.MANUAL,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="name or file of a study in params/studies")
    parser.add_argument("--profile", default="tiny", help="name of a profile in params/profiles (tiny)")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--dry-run", action="store_true", help="print the cells and what is done")
    part.add_argument("--runs-only", action="store_true", help="execute the runs: no evaluation, no analysis")
    part.add_argument("--pack", action="store_true", help="evaluated runs without weights into one file (make pack)")
    part.add_argument("--unpack", action="store_true", help="back into the store (make unpack)")
    part.add_argument("--report", action="store_true", help="execute no run: evaluate and analyse what is finished")
    sweep.add_options(parser)
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        return do(args, console)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, RuntimeError, OSError) as e:
        print(e, file=sys.stderr)
        return 2


def do(args: argparse.Namespace, console: Console) -> int:
    """Do the part of a study that was asked for."""
    study, grid = studies.load_study(args.study, args.profile)
    folder = studies.folder_of(args.study, args.profile)
    if args.pack or args.unpack:
        return pack_or_unpack(args, folder, grid, console)
    sweep.announce(args.study, study, grid, console)
    if args.dry_run:
        sweep.plan(study, grid, console)
        try:
            sweep.check(grid, args.address, args.gpus_per_run)
        except (ValueError, OSError) as e:
            print(f"It could not start here yet: {e}", file=sys.stderr)
        return 0
    if args.runs_only:
        return sweep.report(sweep.run_grid(grid, console=console, **sweep.options(args)), grid)
    failed = {}
    if args.report:
        if not any(runs.status(p.folder) == "done" for p in grid):
            raise ValueError(f"no run of {args.study} is finished here, so there is nothing to report: start it with "
                             f"python -m runner {args.study} --profile {args.profile}")
    else:
        sweep.check(grid, args.address, args.gpus_per_run, inputs=False)  # before anything is downloaded
        prepare(grid, folder, console)
        failed = sweep.run_grid(grid, console=console, **sweep.options(args))
    evaluate_and_analyse(args, study, grid, console)
    print_results(folder, console, grid[0])
    return sweep.report(failed, grid)


def pack_or_unpack(args: argparse.Namespace, folder: Path, grid: list[parameters.Params], console: Console) -> int:
    """Write the archive of a study, or put what it holds into the store."""
    if args.pack:
        archive = pack.pack(folder, grid)
        console.print(f"{dataset.shown(archive)}: {archive.stat().st_size / 2**20:.1f} MB")
        return 0
    for name in pack.unpack(folder, grid):
        console.print(f"{name} is {runs.status(grid[0].folder.with_name(name))} here and was left alone: delete its "
                      "folder and unpack again")
    done = sum(runs.status(p.folder) == "done" for p in grid)
    console.print(f"{done} of {len(grid)} runs of {args.study} are done in {dataset.shown(grid[0].folder.parent)}")
    return 0


def evaluate_and_analyse(args: argparse.Namespace, study: studies.Study, grid: list[parameters.Params],
                         console: Console):
    """Execute 03_eval and 04_analysis unless what they read is what they read last time."""
    folder = studies.folder_of(args.study, args.profile)
    for notebook, stamp, reads in (("03_eval", ".evaluated", ("03_eval",)),
                                   ("04_analysis", ".analysed", ("03_eval", "04_analysis"))):
        seen, now = folder / stamp, state(study, grid, *reads)
        if seen.exists() and seen.read_text() == now:
            console.print(f"{notebook} is up to date: nothing to do.")
            continue
        execute(notebook, folder, console, **({"study": args.study, "profile": args.profile}
                                              if notebook == "03_eval" else {"study": folder.name}))
        files.write_atomically(seen, now)
        if notebook == "04_analysis":
            to_html(folder / "04_analysis.ipynb")


if __name__ == "__main__":
    sys.exit(main())
