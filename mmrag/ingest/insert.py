"""An application's own nodes and documents into the collection."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby

from llama_index.core import Settings
from llama_index.core.ingestion import run_transformations
from llama_index.core.schema import BaseNode, Document, MetadataMode, NodeRelationship

from mmrag.embedders.base import Embedder
from mmrag.embedders.late import LateInteraction
from mmrag.errors import ContentError
from mmrag.ingest.late import encode_tokens, token_content
from mmrag.ingest.writer import encode_each, views_of
from mmrag.nodes import image_source, node_text
from mmrag.store.collection import Collection
from mmrag.store.engine import TOKENS
from mmrag.store.inserted import Insertion, content_hash
from mmrag.store.terms import DocumentTerms, NodeTerms

_BATCH_NODES = 64
_MANY = 1000  # nodes after which the search indexes are built; fewer are searched without


def insert_nodes(
    nodes: Sequence[BaseNode],
    collection: Collection,
    embedder: Embedder,
    hashes: Mapping[str, str] | None = None,
    late: LateInteraction | None = None,
) -> None:
    """Embed and store nodes; those that are stored already, with the same content, are skipped.

    Args:
        hashes: document id to the hash of the document, of those whose nodes are all given: the
            other nodes of these are removed.
        late: how the tokens of nodes are made, of a collection that keeps them.

    Raises:
        ContentError: For nodes that cannot be embedded or stored; it names them. All others are
            stored.
    """
    ready, errors = _prepared(nodes)
    known = collection.inserted.entries(dict.fromkeys(each.doc_id for each in ready))
    files = {each.doc_id: each.file for each in reversed(ready)}
    # A document keeps the name under which it is found.
    files |= {doc_id: entry.file for doc_id, entry in known.items()}
    stored = collection.inserted.hashes([each.node.node_id for each in ready])
    changed = [each for each in ready if stored.get(each.node.node_id) != each.hash]
    terms = _terms(changed, files, collection.settings.language)
    for start in range(0, len(changed), _BATCH_NODES):
        batch = changed[start : start + _BATCH_NODES]
        vectors, failed = _embedded(batch, collection, embedder, late)
        errors |= failed
        kept = [row for row, each in enumerate(batch) if each.node.node_id not in failed]
        collection.insert(
            [batch[row] for row in kept],
            [vectors[row] for row in kept],
            [terms[start + row] for row in kept],
            files,
        )
    of_document: dict[str, list[str]] = defaultdict(list)
    for each in changed:
        if each.node.node_id in errors:
            of_document[each.doc_id].append(errors[each.node.node_id])
    # Not of documents with errors: their earlier version stays whole.
    for doc_id in set(hashes or {}) - set(of_document):
        keep = [each.node.node_id for each in ready if each.doc_id == doc_id]
        collection.inserted.remove(doc_id, keep=keep)
    collection.inserted.finish(files, of_document, hashes or {})
    if len(changed) >= _MANY:
        collection.optimize()
    if errors:
        told = "; ".join([*errors.values()][:5])
        raise ContentError(f"{len(errors)} of {len(nodes)} nodes were not inserted: {told}")


def insert_document(
    document: Document,
    collection: Collection,
    embedder: Embedder,
    late: LateInteraction | None = None,
) -> bool:
    """Store a document in place of its earlier version, if there is one.

    Its text is split by ``Settings.transformations``; a document with an image is one node.

    Returns:
        False if it is stored already, with the same content.

    Raises:
        ContentError: As ``insert_nodes``; the earlier version stays.
    """
    whole = content_hash(document)
    entry = collection.inserted.entries([document.node_id]).get(document.node_id)
    stored = entry is not None and entry.complete and entry.sha256 == whole
    if entry is not None and stored and collection.inserted.count(entry.doc_id) == entry.nodes:
        return False
    nodes: Sequence[BaseNode] = [document]
    if image_source(document) is None:
        nodes = run_transformations([document], Settings.transformations)
    for node in nodes:
        # A splitter of your own may leave it out.
        if node is not document and node.ref_doc_id is None:
            node.relationships[NodeRelationship.SOURCE] = document.as_related_node_info()
    insert_nodes(nodes, collection, embedder, {document.node_id: whole}, late)
    return True


def _prepared(nodes: Sequence[BaseNode]) -> tuple[list[Insertion], dict[str, str]]:
    """What is to be stored, each id once, and what is wrong with the others by node id."""
    ready: dict[str, Insertion] = {}
    errors: dict[str, str] = {}
    for node in nodes:
        try:
            ready[node.node_id] = Insertion.of(node)
        except ContentError as error:
            errors[node.node_id] = str(error)
    return list(ready.values()), errors


def _terms(nodes: Sequence[Insertion], files: Mapping[str, str], language: str) -> list[NodeTerms]:
    """What BM25 finds each node by, made document by document."""
    made: list[NodeTerms] = []
    for doc_id, of_document in groupby(nodes, key=lambda each: each.doc_id):
        texts = [node_text(each.node) for each in of_document]
        document = DocumentTerms(files[doc_id], language)
        # Twice over the texts: the language is told from all of them before any is made into terms.
        for text in texts:
            document.read(text)
        made += [document.of(text) for text in texts]
    return made


def _embedded(
    batch: Sequence[Insertion],
    collection: Collection,
    embedder: Embedder,
    late: LateInteraction | None,
) -> tuple[list[dict[str, object]], dict[str, str]]:
    """The vectors of each node by view, and what is wrong by node id."""
    sides = [(_text(each.node), image_source(each.node)) for each in batch]
    views = [views_of(*each, collection.settings.views, embedder) for each in sides]
    keys = [(row, view) for row, of_node in enumerate(views) for view in of_node]
    contents = [views[row][view] for row, view in keys]
    vectors: list[dict[str, object]] = [{} for _ in batch]
    failed: dict[str, str] = {}
    results = encode_each(embedder, contents, collection.settings.dim)
    for (row, view), result in zip(keys, results, strict=True):
        if isinstance(result, ContentError):
            node_id = batch[row].node.node_id
            failed[node_id] = f"node {node_id}: its {view} view has no vector: {result}"
        else:
            vectors[row][view] = result
    found = encode_tokens(late, [token_content(*each, late) for each in sides]) if late else []
    for row, tokens in enumerate(found):
        if isinstance(tokens, ContentError):
            node_id = batch[row].node.node_id
            failed[node_id] = f"node {node_id}: its {TOKENS} view has no vector: {tokens}"
        else:
            vectors[row] |= tokens
    return vectors, failed


def _text(node: BaseNode) -> str:
    """What is embedded of a node's text: with its metadata, as LlamaIndex does."""
    return node.get_content(MetadataMode.EMBED).strip() if node_text(node).strip() else ""
