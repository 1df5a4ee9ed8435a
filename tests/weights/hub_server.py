"""A server on this machine that speaks the hub's routes, for `huggingface_hub` and torchvision's
files.

As the hub: `HEAD` and `GET` of `/OWNER/NAME/resolve/REVISION/FILE` with `X-Repo-Commit` and `ETag`;
large files redirect to where they lie, with `X-Linked-Etag` (their SHA-256) and `X-Linked-Size`;
what is missing has status 404 (401 for repositories) and `X-Error-Code`. And
`/api/models/OWNER/NAME`.
"""

import hashlib
import http.server
import json
import re
import threading

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
  """Serves while it is open, as a context manager.

  Attributes:
    repositories: name -> file -> content. A file `GATED` closes a repository to everybody.
    plain: path -> content of other files.
    requests: `METHOD path` of all requests so far.
    url: of the server, once it is open.
  """

  def __init__(self):
    self.repositories, self.plain, self.requests = {}, {}, []
    self.url = ""

  def __enter__(self):
    hub = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def log_message(self, *arguments):
        pass

      def do_GET(self):
        hub.requests.append(f"{self.command} {self.path}")
        status, headers, content = hub.answer(self.path)
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
          self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
          self.wfile.write(content)

      do_HEAD = do_GET

    self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
    self._thread.start()
    self.url = f"http://127.0.0.1:{self._server.server_port}"
    return self

  def __exit__(self, *raised):
    self._server.shutdown()
    self._thread.join()
    self._server.server_close()

  def answer(self, path):
    """Status, headers and content."""
    if path in self.plain:
      return 200, {}, self.plain[path]
    if found := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
      return self._large(found[1])
    if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
      files = [{"rfilename": name} for name in self.repositories.get(found[1], {})]
      return 200, {}, json.dumps({"id": found[1], "sha": COMMIT, "siblings": files}).encode()
    found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
    return self._file(*found.groups()) if found else (404, {}, b"")

  def _large(self, digest):
    files = [content for files in self.repositories.values() for content in files.values()]
    content = next(c for c in files if hashlib.sha256(c).hexdigest() == digest)
    return 200, {"ETag": f'"{digest}"'}, content

  def _file(self, repository, revision, name):
    files = self.repositories.get(repository)
    if files is None:  # the hub does not tell whether it is private or absent
      return 401, {"X-Error-Code": "RepoNotFound"}, b""
    if "GATED" in files:
      return 403, {"X-Error-Code": "GatedRepo"}, b""
    if revision not in ("main", COMMIT):
      return 404, {"X-Error-Code": "RevisionNotFound"}, b""
    there = {"X-Repo-Commit": COMMIT}
    if name not in files:
      return 404, {**there, "X-Error-Code": "EntryNotFound"}, b""
    content = files[name]
    if name.endswith(".json"):
      return 200, {**there, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, content
    digest = hashlib.sha256(content).hexdigest()
    headers = {**there, "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": len(content)}
    # On another host, as the hub's.
    elsewhere = self.url.replace("127.0.0.1", "localhost")
    return 302, {**headers, "Location": f"{elsewhere}/lfs/{digest}"}, b""
