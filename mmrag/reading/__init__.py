"""Reading: PDF, image and text files become LlamaIndex nodes, page by page.

Files are opened in worker processes only, which a broken one may hang or crash. PyMuPDF is used
here alone.
"""

from mmrag.reading.clips import discard, read_clip
from mmrag.reading.files import FoundFiles, file_sha256, find_files, is_url, node_id
from mmrag.reading.options import (
    Box,
    Figure,
    OcrMode,
    PageRecord,
    Passage,
    Problem,
    ReadOptions,
)
from mmrag.reading.pagewords import words_path
from mmrag.reading.reader import (
    ReadPage,
    check_original,
    count_pages,
    locate_quote,
    read_file,
    save_marked_page,
)

__all__ = [
    "Box",
    "Figure",
    "FoundFiles",
    "OcrMode",
    "PageRecord",
    "Passage",
    "Problem",
    "ReadOptions",
    "ReadPage",
    "check_original",
    "count_pages",
    "discard",
    "file_sha256",
    "find_files",
    "is_url",
    "locate_quote",
    "node_id",
    "read_clip",
    "read_file",
    "save_marked_page",
    "words_path",
]
