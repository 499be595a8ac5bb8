"""A web server on loopback for tests: what it has, what it was asked, and how it misbehaves."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WebServer:
    """Serves ``pages``: path to (body, headers), or to a function that takes the request.

    Use as a context manager. ``asked`` holds (path, headers) of each request, ``url`` its address.
    """

    def __init__(self):
        self.pages = {}
        self.asked = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append((self.path, dict(self.headers)))
                page = outer.pages.get(self.path)
                if page is None:
                    self.send_error(404)
                elif callable(page):
                    page(self)
                else:
                    outer.answer(self, *page)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @staticmethod
    def answer(request, body, headers):
        """Status 304 if the request names the page's ETag or date; else the page."""
        known = {"If-None-Match": "ETag", "If-Modified-Since": "Last-Modified"}
        same = any(
            request.headers.get(ask) == headers[said]
            for ask, said in known.items()
            if said in headers
        )
        request.send_response(304 if same else 200)
        for key, value in headers.items():
            request.send_header(key, value)
        if not same:
            request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if not same:
            request.wfile.write(body)

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def redirect(target):
    """A page that leads elsewhere."""

    def answer(request):
        request.send_response(302)
        request.send_header("Location", target)
        request.end_headers()

    return answer


def broken(body, size):
    """A page that announces ``size`` bytes and ends after ``body``."""

    def answer(request):
        request.send_response(200)
        request.send_header("Content-Type", "text/plain")
        if size is not None:
            request.send_header("Content-Length", str(size))
        request.end_headers()
        request.wfile.write(body)

    return answer


def silent(seconds):
    """A page that says nothing for a while."""
    return lambda request: time.sleep(seconds)
