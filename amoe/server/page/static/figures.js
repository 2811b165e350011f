// The figures on top, and the lines of the last minutes.

import { count, percent, seconds } from "./format.js";

const HISTORY_S = 300;
const set = (id, text) => {
  const element = document.getElementById(id);
  if (element.textContent !== text) element.textContent = text;
};

export function showFigures(view) {
  const { requests, throughput, latency, waves, capacity } = view;
  set("generated", count(throughput.generated));
  set("prompt", count(throughput.prompt));
  line("generated", throughput.history.seconds, throughput.history.generated);
  line("prompt", throughput.history.seconds, throughput.history.prompt);
  set("running", count(requests.running));
  set("waiting", count(requests.waiting));
  for (const name of ["ttft", "itl"]) {
    set(`${name}-p50`, seconds(latency[name].p50));
    set(`${name}-p99`, seconds(latency[name].p99));
  }
  set("kv", percent(requests.kv_used));
  set("hits", percent(requests.prefix_hits));
  document.getElementById("waves-figure").hidden = waves === null;
  set("waves", count(waves));
  document.getElementById("capacity-figure").hidden = capacity === null;
  set("dropped", count(capacity?.dropped));
  set("rerouted", count(capacity?.rerouted));
}

/** A line over the last minutes; `ages[i]` is how many seconds ago `values[i]` was. */
function line(name, ages, values) {
  const peak = Math.max(0, ...values);
  const points = values.map((value, i) => {
    const x = HISTORY_S - Math.min(HISTORY_S, ages[i]);
    return `${x.toFixed(1)} ${(39 - (38 * value) / (peak || 1)).toFixed(1)}`;
  });
  document.querySelector(`#${name}-line path`).setAttribute("d", points.length > 1 ? `M${points.join("L")}` : "");
  set(`${name}-note`, peak > 0 ? `last 5 min, peak ${count(peak)}` : "last 5 min");
}
