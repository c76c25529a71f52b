"""The files beside the tensors: config.json, tokenizer and chat template, as edited."""

from collections.abc import Mapping
import copy
import json
from typing import Any, NamedTuple

from . import _chat, _form
from ._checkpoint import Checkpoint
from ._layers import count_keys, read_key, stacks
from ._vocabulary import Vocabulary

# Lists in config.json with one entry per layer.
_BY_LAYER = (
    "layer_types",
    "layers_block_type",
    "mlp_layer_types",
    "no_rope_layers",
    "sliding_window_pattern_layers",
    "attention_layers",
)


class Files(NamedTuple):
    """Which files are written, which carried ones are not copied, and the config."""

    written: Mapping[str, bytes]
    left_out: frozenset[str]
    notes: tuple[str, ...]
    config: Mapping[str, Any] | None


def files(
    form: _form.Merge,
    models: Mapping[str, Checkpoint],
    like: str,
    layers: Mapping[str, tuple[int, ...]],
    words: Vocabulary | None,
) -> Files:
    """Every file that differs from those of the model whose files are carried.

    `layers` says, by stack, which layers of the first input a new stack is made of.
    """
    donor = models[like]
    written: dict[str, bytes] = dict(words.tokens.files) if words else {}
    notes: list[str] = list(words.tokens.notes) if words else []
    left = words.tokens.left_out if words else frozenset()
    config = None if donor.config is None else _config(form, donor, layers, words)
    if config is not None and config != donor.config:
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        written["config.json"] = text.encode()
    if config is None and (layers or words):
        notes.append(f"{like} has no config.json to tell of the new sizes")
    if form.chat_template is not None:
        inputs = _form.references(form._replace(tokenizer=None))
        template = _chat.chosen(form.chat_template, models, inputs)
        if template is None:
            notes.append("no input has a chat template: none is set")
        else:
            old = written.get("tokenizer_config.json")
            written |= _chat.stored(template, donor, old)
    return Files(written, left, tuple(notes), config)


def _config(
    form: _form.Merge,
    donor: Checkpoint,
    layers: Mapping[str, tuple[int, ...]],
    words: Vocabulary | None,
) -> dict[str, Any]:
    """The config of the result: dtype, layer counts, vocabulary size."""
    config: dict[str, Any] = copy.deepcopy(dict(donor.config or {}))
    stored = form.out_dtype or form.dtype
    if stored is not None:
        config["dtype" if "dtype" in config else "torch_dtype"] = stored.name
    found = stacks(donor.tensors)
    for stack, made_of in layers.items():
        for path in count_keys(config, stack, found):
            if read_key(config, path) == found.get(stack):
                part = read_key(config, path[:-1])
                part[path[-1]] = len(made_of)
                _by_layer(part, found[stack], made_of)
    if words is not None:
        inner = config.get("text_config")
        nested = "vocab_size" not in config and isinstance(inner, dict)
        (inner if nested and inner else config)["vocab_size"] = words.rows
    return config


def _by_layer(part: dict[str, Any], count: int, made_of: tuple[int, ...]) -> None:
    """Lists of one entry per layer go with the layers."""
    for key in _BY_LAYER:
        values = part.get(key)
        if isinstance(values, list) and len(values) == count:
            part[key] = [values[i] for i in made_of if i < count]
