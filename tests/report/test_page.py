"""The page stands alone: nothing is fetched, everything given is escaped, the pictures lie beside it."""

import base64
import html.parser

import pytest

from lwd_jax.report.page import Code, Picture, Section, Table, Text, render, write_page

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII=")
EVIL = '<script>alert("x")</script> & "quotes"'
VOID = {"meta", "img", "link", "br"}


class Reader(html.parser.HTMLParser):
    """Collects tags, the addresses they name and the text; fails on tags that do not nest."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.addresses, self.text, self._open = [], [], [], []
        self.feed(page)
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def sections():
    return [
        Section("Pictures & more", [Text(EVIL), Text("small", note=True), Picture("dot", PNG, EVIL)]),
        Section("Figures", [Table(["", EVIL], [[EVIL, "1.5"]], EVIL), Code("lwd train --config=a <b>")]),
    ]


def test_page_fetches_nothing_and_nests(sections):
    read = Reader(render(EVIL, EVIL, sections, EVIL))
    assert "script" not in read.tags and "link" not in read.tags
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in read.addresses)
    text = "".join(read.text)
    assert text.count(EVIL) == 9  # title, heading, lead, text, caption, table head, cell, table caption, footer
    assert "lwd train --config=a <b>" in text


def test_every_link_of_the_page_has_its_target(sections):
    page = render("t", "l", sections)
    for address in Reader(page).addresses:
        if address.startswith("#"):
            assert f'id="{address[1:]}"' in page


def test_pictures_are_in_the_page_and_beside_it(sections, tmp_path):
    report = write_page(tmp_path / "run", "t", "l", sections)
    assert (tmp_path / "run/pictures/dot.png").read_bytes() == PNG
    assert base64.b64encode(PNG).decode() in report.read_text()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["pictures", "report.html"]


def test_two_pictures_of_one_name_are_refused(sections, tmp_path):
    with pytest.raises(ValueError, match="have one name: dot"):
        write_page(tmp_path, "t", "l", [*sections, Section("again", [Picture("dot", PNG, "")])])
    assert not (tmp_path / "report.html").exists()
