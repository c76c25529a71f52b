"""Golden vectors of FusionBench 0.2.33's merges, on CPU.

Run in an environment of its own (torch 2.13.0 first, then fusion-bench 0.2.33 with
transformers 4.57.6 and datasets 4.4.2; its OPCM does not import with newer ones):
  python tests/numerics/make/fusionbench.py tests/numerics/fusionbench.npz

Two linear layers of PyTorch's layout, [out, in], and their biases. Contents:
  in/base/<leaf>, in/ft<i>/<leaf>     a model, and three tuned from it
  in/fisher<i>/<leaf>, in/gram<i>/<layer>
  out/<case>/<leaf>                   what FusionBench makes of them, in float32
  out64/<case>/<leaf>                 the same in float64, where its code can
  about                               json: generator, versions, seed, cases
"""

import contextlib
from importlib.metadata import version
import io
import json
import sys
from types import SimpleNamespace

from fusion_bench import BaseModelPool
from fusion_bench.method.doge_ta.doge_ta import DOGE_TA_Algorithm
from fusion_bench.method.emr_merging.utils import emr_merge
from fusion_bench.method.fisher_merging.fisher_merging import (
    merging_with_fisher_weights,
)
from fusion_bench.method.isotropic_merging import iso_utils
from fusion_bench.method.knots.knots_utils import subspace_alignment
from fusion_bench.method.magmax.magmax import _magmax_select
from fusion_bench.method.model_stock import model_stock
from fusion_bench.method.opcm.opcm import OPCMForCLIP
from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
from fusion_bench.method.singular_value_calibration import utils as svc_utils
from fusion_bench.method.slerp.slerp import slerp_on_state_dicts
from fusion_bench.method.task_singular_vector.utils import TSVM_utils
from fusion_bench.method.ties_merging import ties_merging_utils
from fusion_bench.method.trust_region.clip_task_arithmetic import (
    TaskArithmeticWithTrustRegionForCLIP,
)
from fusion_bench.method.wudi.wudi import wudi_merging
import numpy as np
import torch

SEED = 5
SHAPES = {
    "l1.weight": (24, 16),
    "l1.bias": (24,),
    "l2.weight": (8, 24),
    "l2.bias": (8,),
}
ONLY_32 = ("emr", "tsvm_lossless")  # their buffers are of torch's default dtype


class Net(torch.nn.Module):
    """The two layers as a module, for the methods that want one."""

    def __init__(self, state):
        super().__init__()
        self.l1, self.l2 = torch.nn.Linear(16, 24), torch.nn.Linear(24, 8)
        self.to(state["l1.weight"].dtype).load_state_dict(state)


def inputs():
    """The models, and the statistics of them that some merges take."""
    generator = torch.Generator().manual_seed(SEED)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    base = {name: draw(*shape) for name, shape in SHAPES.items()}
    tuned = [{n: x + 0.3 * draw(*x.shape) for n, x in base.items()} for _ in range(3)]
    fisher = [
        {n: torch.rand(x.shape, generator=generator) for n, x in base.items()}
        for _ in range(3)
    ]
    gram = []
    for _ in range(3):
        rows = {"l1": draw(50, 16), "l2": draw(50, 24)}
        gram.append({n: x.T @ x for n, x in rows.items()})
    return base, tuned, fisher, gram


def spectral_cases(base, tuned, taus):
    """The methods of matrices: each a function without arguments."""
    cpu = {"accelerator": "cpu"}
    yield "iso_c", lambda: iso_utils.iso_c(taus(), **cpu)
    yield "iso_cts_0.8", lambda: iso_utils.iso_cts(taus(), 0.8, **cpu)
    yield "wudi_20", lambda: wudi_merging(taus(), iter_num=20, **cpu)
    lossless = TSVM_utils.compute_and_sum_svd_mem_reduction_lossless
    yield "tsvm_lossless", lambda: lossless(taus(), **cpu)
    yield "tsvm", lambda: TSVM_utils.compute_and_sum_svd_mem_reduction(taus(), **cpu)
    weight = [f["l1.weight"] for f in tuned]
    calibrate = svc_utils.subspace_consistency_spectral_calibration
    for name, merged in (
        ("svc_avg", sum(weight) / 3),
        ("svc_sum", base["l1.weight"] + sum(t["l1.weight"] for t in taus())),
    ):
        yield name, lambda merged=merged: calibrate(base["l1.weight"], weight, merged)

    def knots():
        u, s, parts = subspace_alignment([t["l1.weight"] for t in taus()])
        rebuilt = {f"recon{i}": u @ torch.diag(s) @ v for i, v in enumerate(parts)}
        return {**rebuilt, "S": s}

    yield "knots", knots

    def opcm(alpha):
        method = OPCMForCLIP(alpha, shuffle_order=False, save_on_every_step=False)
        tasks = SimpleNamespace(_test_datasets=None)
        method._program = SimpleNamespace(taskpool=tasks)
        models = {f"m{i}": Net(f) for i, f in enumerate(tuned)}
        out = method.run(BaseModelPool({"_pretrained_": Net(base), **models}))
        return dict(out.state_dict())

    for alpha in (0.2, 0.5):
        yield f"opcm_{alpha}", lambda alpha=alpha: opcm(alpha)
    yield "doge_ta", lambda: doge_ta(base, tuned)


def doge_ta(base, tuned):
    """Weights alone: it goes by names, and leaves others as they are."""
    torch.cuda.memory_allocated = lambda: 0  # is only reported
    nest = lambda state: torch.nn.ModuleDict({"encoder": Net(state)})
    models = {f"m{i}": nest(f) for i, f in enumerate(tuned)}
    pool = BaseModelPool({"_pretrained_": nest(base), **models})
    out = DOGE_TA_Algorithm(subspace=6, K=30, lamda=0.07).run(pool).state_dict()
    return {n: out[f"encoder.{n}"] for n in base if n.endswith("weight")}


def trust_region(base, tuned):
    """Without data: the task vectors are their own sensitivities."""
    models = {f"m{i}": Net(f) for i, f in enumerate(tuned)}
    method = TaskArithmeticWithTrustRegionForCLIP(
        scaling_factor=0.3,
        threshold_quantile=0.8,
        max_samples=0,
        batch_size=0,
        zero_shot=True,
    )
    return dict(
        method.run(BaseModelPool({"_pretrained_": Net(base), **models})).state_dict()
    )


def other_cases(base, tuned, taus, fisher, gram):
    """The methods of entries, vectors and statistics."""
    flat = lambda: torch.stack(
        [ties_merging_utils.state_dict_to_vector(t) for t in taus()]
    )
    for how in ("mean", "sum"):
        call = lambda how=how: ties_merging_utils.ties_merging(
            flat(), reset_thresh=20, merge_func=how
        )
        yield f"ties_global_K20_{how}", call

    def emr():
        unified, masks, rescalers = emr_merge(taus())
        flags = {
            f"mask/{n}/{i}": x.float()
            for n, m in masks.items()
            for i, x in enumerate(m)
        }
        return {**unified, "rescalers": rescalers, **flags}

    yield "emr", emr
    yield "trust_region_0.8", lambda: trust_region(base, tuned)
    yield "magmax", lambda: _magmax_select(taus())
    yield "slerp_0.3", lambda: slerp_on_state_dicts(0.3, dict(tuned[0]), dict(tuned[1]))

    def stock():
        pair = (dict(tuned[0]), dict(tuned[1]), dict(base))
        ratio = model_stock.compute_ratio(model_stock.compute_angle(*pair), 2)
        return model_stock.merge_weights(*pair, ratio)

    yield "model_stock2", stock
    lists = {n: [f[n] for f in tuned] for n in base}
    third = torch.ones(3) / 3
    for norm in (True, False):
        call = lambda norm=norm: merging_with_fisher_weights(lists, fisher, third, norm)
        yield f"fisher_norm={norm}", call
    for ratio in (1.0, 0.9):
        call = lambda ratio=ratio: merging_with_regmean_weights(lists, gram, ratio)
        yield f"regmean_{ratio}", call


def cases(base, tuned, fisher, gram):
    """Every case; each gets task vectors of its own, as some change theirs in place."""
    taus = lambda: [{n: f[n] - base[n] for n in base} for f in tuned]
    yield from spectral_cases(base, tuned, taus)
    yield from other_cases(base, tuned, taus, fisher, gram)


def plain(result):
    """A result as arrays by leaf; a bare tensor has the leaf "" ."""
    if isinstance(result, torch.Tensor):
        result = {"": result}
    return {n: x.detach().numpy() for n, x in result.items()}


def main(path):
    base, tuned, fisher, gram = inputs()
    out = {f"in/base/{n}": x for n, x in plain(base).items()}
    for kind, trees in {"ft": tuned, "fisher": fisher, "gram": gram}.items():
        for i, tree in enumerate(trees):
            out |= {f"in/{kind}{i}/{n}": x for n, x in plain(tree).items()}
    names = []
    double = lambda tree: {n: x.double() for n, x in tree.items()}
    wide = double(base), *([double(t) for t in ts] for ts in (tuned, fisher, gram))
    for kind, args in (("out", (base, tuned, fisher, gram)), ("out64", wide)):
        for name, call in cases(*args):
            if kind == "out64" and name in ONLY_32:
                continue
            with contextlib.redirect_stdout(io.StringIO()):
                result = plain(call())
            if kind == "out":
                names.append(name)
            else:
                assert all(x.dtype == np.float64 for x in result.values()), name
            out |= {f"{kind}/{name}/{n}": x for n, x in result.items()}
    about = {
        "generator": "tests/numerics/make/fusionbench.py",
        "fusion-bench": version("fusion-bench"),
        "torch": version("torch"),
        "seed": SEED,
        "cases": names,
    }
    np.savez_compressed(path, about=np.array(json.dumps(about)), **out)


if __name__ == "__main__":
    main(sys.argv[1])
