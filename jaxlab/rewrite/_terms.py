"""Terms: what an axis is made of, and unification, which says that two axes are one.

A leaf is a set of exchangeable positions; a product is an ordered, row-major one of its
factors; a sum is a concatenation; a reordering lists the positions of another term.
Every unpinned leaf that unification leaves is a symmetry.
"""

from collections.abc import Iterable, Sequence
import math

LEAF, PRODUCT, SUM, ORDER = "", "*", "+", "~"


class Term:
    """A node of a term, and of the union-find forest of leaves that were bound."""

    __slots__ = ("even", "kids", "kind", "link", "order", "pinned", "size", "why")

    def __init__(self, size: int, kind: str = LEAF, kids: Iterable["Term"] = ()):
        self.size, self.kind, self.kids = int(size), kind, list(kids)
        self.pinned, self.why = False, ""  # why: the primitive that is not understood
        self.link: Term | None = None
        self.order: tuple[int, ...] = ()  # of a reordering: position in its kid
        self.even = False  # a sum that was a product with a major factor cut apart


def fresh(size: int, *, pinned: bool = False, why: str = "") -> Term:
    """A new leaf."""
    term = Term(size)
    term.pinned, term.why = pinned, why
    return term


def find(term: Term) -> Term:
    """What a term was bound to."""
    while (link := term.link) is not None:
        if link.link is not None:
            term.link = link.link
        term = link
    return term


def parts(term: Term, kind: str) -> list[Term]:
    """The operands of a product or sum, nested ones flattened; else the term alone."""
    term = find(term)
    if term.kind != kind:
        return [term]
    return [part for kid in term.kids for part in parts(kid, kind)]


def product(factors: Iterable[Term]) -> Term:
    """The row-major product; factors of size 1 vanish."""
    flat = [p for f in factors if f.size != 1 for p in parts(f, PRODUCT)]
    if len(flat) == 1:
        return flat[0]
    return Term(math.prod(f.size for f in flat), PRODUCT, flat) if flat else fresh(1)


def chain(pieces: Iterable[Term]) -> Term:
    """The concatenation; empty pieces vanish."""
    flat = [p for piece in pieces if piece.size for p in parts(piece, SUM)]
    if len(flat) == 1:
        return flat[0]
    return Term(sum(p.size for p in flat), SUM, flat) if flat else fresh(0)


def reorder(term: Term, order: Sequence[int]) -> Term:
    """The axis whose position i is position `order[i]` of a term."""
    term = find(term)
    if term.kind == ORDER:
        order, term = [term.order[i] for i in order], find(term.kids[0])
    if list(order) == list(range(term.size)):
        return term
    out = Term(term.size, ORDER, [term])
    out.order = tuple(order)
    return out


def pin(term: Term, why: str = "") -> None:
    """Says that every position of a term stays where it is."""
    term = find(term)
    if term.kind == LEAF and not (term.pinned and (term.why or not why)):
        term.pinned, term.why = True, why
    for kid in term.kids:
        pin(kid, why)


def bind(leaf: Term, term: Term) -> None:
    """Makes a leaf stand for a term."""
    leaf.link = term
    if leaf.pinned:
        pin(term, leaf.why)


def take(term: Term, start: int, stop: int) -> Term | None:
    """The part for positions start to stop; None if the factors do not allow the cut.

    A leaf that is cut becomes the sum of its parts.
    """
    term = find(term)
    if (start, stop) == (0, term.size):
        return term
    if term.kind == ORDER:
        return take(spelled(term), start, stop)
    if term.kind == LEAF:
        sizes = [s for s in (start, stop - start, term.size - stop) if s]
        cut = Term(term.size, SUM, map(fresh, sizes))
        bind(term, cut)
        return cut.kids[1 if start else 0]
    if term.kind == SUM:
        return _take_of_sum(term, start, stop)
    first, *others = parts(term, PRODUCT)
    rest = product(others)
    if start % rest.size or stop % rest.size:
        return None
    head = take(first, start // rest.size, stop // rest.size)
    return None if head is None else product([head, rest])


def _take_of_sum(term: Term, start: int, stop: int) -> Term | None:
    out, offset = [], 0
    for part in parts(term, SUM):
        low, high = max(start, offset), min(stop, offset + part.size)
        if low < high:
            piece = take(part, low - offset, high - offset)
            if piece is None:
                return None
            out.append(piece)
        offset += part.size
    return chain(out)


def spelled(term: Term) -> Term:
    """A reordering written as the sum of the runs that it moves; binds its kid."""
    term = find(term)
    if term.kind != ORDER:
        return term
    order, runs = term.order, []
    for i, position in enumerate(order):
        if i and position == order[i - 1] + 1:
            runs[-1][1] = position + 1
        else:
            runs.append([position, position + 1])
    pieces = [take(term.kids[0], start, stop) for start, stop in runs]
    if any(p is None for p in pieces):
        pin(term.kids[0])
        pieces = [fresh(term.size, pinned=True)]
    term.link = chain(p for p in pieces if p is not None)
    return find(term)


def unify(a: Term | None, b: Term | None) -> None:
    """Says that two axes are one; where their structures do not fit, pins both.

    None is an axis along which a value does not vary: it fits any.
    """
    if a is None or b is None or (a := find(a)) is (b := find(b)) or a.size == 1:
        return
    assert a.size == b.size, (a.size, b.size)
    if ORDER in (a.kind, b.kind):
        _unify_orders(a, b)
    elif a.kind == LEAF:
        bind(a, b)
    elif b.kind == LEAF:
        bind(b, a)
    elif not _align(a, b):
        pin(a)
        pin(b)


def _align(a: Term, b: Term) -> bool:
    """Unifies two sums or products part by part, cutting parts; False: they cannot."""
    kind = PRODUCT if a.kind == b.kind == PRODUCT else SUM
    left, right = parts(a, kind)[::-1], parts(b, kind)[::-1]
    while left and right:
        x, y = _next(left, kind), _next(right, kind)
        if x.size == y.size:
            unify(x, y)
            continue
        big, small, queue = (x, y, left) if x.size > y.size else (y, x, right)
        split = _halves(big, small.size, kind)
        if split is None:
            return False
        queue.append(split[1])
        unify(split[0], small)
    return True


def _next(queue: list[Term], kind: str) -> Term:
    """The next operand; one that was refined since then is flattened first."""
    queue += parts(queue.pop(), kind)[::-1]
    return queue.pop()


def _halves(big: Term, size: int, kind: str) -> tuple[Term, Term] | None:
    """A term as (its first `size`, the rest), as factors or as pieces."""
    if kind == SUM:
        first, rest = take(big, 0, size), take(big, size, big.size)
        return None if first is None or rest is None else (first, rest)
    if big.size % size or big.kind != LEAF:
        return None
    both = fresh(size), fresh(big.size // size)
    bind(big, Term(big.size, PRODUCT, both))
    return both


def _unify_orders(a: Term, b: Term) -> None:
    if a.kind == b.kind and a.order == b.order:
        unify(a.kids[0], b.kids[0])
    elif a.kind == LEAF and _base(b) is not a:
        bind(a, b)
    elif b.kind == LEAF and _base(a) is not b:
        bind(b, a)
    else:
        unify(spelled(a), spelled(b))


def _base(term: Term) -> Term:
    """The term below all reorderings."""
    term = find(term)
    return _base(term.kids[0]) if term.kind == ORDER else term
