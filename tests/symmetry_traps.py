"""Small functions that mislead: each with the groups that are true of it.

`params` are shapes; a group reads `size: members [per names]`, groups by semicolons.
"""

from typing import NamedTuple

import jax
from jax import nn
import jax.numpy as jnp
import numpy as np

SEED = 11
RNG = np.random.default_rng(SEED)


class Trap(NamedTuple):
    apply: object
    params: dict
    inputs: tuple
    groups: str = ""


def normal(*shape):
    return RNG.normal(size=shape)


def weights(shapes):
    return {name: normal(*shape) for name, shape in shapes.items()}


def one_layer(between, **more):
    """x @ a, something between, @ b."""
    return lambda p, x: between(p, nn.relu(x @ p["a"])) @ p["b"]


def conv(x, w, stride=1, groups=1):
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )  # fmt: skip


def attention(change=lambda p, q, k: (q, k), bias=lambda p, s: s):
    def apply(p, x):
        q, k, v = (jnp.einsum("btr,rhd->bthd", x, p[n]) for n in "qkv")
        q, k = change(p, q, k)
        scores = bias(p, jnp.einsum("bthd,bshd->bhts", q, k))
        return jnp.einsum("bhts,bshd,hdr->btr", nn.softmax(scores, -1), v, p["o"])

    return apply


QKVO = {"q": (5, 3, 4), "k": (5, 3, 4), "v": (5, 3, 4), "o": (3, 4, 6)}
HEADS, QK, V = "3: k:1 o:0 q:1 v:1", "4: k:2 q:2 [k:1]", "4: o:1 v:2 [k:1]"
ANGLE = np.arange(7.0)[:, None] * np.array([1.0, 0.3])


def turn(x, interleaved):
    cos, sin = (jnp.asarray(f(ANGLE), x.dtype)[:, None] for f in (np.cos, np.sin))
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :2], x[..., 2:])
    if interleaved:
        return jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)
    return jnp.concatenate([a * cos, b], -1)


def both(turned):
    return lambda p, q, k: (turned(q), turned(k))


def unit_norm(x, gain):
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * gain


def slopes(p, scores):
    place = jnp.arange(7, dtype=scores.dtype)
    gap = jnp.abs(place[:, None] - place[None])
    return scores - jnp.array([0.5, 0.25, 0.1], scores.dtype)[:, None, None] * gap[None]


def shuffled(x):
    return x.reshape(*x.shape[:-1], 2, 4).swapaxes(-1, -2).reshape(x.shape)


def blocks_of_pixels(p, x):
    y = conv(x, p["a"]).reshape(2, 6, 6, 2, 2, 4).transpose(0, 1, 3, 2, 4, 5)
    return conv(y.reshape(2, 12, 12, 4), p["b"])


def padded_shortcut(p, x):
    y = nn.relu(conv(x, p["a"]))
    wide = jnp.pad(y[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 2)))
    return nn.relu(wide + conv(y, p["b"], 2)).mean((1, 2)) @ p["c"]


def gathered_experts(p, x):
    gate, chosen = jax.lax.top_k(x @ p["router"], 2)
    h = jnp.tanh(jnp.einsum("br,bkrf->bkf", x, p["w1"][chosen]))
    return jnp.einsum("bk,bkf,bkfr->br", nn.softmax(gate), h, p["w2"][chosen])


def mismatched_experts(p, x):
    """Each token's hidden units are made by one expert and read by another."""
    _, chosen = jax.lax.top_k(x @ p["router"], 2)
    h = jnp.tanh(jnp.einsum("br,bkrf->bkf", x, p["w1"][chosen]))
    return jnp.einsum("bkf,bkfr->br", h, p["w2"][chosen[:, ::-1]])


def switch_in_a_scan(p, x):
    def token(_, x):
        e = jnp.argmax(x @ p["router"])
        return None, jnp.tanh(x @ p["w1"][e]) @ p["w2"][e]

    return jax.lax.scan(token, None, x)[1]


def maxout_twice(p, x):
    h = x @ p["a"]
    return (h.reshape(4, 3, 4).max(1).repeat(3, 1) + h).reshape(4, 4, 3).max(2) @ p["b"]


def train_mode_batch_norm(p, x):
    h = x @ p["a"]
    return (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-3) * p["g"] @ p["b"]


def fixed_point(p, x):
    step = lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"] + x @ p["a"]))
    start = 0, jnp.zeros((4, 6), x.dtype)
    return jax.lax.while_loop(lambda c: c[0] < 3, step, start)[1] @ p["b"]


def ensemble(p, x):
    return jax.vmap(lambda a, b: nn.relu(x @ a) @ b)(p["a"], p["b"])


def layers(p, x, mixed):
    h = jnp.tanh(jnp.einsum("bi,lif->lbf", x, p["a"]))
    return jnp.einsum("lbf,lfo->bo", mixed(h), p["b"])


def both_ways(p, x):
    h = nn.relu(x @ p["a"])
    return jnp.einsum("bi,bj->bij", h, h).reshape(4, 36) @ p["b"]


def scaled(p, x):
    """One gain per layer, broadcast over two unrelated sets of hidden units."""
    gain = jnp.broadcast_to(p["g"], (6,))
    return (nn.relu(x @ p["a"]) * gain) @ p["b"] + (jnp.tanh(x @ p["c"]) * gain) @ p[
        "d"
    ]


def between_its_own_blocks(p, x):
    """Maxima of pairs, some not read, of units that a matrix relates to each other."""
    h = x @ p["a"]
    h = jnp.einsum("bi,bj,ij->bj", h, h, p["w"])
    return h.reshape(4, 3, 2).max(2)[:, 1:] @ p["b"]


X, IMAGE, SEQ = (normal(4, 5),), (normal(2, 6, 6, 3),), (normal(2, 7, 5),)
AB = {"a": (5, 6), "b": (6, 3)}
MOE = {"router": (5, 4), "w1": (4, 5, 6), "w2": (4, 6, 5)}
STACK = {"a": (4, 5, 6), "b": (4, 6, 2)}
HIDDEN = "6: a:1 b:0"
flip = lambda h: h[:, ::-1]

TRAPS = {
    "gram matrix of hidden units": Trap(
        lambda p, x: (lambda h: h.T @ h)(jnp.tanh(x @ p["a"])) @ p["b"], AB, X),
    "gram matrix, then summed": Trap(
        lambda p, x: jnp.einsum("hf,gf->hg", p["a"], jnp.tanh(p["a"])).sum() * x,
        {"a": (5, 6)}, X, "5: a:0; 6: a:1"),
    "gram matrix between weights": Trap(
        lambda p, x: (p["c"] @ (p["a"] @ p["a"].T) @ p["d"]) * x,
        {"a": (5, 6), "c": (5,), "d": (5,)}, X, "5: a:0 c:0 d:0; 6: a:1"),
    "query and key norms share a gain": Trap(
        attention(lambda p, q, k: (unit_norm(q, p["g"]), unit_norm(k, p["g"]))),
        QKVO | {"g": (4,)}, SEQ, f"4: g:0 k:2 q:2; {HEADS}; {V}"),
    "slopes per head": Trap(
        attention(bias=slopes), QKVO, SEQ,
        "4: k:2 q:2 [pinned 3]; 4: o:1 v:2 [pinned 3]"),
    "learned bias per head": Trap(
        attention(bias=lambda p, s: s + p["r"]), QKVO | {"r": (3, 7, 7)}, SEQ,
        f"3: k:1 o:0 q:1 r:0 v:1; {QK}; {V}"),
    "interleaved rotary": Trap(
        attention(both(lambda x: turn(x, True))), QKVO, SEQ, f"{HEADS}; {V}"),
    "rotary on one half": Trap(
        attention(both(lambda x: turn(x, False))), QKVO, SEQ,
        f"{HEADS}; 2: k:2:@2+2 q:2:@2+2 [k:1]; {V}"),
    "channel shuffle": Trap(
        lambda p, x: conv(nn.relu(shuffled(conv(conv(x, p["a"]), p["b"], groups=2))),
                          p["c"]),
        {"a": (1, 1, 3, 8), "b": (3, 3, 4, 8), "c": (1, 1, 8, 3)}, IMAGE,
        "2: a:3:[2]x4 b:3:[2]x4 c:2:4x[2]; 4: a:3:2x[4] b:2 [a:3:[2]x4]; "
        "4: b:3:2x[4] c:2:[4]x2 [a:3:[2]x4]"),
    "pixel shuffle": Trap(
        blocks_of_pixels, {"a": (1, 1, 3, 16), "b": (1, 1, 4, 2)}, IMAGE,
        "4: a:3:2x2x[4] b:2"),
    "shortcut padded with zeros": Trap(
        padded_shortcut, {"a": (1, 1, 3, 4), "b": (1, 1, 4, 8), "c": (8, 3)}, IMAGE,
        "4: a:3 b:2 b:3:@2+4 c:0:@2+4; 2: b:3:@0+2 c:0:@0+2; 2: b:3:@6+2 c:0:@6+2"),
    "h beside h": Trap(
        one_layer(lambda p, h: jnp.concatenate([h, h], -1)), AB | {"b": (12, 3)}, X,
        "6: a:1 b:0:@0+6 b:0:@6+6"),
    "h beside -h": Trap(
        lambda p, x: (lambda h: nn.relu(jnp.concatenate([h, -h], -1)))(x @ p["a"])
        @ p["b"], AB | {"b": (12, 3)}, X, "6: a:1 b:0:@0+6 b:0:@6+6"),
    "wide and deep": Trap(
        lambda p, x: jnp.concatenate([x @ p["w"], nn.relu(x @ p["a"]) @ p["b"]], -1)
        @ p["c"], {"w": (5, 3), "a": (5, 6), "b": (6, 1), "c": (4, 1)}, X,
        "6: a:1 b:0; 3: c:0:@0+3 w:1"),
    "rolled channels": Trap(
        one_layer(lambda p, h: jnp.roll(h, 1, -1)), AB, X, "6: a:1 b:0:~1,2,3,4,5,0"),
    "running sum over channels": Trap(
        one_layer(lambda p, h: jnp.cumsum(h, -1)), AB, X),
    "sorted channels": Trap(one_layer(lambda p, h: jnp.sort(h, -1)), AB, X, "6: a:1"),
    "maxout in threes, then in fours": Trap(
        maxout_twice, {"a": (5, 12), "b": (4, 3)}, X),
    "products of pairs of channels": Trap(
        both_ways, {"a": (5, 6), "b": (36, 3)}, X, "6: a:1 b:0:[6]x6 b:0:6x[6]"),
    "a constant gain that counts": Trap(
        one_layer(lambda p, h: h * jnp.arange(6, dtype=h.dtype)), AB, X),
    "a constant mask": Trap(
        one_layer(lambda p, h: h * (jnp.arange(6) < 4)), AB, X,
        "4: a:1:@0+4 b:0:@0+4; 2: a:1:@4+2 b:0:@4+2"),
    "the identity added to a weight": Trap(
        lambda p, x: jnp.tanh(x @ p["a"]) @ (p["w"] + jnp.eye(6, dtype=x.dtype))
        @ p["b"], AB | {"w": (6, 6)}, X, "6: a:1 b:0 w:0 w:1"),
    "two experts of four, gathered": Trap(
        gathered_experts, MOE, X, "4: router:1 w1:0 w2:0; 6: w1:2 w2:1 [router:1]"),
    "an ensemble": Trap(ensemble, STACK, X, "6: a:2 b:1 [pinned 4]"),
    "batch norm in training": Trap(
        train_mode_batch_norm, AB | {"g": (6,)}, X, "6: a:1 b:0 g:0"),
    "flattened channels first": Trap(
        lambda p, x: nn.relu(conv(x, p["a"]).transpose(0, 3, 1, 2)).reshape(2, -1)
        @ p["b"], {"a": (3, 3, 3, 4), "b": (144, 3)}, IMAGE, "4: a:3 b:0:[4]x6x6"),
    "a branch on the data": Trap(
        lambda p, x: jax.lax.cond(x.sum() > 0, nn.relu, jnp.tanh, x @ p["a"]) @ p["b"],
        AB, X, HIDDEN),
    "a while loop": Trap(
        fixed_point, AB | {"w": (6, 6)}, X, "6: a:1 b:0 w:0 w:1"),
    "channels and their mirror image": Trap(one_layer(lambda p, h: h + flip(h)), AB, X),
    "a code book, by one-hot": Trap(
        lambda p, x: nn.one_hot(jnp.argmax(x @ p["c"].T, -1), 6, dtype=x.dtype)
        @ p["c"], {"c": (6, 5)}, X, "6: c:0"),
    "each layer beside the next": Trap(
        lambda p, x: layers(p, x, lambda h: h[1:] + h[:-1]), STACK | {"b": (3, 6, 2)},
        X, "6: a:2 b:1"),
    # beyond the usual ones
    "only the mirror image": Trap(
        one_layer(lambda p, h: flip(h)), AB, X, "6: a:1 b:0:~5,4,3,2,1,0"),
    "channels in a constant order": Trap(
        one_layer(lambda p, h: h[:, np.array([2, 0, 1, 5, 3, 4])]), AB, X,
        "6: a:1 b:0:~1,2,0,4,5,3"),
    "rolled by two, and added": Trap(
        one_layer(lambda p, h: h + jnp.roll(h, 2, -1)), AB, X,
        "2: a:1:@0+2 a:1:@2+2 a:1:@4+2 b:0:@0+2 b:0:@2+2 b:0:@4+2"),
    "each layer beside its mirror image": Trap(
        lambda p, x: layers(p, x, lambda h: h + h[::-1]), STACK, X, "6: a:2 b:1"),
    "a running sum over layers": Trap(
        lambda p, x: layers(p, x, lambda h: jnp.cumsum(h, 0)), STACK, X, "6: a:2 b:1"),
    "the largest of units that may tie": Trap(
        lambda p, x: p["b"][jnp.argmax(nn.relu(x @ p["a"]), -1)], AB, X),
    "the largest of repeated units": Trap(
        lambda p, x: p["b"][jnp.argmax(jnp.repeat(x @ p["a"], 2, 1), -1)],
        AB | {"b": (12, 3)}, X),
    "made by one expert, read by another": Trap(
        mismatched_experts, MOE, X, "4: router:1 w1:0 w2:0; 6: w1:2 w2:1"),
    "one expert per token of a scan": Trap(
        switch_in_a_scan, MOE, X, "4: router:1 w1:0 w2:0; 6: w1:2 w2:1 [router:1]"),
    "an index used as a number": Trap(
        lambda p, x: jnp.argmax(x @ p["a"], -1)[:, None].astype(x.dtype) * p["b"][0],
        AB, X, "5: b:0:@1+5 [pinned 3]"),
    "weights in the order of their scores": Trap(
        lambda p, x: x @ p["a"][:, jnp.argsort(p["s"])] @ p["b"], AB | {"s": (6,)}, X,
        "6: a:1 s:0"),
    "one gain in two places": Trap(
        scaled, AB | {"c": (5, 6), "d": (6, 3), "g": ()}, X, "6: a:1 b:0; 6: c:1 d:0"),
    "a function that is not understood": Trap(
        lambda p, x: jnp.fft.rfft(nn.relu(x @ p["a"]), axis=-1).real @ p["b"][:4], AB,
        X, "2: b:0:@4+2 [pinned 3]"),
    "a weight between blocks of itself": Trap(
        between_its_own_blocks, {"a": (5, 6), "w": (6, 6), "b": (2, 3)}, X,
        "2: a:1:@0+2 w:0:@0+2 w:1:@0+2; 2: a:1:@2+4:2x[2] w:0:@2+4:2x[2] "
        "w:1:@2+4:2x[2]; 2: a:1:@2+4:[2]x2 b:0 w:0:@2+4:[2]x2 w:1:@2+4:[2]x2"),
    "part of a sum over channels": Trap(
        lambda p, x: (x @ p["a"])[:, :2].sum(-1, keepdims=True) * p["b"][0], AB, X,
        "2: a:1:@0+2; 4: a:1:@2+4; 5: b:0:@1+5 [pinned 3]"),
}  # fmt: skip
