"""Tables in three forms, and figures."""

import xml.etree.ElementTree as ElementTree

import pytest

from speechssm.report.plots import Line, plot_lines, plot_spectrogram, smooth
from speechssm.report.rows import Row
from speechssm.report.style import inline_svg, save_figure
from speechssm.report.tables import Table, format_interval, format_number, minutes, rows_table

TABLE = Table(["model & size", "loss"], [["a|b", "1.5 [1.0, 2.0]"], ["c_d<e>", "✗ no"]], "50% done")


def test_markdown_escapes_pipes_and_aligns_numbers():
    lines = TABLE.markdown().splitlines()
    assert lines[1] == "| --- | ---: |"
    assert lines[2] == "| a\\|b | 1.5 [1.0, 2.0] |"


def test_html_escapes_text_and_marks_verdicts():
    text = TABLE.html()
    assert "c_d&lt;e&gt;" in text and 'class="fails"' in text
    assert '1.5 <span class="interval">[1.0, 2.0]</span>' in text
    assert text.count("<tr>") == 3


def test_latex_escapes_special_characters():
    text = TABLE.latex()
    assert r"model \& size" in text and r"c\_d" in text and r"50\% done" in text
    assert text.count(r"\\") == 3


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        Table(["a", "b"], [["x"]])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3.14159, "3.142"), (24000, "24\u202f000"), (0.012345, "0.01235"), (-1.5, "−1.500"),
        (0, "0"), (None, "–"), (float("nan"), "–"), (123456.7, "123\u202f457"), (1e-7, "1e−07"),
    ],
)  # fmt: skip
def test_numbers_have_four_significant_digits(value, text):
    assert format_number(value) == text


def test_times_read_as_people_say_them():
    assert [minutes(value) for value in (2.34, 48, 120, 990)] == [
        "2.3 s", "48 s", "2 min", "16 min 30 s",
    ]  # fmt: skip


def test_an_interval_is_shown_only_where_there_is_one():
    assert format_interval(1.0, None, None) == "1"
    assert format_interval(1.25, 1.0, 1.5) == "1.250 [1, 1.500]"


def test_rows_become_one_line_each():
    rows = [Row("bitrate", "tokenizer", "heldout", 212.3, "bit/s", 200.0, 220.0, 5)]
    assert rows_table(rows).cells[0] == ["bitrate", "tokenizer", "heldout", "212.3", "[200, 220]",
                                         "bit/s", "5"]  # fmt: skip


def test_a_figure_is_the_same_bytes_each_time(tmp_path):
    for name in ("a", "b"):
        drawing = plot_lines([Line("x", [0, 1], [1, 2])], "steps", "loss")
        save_figure(drawing, tmp_path / name / "figure.svg")
    assert (tmp_path / "a/figure.svg").read_bytes() == (tmp_path / "b/figure.svg").read_bytes()


def test_inline_svg_takes_colours_from_the_page_and_names_its_ids():
    drawing = plot_lines([Line("x", [0, 1], [1, 2]), Line("y", [0, 1], [2, 1], colour=1)], "a", "b")
    text = inline_svg(drawing, "loss", 'a "b" < c & d')
    root = ElementTree.fromstring(text)
    assert root.get("role") == "img" and root.get("aria-label") == 'a "b" < c & d'
    assert "var(--series-0)" in text and "var(--series-1)" in text and "#0a6c9a" not in text
    identifiers = [node.get("id") for node in root.iter() if node.get("id")]
    assert identifiers and all(name.startswith("loss-") for name in identifiers)
    assert "http" not in text


def test_a_spectrogram_of_silence_can_be_drawn(tmp_path):
    import numpy as np

    save_figure(plot_spectrogram(np.full((8, 20), -13.8), 0.2), tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 0


def test_smoothing_keeps_length_and_constants():
    assert smooth([2.0] * 7, 5) == [2.0] * 7
    assert smooth([0.0, 3.0, 0.0], 3) == [1.5, 1.0, 1.5]
