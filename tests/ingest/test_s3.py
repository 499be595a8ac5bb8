"""``s3://`` by s3fs, against a server that speaks S3."""

import logging

import pytest
from fakes import FakeEmbedder

from mmrag.index import UniversalIndex

pytestmark = pytest.mark.slow


@pytest.fixture
def bucket(monkeypatch):
    """The file system of a server, with an empty bucket ``papers``."""
    s3fs = pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    # The variables that any program for S3 reads.
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ann")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "pw")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    try:
        system = s3fs.S3FileSystem(skip_instance_cache=True)
        system.mkdir("papers")
        yield system
        # What it keeps would outlive the server, which runs in this process.
        system.rm("papers", recursive=True)
    finally:
        server.stop()


def test_a_bucket_is_indexed_and_only_what_has_changed_is_fetched(bucket, tmp_path, monkeypatch):
    bucket.pipe("papers/a.txt", b"The pump stands in the cellar.")
    bucket.pipe("papers/deep/b.txt", b"The well is nine metres deep.")
    bucket.pipe("papers/deep/photo.raw", b"?")
    names = ["s3://papers/a.txt", "s3://papers/deep/b.txt"]
    with UniversalIndex(tmp_path / "library", FakeEmbedder(modalities=("text",))) as index:
        report = index.add("s3://papers")
        assert report.indexed == names
        assert "1 .raw" in "".join(report.notes)
        found = index.as_retriever(similarity_top_k=1).retrieve("How deep is the well?")
        assert found[0].metadata["file"] == names[1]

        opened = []
        whole = type(bucket).open
        monkeypatch.setattr(
            type(bucket),
            "open",
            lambda self, path, *a, **k: opened.append(path) or whole(self, path, *a, **k),
        )
        assert index.add("s3://papers").unchanged == names
        assert opened == []
        bucket.pipe("papers/a.txt", b"The pump stands in the garden.")
        bucket.rm("papers/deep/b.txt")
        report = index.add("s3://papers", prune=True)
        assert (report.replaced, report.removed) == (names[:1], names[1:])
        assert opened == ["papers/a.txt"]


def test_what_cannot_be_had_is_an_error_of_its_source(bucket, tmp_path):
    bucket.pipe("papers/a.txt", b"The pump stands in the cellar.")
    with UniversalIndex(tmp_path / "library", FakeEmbedder(modalities=("text",))) as index:
        report = index.add(["s3://papers/a.txt", "s3://papers/none.txt", "s3://no-such-bucket"])
    assert report.indexed == ["s3://papers/a.txt"]
    assert [error.file for error in report.errors] == [
        "s3://papers/none.txt",
        "s3://no-such-bucket",
    ]
