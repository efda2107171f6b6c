import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from vpd.report import write_report
from vpd.runs import RunError, RunFolder

EVIL = "<script>alert('x')</script>"


class Page(HTMLParser):
    """A parser that collects a page's tags, and the attributes by which a browser would load something."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.loads: list[str | None] = []
        self.ids: list[str | None] = []
        self.open: list[str] = []
        self.text = ""
        self.policy: str | None = None
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"]
        self.loads += [
            value for name, value in attrs if name in ("src", "href", "xlink:href") and not str(value).startswith("#")
        ]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(finished_run: Path) -> Page:
    return Page(write_report(finished_run))


def test_no_text_of_the_run_becomes_markup(page):
    assert "script" not in page.tags
    assert page.text.count(EVIL) > 3 * 20
    assert page.open == []


def test_the_page_loads_nothing(page):
    assert page.loads == []
    assert "@import" not in page.source
    assert set(re.findall(r"url\((.)", page.source)) <= {"#"}
    assert page.policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_page_tells_what_came_of_the_run(page):
    for text in ("my run", "30 of 30", "35m 10s", "after VPD", "68.3%", "62.8 to 73.3%", "gradient-clipped", "+11.0"):
        assert text in page.text
    assert "no final result" not in page.text
    assert page.text.count("reward 1") == 10
    assert page.tags.count("details") == 21
    assert page.tags.count("section") == 8


def test_ids_are_unique_where_something_refers_to_them(page):
    referred = set(re.findall(r"url\(#([^)]+)\)", page.source)) | set(re.findall(r'href="#([^"]+)"', page.source))
    assert referred
    for name in referred:
        assert page.ids.count(name) == 1


def test_equal_runs_give_equal_pages(interrupted_run):
    assert write_report(interrupted_run).read_bytes() == write_report(interrupted_run).read_bytes()


def test_an_interrupted_run_has_a_page(interrupted_run):
    page = Page(write_report(interrupted_run))
    assert "no final result" in page.text
    assert "3 of 30" in page.text
    assert "Sampled rollouts" in page.text


def test_a_run_that_has_only_begun_has_a_page(tmp_path, make_run):
    make_run(tmp_path, steps=0, finished=False)
    (tmp_path / "metrics.jsonl").unlink()
    page = Page(write_report(tmp_path))
    assert "No step has been recorded yet." in page.text
    assert "svg" not in page.tags


@pytest.mark.parametrize("value", [None, "text", [1], {"a": 1}])
def test_strange_or_missing_values_do_not_stop_the_page(tmp_path, value):
    folder = RunFolder(tmp_path)
    folder.write_config({"algorithm": value, "data": value, "run": {"max_steps": value}})
    keys = ("reward", "e_loss", "margin_after", "accuracy", "low", "seconds", "split", "name", "text", "gap")
    for event in ("train", "eval", "gap", "warning", "unheard-of"):
        folder.log(1, event, {})
        folder.log(2, event, dict.fromkeys(keys, value))
    with open(folder.metrics_path, "a") as file:
        file.write('{"event": "train", "reward": 0.5}\n{"event": "ev')
    folder.write_result({"rows": [{"name": value, "accuracy": value}, value], "seconds_total": value})
    assert "unnamed" in Page(write_report(tmp_path)).text


def test_a_folder_without_a_run_is_told(tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        write_report(tmp_path)


def test_inline_figures_are_well_formed_and_take_the_page_colour(page):
    figures = re.findall(r"<svg xmlns.*?</svg>", page.source, re.DOTALL)
    assert len(figures) == 8
    for figure in figures:
        ElementTree.fromstring(figure)
        assert "currentColor" in figure
        assert "#010203" not in figure
