"""Workers of Ray index all files, report what they could not read, and share nothing else."""

import copy
import os
import pickle
import zipfile
from pathlib import Path

import fsspec
import pymupdf
import pytest

from mmrag.errors import ReadError
from mmrag.ingest.progress import IngestReport
from mmrag.ingest.ray import _together, find_work
from mmrag.ingest.run import reading_settings
from mmrag.reading import ReadOptions
from mmrag.store.collection import Collection, CollectionSettings


def test_reading_errors_travel_between_processes():
    error = ReadError("it is broken", file="a.pdf", page=3)
    for other in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert (str(other), other.file, other.page) == (str(error), "a.pdf", 3)


@pytest.mark.slow
def test_ray_workers_index_every_file_once(tmp_path):
    ray = pytest.importorskip("ray")
    from fakes import FakeEmbedder

    from mmrag.ingest.ray import ingest_with_ray

    papers = tmp_path / "papers"
    papers.mkdir()
    for number in range(20):
        pdf = pymupdf.open()
        pdf.new_page().insert_text((72, 72), f"This is paper number {number}.")
        pdf.save(papers / f"{number:02}.pdf")
    (papers / "broken.pdf").write_bytes(b"%PDF-1.7 nothing")

    def open_collection() -> Collection:
        # The embedded engine stands for the server here: one folder for each worker.
        embedder = FakeEmbedder()
        settings = CollectionSettings(
            embedder.name,
            embedder.fingerprint,
            embedder.dim,
            ("image", "text"),
            reading_settings(ReadOptions()),
        )
        return Collection.open(tmp_path / f"library-{os.getpid()}", settings=settings)

    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    archive = tmp_path / "more.zip"
    with zipfile.ZipFile(archive, "w") as more:
        more.writestr("deep/20.txt", "A note that lies in an archive.")
        more.writestr("photo.raw", "?")
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env=environment, log_to_driver=False)
    try:
        report = ingest_with_ray(
            [papers, f"zip://::{archive}"], open_collection, FakeEmbedder, workers=2
        )
    finally:
        ray.shutdown()
    assert len(report.indexed) == 21
    assert report.pages == 21
    assert "1 .raw" in "".join(report.notes)
    assert [Path(error.file).name for error in report.errors] == ["broken.pdf"]
    stored = []
    for folder in tmp_path.glob("library-*"):
        with Collection.open(folder) as collection:
            stored += [Path(entry.file).name for entry in collection.files()]
    names = [*(f"{number:02}.pdf" for number in range(20)), f"20.txt::{archive}"]
    assert sorted(stored) == sorted(Path(name).name for name in names)


def test_the_work_is_found_once_and_urls_go_to_the_workers(tmp_path):
    (tmp_path / "a.txt").write_text("The pump was oiled.")
    for name in ("b.txt", "deep/c.txt"):
        fsspec.filesystem("memory").pipe(f"/papers/{name}", b"The pump was oiled again.")
    web, secret = "https://example.org/a.pdf", "sftp://ann:pw@host/papers"
    work = find_work([tmp_path, web, "memory://papers", secret, "memory://none"])
    stored = ["memory://papers/b.txt", "memory://papers/deep/c.txt"]
    assert work.files == [str(tmp_path / "a.txt"), web, *stored, secret]
    assert [error.file for error in work.errors] == ["memory://none"]


def test_files_that_are_not_there_are_failed():
    missing = ReadError("there is no such file", file="gone.pdf")
    total = _together([IngestReport(indexed=["a.txt"]), IngestReport(failed=["b.txt"])], [missing])
    assert total.indexed == ["a.txt"]
    assert total.failed == ["gone.pdf", "b.txt"]
    assert total.errors == [missing]
