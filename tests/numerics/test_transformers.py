"""Our forwards on the files of transformers 5.23.0's models, tiny and real."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import io, nn

GOLDEN = np.load(Path(__file__).with_name("transformers.npz"))
NAMES = json.loads(str(GOLDEN["about"]))["names"]
INPUTS = ("input_ids", "pixel_values", "attention_mask", "token_type_ids")
# transformers takes RMS norms and rotary angles in float32 whatever the weights are.
SINGLE = ("llama", "mistral", "qwen")


def config(name):
    return json.loads(str(GOLDEN[f"{name}/config"]))


def weights(name):
    """The state dict of a case, by dotted name."""
    layout, flat = json.loads(str(GOLDEN[f"{name}/layout"])), GOLDEN[f"{name}/w"]
    ends = np.cumsum([int(np.prod(shape)) for shape in layout.values()])
    parts = np.split(flat, ends[:-1])
    return {n: x.reshape(s) for (n, s), x in zip(layout.items(), parts, strict=True)}


def inputs(name):
    found = [f"{name}/in/{x}" for x in INPUTS]
    return [jnp.asarray(GOLDEN[x]) for x in found if x in GOLDEN.files]


@pytest.mark.parametrize("name", NAMES)
def test_agrees(name):
    """In float64, on every position that is not padding."""
    with jax.enable_x64(True):
        params = {k: jnp.asarray(v, jnp.float64) for k, v in weights(name).items()}
        found = jax.jit(nn.from_config(config(name)))(params, *inputs(name))
    real = np.ones((2, 7), bool)
    if f"{name}/in/attention_mask" in GOLDEN.files:
        real = GOLDEN[f"{name}/in/attention_mask"] != 0
    found = found if isinstance(found, tuple) else (found,)
    wanted = [GOLDEN[k] for k in GOLDEN.files if k.startswith(f"{name}/out/")]
    tolerance = 2e-6 if name.startswith(SINGLE) else 1e-12
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == jnp.float64
        got, want = (x[real] if x.shape[:2] == (2, 7) else x for x in (got, want))
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_the_model(name, tmp_path):
    """What `io.load` reads is the params: names, nesting and layout as they are."""
    io.save(tmp_path / "m", weights(name))
    (tmp_path / "m" / "config.json").write_text(str(GOLDEN[f"{name}/config"]))
    params = io.load(tmp_path / "m")
    listed = {n: s.shape for n, s in nn.shapes(config(name)).items()}
    held = {n: x.shape for n, x in weights(name).items() if "pooler.dense" not in n}
    assert {n: s for n, s in listed.items() if "pooler.dense" not in n} == held
    out = jax.eval_shape(nn.from_config(tmp_path / "m"), params, *inputs(name))
    want = [GOLDEN[k].shape for k in GOLDEN.files if k.startswith(f"{name}/out/")]
    assert [x.shape for x in jax.tree.leaves(out)] == want


def test_the_real_minilm_agrees(minilm):
    golden = np.load(Path(__file__).with_name("minilm.npz"))
    params = io.load(minilm)
    tokens, mask = (jnp.asarray(golden[f"in/{name}"]) for name in INPUTS[::2])
    hidden, pooled = jax.jit(nn.from_config(minilm))(params, tokens, mask)
    real = golden["in/attention_mask"] != 0
    want = golden["hidden"][real]
    np.testing.assert_allclose(hidden[..., :16][real], want, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(pooled, golden["pooled"], rtol=1e-4, atol=2e-6)
