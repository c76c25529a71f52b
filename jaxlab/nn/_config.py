"""A Hugging Face config.json read strictly: what we do not know is an error."""

from collections.abc import Collection, Mapping
import json
from pathlib import Path
from typing import Any

Config = Mapping[str, Any]

# Training, generation and bookkeeping: none of these changes what a forward computes.
_BESIDE = frozenset(
    """_name_or_path architectures model_type transformers_version torch_dtype dtype
    use_cache initializer_range attention_dropout attention_probs_dropout_prob
    hidden_dropout_prob classifier_dropout bos_token_id eos_token_id sep_token_id
    cls_token_id mask_token_id unk_token_id pad_token_id gradient_checkpointing
    pretraining_tp output_attentions output_hidden_states return_dict torchscript
    chunk_size_feed_forward problem_type finetuning_task task_specific_params
    tokenizer_class model_max_length max_position_embeddings encoder_stride
    attn_implementation _attn_implementation _attn_implementation_autoset id2label
    label2id num_labels output_past directionality pooler_fc_size pooler_type
    pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head""".split()
)

# Known, and done for one value alone.
_FIXED = {
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "partial_rotary_factor": (1.0, None),
    "position_embedding_type": ("absolute", None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "tie_encoder_decoder": (False,),
}


def load(config: Config | str | Path) -> Config:
    """A config as a mapping: itself, or the config.json of a folder or file."""
    if isinstance(config, Mapping):
        return config
    path = Path(config)
    path = path / "config.json" if path.is_dir() else path
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def read(config: Config, sizes: Collection[str], known: Config) -> dict[str, Any]:
    """The fields that a family uses: `sizes` are due, the others have defaults.

    Raises:
      ValueError: a field is missing, no size, unknown, or has a value that the family
        does not do; names the field.
    """
    kind = config.get("model_type")
    for name in sizes:
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"config ({kind}): {name!r} must be a size, got {value!r}")
    for name, value in config.items():
        if name in sizes or name in known or name in _BESIDE:
            continue
        if name not in _FIXED:
            raise ValueError(f"config ({kind}): the field {name!r} is not known here")
        if value not in _FIXED[name]:
            raise refused(config, name)
    return {**known, **{k: config[k] for k in (*sizes, *known) if k in config}}


def refused(config: Config, name: str) -> ValueError:
    """The error for a value that the family does not do."""
    kind, value = config.get("model_type"), config.get(name)
    return ValueError(f"config ({kind}): {name!r} = {value!r} is not supported")


def architecture(config: Config, known: Collection[str]) -> str:
    """The head that a checkpoint has, by the one name in `architectures`."""
    found = config.get("architectures")
    if not isinstance(found, list) or len(found) != 1 or found[0] not in known:
        raise ValueError(
            f"config ({config.get('model_type')}): 'architectures' must be one of "
            f"{sorted(known)}, got {found!r}"
        )
    return found[0]


def labels(config: Config) -> int:
    """How many classes a head has."""
    named = config.get("id2label")
    return len(named) if named else int(config.get("num_labels") or 2)


def evenly(config: Config, whole: str, parts: str) -> int:
    """One size over another, which has to divide it."""
    if config[whole] % config[parts]:
        raise ValueError(
            f"config: {parts!r} = {config[parts]} does not divide {whole!r} = "
            f"{config[whole]}"
        )
    return config[whole] // config[parts]
