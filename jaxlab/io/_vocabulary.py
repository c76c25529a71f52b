"""Tensors whose rows are tokens, and how their rows follow a new vocabulary.

Which tensors these are goes by name and size: input embeddings and output heads, by the
names below, whose axis 0 is as long as the model's vocabulary. Other embeddings
(positions, token types) are none of them.
"""

from collections.abc import Iterable, Mapping, Sequence
import re
from typing import NamedTuple

import numpy as np

from . import _form
from ._checkpoint import Checkpoint, Tensor
from ._compose import Source
from ._fields import Tokenizer
from ._tokenizer import Tokens, tokens, vocab_size

_INPUT = re.compile(
    r"(^|.*\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|shared"
    r"|backbone\.embeddings)\.weight"
)
_HEAD = re.compile(
    r"(^|.*\.)((lm_head(\.decoder|\.linear)?|embed_out|output|output_layer"
    r"|vocab_projector|predictions\.decoder)\.(weight|bias)|(predictions|lm_head)\.bias)"
)
_LAYER = re.compile(r"(^|\.)\d+\.")
ZERO = -1
"""The source of a row of zeros."""
MEAN = -2
"""The source of a row that is a mean of several."""


class Remap(NamedTuple):
    """Where the rows of one input come from; sources count the step's inputs."""

    source: np.ndarray  # [v] an input, the base last; or ZERO, or MEAN
    row: np.ndarray  # [v] the row of that input
    means: Mapping[int, tuple[tuple[int, int], ...]]  # (input, row) pairs, by row
    rows: int  # rows beyond v are the mean of all v


class Vocabulary(NamedTuple):
    """The new vocabulary, and what it was made of."""

    tokens: Tokens
    config: Tokenizer
    sizes: Mapping[str, frozenset[int]]  # how many rows each model has for tokens
    rows: int  # with padding

    def follows(self, source: Source, tensor: Tensor) -> bool:
        """Are the rows of a tensor the tokens of its model?"""
        named = is_input(tensor.name) or is_head(tensor.name)
        size = tensor.shape[0] if tensor.shape else 0
        return named and size in self.sizes[source.model]

    def remaps(
        self,
        inputs: Sequence[Source],
        base: Source | None,
        tensors: Sequence[Tensor],
        anchor: str | None,
    ) -> tuple[Remap, ...]:
        """How the rows of every input of a step follow, the base last."""
        found = (*inputs, *([base] if base else []))
        names = [s.model for s in found]
        rows = [self._own(m, t) for m, t in zip(names, tensors, strict=True)]
        size = max(self.tokens.vocabulary.values(), default=-1) + 1
        source = np.full((len(found), size), ZERO, np.int32)
        row = np.zeros((len(found), size), np.int32)
        means: list[dict[int, tuple[tuple[int, int], ...]]] = [{} for _ in found]
        for token, at in self.tokens.vocabulary.items():
            have = [r.get(token, -1) for r in rows]
            listed = self.config.tokens.get(token)
            force = listed is not None and listed.force
            rest = None
            if force or min(have) < 0:
                rest = self._default(token, names, have, anchor, tensors)
            for i, mine in enumerate(have):
                if rest is None or (mine >= 0 and not force):
                    source[i, at], row[i, at] = i, mine
                elif len(rest) == 1:
                    source[i, at], row[i, at] = rest[0]
                elif rest:
                    source[i, at], means[i][at] = MEAN, rest
        return tuple(
            Remap(s, r, m, self.rows)
            for s, r, m in zip(source, row, means, strict=True)
        )

    def _own(self, model: str, tensor: Tensor) -> Mapping[str, int]:
        """The row of every token in one tensor."""
        own = self.tokens.models[model]
        return {t: i for t, i in own.items() if i < tensor.shape[0]}

    def _default(
        self,
        token: str,
        names: Sequence[str],
        have: Sequence[int],
        anchor: str | None,
        tensors: Sequence[Tensor],
    ) -> tuple[tuple[int, int], ...]:
        """The rows whose mean stands in where a model lacks a token; none is zero."""
        listed = self.config.tokens.get(token)
        if listed is None:
            pairs = [(i, r) for i, r in enumerate(have) if r >= 0]
            preferred = [p for p in pairs if names[p[0]] == anchor]
            return tuple(preferred[:1] or pairs)
        if listed.kind is None:
            raise ValueError(
                f"token {token!r} is not in every model: it needs a 'source'"
            )
        if listed.kind == "zero":
            return ()
        if listed.model not in names:
            raise ValueError(
                f"token {token!r}: its source {listed.model!r} is not among the inputs "
                f"{', '.join(names)}"
            )
        i = names.index(listed.model)
        word = token if listed.kind == "model" else listed.token
        own = self.tokens.models[names[i]]
        at = word if isinstance(word, int) else own.get(str(word), -1)
        if not 0 <= at < tensors[i].shape[0]:
            raise ValueError(f"token {token!r}: {listed.model} has no token {word!r}")
        return ((i, at),)


def vocabulary(
    form: _form.Merge, models: Mapping[str, Checkpoint], like: str
) -> Vocabulary:
    """The vocabulary that a recipe with a tokenizer asks for."""
    assert form.tokenizer is not None
    config = form.tokenizer
    inputs = list(_form.references(form._replace(tokenizer=None)))
    made = tokens(config, models, inputs, like)
    rows = max(made.vocabulary.values(), default=-1) + 1
    if config.multiple:
        rows = -(-rows // config.multiple) * config.multiple
    sizes = {name: _sizes(models[name]) for name in models}
    return Vocabulary(made, config, sizes, rows)


def is_input(name: str) -> bool:
    """Is a tensor an input embedding of tokens?"""
    return _INPUT.fullmatch(name) is not None


def is_head(name: str) -> bool:
    """Is a tensor an output head over tokens, which may be tied to the embedding?"""
    return _HEAD.fullmatch(name) is not None and _LAYER.search(name) is None


def embedding(names: Iterable[str]) -> str | None:
    """The input embedding among the names."""
    return next((n for n in names if is_input(n)), None)


def _sizes(checkpoint: Checkpoint) -> frozenset[int]:
    own = embedding(checkpoint.tensors)
    found = {vocab_size(checkpoint)}
    if own is not None:
        found.add(checkpoint.tensors[own].shape[0])
    return frozenset(size for size in found if size)
