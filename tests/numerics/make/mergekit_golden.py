"""Golden vectors of all 20 merge methods of mergekit 0.1.5, on CPU.

Run in an environment of its own (torch 2.13.0 first, then mergekit 0.1.5; numpy):
  python tests/numerics/make/mergekit_golden.py tests/numerics/mergekit.npz

Every case is a call of `mergekit.merge_methods.merge_tensors`. Its random methods draw
masks by `torch.bernoulli`, which is replaced here by (u < p) with stored uniforms u, so
that another library can replay the same masks. Contents of the file:
  in/<shape>/<i>              inputs, 0 is the base
  out/<shape>/<case>          result in float32
  out64/<shape>/<case>        result in float64, unless mergekit casts to float32 inside
  u/<shape>/<case>/<j>        the uniforms behind its j-th mask
  about                       json: generator, version, seed, cases
"""

from importlib.metadata import version
import itertools
import json
import sys

from mergekit.merge_methods import merge_tensors
import numpy as np
import torch

SHAPES = {"v": (37,), "m": (24, 33), "t": (4, 6, 10)}
IDS = ("base", "a", "b", "c")
WEIGHT = {"a": 0.5, "b": 0.3, "c": 0.4}
DENSITY = {"a": 0.6, "b": 0.4, "c": 0.75}
SEED = 123
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
FLOAT32_INSIDE = (*RANDOM, "ramplus_tl")


def all_of(value):
    return dict.fromkeys("abc", value)


def case(name, method, n=3, base=True, **parameters):
    return {"name": name, "method": method, "n": n, "base": base, "with": parameters}


def spherical_cases():
    pair = {"a": 0.5, "b": 0.3}
    for t in (0.0, 0.3, 1.0):
        yield case(f"slerp/t={t}", "slerp", n=1, t=t)
    for flat, row in ((True, False), (False, False), (False, True)):
        options = {"nuslerp_flatten": flat, "nuslerp_row_wise": row}
        name = f"nuslerp/flat={flat}/row={row}"
        yield case(name, "nuslerp", n=2, weight=pair, **options)
    yield case("multislerp/base", "multislerp", weight=WEIGHT)
    yield case("multislerp/nobase", "multislerp", base=False, weight=WEIGHT)
    yield case("karcher", "karcher", base=False)
    yield case("model_stock", "model_stock")
    yield case("model_stock/filter_wise", "model_stock", filter_wise=True)


def other_cases():
    for norm in (True, False):
        yield case(
            f"linear/{norm}", "linear", base=False, weight=WEIGHT, normalize=norm
        )
    yield case("passthrough", "passthrough", n=1, base=False, scale={"a": 0.5})
    yield case("nearswap", "nearswap", n=1, t=0.1)
    yield case("arcee_fusion", "arcee_fusion", n=1)
    yield case("sce/1.0", "sce")
    yield case("sce/0.4", "sce", select_topk=0.4)
    yield case("ram", "ram", epsilon=0.2)
    yield case("ramplus_tl", "ramplus_tl", epsilon=0.2)


def task_vector_cases():
    both = {"weight": WEIGHT, "density": DENSITY}
    for lam, norm in itertools.product((1.0, 0.7), (False, True)):
        options = {"normalize": norm, "lambda": lam}
        tag = f"lam={lam}/norm={norm}"
        yield case(
            f"task_arithmetic/{tag}", "task_arithmetic", weight=WEIGHT, **options
        )
        yield case(f"ties/{tag}", "ties", **both, **options)
    yield case("ties/int8_mask", "ties", **both, int8_mask=True)
    signed = {"a": 1.0, "b": -0.5, "c": 0.7}
    yield case("ties/negative", "ties", weight=signed, density=DENSITY)
    for method, rescale in itertools.product(RANDOM[:2], (True, False)):
        yield case(f"{method}/rescale={rescale}", method, **both, rescale=rescale)
    for method, gamma in itertools.product(
        ("breadcrumbs", "breadcrumbs_ties"), (0, 0.1)
    ):
        yield case(f"{method}/gamma={gamma}", method, **both, gamma=all_of(gamma))
    for method in RANDOM[2:]:
        options = {"density": all_of(0.5), "epsilon": all_of(0.2)}
        yield case(method, method, weight=WEIGHT, **options)


def inputs(shape):
    """A base and three models around it, in float32."""
    generator = torch.Generator().manual_seed(sum(shape) * 7 + len(shape))
    base = torch.randn(shape, generator=generator)
    noise = [0.3 * torch.randn(shape, generator=generator) for _ in range(3)]
    return [base, *(base + x for x in noise)]


def run(spec, tensors):
    """One call of mergekit."""
    chosen = ([0] if spec["base"] else []) + list(range(1, spec["n"] + 1))
    return merge_tensors(
        [tensors[i].clone() for i in chosen],
        spec["method"],
        ids=[IDS[i] for i in chosen],
        base_index=0 if spec["base"] else None,
        parameters=spec["with"] or None,
    )


def replace_bernoulli(drawn):
    """Makes torch draw masks from uniforms that it appends to `drawn`."""
    generator = torch.Generator().manual_seed(SEED)

    def bernoulli(p, *args, **kwargs):
        u = torch.rand(p.shape, generator=generator)
        drawn.append(u.numpy().copy())
        return (u < p.float()).to(p.dtype)

    torch.bernoulli = bernoulli


def main(path):
    cases = [*other_cases(), *spherical_cases(), *task_vector_cases()]
    out, drawn = {}, []
    replace_bernoulli(drawn)
    for name, shape in SHAPES.items():
        tensors = inputs(shape)
        out.update({f"in/{name}/{i}": x.numpy() for i, x in enumerate(tensors)})
        for spec in cases:
            drawn.clear()
            tag = f"{name}/{spec['name']}"
            out[f"out/{tag}"] = run(spec, tensors).numpy()
            out.update({f"u/{tag}/{j}": u for j, u in enumerate(drawn)})
            if spec["method"] not in FLOAT32_INSIDE:
                result = run(spec, [x.double() for x in tensors])
                assert result.dtype == torch.float64
                out[f"out64/{tag}"] = result.numpy()
    about = {
        "generator": "tests/numerics/make/mergekit_golden.py",
        "mergekit": version("mergekit"),
        "torch": version("torch"),
        "seed": SEED,
        "cases": cases,
    }
    np.savez_compressed(path, about=np.array(json.dumps(about)), **out)


if __name__ == "__main__":
    main(sys.argv[1])
