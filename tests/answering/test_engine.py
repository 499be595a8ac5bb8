import asyncio
import base64
import io
import re
import threading

import numpy as np
import pytest
from chat_server import ChatServer
from fakes import FakeEmbedder, make_image, make_node
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, ImageBlock, LLMMetadata
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms import CustomLLM
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.llms.openai_like import OpenAILike
from PIL import Image
from pydantic import PrivateAttr

from mmrag.answering import citations
from mmrag.answering.citations import parse_marks
from mmrag.answering.context import ImageBudget
from mmrag.answering.engine import CitedQueryEngine
from mmrag.answering.response import NOT_FOUND, SENTINEL, says_not_found, shown
from mmrag.errors import ConfigError, EndpointError
from mmrag.llms.endpoint import ASSUMED_WINDOW, open_llm, served_models

EYES = "The gold plan covers one eye examination a year. Lenses cost 150 dollars."
TEETH = "Dental cleaning is free for children under 12. Adults pay for crowns."
QUESTION = "Does the gold plan cover an eye examination?"
ANSWER = "Yes, the gold plan covers one eye examination a year [1]."


class Chat(CustomLLM):
    """A chat model that says what it is told, and keeps what it was sent."""

    reply: str = ANSWER
    window: int = 32_000
    _seen: list = PrivateAttr(default_factory=list)
    _threads: list = PrivateAttr(default_factory=list)

    @property
    def metadata(self):
        return LLMMetadata(context_window=self.window, is_chat_model=True, model_name="chat")

    def complete(self, prompt, formatted=False, **kwargs):
        raise NotImplementedError

    stream_complete = complete

    def chat(self, messages, **kwargs):
        self._seen.append(messages)
        return ChatResponse(message=ChatMessage(role="assistant", content=self.reply))

    def stream_chat(self, messages, **kwargs):
        self._seen.append(messages)
        for piece in re.findall(r"\S+\s*|\s+", self.reply):
            message = ChatMessage(role="assistant", content=piece)
            yield ChatResponse(message=message, delta=piece)

    async def achat(self, messages, **kwargs):
        return self.chat(messages)

    async def astream_chat(self, messages, **kwargs):
        async def pieces():
            for piece in self.stream_chat(messages):
                yield piece

        return pieces()

    @property
    def prompt(self):
        """All text of the last request."""
        return "\n".join(
            block.text for m in self._seen[-1] for block in m.blocks if block.block_type == "text"
        )

    @property
    def images(self):
        return [b for m in self._seen[-1] for b in m.blocks if isinstance(b, ImageBlock)]


class Found(BaseRetriever):
    """Returns the hits it was given."""

    def __init__(self, hits, callback_manager=None):
        self.hits = hits
        super().__init__(callback_manager=callback_manager)

    def _retrieve(self, query_bundle):
        return list(self.hits)


@pytest.fixture(autouse=True)
def no_pdf(monkeypatch, tmp_path):
    (tmp_path / "plans.pdf").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(citations, "locate_quote", lambda *_: [(1, 2, 3, 4)])


@pytest.fixture
def hits(tmp_path):
    images = [make_image(tmp_path / f"{n}.png", c) for n, c in enumerate(("red", "blue"))]
    nodes = [
        make_node(text, file="plans.pdf", page=page, image=image)
        for page, (text, image) in enumerate(zip((EYES, TEETH), images, strict=True), 4)
    ]
    return [NodeWithScore(node=node, score=1 / n) for n, node in enumerate(nodes, 1)]


@pytest.fixture
def llm():
    return Chat()


@pytest.fixture
def engine(hits, llm):
    return CitedQueryEngine(Found(hits), llm)


def test_the_answer_is_tied_to_file_page_quote_and_box(engine):
    response = engine.query(QUESTION)
    assert str(response) == ANSWER
    assert response.found
    assert response.to_dict(QUESTION) == {
        "question": QUESTION,
        "found": True,
        "answer": ANSWER,
        "extractive": False,
        "certain": True,
        "sources": [
            {
                "n": 1,
                "file": "plans.pdf",
                "page": 4,
                "label": None,
                "page_name": "page 4",
                "quote": "The gold plan covers one eye examination a year.",
                "box": [1.0, 2.0, 3.0, 4.0],
            }
        ],
    }
    assert [source.n for source in response.sources] == [1, 2]
    assert [node.node.metadata["page"] for node in response.source_nodes] == [4, 5]


def test_the_model_gets_one_fenced_text_and_one_image_a_page_and_the_question_last(engine, llm):
    engine.query(QUESTION)
    system, user = llm._seen[0]
    kinds = [block.block_type for block in user.blocks]
    assert kinds == ["text", "image", "text", "image", "text"]
    assert user.blocks[-1].text.startswith(f"Question: {QUESTION}")
    assert SENTINEL in system.content
    assert SENTINEL in user.blocks[-1].text
    boundary = re.search(r"<<<source 1 (\w{16})>>>", user.blocks[0].text)[1]
    assert boundary in system.content
    assert user.blocks[2].text.startswith(f"<<<source 2 {boundary}>>>\nfile: plans.pdf\npage: 5")
    seen = Image.open(io.BytesIO(base64.b64decode(user.blocks[1].image)))
    assert seen.getpixel((0, 0)) == (255, 0, 0)


def test_the_boundary_is_another_in_each_request(engine, llm):
    engine.query(QUESTION)
    first = re.search(r"source 1 (\w{16})", llm.prompt)[1]
    engine.query(QUESTION)
    assert first not in llm.prompt


def test_a_model_without_eyes_gets_text_alone(hits, llm):
    CitedQueryEngine(Found(hits), llm, images=False).query(QUESTION)
    assert not llm.images
    assert "Picture of source" not in llm.prompt


def test_the_question_may_have_an_image(engine, llm, tmp_path):
    path = make_image(tmp_path / "question.png", "green")
    engine.query(QueryBundle("What is this?", image_path=str(path)))
    assert len(llm.images) == 3
    last = Image.open(io.BytesIO(base64.b64decode(llm.images[-1].image)))
    assert last.getpixel((0, 0)) == (0, 128, 0)


def test_a_model_without_eyes_is_not_sent_the_questions_image_either(hits, llm, tmp_path):
    query = QueryBundle(QUESTION, image_path=str(make_image(tmp_path / "q.png")))
    response = CitedQueryEngine(Found(hits), llm, images=False).query(query)
    assert not llm.images
    assert "image of the question was not sent" in response.notes[0]


def test_all_images_of_a_request_keep_to_the_bytes(hits, llm, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "q.png")
    Image.fromarray(noise).save(hits[0].node.image_resource.path)
    query = QueryBundle(QUESTION, image_path=str(tmp_path / "q.png"))
    budget = ImageBudget(max_bytes=31_000)
    CitedQueryEngine(Found(hits), llm, image_budget=budget).query(query)
    assert len(llm.images) == 3
    assert sum(len(base64.b64decode(block.image)) for block in llm.images) <= 31_000


@pytest.mark.parametrize(
    "bad", [{"max_sources": 0}, {"dangling": "drop"}, {"unsupported": "removed"}]
)
def test_options_that_make_no_sense_are_refused(hits, bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        CitedQueryEngine(Found(hits), **bad)


def test_braces_in_documents_and_questions_are_kept(hits, llm):
    hits[0].node.text_resource.text = "{boundary} {{ 7*7 }} {% endchat %} {0}"
    CitedQueryEngine(Found(hits), llm).query("What is {sentinel}?")
    assert "{boundary} {{ 7*7 }} {% endchat %} {0}" in llm.prompt
    assert "What is {sentinel}?" in llm.prompt


def test_without_hits_the_model_is_not_asked(llm):
    response = CitedQueryEngine(Found([]), llm).query(QUESTION)
    assert (str(response), response.found, response.sources) == (NOT_FOUND, False, [])
    assert not llm._seen


def test_below_the_threshold_the_model_is_not_asked(hits, llm):
    response = CitedQueryEngine(Found(hits), llm, threshold=2.0).query(QUESTION)
    assert not response.found
    assert not llm._seen


@pytest.mark.parametrize(
    "reply", [SENTINEL, f"**{SENTINEL}**", f" {SENTINEL.lower()}.\n", f"{SENTINEL}: nothing on it."]
)
def test_the_sentinel_means_not_found(hits, reply):
    response = CitedQueryEngine(Found(hits), Chat(reply=reply)).query(QUESTION)
    assert (str(response), response.found) == (NOT_FOUND, False)
    assert response.to_dict("q")["sources"] == []
    assert len(response.sources) == 2


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("reply", "answer", "found"),
    [
        (f"<think>\nIs it [2]? No.\n</think>\n\n{ANSWER}", ANSWER, True),
        (f"[THINK]Hm [9].[/THINK]{ANSWER}", ANSWER, True),
        (f"<think>Hm.</think>{SENTINEL}", NOT_FOUND, False),
        (f"The sources do not say. {SENTINEL}", NOT_FOUND, False),
        (SENTINEL.replace("_", "\\_"), NOT_FOUND, False),
        (f"{ANSWER} Teeth: {SENTINEL}", f"{ANSWER} Teeth: {NOT_FOUND}", True),
        (f"{ANSWER} NOT_FOUND is no more.", f"{ANSWER} NOT_FOUND is no more.", True),
    ],
)
def test_reasoning_and_the_sentinel_are_no_part_of_an_answer(hits, reply, answer, found, streaming):
    engine = CitedQueryEngine(Found(hits), Chat(reply=reply), streaming=streaming)
    response = engine.query(QUESTION)
    seen = "".join(response.response_gen) if streaming else answer
    final = response.get_response() if streaming else response
    assert (str(final), final.found) == (answer, found)
    assert "think" not in seen.lower()
    assert SENTINEL not in seen
    assert "[9]" not in str(final.problems)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_stream_hides_the_same_however_it_is_cut(size):
    reply = f"<think>Hm.</think> The gold\nplan [1]. IN: {SENTINEL}, NOT_FOUND_IN"
    pieces = (reply[i : i + size] for i in range(0, len(reply), size))
    assert "".join(shown(pieces)) == f"The gold\nplan [1]. IN: {NOT_FOUND}, NOT_FOUND_IN"


def test_a_stream_begins_when_reasoning_ends():
    drawn = []

    def tokens():
        for token in ["<think>", *["hm "] * 30_000, "</thi", "nk>", "\n\n", "Gold ", "covers "]:
            drawn.append(token)
            yield token

    assert next(shown(tokens())) == "Gold "
    assert drawn[-1] == "Gold "


def test_reasoning_that_does_not_end_is_no_answer(hits):
    with pytest.raises(EndpointError, match="max_tokens"):
        CitedQueryEngine(Found(hits), Chat(reply="<think>Let me see [1]")).query(QUESTION)


def test_an_answer_that_speaks_of_finding_is_not_the_sentinel():
    assert not says_not_found("Not found anywhere but on page 3 [1].")


def test_an_empty_answer_is_an_error(hits):
    with pytest.raises(EndpointError, match="empty"):
        CitedQueryEngine(Found(hits), Chat(reply=" \n")).query(QUESTION)


def test_dangling_and_unsupported_are_flagged_or_removed(hits):
    reply = f"{ANSWER} Cheese is green [2]. Lenses cost 150 dollars [8]."
    flagged = CitedQueryEngine(Found(hits), Chat(reply=reply)).query(QUESTION)
    assert str(flagged) == reply
    assert len(flagged.problems) == 2
    strict = CitedQueryEngine(
        Found(hits), Chat(reply=reply), dangling="remove", unsupported="remove"
    )
    assert str(strict.query(QUESTION)) == f"{ANSWER} Lenses cost 150 dollars."


def test_an_answer_with_nothing_left_is_not_found(hits):
    chat = Chat(reply="Cheese is green [2].")
    response = CitedQueryEngine(Found(hits), chat, unsupported="remove").query(QUESTION)
    assert not response.found


def test_a_missing_image_never_kills_the_query(hits, llm, tmp_path, caplog):
    (tmp_path / "0.png").unlink()
    response = CitedQueryEngine(Found(hits), llm).query(QUESTION)
    assert response.found
    assert len(llm.images) == 1
    assert "the image of [1] was not sent" in response.notes[0]
    assert "the image of [1] was not sent" in caplog.text


def test_a_small_window_is_kept(hits):
    small = Chat(window=900)
    hits[0].node.text_resource.text = EYES * 40
    response = CitedQueryEngine(Found(hits), small).query(QUESTION)
    assert response.notes
    assert len(small.prompt) / 3 < 900
    wide = CitedQueryEngine(Found(hits), small, context_window=50_000).query(QUESTION)
    assert not wide.notes


def test_the_silent_default_window_is_said(hits, caplog):
    CitedQueryEngine(Found(hits), OpenAILike(model="m", api_key="x", is_chat_model=True))
    assert "3900" in caplog.text
    caplog.clear()
    known = OpenAILike(model="m", api_key="x", is_chat_model=True, context_window=8000)
    CitedQueryEngine(Found(hits), known)
    CitedQueryEngine(Found(hits), OpenAILike(model="m", api_key="x"), context_window=9000)
    assert not caplog.text


def test_postprocessors_run_before_the_answer(hits, llm):
    cut = SimilarityPostprocessor(similarity_cutoff=0.9)
    response = CitedQueryEngine(Found(hits), llm, [cut]).query(QUESTION)
    assert len(response.sources) == 1


def test_prompts_can_be_replaced(engine, llm):
    engine.update_prompts({"system_prompt": PromptTemplate("Be brief. {boundary} {sentinel}")})
    engine.query(QUESTION)
    assert llm._seen[0][0].content.startswith("Be brief. ")
    assert set(engine.get_prompts()) == {"system_prompt", "question_prompt"}


def test_a_stream_has_its_sources_at_once_and_its_checks_at_the_end(hits, llm):
    response = CitedQueryEngine(Found(hits), llm, streaming=True).query(QUESTION)
    assert [source.page for source in response.sources] == [4, 5]
    pieces = list(response.response_gen)
    assert len(pieces) > 3
    assert "".join(pieces) == ANSWER
    checked = response.get_response()
    assert checked.sources[0].quote
    assert str(checked) == str(response) == ANSWER


def test_a_stream_half_read_is_whole_in_the_end(hits, llm):
    response = CitedQueryEngine(Found(hits), llm, streaming=True).query(QUESTION)
    next(iter(response.response_gen))
    assert str(response.get_response()) == ANSWER


@pytest.mark.parametrize("streaming", [True, False])
def test_a_stream_never_shows_the_sentinel(hits, streaming):
    chat = Chat(reply=f"\n{SENTINEL[:9]}{SENTINEL[9:]}\n")
    response = CitedQueryEngine(Found(hits), chat, streaming=streaming).query(QUESTION)
    assert str(response) == NOT_FOUND
    final = response.get_response() if streaming else response
    assert not final.found


def test_streaming_without_hits_or_model_is_a_stream_too(hits, llm):
    for engine, found in (
        (CitedQueryEngine(Found([]), llm, streaming=True), False),
        (CitedQueryEngine(Found(hits), streaming=True), True),
    ):
        response = engine.query(QUESTION)
        text = "".join(response.response_gen)
        assert response.get_response().found == found
        assert text == str(response.get_response())


async def test_async_gives_the_same(engine):
    assert (await engine.aquery(QUESTION)).to_dict("") == engine.query(QUESTION).to_dict("")


async def test_async_streams(hits, llm):
    response = await CitedQueryEngine(Found(hits), llm, streaming=True).aquery(QUESTION)
    assert len(response.sources) == 2
    pieces = [piece async for piece in response.async_response_gen()]
    assert "".join(pieces) == ANSWER
    assert (await response.get_response()).sources[0].cited


async def test_async_streams_hide_the_sentinel_and_work_without_a_model(hits):
    chat = Chat(reply=SENTINEL)
    response = await CitedQueryEngine(Found(hits), chat, streaming=True).aquery(QUESTION)
    assert [piece async for piece in response.async_response_gen()] == [NOT_FOUND]
    assert not (await response.get_response()).found
    response = await CitedQueryEngine(Found(hits), streaming=True).aquery(QUESTION)
    assert (await response.get_response()).found


async def test_extraction_leaves_the_loop_free(hits):
    class Embedder:
        def encode(self, contents, instruction=None, **_):
            self.thread = threading.current_thread()
            return np.ones((len(contents), 2), dtype=np.float32) / 2**0.5

    embedder = Embedder()
    await CitedQueryEngine(Found(hits), embedder=embedder).aquery(QUESTION)
    assert embedder.thread is not threading.main_thread()


def test_events_and_callbacks_are_those_of_llama_index(hits, llm):
    seen = []

    class Handler(BaseEventHandler):
        def handle(self, event, **kwargs):
            seen.append(event.class_name())

    handler = Handler()
    get_dispatcher().add_event_handler(handler)
    debug = LlamaDebugHandler(print_trace_on_end=False)
    manager = CallbackManager([debug])
    engine = CitedQueryEngine(Found(hits, manager), llm, callback_manager=manager)
    try:
        engine.query(QUESTION)
        asyncio.run(engine.aquery(QUESTION))
    finally:
        get_dispatcher().event_handlers.remove(handler)
    for name in ("QueryStartEvent", "RetrievalEndEvent", "SynthesizeStartEvent", "QueryEndEvent"):
        assert seen.count(name) == 2
    assert len(debug.get_event_pairs(CBEventType.SYNTHESIZE)) == 2


# ---- without a model


def test_without_a_model_the_best_sentences_are_quoted_and_it_is_said(hits):
    response = CitedQueryEngine(Found(hits)).query(QUESTION)
    assert str(response) == "\u201cThe gold plan covers one eye examination a year.\u201d [1]"
    assert response.found
    assert (response.extractive, response.certain) == (True, True)
    assert response.notice == "No language model is configured. Quoted from the documents:"
    (cited,) = response.cited
    assert (cited.n, cited.page, cited.box) == (1, 4, (1, 2, 3, 4))
    assert cited.quote == "The gold plan covers one eye examination a year."


def test_without_a_model_a_foreign_question_is_not_found(hits):
    response = CitedQueryEngine(Found(hits)).query("Who won the football match in Denver?")
    assert (str(response), response.found, response.cited) == (NOT_FOUND, False, [])


def test_without_a_model_how_much_evidence_is_enough_can_be_set(hits):
    assert not CitedQueryEngine(Found(hits), least_evidence=1.01).query(QUESTION).found
    foreign = "Who painted the Mona Lisa in the year 1503?"
    assert CitedQueryEngine(Found(hits), least_evidence=0.0).query(foreign).found


def test_without_a_model_an_announced_list_is_quoted_with_its_announcement():
    text = "The club covers these sports:\n\u2022 climbing in a hall\n\u2022 swimming in a lake\n"
    hit = NodeWithScore(node=make_node(text, file="plans.pdf"), score=1.0)
    response = CitedQueryEngine(Found([hit])).query("Which sports does the club cover?")
    assert "these sports: \u2022 climbing in a hall \u2022 swimming in a lake\u201d" in str(
        response
    )


def test_without_a_model_passages_that_may_answer_are_called_so(hits):
    question = "Does insurance pay for the eye examination of the gold plan abroad?"
    response = CitedQueryEngine(Found(hits)).query(question)
    assert (response.found, response.certain) == (True, False)
    assert "may answer" in response.notice
    assert "may answer" not in str(response)
    assert CitedQueryEngine(Found(hits), sure_evidence=0.2).query(question).certain
    assert response.to_dict(question)["certain"] is False


def test_an_answer_of_a_model_has_no_notice(engine):
    response = engine.query(QUESTION)
    assert (response.extractive, response.certain, response.notice) == (False, True, None)


def test_without_a_model_marks_ask_nothing(hits):
    """An embedder finds something near to anything."""
    engine = CitedQueryEngine(Found(hits), embedder=FakeEmbedder())
    assert not engine.query("?!").found
    assert engine.query("What is this?").found


def test_without_a_model_a_question_of_common_words_is_not_found(hits):
    assert not CitedQueryEngine(Found(hits)).query("What is this?").found


def test_without_a_model_a_documents_own_references_cannot_pass_for_citations():
    page = make_node("The gold plan covers one eye examination a year, as shown in [2].", page=1)
    response = CitedQueryEngine(Found([NodeWithScore(node=page)])).query(QUESTION)
    assert parse_marks(str(response)) == [1]
    assert response.sources[0].quote.endswith("[2].")


def test_without_a_model_meaning_decides_between_sentences(hits):
    class Embedder:
        """Near the question: whatever speaks of children."""

        def encode(self, contents, instruction=None, **_):
            near = [instruction is not None or "children" in str(c) for c in contents]
            return np.asarray([[1.0, 0.0] if yes else [0.0, 1.0] for yes in near], np.float32)

    question = "Do adults pay for crowns or cleaning?"
    plain = CitedQueryEngine(Found(hits)).query(question)
    guided = CitedQueryEngine(Found(hits), embedder=Embedder()).query(question)
    assert plain.claims[0].text == "Adults pay for crowns."
    assert guided.claims[0].text == "Dental cleaning is free for children under 12."


def test_without_a_model_and_without_text_layers_nothing_is_found(tmp_path):
    scan = make_node("", image=make_image(tmp_path / "scan.png"))
    response = CitedQueryEngine(Found([NodeWithScore(node=scan, score=1.0)])).query(QUESTION)
    assert not response.found


def test_sentences_are_not_repeated(hits):
    twice = [*hits, NodeWithScore(node=make_node(EYES + " More here.", file="b.pdf"), score=0.1)]
    response = CitedQueryEngine(Found(twice)).query(QUESTION)
    assert str(response).count("eye examination") == 1


# ---- over the wire


@pytest.fixture
def server():
    server = ChatServer(ANSWER)
    yield server
    server.close()


def remote(server, **kwargs):
    return open_llm("tiny", server.url, timeout=5.0, **kwargs)


def test_the_wire_carries_images_and_the_models_window(hits, server):
    llm = remote(server)
    assert llm.metadata.context_window == 20_000
    response = CitedQueryEngine(Found(hits), llm).query(QUESTION)
    assert str(response) == ANSWER
    content = server.requests[0]["messages"][1]["content"]
    assert [block["type"] for block in content] == ["text", "image_url"] * 2 + ["text"]
    assert content[1]["image_url"]["url"].startswith("data:image/png;base64,")


def test_the_wire_carries_plain_text_for_models_without_eyes(hits, server):
    CitedQueryEngine(Found(hits), remote(server), images=False).query(QUESTION)
    content = server.requests[0]["messages"][1]["content"]
    assert isinstance(content, str)
    assert EYES in content
    fences = [line for line in content.splitlines() if "<<<" in line]
    assert len(fences) == 4
    assert all(re.fullmatch(r"<<<[^<>]*>>>", line) for line in fences)


async def test_the_wire_streams(hits, server):
    response = CitedQueryEngine(Found(hits), remote(server), streaming=True).query(QUESTION)
    assert len(list(response.response_gen)) > 3
    assert response.get_response().sources[0].cited
    response = await CitedQueryEngine(Found(hits), remote(server), streaming=True).aquery(QUESTION)
    assert (await response.get_response()).sources[0].cited
    assert [request["stream"] for request in server.requests] == [True, True]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("refuse", "refused.*If it takes no images"),
        ("deny", "API key"),
        ("missing", "no such model"),
        ("garbage", "is not a chat completion|empty"),
        ("hollow", "is not a chat completion|empty"),
        ("cut", "broke off or is not valid|cannot be reached"),
    ],
)
def test_every_failure_of_the_server_is_one_clear_error(hits, server, mode, message, streaming):
    server.mode = mode
    llm = remote(server)
    llm.max_retries = 0
    with pytest.raises(EndpointError, match=message):
        response = CitedQueryEngine(Found(hits), llm, streaming=streaming).query(QUESTION)
        if streaming:
            response.get_response()


@pytest.mark.parametrize("streaming", [False, True])
def test_an_answer_that_is_cut_off_says_so(hits, server, streaming):
    server.mode = "long"
    response = CitedQueryEngine(Found(hits), remote(server), streaming=streaming).query(QUESTION)
    final = response.get_response() if streaming else response
    assert final.notes == ["the answer is cut off: it reached max_tokens of the model"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_content_filter_is_named(hits, server, streaming):
    server.mode = "filter"
    response = CitedQueryEngine(Found(hits), remote(server), streaming=streaming).query(QUESTION)
    final = response.get_response() if streaming else response
    assert final.notes == ["the answer was stopped by the server's content filter"]
    server.answer = ""
    with pytest.raises(EndpointError, match="stopped by the server's content filter"):
        response = CitedQueryEngine(Found(hits), remote(server), streaming=streaming).query("q")
        _ = response.get_response() if streaming else None


def test_a_server_that_hangs_is_given_up(hits, server):
    server.mode = "hang"
    llm = open_llm("tiny", server.url, timeout=0.3)
    llm.max_retries = 0
    with pytest.raises(EndpointError, match="in time"):
        CitedQueryEngine(Found(hits), llm).query(QUESTION)


async def test_failures_are_clear_in_async_too(hits, server):
    server.mode = "deny"
    with pytest.raises(EndpointError, match="API key"):
        await CitedQueryEngine(Found(hits), remote(server)).aquery(QUESTION)


def test_a_server_that_is_not_there(hits):
    llm = open_llm("tiny", "http://127.0.0.1:9/v1", timeout=2.0)
    llm.max_retries = 0
    with pytest.raises(EndpointError, match="cannot be reached"):
        CitedQueryEngine(Found(hits), llm).query(QUESTION)


def test_the_only_model_of_a_server_needs_no_name(server):
    assert open_llm(base_url=server.url).model == "tiny"
    server.models.append({"id": "other"})
    with pytest.raises(ConfigError, match=r"Name a model: .* has other, tiny"):
        open_llm(base_url=server.url)


def test_windows_as_servers_name_them(server, caplog):
    server.models[:] = [
        {"id": "vllm", "max_model_len": 1},
        {"id": "llama.cpp", "meta": {"n_ctx_train": 2}},
        {"id": "silent"},
    ]
    assert served_models(server.url) == {"vllm": 1, "llama.cpp": 2, "silent": None}
    assert open_llm("silent", server.url).context_window == ASSUMED_WINDOW
    assert "does not report" in caplog.text
    assert open_llm("silent", server.url, context_window=5).context_window == 5
    assert open_llm("gpt-4o", api_key="x").context_window == 128_000


def test_llama_cpp_is_asked_for_the_window_that_it_was_started_with(server):
    server.models[:] = [{"id": "gguf", "meta": {"n_ctx_train": 131_072}}]
    server.props = {"default_generation_settings": {"n_ctx": 8192}}
    assert open_llm(None, server.url).context_window == 8192


def test_an_answer_takes_at_most_a_quarter_of_the_window():
    assert open_llm("gpt-4o", api_key="x").max_tokens == 1024
    assert open_llm("small", api_key="x", context_window=1000).max_tokens == 250
