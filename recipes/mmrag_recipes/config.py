"""The options of every recipe; the docstring under a field is its help on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from mmrag.content import Modality
from mmrag_recipes.options import Options

PROMPTS = Path(__file__).parent / "prompts"
# Three by three: the nine pairs of the benchmark UMRB (GME, arXiv 2412.16855).
MODALITIES: tuple[Modality, ...] = ("text", "image", "fused")
PAIRS = tuple(f"{q}->{d}" for q in MODALITIES for d in MODALITIES)

# The tasks of OmniEval (arXiv 2412.13018), and questions that cannot be answered.
QUESTION_KINDS = {
    "extraction": "it asks for one fact that the page states.",
    "reasoning": "its answer does not stand on the page, but follows from several facts of it, "
    "such as a sum, a difference, a date or a condition that is met.",
    "comparison": "it compares something on the first page with something on the second, and "
    "needs both.",
    "summary": "it asks for an overview that takes most of the pages; the answer has three to six "
    "sentences.",
    "conversational": "a person would ask it in talking, in everyday words and not in those of "
    "the page.",
    "unanswerable": "it sounds as if the page answered it, and it does not: about something near "
    "what is said. Leave the answer and the nuggets empty.",
}


class DataConfig(Options):
    """One data set of a training mix; a plain string is its ``rows``."""

    rows: str
    """JSON lines as in mmrag_recipes.rows; the images are in ``images`` beside the file."""
    name: str = ""
    """Name in logs; by default the file's."""
    # Relative to the rows, so that 1 for all sets draws each row equally often.
    weight: float = Field(1.0, gt=0)
    """How often its batches come up, relative to the other data sets' rows."""
    # In a classification most rows of a batch share the right label: it would be its own negative.
    in_batch_negatives: bool = True
    """Whether documents of other rows serve as negatives. Off for classification."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"rows": value} if isinstance(value, str) else value


class LoraConfig(Options):
    """Low-rank adapters instead of full fine-tuning."""

    r: int = Field(8, ge=1)
    """Rank; GME found 8 best (arXiv 2412.16855, section 5)."""
    alpha: int = 16
    """Scale of the update is alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the adapters."""
    # The decoder alone: "visual" has names of its own, and stays as it was trained.
    targets: str = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    """Regular expression of the modules that get an adapter."""
    dora: bool = False
    """Learn magnitudes too (arXiv 2402.09353): slower, sometimes better."""
    # Of training alone: the exported weights are merged into the base as it was published.
    quantize: Literal["8bit", "4bit", "4bit-double"] | None = None
    """Hold the weights under the adapters in 8 or 4 bits; 4bit-double is QLoRA's way."""


class GroupConfig(Options):
    """Weights with a rate of their own."""

    prefix: str
    """How the names of the weights begin, such as ``visual`` or ``visual.merger``."""
    lr: float | None = Field(None, ge=0)
    """Peak learning rate; by default that of all."""
    weight_decay: float | None = Field(None, ge=0)
    """Weight decay; by default that of all."""


class CompatibleConfig(Options):
    """Training against the vectors of an old model, so that its collections stay searchable."""

    model: str | None = None
    """The old model, which does not train; by default the one that training starts from."""
    family: str | None = None
    """Recipe of the old model where it cannot be told from the checkpoint."""
    limits: dict[str, Any] = Field(default_factory=dict)
    """Limits of the old model's family; by default those of the run where the model is the same."""
    # The remaining share trains the new model on its own.
    weight: float = Field(0.5, gt=0, le=1)
    """Share of the loss that compares new vectors with old ones."""
    sides: Literal["queries", "both"] = "queries"
    """queries: new queries against old documents; both: also old queries against new documents."""


class FeaturesConfig(Options):
    """What a frozen vision tower gives for each image, kept on disk over passes and runs."""

    folder: str
    """Where; runs from the same checkpoint may share it."""
    # Images come in turn, pass by pass: replacing what is there by what comes would find nothing.
    gib: float = Field(20.0, gt=0)
    """Most that they take on disk, in GiB; images beyond that are computed every time."""


class MiningRules(Options):
    """Which candidates become negatives."""

    right: int = Field(4, ge=0)
    """Negatives per row of the positive's modality."""
    wrong: int = Field(2, ge=0)
    """Negatives per row of another modality."""
    depth: int = Field(100, ge=1)
    """Candidates looked at per query."""
    # NV-Retriever's TopK-PercPos (arXiv 2407.15831, section 3).
    max_ratio: float = 0.95
    """A right-modality candidate scores at most this share of the positive."""
    # The first ranks hold many documents that answer the query too and are not labelled as such
    # (MM-Embed, arXiv 2411.02571).
    rank_cut: int = Field(0, ge=0)
    """A right-modality candidate ranks below this many; MM-Embed takes 45 of 50."""
    # A copy of the answer as a negative would teach that the answer is wrong.
    duplicate_cosine: float = 0.97
    """Candidates this close to a positive are taken for copies of it."""
    sample: Literal["top", "random"] = "top"
    """``top`` takes the hardest of each pool, ``random`` any of them."""
    seed: int = 0
    """Of the random choice."""

    @model_validator(mode="after")
    def _candidates_remain(self) -> Self:
        if self.rank_cut >= self.depth:
            raise ValueError("rank_cut must be below depth, or no right-modality candidate is left")
        return self


class RefreshConfig(MiningRules):
    """Mining again during a run, with the model as it stands (ANCE, arXiv 2007.00808)."""

    every: int = Field(ge=1)
    """Steps between two searches; the first comes after this many."""


class RunConfig(Options):
    """What every training has: where it starts, its data, steps, rates, and what it keeps."""

    model: str
    """Checkpoint to start from: a folder, ``mmrag-nano``, or a name on the hub."""
    out: str
    """Folder of the run: options, logs, checkpoints, plot, and the final weights."""
    data: tuple[DataConfig, ...] = Field(min_length=1)
    """The mix: files of rows, or tables of options; each batch comes from one data set."""
    dry_run: bool = False
    """Show what would be trained on, and train nothing."""
    limits: dict[str, Any] = Field(default_factory=dict)
    """Limits of the family, such as {max_length = 1800, max_image_tokens = 1024}."""
    steps: int = Field(1000, ge=1)
    """Optimizer steps in all."""
    epochs: float = Field(0.0, ge=0)
    """Passes over all rows, in place of ``steps``; 0 counts steps."""
    batch_size: int = Field(64, ge=1)
    """Queries per step over all processes."""
    chunk: int = Field(0, ge=0)
    """GradCache: inputs run at a time with a graph; 0 runs the batch at once."""
    # Rows without mined negatives train with those of the batch alone.
    hard_negatives: int = Field(0, ge=0)
    """Mined negatives taken per row and step; they rotate over the passes."""
    lora: LoraConfig | None = None
    """Adapters; without this table all weights train."""
    freeze: tuple[str, ...] = ()
    """Prefixes of weights that stay as they are, such as ``visual``."""
    features: FeaturesConfig | None = None
    """Keep what a frozen vision tower gives on disk; without this table each step computes it."""
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate of AdamW."""
    groups: tuple[GroupConfig, ...] = ()
    """Weights with a rate of their own, such as tower, projector and decoder."""
    # All functions of the step alone, so that a resumed run goes on at the rate it would have had.
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate goes on after the warm-up: linear or cosine to zero, or constant."""
    warmup: float = Field(0.06, ge=0, le=1)
    """Share of the steps over which the rate rises."""
    weight_decay: float = Field(0.0, ge=0)
    """Of AdamW."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    seed: int = 0
    """Of batches, adapters and dropout."""
    # With torchrun each process takes the GPU of its own rank.
    device: str = "auto"
    """Where to train."""
    dtype: str = "auto"
    """Type of the weights under the adapters; full fine-tuning keeps float32 weights."""
    gradient_checkpointing: bool = False
    """Trade time for memory: activations are computed again."""
    shard: bool = False
    """Split weights, gradients and optimizer over the processes (FSDP2), without adapters."""
    evaluate: str = ""
    """Rows to evaluate on during training, metrics per modality pair; empty for none."""
    evaluate_every: int = Field(200, ge=1)
    """Steps between evaluations."""
    best_metric: str = "all/ndcg@10"
    """Which evaluation is best: its weights are the final ones."""
    patience: int = Field(0, ge=0)
    """Evaluations without improvement before the run stops; 0 runs all steps."""
    # 0, so that a run with broken numbers is noticed and not carried on.
    max_skipped_steps: int = Field(0, ge=0)
    """Steps in a row whose loss or gradient is not finite that are skipped before the run stops."""
    save_every: int = Field(200, ge=1)
    """Steps between checkpoints that a run can resume from."""
    keep: int = Field(2, ge=1)
    """Checkpoints that are kept, beside that of the best evaluation."""
    log_every: int = Field(10, ge=1)
    """Steps between lines of the log."""
    # tensorboard writes files alone; wandb sends values to a service, and is only used when asked
    # for.
    report: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where values go beside ``log.jsonl``."""

    @model_validator(mode="after")
    def _shards_all_weights(self) -> RunConfig:
        # Each process can hold adapters and a base that does not train, quantised if need be.
        if self.shard and self.lora:
            raise ValueError("shard is for training all weights: leave it or the table lora out")
        # A process that finds features runs no tower, and another may wait for its blocks.
        if self.shard and self.features:
            raise ValueError("shard and the table features do not go together: leave one out")
        return self


class TrainConfig(RunConfig):
    """Fine-tune an embedder: contrastive, with hard negatives, GradCache, LoRA and exact resume."""

    family: str | None = None
    """Recipe of the model where it cannot be told from the checkpoint."""
    # Low, since cosines of one model lie close together: at 1 the softmax would be nearly flat.
    temperature: float = Field(0.03, gt=0)
    """Of the softmax over cosines."""
    # No two cosines differ by more than 2, so that 2 leaves nothing out.
    false_negative_margin: float = 0.1
    """In-batch documents that beat the positive by more than this are left out; 2 keeps all."""
    matryoshka_dims: tuple[int, ...] = ()
    """Also train these prefixes of the vectors; the full width is always trained."""
    matryoshka_layers: tuple[tuple[int, int], ...] = ()
    """Also train vectors after fewer layers: pairs of layers and width, such as [[14, 768]]."""
    binary_weight: float = Field(0.0, ge=0, le=1)
    """Share of the loss on vectors cut to signs, for collections with quantization="binary"."""
    binary_queries: bool = True
    """Cut queries to signs too, as a search in binary codes does; else documents alone."""
    distil_weight: float = Field(0.0, ge=0, le=1)
    """Share of the loss that follows the teacher's scores in the rows."""
    distil_temperature: float = Field(1.0, gt=0)
    """Of the softmax over the teacher's scores."""
    compatible: CompatibleConfig | None = None
    """Keep vectors comparable with an old model's; without this table they drift away."""
    refresh: RefreshConfig | None = None
    """Replace the negatives by those that the model now confuses; without this table they stay."""

    @model_validator(mode="after")
    def _refresh_is_used(self) -> Self:
        if self.refresh and not self.hard_negatives:
            raise ValueError("refresh mines negatives, and hard_negatives = 0 takes none")
        if self.refresh and self.distil_weight:
            # The teacher judged the negatives of the rows, and not those that come later.
            raise ValueError("distil_weight needs scores, and refreshed negatives have none")
        return self


class WriterConfig(Options):
    """A language model that writes."""

    llm: str | None = None
    """Language model at an OpenAI-compatible server that writes."""
    base_url: str | None = None
    """The server, up to /v1; by default OPENAI_BASE_URL. The key is OPENAI_API_KEY."""
    local_llm: str | None = None
    """Language model to run here: a folder or a name on the hub."""
    concurrency: int = Field(8, ge=1)
    """Requests to the model at a time."""
    max_tokens: int = Field(400, ge=1)
    """Longest answer of the model, reasoning included."""
    # Most servers that speak OpenAI's protocol know the older name alone.
    max_tokens_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the server calls it; OpenAI's reasoning models take max_completion_tokens alone."""
    temperature: float | None = Field(None, ge=0)
    """Of the model; by default the server's."""


class SynthesizeConfig(WriterConfig):
    """Make training rows from your own files: GME's fused-modal pipeline."""

    positional: ClassVar[tuple[str, ...]] = ("paths",)

    paths: tuple[Path, ...] = Field(min_length=1)
    """Files and folders to read."""
    out: Path
    """Folder of the rows, their images and the report."""
    rows: int = Field(900, ge=1)
    """Rows to aim at, over all pairs, before the filter."""
    pairs: tuple[str, ...] = PAIRS
    """Modalities of query and document; of the nine of UMRB, all by default."""
    queries: int = Field(1, ge=1)
    """Queries per document and pair, at most. Few files need several."""
    # By page and not by row: other rows of the same page would give the answer away.
    dev: float = Field(0.0, ge=0, lt=1)
    """Share of the pages whose rows are held out in ``dev.jsonl``."""
    top_k: int = Field(20, ge=1)
    """A row is kept if its document is among this many for its query."""
    min_similarity: float = 0.2
    """Least cosine of an entity's name and the figure taken for it."""
    embedder: str = "mmrag-nano"
    """Model that filters rows and finds figures; a stronger one is a better judge."""
    image_model: str | None = None
    """Model at the same server that draws entities, instead of figures of the files."""
    prompts: Path = PROMPTS
    """Folder of prompt files."""
    languages: tuple[str, ...] = ()
    """Languages to write queries in, such as English French; by default the document's."""
    vary_instructions: bool = False
    """Give each row one of several wordings of its task."""
    license: str = ""
    """License of the files, written into every row."""
    seed: int = 0
    """Of the choice of documents."""
    prompt_price: float = Field(0.0, ge=0)
    """Price of a million prompt tokens, for the report."""
    completion_price: float = Field(0.0, ge=0)
    """Price of a million completion tokens, for the report."""


class DraftQuestionsConfig(WriterConfig):
    """Draft questions about your own files, for a person to check."""

    positional: ClassVar[tuple[str, ...]] = ("paths",)

    paths: tuple[Path, ...] = Field(min_length=1)
    """Files and folders to read."""
    out: Path
    """Folder of questions.jsonl and review.md."""
    rows: int = Field(100, ge=1)
    """Questions to aim at, over all kinds and files."""
    kinds: tuple[str, ...] = tuple(QUESTION_KINDS)
    """Kinds of questions; all by default."""
    document_kinds: tuple[str, ...] = (
        *("report", "manual", "article", "contract", "policy", "presentation", "form", "letter"),
    )
    """Kinds of documents to choose from; a file that is none of them is ``other``."""
    max_tokens: int = Field(1500, ge=1)
    """Longest answer of the model, reasoning included."""
    seed: int = 0
    """Of the choice of pages."""


class MineConfig(MiningRules):
    """Mine hard negatives with any embedder, over one corpus of all modalities."""

    positional: ClassVar[tuple[str, ...]] = ("rows",)

    rows: Path
    """Rows that get negatives."""
    out: Path
    """File of rows with negatives, to write."""
    model: str = "mmrag-nano"
    """Embedder that finds the negatives."""
    family: str | None = None
    """Recipe of the model where it cannot be told from the checkpoint."""
    corpus: tuple[Path, ...] = ()
    """Files and folders whose pages are candidates too, whether they have a row or not."""
    reranker: str | None = None
    """Reranker whose scores are written as the teacher's, in place of the embedder's cosines."""


class ExportConfig(Options):
    """Turn a finished run into a checkpoint folder that loads everywhere, and prove it."""

    positional: ClassVar[tuple[str, ...]] = ("run",)

    run: Path
    """Folder of a finished training run."""
    out: Path
    """Checkpoint folder to write."""
    # float16 has three more bits of precision than bfloat16, at the same size.
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Type of the weights."""
    # Beside the merged weights, which load without PEFT.
    adapter: Path | None = None
    """Also write the adapter of a LoRA run here, in PEFT's layout."""
    scores: tuple[Path, ...] = ()
    """JSON files of ``evaluate --json`` for the model card."""


class ConvertConfig(Options):
    """Turn training data of other forms into rows."""

    positional: ClassVar[tuple[str, ...]] = ("kind", "records")

    kind: Literal["mmeb", "mbeir", "swift", "rows", "pdfs"]
    """mmeb, mbeir, swift, rows that name files, or pdfs: questions about pages of PDFs."""
    records: Path
    """JSON lines, a JSON list or parquet; for mmeb also the folder of subsets as published."""
    out: Path
    """File of rows to write; images go to ``images`` beside it."""
    images: Path = Path()
    """Folder of the images and videos."""
    subsets: tuple[str, ...] = ()
    """Sub-folders to take, for mmeb; by default all."""
    pool: Path | None = None
    """Candidates, for mbeir."""
    instructions: Path | None = None
    """M-BEIR's query_instructions.tsv; without it queries have no instruction."""
    pdfs: Path = Path()
    """Folder of the PDFs, for pdfs."""
    items: Literal["image", "text", "fused"] = "image"
    """What a page of a PDF, or a frame or clip of a video, becomes."""
    clips: bool = False
    """Stretches of videos become clips in place of frames, in swift and rows, for models that take
    clips."""
    task: str | None = None
    """Name of the task; by default the file's."""
    license: str = ""
    """License of the PDFs."""

    @model_validator(mode="after")
    def _has_clips(self) -> Self:
        if self.clips and (self.kind not in ("swift", "rows") or self.items == "text"):
            raise ValueError("clips is for swift and rows, and for items = image or fused")
        return self


class EvaluateConfig(Options):
    """Retrieval metrics on rows, per modality pair and dimension."""

    positional: ClassVar[tuple[str, ...]] = ("rows",)

    rows: Path
    """Rows to rank for."""
    model: str = "mmrag-nano"
    """Embedder to evaluate."""
    family: str | None = None
    """Recipe of the model where it cannot be told from the checkpoint."""
    dims: tuple[int, ...] = ()
    """Dimensions to report; by default the full width."""
    as_json: bool = False
    """Print JSON instead of a table."""


class EvaluatePagesConfig(Options):
    """Page retrieval on a folder of PDFs: every view, BM25 and their fusion, side by side."""

    positional: ClassVar[tuple[str, ...]] = ("questions",)

    questions: Path
    """Questions, or rows that name their page."""
    pdfs: Path
    """Folder of the PDFs."""
    library: Path | None = None
    """Keep the index here."""
    model: str = "mmrag-nano"
    """Embedder to evaluate."""
    family: str | None = None
    """Recipe of the model where it cannot be told from the checkpoint."""
    as_json: bool = False
    """Print JSON instead of a table."""


class EvaluateAnswersConfig(Options):
    """How often the engine answers, and how often it should not have."""

    positional: ClassVar[tuple[str, ...]] = ("questions",)

    questions: Path
    """Questions with their pages."""
    pdfs: Path
    """Folder of the PDFs."""
    # Not optional: an engine that always answers would look perfect without them.
    foreign: Path
    """Questions about something else than the PDFs: JSON lines."""
    near: Path | None = None
    """Questions about what the PDFs could say and do not: JSON lines."""
    count: int = Field(120, ge=1)
    """How many of them are drawn."""
    seed: int = 0
    """Of the draw."""
    model: str = "mmrag-nano"
    """Embedder to answer with."""
    library: Path | None = None
    """Keep the index here."""


class CalibrateConfig(Options):
    """Measure the zero, the weights and the cosine of support of one embedder."""

    positional: ClassVar[tuple[str, ...]] = ("questions",)

    questions: Path
    """Questions with their answers and pages."""
    pdfs: Path
    """Folder of the PDFs."""
    model: str = "mmrag-nano"
    """Embedder to calibrate."""
    # Of wrong ones and not of right ones: a flag that is missing misleads, one too many only costs
    # a look.
    wrong_share: float = Field(0.05, gt=0, lt=1)
    """Share of wrong citations that may pass."""
    write: bool = False
    """Write what was measured into the checkpoint's mmrag.json."""
