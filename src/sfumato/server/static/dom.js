// Elements from data. Text is always text: nothing that came from outside is ever parsed as markup.

export const $ = (id) => document.getElementById(id);

export function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (value == null) continue;
    if (key.startsWith("aria-")) node.setAttribute(key, value); // whose false is a word
    else if (value === false) continue;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "vars") for (const [name, v] of Object.entries(value)) node.style.setProperty(name, v);
    else if (key === "class") node.className = value;
    else if (key in node && key !== "list" && key !== "for") node[key] = value;
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((c) => c != null && c !== false));
  return node;
}

export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

export function fill(node, ...children) {
  node.replaceChildren(...children.flat().filter((c) => c != null && c !== false));
  return node;
}

let gone;
export function toast(text, action) {
  const node = $("toast");
  clearTimeout(gone);
  const close = () => (node.hidden = true);
  fill(node, h("span", {}, text), action && h("button", { type: "button", onclick: () => (close(), action.run()) }, action.name),
    h("button", { type: "button", onclick: close, "aria-label": "Close this message" }, "Close"));
  node.hidden = false;
  gone = setTimeout(close, 9000);
}

export function openDialog(dialog) {
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

// A dialog closes when the dark around it is clicked.
export function lightDismiss(dialog) {
  dialog.addEventListener("mousedown", (e) => {
    if (e.target !== dialog) return;
    const r = dialog.getBoundingClientRect();
    if (e.clientX < r.left || e.clientX > r.right || e.clientY < r.top || e.clientY > r.bottom) dialog.close();
  });
}

export function duration(seconds) {
  if (seconds == null || !isFinite(seconds)) return "";
  if (seconds < 1.5) return "about a second left";
  if (seconds < 90) return `${Math.round(seconds)} s left`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min left`;
  return `${(seconds / 3600).toFixed(1)} h left`;
}

export const short = (text, length = 80) => (text.length > length ? text.slice(0, length - 1) + "…" : text);
export const round = (x, digits = 3) => (x == null ? "∞" : Number(x.toPrecision(digits)).toString());
