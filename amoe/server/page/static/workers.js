// One line per worker: how busy it is and with what, and what it has at hand.

import { count, percent, seconds } from "./format.js";

const MANY = 16; // from here on the details are left to pointing at a worker
const list = document.getElementById("workers");
const rows = new Map();

export function showWorkers(workers) {
  list.classList.toggle("many", workers.length > MANY);
  const ranks = new Set(workers.map((worker) => worker.rank));
  for (const [rank, row] of rows) {
    if (!ranks.has(rank)) {
      row.item.remove();
      rows.delete(rank);
    }
  }
  for (const worker of workers) show(worker);
}

function show(worker) {
  if (!rows.has(worker.rank)) rows.set(worker.rank, create());
  const row = rows.get(worker.rank);
  const home = worker.busy_home ?? 0;
  const experts = worker.busy_experts ?? 0;
  const busy = worker.busy_home === null ? null : Math.min(1, home + experts);
  row.name.textContent = `${worker.rank} ${worker.role}`;
  row.home.style.width = `${home * 100}%`;
  row.experts.style.width = `${experts * 100}%`;
  row.percent.textContent = percent(busy);
  row.detail.textContent = detail(worker);
  row.item.classList.toggle("bad", worker.silent_s !== null);
  row.item.title = `${percent(busy)} busy; ${detail(worker)}`;
}

function detail(worker) {
  const parts = [];
  if (worker.silent_s !== null) parts.push(`nothing heard for ${count(Math.round(worker.silent_s))} s`);
  if (worker.in_flight !== null) {
    parts.push(`${count(worker.in_flight)} in flight`, `${count(worker.running)} running`);
    if (worker.waiting) parts.push(`${count(worker.waiting)} waiting`);
    parts.push(`KV ${percent(worker.kv_used)}`);
  } else {
    parts.push(`${count(worker.queued)} queued`, `oldest ${seconds(worker.oldest_s)}`);
  }
  return parts.join(" · ");
}

function create() {
  const make = (tag, name, parent) => {
    const element = document.createElement(tag);
    element.className = name;
    parent.append(element);
    return element;
  };
  const item = make("li", "worker", list);
  const name = make("span", "name", item);
  const meter = make("span", "meter", item);
  meter.setAttribute("aria-hidden", "true");
  return {
    item,
    name,
    home: make("i", "home", meter),
    experts: make("i", "exp", meter),
    percent: make("span", "percent", item),
    detail: make("span", "detail note", item),
  };
}
