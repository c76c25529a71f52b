"""`adapter_config.json`: its fields, their defaults, and what one layer makes of them.

A field that has another value than PEFT's default is either implemented or refused by
name: none is dropped.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
import json
from pathlib import Path
import re
from typing import Any

from ._errors import refuse, show
from ._json import read_object
from ._peft_defaults import DEFAULTS, SAID
from ._peft_kind import Config, Kind
from ._peft_kinds import KINDS

CONFIG = "adapter_config.json"
VERSION = "0.21.2"
LINEAR = "all-linear"
_OURS = frozenset(
    "target_modules modules_to_save exclude_modules layers_to_transform layers_pattern "
    "bias fan_in_fan_out peft_type peft_version megatron_core runtime_config "
    "qalora_group_size".split()
)  # those that this package reads itself, or that say nothing without another
_PATTERNS = {
    "rank_pattern": ("r", "effective_rank"),
    "alpha_pattern": ("lora_alpha", "alpha"),
    "block_size_pattern": ("block_size",),
    "lambda_pattern": ("delora_lambda",),
    "n_frequency_pattern": ("n_frequency",),
}


def read(folder: Path) -> tuple[Config, Kind]:
    """The fields of a folder's config, defaults filled in, and what its type is.

    Raises:
      FormatError: no type, one that is not known here, or a field that is not
        implemented and not at its default; names file and field.
    """
    file = folder / CONFIG
    if not file.exists():
        raise refuse(file, "the file is missing: is this a PEFT folder?")
    return checked(file, read_object(file))


def checked(file: Path, given: Config) -> tuple[Config, Kind]:
    """The fields of a config, after a check; `file` is for errors."""
    name = given.get("peft_type")
    if not isinstance(name, str) or name not in KINDS:
        raise refuse(file, f"peft_type {show(name)} is none of {', '.join(KINDS)}")
    kind, known = KINDS[name], DEFAULTS[name] | SAID
    fine = kind.implements | _OURS | SAID.keys() | _dropouts(name)
    fine |= {p for p in _PATTERNS if p in known}
    for field, value in given.items():
        if field in fine or (field in known and _alike(value, known[field])):
            continue
        if field in known:
            why = f"{show(value)} is not implemented, only {known[field]!r}"
        elif not value:
            continue  # of another version, and off
        else:
            why = f"PEFT {VERSION} has no such field of {name} (it is {value!r})"
        raise refuse(file, f"field {field!r}: {why}")
    return fill(name, {k: v for k, v in given.items() if k != "runtime_config"}), kind


def fill(name: str, fields: Mapping[str, Any]) -> Config:
    """Fields of a type, with PEFT's defaults for those not given."""
    return {"peft_type": name} | SAID | DEFAULTS[name] | dict(fields)


def dropout(config: Config) -> float:
    """The rate at which a type drops the input of its adapters."""
    rates = [config[field] for field in _dropouts(config["peft_type"])]
    return float(max(rates, default=0.0))


def for_layer(config: Config, module: str) -> Config:
    """The fields as they hold for one layer: rank and alpha patterns applied."""
    out = dict(config)
    for pattern, fields in _PATTERNS.items():
        values = config.get(pattern)
        if not isinstance(values, Mapping):
            continue
        for key, value in values.items():
            if not isinstance(value, list) and re.match(rf"(.*\.)?({key})$", module):
                out |= {f: value for f in fields if f in out}
                break
    return out


def targeted(config: Config, module: str) -> bool:
    """Does the config choose a layer of this name?"""
    if _among(config.get("exclude_modules"), module) or to_save(config, module):
        return False
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    if module in (targets or ()):
        return True
    wanted = config.get("layers_to_transform")
    wanted = [wanted] if isinstance(wanted, int) else wanted
    if not wanted:
        return _among(targets, module)
    return _among(targets, module) and _index(config, module) in wanted


def to_save(config: Config, module: str) -> bool:
    """Is a module one of those that are trained and stored whole?"""
    names = config.get("modules_to_save") or ()
    return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in names)


def write(
    name: str,
    layers: Mapping[str, Config],
    others: Iterable[str],
    said: Config,
) -> bytes:
    """The config of adapters on `layers`, by module name, each with its own fields.

    `others` are the modules that must not be adapted. What most layers have becomes
    the field, the rest its pattern.

    Raises:
      ValueError: a field differs between layers and has no pattern; names both.
    """
    config = fill(name, {})
    for field in sorted({f for own in layers.values() for f in own}):
        values = {m: own.get(field, config.get(field)) for m, own in layers.items()}
        usual = Counter(map(repr, values.values())).most_common(1)[0][0]
        config[field] = next(v for v in values.values() if repr(v) == usual)
        odd = {m: v for m, v in values.items() if repr(v) != usual}
        if odd and field == "feedforward_modules":
            config[field] = sorted(m for m, value in values.items() if value)
        elif odd:
            config[_pattern(name, field, odd)] = {
                f"^{re.escape(m)}$": v for m, v in odd.items()
            }
    names = sorted(layers)
    config |= {"target_modules": names, **said, "peft_version": VERSION}
    if any(targeted(config | {"modules_to_save": None}, m) for m in others):
        config["target_modules"] = "|".join(map(re.escape, names))
    return json.dumps(config, indent=2, sort_keys=True).encode()


def said_dropout(name: str, rate: float) -> Config:
    """The fields that say a rate of dropout; raises where the type has none."""
    fields = sorted(_dropouts(name))
    if rate and not fields:
        raise ValueError(f"PEFT's {name} has no dropout of an adapter's input: {rate}")
    return dict.fromkeys(fields, rate)


def _pattern(name: str, field: str, odd: Mapping[str, Any]) -> str:
    """The field that holds what differs by layer."""
    for pattern, fields in _PATTERNS.items():
        if field in fields and pattern in DEFAULTS[name]:
            return pattern
    module, value = next(iter(odd.items()))
    raise ValueError(
        f"{module!r} has {field}={value!r}, unlike other layers, and PEFT's {name} has "
        "one for all"
    )


def _among(names: Any, module: str) -> bool:
    """Is a module named: a regex that it is, or a list with its end?"""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names or ())


def _index(config: Config, module: str) -> int | None:
    """The number of the layer that a module is in."""
    patterns = config.get("layers_pattern") or ()
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = [re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", module) for p in patterns]
    if not patterns:
        found = [re.match(r".*?\.[^.]*\.(\d+)\.", module)]
    return next((int(m[1]) for m in found if m is not None), None)


def _dropouts(name: str) -> set[str]:
    """The fields that drop an adapter's input, and so are ours to hold any value."""
    inner = {"rank_dropout", "module_dropout"}
    return {f for f in DEFAULTS[name] if f.endswith("_dropout") and f not in inner}


def _alike(value: Any, default: Any) -> bool:
    """Is a value the default, or as empty as it?"""
    return value == default or (not value and not default)
