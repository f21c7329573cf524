"""The page at `/`: one file without outside requests; by keyboard, on a phone, in the dark, with hostile text."""

import re
import urllib.request

import pytest
from serve.playing import toy
from serve.served import listening, serving_of, truth


@pytest.fixture(scope="module")
def url():
    with listening(serving_of(room=200), turn_seconds=0.005) as address:
        yield address


def test_it_is_one_file_that_asks_nobody_else(url):
    with urllib.request.urlopen(url + "/") as reply:
        policy, text = reply.headers["Content-Security-Policy"], reply.read().decode()
    assert not re.search(r"https?://|//[a-z]|@import|url\(", text) and "default-src 'none'" in policy
    assert "innerHTML" not in text and "insertAdjacentHTML" not in text and "document.write" not in text
    assert text.count("<script>") == 1 and 'lang="en"' in text and "viewport" in text


CONTRAST = """() => {
  const number = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const linear = (c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = (text) => number(text).map(c => linear(c / 255))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (one, other) => (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  const ground = light(getComputedStyle(document.body).backgroundColor);
  return [...document.querySelectorAll('article, .drafted, #figures, h1')].map(element => {
    const style = getComputedStyle(element);
    const own = style.backgroundColor === 'rgba(0, 0, 0, 0)' ? ground : light(style.backgroundColor);
    return ratio(light(style.color), own);
  });
}"""


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 800), (360, 640)])
def test_a_talk_by_keyboard(url, chromium, scheme, size):
    page = chromium.new_page(viewport=dict(width=size[0], height=size[1]), color_scheme=scheme)
    asked, wrong = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.goto(url + "/")
    page.evaluate("document.getElementById('tokens').value = 60")
    for turn in range(2):
        page.keyboard.type("VXFQ]B")
        page.keyboard.press("Enter")
        page.locator("article.assistant").nth(turn).wait_for(state="attached")
        page.wait_for_selector("#send:not([disabled])")
    said = page.locator("article.assistant").first.text_content()
    assert said == truth(toy(), "VXFQ]B", 60, temperature=0.0)[1] and len(said) > 50 and {*'<>&"'} & {*said}
    assert page.locator("article.user").first.text_content() == "VXFQ]B"
    assert re.search(r"tokens/s · [\d.]+ tokens per step · \d+ of \d+ tokens drafted", page.text_content("#figures"))
    assert page.locator("article.assistant span").count() > 0
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    assert min(page.evaluate(CONTRAST)) >= 4.5
    small = page.evaluate("[...document.querySelectorAll('button:not([hidden]), textarea')].map(e => e.offsetHeight)")
    assert min(height for height in small if height) >= 44, "a thumb finds it"
    assert not wrong and all(each.startswith((url, "data:")) for each in asked)
    page.close()


@pytest.mark.browser
def test_an_answer_can_be_stopped_and_a_refusal_is_told(url, chromium):
    page = chromium.new_page()
    page.goto(url + "/")
    page.keyboard.type("@" * 300)
    page.keyboard.press("Enter")
    page.wait_for_selector("article.wrong")
    assert "shorten one of them" in page.text_content("article.wrong")
    assert page.input_value("#message") == "@" * 300, "what was written is not lost"
    page.close()
