/** Pages found by words or by an image, as thumbnails with what matches. */

import { postJson } from "/static/api.js";
import { placeNodes } from "/static/ask.js";
import { attachment } from "/static/attach.js";
import { byId, count, el, onDrop } from "/static/dom.js";
import { onCollection, state } from "/static/state.js";
import { openSource } from "/static/viewer.js";

const SNIPPET = 220; // characters
let image = null;
let latest = 0;

export function setUp() {
  const form = byId("search-form");
  image = attachment(form);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    search();
  });
  onDrop(byId("search"), async ([file]) => {
    image.take(file);
    setTimeout(search, 100); // the image is read in the meantime
  });
  onCollection(() => byId("hits").replaceChildren());
}

async function search() {
  const words = byId("words").value.trim();
  if (!words && !image.value()) return;
  const status = byId("search-status");
  const number = (latest += 1);
  status.className = "quiet";
  status.textContent = "Searching\u2026";
  const body = { query: words, image: image.value(), top_k: 24, collection: state.collection };
  try {
    const { hits } = await (await postJson("/api/search", body)).json();
    if (number !== latest) return; // an answer that a later search has overtaken
    status.textContent = hits.length ? count(hits.length, "page") : "Nothing found.";
    byId("hits").replaceChildren(...hits.map((hit) => shown(hit, words)));
  } catch (error) {
    status.className = "error";
    status.textContent = error.message;
  }
}

function shown(hit, words) {
  const plain = hit.image?.replace(/&mark=[^&]*/, ""); // a mark would hide a page this small
  const picture = plain
    ? el("img", { src: `${plain}&width=400`, alt: "", loading: "lazy" })
    : el("span", { class: "sheet", "aria-hidden": "true" }, hit.text.slice(0, 400));
  return el("li", {}, el("button", { type: "button", class: "hit", onclick: () => openSource(hit) },
    el("span", { class: "thumb" }, picture),
    el("span", { class: "place" }, placeNodes(hit)),
    el("span", { class: "snippet quiet" }, marked(snippet(hit.kind === "description" ? "" : hit.text, words), words)),
    // What a model wrote of an image does not stand on the page.
    hit.description ? el("span", { class: "snippet quiet" }, `Description by ${hit.described_by}: `,
      marked(snippet(hit.description, words), words)) : ""));
}

/** The part of a text with most of the words. */
function snippet(text, words) {
  const wanted = terms(words);
  const flat = text.replace(/\s+/g, " ");
  const lower = flat.toLowerCase();
  const places = wanted.map((word) => lower.indexOf(word)).filter((at) => at >= 0);
  const at = places.length ? Math.max(0, Math.min(...places) - 40) : 0;
  const begin = at && flat.indexOf(" ", at) + 1;
  return (begin ? "\u2026" : "") + flat.slice(begin, begin + SNIPPET);
}

const terms = (words) => words.toLowerCase().match(/[\p{L}\p{N}]{4,}/gu) ?? [];

function marked(text, words) {
  const wanted = new Set(terms(words));
  return text.split(/([\p{L}\p{N}]+)/u).map((part) =>
    wanted.has(part.toLowerCase()) ? el("b", {}, part) : part);
}
