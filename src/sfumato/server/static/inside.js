// Look inside: every value comes from the model, computed for the picture that is looked at.

import { get, lines, upload } from "./api.js";
import { chart } from "./charts.js";
import { $, fill, h, round, short } from "./dom.js";
import { thumbs } from "./gallery.js";

let running = new Set(); // of AbortControllers
let visit = 0; // what an earlier one still waits for is not shown, and computes nothing

export function stop() {
  visit++;
  for (const r of running) r.abort();
  running = new Set();
}

export async function choose() {
  stop();
  const mine = visit, view = $("view-inside");
  const head = [h("h1", { id: "inside-head" }, "Look inside"),
    h("p", { class: "soft" }, "For any picture: its path out of the noise, where each word looked, what guidance and samplers do to it, and the schedule it followed.")];
  fill(view, h("div", { class: "stack" }, head));
  try {
    const { pictures } = await get("/pictures?limit=40");
    if (mine === visit) fill(view, h("div", { class: "stack" }, head), pictures.length
      ? h("div", { class: "stack" }, h("h2", {}, "Which picture?"), h("div", { class: "gallery" }, thumbs(pictures, (p) => (location.hash = `#/inside/${p.id}`))))
      : h("div", { class: "empty" }, h("h2", {}, "No picture yet"), h("p", { class: "soft" }, "Make one first; everything here is computed from it."), h("a", { class: "button", href: "#/" }, "To the studio")));
  } catch (e) {
    if (mine === visit) view.append(h("p", { class: "bad" }, e.message));
  }
}

export async function show(id) {
  stop();
  const mine = visit, view = $("view-inside");
  fill(view, h("h1", { id: "inside-head" }, "Look inside"), h("p", { class: "soft", role: "status" }, "Loading the picture"));
  let picture;
  try {
    picture = await get(`/pictures/${encodeURIComponent(id)}`);
  } catch (e) {
    return mine === visit && fill(view, h("h1", { id: "inside-head" }, "Look inside"), h("p", { class: "bad" }, e.message), h("a", { href: "#/inside" }, "Choose another"));
  }
  if (mine !== visit) return;
  const crisp = picture.width <= 64 ? "crisp" : "";
  fill(view,
    h("div", { class: "stack" },
      h("div", { class: "row spread" }, h("h1", { id: "inside-head" }, "Look inside"), h("a", { href: "#/inside" }, "Another picture")),
      h("div", { class: "lead" }, h("img", { src: picture.url, alt: "", class: crisp }),
        h("div", {}, h("p", { class: "words" }, short(picture.request.prompt, 200)),
          h("p", { class: "soft small number" }, `${picture.model.name}, seed ${picture.request.seed}, ${picture.request.steps} steps of ${picture.request.sampler}, guidance ${picture.request.guidance}`)))),
    pathPart(picture, crisp), guidancePart(picture, crisp), samplersPart(picture, crisp), forwardPart(picture, crisp));
  view.querySelector("[data-auto]")?.click();
}

// A part of the page: its heading, what it shows, a button that computes it, and its results.
function part(id, title, text, label, compute, { auto = false, controls = [] } = {}) {
  const out = h("div", { class: "stack", id: `${id}-out` });
  const bar = h("progress", { max: 1, value: 0, hidden: true, "aria-label": `Progress: ${title}` });
  const note = h("p", { class: "soft small number", role: "status" });
  const halt = h("button", { type: "button", class: "quiet", hidden: true }, "Stop");
  const go = h("button", { type: "button", "data-auto": auto, onclick: start }, label);
  async function start() {
    const abort = new AbortController();
    running.add(abort);
    halt.onclick = () => abort.abort();
    go.disabled = true;
    halt.hidden = bar.hidden = false;
    bar.removeAttribute("value");
    note.classList.remove("bad");
    note.textContent = "Waiting for the model";
    try {
      await compute(out, abort.signal, (done, total) => {
        bar.max = total;
        bar.value = done;
        note.textContent = `${done} of ${total} steps`;
      });
      note.textContent = "";
      go.hidden = auto;
    } catch (e) {
      note.classList.toggle("bad", e.name !== "AbortError");
      note.textContent = e.name === "AbortError" ? "Stopped" : e.message;
    } finally {
      running.delete(abort);
      go.disabled = false;
      halt.hidden = bar.hidden = true;
    }
  }
  return h("section", { class: "part", "aria-labelledby": `${id}-head` },
    h("header", {}, h("h2", { id: `${id}-head` }, title), h("p", { class: "soft" }, text)),
    h("div", { class: "run" }, controls, go, halt, note), bar, out);
}

const image = (src, alt, crisp) => h("img", { src, alt, class: crisp });
const level = (l) => `t ${round(l.t)}, α ${round(l.alpha)}, σ ${round(l.sigma)}`;

// ── path and words ──

function pathPart(picture, crisp) {
  return part("path", "Its path out of the noise",
    "At each level the network splits what it is given into a picture and noise; the sampler mixes the two again with less noise.",
    "Follow it", async (out, signal, progress) => {
      const frames = [];
      let start, view;
      for await (const e of lines("/inside/path", { picture: picture.id }, signal)) {
        if (e.kind === "start") start = e;
        if (e.kind === "frame") {
          frames.push(e);
          view ??= pathView(out, start, frames, crisp, picture.request.prompt_to != null);
          view.grow();
          progress(frames.length, start.levels);
        }
        if (e.kind === "end") view?.finish(e);
      }
    }, { auto: true });
}

function pathView(out, start, frames, crisp, mixed) {
  const noisy = image("", "What the network was given", crisp), seen = image("", "The picture it saw in it", crisp);
  const slider = h("input", { type: "range", id: "path-step", min: 0, max: 0, value: 0, oninput: draw });
  const told = h("output", { for: "path-step", class: "small number" });
  const play = h("button", { type: "button", onclick: toggle, "aria-pressed": false }, "Play");
  const strip = h("div", { class: "contact" });
  const words = h("div", { class: "stack" });
  const equal = h("p", { class: "small", role: "status" });
  let timer = null, word = 0, following = true;
  const lit = h("canvas", { role: "img", width: 384, height: 384 }), chips = h("div", { class: "row", role: "group", "aria-label": "Words of the prompt" });
  const litNote = h("figcaption"), many = h("div", { class: "contact" }), curves = h("div");
  fill(out,
    h("div", { class: "scrub" }, h("label", { for: "path-step" }, "Step"), slider, play),
    h("div", { class: "duo" }, h("figure", {}, noisy, h("figcaption", {}, "What it was given: x at this level. ", told)),
      h("figure", {}, seen, h("figcaption", {}, "What it saw in it: the predicted x0"))),
    strip, equal, words);

  function grow() {
    const i = frames.length - 1, f = frames[i];
    slider.max = i;
    strip.append(h("figure", {}, h("button", { type: "button", class: "tile", onclick: () => { slider.value = i; following = false; draw(); }, "aria-label": `Step ${i}` }, image(f.predicted ?? f.noisy, "", crisp)), h("figcaption", { class: "number" }, `σ ${round(f.level.sigma, 2)}`)));
    if (i === 0 && f.attention && start.words.length) wordsView();
    if (following) slider.value = i;
    draw();
  }
  function finish({ equal: same }) {
    if (same != null) equal.textContent = same ? "Drawn again just now, and equal to the picture in the gallery in every pixel." : "Drawn again just now; some pixels differ from the picture in the gallery (another machine, version or starting picture).";
    if (frames.some((f) => f.attention)) drawCurves();
  }
  function toggle() {
    if (timer) { clearInterval(timer); timer = null; }
    else {
      following = false;
      if (Number(slider.value) >= frames.length - 1) slider.value = 0;
      timer = setInterval(() => {
        if (Number(slider.value) >= frames.length - 1 || !slider.isConnected) return toggle();
        slider.value = Number(slider.value) + 1;
        draw();
      }, 180);
    }
    play.textContent = timer ? "Pause" : "Play";
    play.setAttribute("aria-pressed", !!timer);
  }
  function draw(event) {
    if (event) following = false;
    const i = Number(slider.value), f = frames[i];
    noisy.src = f.noisy;
    seen.src = f.predicted ?? f.noisy;
    told.textContent = level(f.level);
    slider.setAttribute("aria-valuetext", `step ${i}, ${level(f.level)}`);
    [...strip.children].forEach((n, k) => n.classList.toggle("now", k === i));
    drawWord();
  }

  // Where a word looked: the predicted picture, lit by the word's share of each cell's attention.
  function wordsView() {
    fill(words, h("h2", {}, "Where each word looked"),
      h("p", { class: "soft" }, "The share of every cell's attention to words that went to this one, mean over layers and heads. It follows the step above." + (mixed ? " These are the words of the first prompt; those of the second are read beside them." : "")),
      chips, h("div", { class: "duo" }, h("figure", {}, lit, litNote), h("figure", {}, many, h("figcaption", {}, "All words at this step, each from none (black) to its own peak (white)"))), curves);
    fill(chips, [...start.words, "start and end"].map((w, k) => h("button", { type: "button", class: "chip", "aria-pressed": k === word, onclick: () => { word = k; drawWord(); } }, w)));
  }
  function drawWord() {
    if (!words.childElementCount) return;
    let i = Number(slider.value);
    while (i > 0 && !frames[i].attention) i--; // at the end no network is called: the last call
    const f = frames[i], a = f.attention;
    if (!a) return;
    [...chips.children].forEach((c, k) => c.setAttribute("aria-pressed", k === word));
    const name = chips.children[word].textContent;
    lightUp(lit, f.predicted, a.maps[word], crisp);
    lit.setAttribute("aria-label", `Where “${name}” looked at step ${i}`);
    const joint = a.share < 0.999 ? ` Cells gave words ${round(100 * a.share, 2)} % of their attention, the rest to each other.` : "";
    litNote.textContent = `“${name}” at step ${i}: ${round(100 * a.mean[word], 2)} % on average, ${round(100 * a.peak[word], 2)} % at its peak.${joint}`;
    fill(many, a.maps.map((m, k) => h("figure", {}, image(m, "", ""), h("figcaption", {}, `${chips.children[k].textContent} ${round(100 * a.mean[k], 2)} %`))));
  }
  function drawCurves() {
    const with_ = frames.map((f, i) => [i, f.attention]).filter(([, a]) => a);
    const named = start.words.slice(0, 6), whose = named.length === start.words.length ? "each word" : `the first ${named.length} words`;
    fill(curves, h("figure", {}, chart({
      label: `Mean share of attention of ${whose} by step`, x: "step", y: "share of attention to words",
      series: named.map((name, k) => ({ name: short(name, 14), points: with_.map(([i, a]) => [i, a.mean[k]]) })),
    }), h("figcaption", {}, `The mean share of ${whose}, step by step`)));
  }
  return { grow, finish };
}

async function lightUp(canvas, under, map, crisp) {
  const mine = (canvas.drawing = {});
  const [picture, mask] = await Promise.all([under, map].map(load));
  if (canvas.drawing !== mine) return; // another step or word was asked for meanwhile
  canvas.width = 384;
  canvas.height = Math.round((384 * picture.height) / picture.width);
  const c = canvas.getContext("2d");
  c.imageSmoothingEnabled = !crisp;
  c.drawImage(picture, 0, 0, canvas.width, canvas.height);
  c.globalCompositeOperation = "multiply";
  c.imageSmoothingEnabled = true;
  c.imageSmoothingQuality = "high";
  c.drawImage(mask, 0, 0, canvas.width, canvas.height);
  c.globalCompositeOperation = "source-over";
  c.globalAlpha = 0.16;
  c.drawImage(picture, 0, 0, canvas.width, canvas.height);
  c.globalAlpha = 1;
}
async function load(src) {
  const i = new Image();
  i.src = src;
  await i.decode();
  return i;
}

// ── guidance ──

function guidancePart(picture, crisp) {
  return part("guided", "What guidance does", "The same noise, followed to the end under guidance scales from 1, the words alone, to 15.",
    "Draw them", async (out, signal, progress) => {
      const found = [];
      const big = image("", "The picture under this guidance", crisp), note = h("figcaption", { class: "number" });
      const slider = h("input", { type: "range", id: "guided-w", min: 0, max: 0, value: 0, oninput: draw });
      const strip = h("div", { class: "contact" }), plot = h("div");
      function draw() {
        const g = found[slider.value];
        big.src = g.picture;
        note.textContent = `w = ${g.guidance}: contrast ${round(g.contrast)}, ${round(100 * g.clipped, 2)} % of values burnt out`;
        slider.setAttribute("aria-valuetext", `guidance ${g.guidance}`);
        [...strip.children].forEach((n, k) => n.classList.toggle("now", k === Number(slider.value)));
      }
      for await (const e of lines("/inside/guidance", { picture: picture.id }, signal)) {
        if (e.kind === "progress") progress(e.done, e.total);
        if (e.kind !== "guided") continue;
        const i = found.push(e) - 1;
        if (i === 0) fill(out, h("div", { class: "scrub" }, h("label", { for: "guided-w" }, "Guidance"), slider), h("div", { class: "duo" }, h("figure", {}, big, note), h("figure", {}, plot)), strip);
        slider.max = i;
        slider.value = i;
        strip.append(h("figure", {}, image(e.picture, `Guidance ${e.guidance}`, crisp), h("figcaption", { class: "number" }, `w ${e.guidance}`)));
        fill(plot, chart({ label: "Contrast and burnt-out values over guidance", x: "guidance w", y: "share of the largest value",
          series: [{ name: "contrast", points: found.map((g) => [g.guidance, g.contrast / 127.5]), dots: true }, { name: "burnt out", points: found.map((g) => [g.guidance, g.clipped]), dots: true }] }));
        draw();
      }
    });
}

// ── samplers ──

function samplersPart(picture, crisp) {
  return part("samplers", "Samplers side by side", "The same noise in 5 to 50 steps, and how far each is from the solution to which samplers without fresh noise converge.",
    "Run them", async (out, signal, progress) => {
      const runs = [];
      let exact;
      for await (const e of lines("/inside/samplers", { picture: picture.id }, signal)) {
        if (e.kind === "progress") progress(e.done, e.total);
        if (e.kind === "solution") exact = e;
        if (e.kind === "run") runs.push(e);
        if ((e.kind === "solution" || e.kind === "run") && exact) drawRuns(out, exact, runs, crisp);
      }
    });
}

function drawRuns(out, exact, runs, crisp) {
  const names = [...new Set(runs.map((r) => r.sampler))], steps = [...new Set(runs.map((r) => r.steps))].sort((a, b) => a - b);
  fill(out, h("div", { class: "duo" },
    h("figure", {}, image(exact.picture, "The converged solution", crisp), h("figcaption", {}, `The solution, in ${exact.steps} steps of Heun's method; off by at most about ${round(exact.uncertainty, 2)} itself`)),
    runs.length > 0 && h("figure", {}, chart({ label: "Distance to the solution over calls of the network", x: "calls of the network", y: "distance to the solution", xlog: true, ylog: true,
      series: names.map((name) => ({ name, dashed: runs.find((r) => r.sampler === name).stochastic, dots: true, points: runs.filter((r) => r.sampler === name).map((r) => [r.calls, r.distance]) })) }),
    h("figcaption", {}, "Root mean square of x − the solution. Dashed: with fresh noise, which goes to other pictures of the same distribution."))),
  h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Pictures by sampler and steps" }, h("table", { class: "runs" },
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Sampler"), steps.map((k) => h("th", { scope: "col", class: "number" }, `${k} steps`)))),
    h("tbody", {}, names.map((name) => h("tr", {}, h("th", { scope: "row" }, name), steps.map((k) => {
      const r = runs.find((x) => x.sampler === name && x.steps === k);
      return h("td", {}, r && h("figure", {}, image(r.picture, `${name} in ${k} steps`, crisp), h("figcaption", { class: "small number" }, round(r.distance, 2))));
    })))))));
}

// ── schedule ──

function forwardPart(picture, crisp) {
  const chosen = h("span", { class: "small soft" });
  const file = h("input", { type: "file", id: "forward-file", class: "visually-hidden", accept: "image/png,image/jpeg,image/webp",
    onchange: () => (chosen.textContent = short(file.files[0]?.name ?? "", 40)) });
  const own = h("div", { class: "row" }, h("label", { for: "forward-file", class: "button" }, "Choose a picture of yours instead"), file, chosen);
  return part("forward", "The schedule, and the way down into the noise",
    "Training noises pictures as x = α·x0 + σ·ε, and the network learns to undo it. Here it is done to a picture, at each level that this one visited.",
    "Noise it", async (out, signal, progress) => {
      const source = file.files[0] ? { upload: (await upload("/uploads", file.files[0])).id } : {};
      const frames = [];
      const noisy = image("", "The picture with noise", crisp), seen = image("", "What the network sees in it", crisp), note = h("output", { for: "forward-step", class: "small number" });
      const slider = h("input", { type: "range", id: "forward-step", min: 0, max: 0, value: 0, oninput: draw }), plots = h("div", { class: "duo" }), two = h("div");
      let curve, levels;
      function draw() {
        const f = frames[slider.value];
        noisy.src = f.noisy;
        seen.src = f.predicted;
        note.textContent = `${level(f.level)}; its error is ${round(f.error)}`;
        slider.setAttribute("aria-valuetext", level(f.level));
        fill(plots, h("figure", {}, chart({ label: "Signal and noise over time", x: "time t of the schedule", y: "share", mark: f.level.t,
          series: [{ name: "α, picture", points: curve.t.map((t, i) => [t, curve.alpha[i]]) }, { name: "σ, noise", points: curve.t.map((t, i) => [t, curve.sigma[i]]) },
            { name: "", only: true, index: 5, points: curve.visited.map((l) => [l.t, l.sigma]) }] }), h("figcaption", {}, "The schedule; dots are the levels that were visited")), two);
      }
      for await (const e of lines("/inside/forward", { picture: picture.id, ...source }, signal)) {
        if (e.kind === "start") { curve = e.schedule; levels = e.levels; progress(0, levels); }
        if (e.kind !== "noised") continue;
        const i = frames.push(e) - 1;
        progress(frames.length, levels);
        if (i === 0) fill(out, h("div", { class: "scrub" }, h("label", { for: "forward-step" }, "Noise"), slider),
          h("div", { class: "duo" }, h("figure", {}, noisy, h("figcaption", {}, "The picture with noise. ", note)), h("figure", {}, seen, h("figcaption", {}, "What the network sees in it"))), plots);
        slider.max = i;
        slider.value = Math.floor(i / 2);
        fill(two, h("figure", {}, chart({ label: "Error of the predicted picture over noise", x: "σ", y: "error of the predicted x0", series: [{ name: "error", dots: true, points: frames.map((f) => [f.level.sigma, f.error]) }] }), h("figcaption", {}, "The more noise, the less of the picture can be told")));
        draw();
      }
    }, { controls: [own] });
}
