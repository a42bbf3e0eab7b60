"""The files that a data set arrives in: they are read, checked row by row, and merged.

A part is a .jsonl, .json or .parquet file. Its rows have MATH's own fields (arXiv 2103.03874), or
a problem and an answer under names that the user gives (`Fields`).
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from lib.answers import MAX_ANSWER, last_boxed
from runner.problems import DIFFICULTIES

FIELDS = ("problem", "level", "type", "solution")
SUFFIXES = (".jsonl", ".json", ".parquet")
SPLIT_WORDS = {"train": ("train",), "validation": ("test", "validation")}  # in a part's path


# --- finding --------------------------------------------------------------------------------------


def all_parts(folder: Path) -> list[Path]:
    """Part files at any depth, sorted, relative to `folder`. Hidden ones are skipped."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder.name} is not a folder: give the one that holds the parts")
    parts = [path.relative_to(folder) for path in sorted(folder.rglob("*"))
             if path.suffix in SUFFIXES and path.is_file()]
    return [part for part in parts if not any(name.startswith(".") for name in part.parts)]


def find_parts(folder: Path) -> dict[str, list[Path]]:
    """`all_parts` by split.

    ValueError if a split has none, or if a path does not say which split it is of.
    """
    parts: dict[str, list[Path]] = {split: [] for split in SPLIT_WORDS}
    for part in all_parts(folder):
        parts[_split_of(part)].append(part)

    for split, found in parts.items():
        if not found:
            raise ValueError(
                f"{folder.name} has no {split} part: no {', '.join(SUFFIXES)} file with the word "
                f"{' or '.join(SPLIT_WORDS[split])} in its name or folder")
    return parts


def _splits_named(part: Path) -> list[str]:
    """The splits that words of a part's path name, in the file's name or a folder's."""
    words = set(re.split(r"[^a-z]+", part.with_suffix("").as_posix().lower()))
    return [split for split, names in SPLIT_WORDS.items() if words & set(names)]


def _split_of(part: Path) -> str:
    """The one split that a part's path names."""
    splits = _splits_named(part)
    if len(splits) == 1:
        return splits[0]
    why = "both train and test/validation" if splits else "neither train nor test/validation"
    raise ValueError(f"{part.as_posix()}: the path says {why}: rename the file or its folder to "
                     "tell its split")


def names_a_test_split(folder: Path) -> bool:
    """Whether the path of a part says that it is for testing."""
    return any("validation" in _splits_named(part) for part in all_parts(folder))


# --- reading --------------------------------------------------------------------------------------


def _numbered_rows(path: Path, part: str) -> Iterator[tuple[int, object]]:
    """(1-based line or row number, parsed row) of a file. Errors name the part and the line."""
    if path.suffix == ".parquet":
        yield from enumerate(_parquet_rows(path, part), 1)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{part}: not UTF-8 text: save the file in that encoding") from None
    if path.suffix == ".json":  # one problem, or a list of problems
        loaded = _parsed(text, part)
        yield from enumerate(loaded if isinstance(loaded, list) else [loaded], 1)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _parsed(line, part, number)


def _parquet_rows(path: Path, part: str) -> list[dict]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as e:
        raise ValueError(f"{part}: cannot be read ({type(e).__name__}): is the file "
                         "truncated?") from None


def _parsed(text: str, part: str, first_line: int = 1) -> object:
    """The JSON value in `text`, which begins at `first_line` of the part."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        where = f"{part}:{first_line + e.lineno - 1}"
        if e.msg == "Extra data" and part.endswith(".json"):
            raise ValueError(f"{where}: more than one JSON value: if each line is a row, rename "
                             "the file to .jsonl") from None
        what = f"{e.msg.removesuffix(' starting at')}, column {e.colno}"
        raise ValueError(f"{where}: not valid JSON ({what}): is the line truncated?") from None


# --- rows in MATH's schema ------------------------------------------------------------------------


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


# --- rows of one's own ----------------------------------------------------------------------------


class Fields(NamedTuple):
    """What a row of one's own calls its problem, answer, difficulty and subject.

    Without a field for the difficulty it is "Level ?", and all problems are of one type.
    """

    problem: str = "problem"
    answer: str = "answer"
    level: str | None = None
    type: str | None = None


def own_row(row: object, where: str, fields: Fields) -> dict[str, str]:
    """A row of one's own in MATH's schema, checked. `where` (file:line) opens every error."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with {fields.problem} and {fields.answer}, "
                         f"not a {type(row).__name__}")
    problem = _value(row, fields.problem, "problem_field", where)
    answer = _value(row, fields.answer, "answer_field", where)
    kind = _value(row, fields.type, "type_field", where) if fields.type else "Problem"
    if fields.level:
        level = _difficulty(_value(row, fields.level, "level_field", where), fields.level, where)
    else:
        level = _difficulty_by_calculations(answer)
    solution = _with_box(answer, f"{where}: field {fields.answer!r}")
    converted = {"problem": problem, "level": level, "type": kind, "solution": solution}
    return check_row(converted, where)


def _value(row: dict, name: str, parameter: str, where: str) -> str:
    """The text or number in a field. ValueError names the parameter that says which field it is."""
    if name not in row:
        raise ValueError(f"{where}: there is no field {name!r}; the row has "
                         f"{', '.join(map(str, row))}: name one of them with -p {parameter} NAME")
    value = row[name]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    _check_text(value, f"{where}: field {name!r}")
    return value


def _difficulty(value: str, name: str, where: str) -> str:
    """Level 1 to Level 5, from that or from a bare number."""
    level = f"Level {value.removeprefix('Level ')}"
    if level not in DIFFICULTIES:
        raise ValueError(f"{where}: field {name!r} holds {value!r}, and a difficulty is 1 to 5 or "
                         "'Level 1' to 'Level 5': leave level_field out if there is none")
    return level


def _difficulty_by_calculations(answer: str) -> str:
    """The number of calculations that GSM8K writes between << and >>, at most 5; else unknown."""
    calculations = answer.count("<<")
    return f"Level {min(calculations, 5)}" if calculations else "Level ?"


def _with_box(text: str, what: str) -> str:
    """A worked solution whose last box is the answer.

    text: a solution that ends in a box, one that ends in `#### 72`, or nothing but the answer.
    """
    if last_boxed(text) is not None:
        return text
    steps, mark, end = text.rpartition("####")
    answer = end.strip()
    if not answer:
        raise ValueError(f"{what} has nothing behind its last ####, so there is no gold answer")
    if "\n" in answer:
        raise ValueError(f"{what} has several lines and neither \\boxed{{...}} nor a last line "
                         "#### ANSWER: name the field of the answer with -p answer_field NAME")
    box = f"\\boxed{{{answer}}}"
    if last_boxed(box) != answer:
        raise ValueError(f"{what}: the braces of {answer[:80]!r} do not match")
    return re.sub("<<.*?>>", "", steps) + box


# --- merging --------------------------------------------------------------------------------------

ReadRow = Callable[[object, str], dict[str, str]]  # (row, file:line) -> the fields and `answer`


def merge_parts(folder: Path, read_row: ReadRow = check_row) -> dict[str, list[dict]]:
    """All parts of a folder as {"train": rows, "validation": rows}, ordered by part and line."""
    merged = {}
    for split, parts in find_parts(folder).items():
        merged[split] = rows_of(folder, parts, read_row)
        if not merged[split]:
            names = ", ".join(part.as_posix() for part in parts)
            raise ValueError(f"{folder.name}: the {split} parts hold no rows ({names})")
    return merged


def rows_of(folder: Path, parts: list[Path], read_row: ReadRow) -> list[dict]:
    """The rows of these parts.

    sample_id is the part's path without its suffix, a colon and the 1-based line, such as
    "algebra/train:17". ValueError if two parts differ in their suffix alone.
    """
    rows = []
    seen: dict[Path, Path] = {}
    for part in parts:
        name = part.with_suffix("")
        other = seen.setdefault(name, part)
        if other != part:
            raise ValueError(f"{part} and {other} would give the same sample_id: keep one of them")
        for number, row in _numbered_rows(folder / part, part.as_posix()):
            fields = read_row(row, f"{part.as_posix()}:{number}")
            rows.append({"sample_id": f"{name.as_posix()}:{number}"} | fields)
    return rows


def rows_of_all(path: Path, read_row: ReadRow) -> list[dict]:
    """The rows of one file, or of all parts of a folder."""
    if path.is_file():
        return rows_of(path.parent, [Path(path.name)], read_row)
    return rows_of(path, all_parts(path), read_row)
