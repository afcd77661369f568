"""The page over a local pair of models: one machine, one model at work at a time, no way to the file system."""

import json
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from minqstar.ask import QFunction
from minqstar.console import Console
from minqstar.errors import Stopped, UserError, first_line, require
from minqstar.lab.explore.export import response_of
from minqstar.text import clean

MOST = 2**16  # bytes of a request
HERE = ("127.0.0.1", "localhost")


class Handler(BaseHTTPRequestHandler):
    """GET / is the page. POST /score takes {"prompt", "response"} and gives the response's tokens and their figures."""

    q: QFunction
    page: bytes
    lock: threading.Lock
    timeout = 30  # seconds, of a request that does not come to its end

    def handle(self):
        with suppress(ConnectionError):  # who hangs up wants no answer
            super().handle()

    def do_GET(self):
        if not self._ours():
            return
        if self.path != "/":
            self._answer(404, {"error": "there is nothing here but /"})
            return
        self._send(200, "text/html; charset=utf-8", self.page)

    def do_POST(self):
        if not self._ours():
            return
        try:
            self._answer(200, self._scored())
        except UserError as e:
            self._answer(400, {"error": first_line(e)})

    def _scored(self) -> dict:
        require(self.path == "/score", "there is nothing here but /score")
        kind, length = self.headers.get("Content-Type", ""), self.headers.get("Content-Length", "")
        require(kind.split(";")[0] == "application/json", "want JSON, with Content-Type: application/json")
        short = length.isdecimal() and len(length) < 10
        require(short and int(length) <= MOST, f"want at most {MOST} bytes, and their Content-Length")
        try:
            asked = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as e:
            raise UserError(f"this is no JSON: {first_line(e)}") from e
        texts = [asked.get(name) for name in ("prompt", "response")] if isinstance(asked, dict) else []
        require(len(texts) == 2 and all(isinstance(text, str) for text in texts), "want prompt and response, two texts")
        prompt, response = (clean(text, name) for text, name in zip(texts, ("prompt", "response"), strict=True))
        with self.lock:
            return response_of(self.q, prompt, "yours", response)

    def _ours(self) -> bool:
        """Whether the request is for this machine by its own name: a page elsewhere cannot lead a browser here."""
        ours = self.headers.get("Host", "").rsplit(":", 1)[0] in HERE
        if not ours:
            self._answer(403, {"error": "ask for 127.0.0.1"})
        return ours

    def _answer(self, status: int, answer: dict):
        self._send(status, "application/json", json.dumps(answer, allow_nan=False).encode())

    def _send(self, status: int, kind: str, body: bytes):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """What is typed there is nobody's business."""


def server_of(q: QFunction, page: str, port: int) -> ThreadingHTTPServer:
    """A server of the page at a port of 127.0.0.1, any free one for 0. UserError if the port is taken."""
    handler = type("Bound", (Handler,), {"q": q, "page": page.encode(), "lock": threading.Lock()})
    try:
        return ThreadingHTTPServer((HERE[0], port), handler)
    except OSError as e:
        raise UserError(f"cannot serve at port {port}: {e.strerror}; give another --port") from e


def serve(q: QFunction, page: str, port: int, console: Console):
    """Serve until the command is stopped."""
    with server_of(q, page, port) as server:
        console.say(f"the page is at http://{HERE[0]}:{server.server_port}; stop with Ctrl-C")
        try:
            server.serve_forever()
        except Stopped as e:
            e.args = ("stopped",)
            raise
