"""Reading: PDF, image and text files become LlamaIndex nodes, page by page.

PyMuPDF is used here alone, in worker processes that a broken file may hang or crash.
"""

from mmrag.reading.files import file_sha256, find_files, node_id
from mmrag.reading.options import Box, ReadOptions
from mmrag.reading.reader import ReadPage, count_pages, locate_quote, read_file, save_marked_page

__all__ = [
    "Box",
    "ReadOptions",
    "ReadPage",
    "count_pages",
    "file_sha256",
    "find_files",
    "locate_quote",
    "node_id",
    "read_file",
    "save_marked_page",
]
