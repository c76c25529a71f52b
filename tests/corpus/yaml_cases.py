"""Bad and good recipe files, built by rule: name -> (accept?, bytes)."""


def _bomb(first: str, item: str, levels: int) -> str:
    rows = [first]
    rows += [
        f"a{i}: &a{i} {item % ','.join([f'*a{i - 1}'] * 9)}" for i in range(1, levels)
    ]
    return "\n".join(rows)


_RECIPE = (
    "merge_method: {0}\nbase_model: z\nmodels:\n  - model: a\n    parameters: {1}\n"
)


def _with(parameters: str, method: str = "task_arithmetic") -> str:
    return _RECIPE.format(method, parameters)


_TEXTS = {
    "ok": (True, _with("{weight: 0.5}")),
    "ok_alias": (
        True,
        "merge_method: task_arithmetic\nbase_model: z\nmodels:\n"
        "  - {model: a, parameters: &p {weight: 1}}\n  - {model: b, parameters: *p}\n",
    ),
    "ok_merge": (
        True,
        "merge_method: task_arithmetic\nbase_model: z\nmodels:\n"
        "  - {model: a, parameters: &p {weight: 1}}\n"
        "  - {model: b, parameters: {<<: *p}}\n",
    ),
    "ok_exponent": (True, _with("{weight: 1e-3}")),
    "ok_quoted_number": (True, _with("{weight: '0.5'}")),
    "ok_yes": (True, _with("{weight: 1}") + "parameters: {normalize: yes}\n"),
    "alias_bomb": (False, _bomb("a0: &a0 [x,x,x,x,x,x,x,x,x]", "[%s]", 9)),
    "merge_bomb": (False, _bomb("a0: &a0 {k: v}", "{<<: [%s]}", 8)),
    "recursive": (False, "a: &a [*a]\n"),
    "python_tag": (False, "a: !!python/object/apply:os.getenv [PATH]\n"),
    "unknown_tag": (False, "a: !foo 1\n"),
    "standard_tag": (False, _with("{weight: !!float 1}")),
    "dup_key": (False, "weight: 1\nweight: 2\n"),
    "dup_key_in_recipe": (False, _with("{weight: 1, weight: 2}")),
    "deep": (False, "[" * 20_000 + "]" * 20_000),
    "deep_block": (False, "\n".join(" " * i + "- " for i in range(0, 200, 2))),
    "deep_alias": (
        False,
        "a: &a " + "[" * 40 + "]" * 40 + "\nb: " + "[" * 40 + "*a" + "]" * 40,
    ),
    "two_docs": (False, "a: 1\n---\nb: 2\n"),
    "norway": (False, _with("{weight: no}")),
    "nan": (False, _with("{weight: .nan}")),
    "nan_quoted": (False, _with("{weight: 'nan'}")),
    "infinity": (False, _with("{weight: -.inf}")),
    "huge_number": (False, _with("{weight: 1e999}")),
    "octal": (False, _with("{weight: 010}")),
    "hexadecimal": (False, _with("{weight: 0x10}")),
    "underscore": (False, _with("{weight: 1_0}")),
    "sexagesimal": (False, _with("{weight: 1:30}")),
    "text_for_number": (False, _with("{weight: half}")),
    "number_for_bool": (False, _with("{weight: 1}") + "parameters: {normalize: 1}\n"),
    "shared_for_one": (False, _with("{weight: 1, normalize: true}")),
    "bool_for_model": (False, "merge_method: linear\nmodels: [{model: no}]\n"),
    "complex_key": (False, "? [a]\n: 1\n"),
    "undefined_alias": (False, "a: *b\n"),
    "second_anchor": (False, "a: &a 1\nb: &a 2\n"),
    "empty": (False, ""),
    "only_comment": (False, "# nothing\n"),
    "a_list": (False, "- 1\n"),
    "unclosed": (False, "a: [1\n"),
    "tab": (False, "a:\n\tb: 1\n"),
    "too_long": (False, "# " + "x" * 1_000_001),
    "too_many": (False, "a: [" + "0," * 10_001 + "]"),
}

CASES = {name: (good, text.encode()) for name, (good, text) in _TEXTS.items()} | {
    "nul": (False, b"a: \0\n"),
    "nonutf8": (False, b"a: \xff\n"),
    "bom16": (False, "a: 1\n".encode("utf-16")),
}
