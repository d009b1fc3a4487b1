"use strict";
// Sorting, filtering and the pictures' views. Without this script everything is shown, in the order it was written.

const table = document.getElementById("comparison");
const body = table.tBodies[0];
const headings = [...table.tHead.rows[0].cells];

function value(row, column) {
  const text = row.cells[column].dataset.value;
  if (text === undefined) return null;
  return headings[column].classList.contains("figure") ? Number(text) : text;
}

function sort(column, direction) {
  const rows = [...body.rows].map((row) => [value(row, column), row]);
  rows.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null); // what is absent stays at the end
    return direction * (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
  });
  body.append(...rows.map(([, row]) => row));
  headings.forEach((heading, index) => {
    if (index === column) heading.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
    else heading.removeAttribute("aria-sort");
  });
}

headings.forEach((heading, column) => {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...heading.childNodes);
  button.addEventListener("click", () => sort(column, heading.getAttribute("aria-sort") === "ascending" ? -1 : 1));
  heading.append(button);
});

const controls = {};
for (const name of ["text", "status", "group", "shown", "save"]) controls[name] = document.getElementById(`filter-${name}`);

function filter() {
  const wanted = controls.text.value.trim().toLowerCase().split(/\s+/);
  let shown = 0;
  for (const row of body.rows) {
    const content = row.textContent.toLowerCase();
    const matches = wanted.every((word) => content.includes(word));
    const status = !controls.status.value || row.dataset.status === controls.status.value;
    const group = !controls.group?.value || row.dataset.group === controls.group.value;
    row.hidden = !(matches && status && group);
    shown += !row.hidden;
  }
  controls.shown.textContent = `${shown} of ${body.rows.length} shown`;
}

controls.text.addEventListener("input", filter);
controls.status.addEventListener("change", filter);
controls.group?.addEventListener("change", filter);
controls.save.addEventListener("click", () => {
  const data = document.getElementById("results").textContent;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([data], { type: "application/json" }));
  link.download = "results.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});

for (const choice of document.querySelectorAll("input[name=view]")) {
  choice.addEventListener("change", () => {
    document.getElementById("grid").dataset.view = choice.value;
  });
}

addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => (part.open = true)));
for (const part of document.querySelectorAll(".controls")) part.hidden = false;
filter();
