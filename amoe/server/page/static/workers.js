// One line per worker: whether it serves, how busy it is and with what, and what it has at hand.

import { count, percent, seconds } from "./format.js";

const MANY = 16; // from here on the details are left to pointing at a worker
const MISSED = ["lost", "waiting"];
const list = document.getElementById("workers");
const note = document.getElementById("cluster");
const rows = new Map();

/** What somebody should know of a worker that does not just serve; null: nothing. */
export function trouble(worker) {
  const name = worker.title ?? `worker ${worker.rank}`;
  if (worker.state === "lost") return `${name} is lost`;
  if (worker.state === "waiting") return `${name} has died ${times(worker.crashes)}; next try in ${seconds(worker.retry_s)}`;
  if (worker.silent_s !== null) return `${name} is silent`;
  if (worker.state === "starting") return `${name} is being started`;
  if (worker.state === "draining") return `${name} is leaving: its experts go elsewhere`;
  return null;
}

export const isBad = (worker) => worker.silent_s !== null || MISSED.includes(worker.state);

function times(number) {
  return number === 1 ? "once" : `${number} times in a row`;
}

export function showWorkers(workers, cluster) {
  const text = cluster === null ? "" : clusterText(cluster, workers);
  if (note.textContent !== text) note.textContent = text;
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

function clusterText(cluster, workers) {
  const parts = [];
  if (workers.some(({ role }) => role === "experts")) parts.push(`${cluster.expert_workers} of at most ${cluster.max_expert_workers} expert workers`);
  if (cluster.replicas) parts.push(`${count(cluster.replicas)} replicas of experts`);
  if (cluster.missing) parts.push(`${count(cluster.missing)} experts are held by nobody`);
  if (cluster.action) parts.push(cluster.action);
  return parts.join(" · ");
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
  row.item.classList.toggle("bad", isBad(worker));
  row.item.classList.toggle("changing", worker.state === "starting" || worker.state === "draining");
  row.item.dataset.state = worker.state ?? "";
  const end = worker.last_end ? `; its last life: ${worker.last_end}` : "";
  row.item.title = `${percent(busy)} busy; ${detail(worker)}${end}`;
}

function detail(worker) {
  const parts = [];
  if (worker.state === "lost") parts.push(worker.last_end ?? "lost");
  if (worker.state === "waiting") parts.push(`died ${times(worker.crashes)}, next try in ${seconds(worker.retry_s)}`);
  if (worker.state === "starting") parts.push(worker.life > 1 ? `being started anew, life ${worker.life}` : "being started");
  if (parts.length) return parts.join(" · ");
  if (worker.state === "draining") parts.push("leaving");
  else if (worker.life > 1) parts.push(`life ${worker.life}`);
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
