"""The comparison as one HTML page that needs nothing else: no scripts, nothing from the network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import Any

from glue.plots import COLOURS
from glue.sections import Section, sections, verdict
from glue.tables import Table

STYLE = """
:root{color-scheme:light dark;--paper:#fdfdfc;--ink:#1c1e21;--dim:#5d636b;--rule:#dcdfe3;--card:#fff;
--c0:#0072b2;--c1:#b96d00;--c2:#00805d;--c3:#cf4a00;--c4:#a8427f;--c5:#2b8cc4;--c6:#7a6a00;--c7:#55595f}
@media(prefers-color-scheme:dark){:root{--paper:#15171a;--ink:#e6e8ea;--dim:#9aa2ab;--rule:#343a41;--card:#1b1e22;
--c0:#56a9e0;--c1:#f2ae3d;--c2:#35c79d;--c3:#ff8b50;--c4:#e59bc6;--c5:#9ad6fb;--c6:#d9cb52;--c7:#bfc4ca}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:76rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0}
h2{font-size:1.2rem;margin:2.2rem 0 .3rem}
h3{font-size:1rem;margin:0 0 .3rem}
p{max-width:46rem;margin:.5rem 0}
.dim,.notes{color:var(--dim);font-size:.875rem}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:1rem;margin:.8rem 0}
figure{margin:0;padding:.7rem .8rem;max-width:32rem;background:var(--card);
border:1px solid var(--rule);border-radius:8px}
svg{display:block;width:100%;height:auto}
svg text{font-size:12px;fill:var(--ink)}
svg .tick{fill:var(--dim);font-size:11px}
svg .value{font-variant-numeric:tabular-nums}
svg .axis{stroke:var(--dim)}
svg .grid{stroke:var(--rule)}
svg .zero{stroke:var(--ink)}
svg .dashed{stroke-dasharray:6 3}
svg .constant{stroke:var(--ink);stroke-width:1.5;stroke-dasharray:3 2}
svg g{fill:currentColor;stroke:none}
svg g line,svg g polyline{stroke:currentColor;fill:none}
svg .dotted{stroke-dasharray:2 3}
svg .whisker{stroke-width:2}
svg rect{opacity:.55}
svg .hollow{fill:var(--card);stroke:currentColor;stroke-width:2}
svg .line{stroke-width:2.2;stroke-linejoin:round}
svg .faint{opacity:.3}
svg text.number{font-weight:700;fill:currentColor}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}
.c4{color:var(--c4)}.c5{color:var(--c5)}.c6{color:var(--c6)}.c7{color:var(--c7)}
.keys{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin:.4rem 0;padding:0;font-size:.875rem}
.keys b{margin-right:.3rem}
.scroll{overflow-x:auto;margin:.5rem 0}
table{border-collapse:separate;border-spacing:0;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--rule);text-align:right;white-space:nowrap}
th{font-weight:500}
.words th,.words td{text-align:left}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--paper)}
"""

WORDS = """<h2>How to read this</h2>
<p><b>n</b> is the number of pretrained models. A model's fine-tuning seeds are averaged first: they tell how noisy
fine-tuning is, and nothing about how lucky its pretraining was. An <b>interval</b> covers the true value in 95 of 100
such studies, if differences are about normal; with two or three seeds it is wide because little is known. Look at its
ends, not only at whether zero is inside. Nothing is corrected for the number of comparisons.</p>
<p><b>FLOPs</b> are multiplications and additions of matrix products and attention, counted alike for scoring and for
training; <b>seconds</b> are of the machines that were used, those of scoring added up over its workers.</p>"""


def page(table: dict[str, Any], summaries: dict[str, list[dict[str, Any]]]) -> str:
    """The page.

    Args:
        table: of ``glue.compare.compare``.
        summaries: what the runs' own summaries say, by regime, for their curves.
    """
    how = "scored" if all("zero_shot" in row for row in table["tasks"].values()) else "fine-tuned"
    title = escape(f"{len(table['regimes'])} regimes, {how} by the {table['protocol']} protocol")
    found = "".join(
        f"<p><b>{escape(kind)}</b>: {escape('; '.join(names))}.</p>" for kind, names in verdict(table).items()
    )
    lead = (
        '<p class="dim">Differences in percent with 95 % intervals, paired over n pretraining seeds.</p>'
        if found
        else ""
    )
    read = "".join(
        f"<li>{escape(name)}: {escape(', '.join(run['directory'] for run in runs))}</li>"
        for name, runs in table["runs"].items()
    )
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            f"<title>{title}</title><style>{STYLE}</style></head><body>",
            f"<h1>{title}</h1>{lead}{found}",
            *(to_html(section) for section in sections(table, summaries)),
            WORDS,
            f"<details><summary>Results read</summary><ul>{read}</ul></details></body></html>\n",
        ]
    )


def to_html(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2><p>{escape(section.text)}</p>"]
    if section.plots:
        figures = "".join(f"<figure><h3>{escape(name)}</h3>{svg}</figure>" for name, svg in section.plots.items())
        parts += [keys_html(section.keys), f'<div class="plots">{figures}</div>']
    if section.table:
        parts.append(table_html(section.table))
    return "\n".join(parts)


def keys_html(names: Sequence[str]) -> str:
    items = [
        f'<li><b class="c{style % COLOURS}">{style + 1}</b>{escape(name)}</li>' for style, name in enumerate(names)
    ]
    return f'<ul class="keys">{"".join(items)}</ul>' if items else ""


def table_html(table: Table) -> str:
    heads = re.sub(
        r"[*]{2}(.+?)[*]{2}", r"<b>\1</b>", "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    )
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    notes = "".join(f'<p class="notes">{escape(note)}</p>' for note in table.notes)
    kind = ' class="words"' if table.words else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>{notes}'
