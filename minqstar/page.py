"""The frame of the lab's HTML pages: whole in themselves, for phone and desktop, light and dark."""

from collections.abc import Sequence
from html import escape
from io import StringIO

from rich.table import Table

from minqstar.console import Console
from minqstar.errors import visible
from minqstar.show import html_tokens, numbers, several_lines

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 58rem; margin: 0 auto; padding: 1rem 1rem 6rem; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.05rem; margin: 2rem 0 .3rem; } p { margin: .4rem 0; }
.line, pre { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
.line, .post { white-space: pre-wrap; overflow-wrap: anywhere; }
.line { line-height: 1.9; } .strips { line-height: 2.4; } .scale { white-space: pre; font-size: .9rem; }
.line span { padding: .2em 0; background-clip: padding-box; border-radius: 3px; cursor: pointer; }
[title]:focus { outline: 2px solid; }
[title]:focus::after { content: attr(title); position: fixed; inset: auto 0 0; padding: .8em 1rem; z-index: 1;
  font: 1rem/1.4 system-ui, sans-serif; background: CanvasText; color: Canvas; }
pre { overflow-x: auto; font-size: .85rem; direction: ltr; unicode-bidi: bidi-override; }
ol { padding: 0; margin: 0; list-style-position: inside; } li > p { display: inline; }
li { border-left: 2px solid #808080; padding-left: .6rem; margin: .8rem 0 0; } li li { margin-left: .4rem; }
.best { border-color: rgb(40 112 230); } .best > .line { font-weight: 700; }
.of { font-size: .85rem; } .post, .of, sup { opacity: .75; } sup { padding: 0 .3em; }
"""


def html_page(title: str, prompt: str, scale: Sequence[float], unit: str, body: str) -> str:
    """A page; the body is HTML, all else plain text. The values of `scale` are its legend."""
    legend = "".join(html_tokens(numbers(scale), scale, [unit] * len(scale)))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{escape(visible(title))}</title><style>{STYLE}</style></head><body>
<h1>{escape(visible(title))}</h1>
<p class="post">{escape(several_lines(prompt))}</p>
<p><span class="line scale">{legend}</span> {escape(unit)}. Tap a token for its figures.</p>
{body}
</body></html>
"""


def html_table(table: Table) -> str:
    """A table of the terminal in HTML."""
    console = Console(record=True, file=StringIO(), width=200, color_system="truecolor", force_terminal=True)
    console.print(table)
    return f"<pre>{console.export_html(code_format='{code}', inline_styles=True)}</pre>"
