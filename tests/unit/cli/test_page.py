"""The page of `data show --html`, in a real browser: hostile rows are text, and trained tokens can be told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from luthier.cli.main import main

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>&lt;"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no chromium here: install Debian's package `chromium`"),
]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_hostile_rows_are_text_and_trained_tokens_stand_out(scheme: str, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    messages = [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": f"fine {HOSTILE}"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}))
    page_path = tmp_path / "page.html"
    assert main(["data", "show", str(tmp_path / "rows.jsonl"), "--model", "practice", "--html", str(page_path)]) == 0
    said: list[str] = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        page = browser.new_page(color_scheme=scheme, viewport={"width": 390, "height": 800})
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("console", lambda message: said.append(message.text))
        page.goto(page_path.as_uri())
        assert page.locator("img").count() == 0
        assert page.locator("script").count() == 0
        trained = "".join(page.locator("pre .t").all_text_contents())
        assert trained == f"fine {HOSTILE}<|im_end|>"
        back = page.locator("pre .t").first.evaluate("node => getComputedStyle(node).backgroundColor")
        assert back not in ("rgba(0, 0, 0, 0)", "transparent")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        browser.close()
    assert said == []
