// What the panel of the layers shows, as flat arrays: they can be moved from one view to the next step by step.

const LEVELS_SHOWN = 4; // the darkest cell has this many times its layer's mean, or more

/** @returns null as long as nothing is known. */
export function layerData(view) {
  const { layers, experts } = view;
  if (!layers.count) return null;
  const waiting = (kind) => Float32Array.from(layers[kind].waiting ?? layers[kind].depth);
  const running = (kind) => Float32Array.from(layers[kind].running ?? layers[kind].depth.map(() => 0));
  return {
    numLayers: layers.count,
    numExperts: experts?.experts ?? 0,
    bars: ["attention", "experts", "head"].map((kind) => ({ running: running(kind), waiting: waiting(kind) })),
    levels: experts ? decode(experts.levels, experts.levels_per_mean) : new Float32Array(0),
    view,
  };
}

/** Loads relative to the layer's mean, from base64 of bytes. */
function decode(text, perMean) {
  return Float32Array.from(atob(text), (char) => char.charCodeAt(0) / perMean);
}

/** Where a load is on the ramp, 0 to 1. Not in proportion: most loads are near the mean, and shall differ there. */
export function place(level) {
  return Math.min(1, (level / LEVELS_SHOWN) ** 0.7);
}

/** Both have the same shape. */
export function fits(a, b) {
  return a !== null && b !== null && a.numLayers === b.numLayers && a.numExperts === b.numExperts;
}

/** `share` (0 to 1) of the way from `a` to `b`. */
export function between(a, b, share) {
  const mix = (from, to) => from.map((value, i) => value + (to[i] - value) * share);
  return {
    ...b,
    bars: b.bars.map((bar, i) => ({
      running: mix(a.bars[i].running, bar.running),
      waiting: mix(a.bars[i].waiting, bar.waiting),
    })),
    levels: mix(a.levels, b.levels),
  };
}

/** The end of the scale of the bars: 1, 2 or 5 times a power of ten, and not below `least`. */
export function niceScale(data) {
  let peak = 1;
  for (const { running, waiting } of data.bars) {
    for (let i = 0; i < running.length; i++) peak = Math.max(peak, running[i] + waiting[i]);
  }
  const power = 10 ** Math.floor(Math.log10(peak));
  return power * [1, 2, 5, 10].find((step) => step * power >= peak);
}
