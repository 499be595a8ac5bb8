"""The table of known checkpoints. Imports nothing heavy: ``mmrag models`` prints it."""

from __future__ import annotations

from dataclasses import dataclass

from mmrag.embedders.base import Calibration

# The family of an Embedder that is not a Backbone: any model sentence-transformers loads.
SENTENCE_TRANSFORMERS = "sentence-transformers"


# Images of pages count as much as the words: on pages of charts, slides and tables models of this
# size find more than BM25 does (ViDoRe, arXiv 2407.01449). Not measured one by one.
_LARGE = Calibration(fusion_weights={"image": 3.0, "fused": 3.0, "tokens": 7.0})

# Measured of mmrag-nano, whose text encoder this is.
_MINILM = Calibration(
    support_cosine=0.8,
    fusion_weights={"text": 1.0, "bm25": 2.0, "reference": 3.0},
    zero_cosine={"text": 0.3},
)


@dataclass(frozen=True, slots=True)
class KnownModel:
    """One published checkpoint and what its card says.

    dim: length of the full vector. matryoshka_dims: shorter ones it was trained for.
    context: tokens of the longest input. visual_tokens: most tokens of one image.
    base: the checkpoint a LoRA adapter sits on, if it is one.
    note: a sentence on what it cannot do, if there is one to know before choosing it.
    calibration: settings that hold for it; what its own folder says comes first.

    >>> find_known("mmrag-nano").family
    'nano'
    """

    name: str
    family: str
    dim: int
    license: str
    context: int
    visual_tokens: int
    matryoshka_dims: tuple[int, ...] = ()
    modalities: tuple[str, ...] = ("text", "image", "fused")
    non_commercial: bool = False
    base: str | None = None
    note: str = ""
    calibration: Calibration = _LARGE


_APACHE = "Apache-2.0"
_NANO_NOTE = "English; weak on scanned pages without recognised text; not trained on photographs"
# As the cards state them: the models were not trained for other lengths.
_MRL_VDR = (512, 1024, 1536)
_MRL_2048 = (64, 128, 256, 512, 1024, 2048)
_MRL_2560 = (64, 128, 256, 512, 1024, 2560)
_MRL_4096 = (64, 128, 256, 512, 1024, 2048, 4096)

KNOWN: tuple[KnownModel, ...] = (
    KnownModel(
        "mmrag-nano",
        "nano",
        384,
        _APACHE,
        512,
        1280,
        note=_NANO_NOTE,
        # Its folder has what was measured.
        calibration=Calibration(),
    ),
    KnownModel(
        "sentence-transformers/all-MiniLM-L6-v2",
        SENTENCE_TRANSFORMERS,
        384,
        _APACHE,
        256,
        0,
        modalities=("text",),
        calibration=_MINILM,
    ),
    KnownModel("Alibaba-NLP/gme-Qwen2-VL-2B-Instruct", "gme", 1536, _APACHE, 32768, 1280),
    KnownModel("Alibaba-NLP/gme-Qwen2-VL-7B-Instruct", "gme", 3584, _APACHE, 32768, 1280),
    KnownModel(
        "TIGER-Lab/VLM2Vec-Qwen2VL-2B",
        "vlm2vec_qwen2vl",
        1536,
        _APACHE,
        32768,
        1280,
        base="Qwen/Qwen2-VL-2B-Instruct",
    ),
    KnownModel(
        "TIGER-Lab/VLM2Vec-Qwen2VL-7B",
        "vlm2vec_qwen2vl",
        3584,
        _APACHE,
        32768,
        1280,
        base="Qwen/Qwen2-VL-7B-Instruct",
    ),
    KnownModel(
        "VLM2Vec/VLM2Vec-V2.0",
        "vlm2vec_v2",
        1536,
        _APACHE,
        32768,
        1280,
        base="Qwen/Qwen2-VL-2B-Instruct",
    ),
    KnownModel("OpenSearch-AI/Ops-MM-embedding-v1-2B", "ops_mm", 1536, _APACHE, 32768, 1280),
    KnownModel("OpenSearch-AI/Ops-MM-embedding-v1-7B", "ops_mm", 3584, _APACHE, 32768, 1280),
    KnownModel(
        "MrLight/dse-qwen2-2b-mrl-v1",
        "dse",
        1536,
        _APACHE,
        32768,
        2560,
        matryoshka_dims=(512, 1536),
        modalities=("text", "image"),
    ),
    KnownModel(
        "llamaindex/vdr-2b-multi-v1",
        "vdr",
        1536,
        _APACHE,
        32768,
        768,
        matryoshka_dims=_MRL_VDR,
        modalities=("text", "image"),
    ),
    KnownModel(
        "llamaindex/vdr-2b-v1",
        "vdr",
        1536,
        _APACHE,
        32768,
        768,
        matryoshka_dims=_MRL_VDR,
        modalities=("text", "image"),
    ),
    KnownModel(
        "marco/mcdse-2b-v1",
        "mcdse",
        1536,
        _APACHE,
        32768,
        960,
        matryoshka_dims=(256, 512, 768, 1024, 1536),
        modalities=("text", "image"),
    ),
    KnownModel("code-kunkun/LamRA-Ret", "lamra", 3584, "not stated", 32768, 16384),
    KnownModel("friedrichor/Unite-Base-Qwen2-VL-2B", "unite", 1536, _APACHE, 32768, 1280),
    KnownModel("friedrichor/Unite-Base-Qwen2-VL-7B", "unite", 3584, _APACHE, 32768, 1280),
    KnownModel("friedrichor/Unite-Instruct-Qwen2-VL-2B", "unite", 1536, _APACHE, 32768, 1280),
    KnownModel("friedrichor/Unite-Instruct-Qwen2-VL-7B", "unite", 3584, _APACHE, 32768, 1280),
    KnownModel(
        "nomic-ai/nomic-embed-multimodal-3b",
        "nomic_multimodal",
        2048,
        # Its base is licensed for research, which binds what is made of it.
        "Qwen Research, by its base",
        32768,
        768,
        modalities=("text", "image"),
        non_commercial=True,
        base="Qwen/Qwen2.5-VL-3B-Instruct",
    ),
    KnownModel(
        "nomic-ai/nomic-embed-multimodal-7b",
        "nomic_multimodal",
        3584,
        _APACHE,
        32768,
        768,
        modalities=("text", "image"),
        base="Qwen/Qwen2.5-VL-7B-Instruct",
    ),
    KnownModel("moca-embed/MoCa-Qwen25VL-3B", "moca", 2048, "MIT", 32768, 1024),
    KnownModel("moca-embed/MoCa-Qwen25VL-7B", "moca", 3584, "MIT", 32768, 1024),
    KnownModel("Qwen/Qwen3-VL-Embedding-2B", "qwen3_vl", 2048, _APACHE, 32768, 1800, _MRL_2048),
    KnownModel("Qwen/Qwen3-VL-Embedding-8B", "qwen3_vl", 4096, _APACHE, 32768, 1800, _MRL_4096),
    KnownModel("tencent/WeMM-Embedding-2B", "wemm", 2048, _APACHE, 262144, 16384, _MRL_2048),
    KnownModel("tencent/WeMM-Embedding-4B", "wemm", 2560, _APACHE, 262144, 16384, _MRL_2560),
    KnownModel("tencent/WeMM-Embedding-9B", "wemm", 4096, _APACHE, 262144, 16384, _MRL_4096),
    KnownModel("TIGER-Lab/VLM2Vec-LLaVaNext", "vlm2vec_llava_next", 4096, _APACHE, 32768, 2928),
    KnownModel("TIGER-Lab/VLM2Vec-Full", "vlm2vec_phi3v", 3072, _APACHE, 131072, 781),
    KnownModel("nvidia/MM-Embed", "mm_embed", 4096, "CC-BY-NC-4.0", 4096, 577, non_commercial=True),
    KnownModel("royokong/e5-v", "e5_v", 4096, "not stated", 8192, 2928),
)


def find_known(name: str) -> KnownModel | None:
    """Row of a checkpoint by its full name, or by the last part of it; None if unknown."""
    # The full name first: two owners may call a checkpoint alike.
    for model in KNOWN:
        if name == model.name:
            return model
    # A folder that a checkpoint was downloaded to usually keeps its name.
    last = name.rstrip("/").rpartition("/")[2]
    return next((m for m in KNOWN if m.name.rpartition("/")[2] == last), None)
