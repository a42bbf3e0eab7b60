"""runner.problems: shares and splits, overlaps, and generators of which every single problem is checked."""

import functools
import itertools
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner import problems
from runner.problems import (
    ARITHMETIC_TYPES,
    DIFFICULTIES,
    GENERATED,
    OPERATIONS,
    arithmetic_row,
    drop_overlaps,
    duplicates,
    generate,
    near_overlaps,
    operations_row,
    proportional_shares,
    split_train,
)

# ---- split ----

strata = st.dictionaries(
    st.tuples(st.sampled_from("ABC"), st.sampled_from(DIFFICULTIES)), st.integers(1, 40), min_size=1
)


def labelled(sizes):
    return [
        {"sample_id": f"{t}{lv}:{i}", "type": t, "level": lv}
        for (t, lv), n in sizes.items()
        for i in range(n)
    ]


@given(sizes=strata, seed=st.integers(0, 5), data=st.data())
@settings(max_examples=60)
def test_split_is_a_stratified_seeded_partition_that_ignores_order(sizes, seed, data):
    everything = labelled(sizes)
    train, validation = split_train(everything, seed)
    ids = [r["sample_id"] for r in train], [r["sample_id"] for r in validation]
    assert sorted(ids[0] + ids[1]) == sorted(r["sample_id"] for r in everything)
    assert len(validation) == (len(everything) + 5) // 10
    counts = Counter((r["type"], r["level"]) for r in validation)
    assert all(abs(counts[key] - n / 10) < 1 for key, n in sizes.items())
    shuffled = split_train(data.draw(st.permutations(everything)), seed)
    assert {r["sample_id"] for r in shuffled[1]} == set(ids[1])


def test_another_seed_chooses_other_rows():
    everything = labelled({("A", "Level 1"): 100})
    chosen = [{r["sample_id"] for r in split_train(everything, seed)[1]} for seed in (0, 1)]
    assert len(chosen[0] & chosen[1]) < 10


@given(sizes=st.dictionaries(st.text(max_size=3), st.integers(1, 50), min_size=1), data=st.data())
@settings(max_examples=60)
def test_shares_sum_to_the_total_and_stay_within_one(sizes, data):
    n = sum(sizes.values())
    total = data.draw(st.integers(0, n))
    shares = proportional_shares(sizes, total)
    assert sum(shares.values()) == total
    assert all(0 <= shares[k] <= sizes[k] and abs(shares[k] - sizes[k] * total / n) < 1 for k in sizes)


# ---- overlaps and duplicates ----


def test_the_helpers_on_three_rows():
    a, b, c = ({"sample_id": i, "problem": p} for i, p in (("a", "x"), ("b", "x"), ("c", "x ")))
    assert duplicates([a, b, c]) == [["a", "b"]]
    assert drop_overlaps([a, c], [b]) == ([c], ["a"])
    assert near_overlaps([a, c], [b]) == [("c", "b")]


# ---- arithmetic ----


def every_problem():
    return [
        (kind, a, b, arithmetic_row(kind, a, b))
        for kind in ARITHMETIC_TYPES
        for a in range(10, 1000)
        for b in range(1, 10)
    ]


def carries(a, b, sign):
    """Carries (or borrows) of the written sum (or difference), counted digit by digit."""
    count, move = 0, 0
    for k in range(3):
        x, y = a // 10**k % 10, b // 10**k % 10
        move = int(x + y + move > 9) if sign == "+" else int(x - y - move < 0)
        count += move
    return count


def test_every_problem_is_true_and_has_the_stated_level():
    for kind, a, b, row in every_problem():
        if row is None:
            assert kind != "Subtraction" and a + b > 999
            continue
        answer = re.search(r"\\boxed\{(\d{1,3})\}\.$", row["solution"])[1]
        left, right = row["problem"].split("=")
        if kind == "Missing Number":
            left, value = left.replace("?", answer), int(right)
        else:
            value = int(answer)
            assert right == ""
        x, sign, y = re.fullmatch(r"(\d+)([+-])(\d+)", left).groups()
        assert value == (int(x) + int(y) if sign == "+" else int(x) - int(y)), row
        assert re.fullmatch(r"[0-9+\-=?]+", row["problem"])
        for digit in re.findall(r"write (\d) ", row["solution"]):
            assert int(digit) == (a + b) % 10, row
        moves = carries(a, b, sign)
        assert row["level"] == f"Level {5 if moves > 1 else (1 if a < 100 else 3) + moves}", row
        for x, sign, y, z in re.findall(r"(\d+)([+-])(\d+) = (?:\\boxed\{)?(\d+)", row["solution"]):
            assert int(z) == (int(x) + int(y) if sign == "+" else int(x) - int(y)), row["solution"]


def test_each_problem_exists_once():
    problems = [row["problem"] for *_, row in every_problem() if row]
    assert len(set(problems)) == len(problems) == 26_640


ALL_PROBLEMS = problems._all_problems


@functools.cache
def space_of(source):
    """All problems of a source, made once: it takes seconds, and other tests look at each of them."""
    return ALL_PROBLEMS(GENERATED[source])


@pytest.mark.parametrize("source", GENERATED)
@given(seed=st.integers(0, 3), n_train=st.integers(1, 300), n_test=st.integers(1, 100))
@settings(max_examples=5)
def test_generator_sizes_and_determinism(tmp_path_factory, source, seed, n_train, n_test):
    folder = tmp_path_factory.mktemp(source)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(problems, "_all_problems", lambda generator: space_of(source))
        for name in "ab":
            generate(source, folder / name, seed, n_train, n_test)
    files = sorted(f.relative_to(folder / "a") for f in folder.rglob("a/*/*.jsonl"))
    assert len(files) == 2 * len(GENERATED[source][1])
    assert all((folder / "a" / f).read_bytes() == (folder / "b" / f).read_bytes() for f in files)
    written = {
        s: sum(len(f.read_text().splitlines()) for f in folder.glob(f"a/*/{s}.jsonl"))
        for s in ("train", "validation")
    }
    assert written == {"train": n_train, "validation": n_test}


def test_the_whole_space_can_be_used(tmp_path):
    generate("arithmetic", tmp_path, 0, 26_000, 640)
    assert sum(len(f.read_text().splitlines()) for f in tmp_path.rglob("*.jsonl")) == 26_640


# ---- operations ----


@pytest.fixture(scope="module")
def every_operation():
    """(problem's first number, its second number, row) of all rows of the space, as the problem's text has them."""
    row, kinds, values_a, values_b, *_ = GENERATED["operations"]
    made = [r for kind, a, b in itertools.product(kinds, values_a, values_b) if (r := row(kind, a, b))]
    texts = [re.fullmatch(r"What is (\d+) ([-+*/]) (\d+)\?", r["problem"]).groups() for r in made]
    assert all(OPERATIONS[r["type"]] == sign for r, (_, sign, _) in zip(made, texts, strict=True))
    return [(int(x), int(y), r) for r, (x, _, y) in zip(made, texts, strict=True)]


EVALUATE = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: x * y,
    "/": lambda x, y: x // y if x % y == 0 else None,
}


def value(text):
    """The value of `a`, `a + b`, `a / b`...: one operation at most, as the worked lines have it."""
    x, *rest = text.split()
    return EVALUATE[rest[0]](int(x), int(rest[1])) if rest else int(x)


def test_every_operation_is_true_with_a_true_worked_line(every_operation):
    for x, y, row in every_operation:
        answer = EVALUATE[OPERATIONS[row["type"]]](x, y)
        assert x > 0 and y > 0 and answer is not None and answer >= 0, row
        line = row["solution"].removesuffix(f"\\boxed{{{answer}}}")
        assert line != row["solution"] and "\\boxed" not in line and "\n" not in line and len(line) < 40, row
        assert row["problem"] == f"What is {line.split('so ')[-1].split(' =')[0]}?", row
        for equation in (line + str(answer)).split(", so "):
            steps = equation.split(" = ")
            assert len({value(step) for step in steps}) == 1 and len(set(steps)) == len(steps), row


def stated_level(kind, x, y):
    """The level of a problem's two numbers: the rules of data/README.md, written a second time."""
    if kind in ("Addition", "Subtraction"):
        sizes = len(str(x)), len(str(y))
        moves = carries(x, y, OPERATIONS[kind])
        return {(1, 1): 1, (2, 1): 2, (2, 2): 4 if moves else 3, (3, 2): 5}[sizes]
    if kind == "Division":
        x //= y
        assert x >= y
    if max(x, y) <= 12:
        return 1 if max(x, y) <= 5 else 2 if max(x, y) <= 9 else 3
    if x in range(13, 50) and y in range(2, 6):
        return 4
    assert (x in range(13, 100) and y in range(6, 10)) or (x in range(50, 100) and y in range(2, 6))
    return 5


def test_operations_have_the_stated_level_and_occur_once(every_operation):
    for x, y, row in every_operation:
        assert row["level"] == f"Level {stated_level(row['type'], x, y)}", row
    assert len({row["problem"] for *_, row in every_operation}) == len(every_operation) == 177_555
    counts = Counter((row["type"], row["level"]) for *_, row in every_operation)
    sizes = {kind: [counts[kind, level] for level in DIFFICULTIES[:5]] for kind in OPERATIONS}
    assert sizes == {  # counted by hand where that is possible: 9 * 9 sums, 15 divisions up to 5
        "Addition": [81, 810, 45 * 44, 8100 - 45 * 44, 900 * 90],
        "Subtraction": [45, 810, 45 * 55, 36 * 45, 900 * 90],
        "Multiplication": [25, 56, 63, 37 * 4, 87 * 4 + 50 * 4],
        "Division": [15, 30, 33, 37 * 4, 87 * 4 + 50 * 4],
    }


@pytest.mark.parametrize("kind, a, b", [("Addition", 7, 47), ("Subtraction", 3, 5), ("Subtraction", 42, 47),
                                        ("Division", 3, 7), ("Multiplication", 6, 47), ("Multiplication", 120, 6)])
def test_numbers_without_a_level_make_no_problem(kind, a, b):
    assert operations_row(kind, a, b) is None
