"""Our own recipe form, read strictly: which models, by which method, which options.

    use: merge.ties            # a public method
    base: path/to/base         # a model, or a recipe: they nest
    models: [path/a, {model: path/b, layers: [0, 16]}, {use: merge.linear, models: ...}]
    weights: [0.3, 0.7]        # an option of the method; a list is one value per model
    density: {where: {"**/mlp/**": 0.5}, else: {gradient: [0.1, 0.9]}}

Any option may depend on the tensor (`where`: the first glob that matches its slash
path; globs are separated by ` | `) and on the depth (`gradient`: over the layers of a
slice; 0 outside the layers).
`slices` stacks layer ranges, `modules` treats parts of a model apart; both inherit what
the recipe says. `like` names the model whose config and tokenizer the result carries.
`align: true` permutes the hidden units of all models onto the base or the first one
before they are merged; `align: {onto: path/to/a, seed: 0}` says which, and `forward:
nn.resnet20` with `inputs: ["float32[2,32,32,3]"]` what they are where no config does.
"""

from collections.abc import Mapping
import inspect
from typing import Any, NamedTuple

import numpy as np

from .. import recipe as methods
from . import _option
from ._fields import (
    Align,
    Tokenizer,
    alignment,
    dtype,
    given,
    layer_range,
    reference,
    tokenizer,
)
from ._node import Node, fault, mapping, nearest, sequence, text

WHOLE = ("like", "align", "dtype", "out_dtype", "tokenizer", "chat_template")
SHAPE = ("use", "base", "models", "slices", "modules")


class Entry(NamedTuple):
    """One input: a model's reference or a nested recipe, whole or a range of layers."""

    model: "str | Merge"
    layers: tuple[int, int] | None = None


class Slice(NamedTuple):
    """One range of output layers: which method, on what, with which options."""

    use: str
    models: tuple[Entry, ...]
    base: Entry | None
    options: Mapping[str, Any]


class Merge(NamedTuple):
    """A whole recipe. The module None is the whole model."""

    modules: Mapping[str | None, tuple[Slice, ...]]
    like: str | None = None
    dtype: np.dtype | None = None
    out_dtype: np.dtype | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    align: Align | None = None

    @property
    def slices(self) -> tuple[Slice, ...]:
        """The slices of all modules."""
        return tuple(s for slices in self.modules.values() for s in slices)


def read(node: Node, *, nested: bool = False) -> Merge:
    """A recipe in our own form, checked; errors name file, line and column."""
    entries = dict(mapping(node, "a recipe"))
    for key in WHOLE if nested else ():
        if key in entries:
            raise fault(node.keys[key], f"{key!r} belongs to the outermost recipe")
    whole = {key: given(entries, key) for key in WHOLE}
    rest = {key: value for key, value in entries.items() if key not in WHOLE}
    like, template = whole["like"], whole["chat_template"]
    return Merge(
        _modules(node, rest),
        reference(like, "'like'") if like else None,
        dtype(whole["dtype"], "dtype"),
        dtype(whole["out_dtype"], "out_dtype"),
        tokenizer(whole["tokenizer"]) if whole["tokenizer"] else None,
        text(template, "'chat_template'") if template else None,
        alignment(whole["align"]) if whole["align"] else None,
    )


def references(merge: Merge) -> tuple[str, ...]:
    """Every model a recipe names, in order, once; the tokenizer's too."""
    found: dict[str, None] = {}
    if merge.like is not None:
        found[merge.like] = None
    for part in merge.slices:
        for entry in (*([part.base] if part.base else []), *part.models):
            inner = entry.model
            named = references(inner) if isinstance(inner, Merge) else (inner,)
            found.update(dict.fromkeys(named))
    if merge.tokenizer is not None:
        found.update(dict.fromkeys(merge.tokenizer.models))
    return tuple(found)


def _modules(node: Node, entries: dict[str, Node]) -> dict[str | None, tuple]:
    """The slices of every module, each with what it inherits."""
    parts = [k for k in ("models", "slices", "modules") if k in entries]
    if len(parts) != 1:
        got = " and ".join(map(repr, parts)) or "none"
        raise fault(node, f"exactly one of models, slices, modules is due, got {got}")
    if "modules" not in entries:
        return {None: _slices(node, entries, {})}
    modules = mapping(entries["modules"], "'modules'")
    if not modules:
        raise fault(entries["modules"], "'modules' is empty")
    inherited = {k: v for k, v in entries.items() if k != "modules"}
    result: dict[str | None, tuple] = {}
    for name, part in modules.items():
        own = mapping(part, f"module {name!r}")
        if ("models" in own) == ("slices" in own):
            raise fault(part, f"module {name!r} needs either 'models' or 'slices'")
        result[name] = _slices(part, own, inherited)
    return result


def _slices(
    node: Node, entries: Mapping[str, Node], inherited: Mapping[str, Node]
) -> tuple[Slice, ...]:
    if "slices" not in entries:
        return (_slice(node, {**inherited, **entries}),)
    upper = {**inherited, **{k: v for k, v in entries.items() if k != "slices"}}
    return tuple(
        _slice(item, {**upper, **mapping(item, "a slice")})
        for item in sequence(entries["slices"], "'slices'")
    )


def _slice(node: Node, entries: Mapping[str, Node]) -> Slice:
    """One slice: its options are those that the method takes, no others."""
    if "use" not in entries:
        raise fault(node, "'use' is missing: the method, for example merge.ties")
    use = text(entries["use"], "'use'")
    if "models" not in entries:
        raise fault(node, "'models' is missing")
    try:
        method = methods.lookup(use)
    except ValueError as error:
        raise fault(entries["use"], str(error)) from None
    if methods.data(method) is None or use in _STEPS:
        raise fault(entries["use"], f"{use!r} is no merge of models by itself")
    beyond = methods.beyond(method)
    if beyond:
        raise fault(
            entries["use"],
            f"{use} needs {', '.join(beyond)}, which a recipe cannot give: call it "
            f"from Python",
        )
    options = _options(node, use, entries)
    base = _entry(entries["base"], "'base'") if given(entries, "base") else None
    if base is None and methods.data(method) == "deltas":
        raise fault(node, f"{use} merges task vectors: it needs a 'base'")
    models = tuple(
        _entry(item, "a model") for item in sequence(entries["models"], "'models'")
    )
    if use in _PAIRS and len(models) != _PAIRS[use]:
        raise fault(
            entries["models"], f"{use} takes {_PAIRS[use]} models, got {len(models)}"
        )
    return Slice(use, models, base, options)


# Steps return no model but a stack or a compressed form; how many models some take.
_STEPS = frozenset(
    f"merge.{name}" for name in ("trim", "trim_outliers", "drop", "drop_by_rank")
) | {"merge.elect", "merge.task_vectors", "merge.tall_masks", "merge.coefficients"}
_STEPS |= {f"merge.{name}" for name in ("compeft", "ternary", "bitdelta", "emr")}
_STEPS |= {"merge.tsv_c"}
_PAIRS = {f"merge.{m}": 2 for m in ("slerp", "nuslerp", "nearswap", "arcee_fusion")}
_PAIRS["merge.wise_ft"] = 2
_PAIRS |= {"merge.passthrough": 1, "merge.transfer": 3}


def _options(node: Node, use: str, entries: Mapping[str, Node]) -> dict[str, Any]:
    taken = methods.options(methods.lookup(use))
    options = {}
    for key, value in entries.items():
        if key in SHAPE:
            continue
        if key not in taken:
            raise fault(value, f"{use} has no option {key!r}{nearest(key, taken)}")
        flag = isinstance(taken[key].default, bool)
        options[key] = _option.read(key, value, flag=flag)
    for key, parameter in taken.items():
        if parameter.default is inspect.Parameter.empty and key not in options:
            raise fault(node, f"{use} needs the option {key!r}")
    return options


def _entry(node: Node, what: str) -> Entry:
    """A model: a reference, a nested recipe, or either with a range of layers."""
    if not isinstance(node.value, dict) or "path" in node.value:
        return Entry(reference(node, what))
    if node.value.keys() & {"use", "slices", "modules"}:
        return Entry(read(node, nested=True))
    entries = mapping(node, what, ("model", "layers"))
    if "model" not in entries:
        raise fault(node, f"{what} needs 'model'")
    inner = _entry(entries["model"], what).model
    layers = given(entries, "layers")
    return Entry(inner, layer_range(layers) if layers else None)
