"""Problems with checkable answers: MATH (arXiv 2103.03874) or generated problems in MATH's own schema.

The steps are those of the reference experiment: merge all parts into train and validation, split train 90/10,
keep the original validation for testing. `make_dataset` does all of them and writes one folder:

    train.jsonl  validation.jsonl                           merged parts, only read by the steps below
    train_split.jsonl  validation_split.jsonl  test.jsonl   what every later notebook loads
    manifest.json                                           parameters, counts, sha256 of each file

A row has sample_id, problem, level, type, solution and answer (the content of the solution's last box).
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lib.answers import last_boxed
from runner import ROOT, WORK
from runner.files import sha256
from runner.problems import (
    GENERATED,
    LEVELS,
    drop_overlaps,
    duplicates,
    generate,
    near_overlaps,
    split_train,
    write_jsonl,
)

HUB_DATASET = "fdyrd/MATH"
FIELDS = ("problem", "level", "type", "solution")
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












# ---- generated problems --------------------------------------------------------------------------










SOURCES = (*GENERATED, "math")




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
