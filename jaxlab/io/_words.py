"""A model's tokenizer, read and edited as the JSON it is; no tokenizer library."""

from collections.abc import Iterator, Mapping
import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

from ._checkpoint import Checkpoint
from ._errors import refuse
from ._json import read_object

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class Words(NamedTuple):
    """A tokenizer: the parsed `tokenizer.json`, what else it says, and where it is."""

    content: dict[str, Any]
    config: Mapping[str, Any]
    file: Path

    @property
    def vocabulary(self) -> dict[str, int]:
        """The id of every token, added ones included, by id."""
        ids = {**_model(self.content), **{t["content"]: t["id"] for t in self.added}}
        return dict(sorted(ids.items(), key=lambda item: item[1]))

    @property
    def added(self) -> list[dict[str, Any]]:
        """The added tokens, by id."""
        return sorted(self.content.get("added_tokens") or [], key=lambda t: t["id"])

    def plus(self, tokens: list[dict[str, Any]]) -> "Words":
        """With tokens added that it lacks, each at the next free id."""
        content = {**self.content, "added_tokens": copy.deepcopy(self.added)}
        known = self.vocabulary
        beyond = [len(_model(content)), *(t["id"] + 1 for t in self.added)]
        following: int = max(beyond)
        held = {t["content"] for t in self.added}
        for token in tokens:
            name = token["content"]
            if name in held:
                continue
            at = known.get(name, following)
            following += at == following
            content["added_tokens"].append({**_blank(name), **token, "id": at})
            known[name] = at
            held.add(name)
        return self._replace(content=content)

    def below(self, size: int) -> "Words":
        """Without the tokens that a model of `size` rows has no embedding for."""
        unused = {t for t, i in self.vocabulary.items() if i >= size}
        if not unused:
            return self
        model = self.content["model"]
        kind = model.get("type")
        if kind != "BPE":
            why = f"tokens beyond the model's {size} rows, in a {kind} tokenizer"
            raise refuse(self.file, f"{why}: only a BPE one can be cut")
        merges = model.get("merges", [])
        pairs = [m.split(" ") if isinstance(m, str) else m for m in merges]
        kept = [
            m
            for m, p in zip(merges, pairs, strict=True)
            if not unused & {*p, "".join(p)}
        ]
        vocab = {t: i for t, i in model["vocab"].items() if t not in unused}
        added = [t for t in self.added if t["id"] < size]
        model = {**model, "vocab": vocab, "merges": kept}
        return self._replace(
            content={**self.content, "model": model, "added_tokens": added}
        )


def words(checkpoint: Checkpoint) -> Words | None:
    """The tokenizer of a model folder; None where it has no tokenizer files at all."""
    files = {path.name: path for path in checkpoint.carried}
    if "tokenizer.json" not in files:
        found = [name for name in FILES if name in files]
        if not [name for name in found if name != "special_tokens_map.json"]:
            return None
        raise refuse(
            checkpoint.path,
            f"its tokenizer is {', '.join(found)}; vocabularies are aligned by a "
            "tokenizer.json only: save the tokenizer in the fast form first",
        )
    file = files["tokenizer.json"]
    content = read_object(file)
    _check(content, file)
    config: dict[str, Any] = {}
    if "tokenizer_config.json" in files:
        config = read_object(files["tokenizer_config.json"])
    loaded = Words(content, config, file)
    return loaded.plus(list(_declared(config, loaded)))


def plain(name: str) -> dict[str, Any]:
    """An added token that is ordinary text."""
    return {**_blank(name), "normalized": True}


def written(found: Words, names: set[str]) -> dict[str, bytes]:
    """The files of a tokenizer that was edited, of those that the folder has."""
    out = {"tokenizer.json": _bytes(found.content)}
    if "tokenizer_config.json" in names:
        config = dict(found.config)
        if "added_tokens_decoder" in config:
            config["added_tokens_decoder"] = {
                str(t["id"]): {k: t[k] for k in ("content", *_FLAGS)}
                for t in found.added
            }
        out["tokenizer_config.json"] = _bytes(config)
    if "added_tokens.json" in names:
        inner = _model(found.content)
        extra = {
            t["content"]: t["id"] for t in found.added if t["content"] not in inner
        }
        out["added_tokens.json"] = _bytes(extra)
    return out


def _bytes(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _blank(name: str) -> dict[str, Any]:
    return {"id": 0, "content": name, **dict.fromkeys(_FLAGS, False)}


def _model(content: Mapping[str, Any]) -> dict[str, int]:
    """The ids of the tokenizer's own model."""
    vocab = content["model"]["vocab"]
    if isinstance(vocab, list):
        return {piece[0]: i for i, piece in enumerate(vocab)}
    return vocab


def _declared(config: Mapping[str, Any], found: Words) -> Iterator[dict[str, Any]]:
    """The tokens that only tokenizer_config.json names: loading it adds them."""
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, Mapping):
        for key in sorted(decoder, key=lambda k: int(k) if str(k).isdigit() else 0):
            if isinstance(decoder[key], Mapping) and "content" in decoder[key]:
                yield dict(decoder[key])
    known = found.vocabulary
    named = [config.get(f"{kind}_token") for kind in _SPECIAL]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key)
        named += list(more.values()) if isinstance(more, Mapping) else more or []
    for token in named:
        name = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(name, str) and name not in known:
            yield {**_blank(name), "special": True}


def _check(content: Mapping[str, Any], file: Path) -> None:
    """Raises where the parts that are used are not what they should be."""
    try:
        vocab = content["model"]["vocab"]
        ids = _model(content)
        good = isinstance(vocab, (dict, list))
        good = good and all(type(i) is int and i >= 0 for i in ids.values())
        for token in content.get("added_tokens") or []:
            good = good and isinstance(token["content"], str)
            good = good and type(token["id"]) is int and token["id"] >= 0
    except (KeyError, TypeError, IndexError, AttributeError):
        good = False
    if not good:
        raise refuse(file, "its vocabulary or added tokens are malformed")
