/**
 * Markdown as elements: headings, lists, tables, quotes, code, emphasis, web links, and citations.
 * Images and HTML stay text: an answer must not load what a document told the model to load.
 */

import { el } from "/static/dom.js";

const INLINE = /(`+)(.+?)\1|\*\*(.+?)\*\*|(?<![\w*])\*(?!\s)(.+?)\*(?!\w)|\[((?:\d{1,3}\s*[,;]?\s*)+)\]|(?<!!)\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/g;
const ITEM = /^(\s*)(?:[-*+]|\d+[.)])\s+(.*)$/;

/**
 * `cite(n)` makes the element of a citation, or returns null for a number without a source.
 */
export function render(text, cite) {
  const lines = text.replace(/\r/g, "").split("\n");
  const out = document.createDocumentFragment();
  for (let at = 0; at < lines.length; ) at = block(lines, at, out, cite);
  return out;
}

function block(lines, at, out, cite) {
  const line = lines[at];
  if (!line.trim()) return at + 1;
  if (/^\s*```/.test(line)) return code(lines, at, out);
  const heading = /^(#{1,6})\s+(.*)$/.exec(line);
  if (heading) {
    out.append(el("p", { class: "heading" }, inline(heading[2], cite)));
    return at + 1;
  }
  if (ITEM.test(line)) return list(lines, at, out, cite);
  if (line.includes("|") && /^\s*\|?[\s:|-]*-[\s:|-]*$/.test(lines[at + 1] ?? "")) {
    return table(lines, at, out, cite);
  }
  const quoted = line.startsWith(">");
  const end = paragraphEnd(lines, at, quoted);
  const words = lines.slice(at, end).map((each) => (quoted ? each.replace(/^>\s?/, "") : each));
  const parts = words.flatMap((each, n) => (n ? [el("br"), inline(each, cite)] : [inline(each, cite)]));
  out.append(el(quoted ? "blockquote" : "p", {}, parts));
  return end;
}

function paragraphEnd(lines, at, quoted) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !ITEM.test(lines[end])
    && !/^(\s*```|#{1,6}\s)/.test(lines[end]) && lines[end].startsWith(">") === quoted) end += 1;
  return end;
}

function code(lines, at, out) {
  let end = at + 1;
  while (end < lines.length && !/^\s*```/.test(lines[end])) end += 1;
  out.append(el("pre", {}, el("code", {}, lines.slice(at + 1, end).join("\n"))));
  return end + 1;
}

function list(lines, at, out, cite) {
  const made = el(/^\s*\d/.test(lines[at]) ? "ol" : "ul");
  while (at < lines.length && ITEM.test(lines[at])) {
    const [, , words] = ITEM.exec(lines[at]);
    made.append(el("li", {}, inline(words, cite)));
    at += 1;
  }
  out.append(made);
  return at;
}

function table(lines, at, out, cite) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const row = (line, name) => el("tr", {}, cells(line).map((cell) => el(name, {}, inline(cell, cite))));
  const head = el("thead", {}, row(lines[at], "th"));
  const body = el("tbody");
  for (at += 2; at < lines.length && lines[at].includes("|"); at += 1) body.append(row(lines[at], "td"));
  out.append(el("div", { class: "table" }, el("table", {}, head, body)));
  return at;
}

function inline(text, cite) {
  const out = document.createDocumentFragment();
  let start = 0;
  for (const found of text.matchAll(INLINE)) {
    out.append(text.slice(start, found.index));
    out.append(...span(found, cite));
    start = found.index + found[0].length;
  }
  out.append(text.slice(start));
  return out;
}

function span([whole, , codeText, strong, emphasis, numbers, label, address], cite) {
  if (codeText) return [el("code", {}, codeText)];
  if (strong) return [el("strong", {}, inline(strong, cite))];
  if (emphasis) return [el("em", {}, inline(emphasis, cite))];
  if (numbers) {
    const made = numbers.match(/\d+/g).map((n) => cite(Number(n)));
    return made.every((each) => each !== null) ? made : [whole];
  }
  return [el("a", { href: address, rel: "noopener noreferrer", target: "_blank" }, label)];
}
