"""Problems with checkable answers: MATH (arXiv 2103.03874) or generated problems in MATH's own schema.

The steps are those of the reference experiment: merge all parts into train and validation, split train 90/10,
keep the original validation for testing. `make_dataset` does all of them and writes one folder:

    train.jsonl  validation.jsonl                           merged parts, only read by the steps below
    train_split.jsonl  validation_split.jsonl  test.jsonl   what every later notebook loads
    manifest.json                                           parameters, counts, sha256 of each file

A row has sample_id, problem, level, type, solution and answer (the content of the solution's last box).
"""

import hashlib
import itertools
import json
import os
import random
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from lib import ROOT, WORK
from lib.answers import last_boxed
from lib.files import sha256

HUB_DATASET = "fdyrd/MATH"
FIELDS = ("problem", "level", "type", "solution")
LEVELS = ("Level 1", "Level 2", "Level 3", "Level 4", "Level 5", "Level ?")  # MATH has two rows of "Level ?"
SUFFIXES = (".jsonl", ".json", ".parquet")
SPLIT_FILES = {"train": "train_split.jsonl", "validation": "validation_split.jsonl", "test": "test.jsonl"}


# ---- paths ---------------------------------------------------------------------------------------


def data_folder(data_dir: str | Path) -> Path:
    """`arithmetic` and `data/arithmetic` both mean <workspace>/data/arithmetic; an absolute path stays.

    ValueError for a path with `..` and for an address.
    """
    path = Path(data_dir).expanduser()
    if ".." in path.parts or "://" in str(data_dir):
        shown_dir = "an address" if "://" in str(data_dir) else repr(str(data_dir))
        raise ValueError(f"data_dir is {shown_dir}: give a folder below data/, or an absolute path")
    if path.is_absolute():
        return path
    return WORK / path if path.parts[:1] == ("data",) else WORK / "data" / path


def shown(path: Path) -> str:
    """The path from the project root when it lies below it, else its last two parts."""
    path = Path(path).resolve()
    return path.relative_to(WORK).as_posix() if path.is_relative_to(WORK) else "/".join(path.parts[-2:])


# ---- reading and merging parts -------------------------------------------------------------------


def find_parts(folder: Path) -> dict[str, list[str]]:
    """Part files at any depth, by split, as sorted paths relative to `folder`.

    A part belongs to `train` if its file stem or one of its folders has the word train, and to `validation`
    if one has the word test or validation. Hidden files and folders are skipped.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{shown(folder)} is not a folder: give the one that holds the parts")
    parts: dict[str, list[str]] = {"train": [], "validation": []}
    for path in sorted(folder.rglob("*")):
        part = path.relative_to(folder)
        if path.suffix not in SUFFIXES or not path.is_file() or any(p.startswith(".") for p in part.parts):
            continue
        words = set(re.split(r"[^a-z]+", part.with_suffix("").as_posix().lower()))
        is_train, is_test = "train" in words, bool(words & {"test", "validation"})
        if is_train == is_test:
            why = "both train and test/validation" if is_train else "neither train nor test/validation"
            raise ValueError(f"{part}: the path says {why}: rename the file or its folder to tell its split")
        parts["train" if is_train else "validation"].append(part.as_posix())
    for split, found in parts.items():
        if not found:
            word = "train" if split == "train" else "test or validation"
            raise ValueError(f"{shown(folder)} has no {split} part: no {', '.join(SUFFIXES)} file "
                             f"with the word {word} in its name or folder")
    return parts


def _numbered_rows(folder: Path, part: str) -> Iterator[tuple[int, object]]:
    """(1-based line or row number, parsed row) of one part; errors name the file and the line."""
    path = folder / part
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
        elif path.suffix == ".json":
            loaded = json.loads(path.read_text(encoding="utf-8-sig"))
            yield from enumerate(loaded if isinstance(loaded, list) else [loaded], 1)
        else:
            number = 0
            with path.open(encoding="utf-8-sig") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield number, json.loads(line)
    except json.JSONDecodeError as exc:
        line = number if path.suffix == ".jsonl" else exc.lineno
        what = f"{exc.msg.removesuffix(' starting at')}, column {exc.colno}"
        raise ValueError(f"{part}:{line}: not valid JSON ({what}): is the line truncated?") from None
    except UnicodeDecodeError:
        raise ValueError(f"{part}: not UTF-8 text") from None
    except (OSError, ValueError) as exc:  # pyarrow's errors are one or the other
        raise ValueError(f"{part}: cannot be read ({type(exc).__name__}): is the file truncated?") from None


def check_row(row: object, where: str) -> dict[str, str]:
    """The row's four fields, checked, plus `answer`. `where` (file:line) opens every error message."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with {', '.join(FIELDS)}, not a {type(row).__name__}")
    for field in FIELDS:
        if not isinstance(row.get(field), str) or not row[field].strip():
            problem = "is not a non-empty text" if field in row else "is missing"
            raise ValueError(f"{where}: field '{field}' {problem}")
    if row["level"] not in LEVELS:
        raise ValueError(f"{where}: unknown level {row['level']!r}; known: {', '.join(LEVELS)}")
    answer = last_boxed(row["solution"])
    if answer is None:
        raise ValueError(f"{where}: the solution has no complete \\boxed{{...}}, so there is no gold answer")
    return {field: row[field] for field in FIELDS} | {"answer": answer}


def merge_parts(folder: Path) -> dict[str, list[dict]]:
    """All parts of a folder as {"train": rows, "validation": rows}, in the order of part path and line.

    sample_id is the part's path without its suffix, a colon and the 1-based line: "algebra/train:17".
    """
    folder, merged = Path(folder), {}
    seen: dict[str, str] = {}
    for split, parts in find_parts(folder).items():
        merged[split] = []
        for part in parts:
            name = part[: -len(Path(part).suffix)]
            if name in seen:
                raise ValueError(f"{part} and {seen[name]} would give the same sample_id: keep one of them")
            seen[name] = part
            for number, row in _numbered_rows(folder, part):
                checked = check_row(row, f"{part}:{number}")
                merged[split].append({"sample_id": f"{name}:{number}"} | checked)
        if not merged[split]:
            raise ValueError(f"{shown(folder)}: the {split} parts hold no rows ({', '.join(parts)})")
    return merged


# ---- splitting -----------------------------------------------------------------------------------


def proportional_shares(sizes: dict, total: int) -> dict:
    """Share `total` over strata in proportion to their sizes, each within 1 of exact (largest remainders)."""
    n = sum(sizes.values())
    shares = {key: size * total // n for key, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda key: (-(sizes[key] * total % n), key))
    for key in by_remainder[: total - sum(shares.values())]:
        shares[key] += 1
    return shares


def split_train(rows: list[dict], seed: int, fraction: float = 0.1) -> tuple[list[dict], list[dict]]:
    """Split rows into (train, validation), stratified by type and level, seeded.

    validation has exactly round(fraction * n) rows (halves up), each stratum within one row of its share.
    The choice does not depend on the order of `rows`; both lists keep that order. A stratum may have a
    single row, which scikit-learn's stratified split refuses.
    """
    strata = defaultdict(list)
    for row in rows:
        strata[row["type"], row["level"]].append(row["sample_id"])
    sizes = {key: len(ids) for key, ids in strata.items()}
    shares = proportional_shares(sizes, int(fraction * len(rows) + 0.5))
    chosen = set()
    for key, ids in strata.items():
        chosen.update(random.Random(f"{seed}/{key}").sample(sorted(ids), shares[key]))
    return ([r for r in rows if r["sample_id"] not in chosen], [r for r in rows if r["sample_id"] in chosen])


def drop_overlaps(rows: list[dict], held_out: Iterable[dict]) -> tuple[list[dict], list[str]]:
    """(rows whose problem text does not occur in `held_out`, sample_ids of the dropped rows)."""
    problems = {row["problem"] for row in held_out}
    kept = [row for row in rows if row["problem"] not in problems]
    return kept, [row["sample_id"] for row in rows if row["problem"] in problems]


def duplicates(rows: list[dict]) -> list[list[str]]:
    """Groups of sample_ids that share one problem text, in order of first occurrence."""
    by_problem = defaultdict(list)
    for row in rows:
        by_problem[row["problem"]].append(row["sample_id"])
    return [ids for ids in by_problem.values() if len(ids) > 1]


def near_overlaps(rows: list[dict], held_out: Iterable[dict]) -> list[tuple[str, str]]:
    """Pairs of sample_ids whose problems differ in white space only. They are reported, not dropped."""
    held = {"".join(r["problem"].split()): r for r in held_out}
    pairs = [(row, held.get("".join(row["problem"].split()))) for row in rows]
    return [(a["sample_id"], b["sample_id"]) for a, b in pairs if b and a["problem"] != b["problem"]]


# ---- generated problems --------------------------------------------------------------------------


ARITHMETIC_TYPES = ("Addition", "Subtraction", "Missing Number")


def arithmetic_row(kind: str, a: int, b: int) -> dict[str, str] | None:
    """One problem in MATH's schema, a in 10..999, b in 1..9; None if the sum has four digits.

    Level 1, 2: two-digit a without, with a carry (or borrow). Level 3, 4: the same for three-digit a.
    Level 5: the carry runs on to the next digit (95+8, 397+5, 402-7).
    """
    tens, units = a // 10 % 10, a % 10
    if kind == "Subtraction":
        result, moves, runs_on = a - b, units < b, units < b and tens == 0
        steps = f"{units}-{b} = {units - b}, no borrow"
        if moves:
            steps = f"{units} is less than {b}: borrow 1, {units + 10}-{b} = {units + 10 - b}"
        if runs_on:
            steps += "; the tens digit is 0: the borrow runs on to the hundreds"
        problem, end = f"{a}-{b}=", f"{a}-{b} = \\boxed{{{result}}}"
    else:
        result, moves, runs_on = a + b, units + b > 9, units + b > 9 and tens == 9
        steps = f"{units}+{b} = {units + b}, no carry"
        if moves:
            steps = f"{units}+{b} = {units + b}, write {units + b - 10} and carry 1"
        if runs_on:
            steps += "; 9+1 = 10: the carry runs on"
        problem, end = f"{a}+{b}=", f"{a}+{b} = \\boxed{{{result}}}"
        if kind == "Missing Number":
            problem, end = f"{a}+?={result}", f"{a}+{b} = {result} and ? = \\boxed{{{b}}}"
    if result > 999:
        return None
    level = 5 if runs_on else (1 if a < 100 else 3) + moves
    return {"problem": problem, "level": f"Level {level}", "type": kind, "solution": f"{steps}, so {end}."}


OPERATIONS = {"Addition": "+", "Subtraction": "-", "Multiplication": "*", "Division": "/"}


def operations_row(kind: str, a: int, b: int) -> dict[str, str] | None:
    """One problem in MATH's schema, a and b >= 1; None if no level has it. Division asks for a: a*b divided by b.

    Addition, Subtraction: level 1: one digit and one digit; 2: two and one; 3, 4: two and two without, with a
    carry (or borrow); 5: three and two. Multiplication: level 1, 2, 3: factors up to 5, 9, 12; 4: 13..49 by
    2..5; 5: 13..99 by 2..9, less level 4. Division: the same, b is not the larger factor.
    """
    sign, low, high = OPERATIONS[kind], min(a, b), max(a, b)
    if kind in ("Addition", "Subtraction"):
        one, units = (1 if sign == "+" else -1), b % 10
        result = a + one * b
        moves = result > 99 or not 0 <= a % 10 + one * units <= 9
        level = {(1, 1): 1, (2, 1): 2, (2, 2): 3 + moves, (3, 2): 5}.get((len(str(a)), len(str(b))))
        between = f"{result - one * units} {sign} {units} = " if b > 9 and units else ""
    else:
        result, tens, units = a * b, high // 10 * 10, high % 10
        level = 1 + (high > 5) + (high > 9) if high <= 12 else None
        if 13 <= a <= 99 and 2 <= b <= 9:
            level = 4 if a <= 49 and b <= 5 else 5
        between = f"{tens * low} + {units * low} = " if tens and units else ""
    if level is None or result < 0 or (kind == "Division" and b > a):
        return None
    problem = f"{a * b} / {b}" if kind == "Division" else f"{a} {sign} {b}"
    steps = f"{b} * {a} = {a * b}, so {problem} = \\boxed{{{a}}}"
    if kind != "Division":
        steps = f"{problem} = {between}\\boxed{{{result}}}"
    return {"problem": f"What is {problem}?", "level": LEVELS[level - 1], "type": kind, "solution": steps}


GENERATED = {  # source: row of (kind, a, b), its kinds, every a, every b, default n_train and n_test
    "arithmetic": (arithmetic_row, ARITHMETIC_TYPES, range(10, 1000), range(1, 10), 6000, 1024),
    "operations": (operations_row, OPERATIONS, range(1, 1000), range(1, 100), 10_000, 2048),
}
SOURCES = (*GENERATED, "math")


def generate(source: str, folder: Path, seed: int, n_train: int, n_test: int) -> None:
    """Write `<folder>/<subject>/train.jsonl` and `validation.jsonl`: n_train + n_test different problems.

    Types and levels are as balanced as the space allows (some have a few problems only), and the validation
    parts hold the same mix as the train parts. The same arguments give the same bytes.
    """
    make_row, kinds, values_a, values_b, *_ = GENERATED[source]
    cells = defaultdict(list)
    for kind, a, b in itertools.product(kinds, values_a, values_b):
        if row := make_row(kind, a, b):
            cells[kind, row["level"]].append(row)
    space, wanted = sum(map(len, cells.values())), n_train + n_test
    if n_train < 1 or n_test < 1 or wanted > space:
        raise ValueError(f"n_train={n_train}, n_test={n_test}: each must be >= 1 and their sum <= {space}")
    sizes: dict = {}
    by_size = sorted(cells, key=lambda key: (len(cells[key]), key))
    for i, key in enumerate(by_size):  # the smallest first: what they cannot give, the others do
        sizes[key] = min(len(cells[key]), (wanted - sum(sizes.values())) // (len(cells) - i))
    tests = proportional_shares(sizes, n_test)
    for kind in kinds:
        parts: dict[str, list[dict]] = {"train": [], "validation": []}
        rng = random.Random(f"{seed}/{kind}")
        for level in LEVELS[:5]:
            drawn = rng.sample(cells[kind, level], sizes[kind, level])
            parts["validation"] += drawn[: tests[kind, level]]
            parts["train"] += drawn[tests[kind, level]:]
        for split, rows in parts.items():
            rng.shuffle(rows)
            write_jsonl(Path(folder) / kind.lower().replace(" ", "_") / f"{split}.jsonl", rows)


# ---- MATH ----------------------------------------------------------------------------------------


def endpoint_has_password() -> bool:
    """Whether HF_ENDPOINT holds one: the hub's client would write it to its log, and would not send HF_TOKEN."""
    return "@" in os.environ.get("HF_ENDPOINT", "").partition("://")[2].partition("/")[0]


def download_math() -> Path:
    """The folder of the hub's copy of MATH (12,500 problems), from the local cache when it is there."""
    from huggingface_hub import snapshot_download

    if endpoint_has_password():
        raise ConnectionError("HF_ENDPOINT holds a password, which would be written to logs: set HF_TOKEN instead")
    patterns = [f"*{suffix}" for suffix in SUFFIXES]
    try:
        return Path(snapshot_download(HUB_DATASET, repo_type="dataset", allow_patterns=patterns))
    except Exception as exc:  # the hub client's own errors, httpx's and the system's: all mean "no data"
        raise ConnectionError(
            f"cannot download {HUB_DATASET} ({type(exc).__name__}): set math_dir to a folder with a local "
            "copy (with make: MATH_DIR=folder), or the environment variable HF_ENDPOINT to a mirror that this "
            "machine reaches.") from None


# ---- writing and loading -------------------------------------------------------------------------


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """One JSON object a line, UTF-8, newline at the end; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")


def _build(parts: Path, stage: Path, seed: int) -> dict:
    """Merge, split, drop overlaps, write the five files to `stage`; returns what the manifest reports."""
    merged = merge_parts(parts)
    test = merged["validation"]
    train, validation = split_train(merged["train"], seed)
    # A problem of two splits stays in the one used later: test before validation before train.
    validation, leaked = drop_overlaps(validation, test)
    train, dropped = drop_overlaps(train, test + validation)
    files = {"train": merged["train"], "validation": test,
             "train_split": train, "validation_split": validation, "test": test}
    for name, rows in files.items():
        write_jsonl(stage / f"{name}.jsonl", rows)
    return {
        "counts": {name: len(rows) for name, rows in files.items()},
        "dropped_from_train_split": dropped, "dropped_from_validation_split": leaked,
        "differ_in_white_space_only": near_overlaps(merged["train"], test),
        "duplicates": {name: duplicates(merged[name]) for name in merged},
        "empty_answers": [r["sample_id"] for r in merged["train"] + test if not r["answer"].strip()],
        "sha256": {f"{name}.jsonl": sha256(stage / f"{name}.jsonl") for name in files},
    }


def make_dataset(source: str, data_dir: str | Path | None = None, math_dir: str | Path | None = None,
                 data_seed: int = 0, n_train: int | None = None, n_test: int | None = None) -> tuple[Path, bool]:
    """Make data/<data_dir> and return (folder, True), or (folder, False) if the same data are there already.

    math_dir: a local copy of MATH (a relative path starts at the project's root); None downloads it.
    n_train, n_test: problems to generate; None: the source's own number.
    Everything is written to a temporary folder beside it, which is renamed at the end: an error leaves no
    output and keeps the data that were there. A folder that this function did not make is never replaced.
    """
    if source not in SOURCES:
        raise ValueError(f"source={source!r}: choose one of {', '.join(SOURCES)}")
    if "://" in str(math_dir):
        raise ValueError("math_dir is an address: give a local folder")
    if source in GENERATED and math_dir is not None:
        raise ValueError(f"math_dir is for source='math': {source} is generated and reads no folder")
    out = data_folder(data_dir or source)
    if out.exists() and any(out.iterdir()) and not (out / "manifest.json").is_file():
        raise ValueError(f"{shown(out)} holds other files (no manifest.json): choose another data_dir")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        stage = Path(temporary) / "new"
        stage.mkdir()
        parameters = {"source": source, "data_seed": data_seed}
        if source in GENERATED:
            *_, own_train, own_test = GENERATED[source]
            sizes = {"n_train": own_train if n_train is None else n_train,
                     "n_test": own_test if n_test is None else n_test}
            parameters |= sizes
            parts = stage / "parts"
            generate(source, parts, data_seed, **sizes)
        else:
            parts = ROOT / Path(math_dir).expanduser() if math_dir is not None else download_math()
        manifest = {"parameters": parameters} | _build(parts, stage, data_seed)
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        (stage / "manifest.json").write_text(text, encoding="utf-8")
        kept = out / "manifest.json"
        if kept.is_file() and kept.read_text(encoding="utf-8") == text and not _changed(out, manifest["sha256"]):
            return out, False
        if out.exists():
            os.replace(out, Path(temporary) / "old")
        os.replace(stage, out)
    return out, True


def _changed(folder: Path, hashes: dict[str, str]) -> list[str]:
    return [name for name, expected in hashes.items() if sha256(folder / name) != expected]


def read_manifest(data_dir: str | Path) -> dict:
    """The manifest of a dataset folder; FileNotFoundError with the command that makes the data."""
    folder = data_folder(data_dir)
    if not (folder / "manifest.json").is_file():
        source = next((s for s in SOURCES if s in folder.name.lower()), "arithmetic")
        raise FileNotFoundError(
            f"no data in {shown(folder)}. Make them, from the project's root, with: papermill "
            f"notebooks/01_data.ipynb outputs/01_data.ipynb -p source {source} -p data_dir {folder.name}")
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        names = {path.removesuffix(".jsonl") for path in manifest["sha256"]}
        if not names == set(manifest["counts"]) == {"train", "validation", "train_split", "validation_split", "test"}:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{shown(folder)}/manifest.json is not what 01_data writes: run 01_data again") from None
    return manifest


def data_hash(data_dir: str | Path) -> str:
    """sha256 over the files of a dataset; ValueError if one has changed since it was made."""
    folder, hashes = data_folder(data_dir), read_manifest(data_dir)["sha256"]
    for name in _changed(folder, hashes):
        raise ValueError(f"{shown(folder)}/{name} has changed since it was made: run 01_data again")
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def load_split(data_dir: str | Path, split: str):
    """A `datasets.Dataset` of one split ("train", "validation" or "test") with the schema's six columns.

    "train" is train_split.jsonl; the merged train.jsonl also holds the validation problems: never loaded.
    """
    if split not in SPLIT_FILES:
        raise ValueError(f"split={split!r}: choose one of {', '.join(SPLIT_FILES)}")
    folder = data_folder(data_dir)
    if not read_manifest(folder)["counts"][SPLIT_FILES[split].removesuffix(".jsonl")]:
        raise ValueError(f"{shown(folder)}: the {split} split is empty")
    from datasets import Dataset  # a slow import that the steps above do not need

    with (folder / SPLIT_FILES[split]).open(encoding="utf-8") as lines:
        return Dataset.from_list([json.loads(line) for line in lines])
