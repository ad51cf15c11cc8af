"""The page of `layerskip report` in a real browser: on a phone and on a desk, in light and dark."""

from __future__ import annotations

import io
import json

import pytest
from browser import Browser, find

from layerskip.cli import main

Image = pytest.importorskip("PIL.Image", reason="Pillow reads the screenshots; it comes with matplotlib")
PROGRAM = find()
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium or Chrome on PATH: apt-get install chromium"),
]
PHONE, DESK = (390, 844), (1280, 900)

# Every text with too little contrast to what is behind it (WCAG 2: 4.5, and 3 for what is large), as "text: ratio".
CONTRAST = """(() => {
  const parse = text => {
    const numbers = text.match(/[\\d.]+/g).map(Number);
    return text.startsWith('color(srgb') ? [...numbers.slice(0, 3).map(one => 255 * one), numbers[3] ?? 1]
                                         : [...numbers.slice(0, 3), numbers[3] ?? 1];
  };
  const over = (top, under) => top.slice(0, 3).map((one, i) => one * top[3] + under[i] * (1 - top[3]));
  const light = colour => colour.slice(0, 3).map(one => one / 255)
    .map(one => one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
    .reduce((sum, one, i) => sum + one * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    const layers = [];
    for (let one = element; one; one = one.parentElement) layers.push(parse(getComputedStyle(one).backgroundColor));
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
  };
  const low = [];
  for (const element of document.querySelectorAll('body *')) {
    const text = [...element.childNodes].filter(one => one.nodeType === 3).map(one => one.data.trim()).join('');
    if (!text || !element.getClientRects().length || element.tagName === 'title') continue;
    const style = getComputedStyle(element), ground = behind(element);
    const ink = over(parse(element.closest('svg') ? style.fill : style.color), ground);
    const [bright, dark] = [light(ink), light(ground)].sort((a, b) => b - a);
    const ratio = (bright + 0.05) / (dark + 0.05);
    if (ratio < (parseFloat(style.fontSize) >= 24 ? 3 : 4.5)) low.push(`${text.slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return low;
})()"""

# What sticks out of the window, but for what scrolls in itself; and texts that stick out of their plot, or overlap.
OUTSIDE = """[...document.querySelectorAll('body *')].filter(one => {
  const box = one.getBoundingClientRect();
  return (box.right > innerWidth + 1 || box.left < -1) && !one.closest('.scroll');
}).map(one => one.outerHTML.slice(0, 80))"""
LABELS = """[...document.querySelectorAll('svg')].flatMap(plot => {
  const frame = plot.getBoundingClientRect();
  const boxes = [...plot.querySelectorAll('text')].map(one => [one.textContent, one.getBoundingClientRect()]);
  const out = boxes.filter(([_, box]) => box.left < frame.left - 1 || box.right > frame.right + 1
    || box.top < frame.top - 1 || box.bottom > frame.bottom + 1).map(([text]) => `${text} is outside`);
  const meet = boxes.flatMap(([text, a], i) => boxes.slice(i + 1).filter(([_, b]) =>
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3)
    .map(([other]) => `${text} and ${other} overlap`));
  return [...out, ...meet];
})"""


@pytest.fixture(scope="module")
def page(measured, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    names = [str(measured / f"{name}.json") for name in ("bench", "auto", "sweep", "exits")]
    assert main(["report", *names, "-o", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    assert PROGRAM is not None
    browser = Browser(PROGRAM, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
class TestPage:
    def test_it_can_be_seen_and_read(self, browser, page, size, scheme):
        browser.open(page, *size, scheme)
        assert browser.evaluate("innerWidth") == size[0]
        assert browser.evaluate("document.documentElement.scrollWidth") <= size[0]
        assert browser.evaluate(OUTSIDE) == []
        assert browser.evaluate("document.querySelectorAll('.chart svg text').length") > 100
        assert browser.evaluate(LABELS) == []
        assert browser.evaluate(CONTRAST) == []
        image = Image.open(io.BytesIO(browser.screenshot())).convert("RGB")
        assert image.width == size[0]
        assert image.height > 3 * size[1]
        seen = image.getcolors(maxcolors=1 << 24)
        assert len(seen) > 300, "letters and lines have many shades"
        assert max(count for count, _ in seen) < 0.9 * image.width * image.height, "more than a ground"
        (count, ground) = max(seen)
        assert (sum(ground) > 600) == (scheme == "light"), (count, ground)

    def test_nothing_is_loaded_and_nothing_complains(self, browser, page, size, scheme):
        browser.complaints.clear()
        browser.requested.clear()
        browser.open(page, *size, scheme)
        browser.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
        assert browser.evaluate("document.documentElement.scrollWidth") <= size[0]
        assert browser.evaluate(CONTRAST) == []
        assert browser.complaints == []
        assert browser.requested == [page.as_uri()]

    def test_a_token_tells_where_it_came_from_when_it_is_touched(self, browser, page, size, scheme):
        browser.open(page, *size, scheme)
        told = "getComputedStyle(document.querySelector('.text .t.fix'), '::after').content"
        assert browser.evaluate(told) == "none"
        box = browser.evaluate("""(() => {
          const one = document.querySelector('.text .t.fix');
          one.scrollIntoView({block: 'center'});
          const box = one.getClientRects()[0];
          return [box.x + box.width / 2, box.y + box.height / 2];
        })()""")
        for kind in ("mousePressed", "mouseReleased"):
            browser.call(
                "Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", buttons=1, clickCount=1
            )
        said = json.loads(browser.evaluate(told))
        assert said == browser.evaluate("document.querySelector('.text .t.fix').dataset.tip")
        assert said.startswith("round ")
        assert browser.evaluate("document.documentElement.scrollWidth") <= size[0]

    def test_rejected_drafts_are_shown_on_demand(self, browser, page, size, scheme):
        browser.open(page, *size, scheme)
        shown = "[...document.querySelectorAll('.text del')].filter(one => one.getClientRects().length).length"
        assert browser.evaluate(shown) == 0
        browser.evaluate("document.querySelector('#part-0 .switch').click()")
        assert browser.evaluate(shown) == browser.evaluate("document.querySelectorAll('#part-0 .text del').length") > 0
        assert browser.evaluate("document.documentElement.scrollWidth") <= size[0]


def test_these_tests_notice(browser, tmp_path):
    """Faint letters, a wide element, labels that overlap, an error."""
    path = tmp_path / "bad.html"
    path.write_text("""<body><p style="color:#bbb">faint</p><div style="width:2000px">wide</div>
      <svg width=100 height=100><text x=10 y=50>one</text><text x=12 y=52>two</text></svg><img src="gone.png">""")
    browser.complaints.clear()
    browser.open(path, *DESK, "light")
    assert browser.evaluate(CONTRAST) == ["faint: 1.92"]
    assert any("wide" in one for one in browser.evaluate(OUTSIDE))
    assert browser.evaluate(LABELS) == ["one and two overlap"]
    assert browser.complaints
