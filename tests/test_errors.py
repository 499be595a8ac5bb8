"""The errors themselves: what they carry, and whose fault they are."""

import errno
import pickle

import pytest

from mmrag.errors import ReadError, is_environment_error


def test_a_read_error_keeps_its_fields_over_a_process_boundary():
    error = pickle.loads(pickle.dumps(ReadError("lost", file="a.pdf", page=3, retry=True)))
    assert (str(error), error.file, error.page, error.retry) == (
        "a.pdf, page 3: lost",
        "a.pdf",
        3,
        True,
    )


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (PermissionError(errno.EACCES, "Permission denied"), True),
        (MemoryError(), True),
        (OSError("image file is truncated (3 bytes not processed)"), False),
        (ValueError("not an image"), False),
    ],
)
def test_which_errors_are_of_the_environment(error, expected):
    assert is_environment_error(error) is expected
