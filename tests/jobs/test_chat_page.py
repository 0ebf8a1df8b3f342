"""The chat page in a real browser: /usr/bin/chromium, or what MPILLAMA_CHROMIUM names."""

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from server import Server


class Browser:
    """A headless Chromium with one page, driven over its debugging pipe."""

    def __init__(self, program, folder):
        to_browser, from_browser = os.pipe(), os.pipe()
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        command += [f"--user-data-dir={folder}", "about:blank"]
        # The browser reads file 3 and writes file 4.
        script = f'exec "$@" 3<&{to_browser[0]} 4>&{from_browser[1]}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command],
            pass_fds=(to_browser[0], from_browser[1]),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        self._out, self._in, self._held, self._n = to_browser[1], from_browser[0], b"", 0
        self._session = ""
        targets = self._call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        self._call("Page.enable")

    def close(self):
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def _call(self, method, **params):
        self._n += 1
        message = {"id": self._n, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            while b"\0" in self._held:
                answer, _, self._held = self._held.partition(b"\0")
                answer = json.loads(answer)
                if answer.get("id") == self._n:
                    assert "error" not in answer, answer
                    return answer["result"]
            if select.select([self._in], [], [], 1)[0]:
                data = os.read(self._in, 1 << 16)
                assert data, "the browser has ended"
                self._held += data
        raise AssertionError(f"{method} was not answered")

    def open(self, url):
        self._call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def run(self, script):
        result = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, script, limit=60):
        began = time.monotonic()
        while not (value := self.run(script)):
            assert time.monotonic() - began < limit, (script, self.run("document.body.innerText"))
            time.sleep(0.05)
        return value


@pytest.fixture
def browser(tmp_path):
    program = os.environ.get("MPILLAMA_CHROMIUM", "/usr/bin/chromium")
    if not Path(program).exists() or shutil.which("bash") is None:
        pytest.skip("there is no /usr/bin/chromium; MPILLAMA_CHROMIUM names another")
    opened = Browser(program, tmp_path / "profile")
    yield opened
    opened.close()


ANSWERS = "[...document.querySelectorAll('.assistant > div')].map(e => e.textContent)"
ERRORS = "[...document.querySelectorAll('.error')].map(e => e.textContent).join()"
DONE = "document.getElementById('stop').hidden"


def say(browser, text):
    browser.run(f"document.getElementById('text').value = {json.dumps(text)}")
    browser.run("document.getElementById('form').requestSubmit()")


def test_a_chat_in_a_browser(browser):
    # Answers are long enough to be stopped by somebody who looks twenty times a second: seconds, not a fraction of one.
    flags = ["--chat-template", "chatml", "--api-key", "sesame", "--ignore-eos", "-c", "8192", "-n", "6000"]
    with Server(*flags, n_ranks=0) as server:
        browser.open(server.url + "/")
        browser.until("document.title === 'mpillama demo'")
        say(browser, "Hello")
        assert "API key" in browser.until(ERRORS)
        browser.run("document.getElementById('clear').click()")
        browser.run(
            "{ const key = document.getElementById('key'); key.value = 'sesame';"
            " key.dispatchEvent(new Event('change')); }"
        )
        say(browser, "<b>Tell</b> me a story")
        browser.until(f"({ANSWERS})[0]")
        browser.run("document.getElementById('stop').click()")
        browser.until(DONE)
        first = browser.run(ANSWERS)[0]
        assert 0 < len(first) < 15000
        assert browser.run("document.getElementById('status').textContent") == "stopped"
        assert not browser.run("document.querySelector('.message b')")

        browser.open(server.url + "/")
        assert browser.run(ANSWERS) == [first]
        browser.run("document.getElementById('clear').click()")
        browser.open(server.url + "/?q=Again")
        browser.until(f"({ANSWERS})[0]")
        browser.until(DONE)
        assert "tokens/s" in browser.run("document.getElementById('status').textContent")
        assert not browser.run(ERRORS)
