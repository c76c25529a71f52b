"""Model folders: shards, index, manifest, carried files, the local cache."""

import json
from pathlib import Path
import pickle
import tempfile

from corpus import torch_cases
from corpus.reading import read_all, same
from corpus.safetensors_parts import ONE, pack
import numpy as np
import pytest

from jaxlab import io
from jaxlab.io._folder import carry
from jaxlab.io._header import Entry
from jaxlab.io._hub import resolve
from jaxlab.io._names import nest, to_path
from jaxlab.io._shards import index_bytes, plan_shards, verify

SHARD = "model-00001-of-00002.safetensors"


def _model(folder: Path, shard_size: float = 40) -> dict[str, np.ndarray]:
    flat = {f"layers.{i}.w": np.full((3, 3), i, np.float32) for i in range(4)}
    io.save(
        folder, nest({to_path(n): x for n, x in flat.items()}), shard_size=shard_size
    )
    return flat


def test_folder_round_trip(tmp_path: Path):
    flat = _model(tmp_path / "m")
    names = sorted(p.name for p in (tmp_path / "m").iterdir())
    shards = [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    index = "model.safetensors.index.json"
    assert names == ["jaxlab_manifest.json", *shards, index]
    for path in (tmp_path / "m", tmp_path / "m" / index):
        got = read_all(path)
        assert got.keys() == flat.keys()
        for name in flat:
            same(got[name], flat[name])
    verify(tmp_path / "m")
    with io.open(tmp_path / "m") as checkpoint:
        where, shard = repr(str(tmp_path / "m")), repr(str(tmp_path / "m" / shards[0]))
        text = f"Checkpoint({where}, safetensors, 4 tensors, 0.0 MB)"
        assert repr(checkpoint) == text
        tensor = checkpoint.tensors["layers.0.w"]
        assert repr(tensor) == f"Tensor('layers.0.w', float32[3, 3], {shard})"
        assert (tensor.size, tensor.nbytes, checkpoint.nbytes) == (9, 36, 144)


def test_damage_is_found(tmp_path: Path):
    _model(tmp_path / "m")
    shard = tmp_path / "m" / "model-00002-of-00004.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + b"\1")
    io.open(tmp_path / "m").close()
    with pytest.raises(io.FormatError, match=r"model-00002.*SHA-256"):
        verify(tmp_path / "m")
    for bad in (good[:-4], b"", good + b"\0"):
        shard.write_bytes(bad)
        with pytest.raises(io.FormatError, match=r"model-00002.*incomplete"):
            io.open(tmp_path / "m")
    shard.unlink()
    for check in (io.open, verify):
        with pytest.raises(io.FormatError, match=r"model-00002.*missing"):
            check(tmp_path / "m")
    manifest = tmp_path / "m" / "jaxlab_manifest.json"
    for bad in (
        "[]",
        "{}",
        '{"version":1,"files":{"../x":{"size":1,"sha256":""}}}',
        "{",
        '{"a":1,"a":1}',
    ):
        manifest.write_text(bad)
        with pytest.raises(io.FormatError, match="manifest"):
            io.open(tmp_path / "m")


def test_plan_never_cuts_a_tensor():
    entries = [
        Entry(str(i), np.dtype(np.uint8), (n,))
        for i, n in enumerate([5, 5, 30, 1, 9, 2])
    ]
    plan = plan_shards(entries, 10)
    sizes = [[e.nbytes for e in held] for _, held in plan]
    assert sizes == [[5, 5], [30], [1, 9], [2]]
    assert [e for _, held in plan for e in held] == entries
    index = json.loads(index_bytes(plan))
    assert index["metadata"]["total_size"] == 52
    assert index["weight_map"]["2"] == "model-00002-of-00004.safetensors"
    assert index_bytes(plan) == index_bytes(plan_shards(entries, 10))
    assert plan_shards([], 10) == [("model.safetensors", ())]


CARRIED = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "preprocessor_config.json",
    "additional_chat_templates/tool.jinja",
]


def test_model_folder_carries_its_files(tmp_path: Path):
    _model(tmp_path / "m", 1e9)
    (tmp_path / "m" / "additional_chat_templates").mkdir()
    for name in [*CARRIED, "README.md", "modeling_x.py", "optimizer.bin"]:
        (tmp_path / "m" / name).write_text('{"limit": [0.0, Infinity]}')
    with io.open(tmp_path / "m") as checkpoint:
        assert checkpoint.config == {"limit": [0.0, float("inf")]}
        found = [p.relative_to(checkpoint.path).as_posix() for p in checkpoint.carried]
        assert sorted(found) == sorted(CARRIED)
        (tmp_path / "copy").mkdir()
        copied = carry(checkpoint, tmp_path / "copy")
    assert copied.keys() == set(CARRIED)
    for name in CARRIED:
        assert (tmp_path / "copy" / name).read_bytes() == (
            tmp_path / "m" / name
        ).read_bytes()
    (tmp_path / "m" / "tokenizer.json").unlink()
    (tmp_path / "m" / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(
        io.FormatError, match=r"tokenizer\.json.*link out of its folder"
    ):
        io.open(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(io.FormatError, match=r"config\.json.*not JSON"):
        io.open(tmp_path / "m")


def test_which_file_is_the_model(tmp_path: Path):
    one = pack(ONE, bytes(4))

    def folder(*names: str) -> Path:
        where = Path(tempfile.mkdtemp(dir=tmp_path))
        for name in names:
            (where / name).write_bytes(one)
        return where

    for names in (
        ["model.safetensors", "other.safetensors", "pytorch_model.bin"],
        ["anything.safetensors"],
        ["diffusion_pytorch_model.safetensors"],
        ["adapter_model.safetensors"],
        ["model-00001-of-00001.safetensors"],
    ):
        assert list(read_all(folder(*names))) == ["a"]
    for names, why in (
        (["a.safetensors", "b.safetensors"], "several safetensors files and no index"),
        ([SHARD], "one shard of several"),
        (["model.safetensors", SHARD], "one shard of several"),
        (["pytorch_model.bin"], r"pytorch_model\.bin.*pickle.*convert"),
        ([], "no safetensors file and no index"),
        (["readme.txt"], "no safetensors file and no index"),
    ):
        with pytest.raises(io.FormatError, match=why):
            io.open(folder(*names))
    twice = folder("x.safetensors.index.json", "y.safetensors.index.json")
    with pytest.raises(io.FormatError, match="several indices"):
        io.open(twice)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".PT", ""])
def test_pickles_are_refused(tmp_path: Path, suffix: str, monkeypatch):
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.delattr(pickle, name)
    path = torch_cases.CASES[0].build(tmp_path).rename(tmp_path / f"model{suffix}")
    with pytest.raises(io.FormatError, match=r"model.*unpickling runs.*safetensors"):
        io.open(path)


def test_unknown_files_are_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(io.FormatError, match=r"a\.txt.*no checkpoint format"):
        io.open(tmp_path / "a.txt")
    io.save(tmp_path / "b.safetensors", {"a": np.ones(1)})
    (tmp_path / "b.safetensors").rename(tmp_path / "b")
    assert list(read_all(tmp_path / "b")) == ["a"]


def test_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    home = tmp_path / "hub" / "models--org--name"
    snapshot = home / "snapshots" / "abc123"
    (home / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc123\n")
    (home / "blobs" / "00ff").write_bytes(pack(ONE, bytes(4)))
    (snapshot / "model.safetensors").symlink_to("../../blobs/00ff")
    for name in ("org/name", "org/name@main", "org/name@abc123"):
        assert resolve(name) == snapshot
        assert list(read_all(name)) == ["a"]
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HOME", "/nowhere")
    assert resolve("org/name") == snapshot
    for name in ("org/other", "org/name@v2", "org/name@../../x"):
        with pytest.raises(FileNotFoundError, match=name):
            resolve(name)
    with pytest.raises(
        FileNotFoundError, match="hf download org/other --revision main"
    ):
        resolve("org/other")
    (home / "refs" / "main").write_text("../../../x")
    with pytest.raises(FileNotFoundError):
        resolve("org/name")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../refs/main")
    with pytest.raises(io.FormatError, match="link out of its folder"):
        io.open(snapshot)
