"""Loads the built-in page in headless Chromium and chats: page_check.py http://127.0.0.1:PORT

Speaks WebDriver's wire protocol (W3C) to chromedriver. Fails unless the answer is streamed into the page, the metrics
show, the console has no error and nothing is asked of any other host.
"""

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
PATIENCE_S = 120


class Browser:
    def __init__(self, port, profile):
        self.base = f"http://127.0.0.1:{port}"
        options = {"args": FLAGS + [f"--user-data-dir={profile}"]}
        capabilities = {"browserName": "chrome", "goog:chromeOptions": options,
                        "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        answer = self.call("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self.session = "/session/" + answer["sessionId"]

    def call(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return json.load(answer)["value"]

    def run(self, script):
        return self.call("POST", self.session + "/execute/sync", {"script": script, "args": []})

    def log(self, kind):
        return self.call("POST", self.session + "/se/log", {"type": kind})

    def type(self, css, text):
        element = self.call("POST", self.session + "/element", {"using": "css selector", "value": css})
        self.call("POST", f"{self.session}/element/{next(iter(element.values()))}/value", {"text": text})


def wait_for(what, check):
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if value := check():
            return value
        time.sleep(0.05)
    raise SystemExit(f"{what}: not seen within {PATIENCE_S} s")


def check_page(browser, url):
    browser.call("POST", browser.session + "/url", {"url": url + "/"})
    assert browser.run("return document.title") == "Ember"
    wait_for("the model's name", lambda: browser.run("return document.getElementById('model').value"))
    metrics = "return document.getElementById('metrics').textContent"
    wait_for("the metrics", lambda: "running" in browser.run(metrics) and "KV cache" in browser.run(metrics))
    # Every length that the answer has had: one that is streamed grows.
    browser.run("""
        window.lengths = new Set();
        new MutationObserver(() => {
            const said = document.querySelector("article.assistant")?.textContent ?? "";
            window.lengths.add(said.length);
        }).observe(document.getElementById("chat"), {subtree: true, childList: true, characterData: true});
    """)
    browser.type("#text", "Count from one to ten.\ue007")
    is_answered = """
        return document.querySelector("article.assistant")?.textContent.length > 0
            && document.getElementById("stop").hidden;
    """
    wait_for("the answer's end", lambda: browser.run(is_answered))
    assert not browser.run("return document.querySelector('article.failed')?.textContent"), "the answer failed"
    lengths = browser.run("return [...window.lengths]")
    assert len(lengths) > 3, f"the answer was not streamed: {lengths}"
    rate = "return [...document.querySelectorAll('#metrics dd')].map(it => it.textContent)"
    figures = browser.run(rate)
    assert len(figures) == 4 and not any("NaN" in it or "undefined" in it for it in figures), figures

    errors = [entry for entry in browser.log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert not errors, f"the console has {errors}"
    asked = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
    urls = [it["params"]["request"]["url"] for it in asked if it["method"] == "Network.requestWillBeSent"]
    # The browser's own first tab.
    urls = [it for it in urls if not it.startswith("chrome://")]
    assert any(it.endswith("/v1/chat/completions") for it in urls), urls
    outside = [it for it in urls if not it.startswith((url + "/", "data:"))]
    assert not outside, f"the page asked {outside}"
    print(f"page: {max(lengths)} characters in {len(lengths)} pieces, {len(urls)} requests, all of this server")


def main():
    url = sys.argv[1].rstrip("/")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as profile:
        driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
        try:
            def ready():
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/status") as answer:
                        return json.load(answer)["value"]["ready"]
                except OSError:
                    return False
            wait_for("chromedriver", ready)
            browser = Browser(port, profile)
            try:
                check_page(browser, url)
            finally:
                browser.call("DELETE", browser.session)
        finally:
            driver.terminate()
            driver.wait()


if __name__ == "__main__":
    main()
