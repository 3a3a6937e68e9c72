"use strict";

function sortValue(row, column, numeric) {
  const value = row.cells[column].dataset.value;
  if (!numeric) return value;
  return value === "" ? null : Number(value);
}

function sortBy(header) {
  const table = header.closest("table");
  const column = header.cellIndex;
  const numeric = header.dataset.type === "number";
  const direction = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const rows = Array.from(table.tBodies[0].rows);
  rows.sort(function (a, b) {
    const x = sortValue(a, column, numeric);
    const y = sortValue(b, column, numeric);
    if (x === null || y === null) return (x === null) - (y === null);
    return direction * (numeric ? x - y : x.localeCompare(y, undefined, { numeric: true }));
  });
  for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
  header.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
  table.tBodies[0].append(...rows);
}

function standalone(svg) {
  const copy = svg.cloneNode(true);
  const box = svg.viewBox.baseVal;
  copy.setAttribute("width", box.width);
  copy.setAttribute("height", box.height);
  copy.style.color = "#000";
  copy.style.background = "#fff";
  for (const link of copy.querySelectorAll("a")) link.replaceWith(...link.childNodes);
  // Few other programs know the page's variables; the colours that they stand for are written beside them.
  const text = new XMLSerializer().serializeToString(copy).replace(/var\(--c\d, (#[0-9a-f]{6})\)/g, "$1");
  return new Blob([text], { type: "image/svg+xml;charset=utf-8" });
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(function () { URL.revokeObjectURL(link.href); }, 10000);
}

function savePng(svg, name) {
  const scale = 3;
  const box = svg.viewBox.baseVal;
  const picture = new Image();
  const source = URL.createObjectURL(standalone(svg));
  picture.onload = function () {
    const canvas = document.createElement("canvas");
    canvas.width = box.width * scale;
    canvas.height = box.height * scale;
    const context = canvas.getContext("2d");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    canvas.toBlob(function (blob) { save(blob, name); });
    URL.revokeObjectURL(source);
  };
  picture.src = source;
}

function openTarget() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const fold = target && target.closest("details");
  if (!fold || fold.open) return;
  fold.open = true;
  target.scrollIntoView();
}

function nextTheme(button) {
  const order = ["auto", "light", "dark"];
  const root = document.documentElement;
  const next = order[(order.indexOf(root.dataset.theme || "auto") + 1) % order.length];
  root.dataset.theme = next;
  button.textContent = "colours: " + next;
}

const theme = document.getElementById("theme");
theme.hidden = false;
theme.addEventListener("click", function () { nextTheme(theme); });
window.addEventListener("hashchange", openTarget);
openTarget();

for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", function () { sortBy(button.closest("th")); });
}
for (const button of document.querySelectorAll("[data-save]")) {
  button.hidden = false;
  button.addEventListener("click", function () {
    const svg = button.closest("figure").querySelector("svg");
    const name = button.dataset.name + "." + button.dataset.save;
    if (button.dataset.save === "png") savePng(svg, name);
    else save(standalone(svg), name);
  });
}
