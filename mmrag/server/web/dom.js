/** Elements without HTML strings: every text stays a text. */

/** The element with an id. */
export const byId = (id) => document.getElementById(id);

/**
 * A new element. Attributes that are null or false are left out; `class`, `on...` handlers and
 * everything else are set as they are named. Children are nodes or texts.
 */
export function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null));
  return made;
}

/** `3 pages`, `1 page`. */
export const count = (n, thing) => `${n.toLocaleString()} ${thing}${n === 1 ? "" : "s"}`;

/** Calls `take` with the files that are dropped on an element, which looks ready meanwhile. */
export function onDrop(target, take) {
  let inside = 0; // dragenter and dragleave come for children too
  const over = (change) => {
    inside = change === 0 ? 0 : inside + change;
    target.classList.toggle("over", inside > 0);
  };
  target.addEventListener("dragenter", (event) => { event.preventDefault(); over(1); });
  target.addEventListener("dragleave", () => over(-1));
  target.addEventListener("dragover", (event) => event.preventDefault());
  target.addEventListener("drop", (event) => {
    event.preventDefault();
    over(0);
    if (event.dataTransfer.files.length) take([...event.dataTransfer.files]);
  });
}
