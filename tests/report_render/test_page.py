"""The page: one small offline file, its panels in order, whatever the texts say."""

import base64
import hashlib
import html.parser
import re

import pytest

from moeadapt.report.page import page
from moeadapt.report.panels import PANELS, PICTURE_NAMES
from tests.report_render.sample import DOMAINS, HOSTILE, NASTY, STYLE_ESCAPE, sample

VARIANTS = {
    "plain": {},
    "64 experts": {"experts": 64, "layers": 32, "tokens": 400},
    "every limit": {
        "experts": 64,
        "layers": 48,
        "tokens": 128,
        "domains": [f"domain {n}" for n in range(48)],
    },
    "hostile": {"hostile": True, "layers": 3, "tokens": 20},
    "bare": {"layers": 1, "domains": ["one"], "training": False, "similar": False, "texts": False},
}
LOADING = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"}


class Reader(html.parser.HTMLParser):
    """What a browser would see: elements, and the text inside tokens."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.tokens, self.styles, self.scripts = [], [], [], []
        self.open = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.elements.append((tag, attrs))
        self.open = None
        if tag == "span" and (attrs.get("class") or "").startswith("t "):
            self.open = self.tokens
        elif tag == "style":
            self.open = self.styles
        elif tag == "script" and "type" not in attrs:
            self.open = self.scripts
        if self.open is not None:
            self.open.append("")

    def handle_endtag(self, tag):
        self.open = None

    def handle_data(self, data):
        if self.open is not None:
            self.open[-1] += data

    def having(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def pages():
    made = {}
    for name, fields in VARIANTS.items():
        data = sample(**fields)
        panels = [make(data) for make in PANELS]
        made[name] = (page(data, panels), panels)
    return made


@pytest.fixture(scope="module")
def read(pages):
    return {name: Reader(text) for name, (text, _) in pages.items()}


every_variant = pytest.mark.parametrize("name", sorted(VARIANTS))


@every_variant
def test_a_page_stays_under_two_megabytes(pages, name):
    assert len(pages[name][0].encode()) < 2_000_000


@every_variant
def test_a_page_refers_to_nothing_outside(read, name):
    for tag, attrs in read[name].elements:
        assert tag not in {"link", "iframe", "object", "embed", "base", "img", "image", "use"}
        for key in LOADING & set(attrs):
            assert attrs[key].startswith("#"), (tag, key, attrs[key])
        for value in attrs.values():
            assert not re.search(r"url\((?!#)", value or "")
    assert not re.search(r"@import|url\(|https?:", "".join(read[name].styles + read[name].scripts))


@every_variant
def test_no_address_is_left_in_a_page(pages, name):
    assert not re.search(r"https?://", pages[name][0])


@every_variant
def test_the_policy_allows_this_style_and_this_script_and_nothing_else(read, name):
    (policy,) = [
        attrs["content"]
        for attrs in read[name].having("meta")
        if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    (style,), (script,) = read[name].styles, read[name].scripts
    assert rules == {
        "default-src": "'none'",
        "style-src": hashed(style),
        "script-src": hashed(script),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def hashed(text):
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@every_variant
def test_no_element_has_a_style_or_a_handler_that_the_policy_would_block(read, name):
    for tag, attrs in read[name].elements:
        assert not [key for key in attrs if key == "style" or key.startswith("on")], tag


@every_variant
def test_every_panel_is_there_in_order(read, name):
    keys = [attrs["id"] for attrs in read[name].having("section")]
    assert keys == [
        "verdict",
        "worth",
        "load",
        "texts",
        "training",
        "domains",
        "experts",
        "flow",
        "layers",
    ]


@every_variant
def test_ids_are_unique_and_references_to_them_resolve(pages, read, name):
    ids = [attrs["id"] for _, attrs in read[name].elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    text = pages[name][0]
    assert set(re.findall(r'(?:url\(|href=")#([\w-]+)', text)) <= set(ids)


@every_variant
def test_every_picture_has_a_sentence_with_a_number(pages, read, name):
    sentences = [a["aria-label"] for a in read[name].having("div") if a.get("role") == "img"]
    pictures = [picture for panel in pages[name][1] for picture in panel.pictures]
    assert len(sentences) == len(pictures) == len(read[name].having("svg"))
    for sentence in sentences:
        assert re.search(r"\d", sentence)
        assert sentence.endswith(".")


@every_variant
def test_pictures_have_known_names_each_once(pages, name):
    names = [picture.name for panel in pages[name][1] for picture in panel.pictures]
    assert len(names) == len(set(names))
    assert set(names) <= set(PICTURE_NAMES)


def test_a_full_report_has_every_picture(pages):
    names = [picture.name for panel in pages["plain"][1] for picture in panel.pictures]
    assert names == list(PICTURE_NAMES)


def test_hostile_texts_stay_texts(pages, read):
    text = pages["hostile"][0]
    assert HOSTILE not in text
    assert STYLE_ESCAPE not in text
    assert len(read["hostile"].having("script")) == len(read["plain"].having("script")) == 2
    assert len(read["hostile"].having("style")) == 1
    shown = [
        re.sub("[\x00-\x08\x0e-\x1f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", token)
        for token in NASTY
    ]
    assert read["hostile"].tokens[: len(NASTY)] == shown


def test_tokens_on_the_page_are_those_of_the_text_to_the_last_space(read):
    texts = sample().texts
    assert read["plain"].tokens == [token for text in texts for token in text.tokens]


def test_what_is_missing_is_said(pages):
    text = pages["bare"][0]
    for sentence in (
        "No training log was found",
        "No text was kept to be shown",
        "Domains were not compared",
        "experts of this kind hold no weight change",
        "There is one layer, so nothing flows",
    ):
        assert sentence in text


def test_many_experts_are_folded_into_other(pages, read):
    assert "most loaded of 64 experts" in pages["64 experts"][0]
    swatches = [a["class"] for a in read["64 experts"].having("span") if "swatch" in a["class"]]
    assert len(swatches) == 9
    assert swatches[-1] == "swatch co"


def test_the_same_data_makes_the_same_page(pages):
    data = sample(**VARIANTS["bare"])
    assert page(data, [make(data) for make in PANELS]) == pages["bare"][0]


def test_controls_have_names(read):
    labels = {attrs["for"] for attrs in read["plain"].having("label")}
    assert {attrs["id"] for attrs in read["plain"].having("input")} == labels
    assert len(DOMAINS) == 3
