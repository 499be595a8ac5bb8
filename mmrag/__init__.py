"""Multimodal RAG for LlamaIndex: one embedder, one Qdrant collection, answers that cite pages.

Names are loaded when they are first used, so that ``import mmrag`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmrag.answering.chat import CitedChatEngine, CitedChatResponse
    from mmrag.answering.citations import Claim
    from mmrag.answering.context import ImageBudget, Source, calibrate_threshold
    from mmrag.answering.engine import CitedQueryEngine
    from mmrag.answering.planning import Plan, PlanBudget, PlanningQueryEngine
    from mmrag.answering.response import (
        AsyncCitedStreamingResponse,
        CitedResponse,
        CitedStreamingResponse,
    )
    from mmrag.answering.structured import StructuredAnswer, answer_as
    from mmrag.content import Clip, Content, ImageLimits, load_image
    from mmrag.embedders import Calibration, Embedder, load_embedder
    from mmrag.embedders.late import LateInteraction, TokenEmbedder, load_token_embedder
    from mmrag.embedders.muvera import Muvera
    from mmrag.embedders.remote import RemoteEmbedder
    from mmrag.embedding import UniversalEmbedding
    from mmrag.errors import (
        CollectionError,
        ConfigError,
        ContentError,
        EndpointError,
        MissingCollectionError,
        MMRagError,
        ModelError,
        ReadError,
    )
    from mmrag.evaluation.answers import AnswerRecord
    from mmrag.evaluation.compare import Difference, compare_evaluations
    from mmrag.evaluation.llamaindex import PageRetriever
    from mmrag.evaluation.mteb_encoder import MTEBEncoder
    from mmrag.evaluation.needle.corpora import NeedleOptions
    from mmrag.evaluation.needle.report import write_needle_report
    from mmrag.evaluation.needle.run import find_needles
    from mmrag.evaluation.needle.scores import NeedleResult
    from mmrag.evaluation.questions import Nugget, Question, read_questions
    from mmrag.evaluation.report import write_report
    from mmrag.evaluation.results import Evaluation, Score, System
    from mmrag.evaluation.run import evaluate
    from mmrag.evaluation.storage import StorageSetting, measure_storage
    from mmrag.evaluation.trec import read_qrels, read_run, save_runs, with_qrels
    from mmrag.index import UniversalIndex
    from mmrag.ingest.progress import DescriptionReport, IngestReport, Progress
    from mmrag.llms.endpoint import open_llm
    from mmrag.llms.local import LocalLLM
    from mmrag.queries import MultimodalQuery, Where
    from mmrag.reading import (
        ReadOptions,
        ReadPage,
        find_files,
        locate_quote,
        read_clip,
        read_file,
        save_marked_page,
    )
    from mmrag.rerankers import RerankPrompt, Scorer, load_scorer
    from mmrag.rerankers.postprocessor import MLLMReranker
    from mmrag.retrieval.fusion import Fused, fuse
    from mmrag.retrieval.retriever import UniversalRetriever
    from mmrag.store.collection import Collection, CollectionSettings, FileEntry
    from mmrag.store.settings import View
    from mmrag.store.snapshots import Snapshot, Snapshots
    from mmrag.testing import check_embedder


__version__ = "0.1.0"

_HOME = {
    "AnswerRecord": "evaluation.answers",
    "AsyncCitedStreamingResponse": "answering.response",
    "Calibration": "embedders",
    "CitedChatEngine": "answering.chat",
    "CitedChatResponse": "answering.chat",
    "CitedQueryEngine": "answering.engine",
    "CitedResponse": "answering.response",
    "CitedStreamingResponse": "answering.response",
    "Claim": "answering.citations",
    "Clip": "content",
    "Collection": "store.collection",
    "CollectionError": "errors",
    "CollectionSettings": "store.collection",
    "ConfigError": "errors",
    "Content": "content",
    "ContentError": "errors",
    "DescriptionReport": "ingest.progress",
    "Difference": "evaluation.compare",
    "Embedder": "embedders",
    "EndpointError": "errors",
    "Evaluation": "evaluation.results",
    "FileEntry": "store.collection",
    "Fused": "retrieval.fusion",
    "ImageBudget": "answering.context",
    "ImageLimits": "content",
    "IngestReport": "ingest.progress",
    "LateInteraction": "embedders.late",
    "LocalLLM": "llms.local",
    "MLLMReranker": "rerankers.postprocessor",
    "MMRagError": "errors",
    "MTEBEncoder": "evaluation.mteb_encoder",
    "MissingCollectionError": "errors",
    "ModelError": "errors",
    "MultimodalQuery": "queries",
    "Muvera": "embedders.muvera",
    "NeedleOptions": "evaluation.needle.corpora",
    "NeedleResult": "evaluation.needle.scores",
    "Nugget": "evaluation.questions",
    "PageRetriever": "evaluation.llamaindex",
    "Plan": "answering.planning",
    "PlanBudget": "answering.planning",
    "PlanningQueryEngine": "answering.planning",
    "Progress": "ingest.progress",
    "Question": "evaluation.questions",
    "ReadError": "errors",
    "ReadOptions": "reading",
    "ReadPage": "reading",
    "RemoteEmbedder": "embedders.remote",
    "RerankPrompt": "rerankers",
    "Score": "evaluation.results",
    "Scorer": "rerankers",
    "Snapshot": "store.snapshots",
    "Snapshots": "store.snapshots",
    "Source": "answering.context",
    "StorageSetting": "evaluation.storage",
    "StructuredAnswer": "answering.structured",
    "System": "evaluation.results",
    "TokenEmbedder": "embedders.late",
    "UniversalEmbedding": "embedding",
    "UniversalIndex": "index",
    "UniversalRetriever": "retrieval.retriever",
    "View": "store.settings",
    "Where": "queries",
    "answer_as": "answering.structured",
    "calibrate_threshold": "answering.context",
    "check_embedder": "testing",
    "compare_evaluations": "evaluation.compare",
    "evaluate": "evaluation.run",
    "find_files": "reading",
    "find_needles": "evaluation.needle.run",
    "fuse": "retrieval.fusion",
    "load_embedder": "embedders",
    "load_image": "content",
    "load_scorer": "rerankers",
    "load_token_embedder": "embedders.late",
    "locate_quote": "reading",
    "measure_storage": "evaluation.storage",
    "open_llm": "llms.endpoint",
    "read_clip": "reading",
    "read_file": "reading",
    "read_qrels": "evaluation.trec",
    "read_questions": "evaluation.questions",
    "read_run": "evaluation.trec",
    "save_marked_page": "reading",
    "save_runs": "evaluation.trec",
    "with_qrels": "evaluation.trec",
    "write_needle_report": "evaluation.needle.report",
    "write_report": "evaluation.report",
}

__all__ = [
    "AnswerRecord",
    "AsyncCitedStreamingResponse",
    "Calibration",
    "CitedChatEngine",
    "CitedChatResponse",
    "CitedQueryEngine",
    "CitedResponse",
    "CitedStreamingResponse",
    "Claim",
    "Clip",
    "Collection",
    "CollectionError",
    "CollectionSettings",
    "ConfigError",
    "Content",
    "ContentError",
    "DescriptionReport",
    "Difference",
    "Embedder",
    "EndpointError",
    "Evaluation",
    "FileEntry",
    "Fused",
    "ImageBudget",
    "ImageLimits",
    "IngestReport",
    "LateInteraction",
    "LocalLLM",
    "MLLMReranker",
    "MMRagError",
    "MTEBEncoder",
    "MissingCollectionError",
    "ModelError",
    "MultimodalQuery",
    "Muvera",
    "NeedleOptions",
    "NeedleResult",
    "Nugget",
    "PageRetriever",
    "Plan",
    "PlanBudget",
    "PlanningQueryEngine",
    "Progress",
    "Question",
    "ReadError",
    "ReadOptions",
    "ReadPage",
    "RemoteEmbedder",
    "RerankPrompt",
    "Score",
    "Scorer",
    "Snapshot",
    "Snapshots",
    "Source",
    "StorageSetting",
    "StructuredAnswer",
    "System",
    "TokenEmbedder",
    "UniversalEmbedding",
    "UniversalIndex",
    "UniversalRetriever",
    "View",
    "Where",
    "__version__",
    "answer_as",
    "calibrate_threshold",
    "check_embedder",
    "compare_evaluations",
    "evaluate",
    "find_files",
    "find_needles",
    "fuse",
    "load_embedder",
    "load_image",
    "load_scorer",
    "load_token_embedder",
    "locate_quote",
    "measure_storage",
    "open_llm",
    "read_clip",
    "read_file",
    "read_qrels",
    "read_questions",
    "read_run",
    "save_marked_page",
    "save_runs",
    "with_qrels",
    "write_needle_report",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mmrag' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mmrag.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
