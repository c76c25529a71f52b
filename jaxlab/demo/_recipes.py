"""The recipes of the demo: mergekit YAML, as any user would write it."""

from typing import Any

import yaml

BASE = "base"
UP = ".."  # recipes lie in a folder of their own, and name models from there
DENSITY = 0.5
SCALE = 0.3  # task arithmetic's own choice for several tasks (Ilharco et al., 2023)

# method: (its own parameters, those of each model)
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({}, {"weight": 1.0}),
    "karcher": ({}, {}),
    "multislerp": ({}, {"weight": 1.0}),
    "task_arithmetic": ({}, {"weight": SCALE}),
    "ties": ({"normalize": True}, {"weight": 1.0, "density": DENSITY}),
    "dare_linear": ({}, {"weight": SCALE, "density": DENSITY}),
    "dare_ties": ({"normalize": True}, {"weight": 1.0, "density": DENSITY}),
    "della": ({"normalize": True}, {"weight": 1.0, "density": DENSITY, "epsilon": 0.2}),
    "breadcrumbs": ({}, {"weight": SCALE, "density": 0.9, "gamma": 0.01}),
    "sce": ({"select_topk": DENSITY}, {}),
    "model_stock": ({}, {}),
}
BASELESS = ("linear", "karcher", "multislerp")


def recipes(experts: list[str]) -> dict[str, str]:
    """YAML by method: all experts together, and a slerp of the first two."""
    out = {m: _together(m, experts) for m in METHODS}
    first, second = (f"{UP}/experts/{e}" for e in experts[:2])
    spec = {
        "merge_method": "slerp",
        "base_model": first,
        "models": [{"model": first}, {"model": second}],
        "parameters": {"t": 0.5},
    }
    return {**out, "slerp": _dump(spec)}


def _together(method: str, experts: list[str]) -> str:
    whole, each = METHODS[method]
    models = [
        {"model": f"{UP}/experts/{e}"} | ({"parameters": dict(each)} if each else {})
        for e in experts
    ]
    spec: dict[str, Any] = {"merge_method": method}
    if method not in BASELESS:
        spec["base_model"] = f"{UP}/{BASE}"
    spec["models"] = models
    if whole:
        spec["parameters"] = whole
    return _dump(spec)


def _dump(spec: dict[str, Any]) -> str:
    return yaml.safe_dump(spec | {"dtype": "float32"}, sort_keys=False)
