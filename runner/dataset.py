"""Problems with checkable answers: MATH (arXiv 2103.03874) or generated problems in its schema.

The steps are those of the reference experiment: merge all parts into train and validation, split
train 90/10, keep the original validation for testing. `make_dataset` does all of them and writes
one folder:

    train.jsonl  validation.jsonl                           merged parts, read by these steps only
    train_split.jsonl  validation_split.jsonl  test.jsonl   what every later notebook loads
    manifest.json                                           parameters, counts, sha256 of each file

A row has sample_id, problem, level, type, solution and answer (the content of the solution's last
box).
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lib.answers import MAX_ANSWER, last_boxed
from runner import ROOT, WORK, hub
from runner.files import sha256
from runner.problems import (
    DIFFICULTIES,
    GENERATED,
    drop_overlaps,
    duplicates,
    generate,
    near_overlaps,
    split_train,
    write_jsonl,
)

SOURCES = (*GENERATED, "math")
HUB_DATASET = "fdyrd/MATH"
FIELDS = ("problem", "level", "type", "solution")
SUFFIXES = (".jsonl", ".json", ".parquet")
SPLIT_WORDS = {"train": ("train",), "validation": ("test", "validation")}  # in a part's path
SPLIT_FILES = {"train": "train_split.jsonl", "validation": "validation_split.jsonl",
               "test": "test.jsonl"}
FILES = ("train.jsonl", "validation.jsonl", *SPLIT_FILES.values())


# --- paths ----------------------------------------------------------------------------------------


def data_folder(data_dir: str | Path) -> Path:
    """Both `arithmetic` and `data/arithmetic` mean <workspace>/data/arithmetic.

    An absolute path stays. ValueError for a path with `..` and for an address.
    """
    if "://" in str(data_dir):  # it may hold a password: it is not repeated
        raise ValueError("data_dir is an address: give a folder below data/, or an absolute path")
    path = Path(data_dir).expanduser()
    if ".." in path.parts:
        raise ValueError(f"data_dir is {str(data_dir)!r}: give a folder below data/, or an "
                         "absolute path")
    if path.is_absolute():
        return path
    return WORK / path if path.parts[:1] == ("data",) else WORK / "data" / path


def shown(path: Path) -> str:
    """The path from the project's root when it lies below it, else its last two parts."""
    path = Path(path).resolve()
    if path.is_relative_to(WORK):
        return path.relative_to(WORK).as_posix()
    return "/".join(path.parts[-2:])


# --- reading and merging parts --------------------------------------------------------------------


def find_parts(folder: Path) -> dict[str, list[str]]:
    """Part files at any depth, by split, as sorted paths relative to `folder`.

    Hidden files and folders are skipped.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{shown(folder)} is not a folder: give the one that holds the "
                                "parts")
    parts: dict[str, list[str]] = {split: [] for split in SPLIT_WORDS}
    for path in sorted(folder.rglob("*")):
        part = path.relative_to(folder)
        hidden = any(name.startswith(".") for name in part.parts)
        if path.suffix in SUFFIXES and path.is_file() and not hidden:
            parts[_split_of(part)].append(part.as_posix())

    for split, found in parts.items():
        if not found:
            raise ValueError(
                f"{shown(folder)} has no {split} part: no {', '.join(SUFFIXES)} file with the word "
                f"{' or '.join(SPLIT_WORDS[split])} in its name or folder")
    return parts


def _split_of(part: Path) -> str:
    """The split that one word of a part's path names, in the file's name or a folder's."""
    words = set(re.split(r"[^a-z]+", part.with_suffix("").as_posix().lower()))
    splits = [split for split, names in SPLIT_WORDS.items() if words & set(names)]
    if len(splits) == 1:
        return splits[0]
    why = "both train and test/validation" if splits else "neither train nor test/validation"
    raise ValueError(f"{part.as_posix()}: the path says {why}: rename the file or its folder to "
                     "tell its split")


def _numbered_rows(folder: Path, part: str) -> Iterator[tuple[int, object]]:
    """(1-based line or row number, parsed row) of one part; errors name the file and the line."""
    path = folder / part
    try:
        if path.suffix == ".parquet":
            yield from _parquet_rows(path)
        elif path.suffix == ".json":
            yield from _json_rows(path, part)
        else:
            yield from _json_lines(path, part)
    except UnicodeDecodeError:
        raise ValueError(f"{part}: not UTF-8 text: save the file in that encoding") from None
    except OSError as e:
        raise ValueError(f"{part}: cannot be read ({type(e).__name__}): is the file "
                         "truncated?") from None


def _parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as e:
        raise OSError(str(e)) from None
    yield from enumerate(table.to_pylist(), 1)


def _json_rows(path: Path, part: str) -> Iterator[tuple[int, object]]:
    """One problem, or a list of problems."""
    text = path.read_text(encoding="utf-8-sig")
    loaded = _parsed(text, part)
    yield from enumerate(loaded if isinstance(loaded, list) else [loaded], 1)


def _json_lines(path: Path, part: str) -> Iterator[tuple[int, object]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _parsed(line, part, number)


def _parsed(text: str, part: str, first_line: int = 1) -> object:
    """The JSON value in `text`, which begins at `first_line` of the part."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{part}:{first_line}: brackets are nested too deeply to be read: a row "
                         "is one object of texts") from None
    except json.JSONDecodeError as e:
        where = f"{part}:{first_line + e.lineno - 1}"
        if e.msg == "Extra data" and part.endswith(".json"):
            raise ValueError(f"{where}: more than one JSON value: if each line is a row, rename "
                             "the file to .jsonl") from None
        what = f"{e.msg.removesuffix(' starting at')}, column {e.colno}"
        raise ValueError(f"{where}: not valid JSON ({what}): is the line truncated?") from None


def check_row(row: object, where: str) -> dict[str, str]:
    """The row's four fields, checked, plus `answer`. `where` (file:line) opens every error."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with {', '.join(FIELDS)}, not a "
                         f"{type(row).__name__}")
    for field in FIELDS:
        if field not in row:
            raise ValueError(f"{where}: field '{field}' is missing")
        _check_text(row[field], f"{where}: field '{field}'")
    if row["level"] not in DIFFICULTIES:
        raise ValueError(f"{where}: unknown level {row['level']!r}; known: "
                         f"{', '.join(DIFFICULTIES)}")
    answer = last_boxed(row["solution"])
    if answer is None:
        raise ValueError(f"{where}: the solution has no complete \\boxed{{...}}, so there is no "
                         "gold answer")
    if len(answer) > MAX_ANSWER:
        raise ValueError(f"{where}: the gold answer has {len(answer):,} characters, and the "
                         f"graders read at most {MAX_ANSWER:,}: leave the problem out")
    return {field: row[field] for field in FIELDS} | {"answer": answer}


def _check_text(value: object, what: str):
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} is not a non-empty text")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        lone = ascii(value[e.start])[1:-1]
        raise ValueError(f"{what} holds {lone}, half of a character that was cut in two: write "
                         "the whole character or delete it") from None


def merge_parts(folder: Path) -> dict[str, list[dict]]:
    """All parts of a folder as {"train": rows, "validation": rows}, ordered by part and line.

    sample_id is the part's path without its suffix, a colon and the 1-based line, such as
    "algebra/train:17".
    """
    folder, merged = Path(folder), {}
    seen: dict[str, str] = {}
    for split, parts in find_parts(folder).items():
        merged[split] = []
        for part in parts:
            name = part.removesuffix(Path(part).suffix)
            if name in seen:
                raise ValueError(f"{part} and {seen[name]} would give the same sample_id: keep one "
                                 "of them")
            seen[name] = part
            for number, row in _numbered_rows(folder, part):
                checked = check_row(row, f"{part}:{number}")
                merged[split].append({"sample_id": f"{name}:{number}"} | checked)
        if not merged[split]:
            raise ValueError(f"{shown(folder)}: the {split} parts hold no rows "
                             f"({', '.join(parts)})")
    return merged


# --- MATH -----------------------------------------------------------------------------------------


def download_math() -> Path:
    """The folder of the hub's copy of MATH (12,500 problems), from the local cache if it is there.

    ConnectionError if it cannot be had.
    """
    from huggingface_hub import snapshot_download

    if hub.endpoint_has_password():
        raise ConnectionError("HF_ENDPOINT holds a password, which would be written to logs: set "
                              "HF_TOKEN instead")
    patterns = [f"*{suffix}" for suffix in SUFFIXES]
    try:
        return Path(snapshot_download(HUB_DATASET, repo_type="dataset", allow_patterns=patterns))
    except Exception as exc:  # the hub client's own errors, httpx's and the system's
        raise ConnectionError(
            f"cannot download {HUB_DATASET} ({type(exc).__name__}): set math_dir to a folder with "
            "a local copy (with make: MATH_DIR=folder), or the environment variable HF_ENDPOINT to "
            "a mirror that this machine reaches.") from None


# --- making a data set ----------------------------------------------------------------------------


def make_dataset(source: str, data_dir: str | Path | None = None,
                 math_dir: str | Path | None = None, data_seed: int = 0,
                 n_train: int | None = None, n_test: int | None = None) -> tuple[Path, bool]:
    """Make data/<data_dir>; (folder, True), or (folder, False) if the same data are there already.

    math_dir: a local copy of MATH (relative to the project's root); None downloads it.
    n_train, n_test: problems to generate; None: the source's own number.
    Everything is written to a temporary folder beside it, which is renamed at the end: an error
    leaves no output and keeps the data that were there. Other people's folders are never replaced.
    """
    _check_request(source, math_dir)
    out = data_folder(data_dir or source)
    _refuse_foreign(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        stage = Path(temporary) / "new"
        stage.mkdir()
        parameters = {"source": source, "data_seed": data_seed}
        if source in GENERATED:
            sizes = _sizes(source, n_train, n_test)
            parameters |= sizes
            parts = stage / "parts"
            generate(source, parts, data_seed, **sizes)
        elif math_dir is None:
            parts = download_math()
        else:
            parts = ROOT / Path(math_dir).expanduser()

        manifest = {"parameters": parameters} | _build(parts, stage, data_seed)
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        (stage / "manifest.json").write_text(text, encoding="utf-8")
        if _is_there(out, text, manifest["sha256"]):
            return out, False
        if out.exists():
            os.replace(out, Path(temporary) / "old")
        os.replace(stage, out)
    return out, True


def _refuse_foreign(folder: Path):
    """ValueError if `make_dataset` did not make the folder."""
    if (folder / "manifest.json").is_file() or not folder.exists():
        return
    if any(folder.iterdir()):
        raise ValueError(f"{shown(folder)} holds other files (no manifest.json): choose another "
                         "data_dir")


def _sizes(source: str, n_train: int | None, n_test: int | None) -> dict[str, int]:
    """Problems to generate: the numbers that were asked for, else the source's own."""
    own = GENERATED[source]
    sizes = {"n_train": own.n_train, "n_test": own.n_test}
    if n_train is not None:
        sizes["n_train"] = n_train
    if n_test is not None:
        sizes["n_test"] = n_test
    return sizes


def _check_request(source: str, math_dir: str | Path | None):
    """ValueError for a source that is unknown or contradicts math_dir."""
    if source not in SOURCES:
        raise ValueError(f"source={source!r}: choose one of {', '.join(SOURCES)}")
    if "://" in str(math_dir):
        raise ValueError("math_dir is an address: give a local folder")
    if source in GENERATED and math_dir is not None:
        raise ValueError(f"math_dir is for source='math': {source} is generated and reads no "
                         "folder")


def _build(parts: Path, stage: Path, seed: int) -> dict:
    """Merge, split, drop overlaps, write the five files to `stage`; returns the manifest's rest."""
    merged = merge_parts(parts)
    test = merged["validation"]
    train, validation = split_train(merged["train"], seed)
    # A problem of two splits stays in the one used later: test before validation before train.
    validation, leaked = drop_overlaps(validation, test)
    train, dropped = drop_overlaps(train, test + validation)
    contents = dict(zip(FILES, (merged["train"], test, train, validation, test), strict=True))
    for name, rows in contents.items():
        write_jsonl(stage / name, rows)
    return {
        "counts": {name.removesuffix(".jsonl"): len(rows) for name, rows in contents.items()},
        "dropped_from_train_split": dropped,
        "dropped_from_validation_split": leaked,
        "differ_in_white_space_only": near_overlaps(merged["train"], test),
        "duplicates": {split: duplicates(rows) for split, rows in merged.items()},
        "empty_answers": [row["sample_id"] for row in merged["train"] + test
                          if not row["answer"].strip()],
        "sha256": {name: sha256(stage / name) for name in FILES},
    }


def _is_there(folder: Path, manifest: str, hashes: dict[str, str]) -> bool:
    """Whether the folder holds these data with this manifest, unchanged."""
    kept = folder / "manifest.json"
    if not kept.is_file() or kept.read_text(encoding="utf-8") != manifest:
        return False
    return not _changed(folder, hashes)


def _changed(folder: Path, hashes: dict[str, str]) -> list[str]:
    return [name for name, expected in hashes.items() if sha256(folder / name) != expected]


# --- loading --------------------------------------------------------------------------------------


def read_manifest(data_dir: str | Path) -> dict:
    """The manifest of a dataset folder.

    FileNotFoundError with the command that makes the data; ValueError for a file of another form.
    """
    folder = data_folder(data_dir)
    file = folder / "manifest.json"
    if not file.is_file():
        raise FileNotFoundError(f"no data in {shown(folder)}. {_how_to_make(folder.name)}")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        names = set(manifest["sha256"])
        counted = {f"{name}.jsonl" for name in manifest["counts"]}
    except (ValueError, KeyError, TypeError):
        names = counted = set()
    if names != set(FILES) or counted != set(FILES):
        raise ValueError(f"{shown(folder)}/manifest.json is not what 01_data writes: run 01_data "
                         "again")
    return manifest


def _how_to_make(name: str) -> str:
    """The command that makes data/<name>; a source only if the name says which."""
    command = "papermill notebooks/01_data.ipynb outputs/01_data.ipynb"
    for source in SOURCES:
        if source in name.lower():
            return (f"Make them, from the project's root, with: {command} -p source {source} "
                    f"-p data_dir {name}")
    return (f"{name!r} is none of the sources {', '.join(SOURCES)}: bring your own problems into "
            f"MATH's schema (docs/recipe-data.md), then: {command} -p source math "
            f"-p math_dir FOLDER -p data_dir {name}")


def data_hash(data_dir: str | Path) -> str:
    """sha256 over the files of a dataset; ValueError if one has changed since it was made."""
    folder, hashes = data_folder(data_dir), read_manifest(data_dir)["sha256"]
    for name in _changed(folder, hashes):
        raise ValueError(f"{shown(folder)}/{name} has changed since it was made: run 01_data again")
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def load_split(data_dir: str | Path, split: str):
    """A `datasets.Dataset` of one split ("train", "validation" or "test") with six columns.

    "train" is train_split.jsonl; the merged train.jsonl also holds the validation problems and is
    never loaded.
    """
    if split not in SPLIT_FILES:
        raise ValueError(f"split={split!r}: choose one of {', '.join(SPLIT_FILES)}")
    folder, name = data_folder(data_dir), SPLIT_FILES[split]
    if read_manifest(folder)["counts"][name.removesuffix(".jsonl")] == 0:
        raise ValueError(f"{shown(folder)}: the {split} split is empty")
    from datasets import Dataset  # a slow import that the steps above do not need

    with (folder / name).open(encoding="utf-8") as lines:
        return Dataset.from_list([json.loads(line) for line in lines])
