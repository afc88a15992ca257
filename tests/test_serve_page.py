"""The page of ``megagpt serve`` in Chromium: a text that appears as it comes, the controls, the key."""

import pytest

pytest.importorskip("starlette", reason="starlette is not installed (extra serve)")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra serve)")

import chromium
from serve_common import serving_run, write_run

from megagpt.serve.guard import VARIABLE, read_key

pytestmark = pytest.mark.skipif(chromium.PATH is None, reason="chromium is not installed: apt-get install chromium")

KEY = "a-key-of-the-tests-0123456789"
ANSWER = "document.getElementById('answer').textContent"
STATUS = "document.getElementById('status').textContent"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with chromium.page(tmp_path_factory.mktemp("chromium")) as found:
        yield found


def click(page, element):
    page.run(f"document.getElementById({element!r}).click()")


def test_a_text_streams_into_the_page_and_stops_on_request(run, page):
    with serving_run(run) as server:
        page.go(server.url)
        page.until("document.getElementById('model').textContent === 'tiny'")
        prompt = "<b>It was</b>"
        page.write("prompt", prompt)
        page.write("max_tokens", "40")
        page.write("temperature", "0")
        page.run(
            "window.steps = 0; new MutationObserver(() => window.steps++)"
            ".observe(document.getElementById('answer'), {childList: true})"
        )
        click(page, "generate")
        page.until(f"/^\\d+ tokens in/.test({STATUS})")
        assert page.run(ANSWER) == server.alone(prompt, 40).text
        assert page.run("document.getElementById('echo').textContent") == prompt
        assert page.run("document.querySelector('pre b')") is None  # text is text
        assert page.run("window.steps") > 3

        page.write("max_tokens", "50000")
        page.write("seed", "5")
        click(page, "generate")
        page.until(f"{ANSWER}.length > 5")
        click(page, "halt")
        page.until(f"{STATUS} === 'stopped'")
        server.wait_until_idle()

        page.write("top_k", "3")
        page.write("max_tokens", "1000000")
        click(page, "generate")
        page.until(f"{STATUS}.startsWith('max_tokens must be')")
        assert [error for error in page.errors if "400" not in error] == []  # Chromium notes every failed request


def test_the_page_asks_for_a_key_where_one_is_needed(run, page):
    with serving_run(run, key=read_key(None, {VARIABLE: KEY})) as server:
        page.go(server.url)
        page.until(f"{STATUS}.startsWith('an API key is needed')")
        page.write("key", "wrong")
        click(page, "generate")
        page.until(f"{STATUS} === 'the API key is wrong'")
        page.write("key", KEY)
        click(page, "generate")
        page.until(f"/^\\d+ tokens in/.test({STATUS})")
        assert page.run("document.getElementById('model').textContent") == "tiny"
        assert page.run("localStorage.length + sessionStorage.length + document.cookie.length") == 0
