/** Starts the page, and shows the view that the address names. */

import * as ask from "/static/ask.js";
import { byId, el } from "/static/dom.js";
import * as files from "/static/files.js";
import * as search from "/static/search.js";
import { choose, refresh } from "/static/state.js";
import * as viewer from "/static/viewer.js";

const VIEWS = ["ask", "search", "files"];
const FIRST = { ask: "question", search: "words" };

function route() {
  const [name, query] = location.hash.slice(1).split("?");
  const shown = VIEWS.includes(name) ? name : "ask";
  for (const view of VIEWS) byId(view).hidden = view !== shown;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === shown) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${shown[0].toUpperCase()}${shown.slice(1)} \u00b7 mmrag`;
  if (name === "view") {
    const wanted = new URLSearchParams(query);
    choose(wanted.get("collection"));
    viewer.openAddress(wanted);
  } else if (FIRST[shown] && matchMedia("(pointer: fine)").matches) {
    byId(FIRST[shown]).focus();
  }
}

for (const part of [viewer, ask, search, files]) part.setUp();
byId("collection").addEventListener("change", (event) => choose(event.target.value));
addEventListener("hashchange", route);
// A file that is dropped beside a target must not replace the page.
for (const name of ["dragover", "drop"]) addEventListener(name, (event) => event.preventDefault());
try {
  await refresh();
  ask.restore();
  route();
} catch (error) {
  byId("main").prepend(el("p", { class: "error", role: "alert" }, error.message));
}
