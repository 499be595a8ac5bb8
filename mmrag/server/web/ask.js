/** The conversation: questions, answers that stream, and citations that open their page. */

import { events } from "/static/api.js";
import { attachment } from "/static/attach.js";
import { byId, count, el } from "/static/dom.js";
import { render } from "/static/markdown.js";
import { current, onCollection, state } from "/static/state.js";
import { openSource } from "/static/viewer.js";

const KEPT = "mmrag-conversation"; // of this tab, so that it outlasts a reload
const MOST_KEPT = 20; // turns; a browser keeps about 5 MB
const turns = []; // of {question, reply}, those that were answered
let running = null;

export function setUp() {
  const form = byId("ask-form");
  const question = byId("question");
  const image = attachment(form);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running) return running.abort();
    const [words, picture] = [question.value.trim(), image.value()];
    if (!words && !picture) return;
    question.value = "";
    image.clear();
    fit(question);
    const failed = !(await ask(words, picture));
    // It can be asked again, unless another was written meanwhile.
    if (failed && !question.value && !image.value()) {
      question.value = words;
      if (picture) image.show(picture, "Image of the question");
      fit(question);
    }
  });
  question.addEventListener("input", () => fit(question));
  question.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  byId("new-chat").addEventListener("click", forget);
  onCollection(about);
}

/** Grows the field with its text. */
function fit(field) {
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, 200)}px`;
}

function about() {
  const { files, pages, llm } = current();
  const held = `${count(files, "file")}, ${count(pages, "page")}`;
  const how = llm ? `answered by ${llm}` : "answered by quoting the best sentences";
  byId("ask-about").textContent = files ? `${held}, ${how}.` : "Nothing is indexed yet. Add files first.";
}

function forget() {
  running?.abort();
  turns.length = 0;
  keep();
  byId("turns").replaceChildren();
  begun(false);
  byId("question").focus();
}

function begun(yes) {
  byId("ask-empty").hidden = yes;
  byId("ask-title").hidden = byId("new-chat").hidden = !yes;
}

/** Shows the conversation that this tab had before it was loaded anew. */
export function restore() {
  try {
    for (const turn of JSON.parse(sessionStorage.getItem(KEPT) ?? "[]")) {
      begun(true);
      newTurn(turn.question, null).finish(turn.reply);
      turns.push(turn);
    }
  } catch (error) {
    // Kept by another version of the page.
    newTurn("", null).fail(`The conversation before cannot be shown again (${error.message}).`);
  }
}

/** Keeps the last turns, as many as the browser has room for. */
function keep() {
  for (let first = Math.max(0, turns.length - MOST_KEPT); ; first += 1) {
    try {
      return sessionStorage.setItem(KEPT, JSON.stringify(turns.slice(first)));
    } catch (error) {
      if (error.name !== "QuotaExceededError" || first >= turns.length) throw error;
    }
  }
}

const historyOf = ({ question, reply }) => [
  { role: "user", content: question },
  { role: "assistant", content: reply.answer },
];

/** Whether it did not fail; what was stopped has not. */
async function ask(question, image) {
  begun(true);
  const turn = newTurn(question, image);
  running = new AbortController();
  busy(true);
  const history = turns.flatMap(historyOf);
  const body = { query: question, image, history, collection: state.collection };
  let failed = false;
  try {
    for await (const [name, data] of events("/api/ask", body, running.signal)) {
      if (name === "sources") turn.begin(data, question);
      else if (name === "token") turn.add(data.text);
      else if (name === "answer") turn.finish(data);
      else {
        turn.fail(data.error.message);
        failed = true;
      }
    }
    if (turn.reply?.answer) {
      turns.push({ question: question || "(an image)", reply: turn.reply });
      keep();
    }
  } catch (error) {
    failed = error.name !== "AbortError";
    turn.fail(failed ? error.message : "Stopped.");
  } finally {
    running = null;
    busy(false);
  }
  return !failed;
}

function busy(on) {
  const send = byId("ask-form").querySelector(".send");
  send.textContent = on ? "Stop" : "Ask";
  send.classList.toggle("stop", on);
}

/** One question with its answer, growing while it streams. */
function newTurn(question, image) {
  const words = el("div", { class: "answer", "aria-busy": "true" });
  const wait = el("p", { class: "wait quiet" }, "Searching\u2026");
  const foot = el("div", { class: "foot" });
  const picture = image ? el("img", { src: image, alt: "The image of the question" }) : null;
  const asked = el("div", { class: "question" }, picture, el("p", {}, question));
  const turn = el("article", {}, asked, wait, words, foot);
  byId("turns").append(turn);
  turn.scrollIntoView({ block: "start", behavior: "smooth" });
  let text = "";
  let sources = [];
  let drawing = false;

  const draw = () => {
    drawing = false;
    words.replaceChildren(render(text, (n) => citation(n, sources)));
  };
  const made = {
    reply: null,
    begin(data, asked) {
      sources = data.sources;
      wait.textContent = "Reading\u2026";
      if (data.question !== asked) foot.before(el("p", { class: "quiet searched" }, `Searched for: ${data.question}`));
    },
    add(piece) {
      wait.hidden = true;
      text += piece;
      if (!drawing) requestAnimationFrame(draw); // many words a frame are drawn once
      drawing = true;
    },
    finish(data) {
      made.reply = data;
      wait.hidden = true;
      [text, sources] = [data.answer, data.sources];
      draw();
      words.removeAttribute("aria-busy");
      foot.replaceChildren(...footOf(data));
    },
    fail(message) {
      wait.hidden = true;
      words.removeAttribute("aria-busy");
      foot.append(el("p", { class: "error", role: "alert" }, message));
    },
  };
  return made;
}

function citation(n, sources) {
  const source = sources.find((each) => each.n === n);
  if (!source) return null;
  const label = `Source ${n}: ${placeOf(source)}`;
  return el("button", { type: "button", class: "cite", "aria-label": label, title: placeOf(source), onclick: () => openSource(source) }, String(n));
}

const placeOf = ({ name, page_name: place }) => (place ? `${name}, ${place}` : name);

/** The same as nodes: a line breaks before `page 2`, not within it. */
export const placeNodes = ({ name, page_name: place }) =>
  place ? [`${name}, `, el("span", { class: "page" }, place)] : [name];

function footOf({ found, sources, problems }) {
  const cited = sources.filter((source) => source.cited);
  const shown = cited.length ? cited : sources.slice(0, 3);
  const parts = [];
  if (shown.length) {
    const title = found && cited.length ? "Sources" : "Nearest pages";
    parts.push(el("h2", {}, title), el("ul", { class: "sources" }, shown.map(card)));
  }
  if (problems.length) {
    parts.push(el("details", { class: "problems" },
      el("summary", {}, `Check before you trust it (${problems.length})`),
      el("ul", {}, problems.map((problem) => el("li", {}, problem)))));
  }
  return parts;
}

function card(source) {
  const small = source.image ? `${source.image}&width=160` : null;
  return el("li", {}, el("button", { type: "button", class: "card", onclick: () => openSource(source) },
    small ? el("img", { src: small, alt: "", loading: "lazy" }) : null,
    el("span", { class: "words" },
      el("span", { class: "place" }, el("span", { class: "n" }, String(source.n)), placeNodes(source)),
      source.quote ? el("q", {}, source.quote) : null)));
}
