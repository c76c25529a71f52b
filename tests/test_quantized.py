"""Bases in few bits under adapters, against their dequantized selves."""

import functools as ft

from adapters import MATRICES, everything, moved
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import lowrank, rewrite

pytest.importorskip("qwix", reason="the extra `quantize` is not installed")
jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
LORA, KEY = lowrank.lora(rank=2), jax.random.key(0)
WHERE = lambda path, _: path in MATRICES


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("qtype", "most"), [("int8", 0.005), ("nf4", 0.11), ("int4", 0.1)]
)
def test_every_form_of_leaf_is_quantized_along_what_it_contracts(qtype, most):
    apply, params, inputs = everything()
    small = lowrank.quantize(apply, params, *inputs, where=WHERE, qtype=qtype, block=4)
    plain = lowrank.dequantize(small)
    jax.tree.map(lambda a, b: (a.shape == b.shape, a.dtype == b.dtype), plain, params)
    uses = rewrite.uses(apply, params, *inputs)
    for path in MATRICES:
        w, q = (
            ft.reduce(lambda t, k: t[k], path.split("/"), t) for t in (params, small)
        )
        matrix = rewrite.as_matrix(w, uses[path][0])
        assert q.q.qvalue.shape == matrix.shape
        assert q.q.scale.shape == (
            *matrix.shape[:-2],
            matrix.shape[-2] // 4,
            matrix.shape[-1],
        )
        blocks = np.abs(matrix).reshape(*matrix.shape[:-2], -1, 4, matrix.shape[-1])
        error = np.abs(q.matrix - matrix).reshape(blocks.shape)
        assert (error <= most * 1.5 * blocks.max(-2, keepdims=True)).all()
        assert error.max() > 0
    close(plain["dense"]["bias"], params["dense"]["bias"], 0)


def test_adapters_on_a_quantized_base_and_plain_quantized_leaves_beside():
    """Every matrix quantized, half of them adapted: as on the dequantized base."""
    apply, params, inputs = everything()
    small = lowrank.quantize(apply, params, *inputs, where=WHERE, qtype="nf4", block=4)
    plain = lowrank.dequantize(small)
    for chosen in (MATRICES[::2], MATRICES[1::2]):
        where = lambda path, _, chosen=chosen: path in chosen
        adapted, state = lowrank.attach(
            apply, small, LORA, *inputs, where=where, key=KEY
        )
        state = state.replace(
            leaves={p: moved(LORA, s) for p, s in state.leaves.items()}
        )
        got = jit(adapted)(small, state, *inputs)
        other, _ = lowrank.attach(apply, plain, LORA, *inputs, where=where, key=KEY)
        folded = lowrank.fold(small, state)
        close(got, jit(apply)(folded, *inputs), 2e-5)
        close(got, jit(other)(plain, other_state(other, state), *inputs), 2e-5)
        loss = lambda s, run=adapted: jnp.sum(run(small, s, *inputs) ** 2)
        slopes = jit(jax.grad(loss))(state)
        assert all(np.isfinite(v).all() for v in jax.tree.leaves(slopes))


def other_state(adapted, state):
    return state.replace(spec=adapted.spec)


def test_one_layer_of_a_scan_is_dequantized_at_a_time():
    """No array of all layers in float comes to be in the program."""
    apply, params, inputs = everything()
    small = lowrank.quantize(
        apply, params, *inputs, where="layers/kernel", qtype="int8", block=4
    )
    adapted, state = lowrank.attach(
        apply, small, LORA, *inputs, where="layers/kernel", key=KEY
    )
    jaxpr = jax.make_jaxpr(adapted)(small, state, *inputs)
    made = [v.aval for e in jaxpr.jaxpr.eqns for v in e.outvars]
    stacked = [a for a in made if a.shape == (3, 8, 8) and a.dtype == jnp.float32]
    assert len(stacked) <= 1  # the zeros in the leaf's place, which nothing reads


def test_loftq_starts_closer_than_quantization_alone():
    apply, params, inputs = everything()
    options = {"where": WHERE, "qtype": "nf4", "block": 4}
    want = apply(params, *inputs)
    small = lowrank.quantize(apply, params, *inputs, **options)
    plain = float(jnp.linalg.norm(apply(lowrank.dequantize(small), *inputs) - want))
    errors = []
    for rank, iterations in ((2, 1), (4, 1), (4, 4), (8, 1)):
        base, adapted, state = lowrank.loftq(
            apply,
            params,
            *inputs,
            key=KEY,
            rank=rank,
            alpha=3,
            iterations=iterations,
            **options,
        )
        errors.append(float(jnp.linalg.norm(adapted(base, state, *inputs) - want)))
        one = lowrank.fold(base, state)["dense"]["kernel"] - params["dense"]["kernel"]
        lost = base["dense"]["kernel"].dequantized() - params["dense"]["kernel"]
        if iterations == 1:  # Eckart-Young: what is left is the tail of the spectrum
            tail = np.linalg.svd(np.asarray(lost), compute_uv=False)[rank:]
            close(np.linalg.norm(one), np.linalg.norm(tail), 1e-4)
    assert errors[0] < plain
    assert errors[1] < errors[0]
    assert errors[3] < 1e-4 * plain  # rank 8 is full


def test_bad_input_is_named():
    apply, params, inputs = everything()
    with pytest.raises(ValueError, match="chooses no leaf"):
        lowrank.quantize(apply, params, *inputs, where="nothing")
    with pytest.raises(ValueError, match="'dense/bias' is in no matrix product"):
        lowrank.quantize(apply, params, *inputs, where="dense/bias")
    with pytest.raises(ValueError, match="iterations must be at least 1"):
        lowrank.loftq(
            apply, params, *inputs, where=WHERE, key=KEY, rank=1, iterations=0
        )


def test_a_dimension_that_no_block_divides_takes_its_largest_divisor():
    apply = lambda p, x: x @ p
    w, x = jax.random.normal(KEY, (10, 3)), jnp.ones((1, 10))
    q = lowrank.quantize(apply, w, x, where="**", qtype="int8", block=4)
    assert q.q.scale.shape == (5, 3)
    assert isinstance(q, lowrank.Quantized)
