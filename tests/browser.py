"""A headless Chromium for tests, through chromedriver's HTTP interface (W3C WebDriver): needs no other package."""
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = None if CHROMIUM and DRIVER else \
    "needs Chromium and its driver (Debian: apt-get install chromium chromium-driver)"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"       # the key of an element's identifier, fixed by the standard


class Browser:
    """One window.  dark: the system's theme, as a page sees it; mobile: a phone of this width, touch and all."""

    def __init__(self, folder, width=1280, height=900, dark=False, mobile=False):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self._log = open(folder / "chromedriver.log", "wb")
        self._driver = subprocess.Popen([DRIVER, f"--port={self._url.rpartition(':')[2]}"], stdout=self._log,
                                        stderr=subprocess.STDOUT, env={**os.environ, "HOME": str(folder)})
        options = {"binary": CHROMIUM, "args": [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            f"--window-size={width},{height}", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]}
        if mobile:
            options["mobileEmulation"] = {"deviceMetrics": {"width": width, "height": height, "pixelRatio": 1}}
        capabilities = {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options,
                                        "goog:loggingPrefs": {"browser": "ALL"}}}
        try:
            self._wait_until_ready()
            self._session = ""
            self._session = "/session/" + self._call("POST", "/session", {"capabilities": capabilities})["sessionId"]
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self._call("DELETE", "")
        finally:
            self.close()

    def close(self):
        self._driver.terminate()
        self._driver.wait(10)
        self._log.close()

    def open(self, path):
        self._call("POST", "/url", {"url": path.absolute().as_uri()})

    def run(self, script, *arguments):
        """What a function with this body returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def click(self, selector):
        self._call("POST", f"/element/{self._find(selector)}/click", {})

    def type(self, selector, text):
        found = self._find(selector)
        self._call("POST", f"/element/{found}/clear", {})
        self._call("POST", f"/element/{found}/value", {"text": text})

    def texts(self, selector):
        """Of the elements that are shown."""
        return self.run("return [...document.querySelectorAll(arguments[0])].filter(e => e.getClientRects().length)"
                        ".map(e => e.textContent.trim())", selector)

    def complaints(self):
        """Errors in the console of the page."""
        return [entry["message"] for entry in self._call("POST", "/se/log", {"type": "browser"})
                if entry["level"] == "SEVERE"]

    def screenshot(self):
        """PNG, in base64."""
        return self._call("GET", "/screenshot")

    def _find(self, selector):
        return self._call("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def _call(self, method, path, body=None):
        request = urllib.request.Request(self._url + self._session + path, method=method,
                                         data=None if body is None else json.dumps(body).encode(),
                                         headers={"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{method} {path}: {json.load(error)['value']['message'].splitlines()[0]}") from None

    def _wait_until_ready(self):
        for _ in range(200):
            try:
                with urllib.request.urlopen(f"{self._url}/status", timeout=5):
                    return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError("chromedriver does not answer")
