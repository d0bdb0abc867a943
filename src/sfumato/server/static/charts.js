// Small line charts, drawn from the values given and nothing else, at the width they have so that text keeps its size.

import { round, svg } from "./dom.js";

const NARROW = 300, WIDE = 720, LEFT = 52, TOP = 20, BOTTOM = 44, LETTER = 7; // pixels

function ticks(low, high, log) {
  if (log) {
    const all = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
      for (const m of [1, 2, 5]) if (m * 10 ** e >= low * 0.999 && m * 10 ** e <= high * 1.001) all.push(m * 10 ** e);
    return all.length > 7 ? all.filter((v) => Math.abs(Math.log10(v) % 1) < 1e-9) : all;
  }
  const step0 = (high - low) / 5 || 1;
  const power = 10 ** Math.floor(Math.log10(step0));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= step0);
  const all = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-6; v += step) all.push(Math.abs(v) < step * 1e-6 ? 0 : v);
  return all;
}

// series: [{name, points: [[x, y], …], dashed, dots, index}]; values that are null or cannot be drawn are left out.
export function chart(what) {
  const root = svg("svg", { class: "plot", role: "img", "aria-label": what.label });
  let drawn = WIDE;
  draw(root, what, drawn);
  const watch = new ResizeObserver(([{ contentRect }]) => {
    if (!root.isConnected) return watch.disconnect();
    const width = Math.round(Math.min(WIDE, Math.max(NARROW, contentRect.width)));
    if (width !== drawn) draw(root, what, (drawn = width));
  });
  watch.observe(root);
  return root;
}

function draw(root, { series, x, y, xlog = false, ylog = false, mark = null }, W) {
  const H = Math.round(Math.max(220, W * 0.46));
  const RIGHT = 18 + LETTER * Math.max(2, ...series.map((s) => s.name.length));
  const clean = series.map((s, i) => ({
    index: i % 6, ...s,
    points: s.points.filter(([a, b]) => isFinite(a) && b != null && isFinite(b) && (!xlog || a > 0) && (!ylog || b > 0)),
  }));
  const xs = clean.flatMap((s) => s.points.map((p) => p[0])), ys = clean.flatMap((s) => s.points.map((p) => p[1]));
  root.setAttribute("viewBox", `0 0 ${W} ${H}`);
  root.replaceChildren();
  if (!xs.length) return;
  let [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  if (!ylog) { const pad = (y1 - y0) * 0.06 || 0.5; y0 = y0 >= 0 && y0 < pad * 8 ? 0 : y0 - pad; y1 += pad; }
  if (ylog && y0 === y1) { y0 /= 2; y1 *= 2; }
  if (x0 === x1) { x0 -= 0.5; x1 += 0.5; }
  const along = (v, a, b, log) => (log ? Math.log(v / a) / Math.log(b / a) : (v - a) / (b - a));
  const px = (v) => LEFT + along(v, x0, x1, xlog) * (W - LEFT - RIGHT);
  const py = (v) => H - BOTTOM - along(v, y0, y1, ylog) * (H - TOP - BOTTOM);
  const text = (content, attributes) => { const t = svg("text", attributes); t.textContent = content; return t; };
  for (const v of ticks(y0, y1, ylog)) {
    root.append(svg("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: py(v), y2: py(v) }),
      text(round(v), { x: LEFT - 8, y: py(v) + 4, "text-anchor": "end" }));
  }
  for (const v of ticks(x0, x1, xlog)) root.append(text(round(v), { x: px(v), y: H - BOTTOM + 18, "text-anchor": "middle" }));
  root.append(svg("line", { class: "axis", x1: LEFT, x2: W - RIGHT, y1: H - BOTTOM, y2: H - BOTTOM }),
    text(x, { x: (LEFT + W - RIGHT) / 2, y: H - 6, "text-anchor": "middle" }), text(y, { x: LEFT, y: 10 }));
  if (mark != null) root.append(svg("line", { class: "axis dashed", x1: px(mark), x2: px(mark), y1: TOP, y2: H - BOTTOM }));
  const names = [];
  for (const s of clean) {
    if (!s.points.length) continue;
    const d = s.points.map(([a, b], i) => `${i ? "L" : "M"}${px(a).toFixed(1)} ${py(b).toFixed(1)}`).join("");
    if (!s.only) root.append(svg("path", { class: `line s${s.index}${s.dashed ? " dashed" : ""}`, d }));
    if (s.dots || s.only) for (const [a, b] of s.points) root.append(svg("circle", { class: `s${s.index}`, cx: px(a), cy: py(b), r: 3 }));
    const [, last] = s.points[s.points.length - 1];
    if (s.name) names.push({ s, at: py(last) });
  }
  names.sort((a, b) => a.at - b.at);
  let edge = -Infinity;
  for (const name of names) name.at = edge = Math.max(name.at, edge + 15); // apart from the one above
  edge = H - BOTTOM + 15;
  for (const name of names.toReversed()) name.at = edge = Math.min(name.at, edge - 15); // and not below the axis
  for (const { s, at } of names) root.append(text(s.name, { class: `name s${s.index}`, x: W - RIGHT + 10, y: at + 4 }));
}
