"""What lies over the pages of a PDF: form fields and comments; and the files attached to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pymupdf

from mmrag.reading.boxes import holds, moved
from mmrag.reading.characters import clean
from mmrag.reading.columns import Word
from mmrag.reading.options import Box

TICKED, UNTICKED = "\u2611", "\u2610"

_BUTTONS = (pymupdf.PDF_WIDGET_TYPE_CHECKBOX, pymupdf.PDF_WIDGET_TYPE_RADIOBUTTON)
_VALUES = (
    pymupdf.PDF_WIDGET_TYPE_TEXT,
    pymupdf.PDF_WIDGET_TYPE_COMBOBOX,
    pymupdf.PDF_WIDGET_TYPE_LISTBOX,
)
_PASSWORD = 1 << 13  # flag of a text field, PDF 32000-1, table 228
_HIDDEN = 2  # flag of an annotation, table 165
# A text box shows its text on the page; links, form fields and pop-up windows have none.
_SHOWN_ANYWAY = (
    pymupdf.PDF_ANNOT_FREE_TEXT,
    pymupdf.PDF_ANNOT_WIDGET,
    pymupdf.PDF_ANNOT_POPUP,
    pymupdf.PDF_ANNOT_LINK,
)


def with_fields(page: Any, words: Sequence[Word]) -> list[Word]:
    """The words of a page with ticked boxes as marks and the values of fields that show none."""
    words, shown = list(words), tuple(page.rotation_matrix)
    block = max((word.block for word in words), default=-1)
    for widget in page.widgets():
        block += 1
        box = moved(widget.rect, shown)
        if widget.field_type in _BUTTONS:
            # The tick is a letter of a symbol font: it is not among the words that one reads.
            words = [word for word in words if not holds(box, word.box)]
            words.append(Word(TICKED if _is_ticked(page, widget) else UNTICKED, box, block, 0))
            continue
        is_secret = widget.field_flags & _PASSWORD
        has_value = widget.field_type in _VALUES and not is_secret
        # Most programs draw the value on the page as well; only a value that is not seen is added.
        if has_value and not any(holds(box, word.box) for word in words):
            words += [Word(value, box, block, 0) for value in _value(widget).split()]
    return words


def _is_ticked(page: Any, widget: Any) -> bool:
    """Whether a check box or radio button is on, by the state that is drawn."""
    # "AS" is what is drawn. The field's value is the state of its whole group of radio buttons.
    kind, state = page.parent.xref_get_key(widget.xref, "AS")
    if kind == "name":
        return bool(state != "/Off")
    return widget.field_value not in (None, "", "Off", False)


def _value(widget: Any) -> str:
    value = widget.field_value
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value or "")


@dataclass(frozen=True, slots=True)
class Comment:
    """A note on a page. box: of what it is about, in points of the page as shown."""

    text: str
    box: Box


def comments(page: Any) -> Iterator[Comment]:
    """The notes, highlights with a comment and the like of a page, each marked as one."""
    shown = tuple(page.rotation_matrix)
    for annotation in page.annots() or ():
        if annotation.type[0] in _SHOWN_ANYWAY or annotation.flags & _HIDDEN:
            continue
        words = " ".join(clean(annotation.info.get("content") or "").split())
        if words:
            author = " ".join(clean(annotation.info.get("title") or "").split())
            mark = f"Comment by {author}" if author else "Comment"
            yield Comment(f"{mark}: {words}", moved(annotation.rect, shown))


def attachments(document: Any) -> list[str]:
    """Names of the files that are attached to a document; see ``attached_here`` for its pages."""
    names: list[str] = []
    with contextlib.suppress(Exception):  # a broken list of names costs the names
        names = [document.embfile_info(i)["ufilename"] for i in range(document.embfile_count())]
    return _cleaned(names)


def attached_here(page: Any) -> list[str]:
    """Names of the files that are attached to places on a page."""
    names = []
    for annotation in page.annots(types=[pymupdf.PDF_ANNOT_FILE_ATTACHMENT]) or ():
        # The engine's own "file_info" takes the bytes of names beyond ASCII for letters.
        keys = (page.parent.xref_get_key(annotation.xref, f"FS/{key}") for key in ("UF", "F"))
        names += [name for kind, name in keys if kind == "string" and name][:1]
    return _cleaned(names)


def _cleaned(names: Sequence[str]) -> list[str]:
    return [name for each in names if (name := " ".join(clean(each).split()))]


def is_dynamic_form(document: Any) -> bool:
    """Whether the pages of a PDF are a placeholder for an XFA form that Adobe's Reader builds."""
    catalog = document.pdf_catalog()
    if document.xref_get_key(catalog, "AcroForm/XFA")[0] == "null":
        return False
    if document.xref_get_key(catalog, "NeedsRendering")[1] == "true":
        return True
    first = document[0]
    # The placeholder is in many languages, and names the program in all of them.
    text = first.get_text()
    return first.first_widget is None and ("Adobe Reader" in text or "Acrobat" in text)
