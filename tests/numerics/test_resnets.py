"""The released CIFAR ResNets: our logits against torch's, in float64."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import nn

GOLDEN = np.load(Path(__file__).with_name("resnets.npz"))
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
FILES = {
    "resnet20": ("resnet20-12fca82f", nn.resnet20),
    "A": ("A_pretrained_HEAD", nn.resnet8),
    "C": ("C_trained_2025", nn.resnet8),
}


@pytest.mark.parametrize("name", FILES)
def test_agrees(name, data):
    file, apply = FILES[name]
    weights = dict(np.load(data / "weights" / f"{file}.npz"))
    with jax.enable_x64(True):
        params = {k: jnp.asarray(v, jnp.float64) for k, v in weights.items()}
        images = GOLDEN["images"].astype(np.float64)
        if name == "resnet20":
            # The scale of the golden file is in float32.
            mean, std = (
                np.array(v, np.float32).astype(np.float64) for v in (MEAN, STD)
            )
            images = (images / 255 - mean) / std
        got = jax.jit(apply)(params, jnp.asarray(images))
    np.testing.assert_allclose(got, GOLDEN[name], rtol=1e-12, atol=1e-12)


def test_agrees_from_a_file_in_float32(data):
    from jaxlab import io

    params = io.load(data / "weights" / "A_pretrained_HEAD.npz")
    got = nn.resnet8(params, GOLDEN["images"].astype(np.float32))
    np.testing.assert_allclose(got, GOLDEN["A"], rtol=2e-5, atol=2e-5)
