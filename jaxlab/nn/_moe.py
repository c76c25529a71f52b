"""The Flax NNX layer of Experts Weights Averaging."""

from collections.abc import Callable

from flax import nnx
from jaxtyping import Array, Float

from ._experts import partition_experts, to_ffn


class RandomPartitionMoE(nnx.Module):
    """A feed-forward network as experts that share the tokens by random partition.

    Its weights are those of the network, stacked: paths stay, an axis 0 comes. Called
    with an `rngs` stream "partition" it deals the tokens; without, as in evaluation, it
    runs the mean expert on all of them.
    """

    def __init__(
        self, make: Callable[[nnx.Rngs], nnx.Module], experts: int, *, rngs: nnx.Rngs
    ):
        """Makes `experts` networks, each by `make(rngs)` with its own draws."""
        self.experts = nnx.vmap(make)(rngs.split(experts))

    def __call__(
        self, x: Float[Array, "*b n"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "*b m"]:
        """`[*b, n]` tokens to `[*b, m]`."""
        graph, state = nnx.split(self.experts)
        expert = lambda params, tokens: nnx.merge(graph, params)(tokens)
        if rngs is None:
            return expert(to_ffn(state, where=lambda *_: True), x)
        return partition_experts(expert, state, x, key=rngs.partition())
