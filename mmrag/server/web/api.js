/** Calls of the server. */

import { byId } from "/static/dom.js";

let opening = null;

/** An error that the server told; `message` is for people. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function failure(reply) {
  let told = `The server answered with status ${reply.status}.`;
  try {
    told = (await reply.json()).error.message;
  } catch { /* not one of our answers: the status has to do */ }
  if (reply.status === 429) {
    told = `The server is busy. Try again in ${reply.headers.get("Retry-After") ?? "a few"} seconds.`;
  }
  return new ApiError(reply.status, told);
}

/** A request; after a 401 the key is asked for once, and the request repeated. */
export async function call(path, options = {}) {
  let reply;
  try {
    reply = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached. Is it running?");
  }
  if (reply.status === 401) {
    await login();
    reply = await fetch(path, options);
  }
  if (!reply.ok) throw await failure(reply);
  return reply;
}

export const getJson = async (path) => (await call(path)).json();

export async function postJson(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return call(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

/** The events of an answer, as `[name, data]`. */
export async function* events(path, body, signal) {
  const reply = await postJson(path, body, signal);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const blocks = held.split("\n\n");
    held = blocks.pop();
    for (const block of blocks) {
      const [name, data] = block.split("\n");
      yield [name.slice("event: ".length), JSON.parse(data.slice("data: ".length))];
    }
  }
}

/** Uploads a file; `told` gets the share that is sent, from 0 to 1. Resolves to its job. */
export function upload(path, file, told) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(); // fetch does not tell how much it has sent
    const form = new FormData();
    form.append("file", file);
    request.open("POST", path);
    request.responseType = "json";
    request.upload.onprogress = (event) => event.lengthComputable && told(event.loaded / event.total);
    request.onerror = () => reject(new ApiError(0, "The upload broke off."));
    request.onload = () => {
      if (request.status === 202) resolve(request.response);
      else reject(new ApiError(request.status, request.response?.error?.message ?? "It was refused."));
    };
    request.send(form);
  });
}

/** Asks for the key until the server takes one. */
function login() {
  opening ??= new Promise((resolve) => {
    const dialog = byId("login");
    dialog.showModal();
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    dialog.querySelector("form").onsubmit = async (event) => {
      event.preventDefault();
      const headers = { "Content-Type": "application/json" };
      const body = JSON.stringify({ key: byId("key").value });
      const reply = await fetch("/api/session", { method: "POST", headers, body });
      if (reply.ok) {
        dialog.close();
        opening = null;
        resolve();
      } else {
        byId("login-error").textContent = (await failure(reply)).message;
      }
    };
  });
  return opening;
}
