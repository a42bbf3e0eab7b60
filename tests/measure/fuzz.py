r"""The graders under generated completions: `make fuzz` tries a million, `make fuzz N=10000` fewer.

Prints how many completions of each kind were tried, accepted and timed out, the time, the peak memory of this process
and of its workers. Exit status 1 if an exception escaped, code of a completion ran, or a completion was accepted that
has no right answer by construction. Seeded: the same N and SEED give the same completions.
"""

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from lib.answers import Verifier
from runner import ROOT, WORK

MARKER = Path(tempfile.gettempdir()) / f"grpo-noise-fuzz-{os.getpid()}"
COMMANDS = (
    r"\frac \dfrac \sqrt \cdot \times \div \pm \pi \infty \circ \text \left \right \begin \end \cup \le \sin \log "
    r"\binom \int \sum \lim \boxed \fbox \overline \mathbb \phantom \def \% \$ \{ \} \\ \! \, \ "
).split(" ")
PIECES = COMMANDS + list("0123456789xyzabi+-*/^_=<>(){}[]|.,;:!?'\"%&$# \n")
STRANGE = "\0\x07\x1b\u200b\u200f\u202e\u2066\ufeff\ud800\udfff\u0665\uff15\u00b2\u2164\u2212\u00b0\U0001d7d3\U0010ffff"
UNITS = [
    "cm",
    "inches",
    r"\text{ cm}",
    r"\text{ m}^2",
    r"\text{ dollars}",
    r"\text{ apples}",
    r"\%",
    r"^\circ",
    r"\text{ million}",
]
CODE = [
    "__import__('os').system('touch {}')",
    "open('{}', 'w')",
    r"\text{{__import__('pathlib').Path('{}').touch()}}",
    "Integer.__class__('x', (), {{}})",
    "lambda: open('{}', 'w')",
    r"\operatorname{{exec}}(open('{}', 'w'))",
]


def expression(rng: random.Random, depth: int) -> str:
    """A random expression in MATH's LaTeX, of at most `depth` levels."""
    if depth == 0 or rng.random() < 0.2:
        return rng.choice(
            [str(rng.randint(-20, 200)), str(rng.randint(2, 9)), f"{rng.uniform(0, 9):.2f}", "x", "y", r"\pi", "n"]
        )
    a, b = expression(rng, depth - 1), expression(rng, depth - 1)
    return rng.choice([
        "{a}+{b}", "{a}-{b}", "{a}{b}", r"\frac{{{a}}}{{{b}}}", r"\sqrt{{{a}}}", "({a})^{{2}}", "({a})({b})", r"{a} \cdot {b}",  # noqa: E501
        "({a}, {b})", r"\{{{a}, {b}\}}", "[{a}, {b})", r"{a} \pm {b}", "x = {a}", r"{a} \le {b}", r"\sin {a}", "|{a}|",
        r"\begin{{pmatrix}} {a} \\ {b} \end{{pmatrix}}", r"{a} \text{{ or }} {b}", "{a}, {b}", "{a}!", r"\log_{{2}} {a}",  # noqa: E501
        r"({a}, {b}] \cup [{b}, \infty)", r"\left( {a} \right)", r"{a}\%", "{a}^{{{b}}}"]).format(a=a, b=b)  # fmt: skip


def mutated(rng: random.Random, text: str) -> str:
    """`text` after one to four cuts, repeats, swaps and insertions."""
    for _ in range(rng.randint(1, 4)):
        i, j = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        j = min(j, i + 12)
        part = rng.choice(
            ["", text[i:j] * 2, text[i:j][::-1], rng.choice(PIECES), rng.choice(STRANGE), text[j : j + 5]]
        )
        text = text[:i] + part + text[j:]
    return text


def giant(rng: random.Random) -> str:
    """Something small to write and large to compute."""
    n = rng.randint(5, 9)
    return rng.choice(
        [
            f"{n}^{{{n}^{{{n}^{{{n}}}}}}}",
            f"{n}" * 8 + "!",
            f"(x+y+z+w)^{{{n}000}}",
            f"{n}!!!!!",
            f"{n}^{{{n}99999999}}",
            rf"\binom{{{n}99999999}}{{{n}999999}}",
            rf"\frac{{x^{{{n}000}}-1}}{{x-1}}",
            rf"\sqrt[{n}]{{" * 60 + "2" + "}" * 60,
        ]
    )


UNITS_OF_EACH_KIND = [  # names of one unit stand together
    ["cm", "centimeters"], ["m", "meters"], ["inches", "in"], ["feet", "ft"], ["miles", "mi"], ["acres"], ["hectares"],
    ["hours", "hr"], ["minutes", "min"], ["fortnights"], ["decades"], ["grams", "g"], ["kg"], ["tons"], ["liters", "L"],
    ["quarts"], ["pints"], ["dollars"], ["cents"], ["dimes"], ["euros"], ["degrees"], ["apples"], ["pears"], ["knots"],
    ["square units"], ["cubic units"], ["square inches"], ["miles per hour", "mph"], ["m/s"], ["cm/s"], ["m/s^2"],
]  # fmt: skip
AMOUNT_WORDS = (
    "halves thirds quarters fourths fifths eighths ninths tenths hundredths hundreths thousandths sixteenths "
    "millionths lakhs crores dozen dozens scores hundred thousand million billion trillion quadrillion ten-thousandths "
    "zillion"
).split()
LETTERS = "abcdeikmnpqtuvwxyzABCLNPX"


def text_mode(rng: random.Random, n: int, m: int) -> tuple[str, str]:
    """Mathematics hidden in text: a letter, an operator, another number."""
    command, letter = rng.choice(["text", "mathrm", "mathbf", "textbf", "mbox"]), rng.choice(LETTERS)
    hidden = [f"{n}\\{command}{{{letter}}}", f"{n}-\\{command}{{{letter}}}",
              f"\\frac{{{n}}}{{\\{command}{{{letter}}}}}",
              f"{n}\\text{{ + {m}}}", f"{n}\\text{{, {m}}}", f"{n}\\text{{ or {m}}}", f"{n}\\{command}{{{m}}}",
              f"\\text{{-}}{n}", f"{n}\\text{{^{m}}}", f"{n}\\text{{pi}}", f"\\text{{not }}{n}", f"{n}{letter}"]
    return str(n), rng.choice(hidden)


def number_word(rng: random.Random, n: int, m: int) -> tuple[str, str]:
    """A number, and the same number of millionths."""
    return str(n), f"{n}\\text{{ {rng.choice(AMOUNT_WORDS)}}}"


def compound(rng: random.Random, n: int, m: int) -> tuple[str, str]:
    """A number, and two measures that begin or end with it."""
    first, second = (f"\\text{{ {rng.choice(names)}}}" for names in rng.sample(UNITS_OF_EACH_KIND, 2))
    sign = rng.choice([" ", "", " + ", " - ", r" \times ", r"\text{ and }", ", "])
    return str(rng.choice([n, m])), f"{n}{first}{sign}{m}{second}"


def two_units(rng: random.Random, n: int, m: int) -> tuple[str, str]:
    """One number in two units."""
    first, second = (rng.choice(names) for names in rng.sample(UNITS_OF_EACH_KIND, 2))
    per = rng.choice(["", "", " per week"])
    return f"{n}\\text{{ {first}{per}}}", f"{n}\\text{{ {second}{rng.choice([per, per, ' per year'])}}}"


def primed(rng: random.Random, n: int, m: int) -> tuple[str, str]:
    """Another derivative, another point, an accent."""
    letter = rng.choice(LETTERS)
    argument = rng.choice(["", "(x)", f"({n})"])
    marks = ["", "'", "''", r"^\prime"]
    first, second = rng.sample(marks, 2)
    plain, accented = f"{letter}{first}{argument}", f"\\{rng.choice(['hat', 'bar', 'overline', 'vec'])}{{{letter}}}"
    return plain, rng.choice([f"{letter}{second}{argument}", accented])


def tiny(rng: random.Random, n: int, m: int) -> tuple[str, str]:
    """Two values that no fixed number of decimals tells apart."""
    value = rng.choice([str(n), f"\\frac{{1}}{{{n}}}", r"\pi", f"\\sqrt{{{n}}}", "x", "0", f"10^{{{n}}}", f"{n}!", "e"])
    small = rng.choice(
        [f"2^{{-{m}}}", f"\\frac{{1}}{{{m}!}}", f"10^{{-{m}}}", f"e^{{-{m}}}", f"\\frac{{1}}{{3^{{{m}}}}}"])
    pairs = [(value, f"{value}+{small}"), (f"{value}-{small}", value), (small, f"-{small}"),
             (small, f"2 \\cdot {small}"),
             (f"10^{{{m}}}", f"\\sqrt{{10^{{{2 * m}}}+1}}"), (f"1-{small}", f"1-{small}-{small}"),
             (f"\\frac{{1}}{{{m}!}}", f"\\frac{{1}}{{{m - 1}!}}"), (f"\\cos({small})", "1")]
    return rng.choice(pairs)


def unfinished(rng: random.Random, n: int, m: int) -> tuple[str, str]:
    """A number, and an expression, relation or list that it is a part of."""
    forms = ["{n}-", "{n}/", "{n}=", "{n}^", "{n}^{{}}", "{n}_{m}", "{n} | {m}", "{n}?", "{n}!", "{n}+", "{m}<{n}",
             r"{n} \ne {m}", r"{n} \quad {m}", "{n}; {m}", r"{n}\%{m}", "{n}^2", "{m}={n}", "x>{n}", r"\sqrt{{{n}}}",
             "{n}({m})", "({n})({m})", "{n}({m}+1)", r"\frac{{{n}}}{{{m}}}({n})", "{n}:{m}", r"{n}\ldots", "f({n})",
             r"\lfloor {n}.5 \rfloor+1", r"|{n}|{m}", r"\log_{{{m}}} {n}", r"\sin {n}", r"{n}^\circ {m}"]  # fmt: skip
    return str(n), rng.choice(forms).format(n=n, m=m)


WRONG_FORMS = {"letters in text mode": text_mode, "number words": number_word, "compound measures": compound,
               "two units": two_units, "primes and accents": primed, "tiny differences": tiny,
               "unfinished": unfinished}  # fmt: skip


def generate(rng: random.Random, corpus: list[tuple[str, str]], hacks: list[dict]) -> tuple[str, str, str, bool]:
    """(kind, gold answer, completion, whether it is wrong by construction)"""
    gold, solution = rng.choice(corpus)
    kind, draw = "", rng.random()
    number, other = str(rng.randint(2, 999)), str(rng.randint(1000, 9999))
    box, wrong = r"\boxed{{{}}}".format, False
    if rng.random() < 0.15:
        kind = rng.choice(list(WRONG_FORMS))
        gold, text = WRONG_FORMS[kind](rng, rng.randint(3, 99), rng.randint(100, 999))
        return kind, gold, box(text), True
    if draw < 0.30:
        kind, text = "mutated solution", mutated(rng, solution)
    elif draw < 0.42:
        kind, text = "mutated answer", box(mutated(rng, gold))
    elif draw < 0.54:
        kind, text = "random LaTeX", box("".join(rng.choices(PIECES, k=rng.randint(1, 30))))
    elif draw < 0.57:
        kind, text = "grammar", box(expression(rng, rng.randint(1, 2)))
        gold = expression(rng, rng.randint(0, 2)) if rng.random() < 0.5 else gold
    elif draw < 0.68:
        kind, gold = "hack", rng.choice(hacks)["gold"]
        text = mutated(rng, rng.choice(hacks)["completion"])
    elif draw < 0.74:
        kind, text = (
            "random characters",
            "".join(chr(rng.choice([rng.randrange(128), rng.randrange(0x110000)])) for _ in range(60)),
        )
        text = box(text) if rng.random() < 0.5 else rng.choice([r"\boxed{", r"\boxed ", "{", ""]) + text
    elif draw < 0.78:
        kind, text = "strange characters", box("".join(rng.choices(gold + STRANGE, k=rng.randint(1, 20))))
    elif draw < 0.82:
        kind, text = (
            "units",
            box(rng.choice([number, gold]) + rng.choice(UNITS) + rng.choice(["", ".", rng.choice(UNITS)])),
        )
    elif draw < 0.86:
        kind, gold, wrong = "list with the answer", number, True
        text = box(
            rng.choice([", ", r" \text{ or } ", " or ", r" \lor ", "; ", " / ", r" \quad "]).join(
                [number, other, other + "1"]
            )
        )
    elif draw < 0.90:
        kind, gold, wrong = "answer elsewhere", number, True
        text = rng.choice(
            [
                f"{number} \\boxed{{}}",
                f"\\boxed{{{number}}} \\boxed{{{other}}}",
                f"The answer is {number}.",
                f"\\boxed{{{number}}} \\boxed{{",
                f"\\boxed{{\\text{{the answer is above}}}} {number}",
                f"\\boxed{{{other}}}{{{number}}}",
                f"\\boxed{{{other} % {number}\n}}",
                f"\\boxed{{{other} = {number}}}",
                f"\\boxed{{\\phantom{{{number}}}}}",
                f"What is {number}? Put it within \\boxed{{}}.",
            ]
        )
    elif draw < 0.94:
        kind, gold, text, wrong = "code", number, box(rng.choice(CODE).format(MARKER)), True
    elif draw < 0.97:
        kind, gold, wrong = "long digits", number, True
        text = box(
            rng.choice(
                ["9" * rng.randint(20, 5000), "0." + "3" * rng.randint(20, 5000), number + "0" * rng.randint(20, 900)]
            )
        )
    elif draw < 0.9998:
        kind, n = "deep nesting", rng.choice([100, 300, 10_000])
        text = rng.choice(
            ["{" * n + gold + "}" * n, "{" * n, r"\boxed{" * n + gold + "}" * n, "(" * n + gold + ")" * n, "^{" * n]
        )
        text = box(text)
    else:
        kind, gold, text, wrong = "giant", number, box(giant(rng)), True
    return kind, gold, text, wrong


def read_corpus() -> tuple[list[tuple[str, str]], list[dict]]:
    """(gold answer, solution) of all problems in data/, and the hand-checked hacks."""
    hacks = [json.loads(line) for line in (ROOT / "tests/lib/hacks.jsonl").open()]
    corpus = [(h["gold"], h["completion"]) for h in hacks]
    for name in ("math", "operations", "arithmetic"):
        for file in sorted((WORK / "data" / name).glob("train.jsonl")):
            rows = map(json.loads, file.open(encoding="utf-8"))
            corpus += [(r["answer"], r["solution"]) for r in rows]
            return corpus, hacks  # the richest that is there
    return corpus, hacks


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("n", type=int, nargs="?", default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1.0, help="limit for one pair in math-verify")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this long")
    args = parser.parse_args()
    rng, (corpus, hacks) = random.Random(args.seed), read_corpus()
    verifier = Verifier(args.workers, args.seconds)
    tried, accepted, timeouts, methods, errors, gamed = Counter(), Counter(), Counter(), Counter(), [], []
    began = told = time.monotonic()
    slowest = 0.0
    while sum(tried.values()) < args.n and time.monotonic() < began + 60 * args.minutes:
        batch = [generate(rng, corpus, hacks) for _ in range(min(2000, args.n - sum(tried.values())))]
        kinds, golds, texts, wrong = zip(*batch, strict=True)
        tried.update(kinds)
        start = time.monotonic()
        try:
            grades = verifier.grade(golds, texts)
        except Exception as e:
            errors.append(repr(e)[:300])
            continue
        slowest = max(slowest, time.monotonic() - start)
        methods.update(g.method for g in grades)
        accepted.update(k for k, g in zip(kinds, grades, strict=True) if g.correct)
        timeouts.update(k for k, g in zip(kinds, grades, strict=True) if g.method == "timeout")
        gamed += [
            (gold, text[:200]) for gold, text, w, g in zip(golds, texts, wrong, grades, strict=True) if w and g.correct
        ]
        if time.monotonic() > told + 60:
            told = time.monotonic()
            print(f"{sum(tried.values()):,} after {(told - began) / 60:.1f} min", flush=True)
    seconds = time.monotonic() - began
    verifier.close()
    print(f"{'kind':22}{'tried':>10}{'accepted':>10}{'timeouts':>10}")
    for kind, n in tried.most_common():
        print(f"{kind:22}{n:10,}{accepted[kind]:10,}{timeouts[kind]:10,}")
    print(
        f"{sum(tried.values()):,} completions in {seconds / 60:.1f} min; settled by "
        + ", ".join(f"{m} {n:,}" for m, n in methods.most_common())
    )
    own, children = (
        resource.getrusage(who).ru_maxrss // 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    print(
        f"slowest batch of 2,000: {slowest:.0f} s; peak memory: {own} MiB, largest worker {children} MiB "
        f"(limit {verifier.memory_mb} MiB of address space)"
    )
    print(f"exceptions {len(errors)}, accepted though wrong by construction {len(gamed)}, code run: {MARKER.exists()}")
    for problem in [*errors[:5], *gamed[:20]]:
        print(problem)
    return int(bool(errors or gamed or MARKER.exists()))


if __name__ == "__main__":
    sys.exit(main())
