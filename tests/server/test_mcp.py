"""The tools, asked by the official client: in process, over stdio, and over HTTP."""

import base64
import io
import json
import os
import sys
from pathlib import Path

import httpx2
import pytest
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from PIL import Image

from mmrag.server.mcp_tools import create_mcp

HERE = Path(__file__).parent


@pytest.fixture
def server(opened):
    return create_mcp(opened())


def text_of(result):
    return "\n".join(block.text for block in result.content if block.type == "text")


def links_of(result):
    return [block for block in result.content if block.type == "resource_link"]


async def test_the_tools_describe_themselves(server):
    async with Client(server) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    assert set(tools) == {"search", "ask", "get_page", "list_files"}
    for tool in tools.values():
        assert tool.description
        assert tool.annotations.read_only_hint
        assert all("description" in each for each in tool.input_schema["properties"].values())


async def test_search_links_to_pages_that_can_be_read(server):
    async with Client(server) as client:
        found = await client.call_tool("search", {"query": "dental cleaning", "top_k": 1})
        assert "plans.pdf, page 2" in text_of(found)
        (link,) = links_of(found)
        assert link.name == "plans.pdf, page 2"
        (content,) = (await client.read_resource(str(link.uri))).contents
    image = Image.open(io.BytesIO(base64.b64decode(content.blob)))
    assert image.width == 1100


async def test_an_answer_cites_pages_and_marks_the_evidence(server):
    async with Client(server) as client:
        question = {"question": "Who gets an eye examination a year?"}
        answer = await client.call_tool("ask", question)
        assert "one eye examination" in text_of(answer)
        assert "[1] plans.pdf, page 1 (file_id " in text_of(answer)
        (link,) = links_of(answer)
        file_id, page, mark = str(link.uri).split("/")[-3:]
        body = {"file_id": file_id, "page": int(page)}
        plain = await client.call_tool("get_page", body)
        marked = await client.call_tool("get_page", {**body, "mark": mark.replace("%2C", ",")})
    assert [block.type for block in marked.content] == ["image"]
    assert marked.content[0].mime_type == "image/webp"
    assert marked.content[0].data != plain.content[0].data


async def test_files_and_collections(server):
    async with Client(server) as client:
        listed = await client.call_tool("list_files", {"collection": "boilers"})
    rows = json.loads(text_of(listed))
    assert [(row["file"], row["pages"]) for row in rows["files"]] == [("boilers.pdf", 1)]
    assert rows["collections"] == ["plans", "boilers"]


@pytest.mark.parametrize(
    ("tool", "arguments", "told"),
    [
        ("search", {"query": "x", "collection": "none"}, "plans, boilers"),
        ("search", {"query": "  "}, "empty"),
        ("get_page", {"file_id": "f" * 64, "page": 1}, "no image"),
        ("get_page", {"file_id": "../../etc", "page": 1}, "no image"),
        ("get_page", {"file_id": "f" * 64, "page": 1, "mark": "a"}, "mark"),
        ("ask", {}, "question"),
    ],
)
async def test_failures_are_told_to_the_assistant(server, tool, arguments, told):
    async with Client(server) as client:
        result = await client.call_tool(tool, arguments)
    assert result.is_error
    assert told in text_of(result)


async def test_nothing_found_is_said(server):
    async with Client(server) as client:
        found = await client.call_tool("search", {"query": "eye", "files": ["none.pdf"]})
    assert text_of(found) == "Nothing found."


async def test_over_stdio(built):
    env = {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])}
    arguments = [str(HERE / "serve_fake.py"), "mcp", "-c", str(built / "plans")]
    command = StdioServerParameters(command=sys.executable, args=arguments, env=env)
    async with Client(command) as client:
        found = await client.call_tool("search", {"query": "dental", "top_k": 1})
    assert "plans.pdf, page 2" in text_of(found)


async def test_over_http_with_a_key(listening):
    key = "a-long-random-key"
    url = listening(api_keys=(key,)) + "/mcp"
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx2.AsyncClient(headers=headers) as http:
        assert (await httpx2.AsyncClient().post(url, json={})).status_code == 401
        async with Client(streamable_http_client(url, http_client=http)) as client:
            found = await client.call_tool("search", {"query": "dental", "top_k": 1})
    assert "plans.pdf, page 2" in text_of(found)
