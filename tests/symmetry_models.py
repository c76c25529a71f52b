"""Thirteen architectures, each with the groups that a person finds in it.

A member is `path:axis[:block]`: block `3x[4]` is the axis viewed as (3, 4), acting on
the bracketed factor; `@6+8` are its positions 6 to 14. A group is its size, members,
and the groups (or "pinned N" axes) that it may depend on.
"""

from flax import nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SEED = 7
RNG = np.random.default_rng(SEED)
MODELS = {}


def model(make):
    MODELS[make.__name__] = make
    return make


def normal(*shape):
    return RNG.normal(size=shape) / 2


def randomised(params):
    """Weights without zeros or ones, variances positive."""
    draw = lambda x: np.abs(RNG.normal(size=x.shape)) / 2 + 0.2 + normal(*x.shape) / 5
    return jax.tree.map(draw, params)


def tokens(*shape):
    return RNG.integers(0, 11, shape)


def rms(x, gain):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * gain


def norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    spread = jnp.sqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + 1e-5)
    return centred / spread * p["scale"] + p["bias"]


def conv(x, w, stride=1, groups=1):
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )  # fmt: skip


def on(template, *names):
    return " ".join(template.format(n) for n in names)


@model
def mlp():
    p = {
        "a": {"w": normal(5, 7), "b": normal(7)},
        "b": {"w": normal(7, 6), "b": normal(6)},
        "c": {"w": normal(6, 3), "b": normal(3)},
    }

    def apply(p, x):
        x = jax.nn.relu(x @ p["a"]["w"] + p["a"]["b"])
        x = jax.nn.gelu(x @ p["b"]["w"] + p["b"]["b"])
        return x @ p["c"]["w"] + p["c"]["b"]

    return apply, p, (normal(4, 5),), {
        "one": (7, "a/w:1 a/b:0 b/w:0", []),
        "two": (6, "b/w:1 b/b:0 c/w:0", []),
    }  # fmt: skip


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        def layer(x, name, features, kernel=3, stride=1):
            x = nn.Conv(features, (kernel, kernel), stride, use_bias=False, name=name)(
                x
            )
            return nn.BatchNorm(use_running_average=True, name=f"bn_{name}")(x)

        x = nn.relu(layer(x, "stem", 8))
        x = nn.relu(x + layer(nn.relu(layer(x, "a1", 6)), "a2", 8))
        y = layer(nn.relu(layer(x, "b1", 10, 3, 2)), "b2", 12)
        x = nn.relu(layer(x, "skip", 12, 1, 2) + y)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


@model
def resnet_with_batch_norm():
    net, x = ResNet(), normal(2, 8, 8, 3)
    p = randomised(jax.eval_shape(net.init, jax.random.key(0), x))
    stats = " params/bn_{0}/scale:0 params/bn_{0}/bias:0 batch_stats/bn_{0}/mean:0" \
        " batch_stats/bn_{0}/var:0"  # fmt: skip
    made = "params/{0}/kernel:3" + stats
    read = " params/{0}/kernel:2"
    return net.apply, p, (x,), {
        "stage 1": (8, on(made, "stem", "a2") + on(read, "a1", "b1", "skip"), []),
        "inside a": (6, on(made, "a1") + on(read, "a2"), []),
        "inside b": (10, on(made, "b1") + on(read, "b2"), []),
        "stage 2": (12, on(made, "b2", "skip") + " params/head/kernel:0", []),
    }  # fmt: skip


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, t):
        place = self.param("place", nn.initializers.normal(1.0), (6, 12))
        x = nn.Embed(11, 12, name="embed")(t) + place[: t.shape[1]]
        attend = nn.MultiHeadDotProductAttention(3, qkv_features=15, name="attend")
        x = x + attend(nn.LayerNorm(name="n1")(x), mask=nn.make_causal_mask(t))
        y = nn.gelu(nn.Dense(10, name="up")(nn.LayerNorm(name="n2")(x)))
        x = x + nn.Dense(12, name="down")(y)
        return nn.Dense(11, name="head")(nn.LayerNorm(name="n3")(x))


@model
def linen_transformer():
    net, t = Transformer(), tokens(2, 6)
    p = randomised(jax.eval_shape(net.init, jax.random.key(0), t)["params"])
    qkv = ("query", "key", "value")
    heads = "attend/{0}/kernel:1 attend/{0}/bias:0"
    dims = "attend/{0}/kernel:2 attend/{0}/bias:1"
    stream = "embed/embedding:1 place:1 attend/out/kernel:2 attend/out/bias:0 " \
        "up/kernel:0 down/kernel:1 down/bias:0 head/kernel:0 "  # fmt: skip
    norms = on("{0}/scale:0 {0}/bias:0", "n1", "n2", "n3")
    return lambda p, t: net.apply({"params": p}, t), p, (t,), {
        "stream": (12, stream + norms + " " + on("attend/{0}/kernel:0", *qkv), []),
        "heads": (3, on(heads, *qkv) + " attend/out/kernel:0", []),
        "qk": (5, on(dims, "query", "key"), ["heads"]),
        "v": (5, on(dims, "value") + " attend/out/kernel:1", ["heads"]),
        "ffn": (10, "up/kernel:1 up/bias:0 down/kernel:0", []),
    }  # fmt: skip


H, K, D = 4, 2, 6  # query heads, key-value heads, head dim


def rotate(x, angle):
    a, b = jnp.split(x, 2, -1)
    c, s = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    return jnp.concatenate([a * c - b * s, b * c + a * s], -1)


def decoder_layer(x, w, rope=True):
    batch, length, _ = x.shape
    y = rms(x, w["n1"])
    q, k, v = ((y @ w[n]).reshape(batch, length, -1, D) for n in "qkv")
    if rope:
        step = 0.01 ** (jnp.arange(D // 2, dtype=x.dtype) / (D // 2))
        angle = jnp.arange(length, dtype=x.dtype)[:, None] * step[None]
        q, k = rotate(q, angle), rotate(k, angle)
    k, v = (jnp.repeat(z, H // K, axis=2) for z in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / D**0.5
    past = jnp.arange(length)[:, None] >= jnp.arange(length)[None]
    weights = jax.nn.softmax(jnp.where(past, scores, -1e30), -1)
    y = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(batch, length, -1)
    x = x + y @ w["o"]
    y = rms(x, w["n2"])
    return x + (jax.nn.silu(y @ w["gate"]) * (y @ w["up"])) @ w["down"]


def layer_weights():
    shapes = {
        "n1": (10,), "q": (10, H * D), "k": (10, K * D), "v": (10, K * D),
        "o": (H * D, 10), "n2": (10,), "gate": (10, 14), "up": (10, 14),
        "down": (14, 10),
    }  # fmt: skip
    return {n: normal(*s) for n, s in shapes.items()}


def decoder_weights(layers):
    top = {"embed": normal(11, 10), "last": normal(10), "head": normal(10, 11)}
    return top | {"l": layers}


def decoder(p, t, rope=True):
    x = decoder_layer(p["embed"][t], p["l"], rope)
    return rms(x, p["last"]) @ p["head"]


def decoder_groups(stacked=0, rope=True):
    at = lambda text: " ".join(
        f"l/{n}:{int(axis) + stacked}{':' + block if block else ''}"
        for n, axis, block in ((m + ":").split(":")[:3] for m in text.split())
    )
    layer = ["pinned 3"] * stacked
    stream = "n1:0 n2:0 q:0 k:0 v:0 gate:0 up:0 o:1 down:1"
    out = {
        "stream": (10, "embed:1 last:0 head:0 " + at(stream), []),
        "kv": (2, at("q:1:[2]x2x6 k:1:[2]x6 v:1:[2]x6 o:0:[2]x2x6"), layer),
        "q in kv": (2, at("q:1:2x[2]x6 o:0:2x[2]x6"), ["kv", *layer]),
        "v": (6, at("v:1:2x[6] o:0:2x2x[6]"), ["kv", *layer]),
        "ffn": (14, at("gate:1 up:1 down:0"), layer),
    }
    if not rope:
        out["qk"] = (6, at("q:1:2x2x[6] k:1:2x[6]"), ["kv", *layer])
    return out


@model
def grouped_query_decoder():
    return decoder, decoder_weights(layer_weights()), (tokens(2, 5),), decoder_groups()


@model
def decoder_without_rope():
    apply = lambda p, t: decoder(p, t, rope=False)
    weights = decoder_weights(layer_weights())
    return apply, weights, (tokens(2, 5),), decoder_groups(rope=False)


@model
def scanned_decoder_with_remat():
    def apply(p, t):
        layer = jax.checkpoint(lambda x, w: (decoder_layer(x, w), None))
        return rms(jax.lax.scan(layer, p["embed"][t], p["l"])[0], p["last"]) @ p["head"]

    layers = jax.tree.map(lambda *x: np.stack(x), *(layer_weights() for _ in range(3)))
    return apply, decoder_weights(layers), (tokens(2, 5),), decoder_groups(1)


class ViT(nnx.Module):
    def __init__(self, rngs):
        self.patch = nnx.Conv(3, 12, (4, 4), strides=(4, 4), rngs=rngs)
        self.cls, self.place = nnx.Param(normal(1, 1, 12)), nnx.Param(normal(1, 5, 12))
        self.n1, self.n2 = nnx.LayerNorm(12, rngs=rngs), nnx.LayerNorm(12, rngs=rngs)
        self.qkv = nnx.Linear(12, 42, rngs=rngs)
        self.out = nnx.Linear(14, 12, rngs=rngs)
        self.up, self.down = nnx.Linear(12, 9, rngs=rngs), nnx.Linear(9, 12, rngs=rngs)
        self.head = nnx.Linear(12, 4, rngs=rngs)

    def __call__(self, image):
        x = self.patch(image).reshape(len(image), -1, 12)
        first = jnp.broadcast_to(self.cls[...], (len(image), 1, 12))
        x = jnp.concatenate([first, x], 1) + self.place[...]
        qkv = self.qkv(self.n1(x)).reshape(len(image), -1, 3, 2, 7)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) / 7**0.5, -1)
        x = x + self.out((weights @ v).swapaxes(1, 2).reshape(len(image), -1, 14))
        x = x + self.down(nnx.gelu(self.up(self.n2(x))))
        return self.head(x[:, 0])


@model
def vit_with_fused_qkv():
    graph, state = nnx.split(nnx.eval_shape(lambda: ViT(nnx.Rngs(0))))
    p = randomised(nnx.to_pure_dict(state))

    def apply(p, image):
        blank = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(blank, p)
        return nnx.merge(graph, blank)(image)

    stream = "patch/kernel:3 patch/bias:0 cls:2 place:2 qkv/kernel:0 out/kernel:1 " \
        "out/bias:0 up/kernel:0 down/kernel:1 down/bias:0 head/kernel:0 "  # fmt: skip
    return apply, p, (normal(2, 8, 8, 3),), {
        "stream": (12, stream + on("{0}/scale:0 {0}/bias:0", "n1", "n2"), []),
        "heads": (2, "qkv/kernel:1:3x[2]x7 qkv/bias:0:3x[2]x7 out/kernel:0:[2]x7", []),
        "qk": (7, "qkv/kernel:1:@0+28:2x2x[7] qkv/bias:0:@0+28:2x2x[7]", ["heads"]),
        "v": (7, "qkv/kernel:1:@28+14:2x[7] qkv/bias:0:@28+14:2x[7] "
                 "out/kernel:0:2x[7]", ["heads"]),
        "ffn": (9, "up/kernel:1 up/bias:0 down/kernel:0", []),
    }  # fmt: skip


@model
def unet_with_group_norm():
    p = {
        "first": normal(3, 3, 3, 8), "scale": normal(8), "bias": normal(8),
        "low": normal(3, 3, 8, 10), "back": normal(3, 3, 10, 6),
        "join": normal(3, 3, 14, 5), "last": normal(1, 1, 5, 2),
    }  # fmt: skip

    def apply(p, x):
        high = conv(x, p["first"])
        groups = high.reshape(*high.shape[:3], 2, 4)
        centred = groups - groups.mean((1, 2, 4), keepdims=True)
        spread = jnp.sqrt(jnp.square(centred).mean((1, 2, 4), keepdims=True) + 1e-5)
        high = (centred / spread).reshape(high.shape) * p["scale"] + p["bias"]
        high = jax.nn.silu(high)
        low = conv(jax.nn.silu(conv(high, p["low"], 2)), p["back"])
        wide = jax.image.resize(jax.nn.silu(low), (*high.shape[:3], 6), "nearest")
        joined = jnp.concatenate([wide, high], -1)
        return conv(jax.nn.silu(conv(joined, p["join"])), p["last"])

    at = "first:3:{0} scale:0:{0} bias:0:{0} low:2:{0} join:2:@6+8:{0}"
    return apply, p, (normal(2, 8, 8, 3),), {
        "groups": (2, on(at, "[2]x4"), []),
        "in a group": (4, on(at, "2x[4]"), ["groups"]),
        "low": (10, "low:3 back:2", []),
        "back": (6, "back:3 join:2:@0+6", []),
        "join": (5, "join:3 last:2", []),
    }  # fmt: skip


@model
def convnext():
    def block():
        shapes = {"dw": (3, 3, 1, 8), "up": (8, 14), "upb": (14,), "gain": (8,),
                  "down": (14, 8)}  # fmt: skip
        weights = {n: normal(*s) for n, s in shapes.items()}
        return weights | {"n": {"scale": normal(8), "bias": normal(8)}}

    def apply(p, x):
        x = conv(x, p["stem"], 2)
        for w in (p["a"], p["b"]):
            y = norm(conv(x, w["dw"], groups=8), w["n"])
            x = x + w["gain"] * (jax.nn.gelu(y @ w["up"] + w["upb"]) @ w["down"])
        return x.reshape(len(x), -1) @ p["head"]

    p = {"stem": normal(2, 2, 3, 8), "a": block(), "b": block(), "head": normal(128, 3)}
    stream = " {0}/dw:3 {0}/n/scale:0 {0}/n/bias:0 {0}/up:0 {0}/gain:0 {0}/down:1"
    return apply, p, (normal(2, 8, 8, 3),), {
        "stream": (8, "stem:3 head:0:4x4x[8]" + on(stream, "a", "b"), []),
        "ffn a": (14, "a/up:1 a/upb:0 a/down:0", []),
        "ffn b": (14, "b/up:1 b/upb:0 b/down:0", []),
    }  # fmt: skip


def mixture(threshold):
    def apply(p, x):
        scores = x @ p["router"]
        if threshold:
            least = jax.lax.top_k(scores, 2)[0][..., -1:]
            scores = jnp.where(scores >= least, scores, -jnp.inf)
        h = jax.nn.gelu(jnp.einsum("br,erf->bef", x, p["w1"]) + p["b1"])
        weights = jax.nn.softmax(scores, -1)
        return (x + jnp.einsum("be,bef,efr->br", weights, h, p["w2"])) @ p["head"]

    p = {"router": normal(5, 4), "w1": normal(4, 5, 6), "b1": normal(4, 6),
         "w2": normal(4, 6, 5), "head": normal(5, 3)}  # fmt: skip
    return apply, p, (normal(7, 5),), {
        "experts": (4, "router:1 w1:0 b1:0 w2:0", []),
        "ffn": (6, "w1:2 b1:1 w2:1", ["experts"]),
    }  # fmt: skip


@model
def mixture_of_experts():
    return mixture(threshold=False)


@model
def mixture_with_top_k():
    return mixture(threshold=True)


@model
def gru_with_fused_gates():
    p = {"wi": normal(5, 18), "wh": normal(6, 18), "bi": normal(18), "bh": normal(18),
         "out": normal(6, 3)}  # fmt: skip

    def apply(p, x):
        def step(h, x):
            a = jnp.split(x @ p["wi"] + p["bi"], 3, -1)
            b = jnp.split(h @ p["wh"] + p["bh"], 3, -1)
            reset, keep = (jax.nn.sigmoid(a[i] + b[i]) for i in (0, 1))
            new = jnp.tanh(a[2] + reset * b[2])
            return (1 - keep) * new + keep * h, None

        start = jnp.zeros((x.shape[1], 6), x.dtype)
        return jax.lax.scan(step, start, x)[0] @ p["out"]

    chunks = "wi:1:{0} wh:1:{0} bi:0:{0} bh:0:{0}"
    return apply, p, (normal(4, 2, 5),), {
        "hidden": (6, "wh:0 out:0 " + on(chunks, "@0+6", "@6+6", "@12+6"), []),
    }  # fmt: skip


@model
def tied_autoencoder():
    p = {"w": normal(5, 8), "b": normal(8), "v": normal(8, 4), "d": normal(4),
         "c": normal(5)}  # fmt: skip

    def apply(p, x):
        z = jax.nn.sigmoid(jax.nn.relu(x @ p["w"] + p["b"]) @ p["v"] + p["d"])
        return z @ p["v"].T @ p["w"].T + p["c"]

    return apply, p, (normal(3, 5),), {
        "h": (8, "w:1 b:0 v:0", []), "z": (4, "v:1 d:0", []),
    }  # fmt: skip
