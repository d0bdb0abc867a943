// The request form: from controls to a request as JSON, and back from any picture's request.

import { $, fill, h } from "./dom.js";

export const state = { models: [], limits: {}, start: null, mask: null, extras: {} };
const PLAIN = ["prompt", "negative", "n", "best_of", "steps", "guidance", "seed", "sampler", "spacing"];
const OWN = new Set([...PLAIN, "width", "height", "upscale", "init", "mask", "strength"]);
export const NOTHING_AT_0 = new Set(["guidance_rescale", "variation_strength"]);
const says = (key, v) => v != null && v !== "" && v !== false && !(v === 0 && NOTHING_AT_0.has(key)) && !(Array.isArray(v) && !v.length);
const STYLES = ["oil painting", "watercolour", "pencil drawing", "photograph", "woodcut", "flat icon", "pixel art"];

export const model = () => state.models.find((m) => m.name === $("model").value) ?? state.models[0];

export function setUp({ models, samplers, spacings, limits }) {
  Object.assign(state, { models, limits });
  fill($("model"), models.map((m) => h("option", { value: m.name }, m.name)));
  $("model").value = (models.find((m) => m.default) ?? models[0])?.name ?? "";
  fill($("sampler"), samplers.filter((s) => s.name !== "ddim-inversion").map((s) => h("option", { value: s.name, title: s.summary }, s.name)));
  fill($("spacing"), spacings.map((s) => h("option", { value: s.name, title: s.summary }, s.name)));
  if (limits.n) $("n").max = limits.n;
  if (limits.steps) $("steps").max = Math.min(100, limits.steps);
  $("model").addEventListener("change", () => useDefaults());
  for (const id of ["steps", "guidance", "strength"]) $(id).addEventListener("input", tell);
  for (const id of ["width", "height", "sampler", "seed"]) $(id).addEventListener("change", tell);
  $("upscale").addEventListener("change", () => {
    const by = enlargement() / bounded;
    setSize(Number($("width").value) * by, Number($("height").value) * by);
    bound();
    tell();
  });
  $("forget").addEventListener("click", () => (($("seed").value = ""), tell()));
  for (const button of document.querySelectorAll("[data-step]"))
    button.addEventListener("click", () => {
      const n = $("n");
      n.value = Math.min(Number(n.max), Math.max(1, (Number(n.value) || 1) + Number(button.dataset.step)));
    });
  $("prompt").addEventListener("keydown", (e) => {
    if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); $("compose").requestSubmit(); }
  });
  useDefaults();
}

function useDefaults() {
  const m = model();
  if (!m) return;
  const d = m.defaults;
  put("steps", d.steps); put("guidance", d.guidance);
  $("sampler").value = d.sampler; $("spacing").value = d.spacing;
  $("upscale").value = d.upscale;
  setSize(d.width * d.upscale, d.height * d.upscale);
  bound();
  const named = m.card?.styles;
  const styles = Array.isArray(named) ? named : typeof named === "string" ? named.split(",").map((s) => s.trim()) : STYLES;
  fill($("styles"), styles.map((s) => h("option", { value: s })));
  $("choice").hidden = !m.has_critic;
  $("best_of").value = 1;
  tell();
}

// Give a control a value as it is: a slider's ends and steps make room for it.
function put(id, value) {
  const control = $(id), step = { guidance: 0.5, strength: 0.05 }[id];
  if (control.type === "range") {
    if (value > Number(control.max)) control.max = value;
    if (value < Number(control.min)) control.min = value;
    const off = (value - control.min) / (step ?? 1);
    control.step = Math.abs(off - Math.round(off)) > 1e-6 ? "any" : (step ?? 1);
  }
  control.value = value;
}

// Sizes are those of the picture that comes out; the network draws it `enlargement` times smaller.
export const enlargement = () => Number($("upscale").value) || 1;

// A size that the model can make, nearest to one that is wished for.
export function setSize(width, height) {
  const unit = model().multiple * enlargement();
  for (const [id, side] of [["width", width], ["height", height]]) $(id).value = Math.max(1, Math.round(side / unit)) * unit;
}

let bounded = 1; // the enlargement that sizes were last bound to

// What depends on model and enlargement: the steps between sizes, and the shapes to choose from.
function bound() {
  const m = model(), d = m.defaults, times = (bounded = enlargement());
  for (const id of ["width", "height"]) $(id).step = $(id).min = m.multiple * times;
  const fit = (v) => Math.max(m.multiple, Math.round(v / m.multiple) * m.multiple);
  const shapes = [["Square", d.width, d.height], ["Wide", fit(d.width * 1.25), fit(d.height * 0.8)], ["Tall", fit(d.width * 0.8), fit(d.height * 1.25)]]
    .filter(([, w, t]) => w * t <= m.max_pixels);
  fill($("shapes"), shapes.map(([name, w, t]) =>
    h("button", { type: "button", class: "chip", onclick: () => { setSize(w * times, t * times); tell(); }, "data-size": `${w * times}x${t * times}` }, name)));
}

export function tell() {
  for (const id of ["steps", "guidance", "strength"]) $(`${id}-out`).textContent = $(id).value;
  const size = `${$("width").value}×${$("height").value}`;
  $("how").textContent = `${$("steps").value} steps, ${size}, guidance ${$("guidance").value}`;
  for (const b of $("shapes").children) b.setAttribute("aria-pressed", b.dataset.size === size.replace("×", "x"));
  $("from-note").textContent = state.start ? (state.mask ? "a part of one" : "one") : "none";
}

// The request as it stands; picture fields hold ids.
export function request() {
  const style = $("style").value.trim();
  const number = (id) => ($(id).value === "" ? null : Number($(id).value));
  const drawn = (id) => ($(id).value === "" ? null : Number($(id).value) / enlargement());
  const words = $("prompt").value.trim();
  const r = {
    ...state.extras,
    prompt: style ? `${words}, ${style}` : words,
    negative: $("negative").value,
    n: number("n") ?? 1, best_of: number("best_of") ?? 1, steps: number("steps"), guidance: number("guidance"),
    width: drawn("width"), height: drawn("height"), upscale: enlargement(), seed: number("seed"),
    sampler: $("sampler").value, spacing: $("spacing").value, model: $("model").value,
  };
  const m = model();
  if (r.guidance === 1 || m?.distilled) r.negative = "";
  if (state.start) {
    r.init = state.start.id;
    r.strength = number("strength");
    if (state.mask) { r.mask = state.mask.id; if (r.strength === 1) delete r.strength; }
  }
  return r;
}

// Set every control by a request, such as a picture's. What has no control is kept, and shown as a chip.
export function use(r, modelName) {
  if (modelName && state.models.some((m) => m.name === modelName) && $("model").value !== modelName) {
    $("model").value = modelName;
    useDefaults();
  }
  for (const key of [...PLAIN, "strength"]) if (r[key] != null) put(key, r[key]);
  const own = model().defaults.upscale, times = r.upscale ?? 1;
  $("upscale").value = r.upscale ?? own;
  if (r.width && r.height) setSize(r.width * times, r.height * times);
  bound();
  $("seed").value = r.seed ?? "";
  $("style").value = "";
  $("negative").value = r.negative ?? "";
  state.extras = Object.fromEntries(Object.entries(r).filter(([k, v]) => !OWN.has(k) && k !== "model" && says(k, v)));
  showExtras();
  tell();
}

export function showExtras() {
  const box = $("extras");
  fill(box, Object.entries(state.extras).map(([key, value]) =>
    h("button", { type: "button", class: "chip", title: "Remove", onclick: () => { delete state.extras[key]; showExtras(); } },
      `${key.replaceAll("_", " ")} ${typeof value === "object" ? JSON.stringify(value) : value} ✕`)));
  box.hidden = !box.childElementCount;
}
