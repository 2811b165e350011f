// The panel of the layers: for each, the tokens at its two blocks, and the load of its experts as a row of a heatmap.

import { between, fits, layerData, niceScale, place } from "./layer_data.js";
import { count, seconds, times } from "./format.js";
import { css, ramp } from "./theme_colors.js";

const MOVE_MS = 500; // from one view to the next
const TOP = 30; // the names of the columns
const calm = matchMedia("(prefers-reduced-motion: reduce)");

export class LayersPanel {
  #canvas = document.getElementById("layers");
  #readout = document.getElementById("readout");
  #shown = null; // what is drawn now
  #from = null;
  #target = null;
  #since = 0;
  #frame = 0;
  #scale = 1;
  #colors = null;
  #cursor = null; // [layer, expert]

  constructor() {
    for (const tick of document.querySelectorAll("[data-level]")) {
      tick.style.left = `${place(Number(tick.dataset.level)) * 100}%`;
    }
    new ResizeObserver(() => this.#draw()).observe(this.#canvas.parentElement);
    document.addEventListener("themechange", () => {
      this.#colors = null;
      this.#draw();
    });
    this.#canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.#canvas.addEventListener("pointerdown", (event) => this.#point(event));
    this.#canvas.addEventListener("pointerleave", () => this.#moveTo(null));
    this.#canvas.addEventListener("keydown", (event) => this.#onKey(event));
  }

  show(view) {
    const data = layerData(view);
    if (data === null) return;
    this.#from = fits(this.#shown, data) && !calm.matches ? this.#shown : data;
    this.#target = data;
    this.#since = performance.now();
    const scale = niceScale(data);
    // Up at once, down only when there is much room: a scale that jumps to and fro cannot be read.
    if (scale > this.#scale || scale * 4 <= this.#scale) this.#scale = scale;
    this.#describe(data);
    this.#tell();
    cancelAnimationFrame(this.#frame);
    this.#step();
  }

  #step() {
    const share = this.#from === this.#target ? 1 : Math.min(1, (performance.now() - this.#since) / MOVE_MS);
    this.#shown = share < 1 ? between(this.#from, this.#target, share) : this.#target;
    this.#draw();
    if (share < 1) this.#frame = requestAnimationFrame(() => this.#step());
  }

  // -- where things are --------------------------------------------------------------------------------------------

  #layout() {
    const { numLayers, numExperts } = this.#shown;
    const width = this.#canvas.clientWidth;
    const isNarrow = width < 560;
    const row = Math.max(12, Math.min(36, Math.floor(420 / numLayers)));
    const label = 34;
    const bar = isNarrow ? Math.floor(width * 0.15) : Math.max(60, Math.min(140, Math.floor(width * 0.12)));
    const batch = isNarrow ? 0 : 42;
    const tail = isNarrow ? 40 : 92;
    const column = bar + batch + 12;
    const map = label + 2 * column + 4;
    return {
      width, row, label, bar, batch, isNarrow, map,
      bars: [label, label + column],
      mapWidth: Math.max(40, width - map - tail - 8),
      tail: width - tail,
      height: TOP + row * (numLayers + 1) + 6,
      numLayers, numExperts,
    };
  }

  // -- drawing -----------------------------------------------------------------------------------------------------

  #draw() {
    if (this.#shown === null || this.#canvas.clientWidth === 0) return;
    this.#colors ??= {
      ramp: ramp(), ink: css("ink"), muted: css("muted"), rule: css("rule"), panel: css("panel"),
      attention: [css("attention"), css("attention-pale")], experts: [css("experts"), css("experts-pale")],
    };
    const at = this.#layout();
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [Math.round(at.width * ratio), Math.round(at.height * ratio)];
    if (this.#canvas.width !== width || this.#canvas.height !== height) {
      this.#canvas.width = width;
      this.#canvas.height = height;
      this.#canvas.style.height = `${at.height}px`;
    }
    const pen = this.#canvas.getContext("2d");
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.clearRect(0, 0, width, height);
    this.#drawMap(pen, at, ratio);
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.#drawNames(pen, at);
    this.#drawBars(pen, at);
    this.#drawTail(pen, at);
    this.#drawCursor(pen, at);
  }

  #font(pen, size, align, color = this.#colors.muted) {
    pen.font = `${size}px ${getComputedStyle(document.body).fontFamily}`;
    pen.textAlign = align;
    pen.textBaseline = "middle";
    pen.fillStyle = color;
  }

  #drawNames(pen, at) {
    this.#font(pen, 11, "left");
    pen.fillText(at.isNarrow ? "att." : "attention", at.bars[0], 8);
    pen.fillText("experts", at.bars[1], 8);
    const map = at.numExperts ? `load of experts 0 to ${at.numExperts - 1}` : "load of the experts";
    pen.fillText(map, at.map, 8, at.mapWidth);
    pen.fillText(at.isNarrow ? "peak" : "hottest, its load", at.tail, 8);
    this.#font(pen, 10, "left");
    for (const x of at.bars) {
      pen.fillText(`0–${count(this.#scale)}${at.isNarrow ? "" : " tokens"}`, x, 21);
      if (at.batch) pen.fillText("batch", x + at.bar + 8, 21);
    }
    this.#font(pen, 11, "right");
    for (let layer = 0; layer < at.numLayers; layer++) {
      pen.fillText(String(layer), at.label - 8, TOP + (layer + 0.5) * at.row);
    }
    this.#font(pen, 11, "left");
    pen.fillText("head", 0, TOP + (at.numLayers + 0.5) * at.row + 4);
  }

  #drawBars(pen, at) {
    const [attention, experts, head] = this.#shown.bars;
    const { attention: warm, experts: cool, rule } = this.#colors;
    const bar = (x, layer, { running, waiting }, i, [solid, pale], shift = 0) => {
      const y = TOP + layer * at.row + 1 + shift;
      const height = at.row - 2;
      const perToken = at.bar / this.#scale;
      const first = Math.min(at.bar, running[i] * perToken);
      const both = Math.min(at.bar, (running[i] + waiting[i]) * perToken);
      pen.fillStyle = pale;
      pen.fillRect(x, y, both, height);
      pen.fillStyle = solid;
      pen.fillRect(x, y, first, height);
    };
    pen.fillStyle = rule;
    for (const x of at.bars) pen.fillRect(x - 1, TOP, 1, at.row * at.numLayers);
    pen.fillRect(at.bars[0] - 1, TOP + at.row * at.numLayers + 4, 1, at.row);
    for (let layer = 0; layer < at.numLayers; layer++) {
      bar(at.bars[0], layer, attention, layer, warm);
      bar(at.bars[1], layer, experts, layer, cool);
    }
    bar(at.bars[0], at.numLayers, head, 0, warm, 4);
    if (at.batch) this.#drawBatches(pen, at);
  }

  #drawBatches(pen, at) {
    const { attention, experts, head } = this.#shown.view.layers;
    this.#font(pen, 11, "right");
    const put = (x, row, size) => size && pen.fillText(count(Number(size.toFixed(1))), x + at.bar + 34, TOP + (row + 0.5) * at.row);
    for (let layer = 0; layer < at.numLayers; layer++) {
      put(at.bars[0], layer, attention.batch?.[layer]);
      put(at.bars[1], layer, experts.batch?.[layer]);
    }
    put(at.bars[0], at.numLayers + 4 / at.row, head.batch?.[0]);
  }

  /** The heatmap, in device pixels. More experts than pixels: a pixel shows the hottest of its own. */
  #drawMap(pen, at, ratio) {
    const { numLayers, numExperts, levels } = this.#shown;
    if (!numExperts) return;
    const left = Math.round(at.map * ratio);
    const width = Math.round(at.mapWidth * ratio);
    const columns = Math.min(numExperts, width);
    const image = new ImageData(columns, numLayers);
    for (let layer = 0; layer < numLayers; layer++) {
      for (let column = 0; column < columns; column++) {
        const end = Math.max(Math.ceil(((column + 1) * numExperts) / columns), 1);
        let level = 0;
        for (let e = Math.floor((column * numExperts) / columns); e < end; e++) {
          level = Math.max(level, levels[layer * numExperts + e]);
        }
        const [r, g, b] = this.#colors.ramp[Math.round(place(level) * 255)];
        image.data.set([r, g, b, 255], 4 * (layer * columns + column));
      }
    }
    const small = new OffscreenCanvas(columns, numLayers);
    small.getContext("2d").putImageData(image, 0, 0);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(small, left, Math.round(TOP * ratio), width, Math.round(at.row * numLayers * ratio));
    this.#drawGrid(pen, at, ratio, left, width);
  }

  /** Lines between the cells, where there is room for them. */
  #drawGrid(pen, at, ratio, left, width) {
    pen.fillStyle = this.#colors.panel;
    for (let layer = 1; layer < at.numLayers; layer++) {
      pen.fillRect(left, Math.round((TOP + layer * at.row) * ratio), width, 1);
    }
    if (at.mapWidth / at.numExperts < 6) return;
    const height = at.row * at.numLayers * ratio;
    for (let e = 1; e < at.numExperts; e++) {
      pen.fillRect(left + Math.round((e * width) / at.numExperts), TOP * ratio, 1, height);
    }
  }

  #drawTail(pen, at) {
    const { imbalance, hottest } = this.#shown.view.experts ?? { imbalance: [], hottest: [] };
    imbalance.forEach((value, layer) => {
      if (value === null) return;
      const y = TOP + (layer + 0.5) * at.row;
      if (!at.isNarrow) {
        this.#font(pen, 11, "right");
        pen.fillText(String(hottest[layer]), at.tail + 28, y);
      }
      this.#font(pen, 11, "right", this.#colors.ink);
      pen.fillText(`${value.toFixed(value < 10 ? 2 : 1)} ×`, at.width - 2, y);
    });
  }

  // -- figures of one cell -----------------------------------------------------------------------------------------

  #drawCursor(pen, at) {
    if (this.#cursor === null || !at.numExperts) return;
    const [layer, expert] = this.#cursor;
    const cell = at.mapWidth / at.numExperts;
    pen.strokeStyle = this.#colors.ink;
    pen.lineWidth = 1.5;
    pen.strokeRect(at.map + expert * cell - 1, TOP + layer * at.row - 1, Math.max(3, cell) + 2, at.row + 2);
  }

  #point(event) {
    if (this.#shown === null) return;
    const at = this.#layout();
    const box = this.#canvas.getBoundingClientRect();
    const layer = Math.floor((event.clientY - box.top - TOP) / at.row);
    const expert = Math.floor(((event.clientX - box.left - at.map) / at.mapWidth) * at.numExperts);
    const isInside = layer >= 0 && layer < at.numLayers;
    this.#moveTo(isInside ? [layer, Math.max(0, Math.min(at.numExperts - 1, expert))] : null);
  }

  #onKey(event) {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const move = moves[event.key];
    if (move === undefined || this.#shown === null) return;
    event.preventDefault();
    const [layer, expert] = this.#cursor ?? [0, -1];
    const clip = (value, size) => Math.max(0, Math.min(size - 1, value));
    this.#moveTo([clip(layer + move[0], this.#shown.numLayers), clip(expert + move[1], this.#shown.numExperts)]);
  }

  #moveTo(cursor) {
    this.#cursor = cursor;
    // Spoken when the user moves, not with every view.
    this.#readout.setAttribute("aria-live", cursor === null ? "off" : "polite");
    this.#tell();
    this.#readout.setAttribute("aria-live", "off");
    this.#readout.classList.toggle("active", cursor !== null);
    this.#draw();
  }

  #tell() {
    if (this.#target === null) return;
    const text =
      this.#cursor === null
        ? "Point at a cell, or use the arrow keys, for its figures."
        : cellText(this.#target, ...this.#cursor);
    if (this.#readout.textContent !== text) this.#readout.textContent = text;
  }

  #describe(data) {
    const { experts } = data.view;
    const known = (experts?.imbalance ?? []).filter((value) => value !== null);
    const worst = known.length ? Math.max(...known) : null;
    const load = worst === null ? "no load now" : `greatest load of an expert ${times(worst)} the mean of its layer`;
    const text = `${data.numLayers} layers, ${data.numExperts} experts each; ${load}. The same figures are in the table below.`;
    this.#canvas.setAttribute("role", "img");
    this.#canvas.setAttribute("aria-label", text);
  }
}

function cellText(data, layer, expert) {
  const { layers, experts } = data.view;
  const parts = [`Layer ${layer}`];
  if (experts?.known && expert >= 0) {
    const level = data.levels[layer * data.numExperts + expert];
    parts.push(`expert ${expert}: ${count(level * experts.mean[layer])} pairs/s, ${times(level)} the mean`);
  }
  for (const [kind, name] of [["attention", "attention"], ["experts", "experts"]]) {
    const waiting = layers[kind].waiting?.[layer] ?? layers[kind].depth[layer];
    const batch = layers[kind].batch?.[layer];
    parts.push(`${name}: ${count(waiting)} waiting${batch ? `, batches of ${count(batch)}` : ""}`);
  }
  const join = layers.join_wait_s?.[layer];
  if (join) parts.push(`join wait ${seconds(join)}`);
  return parts.join(" · ");
}
