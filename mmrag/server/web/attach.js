/** An image that goes with a question: chosen, dropped or pasted, and shown as a chip. */

import { el, onDrop } from "/static/dom.js";

/** Gives `{take(file), show(url, name), value(), clear()}` for a form with a `.chip` and an image input. */
export function attachment(form) {
  const chip = form.querySelector(".chip");
  const input = form.querySelector("input[type=file]");
  let url = null;

  const clear = () => {
    url = null;
    input.value = "";
    chip.hidden = true;
    chip.replaceChildren();
  };
  const show = (data, name) => {
    url = data;
    const remove = el("button", { type: "button", class: "icon", "aria-label": `Remove ${name}`, onclick: clear }, "\u00d7");
    chip.replaceChildren(el("img", { src: url, alt: "" }), el("span", {}, name), remove);
    chip.hidden = false;
  };
  const take = (file) => {
    if (!file?.type.startsWith("image/")) return;
    const reader = new FileReader();
    reader.onload = () => show(reader.result, file.name);
    reader.readAsDataURL(file);
  };
  input.addEventListener("change", () => take(input.files[0]));
  onDrop(form, (files) => take(files[0]));
  form.addEventListener("paste", (event) => take([...event.clipboardData.files][0]));
  return { take, show, clear, value: () => url };
}
