"""mergekit recipes whose results are compared, deterministic ones only."""


def _all(method, parameters="", models="", base="base_model: z\n"):
    listed = models or "".join(
        f"  - {{model: {m}, parameters: {{weight: {w}, density: {d}}}}}\n"
        for m, w, d in (("a", 0.5, 0.6), ("b", 0.3, 0.4), ("c", 0.4, 0.75))
    )
    extra = f"parameters: {parameters}\n" if parameters else ""
    return f"merge_method: {method}\n{base}models:\n{listed}{extra}dtype: float32\n"


def _plain(*names):
    return "".join(f"  - {{model: {n}}}\n" for n in names)


_WEIGHTED = "".join(
    f"  - {{model: {m}, parameters: {{weight: {w}}}}}\n"
    for m, w in (("a", 0.5), ("b", 0.3), ("c", 0.4))
)
_TWO = "".join(
    f"  - {{model: {m}, parameters: {{weight: {w}}}}}\n"
    for m, w in (("a", 3), ("b", 1))
)
_VOCAB = """merge_method: task_arithmetic
base_model: vz
models:
  - {model: va, parameters: {weight: 0.6}}
  - {model: vb, parameters: {weight: 0.3}}
"""
_STACK = """merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources:
      - model: b
        layer_range: [1, 3]
        parameters:
          scale:
            - {filter: o_proj, value: 0.0}
            - {filter: down_proj, value: 0.5}
            - value: 1.0
  - sources: [{model: a, layer_range: [2, 3]}]
dtype: float32
"""

RECIPES = {
    # every method
    "linear": _all("linear", models=_WEIGHTED, base=""),
    "linear_sum": _all("linear", "{normalize: false}", _WEIGHTED, ""),
    "slerp": _all("slerp", "{t: 0.3}", _plain("a", "z")),
    "nuslerp": _all("nuslerp", models=_TWO, base=""),
    "nuslerp_base": _all("nuslerp", "{nuslerp_flatten: false}", _TWO),
    "multislerp": _all("multislerp", models=_WEIGHTED, base=""),
    "multislerp_base": _all("multislerp", "{normalize_weights: false}", _WEIGHTED),
    "karcher": _all("karcher", "{max_iter: 5}", _plain("a", "b", "c"), ""),
    "task_arithmetic": _all("task_arithmetic", "{lambda: 0.8}"),
    "ties": _all("ties"),
    "ties_sum": _all("ties", "{normalize: false, lambda: 1.5, int8_mask: true}"),
    "dare_linear_dense": _all("dare_linear", models=_WEIGHTED),
    "dare_ties_dense": _all("dare_ties", models=_WEIGHTED),
    "della_dense": _all("della", "{epsilon: 0.0}", _WEIGHTED),
    "della_linear_dense": _all("della_linear", "{epsilon: 0}", _WEIGHTED),
    "breadcrumbs": _all("breadcrumbs", "{gamma: 0.1}"),
    "breadcrumbs_ties": _all("breadcrumbs_ties"),
    "sce": _all("sce", "{select_topk: 0.5}", _plain("a", "b", "c")),
    "ram": _all("ram", "{epsilon: 0.2}", _plain("a", "b", "c")),
    "ramplus_tl": _all("ramplus_tl", "{r: 0.5, epsilon: 0.3}", _plain("a", "b", "c")),
    "model_stock": _all("model_stock", "", _plain("a", "b", "c")),
    "model_stock_rows": _all("model_stock", "{filter_wise: true}", _plain("a", "b")),
    "nearswap": _all("nearswap", "{t: 0.05}", _plain("a")),
    "arcee_fusion": _all("arcee_fusion", "", _plain("a")),
    # filters, gradients, precedence
    "gradient": _all(
        "slerp",
        "{t: [{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}, "
        "{filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}, {value: 0.5}]}",
        _plain("z", "a"),
    ),
    "precedence": """merge_method: ties
base_model: z
models:
  - model: a
    parameters: {weight: [{filter: mlp, value: [0.2, 0.9]}], density: 1e-1}
  - model: b
    parameters: {weight: [{filter: norm, value: 2}, {filter: q_proj, value: 0}]}
parameters:
  weight: [{filter: layers.1., value: 0.4}, {filter: "*", value: 0.7}]
  density: [0.3, 0.8]
  normalize: [{filter: embed, value: false}, {value: yes}]
dtype: float32
""",
    "slices_ties": """merge_method: ties
base_model: z
slices:
  - sources:
      - {model: a, layer_range: [0, 2], parameters: {weight: 0.9}}
      - {model: z, layer_range: [0, 2]}
      - {model: b, layer_range: [1, 3]}
    parameters: {weight: [0.1, 0.6], density: 0.7}
  - sources:
      - {model: z, layer_range: [2, 3]}
      - {model: c, layer_range: [0, 1]}
parameters: {weight: 0.5, density: [0.2, 1.0]}
dtype: float32
""",
    "slices_slerp": """merge_method: slerp
slices:
  - base_model: a
    sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
    parameters: {t: 0.25}
  - base_model: b
    sources: [{model: a, layer_range: [1, 3]}, {model: b, layer_range: [1, 3]}]
base_model: a
parameters: {t: [{filter: mlp, value: [0, 1]}, {value: 0.6}]}
dtype: float32
""",
    "stack": _STACK,
    "modules": """merge_method: linear
modules:
  default:
    models:
      - {model: a, parameters: {weight: 0.3}}
      - {model: b}
    parameters: {weight: [{filter: mlp, value: 2}]}
parameters: {weight: 1}
dtype: float32
""",
    "modules_t5": """merge_method: linear
modules:
  encoder:
    slices:
      - sources: [{model: tz, layer_range: [0, 2]}, {model: ta, layer_range: [0, 2]}]
      - sources: [{model: ta, layer_range: [1, 2]}, {model: tb, layer_range: [1, 2]}]
  decoder:
    models: [{model: tz}, {model: tb, parameters: {weight: [0.2, 0.8]}}]
  shared:
    models: [{model: ta}, {model: tb}]
    parameters: {weight: 3}
base_model: tz
parameters: {weight: 1}
dtype: float32
""",
    "gpt2": """merge_method: slerp
base_model: gz
slices:
  - sources: [{model: gz, layer_range: [0, 3]}, {model: ga, layer_range: [0, 3]}]
  - sources: [{model: ga, layer_range: [2, 3]}, {model: gz, layer_range: [1, 2]}]
parameters: {t: [0.1, 0.9]}
dtype: float32
""",
    # tied heads, dtypes
    "tied": _all(
        "linear",
        "{weight: [{filter: lm_head, value: 2}, {value: 1}]}",
        _plain("a", "tied"),
        "",
    ),
    "half": _all("linear", models=_WEIGHTED, base="").replace(
        "dtype: float32", "dtype: float32\nout_dtype: float16"
    ),
    # vocabularies
    "union": _VOCAB + "tokenizer_source: union\ndtype: float32\n",
    "union_linear": """merge_method: linear
models:
  - {model: vz, parameters: {weight: 0.5}}
  - {model: vb, parameters: {weight: 0.3}}
  - {model: vc, parameters: {weight: 0.7}}
base_model: va
parameters: {weight: 0.2}
tokenizer: {source: union, pad_to_multiple_of: 16}
dtype: float32
""",
    "base": _VOCAB + "tokenizer_source: base\ndtype: float32\n",
    "other": _VOCAB + "tokenizer_source: vb\ndtype: float32\n",
    "tokens": _VOCAB
    + """tokenizer:
  source: union
  tokens:
    "<new>": {source: {kind: zero}}
    "<like_w3>": {source: {kind: model_token, model: vb, token: w3}}
    "<id>": {source: {kind: model_token, model: va, token_id: 5}}
    only_b: {source: vb, force: true}
    w4: {source: va, force: true}
  pad_to_multiple_of: 8
dtype: float32
chat_template: chatml
""",
    "auto_template": _VOCAB.replace("vz", "va").replace("model: va", "model: vc", 1)
    + "tokenizer_source: base\nchat_template: auto\ndtype: float32\n",
}
