"""Generated problems in MATH's own schema, and how rows are split."""

import itertools
import json
import random
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

LEVELS = ("Level 1", "Level 2", "Level 3", "Level 4", "Level 5", "Level ?")  # MATH has two rows of "Level ?"


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """One JSON object a line, UTF-8, newline at the end; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")


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
