"""Files of an adapter for the fuzzers: a tiny valid one, and strategies that damage it anywhere."""

import json
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import strategies as st

from moeadapt import BALANCE, EXPERTS, ROUTERS
from tests.tiny import adapt, moe_config, tiny

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MANIFEST = "moeadapt_manifest.json"


@dataclass(frozen=True, kw_only=True)
class Files:
    """What lies in the folder of an adapter.

    Attributes:
        settings: content of adapter_config.json.
        weights: content of adapter_model.safetensors.
        manifest: content of the manifest; None: there is none.
        sealed: write a manifest that fits the other two instead.
    """

    settings: bytes
    weights: bytes
    manifest: bytes | None = None
    sealed: bool = False


@cache
def valid() -> Files:
    """Return a small adapter of `tiny("llama")` as it is saved."""
    config = moe_config(
        "layer", r=2, num_experts=2, target_modules=["q_proj"], layers_to_transform=[0]
    )
    with TemporaryDirectory() as name:
        adapt(tiny("llama"), config, seed=1).save_pretrained(name)
        settings, weights, manifest = (
            (Path(name) / file).read_bytes() for file in (SETTINGS, WEIGHTS, MANIFEST)
        )
    return Files(settings=settings, weights=weights, manifest=manifest)


# --- JSON, changed anywhere

SPECIAL = [math.nan, math.inf, -math.inf, 1e308, 1e38, -0.0, 2**63, 2**64, -(2**31), 10**9, 10**30]

WORDS = ["", "q_proj", "all-linear", "(a+)+$", ".*", "*(", "os", "../../x", "/etc", "\0", "\ud800"]

HERE = ["r", "dtype", "F16", "I64", "lora", "top_k", "top_p", "hash", "block", "ffn", "SEQ_CLS"]
"""Words that mean something in one of the files."""

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.floats(width=32),
    st.sampled_from(SPECIAL),
    st.sampled_from(WORDS + HERE),
    st.text(max_size=5),
)
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)


numbers = st.one_of(st.integers(-1, 40), st.sampled_from(SPECIAL), st.floats(width=32))

PATTERNS = ["all-linear", "(.*)*q_proj", ["q_proj", "v_proj"], ["lm_head"], ["embed_tokens"], ["x"]]

fields = st.one_of(
    st.tuples(st.just("router"), st.sampled_from([{"name": name} for name in sorted(ROUTERS)])),
    st.tuples(st.just("experts"), st.sampled_from(sorted(EXPERTS))),
    st.tuples(st.just("balance"), st.sampled_from([{name: 0.1} for name in sorted(BALANCE)])),
    st.tuples(st.just("placement"), st.sampled_from(["linear", "ffn", "glu"])),
    st.tuples(st.just("router_scope"), st.sampled_from(["layer", "block"])),
    st.tuples(st.just("target_modules"), st.sampled_from(PATTERNS)),
    st.tuples(st.just("modules_to_save"), st.sampled_from(PATTERNS)),
    st.tuples(st.just("layers_to_transform"), st.lists(numbers, max_size=3)),
    st.tuples(st.sampled_from(["r", "num_experts", "lora_alpha", "n_shared"]), numbers),
    st.tuples(
        st.sampled_from(["alpha_pattern", "rank_pattern", "experts_pattern"]),
        st.dictionaries(st.sampled_from(["q_proj", ".*", "(a+)+$", "*("]), numbers, max_size=2),
    ),
    st.tuples(st.just("trainable_token_indices"), st.lists(numbers, max_size=3)),
    st.tuples(st.just("init_lora_weights"), st.sampled_from([True, "svd_segments", "pissa", "x"])),
    st.tuples(st.just("task_type"), st.sampled_from(["SEQ_CLS", "FEATURE_EXTRACTION", "x"])),
    st.tuples(st.just("use_rslora"), st.booleans()),
)
"""A field of the settings and a value that means something there."""


def places(document: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of everything in a document."""
    items = (
        list(document.items())
        if isinstance(document, dict)
        else list(enumerate(document))
        if isinstance(document, list)
        else []
    )
    found = [(document, key) for key, _ in items]
    for _, value in items:
        found.extend(places(value))
    return found


def change(draw: Any, document: Any) -> Any:
    """Change a document at one to three places."""
    for _ in range(draw(st.integers(1, 3))):
        found = places(document)
        if not found:
            return draw(anything)
        holder, key = found[draw(st.integers(0, len(found) - 1))]
        how = draw(st.sampled_from(["set", "set", "near", "delete", "add", "move", "nest"]))
        if how == "delete":
            del holder[key]
        elif how == "add" and isinstance(holder, dict):
            holder[draw(st.one_of(st.sampled_from(WORDS + HERE), st.text(max_size=4)))] = draw(
                anything
            )
        elif how == "move":
            other, name = found[draw(st.integers(0, len(found) - 1))]
            # Copied through JSON, or a document would hold itself.
            holder[key] = json.loads(json.dumps(other[name])) if name in _keys(other) else None
        elif how == "near" and isinstance(holder[key], int | float):
            holder[key] += draw(st.integers(-2, 2))
        elif how == "nest":
            holder[key] = json.loads("[" * 40 + "]" * 40)
        else:
            holder[key] = draw(anything)
    return document


def _keys(holder: Any) -> Any:
    return holder if isinstance(holder, dict) else range(len(holder))


def to_bytes(document: Any) -> bytes:
    return json.dumps(document).encode("utf-8", "surrogatepass")


# --- bytes, changed anywhere

PIECES = [b"", b"\0", b"\xff\xff\xff\xff", b"{", b'"a":', b"[" * 100, b"NaN", b"\x00\x00\x80\x7f"]

pieces = st.one_of(st.sampled_from(PIECES), st.binary(max_size=24))


def damage(draw: Any, content: bytes) -> bytes:
    """Flip, cut, insert, overwrite or repeat bytes at one to four places."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        how = draw(st.sampled_from(["flip", "flip", "insert", "overwrite", "remove", "cut"]))
        if how == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del data[at:]
        elif how == "remove":
            del data[at : at + draw(st.integers(1, 64))]
        else:
            piece = draw(pieces)
            data[at : at if how == "insert" else at + len(piece)] = piece
    return bytes(data)


def split(weights: bytes) -> tuple[dict[str, Any], bytes]:
    """Return header and numbers of a file of weights."""
    size = int.from_bytes(weights[:8], "little")
    return json.loads(weights[8 : 8 + size]), weights[8 + size :]


def join(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


SIZES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I64": 8, "I8": 1, "BOOL": 1, "F8_E4M3": 1}


def rewrite(draw: Any, weights: bytes) -> bytes:
    """Write a file that is in order with other tensors: names, types, shapes, numbers."""
    header, data = split(weights)
    header.pop("__metadata__", None)
    names = sorted(header)
    tensors = {n: (header[n]["dtype"], header[n]["shape"]) for n in names}
    content = {n: data[slice(*header[n]["data_offsets"])] for n in names}
    name = names[draw(st.integers(0, len(names) - 1))]
    how = draw(st.sampled_from(["numbers", "numbers", "type", "shape", "rename", "add", "drop"]))
    if how == "numbers":
        content[name] = damage(draw, content[name])[: len(content[name])].ljust(
            len(content[name]), b"\0"
        )
    elif how == "drop":
        del tensors[name]
    elif how == "rename":
        tensors[draw(st.sampled_from(NAMES))] = tensors.pop(name)
    else:
        kind = draw(st.sampled_from(sorted(SIZES))) if how == "type" else "F32"
        shape = draw(st.lists(st.integers(0, 40), max_size=3)) if how != "type" else None
        name = draw(st.sampled_from(NAMES)) if how == "add" else name
        tensors[name] = (kind, tensors[name][1] if shape is None else shape)
        piece = draw(pieces)
        size = math.prod(tensors[name][1]) * SIZES[kind]
        content[name] = (piece * (size // max(len(piece), 1) + 1))[:size].ljust(size, b"\0")
    out, new = bytearray(), {}
    for name, (kind, shape) in tensors.items():
        part = content.get(name, bytes(math.prod(shape) * SIZES[kind]))
        places = [len(out), len(out) + len(part)]
        new[name] = {"dtype": kind, "shape": shape, "data_offsets": places}
        out += part
    return join(to_bytes(new), bytes(out))


NAMES = [
    "lm_head.weight",
    "base_model.model.lm_head.weight",
    "base_model.model.model.layers.0.self_attn.q_proj.weight",
    "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
    "base_model.model.model.layers.1.self_attn.q_proj.moeadapt_lora_A.weight",
    "base_model.model.model.layers.0.self_attn.q_proj.moeadapt_lora_C.weight",
    "moeadapt_",
]

KINDS = (
    *("random", "weights", "settings bytes", "header", "header", "manifest", "manifest"),
    *("tensors", "tensors", "tensors", "settings", "settings", "fields", "fields"),
)
"""What is damaged; the ways that get past the first checks are there more often."""


@st.composite
def damaged(draw: Any) -> Files:
    """An adapter with one or two of its files damaged."""
    files = valid()
    for _ in range(draw(st.integers(1, 2))):
        kind = draw(st.sampled_from(KINDS))
        if kind == "random":
            name = draw(st.sampled_from(["settings", "weights", "manifest"]))
            files = replace(files, **{name: draw(st.binary(max_size=200))})
        elif kind == "weights":
            files = replace(files, weights=damage(draw, files.weights))
        elif kind in ("header", "tensors") and files.weights is valid().weights:
            header, data = split(files.weights)
            new = (
                join(to_bytes(change(draw, header)), data)
                if kind == "header"
                else rewrite(draw, files.weights)
            )
            files = replace(files, weights=new)
        elif kind in ("settings", "fields") and files.settings is valid().settings:
            settings = json.loads(files.settings)
            if kind == "settings":
                settings = change(draw, settings)
            else:
                settings.update(draw(st.lists(fields, min_size=1, max_size=2)))
            files = replace(files, settings=to_bytes(settings))
        elif kind == "manifest" and files.manifest is valid().manifest:
            manifest = change(draw, json.loads(files.manifest or b""))
            files = replace(files, manifest=to_bytes(manifest))
        elif kind == "settings bytes":
            files = replace(files, settings=damage(draw, files.settings))
    seal = draw(st.sampled_from(["fits", "fits", "fits", "none", "stays"]))
    if seal == "stays" or files.manifest is not valid().manifest:
        return files
    return replace(files, sealed=seal == "fits", manifest=None)
