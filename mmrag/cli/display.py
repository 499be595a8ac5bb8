"""What the command line shows to people, built with rich. Imports nothing heavy."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mmrag.lexical import Idf, sentences, terms

if TYPE_CHECKING:
    from mmrag.answering.context import Source
    from mmrag.answering.response import CitedResponse
    from mmrag.embedders.known import KnownModel
    from mmrag.ingest.progress import DescriptionReport, IngestReport
    from mmrag.nodes import Hit
    from mmrag.store.entries import FileEntry

# About three lines of a terminal.
_SNIPPET = 240  # characters


def clean(text: str) -> str:
    """Text of a document or a model, without characters that could steer a terminal."""
    # Escape sequences move the cursor or set the clipboard; characters of format (Cf) reverse the
    # order of what follows. The joiners U+200C and U+200D only shape letters.
    return "".join(
        c for c in text if c in "\n\t\u200c\u200d" or unicodedata.category(c) not in ("Cc", "Cf")
    )


def snippet(text: str, query: str) -> str:
    """The sentence nearest to the query, with those after it as far as there is room."""
    pieces = sentences(clean(text))
    if not pieces:
        return ""
    words = [terms(piece) for piece in pieces]
    idf, wanted = Idf(words), terms(query)
    # Of equals the first, as a reader would find it.
    best = max(range(len(pieces)), key=lambda i: (idf.coverage(wanted, words[i]), -i))
    shown = pieces[best]
    for piece in pieces[best + 1 :]:
        if len(shown) + len(piece) >= _SNIPPET:
            break
        shown += f" {piece}"
    return shown if len(shown) <= _SNIPPET else f"{shown[: _SNIPPET - 1].rstrip()}\u2026"


def place(file: str, page: str) -> Text:
    """``report.pdf  page 3``, or the file alone where ``page`` is empty."""
    name = Text.assemble((clean(file), "bold"))
    return name.append(f"  {clean(page)}", style="cyan") if page else name


def hits_view(hits: Sequence[Hit], query: str) -> RenderableType:
    """Each hit with its place, score, ranks and the words that match."""
    from mmrag.nodes import document_name, given_metadata, page_name

    rows: list[RenderableType] = []
    for n, hit in enumerate(hits, start=1):
        head = Text.assemble((f"{n:>2}  ", "dim"))
        head.append_text(place(document_name(hit.node), page_name(hit.metadata)))
        kind = hit.metadata.get("kind", "page")
        # What a hit is unless something else is said.
        unsaid = {"page": "", "text": "", "description": f"description by {hit.described_by}"}
        if label := unsaid.get(kind, kind):
            head.append(f"  {clean(label)}", style="magenta")
        ranks = "  ".join(f"{name} #{rank}" for name, rank in hit.ranks.items())
        head.append(f"  {hit.score or 0:.2f}", style="green")
        head.append(f"  {ranks}", style="dim")
        rows.append(head)
        for name, part in (hit.explanation or {}).items():
            line = f"{name}: rank {part.rank}, score {part.score:.3f}, credit {part.credit:.3f}"
            rows.append(Padding(Text(line, style="dim"), (0, 0, 0, 4), expand=False))
        given = given_metadata(hit.metadata)
        if given:
            told = "  ".join(f"{key}: {value}" for key, value in given.items())
            rows.append(Padding(Text(clean(told), style="dim"), (0, 0, 0, 4), expand=False))
        words = snippet(hit.text, query)
        shown = marked(words, query) if words else Text("(no text layer)", style="dim")
        rows.append(Padding(shown, (0, 0, 1, 4), expand=False))
        if hit.description and kind != "description":
            by = Text(f"description by {clean(str(hit.described_by))}: ", style="magenta")
            by.append_text(marked(snippet(hit.description, query), query))
            rows.append(Padding(by, (0, 0, 1, 4), expand=False))
    return Group(*rows)


def hit_row(hit: Hit, query: str) -> dict[str, Any]:
    """A hit for JSON."""
    from mmrag.nodes import document_name, explained, given_metadata, page_name

    values = hit.metadata
    described = {"description": hit.description, "described_by": hit.described_by}
    return (
        {
            "file": document_name(hit.node),
            "page": values.get("page"),
            "label": values.get("label"),
            "page_name": page_name(values),
            "kind": values.get("kind"),
            "score": round(hit.score or 0.0, 4),
            "snippet": snippet(hit.text, query),
            "box": hit.box or values.get("box"),
            "metadata": given_metadata(values),
        }
        | (described if hit.description else {})
        | explained(hit)
    )


def marked(text: str, query: str) -> Text:
    """Text with the words of the query in bold."""
    shown = Text(text)
    wanted = set(terms(query))
    start = 0
    for word in text.split():
        # From where the last word ended: a word may occur more than once.
        start = text.index(word, start)
        # By stem: a question of turbines marks turbine.
        if wanted & set(terms(word)):
            shown.stylize("bold yellow", start, start + len(word))
        start += len(word)
    return shown


def answer_view(response: CitedResponse) -> RenderableType:
    """The answer, under what is to be said about it."""
    answer = Text(clean(str(response)))
    if response.notice is None:
        return answer
    return Group(Text(response.notice, style="dim"), Text(), answer)


def sources_view(response: CitedResponse, saved: dict[int, str]) -> RenderableType:
    """The sources of an answer with their quotes, then what to be careful about."""
    rows: list[RenderableType] = []
    # Where to look on, with no claim that the answer is there.
    if not response.found:
        if response.sources:
            rows.append(Text("\nNearest pages", style="bold"))
            rows += [_source_line(source) for source in response.sources]
        return Group(*rows)
    rows.append(Text("\nSources", style="bold"))
    for source in response.cited:
        rows.append(_source_line(source))
        if source.quote:
            quote = Text(f"\u201c{clean(source.quote)}\u201d", style="italic")
            rows.append(Padding(quote, (0, 0, 0, 6), expand=False))
        if source.n in saved:
            saved_as = Text(f"saved as {clean(saved[source.n])}", style="dim")
            rows.append(Padding(saved_as, (0, 0, 0, 6), expand=False))
    if not any(source.cited for source in response.sources):
        rows.append(Text("The answer cites none of them.", style="yellow"))
    if response.problems:
        rows.append(Text("\nCheck before you trust it", style="bold yellow"))
        rows += [_bullet(problem) for problem in response.problems]
    return Group(*rows)


def plan_view(plan: Mapping[str, Any]) -> RenderableType:
    """The searches that led to an answer, and why they ended."""
    rows: list[RenderableType] = [Text("\nSearches", style="bold")]
    for search in plan["searches"]:
        found = ", ".join(clean(page) for page in search["pages"][:3]) or "nothing"
        rows.append(_bullet(f"{clean(search['question'])}: {found}"))
    calls = f"{plan['calls']} calls, {plan['seconds']:.1f} s"
    rows.append(Text(f"Ended after {calls}: {plan['stopped']}.", style="dim"))
    return Group(*rows)


def _source_line(source: Source) -> Text:
    mark = Text.assemble((f" [{source.n}]  ", "cyan"))
    return mark.append_text(place(source.file, source.page_name))


def _bullet(text: str) -> Padding:
    # A grid indents the lines of a long text behind the dash.
    table = Table.grid(padding=(0, 1))
    # A path that is longer than the line must not lose the name of its file.
    table.add_row("-", Text(clean(text), overflow="fold"))
    return Padding(table, (0, 0, 0, 1), expand=False)


def report_view(report: IngestReport) -> RenderableType:
    """What became of the files."""
    speed = report.pages / report.seconds if report.seconds else 0.0
    counts = {
        "indexed": len(report.indexed),
        "replaced": len(report.replaced),
        "incomplete": len(report.incomplete),
        "unchanged": len(report.unchanged),
        "moved": len(report.moved),
        "duplicates": len(report.duplicates),
        "removed": len(report.removed),
        "failed": len(report.failed),
    }
    parts = [f"{count} {name}" for name, count in counts.items() if count] or ["nothing to do"]
    rows: list[RenderableType] = [
        Text.assemble(("Files: ", "bold"), ", ".join(parts)),
        Text.assemble(
            ("Stored: ", "bold"),
            f"{report.pages} pages, {report.nodes} nodes in {report.seconds:.1f} s "
            f"({speed:.1f} pages/s)",
        ),
    ]
    if report.descriptions:
        rows.append(_cost(report.descriptions))
    rows += [_bullet(note) for note in report.notes]
    return Group(*rows)


def _cost(done: DescriptionReport) -> Text:
    """What describing images took."""
    tokens = "the server counts no tokens"
    if done.input_tokens is not None:
        tokens = f"{done.input_tokens} tokens in, {done.output_tokens} out"
    counts = f"{done.stored} by {clean(done.model)} ({done.reused} known, {done.failed} failed)"
    cost = f"{done.calls} calls, {tokens}, {done.seconds:.1f} s"
    return Text.assemble(("Descriptions: ", "bold"), f"{counts}; {cost}")


def failures_view(report: IngestReport) -> RenderableType:
    """What this run and earlier ones could not read, and why."""
    rows: list[RenderableType] = []
    if report.errors:
        rows.append(Text(f"\n{len(report.errors)} could not be read", style="bold red"))
        rows += [_bullet(str(error)) for error in report.errors]
    if report.known_errors:
        count = len(report.known_errors)
        rows.append(Text(f"\n{count} could not be read by earlier runs", style="bold yellow"))
        rows += [_bullet(error) for error in report.known_errors]
    return Group(*rows)


def files_view(files: Sequence[FileEntry], title: str) -> RenderableType:
    """The indexed files in a table, then what could not be read of them."""
    table = plain_table(title)
    table.add_column("file", overflow="fold", ratio=1)
    for name in ("pages", "nodes", "errors"):
        table.add_column(name, justify="right")
    for entry in files:
        count = Text(str(len(entry.errors)) if entry.errors else "", style="red")
        table.add_row(Text(clean(entry.file)), str(entry.pages), str(entry.nodes), count)
    rows: list[RenderableType] = [table]
    incomplete = [entry for entry in files if not entry.complete]
    if incomplete:
        rows.append(Text("\nIncomplete; index them again to read the rest", style="bold red"))
        rows += [_bullet(entry.file) for entry in incomplete]
    errors = [error for entry in files for error in entry.errors]
    if errors:
        rows.append(Text("\nWhat could not be read", style="bold red"))
        rows += [_bullet(error) for error in errors]
    return Group(*rows)


def models_view(models: Iterable[KnownModel]) -> RenderableType:
    """The known embedders: each name on a line of its own, to be copied whole."""
    rows: list[RenderableType] = []
    for model in models:
        license = Text(model.license)
        if model.non_commercial:
            license.append(" (non-commercial)", style="yellow")
        takes = ", ".join(kind for kind in model.modalities if kind != "fused")
        facts = f"{model.dim} dimensions, {takes}, context {model.context}, {model.family}, "
        # A name cut with an ellipsis could not be copied.
        rows.append(Text(model.name, style="bold", no_wrap=True, overflow="ignore"))
        rows.append(Padding(Text(facts).append_text(license), (0, 0, 0, 4), expand=False))
        if model.note:
            rows.append(Padding(Text(model.note), (0, 0, 0, 4), expand=False))
    return Group(*rows)


def plain_table(title: str) -> Table:
    """A table without lines."""
    return Table(
        # As wide as it is: rich would fold it to the width of the table.
        title=Text(clean(title), style="bold", no_wrap=True, overflow="ignore"),
        title_justify="left",
        header_style="dim",
        # Without lines, so that a table can be copied as text.
        box=None,
        pad_edge=False,
    )
