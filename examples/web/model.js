// An exported ONNX file and its card, run by onnxruntime-web in WebAssembly.

import { UserError } from "./errors.js";
import { FILTERS } from "./resample.js";

const RUNTIME = "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";
let loading;

/** onnxruntime-web, loaded at the first call. */
export function runtime() {
  loading ??= import(RUNTIME).then(
    (ort) => {
      ort.env.wasm.numThreads = 1; // more need a page that is cross-origin isolated
      return ort;
    },
    () => {
      throw new UserError("onnxruntime-web is not installed. Run npm ci here, then reload.");
    },
  );
  return loading;
}

/** The content of a card, checked. `name` is what messages call it. */
export function readCard(text, name) {
  const advice = "Give the FILE.onnx.json that profit export wrote beside FILE.onnx.";
  let card;
  try {
    card = JSON.parse(text);
  } catch {
    throw new UserError(`${name} is no card: it is not JSON. ${advice}`);
  }
  const input = card?.input;
  const lacking = [
    [["string"], card?.sha256, "sha256"],
    [["number"], card?.num_classes, "num_classes"],
    [["object"], card?.class_names, "class_names"],
    [["string"], input?.type, "input.type"],
    [["object"], input?.shape, "input.shape"],
    [["number"], input?.image_size, "input.image_size"],
  ].filter(([types, value]) => !types.includes(typeof value) || value === null);
  if (lacking.length) {
    throw new UserError(`${name} is no card: it has no ${lacking[0][2]}. ${advice}`);
  }
  if (input.type !== "uint8" || !("crop_pct" in input)) {
    throw new UserError(
      `The model of ${name} was trained on a program's own arrays, and its card does not say how ` +
        "they are made of images. Use profit predict with .npy files.",
    );
  }
  if (!(input.interpolation in FILTERS)) {
    throw new UserError(
      `${name} asks for the interpolation ${input.interpolation}. This page knows ` +
        `${Object.keys(FILTERS).join(" and ")}.`,
    );
  }
  return card;
}

/**
 * Opens a model.
 *
 * @param {Uint8Array} bytes of the ONNX file
 * @param {object} card of `readCard`
 * @param {string} name of the file, for messages
 */
export async function openModel(bytes, card, name) {
  if (((await sha256(bytes)) ?? card.sha256) !== card.sha256) {
    throw new UserError(
      `${name} is not the file that its card describes: other bytes. Give both files of one ` +
        "export.",
    );
  }
  const ort = await runtime();
  let session;
  try {
    session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  } catch (error) {
    throw new UserError(
      `onnxruntime-web ${ort.env.versions.web} cannot open ${name}: ${error.message ?? error} ` +
        "It opens what profit export --formats=onnx writes: of 3 and 4 bits from onnxruntime-web " +
        "1.23 on, of 2 bits from 1.24 on. Run npm ci for 1.30, or export with " +
        "--formats=onnx_int8.",
    );
  }
  const { inputNames, inputMetadata, outputNames } = session;
  const takes = inputMetadata.map(({ type, shape }) => `${type} [${shape.join(", ")}]`);
  if (inputNames.length !== 1 || outputNames.length !== 1) {
    throw new UserError(
      `${name} has ${inputNames.length} inputs (${inputNames.join(", ")}) and ` +
        `${outputNames.length} outputs. A model of profit export has one of each.`,
    );
  }
  const expected = `${card.input.type} [N, ${card.input.shape.join(", ")}]`;
  if (takes[0] !== expected) {
    throw new UserError(`${name} takes ${takes[0]}, but its card says ${expected}.`);
  }
  const model = { session, card };
  // The first run takes longer: its time would mislead.
  await classify(model, new Uint8ClampedArray(card.input.shape.reduce((a, b) => a * b)));
  return model;
}

/** In hexadecimal; null where the browser computes none, which it does on https and localhost. */
async function sha256(bytes) {
  if (!globalThis.crypto.subtle) return null;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * Classifies one image.
 *
 * @param {{session: object, card: object}} model
 * @param {Uint8ClampedArray} pixels RGB `[size, size, 3]`
 * @returns the five most probable classes, best first, and the time in ms
 */
export async function classify({ session, card }, pixels) {
  const ort = await runtime();
  const image = new ort.Tensor("uint8", new Uint8Array(pixels.buffer), [1, ...card.input.shape]);
  const start = performance.now();
  const results = await session.run({ [session.inputNames[0]]: image });
  const milliseconds = performance.now() - start;
  const logits = Array.from(results[session.outputNames[0]].data);
  if (logits.length !== card.num_classes) {
    throw new UserError(
      `${card.file} gives ${logits.length} numbers an image, but its card says ` +
        `${card.num_classes} classes.`,
    );
  }
  const largest = Math.max(...logits);
  const powers = logits.map((logit) => Math.exp(logit - largest));
  const sum = powers.reduce((total, power) => total + power, 0);
  const best = powers
    .map((power, index) => ({ name: card.class_names[index] ?? `${index}`, share: power / sum }))
    .sort((a, b) => b.share - a.share)
    .slice(0, 5);
  return { best, milliseconds };
}
