"""Answers browsers: pages, and their news as server-sent events. Reads only; who asks from elsewhere shows a token."""

from __future__ import annotations

import hmac
import json
import threading
import time
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

from ddil_dist.dashboard.pages import run_page, runs_list, runs_page, script, style_sheet
from ddil_dist.dashboard.panels import now_panel
from ddil_dist.dashboard.watch import Runs
from ddil_dist.errors import EnvironmentFailure

COOKIE: Final = "ddil_dashboard"
LOOPBACK: Final = ("127.0.0.1", "localhost")
MOST_STREAMS: Final = 32
CLIENT_TIMEOUT_S: Final = 20.0
"""For a client to send its request, or to take what it is sent."""
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HTML: Final = "text/html; charset=utf-8"


class DashboardServer(ThreadingHTTPServer):
    """Serves until `shutdown`. token: what clients must show, by `?token=` once and by a cookie then; None: nothing.

    Without one it answers requests only that name the loopback as their host, so that no page from elsewhere can ask
    through somebody's browser. Raises EnvironmentFailure where the address cannot be had.
    """

    daemon_threads = True

    def __init__(self, host: str, port: int, runs: Runs, *, token: str | None) -> None:
        self.runs = runs
        self.token = token
        self.streams = threading.Semaphore(MOST_STREAMS)
        self.closing = threading.Event()
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise EnvironmentFailure(
                f"--port: cannot listen on {host}:{port}: {error.strerror}; give another, or 0 for any free one"
            ) from None

    def shutdown(self) -> None:
        self.closing.set()
        super().shutdown()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away is no news."""


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: DashboardServer
    timeout = CLIENT_TIMEOUT_S
    server_version, sys_version = "ddil_dist", ""

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        if not self._is_welcome(asked.query):
            return
        parts = [unquote(part) for part in asked.path.split("/") if part]
        runs = self.server.runs
        match parts:
            case []:
                self._answer(200, runs_page(runs), HTML)
            case ["events"]:
                self._stream(None)
            case ["dashboard.css"]:
                self._answer(200, style_sheet(), "text/css; charset=utf-8")
            case ["dashboard.js"]:
                self._answer(200, script(), "text/javascript; charset=utf-8")
            case ["runs", name] if (watch := runs.get(name)) is not None:
                self._answer(200, run_page(runs, watch), HTML)
            case ["runs", name, "events"] if runs.get(name) is not None:
                self._stream(name)
            case _:
                self._answer(404, "there is no such page; / has all runs\n")

    def _is_welcome(self, query: str) -> bool:
        """Whether the request may be answered; where not, it was."""
        token = self.server.token
        if token is None:
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
            if host in LOOPBACK:
                return True
            self._answer(403, "this dashboard is for its own machine: ask for it as localhost\n")
            return False
        shown = parse_qs(query).get("token", [""])[0]
        if shown and hmac.compare_digest(shown.encode(), token.encode()):
            self.send_response(303)
            self.send_header("Location", urlsplit(self.path).path)
            self.send_header("Set-Cookie", f"{COOKIE}={token}; HttpOnly; SameSite=Strict; Path=/")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return False
        if hmac.compare_digest(self._cookie().encode(), token.encode()):
            return True
        self._answer(401, "this dashboard wants its token: add ?token=... to the address\n")
        return False

    def _cookie(self) -> str:
        try:
            found = SimpleCookie(self.headers.get("Cookie", "")).get(COOKIE)
        except CookieError:
            return ""
        return "" if found is None else found.value

    def _answer(self, status: int, text: str, kind: str = "text/plain; charset=utf-8") -> None:
        body = text.encode()
        self.send_response(status)
        self._say(kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _say(self, kind: str) -> None:
        for name, value in (
            ("Content-Type", kind),
            ("Content-Security-Policy", POLICY),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)

    def _stream(self, name: str | None) -> None:
        """What changes, as it does: "now", and "report" where that of the run was drawn anew."""
        if not self.server.streams.acquire(blocking=False):
            self._answer(503, f"{MOST_STREAMS} pages are open; close one\n")
            return
        try:
            self.send_response(200)
            self._say("text/event-stream")
            self.end_headers()
            self._send_news(name)
        finally:
            self.server.streams.release()

    def _send_news(self, name: str | None) -> None:
        runs, told, version = self.server.runs, "", None
        while not self.server.closing.is_set():
            watch = None if name is None else runs.get(name)
            if name is not None and watch is None:
                return
            text = runs_list(runs) if watch is None else now_panel(watch.now())
            if text != told:
                told = text
                self._event("now", text)
            else:
                self.wfile.write(b": still here\n\n")  # so that a browser that has gone is noticed
            if watch is not None:
                watch.sections()
                if version is not None and watch.version != version:
                    self._event("report", str(watch.version))
                version = watch.version
            self.wfile.flush()
            self.server.closing.wait(runs.interval_s)

    def _event(self, kind: str, text: str) -> None:
        self.wfile.write(f"event: {kind}\ndata: {json.dumps(text)}\n\n".encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not news, and may hold the token."""


def serve(server: DashboardServer) -> None:
    """Answer until Ctrl-C."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            time.sleep(0.2)
    except KeyboardInterrupt:
        pass
    finally:
        server.shutdown()
        server.server_close()
        server.runs.close()
