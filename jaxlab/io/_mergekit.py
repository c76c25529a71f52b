"""mergekit's YAML, read strictly and lowered to our own form.

Every key that mergekit 0.1.5 knows is honoured; one it would ignore is an error. What
mergekit resolves while it runs (source before slice before module before global, the
first filter whose text is in the tensor's name) becomes one value per option.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from . import _fields
from ._fields import given, layer_range, reference
from ._mergekit_methods import METHODS, Method, Parameter
from ._mergekit_values import Scopes, chain
from ._node import Node, fault, mapping, nearest, plain, sequence, text

KEYS = (
    "merge_method",
    "models",
    "slices",
    "modules",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
)


class Source(NamedTuple):
    """One model of a slice."""

    node: Node
    model: str
    layers: tuple[int, int] | None
    parameters: Mapping[str, Node]


def is_mergekit(node: Node) -> bool:
    """Is this recipe mergekit's? Ours has no `merge_method`."""
    return isinstance(node.value, dict) and "merge_method" in node.value


def lower(node: Node) -> dict[str, Any]:
    """A mergekit recipe in our own form, as plain values."""
    entries = mapping(node, "a mergekit recipe", KEYS)
    name = text(entries["merge_method"], "'merge_method'")
    if name not in METHODS:
        why = f"no merge method {name!r}{nearest(name, METHODS)}"
        raise fault(entries["merge_method"], why)
    parts = [k for k in ("models", "slices", "modules") if given(entries, k)]
    if len(parts) != 1:
        got = " and ".join(map(repr, parts)) or "none"
        raise fault(node, f"exactly one of models, slices, modules is due, got {got}")
    base = given(entries, "base_model")
    anchor = reference(base, "'base_model'") if base else None
    whole = _scope(given(entries, "parameters"), name)
    if parts[0] == "modules":
        modules = mapping(entries["modules"], "'modules'")
        lowered = {k: _module(name, v, anchor, whole) for k, v in modules.items()}
        body: dict[str, Any] = {"use": f"merge.{name}", "modules": lowered}
    else:
        body = _parts(name, entries[parts[0]], parts[0], anchor, (whole,))
        body = {"use": f"merge.{name}", **body}
    if anchor is not None and body.get("base") != anchor:
        body["like"] = anchor
    return {**body, **_files(entries)}


def _files(entries: Mapping[str, Node]) -> dict[str, Any]:
    """What concerns dtypes and tokenizers, checked, as it is in both forms."""
    out = {}
    for key in ("dtype", "out_dtype"):
        if node := given(entries, key):
            _fields.dtype(node, key)
            out[key] = text(node, key).removeprefix("torch.")
    source, config = given(entries, "tokenizer_source"), given(entries, "tokenizer")
    if source and config:
        raise fault(config, "'tokenizer' and 'tokenizer_source' exclude each other")
    if source:
        out["tokenizer"] = {"source": reference(source, "'tokenizer_source'")}
    if config:
        mapping(config, "'tokenizer'")
        _fields.tokenizer(config)
        out["tokenizer"] = plain(config)
    if template := given(entries, "chat_template"):
        out["chat_template"] = text(template, "'chat_template'")
    return out


def _module(
    name: str, node: Node, anchor: str | None, whole: Mapping[str, Node]
) -> dict[str, Any]:
    entries = mapping(node, "a module", ("models", "slices", "parameters"))
    parts = [k for k in ("models", "slices") if given(entries, k)]
    if len(parts) != 1:
        raise fault(node, "a module needs either 'models' or 'slices'")
    scopes = (_scope(given(entries, "parameters"), name), whole)
    return _parts(name, entries[parts[0]], parts[0], anchor, scopes)


def _parts(
    name: str, node: Node, kind: str, anchor: str | None, scopes: Scopes
) -> dict[str, Any]:
    """The `models` or the `slices` of a recipe or a module."""
    items = sequence(node, f"{kind!r}")
    if kind == "slices":
        return {"slices": [_slice(name, item, anchor, scopes) for item in items]}
    sources = [_source(item, ("model", "parameters"), name) for item in items]
    if anchor is not None and all(s.model != anchor for s in sources):
        sources.append(Source(node, anchor, None, {}))
    return _body(name, node, sources, anchor, scopes)


def _slice(name: str, node: Node, anchor: str | None, scopes: Scopes) -> dict[str, Any]:
    known = ("sources", "base_model", "parameters", "residual_weight")
    entries = mapping(node, "a slice", known)
    if given(entries, "residual_weight"):
        why = "'residual_weight' is not supported: mergekit reads it and never uses it"
        raise fault(node.keys["residual_weight"], why)
    if "sources" not in entries:
        raise fault(node, "a slice needs 'sources'")
    if base := given(entries, "base_model"):
        anchor = reference(base, "'base_model'")
    allowed = ("model", "layer_range", "parameters")
    items = sequence(entries["sources"], "'sources'")
    sources = [_source(item, allowed, name) for item in items]
    for source in sources:
        if source.layers is None:
            raise fault(source.node, "a source of a slice needs a 'layer_range'")
    scopes = (_scope(given(entries, "parameters"), name), *scopes)
    return _body(name, node, sources, anchor, scopes)


def _source(node: Node, keys: Sequence[str], name: str) -> Source:
    entries = mapping(node, "an input", keys)
    if "model" not in entries:
        raise fault(node, "an input needs a 'model'")
    layers = given(entries, "layer_range")
    return Source(
        node,
        reference(entries["model"], "'model'"),
        layer_range(layers) if layers else None,
        _own_scope(given(entries, "parameters"), name),
    )


def _body(
    name: str,
    node: Node,
    sources: Sequence[Source],
    anchor: str | None,
    scopes: Scopes,
) -> dict[str, Any]:
    """One slice of ours: the models, the base, and every option as one value."""
    method = METHODS[name]
    base = _contract(name, method, node, sources, anchor)
    others = [s for s in sources if s is not base]
    listed = [base, *others] if method.pair and base else others
    if method.base == "ignored":
        listed = list(sources)
    if not others:  # only the base is there: mergekit returns it
        return {"use": "merge.passthrough", "models": [_entry(sources[0])]}
    body: dict[str, Any] = {"models": [_entry(s) for s in listed]}
    if base and not method.pair:
        body["base"] = _entry(base)
    for key, parameter in method.parameters.items():
        value = _resolved(key, parameter, others, listed, scopes, node)
        if parameter.ours is not None and value is not None:
            body[parameter.ours] = value
    return {**body, **method.fixed}


def _entry(source: Source) -> Any:
    if source.layers is None:
        return source.model
    return {"model": source.model, "layers": list(source.layers)}


def _contract(
    name: str,
    method: Method,
    node: Node,
    sources: Sequence[Source],
    anchor: str | None,
) -> Source | None:
    """The base among the sources, after a check of what the method accepts."""
    seen: set[str] = set()
    for source in sources:
        if source.model in seen:
            raise fault(source.node, f"model {source.model!r} is there twice")
        seen.add(source.model)
    base = next((s for s in sources if s.model == anchor), None)
    if method.base == "ignored":
        base = None
    elif anchor is not None and base is None:
        raise fault(node, f"the base model {anchor!r} is not among the sources")
    if method.base == "required" and base is None:
        raise fault(node, f"{name} needs a 'base_model'")
    count = len(sources) - (method.of_others and base is not None)
    if count < method.least or (method.most is not None and count > method.most):
        due = f"at least {method.least}"
        if method.most is not None:
            due = f"exactly {method.most}"
        what = "models besides the base" if method.of_others else "models"
        what += ", the base among them" if method.base == "required" else ""
        raise fault(node, f"{name} takes {due} {what}; got {count}")
    return base


def _resolved(
    key: str,
    parameter: Parameter,
    others: Sequence[Source],
    listed: Sequence[Source],
    scopes: Scopes,
    node: Node,
) -> Any:
    """A parameter as one value: by model where it is mergekit's to be."""
    if parameter.scope == "shared":
        return chain(key, parameter, scopes, node, "")
    owners = listed if parameter.scope == "models" else others
    values = []
    for source in owners:
        about = f" of {source.model!r}"
        inner = (source.parameters, *scopes)
        values.append(chain(key, parameter, inner, source.node, about))
    return None if all(v is None for v in values) else values


def _own_scope(node: Node | None, name: str) -> Mapping[str, Node]:
    """The `parameters` of one model: those of the whole slice have no place in it."""
    scope = _scope(node, name)
    for key, value in scope.items():
        parameter = METHODS[name].parameters.get(key)
        if parameter and parameter.scope == "shared" and key != "int8_mask":
            why = f"the parameter {key!r} of {name} holds for all models, not for one"
            raise fault(value, f"{why}: mergekit would ignore it here")
    return scope


def _scope(node: Node | None, name: str) -> Mapping[str, Node]:
    """A `parameters` mapping; `int8_mask` is accepted anywhere: it changes nothing."""
    if node is None:
        return {}
    known = {*METHODS[name].parameters, "int8_mask"}
    return mapping(node, f"the parameters of {name}", sorted(known))
