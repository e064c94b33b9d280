"""Files and headers of an adapter: cases 1 to 14."""

import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from moeadapt.adapter_format.adapter import AdapterFiles
from moeadapt.errors import AdapterFileError
from tests.faults.loading_kit import (
    MANIFEST,
    SETTINGS,
    WEIGHTS,
    A,
    assert_loads,
    assert_refused,
    assert_untouched,
    base_model,
    by_from_pretrained,
    by_given_settings,
    by_replacing,
    edit_header,
    edit_tensors,
    expected_logits,
    fresh,
    natively,
    refusal,
    reseal,
    shelf,
    state,
)
from tests.tiny import batch, logits


def pickled(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    return folder


def test_fault_001_a_benign_pickled_file_alone_is_refused_with_a_way_to_convert_it(tmp_path):
    folder = fresh(tmp_path)
    pickled(folder, load_file(folder / WEIGHTS))
    assert_refused(folder, "adapter_model.bin.*(Convert|not read)")
    for way in (by_given_settings, by_replacing):
        with refusal("adapter_model.bin.*Convert"):
            way(base_model(), folder)


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_fault_002_a_pickled_file_that_runs_code_is_refused_and_nothing_ran(tmp_path):
    folder = pickled(fresh(tmp_path), {"x": Hostile(tmp_path / "ran")})
    assert_refused(folder, "adapter_model.bin")
    assert not (tmp_path / "ran").exists()


opened: list[str] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str):
        opened.append(arguments[0])


def test_fault_003_a_pickled_file_beside_the_weights_is_never_opened(tmp_path):
    folder = fresh(tmp_path)
    torch.save({"x": Hostile(tmp_path / "ran")}, folder / "adapter_model.bin")
    sys.addaudithook(_watch)
    opened.clear()
    assert_loads(folder)
    base_model().load_adapter(str(folder), use_safetensors=False)
    assert any(str(path).endswith(SETTINGS) for path in opened)  # the hook works
    assert not [path for path in opened if str(path).endswith(".bin")]
    assert not (tmp_path / "ran").exists()


def test_fault_004_an_empty_file_is_refused(tmp_path):
    folder = fresh(tmp_path)
    (folder / WEIGHTS).write_bytes(b"")
    assert_refused(folder, "adapter_model.safetensors: is empty")


def test_fault_005_a_file_cut_off_anywhere_is_refused(tmp_path):
    folder = fresh(tmp_path)
    small = {A: torch.ones(2, 3)}
    edit_tensors(folder, lambda _: small)
    whole = (folder / WEIGHTS).read_bytes()
    (folder / MANIFEST).unlink()
    with pytest.warns(UserWarning, match="has no moeadapt_manifest"):
        AdapterFiles(folder).close()
    for length in range(len(whole)):
        (folder / WEIGHTS).write_bytes(whole[:length])
        with refusal("adapter_model.safetensors: .*(empty|cut off|lacks)"):
            AdapterFiles(folder)
    original = fresh(tmp_path / "2")
    content = (original / WEIGHTS).read_bytes()
    (original / WEIGHTS).write_bytes(content[: len(content) // 2])
    assert_refused(original, "is cut off")


@pytest.mark.parametrize("length", [10**6, 2**63, 2**64 - 1, 200 << 20])
def test_fault_006_a_header_longer_than_the_file_or_the_bound_is_refused_at_once(tmp_path, length):
    folder = fresh(tmp_path)
    with open(folder / WEIGHTS, "r+b") as file:
        file.write(length.to_bytes(8, "little"))
        if length == 200 << 20:
            file.truncate(300 << 20)  # sparse: it takes no room
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with refusal("header"):
        by_from_pretrained(base_model(), folder)
    assert time.monotonic() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10  # kB
    assert_refused(folder, "header")


def _move(by_start: int, by_end: int) -> Any:
    def change(header: dict[str, Any]) -> None:
        first, second = sorted(
            (n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"]
        )[:2]
        del first
        start, end = header[second]["data_offsets"]
        header[second]["data_offsets"] = [start + by_start, end + by_end]

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_move(-4, -4), "overlaps"),
        (_move(4, 4), "leaves a hole"),
        (_move(-(10**9), -(10**9)), "data_offsets"),
        (_move(0, 4), "data_offsets hold"),
        (_move(10**15, 10**15), "leaves a hole|overlaps"),
    ],
    ids=["overlap", "hole", "negative", "longer", "far"],
)
def test_fault_007_tensors_that_do_not_fill_the_file_are_refused(tmp_path, change, match):
    assert_refused(edit_header(fresh(tmp_path), change), match)


def test_fault_008_a_header_with_too_many_tensors_is_refused_before_they_are_read(tmp_path):
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    folder = edit_header(fresh(tmp_path), lambda h: {**h, **{f"t{i}": empty for i in range(10**5)}})
    assert_refused(folder, "holds 1000.. tensors; an adapter has at most 65536")


def test_fault_008_names_written_with_escapes_count_too(tmp_path):
    escaped = b'{"dtype":"F32","shape":[0],"data\\u005foffsets":[0,0]}'

    def many(header):
        rest = b"".join(b',"t%d":%s' % (i, escaped) for i in range(70_000))
        return json.dumps(header).encode()[:-1] + rest + b"}"

    assert_refused(edit_header(fresh(tmp_path), many), "tensors; an adapter has at most 65536")


def test_fault_009_a_name_that_is_there_twice_among_many_is_found_in_time(tmp_path):
    names = b"".join(b',"a%d":0' % i for i in range(90_000))

    def twice(header):
        return json.dumps(header).encode()[:-1] + names + b',"a89999":0}'

    folder = edit_header(fresh(tmp_path), twice)
    start = time.monotonic()
    assert_refused(folder, "field 'a89999' is there twice")
    assert time.monotonic() - start < 20  # each of several ways to load it


NAMES = {
    "twice": (lambda h: json.dumps(h).encode()[:-1] + b"," + json.dumps(h).encode()[1:], "twice"),
    "not utf-8": (lambda h: json.dumps(h).encode().replace(b"q_proj", b"q\xffproj", 1), "UTF-8"),
    "leading space": (lambda h: b" " + json.dumps(h).encode(), "starts with ' '"),
    "space in name": (lambda h: {f" {n}" if n == A else n: v for n, v in h.items()}, "spaces"),
    "control sign": (lambda h: {f"{n}\x00" if n == A else n: v for n, v in h.items()}, "printable"),
    "a list": (lambda h: b"[]", "starts with"),
    "a number as shape": (lambda h: h[A].update(shape=7), "shape 7"),
    "a field more": (lambda h: h[A].update(more=7), "exactly dtype"),
    "unknown type": (lambda h: h[A].update(dtype="F31"), "unknown type 'F31'"),
    "a type of no adapter": (lambda h: h[A].update(dtype="U32"), "unknown type 'U32'"),
    "metadata of numbers": (lambda h: h.update(__metadata__={"a": 1}), "__metadata__"),
    "nested": (lambda h: b'{"a":' + b"[" * 10**5, "nested"),
}


@pytest.mark.parametrize("name", NAMES)
def test_fault_009_a_header_that_is_not_what_it_should_be_is_refused(tmp_path, name):
    change, match = NAMES[name]
    assert_refused(edit_header(fresh(tmp_path), change), match, cli=name == "twice")


def test_fault_010_one_flipped_bit_in_the_numbers_is_refused(tmp_path):
    folder = fresh(tmp_path)
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-3] ^= 4
    (folder / WEIGHTS).write_bytes(content)
    assert_refused(folder, "is not as it was saved: its sha256")
    with refusal("sha256"):
        by_replacing(base_model(), folder)
    (folder / MANIFEST).unlink()
    with pytest.warns(UserWarning, match="has no moeadapt_manifest.json"):
        by_from_pretrained(base_model(), folder)
    by_from_pretrained(base_model(), folder)  # a second warning would be an error


def test_fault_010_a_changed_setting_is_refused(tmp_path):
    folder = fresh(tmp_path)
    path = folder / SETTINGS
    path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    assert_refused(folder, "adapter_config.json: is not as it was saved")


def test_fault_011_one_flipped_bit_in_a_name_is_refused(tmp_path):
    folder = fresh(tmp_path)
    content = (folder / WEIGHTS).read_bytes()
    flipped = content.replace(b"layers.0.self_attn.q_proj.moe", b"layers.0.self_attn.p_proj.moe", 1)
    assert flipped != content
    (folder / WEIGHTS).write_bytes(flipped)
    reseal(folder)
    assert_refused(folder, "p_proj.*do not make on this base; did you mean .*q_proj")


def test_fault_012_links_out_of_the_folder_are_refused(tmp_path):
    for name in (WEIGHTS, SETTINGS):
        folder = fresh(tmp_path / name)
        shutil.move(folder / name, tmp_path / f"elsewhere {name}")
        (folder / name).symlink_to(tmp_path / f"elsewhere {name}")
        assert_refused(folder, f"{name}: is a link to .*elsewhere")


def test_fault_012_a_snapshot_of_the_hubs_cache_loads(tmp_path):
    plain = fresh(tmp_path)
    root = tmp_path / "models--someone--adapter"
    snapshot = root / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for i, path in enumerate(plain.iterdir()):
        shutil.move(path, root / "blobs" / str(i))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(i))
    assert_loads(snapshot)
    (snapshot / WEIGHTS).unlink()
    (snapshot / MANIFEST).unlink()
    shutil.copy(shelf() / "adapter" / MANIFEST, snapshot)
    shutil.move(root / "blobs", tmp_path / "blobs")
    (root / "blobs").mkdir()
    (snapshot / SETTINGS).unlink()
    shutil.copy(shelf() / "adapter" / SETTINGS, snapshot)
    (snapshot / WEIGHTS).symlink_to(tmp_path / "blobs" / "0")
    with refusal("is a link to"):
        AdapterFiles(snapshot)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make", [_pipe, Path.mkdir, lambda p: p.symlink_to("/dev/zero")])
@pytest.mark.parametrize("name", [WEIGHTS, SETTINGS])
def test_fault_013_what_is_no_file_is_refused_and_does_not_hang(tmp_path, name, make):
    folder = fresh(tmp_path)
    (folder / name).unlink()
    make(folder / name)
    assert_refused(folder, f"{name}: is a")


def test_fault_014_a_file_exchanged_while_it_is_loaded_changes_nothing(tmp_path, monkeypatch):
    """What was checked is loaded: the path is not opened again."""
    original = AdapterFiles.read

    def exchange(self: AdapterFiles) -> Any:
        tensors = original(self)
        if self.folder != folder:
            return tensors
        other = edit_tensors(
            fresh(tmp_path / str(time.monotonic_ns())),
            lambda t: {**{n: x + 1 for n, x in t.items()}, "lm_head.weight": torch.ones(2)},
        )
        os.replace(other / WEIGHTS, folder / WEIGHTS)
        return tensors

    monkeypatch.setattr(AdapterFiles, "read", exchange)
    for number, way in enumerate((by_from_pretrained, natively, by_replacing)):
        folder = fresh(tmp_path / str(number))
        base = base_model()
        before = state(base)
        model = way(base, folder).eval()
        assert torch.equal(logits(model, batch()), expected_logits())
        assert_untouched(base, before)
        assert "lm_head.weight" in load_file(folder / WEIGHTS)  # it was exchanged


def test_fault_014_the_numbers_are_read_through_one_handle(tmp_path, monkeypatch):
    from moeadapt.adapter_format import adapter

    folder, names, original = fresh(tmp_path), [], adapter.open_file
    monkeypatch.setattr(adapter, "open_file", lambda f, n: names.append(n) or original(f, n))
    PeftModel.from_pretrained(base_model(), folder)
    assert names.count(WEIGHTS) == 1
    with pytest.raises(AdapterFileError):
        AdapterFiles(tmp_path)
