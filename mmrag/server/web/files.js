/** What is in the collection; adding and removing files. */

import { call, getJson, upload } from "/static/api.js";
import { byId, count, el, onDrop } from "/static/dom.js";
import { inCollection, onCollection, refresh } from "/static/state.js";

const POLL = 700; // milliseconds between two looks at what is being indexed
const LOOK = 5000; // and at the list, while folders are watched
let files = [], unread = [], last = "", timer = 0;

export function setUp() {
  onDrop(byId("drop"), (chosen) => chosen.forEach(add));
  byId("upload").addEventListener("change", (event) => {
    [...event.target.files].forEach(add);
    event.target.value = "";
  });
  byId("filter").addEventListener("input", draw);
  onCollection(load);
}

async function load() {
  const reply = await getJson(`/api/files?${inCollection()}`);
  clearTimeout(timer);
  if (reply.watched.length) timer = setTimeout(() => load().catch(() => {}), LOOK);
  // Drawing anew would take the question back from a button that asks.
  if (JSON.stringify(reply) === last) return;
  last = JSON.stringify(reply);
  ({ files, unread } = reply);
  byId("watched").textContent = reply.watched.length ? `Watching ${reply.watched.join(", ")}` : "";
  const pages = files.reduce((sum, file) => sum + file.pages, 0);
  byId("files-summary").textContent = files.length
    ? `${count(files.length, "file")}, ${count(pages, "page")}` : "Nothing is indexed yet.";
  byId("filter").hidden = files.length < 12;
  draw();
}

function draw() {
  const wanted = byId("filter").value.toLowerCase();
  const shown = files.filter((file) => file.name.toLowerCase().includes(wanted));
  const failed = unread.filter((file) => file.name.toLowerCase().includes(wanted));
  byId("file-list").replaceChildren(...shown.map(row), ...failed.map(failedRow));
}

function failedRow(file) {
  return el("li", {},
    el("span", { class: "name", title: file.file }, file.name),
    el("span", { class: "error" }, file.errors.join("; ")));
}

function row(file) {
  const remove = el("button", { type: "button", class: "text", "aria-label": `Remove ${file.name}`, onclick: () => forget(file, remove) }, "Remove");
  const errors = file.errors.length
    ? el("details", {}, el("summary", {}, count(file.errors.length, "problem")),
      el("ul", {}, file.errors.map((error) => el("li", {}, error)))) : null;
  return el("li", {},
    el("span", { class: "name", title: file.file }, file.name),
    el("span", { class: "quiet" }, count(file.pages, "page")), remove, errors);
}

/** Asks once more on the button itself. */
async function forget(file, button) {
  if (!button.classList.contains("sure")) {
    button.classList.add("sure");
    button.textContent = file.uploaded ? "Delete?" : "Forget?";
    setTimeout(() => {
      button.classList.remove("sure");
      button.textContent = "Remove";
    }, 4000);
    return;
  }
  button.disabled = true;
  try {
    await call(`/api/files/${file.id}?${inCollection()}`, { method: "DELETE" });
    await refresh();
  } catch (error) {
    button.disabled = false;
    byId("files-summary").textContent = error.message;
  }
}

/** Sends a file and follows its indexing. */
async function add(file) {
  const bar = el("progress", { max: "1", value: "0", "aria-label": `Progress of ${file.name}` });
  const told = el("span", { class: "quiet", role: "status" }, "Sending");
  const item = el("li", {}, el("span", { class: "name" }, file.name), bar, told);
  byId("jobs").append(item);
  try {
    const where = inCollection();
    const job = await upload(`/api/files?${where}`, file, (share) => { bar.value = share; });
    bar.removeAttribute("value");
    await follow(job.id, where, told);
    item.remove();
    await refresh();
  } catch (error) {
    bar.remove();
    told.className = "error";
    told.textContent = error.message;
    item.append(el("button", { type: "button", class: "icon", "aria-label": "Dismiss", onclick: () => item.remove() }, "\u00d7"));
  }
}

async function follow(id, where, told) {
  for (;;) {
    const job = (await getJson(`/api/jobs?${where}`)).jobs.find((each) => each.id === id);
    if (!job || job.state === "done") return;
    if (job.state === "failed" || job.state === "stopped") {
      throw new Error(job.errors.join("; ") || "Indexing was stopped.");
    }
    told.textContent = job.state === "waiting" ? "Waiting" : `Indexing, ${count(job.pages, "page")}`;
    await new Promise((resolve) => setTimeout(resolve, POLL));
  }
}
