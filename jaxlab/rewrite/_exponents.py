"""How a value answers when the units of a group are scaled, flipped or mixed.

Unit f of a leaf is multiplied by s_f to a power, the exponent; an exponent is a linear
form in those of the params. What an operation does to exponents gives linear equations;
their solutions are the symmetries. Modulo 2 they say how signs go; without the rules
for what is not linear, how whole matrices go.
"""

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
import math
from typing import Any, NamedTuple

Number = int | Fraction
Form = dict[Any, Number]  # unknown -> coefficient; {}: the value does not change
SQUARED = "squared"  # a key: the value is a product of two vectors, to be summed


class Rules(NamedTuple):
    """Which operations a family of symmetries passes through."""

    modulo: int = 0  # of exponents: 2 for signs and for reflections
    entrywise: bool = True  # is each unit changed for itself?
    squares: bool = False  # may vectors meet in an inner product of two alike?


SCALES = Rules()
SIGNS = Rules(modulo=2)
LINEAR = Rules(entrywise=False)
ROTATIONS = Rules(modulo=2, entrywise=False, squares=True)


class System(NamedTuple):
    """Equations between exponents: each form is to be zero."""

    rules: Rules
    equations: dict[frozenset, Form]


def plus(a: Form, b: Form, times: Number = 1) -> Form:
    """The first plus so many times the second."""
    out = dict(a)
    for k, v in b.items():
        out[k] = out.get(k, 0) + times * v
    return {k: v for k, v in out.items() if v}


def fix(system: System, form: Form) -> Form:
    """Says that a value does not change."""
    form = {k: v for k, v in form.items() if k != SQUARED}
    if form:
        system.equations[frozenset(form.items())] = form
    return {}


def equal(system: System, forms: Sequence[Form]) -> Form:
    """Says that values change alike."""
    first = forms[0]
    if any((SQUARED in f) != (SQUARED in first) for f in forms):
        for f in forms:
            fix(system, f)
        return {}
    for f in forms[1:]:
        fix(system, plus(first, f, -1))
    return first


def product(system: System, a: Form, b: Form, sign: int = 1) -> Form:
    """The entrywise product of two values that change, or their quotient."""
    rules = system.rules
    if rules.entrywise:
        return plus(a, b, sign)
    if rules.squares and sign == 1 and SQUARED not in a and SQUARED not in b:
        fix(system, plus(a, b, -1))
        return a | {SQUARED: 1} if a else fix(system, b)
    fix(system, a)
    return fix(system, b)


def inner(system: System, a: Form, b: Form) -> None:
    """The sum over units of the product of two values."""
    if SQUARED in a or SQUARED in b:
        fix(system, a)
        fix(system, b)
    else:
        fix(system, plus(a, b))


def total(system: System, a: Form) -> None:
    """The sum over units of one value."""
    if SQUARED not in a:
        fix(system, a)


def power(system: System, a: Form, exponent: Number) -> Form:
    """A power of a value."""
    if exponent == 2 and not system.rules.entrywise:
        return product(system, a, a)
    whole = exponent.denominator == 1
    if not system.rules.entrywise or (system.rules.modulo and not whole):
        return fix(system, a)
    return {k: v * exponent for k, v in a.items() if exponent}


def positive(system: System, a: Form) -> Form:
    """What commutes with positive factors only: max(x, 0), |x|, a largest entry."""
    return a if system.rules == SCALES else fix(system, a)


def unsigned(system: System, a: Form) -> Form:
    """What does not see a sign: cos x."""
    return {} if system.rules == SIGNS else fix(system, a)


def odd(system: System, a: Form) -> Form:
    """What commutes with a sign: tanh x."""
    return a if system.rules == SIGNS else fix(system, a)


def insert(
    rows: dict[Any, Form], form: Form, modulo: int, order: Mapping[Any, int]
) -> bool:
    """Adds an equation to rows, each by the first unknown in it, which it determines.

    False where the rows say it already. Unknowns that are not in the order come first.
    """
    clean = lambda f: {k: r for k, v in f.items() if (r := v % modulo if modulo else v)}
    form = clean(form)
    for pivot in [k for k in form if k in rows]:
        form = clean(plus(form, rows[pivot], -form[pivot]))
    if not form:
        return False
    pivot = min(form, key=lambda k: order.get(k, -1))
    if (by := form[pivot]) != 1:
        form = {k: Fraction(v) / by for k, v in form.items()}
    for other, row in rows.items():
        if pivot in row:
            rows[other] = clean(plus(row, form, -row[pivot]))
    rows[pivot] = form
    return True


def solutions(
    equations: Iterable[Form], unknowns: Sequence[Any], modulo: int
) -> list[dict[Any, int]]:
    """Exponents that solve the equations, in whole numbers: a basis, and short ones.

    Of the unknowns only: what other unknowns of the equations must be is left out.
    """
    out = []
    for order in (unknowns, unknowns[::-1]):
        rows: dict[Any, Form] = {}
        rank = {k: i for i, k in enumerate(order)}
        for form in equations:
            insert(rows, form, modulo, rank)
        for one in [k for k in order if k not in rows]:
            found: Form = {one: 1}
            found |= {p: -row[one] for p, row in rows.items() if one in row}
            out.append(_whole({k: found[k] for k in unknowns if k in found}, modulo))
    return sorted(out, key=len)


def _whole(vector: Form, modulo: int) -> dict[Any, int]:
    """A multiple of a vector in whole numbers, the first one positive."""
    scale = math.lcm(*(v.denominator for v in vector.values()))
    first = next(iter(vector.values()))
    scale = -scale if first < 0 and not modulo else scale
    whole = {k: int(v * scale) for k, v in vector.items()}
    return {k: v % modulo for k, v in whole.items()} if modulo else whole


def beyond(
    vectors: Iterable[dict], known: Iterable[dict], modulo: int
) -> list[dict[Any, int]]:
    """The vectors that are no combination of those known and those before them."""
    rows: dict[Any, Form] = {}
    for vector in known:
        insert(rows, vector, modulo, {})
    return [v for v in vectors if insert(rows, v, modulo, {})]


def solves(vector: dict, equations: Iterable[Form], unknowns: Sequence[Any]) -> bool:
    """Are there signs that go as a vector says, modulo 2?"""
    rows: dict[Any, Form] = {}
    rank = {k: i for i, k in enumerate(unknowns)}
    for form in equations:
        insert(rows, form, 2, rank)
    return all(
        sum(v * vector.get(k, 0) for k, v in row.items()) % 2 == 0
        for pivot, row in rows.items() if pivot in rank
    )  # fmt: skip
