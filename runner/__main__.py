"""Do a whole study: data, base policies, runs, evaluation and analysis.

Whatever is up to date is left alone. `make study` calls this.
"""

import argparse
import os
import subprocess
import sys

import pandas as pd
from rich.console import Console

from runner import (
    ROOT,
    dataset,
    engines,
    notebooks,
    parameters,
    plan,
    results,
    studies,
    sweep,
    targets,
)

MANUAL = """
examples:
  python -m runner flip --dry-run        the runs of params/studies/flip.yaml
  python -m runner flip                  do them, evaluate and analyse
  python -m runner flip --profile smol --gpus-per-run 0.25
  python -m runner clean-s0-1c2f9a03 --report
                                         evaluate one run, or several: ID,ID,FOLDER
  python -m runner flip --address 10.0.0.7:6379
                                         on a Ray cluster; inside it: auto
  sbatch scripts/slurm.sh flip --profile smol
                                         in a SLURM allocation
  python -m runner compare flip mask     two studies, or two runs, side by side

runs:
  outputs/runs/<run_id>/ is the one store of all runs; it holds DONE when a run
  is whole. The same cell in two studies is one run. The command can be
  repeated at any time, and started twice: finished runs are skipped,
  interrupted ones go on from their last checkpoint, and a run that another
  process executes is waited for. A failed run is tried again by the next
  command.

clusters:
  All nodes share the file system of the workspace, under the same path, and
  have the same Python and packages. The project's code comes from Ray.

signals:
  Ctrl-C or SIGTERM stops the running runs and says what is left; a second one
  ends at once.

the end:
  --on-done 'mail -s "$STUDY ended: $STATUS" me@example.org < /dev/null'
                   runs in a shell when the command ends: done, failed or
                   stopped. STUDY is the study, STATUS the exit status, and
                   FOLDER where tables and figures are.

exit status:
  0  all runs are done     1  a run failed     130  stopped by a signal
  2  something was refused before a run began

environment:
  GRPO_NOISE_WORK  the workspace: where data/, models/ and outputs/ are
                   (the project, if not set)
  RAY_AUTH_MODE, RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH
                   of a cluster that asks for a token
  GRPO_NOISE_ROLLOUT_KEY
                   of the server at --rollout-url
  HF_ENDPOINT, HF_TOKEN
                   hub of models, on every node that loads one
"""


def command_line() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m runner", description=__doc__, epilog=MANUAL,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="name or file of a study in params/studies; for --report "
                                      "also runs, by id or folder, separated by commas")
    parser.add_argument("--profile", default="tiny", metavar="NAME",
                        help="hardware and model: a name in params/profiles (tiny)")
    group = parser.add_argument_group("only a part of it")
    part = group.add_mutually_exclusive_group()
    for option, text in (
            ("--dry-run", "print the runs and which are done; execute nothing"),
            ("--runs-only", "execute the runs; no evaluation, no analysis"),
            ("--report", "evaluate and analyse what is finished; execute no run")):
        part.add_argument(option, action="store_const", dest="part", const=option, help=text)
    parser.add_argument("--on-done", metavar="COMMAND",
                        help="a shell command for the end, however it comes: see below")
    where = parser.add_argument_group("where, and how many at once")
    where.add_argument("--address", metavar="HOST:PORT",
                       help="a Ray cluster that is there; without it, Ray starts here and ends "
                            "with the command")
    where.add_argument("--cpus-per-run", type=float, default=1, metavar="N",
                       help="CPU cores of a run (1)")
    where.add_argument("--gpus-per-run", type=float, metavar="N",
                       help="0.25 lets four runs share a GPU, and is the default of runs that "
                            "share a rollout server; else a run has one where there is one, and "
                            "the tiny policy has none")
    where.add_argument("--engines", type=int, metavar="K",
                       help="K GPUs of this machine serve rollouts and the others train; by "
                            "default each does both")
    where.add_argument("--rollout-url", metavar="URL",
                       help="a vLLM server that is there; its key is in GRPO_NOISE_ROLLOUT_KEY")
    return parser


def main(argv=None) -> int:
    """Run the command; returns its exit status."""
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["compare"]:
        from runner import compare  # it draws: seconds of imports that no other command needs

        return compare.main(given[1:])
    args = command_line().parse_args(argv)
    os.chdir(ROOT)
    width = None if sys.stdout.isatty() else 80
    console = Console(width=width, soft_wrap=True, markup=False, highlight=False)
    status = do_command(args, console)
    if args.on_done:
        on_done(args.on_done, args, status)
    return status


def do_command(args: argparse.Namespace, console: Console) -> int:
    """Do what the options say; returns the exit status."""
    try:
        return Command(args, console).do(args.part)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, RuntimeError, OSError) as e:
        print(e, file=sys.stderr)
        return 2


def on_done(command: str, args: argparse.Namespace, status: int):
    """Run the user's command for the end. That it fails changes no exit status, and is said."""
    folder = targets.folder_of(args.study, args.profile)
    about = {"STUDY": args.study, "STATUS": str(status), "FOLDER": str(folder)}
    ended = subprocess.run(command, shell=True, env=os.environ | about)
    if ended.returncode:
        print(f"--on-done ended with status {ended.returncode}: {command}", file=sys.stderr)


class Command:
    """A study, its grid, and the parts of the work that can be asked for."""

    def __init__(self, args: argparse.Namespace, console: Console):
        self.args, self.console = args, console
        if args.rollout_url:
            os.environ[engines.ROLLOUT_URL] = args.rollout_url
        self.study, self.grid = targets.load(args.study, args.profile)
        self.folder = targets.folder_of(args.study, args.profile)
        self.again = f"python -m runner {args.study} --profile {args.profile}"

    def do(self, part: str | None) -> int:
        """Do one part, or all of it; returns the exit status."""
        parts = {None: self.everything, "--dry-run": self.dry_run, "--runs-only": self.runs_only,
                 "--report": self.report}
        return parts[part]()

    def everything(self) -> int:
        """Inputs, runs, evaluation, analysis."""
        self.announce()
        plan.check_resources(self.grid, self.args.address, self.gpus())  # before any download
        notebooks.make_inputs(self.grid, self.folder, self.console)
        failed = self.execute_runs()
        self.show_results()
        return self.name_failures(failed)

    def dry_run(self) -> int:
        """The cells of the study, and what is there already."""
        self.announce()
        plan.print_plan(self.study, self.grid, self.console.file)
        try:
            plan.check_resources(self.grid, self.args.address, self.gpus())
            plan.check_all_inputs(self.grid)
        except (ValueError, OSError) as e:
            print(f"It could not start here yet: {e}", file=sys.stderr)
        self.console.print(f"Next: {self.again}")
        return 0

    def runs_only(self) -> int:
        """The runs, and no evaluation."""
        self.announce()
        status = self.name_failures(self.execute_runs())
        self.console.print(f"Next: {self.again} --report")
        return status

    def report(self) -> int:
        """Evaluation and analysis of what is finished."""
        if "done" not in plan.statuses(self.grid).values():
            raise ValueError(f"no run of {self.args.study} is finished here, so there is nothing "
                             f"to report: start it with {self.again}")
        self.show_results()
        return 0

    def announce(self):
        """Say what is going to run, where, and with whose hyperparameters."""
        first = self.grid[0]
        self.console.print(f"{self.study.title}. Runs: {len(self.grid)}, "
                           f"profile: {first.profile}, folder: {dataset.shown(self.folder)}")
        remark = studies.compared_with_nothing(self.study, self.grid)
        if remark:
            self.console.print(remark)
        if first.model != "tiny" and not engines.gpu_query("name"):
            self.console.print("nvidia-smi shows no GPU here: on a CPU, a run of this model can "
                               "take hours.")
        if self.study.use_selected:
            chosen = parameters.selected(first.profile).items()
            values = ", ".join(f"{name}={value}" for name, value in chosen)
            self.console.print(f"chosen by the hyperparameter study: {values or 'nothing'}")

    def gpus(self) -> float:
        """The part of a GPU that a run has."""
        if self.args.gpus_per_run is None:
            return plan.gpus_of_a_run(self.grid, self.args.address)
        return self.args.gpus_per_run

    def execute_runs(self) -> dict[str, str]:
        """Execute the runs that are not done; returns {run_id: message} of failures."""
        return sweep.run_grid(self.grid, self.console, self.args.address, self.args.cpus_per_run,
                              self.gpus(), self.args.engines)

    def show_results(self):
        """Bring tables and analysis up to date, and print the results."""
        notebooks.evaluate_and_analyse(self.args.study, self.args.profile, self.console)
        about = self.grid[0]
        self.console.print(f"\n{self.folder.name}: {about.model}, prompt template "
                           f"{about.prompt_template}")
        table = self.folder / "results.csv"
        self.console.print(results.results_table(pd.read_csv(table)))
        reproduced = results.compare_with_published(table)
        if reproduced:
            self.console.print(f"\n{reproduced}")
        self.console.print(f"\nNext: open {dataset.shown(self.folder)}/04_analysis.html in a "
                           "browser, or see the notebook beside it with make lab")

    def name_failures(self, failed: dict[str, str]) -> int:
        """Say which runs failed and where their notebooks are; returns the exit status."""
        store = dataset.shown(self.grid[0].folder.parent)
        arms = {p.folder.name: self.study.arm_and_reference(p)[0] for p in self.grid}
        for name, message in failed.items():
            first_line = message.splitlines()[0][:300]
            print(f"FAILED {name} ({arms[name]}): {first_line}\n"
                  f"       see {store}/{name}/notebook.ipynb", file=sys.stderr)
        return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
