"""The merges of PEFT 0.21.2's merge_utils, through the keywords that reproduce them."""

import functools as ft
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import merge
from jaxlab.merge import _drop

GOLDEN = np.load(Path(__file__).with_name("peft.npz"))
ABOUT = json.loads(str(GOLDEN["about"]))
W = {"weights": GOLDEN["weights"]}
D = {"density": ABOUT["density"]}
KEY = {"key": jax.random.key(0)}
FREQUENCY = {"consensus": "majority"}


def magnitude_prune(deltas):
    trimmed = merge.trim(deltas, **D, per="leaf")
    return merge.task_arithmetic(trimmed, **W)


OURS = {
    "task_arithmetic": ft.partial(merge.task_arithmetic, **W),
    "magnitude_prune": magnitude_prune,
    "ties": ft.partial(merge.ties, **W, **D, per="leaf"),
    "ties/frequency": ft.partial(merge.ties, **W, **D, per="leaf", **FREQUENCY),
    "dare_linear": ft.partial(merge.dare_linear, **W, **D, **KEY),
    "dare_ties": ft.partial(merge.dare_ties, **W, **D, **KEY),
    "dare_ties/frequency": ft.partial(merge.dare_ties, **W, **D, **KEY, **FREQUENCY),
}


@pytest.mark.parametrize("name", ABOUT["names"])
def test_agrees(name, monkeypatch):
    def stored(path, key, shape):
        del path, key
        return jnp.stack([GOLDEN[f"u/{name}/{j}"] for j in range(shape[0])])

    monkeypatch.setattr(_drop, "_uniform", stored)
    deltas = {"w": jnp.stack([GOLDEN[f"in/{i}"] for i in range(3)])}
    got, want = OURS[name](deltas)["w"], GOLDEN[f"out/{name}"]
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())


def test_the_peers_differ():
    """TIES of mergekit and of PEFT: same arguments, other numbers."""
    deltas = {"w": jnp.stack([GOLDEN[f"in/{i}"] for i in range(3)])}
    call = ft.partial(merge.ties, deltas, **W, **D, per="leaf")
    theirs, ours = call(consensus="weighted_mean")["w"], call()["w"]
    assert jnp.linalg.norm(theirs - ours) > 0.5 * jnp.linalg.norm(ours)
