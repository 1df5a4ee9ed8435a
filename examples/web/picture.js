// An image file as the model takes it: what `profit predict --exif` makes of the same file.

import { UserError } from "./errors.js";
import { resize } from "./resample.js";

const LONGEST = 4; // sides of an image; of a longer one only the middle is used

/** Python's round: halves go to the even number. */
export function round(x) {
  const floor = Math.floor(x);
  return x - floor === 0.5 ? floor + (floor % 2) : Math.round(x);
}

/**
 * The pixels that a card's model takes: its shorter side scaled, its centre cut out.
 *
 * @param {Blob} file
 * @param {{image_size: number, crop_pct: number, interpolation: string}} input of the card
 * @returns {Promise<{pixels: Uint8ClampedArray, transparent: boolean}>} RGB `[size, size, 3]`
 */
export async function prepare(file, input) {
  const size = input.image_size;
  const { transparent, ...image } = await decode(file);
  const shorter = round(size / input.crop_pct);
  const side = Math.min(image.width, image.height);
  const scaled = resize(
    image,
    Math.floor((shorter * image.width) / side),
    Math.floor((shorter * image.height) / side),
    input.interpolation,
  );
  return { pixels: cut(scaled, size), transparent };
}

function cut({ width, height, pixels }, size) {
  const left = round((width - size) / 2);
  const top = round((height - size) / 2);
  const result = new Uint8ClampedArray(size * size * 3);
  for (let y = 0; y < size; y++) {
    const start = ((top + y) * width + left) * 3;
    result.set(pixels.subarray(start, start + size * 3), y * size * 3);
  }
  return result;
}

async function decode(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, {
      imageOrientation: "from-image", // upright; Chromium cannot ignore the EXIF orientation
      colorSpaceConversion: "none", // training sees the bytes of the file, whatever its profile
      premultiplyAlpha: "none",
    });
  } catch {
    throw new UserError(
      `${file.name} cannot be read as an image by this browser. Convert it to JPEG or PNG.`,
    );
  }
  const longest = LONGEST * Math.min(bitmap.width, bitmap.height);
  const width = Math.min(bitmap.width, longest);
  const height = Math.min(bitmap.height, longest);
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  if (context === null) throw new UserError(`${file.name} is too large for this browser.`);
  context.drawImage(
    bitmap,
    -Math.floor((bitmap.width - width) / 2),
    -Math.floor((bitmap.height - height) / 2),
  );
  bitmap.close();
  return { width, height, ...withoutAlpha(context.getImageData(0, 0, width, height).data) };
}

function withoutAlpha(rgba) {
  const pixels = new Uint8ClampedArray((rgba.length / 4) * 3);
  let transparent = false;
  for (let from = 0, to = 0; from < rgba.length; from += 4, to += 3) {
    pixels[to] = rgba[from];
    pixels[to + 1] = rgba[from + 1];
    pixels[to + 2] = rgba[from + 2];
    transparent ||= rgba[from + 3] < 255;
  }
  return { pixels, transparent };
}
