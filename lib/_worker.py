r"""The process that reads LaTeX with math-verify and compares what it has read.

`lib.answers` runs this file as a script of its own, so that a time or memory limit can end it.

math-verify reads each expression. Comparing is done here, because its `verify` takes two numbers
for equal that differ by less than 1e-50, and two decimals that agree to six places. Here rational
numbers are compared exactly. All else is evaluated with so many digits that its smallest part
counts (`_size`), at random points where there are unknowns: 2^{-2004} is not 0.
"""

import os
import random
import re
import subprocess
import sys
import time
from functools import lru_cache
from multiprocessing.connection import Connection, Pipe

Tree = str | tuple[str, tuple["Tree", ...]]
"""The structure of an answer: an expression, or a kind and its parts (`lib.answers.structure`)."""

MAX_DIGITS = 20_000
"""Two numbers that need more digits to be told apart are called different."""

RELATIONS = ("=", "<", r"\le")
UNORDERED = ("set", "union", "all")
"""Kinds of a tree. Other kinds have an order: the brackets of pairs and intervals, and matrices."""

POINTS = 8
"""Points at which expressions with unknowns are compared: all signs of three unknowns."""


class _Worker:
    """One Python process that runs `_serve`. It takes a pair of trees and sends back a bool."""

    def __init__(self, seconds: float, memory_mb: int):
        self.seconds = seconds
        self.connection, theirs = Pipe()
        limits = map(str, (theirs.fileno(), seconds, memory_mb))
        # -P: this file's folder must not shadow other modules. A new session: Ctrl-C is for us.
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, *limits], pass_fds=[theirs.fileno()],
            start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        theirs.close()
        message = "no sign of life in 300 s"
        try:  # the time to import math-verify is not counted as grading time
            if self.connection.poll(300):
                message = self.connection.recv()
        except (EOFError, OSError):
            code = self.process.wait()
            message = f"it ended with exit code {code}; is memory_mb={memory_mb} too small?"
        finally:  # also after an interrupt
            if message != "ready":
                self.kill()
        if message != "ready":
            raise RuntimeError(f"the process that runs math-verify did not start: {message}")

    def ask(self, pair: tuple[Tree, Tree]) -> bool | None:
        """Return whether the trees are the same; None, and no worker any more, if that took long.

        Raises EOFError or OSError if the process has died.
        """
        self.connection.send(pair)
        if self.connection.poll(self.seconds):
            return self.connection.recv()
        self.kill()
        return None

    def kill(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self.connection.close()


def _kill_all(workers: set[_Worker], owner: int) -> None:
    """End the workers of the process `owner`, if that is this one."""
    if os.getpid() == owner:  # after a fork they are the parent's
        for worker in list(workers):
            worker.kill()
    workers.clear()


# --- reading and comparing, in the worker ---------------------------------------------------------

_FRACTION = re.compile(r"\(*(-?)\(*(?:\\frac\{([0-9]+)\}\{([0-9]+)\}|([0-9]+))\)*")


def _is_defined(*expressions) -> bool:
    """Whether no part of them is a division by zero or the like."""
    from sympy import nan, zoo

    return not any(expression.has(nan, zoo) for expression in expressions)


def _defined(expression):
    if not _is_defined(expression):
        raise ValueError(f"not defined: {expression}")
    return expression


@lru_cache(maxsize=2000)
def _read(text: str):
    """Return the sympy expression that LaTeX stands for; ValueError if it is nothing defined."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse
    from sympy import E, Expr, I, Rational, Symbol

    fraction = _FRACTION.fullmatch(text)  # the usual case needs no parser
    if fraction:
        sign, numerator, denominator, whole = fraction.groups()
        value = Rational(int(whole or numerator), int(denominator or 1))
        return _defined(int(sign + "1") * value)
    # Only the content of the box, as it stands: rewritten, the t of 25t would be a unit.
    as_it_stands = NormalizationConfig(basic_latex=False)
    config = LatexExtractionConfig(boxed_match_priority=0, normalization_config=as_it_stands)
    found = parse(rf"\boxed{{{text}}}", [config], extraction_mode="first_match",
                  parsing_timeout=None)
    if not found or not isinstance(found[0], Expr):
        raise ValueError(f"no expression: {text}")
    constants = {"i": I, "e": E}
    symbols = {symbol: constants.get(symbol.name, Symbol(symbol.name))
               for symbol in found[0].free_symbols}
    return _defined(found[0].xreplace(symbols).doit())


def _part_size(part) -> int:
    """Return the bits of one part of a number, before or after the binary point."""
    from mpmath import mag

    if part.is_Rational:
        return part.p.bit_length() + part.q.bit_length()
    if not part.is_number or part.is_zero or not part.is_finite:
        return 0
    return abs(int(mag(abs(part.evalf(5))._to_mpmath(20))))


def _size(*numbers) -> int:
    """Return how many digits the parts of numbers have, before or after the decimal point."""
    from sympy import preorder_traversal

    parts = [part for number in numbers for part in preorder_traversal(number)]
    return sum(map(_part_size, parts)) * 3 // 10


def _close(left, right) -> bool:
    """Whether two numbers are equal: exactly if rational, else to all digits that can matter."""
    if left == right:
        return True
    if left.is_Rational and right.is_Rational:
        return False
    size = _size(left, right)
    digits = 3 * size + 60
    if digits > MAX_DIGITS:
        return False
    difference = abs(left.evalf(digits) - right.evalf(digits))
    return bool(difference * 10 ** (2 * size + 20) < 1)


def _points(left, right) -> list[dict]:
    """Return points {unknown: number}, random but the same for the same expressions.

    Two of them are whole numbers, since floor and ceiling differ in nothing else.
    """
    from sympy import Rational

    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    draw = random.Random(f"{left} {right}")
    points = []
    for k in range(POINTS):
        divisor = 1 if k in (3, 4) else 101
        signs = [(-1) ** (k >> i) for i in range(len(symbols))]  # the binary digits of k
        points.append({symbol: Rational(sign * draw.randint(2, 399), divisor)
                       for symbol, sign in zip(symbols, signs, strict=True)})
    return points


def _values(left, right) -> list[tuple]:
    """Return the values of two expressions: one pair without unknowns, else where both are finite.

    An empty list if too few of the points are left.
    """
    if not left.free_symbols | right.free_symbols:
        return [(left, right)]
    pairs = [(left.subs(point), right.subs(point)) for point in _points(left, right)]
    defined = [pair for pair in pairs if _is_defined(*pair)]
    if len(defined) <= POINTS // 2:
        return []
    return defined


def _equal(left, right) -> bool:
    """Whether two expressions have the same values, at as many points as are defined."""
    if left == right:
        return True
    values = _values(left, right)
    return bool(values) and all(_close(*pair) for pair in values)


def _difference(left: str, right: str):
    """Return left - right: a relation compares it with 0."""
    return _read(left) - _read(right)


def _constant_ratio(ours, theirs):
    """Return ours / theirs if it is one number wherever both have values, else None."""
    ratios = [mine / its for mine, its in _values(ours, theirs)]
    if not ratios or not all(_close(ratio, ratios[0]) for ratio in ratios):
        return None
    return ratios[0]


def _same_relation(sign: str, gold: tuple[str, ...], answer: tuple[str, ...]) -> bool:
    """Whether left - right of one relation is a constant multiple of left - right of the other."""
    ours, theirs = _difference(*gold), _difference(*answer)
    if not ours.free_symbols or ours.free_symbols != theirs.free_symbols:
        return False  # 0 = 0 says nothing
    ratio = _constant_ratio(ours, theirs)
    if ratio is None or _close(ratio, ratio * 0):
        return False
    return sign == "=" or bool(ratio.evalf(20) > 0)  # -x < -1 is not x < 1


def _in_some_order(parts: tuple[Tree, ...], others: tuple[Tree, ...]) -> bool:
    """Whether each part has a partner of its own among the others, which are as many."""
    left = list(others)
    for part in parts:
        partner = next((other for other in left if same(part, other)), None)
        if partner is None:
            return False
        left.remove(partner)
    return True


def same(gold: Tree, answer: Tree) -> bool:
    """Whether two structures are the same: of one kind, with equal parts.

    Raises ValueError where math-verify reads nothing defined in one of them.
    """
    if type(gold) is not type(answer):  # an expression and something made of parts
        return False
    if isinstance(gold, str):
        return _equal(_read(gold), _read(answer))
    (kind, parts), (other_kind, others) = gold, answer
    if kind != other_kind or len(parts) != len(others):
        return False
    if kind in RELATIONS:
        return _same_relation(kind, parts, others)
    if kind in UNORDERED:
        return _in_some_order(parts, others)
    return all(same(part, other) for part, other in zip(parts, others, strict=True))


# --- the process ----------------------------------------------------------------------------------

def _verdict(gold: Tree, answer: Tree) -> bool:
    """Return `same`, and False where it fails. MemoryError passes."""
    try:
        return same(gold, answer)
    except MemoryError:
        raise  # the limit: the process ends, which its parent takes for a time-out
    except Exception:  # sympy cannot read, evaluate or compare something
        return False


def _serve(descriptor: str, seconds: str, memory_mb: str) -> None:
    """Answer pairs of trees with verdicts until the parent is gone or a limit ends the process.

    First it says "ready", or what kept it from starting. The arguments are those of a command
    line: the number of the pipe's open file, CPU seconds a pair, and MiB of address space.
    """
    import resource

    connection, parent = Connection(int(descriptor)), os.getppid()
    size = int(memory_mb) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    try:
        import logging

        logging.disable()
        same(r"\frac{1}{2}+x", r"\sqrt{x}")  # the first comparison takes half a second
        connection.send("ready")
    except BaseException as error:
        connection.send(f"{type(error).__name__}: {error}")
        return
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    while True:
        while not connection.poll(5):
            if os.getppid() != parent:  # killed, while a forked sibling holds the pipe's other end
                return
        gold, answer = connection.recv()
        # If the parent is killed while sympy is stuck, this ends the orphan.
        end = int(time.process_time() + float(seconds)) + 3
        resource.setrlimit(resource.RLIMIT_CPU, (end, hard))
        connection.send(_verdict(gold, answer))


if __name__ == "__main__":
    try:
        _serve(*sys.argv[1:])
    except (EOFError, OSError):  # the parent has ended
        pass
