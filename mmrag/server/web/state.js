/** What the views share: which collection is open. */

import { getJson } from "/static/api.js";
import { byId, el } from "/static/dom.js";

export const state = { collections: [], collection: null };
const watchers = [];

/** Calls `told` now and whenever the collection, or what it holds, has changed. */
export function onCollection(told) {
  watchers.push(told);
}

export const current = () => state.collections.find((each) => each.name === state.collection);
export const inCollection = () => `collection=${encodeURIComponent(state.collection)}`;

/** Reads the collections anew. */
export async function refresh() {
  state.collections = (await getJson("/api/collections")).collections;
  state.collection ??= state.collections[0].name;
  const select = byId("collection");
  select.replaceChildren(...state.collections.map(({ name }) => el("option", { value: name }, name)));
  select.value = state.collection;
  select.parentElement.hidden = state.collections.length < 2;
  watchers.forEach((told) => told());
}

export function choose(name) {
  if (!state.collections.some((each) => each.name === name)) return;
  state.collection = name;
  byId("collection").value = name;
  watchers.forEach((told) => told());
}
