"""What samplers ask of samples, of conditions and of predictions."""

from typing import Any

import jax
import jax.numpy as jnp


def check_floating(x: Any) -> None:
    """Samples are floating-point."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating-point, got {x.dtype}")


def check_cond(cond: Any, x: Any) -> None:
    """Every leaf of a condition is of as many samples."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(cond):
        if jnp.shape(leaf)[:1] != x.shape[:1]:
            raise ValueError(
                f"cond{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}; its "
                f"first axis must be the {len(x)} samples"
            )


def check_prediction(x0: Any, x: Any) -> None:
    """A prediction is of the sample's shape and dtype."""
    got, want = jax.typeof(x0), jax.typeof(x)
    if (got.shape, got.dtype) != (want.shape, want.dtype):
        raise ValueError(
            f"the denoiser gave {got.str_short()} for a sample {want.str_short()}"
        )
