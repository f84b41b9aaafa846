"""The parts of an HTML page that needs no other file: text, tables, pictures, sections and the style.

Values come as they are and are escaped here. Only parts that these functions return are put into a page unchanged.
"""

import base64
import html
from collections.abc import Sequence

# A browser loads nothing and runs nothing, whatever the page contains.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --paper: #fff; --shade: #f4f6f8;
  --mark: #0b5cad; --warn: #8a4b00; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Open Sans", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 2.25rem 0 .5rem; padding-top: .75rem;
  border-top: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 46rem; }
.note { color: var(--soft); font-size: .9rem; }
.warn { border-left: 4px solid var(--warn); padding-left: .75rem; }
.scroll { overflow-x: auto; margin: .75rem 0; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--mark); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .35rem; }
caption span { display: inline-block; max-width: calc(100vw - 2rem); }
th, td { text-align: left; vertical-align: top; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line);
  unicode-bidi: isolate; }
thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 500; min-width: 7.5rem; }
td { min-width: 5rem; }
table.numbers td, table.numbers thead th + th { text-align: right; min-width: 0; }
table.numbers td { white-space: nowrap; }
table.numbers thead th { vertical-align: bottom; overflow-wrap: normal; }
.code tbody th, .code td, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  font-size: .84rem; }
.code tbody th { white-space: nowrap; }
.code tbody th + td { min-width: 9rem; }
pre { white-space: pre-wrap; background: var(--shade); padding: .75rem; border-radius: 6px; margin: .5rem 0; }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; }
.charts { display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
.charts figure { max-width: 32rem; }
.maps img { min-width: 40rem; padding: .5rem; background: #fff; border-radius: 6px; }
ul { padding-left: 1.25rem; margin: .5rem 0; }
summary { cursor: pointer; padding: .35rem 0; color: var(--mark); }
@media (max-width: 40rem) {
  table { font-size: .85rem; }
  th, td { padding-right: .6rem; }
  tbody th { min-width: 6rem; }
}
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #a5afba; --line: #3a424b; --paper: #14171b; --shade: #1f242a; --mark: #79b8ff;
    --warn: #f0a94a; }
  /* The charts are drawn for white paper: this turns light into dark and keeps the hues. */
  .charts img { filter: invert(1) hue-rotate(180deg) brightness(1.15); }
}
@media print {
  :root { color-scheme: light; }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  .scroll { overflow: visible; }
  .charts { grid-template-columns: 1fr 1fr; }
  .maps img { min-width: 0; }
  h2, h2 + p, caption, thead { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
""".strip()


def plain(value: object) -> str:
    """A value as text. Characters without a glyph, such as those that reverse the direction, are replaced."""
    try:
        text = str(value)
    except ValueError:  # a whole number with thousands of digits
        text = '…'
    return ''.join(each if each.isprintable() or each == '\n' else '\ufffd' for each in text)


def escape(value: object) -> str:
    return html.escape(plain(value))


def paragraph(text: object, kind: str = '') -> str:
    """`kind`: note or warn."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f'<p>{escape(text)}</p>'


def bullets(items: Sequence[object]) -> str:
    return '<ul>' + ''.join(f'<li>{escape(item)}</li>' for item in items) + '</ul>'


def preformatted(text: object) -> str:
    return f'<pre>{escape(text)}</pre>'


def scrolling(name: object, part: str) -> str:
    """A box in which a wide part scrolls sideways, also with the keyboard."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}">{part}</div>'


def table(name: object, head: Sequence[object], rows: Sequence[Sequence[object]], kind: str = 'numbers') -> str:
    """A table whose first column names the rows.

    Args:
        name: its caption.
        head: names of the columns; () for a list of names and values.
        rows: the values, line by line.
        kind: numbers, aligned to the right; code, for flags and their values; or ''.
    """
    columns = ''.join(f'<th scope="col">{escape(each)}</th>' for each in head)
    lines = (
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(each)}</td>" for each in others)}</tr>'
        for first, *others in rows
    )
    top = f'<caption><span>{escape(name)}</span></caption>' + (f'<thead><tr>{columns}</tr></thead>' if head else '')
    return scrolling(name, f'<table class="{kind}">{top}<tbody>{"".join(lines)}</tbody></table>')


def picture(data: bytes, media_type: str, alt: object) -> str:
    """A picture within the page; a browser takes no scripts and no files from it."""
    source = f'data:{media_type};base64,{base64.b64encode(data).decode()}'
    return f'<figure><img src="{source}" alt="{escape(alt)}"></figure>'


def charts(pictures: Sequence[str]) -> str:
    return f'<div class="charts">{"".join(pictures)}</div>'


def folded(summary: object, *parts: str) -> str:
    return f'<details><summary>{escape(summary)}</summary>{"".join(parts)}</details>'


def section(title: str, *parts: str) -> str:
    """A section of the page; its title is also its id, and so must be different from all others."""
    name = '-'.join(title.lower().split())
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>{"".join(parts)}</section>'


def document(title: object, subtitle: object, sections: Sequence[str]) -> str:
    """The whole page."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{STYLE}
</style>
</head>
<body>
<main>
<header><h1>{escape(title)}</h1>{paragraph(subtitle, 'note')}</header>
{chr(10).join(sections)}
</main>
</body>
</html>
"""
