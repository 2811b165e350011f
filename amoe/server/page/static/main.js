// Puts the page together.

import { Attempt } from "./attempt.js";
import { showFigures } from "./figures.js";
import { duration } from "./format.js";
import { LayersPanel } from "./layers.js";
import { Live } from "./live.js";
import { key, setKey } from "./server.js";
import { showTable } from "./table.js";
import { isBad, showWorkers, trouble } from "./workers.js";

const RESTART_MS = 15000; // how long a restart is told
const find = (id) => document.getElementById(id);
const panel = new LayersPanel();
let latest = null;
let restartedAt = -Infinity;

const live = new Live(onView, onState);
new Attempt(() => latest?.model ?? null, () => onState("guarded", "locked"));

find("access").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(find("key").value.trim());
  live.now();
});

function onView(view, isOther) {
  latest = view;
  if (isOther) restartedAt = performance.now();
  showFigures(view);
  panel.show(view);
  showTable(view);
  showWorkers(view.workers, view.cluster);
  document.title = `amoe · ${view.model}`;
  find("about").textContent = about(view);
  find("about").title = about(view);
  showStatus(...health(view));
}

function onState(state, text) {
  document.body.dataset.state = state;
  find("access").hidden = state !== "guarded";
  if (state === "live") return; // the view says more
  if (state === "guarded") find("access-text").textContent = accessText();
  if (state === "guarded" && !find("access").contains(document.activeElement)) find("key").focus();
  showStatus(state === "lost" ? "bad" : "wait", text);
}

function accessText() {
  return key()
    ? "The server does not take this key. Try another one."
    : "This server asks for a key. It stays in this browser tab, until you close it.";
}

function health(view) {
  if (!view.healthy) return ["bad", view.word ?? "a worker makes no progress"];
  const bad = view.workers.find(isBad);
  if (bad) return ["bad", trouble(bad)];
  const changing = view.workers.map(trouble).find((text) => text !== null);
  const missing = view.cluster?.missing ?? 0;
  if (changing && missing) return ["bad", `${changing}; ${missing} experts are held by nobody`];
  if (changing ?? view.word) return ["wait", changing ?? view.word];
  if (performance.now() - restartedAt < RESTART_MS) return ["good", "live: the server has restarted"];
  return ["good", "live"];
}

function showStatus(kind, text) {
  find("status").dataset.state = kind;
  if (find("status-text").textContent !== text) find("status-text").textContent = text;
}

function about(view) {
  const number = view.workers.length || view.num_workers;
  const workers = `${number} worker${number === 1 ? "" : "s"}`;
  const up = duration(Date.now() / 1000 - view.started);
  return [view.model, view.schedule, workers, view.device, `context ${view.max_model_len}`, `v${view.version}`, `up ${up}`].join(" · ");
}
