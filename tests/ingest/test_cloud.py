"""Files behind fsspec as sources: memory, archives, and drivers that are missing or break."""

import zipfile

import fsspec
import pytest
from fsspec.registry import known_implementations

from mmrag.errors import ReadError
from mmrag.ingest.sources import clean_url


@pytest.fixture
def store():
    """The memory of this process as a file system, with three files in a folder."""
    system = fsspec.filesystem("memory")
    system.pipe("/docs/a.txt", b"the words of a")
    system.pipe("/docs/deep/b.txt", b"the words of b")
    system.pipe("/docs/program.exe", b"MZ")
    system.pipe("/docs/.hidden.txt", b"hidden words")
    system.pipe("/other/c.txt", b"the words of c")
    yield system
    for root in ("/docs", "/other"):
        if system.exists(root):
            system.rm(root, recursive=True)


@pytest.fixture
def opened(monkeypatch):
    """Paths of the memory that were opened for reading."""
    paths = []
    original = fsspec.implementations.memory.MemoryFileSystem._open

    def note(self, path, mode="rb", **options):
        paths.extend([path] if mode == "rb" else [])
        return original(self, path, mode, **options)

    monkeypatch.setattr(fsspec.implementations.memory.MemoryFileSystem, "_open", note)
    return paths


def test_a_folder_is_read_to_any_depth_under_full_urls(index, store):
    report = index.add("memory://docs")
    assert report.indexed == ["memory://docs/a.txt", "memory://docs/deep/b.txt"]
    assert report.passed_over == ["memory://docs/program.exe"]
    assert "1 file of other types passed over: 1 .exe" in report.notes
    assert [entry.file for entry in index.files()] == report.indexed
    assert index.remove("memory://docs/deep/*") == ["memory://docs/deep/b.txt"]


def test_only_what_has_changed_is_fetched(index, store, opened):
    index.add("memory://docs/")
    assert sorted(opened) == ["/docs/a.txt", "/docs/deep/b.txt"]
    opened.clear()
    assert len(index.add("memory://docs/").unchanged) == 2
    assert opened == []
    store.pipe("/docs/a.txt", b"other words of a")
    report = index.add("memory://docs/")
    assert report.replaced == ["memory://docs/a.txt"]
    assert opened == ["/docs/a.txt"]


def test_what_is_gone_goes_with_prune_alone(index, store):
    index.add(["memory://docs", "memory://other/c.txt"])
    store.rm("/docs/a.txt")
    store.rm("/other/c.txt")
    assert index.add("memory://docs").removed == []
    assert index.add("memory://docs", prune=True).removed == ["memory://docs/a.txt"]
    store.rm("/docs/deep/b.txt")
    assert index.prune("memory://docs") == ["memory://docs/deep/b.txt"]
    # A single file that is gone was an error, and a folder that cannot be listed lacks nothing.
    report = index.add(["memory://other/c.txt", "memory://other"], prune=True)
    assert report.failed == ["memory://other/c.txt", "memory://other"]
    assert [entry.file for entry in index.files()] == ["memory://other/c.txt"]
    with pytest.raises(ReadError, match="no such file or folder"):
        index.prune("memory://other")


def test_a_single_file_is_named_by_its_url(index, store):
    assert index.add(["memory://docs/a.txt"]).indexed == ["memory://docs/a.txt"]
    report = index.add("memory://docs/program.exe")
    assert "not supported" in str(report.errors[0])


def test_files_in_an_archive(index, tmp_path):
    path = tmp_path / "all.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("in/a.txt", "the words of a")
        archive.writestr("b.txt", "the words of b")
        archive.writestr("photo.raw", "?")
    report = index.add(f"zip://::{path}")
    assert report.notes == ["1 file of other types passed over: 1 .raw"]
    assert report.indexed == [f"zip://b.txt::{path}", f"zip://in/a.txt::{path}"]
    assert index.add(f"zip://in::{path}").unchanged == [f"zip://in/a.txt::{path}"]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("in/a.txt", "other words")
    report = index.add(f"zip://::{path}", prune=True)
    assert report.replaced == [f"zip://in/a.txt::{path}"]
    assert report.removed == [f"zip://b.txt::{path}"]


def test_a_missing_driver_names_its_package(index, store, monkeypatch):
    monkeypatch.setitem(
        known_implementations,
        "vault",
        {"class": "no_such_package.Vault", "err": "Install vaultfs to access the vault"},
    )
    report = index.add(["vault://bucket/x", "gopher://example.org", "memory://docs/a.txt"])
    assert report.indexed == ["memory://docs/a.txt"]
    assert [str(error) for error in report.errors] == [
        "vault://bucket/x: vault:// needs another package: Install vaultfs to access the vault",
        "gopher://example.org: it cannot be read (ValueError: Protocol not known: gopher)",
    ]


def test_an_error_of_the_driver_is_of_one_file(index, store, monkeypatch):
    original = fsspec.implementations.memory.MemoryFileSystem._open

    def broken(self, path, *args, **options):
        if path.endswith("a.txt"):
            raise RuntimeError("the token has expired\nand more")
        return original(self, path, *args, **options)

    monkeypatch.setattr(fsspec.implementations.memory.MemoryFileSystem, "_open", broken)
    report = index.add("memory://docs")
    assert report.indexed == ["memory://docs/deep/b.txt"]
    assert [str(error) for error in report.errors] == [
        "memory://docs/a.txt: it cannot be read (RuntimeError: the token has expired)"
    ]


@pytest.mark.parametrize("url", ["zip://::https://example.org/a.zip", "local:///etc/passwd"])
def test_what_would_pass_the_checks_by_is_refused(index, url):
    assert index.add(url).failed == [url]


def test_passwords_are_left_out_of_names():
    assert clean_url("sftp://ann:pw@host/a.pdf") == "sftp://host/a.pdf"
    assert clean_url("zip://a.pdf::sftp://ann:pw@host/x.zip") == "zip://a.pdf::sftp://host/x.zip"
