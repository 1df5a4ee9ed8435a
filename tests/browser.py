"""Headless Chromium, driven through its debugging protocol over two pipes: no driver is needed.

https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import contextlib
import json
import os
import pathlib
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 60  # until a call, or what is waited for, counts as hung


def executable() -> str | None:
  """The path of a Chromium, if there is one."""
  return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
  """One page. A context manager: no process is left after it.

  Args: directory: for the profile and what the browser prints.
  """

  def __init__(self, directory: pathlib.Path):
    self._number, self._unread, self._events = 0, b"", []
    (theirs, self._write), (self._read, back) = os.pipe(), os.pipe()
    options = [
      *("--headless", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run"),
      # As root, and with a small /dev/shm, as in containers.
      *("--no-sandbox", "--disable-dev-shm-usage"),
      *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
      f"--user-data-dir={directory / 'profile'}",
    ]
    # The protocol's pipes are the descriptors 3 and 4, which the shell makes of ours.
    script = f'exec "$@" 3<&{theirs} 4>&{back}'
    with open(directory / "chromium.log", "wb") as log:
      self._process = subprocess.Popen(
        ["bash", "-c", script, "bash", executable(), *options],
        pass_fds=(theirs, back),
        stdout=log,
        stderr=log,
        start_new_session=True,
      )
    os.close(theirs)
    os.close(back)
    self._session = None
    target = self.call("Target.createTarget", url="about:blank")["targetId"]
    attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
    self._session = attached["sessionId"]
    for domain in ("Page", "Runtime", "Log"):
      self.call(f"{domain}.enable")

  def __enter__(self) -> "Browser":
    return self

  def __exit__(self, *_) -> None:
    os.close(self._write)  # at the end of its input the browser ends itself
    try:
      with contextlib.suppress(subprocess.TimeoutExpired):
        self._process.wait(10)
    finally:
      # What is left of its processes.
      with contextlib.suppress(ProcessLookupError):
        os.killpg(self._process.pid, signal.SIGKILL)
      self._process.wait()
      os.close(self._read)

  def call(self, method: str, **parameters: Any) -> dict[str, Any]:
    """The result of a method of the protocol."""
    self._number += 1
    message = {"id": self._number, "method": method, "params": parameters}
    if self._session:
      message["sessionId"] = self._session
    os.write(self._write, json.dumps(message).encode() + b"\0")
    while True:
      answer = self._next()
      if answer.get("id") == self._number:
        assert "error" not in answer, (method, answer)
        return answer["result"]
      self._events.append(answer)

  def _next(self) -> dict[str, Any]:
    while b"\0" not in self._unread:
      ready, _, _ = select.select([self._read], [], [], SECONDS)
      assert ready, "the browser does not answer"
      content = os.read(self._read, 2**16)
      assert content, "the browser ended"
      self._unread += content
    message, _, self._unread = self._unread.partition(b"\0")
    return json.loads(message)

  def complaints(self) -> list[str]:
    """What the page's console has of errors since the last call."""
    self.run("0")
    found = []
    for event in self._events:
      parameters = event.get("params", {})
      if event.get("method") == "Runtime.exceptionThrown":
        found.append(str(parameters["exceptionDetails"]))
      elif event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
        found.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")
      elif event.get("method") == "Runtime.consoleAPICalled" and parameters["type"] == "error":
        found.append(str([value.get("value") for value in parameters["args"]]))
    self._events.clear()
    return found

  def open(self, address: str) -> None:
    """Loads a page."""
    self.call("Page.navigate", url=address)
    self.wait(f"location.href === {json.dumps(address)} && document.readyState === 'complete'")

  def run(self, script: str) -> Any:
    """The value of an expression in the page; of a promise, what it gives."""
    answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
    assert "exceptionDetails" not in answer, answer["exceptionDetails"]
    return answer["result"].get("value")

  def wait(self, condition: str) -> None:
    """Until an expression is true."""
    end = time.monotonic() + SECONDS
    while not self.run(f"Boolean({condition})"):
      assert time.monotonic() < end, (condition, self.run("document.body.innerText"))
      time.sleep(0.02)

  def choose(self, selector: str, files: Sequence[pathlib.Path]) -> None:
    """Files for an input of files."""
    element = self.call("Runtime.evaluate", expression=f"document.querySelector('{selector}')")
    self.call(
      "DOM.setFileInputFiles",
      files=list(map(os.fspath, files)),
      objectId=element["result"]["objectId"],
    )

  def drop(self, x: float, y: float, files: Sequence[pathlib.Path]) -> None:
    """Drags files to a place and drops them."""
    data = {"items": [], "files": list(map(os.fspath, files)), "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
      self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

  def stroke(self, points: Sequence[tuple[float, float]]) -> None:
    """Moves the mouse through points, its button pressed."""
    kinds = ["mousePressed", *["mouseMoved"] * (len(points) - 1), "mouseReleased"]
    for kind, (x, y) in zip(kinds, [*points, points[-1]], strict=True):
      self.call(
        "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1
      )

  def screenshot(self, file: pathlib.Path, width: int, height: int, scheme: str = "light") -> None:
    """Writes a PNG of the page in a window of this size, `light` or `dark`."""
    self.call(
      "Emulation.setDeviceMetricsOverride",
      **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    scheme_feature = {"name": "prefers-color-scheme", "value": scheme}
    self.call("Emulation.setEmulatedMedia", features=[scheme_feature])
    file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
