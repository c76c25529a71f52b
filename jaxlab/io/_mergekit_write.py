"""Our own form as a mergekit recipe, where mergekit can say it."""

from collections.abc import Mapping, Sequence
import re
from typing import Any

from .. import recipe as methods
from . import _form
from ._mergekit_methods import METHODS, Method, Parameter
from ._mergekit_values import globs
from ._node import nodes

_NONE: Any = object()


def write(own: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe of ours, as plain values, in mergekit's form."""
    form = _form.read(nodes(own))
    if form.align is not None:
        raise _cannot("that models are aligned before they are merged")
    uses = {part.use for part in form.slices}
    if len(uses) > 1:
        raise _cannot(f"two methods in one recipe, {' and '.join(sorted(uses))}")
    name = uses.pop().removeprefix("merge.")
    if name not in METHODS:
        raise _cannot(f"merge.{name}: it has no such method")
    anchor = _anchor(form, METHODS[name])
    out: dict[str, Any] = {"merge_method": name}
    if anchor is not None:
        out["base_model"] = anchor
    parts = {k: _part(name, v, anchor) for k, v in form.modules.items()}
    out |= parts.get(None, {"modules": parts})
    for key in ("dtype", "out_dtype", "tokenizer", "chat_template"):
        if own.get(key) is not None:
            out[key] = own[key]
    if isinstance(out.get("tokenizer"), str):
        out["tokenizer_source"] = out.pop("tokenizer")
    return out


def _cannot(what: str) -> ValueError:
    return ValueError(f"mergekit cannot say {what}")


def _anchor(form: _form.Merge, method: Method) -> str | None:
    """The `base_model` of the recipe."""
    if form.like is not None:
        return form.like
    base = _base(form.slices[0], method)
    return None if base is None else _model(base)


def _base(part: _form.Slice, method: Method) -> _form.Entry | None:
    if method.pair:
        return part.models[0]
    if part.base is not None and method.base == "ignored":
        raise _cannot(f"{part.use} around a base")
    return part.base


def _model(entry: _form.Entry) -> str:
    if not isinstance(entry.model, str):
        raise _cannot("a nested recipe")
    return entry.model


def _part(
    name: str, slices: Sequence[_form.Slice], anchor: str | None
) -> dict[str, Any]:
    """The models or the slices of a recipe or a module."""
    entries = [e for s in slices for e in (*s.models, *([s.base] if s.base else []))]
    if len(slices) == 1 and all(e.layers is None for e in entries):
        return _models(name, slices[0], anchor)
    if any(e.layers is None for e in entries):
        raise _cannot("a slice of a model without its range of layers")
    return {"slices": [_slice(name, part, anchor) for part in slices]}


def _models(name: str, part: _form.Slice, anchor: str | None) -> dict[str, Any]:
    method = METHODS[name]
    base = _base(part, method)
    if anchor is not None and (
        _model(base) != anchor
        if base is not None
        else all(_model(e) != anchor for e in part.models)
    ):
        raise _cannot(f"like: {anchor} where it is not the base, nor among the models")
    shared, own = _parameters(name, part)
    items = [
        {"model": _model(entry), **({"parameters": p} if p else {})}
        for entry, p in zip(part.models, own, strict=True)
    ]
    return {"models": items, **({"parameters": shared} if shared else {})}


def _slice(name: str, part: _form.Slice, anchor: str | None) -> dict[str, Any]:
    base = _base(part, METHODS[name])
    shared, own = _parameters(name, part)
    sources = []
    for entry, parameters in zip(part.models, own, strict=True):
        item = {"model": _model(entry), "layer_range": list(entry.layers or ())}
        sources.append(item | ({"parameters": parameters} if parameters else {}))
    if part.base is not None:
        layers = list(part.base.layers or ())
        sources.append({"model": _model(part.base), "layer_range": layers})
    out: dict[str, Any] = {"sources": sources}
    if base is not None and _model(base) != anchor:
        out["base_model"] = _model(base)
    if shared:
        out["parameters"] = shared
    return out


def _parameters(
    name: str, part: _form.Slice
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What goes with the slice, and what with each of its models."""
    method, options = METHODS[name], dict(part.options)
    for key, parameter in methods.options(methods.lookup(part.use)).items():
        options.setdefault(key, parameter.default)
    if options.get("consensus") == "mean" and _ones(options.get("weights")):
        options["consensus"] = "weighted_mean"  # the same where all weights are 1
    shared: dict[str, Any] = {}
    own: list[dict[str, Any]] = [{} for _ in part.models]
    said = {k: p for k, p in method.parameters.items() if p.ours is not None}
    for theirs, parameter in said.items():
        value = options.pop(str(parameter.ours))
        if not isinstance(value, list):
            shared[theirs] = _value(parameter, value)
        elif parameter.scope == "shared" or len(value) != len(own):
            raise _cannot(f"{parameter.ours} by model for {name}")
        else:
            for mine, item in zip(own, value, strict=True):
                mine[theirs] = _value(parameter, item)
    defaults = methods.options(methods.lookup(part.use))
    for key, value in options.items():
        due = method.fixed.get(key, defaults[key].default)
        if value != due:
            raise _cannot(f"{key}: {value} for {name}, there it is always {due}")
    return shared, own


def _ones(value: Any) -> bool:
    return all(v == 1 for v in value) if isinstance(value, list) else value == 1


def _value(parameter: Parameter, value: Any) -> Any:
    """An option as mergekit's setting: a value, a gradient, or cases."""
    if isinstance(value, list):
        raise _cannot(f"{parameter.ours} by model within 'where'")
    if not isinstance(value, Mapping):
        return _said(parameter, value)
    if "gradient" in value:
        return [_said(parameter, v) for v in value["gradient"]]
    cases, rest = [], value
    while isinstance(rest, Mapping) and "where" in rest:
        for key, item in rest["where"].items():
            inner = _value(parameter, item)
            if isinstance(item, Mapping) and "where" in item:
                raise _cannot(f"'where' within 'where' ({key})")
            cases.append({"filter": _filter(key), "value": inner})
        rest = rest.get("else", _NONE)
    if rest is not _NONE:
        cases.append({"value": _value(parameter, rest)})
    return cases


def _said(parameter: Parameter, value: Any) -> Any:
    """A plain value in mergekit's words."""
    if not parameter.says:
        return value
    for theirs, ours in parameter.says.items():
        if ours == value:
            return theirs
    raise _cannot(f"{parameter.ours}: {value}")


def _filter(key: str) -> str:
    """The text of which globs say that a name contains it."""
    first = key.split(" | ")[0].removeprefix("**/*").removesuffix("*")
    text = re.sub(r"\[([*?[])\]", r"\1", first.replace("/", "."))
    if globs(text) != key:
        raise _cannot(f"the globs {key!r}: it knows only whether a name holds a text")
    return text
