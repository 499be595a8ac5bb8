"""Ingestion over many machines with Ray Data, into one collection on a Qdrant server.

Needs the ``ray`` extra. Files are the unit: each worker runs ``mmrag.ingest.run.ingest`` over its
share, so that a run can be killed and started again as on one machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmrag.embedders.base import Embedder
from mmrag.errors import ConfigError, ReadError
from mmrag.ingest.plan import note_passed_over
from mmrag.ingest.progress import IngestReport
from mmrag.ingest.run import ingest
from mmrag.ingest.sources import clean_url, list_folders
from mmrag.reading import ReadOptions, find_files, is_url
from mmrag.store.collection import Collection

FILES_PER_TASK = 8


@dataclasses.dataclass
class Work:
    """What workers are to index. files: paths and URLs. passed_over: files of other types."""

    files: list[str]
    errors: list[ReadError]
    passed_over: list[str]


class _Worker:
    """One Ray actor: a model and an open collection, kept over its batches of files."""

    def __init__(
        self,
        open_collection: Callable[[], Collection],
        load: Callable[[], Embedder],
        options: ReadOptions | None,
    ) -> None:
        self.collection = open_collection()
        self.embedder = load()
        self.options = options

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        files = [str(path) for path in batch["file"]]
        # One reader: Ray runs several actors on a machine already.
        report = ingest(files, self.collection, self.embedder, options=self.options, workers=1)
        return {"report": [report]}


def ingest_with_ray(
    paths: Sequence[str | Path],
    open_collection: Callable[[], Collection],
    load: Callable[[], Embedder],
    *,
    options: ReadOptions | None = None,
    workers: int = 2,
    gpus_per_worker: float = 0,
) -> IngestReport:
    """Index files with Ray workers, on this machine or on the cluster that Ray is connected to.

    Args:
        paths: files and folders that every machine sees under the same path, and URLs, which the
            workers fetch. A folder that a URL with a password names is the share of one worker.
        open_collection: opens the collection in a worker: one on a server, for the embedded
            engine locks its folder; with ``images_dir`` on storage that all machines share.
        load: loads the embedder in a worker, for instance
            ``lambda: load_embedder("Alibaba-NLP/gme-Qwen2-VL-2B-Instruct")``.
        gpus_per_worker: share of a GPU that each worker is given.

    Returns:
        The reports of all workers in one.

    Raises:
        ConfigError: Without Ray.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError("Ray is not installed: pip install 'mmrag[ray]'.") from error
    found = find_work(paths)
    data = ray.data.from_items([{"file": file} for file in found.files])
    reports = data.map_batches(
        _Worker,
        fn_constructor_args=(open_collection, load, options),
        batch_size=FILES_PER_TASK,
        concurrency=workers,
        num_gpus=gpus_per_worker or None,
    ).take_all()
    report = _together([row["report"] for row in reports], found.errors)
    note_passed_over(found.passed_over, report)
    return report


def find_work(paths: Sequence[str | Path]) -> Work:
    """The files below folders, of this file system and of others, and the URLs of web servers."""
    # Here, once: workers that looked for themselves would see a folder that changes meanwhile.
    files, errors, passed_over = find_files([path for path in paths if not is_url(path)])
    work = Work([str(path) for path in files], errors, [path.as_posix() for path in passed_over])
    for url in (str(path) for path in paths if is_url(path)):
        try:
            # The names in a listing have no passwords, and a worker needs them.
            listings = list_folders([url]) if clean_url(url) == url else []
        except ReadError as error:
            work.errors.append(error)
            continue
        work.files += [name for listing in listings for name in listing.files] or [url]
        work.passed_over += [name for listing in listings for name in listing.passed_over]
    return work


def _together(reports: Sequence[IngestReport], errors: Sequence[ReadError]) -> IngestReport:
    total = IngestReport(errors=list(errors), failed=[error.file for error in errors])
    for report in reports:
        for field in dataclasses.fields(IngestReport):
            value = getattr(report, field.name)
            if isinstance(value, list):
                getattr(total, field.name).extend(value)
            elif isinstance(value, dict):
                getattr(total, field.name).update(value)
        total.pages += report.pages
        total.nodes += report.nodes
        total.seconds = max(total.seconds, report.seconds)
    # Every worker notes the same missing extra.
    total.notes = list(dict.fromkeys(total.notes))
    return total
