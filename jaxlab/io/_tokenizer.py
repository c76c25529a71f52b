"""The tokenizer of a merged model: the base's, another model's, or a union of all."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ._checkpoint import Checkpoint
from ._fields import Tokenizer
from ._words import FILES, Words, plain, words, written


class Tokens(NamedTuple):
    """The new tokenizer, and how every model numbers its own tokens."""

    vocabulary: Mapping[str, int]  # the id of every token
    models: Mapping[str, Mapping[str, int]]  # each model's own, without unused tokens
    files: Mapping[str, bytes]  # to write
    left_out: frozenset[str]  # carried files that no longer fit
    notes: tuple[str, ...]


def vocab_size(checkpoint: Checkpoint) -> int | None:
    """The number of tokens that config.json says the model has."""
    config: Mapping[str, Any] = checkpoint.config or {}
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, Mapping) else {}):
        if isinstance(part.get("vocab_size"), int):
            return part["vocab_size"]
    return None


def tokens(
    config: Tokenizer, models: Mapping[str, Checkpoint], inputs: list[str], like: str
) -> Tokens:
    """Builds the tokenizer that the recipe asks for.

    `inputs` are the merged models in order, `like` the one whose tokenizer is the base:
    its tokens keep their ids, in a union too.
    """
    found, notes = _all(models, [like, *inputs, *config.models], like)
    base = _stripped(found[like], models[like])
    donor = like
    if config.source == "union":
        others = [name for name in inputs if name != like]
        result = _union(base, {name: found[name] for name in others}, models)
    elif config.source == "base":
        result = base
    else:
        donor, result = config.source, found[config.source]
    known = result.vocabulary
    result = result.plus([plain(t) for t in config.tokens if t not in known])
    own = {name: _rows(found[name], models[name]) for name in found}
    own[like] = _rows(base, models[like])
    files, left = _files(result, found[donor], models[donor], models[like])
    if left:
        notes.append(f"{', '.join(sorted(left))} no longer fit and are not carried")
    return Tokens(result.vocabulary, own, files, left, tuple(notes))


def _all(
    models: Mapping[str, Checkpoint], names: list[str], like: str
) -> tuple[dict[str, Words], list[str]]:
    """The tokenizer of every model; one without has the base's."""
    base = words(models[like])
    if base is None:
        raise ValueError(f"{like} has no tokenizer.json, so none can be built from it")
    found, notes = {}, []
    for name in dict.fromkeys(names):
        mine = base if name == like else words(models[name])
        if mine is None:
            notes.append(f"{name} has no tokenizer: taken to have that of {like}")
        found[name] = mine or base
    return found, notes


def _stripped(found: Words, checkpoint: Checkpoint) -> Words:
    size = vocab_size(checkpoint)
    return found if size is None else found.below(size)


def _rows(found: Words, checkpoint: Checkpoint) -> dict[str, int]:
    """The row of every token that the model has an embedding for."""
    size = vocab_size(checkpoint)
    return {t: i for t, i in found.vocabulary.items() if size is None or i < size}


def _union(
    base: Words, others: Mapping[str, Words], models: Mapping[str, Checkpoint]
) -> Words:
    """The base's tokens, then other models' plain ones, then their added ones."""
    known, texts, added = base.vocabulary, {}, {t["content"]: t for t in base.added}
    for name, found in others.items():
        rows = _rows(found, models[name])
        own = {t["content"]: t for t in found.added if t["content"] in rows}
        texts |= {t: None for t in rows if t not in own and t not in known}
        added = {**own, **added}
    extra = [plain(t) for t in texts if t not in added]
    ordered = [t for found in others.values() for t in found.added]
    special = [added[t["content"]] for t in ordered if t["content"] in added]
    return base.plus([*extra, *special])


def _files(
    result: Words, source: Words, donor: Checkpoint, like: Checkpoint
) -> tuple[dict[str, bytes], frozenset[str]]:
    """What is written, and which of the carried files do not go along."""
    there = {path.name: path for path in donor.carried if path.name in FILES}
    if result.content == source.content and donor is like:
        return {}, frozenset()
    edited = result.content != source.content
    own = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    files = {
        name: path.read_bytes()
        for name, path in there.items()
        if not edited or name in own
    }
    if edited:
        files |= written(result, set(there))
    carried = {path.name for path in like.carried if path.name in FILES}
    return files, frozenset(carried - files.keys())
