// Starting from a picture: choosing it, uploading it, and painting the mask of what to make anew.

import { upload } from "./api.js";
import { $, lightDismiss, openDialog, toast } from "./dom.js";
import { setSize, state, tell } from "./form.js";

const MAX = 32 * 2 ** 20;
const TINT = "#e11d8f"; // of the mask as it is painted, a colour that few pictures have; only where it is counts

export function setUp() {
  $("file").addEventListener("change", async () => {
    const [file] = $("file").files;
    $("file").value = "";
    if (file) await startFromFile(file);
  });
  $("drop-start").addEventListener("click", clear);
  $("drop-mask").addEventListener("click", () => { state.mask = null; show(); });
  $("paint-mask").addEventListener("click", openBrush);
  setUpBrush();
}

export function clear() {
  state.start = state.mask = null;
  show();
}

// A file of any size is cropped to the proportions asked for and drawn at that size: what is seen is what is sent.
export async function startFromFile(file) {
  try {
    if (file.size > MAX) throw new Error(`${file.name}: larger than 32 MiB`);
    const image = await createImageBitmap(file).catch(() => { throw new Error(`${file.name}: no picture that can be read`); });
    const [w, t] = [Number($("width").value), Number($("height").value)];
    const canvas = new OffscreenCanvas(w, t);
    const context = canvas.getContext("2d");
    context.fillStyle = "white";
    context.fillRect(0, 0, w, t);
    const scale = Math.max(w / image.width, t / image.height);
    context.imageSmoothingQuality = "high";
    context.drawImage(image, (w - image.width * scale) / 2, (t - image.height * scale) / 2, image.width * scale, image.height * scale);
    const kept = await upload("/uploads", await canvas.convertToBlob({ type: "image/png" }));
    startFrom({ id: kept.id, url: `uploads/${kept.id}.png`, width: kept.width, height: kept.height });
  } catch (e) {
    toast(e.message);
  }
}

export function startFrom(picture, size = picture) {
  state.start = picture;
  state.mask = null;
  setSize(size.width, size.height);
  $("from").open = true;
  show();
}

// The picture that a stored request started from, if the server still has it; a mask is painted anew.
export function startAgain(picture, size, masked) {
  const probe = new Image();
  probe.onload = () => {
    startFrom({ ...picture, width: probe.naturalWidth, height: probe.naturalHeight }, size);
    if (masked) toast("It repainted a part of a picture: paint the mask again, or replay it as it was.");
  };
  probe.onerror = () => toast("The picture that it started from is not here any more: choose one, under “From a picture”.");
  probe.src = picture.url;
}

function show() {
  $("start").hidden = !state.start;
  $("drop").hidden = !!state.start;
  if (state.start) {
    $("start-image").src = state.start.url;
    $("start-image").classList.toggle("crisp", state.start.width <= 64);
  }
  $("start-veil").hidden = $("drop-mask").hidden = !state.mask;
  $("paint-mask").textContent = state.mask ? "Change the mask" : "Repaint a part";
  tell();
}

// ── the brush ──

const ink = () => $("brush-mask").getContext("2d", { willReadFrequently: true });
const brush = { x: 0.5, y: 0.5, down: false, erase: false };

const size = () => ($("brush-size").value / 100) * $("brush-mask").width;

function openBrush() {
  const { start } = state, mask = $("brush-mask"), cursor = $("brush-cursor");
  const side = 512 / Math.max(start.width, start.height);
  for (const canvas of [mask, cursor]) {
    canvas.width = Math.round(start.width * side);
    canvas.height = Math.round(start.height * side);
  }
  $("brush-image").src = start.url;
  $("brush-image").classList.toggle("crisp", start.width <= 64);
  if (state.mask) ink().drawImage(state.mask.canvas, 0, 0);
  openDialog($("brush"));
  drawCursor();
  tellShare();
  mask.focus();
}

function dab(from, to) {
  const c = ink(), { width, height } = $("brush-mask");
  c.globalCompositeOperation = brush.erase ? "destination-out" : "source-over";
  c.strokeStyle = TINT;
  c.lineCap = "round";
  c.lineWidth = size();
  c.beginPath();
  c.moveTo(from.x * width, from.y * height);
  c.lineTo(to.x * width + 0.01, to.y * height);
  c.stroke();
}

function drawCursor() {
  const canvas = $("brush-cursor"), c = canvas.getContext("2d");
  c.clearRect(0, 0, canvas.width, canvas.height);
  for (const [width, colour] of [[4, "#000a"], [2, "#fff"]]) {
    c.lineWidth = width;
    c.strokeStyle = colour;
    c.beginPath();
    c.arc(brush.x * canvas.width, brush.y * canvas.height, size() / 2, 0, 7);
    c.stroke();
  }
}

function share() {
  const mask = $("brush-mask"), data = ink().getImageData(0, 0, mask.width, mask.height).data;
  let on = 0;
  for (let i = 3; i < data.length; i += 4) on += data[i] > 127;
  return on / (data.length / 4);
}
const tellShare = () => ($("brush-share").textContent = `${Math.round(100 * share())} % will be made anew`);

function setUpBrush() {
  const mask = $("brush-mask"), cursor = $("brush-cursor");
  const place = (e) => {
    const r = mask.getBoundingClientRect();
    return { x: (e.clientX - r.left) / r.width, y: (e.clientY - r.top) / r.height };
  };
  // The cursor's canvas lies on top and takes the pointer; the mask's takes the keyboard.
  cursor.addEventListener("pointerdown", (e) => {
    cursor.setPointerCapture(e.pointerId);
    brush.down = true;
    Object.assign(brush, place(e));
    dab(brush, brush);
    mask.focus();
    e.preventDefault();
  });
  cursor.addEventListener("pointermove", (e) => {
    const to = place(e);
    if (brush.down) dab(brush, to);
    Object.assign(brush, to);
    drawCursor();
  });
  for (const end of ["pointerup", "pointercancel"]) cursor.addEventListener(end, () => { brush.down = false; tellShare(); });
  mask.addEventListener("keydown", (e) => {
    const far = e.shiftKey ? 0.1 : 0.025;
    const move = { ArrowLeft: [-far, 0], ArrowRight: [far, 0], ArrowUp: [0, -far], ArrowDown: [0, far] }[e.key];
    if (!move && e.key !== " ") return;
    e.preventDefault();
    if (move) { brush.x = Math.min(1, Math.max(0, brush.x + move[0])); brush.y = Math.min(1, Math.max(0, brush.y + move[1])); }
    else { dab(brush, brush); tellShare(); }
    drawCursor();
  });
  $("brush-size").addEventListener("input", drawCursor);
  $("brush-erase").addEventListener("click", () => {
    brush.erase = !brush.erase;
    $("brush-erase").setAttribute("aria-pressed", brush.erase);
  });
  $("brush-clear").addEventListener("click", () => { ink().clearRect(0, 0, mask.width, mask.height); tellShare(); });
  $("brush-invert").addEventListener("click", () => {
    const c = ink();
    c.globalCompositeOperation = "xor";
    c.fillStyle = TINT;
    c.fillRect(0, 0, mask.width, mask.height);
    tellShare();
  });
  $("brush-cancel").addEventListener("click", () => $("brush").close());
  lightDismiss($("brush"));
  $("brush-done").addEventListener("click", async () => {
    if (share() === 0) return toast("The mask is empty: draw over the part to make anew.");
    const { start } = state, small = new OffscreenCanvas(start.width, start.height), c = small.getContext("2d", { willReadFrequently: true });
    c.drawImage(mask, 0, 0, start.width, start.height);
    const data = c.getImageData(0, 0, start.width, start.height); // white where it was painted, else black
    for (let i = 0; i < data.data.length; i += 4) {
      data.data.fill(data.data[i + 3] > 127 ? 255 : 0, i, i + 3);
      data.data[i + 3] = 255;
    }
    c.putImageData(data, 0, 0);
    try {
      const kept = await upload("/uploads", await small.convertToBlob({ type: "image/png" }));
      const canvas = new OffscreenCanvas(mask.width, mask.height);
      canvas.getContext("2d").drawImage(mask, 0, 0);
      state.mask = { id: kept.id, canvas };
      $("start-veil").width = mask.width;
      $("start-veil").height = mask.height;
      $("start-veil").getContext("2d").drawImage(mask, 0, 0);
      $("strength").value = 1;
      $("brush").close();
      show();
    } catch (e) {
      toast(e.message);
    }
  });
}
