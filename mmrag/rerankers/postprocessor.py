"""MLLMReranker, a LlamaIndex postprocessor: a model judges each hit for the query.

No node is lost: what cannot be judged keeps the place that retrieval gave it, and says why.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle
from llama_index_instrumentation import get_dispatcher

from mmrag.content import Content, image_size
from mmrag.errors import ConfigError, ContentError, EndpointError
from mmrag.nodes import Hit, as_hit, node_content
from mmrag.prompting import PIXELS_PER_TOKEN, estimate_tokens, sanitize
from mmrag.queries import query_content
from mmrag.rerankers import RerankPrompt, Scorer, ScorerOptions, load_scorer
from mmrag.rerankers.base import DeadlineError, Outcome
from mmrag.rerankers.cascade import Depth, filled, final_order, judge_in_steps

logger = logging.getLogger(__name__)
dispatcher = get_dispatcher(__name__)

DEFAULT_MODEL = "Qwen/Qwen3-VL-Reranker-2B"
_MOST_IMAGE_TOKENS = 1280  # an image counts as no more than this against budget_tokens


class RerankerOptions(ScorerOptions, total=False):
    """How the model of a reranker is loaded; see ``load_scorer``."""

    kind: str | None
    device: str
    dtype: str
    revision: str | None
    quantize: Literal["8bit", "4bit", "4bit-double"] | None
    device_map: Literal["auto"] | None


class MLLMReranker(BaseNodePostprocessor):
    """Orders hits by a model's judgement of each: pages, images, passages, of any query.

    Args:
        model: a name on the hub or a folder: Qwen3-VL-Reranker, a chat MLLM that is asked for one
            of two words, or a cross-encoder, which reads text alone. With ``base_url``, the name
            at a server.
        top_n: how many come back; None: all.
        scorer: a loaded scorer, in place of ``model``.
        base_url: of an OpenAI-compatible server, up to ``/v1``, or of an endpoint in Jina's and
            Cohere's form, up to ``/rerank``.
        api_key: for that server.
        prompt: for chat models: a ``RerankPrompt``, a name in ``mmrag.rerankers.PROMPTS``, or a
            template with ``{query}`` and ``{document}``. By default it fits the query.
        instruction: what the query is looking for: free text, or the name of a task in
            ``mmrag.instructions``.
        settle: stop once a whole step of hits stays this far below the ``top_n``-th best score.
        max_depth: judge no more than this many hits, from the first on.
        budget_ms: stop before a step that would take longer than this, in milliseconds in all.
        budget_tokens: stop before a step that would pass this number of tokens in all.
        step: hits judged together where any of ``settle`` and the budgets is set.
        options: how the model is loaded and what the scorer takes; see ``load_scorer``.

    Results are ``Hit`` objects with ``retrieval_score`` and ``rerank_score`` (in [0, 1]);
    ``rerank_error`` where judging failed, ``rerank_skipped`` where the cascade stopped before,
    ``rerank_note`` where an image was missing. A node that was not judged keeps its place and
    takes the score of its neighbour. Nodes are not changed. Two in a row are a cascade: the first
    chooses, by its ``top_n``, what the second judges.

    Raises:
        ModelError: If the model cannot be had. Queries raise EndpointError only if a server fails
            for every hit.
        ConfigError: If the model cannot be had. Queries raise EndpointError only if a server fails
            for every hit.

    >>> reranker = MLLMReranker("Qwen/Qwen3-VL-Reranker-2B", top_n=5)  # doctest: +SKIP
    >>> reranker.postprocess_nodes(hits, query_str="wind energy")  # doctest: +SKIP
    """

    model: str = Field(description="Name of the model that judges.")
    top_n: int | None = Field(default=5, description="How many nodes come back; None: all.")
    instruction: str | None = Field(default=None, description="What the query looks for.")
    settle: float | None = Field(default=None, description="Gap of scores that stops a cascade.")
    max_depth: int | None = Field(default=None, description="Most nodes that are judged.")
    budget_ms: float | None = Field(default=None, description="Milliseconds to judge in.")
    budget_tokens: int | None = Field(default=None, description="Tokens to judge.")
    step: int = Field(default=8, description="Nodes judged together in a cascade.")
    _scorer: Scorer = PrivateAttr()

    def __init__(
        self,
        model: str | Path | None = None,
        top_n: int | None = 5,
        *,
        scorer: Scorer | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        prompt: RerankPrompt | str | None = None,
        instruction: str | None = None,
        settle: float | None = None,
        max_depth: int | None = None,
        budget_ms: float | None = None,
        budget_tokens: int | None = None,
        step: int = 8,
        callback_manager: CallbackManager | None = None,
        **options: Unpack[RerankerOptions],
    ) -> None:
        loading: dict[str, Any] = {"base_url": base_url, "api_key": api_key, "prompt": prompt}
        loading = {key: value for key, value in loading.items() if value is not None} | {**options}
        # Silently ignored, they would leave the user with another model than asked for.
        if scorer is not None and (model is not None or loading):
            given = ", ".join([*(["model"] if model else []), *loading])
            raise ConfigError(f"With scorer= leave out {given}: it is loaded already.")
        if base_url is not None and model is None:
            raise ConfigError("With base_url give model as the server calls it.")
        limits: dict[str, Any] = {
            "top_n": top_n,
            "settle": settle,
            "max_depth": max_depth,
            "budget_ms": budget_ms,
            "budget_tokens": budget_tokens,
            "step": step,
        }
        Depth(**limits)  # refuses what makes no sense before a model is loaded
        loaded = scorer or load_scorer(model or DEFAULT_MODEL, **loading)
        fields = {"model": loaded.name, "instruction": instruction, **limits}
        super().__init__(callback_manager=callback_manager or CallbackManager(), **fields)
        self._scorer = loaded

    @classmethod
    def class_name(cls) -> str:
        """Name in LlamaIndex's registry."""
        return "MLLMReranker"

    @property
    def scorer(self) -> Scorer:
        """The model that judges."""
        return self._scorer

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise ConfigError("Reranking needs the query: pass query_bundle or query_str.")
        top_n = len(nodes) if self.top_n is None else self.top_n
        dispatcher.event(
            ReRankStartEvent(query=query_bundle, nodes=nodes, top_n=top_n, model_name=self.model)
        )
        payload: dict[str, Any] = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: self.model,
            EventPayload.QUERY_STR: query_bundle.query_str,
            EventPayload.TOP_K: top_n,
        }
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            ranked = self._rerank(nodes, query_bundle)[:top_n]
            event.on_end(payload={EventPayload.NODES: ranked})
        dispatcher.event(ReRankEndEvent(nodes=ranked))
        return ranked

    def _rerank(self, nodes: Sequence[NodeWithScore], bundle: QueryBundle) -> list[NodeWithScore]:
        if not nodes:
            return []
        query = query_content(bundle)
        documents = [document_content(hit.node) for hit in nodes]
        depth = Depth(
            top_n=self.top_n,
            step=self.step,
            settle=self.settle,
            max_depth=self.max_depth,
            budget_ms=self.budget_ms,
            budget_tokens=self.budget_tokens,
        )

        def judge(indices: Sequence[int]) -> list[Outcome]:
            return self._judge(query, [documents[index][0] for index in indices])

        costs = [_cost(query) + _cost(document) for document, _ in documents]
        outcomes, stopped = judge_in_steps(judge, costs, depth)
        _report(outcomes, self.model)
        results = []
        for index, (hit, (_, note)) in enumerate(zip(nodes, documents, strict=True)):
            # The cascade judges from the front: what is missing was not reached.
            outcome = outcomes[index] if index < len(outcomes) else None
            results.append(_judged(hit, outcome, note, stopped))
        return _ordered(results)

    def _judge(self, query: Content, documents: Sequence[Content | ContentError]) -> list[Outcome]:
        """Outcomes of documents; those that could not be read keep their error."""
        readable = [document for document in documents if isinstance(document, Content)]
        pairs = [(query, document) for document in readable]
        judged = iter(self._scorer.judge(pairs, self.instruction) if pairs else [])
        return [
            document if isinstance(document, ContentError) else next(judged)
            for document in documents
        ]


def document_content(node: BaseNode) -> tuple[Content | ContentError, str | None]:
    """What of a node is judged, and what is missing from it.

    An image that cannot be read leaves the text; without text the error is returned. Chat
    markers in the text are made harmless.
    """
    text = sanitize(node.get_content(metadata_mode=MetadataMode.NONE))
    try:
        image = node_content(node, "image").image
        if image is not None:
            image_size(image)  # type: ignore[arg-type]  # a node has one image at most
    except ContentError as error:
        if not text.strip():
            return error, None
        return Content(text), f"judged by its text alone: {error}"
    if image is not None and not text.strip():
        return Content(image=image), None
    return Content(text, image), None


def _cost(content: Content | ContentError) -> int:
    """Tokens of a content, estimated; of one that cannot be read, none."""
    if isinstance(content, ContentError):
        return 0
    tokens = estimate_tokens(content.text or "")
    for image in content.images:
        width, height = image_size(image)
        # Rounded up.
        tokens += min(-(-width * height // PIXELS_PER_TOKEN), _MOST_IMAGE_TOKENS)
    return tokens


def _report(outcomes: Sequence[Outcome], model: str) -> None:
    """Warn about hits that could not be judged; raise what a server failed all of them with."""
    errors = [outcome for outcome in outcomes if not isinstance(outcome, float)]
    # A deadline that passed is no failure of the server: it was set so that the query goes on.
    down = [e for e in errors if isinstance(e, EndpointError) and not isinstance(e, DeadlineError)]
    if errors and len(down) == len(outcomes):
        raise down[0]
    if errors:
        logger.warning(
            "%s could not judge %d of %d hits, which keep their places; the first: %s",
            model,
            len(errors),
            len(outcomes),
            errors[0],
        )


def _judged(
    found: NodeWithScore, outcome: Outcome | None, note: str | None, stopped: str | None
) -> Hit:
    """A copy of a hit with its judgement, in place of an earlier one."""
    skipped = stopped if outcome is None else None
    judgement = {
        "rerank_score": outcome if isinstance(outcome, float) else None,
        "rerank_error": None if outcome is None or isinstance(outcome, float) else str(outcome),
        "rerank_skipped": skipped,
        "rerank_note": note,
    }
    # A copy: other retrievers and caches may hold the same node object.
    return as_hit(found).model_copy(update=judgement)


def _ordered(hits: Sequence[Hit]) -> list[NodeWithScore]:
    """Hits in their final order with their final scores."""
    scores = [hit.rerank_score for hit in hits]
    order = final_order(scores)
    # LlamaIndex sorts by score in places, so scores must fall from first to last.
    final = filled([scores[index] for index in order])
    return [
        hits[index].model_copy(update={} if score is None else {"score": score})
        for index, score in zip(order, final, strict=True)
    ]
