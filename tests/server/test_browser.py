"""The web page in a real Chromium. Skipped where there is none."""

import base64
import shutil

import pytest

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
KEY = "a-long-random-key"
EXPECTED = (
    "status of 401 (Unauthorized)",
    "status of 415 (Unsupported Media Type)",
    "status of 429 (Too Many Requests)",
)


def enter(page, field: str, text: str) -> None:
    page.fill(field, text)
    page.press(field, "Enter")


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium (apt-get install chromium)")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def url(listening):
    return listening(api_keys=(KEY,))


@pytest.fixture
def page(browser, url):
    """The page, open with a key; what it complains of fails the test at the end."""
    opened = browser.new_page(viewport={"width": 1440, "height": 900})
    opened.set_default_timeout(20_000)
    wrong = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on(
        "request",
        lambda request: (
            request.url.startswith((url, "data:", "blob:"))
            or wrong.append(f"asked for {request.url}")
        ),
    )
    opened.on(
        "console",
        lambda said: (
            said.type == "error" and not said.text.endswith(EXPECTED) and wrong.append(said.text)
        ),
    )
    opened.goto(url)
    enter(opened, "#key", "wrong")
    opened.wait_for_selector("#login-error:not(:empty)")
    enter(opened, "#key", KEY)
    opened.wait_for_selector("#ask-about:not(:empty)")
    yield opened
    opened.close()
    assert not wrong


def test_an_answer_and_its_page_by_keyboard_alone(page):
    page.keyboard.type("Who gets an eye examination a year?")
    page.keyboard.press("Enter")
    page.wait_for_selector(".answer .cite")
    assert "one eye examination" in page.inner_text(".answer")
    page.focus(".answer .cite")
    page.keyboard.press("Enter")
    image = page.wait_for_selector("#viewer-page img")
    assert "evidence marked" in image.get_attribute("alt")
    assert page.inner_text("#page-number") == "1 / 2"
    width = image.bounding_box()["width"]
    page.keyboard.press("+")
    assert image.bounding_box()["width"] > width * 1.2
    page.keyboard.press("PageDown")
    page.wait_for_selector("#viewer-page img[alt='Page 2 of plans.pdf']")
    page.keyboard.press("Escape")
    assert page.is_hidden("#viewer")
    assert page.evaluate("document.activeElement.className") == "cite"


def test_search_another_collection_and_a_link_to_a_page(page, url):
    page.select_option("#collection", "boilers")
    page.click("nav a[data-view=search]")
    enter(page, "#words", "boiler exploded")
    hit = page.wait_for_selector("#hits .hit")
    assert "boilers.pdf, page 1" in hit.inner_text()
    assert hit.query_selector("b").inner_text().lower() == "boiler"
    hit.click()
    page.wait_for_selector("#viewer-page img")
    source = page.get_attribute("#viewer-page img", "src")
    file_id = source.split("/")[3]
    page.goto("about:blank")
    page.goto(f"{url}/#view?collection=boilers&file={file_id}&page=1&mark=72,72,300,90")
    page.wait_for_selector("#viewer-page img[alt*='evidence marked']")
    assert page.input_value("#collection") == "boilers"


@pytest.mark.parametrize("leave", ["Back", "Escape"])
def test_on_a_phone_back_closes_a_page_and_keeps_the_answer(page, leave):
    page.set_viewport_size({"width": 360, "height": 640})
    page.click("nav a[data-view=search]")
    page.click("nav a[data-view=ask]")
    enter(page, "#question", "Who gets an eye examination a year?")
    page.wait_for_selector(".foot > *")
    for _ in range(2):
        page.click(".answer .cite")
        page.wait_for_selector("#viewer-page img")
        if leave == "Back":
            page.go_back()
        else:
            page.keyboard.press("Escape")
        page.wait_for_selector("#viewer", state="hidden")
        assert page.is_visible(".answer")
        assert page.evaluate("document.activeElement.className") == "cite"
    page.go_back()
    page.wait_for_selector("#search", state="visible")


def test_files_are_added_and_removed(page, tmp_path, built):
    name = f"<b>pump & {tmp_path.name}.txt"
    (tmp_path / name).write_text("The pump was oiled <img src=x onerror=alert(1)> in spring.")
    page.click("nav a[data-view=files]")
    page.set_input_files("#upload", str(tmp_path / name))
    row = page.wait_for_selector(f"#file-list li:has-text('{tmp_path.name}')")
    assert row.query_selector(".name").inner_text() == name
    page.click("nav a[data-view=search]")
    enter(page, "#words", "pump oiled")
    page.click(f"#hits .hit:has-text('{tmp_path.name}')")
    assert "<img src=x" in page.inner_text("#viewer-page .passage")
    page.keyboard.press("Escape")
    page.click("nav a[data-view=files]")
    remove = f"button[aria-label='Remove {name}']"
    page.click(remove)
    page.click(remove)
    page.wait_for_selector(f"#file-list li:has-text('{tmp_path.name}')", state="detached")
    uploads = built / "plans" / "uploads"
    assert not any(uploads.iterdir())


def test_a_question_in_hebrew_runs_from_the_right(page):
    enter(page, "#question", "\u05de\u05d4 \u05d2\u05d5\u05d1\u05d4?")
    page.wait_for_selector(".foot")
    first, last, right = page.evaluate(
        """() => {
            const text = document.querySelector(".question p").firstChild;
            const place = (from) => {
                const range = document.createRange();
                range.setStart(text, from);
                range.setEnd(text, from + 1);
                return range.getBoundingClientRect();
            };
            const line = text.parentElement.getBoundingClientRect();
            return [place(0).right, place(text.length - 1).right, line.right];
        }"""
    )
    assert last < first  # the question mark stands on the left
    assert right - first < 2  # and the line begins at the right edge


def test_an_image_goes_with_a_question(page, tmp_path):
    from fakes import make_image

    page.set_input_files("#ask input[type=file]", str(make_image(tmp_path / "a.png")))
    page.wait_for_selector("#ask .chip img")
    page.click("#ask .send")
    page.wait_for_selector(".question img")
    page.wait_for_selector(".foot > *")


def test_a_conversation_outlasts_a_reload_until_a_new_one_begins(page):
    enter(page, "#question", "Who gets an eye examination a year?")
    page.wait_for_selector(".foot > *")
    said = page.inner_text(".answer")
    page.reload()
    page.wait_for_selector(".foot > *")
    assert page.inner_text(".answer") == said
    page.click(".answer .cite")
    page.wait_for_selector("#viewer-page img[alt*='evidence marked']")
    page.keyboard.press("Escape")
    with page.expect_request("**/api/ask") as asked:
        enter(page, "#question", "And who gets glasses?")
    history = asked.value.post_data_json["history"]
    assert history[0]["content"] == "Who gets an eye examination a year?"
    assert "eye examination" in history[1]["content"]
    page.wait_for_selector("article:nth-child(2) .foot > *")
    page.click("#new-chat")
    page.reload()
    page.wait_for_selector("#ask-about:not(:empty)")
    assert page.query_selector("article") is None


def test_a_kept_conversation_that_cannot_be_shown_blocks_nothing(page):
    page.evaluate("sessionStorage.setItem('mmrag-conversation', '[{\"question\": \"Why?\"}]')")
    page.reload()
    page.wait_for_selector("[role=alert]:has-text('cannot be shown again')")
    with page.expect_request("**/api/ask") as asked:
        enter(page, "#question", "Who gets an eye examination a year?")
    assert asked.value.post_data_json["history"] == []
    page.wait_for_selector(".foot h2")


def test_a_full_storage_costs_no_answer(page):
    """The oldest turns are left out of what is kept for a reload."""
    enter(page, "#question", "Who gets an eye examination a year?")
    page.wait_for_selector("article:nth-child(1) .foot h2")
    page.evaluate(
        """() => {
            const keep = Storage.prototype.setItem;
            Storage.prototype.setItem = function (key, value) {
                // What Chromium throws at about 5 MB.
                if (JSON.parse(value).length > 1) throw new DOMException("", "QuotaExceededError");
                keep.call(this, key, value);
            };
        }"""
    )
    enter(page, "#question", "Which plan covers dental cleaning?")
    page.wait_for_selector("article:nth-child(2) .foot h2")
    assert page.query_selector("article [role=alert]") is None
    kept = page.evaluate("JSON.parse(sessionStorage.getItem('mmrag-conversation'))")
    assert [turn["question"] for turn in kept] == ["Which plan covers dental cleaning?"]


def test_a_question_that_failed_can_be_asked_again(page, tmp_path):
    from fakes import make_image

    busy = {"status": 429, "json": {"error": {"message": "The server is busy."}}}
    page.route("**/api/ask", lambda route: route.fulfill(**busy))
    page.set_input_files("#ask input[type=file]", str(make_image(tmp_path / "a.png")))
    page.wait_for_selector("#ask .chip img")
    enter(page, "#question", "Who gets an eye examination a year?")
    page.wait_for_selector("[role=alert]:has-text('The server is busy.')")
    assert page.input_value("#question") == "Who gets an eye examination a year?"
    page.unroute("**/api/ask")
    with page.expect_request("**/api/ask") as asked:
        page.press("#question", "Enter")
    body = asked.value.post_data_json
    assert body["image"].startswith("data:image/png;base64,") and body["history"] == []
    page.wait_for_selector(".foot h2")
    assert page.input_value("#question") == "" and page.is_hidden("#ask .chip")


def drop(page, target, path, kind):
    """Drop a file on an element, as a browser does when one is dragged onto it."""
    data = base64.b64encode(path.read_bytes()).decode()
    held = page.evaluate_handle(
        """([data, name, type]) => {
          const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
          const held = new DataTransfer();
          held.items.add(new File([bytes], name, { type }));
          return held;
        }""",
        [data, path.name, kind],
    )
    page.dispatch_event(target, "dragenter", {"dataTransfer": held})
    assert "over" in page.get_attribute(target, "class")
    page.dispatch_event(target, "drop", {"dataTransfer": held})
    assert "over" not in (page.get_attribute(target, "class") or "")


def test_an_image_is_dropped_to_search_by_it(page, tmp_path):
    from fakes import make_image

    page.click("nav a[data-view=search]")
    (tmp_path / "note.txt").write_text("no image")
    drop(page, "#search", tmp_path / "note.txt", "text/plain")
    drop(page, "#search", make_image(tmp_path / "a.png"), "image/png")
    page.wait_for_selector("#search .chip img")
    assert "a.png" in page.inner_text("#search .chip")
    page.click("#search .send")
    page.wait_for_selector("#hits .hit")


def test_a_file_is_dropped_to_add_it(page, tmp_path):
    page.click("nav a[data-view=files]")
    path = tmp_path / f"{tmp_path.name}.txt"
    path.write_text("The pump was dropped.")
    drop(page, "#drop", path, "text/plain")
    page.wait_for_selector(f"#file-list li:has-text('{path.name}')")


@pytest.mark.parametrize("width", [360, 800])
def test_what_is_wrong_with_a_file_stands_below_its_name(page, tmp_path, width):
    page.set_viewport_size({"width": width, "height": 740})
    page.click("nav a[data-view=files]")
    (tmp_path / "film.xyz").write_text("no such kind")
    page.set_input_files("#upload", str(tmp_path / "film.xyz"))
    error = page.wait_for_selector("#jobs .error")
    assert "unsupported file type" in error.inner_text()
    name, error = page.query_selector("#jobs .name").bounding_box(), error.bounding_box()
    assert name["height"] < 40 and error["y"] >= name["y"] + name["height"]
    page.click("#jobs button[aria-label=Dismiss]")
    page.wait_for_selector("#jobs li", state="detached")


@pytest.mark.parametrize("width", [360, 800, 1440])
def test_nothing_is_wider_than_the_window(page, width):
    page.set_viewport_size({"width": width, "height": 740})
    enter(page, "#question", "Who gets an eye examination a year? " + "x" * 300)
    page.wait_for_selector(".foot > *")
    for view in ("ask", "search", "files"):
        page.click(f"nav a[data-view={view}]")
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_words_of_a_search_fit_a_phone(page):
    page.set_viewport_size({"width": 360, "height": 640})
    page.click("nav a[data-view=search]")
    field = page.wait_for_selector("#words")
    page.fill("#words", field.get_attribute("placeholder"))
    assert field.evaluate("(field) => field.scrollWidth <= field.clientWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1440])
def test_axe_finds_nothing_in_any_view(page, width, scheme):
    """Contrast, names, roles and order, as WCAG asks, in each view and with a page open."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()

    def check(what):
        found = axe.run(page)
        assert not found.response["violations"], f"{what}: {found.generate_report()}"

    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.set_viewport_size({"width": width, "height": 740})
    check("an empty conversation")
    enter(page, "#question", "Who gets an eye examination a year?")
    page.wait_for_selector(".foot > *")
    check("an answer")
    page.click(".answer .cite")
    page.wait_for_selector("#viewer-page:not(.loading) img")
    check("a cited page")
    page.keyboard.press("Escape")
    page.click("nav a[data-view=search]")
    enter(page, "#words", "eye examination")
    page.wait_for_selector("#hits .hit")
    check("hits")
    page.click("nav a[data-view=files]")
    page.wait_for_selector("#file-list li")
    check("files")
