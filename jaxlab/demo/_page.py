"""The demo's page: one HTML file that carries its figures within it."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ._results import Results

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #222; max-width: 60rem;
       margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; line-height: 1.25; } h2 { margin-top: 2.5rem; }
img { max-width: 100%; height: auto; display: block; margin: 1.25rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #e4e4e4; }
th:first-child, td:first-child { text-align: left; }
td:last-child { font-weight: 600; }
tr.first td { border-top: 2px solid #999; }
pre { background: #f6f6f4; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
summary { cursor: pointer; } footer { color: #666; margin: 3rem 0; font-size: .9rem; }
"""


def write(results: Results, figures: Sequence[Path], file: Path) -> None:
    """Writes the page; it needs no other file."""
    base, best = results.mean("base"), results.merges[0]
    title = f"Four experts, one model: {base:.0%} → {results.mean(best):.0%}"
    body = [
        f"<h1>{title}</h1>",
        f"<p>{_story(results)}</p>",
        *(_image(f) for f in figures),
        "<h2>Every model on every task</h2>",
        _table(results),
        "<h2>Make them again</h2>",
        _again(results),
        "<h2>Recipes</h2>",
        *(_recipe(m, text) for m, text in results.recipes.items()),
        f"<footer>{_footer(results)}</footer>",
    ]
    head = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>jaxlab demo</title><style>{STYLE}</style>"
    )
    file.write_text(head + "\n".join(body) + "\n</html>\n", encoding="utf-8")


def _story(results: Results) -> str:
    best, expert = results.merges[0], results.best_expert()
    own, others = results.at_home()
    return (
        "A small network, the base, learned scikit-learn's digits. Four copies of "
        "it, the experts, were fine-tuned on one shift each: "
        f"{', '.join(results.experts)}. "
        f"An expert reads {own:.0%} of its own digits and {others:.0%} of the others'. "
        f"Their weights were then merged in {len(results.merges)} ways, without any "
        "data, from safetensors files and by the streaming path that merges a "
        "checkpoint of any size. Over all tasks the base reads "
        f"{results.mean('base'):.1%}, the best expert ({expert}) "
        f"{results.mean(expert):.1%}, the best merge ({best}) "
        f"{results.mean(best):.1%}; both are the best on these very test images. No "
        "recipe was tuned."
    )


def _image(file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="{escape(file.stem)}" src="data:image/png;base64,{data}">'


def _table(results: Results) -> str:
    starts = {results.experts[0], results.merges[0]}
    cells = lambda tag, xs: "".join(f"<{tag}>{escape(x)}</{tag}>" for x in xs)
    rows = []
    for model, values in results.accuracy.items():
        name = f"expert: {model}" if model in results.experts else model
        numbers = [f"{100 * v:.1f}" for v in (*values, results.mean(model))]
        kind = ' class="first"' if model in starts else ""
        rows.append(f"<tr{kind}>{cells('td', [name, *numbers])}</tr>")
    head = cells("th", ["accuracy, %", *results.tasks, "mean"])
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _again(results: Results) -> str:
    one = results.merges[0]
    lines = [
        f"jaxlab demo --seed {results.seed}",
        f"jaxlab merge demo/recipes/{one}.yaml again --seed {results.seed}",
        f"jaxlab diff demo/merged/{one} again    # no difference",
        f"jaxlab diff demo/base demo/merged/{one} --plot diff.png",
        f"jaxlab inspect demo/merged/{one}",
    ]
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def _recipe(method: str, text: str) -> str:
    name, body = escape(method), escape(text)
    return f"<details><summary>{name}</summary><pre>{body}</pre></details>"


def _footer(results: Results) -> str:
    from .. import __version__

    total = sum(results.seconds.values())
    return (
        f"jaxlab {__version__}, seed {results.seed}, {results.tested} test images per "
        f"task, {total:.0f} s. The numbers are in results.json."
    )
