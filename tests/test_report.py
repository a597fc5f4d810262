"""The report: one page that stands alone, whatever the executed notebooks hold."""

import base64
import json
import re

import pandas as pd
import pytest

from ueba_helpers.errors import UserError
from ueba_helpers.study.comparison import write_comparison, write_verdict
from ueba_helpers.study.report import (
    COMPARISON_COLUMNS,
    build_report,
    headline_rows,
    headline_text,
    read_comparison,
)

PIXEL = base64.b64encode(b"\x89PNG a pixel").decode()


def write_executed(study, name, *outputs, tags=("report",), title="# Which one?", markdown=None):
    cells = [{"cell_type": "markdown", "source": [title], "metadata": {}},
             {"cell_type": "code", "source": "x", "metadata": {"tags": list(tags)},
              "outputs": list(outputs), "execution_count": 1}]
    if markdown:
        cells.append({"cell_type": "markdown", "source": markdown,
                      "metadata": {"tags": ["report"]}})
    (study / "notebooks").mkdir(exist_ok=True)
    (study / "notebooks" / f"{name}.ipynb").write_text(json.dumps({"cells": cells}))


def display(**data):
    return {"output_type": "display_data",
            "data": {key.replace("_", "/"): value for key, value in data.items()}}


def comparison(**changes):
    row = {"detector": "grpo", "macro_f1": 0.61234, "macro_f1_low": 0.55, "macro_f1_high": 0.67,
           "pr_auc": 0.4, "valid_rate": float("nan"), "evidence_hit_rate": 0.7,
           "seconds": 250.4, "peak_memory_gib": 1.234}
    return pd.DataFrame([row | changes])


def test_figures_are_embedded_and_written_and_texts_are_shown(tmp_path):
    write_executed(tmp_path, "05_ppo", display(image_png=PIXEL, text_plain="<Figure>"),
                   {"output_type": "stream", "name": "stdout", "text": ["gain 5 < 6 points\n"]},
                   {"output_type": "stream", "name": "stderr", "text": ["a warning"]})
    page = build_report(tmp_path, ["05_ppo", "06_absent"], subtitle="Profile smoke").read_text()
    assert f"data:image/png;base64,{PIXEL}" in page
    assert "gain 5 &lt; 6 points" in page
    assert "a warning" not in page
    assert "&lt;Figure&gt;" not in page  # the richest form only
    assert "Which one?" in page
    assert "06_absent" not in page
    assert (tmp_path / "figures" / "05_ppo-1.png").read_bytes() == b"\x89PNG a pixel"


def test_cells_without_the_tag_stay_out(tmp_path):
    write_executed(tmp_path, "05_ppo", display(image_png=PIXEL), tags=())
    assert PIXEL not in build_report(tmp_path, ["05_ppo"]).read_text()


def test_figures_of_an_earlier_report_do_not_linger(tmp_path):
    write_executed(tmp_path, "05_ppo", display(image_png=PIXEL), display(image_png=PIXEL))
    build_report(tmp_path, ["05_ppo"])
    write_executed(tmp_path, "05_ppo", display(image_png=PIXEL))
    build_report(tmp_path, ["05_ppo"])
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["05_ppo-1.png"]


@pytest.mark.parametrize("output", [
    display(text_html="<script>alert(1)</script><table><tr><td>7</td></tr></table>"),
    display(text_html="<style>p { color: red }</style><img src=x onerror=alert(1)><td>7</td>"),
    display(text_markdown="<script>alert(1)</script>\n\n[7](javascript:alert(1))"),
    display(text_plain="<script>alert(1)</script> 7"),
    display(**{"image_svg+xml": "<svg onload='alert(1)'><text>7</text></svg>"}),
])
def test_no_output_can_smuggle_a_script_into_the_page(tmp_path, output):
    write_executed(tmp_path, "01_x", output, title="# <script>alert(1)</script>",
                   markdown="<script>alert(1)</script>")
    page = build_report(tmp_path, ["01_x"], warnings=["<script>alert(1)</script>"],
                        subtitle="<script>").read_text()
    assert "<script" not in page
    assert "onerror" not in page
    assert not re.search(r"(?:href|src)=\W*javascript", page)
    assert "color: red" not in page


def test_tables_of_notebooks_stay_tables(tmp_path):
    table = pd.DataFrame({"user": ["<b>A"], "f1": [0.5]}).to_html()
    write_executed(tmp_path, "02_x", display(text_html=table),
                   display(text_markdown="| a | b |\n|---|---|\n| 1 | 2 |"))
    page = build_report(tmp_path, ["02_x"]).read_text()
    assert "<td>0.5</td>" in page
    assert "&lt;b&gt;A" in page
    assert "<td>1</td>" in page


def test_the_page_asks_for_nothing_from_the_network(tmp_path):
    write_executed(tmp_path, "01_x", display(image_png=PIXEL))
    (tmp_path / "html").mkdir()
    (tmp_path / "html" / "01_x.html").write_text("copy")
    page = build_report(tmp_path, ["01_x"]).read_text()
    assert re.findall(r'(?:src|href)="(?!data:)([^"]*)"', page) == [
        "notebooks/01_x.ipynb", "html/01_x.html"]
    assert "http" not in page
    assert "@import" not in page


def test_warnings_stand_on_top(tmp_path):
    page = build_report(tmp_path, [], warnings=["05_ppo: failed"]).read_text()
    assert "05_ppo: failed" in page
    assert not (tmp_path / "figures" / "x").exists()


def test_the_headline_shows_intervals_dashes_and_rounded_costs():
    assert headline_rows(comparison()) == [
        ["grpo", "0.612 [0.550, 0.670]", "0.400", "–", "0.700", "250", "1.23"]]
    assert headline_text(comparison()).splitlines()[1].split()[0] == "grpo"


def test_the_headline_table_is_in_page_and_folder(tmp_path):
    assert read_comparison(tmp_path) is None
    comparison(detector="<grpo>").to_csv(tmp_path / "comparison.csv", index=False)
    page = build_report(tmp_path, []).read_text()
    assert "<td>&lt;grpo&gt;</td>" in page
    for heading in COMPARISON_COLUMNS.values():
        assert f">{heading}</th>" in page


def test_the_answer_stands_beside_its_own_table_only(tmp_path):
    write_comparison(tmp_path, comparison(), made_by={}, runs=[])
    write_verdict(tmp_path, {"sentence": "**Both** are <alike>.",
                             "citations": {"sentence": "Both **cite less**."}})
    page = build_report(tmp_path, []).read_text()
    assert "<strong>Both</strong> are &lt;alike&gt;." in page
    assert "<p>Both <strong>cite less</strong>.</p>" in page
    comparison(macro_f1=0.9).to_csv(tmp_path / "comparison.csv", index=False)
    assert "<strong>Both" not in build_report(tmp_path, []).read_text()


def test_a_comparison_without_a_column_is_refused_by_name(tmp_path):
    comparison().drop(columns="pr_auc").to_csv(tmp_path / "comparison.csv", index=False)
    with pytest.raises(UserError, match=r"comparison\.csv lacks the columns pr_auc"):
        read_comparison(tmp_path)
