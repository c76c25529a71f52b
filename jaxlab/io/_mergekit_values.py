"""mergekit's parameters: scopes, filters and gradients, as one value of ours."""

from collections.abc import Mapping, Sequence
from typing import Any

from . import _option
from ._fields import given
from ._mergekit_methods import REQUIRED, Parameter
from ._node import Node, boolean, fault, mapping, real, sequence, text

Scopes = Sequence[Mapping[str, Node]]
"""The `parameters` that hold, the most specific first."""


def chain(
    key: str, parameter: Parameter, scopes: Scopes, node: Node, about: str
) -> Any:
    """The first setting that holds; those that hold for some tensors only, in turn."""
    cases: list[tuple[dict[str, Any], Any]] = []
    value: Any = parameter.default
    for scope in scopes:
        if key not in scope:
            continue
        where, rest = _setting(key, parameter, scope[key], about)
        if where:
            cases.append((where, rest))
        if rest is not _option.ABSENT:
            value = rest
            break
    else:
        if value is REQUIRED and not cases:
            raise fault(node, f"the parameter {key!r}{about} is required")
        value = _said(parameter, value) if value not in (REQUIRED, None) else value
    for where, _ in reversed(cases):
        more = {} if value is REQUIRED or value is None else {"else": value}
        value = {"where": where, **more}
    return value


def _setting(
    key: str, parameter: Parameter, node: Node, about: str
) -> tuple[dict[str, Any], Any]:
    """A setting as (value by globs, value where none matches)."""
    items = node.value if isinstance(node.value, list) else [node]
    if not any(isinstance(item.value, dict) for item in items):
        return {}, _value(key, parameter, node, about) if items else _option.ABSENT
    where: dict[str, Any] = {}
    for item in items:
        entries = mapping(item, f"a case of {key!r}", ("filter", "value"))
        if "value" not in entries:
            raise fault(item, f"a case of {key!r} needs a 'value'")
        value = _value(key, parameter, entries["value"], about)
        within = given(entries, "filter")
        if within is None or within.value in ("*", ""):
            return where, value
        where.setdefault(globs(text(within, "'filter'")), value)
    return where, _option.ABSENT


def globs(within: str) -> str:
    """Globs of the slash paths whose dotted name contains a text."""
    escaped = "".join(f"[{c}]" if c in "*?[" else c for c in within)
    path = escaped.replace("/", "?").replace(".", "/")
    return f"**/*{path}* | **/*{path}*/**"


def _value(key: str, parameter: Parameter, node: Node, about: str) -> Any:
    """A plain value or a gradient, of the parameter's kind and in its range."""
    if isinstance(node.value, list):
        points = sequence(node, f"{key!r}")
        return {"gradient": [_value(key, parameter, p, about) for p in points]}
    what = f"the parameter {key!r}{about}"
    if parameter.kind == "bool":
        value: Any = boolean(node, what)
        if parameter.says and value not in parameter.says:
            raise fault(node, f"{what}: {value} is not supported for this method")
    else:
        value = real(node, what)
        _option.in_range(parameter.ours or key, value, node, what)
        value = int(value) if parameter.kind == "int" else value
    return _said(parameter, value)


def _said(parameter: Parameter, value: Any) -> Any:
    return parameter.says.get(value, value) if parameter.says else value
