"""Tiny random model folders that mergekit and jaxlab both read, the same everywhere."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

WIDTH, INNER, ROWS, LAYERS = 6, 10, 24, 3


def _llama(layers, rows, tied):
    shapes = {"model.embed_tokens.weight": (rows, WIDTH), "model.norm.weight": (WIDTH,)}
    if not tied:
        shapes["lm_head.weight"] = (rows, WIDTH)
    for i in range(layers):
        at = f"model.layers.{i}"
        for name in ("q", "k", "v", "o"):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (WIDTH, WIDTH)
        for name in ("up", "gate"):
            shapes[f"{at}.mlp.{name}_proj.weight"] = (INNER, WIDTH)
        shapes[f"{at}.mlp.down_proj.weight"] = (WIDTH, INNER)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}.{name}.weight"] = (WIDTH,)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": layers,
        "vocab_size": rows,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
    }
    return shapes, config


def _gpt2(layers, rows):
    shapes = {
        "transformer.wte.weight": (rows, WIDTH),
        "transformer.wpe.weight": (6, WIDTH),
        "transformer.ln_f.weight": (WIDTH,),
        "transformer.ln_f.bias": (WIDTH,),
    }
    for i in range(layers):
        at = f"transformer.h.{i}"
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            shapes[f"{at}.{name}.weight"] = (WIDTH, WIDTH)
            shapes[f"{at}.{name}.bias"] = (WIDTH,)
        for name in ("ln_1", "ln_2"):
            shapes[f"{at}.{name}.weight"] = shapes[f"{at}.{name}.bias"] = (WIDTH,)
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": WIDTH,
        "n_head": 2,
        "n_layer": layers,
        "n_positions": 6,
        "vocab_size": rows,
    }
    return shapes, config


def _t5(layers, rows):
    shapes = {"shared.weight": (rows, WIDTH), "lm_head.weight": (rows, WIDTH)}
    for part in ("encoder", "decoder"):
        shapes[f"{part}.final_layer_norm.weight"] = (WIDTH,)
        for i in range(layers):
            at = f"{part}.block.{i}.layer"
            blocks = [(0, "SelfAttention")]
            blocks += [(1, "EncDecAttention")] if part == "decoder" else []
            for j, name in blocks:
                for w in "qkvo":
                    shapes[f"{at}.{j}.{name}.{w}.weight"] = (WIDTH, WIDTH)
            last = len(blocks)
            for w in ("wi_0", "wi_1", "wo"):
                shapes[f"{at}.{last}.DenseReluDense.{w}.weight"] = (WIDTH, WIDTH)
            for j in range(last + 1):
                shapes[f"{at}.{j}.layer_norm.weight"] = (WIDTH,)
        first = f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        shapes[first] = (4, 2)
    config = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "d_model": WIDTH,
        "num_heads": 2,
        "num_layers": layers,
        "num_decoder_layers": layers,
        "vocab_size": rows,
        "is_encoder_decoder": True,
    }
    return shapes, config


def _tokenizer(words, added):
    vocab = {w: i for i, w in enumerate(words)}
    entries = []
    for name in added:
        at = vocab.get(
            name, len(words) + sum(a["content"] not in vocab for a in entries)
        )
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        entries.append({"id": at, "content": name, **flags, "special": True})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": entries,
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }


WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(17))]  # 20 tokens, 24 rows
TOKENIZERS = {
    "z": (WORDS, ["<unk>", "<s>", "</s>"]),
    "a": (["<unk>", "</s>", "<s>", *WORDS[:2:-1]], ["<unk>", "<s>", "</s>", "<a>"]),
    "b": ([*WORDS[:18], "only_b", "both"], ["<unk>", "<s>", "</s>", "<b>"]),
    "c": ([*WORDS[:3], "both", *WORDS[3:15]], ["<unk>", "<s>", "</s>"]),
}
MODELS = {  # name: (architecture, layers, seed, tokenizer)
    "z": ("llama", LAYERS, 0, None),
    "a": ("llama", LAYERS, 1, None),
    "b": ("llama", LAYERS, 2, None),
    "c": ("llama", LAYERS, 3, None),
    "tied": ("tied", LAYERS, 4, None),
    "vz": ("llama", LAYERS, 5, "z"),
    "va": ("llama", LAYERS, 6, "a"),
    "vb": ("llama", LAYERS, 7, "b"),
    "vc": ("llama", LAYERS, 8, "c"),
    "gz": ("gpt2", LAYERS, 9, None),
    "ga": ("gpt2", LAYERS, 10, None),
    "tz": ("t5", 2, 11, None),
    "ta": ("t5", 2, 12, None),
    "tb": ("t5", 2, 13, None),
}


def write(folder: Path, name: str, dtype="float32") -> Path:
    """Writes one of `MODELS` into `folder/name`."""
    kind, layers, seed, words = MODELS[name]
    make = {"llama": _llama, "tied": _llama, "gpt2": _gpt2, "t5": _t5}[kind]
    tied = {"tied": kind == "tied"} if make is _llama else {}
    shapes, config = make(layers, ROWS, **tied)
    shared = np.random.default_rng([99, *kind.replace("tied", "llama").encode()])
    own = np.random.default_rng(seed)
    draw = lambda rng, shape: rng.standard_normal(shape).astype(np.float32)
    tensors = {}
    for key, shape in sorted(shapes.items()):
        common = np.random.default_rng([*shared.integers(1, 9, 1), *key.encode()])
        tensors[key] = draw(common, shape) + np.float32(0.3) * draw(own, shape)
        tensors[key] = tensors[key].astype(dtype)
    path = folder / name
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, indent=2))
    if words is not None:
        content = json.dumps(_tokenizer(*TOKENIZERS[words]), indent=2)
        (path / "tokenizer.json").write_text(content)
        about = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "chat_template": "{{ '" + ("two" if words in "bc" else "one") + "' }}",
        }
        (path / "tokenizer_config.json").write_text(json.dumps(about, indent=2))
    return path
