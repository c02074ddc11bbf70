"""One self-contained page: inline style, pictures as data, no script. The pictures also lie beside it as PNG files."""

import base64
import html
from collections.abc import Sequence
from typing import NamedTuple

from etils.epath import Path

from lwd_jax.files import write_whole


class Text(NamedTuple):
    """A paragraph; plain text, escaped. `note` sets it apart (what a figure can and cannot show)."""

    text: str
    note: bool = False


class Picture(NamedTuple):
    """A PNG with its caption; `name` is its file name without suffix and must be unique on the page."""

    name: str
    png: bytes
    caption: str


class Table(NamedTuple):
    """Rows of cells as text; the first column is left-aligned, the others (figures) right-aligned."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


class Code(NamedTuple):
    """Command lines, shown as they are typed."""

    text: str


class Section(NamedTuple):
    title: str
    blocks: Sequence[Text | Picture | Table | Code]


_STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --quiet: #5f6c7b; --rule: #dfe4ea; --paper: #fff; --wash: #f5f7f9;
  --mark: #0f6b8f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ee; --quiet: #9aa7b4; --rule: #313a44; --paper: #14191e; --wash: #1c232a; --mark: #5db5d8; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 3.5rem 1.5rem 5rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 .75rem; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 3.25rem 0 .75rem;
  padding-top: 1.4rem; border-top: 1px solid var(--rule); }
p { max-width: 44rem; margin: 0 0 1rem; }
.lead { font-size: 1.12rem; color: var(--quiet); }
.note { background: var(--wash); border-left: 3px solid var(--mark); padding: .85rem 1.1rem;
  border-radius: 0 6px 6px 0; }
nav { margin: 1.5rem 0 0; font-size: .92rem; display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; }
nav a { color: var(--mark); text-decoration: none; }
nav a:hover { text-decoration: underline; }
figure { margin: 1.4rem 0 2rem; }
figure img { display: block; width: 100%; height: auto; background: #fff; border-radius: 8px;
  border: 1px solid var(--rule); }
figcaption { margin-top: .6rem; color: var(--quiet); font-size: .92rem; max-width: 48rem; }
.table { overflow-x: auto; margin: 1.2rem 0 .4rem; }
table { border-collapse: collapse; font-size: .94rem; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem 1.1rem .42rem 0; border-bottom: 1px solid var(--rule); text-align: right;
  vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
th { color: var(--quiet); font-weight: 600; }
pre { background: var(--wash); padding: .9rem 1.1rem; border-radius: 8px; overflow-x: auto;
  font-size: .88rem; line-height: 1.55; }
footer { margin-top: 4rem; color: var(--quiet); font-size: .88rem; }
"""


def _anchor(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title.lower())


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    caption = html.escape(picture.caption)
    image = f'<img src="data:image/png;base64,{data}" alt="{caption}" loading="lazy">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _cells(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"


def _table(table: Table) -> str:
    rows = "".join(_cells("td", row) for row in table.rows)
    caption = f"<figcaption>{html.escape(table.caption)}</figcaption>" if table.caption else ""
    return f'<figure><div class="table"><table>{_cells("th", table.head)}{rows}</table></div>{caption}</figure>'


def _text(text: Text) -> str:
    return f"<p{' class=note' if text.note else ''}>{html.escape(text.text)}</p>"


def _code(code: Code) -> str:
    return f"<pre>{html.escape(code.text)}</pre>"


_BLOCKS = {Text: _text, Picture: _picture, Table: _table, Code: _code}


def render(title: str, lead: str, sections: Sequence[Section], footer: str = "") -> str:
    """The page as HTML. Every text is escaped; nothing is fetched when it is opened."""
    links = "".join(f'<a href="#{_anchor(s.title)}">{html.escape(s.title)}</a>' for s in sections)
    body = "".join(
        f'<section id="{_anchor(s.title)}"><h2>{html.escape(s.title)}</h2>'
        + "".join(_BLOCKS[type(block)](block) for block in s.blocks)
        + "</section>"
        for s in sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        f'<header><h1>{html.escape(title)}</h1><p class="lead">{html.escape(lead)}</p><nav>{links}</nav></header>'
        f"{body}<footer>{html.escape(footer)}</footer></body></html>\n"
    )


def write_page(
    folder: Path, title: str, lead: str, sections: Sequence[Section], footer: str = "", pictures: str = "pictures"
) -> Path:
    """Writes `folder/report.html`, and each picture as `folder/<pictures>/NAME.png`; files appear whole or not at all.

    Raises:
      ValueError: two pictures of one name.
    """
    found = [block for section in sections for block in section.blocks if isinstance(block, Picture)]
    names = [picture.name for picture in found]
    if len(set(names)) < len(names):
        raise ValueError(
            f"Two pictures of the page have one name: {sorted(n for n in names if names.count(n) > 1)[0]}."
        )
    beside = Path(folder) / pictures
    beside.mkdir(parents=True, exist_ok=True)
    for picture in found:
        write_whole(beside / f"{picture.name}.png", picture.png)
    report = Path(folder) / "report.html"
    write_whole(report, render(title, lead, sections, footer).encode())
    return report
