"""Tests of UniversalEmbedding as LlamaIndex uses it, with a stand-in embedder."""

import asyncio
import base64
import copy
import hashlib
import io
import json
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from embedding_server import DIM, Server, vector_of
from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.embeddings.multi_modal_base import MultiModalEmbedding
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.rate_limiter import TokenBucketRateLimiter
from llama_index.core.schema import (
    Document,
    ImageDocument,
    ImageNode,
    IndexNode,
    MediaResource,
    MetadataMode,
    Node,
    QueryBundle,
    TextNode,
)
from llama_index.core.storage.kvstore import SimpleKVStore
from llama_index.vector_stores.qdrant import QdrantVectorStore
from PIL import Image
from qdrant_client import QdrantClient

from mmrag.content import Content, as_content, load_image
from mmrag.embedders.base import truncate_normalise
from mmrag.embedding import UniversalEmbedding
from mmrag.errors import ConfigError, ContentError, ModelError
from mmrag.instructions import TASKS, resolve
from mmrag.nodes import node_content
from mmrag.queries import MultimodalQuery


class Stub:
    """An Embedder whose vectors tell text, pixels and instruction apart; it records its calls."""

    name, family, dim, fingerprint = "stub", "stub", 16, "stub-1"
    modalities = frozenset({"text", "image", "fused"})

    def __init__(self):
        self.calls = []
        self.delay = 0.0
        self.threads = set()

    def encode(self, contents, instruction=None, dim=None, progress=False):
        self.threads.add(threading.get_ident())
        time.sleep(self.delay)
        contents = [as_content(content) for content in contents]
        self.calls.append([(content, resolve(instruction)) for content in contents])
        rows = [self.vector(content, resolve(instruction)) for content in contents]
        return truncate_normalise(np.array(rows).reshape(-1, self.dim), dim or self.dim)

    def vector(self, content, instruction):
        seen = [content.text, instruction]
        seen += [
            hashlib.sha256(load_image(image).tobytes()).hexdigest() for image in content.images
        ]
        seed = int(hashlib.sha256(repr(seen).encode()).hexdigest()[:8], 16)
        return np.random.default_rng(seed).normal(size=self.dim)

    @property
    def last(self):
        return self.calls[-1]


@pytest.fixture
def stub():
    return Stub()


@pytest.fixture
def model(stub):
    return UniversalEmbedding(embedder=stub)


@pytest.fixture
def red(tmp_path):
    path = tmp_path / "red.png"
    Image.new("RGB", (4, 4), "red").save(path)
    return str(path)


@pytest.fixture
def blue(tmp_path):
    path = tmp_path / "blue.png"
    Image.new("RGB", (4, 4), "blue").save(path)
    return str(path)


def direct(content, instruction=None):
    return Stub().encode([content], instruction)[0].tolist()


# --- queries and documents --------------------------------------------------------------------


def test_is_llamaindex_multi_modal_embedding(model):
    assert isinstance(model, MultiModalEmbedding)
    assert model.class_name() == "UniversalEmbedding"
    assert model.model_name == "stub"


def test_queries_carry_the_instruction_and_documents_none(model, stub):
    assert model.get_query_embedding("why?") == direct("why?", "page_for_question")
    assert model.get_text_embedding("why?") == direct("why?")
    assert model.get_query_embedding("why?") != model.get_text_embedding("why?")
    assert stub.calls[0][0][1] == TASKS["page_for_question"]


@pytest.mark.parametrize("instruction", ["image_for_caption", "Find the right plan.", None])
def test_query_instruction_is_a_task_a_sentence_or_none(stub, instruction):
    model = UniversalEmbedding(embedder=stub, query_instruction=instruction)
    assert model.get_query_embedding("q") == direct("q", instruction)


def test_every_kind_of_image_is_embedded(model, red):
    raw = Path(red).read_bytes()
    truth = direct(Content(image=red))
    for image in (red, io.BytesIO(raw), raw, Image.open(red), np.asarray(Image.open(red))):
        assert model.get_image_embedding(image) == truth
    url = "data:image/png;base64," + base64.b64encode(raw).decode()
    assert model.get_image_embedding(url) == truth


def test_a_path_is_an_image_where_an_image_is_asked_for_and_else_a_text(model, red):
    assert model.get_text_embedding(red) == direct(red)
    assert model.get_image_embedding(red) == direct(Content(image=red))


def test_image_and_text_together(model, red):
    assert model.get_fused_embedding("a", red) == direct(Content("a", red))
    assert model.get_query_image_embedding(red) == direct(Content(image=red), "page_for_question")
    assert model.get_query_image_embedding(red, "a") == direct(
        Content("a", red), "page_for_question"
    )


@pytest.mark.parametrize(
    ("text", "has_image", "modality"),
    [("a", False, "text"), ("a", True, "fused"), ("", True, "image")],
)
def test_query_bundle_is_embedded_by_what_it_holds(model, stub, red, text, has_image, modality):
    bundle = QueryBundle(query_str=text, image_path=red if has_image else None)
    model.get_query_embedding(bundle)
    ((content, instruction),) = stub.last
    assert content.modality == modality
    assert instruction == TASKS["page_for_question"]


def test_the_image_of_a_multimodal_query_is_embedded(model, stub, red):
    image = np.zeros((4, 4, 3), np.uint8)
    model.get_query_embedding(MultimodalQuery("what?", image=image))
    ((content, _),) = stub.last
    assert content.text == "what?"
    assert content.images[0] is image
    model.get_query_embedding(MultimodalQuery("", image=image, image_path=red))
    ((content, _),) = stub.last
    assert content.modality == "image"
    assert content.images[0] is image


def test_dim_keeps_leading_dimensions(stub):
    short = UniversalEmbedding(embedder=stub, dim=4).get_text_embedding("a")
    full = np.array(direct("a"))[:4]
    np.testing.assert_allclose(short, full / np.linalg.norm(full), atol=1e-6)


def test_aggregated_queries_use_the_instruction(model):
    mean = np.mean([direct(q, "page_for_question") for q in "ab"], axis=0)
    np.testing.assert_allclose(model.get_agg_embedding_from_queries(["a", "b"]), mean, atol=1e-7)


# --- batches ----------------------------------------------------------------------------------


def test_many_texts_and_images_are_one_call(model, stub, red, blue):
    assert model.get_text_embedding_batch(["a", "b", "c"]) == [direct(t) for t in "abc"]
    assert model.get_image_embedding_batch([red, blue]) == [
        direct(Content(image=red)),
        direct(Content(image=blue)),
    ]
    model([TextNode(text="a"), ImageNode(image_path=red), TextNode(text="b")])
    assert [len(call) for call in stub.calls] == [3, 2, 3]


def test_batch_size_bounds_a_call(stub, red):
    model = UniversalEmbedding(embedder=stub, embed_batch_size=2)
    model.get_text_embedding_batch(list("abcde"))
    model.get_image_embedding_batch([red] * 3)
    model([TextNode(text=t) for t in "abcde"])
    assert [len(call) for call in stub.calls] == [2, 2, 1, 2, 1, 2, 2, 1]


def test_nothing_gives_nothing(model, stub):
    assert model.get_text_embedding_batch([]) == []
    assert model.get_image_embedding_batch([]) == []
    assert model([]) == []
    assert stub.calls == []


def test_rate_limiter_is_asked_for_images_too(stub, red):
    class Counter(TokenBucketRateLimiter):
        count: int = 0

        def acquire(self, *args, **kwargs):
            self.count += 1

    limiter = Counter(requests_per_minute=1000)
    model = UniversalEmbedding(embedder=stub, rate_limiter=limiter, embed_batch_size=1)
    model.get_image_embedding_batch([red, red])
    model.get_query_embedding("q")
    model.get_text_embedding("t")
    assert limiter.count == 4


# --- nodes ------------------------------------------------------------------------------------


def node_with(text, image):
    return Node(
        text_resource=None if text is None else MediaResource(text=text),
        image_resource=None if image is None else MediaResource(path=image),
        metadata={"file": "a.pdf"},
    )


def test_text_nodes_are_embedded_with_their_metadata_as_llamaindex_does():
    node = TextNode(
        text="body", metadata={"section": "Costs", "sha": "1"}, excluded_embed_metadata_keys=["sha"]
    )
    content = node_content(node)
    assert content == Content(node.get_content(MetadataMode.EMBED))
    assert "Costs" in content.text
    assert "sha" not in content.text


def test_images_are_embedded_without_metadata(red):
    assert node_content(node_with("body", red)) == Content("body", red)
    assert node_content(node_with(None, red)) == Content(image=red)
    assert node_content(node_with("  \n", red)) == Content(image=red)
    assert node_content(node_with("body", None)).text == "file: a.pdf\n\nbody"


@pytest.mark.parametrize(
    ("view", "both", "bare", "text"),
    [
        ("fused", "fused", "image", "text"),
        ("image", "image", "image", "text"),
        ("text", "text", "image", "text"),
    ],
)
def test_view_is_chosen_for_nodes_that_have_both(stub, red, view, both, bare, text):
    model = UniversalEmbedding(embedder=stub, node_view=view)
    model([node_with("body", red), node_with(None, red), node_with("body", None)])
    assert [content.modality for content, _ in stub.last] == [both, bare, text]


def test_every_llamaindex_node_with_an_image_is_seen_as_one(model, stub, red):
    raw = Path(red).read_bytes()
    encoded = base64.b64encode(raw).decode()
    nodes = [
        ImageNode(image_path=red),
        ImageNode(image=encoded),
        ImageNode(image_resource=MediaResource(path=red)),
        Node(image_resource=MediaResource(data=raw)),
        node_with(None, red),
    ]
    model(nodes)
    truth = direct(Content(image=red))
    assert [node.embedding for node in nodes] == [truth] * len(nodes)


def test_documents_with_an_image_are_embedded_but_not_as_nodes(model, red):
    """As nodes of a pipeline they would be stored, and come back without their image."""
    raw = Path(red).read_bytes()
    documents = [
        ImageDocument(image_path=red),
        ImageDocument(image=raw),
        Document(image_resource=MediaResource(path=red)),
    ]
    for document in documents:
        with pytest.raises(ContentError, match=r"comes back .* without its image\. Give Node\("):
            model([document])
    truth = direct(Content(image=red))
    assert model.embed_contents([node_content(document) for document in documents]) == [truth] * 3


def test_caption_of_an_image_node_is_embedded_with_it(model, stub, red):
    model([ImageNode(text="a chart", image_path=red)])
    assert stub.last[0][0] == Content("a chart", red)


def test_other_nodes_are_texts(model, stub):
    model([IndexNode(text="a", index_id="1"), Document(text="b"), TextNode(text="")])
    assert [content for content, _ in stub.last] == [Content("a"), Content("b"), Content("")]


def test_node_with_sound_alone_is_refused(model):
    with pytest.raises(ContentError, match="neither text nor image"):
        model([Node(audio_resource=MediaResource(data=b"abc"))])


def test_node_whose_image_is_missing_names_the_file(model):
    with pytest.raises(ContentError, match=r"gone\.png"):
        model([Node(image_resource=MediaResource(path="gone.png"))])


def test_web_address_in_a_node_is_not_followed(model, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was tried"))
    for node in (
        ImageNode(image_url="http://x/a.png"),
        Node(image_resource=MediaResource(url="http://x/a.png")),
    ):
        with pytest.raises(ContentError, match="not followed"):
            model([node])


# --- async ------------------------------------------------------------------------------------


async def test_async_twins_agree_with_the_sync_methods(model, red):
    assert await model.aget_query_embedding("a") == model.get_query_embedding("a")
    assert await model.aget_text_embedding("a") == model.get_text_embedding("a")
    assert await model.aget_image_embedding(red) == model.get_image_embedding(red)
    assert await model.aget_fused_embedding("a", red) == model.get_fused_embedding("a", red)
    assert await model.aget_query_image_embedding(red) == model.get_query_image_embedding(red)
    assert await model.aget_text_embedding_batch(["a", "b"]) == [direct("a"), direct("b")]
    assert await model.aget_image_embedding_batch([red]) == [direct(Content(image=red))]
    bundle = QueryBundle("a", image_path=red)
    assert await model.aget_query_embedding(bundle) == model.get_query_embedding(bundle)
    (node,) = await model.acall([TextNode(text="a")])
    assert node.embedding == direct("a")


async def test_async_methods_leave_the_loop_free(model, stub, red):
    stub.delay = 0.2
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.create_task(tick())
    for call in (
        model.aget_query_embedding("a"),
        model.aget_text_embedding("a"),
        model.aget_text_embedding_batch(["a"]),
        model.aget_image_embedding(red),
        model.aget_image_embedding_batch([red]),
        model.acall([TextNode(text="a")]),
    ):
        ticks = 0
        await call
        assert ticks > 3
    ticking.cancel()
    assert threading.get_ident() not in stub.threads


# --- events -----------------------------------------------------------------------------------


class Events(BaseEventHandler):
    seen: list

    @classmethod
    def class_name(cls):
        return "Events"

    def handle(self, event, **kwargs):
        self.seen.append(event)


@pytest.fixture
def events():
    handler = Events(seen=[])
    dispatcher = get_dispatcher()
    dispatcher.add_event_handler(handler)
    yield handler.seen
    dispatcher.event_handlers.remove(handler)


def embedding_events(events):
    return [event for event in events if event.class_name().startswith("Embedding")]


def test_images_emit_the_same_events_as_texts(stub, events, red):
    model = UniversalEmbedding(embedder=stub, embed_batch_size=1)
    for call in (
        lambda: model.get_text_embedding_batch(["a", "b"]),
        lambda: model.get_image_embedding_batch([red, red]),
        lambda: model([node_with(None, red), TextNode(text="a")]),
    ):
        events.clear()
        vectors = call()
        seen = embedding_events(events)
        assert [e.class_name() for e in seen] == ["EmbeddingStartEvent", "EmbeddingEndEvent"] * 2
        assert seen[0].model_dict["model_name"] == "stub"
        ends = [event.embeddings[0] for event in seen[1::2]]
        assert ends == [getattr(vector, "embedding", vector) for vector in vectors]


async def test_async_images_emit_events_within_the_callers_span(model, events, red):
    await model.aget_image_embedding(red)
    seen = embedding_events(events)
    assert len(seen) == 2
    assert all(event.span_id for event in seen)


class Callbacks(BaseCallbackHandler):
    def __init__(self):
        super().__init__([], [])
        self.ends = []

    def on_event_start(self, event_type, payload=None, **kwargs):
        return ""

    def on_event_end(self, event_type, payload=None, **kwargs):
        self.ends.append((event_type.value, payload))

    def start_trace(self, trace_id=None):
        pass

    def end_trace(self, trace_id=None, trace_map=None):
        pass


def test_callbacks_and_events_name_images_without_their_bytes(stub, events, red):
    callbacks = Callbacks()
    model = UniversalEmbedding(embedder=stub, callback_manager=CallbackManager([callbacks]))
    raw = Path(red).read_bytes()
    url = "data:image/png;base64," + base64.b64encode(raw).decode()
    images = [red, io.BytesIO(raw), raw, url, Image.open(io.BytesIO(raw))]
    model.get_image_embedding_batch(images)
    model.get_fused_embedding("a chart", red)
    (kind, payload), (_, fused) = callbacks.ends
    assert kind == "embedding"
    assert payload["chunks"] == [
        f"[{red}]",
        "[image from bytes]",
        "[image from bytes]",
        "[image from a data URL]",
        "[image of 4x4]",
    ]
    assert len(payload["embeddings"]) == len(images)
    assert fused["chunks"] == [f"a chart [{red}]"]
    ends = [e for e in embedding_events(events) if e.class_name() == "EmbeddingEndEvent"]
    assert [e.chunks for e in ends] == [payload["chunks"], fused["chunks"]]


# --- storing, copying, pickling ---------------------------------------------------------------


def test_dict_round_trip_is_stable_and_knows_the_weights(stub):
    model = UniversalEmbedding(embedder=stub, dim=8, node_view="image", query_instruction=None)
    data = model.to_dict()
    json.dumps(data)
    assert data["class_name"] == "UniversalEmbedding"
    assert data["fingerprint"] == "stub-1"
    again = UniversalEmbedding.from_dict(data, embedder=stub)
    assert again.to_dict() == data
    assert again.get_query_embedding("a") == model.get_query_embedding("a")
    stub.fingerprint = "stub-2"
    assert model.to_dict() != data


def test_settings_survive_a_json_round_trip(monkeypatch, stub):
    monkeypatch.setattr("mmrag.embedders.load_embedder", lambda *a, **k: stub)
    model = UniversalEmbedding("m", device="cpu", options={"max_image_tokens": 640}, dim=4)
    again = UniversalEmbedding.from_json(model.to_json())
    assert again.to_dict() == model.to_dict()
    assert (again.device, again.options) == ("cpu", {"max_image_tokens": 640})


def test_secrets_are_in_no_dict_repr_or_payload():
    model = UniversalEmbedding(
        "m", base_url="http://a/v1", api_key="sk-secret", options={"dim": DIM}
    )
    shown = f"{model!r} {model} {model.to_dict()} {model.to_payload()} {model.model_dump_json()}"
    assert "sk-secret" not in shown
    assert "api_key" not in model.to_dict()
    assert "http" not in str(model.to_payload())
    assert model.embedder.server._api_key == "sk-secret"
    assert UniversalEmbedding.from_dict(model.to_dict(), api_key="k").api_key is not None


def test_copies_share_the_embedder(model, stub):
    for twin in (copy.copy(model), copy.deepcopy(model), model.model_copy(deep=True)):
        assert twin.embedder is stub
        assert twin.get_text_embedding("a") == direct("a")


def test_pickle_of_a_given_embedder_carries_it(model):
    again = pickle.loads(pickle.dumps(model))
    assert isinstance(again.embedder, Stub)
    assert again.get_query_embedding("a") == model.get_query_embedding("a")


def test_pickle_of_a_named_model_carries_no_weights_and_loads_again(monkeypatch, red):
    loads = []

    def load(name, **settings):
        loads.append((name, settings))
        return Stub()

    monkeypatch.setattr("mmrag.embedders.load_embedder", load)
    model = UniversalEmbedding("some/model", device="cpu", options={"max_length": 9}, dim=4)
    model.embedder.weights = bytes(10_000_000)
    raw = pickle.dumps(model)
    assert len(raw) < 10_000
    again = pickle.loads(raw)
    assert len(loads) == 1
    assert again.get_image_embedding(red) == model.get_image_embedding(red)
    assert loads[0] == loads[1]
    assert loads[0][0] == "some/model"
    assert loads[0][1]["device"] == "cpu" and loads[0][1]["max_length"] == 9


def test_model_is_loaded_once_and_only_when_needed(monkeypatch):
    loads = []

    def load(name, **_):
        time.sleep(0.05)
        loads.append(name)
        return Stub()

    monkeypatch.setattr("mmrag.embedders.load_embedder", load)
    model = UniversalEmbedding()
    assert model.model_name == "mmrag-nano"
    assert not loads
    threads = [threading.Thread(target=model.get_text_embedding, args=("a",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == ["mmrag-nano"]


# --- wrong settings ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"query_instruction": "page_for_questions"},
        {"node_view": "picture"},
        {"instruction": "Find it."},
        {"api_key": "k"},
        {"base_url": "http://a/v1"},
        {"model_name": "m", "base_url": "http://a/v1", "device": "cpu"},
        {"embeddings_cache": SimpleKVStore()},
        {"embedder": Stub(), "device": "cpu"},
        {"embedder": Stub(), "model_name": "another"},
        {"embedder": Stub(), "options": {"max_length": 9}},
    ],
)
def test_wrong_settings_are_refused_at_once(wrong):
    with pytest.raises(ConfigError):
        UniversalEmbedding(**wrong)


def test_unknown_options_are_refused_when_loading():
    with pytest.raises(ConfigError, match="tries"):
        _ = UniversalEmbedding("m", base_url="http://a/v1", options={"tries": 3}).embedder


def test_model_that_is_not_there_is_told_on_first_use(tmp_path):
    model = UniversalEmbedding(str(tmp_path / "no model"))
    with pytest.raises(ModelError):
        model.get_text_embedding("a")


# --- in LlamaIndex ----------------------------------------------------------------------------


def vector_store():
    return QdrantVectorStore("nodes", client=QdrantClient(":memory:"))


def test_settings_pipeline_and_index_find_texts_and_images(model, red, blue):
    previous = Settings._embed_model
    Settings.embed_model = model
    try:
        nodes = [node_with(None, red), node_with("both", blue), TextNode(text="words")]
        store = vector_store()
        IngestionPipeline(transformations=[Settings.embed_model], vector_store=store).run(
            nodes=nodes
        )
        retriever = VectorStoreIndex.from_vector_store(store).as_retriever(similarity_top_k=3)
        assert len(retriever.retrieve("anything")) == 3
        bundle = QueryBundle("", image_path=blue, embedding=model.get_fused_embedding("both", blue))
        (best, *_) = retriever.retrieve(bundle)
        assert best.node.node_id == nodes[1].node_id
        assert best.score == pytest.approx(1)
        assert str(best.node.image_resource.path) == blue
    finally:
        Settings._embed_model = previous


async def test_async_pipeline_embeds_nodes(model, red):
    pipeline = IngestionPipeline(transformations=[model])
    nodes = await pipeline.arun(nodes=[node_with(None, red), TextNode(text="a")])
    assert [node.embedding for node in nodes] == [direct(Content(image=red)), direct("a")]


def test_pipeline_with_processes_embeds_nodes_in_each(red):
    """The model goes to the workers by name, and each asks the server itself."""
    with Server() as server:
        model = UniversalEmbedding("served", base_url=server.url, options={"dim": DIM})
        nodes = [TextNode(text=f"text {i}") for i in range(4)] + [node_with(None, red)]
        done = IngestionPipeline(transformations=[model]).run(nodes=nodes, num_workers=2)
        assert len(server.requests) >= 2
    by_id = {node.node_id: node.embedding for node in done}
    truth = np.array(vector_of("text 0")) / np.linalg.norm(vector_of("text 0"))
    np.testing.assert_allclose(by_id[nodes[0].node_id], truth, atol=1e-6)
    assert len({tuple(vector) for vector in by_id.values()}) == 5


def test_served_model_needs_no_torch():
    with Server() as server:
        code = (
            "import sys; from mmrag.embedding import UniversalEmbedding\n"
            f"model = UniversalEmbedding('m', base_url={server.url!r})\n"
            "assert len(model.get_query_embedding('a')) == 8\n"
            "assert not {'torch', 'transformers'} & set(sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert server.requests[-1]["input"] == [f"Instruct: {TASKS['page_for_question']}\nQuery: a"]


# --- a real model -----------------------------------------------------------------------------


def test_golden_gme_vectors_come_out_of_every_door(golden):
    folder = golden / "gme"
    expected = json.loads((folder / "expected.json").read_text())
    limits = {key: expected[key] for key in ("min_image_tokens", "max_image_tokens", "max_length")}
    model = UniversalEmbedding(
        str(folder / "checkpoint"), family="gme", device="cpu", dtype="float32", options=limits
    )

    def of(case):
        """The vector of a case, by the door that a user takes for it."""
        image = case["image"] and folder / "images" / case["image"]
        if case["instruction"]:
            asking = UniversalEmbedding(
                embedder=model.embedder, query_instruction=case["instruction"]
            )
            return asking.get_query_embedding(QueryBundle(case["text"], image_path=image))
        if image is None:
            return model.get_text_embedding_batch([case["text"]])[0]
        if case["text"] is None:
            return model.get_image_embedding(str(image))
        return model([node_with(case["text"], image)])[0].embedding

    cases = [case for case in expected["cases"] if case["n_tokens"] < 320]
    doors = {(c["text"] is None, c["image"] is None, c["instruction"] is None): c for c in cases}
    assert len(doors) == 5
    for case in doors.values():
        truth = np.array(case["vector"])
        assert np.array(of(case)) @ truth / np.linalg.norm(truth) > 0.9999, case["text"]
