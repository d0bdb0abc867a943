// Jobs: sending them, watching one come out of the noise, and the queue of all.

import { get, post, remove } from "./api.js";
import { $, duration, fill, h, short, toast } from "./dom.js";

const ENDED = ["done", "failed", "cancelled"];
let watched = null; // {job, source, previews}
let strip = null; // {jobs: [ids], tiles, labels}
let timer = null;
const small = (r) => (r.width ?? 0) * (r.upscale ?? 1) <= 64; // whose pixels are shown as squares
const listeners = { done: () => {}, open: () => {} };

export function setUp({ done, open }) {
  Object.assign(listeners, { done, open });
  $("cancel").addEventListener("click", () => {
    if (strip) strip.jobs.forEach((id) => cancel(id, true));
    else if (watched) cancel(watched.job.id);
  });
  emptyEasel();
}

export async function submit(request) {
  const job = await post("/jobs", request);
  strip = null;
  watch(job);
  if (matchMedia("(max-width: 900px)").matches) $("easel").scrollIntoView({ block: "center" });
  refresh();
  return job;
}

async function cancel(id, quiet = false) {
  try {
    await remove(`/jobs/${id}`);
  } catch (e) {
    if (!quiet && e.code !== "conflict") toast(e.message);
  }
  refresh();
}

// After a reload: go on watching what is being made, if anything is.
export async function resume() {
  const { jobs } = await get("/jobs?state=queued,running&limit=50");
  const [oldest] = jobs.slice().reverse();
  if (oldest && !watched) watch(oldest);
  refresh();
}

// ── one job ──

export function watch(job) {
  watched?.source?.close();
  const source = new EventSource(`jobs/${job.id}/events`);
  watched = { job, source, tiles: [], said: "" };
  layOut(job.request);
  Object.assign($("easel").dataset, { job: job.id, state: job.state });
  $("after").hidden = true;
  tellPlace(job);
  const on = (name, run) => source.addEventListener(name, (e) => watched?.source === source && run(JSON.parse(e.data)));
  on("place", tellPlace);
  on("step", (s) => {
    $("bar").max = s.steps;
    $("bar").value = s.step;
    $("status").textContent = s.step ? `Step ${s.step} of ${s.steps}. ${duration(s.seconds_left)}` : "Started";
    if (s.step === 0) say("Started");
    if (s.steps > 3 && s.step === Math.floor(s.steps / 2)) say("Half done");
  });
  on("preview", ({ picture, image }) => {
    const tile = watched.tiles[picture];
    if (!tile) return;
    if (tile.firstChild?.tagName !== "IMG") tile.replaceChildren(h("img", { alt: "The picture as it is foreseen so far" }));
    tile.classList.remove("waiting");
    const image_ = tile.firstChild;
    image_.src = image;
    image_.classList.toggle("crisp", small(job.request));
  });
  for (const name of ENDED) on(name, (ended) => { source.close(); end(ended); });
  source.onerror = () => {
    if (source.readyState === EventSource.CLOSED) ask(job.id);
    else $("status").textContent = "The connection was lost; trying again";
  };
}

// The stream of events was refused: ask for the job itself, and try again.
async function ask(id) {
  const still = () => watched?.job.id === id;
  try {
    const job = await get(`/jobs/${id}`);
    if (still() && ENDED.includes(job.state)) return end(job);
  } catch (e) {
    if (still()) $("status").textContent = e.message;
    if (e.status === 404) return;
  }
  setTimeout(() => still() && watch(watched.job), 2000);
}

function layOut(request) {
  const n = request.n ?? 1;
  const columns = n === 1 ? 1 : Math.ceil(Math.sqrt(n));
  watched.tiles = Array.from({ length: n }, (_, i) => h("div", { class: "tile waiting", vars: { "aspect-ratio": `${request.width} / ${request.height}` } },
    h("span", { class: "visually-hidden" }, `Picture ${i + 1}, not yet begun`)));
  $("easel").className = "easel live";
  fill($("easel"), h("div", { class: "tiles", vars: { "--columns": columns } }, watched.tiles));
  $("progress").hidden = false;
  $("bar").value = 0;
}

function tellPlace({ place, seconds_left, state }) {
  if (state && state !== "queued") { $("status").textContent = "Being painted"; return; }
  const text = place ? `Waiting: ${place} before this one. ${duration(seconds_left)}` : "Next in the queue";
  $("status").textContent = text;
  say(text);
}

function say(text) {
  if (watched.said !== text) $("live").textContent = watched.said = text;
}

function end(job) {
  const tiles = watched.tiles;
  watched = null;
  $("easel").dataset.state = job.state;
  $("progress").hidden = true;
  $("easel").classList.remove("live");
  if (job.state === "done") {
    job.pictures.forEach((p, i) => {
      const image = h("img", { src: p.url, alt: job.request.prompt, class: "crisp" });
      const button = h("button", { type: "button", class: "tile", onclick: () => listeners.open(p.id), title: `Seed ${p.seed}` }, image);
      image.addEventListener("load", () => image.classList.toggle("crisp", small(job.request)));
      tiles[i]?.replaceWith(button);
    });
    $("live").textContent = `Done: ${job.pictures.length === 1 ? "one picture" : `${job.pictures.length} pictures`}.`;
    after(job);
    listeners.done(job);
  } else {
    const why = job.state === "failed" ? (job.error?.message ?? "It failed.") : "Cancelled.";
    const n = job.pictures?.length, kept = n ? `${n === 1 ? "One picture was" : `${n} pictures were`} done by then: see the gallery.` : "Nothing was kept of it.";
    $("live").textContent = why;
    fill($("easel"), h("div", { class: "empty" }, h("h2", {}, job.state === "failed" ? "That did not work" : "Cancelled"),
      h("p", { class: job.state === "failed" ? "bad" : "soft" }, job.state === "failed" ? why : kept),
      h("button", { type: "button", onclick: () => listeners.again(job) }, "Paint it again")));
  }
  refresh();
}

export const setAgain = (run) => (listeners.again = run);
export const setAfter = (run) => (listeners.after = run);

function after(job) {
  fill($("after"), listeners.after(job), job.warnings.map((w) => h("p", { class: "small warning" }, w)));
  $("after").hidden = false;
}

// ── a strip of jobs: variations, or the way from one picture to another ──

export async function runStrip(requests, labels, title) {
  watched?.source?.close();
  watched = null;
  const tiles = requests.map((r) => h("div", { class: "tile waiting", vars: { "aspect-ratio": `${r.width} / ${r.height}` } }));
  $("easel").className = "easel strip";
  fill($("easel"), h("div", { class: "stack" }, h("h2", {}, title), h("div", { class: "tiles", vars: { "--columns": requests.length } }, tiles)));
  $("after").hidden = true;
  $("progress").hidden = false;
  $("bar").max = requests.length;
  $("bar").value = 0;
  $("status").textContent = `0 of ${requests.length}`;
  const own = { jobs: [], done: 0 };
  strip = own;
  let failed = "";
  try {
    for (const r of requests) own.jobs.push((await post("/jobs", r)).id);
  } catch (e) {
    failed = e.message;
  }
  refresh();
  const open = new Set(own.jobs);
  while (open.size && strip === own) {
    for (const id of [...open]) {
      const job = await get(`/jobs/${id}`).catch((e) => (e.status === 404 ? { state: "failed", error: e } : null));
      if (!job || !ENDED.includes(job.state)) continue;
      open.delete(id);
      own.done += 1;
      const i = own.jobs.indexOf(id);
      if (job.state === "done") {
        const [p] = job.pictures;
        const image = h("img", { src: p.url, alt: `${labels[i]}: ${job.request.prompt}`, class: small(job.request) ? "crisp" : "" });
        tiles[i].replaceWith(h("button", { type: "button", class: "tile", onclick: () => listeners.open(p.id) }, image, h("span", { class: "tag number" }, labels[i])));
        listeners.done(job);
      } else failed ||= job.state === "failed" ? (job.error?.message ?? "One failed.") : "Cancelled.";
    }
    if (strip === own) {
      $("bar").value = own.done;
      $("status").textContent = failed || `${own.done} of ${requests.length}`;
      if (open.size) await new Promise((r) => setTimeout(r, 700));
    }
  }
  if (strip === own) {
    strip = null;
    $("progress").hidden = true;
    $("live").textContent = failed || "The strip is done.";
    if (failed) toast(failed);
    refresh();
  }
}

// ── the queue ──

export async function refresh() {
  clearTimeout(timer);
  let jobs = [];
  try {
    ({ jobs } = await get("/jobs?state=queued,running&limit=50"));
  } catch {
    timer = setTimeout(refresh, 5000);
    return;
  }
  jobs.reverse();
  $("queue-part").hidden = jobs.length === 0 || (jobs.length === 1 && watched?.job.id === jobs[0].id);
  fill($("queue"), jobs.map((job) => h("li", {},
    h("span", { class: "words" }, short(job.request.prompt)),
    h("span", { class: "row" },
      job.id !== watched?.job.id && !strip && h("button", { type: "button", class: "quiet", onclick: () => watch(job) }, "Watch"),
      h("button", { type: "button", class: "quiet", disabled: job.cancelling, onclick: () => cancel(job.id), "aria-label": `Cancel: ${short(job.request.prompt, 40)}` }, "Cancel")),
    h("span", { class: "soft small number" }, job.state === "running" ? `Step ${job.step} of ${job.steps}. ${duration(job.seconds_left)}` : `${job.place ? `${job.place} before it` : "Next"}. ${duration(job.seconds_left)}`),
    h("progress", { max: job.steps || 1, value: job.step, "aria-label": `Progress: ${short(job.request.prompt, 40)}` }))));
  if (jobs.length) timer = setTimeout(refresh, 1500);
}

// ── nothing yet ──

function emptyEasel() {
  const canvas = h("canvas", { width: 96, height: 96, class: "crisp", "aria-hidden": "true" });
  const c = canvas.getContext("2d"), data = c.createImageData(96, 96);
  for (let i = 0; i < data.data.length; i += 4) {
    for (let k = 0; k < 3; k++) {
      const z = Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
      data.data[i + k] = 127.5 + 64 * z;
    }
    data.data[i + 3] = 255;
  }
  c.putImageData(data, 0, 0);
  $("easel").className = "easel";
  fill($("easel"), h("div", { class: "empty" }, canvas, h("h2", {}, "Every picture begins as noise"),
    h("p", { class: "soft" }, "Say what it should show, and watch it come out.")));
}
