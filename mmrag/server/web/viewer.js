/** A page beside the answer: its image with the evidence marked, zoom, and the pages around it. */

import { getJson } from "/static/api.js";
import { byId, el } from "/static/dom.js";
import { inCollection, state } from "/static/state.js";

const ZOOMS = [1, 1.25, 1.5, 2, 3, 4];
const COVERS = "(max-width: 860px)"; // as in app.css: the page lies over everything else
const view = { source: null, page: 1, pages: 1, zoom: 0, back: null, pushed: false };

export function setUp() {
  byId("viewer-close").addEventListener("click", close);
  byId("page-back").addEventListener("click", () => turn(-1));
  byId("page-on").addEventListener("click", () => turn(1));
  byId("zoom-in").addEventListener("click", () => zoom(view.zoom + 1));
  byId("zoom-out").addEventListener("click", () => zoom(view.zoom - 1));
  byId("zoom-fit").addEventListener("click", () => zoom(0));
  byId("viewer-page").addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    zoom(view.zoom + (event.deltaY < 0 ? 1 : -1));
  }, { passive: false });
  byId("viewer").addEventListener("keydown", (event) => {
    const acts = {
      Escape: close, "+": () => zoom(view.zoom + 1), "=": () => zoom(view.zoom + 1),
      "-": () => zoom(view.zoom - 1), 0: () => zoom(0), PageUp: () => turn(-1), PageDown: () => turn(1),
    };
    if (!acts[event.key] || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    acts[event.key]();
  });
  addEventListener("popstate", () => {
    // Later, since going back takes the focus away.
    if (view.pushed) setTimeout(hide);
    view.pushed = false;
  });
}

/** Opens the page of a source or a hit, with its evidence marked. */
export async function openSource(source) {
  view.back = document.activeElement;
  view.source = source;
  view.page = source.page;
  view.pages = source.page ?? 1;
  view.zoom = 0;
  // Where it covers the rest, people leave it with Back, which must not leave what is below.
  const covers = byId("viewer").hidden && matchMedia(COVERS).matches;
  if (covers && !location.hash.startsWith("#view")) {
    history.pushState(null, "");
    view.pushed = true;
  }
  byId("viewer").hidden = false;
  document.body.classList.add("viewing");
  show();
  byId("viewer").focus();
  const { files } = await getJson(`/api/files?${inCollection()}`);
  view.pages = files.find((file) => file.id === source.file_id)?.pages ?? view.pages;
  number();
}

/** Opens a page by its address: of a link in an answer that was read elsewhere. */
export async function openAddress(query) {
  const file = query.get("file");
  const page = query.has("page") ? Number(query.get("page")) : null;
  const { files } = await getJson(`/api/files?${inCollection()}`);
  const found = files.find((each) => each.id === file);
  if (!found) return;
  const mark = query.get("mark");
  const boxes = mark ? mark.split(";").map((box) => box.split(",").map(Number)) : [];
  await openSource({ name: found.name, file: found.file, file_id: file, page, boxes, quote: null, text: "" });
}

function show() {
  const { source } = view;
  byId("viewer-title").textContent = source.name;
  byId("viewer-title").title = source.file;
  byId("viewer-place").textContent = source.page_name ?? "";
  byId("viewer-quote").textContent = source.quote ?? "";
  byId("viewer-quote").hidden = !source.quote || source.image === null;
  for (const tool of document.querySelectorAll(".tools .icon, .tools .text")) tool.hidden = source.image === null;
  if (source.image === null) byId("viewer-page").replaceChildren(passage(source));
  else draw();
  number();
}

/** The text of what has no image, its quote marked. */
function passage({ text, quote }) {
  const at = quote ? text.indexOf(quote) : -1;
  if (at < 0) return el("pre", { class: "passage" }, text);
  const mark = el("mark", {}, quote);
  return el("pre", { class: "passage" }, text.slice(0, at), mark, text.slice(at + quote.length));
}

function draw() {
  const { source, page } = view;
  const own = page === source.page;
  const marks = own && source.boxes.length ? `&mark=${source.boxes.map((box) => box.join(",")).join(";")}` : "";
  const address = `/api/files/${source.file_id}/pages/${page}/image?${inCollection()}${marks}`;
  const marked = marks ? ", evidence marked" : "";
  const image = el("img", { src: address, alt: `Page ${page} of ${source.name}${marked}` });
  const pane = byId("viewer-page");
  pane.classList.add("loading");
  image.addEventListener("load", () => {
    pane.classList.remove("loading");
    pane.replaceChildren(image);
    fit(image);
    if (own && source.boxes.length) scrollTo(image, source.boxes[0]);
  });
  image.addEventListener("error", () => {
    pane.classList.remove("loading");
    pane.replaceChildren(el("p", { class: "error", role: "alert" }, "This page has no image."));
  });
}

function fit(image) {
  image.style.width = `${ZOOMS[view.zoom] * 100}%`;
  byId("zoom-fit").textContent = `${ZOOMS[view.zoom] * 100}%`;
}

/** Brings the evidence to the upper third of the pane. */
function scrollTo(image, [x0, y0]) {
  const { dpi } = state.collections.find((each) => each.name === state.collection);
  const shown = (image.clientWidth / image.naturalWidth) * (dpi / 72);
  const pane = byId("viewer-page");
  pane.scrollTo({ top: y0 * shown - pane.clientHeight / 3, left: x0 * shown - 24 });
}

function zoom(step) {
  view.zoom = Math.max(0, Math.min(ZOOMS.length - 1, step));
  const image = byId("viewer-page").querySelector("img");
  if (!image) return;
  const pane = byId("viewer-page");
  const [x, y] = [
    (pane.scrollLeft + pane.clientWidth / 2) / pane.scrollWidth,
    (pane.scrollTop + pane.clientHeight / 2) / pane.scrollHeight,
  ];
  fit(image); // and what was in the middle stays there
  pane.scrollTo(x * pane.scrollWidth - pane.clientWidth / 2, y * pane.scrollHeight - pane.clientHeight / 2);
}

function turn(step) {
  const page = view.page + step;
  if (page < 1 || page > view.pages) return;
  view.page = page;
  draw();
  number();
}

function number() {
  byId("page-number").textContent = view.source.image === null ? "" : `${view.page} / ${view.pages}`;
  byId("page-back").disabled = view.page <= 1;
  byId("page-on").disabled = view.page >= view.pages;
}

function close() {
  if (view.pushed) history.back();
  else hide();
}

function hide() {
  byId("viewer").hidden = true;
  document.body.classList.remove("viewing");
  if (location.hash.startsWith("#view")) history.replaceState(null, "", "#ask");
  view.back?.focus();
}
