"""One study twice: `make reproduce`. The second time with its cells in another order and at another parallelism.

Both start from nothing, so data and base policies are made twice too (--same-inputs saves that). Then all tables are
compared, value by value; of the metrics only what measures time is left out. The exit status is 1 if anything differs.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import yaml

from runner import ROOT, WORK, parameters, studies, targets

TABLES = {"summary.csv": ["run_id"], "runs.csv": ["run_id"], "replay.csv": ["run_id"], "provenance.csv": ["run_id"],
          "results.csv": ["arm"], "metrics.parquet": ["run_id", "step"],
          "eval.parquet": ["run_id", "sample_id", "decoding", "sample"],
          "signals.parquet": ["run_id", "third", "level", "quantity"]}
TIMES = ("seconds/", "step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")
HASHES = ["policy_hash", "data_hash", "adapter_hash", "steps", "code"]  # of provenance.csv, the rest is the machine


def write_study(name: str, profile: str, target: Path, max_steps: int | None, backwards: bool):
    """The study's file, shortened to `max_steps` if given, with arms, their lists and seeds in reverse if wanted."""
    values, _ = parameters.load_yaml(studies.STUDIES, name, "study")
    values |= values.pop("profiles", {}).get(profile, {})
    if max_steps:
        values["fixed"] = values.get("fixed", {}) | {"max_steps": max_steps}
    if backwards:
        values["seeds"] = values["seeds"][::-1]
        values["arms"] = [{k: v[::-1] if isinstance(v, list) else v for k, v in arm.items()}
                          for arm in values["arms"][::-1]]
    target.write_text(yaml.safe_dump(values, sort_keys=False))


def table(folder: Path, name: str) -> pd.DataFrame:
    """One table in an order of its own, without what measures time or names the machine."""
    read = pd.read_csv if name.endswith(".csv") else pd.read_parquet
    values = read(folder / name)
    values = values.astype({c: str for c in values.select_dtypes("category")})
    if name == "provenance.csv":
        values = values.reindex(columns=["run_id", *HASHES])
    values = values[sorted(c for c in values if not c.startswith(TIMES))]
    return values.sort_values(TABLES[name], kind="stable", ignore_index=True)


def compare(first: Path, second: Path) -> list[str]:
    """What differs between the tables of two study folders, in words; prints a line a table."""
    different = []
    for name in TABLES:
        if not (first / name).exists() and not (second / name).exists():
            continue  # a study without signals
        a, b = table(first, name), table(second, name)
        try:
            pd.testing.assert_frame_equal(a, b, check_exact=True)
            print(f"{name:16} {len(a):8,} rows, {a.shape[1]:3} columns: identical")
        except AssertionError as e:
            different.append(name)
            print(f"{name:16} DIFFERS: {' '.join(str(e).split())[:300]}")
    return different


def main() -> int:
    """Run twice, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", nargs="?", default="tiny", help="name or file of a study")
    parser.add_argument("--profile", default="tiny")
    parser.add_argument("--max-steps", type=int, help="shorten every run, for a quick answer")
    parser.add_argument("--same-inputs", action="store_true", help="share the data and base policies that are here")
    args = parser.parse_args()
    root, folders = Path(tempfile.mkdtemp(prefix="reproduce")), []
    for turn, at_once in (("first", os.cpu_count()), ("second", 1)):
        work = root / turn
        work.mkdir()
        for name in ("data", "models") if args.same_inputs else ():
            (work / name).symlink_to(WORK / name)
        study = work / f"{Path(args.study).stem}.yaml"
        write_study(args.study, args.profile, study, args.max_steps, backwards=turn == "second")
        print(f"{turn}: {at_once} runs at a time{', cells in reverse' if turn == 'second' else ''}", flush=True)
        done = subprocess.run([sys.executable, "-m", "runner", study, "--profile", args.profile,
                               "--cpus-per-run", str(os.cpu_count() // at_once)], cwd=ROOT,
                              env=os.environ | {"GRPO_NOISE_WORK": str(work)}, capture_output=True, text=True)
        if done.returncode:
            print(f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}\nsee {work}")
            return 2
        folders.append(work / "outputs" / targets.folder_of(str(study), args.profile).name)
    different = compare(*folders)
    print(f"{', '.join(different)} differ: see {root}" if different else "The two studies are identical.")
    if not different:
        shutil.rmtree(root)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
