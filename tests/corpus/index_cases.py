"""Folders of shards with an index: 33 cases, one rule of the folder each."""

import json
import os

from . import Case
from .safetensors_parts import ZERO, info, pack

A, B, BOTH = (
    pack({"a": info()}, ZERO),
    pack({"b": info()}, ZERO),
    pack({"a": info(), "b": info(offsets=(4, 8))}, bytes(8)),
)
MAP = {"a": "s1.safetensors", "b": "s2.safetensors"}


def _case(name, why, places=None, *, text=None, after=None, want="refuse", total=8):
    """A folder of two good shards and an index; `after` spoils the folder."""

    def build(root):
        folder = root / name
        folder.mkdir()
        (folder / "s1.safetensors").write_bytes(A)
        (folder / "s2.safetensors").write_bytes(B)
        (root / "outside.safetensors").write_bytes(B)
        where = places(root) if callable(places) else places
        index = {"metadata": {"total_size": total}, "weight_map": where}
        content = json.dumps(index) if text is None else text
        (folder / "model.safetensors.index.json").write_text(content)
        if after:
            after(folder)
        return folder

    return Case(name, want, why, build)


def _to(file):
    """The good map, with b in another file."""
    return {**MAP, "b": file}


def _link(target):
    def after(folder):
        (folder / "s2.safetensors").unlink()
        (folder / "s2.safetensors").symlink_to(target)

    return after


def _replace(make):
    def after(folder):
        (folder / "s2.safetensors").unlink()
        make(folder / "s2.safetensors")

    return after


def _put(file, content):
    return lambda folder: (folder / file).write_bytes(content)


def _as_bin(folder):
    (folder / "s2.safetensors").rename(folder / "s2.bin")


DUPLICATE = (
    '{"metadata":{},"weight_map":'
    '{"a":"s1.safetensors","a":"s2.safetensors","b":"s2.safetensors"}}'
)
UP = "../outside.safetensors"

CASES = [
    _case("ok", "control", MAP, want="accept"),
    _case("traversal", "out of the folder", _to(UP)),
    _case(
        "traversal_mid",
        "out by a detour",
        _to("sub/../../outside.safetensors"),
        after=lambda folder: (folder / "sub").mkdir(),
    ),
    _case("absolute", "absolute", lambda root: _to(str(root / "outside.safetensors"))),
    _case("backslash", "out, as on Windows", _to("..\\outside.safetensors")),
    _case("url", "no file", _to("https://example.com/x.safetensors")),
    _case("nul", "a NUL", _to("s2\0.safetensors")),
    _case("not_safetensors", "towards a pickle", _to("s2.bin"), after=_as_bin),
    _case("dot", "the folder", _to(".")),
    _case("empty_name", "nothing", _to("")),
    _case("self", "the index", _to("model.safetensors.index.json")),
    _case("missing_shard", "no such file", _to("s3.safetensors")),
    _case("missing_tensor", "no shard has c", {**MAP, "c": "s2.safetensors"}),
    _case(
        "extra_tensor",
        "a weight would be dropped",
        {"a": "s1.safetensors"},
        after=_put("s1.safetensors", BOTH),
    ),
    _case("wrong_shard", "swapped", {"a": "s2.safetensors", "b": "s1.safetensors"}),
    _case("tensor_in_two_shards", "a twice", MAP, after=_put("s2.safetensors", BOTH)),
    _case("dup_weight", "a mapped twice", text=DUPLICATE),
    _case("no_weight_map", "no map", text="{}"),
    _case("weight_map_list", "a list", [["a", "s1.safetensors"]]),
    _case("value_int", "no string", _to(2)),
    _case("value_list", "no string", _to(["s2.safetensors"])),
    _case("empty_map", "shards, but no weights", {}),
    _case("total_size_wrong", "only advice", MAP, total=9, want="accept"),
    _case("bad_json", "truncated", text='{"weight_map":{"a":"s1.safe'),
    _case("top_list", "no object", text="[]"),
    _case("deep_json", "nested", text="[" * 100_000 + "]" * 100_000),
    _case("bom", "a mark", text="\ufeff" + json.dumps({"weight_map": MAP})),
    _case("symlink_cycle", "to itself", MAP, after=_link("s2.safetensors")),
    _case("symlink_out", "out of the folder", MAP, after=_link(UP)),
    _case("symlink_dangling", "to nothing", MAP, after=_link("nowhere")),
    _case("shard_is_dir", "a folder", MAP, after=_replace(os.mkdir)),
    _case("shard_is_fifo", "a pipe blocks", MAP, after=_replace(os.mkfifo)),
    _case(
        "both_single_and_index",
        "which is it",
        MAP,
        after=_put("model.safetensors", BOTH),
    ),
]
