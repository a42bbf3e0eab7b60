r"""Grading: what is in the last box of a completion, and does it equal the gold answer?

One small grammar takes an answer apart (`take_apart`):

    answer      =  [name "="]  mathematics  [label]        x = 5\text{ cm}
    label       =  a unit of measure, or what is counted   miles per hour; teachers
    mathematics =  items with commas between them          an item: a matrix, a union, a pair,
                                                           a set, a relation or an expression

Two graders look at the result, and at nothing outside the LAST ``\boxed{}``:

- `exact_match` compares the mathematics as text. It costs microseconds and settles most pairs.
- `Verifier` compares it expression by expression: math-verify reads the two LaTeX strings, exact
  arithmetic compares them (`lib._worker`). A completion can make that slow, large or stuck: it
  happens in processes that are killed when they pass a time or memory limit.

For both, names and labels must agree or be left out. Words that are neither leave the exact match
alone, and so does whatever math-verify is known to misread: when in doubt, an answer is refused.
"""

import math
import os
import queue
import re
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Literal, NamedTuple

from lib._worker import Tree, _kill_all, _Worker

MAX_ANSWER = 1000
"""Longer answers (characters) are compared as they stand. MATH's longest has 159."""

MAX_BRACKETS = 60
"""Answers with more opening brackets are not parsed: nesting costs seconds. MATH's most have 20."""

# --- the last box ---------------------------------------------------------------------------------

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # `\{` and `\}` are characters of the answer
_UNBRACED_END = re.compile(r"\\[)\]]|[$}\n]|\Z")


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{...}`` or ``\fbox{...}``, None if there is none.

    An unclosed last box gives None, not an earlier box: the text stopped in the middle of its
    answer. The form without braces, ``\boxed 5``, reaches to the next ``$``, ``\)``, ``\]``, ``}``
    or line end. Of two nested boxes the inner one starts last, so it wins. Linear time, no
    recursion, no error on any str.
    """
    ends = [box.end() for box in _BOX.finditer(text)]
    if not ends:
        return None
    start = ends[-1]
    if text.startswith("{", start):
        return _braced(text, start)
    end = _UNBRACED_END.search(text, start).start()
    return text[start:end].strip() or None


def _braced(text: str, start: int) -> str | None:
    """Return what is between the brace at `start` and the one that closes it, None if none does."""
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1 : brace.start()]
    return None


# --- words: units of measure, amounts, and what is neither ----------------------------------------

UNITS = {prefix + sign: name + unit
         for prefix, name in (("", ""), ("k", "kilo"), ("c", "centi"), ("m", "milli"))
         for sign, unit in (("m", "meter"), ("g", "gram"), ("L", "liter"), ("l", "liter"),
                            ("s", "second"))}
"""Name or abbreviation, singular -> name of a unit of measure. Others are told apart all the same:
an unlisted plural, as in `5\\text{ apples}`, is a label too."""
UNITS |= {name: name for name in UNITS.values()}
UNITS |= {sign: line.split()[0] for line in """unit; percent; degree deg; radian rad; fahrenheit F;
    celsius C; inch in; foot ft feet; yard yd; mile mi; acre; hectare ha; gram gm; pound lb; ounce
    oz; ton; gallon gal; quart; pint; second sec; minute min; hour hr h; day; week; month; year yr;
    dollar usd; cent; euro; mile-per-hour mph; kilometer-per-hour kph""".split(";")
          for sign in line.split()}

_LARGE = {"ten": 10, "hundred": 100, "thousand": 1000, "lakh": 10**5, "million": 10**6,
          "crore": 10**7, "billion": 10**9, "trillion": 10**12}
_PARTS = ("half third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth "
          "fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth").split()
AMOUNTS = {"dozen": Fraction(12), "score": Fraction(20), "quarter": Fraction(1, 4)}
"""A word that multiplies the number before it, singular -> its value: 3 fifths, 5 million."""
AMOUNTS |= {word: Fraction(1, n) for n, word in enumerate(_PARTS, start=2)}
AMOUNTS |= {word: Fraction(value) for word, value in _LARGE.items()}
AMOUNTS |= {word + "th": Fraction(1, value) for word, value in _LARGE.items()}

_NO_LABEL = re.compile(
    r"(?<![A-Za-z-])(?:am|pm|not?|never|less|more|plus|minus|negatives?|opposites?|times|twice|"
    r"double|triple|squared|cubed|over|out|of|to|factorial|roots?|powers?|base|remainder|wrongs?|"
    r"false|about|almost|pairs?|couples?|gross|myriads?|inverses?|reciprocals?|logs?|pi|sin|cos|"
    r"tan|ln|max|min|gcd|lcm|mod|nan|inf|[A-Z]{2,}|[a-z-]*(?:ths?|rds|folds?|illions?))"
    r"(?![A-Za-z-])")
"""A word that changes what is said, or may: an answer that has one is compared as text only."""


_IRREGULAR = {"halves": "half", "inches": "inch"}


def _singular(word: str) -> str:
    """Return a word in small letters, American spelling and the singular: Metres is meter."""
    word = word.lower().replace("metre", "meter").replace("litre", "liter")
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("s") and len(word) > 2:
        return word[:-1]
    return word


_FACTOR = re.compile(
    r"(?:(sq(?:uare)?|cu(?:bic)?)\.? ?)?([A-Za-z-]+)\.?(?: ?\^ ?\{?([23])\}?)?")


def _factor(text: str) -> str | None:
    """Return the name of one factor of a unit, None if it is none: sq. cm is square centimeter."""
    found = _FACTOR.fullmatch(text.strip())
    if found is None:
        return None
    size, word, power = found.groups(default="")
    name = UNITS.get(word) or UNITS.get(_singular(word))
    if name is None:
        return None
    power = power or {"s": "2", "c": "3"}.get(size[:1], "")
    return {"2": "square ", "3": "cubic ", "": ""}[power] + name


@lru_cache(maxsize=20_000)
def unit(text: str) -> str | None:
    """Return the one name of a unit of measure, None if a word in it is unknown.

    `sq. cm` and `cm^2` are `square centimeter`; `km/h` and `kph` are `kilometer-per-hour`.
    """
    text = re.sub(r"^ *degrees? (?=[FCfc])", "", text.replace("per cent", "percent"))
    factors = [_factor(part) for part in re.split(r"/| per |-per-", text)]
    if None in factors:
        return None
    return "-per-".join(factors)


_SIGNS = "|".join(sorted((sign for sign in UNITS if len(sign) > 1), key=len, reverse=True))
_TEXT_BLOCK = (r"\\(?:text|textbf|textit|textnormal|mbox|hbox|mathrm|mathbf) ?"
               r"\{(?P<text>(?:[^{}]|\{\w\})*)\}")
_NO_WORD = r"\\(?:begin|end) ?\{\w*\}|\\[A-Za-z]+"
_SHORT_WORD = r"(?:yes|no|not|odd|sin|cos|tan|log|ln|max|min|gcd|nan|inf)(?![A-Za-z])"
_BARE_WORD = rf"(?<![A-Za-z])(?:{_SHORT_WORD}|[A-Z]{{2,}}(?![a-z])|[A-Za-z]{{4,}})"  # AB, Monday
_BARE_UNIT = rf"(?:(?<=[0-9}}])|(?<=[0-9}}] ))(?:sq|{_SIGNS})(?![A-Za-z])"  # 5cm
_WORDS = re.compile(
    rf"(?=[\\A-Za-z ~])(?P<apart>\\[,;: ]|[ ~])?{_TEXT_BLOCK}|{_NO_WORD}"
    rf"|(?P<bare>(?<![A-Za-z])(?:and|or)(?![A-Za-z])"
    rf"|(?:{_BARE_WORD}|{_BARE_UNIT})(?:(?: ?/ ?| )[A-Za-z]{{2,}})*)")
_WORD_IN_TEXT = re.compile(r"(?:and|or)(?![A-Za-z])|[A-Za-z]{2,}(?:[ -]+(?!and |or )[A-Za-z]{2,})*")


def _mark_words(match: re.Match) -> str:
    r"""Rewrite a text block or bare words: words go to ``\text{}``, all else is mathematics."""
    if match["bare"]:
        return rf"\text{{{match['bare']}}}"
    if match["text"] is None:
        return match[0]
    content = match["text"].rstrip(".")
    is_letter = len(content.strip()) == 1
    stands_apart = match["apart"] or content.startswith(" ")
    if stands_apart or not is_letter:  # 5\text{ m} is in meters, but 3\text{m} is 3m
        name = unit(content)
        if name:
            return rf"\text{{{name}}}"
    return " " + _WORD_IN_TEXT.sub(r"\\text{\g<0>}", content) + " "


# --- one spelling ---------------------------------------------------------------------------------

class Rule(NamedTuple):
    """A rewriting: what `pattern` finds becomes `replacement`, so `example` becomes `result`."""

    name: str
    pattern: re.Pattern
    replacement: str | Callable[[re.Match], str]
    example: str
    result: str

    def apply(self, text: str) -> str:
        """Rewrite every occurrence."""
        return self.pattern.sub(self.replacement, text)


def _rules(*rows: tuple) -> list[Rule]:
    """Return the rules that rows of texts stand for."""
    return [Rule(name, re.compile(pattern), *rest) for name, pattern, *rest in rows]


_UNICODE = str.maketrans({
    "−": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "±": r"\pm ", "≤": r"\le ",
    "≥": r"\ge ", "≠": r"\ne ", "∞": r"\infty ", "√": r"\sqrt ", "π": r"\pi ", "θ": r"\theta ",
    "∪": r"\cup ", "∈": r"\in ", "²": "^2", "³": "^3", "°": r"^\circ ", "′": "'"})
_COMMAND = {"dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac", "dbinom": r"\binom",
            "tbinom": r"\binom", "leq": r"\le", "leqslant": r"\le", "geq": r"\ge",
            "geqslant": r"\ge", "neq": r"\ne", "lt": "<", "gt": ">"} | dict.fromkeys(
    "left right big Big bigl bigr Bigl Bigr bigg Bigg biggl biggr displaystyle".split(), "")
_ARGUMENT = r"(?:[0-9A-Za-z]|\\[A-Za-z]+)"  # a TeX argument without braces is one token
_GROUP = r"\{(?:[^{}]|\{[^{}]*\})*\}"

SPELLING = _rules(
    ("markup", r"\\!|\\(?:left|right)\.|(?<!\\)\\[()\[\]]|(?<!\\)\$", "",
     r"$12,\!345$", "12,345"),
    ("commands", r"\\([A-Za-z]+)", lambda found: _COMMAND.get(found[1], found[0]),
     r"\left(\dfrac12\right)", r"(\frac12)"),
    ("pi", r"(?<![A-Za-z\\{])pi(?![A-Za-z])", r"\\pi ", "2pi", r"2\pi "),
    ("clock", r"\\text\{([AaPp])[Mm]\}|(?<![A-Za-z\\{])([AaPp])\. ?[Mm](?:\.|(?![A-Za-z]))",
     lambda found: rf"\text{{{(found[1] or found[2]).lower()}m}}", "4:30 P.M.", r"4:30 \text{pm}"),
    ("and, or", r" ?(?:[,;] ?)?(?:\\text\{(?:and|or)\}|;)[ ,]*", ", ",
     r"6, 8, \text{and}10", "6, 8, 10"),
    ("full stop", r"(?<!\.)\.(?=$|\\text\{[^{}]*\}$)", "", "5.", "5"),
    ("sign in words", r"^\\text\{(?:minus|negative)\} ?", "-", r"\text{minus}3", "-3"),
    ("degree sign", r"\^ ?\{ ?\\circ ?\}", r"^\\circ", r"90^{\circ}", r"90^\circ"),
    ("temperature", r"\^\\circ ?([FC])(?![A-Za-z])", r"\\text{degree \1}",
     r"72^\circ F", r"72\text{degree F}"),
    ("percent sign", r"\\?%(?=\.?$|\\text)", r"\\text{percent}", r"5\%", r"5\text{percent}"),
    ("dollar sign", r"^(-?) ?\\\$(.*?)(?=\\text|\.?$)", r"\1\2\\text{dollar}",
     r"\$5\text{per hour}", r"5\text{dollar}\text{per hour}"),
    ("root", rf"\\sqrt ?({_ARGUMENT})", r"\\sqrt{\1}", r"\sqrt3", r"\sqrt{3}"),
    ("numerator", rf"\\frac ?({_ARGUMENT})", r"\\frac{\1}", r"\frac12", r"\frac{1}2"),
    ("denominator", rf"(\\frac{_GROUP}) ?({_ARGUMENT})", r"\1{\2}",
     r"\frac{1}2", r"\frac{1}{2}"),
    ("slash", r"(?<![0-9A-Za-z./^_)}\]])([0-9]+)/([0-9]+)(?![0-9A-Za-z./^_!({\[]|\\[A-Zac-z])",
     r"\\frac{\1}{\2}", "1/2", r"\frac{1}{2}"),
    ("negative numerator", r"(?<![^(,=\[])\\frac\{-([0-9]+)\}", r"-\\frac{\1}",
     r"\frac{-1}{2}", r"-\frac{1}{2}"),
    ("script", r"([\^_])\{([0-9A-Za-z])\}(?! ?[0-9])", r"\1\2", "x^{2}", "x^2"),
    ("base of a logarithm", r"\\log_([0-9]) (?=[0-9])", r"\\log_{\1}", r"\log_2 9", r"\log_{2}9"),
    ("decimal", r"(?<![0-9])\.(?=[0-9])", "0.", ".5", "0.5"),
    ("braces", r"^\{([^{}]*)\}$", r"\1", "{5}", "5"),
)
"""Ways to write the same thing, brought to one, in this order and until nothing changes."""

_NUMBER = re.compile(r"[+-]?[0-9]*(?:\.[0-9]*)?")
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+(?![0-9,{])")
_TRIGONOMETRY = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)")
_DEGREES = re.compile(r"\^\\circ ?(?=$|[,)\]+*/<>=-]|\\text)")


_BLANK = re.compile(r"(?<!\\)(?:\\[,;:\s]|~|\\q?quad(?![A-Za-z]))|\s+")
_IDLE_BLANK = re.compile(r" (?![A-Za-z0-9])|(?<=[0-9]) (?=[A-Za-z])")
_IDLE_BLANK_AFTER = re.compile(r"(?<![A-Za-z0-9])(?!(?<=[0-9],) [0-9]) ")


def _tidy(answer: str) -> str:
    """Drop white space that cannot matter. A blank stays where words or numbers would join."""
    answer, blanks = _BLANK.subn(" ", answer)
    if not blanks:
        return answer
    answer = re.sub(" +", " ", answer).strip(" ").replace(" ,", ",")
    answer = _IDLE_BLANK_AFTER.sub("", _IDLE_BLANK.sub("", answer))
    return re.sub(r"(\\[A-Za-z]+) (?=[0-9])", r"\1", answer)


def _plain_number(text: str) -> str:
    """Drop the plus sign and the idle zeros of a number: +05.50 is 5.5. Other texts stay."""
    if not _NUMBER.fullmatch(text) or not text.strip("+-."):
        return text
    digits = f"{Decimal(text):f}"
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    return "0" if digits == "-0" else digits


def _join_thousands(answer: str) -> str:
    """Drop the commas in large numbers; a comma that stays between digits gets a blank.

    Between brackets a comma separates coordinates. Outside, groups of three digits make a large
    number, unless a blank follows the comma.
    """
    has_brackets = any(bracket in answer for bracket in ("(", "[", r"\{"))
    if not has_brackets:
        answer = _THOUSANDS.sub(lambda number: re.sub(r"[,{}]", "", number[0]), answer)
    return re.sub(r"(?<=[0-9]),(?=[0-9])", ", ", answer)


def _name_degrees(answer: str) -> str:
    r"""Write ``90^\circ`` as 90 degrees, but leave ``\cos 15^\circ``, which is not ``\cos 15``."""
    if _TRIGONOMETRY.search(answer) or not _DEGREES.search(answer):
        return answer
    return _DEGREES.sub("", answer) + r"\text{degree}"


def _spell(answer: str) -> str:
    """Bring an answer closer to the one spelling; `take_apart` repeats it until nothing changes."""
    answer = _tidy(_WORDS.sub(_mark_words, answer.translate(_UNICODE)))
    for rule in SPELLING:
        answer = rule.apply(answer)
    return _tidy(_name_degrees(_join_thousands(answer)))


# --- name, mathematics, label ---------------------------------------------------------------------

_GREEK = "alpha|beta|delta|theta|lambda|mu|phi|omega|rho|sigma"
_NAME = re.compile(
    rf"((?:[A-Za-z]|\\(?:{_GREEK})|\\text\{{[A-Za-z ]+\}})(?:_\w|_\{{\w+\}})?"
    r"(?:\([a-z](?:, ?[a-z])*\))?)(?:=|\\in ?(?=[(\[]|\\\{))(?=[^=<>]+$)")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_TAIL = re.compile(r"(?: ?\\text\{[^{}]*\}(?:\^[23])?)+$")
_HAS_VALUE = re.compile(r"[0-9]|\\pi")


@dataclass(frozen=True, slots=True)
class Answer:
    r"""An answer taken apart: ``x = 5\text{ cm}`` is 5, named x, labelled centimeter."""

    mathematics: str
    name: str = ""
    label: str = ""

    @property
    def equation(self) -> str:
        """The answer with its name, or as it stands if it is an equation without one, or empty."""
        if self.name:
            return f"{self.name}={self.mathematics}"
        return self.mathematics if "=" in self.mathematics else ""

    @property
    def is_percentage(self) -> bool:
        """Whether it is labelled percent."""
        return self.label == "percent"

    @property
    def is_number(self) -> bool:
        """Whether the mathematics is a plain number, such as -5 or 0.5."""
        return self.mathematics != "" and _NUMBER.fullmatch(self.mathematics) is not None

    @property
    def has_words(self) -> bool:
        """Whether there are words in the mathematics, which is then compared as text only."""
        return r"\text{" in self.mathematics


def _times(number: str, amounts: list[Fraction]) -> str:
    r"""Multiply a plain number with amounts: 3 and 1/5 are ``\frac{3}{5}``. Empty if it is none."""
    if not amounts:
        return number
    if not re.fullmatch(r"-?[0-9]+(?:\.[0-9]+)?", number):
        return ""
    product = math.prod(amounts, start=Fraction(number))
    if product.denominator == 1:
        return str(product)
    fraction = rf"\frac{{{abs(product.numerator)}}}{{{product.denominator}}}"
    return "-" * (product < 0) + fraction


def _sort_words(words: list[str]) -> tuple[list[Fraction], list[str]]:
    """Return the amounts among words after a number, and the words that are none."""
    amounts, others = [], []
    for word in words:
        amount = AMOUNTS.get(_singular(word))
        if amount is None:
            others.append(word)
        else:
            amounts.append(amount)
    return amounts, others


def _label(words: list[str]) -> str | None:
    """Return the label that words after a number are, None if they say more."""
    text = " ".join(words)
    known = unit(text)
    if known is None and _NO_LABEL.search(text):
        return None
    return known or text.lower()


def _split_label(text: str) -> tuple[str, str]:
    """Split the words at the end off, if they are a label or an amount; else split off nothing."""
    tail = _TAIL.search(text)
    if tail is None:
        return text, ""
    amounts, others = _sort_words(_TEXT.sub(r" \1", tail[0]).split())
    label = _label(others)
    if label is None:
        return text, ""
    number = _times(text[: tail.start()].rstrip(), amounts)
    if not _HAS_VALUE.search(number):
        return text, ""
    return number, label


@lru_cache(maxsize=20_000)
def take_apart(answer: str) -> Answer:
    """Take an answer (the content of a box) apart. Never raises on a str; linear time."""
    if len(answer) > MAX_ANSWER:
        return Answer(_tidy(answer))
    if _NUMBER.fullmatch(answer):  # most answers are plain numbers
        return Answer(_plain_number(answer))
    name, label, text = "", "", answer
    for _ in range(8):
        before, text = text, _spell(text)
        named = _NAME.match(text)
        if named:
            name, text = name or named[1], text[named.end() :]
        text, found = _split_label(text)
        label = f"{label} {found}".strip()
        text = _plain_number(text)
        if text == before:
            return Answer(text, name, label)
    return Answer(_tidy(answer))  # does not settle: left alone, which keeps normalize idempotent


def normalize(answer: str) -> str:
    r"""Return the mathematics of an answer in one spelling. Idempotent, never raises on a str.

    White space, ``\left``, a final full stop, the name of the unknown and the label are gone.
    One form for each of ``\dfrac12``, ``\frac{1}{2}``, ``1/2``; ``.5``, ``0.50``; ``12{,}345``,
    ``12,345``. An answer longer than `MAX_ANSWER` only has its white space tidied.
    """
    return take_apart(answer).mathematics


# --- exact match ----------------------------------------------------------------------------------

_UP_TO_ONE = re.compile(r"-?(?:0|\\frac|1$)")


def _labels_agree(gold: Answer, answer: Answer) -> bool:
    """Whether two labels are one, or one is left out. Only a unit or one plural may be added."""
    if answer.label == "" or _singular(gold.label) == _singular(answer.label):
        return True
    if gold.label:
        return False
    is_one_plural = answer.label.endswith("s") and " " not in answer.label
    return is_one_plural or unit(answer.label) is not None


def _names_agree(gold: Answer, answer: Answer) -> bool:
    """Whether two names are one, or one is left out."""
    return gold.name == answer.name or "" in (gold.name, answer.name)


def _same_text(gold: Answer, answer: Answer) -> bool:
    r"""Whether the mathematics is the same as text, up to a percent sign from 1 on.

    MATH writes percentages with and without the sign: 50\% is 50, but 1\% is not 1.
    """
    ours, theirs = _TEXT.sub(r"\1", gold.mathematics), _TEXT.sub(r"\1", answer.mathematics)
    if ours != theirs or ours == "":
        return False
    if gold.is_percentage == answer.is_percentage:
        return True
    return not _UP_TO_ONE.match(ours)


def exact_match(gold: str, answer: str) -> bool:
    """Whether two answers (contents of a box, not whole texts) are the same mathematics as text.

    A name or a label may be left out, not contradicted: 5 cm and 5, not 5 cm and 5 inches, nor
    x=5 and y=5.
    """
    ours, theirs = take_apart(gold), take_apart(answer)
    may_be_one = _names_agree(ours, theirs) and _labels_agree(ours, theirs)
    return may_be_one and _same_text(ours, theirs)


# --- what math-verify is shown --------------------------------------------------------------------

_KNOWN = re.compile(
    r"(?:\\(?:frac|sqrt|cdot|times|div|pi|infty|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|"
    rf"ln|binom|lfloor|rfloor|lceil|rceil|{_GREEK})(?![A-Za-z])|[0-9A-Za-z+*/^_(){{}}\[\]|!. -])+")
_FUNCTION = r"\\(?:(?:arc)?(?:sin|cos|tan|cot|sec|csc)|log|ln)(?:[\^_](?:\w|\{[^{}]*\}))*"

_BARE = rf"(?:\\(?:frac|sqrt|binom|pi|theta)(?![A-Za-z])|{_GROUP}|[0-9A-Za-z^! ])"
_OPERATOR = r"\\(?:cdot|times|div|lfloor|lceil)"

MISREAD = [
    ("two numbers side by side", r"[0-9] [0-9]", "7 8"),
    ("a number after a letter", r"(?<![\\A-Za-z])[A-Za-z]+ ?[0-9]", "2x3"),
    ("a number after a bracket", r"(?<!log_\{[0-9]\})(?<=[)}\]!]) ?[0-9]", r"\frac{1}{2}3"),
    ("a script of two digits", r"[\^_] ?[0-9][0-9]", "x^10"),
    ("an index that is a base", r"[0-9)}|!] ?_", "43_8"),
    ("nothing in brackets", r"\{ ?\}|\( ?\)|\[ ?\]", "7^{}"),
    ("an operator at the end", r"(?:[-+*/^_]|\\(?:cdot|times|div)) ?(?=$|[)}\]])", "7-"),
    ("an operator at the start", r"(?:^|[({\[]) ?(?:[*/^_!]|\\(?:cdot|times|div))", "/7"),
    ("two operators", r"[*/^_] ?[*/^_!]|!!", "2**3"),
    ("two exponents", r"\^ ?(?:\w|\{[^{}]*\}) ?\^", "2^3^2"),
    ("a product after a function", rf"{_FUNCTION} ?{_BARE}+(?:[*/]|\\(?:cdot|times|div))",
     r"\sin x\cdot2"),
    ("bars around a number", r"[0-9] ?\|[^|]*\| ?[0-9]", "7|8|9"),
    ("more than two bars", r"\|[^|]*\|[^|]*\|", "|x||y|"),
    ("a slash before a product", r"/ ?[0-9A-Za-z]+ ?[A-Za-z(\\]", "1/2x"),
    ("a function", r"(?<![\\A-Za-z])[fghpqFGHPQ] ?\(", "f(x+1)"),
    ("a full stop", r"\.(?![0-9])", "5.+1"),
    ("a bracket that is no root's", r"(?<!\\sqrt)\[|\](?!\{)", "[5]"),
]
"""What math-verify misreads, by name and example. It takes 7 8 for 15 and f(x+1) for a product."""
_MISREAD = re.compile("|".join(pattern for _, pattern, _ in MISREAD))


def _decimal(match: re.Match) -> str:
    r"""Write 0.5 as ``(\frac{5}{10})``, a number that can be compared exactly."""
    whole, digits = match.groups()
    return rf"(\frac{{{int(whole + digits)}}}{{{10 ** len(digits)}}})"


def _repeating(match: re.Match) -> str:
    r"""Write ``0.1\overline{6}`` as the fraction that it is: 16 - 1 over 90."""
    whole, start, period = match.groups()
    numerator = int(whole + start + period) - int(whole + start)
    return rf"(\frac{{{numerator}}}{{{(10 ** len(period) - 1) * 10 ** len(start)}}})"


READING = _rules(
    ("repeating decimal", r"([0-9]+)\.([0-9]*)\\overline ?\{([0-9]+)\}", _repeating,
      r"0.1\overline{6}", r"(\frac{15}{90})"),
    ("decimal", r"([0-9]+)\.([0-9]+)", _decimal, "0.5", r"(\frac{5}{10})"),
    ("factor before a bracket", rf"((?:{_FUNCTION}|{_OPERATOR}) ?\()|(?<=[0-9A-Za-z)}}|!]) ?\(",
      lambda match: match[1] or r"\cdot(", "2(3)", r"2\cdot(3)"),
    ("factor after a bracket", r"\) ?(?=[A-Za-z]|\\(?!cdot|times|div|rfloor|rceil))",
      r")\\cdot ", "(2)x", r"(2)\cdot x"),
    ("differential", r"(\\[A-Za-z]+)|d", lambda match: match[1] or "q_{d}", "2d", "2q_{d}"),
)
"""What math-verify would misread, in the spelling that it reads rightly: 2(3) is 5 for it."""


def _well_nested(text: str) -> bool:
    """Whether brackets and bars come in pairs, and the brackets are not too many."""
    counts = [(text.count(left), text.count(right)) for left, right in ("{}", "()", "[]")]
    opened = sum(left for left, _ in counts)
    are_pairs = all(left == right for left, right in counts)
    return are_pairs and text.count("|") % 2 == 0 and opened <= MAX_BRACKETS


def _expression(text: str) -> str | None:
    """Return an expression as math-verify is to read it, None if it must not see it."""
    text = READING[0].apply(text.strip())
    if not _KNOWN.fullmatch(text):
        return None
    if _MISREAD.search(text) or not _well_nested(text):
        return None
    for rule in READING[1:]:
        text = rule.apply(text)
    return text


# --- the structure of an answer -------------------------------------------------------------------

_BRACKETS = re.compile(r"\\[{}]|[({\[\])}]|,|\\cup(?![A-Za-z])")
_RELATION = re.compile(r"(<|>|=|\\le(?![A-Za-z])|\\ge(?![A-Za-z]))")
_TURNED = {">": "<", r"\ge": r"\le"}
_MATRIX = re.compile(r"\\begin ?\{([pb]matrix)\}(.*?)(?:\\\\)?\\end ?\{\1\}", re.DOTALL)
_ENCLOSED = re.compile(r"([(\[]|\\\{)(.*)([)\]]|\\\})", re.DOTALL)


def _split(text: str, separator: str) -> list[str]:
    """Split where a separator stands outside of all brackets."""
    parts, start, depth = [], 0, 0
    for found in _BRACKETS.finditer(text):
        sign = found[0]
        if sign in ("(", "[", "{", r"\{"):
            depth += 1
        elif sign in (")", "]", "}", r"\}"):
            depth -= 1
        elif sign == separator and depth == 0:
            parts.append(text[start : found.start()])
            start = found.end()
    return [*parts, text[start:]]


def _node(kind: str, parts: Iterable[Tree | None]) -> Tree | None:
    """Return the structure of this kind, None if one of its parts is None."""
    parts = tuple(parts)
    if None in parts:
        return None
    return kind, parts


def _matrix(rows: str) -> Tree | None:
    r"""Read what is between ``\begin{pmatrix}`` and ``\end{pmatrix}``."""
    rows = [_node("row", [_expression(cell) for cell in row.split("&")])
            for row in rows.split(r"\\")]
    return _node("matrix", rows)


def _relations(text: str) -> Tree | None:
    """Read a < b = c as the relations of neighbours, with the smaller side first."""
    signs = _RELATION.findall(text)
    sides = [_expression(side) for side in _RELATION.split(text)[::2]]
    relations = []
    for sign, left, right in zip(signs, sides[:-1], sides[1:], strict=True):
        if sign in _TURNED:
            sign, left, right = _TURNED[sign], right, left
        relations.append(_node(sign, [left, right]))
    if len(relations) == 1:
        return relations[0]
    return _node("all", relations)


def _enclosed(text: str) -> tuple[str, list[str]] | None:
    """Return kind and items of a pair, an interval or a set, None if the text is none of them."""
    found = _ENCLOSED.fullmatch(text)
    if found is None or len(_split(text, ",")) > 1:
        return None
    left, inner, right = found.groups()
    brackets, items = left + right, _split(inner, ",")
    if brackets == r"\{\}":
        return "set", items
    if len(items) == 1:  # (5) is an expression
        return None
    return brackets, items


def _item(text: str) -> Tree | None:
    """Read one item: a matrix, a union, a pair, interval or set, a relation, or an expression."""
    text = text.strip()
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        return _matrix(matrix[2])
    union = _split(text, r"\cup")
    if len(union) > 1:
        return _node("union", map(_item, union))
    enclosed = _enclosed(text)
    if enclosed:
        return _node(enclosed[0], map(_item, enclosed[1]))
    if _RELATION.search(text):
        return _relations(text)
    return _expression(text)


def _both_signs(item: str) -> list[str]:
    r"""Write ``1 \pm x`` as ``1+x`` and ``1-x``."""
    if item.count(r"\pm") != 1:
        return [item]
    plus = re.sub(r"(^|[({])\+", r"\1", item.replace(r"\pm", "+"))
    return [plus, item.replace(r"\pm", "-")]


def structure(mathematics: str) -> Tree | None:
    r"""Return the structure of mathematics, None if math-verify must not see some part of it.

    An expression is a str; all else is a kind and its parts: ``(1,2]`` is ``("(]", ("1", "2"))``.
    """
    items = [item for part in _split(mathematics, ",") for item in _both_signs(part)]
    if len(items) == 1:
        return _item(items[0])
    return _node("set", map(_item, items))


def _alike(gold: Tree | None, answer: Tree | None) -> bool:
    """Whether both are expressions, or of one kind with as many parts."""
    if gold is None or type(gold) is not type(answer):
        return False
    if isinstance(gold, str):
        return True
    return gold[0] == answer[0] and len(gold[1]) == len(answer[1])


def _value(side: Answer, tree: Tree) -> Tree:
    """Return an expression as its value if it is a percentage."""
    if side.is_percentage and isinstance(tree, str):
        return rf"\frac{{{tree}}}{{100}}"
    return tree


def _case_clash(text: str) -> bool:
    """Whether a letter occurs as a capital and as a small one: math-verify reads X as x."""
    letters = set(re.sub(r"\\[A-Za-z]+", "", text))
    return any(letter.isupper() and letter.lower() in letters for letter in letters)


def _texts_to_compare(gold: Answer, answer: Answer) -> tuple[str, str]:
    """Return the equations x=5 and 2x=10 with their names, but of x=5 and 5 the 5 alone."""
    if gold.name != answer.name and gold.equation and answer.equation:
        return gold.equation, answer.equation
    return gold.mathematics, answer.mathematics


def _structures(gold: Answer, answer: Answer) -> tuple[Tree, Tree] | None:
    """Return what is to be compared, None if only the exact match may decide."""
    if gold.has_words or answer.has_words:
        return None
    ours, theirs = _texts_to_compare(gold, answer)
    if not _labels_agree(gold, answer) or _case_clash(f"{ours} {theirs}"):
        return None
    gold_tree, answer_tree = structure(ours), structure(theirs)
    if not _alike(gold_tree, answer_tree):
        return None
    if _same_text(gold, answer):
        return gold_tree, answer_tree
    return _value(gold, gold_tree), _value(answer, answer_tree)


# --- symbolic equality ----------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Grade:
    """Verdict on one completion.

    correct: the verdict. exact: the verdict of `exact_match` alone. answer: content of the last
    box, or None. method: what settled it.
    - `exact`: the same text, or two plain numbers that differ, or an answer that math-verify must
      not see (`structure`, `MAX_ANSWER`);
    - `symbolic`: math-verify and exact arithmetic;
    - `timeout`: a time or memory limit was passed, so incorrect;
    - `unparsed`: no box, an empty one, or a last one that never closes, so incorrect.
    """

    correct: bool
    method: Literal["exact", "symbolic", "timeout", "unparsed"]
    exact: bool
    answer: str | None


def _are_two_numbers(gold: Answer, answer: Answer) -> bool:
    r"""Whether they are plain numbers that are equal only as texts, unlike 50\% and 0.5."""
    if gold.is_percentage or answer.is_percentage:
        return False
    return gold.is_number and answer.is_number


def _without_sympy(gold: str, answer: str | None, shortcut: bool) -> Grade | tuple[Tree, Tree]:
    """Return the verdict where text is enough for it, else the two structures to compare."""
    if answer is None or not answer.strip():
        return Grade(False, "unparsed", False, answer)
    exact = exact_match(gold, answer)
    settled = Grade(exact, "exact", exact, answer)
    if len(gold) > MAX_ANSWER or len(answer) > MAX_ANSWER:
        return settled
    ours, theirs = take_apart(gold), take_apart(answer)
    if shortcut and (exact or _are_two_numbers(ours, theirs)):
        return settled
    return _structures(ours, theirs) or settled


def _by_verdict(gold: str, answer: str, verdict: bool | None) -> Grade:
    """Return the grade that a worker's verdict gives; None stands for a limit that was passed."""
    method = "timeout" if verdict is None else "symbolic"
    return Grade(bool(verdict), method, exact_match(gold, answer), answer)


def _check_texts(golds: Sequence[str], completions: Sequence[str]) -> None:
    """ValueError unless these are as many strings as those."""
    if len(golds) != len(completions):
        raise ValueError("grade needs one gold a completion, "
                         f"got {len(golds)} and {len(completions)}")
    for name, texts in (("golds", golds), ("completions", completions)):
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                kind = type(text).__name__
                raise ValueError(f"{name}[{i}] must be a string, got {kind}: {text!r:.80}")


class Verifier:
    """Grades completions: exact match first, then math-verify in a bounded pool of processes.

    workers: processes. They start when first needed (about a second) and end with this process,
    also if it is killed. seconds: wall-clock limit for one pair, start-up not counted. memory_mb:
    address space of a worker, MiB (Linux). cache_size: pairs whose verdict is remembered.
    A batch takes up to seconds x pairs / workers, so keep seconds short where completions may be
    hostile. Safe to call from any thread, a Jupyter kernel or a script without a main guard.
    POSIX only.

    Why not a library: pebble 5.2.3 kills on time-out, but its workers import the caller's main
    module again (a training script would start twice) and the pool breaks for good when an idle
    worker is killed.
    """

    def __init__(self, workers: int = 1, seconds: float = 5.0, memory_mb: int = 2048,
                 cache_size: int = 20_000):
        for name, value in [("workers", workers), ("seconds", seconds), ("memory_mb", memory_mb)]:
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self.workers, self.seconds, self.memory_mb = workers, seconds, memory_mb
        self._same = lru_cache(maxsize=cache_size)(self._ask)
        self._start()

    def _start(self) -> None:
        """Make room for the workers, and see to it that they end with this process."""
        self._owner = os.getpid()
        self._alive: set[_Worker] = set()
        self._slots: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(self.workers):
            self._slots.put(None)  # a worker not started yet
        self.close = weakref.finalize(self, _kill_all, self._alive, self._owner)  # also at exit

    def grade(self, golds: Sequence[str], completions: Sequence[str],
              shortcut: bool = True) -> list[Grade]:
        """Grade completions[i], a whole text, against golds[i], an answer (not a solution).

        shortcut=False asks math-verify about every pair that it may see and takes its verdict
        alone. Raises ValueError when the lists differ in length or hold something other than
        strings, RuntimeError when math-verify cannot be started.
        """
        _check_texts(golds, completions)
        answers = [last_boxed(text) for text in completions]
        found = [_without_sympy(gold, answer, shortcut)
                 for gold, answer in zip(golds, answers, strict=True)]
        pairs = list(dict.fromkeys(pair for pair in found if isinstance(pair, tuple)))
        verdicts = dict(zip(pairs, self._ask_all(pairs), strict=True))

        grades = []
        for gold, answer, grade in zip(golds, answers, found, strict=True):
            if isinstance(grade, tuple):  # a pair that math-verify was asked about
                grade = _by_verdict(gold, answer, verdicts[grade])
            grades.append(grade)
        return grades

    def _ask_all(self, pairs: list[tuple[Tree, Tree]]) -> list[bool | None]:
        """Return the verdicts: True, False, or None where a limit was passed."""
        if self._owner != os.getpid():  # after a fork the workers answer to the parent, not to us
            self.close.detach()
            self._start()
        threads = ThreadPoolExecutor(self.workers)
        try:
            return list(threads.map(self._same, pairs))
        finally:  # after an interrupt, do not grade the rest first
            threads.shutdown(wait=False, cancel_futures=True)

    def _awake(self, worker: _Worker | None) -> _Worker:
        """Return the worker if it lives, else a new one."""
        if worker is not None and worker.process.poll() is None:
            return worker
        self._alive.discard(worker)
        worker = _Worker(self.seconds, self.memory_mb)
        self._alive.add(worker)
        return worker

    def _ask(self, pair: tuple[Tree, Tree]) -> bool | None:
        """Return the verdict of a worker on one pair, None where a limit was passed."""
        worker = self._slots.get()
        try:
            for _ in range(2):  # a dead worker's successor tries once more: it may not be the pair
                worker = self._awake(worker)
                try:
                    return worker.ask(pair)
                except (EOFError, OSError):
                    worker.kill()
            return None
        except BaseException:  # an interrupt: this verdict must not be read as the next pair's
            if worker is not None:
                worker.kill()
            raise
        finally:
            self._slots.put(worker)
