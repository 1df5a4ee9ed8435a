// The page: which files it was given, and what it shows.

import { enlarge, isDigits, scan } from "./digits.js";
import { UserError } from "./errors.js";
import { classify, openModel, readCard, runtime } from "./model.js";
import { prepare } from "./picture.js";

const find = (id) => document.getElementById(id);
let model = null;
const given = { file: null, card: null }; // of a model that is not complete yet
let strokes = []; // of the drawing

// One thing after the other: a session runs one image at a time.
let queue = Promise.resolve();

function enqueue(task) {
  queue = queue.then(task).catch((error) => {
    if (!(error instanceof UserError)) console.error(error);
    tell(error instanceof UserError ? error.message : `This page failed: ${error}`);
  });
}

function tell(text) {
  find("message").textContent = text;
  find("message").hidden = !text;
}

// Files.

function take(files) {
  tell("");
  // A model that comes with images is opened first.
  const rank = (name) => (/\.(onnx|json)$/i.test(name) ? 0 : 1);
  for (const file of [...files].sort((a, b) => rank(a.name) - rank(b.name))) {
    enqueue(() => takeOne(file));
  }
}

async function takeOne(file) {
  if (/\.json$/i.test(file.name)) {
    given.card = readCard(await file.text(), file.name);
    await complete();
  } else if (/\.onnx$/i.test(file.name)) {
    given.file = file;
    await complete();
  } else {
    await classifyFile(file);
  }
}

async function complete() {
  const { file, card } = given;
  if (!file || !card) {
    const other = file ? `${file.name}.json, its card` : "the .onnx file of this card";
    find("hint").textContent = `Now drop ${other}.`;
    return;
  }
  given.file = given.card = null;
  await show(new Uint8Array(await file.arrayBuffer()), card, file.name);
}

async function fetched(address) {
  let why = "no answer came";
  try {
    const response = await fetch(address);
    if (response.ok) return response;
    why = response.status === 404 ? "there is no such file" : response.statusText;
  } catch (error) {
    console.warn(error);
  }
  throw new UserError(`${address} cannot be loaded: ${why}.`);
}

async function show(bytes, card, name) {
  find("model").textContent = `Opening ${name} ...`;
  try {
    model = await openModel(bytes, card, name);
  } finally {
    await start();
  }
  find("results").replaceChildren();
  clear();
}

/** What the page offers now. */
async function start() {
  const card = model?.card;
  const top1 = card?.top1 ? `, top-1 ${card.top1.file.toFixed(2)} %` : "";
  find("model").textContent = card
    ? `${card.file}: ${card.num_classes} classes${top1}`
    : "No model is open yet.";
  find("hint").textContent = card
    ? "Drop images here, or another model with its card."
    : "Drop FILE.onnx and FILE.onnx.json here.";
  find("drawing").hidden = !card || !isDigits(card);
  find("runtime").textContent = `onnxruntime-web ${(await runtime()).env.versions.web}`;
}

// Results.

async function classifyFile(file) {
  if (!model) throw new UserError(`There is no model yet for ${file.name}. Give it first.`);
  const begin = performance.now();
  const { pixels, transparent } = await prepare(file, model.card.input);
  const prepared = performance.now() - begin;
  const shown = await result(file.name, pixels, prepared);
  if (transparent) {
    const note = shown.querySelector(".times");
    note.textContent += ". Colours below its transparency may differ from profit predict's.";
  }
  find("results").prepend(shown);
}

async function result(name, pixels, prepared) {
  const { best, milliseconds } = await classify(model, pixels);
  const shown = find("result").content.firstElementChild.cloneNode(true);
  shown.querySelector("h2").textContent = name;
  paint(shown.querySelector("canvas"), pixels, model.card.input.image_size);
  for (const { name: label, share } of best) {
    const row = document.createElement("li");
    row.dataset.share = share;
    row.style.setProperty("--share", `${100 * share}%`);
    for (const text of [label, `${(100 * share).toFixed(2)} %`]) {
      row.append(Object.assign(document.createElement("span"), { textContent: text }));
    }
    shown.querySelector("ol").append(row);
  }
  shown.querySelector(".times").textContent =
    `classified in ${milliseconds.toFixed(1)} ms, prepared in ${prepared.toFixed(1)} ms`;
  return shown;
}

function paint(canvas, pixels, size) {
  canvas.width = canvas.height = size;
  const image = new ImageData(size, size);
  image.data.fill(255);
  pixels.forEach((value, index) => {
    image.data[Math.floor(index / 3) * 4 + (index % 3)] = value;
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// Drawing.

const pad = find("pad");
const pen = pad.getContext("2d");
Object.assign(pen, { strokeStyle: "white", lineWidth: 28, lineCap: "round", lineJoin: "round" });

function clear() {
  strokes = [];
  pen.clearRect(0, 0, pad.width, pad.height);
  find("drawn").replaceChildren(find("advice").content.cloneNode(true));
}

function draw(event) {
  const stroke = strokes.at(-1);
  const share = pad.width / pad.clientWidth;
  const point = { x: event.offsetX * share, y: event.offsetY * share };
  const last = stroke.at(-1) ?? point;
  stroke.push(point);
  pen.beginPath();
  pen.moveTo(last.x, last.y);
  pen.lineTo(point.x, point.y);
  pen.stroke();
}

async function classifyDrawing() {
  if (!strokes.length) return; // cleared since
  const begin = performance.now();
  const pixels = enlarge(scan(strokes), model.card.input.image_size);
  find("drawn").replaceChildren(await result("Drawing", pixels, performance.now() - begin));
}

pad.addEventListener("pointerdown", (event) => {
  if (!event.isPrimary || event.button !== 0) return;
  pad.setPointerCapture(event.pointerId);
  strokes.push([]);
  draw(event);
});
pad.addEventListener("pointermove", (event) => {
  if (pad.hasPointerCapture(event.pointerId)) draw(event);
});
pad.addEventListener("pointerup", () => enqueue(classifyDrawing));
find("clear").addEventListener("click", () => enqueue(clear));

// The rest.

find("files").addEventListener("change", (event) => {
  take(event.target.files);
  event.target.value = ""; // the same file may be chosen again
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  find("drop").classList.add("over");
});
addEventListener("dragleave", () => find("drop").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  find("drop").classList.remove("over");
  take(event.dataTransfer.files);
});

enqueue(start);
const address = new URLSearchParams(location.search).get("model");
if (address) {
  enqueue(async () => {
    const card = readCard(await (await fetched(`${address}.json`)).text(), `${address}.json`);
    const bytes = new Uint8Array(await (await fetched(address)).arrayBuffer());
    await show(bytes, card, address.split("/").at(-1));
  });
}
