r"""Grading: what is in the last box of a completion, and does it equal the gold answer?

Two graders look at the same text, the content of the LAST ``\boxed{}`` and nothing else:

- `exact_match` compares the normal forms of two strings. It costs microseconds and settles most pairs.
- math-verify compares them symbolically (`Verifier`). It parses LaTeX with sympy, so a completion can make it
  slow, large or stuck: it runs in worker processes that are killed when they pass a time or memory limit.
"""

import os
import queue
import re
import string
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection, Pipe
from typing import Literal

MAX_ANSWER = 1000
"""Longer answers (characters) are compared as they stand and never reach sympy. MATH's longest has 159."""

MAX_BRACKETS = 60
"""Likewise answers with more opening brackets, whose nesting costs the parser seconds. MATH's most have 20."""

# --- the last box ---------------------------------------------------------------------------------

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # `\{` and `\}` are characters of the answer, not grouping
_UNBRACED_END = re.compile(r"\\[)\]]|[$}\n]|\Z")


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}`` or ``\fbox{...}``; None without one or when the last never closes.

    An unclosed last box does not fall back to an earlier one: the text stopped in the middle of its answer.
    The form without braces, ``\boxed 5``, reaches to the next ``$``, ``\)``, ``\]``, ``}`` or line end.
    Of two nested boxes the inner one starts last, so it wins. Linear time, no recursion, no error on any str.
    """
    box = None
    for box in _BOX.finditer(text):  # noqa: B007  (only the last match matters)
        pass
    if box is None:
        return None
    start = box.end()
    if text[start : start + 1] != "{":
        return text[start : _UNBRACED_END.search(text, start).start()].strip() or None
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1 : brace.start()]
    return None


# --- exact match ----------------------------------------------------------------------------------

_NUMBER = re.compile(r"([+-]?)([0-9]*)(?:\.([0-9]*))?")
_TRIGONOMETRY = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)")
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+(?![0-9,{])")
_ABBREVIATION = r"mm|cm|km|m|ft|in|yd|mi|kg|g|lbs?|oz|mL|L|s|sec|min|hrs?|h|mph"
_UNIT = (
    r"units?|inch(?:es)?|foot|feet|yards?|miles?|(?:centi|milli|kilo)?met(?:er|re)s?|(?:kilo)?grams?|pounds?|ounces?"
    r"|lit(?:er|re)s?|gallons?|seconds?|minutes?|hours?|days?|weeks?|months?|years?|dollars?|cents?|degrees?|radians?"
)
_POWER = r"(?:\^\{?[23]\}?)?"
_TEXT_UNIT = re.compile(
    rf"(?<=[0-9}}]) ?\\(?:text|mbox|mathrm) ?\{{ ?(?:sq(?:uare|\.)? |cubic )?"
    rf"({_UNIT}|{_ABBREVIATION})\.? ?{_POWER}\}}{_POWER}$"
)
_BARE_UNIT = re.compile(rf"(?<=[0-9}}]) ?(?:(?:square|cubic) )?({_UNIT})$")
_ARGUMENT = r"(?:[0-9A-Za-z]|\\[A-Za-z]+)"  # a TeX argument without braces is one token

_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\!|\\displaystyle(?![A-Za-z])|(?<!\\)\\[()\[\]]|\\?\$", ""),
        (r"\\(?:left|right)\.|\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(le|ge|ne)q(?![A-Za-z])", r"\\\1"),
        ("\u2212", "-"),
        (r"\^\{?(?:\\circ|\u00b0)\}?|\u00b0", r"^\\circ"),
        (_TEXT_UNIT, ""),
        (_BARE_UNIT, ""),
        (r"\\(?:text|textbf|textit|textnormal|mbox|hbox|mathrm|mathbf) ?\{([^{}]*)\}", r" \1 "),
        (r"(?:\.|\\?%)+$", ""),
        (r"^[A-Za-z]=(?=[^=<>]+$)", ""),
        (rf"\\sqrt ?({_ARGUMENT})", r"\\sqrt{\1}"),
        (rf"\\frac ?({_ARGUMENT})", r"\\frac{\1}"),
        (rf"(\\frac\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}) ?({_ARGUMENT})", r"\1{\2}"),
        (r"(?<![0-9A-Za-z./^_)}\]])([0-9]+)/([0-9]+)(?![0-9A-Za-z./^_({\[]|\\[A-Za-z])", r"\\frac{\1}{\2}"),
        (r"(?<![^(,=\[])\\frac\{-([0-9]+)\}", r"-\\frac{\1}"),
        (r"([\^_])\{([0-9A-Za-z])\}", r"\1\2"),
        (r"(?<![0-9])\.(?=[0-9])", "0."),
        (r"^\{([^{}]*)\}$", r"\1"),
    ]
]  # fmt: skip


def _tidy(answer: str) -> str:
    """Drop the white space that cannot matter. A blank stays where words or numbers would join, as in 81, 256."""
    answer = re.sub(r"(?<!\\)(?:\\[,;:\s]|~|\\q?quad(?![A-Za-z]))", " ", answer)
    answer = re.sub(r"\s+", " ", answer).strip(" ").replace(" ,", ",")
    answer = re.sub(r" (?![A-Za-z0-9])|(?<=[0-9]) (?=[A-Za-z])", "", answer)
    answer = re.sub(r"(?<![A-Za-z0-9])(?!(?<=[0-9],) [0-9]) ", "", answer)
    return re.sub(r"(\\[A-Za-z]+) (?=[0-9])", r"\1", answer)


def _rewrite(answer: str) -> str:
    for pattern, replacement in _RULES:
        answer = pattern.sub(replacement, answer)
    # Between brackets a comma separates coordinates. Outside, groups of three digits make a large number,
    # unless a blank follows the comma. Every comma that stays between digits gets that blank.
    if not any(bracket in answer for bracket in ("(", "[", r"\{")):
        answer = _THOUSANDS.sub(lambda number: re.sub(r"[,{}]", "", number[0]), answer)
    answer = re.sub(r"(?<=[0-9]),(?=[0-9])", ", ", answer)
    # 90^\circ is 90, but \cos 15^\circ is not \cos 15.
    if not _TRIGONOMETRY.search(answer):
        answer = answer.replace(r"^\circ", "")
    number = _NUMBER.fullmatch(answer)
    if number and (number[2] or number[3]):
        sign, whole, decimals = number[1], number[2].lstrip("0") or "0", (number[3] or "").rstrip("0")
        answer = whole + ("." + decimals if decimals else "")
        answer = "-" + answer if sign == "-" and answer != "0" else answer
    return answer


@lru_cache(maxsize=20_000)
def _normal_form(tidy: str) -> str:
    answer = tidy
    for _ in range(8):
        before, answer = answer, _tidy(_rewrite(answer))
        if answer == before:
            return answer
    return tidy  # does not settle: left alone, which keeps normalize idempotent on every string


def normalize(answer: str) -> str:
    r"""Normal form of an answer for comparison. Idempotent, never raises on a str, linear time.

    Dropped: white space, ``\left``, ``\right``, a final full stop, ``\text{}``, ``\$``, ``\%``, degrees,
    units of measure after a number (``5 cm`` and ``5 inches`` agree) and one letter in front (``x = 5``).
    One form for each of ``\dfrac12``, ``\frac{1}{2}``, ``1/2``; ``\sqrt3``, ``\sqrt{3}``; ``.5``, ``0.50``;
    ``12{,}345``, ``12,345``. An answer longer than `MAX_ANSWER` only has its white space tidied.
    """
    tidy = _tidy(answer)
    return tidy if len(tidy) > MAX_ANSWER else _normal_form(tidy)


def exact_match(gold: str, answer: str) -> bool:
    """Whether two answers (contents of a box, not whole texts) have the same non-empty normal form.

    What the normal form drops may be left out, not contradicted: 5 cm and 5, not 5 cm and 5 inches, nor x=5 and y=5.
    """
    form = normalize(gold)
    return form != "" and form == normalize(answer) and not _contradict(gold, answer)


_UNIT_NAMES = {"mm": "millimeter", "cm": "centimeter", "km": "kilometer", "m": "meter", "in": "inch", "ft": "foot",
               "feet": "foot", "yd": "yard", "mi": "mile", "kg": "kilogram", "g": "gram", "lb": "pound", "oz": "ounce",
               "ml": "milliliter", "l": "liter", "s": "second", "sec": "second", "min": "minute", "h": "hour",
               "hr": "hour"}  # fmt: skip


@lru_cache(maxsize=20_000)
def _dropped(answer: str) -> tuple[str, str, bool]:
    """What `normalize` drops: a name in front, the unit of measure with its power, whether there is a percent sign."""
    tidy = _tidy(answer).rstrip("$.")
    name = re.match(r"\$?([A-Za-z])=(?=[^=<>]+$)", tidy)
    unit = _TEXT_UNIT.search(tidy) or _BARE_UNIT.search(tidy)
    if unit:
        text, word = unit[0], unit[1].lower().replace("metre", "meter").replace("litre", "liter")
        singular = re.sub(r"(?<=inch)es$|s$", "", word)
        unit = _UNIT_NAMES.get(word) or _UNIT_NAMES.get(singular, singular)
        unit += "2" if re.search(r"sq|\^\{?2", text) else "3" if re.search(r"cubic|\^\{?3", text) else ""
    elif r"\$" in tidy:
        unit = "dollar"
    elif "\\circ" in tidy or "\u00b0" in tidy:
        unit = "degree"
    return name[1] if name else "", unit or "", "%" in tidy


def _contradict(gold: str, answer: str) -> bool:
    """Whether two answers name different unknowns or units, or one of two numbers up to 1 is a percentage.

    From 1 on a percent sign does not matter, since MATH writes percentages with and without it.
    """
    (name, unit, percent), (other_name, other_unit, other_percent) = _dropped(gold), _dropped(answer)
    small = percent != other_percent and re.match(r"-?(?:0|\\frac|1$)", normalize(gold))
    return bool(name and other_name and name != other_name or unit and other_unit and unit != other_unit
                or small and normalize(gold) == normalize(answer))


# --- what math-verify may be shown ----------------------------------------------------------------

# math-verify skips what it cannot read, takes the last of several sides and reads X as x. Of its own it accepts
# "5 is not the answer", "6 = 5" and 10_2 for 10. So an answer that it may see is made of what is listed here.
_COMMANDS = set(
    "frac dfrac tfrac cfrac sqrt cdot times div pm pi infty circ text textbf textit textnormal mbox hbox mathrm mathbf "
    "left right big bigl bigr Big Bigl Bigr bigg biggl biggr displaystyle quad qquad begin end cup cap in setminus "
    "mathbb emptyset varnothing le leq ge geq lt gt sin cos tan cot sec csc arcsin arccos arctan log ln binom lfloor "
    "rfloor lceil rceil alpha beta gamma delta theta lambda mu phi omega rho sigma overline angle triangle".split()
)
_CHARACTERS = set(string.ascii_letters + string.digits + "+-*/^_(){}[]|.,:;=<>!&%$\\ \t\n\u2212\u00b0")
_TEXT = re.compile(r"\\(?:text\w*|mbox|hbox|mathrm|mathbf) ?\{([^{}]*)\}|(?<![A-Za-z\\])([A-Za-z]{4,}|not)(?![A-Za-z])")
_WORD = re.compile(r"[ap]\.? ?m\b|[a-z]{2,}")
_MEASURE = re.compile(rf"{_UNIT}|{_ABBREVIATION}|sq|square|cubic")
_AMOUNTS = set(
    "am pm not thousand million billion trillion hundred dozen thousands millions billions trillions hundreds dozens "
    "tens tenths hundredths thousandths halves thirds times less plus minus".split()
)
_JOINT = re.compile(r"\\pm(?![A-Za-z])|;|(?<![A-Za-z])(?:and|or)(?![A-Za-z])")
_NAMED = re.compile(r"\$?(?:[A-Za-z]|\\[a-z]+)(?:_\w|_\{\w+\})?(?:\([a-z](?:,[a-z])*\))?=[^=]+")
_DECIMAL = re.compile(r"(?<![0-9.])([0-9]*)\.([0-9]+)(?![0-9.]|\\(?:overline|bar|dot))(\\?%)?")


@lru_cache(maxsize=20_000)
def _shape(answer: str) -> str:
    """Commas and what encloses them: (,) for a pair, "," for two numbers, a set of them or plus-minus, <> for {5}."""
    form = _JOINT.sub(",", re.sub("[<>]", "", normalize(answer))).replace(r"\{", "<").replace(r"\}", ">")
    before, shape = "", re.sub(r"[^()\[\],<>]", "", form)
    while shape != before:
        before, shape = shape, re.sub(r"\(\)|\[\]", "", shape)
    return re.sub(r"^<((?:[(\[],*[)\]])*,.*)>$", r"\1", shape)


@lru_cache(maxsize=20_000)
def _parts(answer: str) -> tuple[set[str], set[str], set[str]]:
    """The commands, the words (units of measure and "and", "or" left out) and the letters of an answer."""
    commands = set(re.findall(r"\\([A-Za-z]+)", answer))
    answer = re.sub(r"\\(?:begin|end) ?\{\w*\}", "", answer)
    found = [w for text in _TEXT.findall(answer) for w in _WORD.findall("".join(text).lower())]
    words = {re.sub(r"[. ]", "", w) for w in found if not _MEASURE.fullmatch(w)} - {"and", "or"}
    letters = set(re.sub(r"\\[A-Za-z]+|[^A-Za-z]", "", _TEXT.sub("", answer)))
    return commands, words, letters


def _comparable(gold: str, answer: str) -> bool:
    """Whether math-verify may decide about two answers that the exact match does not accept."""
    (known, said, letters), (commands, words, others) = _parts(gold), _parts(answer)
    if commands - _COMMANDS - known or set(answer) - _CHARACTERS - set(gold) or _contradict(gold, answer):
        return False
    if sum(map(answer.count, "([{|")) > MAX_BRACKETS:
        return False
    # Words: those of the gold answer, or, where it has none, what is counted: 81 teachers.
    new, missing = words - said, said - words
    counted = not said and all(w.endswith("s") and w not in _AMOUNTS for w in new)
    if (new and not counted) or missing & _AMOUNTS or (missing and not any(c.isdigit() for c in gold)):
        return False
    if any(c.isupper() and c.lower() in letters | others for c in letters | others):
        return False
    forms = [normalize(gold), normalize(answer)]
    equations = sorted((len(re.findall("(?<![<>!])=", text)), _tidy(text)) for text in (gold, answer))
    if equations[0][0] != equations[1][0] and (equations[1][0] > 1 or not _NAMED.fullmatch(equations[1][1])):
        return False
    angles = [bool(re.search(r"\\circ|\u00b0", text)) for text in (gold, answer)]
    if angles[0] != angles[1] and any(map(_TRIGONOMETRY.search, forms)):
        return False
    if any(re.search(r"[0-9)}] *_|(?<!_)[0-9] [0-9]", form) for form in forms):  # number bases, 2 2
        return False
    lists = [re.sub(r"\\[{}]| ", "", form).split(",") for form in forms]
    shapes = {_shape(gold), _shape(answer)}
    return len(shapes) == 1 and (not shapes <= {",", ",,"} or all(len(set(items)) == len(items) for items in lists))


def _as_fractions(text: str) -> str:
    """Decimals and their percentages as fractions, since math-verify compares decimals to six places only."""
    def fraction(number):
        whole, digits, percent = number.groups()
        return rf"(\frac{{{int(whole + digits)}}}{{{10 ** (len(digits) + 2 * bool(percent))}}})"

    return _DECIMAL.sub(fraction, text)


# --- symbolic equality ----------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Grade:
    """Verdict on one completion.

    correct: the verdict. exact: the verdict of `exact_match` alone. answer: content of the last box, or None.
    method: what settled it.
    - `exact`: equal normal forms, or two plain numbers that differ, or an answer that math-verify is not shown: longer
      than `MAX_ANSWER`, or made of what it is known to misread (`_comparable`);
    - `symbolic`: math-verify;
    - `timeout`: a time or memory limit was passed, so incorrect;
    - `unparsed`: no box, an empty one, or a last one that never closes, so incorrect.
    """

    correct: bool
    method: Literal["exact", "symbolic", "timeout", "unparsed"]
    exact: bool
    answer: str | None


class _Worker:
    """One Python process that runs `_serve` on this file. It takes (gold, answer) and sends back a bool."""

    def __init__(self, seconds: float, memory_mb: int):
        self.connection, theirs = Pipe()
        # -P: this file's folder must not shadow other modules. A session of its own: Ctrl-C is meant for us.
        command = [sys.executable, "-P", __file__, *map(str, (theirs.fileno(), seconds, memory_mb))]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        theirs.close()
        try:  # the time to import math-verify is not counted as grading time
            message = self.connection.recv() if self.connection.poll(300) else "no sign of life in 300 s"
        except (EOFError, OSError):
            message = f"it ended with exit code {self.process.wait()}; is memory_mb={memory_mb} too small?"
        except BaseException:
            self.kill()
            raise
        if message != "ready":
            self.kill()
            raise RuntimeError(f"the process that runs math-verify did not start: {message}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


def _kill_all(workers: set[_Worker], owner: int) -> None:
    for worker in list(workers) if os.getpid() == owner else []:  # after a fork they are the parent's
        worker.kill()
    workers.clear()


class Verifier:
    """Grades completions: exact match first, then math-verify in a bounded pool of processes.

    workers: processes. They start when first needed (about a second) and end with this process, also if it
    is killed. seconds: wall-clock limit for one pair, start-up not counted. memory_mb: address space of a
    worker, MiB (Linux). cache_size: pairs whose verdict is remembered, least recently used out first.
    A batch takes up to seconds x pairs / workers, so keep seconds short where completions may be hostile.
    Safe to call from any thread, a Jupyter kernel or a script without a main guard. POSIX only.

    Why not a library: pebble 5.2.3 kills on time-out, but its workers import the caller's main module again
    (a training script would start twice) and the pool breaks for good when an idle worker is killed.
    """

    def __init__(self, workers: int = 1, seconds: float = 5.0, memory_mb: int = 2048, cache_size: int = 20_000):
        for name, value in [("workers", workers), ("seconds", seconds), ("memory_mb", memory_mb)]:
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self.workers, self.seconds, self.memory_mb, self.cache_size = workers, seconds, memory_mb, cache_size
        self._cache: OrderedDict[tuple[str, str], bool | None] = OrderedDict()
        self._lock = threading.Lock()
        self._reset()

    def _reset(self) -> None:
        self._alive: set[_Worker] = set()
        self._slots: queue.LifoQueue[_Worker | None] = queue.LifoQueue()  # None: a worker not started yet
        for _ in range(self.workers):
            self._slots.put(None)
        self.close = weakref.finalize(self, _kill_all, self._alive, os.getpid())  # also runs at exit
        self._owner = os.getpid()

    def grade(self, golds: Sequence[str], completions: Sequence[str], shortcut: bool = True) -> list[Grade]:
        """Grade completions[i], a whole text, against golds[i], an answer (not a solution). One Grade a pair.

        shortcut=False asks math-verify about every pair that it may see and takes its verdict alone.
        Raises ValueError when the lists differ in length or hold something other than strings, RuntimeError
        when math-verify cannot be started.
        """
        if len(golds) != len(completions):
            raise ValueError(f"grade needs one gold a completion, got {len(golds)} and {len(completions)}")
        for name, texts in (("golds", golds), ("completions", completions)):
            for i, text in enumerate(texts):
                if not isinstance(text, str):
                    raise ValueError(f"{name}[{i}] must be a string, got {type(text).__name__}: {text!r:.80}")
        grades = [self._without_sympy(gold, last_boxed(text), shortcut)
                  for gold, text in zip(golds, completions, strict=True)]
        asked = {i: (golds[i], grade.answer) for i, grade in enumerate(grades) if grade.method == "symbolic"}
        verdicts = self._ask_all(list(dict.fromkeys(asked.values())))
        for i, pair in asked.items():
            equal = verdicts[pair]
            method = "timeout" if equal is None else "symbolic"
            grades[i] = Grade(bool(equal), method, grades[i].exact, grades[i].answer)
        return grades

    @staticmethod
    def _without_sympy(gold: str, answer: str | None, shortcut: bool) -> Grade:
        if answer is None or not answer.strip():
            return Grade(False, "unparsed", False, answer)
        ours, theirs = normalize(gold), normalize(answer)
        exact = exact_match(gold, answer)
        numbers = all(form and _NUMBER.fullmatch(form) for form in (ours, theirs))
        differ = numbers and "%" not in gold + answer  # 50\% can equal 0.5
        settled = shortcut and (exact or differ)
        if settled or max(len(gold), len(answer)) > MAX_ANSWER or not (exact or _comparable(gold, answer)):
            return Grade(exact, "exact", exact, answer)
        return Grade(False, "symbolic", exact, answer)

    def _ask_all(self, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], bool | None]:
        """The verdicts: True, False, or None where a limit was passed."""
        if self._owner != os.getpid():  # after a fork the workers answer to the parent, not to us
            self.close.detach()
            self._reset()
        with self._lock:
            known = {pair: self._cache[pair] for pair in pairs if pair in self._cache}
            for pair in known:
                self._cache.move_to_end(pair)
        unknown = [pair for pair in pairs if pair not in known]
        if len(unknown) < 2 or self.workers == 1:
            return known | {pair: self._ask(pair) for pair in unknown}
        threads = ThreadPoolExecutor(min(self.workers, len(unknown)))
        try:
            return known | dict(zip(unknown, threads.map(self._ask, unknown), strict=True))
        finally:  # after an interrupt, do not grade the rest first
            threads.shutdown(wait=False, cancel_futures=True)

    def _ask(self, pair: tuple[str, str]) -> bool | None:
        equal = None
        worker = self._slots.get()
        try:
            for _ in range(2):  # a dead worker's successor tries once more: the pair may not be at fault
                if worker is None or worker.process.poll() is not None:
                    self._alive.discard(worker)
                    worker = _Worker(self.seconds, self.memory_mb)
                    self._alive.add(worker)
                try:
                    worker.connection.send(pair)
                    if worker.connection.poll(self.seconds):
                        equal = worker.connection.recv()
                    else:
                        worker.kill()
                    break
                except (EOFError, OSError):
                    worker.kill()
        except BaseException:  # an interrupt, say: the verdict under way must not be read as the next pair's
            if worker is not None:
                worker.kill()
            raise
        finally:
            self._slots.put(worker)
        with self._lock:
            self._cache[pair] = equal
            while len(self._cache) > self.cache_size:
                self._cache.popitem(last=False)
        return equal


# --- the worker process ---------------------------------------------------------------------------

def _serve(descriptor: str, seconds: str, memory_mb: str) -> None:
    import resource

    connection, parent = Connection(int(descriptor)), os.getppid()
    size = int(memory_mb) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    try:
        import logging

        from math_verify import LatexExtractionConfig, parse, verify

        logging.disable()
        # Only the content of the box, as LaTeX. math-verify's other patterns would find a "5" in "\neq 5".
        config = [LatexExtractionConfig(boxed_match_priority=0)]

        def equal(pair: tuple[str, str]) -> bool:
            # The parent keeps the time: math-verify's own limit is an alarm, which sympy can catch.
            gold, answer = (parse(f"\\boxed{{{_as_fractions(text)}}}", config, extraction_mode="first_match",
                                  parsing_timeout=None) for text in pair)
            return bool(verify(gold, answer, numeric_precision=50, timeout_seconds=None))

        equal((r"\frac{1}{2}+x", "0.5x+1"))  # sympy's first comparison takes half a second: not that of a real pair
        connection.send("ready")
    except BaseException as error:
        connection.send(f"{type(error).__name__}: {error}")
        return
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    while True:
        while not connection.poll(5):
            if os.getppid() != parent:  # killed, while a forked sibling still holds the other end of the pipe
                return
        pair = connection.recv()
        # If the parent is killed while sympy is stuck, this ends the orphan.
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + float(seconds)) + 3, hard))
        connection.send(equal(pair))


if __name__ == "__main__":
    try:
        _serve(*sys.argv[1:])
    except (EOFError, OSError):  # the parent has ended
        pass
