"""Generated problems in MATH's own schema, and how rows are split.

A row has `problem`, `level`, `type` and `solution`. The column `level` is the difficulty, called as
in MATH.
"""

import itertools
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

DIFFICULTIES = ("Level 1", "Level 2", "Level 3", "Level 4", "Level 5",
                "Level ?")  # of two problems of MATH


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write one JSON object a line, UTF-8, newline at the end; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


# --- splitting ------------------------------------------------------------------------------------


def proportional_shares(sizes: dict, total: int) -> dict:
    """Share `total` over strata in proportion to their sizes, by largest remainders.

    The shares add up to `total`, and each is less than 1 from its exact share.
    """
    n = sum(sizes.values())
    shares = {key: size * total // n for key, size in sizes.items()}
    left = total - sum(shares.values())
    by_remainder = sorted(sizes, key=lambda key: (-(sizes[key] * total % n), key))
    for key in by_remainder[:left]:
        shares[key] += 1
    return shares


def split_train(rows: list[dict], seed: int,
                fraction: float = 0.1) -> tuple[list[dict], list[dict]]:
    """Split rows into (train, validation), stratified by type and difficulty, seeded.

    validation has round(fraction * n) rows (halves up), each stratum within one row of its share.
    The choice does not depend on the order of `rows`, which both lists keep. A stratum may have a
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
    train = [row for row in rows if row["sample_id"] not in chosen]
    validation = [row for row in rows if row["sample_id"] in chosen]
    return train, validation


def drop_overlaps(rows: list[dict], held_out: Iterable[dict]) -> tuple[list[dict], list[str]]:
    """(rows whose problem does not occur in `held_out`, sample_ids of the dropped rows)."""
    problems = {row["problem"] for row in held_out}
    kept = [row for row in rows if row["problem"] not in problems]
    dropped = [row["sample_id"] for row in rows if row["problem"] in problems]
    return kept, dropped


def duplicates(rows: list[dict]) -> list[list[str]]:
    """Groups of sample_ids that share one problem text, in order of first occurrence."""
    by_problem = defaultdict(list)
    for row in rows:
        by_problem[row["problem"]].append(row["sample_id"])
    return [ids for ids in by_problem.values() if len(ids) > 1]


def near_overlaps(rows: list[dict], held_out: Iterable[dict]) -> list[tuple[str, str]]:
    """Pairs of sample_ids whose problems differ in white space only; reported, not dropped."""
    by_text = {_without_white_space(row): row for row in held_out}
    pairs = []
    for row in rows:
        other = by_text.get(_without_white_space(row))
        if other and other["problem"] != row["problem"]:
            pairs.append((row["sample_id"], other["sample_id"]))
    return pairs


def _without_white_space(row: dict) -> str:
    return "".join(row["problem"].split())


# --- arithmetic: 47+8=, 52-7= and 47+?=55 ---------------------------------------------------------

ARITHMETIC_TYPES = ("Addition", "Subtraction", "Missing Number")


def _row(kind: str, difficulty: int, problem: str, solution: str) -> dict[str, str]:
    """A problem of this difficulty (1 to 5) in MATH's schema."""
    return {"problem": problem, "level": DIFFICULTIES[difficulty - 1], "type": kind,
            "solution": solution}


def arithmetic_row(kind: str, a: int, b: int) -> dict[str, str] | None:
    """One problem, a in 10..999 and b in 1..9; None if the sum has four digits.

    Level 1 and 2: two-digit a without and with a carry (or borrow). Level 3 and 4: the same for
    three-digit a. Level 5: the carry runs on to the next digit (95+8, 397+5, 402-7).
    """
    if kind == "Subtraction":
        return _subtraction(a, b)
    total = a + b
    if total > 999:
        return None

    tens, units = a // 10 % 10, a % 10
    carries = units + b > 9
    runs_on = carries and tens == 9
    steps = f"{units}+{b} = {units + b}, no carry"
    if carries:
        steps = f"{units}+{b} = {units + b}, write {units + b - 10} and carry 1"
    if runs_on:
        steps += "; 9+1 = 10: the carry runs on"

    problem, end = f"{a}+{b}=", f"{a}+{b} = \\boxed{{{total}}}"
    if kind == "Missing Number":
        problem, end = f"{a}+?={total}", f"{a}+{b} = {total} and ? = \\boxed{{{b}}}"
    return _row(kind, _arithmetic_difficulty(a, carries, runs_on), problem, f"{steps}, so {end}.")


def _subtraction(a: int, b: int) -> dict[str, str]:
    tens, units = a // 10 % 10, a % 10
    borrows = units < b
    runs_on = borrows and tens == 0
    steps = f"{units}-{b} = {units - b}, no borrow"
    if borrows:
        steps = f"{units} is less than {b}: borrow 1, {units + 10}-{b} = {units + 10 - b}"
    if runs_on:
        steps += "; the tens digit is 0: the borrow runs on to the hundreds"
    return _row("Subtraction", _arithmetic_difficulty(a, borrows, runs_on), f"{a}-{b}=",
                f"{steps}, so {a}-{b} = \\boxed{{{a - b}}}.")


def _arithmetic_difficulty(a: int, moves: bool, runs_on: bool) -> int:
    """moves: there is a carry or a borrow; runs_on: it reaches the hundreds."""
    if runs_on:
        return 5
    easy = 1 if a < 100 else 3
    return easy + moves


# --- operations: What is 47 + 38? -----------------------------------------------------------------

OPERATIONS = {"Addition": "+", "Subtraction": "-", "Multiplication": "*", "Division": "/"}
FACTORS = (  # values of a, values of b, difficulty of their product: the first row that has both
    (range(1, 6), range(1, 6), 1),
    (range(1, 10), range(1, 10), 2),
    (range(1, 13), range(1, 13), 3),
    (range(13, 50), range(2, 6), 4),
    (range(13, 100), range(2, 10), 5),
)


def operations_row(kind: str, a: int, b: int) -> dict[str, str] | None:
    """One problem, a and b >= 1; None if no difficulty has it. Division asks for a: a*b by b.

    Addition, Subtraction: level 1: one digit and one digit; 2: two and one; 3 and 4: two and two
    without and with a carry (or borrow); 5: three and two. Multiplication: level 1, 2, 3: factors
    up to 5, 9, 12; 4: 13..49 by 2..5; 5: 13..99 by 2..9, less level 4. Division: the same, and b
    is not the larger factor.
    """
    if kind in ("Addition", "Subtraction"):
        return _sum_row(kind, a, b)
    difficulty = _product_difficulty(a, b)
    if difficulty is None:
        return None
    if kind == "Multiplication":
        return _product_row(difficulty, a, b)
    if b > a:
        return None
    problem = f"{a * b} / {b}"
    solution = f"{b} * {a} = {a * b}, so {problem} = \\boxed{{{a}}}"
    return _row(kind, difficulty, f"What is {problem}?", solution)


def _sum_row(kind: str, a: int, b: int) -> dict[str, str] | None:
    """a + b or a - b: the units of b are added or subtracted last (47 + 38 = 77 + 8)."""
    sign = OPERATIONS[kind]
    direction = 1 if sign == "+" else -1
    units = b % 10
    result = a + direction * b
    if result < 0:
        return None

    moves = result > 99 or not 0 <= a % 10 + direction * units <= 9  # a carry or a borrow
    digits = len(str(a)), len(str(b))
    difficulty = {(1, 1): 1, (2, 1): 2, (2, 2): 3 + moves, (3, 2): 5}.get(digits)
    if difficulty is None:
        return None

    problem, between = f"{a} {sign} {b}", ""
    if b > 9 and units:
        between = f"{result - direction * units} {sign} {units} = "
    return _row(kind, difficulty, f"What is {problem}?",
                f"{problem} = {between}\\boxed{{{result}}}")


def _product_difficulty(a: int, b: int) -> int | None:
    """Of a * b, and of dividing it by b; None if no difficulty has these factors."""
    for values_a, values_b, difficulty in FACTORS:
        if a in values_a and b in values_b:
            return difficulty
    return None


def _product_row(difficulty: int, a: int, b: int) -> dict[str, str]:
    """a * b: tens and units of the larger factor one after the other (47 * 6 = 240 + 42)."""
    low, high = min(a, b), max(a, b)
    tens, units = high // 10 * 10, high % 10
    problem, between = f"{a} * {b}", ""
    if tens and units:
        between = f"{tens * low} + {units * low} = "
    return _row("Multiplication", difficulty, f"What is {problem}?",
                f"{problem} = {between}\\boxed{{{a * b}}}")


# --- a whole data set -----------------------------------------------------------------------------


class Generator(NamedTuple):
    """How a source's problems are made: row(kind, a, b) for all kinds and all values."""

    row: Callable[[str, int, int], dict[str, str] | None]
    kinds: Iterable[str]
    values_a: range
    values_b: range
    n_train: int  # of training and validation, if no other number is given
    n_test: int


GENERATED = {
    "arithmetic": Generator(arithmetic_row, ARITHMETIC_TYPES, range(10, 1000), range(1, 10),
                            6000, 1024),
    "operations": Generator(operations_row, OPERATIONS, range(1, 1000), range(1, 100),
                            10_000, 2048),
}


def generate(source: str, folder: Path, seed: int, n_train: int, n_test: int) -> None:
    """Write `<folder>/<subject>/train.jsonl` and `validation.jsonl`: n_train + n_test problems.

    No problem occurs twice. Types and difficulties are as balanced as the space allows (some have
    a few problems only), and the validation parts hold the same mix as the train parts. The same
    arguments give the same bytes.
    """
    generator = GENERATED[source]
    space = _all_problems(generator)
    available = {key: len(rows) for key, rows in space.items()}
    if n_train < 1 or n_test < 1 or n_train + n_test > sum(available.values()):
        raise ValueError(f"n_train={n_train}, n_test={n_test}: each must be >= 1 and their sum "
                         f"<= {sum(available.values())}")

    sizes = _balanced_sizes(available, n_train + n_test)
    test_sizes = proportional_shares(sizes, n_test)
    for kind in generator.kinds:
        rng = random.Random(f"{seed}/{kind}")
        train, test = [], []
        for difficulty in DIFFICULTIES[:5]:
            key = kind, difficulty
            drawn = rng.sample(space[key], sizes[key])
            test += drawn[:test_sizes[key]]
            train += drawn[test_sizes[key]:]
        subject = Path(folder) / kind.lower().replace(" ", "_")
        for name, rows in (("train", train), ("validation", test)):
            rng.shuffle(rows)
            write_jsonl(subject / f"{name}.jsonl", rows)


def _all_problems(generator: Generator) -> dict[tuple[str, str], list[dict]]:
    """{(type, difficulty): all problems of the source}"""
    space = defaultdict(list)
    values = itertools.product(generator.kinds, generator.values_a, generator.values_b)
    for kind, a, b in values:
        row = generator.row(kind, a, b)
        if row:
            space[kind, row["level"]].append(row)
    return space


def _balanced_sizes(available: dict, total: int) -> dict:
    """Share `total` over cells as evenly as what is available in each allows."""
    sizes = {}
    smallest_first = sorted(available, key=lambda key: (available[key], key))
    for i, key in enumerate(smallest_first):  # what one cell cannot give, the larger ones do
        even_share = (total - sum(sizes.values())) // (len(available) - i)
        sizes[key] = min(available[key], even_share)
    return sizes
