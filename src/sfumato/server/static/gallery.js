// The gallery: search, a picture's own page, comparing two, and what can be done with each.

import { get, remove } from "./api.js";
import { $, fill, h, lightDismiss, openDialog, round, short, toast } from "./dom.js";
import { NOTHING_AT_0 } from "./form.js";

const actions = {}; // reuse, replay, vary, start, interpolate: given by main
const picked = new Map();
let query = "", next = null, searching = 0;

export function setUp(given) {
  Object.assign(actions, given);
  let wait;
  $("search").addEventListener("input", () => {
    clearTimeout(wait);
    wait = setTimeout(() => { query = $("search").value.trim(); load(); }, 250);
  });
  $("more").addEventListener("click", () => load(next));
  lightDismiss($("detail"));
}

export async function load(before = null) {
  const mine = ++searching;
  const list = $("gallery");
  list.setAttribute("aria-busy", "true");
  try {
    const at = new URLSearchParams({ q: query, limit: 60, ...(before && { before }) });
    const found = await get(`/pictures?${at}`);
    if (mine !== searching) return;
    next = found.next;
    const items = found.pictures.map(item);
    if (before) list.append(...items); else fill(list, items);
    $("gallery-count").textContent = found.total === 1 ? "One picture" : `${found.total} pictures`;
    $("more").hidden = !next;
    $("gallery-empty").hidden = found.total > 0;
    fill($("gallery-empty"), query
      ? [h("h2", {}, "Nothing by these words"), h("p", { class: "soft" }, "Every word must occur in a picture's request.")]
      : [h("h2", {}, "An empty wall"), h("p", { class: "soft" }, "Pictures that you make stay here, with the request that made them."), h("a", { class: "button", href: "#/" }, "To the studio")]);
  } catch (e) {
    if (mine !== searching) return;
    if (before && e.status === 422) return load(); // the last one shown is gone
    $("gallery-empty").hidden = false;
    fill($("gallery-empty"), h("h2", {}, "The gallery cannot be shown"), h("p", { class: "bad" }, e.message), h("button", { type: "button", onclick: () => load() }, "Try again"));
  } finally {
    list.removeAttribute("aria-busy");
  }
}

function item(picture) {
  const words = short(picture.request.prompt, 120);
  const pick = h("input", {
    type: "checkbox", checked: picked.has(picture.id), "aria-label": `Choose: ${short(words, 50)}, seed ${picture.request.seed}`,
    onchange: (e) => { if (e.target.checked) picked.set(picture.id, picture); else picked.delete(picture.id); tray(); },
  });
  return h("li", { "data-id": picture.id },
    h("button", { type: "button", class: "tile", onclick: () => open(picture.id), "aria-label": `Open: ${short(words, 60)}, seed ${picture.request.seed}` },
      h("img", { src: picture.url, alt: "", loading: "lazy", width: picture.width, height: picture.height })),
    h("span", { class: "pick" }, pick),
    h("span", { class: "caption" }, words));
}

export function thumbs(pictures, run) {
  return pictures.map((p) => h("button", { type: "button", class: "tile", onclick: () => run(p), "aria-label": `${short(p.request.prompt, 60)}, seed ${p.request.seed}` },
    h("img", { src: p.url, alt: "", loading: "lazy" })));
}

function tray() {
  const box = $("tray"), chosen = [...picked.values()];
  box.hidden = chosen.length === 0;
  $("gallery").classList.toggle("picking", chosen.length > 0);
  const two = chosen.length === 2;
  const away = () => { picked.clear(); for (const i of document.querySelectorAll(".pick input")) i.checked = false; tray(); };
  fill(box, h("span", { class: "small number", role: "status" }, chosen.length === 1 ? "1 chosen: one more to compare" : `${chosen.length} chosen`),
    h("button", { type: "button", disabled: !two, onclick: () => (location.hash = `#/compare/${chosen[0].id}/${chosen[1].id}`) }, "Compare"),
    h("button", { type: "button", disabled: !two, onclick: () => { away(); actions.interpolate(chosen[0], chosen[1]); } }, "Interpolate"),
    h("button", { type: "button", onclick: () => discard(chosen, away) }, "Delete"),
    h("button", { type: "button", class: "quiet", onclick: away }, "Choose none"));
}

async function discard(pictures, then = () => {}) {
  const what = pictures.length === 1 ? "this picture" : `these ${pictures.length} pictures`;
  if (!confirm(`Delete ${what}? The files are gone then.`)) return false;
  try {
    for (const p of pictures) await remove(`/pictures/${p.id}`);
  } catch (e) {
    toast(e.message);
  }
  then();
  load();
  return true;
}

// ── one picture ──

const NAMES = { guidance_rescale: "guidance rescale", guidance_interval: "guidance interval", n: null, prompt: null, width: null, height: null, upscale: null };

export function facts(picture) {
  const r = picture.request, rows = [["size", `${picture.width} × ${picture.height}`]];
  if (r.upscale > 1) rows.push(["drawn at", `${picture.width / r.upscale} × ${picture.height / r.upscale}, and enlarged`]);
  for (const [key, value] of Object.entries(r)) {
    const name = key in NAMES ? NAMES[key] : key.replaceAll("_", " ");
    if (!name || value == null || value === "" || (value === 0 && NOTHING_AT_0.has(key)) || (value === 1 && key === "best_of")) continue;
    const said = (v) => (typeof v === "number" && !Number.isInteger(v) ? round(v, 4) : v?.sha256 ? `picture ${v.sha256.slice(0, 8)} ${v.name}`.trim() : String(v));
    rows.push([name, [value].flat().map(said).join(", ")]);
  }
  rows.push(["model", picture.model.name]);
  return rows;
}

export async function open(id) {
  let picture;
  try {
    picture = await get(`/pictures/${encodeURIComponent(id)}`);
  } catch (e) {
    return toast(e.message);
  }
  const dialog = $("detail"), close = () => dialog.close();
  const act = (name, run, props = {}) => h("button", { type: "button", onclick: () => { close(); run(); }, ...props }, name);
  fill(dialog, h("button", { type: "button", class: "icon shut", onclick: close, "aria-label": "Close" }, "✕"), h("div", { class: "detail" },
    h("img", { class: `picture${picture.width <= 64 ? " crisp" : ""}`, src: picture.url, alt: picture.request.prompt, width: picture.width * picture.scale, height: picture.height * picture.scale }),
    h("div", { class: "stack" },
      h("h2", { class: "words", id: "detail-head" }, picture.request.prompt),
      h("dl", { class: "facts" }, facts(picture).flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
      picture.warnings.map((w) => h("p", { class: "small warning" }, w)),
      h("div", { class: "row" },
        h("a", { class: "button", href: `#/inside/${picture.id}`, onclick: close }, "Look inside"),
        act("Reuse settings", () => actions.reuse(picture)),
        act("Replay", () => actions.replay(picture), { title: "Make it again: the same seed and settings give the same picture" }),
        act("Variations", () => actions.vary(picture)),
        act("Start from it", () => actions.start(picture))),
      h("div", { class: "row" },
        h("a", { class: "button quiet", href: picture.url, download: `${picture.id}.png` }, "Download"),
        h("button", { type: "button", class: "quiet", onclick: () => discard([picture], close) }, "Delete")))));
  openDialog(dialog);
}

// ── two pictures ──

export async function compare(a, b) {
  const view = $("view-compare");
  fill(view, h("h1", { id: "compare-head" }, "Side by side"), h("p", { class: "soft" }, "Loading"));
  let pictures;
  try {
    pictures = await Promise.all([a, b].map((id) => get(`/pictures/${encodeURIComponent(id)}`)));
  } catch (e) {
    return fill(view, h("h1", { id: "compare-head" }, "Side by side"), h("p", { class: "bad" }, e.message), h("a", { href: "#/gallery" }, "To the gallery"));
  }
  const [p, q] = pictures;
  const crisp = (x) => (x.width <= 64 ? "crisp" : "");
  const wipe = h("div", { class: "wipe", vars: { "--at": "50%" } },
    h("img", { src: p.url, alt: "", class: crisp(p) }), h("img", { src: q.url, alt: "", class: `over ${crisp(q)}` }), h("span", { class: "hair" }));
  const facts1 = new Map([["prompt", p.request.prompt], ...facts(p)]), facts2 = new Map([["prompt", q.request.prompt], ...facts(q)]);
  const keys = [...new Set([...facts1.keys(), ...facts2.keys()])];
  const rows = keys.filter((k) => facts1.get(k) !== facts2.get(k));
  const same = keys.filter((k) => facts1.get(k) === facts2.get(k));
  return fill(view,
    h("div", { class: "row spread" }, h("h1", { id: "compare-head" }, "Side by side"), h("a", { href: "#/gallery" }, "To the gallery")),
    h("div", { class: "side" }, pictures.map((x) => h("figure", {}, h("img", { src: x.url, alt: x.request.prompt, class: crisp(x) }), h("figcaption", {}, short(x.request.prompt, 90))))),
    h("div", { class: "stack" }, h("h2", {}, "One over the other"), wipe,
      h("div", { class: "field under" }, h("label", { for: "wipe" }, "How much of the second covers the first"),
        h("input", { type: "range", id: "wipe", min: 0, max: 100, value: 50, oninput: (e) => wipe.style.setProperty("--at", `${100 - e.target.value}%`) }))),
    h("div", { class: "stack" }, h("h2", {}, rows.length ? "What differs" : "The same request"),
      h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "What differs" }, rows.length > 0 && h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Setting"), h("th", { scope: "col" }, "First"), h("th", { scope: "col" }, "Second"))),
        h("tbody", {}, rows.map((k) => h("tr", {}, h("th", { scope: "row" }, k), h("td", {}, facts1.get(k) ?? "–"), h("td", {}, facts2.get(k) ?? "–")))))),
      same.length > 0 && h("p", { class: "soft small" }, `The same in both: ${same.join(", ")}.`),
      h("div", { class: "row" }, h("button", { type: "button", onclick: () => actions.interpolate(p, q) }, "Interpolate between them"))));
}
