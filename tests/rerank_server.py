"""A ``/rerank`` endpoint in the form of Jina or of Cohere, for tests."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FIELDS = {
    "jina": {"model", "query", "documents", "top_n", "return_documents"},
    "cohere": {"model", "query", "documents", "top_n", "max_tokens_per_doc"},
}


class RerankServer:
    """Gives each document the score that ``relevance(query, document)`` says.

    form: ``jina`` (at /v1/rerank, repeats the documents) or ``cohere`` (at /v2/rerank, does not).
        Both refuse what their form has no field for, and list the best first.
    key: what requests must carry as a bearer token; None: nothing.
    script: statuses, bodies, or functions of the answer, used up one a request.
    refuse: a document that is answered with 422.
    """

    def __init__(self, relevance, form="jina", key=None, script=(), refuse=lambda document: False):
        self.relevance, self.form, self.key = relevance, form, key
        self.script, self.refuse = list(script), refuse
        self.requests = []
        self.released = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (_Handler,), {"owner": self}))
        self._http.daemon_threads = True
        version = "v1" if form == "jina" else "v2"
        self.path = f"/{version}/rerank"
        self.url = f"http://127.0.0.1:{self._http.server_port}{self.path}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.released.set()
        self._http.shutdown()
        self._http.server_close()

    def reply(self, body, sent_key):
        """Status and JSON."""
        if self.key is not None and sent_key != f"Bearer {self.key}":
            return 401, {"detail": f"no access with {sent_key}"}
        if set(body) - FIELDS[self.form] or not {"model", "query", "documents"} <= set(body):
            return 422, {"message": f"fields {sorted(body)}"}
        documents = body["documents"]
        if any(self.refuse(document) for document in documents):
            return 422, {"message": "a document is too long"}
        scores = [self.relevance(body["query"], document) for document in documents]
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.get("top_n")]
        results = [{"index": index, "relevance_score": scores[index]} for index in order]
        if self.form == "cohere":
            return 200, {"id": "1", "results": results, "meta": {"api_version": {"version": "2"}}}
        for row in results:
            row["document"] = {"text": documents[row["index"]]}
        return 200, {"model": body["model"], "usage": {"total_tokens": 9}, "results": results}


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        owner = self.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        owner.requests.append(body)
        status, answer = owner.reply(body, self.headers.get("Authorization"))
        step = owner.script.pop(0) if owner.script else None
        if step == "hang":
            owner.released.wait(10)
        elif isinstance(step, int):
            status, answer = step, {"message": "not now"}
        elif isinstance(step, bytes):
            answer = step
        elif step is not None:
            answer = step(answer)
        if self.path != owner.path:
            status, answer = 404, {"message": "no such path"}
        raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        time.sleep(0.005)
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)
