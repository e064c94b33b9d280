"""A hub on 127.0.0.1 that speaks what huggingface_hub speaks, with switches for faults.

    with Loopback() as hub:
        hub.fail("commit", status=500)      # or cut=True, delay=2.0, times=1

Routes by name: info, create, branch, validate, preupload, batch, upload, commit, resolve, tree,
whoami. Each is one function of `routes`; a request that none knows is noted in `unknown`.
"""

import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.repositories import Repository
from tests.hub.routes import ROUTES, Request, Response, respond

TOKEN = "hf_" + "loopbackToken" * 3


@dataclass
class Fault:
    """What a route does instead of its work.

    Attributes:
        status: answered, with `message`; None: none.
        message: what the hub says of it.
        delay: seconds before anything else.
        cut: close the connection; of an upload, after half of the body was read.
        times: how often; None: always.
    """

    status: int | None = None
    message: str = "made to fail"
    delay: float = 0.0
    cut: bool = False
    times: int | None = None


@dataclass
class Loopback:
    """The hub.

    Attributes:
        repositories: by name.
        uploaded: large files by sha256, whether or not a commit names them.
        log: (route, method, path, headers) of each request, in order.
        unknown: requests without a route.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    uploaded: dict[str, bytes] = field(default_factory=dict)
    log: list[tuple[str, str, str, dict[str, str]]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    token: str = TOKEN
    faults: dict[str, Fault] = field(default_factory=dict)

    def __enter__(self) -> "Loopback":
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def fail(self, route: str, **fault: Any) -> None:
        """Make a route fail, see `Fault`."""
        self.faults[route] = Fault(**fault)

    def heal(self) -> None:
        """Make all routes work, and forget the log."""
        self.faults.clear()
        self.log.clear()

    def calls(self, *routes: str) -> list[str]:
        """Return the routes that were called, those of `routes` alone if given."""
        return [name for name, *_ in self.log if not routes or name in routes]

    def fault_of(self, route: str) -> Fault | None:
        """Return the fault that this request meets."""
        fault = self.faults.get(route)
        if fault is None or fault.times == 0:
            return None
        if fault.times is not None:
            fault.times -= 1
        return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Loopback

    def log_message(self, *args: Any) -> None:
        """Stay quiet."""

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        length = int(self.headers.get("Content-Length") or 0)
        name, match = next(
            ((n, m) for n, pattern in ROUTES.items() if (m := pattern.fullmatch(path))),
            ("unknown", None),
        )
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.hub.log.append((name, self.command, path, headers))
        fault = self.hub.fault_of(name)
        if fault is not None:
            time.sleep(fault.delay)
            if fault.cut:
                self.rfile.read(1 if "transfer-encoding" in headers else length // 2)
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
        body = self._chunks() if "transfer-encoding" in headers else self.rfile.read(length)
        if fault is not None and fault.status is not None:
            self._send(Response(status=fault.status, said=fault.message))
            return
        if match is None:
            self.hub.unknown.append(f"{self.command} {path}")
            self._send(Response(status=404, said="no route", code="EntryNotFound"))
            return
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        request = Request(
            self.command, match.groupdict(), query, body, headers.get("authorization", "")
        )
        self._send(respond(self.hub, name, request))

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, response: Response) -> None:
        body = response.body()
        try:
            self.send_response(response.status)
            for key, value in {**response.headers(), "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
        except OSError:
            pass  # the client went away first

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer
