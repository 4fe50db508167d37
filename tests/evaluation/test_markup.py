"""HTML is what it should be, and text never becomes elements."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smp_ensemble.evaluation.markup import Cell, Html, Picture, document, element, picture, safe, section, table

PNG = bytes.fromhex("89504e470d0a1a0a0000000d49484452000000050000000308020000002ca2d4")


class Reader(HTMLParser):
    """Elements and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements, self.text = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


@given(st.text())
def test_text_comes_back_as_it_was_and_makes_no_element(text):
    text = text.replace("\r", "").replace("\x00", "")  # which no HTML can hold
    reader = Reader(element("p", text, title=text))
    assert [tag for tag, _ in reader.elements] == ["p"]
    assert reader.elements[0][1]["title"] == text
    assert "".join(reader.text) == text


@pytest.mark.parametrize(
    "attack",
    ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "'--><!--", "</td></table><b>", "&lt;b&gt;"],
)
def test_names_in_tables_sections_and_titles_stay_names(attack):
    cells = [[attack, Cell(attack, best=True), attack]]
    page = document(
        attack,
        section("x", attack, table([attack] * 3, cells, caption=attack), how=attack),
        picture(Picture(PNG, attack), attack),
    )
    reader = Reader(page)
    assert not {"script", "b"} & {tag for tag, _ in reader.elements}
    assert [attributes["src"][:10] for tag, attributes in reader.elements if tag == "img"] == ["data:image"]
    assert not [name for _, attributes in reader.elements for name in attributes if name.startswith("on")]
    assert sum(attack in part for part in reader.text) >= 8


def test_html_is_not_escaped_twice():
    assert safe(safe("a & b")) == "a &amp; b"
    assert element("div", element("b", "x"), Html("<i>y</i>")) == "<div><b>x</b><i>y</i></div>"


def test_pictures_say_their_size():
    (image,) = [
        attributes
        for tag, attributes in Reader(picture(Picture(PNG, "five by three"), "a.png")).elements
        if tag == "img"
    ]
    assert (image["width"], image["height"], image["alt"]) == ("5", "3", "five by three")


def test_a_document_forbids_scripts_and_requests():
    reader = Reader(document("title"))
    meta = [attributes for tag, attributes in reader.elements if tag == "meta"]
    assert meta[0] == {"charset": "utf-8"}
    assert "default-src 'none'" in meta[1]["content"]
    assert [attributes["href"] for tag, attributes in reader.elements if tag == "link"] == ["data:,"]
