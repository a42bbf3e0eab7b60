"""Problems with checkable answers: MATH, GSM8K, generated problems, or a user's own.

The steps are those of the reference experiment: merge all parts into train and validation, split
train 90/10, keep the original validation for testing. `make_dataset` does all of them and writes
one folder:

    train.jsonl  validation.jsonl                           merged parts, read by these steps only
    train_split.jsonl  validation_split.jsonl  test.jsonl   what every later notebook loads
    manifest.json                                           parameters, counts, sha256 of each file

A row has sample_id, problem, level, type, solution and answer (the content of the solution's last
box). The fields are those of MATH (arXiv 2103.03874).
"""

import hashlib
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lib.rewards import difficulties
from runner import ROOT, WORK, hub
from runner.files import sha256
from runner.parts import (
    SUFFIXES,
    Fields,
    ReadRow,
    merge_parts,
    names_a_test_split,
    own_row,
    rows_of_all,
)
from runner.problems import (
    GENERATED,
    drop_overlaps,
    duplicates,
    generate,
    near_overlaps,
    split_train,
    write_jsonl,
)
from runner.reading import nearest


class HubCopy(NamedTuple):
    """Where the hub has a data set, and what to do where it cannot be reached."""

    name: str
    patterns: tuple[str, ...]
    otherwise: str


HUB_COPIES = {
    "math": HubCopy("fdyrd/MATH", tuple(f"*{suffix}" for suffix in SUFFIXES),
                    "set math_dir to a folder with a local copy (with make: MATH_DIR=folder)"),
    "gsm8k": HubCopy("openai/gsm8k", ("main/*.parquet",),
                     "give a folder with a local copy as the source (-p source FOLDER "
                     "-p problem_field question -p data_dir gsm8k)"),
}
SOURCES = (*GENERATED, *HUB_COPIES)
GSM8K_FIELDS = Fields("question", "answer")
# parameter -> kinds of sources that make use of it
USED_BY = {"math_dir": ["math"], "n_train": ["generated"], "n_test": ["generated", "own"],
           **{f"{field}_field": ["own"] for field in Fields._fields}}
TEST_SHARE = 0.1  # of one's own problems, if no part of them is for testing
FEWEST = 20  # problems that can be shared out to training, validation and test
SPLIT_FILES = {"train": "train_split.jsonl", "validation": "validation_split.jsonl",
               "test": "test.jsonl"}
FILES = ("train.jsonl", "validation.jsonl", *SPLIT_FILES.values())


# --- paths ----------------------------------------------------------------------------------------


def data_folder(data_dir: str | Path) -> Path:
    """Both `arithmetic` and `data/arithmetic` mean <workspace>/data/arithmetic.

    An absolute path stays.
    """
    path = Path(data_dir).expanduser()
    if path.parts[:1] == ("data",):
        return WORK / path
    return WORK / "data" / path


def shown(path: Path) -> str:
    """The path from the project's root when it lies below it, else its last two parts."""
    path = Path(path).resolve()
    if path.is_relative_to(WORK):
        return path.relative_to(WORK).as_posix()
    return "/".join(path.parts[-2:])


# --- where the parts come from --------------------------------------------------------------------


def download(source: str) -> Path:
    """The folder of the hub's copy of a data set, from the local cache if it is there.

    FileNotFoundError if it cannot be had.
    """
    from huggingface_hub import snapshot_download

    hub.refuse_password()
    copy = HUB_COPIES[source]
    remedy = f"{copy.otherwise}, or set HF_ENDPOINT to a mirror that this machine reaches"
    with hub.explained(copy.name, remedy):
        return Path(snapshot_download(copy.name, repo_type="dataset",
                                      allow_patterns=list(copy.patterns)))


def merge_own(path: Path, read_row: ReadRow, seed: int,
              n_test: int | None = None) -> dict[str, list[dict]]:
    """The problems of a user's file or folder as {"train": rows, "validation": rows}.

    A folder with a part for testing is merged as MATH is. From anything else n_test problems are
    drawn for testing (None: a tenth), stratified and seeded as the validation split is.
    """
    if path.is_dir() and names_a_test_split(path):
        if n_test is not None:
            raise ValueError(f"n_test={n_test}: {shown(path)} has a part for testing, of which all "
                             "problems are taken: leave n_test out")
        return merge_parts(path, read_row)
    rows = rows_of_all(path, read_row)
    if len(rows) < FEWEST:
        raise ValueError(f"{shown(path)} holds {len(rows)} problems: at least {FEWEST} are needed "
                         "to share them out to training, validation and test")
    share = TEST_SHARE
    if n_test is not None:
        if not 1 <= n_test <= len(rows) // 2:
            raise ValueError(f"n_test={n_test}: give a number from 1 to half of the {len(rows)} "
                             f"problems of {shown(path)}")
        share = n_test / len(rows)
    train, test = split_train(rows, seed, share)
    return {"train": train, "validation": test}


# --- making a data set ----------------------------------------------------------------------------


def make_dataset(source: str, data_dir: str | Path | None = None,
                 math_dir: str | Path | None = None, data_seed: int = 0,
                 n_train: int | None = None, n_test: int | None = None,
                 **field_names: str | None) -> tuple[Path, bool]:
    """Make data/<data_dir>; (folder, True), or (folder, False) if the same data are there already.

    source: one of SOURCES, or a file or folder of one's own problems (relative to the project).
    math_dir: a local copy of MATH (relative to the project's root); None downloads it.
    n_train, n_test: problems to generate; None: the source's own number. n_test: also the test
        problems to draw from a file of one's own.
    field_names: `problem_field`, `answer_field`, `level_field` and `type_field` of one's own rows.

    Everything is written to a temporary folder beside it, which is renamed at the end: an error
    leaves no output and keeps the data that were there. Other people's folders are never replaced.
    """
    _check_request(source, {"math_dir": math_dir, "n_train": n_train, "n_test": n_test}
                   | field_names)
    named = {name.removesuffix("_field"): field for name, field in field_names.items() if field}
    out = data_folder(data_dir or _own_name(source))
    _refuse_foreign(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        stage = Path(temporary) / "new"
        stage.mkdir()
        parameters, merged = _collect(source, stage, math_dir, data_seed, n_train, n_test, named)
        manifest = {"parameters": parameters} | _build(merged, stage, data_seed)
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        (stage / "manifest.json").write_text(text, encoding="utf-8")
        if _is_there(out, text, manifest["sha256"]):
            return out, False
        if out.exists():
            os.replace(out, Path(temporary) / "old")
        os.replace(stage, out)
    return out, True


def _collect(source: str, stage: Path, math_dir: str | Path | None, data_seed: int,
             n_train: int | None, n_test: int | None,
             fields: dict[str, str]) -> tuple[dict, dict[str, list[dict]]]:
    """(what the manifest says of the request, rows for training and for testing)"""
    parameters = {"source": source, "data_seed": data_seed}
    if source in GENERATED:
        usual = GENERATED[source]
        sizes = {"n_train": usual.n_train if n_train is None else n_train,
                 "n_test": usual.n_test if n_test is None else n_test}
        generate(source, stage / "parts", data_seed, **sizes)
        return parameters | sizes, merge_parts(stage / "parts")
    if source == "math":
        folder = ROOT / Path(math_dir).expanduser() if math_dir else download(source)
        return parameters, merge_parts(folder)
    if source == "gsm8k":
        return parameters, merge_parts(download(source), partial(own_row, fields=GSM8K_FIELDS))
    path, own = own_path(source), Fields(**fields)
    parameters |= {"source": shown(path), "n_test": n_test, "fields": own._asdict()}
    return parameters, merge_own(path, partial(own_row, fields=own), data_seed, n_test)


def own_path(source: str) -> Path:
    """The file or folder that a source names, from the project's root."""
    return ROOT / Path(source).expanduser()


def _own_name(source: str) -> str:
    """What the data are called if nobody says: as the source, or as its file or folder."""
    if source in SOURCES:
        return source
    name = own_path(source).stem
    if name in SOURCES:
        raise ValueError(f"{name!r} is also the name of a source of this project: say what the "
                         "data are to be called, with -p data_dir NAME")
    return name


def _refuse_foreign(folder: Path):
    """ValueError if `make_dataset` did not make the folder."""
    if (folder / "manifest.json").is_file() or not folder.exists():
        return
    if any(folder.iterdir()):
        raise ValueError(f"{shown(folder)} holds other files (no manifest.json): choose another "
                         "data_dir")


def _check_request(source: str, given: dict[str, object]):
    """ValueError for a source that is unknown, or for a parameter that it makes no use of.

    given: the other parameters, by name; None is not given.
    """
    kind = "generated" if source in GENERATED else source
    if source not in SOURCES:
        kind = "own"
        _check_own(source)
    for name, value in given.items():
        if value is not None and kind not in USED_BY[name]:
            raise ValueError(f"source={source!r} makes no use of {name}: leave it out")


def _check_own(source: str):
    """ValueError if a source is neither known nor a file or folder that can be read."""
    path = own_path(source)
    if not path.exists():
        raise ValueError(f"source={source!r} is no file or folder, seen from the project's root"
                         f"{nearest(source, SOURCES)}; or choose one of {', '.join(SOURCES)}")
    if path.is_file() and path.suffix not in SUFFIXES:
        raise ValueError(f"source={source!r}: a file of problems ends in {', '.join(SUFFIXES)}")


def _build(merged: dict[str, list[dict]], stage: Path, seed: int) -> dict:
    """Split, drop overlaps, write the five files to `stage`; returns the manifest's rest."""
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
    """The manifest of a dataset folder. FileNotFoundError with the command that makes the data."""
    folder = data_folder(data_dir)
    file = folder / "manifest.json"
    if not file.is_file():
        raise FileNotFoundError(f"no data in {shown(folder)}. {_how_to_make(folder.name)}")
    return json.loads(file.read_text(encoding="utf-8"))


def _how_to_make(name: str) -> str:
    """The command that makes data/<name>; a source only if the name says which."""
    command = "papermill notebooks/01_data.ipynb out.ipynb --log-output"
    for source in SOURCES:
        if source in name.lower():
            return (f"Make them, from the project's root, with: {command} -p source {source} "
                    f"-p data_dir {name}")
    return (f"{name!r} is none of the sources {', '.join(SOURCES)}. Of your own problems, make "
            f"them with: {command} -p source FILE_OR_FOLDER -p data_dir {name} "
            "(docs/recipe-data.md)")


def data_hash(data_dir: str | Path) -> str:
    """sha256 over the files of a dataset; ValueError if one has changed since it was made."""
    folder, hashes = data_folder(data_dir), read_manifest(data_dir)["sha256"]
    for name in _changed(folder, hashes):
        raise ValueError(f"{shown(folder)}/{name} has changed since it was made: run 01_data again")
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def of_difficulties(rows, which: str):
    """The rows of a split that have one of these difficulties, such as "1-3" or "4,5"; or "all".

    ValueError if there is none.
    """
    if which == "all":
        return rows
    wanted = {f"Level {number}" for number in numbers_in(which)}
    kept = rows.filter(lambda row: row["level"] in wanted)
    if not len(kept):
        raise ValueError(f"train_difficulties={which!r}: no problem has one of them; there are "
                         f"{', '.join(sorted(set(rows['level'])))}")
    return kept


def numbers_in(which: str) -> list[int]:
    """The numbers in a list of numbers and ranges: "1-3,5" is 1, 2, 3 and 5."""
    numbers: list[int] = []
    for part in which.split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def check_rates(data_dir: str | Path, rates: int):
    """ValueError unless rates of difficulties 1 to `rates` are those of the training problems.

    A problem without a difficulty is allowed, as MATH has a few, but not a data set without any.
    """
    found = {int(number) for number in difficulties(load_split(data_dir, "train")["level"])}
    if found == {0}:
        raise ValueError(f"mask_rate_by_difficulty: no training problem of {data_dir} has a "
                         "difficulty, which is a level such as 'Level 3'")
    if max(found) > rates:
        raise ValueError(f"mask_rate_by_difficulty has {rates} rates, and the training problems of "
                         f"{data_dir} have difficulties up to {max(found)}: give one for each")


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
