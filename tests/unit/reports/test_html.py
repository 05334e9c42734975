"""The page: complete in itself, and hostile text can do nothing; in a real browser in light, in dark and on a phone."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from luthier.reports.html import render_page
from luthier.reports.model import Report, read_report
from tests.unit.reports.made import (
    HOSTILE,
    Course,
    certificate,
    comparison,
    looked_for,
    make_report,
    paired,
    write_hostile,
    write_run,
)

if TYPE_CHECKING:
    from playwright.sync_api import Browser

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
VOID = {"meta", "br", "hr", "input", "link", "img"}


class Elements(HTMLParser):
    """Every element with its attributes, and whether each is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def hostile(tmp_path: Path) -> Report:
    return read_report(write_hostile(tmp_path / "hostile"))


@pytest.fixture
def judged(tmp_path: Path) -> Report:
    run = write_run(tmp_path / "judged")
    (run.folder / "comparison.json").write_text(
        json.dumps({**comparison(exact_match="better", length="worse"), **looked_for()})
    )
    (run.folder / "certificate.json").write_text(json.dumps(certificate()))
    return read_report(run)


def test_the_page_is_complete_in_itself(hostile: Report, judged: Report) -> None:
    for reports in ([hostile], [judged], [hostile, judged]):
        page = render_page(reports)
        elements = Elements(page)
        assert elements.open == []
        names = {name for name, _ in elements.found}
        assert names & {"script", "img", "link", "iframe", "object", "form", "base"} == set()
        attributes = {key for _, given in elements.found for key in given}
        assert not {key for key in attributes if key.startswith("on")} | attributes & {"src", "style", "action"}
        assert all(str(given.get("href", "#")).startswith("#") for _, given in elements.found)
        assert "url(" not in page
        assert "@import" not in page


def test_the_policy_allows_its_own_style_sheet_and_nothing_else(judged: Report) -> None:
    page = render_page([judged])
    styles = re.findall(r"<style>(.*?)</style>", page, re.S)
    assert len(styles) == 1
    digest = base64.b64encode(hashlib.sha256(styles[0].encode()).digest()).decode()
    policy = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy == [f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"]


def test_the_verdict_comes_first(judged: Report) -> None:
    page = render_page([judged])
    assert page.index("<h1>") < page.index("<h2>")
    assert "<h1>The tuned model is better than practice on exact match, but worse on length" in page


@pytest.mark.parametrize("course", [Course([], {}), Course([1.0], {}), Course(last={"kind": "failed", "code": "x"})])
def test_a_run_without_much_has_a_page(course: Course, tmp_path: Path) -> None:
    Elements(render_page([make_report(tmp_path / "run", course, [])]))
    Elements(render_page([make_report(tmp_path / name, course, []) for name in ("a", "b")]))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield opened
        opened.close()


CONTRAST = """() => {
  const level = text => {
    const [r, g, b] = text.match(/[\\d.]+/g).map(Number).map(c => c / 255)
      .map(c => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = node => {
    for (let at = node; at; at = at.parentElement) {
      const back = getComputedStyle(at).backgroundColor;
      if (!back.endsWith(", 0)")) return back;
    }
    return "rgb(255, 255, 255)";
  };
  const worst = [99, ""];
  const all = document.querySelectorAll("h1,h2,h3,p,td,th,dt,dd,a,code,pre,summary,b,li,.key,.tag,.said,svg text");
  for (const node of all) {
    const style = getComputedStyle(node);
    const [a, b] = [level(node.closest("svg") ? style.fill : style.color), level(behind(node))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < worst[0]) { worst[0] = ratio; worst[1] = node.outerHTML.slice(0, 120); }
  }
  return worst;
}"""


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no chromium here: install Debian's package `chromium`")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_runs_and_nothing_is_cut(
    scheme: Any, width: int, browser: Browser, hostile: Report, judged: Report, tmp_path: Path
) -> None:
    for name, reports in (("one", [hostile]), ("other", [judged]), ("several", [hostile, judged])):
        path = tmp_path / f"{name}.html"
        path.write_text(render_page(reports), "utf-8")
        said: list[str] = []
        page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
        page.on("dialog", lambda dialog, said=said: said.append(dialog.message))  # type: ignore[misc]
        page.on("console", lambda message, said=said: said.append(message.text))  # type: ignore[misc]
        page.on("request", lambda request, said=said: said.append(request.url))  # type: ignore[misc]
        page.goto(path.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
        assert said == [path.as_uri()]
        assert page.locator("h1").is_visible()
        if reports == [hostile]:
            written = HOSTILE.replace("\u202e", "\\u202e").replace("\x1b", "\\u001b")
            assert sum(written in text for text in page.locator("pre").all_text_contents()) >= 12
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        ratio, where = page.evaluate(CONTRAST)
        assert ratio >= 4.5, where
        page.close()


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no chromium here: install Debian's package `chromium`")
def test_paper_is_light_whatever_the_screen_is(browser: Browser, judged: Report, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(render_page([judged]), "utf-8")
    page = browser.new_page(color_scheme="dark", viewport={"width": 700, "height": 900})
    page.emulate_media(media="print", color_scheme="dark")
    page.goto(path.as_uri())
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('h1')).color") == "rgb(29, 33, 41)"
    assert not page.locator("nav").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.close()


LINES = """() => [...document.querySelectorAll("tbody th, .outcome")].map(each => {
  const range = document.createRange();
  range.selectNodeContents(each);
  return [new Set([...range.getClientRects()].map(box => Math.round(box.top / 10))).size, each.textContent];
})"""


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no chromium here: install Debian's package `chromium`")
@pytest.mark.parametrize("width", [390, 700, 1280])
def test_no_label_is_broken_into_letters(width: int, browser: Browser, judged: Report, tmp_path: Path) -> None:
    long = "/somewhere/far/away/" + "and/on" * 12
    runs = [make_report(tmp_path / name, paired(), data={"train": f"{long}/{name}.jsonl"}) for name in ("one", "two")]
    for reports in ([judged], runs):
        path = tmp_path / f"{len(reports)}.html"
        path.write_text(render_page(reports), "utf-8")
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.goto(path.as_uri())
        most, text = max(page.evaluate(LINES))
        assert most <= 4, text
        page.close()
