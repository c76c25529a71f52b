"""Where the layers of a model are, from its tensors' names; no architecture files.

A layer stack is a prefix followed by consecutive numbers from 0: `model.layers.0...`.
The first number in a name counts. What is in no stack is loose: embeddings before the
layers, all else (norms, heads) after them.
"""

from collections.abc import Collection, Iterable, Mapping
import re
from typing import Any, NamedTuple

_INDEX = re.compile(r"(?:^|(?<=\.))(\d+)\.")
_BEFORE = re.compile(
    r"embed(?!_out)|wte|wpe|shared|patch|conv[12]\.|_pre\b|ln_q|relative_pe|rotary"
)
PLURAL = ("layers", "layer", "h", "blocks", "block", "resblocks")
_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "depth",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
)
_NESTED = ("text_config", "vision_config", "audio_config", "encoder", "decoder")
# Parts of a model that go by several names; the first that there is counts.
_ALIASES = {
    "text_decoder": ("language_model", "model.language_model"),
    "vision_tower": ("vision_tower", "model.vision_tower", "visual", "model.visual"),
    "multi_modal_projector": (
        "multi_modal_projector",
        "model.multi_modal_projector",
        "visual.merger",
        "model.visual.merger",
    ),
}


class Place(NamedTuple):
    """A tensor of a layer: `<stack>.<layer>.<rest>`."""

    stack: str
    layer: int
    rest: str

    @property
    def name(self) -> str:
        """The name of the tensor."""
        head = f"{self.stack}." if self.stack else ""
        return f"{head}{self.layer}.{self.rest}"


def place(name: str, stacks: Collection[str]) -> Place | None:
    """Where in which stack a tensor is; None where it is loose."""
    found = _split(name)
    return found if found is not None and found.stack in stacks else None


def stacks(names: Iterable[str]) -> dict[str, int]:
    """The layer stacks among the names, and how many layers each has."""
    seen: dict[str, set[int]] = {}
    for name in names:
        if (found := _split(name)) is not None:
            seen.setdefault(found.stack, set()).add(found.layer)
    result = {}
    for stack, layers in seen.items():
        if layers == set(range(len(layers))):
            result[stack] = len(layers)
        elif stack.rpartition(".")[2] in PLURAL:
            missing = min(set(range(max(layers))) - layers)
            raise ValueError(f"layer {missing} of {stack!r} is missing")
    return result


def is_before(name: str) -> bool:
    """Does a loose tensor come before the layers?"""
    return _BEFORE.search(name) is not None


def members(module: str | None, names: Collection[str]) -> list[str]:
    """The tensors of a module, in order.

    A module is named by the prefix of its tensors (`vision_tower`, `model.encoder`,
    `encoder`), `default` where there is one stack or for all that is in no stack, or
    `text_decoder` and `shared` for what no other part of the model holds.
    """
    found = stacks(names)
    if module is None or (module in ("default", "text_decoder") and len(found) == 1):
        return list(names)
    if module == "default":
        return [n for n in names if place(n, found) is None]
    if module == "shared" and (rest := _rest(module, names, found)):
        return rest
    prefixes = (*_ALIASES.get(module, ()), module, f"model.{module}")
    for prefix in prefixes:
        held = [n for n in names if n.startswith(f"{prefix}.")]
        if held and module == "vision_tower":
            held = [n for n in held if not n.startswith(f"{prefix}.merger.")]
        if held:
            return held
    rest = _rest(module, names, found)
    if not rest:
        known = sorted({"default", *found, *(n.split(".")[0] for n in names)})
        raise ValueError(f"no module {module!r}: it may be one of {', '.join(known)}")
    return rest


def count_keys(
    config: Mapping[str, Any] | None, stack: str, found: Mapping[str, int]
) -> list[tuple[str, ...]]:
    """Where config.json says how many layers a stack has, as paths of keys."""
    if config is None:
        return []
    named = [(k,) for k in _COUNTS if isinstance(config.get(k), int)]
    for part in _NESTED:
        inner = config.get(part)
        if isinstance(inner, Mapping):
            named += [(part, k) for k in _COUNTS if isinstance(inner.get(k), int)]
    if len(found) <= 1:
        flat = [path for path in named if len(path) == 1]
        return flat or named[:1]
    kind = next(
        (k for k in ("decoder", "encoder", "vision", "visual", "audio") if k in stack),
        None,
    )
    kind = "vision" if kind == "visual" else kind
    fits = [p for p in named if kind is not None and any(kind in key for key in p)]
    if not fits and kind in (None, "encoder", "decoder"):
        fits = [p for p in named if p[0] == "text_config" or len(p) == 1]
    return [p for p in fits if read_key(config, p) == found[stack]][:1]


def read_key(config: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """The value at a path of keys."""
    value: Any = config
    for key in path:
        value = value[key]
    return value


def _rest(module: str, names: Collection[str], found: Mapping[str, int]) -> list[str]:
    """What remains for a module without a prefix: all that no other part holds."""
    if module not in ("text_decoder", "shared"):
        return []
    embeds = [n for n in names if n.endswith("embed_tokens.weight")]
    own = {n.rpartition(".embed_tokens.")[0] for n in embeds} & {
        s.rpartition(".")[0] for s in found
    }
    keep = {
        s for s in found if module == "text_decoder" and s.rpartition(".")[0] in own
    }
    others = {s.split(".")[0] if module == "shared" else _part(s) for s in found}
    others -= {_part(s) for s in keep}
    out = []
    for name in names:
        where = place(name, found)
        loose = where is None and not any(name.startswith(f"{o}.") for o in others)
        if loose or (where is not None and where.stack in keep):
            out.append(name)
    return out


def _part(stack: str) -> str:
    """The part of a model that a stack belongs to."""
    return stack.rpartition(".")[0] or stack


def _split(name: str) -> Place | None:
    match = _INDEX.search(name)
    if match is None:
        return None
    stack, rest = name[: match.start()].rstrip("."), name[match.end() :]
    return Place(stack, int(match[1]), rest)
