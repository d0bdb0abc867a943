// The page: which view is shown, what is dropped on it, and what one part asks of another.

import { Refused, get, upload } from "./api.js";
import { $, fill, h, openDialog, short, toast } from "./dom.js";
import * as form from "./form.js";
import * as gallery from "./gallery.js";
import * as inside from "./inside.js";
import * as jobs from "./jobs.js";
import * as start from "./start.js";

const VIEWS = ["studio", "gallery", "compare", "inside"];

function route() {
  const [view = "studio", ...rest] = location.hash.replace(/^#\/?/, "").split("/").map(decoded);
  const name = VIEWS.includes(view) ? view : "studio";
  for (const v of VIEWS) $(`view-${v}`).hidden = v !== name;
  for (const a of document.querySelectorAll(".top nav a")) {
    const here = a.getAttribute("href") === (name === "studio" ? "#/" : name === "inside" ? "#/inside" : "#/gallery");
    if (here) a.setAttribute("aria-current", "page"); else a.removeAttribute("aria-current");
  }
  document.title = { studio: "Sfumato", gallery: "Gallery · Sfumato", compare: "Side by side · Sfumato", inside: "Look inside · Sfumato" }[name];
  if (name !== "inside") inside.stop();
  if (name === "studio") recent();
  if (name === "gallery") gallery.load();
  if (name === "compare") gallery.compare(rest[0], rest[1]);
  if (name === "inside") { if (rest[0]) inside.show(rest[0]); else inside.choose(); }
  window.scrollTo(0, 0);
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // an address that was cut off
  }
}

async function recent() {
  try {
    const { pictures } = await get("/pictures?limit=16");
    $("recent-part").hidden = pictures.length === 0;
    fill($("recent"), gallery.thumbs(pictures, (p) => gallery.open(p.id)));
  } catch {
    $("recent-part").hidden = true;
  }
}

function toStudio() {
  if (!["", "#/"].includes(location.hash)) location.hash = "#/";
}

async function paint(request) {
  toStudio();
  $("complaint").textContent = "";
  $("go").disabled = true;
  try {
    await jobs.submit(request);
  } catch (e) {
    $("complaint").textContent = e instanceof Refused && e.retryAfter ? `${e.message} (again in ${e.retryAfter} s)` : e.message;
  } finally {
    $("go").disabled = false;
  }
}

// A stored request as it can be sent again; pictures that it started from are records, which the server finds by hash.
function again(picture) {
  if (picture.model?.hash && !served(picture.model)) toast(`It was made by ${picture.model.name}, which is not served here: the default model draws instead.`);
  return Object.fromEntries(Object.entries({ ...picture.request, model: served(picture.model) }).filter(([, v]) => v != null));
}

// The name by which the server knows a picture's model; pictures name the file, and are surest by its hash.
function served(model) {
  return form.state.models.find((m) => (model?.hash ? m.hash === model.hash : m.name === model?.name))?.name;
}

const actions = {
  reuse(picture) {
    start.clear();
    form.use(picture.request, served(picture.model));
    toStudio();
    $("prompt").focus();
    const { init, mask } = picture.request, size = { width: Number($("width").value), height: Number($("height").value) };
    if (init) start.startAgain({ id: init.sha256, url: `uploads/${init.sha256}.png` }, size, !!mask);
  },
  replay(picture) {
    paint({ ...again(picture), n: 1 });
  },
  vary(picture) {
    const base = { ...again(picture), n: 1 };
    const other = () => Math.floor(Math.random() * 2 ** 32);
    const amounts = [0.1, 0.2, 0.3, 0.45, 0.6, 0.8];
    toStudio();
    jobs.runStrip(amounts.map((v) => ({ ...base, variation_seed: other(), variation_strength: v })), amounts.map((v) => `${Math.round(100 * v)} %`), "Variations, from near to far");
  },
  interpolate(a, b) {
    const [from, to] = [again(a), again(b)];
    if (from.width !== to.width || from.height !== to.height || a.model?.hash !== b.model?.hash) return toast("Only pictures of one size and one model have a way between them.");
    if ([from, to].some((r) => r.variation_strength > 0 || r.prompt_to != null)) return toast("What is a mix of two noises or prompts itself has no way to another picture.");
    const same = from.prompt === to.prompt;
    const between = [1, 2, 3, 4, 5].map((k) => k / 6);
    const requests = [from, ...between.map((v) => ({ ...from, ...(!same && { prompt_to: to.prompt, mix: v }), ...(from.seed !== to.seed && { variation_seed: to.seed, variation_strength: v }) })), to];
    const title = same ? `“${short(from.prompt, 40)}”, from seed ${from.seed} to ${to.seed}` : `From “${short(from.prompt, 30)}” to “${short(to.prompt, 30)}”`;
    toStudio();
    jobs.runStrip(requests.map((r) => ({ ...r, n: 1 })), ["first", ...between.map((v) => `${Math.round(100 * v)} %`), "second"], title);
  },
  start(picture) {
    start.startFrom({ id: picture.id, url: picture.url, width: picture.width, height: picture.height });
    if (!$("prompt").value.trim()) $("prompt").value = picture.request.prompt; // to be changed
    toStudio();
    $("from").scrollIntoView({ block: "center" });
  },
};

// ── dropping ──

async function dropped(file) {
  const dialog = $("dropped");
  const close = () => dialog.close();
  const url = URL.createObjectURL(file);
  dialog.addEventListener("close", () => URL.revokeObjectURL(url), { once: true });
  let info = null, why = "";
  if (file.type === "image/png") {
    try { info = await upload("/pictures/info", file); } catch (e) { why = e.message; }
  } else why = "Only PNG files can hold a request.";
  const act = (name, run) => h("button", { type: "button", onclick: () => { run(); close(); } }, name);
  const left = Object.keys(info?.ignored ?? {});
  fill(dialog, h("div", { class: "stack" },
    h("h2", { id: "dropped-head" }, info ? "This picture holds its request" : "A picture"),
    h("div", { class: "start" }, h("div", { class: "thumb" }, h("img", { src: url, alt: "" })),
      h("div", { class: "stack" }, h("p", { class: "small soft" }, short(file.name, 80)),
        info ? h("p", { class: "serif" }, short(info.request.prompt, 200)) : h("p", { class: "soft" }, `No request was found in it. ${why}`),
        info?.source === "a1111" && h("p", { class: "small soft" }, "Written by another program (A1111's form)."),
        left.length > 0 && h("p", { class: "small soft" }, `Not understood and left out: ${left.join(", ")}.`))),
    h("div", { class: "row" },
      info && act("Use its settings", () => actions.reuse(info)),
      info && act("Replay it", () => actions.replay(info)),
      act("Start from it", () => start.startFromFile(file).then(toStudio)),
      h("button", { type: "button", class: "quiet push", onclick: close }, "Close"))));
  openDialog(dialog);
}

function setUpDropping() {
  const picture = (e) => [...(e.dataTransfer?.types ?? [])].includes("Files");
  addEventListener("dragover", (e) => { if (picture(e)) { e.preventDefault(); document.body.classList.add("dragging"); } });
  addEventListener("dragleave", (e) => { if (!e.relatedTarget) document.body.classList.remove("dragging"); });
  addEventListener("drop", (e) => {
    if (!picture(e)) return;
    e.preventDefault();
    document.body.classList.remove("dragging");
    const [file] = e.dataTransfer.files;
    if (file) dropped(file);
  });
  addEventListener("paste", (e) => {
    const file = [...(e.clipboardData?.files ?? [])].find((f) => f.type.startsWith("image/"));
    if (file) { e.preventDefault(); dropped(file); }
  });
}

function setUpTheme() {
  const root = document.documentElement;
  const tell = () => ($("theme").textContent = root.dataset.theme === "dark" ? "Light" : "Dark");
  $("theme").addEventListener("click", () => {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
    localStorage.setItem("sfumato-theme", root.dataset.theme);
    tell();
  });
  new MutationObserver(tell).observe(root, { attributeFilter: ["data-theme"] });
  tell();
}

// ── begin ──

async function learn() {
  for (;;) {
    try {
      const [{ models }, { samplers, spacings }, limits] = await Promise.all([get("/models"), get("/samplers"), get("/limits")]);
      if (models.length) return { models, samplers, spacings, limits };
      $("status").textContent = "";
    } catch (e) {
      if (e.status !== 503 && e.status !== 0) throw e;
      $("complaint").textContent = e.status ? "The model is being loaded." : e.message;
    }
    await new Promise((r) => setTimeout(r, 1000));
  }
}

async function begin() {
  setUpTheme();
  jobs.setUp({ done: recent, open: gallery.open });
  jobs.setAgain((job) => paint({ ...again({ request: job.request, model: { name: job.model } }) }));
  jobs.setAfter((job) => {
    const [p] = job.pictures;
    const { hires, upscale } = job.request, unit = form.state.models.find((m) => m.name === job.model)?.multiple ?? 1;
    const side = (drawn) => Math.round((drawn * (hires ?? 1)) / unit) * unit * (upscale ?? 1);
    const one = { seed: p.seed, variation_seed: p.variation_seed, n: 1, best_of: 1 }; // the chosen one, not the choice
    const whole = { id: p.id, url: p.url, request: { ...job.request, ...one }, model: { name: job.model }, width: side(job.request.width), height: side(job.request.height) };
    return [
      h("a", { class: "button", href: `#/inside/${p.id}` }, "Look inside"),
      h("button", { type: "button", onclick: () => actions.vary(whole) }, "Variations"),
      h("button", { type: "button", onclick: () => actions.start(whole) }, "Start from it"),
      h("a", { class: "button quiet", href: p.url, download: `${p.id}.png` }, "Download"),
    ];
  });
  gallery.setUp(actions);
  start.setUp();
  setUpDropping();
  $("skip").addEventListener("click", (e) => { e.preventDefault(); $("main").focus(); });
  $("compose").addEventListener("submit", (e) => {
    e.preventDefault();
    paint(form.request());
  });
  addEventListener("hashchange", route);
  route();
  $("go").disabled = true;
  try {
    form.setUp(await learn());
    $("complaint").textContent = "";
    $("go").disabled = false;
    await jobs.resume();
  } catch (e) {
    $("complaint").textContent = e.message;
  }
  document.documentElement.dataset.ready = "true";
}

begin();
