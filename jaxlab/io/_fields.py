"""The fields that recipes of both forms share: models, layers, dtypes, tokenizers."""

from collections.abc import Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

from ._node import Node, boolean, fault, integer, mapping, nearest, said, sequence, text

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}


class Token(NamedTuple):
    """Where the embedding of one token comes from; without a kind, as if not listed."""

    kind: str | None = None  # "zero", "model" (its row of this token), "model_token"
    model: str | None = None
    token: str | int | None = None
    force: bool = False


class Tokenizer(NamedTuple):
    """Whose vocabulary the result has, and what it is padded to."""

    source: str = "union"  # "union", "base", or a model's reference
    tokens: Mapping[str, Token] = {}
    multiple: int | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """The references in it."""
        named = [t.model for t in self.tokens.values() if t.model is not None]
        return (*([] if self.source in ("union", "base") else [self.source]), *named)


class Align(NamedTuple):
    """Which models are permuted onto which other one before they are merged."""

    onto: str | None = None  # "first", "base", or a reference; None: base, else first
    seed: int | None = None  # None: that of the merge
    forward: str | None = None  # a function of `nn`; None: as config.json says
    inputs: tuple[str, ...] = ()  # of the forward, such as float32[2,32,32,3]


def given(entries: Mapping[str, Node], key: str) -> Node | None:
    """An entry, unless it is absent or null."""
    node = entries.get(key)
    return None if node is None or node.value is None else node


def reference(node: Node, what: str) -> str:
    """A model's reference: text, or a mapping with `path` and `revision`."""
    if not isinstance(node.value, dict):
        name = text(node, what)
    elif "path" in node.value:
        entries = mapping(node, what, ("path", "revision"))
        name = text(entries["path"], "'path'")
        if revision := given(entries, "revision"):
            name += f"@{text(revision, 'revision')}"
    else:
        entries = mapping(node, what, ("model", "lora", "override_architecture"))
        for key in ("lora", "override_architecture"):
            if given(entries, key):
                raise fault(node.keys[key], f"{key!r} is not supported yet")
        if "model" not in entries:
            raise fault(node, f"{what} needs a 'model'")
        return reference(entries["model"], "'model'")
    if "+" in name:
        raise fault(
            node,
            f"{what} {name!r}: merging a LoRA adapter ('+') is not supported yet; fold "
            "it into its model first",
        )
    if name.count("@") > 1:
        raise fault(node, f"{what} {name!r} has more than one '@'")
    return name


def layer_range(node: Node) -> tuple[int, int]:
    """A range of layers: the first, and one past the last."""
    items = sequence(node, "a layer range")
    if len(items) != 2:
        raise fault(node, f"a layer range has two numbers, got {said(node)}")
    low, high = (integer(item, "a layer") for item in items)
    if not 0 <= low < high:
        raise fault(node, f"layers [{low}, {high}] are no range")
    return low, high


def dtype(node: Node | None, what: str) -> np.dtype | None:
    """A float type by name; `torch.` before it is allowed."""
    if node is None:
        return None
    name = text(node, f"{what!r}").removeprefix("torch.")
    if name not in DTYPES:
        raise fault(node, f"{what!r} is no float type{nearest(name, DTYPES)}")
    return DTYPES[name]


def tokenizer(node: Node) -> Tokenizer:
    """The `tokenizer` entry; a text is its `source`."""
    if isinstance(node.value, str):
        return Tokenizer(reference(node, "'tokenizer'"))
    known = ("source", "tokens", "pad_to_multiple_of")
    entries = mapping(node, "'tokenizer'", known)
    tokens, multiple = given(entries, "tokens"), None
    listed = mapping(tokens, "'tokens'") if tokens else {}
    if pad := given(entries, "pad_to_multiple_of"):
        multiple = integer(pad, "'pad_to_multiple_of'")
        if multiple < 1:
            raise fault(pad, f"'pad_to_multiple_of' has to be positive, got {multiple}")
    source = given(entries, "source")
    return Tokenizer(
        reference(source, "'source'") if source else "union",
        {name: _token(name, item) for name, item in listed.items()},
        multiple,
    )


def alignment(node: Node) -> Align | None:
    """The `align` entry: true, or a mapping."""
    if isinstance(node.value, bool):
        return Align() if node.value else None
    entries = mapping(node, "'align'", ("method", *Align._fields))
    onto, seed, forward, inputs = (given(entries, key) for key in Align._fields)
    method = given(entries, "method")
    if method is not None and text(method, "'method'") != "weight_matching":
        why = f"'method' has to be weight_matching, got {said(method)}"
        raise fault(method, why)
    if (forward is None) != (inputs is None):
        raise fault(node, "'forward' and 'inputs' go together")
    if seed is not None and integer(seed, "'seed'") < 0:
        raise fault(seed, f"'seed' has to be at least 0, got {said(seed)}")
    return Align(
        reference(onto, "'onto'") if onto else None,
        integer(seed, "'seed'") if seed else None,
        text(forward, "'forward'") if forward else None,
        tuple(text(x, "an input") for x in sequence(inputs, "'inputs'"))
        if inputs
        else (),
    )


def _token(name: str, node: Node) -> Token:
    """How one token gets its embedding."""
    entries = mapping(node, f"token {name!r}", ("source", "force"))
    force = given(entries, "force")
    forced = force is not None and boolean(force, "'force'")
    source = given(entries, "source")
    if source is None:
        if forced:
            raise fault(node, f"token {name!r} is forced, so it needs a 'source'")
        return Token()
    if not isinstance(source.value, dict) or "kind" not in source.value:
        return Token("model", reference(source, "'source'"), None, forced)
    kind = text(source.value["kind"], "'kind'")
    if kind == "zero":
        mapping(source, "a source of kind zero", ("kind",))
        return Token("zero", None, None, forced)
    if kind != "model_token":
        raise fault(source, f"'kind' has to be zero or model_token, got {kind!r}")
    items = mapping(source, "'source'", ("kind", "model", "token", "token_id"))
    word, number = given(items, "token"), given(items, "token_id")
    if "model" not in items or (word is None) == (number is None):
        raise fault(source, "model_token needs 'model' and one of 'token', 'token_id'")
    which = text(word, "'token'") if word else integer(number or source, "'token_id'")
    return Token("model_token", reference(items["model"], "'model'"), which, forced)
