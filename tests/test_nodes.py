"""What a node holds, and how its page is called."""

import pytest

from mmrag.nodes import page_name


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        ({"page": 6, "label": "3"}, "page 6 (printed 3)"),
        ({"page": 2, "label": "ii"}, "page 2 (printed ii)"),
        ({"page": 6, "label": "6"}, "page 6"),
        ({"page": 6, "label": ""}, "page 6"),
        ({"page": 6}, "page 6"),
        ({"kind": "text"}, ""),
    ],
)
def test_a_page_is_called_by_its_number_and_its_printed_label(metadata, name) -> None:
    assert page_name(metadata) == name
