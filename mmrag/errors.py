"""Every error that mmrag raises on purpose.

``MMRagError``
  ├── ``ContentError``      a text or image that cannot be used
  ├── ``ReadError``         a file or page that cannot be read
  ├── ``ModelError``        a checkpoint or adapter that cannot be loaded exactly
  ├── ``CollectionError``   a collection that is locked, broken, or built otherwise
  │     └── ``MissingCollectionError``   there is none yet
  ├── ``EndpointError``     a remote server that refused, hung, or answered nonsense
  └── ``ConfigError``       options that contradict each other or are not known

Each message says what was wrong and what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial


class MMRagError(Exception):
    """Base of all errors that mmrag raises on purpose."""


class ContentError(MMRagError):
    """A text or image that cannot be embedded: broken, too large, or of an unknown type."""


class ReadError(MMRagError):
    """A file, or one page of it, that cannot be read.

    retry: whether the environment failed (time, memory, a full disk, a killed worker) and not
        the file, so that reading the same bytes again may succeed.
    """

    def __init__(
        self, message: str, *, file: str, page: int | None = None, retry: bool = False
    ) -> None:
        super().__init__(message)
        self.file = file
        self.page = page
        self.retry = retry

    def __reduce__(self) -> tuple[partial[ReadError], tuple[str]]:
        """Pickle with the fields that ``args`` does not hold."""
        # Exceptions are pickled by their args; Ray and worker processes send errors back.
        fields = partial(ReadError, file=self.file, page=self.page, retry=self.retry)
        return fields, (self.args[0],)

    def __str__(self) -> str:
        where = self.file if self.page is None else f"{self.file}, page {self.page}"
        return f"{where}: {self.args[0]}"


class ModelError(MMRagError):
    """A checkpoint or adapter that is unknown, incomplete, or of another architecture."""


class CollectionError(MMRagError):
    """A collection that is missing, locked by another process, or built with other settings."""


class MissingCollectionError(CollectionError):
    """No collection is there yet, or its making was cut short; indexing something makes it."""


class EndpointError(MMRagError):
    """A remote model server that cannot be reached or does not answer as its protocol says."""


class ConfigError(MMRagError):
    """Options that are unknown or contradict each other."""


def is_environment_error(error: BaseException) -> bool:
    """Whether an error says that the machine failed, and nothing about the bytes that were read."""
    # The operating system sets errno (no space left, input/output error, too many open files);
    # decoders that raise OSError for damaged data do not.
    return isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno is not None
    )


@contextmanager
def naming(item: str) -> Iterator[None]:
    """Begin the message of a ContentError with the item that it is about."""
    try:
        yield
    except ContentError as error:
        raise ContentError(f"{item}: {error}") from error
