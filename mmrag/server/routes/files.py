"""The files of a collection and images of their pages."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Path, Query, UploadFile
from fastapi.responses import Response

from mmrag.server.links import parse_boxes
from mmrag.server.pages import MAX_WIDTH, page_image_bytes
from mmrag.server.state import Server
from mmrag.server.uploads import store_upload

router = APIRouter(prefix="/api")

FileId = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$")]
InCollection = Annotated[str | None, Query(alias="collection")]


@router.get("/files")
async def list_files(server: Server, name: InCollection = None) -> dict[str, Any]:
    """The indexed files, those that could not be read, and the folders that are watched."""
    library = server.libraries.get(name)
    rows = await to_thread.run_sync(library.file_rows)
    return {
        "collection": library.name,
        "embedder": library.collection.settings.embedder,
        "files": rows,
        "unread": [
            {"file": file, "name": FilePath(file).name, "errors": errors}
            for file, errors in library.writer.unread().items()
        ],
        "watched": [folder.as_posix() for folder in library.watched],
    }


@router.post("/files", status_code=202)
async def upload(file: UploadFile, server: Server, name: InCollection = None) -> dict[str, Any]:
    """Take a file; it is indexed in the background as a job."""
    library, options = server.libraries.get(name), server.options
    limits = (options.max_upload_bytes, options.max_upload_pages)
    path = await to_thread.run_sync(
        store_upload, file.file, file.filename or "", library.uploads, *limits
    )
    return library.add(path).to_dict()


@router.delete("/files/{file_id}")
async def remove(file_id: FileId, server: Server, name: InCollection = None) -> dict[str, Any]:
    """Forget a file. Only a copy that was uploaded is deleted."""
    entry = await to_thread.run_sync(server.libraries.get(name).remove, file_id)
    return {"removed": entry.file}


@router.get("/jobs")
async def jobs(server: Server, name: InCollection = None) -> dict[str, Any]:
    """What is being indexed, and what was."""
    return {"jobs": [job.to_dict() for job in server.libraries.get(name).writer.jobs()]}


@router.get("/files/{file_id}/pages/{page}/image")
async def page_image(
    file_id: FileId,
    page: Annotated[int, Path(ge=1)],
    server: Server,
    name: InCollection = None,
    width: Annotated[int | None, Query(ge=16, le=MAX_WIDTH)] = None,
    mark: str | None = None,
) -> Response:
    """The image of a page, scaled down to ``width``, with the boxes of ``mark`` marked."""
    collection = server.libraries.get(name).collection
    boxes = parse_boxes(mark)
    data, kind = await to_thread.run_sync(page_image_bytes, collection, file_id, page, boxes, width)
    # The address holds the file's hash, so what it shows changes only with reading itself.
    return Response(data, media_type=kind, headers={"Cache-Control": "private, max-age=3600"})
