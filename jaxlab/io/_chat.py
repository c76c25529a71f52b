"""Chat templates: Jinja text, one of five known formats, or what most inputs use."""

from collections import Counter
from collections.abc import Mapping, Sequence
import json
from typing import Any

from ._checkpoint import Checkpoint
from ._json import read_object

_TURNS = "{% for m in messages %}"
_END = "{% endfor %}"
_PROMPT = "{% if add_generation_prompt %}"

TEMPLATES = {
    "alpaca": (
        _TURNS
        + "{% if m['role'] == 'system' %}{{ m['content'] + '\\n\\n' }}"
        + "{% elif m['role'] == 'user' %}"
        + "{{ '### Instruction:\\n' + m['content'] + '\\n\\n' }}"
        + "{% else %}{{ '### Response:\\n' + m['content'] + eos_token + '\\n\\n' }}"
        + "{% endif %}"
        + _END
        + _PROMPT
        + "{{ '### Response:\\n' }}{% endif %}"
    ),
    "chatml": (
        _TURNS
        + "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
        + _END
        + _PROMPT
        + "{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "exaone": (
        _TURNS
        + "{{ '[|' + m['role'] + '|]' + m['content'] }}"
        + "{{ '\\n' if m['role'] == 'user' else '[|endofturn|]\\n' }}"
        + _END
        + _PROMPT
        + "{{ '[|assistant|]' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}"
        + _TURNS
        + "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
        + "{{ m['content'] | trim + '<|eot_id|>' }}"
        + _END
        + _PROMPT
        + "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}"
        + _TURNS
        + "{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
        + "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}"
        + _END
    ),
}


def chosen(
    wanted: str, models: Mapping[str, Checkpoint], inputs: Sequence[str]
) -> str | None:
    """The template that a recipe asks for; None where auto finds none."""
    if wanted == "auto":
        found = [t.strip() for n in inputs if (t := template(models[n]))]
        return Counter(found).most_common(1)[0][0] if found else None
    if wanted in TEMPLATES:
        return TEMPLATES[wanted]
    if len(wanted) < 20 or "{" not in wanted:
        raise ValueError(
            f"chat_template {wanted!r} is no Jinja template, nor auto, nor one of "
            f"{', '.join(TEMPLATES)}"
        )
    return wanted


def template(checkpoint: Checkpoint) -> str | None:
    """The chat template of a model folder."""
    files = {path.name: path for path in checkpoint.carried}
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].read_text("utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if name not in files:
            continue
        found: Any = read_object(files[name]).get("chat_template")
        if isinstance(found, list):
            named = {t.get("name"): t.get("template") for t in found}
            found = named.get("default")
        if isinstance(found, str) and found:
            return found
    return None


def stored(text: str, donor: Checkpoint, config: bytes | None) -> dict[str, bytes]:
    """The files that hold a template: where the donor has its own, in the config else.

    `config` is tokenizer_config.json where it is rewritten anyway.
    """
    files = {path.name: path for path in donor.carried}
    if "chat_template.jinja" in files:
        return {"chat_template.jinja": text.encode()}
    if config is not None:
        content = json.loads(config)
    elif "tokenizer_config.json" in files:
        content = read_object(files["tokenizer_config.json"])
    else:
        raise ValueError(
            f"{donor.path}: a chat template needs a tokenizer_config.json to be in"
        )
    content["chat_template"] = text
    data = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    return {"tokenizer_config.json": data.encode()}
