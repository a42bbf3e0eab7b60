"""The two graders of lib.answers: the box parser, the normal form, math-verify behind its limits."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lib._worker import same
from lib.answers import (
    AMOUNTS,
    MAX_ANSWER,
    MISREAD,
    READING,
    SPELLING,
    UNITS,
    Answer,
    Verifier,
    exact_match,
    last_boxed,
    normalize,
    structure,
    take_apart,
    unit,
)

MATH = Path(os.environ.get("MATH_DIR", Path(__file__).parents[3] / "shared/data/math"))
PIECES = [
    *r"\boxed{ \boxed \fbox{ { } \{ \} \frac \dfrac \sqrt \text{ \left( \right) \, \! \\ \ \$".split(),
    *r"$ % \% ^\circ ^{ _{ ~ \quad \!".split(),
    *"x = 1 0 23 , . - / + ( ) [ ] cm feet 1,234 {,} \u2212 \u00b0 \u00a0 \ud800 \x00".split(" "),
    " ", "\\", "\t", "\n",
]  # fmt: skip
tex = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)
anything = st.text(st.characters(), max_size=60) | tex  # st.characters() includes lone surrogates
quick = settings(max_examples=300)


@pytest.fixture(scope="module")
def verifier():
    with_limits = Verifier(seconds=3)
    yield with_limits
    with_limits.close()


# --- the last box


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{1} no, \fbox{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {17}$$", "17"),
        (r"is $\boxed 2$.", "2"),
        (r"is \(\boxed 2\).", "2"),
        (r"{\boxed 2}", "2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed{a\\}", r"a\\"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{5} then \boxed{6", None),
        (r"\boxed{5} then \boxed", None),
        (r"\boxed{5\}", None),
        (r"\boxedanswer{5} \unboxed{5}", None),
        ("5", None),
        ("", None),
    ],
)
def test_last_box_by_hand(text, answer):
    assert last_boxed(text) == answer


def balanced():
    leaf = st.text("0123abx+-=., \n", max_size=5) | st.sampled_from([r"\{", r"\}", r"\\", r"\frac"])
    return st.recursive(leaf, lambda s: st.lists(s, max_size=3).map("".join) | s.map("{{{}}}".format))


@quick
@given(anything, balanced(), st.sampled_from(["boxed", "fbox"]))
def test_round_trip_and_the_last_box_wins(before, answer, command):
    after = " and that is all }"
    assert last_boxed(f"{before} \\{command}{{{answer}}}{after}") == answer


@quick
@given(anything, anything)
def test_only_the_text_from_the_last_box_counts(before, text):
    if last_boxed(text) is not None:
        assert last_boxed(before + " " + text) == last_boxed(text)


@quick
@given(anything)
def test_what_the_parser_returns_was_in_the_text_and_is_balanced(text):
    answer = last_boxed(text)
    if answer is not None:
        assert answer in text
    braced = last_boxed(r"\boxed{" + text + "}")
    if braced is not None and "box" not in text:
        depth = lowest = 0
        for i, character in enumerate(braced):
            backslashes = len(braced[:i]) - len(braced[:i].rstrip("\\"))
            depth += {"{": 1, "}": -1}.get(character, 0) * (backslashes % 2 == 0)
            lowest = min(lowest, depth)
        assert (depth, lowest) == (0, 0)


# --- exact match

EQUAL = [
    ["1/2", r"\frac12", r"\frac{1}{2}", r"\dfrac{1}2", r"\tfrac 12", r"\frac {1} {2}", r"$\frac12$.",
     r"x = \frac12"],
    ["-1/2", r"-\frac12", r"\frac{-1}{2}", "\u22121/2"],
    ["0.5", ".5", "0.50", "+.5", "$0.5$"],
    ["12345", "12,345", "12{,}345", r"12,\!345", "12345.", "12345.0", "012345"],
    ["1000000", "1,000,000"],
    ["5", r"\$5", r"\$5.00", "x=5", "x = 5", r"5\text{ cm}", r"5 \text{ square inches}", "5 feet",
     r"5\mbox{ cm}^2", r"5\,\text{m}^2", "{5}", r"5^\circ", r"5^{\circ}", "5\u00b0", r"5\%", "5%", "\\(5\\)"],
    [r"\sqrt3", r"\sqrt{3}", r"\sqrt 3"],
    [r"\frac{\sqrt6}2", r"\frac{\sqrt{6}}{2}", r"\dfrac{\sqrt 6}{2}"],
    [r"\left(1, 2\right)", "(1,2)", r"\bigl( 1,\ 2 \bigr)"],
    [r"\text{(C)}", "(C)", r"\mbox{(C)}"],
    ["x^2", "x^{2}", "x ^ 2"],
    ["25_6", "25_{6}"],
    ["81, 256", "81 , 256", r"81,\ 256"],
    ["1, 2", "1,2"],
    ["y = 2x + 3", "2x+3"],
    [r"x \le 5", r"x\leq5"],
    [r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"],
    ["0", "-0", "0.0", "00"],
]  # fmt: skip


@pytest.mark.parametrize("forms", EQUAL, ids=lambda forms: forms[0])
def test_forms_of_one_answer_are_equal(forms):
    assert {form: normalize(form) for form in forms} == dict.fromkeys(forms, normalize(forms[0]))


def test_forms_of_different_answers_differ():
    normal_forms = [normalize(forms[0]) for forms in EQUAL]
    assert len(set(normal_forms)) == len(EQUAL)


@pytest.mark.parametrize(
    "gold, answer",
    [
        ("(1,234)", "(1234)"),  # a pair, not a number
        ("(1,234)", "1234"),
        ("12,34", "1234"),
        ("81, 256", "81256"),  # a blank makes it a list
        ("(1, 234)", "(1234)"),
        ("1234,567", "1234567"),
        ("1,2", "12"),
        ("1 2", "12"),
        (r"\cos 15^\circ", r"\cos 15"),  # degrees against radians
        ("5", "-5"),
        ("5", "5, 6"),
        ("x = 5, y = 6", "5, 6"),
        ("x = 5", "x > 5"),
        (r"\frac{1}{2}", r"\frac{2}{1}"),
        ("1/2/3", "1/(2/3)"),
        (r"11\text{ a.m.}", r"11\text{ p.m.}"),
        (r"5\text{ million}", "5"),
        ("A", "a"),
        ("", ""),  # nothing is not an answer
        (r"\$", "%"),
        ("\u0665", "5"),  # an Arabic five: only ASCII digits are numbers
    ],
)
def test_not_equal(gold, answer):
    assert not exact_match(gold, answer)
    assert not exact_match(answer, gold)


@quick
@given(anything)
@example("x=" * 50 + "5")
@example("\\ \\, \\~ \\\\ ,")
@example(r"\text{" * 20 + "5" + "}" * 20)
@example(r"5.\%.\%" * 9)
def test_normalize_is_idempotent(answer):
    once = normalize(answer)
    assert normalize(once) == once


@quick
@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-10**9, max_value=10**9, places=4))
def test_numbers_are_compared_by_value(value):
    plain, trimmed = f"{value:f}", f"{value.normalize():f}"
    assert exact_match(plain, trimmed)
    assert exact_match(f"{value:,f}", plain)
    assert not exact_match(plain, f"{value + 1:f}")


# --- the grammar


@pytest.mark.parametrize("rule", SPELLING + READING, ids=lambda rule: rule.name)
def test_each_rule_does_what_its_example_says(rule):
    assert rule.apply(rule.example) == rule.result


@pytest.mark.parametrize("name, pattern, example", MISREAD, ids=[row[0] for row in MISREAD])
def test_what_math_verify_misreads_is_kept_from_it_for_the_named_reason(name, pattern, example):
    assert [row[0] for row in MISREAD if re.search(row[1], example)] == [name]
    assert structure(example) is None


@pytest.mark.parametrize(
    "answer, parts",
    [
        (r"x = 5\text{ cm}", Answer("5", "x", "centimeter")),
        (r"\$5\text{ per hour}", Answer("5", "", "dollar-per-hour")),
        ("5 sq cm", Answer("5", "", "square centimeter")),
        (r"5\text{ m/s}^2", Answer("5", "", "meter-per-square second")),
        (r"72^\circ F", Answer("72", "", "fahrenheit")),
        (r"12.50\%", Answer("12.5", "", "percent")),
        (r"5\text{ apples}", Answer("5", "", "apples")),
        (r"3\text{ fifths}", Answer(r"\frac{3}{5}")),
        (r"2.5\text{ million dollars}", Answer("2500000", "", "dollar")),
        ("f(x) = x^2", Answer("x^2", "f(x)")),
        (r"x \in (1, 2]", Answer("(1, 2]", "x")),
        (r"3\mathrm{i}", Answer("3i")),
        (r"3\text{m}", Answer("3m")),  # a letter, but a unit after a blank
        (r"3\text{ m}", Answer("3", "", "meter")),
        (r"7\text{ or 8}", Answer("7, 8")),
    ],
)  # fmt: skip
def test_an_answer_is_taken_apart(answer, parts):
    assert take_apart(answer) == parts


@pytest.mark.parametrize(
    "answer",
    [r"1\text{ hour }30\text{ minutes}", r"5\text{ m} + 3\text{ m}", r"3\text{ remainder }2", r"7\text{ out of }10",
     r"11\text{ a.m.}", r"\text{east}", r"2\text{ hundreths}", r"2\text{ twenty-fifths}", "AB", r"x\text{ fifths}"],
)  # fmt: skip
def test_words_that_are_no_label_stay_and_leave_the_exact_match_alone(answer):
    assert take_apart(answer).has_words
    assert exact_match(answer, answer)


def test_units_have_one_name_and_amounts_are_no_units():
    assert all(unit(name) == name for name in UNITS.values() if "-per-" not in name)
    assert not set(UNITS) & set(AMOUNTS)
    assert unit("sq. cm") == unit("cm^2") == unit("square centimetres") == "square centimeter"
    assert unit("mph") == unit("miles per hour") == unit("mi/hr")
    assert unit("apples") is None


@pytest.mark.parametrize(
    "mathematics, tree",
    [
        ("5", "5"),
        ("2(3)", r"2\cdot(3)"),
        ("(1,2]", ("(]", ("1", "2"))),
        ("1, 2", ("set", ("1", "2"))),
        (r"\{1,2\}", ("set", ("1", "2"))),
        (r"\pm 5", ("set", (" 5", "- 5"))),
        (r"(0,1)\cup(2,3)", ("union", (("()", ("0", "1")), ("()", ("2", "3"))))),
        ("3>x>0", ("all", (("<", ("x", "3")), ("<", ("0", "x"))))),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", ("matrix", (("row", ("1", "2")), ("row", ("3", "4"))))),
        ("(1,2", None),
        ("f(x)", None),
        (r"\overline{AB}", None),
    ],
)
def test_structure_of_mathematics(mathematics, tree):
    found = structure(mathematics)
    assert str(found).replace("' ", "'").replace("- ", "-") == str(tree).replace("' ", "'").replace("- ", "-")


@pytest.mark.parametrize(
    "gold, answer, equal",
    [
        ("2^{-2004}", "0", False),
        (r"\sqrt{10^{120}+1}", "10^{60}", False),
        (r"\cos(10^{-300})", "1", False),  # flat: they differ by 5e-601
        ("x+e^{-1000}", "x", False),
        (r"\sqrt{5+2\sqrt{6}}", r"\sqrt{2}+\sqrt{3}", True),
        (r"\lfloor x\rfloor", r"\lceil x\rceil-1", False),  # equal but at whole numbers
        ("|x|", "x", False),
        (r"\frac{x^2-1}{x-1}", "x+1", True),
        (("=", ("x+y", "1")), ("=", ("2x", "2-2y")), True),
        (("=", ("x", "x")), ("=", ("0", "0")), False),
        (("<", ("x", "1")), ("<", ("-1", "-x")), True),
        (("<", ("x", "1")), ("<", ("-x", "-1")), False),
        (("set", ("1", "1", "2")), ("set", ("1", "2", "2")), False),
        (("()", ("1", "2")), ("()", ("2", "1")), False),
    ],
)
def test_comparing_is_exact(gold, answer, equal):
    assert same(gold, answer) == same(answer, gold) == equal


@quick
@given(anything)
def test_any_text_can_be_taken_apart_and_has_a_structure_or_none(answer):
    parts = take_apart(answer)
    assert exact_match(answer, answer) == (parts.mathematics != "")
    structure(parts.mathematics)


# --- both graders


@pytest.mark.parametrize(
    "gold, completion, correct, method",
    [
        ("5", r"The answer is \boxed{5}.", True, "exact"),
        ("5", r"The answer is \boxed{6}.", False, "exact"),
        ("5", "The answer is 5.", False, "unparsed"),
        ("5", r"\boxed{5} or rather \boxed{6}", False, "exact"),  # a list of guesses: the last one counts
        ("6", r"\boxed{5} or rather \boxed{6}", True, "exact"),
        ("5", r"\boxed{5} and now \boxed{", False, "unparsed"),
        ("5", r"\boxed{5} and now \boxed{}", False, "unparsed"),
        ("5", r"5 \boxed{ } 5", False, "unparsed"),
        ("5", r"\boxed{6} 5", False, "exact"),
        ("5", "boxed{5}", False, "unparsed"),
        ("5", "\\box{5}", False, "unparsed"),
        ("5", r"\boxed{5, 6}", False, "exact"),
        ("5", r"\boxed{4 or 5}", False, "exact"),
        ("5", r"\boxed{$4$ or $5$}", False, "exact"),
        ("5", r"\boxed{a) $5$ b}", False, "exact"),
        ("5", r"\boxed{\neq 5}", False, "exact"),
        ("5", r"\boxed{\text{the answer}}", False, "exact"),
        ("5", r"\boxed{x}", False, "symbolic"),
        ("5", r"\boxed{4}{5}", False, "exact"),
        ("5", r"\boxed{5 - 4 + 4}", True, "symbolic"),
        (r"\frac{1}{2}", r"\boxed{0.5}", True, "symbolic"),
        ("0.5", r"\boxed{\frac{2}{4}}", True, "symbolic"),
        (r"50\%", r"\boxed{0.5}", True, "symbolic"),
        (r"\{1,2\}", r"\boxed{\{2,1\}}", True, "symbolic"),
        ("(1,2)", r"\boxed{(2,1)}", False, "symbolic"),
        ("(1,2]", r"\boxed{(1,2)}", False, "exact"),
        ("x^2-1", r"\boxed{(x-1)(x+1)}", True, "symbolic"),
        (r"\sqrt{8}", r"\boxed{2\sqrt2}", True, "symbolic"),
    ],
)
def test_grades_by_hand(verifier, gold, completion, correct, method):
    (grade,) = verifier.grade([gold], [completion])
    assert (grade.correct, grade.method) == (correct, method)
    assert grade.exact == exact_match(gold, last_boxed(completion) or "")
    assert grade.answer == last_boxed(completion)


@settings(max_examples=40)
@given(text=tex)
def test_text_before_the_last_box_changes_nothing(verifier, text):
    golds, completions = ["5", "5", "1/2"], [r"\boxed{5}", r"\boxed{6}", r"\boxed{0.5}"]
    assert verifier.grade(golds, [text + " " + c for c in completions]) == verifier.grade(golds, completions)


def test_shortcut_false_asks_math_verify(verifier):
    grades = verifier.grade(["5", "5", "5"], [r"\boxed{5}", r"\boxed{6}", "5"], shortcut=False)
    assert [g.method for g in grades] == ["symbolic", "symbolic", "unparsed"]
    assert [g.correct for g in grades] == [True, False, False]


def test_length_limit_is_on_the_answer_not_on_the_text(verifier):
    long_sum = "1+" * MAX_ANSWER + "1"
    fits, too_long = verifier.grade(["1/2"] * 2, ["so " * 9999 + r"\boxed{0.5}", rf"\boxed{{{long_sum}}}"])
    assert (fits.correct, fits.method) == (True, "symbolic")
    assert (too_long.correct, too_long.method) == (False, "exact")
    assert verifier.grade([long_sum], [rf"\boxed{{ {long_sum} }}"])[0].correct


def test_errors_are_for_people():
    with pytest.raises(ValueError, match="got 1 and 2"):
        Verifier().grade(["5"], ["a", "b"])
    with pytest.raises(ValueError, match=r"completions\[0\] must be a string, got dict"):
        Verifier().grade(["5"], [{"content": r"\boxed{5}"}])
    with pytest.raises(ValueError, match="workers must be positive, got 0"):
        Verifier(workers=0)
    with pytest.raises(RuntimeError, match="did not start"):
        Verifier(memory_mb=30).grade(["1/2"], [r"\boxed{0.5}"])


# --- hand-checked pairs: what a policy may try, and what a fair grader accepts

HACKS = [json.loads(line) for line in (Path(__file__).parent / "hacks.jsonl").open()]


def test_no_hand_checked_hack_is_accepted():
    """tests/lib/hacks.jsonl says of each pair, with a reason, whether it should be accepted. No grader errs upwards."""
    assert len(HACKS) >= 200 and len({(h["gold"], h["completion"]) for h in HACKS}) == len(HACKS)
    golds, completions = [h["gold"] for h in HACKS], [h["completion"] for h in HACKS]
    with_limits = Verifier(workers=2, seconds=2)
    both = with_limits.grade(golds, completions)
    alone = with_limits.grade(golds, completions, shortcut=False)
    with_limits.close()
    wrongly = [h for h, a, b in zip(HACKS, both, alone, strict=True)
               if not h["accept"] and (a.correct or a.exact or b.correct)]
    assert not wrongly
    # Fair answers are accepted, but for known forms: a slow machine may add a few timeouts.
    rightly = [h for h, grade in zip(HACKS, both, strict=True) if h["accept"] and grade.correct]
    assert len(rightly) >= 0.8 * sum(h["accept"] for h in HACKS)


REPORTED = [json.loads(line) for line in (Path(__file__).parent / "reported.jsonl").open()]


@pytest.fixture(scope="module")
def reported():
    """The cases of tests/lib/reported.jsonl, after public bug reports on graders, with the two verdicts on each."""
    golds, completions = [case["gold"] for case in REPORTED], [case["completion"] for case in REPORTED]
    with_limits = Verifier(workers=2, seconds=10)
    both = with_limits.grade(golds, completions)
    alone = with_limits.grade(golds, completions, shortcut=False)
    with_limits.close()
    return list(zip(REPORTED, both, alone, strict=True))


@pytest.mark.parametrize("kind", sorted({case["kind"] for case in REPORTED}))
def test_every_reported_case_is_judged_rightly(kind, reported):
    cases = [row for row in reported if row[0]["kind"] == kind]
    assert [case for case, both, _ in cases if both.correct != case["correct"]] == []
    assert [case for case, both, alone in cases if not case["correct"] and (both.exact or alone.correct)] == []


# --- limits and processes

HOSTILE = {
    "power tower": "9^{9^{9^{9}}}",
    "factorial": "99999999!",
    "expansion": "(x+y+z+w)^{4000}",
    "a million digits": "7" * 10**6,
    "100,000 nested braces": "{" * 10**5 + "}" * 10**5,
    "400 nested braces": "{" * 400 + "}" * 400,
    "nested roots": r"\sqrt{" * 90 + "2" + "}" * 90,
    "a long list": ",".join("1" * 490),
    "carets": "^" * 900,
    "broken LaTeX": r"\frac{1}{\sqrt[\left(",
    "NUL, lone surrogates, right-to-left": "\0\ud800\udfff\u202e5",
    "every plane": "".join(map(chr, range(0, 0x110000, 1300))),
}


@pytest.fixture(scope="module")
def impatient():
    """A worker that has half a second a pair. Nothing is remembered, so it or its successor answers every time."""
    with_limits = Verifier(seconds=0.5, cache_size=0)
    yield with_limits
    with_limits.close()


@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_answer_is_wrong_within_the_limit(impatient, answer):
    start = time.monotonic()
    hostile, honest = impatient.grade(["5", "1/2"], [rf"\boxed{{{answer}}}", r"\boxed{0.5}"])
    assert not hostile.correct
    assert (honest.correct, honest.method) == (True, "symbolic")
    assert time.monotonic() - start < 60  # a second on an idle machine; without limits some take hours


@pytest.mark.parametrize(
    "text", [r"\boxed{" * 150_000, "\\" * 10**6, r"\boxed" + " " * 10**6, r"\boxed 5" + " " * 10**6 + "x",
             r"\boxed{" + r"\{" * 500_000, "{" * 10**6, r"\boxed{" + "1," * 500_000 + "}"],
    ids=range(7),
)  # fmt: skip
def test_parser_and_normal_form_are_fast_on_long_texts(text):
    start = time.monotonic()
    normalize(last_boxed(text) or text)
    normalize(text[:MAX_ANSWER])
    assert time.monotonic() - start < 5


def test_one_bad_pair_does_not_spoil_its_batch_and_is_asked_once():
    with_limits = Verifier(workers=2, seconds=1)
    golds = ["5", "1/2"] * 6
    completions = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{0.5}"] * 6
    start = time.monotonic()
    for _ in range(3):
        grades = with_limits.grade(golds, completions)
        assert [g.method for g in grades] == ["timeout", "symbolic"] * 6
        assert [g.correct for g in grades] == [False, True] * 6
    assert time.monotonic() - start < 15
    with_limits.close()


def children():
    return [p.pid for p in psutil.Process().children() if "_worker.py" in " ".join(p.cmdline())]


def gone(pid, seconds=15):
    deadline = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def new_worker(with_limits, before):
    assert with_limits.grade(["1/2"], [r"\boxed{0.5}"])[0].correct
    (pid,) = set(children()) - set(before)
    return pid


def test_idle_worker_killed():
    with_limits, before = Verifier(), children()
    assert set(children()) == set(before)  # nothing runs until it is needed
    os.kill(new_worker(with_limits, before), signal.SIGKILL)
    assert with_limits.grade(["1/3"], [r"\boxed{\frac{2}{6}}"])[0].correct
    with_limits.close()
    assert set(children()) == set(before)


def test_busy_worker_killed_gets_one_successor():
    with_limits, before = Verifier(seconds=1), children()
    pid = new_worker(with_limits, before)
    threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
    slow, honest = with_limits.grade(["5", "1/3"], [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{\frac{2}{6}}"])
    assert slow.method == "timeout"
    assert honest.correct
    with_limits.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory limits are enforced on Linux")
def test_worker_has_the_memory_limit():
    with_limits, before = Verifier(memory_mb=700), children()
    pid = new_worker(with_limits, before)
    assert psutil.Process(pid).rlimit(psutil.RLIMIT_AS) == (700 * 2**20, 700 * 2**20)
    with_limits.close()


def test_many_threads_share_one_pool():
    with_limits, results = Verifier(workers=2), {}

    def work(i):
        completions = [rf"\boxed{{\frac{{2}}{{{2 * i}}}}}", rf"\boxed{{1/{i + 1}}}"]
        results[i] = with_limits.grade([f"1/{i}"] * 2, completions)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2, 14)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {i: [g.correct for g in grades] for i, grades in results.items()} == {
        i: [True, False] for i in range(2, 14)
    }
    with_limits.close()


# No main guard, and the grading thread is not the main one: how a training script and a notebook use it.
SCRIPT = r"""
import os, sys, threading
from lib.answers import Verifier
print("main", flush=True)
v = Verifier(seconds=0.5)
grades = []
thread = threading.Thread(target=lambda: grades.extend(v.grade(["1/2"], [r"\boxed{0.5}"])))
thread.start()
thread.join()
print(grades[0].correct, next(iter(v._alive)).process.pid, flush=True)
if sys.argv[1] == "busy":
    v.grade(["5"], [r"\boxed{9^{9^{9^{9}}}}"])
if sys.argv[1] == "idle":
    sys.stdin.read()
"""


@pytest.mark.parametrize("state", ["exit", "idle", "busy"])
def test_workers_end_with_their_parent(state, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "script.py", state]
    script = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert script.stdout.readline() == "main\n"
    correct, pid = script.stdout.readline().split()
    assert correct == "True"
    if state == "busy":
        time.sleep(0.5)
    if state == "exit":
        assert script.wait(20) == 0
    script.kill()
    script.wait()
    assert gone(int(pid), 120)  # the limit is on its processor time, which a busy machine stretches
    assert script.stdout.read() == ""  # "main" once: the worker did not run the script again


# --- real answers


@pytest.fixture(scope="module")
def solutions():
    files = sorted(MATH.glob("*/*.jsonl"))
    if not files:
        pytest.skip("set MATH_DIR to a folder with MATH's <subject>/<split>.jsonl")
    return [json.loads(line)["solution"] for file in files for line in file.open()]


def test_math_gold_answers_match_themselves_exactly(solutions):
    golds = [last_boxed(solution) for solution in solutions]
    assert None not in golds
    assert max(map(len, golds)) <= MAX_ANSWER
    assert sum(exact_match(gold, gold) for gold in golds) >= 0.995 * len(golds)
    grades = Verifier().grade(golds, solutions)
    assert {grade.method for grade in grades} == {"exact", "unparsed"}  # two solutions box nothing


def test_math_gold_answers_match_themselves_symbolically(solutions, verifier):
    distinct = sorted({last_boxed(solution) for solution in solutions} - {""})[::12]
    completions = [rf"\boxed{{{gold}}}" for gold in distinct]
    grades = verifier.grade(distinct, completions, shortcut=False)
    assert sum(grade.correct for grade in grades) >= 0.995 * len(distinct)


def test_math_gold_answers_do_not_match_others(solutions, verifier):
    """Of pairs of different golds of one shape, few are accepted, and all of those have one value."""
    shapes = {}
    for gold in sorted({last_boxed(solution) for solution in solutions}):
        letters = "".join(sorted(set(re.findall(r"[A-Za-z]+", normalize(gold)))))
        shapes.setdefault((letters, normalize(gold).count(",")), []).append(gold)
    draw = random.Random(0)
    pairs = [draw.sample(golds, 2) for golds in shapes.values() for _ in range(5) if len(golds) > 1]
    golds, others = zip(*pairs, strict=True)
    grades = verifier.grade(golds, [rf"\boxed{{{other}}}" for other in others])
    accepted = [pair for pair, grade in zip(pairs, grades, strict=True) if grade.correct]
    assert len(pairs) > 300
    # Another order, or the same text but for markup, a label and the brackets of (A).
    forms = [[sorted(re.sub("[()]", "", normalize(gold))) for gold in pair] for pair in accepted]
    assert all(form == other for form, other in forms)


@pytest.mark.parametrize("gold, answer", [(r"X+\pi", r"x+\pi"), (r"x+\pi", r"X+\pi"), (r"R^2\pi", r"r^2\pi"),
                                          (r"c\theta", r"C\theta")])
def test_a_capital_after_a_command_is_not_taken_for_a_part_of_it(verifier, gold, answer):
    """A command at the end of one text and a letter at the beginning of the other are not one command."""
    assert not verifier.grade([gold], [rf"\boxed{{{answer}}}"])[0].correct
    assert verifier.grade([gold], [rf"\boxed{{{gold}}}"])[0].correct
