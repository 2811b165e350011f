// The figures of the layers as a table, for those who read better than they see.

import { count, seconds, times } from "./format.js";

const box = document.getElementById("table-box");
const body = document.querySelector("#table tbody");
let latest = null;

box.addEventListener("toggle", () => latest && fill(latest));

/** Costs nothing while the table is closed. */
export function showTable(view) {
  latest = view;
  if (box.open) fill(view);
}

function fill({ layers, experts }) {
  while (body.rows.length > layers.count) body.deleteRow(-1);
  while (body.rows.length < layers.count) addRow();
  for (let layer = 0; layer < layers.count; layer++) {
    const cells = [
      ...block(layers.attention, layer),
      ...block(layers.experts, layer),
      seconds(layers.join_wait_s?.[layer]),
      count(experts?.known ? experts.mean[layer] * experts.experts : null),
      experts?.hottest[layer]?.toString() ?? "–",
      times(experts?.imbalance[layer]),
    ];
    cells.forEach((text, i) => (body.rows[layer].cells[i + 1].textContent = text));
  }
}

function block({ running, waiting, batch }, layer) {
  return [count(running?.[layer]), count(waiting?.[layer]), count(batch?.[layer])];
}

function addRow() {
  const row = body.insertRow();
  const name = document.createElement("th");
  name.scope = "row";
  name.textContent = String(row.sectionRowIndex);
  row.append(name);
  for (let i = 0; i < 10; i++) row.insertCell();
}
