"""What mergekit-yaml 0.1.5 makes of tiny folders, for tests/test_mergekit_yaml.py.

In an environment of its own (torch 2.13.0, then mergekit 0.1.5), from the repository:
  HF_HUB_OFFLINE=1 python tests/numerics/make/mergekit_folders.py \
    tests/numerics/mergekit_folders.npz

The inputs are those of tests/corpus/tiny_models.py, the recipes those of
tests/corpus/mergekit_recipes.py. Contents of the file:
  <recipe>/<tensor>    what mergekit wrote
  about                json: generator, version, recipes, and by recipe the config.json,
                       the vocabulary and the chat template that it wrote
"""

from importlib.metadata import version
import json
import os
from pathlib import Path
import sys
import tempfile

from mergekit.scripts.run_yaml import main as mergekit_yaml
import numpy as np
from safetensors.numpy import load_file
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))
from corpus import mergekit_recipes, tiny_models


def merge(folder, name, text):
    """Runs mergekit-yaml on one recipe; returns the tensors and what else matters."""
    recipe, out = folder / f"{name}.yaml", folder / f"out_{name}"
    recipe.write_text(text)
    command = [str(recipe), str(out), "--quiet", "--no-write-model-card"]
    mergekit_yaml(command, standalone_mode=False)
    tensors = {}
    for shard in sorted(out.glob("*.safetensors")):
        tensors |= load_file(shard)
    facts = {"config": json.loads((out / "config.json").read_text())}
    if (out / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(out)
        facts["vocabulary"] = tokenizer.get_vocab()
        facts["added"] = {
            str(i): [t.content, t.special]
            for i, t in tokenizer.added_tokens_decoder.items()
        }
        facts["template"] = tokenizer.chat_template
    return tensors, facts


def main(target):
    arrays, facts = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.chdir(folder)  # the recipes name the models by folder
        for name in tiny_models.MODELS:
            tiny_models.write(folder, name)
        for name, text in mergekit_recipes.RECIPES.items():
            tensors, facts[name] = merge(folder, name, text)
            arrays |= {f"{name}/{key}": value for key, value in tensors.items()}
            print(name, len(tensors))
    about = {
        "generator": "tests/numerics/make/mergekit_folders.py",
        "mergekit": version("mergekit"),
        "transformers": version("transformers"),
        "facts": facts,
    }
    np.savez_compressed(target, about=json.dumps(about), **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
