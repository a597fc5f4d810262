"""One self-contained page for a study: the headline table, every figure, every reading.

In: a study folder with executed notebooks and what notebook 07 hands on (`comparison`). Out:
`report.html` with embedded images, the same figures as files under `figures/`, and the table as
text for the terminal. Takes the outputs of code cells tagged `report`, and the text of markdown
cells tagged so. Whatever an output holds is escaped or reduced to plain tables: the page runs no
script and asks for nothing from the network.
"""

import base64
import json
import math
from collections.abc import Sequence
from pathlib import Path

import bleach
import jinja2
import mistune
import pandas as pd
from markupsafe import Markup

from ueba_helpers.data.files import atomic_path
from ueba_helpers.errors import UserError
from ueba_helpers.study.comparison import (
    COMPARISON_COLUMNS,
    read_comparison,
    read_verdict,
)

REPORT_TAG = "report"

_TABLE_TAGS = {"table", "thead", "tbody", "tr", "th", "td", "caption", "b", "i", "em", "strong",
               "br", "p", "div", "span", "sub", "sup"}
_TEXT_TAGS = _TABLE_TAGS | {"h1", "h2", "h3", "h4", "ul", "ol", "li", "code", "pre", "a",
                            "blockquote"}

_PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; }
section { border-top: 1px solid #ccc; margin-top: 2rem; }
img { max-width: 100%; height: auto; }
figure { margin: 1rem 0; overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
pre { background: #f5f5f5; padding: .6rem; overflow-x: auto; }
.warning { background: #fff3cd; border-left: 4px solid #b58900; padding: .5rem 1rem; }
.small { color: #555; font-size: .9rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="small">{{ subtitle }}</p>
{% for warning in warnings %}
<p class="warning">{{ warning }}</p>
{% endfor %}
{% if headings %}
<h2>Headline: detectors on the same test windows</h2>
<figure><table>
<thead><tr>{% for heading in headings %}<th scope="col">{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>{% for value in row %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></figure>
<p class="small">macro-F1 on the balanced sample; in brackets the 95 % interval over users. Seconds:
fitting or training until the dev sample is judged; sft_all, ppo and grpo come on top of sft.</p>
{% if answer %}
<div>{{ answer }}</div>
{% endif %}
{% endif %}
{% for notebook in notebooks %}
<section id="{{ notebook.name }}">
<h2>{{ notebook.title }}</h2>
<p class="small"><a href="notebooks/{{ notebook.name }}.ipynb">{{ notebook.name }}.ipynb</a>
{% if notebook.html %} · <a href="html/{{ notebook.name }}.html">as a page</a>{% endif %}</p>
{% for block in notebook.blocks %}
{% if block.kind == "image" %}
<figure><img src="{{ block.source }}" alt="{{ block.text }}"></figure>
{% elif block.kind == "html" %}
<figure>{{ block.markup }}</figure>
{% else %}
<pre>{{ block.text }}</pre>
{% endif %}
{% endfor %}
</section>
{% endfor %}
</body>
</html>
""")


def headline_rows(table: pd.DataFrame) -> list[list[str]]:
    """Return the headline table's cells as text, one list per detector."""
    rows = []
    for record in table.to_dict("records"):
        row = []
        for name in COMPARISON_COLUMNS:
            text = _number(name, record[name])
            low, high = record.get(f"{name}_low"), record.get(f"{name}_high")
            if text != "–" and _is_number(low) and _is_number(high):
                text += f" [{_number(name, low)}, {_number(name, high)}]"
            row.append(text)
        rows.append(row)
    return rows


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _number(name: str, value: object) -> str:
    if name == "detector":
        return str(value)
    if not _is_number(value):
        return "–"
    return f"{value:.0f}" if name == "seconds" else (
        f"{value:.2f}" if name == "peak_memory_gib" else f"{value:.3f}")


def headline_text(table: pd.DataFrame) -> str:
    """Return the headline table as aligned text for a terminal.

    >>> row = dict.fromkeys(COMPARISON_COLUMNS, 0.5) | {"detector": "ppo", "seconds": 61.0}
    >>> for line in headline_text(pd.DataFrame([row])).splitlines():
    ...     print(line[:70])
    detector  macro-F1  PR-AUC at the natural base rate  valid format rate
    ppo          0.500                            0.500              0.500
    """
    lines = [list(COMPARISON_COLUMNS.values()), *headline_rows(table)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(
        text.ljust(width) if column == 0 else text.rjust(width)
        for column, (text, width) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines)


def build_report(study: Path | str, notebooks: Sequence[str], *, subtitle: str = "",
                 warnings: Sequence[str] = ()) -> Path:
    """Write report.html (and figures/) from the executed notebooks named; return its path.

    `warnings` are shown on top, for instance which notebooks are not up to date.
    """
    study = Path(study)
    table = read_comparison(study)
    sections = [_section(study, name) for name in notebooks
                if (study / "notebooks" / f"{name}.ipynb").exists()]
    _write_figures(study / "figures", sections)
    page = _PAGE.render(
        title="PPO against GRPO on insider-threat windows", subtitle=subtitle,
        warnings=warnings, notebooks=sections, answer=_answer(study),
        headings=list(COMPARISON_COLUMNS.values()) if table is not None else [],
        rows=headline_rows(table) if table is not None else [])
    with atomic_path(study / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return study / "report.html"


def _answer(study: Path) -> Markup:
    try:
        found = read_verdict(study)
        said = [found["sentence"], *(found.get(part, {}).get("sentence", "")
                                     for part in ("citations", "rivals"))]
        return _markdown("\n\n".join(said))["markup"]
    except UserError:  # notebook 07 has not come so far, which the page says elsewhere
        return Markup("")


def _section(study: Path, name: str) -> dict:
    cells = json.loads((study / "notebooks" / f"{name}.ipynb").read_text("utf-8"))["cells"]
    blocks = []
    for cell in cells:
        if REPORT_TAG not in cell.get("metadata", {}).get("tags", []):
            continue
        if cell["cell_type"] == "markdown":
            blocks.append(_markdown("".join(cell["source"])))
        for output in cell.get("outputs", []):
            blocks.extend(_block(output, name))
    return {"name": name, "title": _title(cells) or name, "blocks": blocks,
            "html": (study / "html" / f"{name}.html").exists()}


def _title(cells: Sequence[dict]) -> str | None:
    for cell in cells:
        if cell["cell_type"] == "markdown":
            for line in "".join(cell["source"]).splitlines():
                if line.startswith("# "):
                    return line[2:].strip()
    return None


def _block(output: dict, name: str) -> list[dict]:
    """Return an output as blocks of the page, the richest form first."""
    if output["output_type"] == "stream":
        text = "".join(output["text"]).strip()
        return [{"kind": "text", "text": text}] if text and output["name"] == "stdout" else []
    data = {kind: "".join(value) if isinstance(value, list) else value
            for kind, value in output.get("data", {}).items()}
    caption = f"Figure of {name}"
    if "image/png" in data:
        png = data["image/png"].replace("\n", "")
        return [{"kind": "image", "source": f"data:image/png;base64,{png}", "text": caption,
                 "file": (".png", base64.b64decode(png))}]
    if "image/svg+xml" in data:
        svg = data["image/svg+xml"].encode()
        source = "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
        return [{"kind": "image", "source": source, "text": caption, "file": (".svg", svg)}]
    if "text/markdown" in data:
        return [_markdown(data["text/markdown"])]
    if "text/html" in data:
        return [{"kind": "html", "markup": _clean(_without_style(data["text/html"]))}]
    return [{"kind": "text", "text": data["text/plain"]}] if "text/plain" in data else []


def _markdown(text: str) -> dict:
    html = mistune.create_markdown(escape=True, plugins=["table"])(text)
    return {"kind": "html", "markup": _clean(html, _TEXT_TAGS)}


def _without_style(html: str) -> str:
    """Drop `<style>` elements whole: cleaning alone would leave their rules as text."""
    while (start := html.lower().find("<style")) >= 0:
        end = html.lower().find("</style>", start)
        html = html[:start] + (html[end + len("</style>"):] if end >= 0 else "")
    return html


def _clean(html: str, tags: set[str] = _TABLE_TAGS) -> Markup:
    return Markup(bleach.clean(html, tags=tags, strip=True, protocols={"http", "https"},
                               attributes={"th": ["scope", "colspan", "rowspan"],
                                           "td": ["colspan", "rowspan"], "a": ["href"]}))


def _write_figures(folder: Path, sections: Sequence[dict]) -> None:
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for section in sections:
            images = [block["file"] for block in section["blocks"] if block["kind"] == "image"]
            for number, (suffix, content) in enumerate(images, start=1):
                (temporary / f"{section['name']}-{number}{suffix}").write_bytes(content)
