"""Pieces of an HTML page: sections, tables, figures, notes. Plain text comes in and is escaped; markup goes out.

>>> notes = Notes()
>>> table(["", "L0"], [["1", notes.cell(Missing("not <measured>"))]])
'<div class="scroll"><table>...<tr><th scope="row">1</th><td>–<sup>1</sup></td></tr>...</table></div>'
>>> notes.html()
'<ol class="notes"><li>not &lt;measured&gt;</li></ol>'
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from e2e_fast.report.runs import Missing


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    id: str
    heading: str
    content: str
    """Markup."""

    @property
    def html(self) -> str:
        """The element."""
        return f'<section id="{self.id}">\n<h2>{text(self.heading)}</h2>\n{self.content}\n</section>'


def page(title: str, sections: Sequence[Section]) -> str:
    """The whole document, with links to its sections."""
    links = "".join(f'<a href="#{section.id}">{text(section.heading)}</a>' for section in sections)
    body = "\n".join(section.html for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"<header><h1>{text(title)}</h1>\n<nav>{links}</nav></header>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


class Notes:
    """Reasons for what is missing, numbered below a table."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def cell(self, value: Any, pattern: str = "{:,}") -> str:
        """Escaped text of a table's cell; a `Missing` is a dash with the number of its note."""
        if isinstance(value, Missing):
            if value.reason not in self.reasons:
                self.reasons.append(value.reason)
            return f"–<sup>{self.reasons.index(value.reason) + 1}</sup>"
        return text(value if isinstance(value, str) else pattern.format(value).replace("-", "−"))

    def html(self) -> str:
        """The list of the notes."""
        if not self.reasons:
            return ""
        listed = "".join(f"<li>{text(reason)}</li>" for reason in self.reasons)
        return f'<ol class="notes">{listed}</ol>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[str] = ()) -> str:
    """A table that scrolls by itself where it is too wide. head: plain text; rows: escaped."""
    sides = ['class="name"' if name == "name" else 'class="left"' if name in left else "" for name in head]
    top = "".join(f'<th scope="col" {side}>{_heading(name)}</th>' for name, side in zip(head, sides, strict=True))
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td {side}>{cell}</td>" for cell, side in zip(others, sides[1:], strict=True))
        lines.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    inside = f"<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody>".replace(" >", ">")
    return f'<div class="scroll"><table>{inside}</table></div>'


def _heading(name: str) -> str:
    """A column's name; a short one stays on one line."""
    return text(name if len(name) > 8 else name.replace(" ", "\u00a0"))


def figures(pictures: Iterable[tuple[str, str]]) -> str:
    """Pictures (SVG elements, or nothing) with their captions, side by side as the page allows."""
    drawn = [
        f"<figure>{svg}{f'<figcaption>{text(caption)}</figcaption>' if caption else ''}</figure>"
        for svg, caption in pictures
        if svg
    ]
    return f'<div class="figures">{"".join(drawn)}</div>' if drawn else ""


def definitions(terms: Mapping[str, str]) -> str:
    """Terms and what they are."""
    return f"<dl>{''.join(f'<dt>{text(term)}</dt><dd>{text(meaning)}</dd>' for term, meaning in terms.items())}</dl>"


def number(value: float | None) -> str:
    """Three decimals; a dash for None."""
    return "–" if value is None else f"{value:.3f}"


def signed(value: float) -> str:
    """Four decimals with their sign."""
    return f"{value:+.4f}".replace("-", "−")


def text(value: Any) -> str:
    """Plain text, escaped."""
    return html.escape(str(value))


CSS = """
:root { color-scheme: light dark; --line: #8885; --heat: 76, 114, 176; }
* { box-sizing: border-box; }
body { font: 1rem/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; max-width: 11rem; font-weight: 600; }
th.left, td.left, th.name, td.name { text-align: left; }
tbody th { font-weight: 600; }
td.name { white-space: normal; overflow-wrap: anywhere; min-width: 16rem; max-width: 24rem; }
.matrix th .name { font-weight: 400; display: inline-block; max-width: 16rem; overflow: hidden; text-overflow: ellipsis;
  vertical-align: bottom; }
.matrix tbody th { text-align: left; }
.heat { background: color-mix(in srgb, rgb(var(--heat)) calc(.75 * var(--shade)), transparent); }
.null { color: #888; }
.notes { font-size: .8125rem; margin: .3rem 0; padding-left: 1.4rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem;
  margin: 1rem 0; align-items: start; }
figure { margin: 0; break-inside: avoid; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .8125rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .2rem 1rem; font-size: .9rem; }
dt { font-weight: 600; }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  dl { display: block; }
  dd { margin: 0 0 .5rem; }
  .matrix th .name { max-width: 6rem; }
}
@media print {
  :root { font-size: 11px; }
  body { max-width: none; }
  nav { display: none; }
  .scroll { overflow: visible; }
  .figures { grid-template-columns: repeat(3, 1fr); }
}
"""
