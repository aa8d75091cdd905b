"""The page: complete, self-contained, valid, and honest about what is missing."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from speechssm.errors import ConfigError
from speechssm.report.page import report, write_report

VOID = {"meta", "link", "br", "img", "hr", "input", "source", "path", "use", "rect", "image"}


class Checker(HTMLParser):
    """Collects ids, links and text, and checks that elements are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.sources, self.anchors = [], [], [], []
        self.headings, self.words, self.svg_labels = [], [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if "id" in values:
            self.ids.append(values["id"])
        for name in ("src", "href"):
            value = values.get(name)
            if value and value.startswith("#"):
                self.anchors.append(value[1:])
            elif value and not value.startswith("data:"):
                self.sources.append(value)
        if tag == "svg":
            self.svg_labels.append(values.get("aria-label"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data)
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(self.words)


def check(path):
    checker = Checker()
    checker.feed(path.read_text(encoding="utf-8"))
    checker.close()
    assert checker.open == []
    return checker


@pytest.fixture(scope="module")
def page(demo_source, tmp_path_factory):
    """The report of a whole demo, in all formats."""
    folder = shutil.copytree(demo_source, tmp_path_factory.mktemp("page") / "demo")
    return folder, write_report(folder, ["html", "markdown", "latex"])


def test_a_whole_demo_has_every_section_and_nothing_missing(page):
    checker = check(page[1]["html"])
    for heading in (
        "From recordings to endless speech", "Listen", "Against trivial baselines", "The stages",
        "Semantic tokenizer", "SoundStream codec", "SoundStorm", "Sweep over sequence lengths",
        "Loss against position", "Constant memory", "How it was made",
    ):  # fmt: skip
        assert heading in checker.headings
    assert "Not here" not in checker.text


def test_every_link_resolves_and_ids_are_unique(page):
    folder, written = page
    checker = check(written["html"])
    assert checker.sources
    for source in checker.sources:
        assert (folder / "report" / source).is_file(), source
    assert len(set(checker.ids)) == len(checker.ids)
    assert set(checker.anchors) <= set(checker.ids)


def test_the_page_needs_nothing_from_outside(page):
    text = page[1]["html"].read_text(encoding="utf-8")
    assert not re.search(r"https?://|//[a-z]+\.|<script|@import|url\((?!#)", text)


def test_every_figure_has_a_description(page):
    labels = check(page[1]["html"]).svg_labels
    assert len(labels) > 10 and all(labels)


def test_the_page_says_what_the_demo_cannot_do(page):
    assert "cannot give good speech" in check(page[1]["html"]).text.replace("\n", " ")


def test_the_page_claims_success_only_where_every_check_holds(demo):
    path = demo / "evaluation" / "acoustic" / "metrics.json"
    claim = "beats what needs no learning on recordings"
    assert claim not in check(write_report(demo)["html"]).text
    content = json.loads(path.read_text())
    content["comparisons"][0]["holds"] = True
    path.write_text(json.dumps(content))
    assert claim in check(write_report(demo)["html"]).text
    shutil.rmtree(demo / "bench")
    assert claim not in check(write_report(demo)["html"]).text


def test_a_comparison_that_fails_is_shown_as_failed(page):
    text = check(page[1]["html"]).text
    assert "does not hold" in text and "1 of 7 do not hold" in text


def test_sweep_table_has_runs_and_baselines_with_intervals(page):
    html = page[1]["html"].read_text(encoding="utf-8")
    table = html[html.index('id="sweep"') :]
    table = table[: table.index("</table>")]
    for label in ("30s", "4min", "16min", "unigram", "bigram"):
        assert f'<th scope="row">{label}</th>' in table
    assert '3.43 <span class="interval">[3.37, 3.49]</span>' in table
    assert "60%" in table and "1.50 M" in table


def test_merged_metrics_hold_all_rows_comparisons_and_curves(page):
    content = json.loads(page[1]["metrics"].read_text())
    names = {row["name"] for row in content["rows"]}
    assert {"unit_perplexity", "log_mel_distance", "nats_per_code", "nats_per_unit",
            "memory_slope", "training_time"} <= names  # fmt: skip
    assert {entry["stage"] for entry in content["comparisons"]} == {
        "tokenizer", "soundstream", "soundstorm", "lm", "pipeline",
    }  # fmt: skip
    assert len(content["curves"]) == 10


def test_a_second_report_is_the_same(page):
    folder, written = page
    before = {name: written[name].read_bytes() for name in ("html", "metrics")}
    again = write_report(folder)
    assert {name: path.read_bytes() for name, path in again.items()} == before


def test_markdown_and_latex_have_the_tables_and_their_figures(page):
    folder, written = page
    markdown = written["markdown"].read_text(encoding="utf-8")
    assert "| trained on |" in markdown
    for source in re.findall(r"\]\(([^)]+)\)", markdown):
        assert (folder / "report" / source).is_file(), source
    latex = written["latex"].read_text(encoding="utf-8")
    assert latex.count(r"\begin{table}") == latex.count(r"\end{table}") > 3
    for source in re.findall(r"\\includegraphics\[[^]]*\]\{([^}]+)\}", latex):
        assert (folder / "report" / source).is_file(), source


def test_missing_parts_are_named_with_what_makes_them(demo):
    for part in ("soundstorm", "sequence_length", "evaluation", "bench"):
        shutil.rmtree(demo / part)
    for name in ("continuation.wav", "prompt.flac"):
        (demo / name).unlink()
    checker = check(write_report(demo)["html"])
    for command in (
        "speechssm generate", "speechssm evaluate codec", "speechssm evaluate likelihood",
        "speechssm bench pipeline", "speechssm train stage=soundstorm",
        "speechssm train -m experiment=sequence_length",
    ):  # fmt: skip
        assert command in checker.text


def test_a_sweep_folder_has_a_page_and_metrics_of_its_own(sweep_folder):
    written = write_report(sweep_folder)
    checker = check(written["html"])
    assert "Sweep over sequence lengths" in checker.headings
    assert "speechssm evaluate likelihood" in checker.text
    assert json.loads((sweep_folder / "metrics.json").read_text())["rows"]


def test_a_run_folder_has_a_page_and_keeps_its_own_metrics(run_folder):
    before = (run_folder / "metrics.json").read_bytes()
    written = write_report(run_folder)
    assert "metrics" not in written
    assert (run_folder / "metrics.json").read_bytes() == before
    checker = check(written["html"])
    assert "Run: demo/tokenizer" in checker.headings and "Not here" not in checker.text


def test_an_unfinished_run_is_called_so(run_folder):
    (run_folder / "metrics.json").unlink()
    assert "not finished" in check(write_report(run_folder)["html"]).text


def test_unknown_formats_and_folders_are_refused(run_folder):
    with pytest.raises(ConfigError, match="format=pdf is unknown"):
        report({"folder": run_folder, "format": "html,pdf"})
    with pytest.raises(ConfigError, match="folder is not set"):
        report({"format": "html"})


def test_a_broken_recording_is_named(demo):
    (demo / "continuation.wav").write_bytes(b"not sound")
    with pytest.raises(ConfigError, match=r"continuation\.wav is not a readable recording"):
        write_report(demo)
