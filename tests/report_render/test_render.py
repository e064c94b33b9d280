"""The files of a report: the numbers in full, the pictures, and what may be replaced."""

import dataclasses
import json
from html import escape
from xml.etree import ElementTree

import pytest

from moeadapt.errors import ConfigError, ExportError, UnsupportedError
from moeadapt.report import output
from moeadapt.report.panels import PICTURE_NAMES
from moeadapt.report.render import numbers, render
from moeadapt.report.wording import rounded
from tests.report_render.sample import sample


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "run.html"
    return out, render(sample(), out)


@pytest.fixture
def quick():
    """A report that is drawn fast: one layer, no log, one domain."""
    return sample(layers=1, domains=["one"], training=False, similar=False, texts=False)


def test_the_json_file_is_the_data(written):
    out, paths = written
    assert paths[1] == out.with_suffix(".json")
    assert json.loads(paths[1].read_text()) == rounded(sample().to_json())


def test_hostile_texts_come_back_from_json_as_they_were():
    data = sample(hostile=True, layers=1)
    assert json.loads(numbers(data)) == rounded(data.to_json())


def test_what_is_no_number_is_null_in_json():
    data = dataclasses.replace(sample(), seconds=float("nan"))
    assert json.loads(numbers(data))["seconds"] is None


def test_every_picture_is_a_file_twice(written):
    out, paths = written
    folder = out.with_name("run_files")
    names = {f"{name}{ending}" for name in PICTURE_NAMES for ending in (".svg", ".png")}
    assert {path.name for path in folder.iterdir()} == names
    assert set(paths[2:]) == set(folder.iterdir())
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 2000
    for path in folder.glob("*.svg"):
        root = ElementTree.fromstring(path.read_text())
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.get("role") == "img"
        told = root.find("{http://www.w3.org/2000/svg}title")
        assert told is not None
        assert told.text in out.read_text() or escape(told.text) in out.read_text()


def test_nothing_else_is_left_beside_a_report(written):
    out, _ = written
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "run.html",
        "run.json",
        "run_files",
    ]


def test_a_report_replaces_an_older_one_and_drops_its_pictures(tmp_path, quick):
    out = tmp_path / "run.html"
    render(quick, out)
    stale, kept = tmp_path / "run_files" / "flow.png", tmp_path / "run_files" / "notes.txt"
    stale.write_bytes(b"old")
    kept.write_text("mine")
    render(dataclasses.replace(quick, title="second"), out)
    assert "<h1>second</h1>" in out.read_text()
    assert json.loads(out.with_suffix(".json").read_text())["title"] == "second"
    assert not stale.exists()
    assert kept.read_text() == "mine"


def test_a_page_of_another_kind_is_not_replaced(tmp_path, quick):
    out = tmp_path / "index.html"
    out.write_text("<!doctype html><title>mine</title>")
    with pytest.raises(ConfigError, match="is no report of moeadapt; remove it"):
        render(quick, out)
    assert out.read_text() == "<!doctype html><title>mine</title>"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("name", ["run.json", "run_files"])
def test_what_would_be_beside_the_report_is_not_replaced_either(tmp_path, quick, name):
    (tmp_path / name).mkdir() if "." not in name else (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match="remove it, or name another report"):
        render(quick, tmp_path / "run.html")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_name_that_is_no_page_is_refused(tmp_path, quick):
    with pytest.raises(ConfigError, match=r"ends in \.html"):
        render(quick, tmp_path / "run.pdf")


def test_a_folder_and_a_link_are_refused(tmp_path, quick):
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        render(quick, tmp_path / "folder.html")
    (tmp_path / "link.html").symlink_to(tmp_path / "else.html")
    with pytest.raises(ConfigError, match="is a link"):
        render(quick, tmp_path / "link.html")


def test_a_report_without_layers_is_refused(tmp_path, quick):
    with pytest.raises(ConfigError, match="no layer"):
        render(dataclasses.replace(quick, layers=[]), tmp_path / "run.html")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_report(tmp_path, quick, monkeypatch):
    out = tmp_path / "run.html"
    render(quick, out)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    calls = []

    def full(path, data, write=output._write):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(data[:10])
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(output, "_write", full)
    with pytest.raises(ExportError, match="free space"):
        render(dataclasses.replace(quick, title="second"), out)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_missing_package_is_named_before_anything_is_written(tmp_path, quick, monkeypatch):
    monkeypatch.setattr("moeadapt.report.render.NEEDS", ("json", "no_such_package"))
    with pytest.raises(UnsupportedError, match=r"needs no_such_package.*moeadapt\[report\]"):
        render(quick, tmp_path / "run.html")
    assert not list(tmp_path.iterdir())
