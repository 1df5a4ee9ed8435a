// Pillow's resize: separable, antialiased, in fixed point, equal to the byte. A canvas scales
// otherwise. Pillow 13 scales the height first of what is more than twice as high as wide, which
// changes some bytes by 1.

const BITS = 22; // of the fraction of a weight

export const FILTERS = {
  bilinear: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: { support: 2, weight: cubic },
};

function cubic(x) {
  const a = -0.5;
  const d = Math.abs(x);
  if (d < 1) return ((a + 2) * d - (a + 3)) * d * d + 1;
  return d < 2 ? (((d - 5) * d + 8) * d - 4) * a : 0;
}

/** The weights of each of `target` pixels, and the first of the `length` pixels they belong to. */
function windows(length, target, { support, weight }) {
  const scale = length / target;
  const widening = Math.max(scale, 1); // antialiasing: downscaling widens the filter
  const radius = support * widening;
  return Array.from({ length: target }, (_, index) => {
    const center = (index + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - radius + 0.5));
    const end = Math.min(length, Math.trunc(center + radius + 0.5));
    const weights = [];
    for (let x = first; x < end; x++) weights.push(weight((x - center + 0.5) * (1 / widening)));
    const sum = weights.reduce((total, each) => total + each, 0);
    const fixed = weights.map((each) => {
      const value = (each / sum) * 2 ** BITS;
      return Math.trunc(value + (value < 0 ? -0.5 : 0.5));
    });
    return { first, weights: Int32Array.from(fixed) };
  });
}

/** Scales the middle axis of bytes `[outer, length, inner]` to `target`. */
function scaleAxis(bytes, outer, length, inner, target, filter) {
  if (length === target) return bytes;
  const scaled = new Uint8ClampedArray(outer * target * inner);
  const all = windows(length, target, filter);
  let to = 0;
  for (let row = 0; row < outer; row++) {
    for (const { first, weights } of all) {
      const from = (row * length + first) * inner;
      for (let i = 0; i < inner; i++) {
        let sum = 2 ** (BITS - 1); // rounds
        for (let k = 0; k < weights.length; k++) sum += bytes[from + k * inner + i] * weights[k];
        scaled[to++] = sum >> BITS;
      }
    }
  }
  return scaled;
}

/**
 * Scales an image.
 *
 * @param {{width: number, height: number, pixels: Uint8ClampedArray}} image `[height, width, C]`
 * @param {"bilinear" | "bicubic"} interpolation
 * @returns an image `width` x `height`
 */
export function resize(image, width, height, interpolation) {
  const filter = FILTERS[interpolation];
  const channels = image.pixels.length / (image.width * image.height);
  const rows = scaleAxis(image.pixels, image.height, image.width, channels, width, filter);
  const pixels = scaleAxis(rows, 1, image.height, width * channels, height, filter);
  return { width, height, pixels };
}
