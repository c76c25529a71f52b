"""mergekit's 20 methods: their parameters, defaults and input contracts, as ours."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

REQUIRED: Any = object()


class Parameter(NamedTuple):
    """One parameter of mergekit's, and the keyword of ours that it is."""

    ours: str | None  # None: it changes no number
    kind: Literal["real", "bool", "int"] = "real"
    scope: Literal["shared", "models", "others"] = "shared"  # others: without the base
    default: Any = REQUIRED  # None: ours
    says: Mapping[bool, Any] = {}  # ours where theirs is a boolean; one left out is
    # not supported


class Method(NamedTuple):
    """One method of mergekit's, what it takes, and what reproduces it in ours."""

    parameters: Mapping[str, Parameter]
    base: Literal["required", "optional", "ignored"] = "ignored"
    least: int = 1
    most: int | None = None
    of_others: bool = False  # the counts leave out the base
    pair: bool = False  # ours takes the base as its first model
    fixed: Mapping[str, Any] = {}


_WEIGHT = Parameter("weights", scope="models")
_OTHERS = Parameter("weights", scope="others")
_MASK = Parameter(None, "bool", default=False)
_MEAN = {True: "weighted_mean", False: "weighted_sum"}


def _arithmetic(
    *,
    normalize: bool,
    elects: bool = False,
    rescale: bool | None = None,
    sparse: bool = True,
    fixed: Mapping[str, Any] | None = None,
    **more: float,
) -> Method:
    """Task arithmetic: sparsify each task vector, then perhaps elect a sign."""
    mean = Parameter("normalize", "bool", default=normalize)
    if elects:
        mean = Parameter("consensus", "bool", default=normalize, says=_MEAN)
    l1 = Parameter(None, "bool", default=False, says={False: False} if sparse else {})
    if rescale is not None:
        says = {True: "l1", False: None}
        l1 = Parameter("rescale", "bool", default=rescale, says=says)
    density = Parameter("density" if sparse else None, scope="others", default=1.0)
    parameters = {
        "weight": _OTHERS,
        "density": density,
        "normalize": mean,
        "rescale": l1,
        "lambda": Parameter("scale", default=1.0),
        "int8_mask": _MASK,
    }
    for name, default in more.items():
        parameters[name] = Parameter(name, scope="others", default=default)
    return Method(parameters, "required", fixed=fixed or {})


METHODS: dict[str, Method] = {
    "linear": Method(
        {"weight": _WEIGHT, "normalize": Parameter("normalize", "bool", default=True)}
    ),
    "slerp": Method({"t": Parameter("t")}, "required", 2, 2, pair=True),
    "nuslerp": Method(
        {
            "weight": _OTHERS,
            "nuslerp_row_wise": Parameter("row_wise", "bool", default=False),
            "nuslerp_flatten": Parameter("flatten", "bool", default=True),
        },
        "optional",
        2,
        2,
        of_others=True,
    ),
    "multislerp": Method(
        {
            "weight": _OTHERS,
            "normalize_weights": Parameter("normalize", "bool", default=True),
            "eps": Parameter("eps", default=1e-8),
        },
        "optional",
        of_others=True,
    ),
    "karcher": Method(
        {
            "max_iter": Parameter("max_iter", "int", default=10),
            "tol": Parameter("tol", default=1e-5),
        }
    ),
    "passthrough": Method(
        {"scale": Parameter("scale", scope="models", default=None)}, most=1
    ),
    "nearswap": Method({"t": Parameter("t")}, "required", 2, 2, pair=True),
    "arcee_fusion": Method({}, "required", 2, 2, pair=True),
    "task_arithmetic": _arithmetic(normalize=False, sparse=False),
    "ties": _arithmetic(normalize=True, elects=True, fixed={"per": "leaf"}),
    "dare_linear": _arithmetic(normalize=False, rescale=True),
    "dare_ties": _arithmetic(normalize=False, elects=True, rescale=True),
    "della": _arithmetic(normalize=True, elects=True, rescale=True, epsilon=0.15),
    "della_linear": _arithmetic(normalize=False, rescale=True, epsilon=0.15),
    "breadcrumbs": _arithmetic(normalize=False, gamma=0.01, fixed={"per": "leaf"}),
    "breadcrumbs_ties": _arithmetic(
        normalize=False, elects=True, gamma=0.01, fixed={"per": "leaf"}
    ),
    "sce": Method(
        {"select_topk": Parameter("density", default=1.0), "int8_mask": _MASK},
        "required",
        fixed={"eps": 1e-6},
    ),
    "ram": Method({"epsilon": Parameter("threshold", default=1e-5)}, "required"),
    "ramplus_tl": Method(
        {
            "epsilon": Parameter("threshold", default=1e-5),
            "r": Parameter("gain", default=0.1),
            "alpha": Parameter("cap", default=0.2),
        },
        "required",
    ),
    "model_stock": Method(
        {"filter_wise": Parameter("filter_wise", "bool", default=False)},
        "required",
        3,
        fixed={"eps": 1e-6},
    ),
}
