"""Debian's Chromium without a window, driven through a pipe in its own language, the DevTools protocol."""

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time

PATH = shutil.which("chromium")
_FLAGS = [
    "--headless=new",
    "--no-sandbox",  # which it does not offer to root; it sees our own page alone
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--window-size=1000,800",
    "--remote-debugging-pipe",  # it reads from descriptor 3 and writes to 4
]
_LAUNCH = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """A tab. ``errors`` are the messages of its console and of its scripts."""

    def __init__(self, commands, replies):
        self._commands, self._replies, self._n = commands, replies, 0
        self._session = {}
        self.errors = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method, **params):
        """The result of a command; events that come before it are looked through for errors."""
        self._n += 1
        command = {"id": self._n, "method": method, "params": params, **self._session}
        self._commands.write(json.dumps(command).encode() + b"\0")
        self._commands.flush()
        while True:
            reply = self._read()
            if reply.get("id") == self._n:
                assert "error" not in reply, reply
                return reply["result"]
            if reply.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(json.dumps(reply["params"]))

    def _read(self):
        content = bytearray()
        while (byte := self._replies.read(1)) != b"\0":
            assert byte, "Chromium has ended"
            content += byte
        return json.loads(content)

    def go(self, url):
        self.send("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script):
        """The value of an expression of JavaScript."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, script, seconds=30):
        """Wait for an expression to be true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, (
                f"{script} is not true; {self.run('document.body.innerText')!r} {self.errors}"
            )
            time.sleep(0.02)

    def write(self, element, text):
        """Put ``text``, as from the keyboard, in place of what the field of this id holds."""
        self.run(f"document.getElementById({element!r}).select()")
        self.send("Input.insertText", text=text)

    def screenshot(self, path):
        self.send("Page.bringToFront")  # what is behind is not drawn
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def page(folder):
    """A :class:`Page` of a Chromium whose profile is in ``folder``."""
    (read_commands, commands), (replies, write_replies) = os.pipe(), os.pipe()
    theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (read_commands, write_replies)]
    os.close(read_commands)
    os.close(write_replies)
    launch = [sys.executable, "-S", "-c", _LAUNCH, *map(str, theirs), PATH, *_FLAGS, f"--user-data-dir={folder}"]
    process = subprocess.Popen(launch, pass_fds=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for fd in theirs:
        os.close(fd)
    with os.fdopen(commands, "wb") as writer, os.fdopen(replies, "rb") as reader:
        try:
            yield Page(writer, reader)
        finally:
            with contextlib.suppress(OSError):
                writer.write(b'{"id": 0, "method": "Browser.close"}\0')
                writer.flush()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
