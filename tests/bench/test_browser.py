"""The report and the picture in headless Chromium: no error, nothing beyond the screen, nothing on top of another."""

from pathlib import Path

import pytest
from paceline.spec import cli

from support import runs

pytestmark = pytest.mark.browser

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLE, PICTURE = DOCS / "example-report.html", DOCS / "picture.svg"

OVERLAPS = """() => {
  const blocks = [...document.querySelectorAll('h1,h2,h3,p,svg,.wide,.card,dt,dd')].filter(e => !e.closest('.card') ||
    e.classList.contains('card')).map(e => [e, e.getBoundingClientRect()]).filter(([, r]) => r.width && r.height);
  const found = [];
  for (const [a, r] of blocks) for (const [b, s] of blocks)
    if (a !== b && !a.contains(b) && !b.contains(a) && Math.min(r.right, s.right) - Math.max(r.left, s.left) > 1 &&
        Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top) > 1) found.push(a.outerHTML.slice(0, 80));
  const lines = [...document.querySelectorAll('svg')].flatMap(svg => {
    const texts = [...svg.querySelectorAll('text')].map(t => t.getBoundingClientRect());
    const over = (r, s) => Math.min(r.right, s.right) - Math.max(r.left, s.left) > 1 &&
      Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top) > 2;
    return texts.filter((r, i) => texts.some((s, j) => j > i && over(r, s))).map(() => svg.getAttribute('aria-label'));
  });
  return found.concat(lines);
}"""


BARS = """() => [...document.querySelectorAll('.gain:not(.axis)')].map(row => {
  const svg = row.querySelector('svg').getBoundingClientRect(), one = row.querySelector('.one').getBoundingClientRect();
  const bar = row.querySelector('rect').getBoundingClientRect();
  const said = parseFloat(row.querySelector('strong').textContent);
  return [said, bar.width / (one.left - svg.left), bar.right <= svg.right];
})"""


@pytest.fixture(scope="module")
def made_page(tmp_path_factory):
    """Of a run with hostile pieces and a long name."""
    folder = tmp_path_factory.mktemp("page")
    made = runs.records(30, pieces={"7": "</script>", "8": "\u202eabc", "9": "x" * 10_000})
    path = runs.write(folder / "a_rather_long_name_of_a_run_file_that_must_wrap.jsonl", lines=made)
    assert cli.main(["report", str(path), "-o", str(folder / "r.html")]) == 0
    return folder / "r.html"


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kept", [False, True], ids=["made", "kept"])
def test_the_page_is_whole(chromium, made_page, width, scheme, kept):
    path = EXAMPLE if kept else made_page
    assert path.stat().st_size <= 500_000
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    problems = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: problems.append(request.url))
    page.goto(path.as_uri())
    assert problems == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OVERLAPS) == []
    bars = page.evaluate(BARS)
    assert bars and all(inside and drawn == pytest.approx(said, abs=0.03) for said, drawn, inside in bars)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kept", [False, True], ids=["made", "kept"])
def test_the_picture_is_whole(chromium, made_page, scheme, kept):
    path = PICTURE
    if not kept:
        path, (run,) = made_page.parent / "p.svg", made_page.parent.glob("*.jsonl")
        assert cli.main(["report", str(run), "--picture", str(path)]) == 0
    page = chromium.new_page(viewport={"width": 900, "height": 900}, color_scheme=scheme)
    page.goto(path.as_uri())
    assert page.evaluate(OVERLAPS) == []
    outside = """() => [...document.querySelectorAll('text, rect')].filter(own => own.getBoundingClientRect().right >
      document.documentElement.getBoundingClientRect().right).length"""
    assert page.evaluate(outside) == 0
    light = page.evaluate("getComputedStyle(document.querySelector('.paper')).fill") == "rgb(255, 255, 255)"
    assert light == (scheme == "light")
    page.close()


@pytest.mark.parametrize("kept", [False, True], ids=["made", "kept"])
def test_the_page_fits_on_paper(chromium, made_page, kept):
    page = chromium.new_page(viewport={"width": 720, "height": 900}, color_scheme="light")
    page.emulate_media(media="print")
    page.goto((EXAMPLE if kept else made_page).as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 720 and page.evaluate(OVERLAPS) == []
    page.close()
