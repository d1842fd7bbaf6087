"use strict";
// Draws what depends on the chosen layer and head: the strong line of the spectra, head similarity, attention maps.
const data = JSON.parse(document.getElementById("data").textContent);
const attention = data.attention;
const count = attention.tokens.length;
const $ = (id) => document.getElementById(id);
const chosen = { layer: 0, head: 0, query: count - 1, key: 0, row: 0, column: data.similarity[0].value.length > 1 ? 1 : 0 };

// Colours come from the style sheet, so that they follow light and dark.
function colour(name) {
  const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}
function between(stops, share) {
  const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const left = Math.min(Math.floor(at), stops.length - 2);
  const mixed = stops[left].map((value, i) => Math.round(value + (stops[left + 1][i] - value) * (at - left)));
  return `rgb(${mixed})`;
}

// Draws size x size cells; `fill` gives a colour, or null where there is no cell.
function draw(canvas, size, fill, row, column) {
  const cell = Math.max(4, Math.floor(480 / size));
  canvas.width = canvas.height = cell * size;
  const context = canvas.getContext("2d");
  for (let r = 0; r < size; r++) {
    for (let c = 0; c < size; c++) {
      const style = fill(r, c);
      if (style === null) continue;
      context.fillStyle = style;
      context.fillRect(c * cell, r * cell, cell, cell);
    }
  }
  context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--cursor");
  context.lineWidth = Math.min(Math.max(2, cell / 6), 5);
  const inset = context.lineWidth / 2;
  context.strokeRect(column * cell + inset, row * cell + inset, cell - 2 * inset, cell - 2 * inset);
}

// `move(row, column)` is called with the cell under the pointer, or beside the present one for an arrow key.
function navigate(canvas, size, at, move) {
  const clamp = (value) => Math.min(Math.max(value, 0), size - 1);
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    move(clamp(Math.floor(((event.clientY - box.top) / box.height) * size)), clamp(Math.floor(((event.clientX - box.left) / box.width) * size)));
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const [row, column] = at();
    move(clamp(row + step[0]), clamp(column + step[1]));
  });
}

function weights(model) {
  const bytes = atob(attention[model][chosen.layer][chosen.head]);
  return (query, key) => (bytes.charCodeAt((query * (query + 1)) / 2 + key) / 255) ** 2;
}
const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(3);
const quoted = (at) => `${at} “${attention.tokens[at]}”`;

function drawAttention() {
  const [original, compressed] = [weights("original"), weights("compressed")];
  const scale = ["--map-0", "--map-1", "--map-2"].map(colour);
  const diverging = ["--less", "--same", "--more"].map(colour);
  let limit = 0.05; // below it the two bytes' rounding would show
  for (let q = 0; q < count; q++) for (let k = 0; k <= q; k++) limit = Math.max(limit, Math.abs(compressed(q, k) - original(q, k)));
  const causal = (fill) => (q, k) => (k > q ? null : fill(q, k));
  const maps = {
    original: (q, k) => between(scale, Math.sqrt(original(q, k))),
    compressed: (q, k) => between(scale, Math.sqrt(compressed(q, k))),
    difference: (q, k) => between(diverging, 0.5 + (compressed(q, k) - original(q, k)) / (2 * limit)),
  };
  for (const name in maps) draw($(`attention-${name}`), count, causal(maps[name]), chosen.query, chosen.key);
  const [a, b] = [original(chosen.query, chosen.key), compressed(chosen.query, chosen.key)];
  $("attention-readout").textContent =
    `Query ${quoted(chosen.query)} on key ${quoted(chosen.key)}: original ${a.toFixed(3)}, compressed ${b.toFixed(3)}, difference ${signed(b - a)}`;
  $("attention-distance").textContent =
    `Layer ${chosen.layer}, head ${chosen.head}: rows differ by ${attention.distance[chosen.layer][chosen.head].toFixed(4)} on average (total variation; 0 is equal, 1 is disjoint).`;
  $("difference-low").textContent = signed(-limit);
  $("difference-high").textContent = signed(limit);
  document.querySelectorAll(".tokens li").forEach((item, at) => {
    item.classList.toggle("is-query", at === chosen.query);
    item.classList.toggle("is-key", at === chosen.key);
  });
}

function drawSimilarity() {
  const scale = ["--map-0", "--map-1", "--map-2"].map(colour);
  const parts = [];
  for (const [name, matrix] of Object.entries(data.similarity[chosen.layer])) {
    draw($(`similarity-${name}`), matrix.length, (r, c) => between(scale, matrix[r][c]), chosen.row, chosen.column);
    parts.push(`${name}s ${matrix[chosen.row][chosen.column].toFixed(3)}`);
  }
  $("similarity-readout").textContent = `KV heads ${chosen.row} and ${chosen.column}: ${parts.join(", ")}`;
}

function drawAll() {
  document.querySelectorAll("#spectra-lines .line").forEach((line) => {
    line.classList.toggle("chosen", Number(line.dataset.layer) === chosen.layer);
  });
  drawSimilarity();
  drawAttention();
}

document.querySelectorAll("select[data-choice]").forEach((select) => {
  const what = select.dataset.choice;
  select.addEventListener("change", () => {
    chosen[what] = Number(select.value);
    document.querySelectorAll(`select[data-choice=${what}]`).forEach((other) => (other.value = select.value));
    drawAll();
  });
});
for (const name of ["original", "compressed", "difference"]) {
  navigate($(`attention-${name}`), count, () => [chosen.query, chosen.key], (query, key) => {
    chosen.query = query;
    chosen.key = Math.min(key, query);
    drawAttention();
  });
}
for (const name in data.similarity[0]) {
  navigate($(`similarity-${name}`), data.similarity[0][name].length, () => [chosen.row, chosen.column], (row, column) => {
    [chosen.row, chosen.column] = [row, column];
    drawSimilarity();
  });
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
drawAll();
