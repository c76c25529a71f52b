"""Merging 245M-parameter bf16 checkpoints: `jaxlab merge` against `mergekit-yaml`.

Claim:    whole processes, start-up included: ties of 8 models takes at most 1/8 of
          mergekit's CPU time, dare_ties of 8 at most 1/4, linear and slerp no more;
          anonymous memory beyond the bare runtime stays under 256 MB.
Cite:     mergekit 0.1.5 (Goddard et al., 2024, https://arxiv.org/abs/2403.13257).
Command:  python experiments/bench/merge_checkpoints.py --mergekit PATH/TO/mergekit-yaml
          (mergekit in an environment of its own; without it, only ours is measured)
Device:   2 CPU cores. Minutes: 25, and 5 GB of disk; --smoke: under one.
Expected: CPU ratios mergekit : jaxlab of 8 (ties 8), 4 (dare_ties 8), 1 (others).

Each row is the median of paired runs, one of ours after one of theirs, on warm files.
The floor is reading every input byte once and writing every output byte once, measured
here; anonymous memory is RssAnon, sampled every 20 ms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
import json
import os
from pathlib import Path
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
import tyro
import yaml

from jaxlab import io
from jaxlab.io._header import Entry, header_bytes

RESULTS = Path(__file__).parents[1] / "results" / "merge_checkpoints.jsonl"
DTYPE = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Config:
    """What to measure."""

    mergekit: Path | None = None
    """the peer's `mergekit-yaml`"""
    folder: Path = Path(tempfile.gettempdir()) / "jaxlab_bench"
    """where checkpoints are made, and kept for the next time"""
    cases: tuple[str, ...] = (
        "linear:2", "linear:3", "linear:8", "slerp:2", "ties:2", "ties:3", "ties:8",
        "dare_ties:2", "dare_ties:3", "dare_ties:8",
    )  # fmt: skip
    repeats: int = 3
    layers: int = 14
    big: bool = False
    """instead: ties of two 7B-sized models, whose files are mostly holes"""
    smoke: bool = False
    """two tiny models, one run, nothing recorded"""


def shapes(
    layers: int, wide: int, inner: int, vocabulary: int
) -> dict[str, tuple[int, ...]]:
    """A Llama's tensors."""
    out = {"model.embed_tokens.weight": (vocabulary, wide)}
    for i in range(layers):
        prefix = f"model.layers.{i}"
        out |= {f"{prefix}.self_attn.{n}_proj.weight": (wide, wide) for n in "qkvo"}
        out |= {f"{prefix}.mlp.{n}_proj.weight": (inner, wide) for n in ("gate", "up")}
        out[f"{prefix}.mlp.down_proj.weight"] = (wide, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out[f"{prefix}.{norm}.weight"] = (wide,)
    return out | {"model.norm.weight": (wide,), "lm_head.weight": (vocabulary, wide)}


def make(folder: Path, models: int, layers: int, wide: int) -> None:
    """Writes `base` and `m0`, `m1`, ...: the base plus small random changes."""
    names = ["base", *(f"m{i}" for i in range(models))]
    if all((folder / name / "config.json").exists() for name in names):
        return  # from the last time
    inner, vocabulary = wide * 11 // 4, 32000 * wide // 1024
    base: dict[str, np.ndarray] = {}
    for name in names:
        target = folder / name
        rng = np.random.default_rng([ord(c) for c in name])
        tensors = {}
        for key, shape in shapes(layers, wide, inner, vocabulary).items():
            draw = rng.standard_normal(shape, np.float32)
            start = base.get(key)
            x = draw * 0.02 if start is None else start.astype("f4") + draw * 0.002
            tensors[key] = x.astype(DTYPE)
        base = base or tensors
        target.mkdir(parents=True, exist_ok=True)
        io.save(target / "model.safetensors", tensors, metadata={"format": "pt"})
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "hidden_size": wide, "intermediate_size": inner,
            "num_hidden_layers": layers, "num_attention_heads": 16,
            "num_key_value_heads": 16, "vocab_size": vocabulary,
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip
        (target / "config.json").write_text(json.dumps(config))


def make_big(folder: Path) -> None:
    """Writes 7B-sized models as sparse files: the start of each tensor is random."""
    tensors = shapes(32, 4096, 11008, 32000)
    entries = [Entry(name, DTYPE, shape) for name, shape in tensors.items()]
    header = header_bytes(entries, {"format": "pt"})
    rng = np.random.default_rng(0)
    for name in ("base", "m0", "m1"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        with (folder / name / "model.safetensors").open("wb") as file:
            file.write(header)
            at = len(header)
            for entry in entries:
                file.seek(at)
                count = min(entry.nbytes // 2, 2**18)
                file.write((rng.standard_normal(count) * 0.02).astype(DTYPE).tobytes())
                at += entry.nbytes
            file.truncate(at)
        config = {"model_type": "llama", "num_hidden_layers": 32, "vocab_size": 32000}
        (folder / name / "config.json").write_text(json.dumps(config))


def recipe(folder: Path, method: str, k: int) -> dict:
    """The same YAML for both programs."""
    models = [str(folder / f"m{i}") for i in range(k)]
    out: dict = {"merge_method": method, "dtype": "bfloat16"}
    if method == "linear":
        given: dict = {"weight": 1.0}
    elif method == "slerp":
        return out | {
            "base_model": models[0],
            "models": [{"model": m} for m in models],
            "parameters": {"t": 0.4},
        }
    else:
        out["base_model"] = str(folder / "base")
        given = {"weight": 1.0 / k, "density": 0.5}
    return out | {"models": [{"model": m, "parameters": given} for m in models]}


def measure(command: Sequence[str]) -> dict[str, float]:
    """Runs a process; its CPU and wall seconds and the peak of its anonymous memory."""
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    start = time.perf_counter()
    child = subprocess.Popen(
        command,
        env=os.environ | quiet,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    anonymous = 0
    while True:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            break
        anonymous = max(anonymous, _anonymous(child.pid))
        time.sleep(0.02)
    wall = time.perf_counter() - start
    if status:
        assert child.stderr is not None
        sys.exit(f"{' '.join(command)} failed:\n{child.stderr.read().decode()[-2000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"cpu": cpu, "wall": wall, "anonymous": anonymous / 1e6}


def _anonymous(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    line = next((x for x in text.splitlines() if x.startswith("RssAnon")), "0 0 kB")
    return int(line.split()[1]) * 1024


def floor(inputs: Sequence[Path], size: int, scratch: Path) -> tuple[float, int]:
    """Seconds to read the inputs once and write `size` bytes to disk; bytes moved."""
    buffer = np.empty(2**22, np.uint8)
    start = time.perf_counter()
    for path in inputs:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    with scratch.open("wb") as file:
        for _ in range(size // len(buffer)):
            file.write(buffer)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    scratch.unlink()
    return seconds, sum(p.stat().st_size for p in inputs) + size


def place(config: Config) -> Path:
    """Where the checkpoints of a run lie."""
    size = "smoke" if config.smoke else "big" if config.big else "llama"
    return config.folder / size


def case(config: Config, method: str, k: int, bare: dict[str, float]) -> dict:
    """One row: medians of paired runs, and their ratios."""
    folder = place(config)
    spec, out = folder / f"{method}_{k}.yaml", folder / "out"
    spec.write_text(yaml.safe_dump(recipe(folder, method, k)))
    names = [f"m{i}" for i in range(k)] + ["base"] * (method not in ("linear", "slerp"))
    inputs = [folder / n / "model.safetensors" for n in names]
    commands = {
        "jaxlab": [sys.executable, "-m", "jaxlab", "merge", str(spec), str(out)]
    }
    if config.mergekit is not None:
        peer = [str(config.mergekit), str(spec), str(out)]
        commands["mergekit"] = [*peer, "--quiet", "--no-copy-tokenizer"]
    seconds, moved = floor(inputs, inputs[0].stat().st_size, folder / "scratch")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(1 if config.smoke or config.big else config.repeats):
        for name in reversed(commands):
            shutil.rmtree(out, ignore_errors=True)
            runs[name].append(measure(commands[name]))
    shutil.rmtree(out, ignore_errors=True)
    middle = lambda name, key: statistics.median(r[key] for r in runs[name])
    row: dict = {"method": method, "models": k, "GB": moved / 1e9, "floor": seconds}
    for name in commands:
        row |= {
            f"{name}_{key}": middle(name, key) for key in ("cpu", "wall", "anonymous")
        }
    row["beyond_runtime"] = row["jaxlab_anonymous"] - bare["anonymous"]
    row["of_floor"] = seconds / row["jaxlab_wall"]
    row["of_floor_work"] = seconds / max(row["jaxlab_wall"] - bare["wall"], 1e-3)
    if config.mergekit is not None:
        pairs = zip(runs["mergekit"], runs["jaxlab"], strict=True)
        row["cpu_ratio"] = statistics.median(a["cpu"] / b["cpu"] for a, b in pairs)
        row["wall_ratio"] = row["mergekit_wall"] / row["jaxlab_wall"]
    return row


def run(config: Config) -> list[dict]:
    """Makes the checkpoints, measures every case, prints and records the table."""
    few = config.smoke or config.big
    cases = [c.split(":") for c in (("ties:2",) if few else config.cases)]
    if config.big:
        make_big(place(config))
    else:
        layers, wide = (2, 64) if config.smoke else (config.layers, 1024)
        make(place(config), max(int(k) for _, k in cases), layers, wide)
    code = "import jax, jaxlab.io, jaxlab.merge; jax.numpy.ones(1).block_until_ready()"
    bare = measure([sys.executable, "-c", code])
    rows = [
        case(config, method, int(k), bare)
        for method, k in track(cases, "merging", transient=True)
    ]
    show(rows)
    if not config.smoke:
        commit = ["git", "rev-parse", "--short", "HEAD"]
        head = subprocess.run(
            commit, capture_output=True, text=True, check=False
        ).stdout
        line = {
            "bare": bare,
            "rows": rows,
            "git": head.strip(),
            "cores": os.cpu_count(),
        }
        line["when"] = datetime.now(UTC).isoformat(timespec="seconds")
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
    return rows


def show(rows: Sequence[dict]) -> None:
    """Prints the rows as a table."""
    table = Table("method", "models", "GB", "floor s")
    keys = [k for k in rows[0] if k not in ("method", "models", "GB", "floor")]
    for key in keys:
        table.add_column(key.replace("_", " "), justify="right")
    for row in rows:
        numbers = [f"{row[k]:.2f}" for k in ("GB", "floor", *keys)]
        table.add_row(row["method"], str(row["models"]), *numbers)
    Console(width=200).print(table)


def main() -> None:
    """Reads the command line."""
    run(tyro.cli(Config))


if __name__ == "__main__":
    main()
