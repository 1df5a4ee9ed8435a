// Drawings as the digits of scikit-learn: 8x8 counts of ink, 0 to 16, enlarged to the model's size.
//
// The scans behind that data set were scaled to bitmaps of 32x32 and counted in blocks of 4x4. They
// reach from the top row to the bottom row and are about 20 pixels wide. Whatever the digit is,
// they have about the same number of black pixels: 313 on average.

import { resize } from "./resample.js";

const SIDE = 32;
const BLOCK = 4;
const WIDTH = 20;
const INK = 313;

/** Whether a card's model was trained on these digits. */
export function isDigits(card) {
  return card.training?.dataset === "digits";
}

/**
 * The counts of ink of a drawing.
 *
 * @param {{x: number, y: number}[][]} strokes each a list of points, in any unit
 * @returns {number[]} 8 x 8, each 0 to 16
 */
export function scan(strokes) {
  // A thicker pen gives more ink.
  let [thin, thick] = [0.5, SIDE / 4];
  for (let step = 0; step < 8; step++) {
    const radius = (thin + thick) / 2;
    const ink = bitmap(fitted(strokes, radius), radius).reduce((sum, pixel) => sum + pixel, 0);
    [thin, thick] = ink < INK ? [radius, thick] : [thin, radius];
  }
  const pixels = bitmap(fitted(strokes, thin), thin);
  const counts = new Array((SIDE / BLOCK) ** 2).fill(0);
  pixels.forEach((pixel, index) => {
    const row = Math.floor(index / SIDE / BLOCK);
    const column = Math.floor((index % SIDE) / BLOCK);
    counts[(row * SIDE) / BLOCK + column] += pixel;
  });
  return counts;
}

/** Counts of ink as RGB `[size, size, 3]`: what training makes of the data set's 8x8 values. */
export function enlarge(counts, size) {
  const side = SIDE / BLOCK;
  const grey = Uint8ClampedArray.from(counts, (count) => Math.round(count * (255 / 16)));
  const large = resize({ width: side, height: side, pixels: grey }, size, size, "bicubic").pixels;
  return Uint8ClampedArray.from({ length: 3 * large.length }, (_, i) => large[Math.floor(i / 3)]);
}

/** Strokes moved and scaled to fill the bitmap's height with a pen of this radius. */
function fitted(strokes, radius) {
  const points = strokes.flat();
  const range = (axis) => {
    const values = points.map((point) => point[axis]);
    return [Math.min(...values), Math.max(...values)];
  };
  const [left, right] = range("x");
  const [top, bottom] = range("y");
  // A line across, or a dot, is not stretched to the whole height. A narrow digit is widened, but a
  // 1 must not become a block.
  const height = Math.max(bottom - top, (right - left) / 4, Number.EPSILON);
  const down = (SIDE - 2 * radius) / height;
  const width = Math.max(right - left, Number.EPSILON);
  const across = Math.min(1.5 * down, Math.max(WIDTH - 2 * radius, 1) / width);
  return strokes.map((stroke) =>
    stroke.map(({ x, y }) => ({
      x: SIDE / 2 + (x - (left + right) / 2) * across,
      y: SIDE / 2 + (y - (top + bottom) / 2) * down,
    })),
  );
}

/** The 32x32 pixels, 1 where their centre is within `radius` of a stroke. */
function bitmap(strokes, radius) {
  const pixels = new Array(SIDE * SIDE).fill(0);
  const segments = strokes.flatMap((stroke) =>
    stroke.map((point, index) => [stroke[Math.max(0, index - 1)], point]),
  );
  for (const [from, to] of segments) {
    const firstRow = Math.max(0, Math.floor(Math.min(from.y, to.y) - radius));
    const lastRow = Math.min(SIDE - 1, Math.ceil(Math.max(from.y, to.y) + radius));
    for (let row = firstRow; row <= lastRow; row++) {
      for (let column = 0; column < SIDE; column++) {
        const near = distance(column + 0.5, row + 0.5, from, to) <= radius;
        if (near) pixels[row * SIDE + column] = 1;
      }
    }
  }
  return pixels;
}

/** From a point to a segment. */
function distance(x, y, from, to) {
  const [dx, dy] = [to.x - from.x, to.y - from.y];
  const length = dx * dx + dy * dy;
  const along = length === 0 ? 0 : ((x - from.x) * dx + (y - from.y) * dy) / length;
  const at = Math.min(1, Math.max(0, along));
  return Math.hypot(x - from.x - at * dx, y - from.y - at * dy);
}
