"""Asking a running server from the command line, with answers as if they were found here."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from mmrag.content import ImageSource, load_image
from mmrag.errors import EndpointError
from mmrag.server.address import Address, find_address

if TYPE_CHECKING:
    from mmrag.answering.context import Source
    from mmrag.answering.response import CitedResponse, CitedStreamingResponse
    from mmrag.ingest.progress import IngestReport, Progress
    from mmrag.nodes import Hit
    from mmrag.queries import MultimodalQuery
    from mmrag.store.entries import FileEntry
    from mmrag.store.snapshots import Snapshot

_PATIENCE = httpx.Timeout(120.0, connect=2.0)  # seconds


def find_server(location: str) -> ServerClient | None:
    """The server that holds a collection's folder, if one answers.

    Its key is taken from MMRAG_API_KEY.
    """
    address = find_address(location)
    if address is None:
        return None
    try:
        # The file of a server that was killed stays behind.
        httpx.get(f"{address.url}/health", timeout=2.0).raise_for_status()
    except httpx.HTTPError:
        return None
    return ServerClient(address, os.environ.get("MMRAG_API_KEY"))


class ServerClient:
    """One collection of a running ``mmrag serve``."""

    def __init__(self, address: Address, key: str | None = None) -> None:
        self.address = address
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=address.url, headers=headers, timeout=_PATIENCE)

    def search(self, query: MultimodalQuery, *, explain: bool = False) -> list[Hit]:
        """The pages nearest to a query. Raises EndpointError if the server refuses."""
        found = self._json("POST", "/api/search", {**self._body(query), "explain": explain})
        return [_hit(row) for row in found["hits"]]

    def files(self) -> tuple[str, list[FileEntry]]:
        """The embedder's name and the indexed files. Raises EndpointError as ``search``."""
        from mmrag.store.entries import FileEntry

        found = self._json("GET", "/api/files")
        return found["embedder"], [FileEntry.from_payload(row) for row in found["files"]]

    def remove(self, patterns: Sequence[str]) -> list[str]:
        """Forget files by path, name or glob; returns their paths. Raises as ``search``."""
        from mmrag.store.matching import matching_paths

        ids = {entry.file: entry.sha256 for entry in self.files()[1]}
        paths = matching_paths(patterns, list(ids))
        for path in paths:
            self._json("DELETE", f"/api/files/{ids[path]}")
        return paths

    def index(
        self,
        paths: Sequence[str | Path],
        progress: Callable[[Progress | None], None],
        *,
        prune: bool = False,
        metadata: Mapping[str, Any] | None = None,
    ) -> IngestReport:
        """Index files of this machine, and URLs.

        An exception of ``progress``, or Ctrl-C, ends the run at the next batch.

        progress: called about once a second, with None while other files are being indexed.

        Raises:
            EndpointError: If the server refuses, or stops.
        """
        from mmrag.ingest.progress import Progress
        from mmrag.reading.files import is_url
        from mmrag.server.indexing import report_from

        body = {
            # The server has another working directory.
            "paths": [str(path if is_url(path) else Path(path).absolute()) for path in paths],
            "secret": self.address.secret,
            "prune": prune,
            "metadata": metadata,
            "collection": self.address.collection,
        }
        for name, data in self._events("/api/index", body):
            if name == "report":
                return report_from(data)
            if name != "started":
                progress(Progress(**data) if name == "progress" else None)
        raise EndpointError(f"{self.address.url} stopped before the files were indexed.")

    def create_snapshot(self, name: str | None) -> Snapshot:
        """Keep a version of the collection. Raises EndpointError as ``search``."""
        from mmrag.store.snapshots import Snapshot

        body = {"name": name, "collection": self.address.collection}
        return Snapshot(**self._json("POST", "/api/snapshots", body))

    def ask(
        self, query: MultimodalQuery, history: Sequence[tuple[str, str]] = ()
    ) -> tuple[str, CitedStreamingResponse]:
        """The question as it was searched, and the answer as a stream; as ``Library.ask``."""
        from mmrag.answering.response import CitedStreamingResponse

        turns = [{"role": role, "content": text} for role, text in history]
        events = self._events("/api/ask", {**self._body(query), "history": turns})
        # The sources come first, so that they can be shown while the answer is written.
        name, begun = next(events)
        assert name == "sources"
        final: dict[str, Any] = {}

        def tokens() -> Generator[str, None, None]:
            for name, data in events:
                if name == "token":
                    yield data["text"]
                else:
                    final.update(data)

        sources = [_source(row) for row in begun["sources"]]
        stream = CitedStreamingResponse(
            response_gen=tokens(),
            source_nodes=[source.node for source in sources],
            sources=sources,
            # A stream that its reader left early has no final event; its text stays unchecked.
            finish=lambda text: _response(final or {"answer": text, "sources": []}),
        )
        return begun["question"], stream

    def _body(self, query: MultimodalQuery) -> dict[str, Any]:
        where = query.where
        return {
            "query": query.query_str,
            "collection": self.address.collection,
            "image": None if query.image is None else _encoded(query.image),
            "top_k": query.top_k or 8,
            "files": list(where.files) if where else [],
            "pages": where.pages if where else None,
            "kinds": list(where.kinds) if where else [],
            "filters": where.filters.model_dump(mode="json") if where and where.filters else None,
        }

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        with self._answer(method, path, body) as reply:
            reply.read()
            return reply.json()

    def _events(self, path: str, body: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        with self._answer("POST", path, body) as reply:
            name = ""
            for line in reply.iter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    data = json.loads(line.removeprefix("data: "))
                    if name == "error":
                        raise EndpointError(f"The server: {data['error']['message']}")
                    yield name, data

    @contextmanager
    def _answer(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> Iterator[httpx.Response]:
        # Where there is no body, the collection is a part of the address.
        params = {"collection": self.address.collection} if body is None else None
        try:
            with self._http.stream(method, path, json=body, params=params) as reply:
                if reply.is_error:
                    reply.read()
                    raise EndpointError(f"{self.address.url}: {_error_message(reply)}")
                yield reply
        except httpx.HTTPError as error:
            raise EndpointError(f"{self.address.url} broke off: {error}") from error


def _error_message(reply: httpx.Response) -> str:
    if reply.status_code == 401:
        return "the server requires an API key; set MMRAG_API_KEY."
    try:
        return str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered with status {reply.status_code}."


def _encoded(image: ImageSource) -> str:
    import io

    stream = io.BytesIO()
    load_image(image).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode("ascii")


def _hit(row: Mapping[str, Any]) -> Hit:
    from llama_index.core.schema import TextNode

    from mmrag.nodes import Hit

    names = ("file", "page", "label", "page_name", "kind")
    metadata = {name: row[name] for name in names if row.get(name) is not None}
    metadata |= {**row.get("metadata", {}), "sha256": row["file_id"]}
    node = TextNode(text=row["text"], metadata=metadata)
    box = tuple(row["boxes"][0]) if row["boxes"] else None
    how = row.get("explanation") or {}
    return Hit(
        node=node,
        score=row.get("score"),
        ranks=row.get("ranks", {}),
        box=box,
        description=row.get("description"),
        described_by=row.get("described_by"),
        explanation=how.get("rankings"),
        evidence=how.get("evidence", []),
    )


def _source(row: Mapping[str, Any]) -> Source:
    from mmrag.answering.context import Source

    hit = _hit(row)
    # The server is on this machine, so an image file of the user can be shown from its path.
    is_image = row["kind"] == "picture" and _is_original(row["file"], row["file_id"])
    return Source(
        n=row["n"],
        file=row["file"],
        page=row["page"],
        node=hit,
        text=row["text"],
        image=Path(row["file"]) if is_image else None,
        quote=row["quote"],
        # Without a quote the boxes show what was found, which the hit holds already.
        boxes=tuple(tuple(box) for box in row["boxes"]) if row["quote"] else (),
        cited=row["cited"],
    )


def _is_original(path: str, file_id: str) -> bool:
    from mmrag.reading import file_sha256

    return Path(path).is_file() and file_sha256(path) == file_id


def _response(answer: Mapping[str, Any]) -> CitedResponse:
    from mmrag.answering.response import CitedResponse

    sources = [_source(row) for row in answer["sources"]]
    return CitedResponse(
        response=answer["answer"],
        source_nodes=[source.node for source in sources],
        sources=sources,
        found=answer.get("found", True),
        problems=list(answer.get("problems", ())),
        notes=list(answer.get("notes", ())),
    )
