"""What the original's command lines share: each option becomes a parameter of a notebook."""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from runner import WORK  # noqa: E402

PROFILE = {"profile": "qwen2.5-math-1.5b"}  # the original's model and data
DATA = {"source": "math", "data_dir": None, "math_dir": None, "data_seed": None}
TRAINING = PROFILE | dict.fromkeys((
    "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "grpo_beta", "seed",
    "num_train_epochs", "output_dir"))


def execute(notebook: str, about: str, options: dict[str, str | None]) -> int:
    """Execute a notebook with what the command line gives; returns the exit status.

    options: name -> default, where None stands for the notebook's own.
    """
    parser = argparse.ArgumentParser(
        description=about, allow_abbrev=False,
        epilog=f"The first cell of code in notebooks/{notebook}.ipynb explains each option.")
    for name, default in options.items():
        parser.add_argument(f"--{name}", default=default, metavar="VALUE", help=f"default: {default or 'as there'}")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    if "num_train_epochs" in given:
        given["max_steps"] = "-1"  # as in the original, epochs alone say how long a run is
    executed = WORK / f"{Path(sys.argv[0]).stem}.ipynb"
    command = [sys.executable, "-m", "papermill", f"notebooks/{notebook}.ipynb", str(executed), "--log-output"]
    for name, value in given.items():
        command += ["-p", name, value]
    return subprocess.run(command, cwd=ROOT).returncode
