
// The page: what is chosen, and the views that follow it.

const SVG = document.getElementById("profile").namespaceURI;
const SHOWN = 8; // sources and readers listed
const byId = (id) => document.getElementById(id);
const state = { layer: 0, selected: firstSelected(), cursor: null, isLog: true };
const charts = [];

// Where Deep Decay shows: the first step of the summary.
function firstSelected() {
  const summary = steps.findIndex((step) => step.label === "summary");
  return summary < 0 ? count - 1 : summary;
}

function element(name, text = "", classes = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (classes) made.className = classes;
  return made;
}

function shape(name, attributes, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
}

const chip = (i) => element("span", `${i}`, `chip ${steps[i].label}`);

function key(colour, text) {
  const made = element("span");
  const dot = element("i");
  dot.style.background = `var(--${colour})`;
  made.append(dot, text);
  return made;
}

function showFacts() {
  byId("facts").replaceChildren(...report.facts.map((fact) => element("span", fact)));
  document.title = `Step-Saliency · ${report.facts[0]}`;
  byId("settings").hidden = report.settings.length === 0;
  for (const [name, value] of report.settings) {
    const row = element("div");
    row.append(element("dt", name), element("dd", value));
    byId("settings").querySelector("dl").append(row);
  }
  byId("map-about").textContent =
    "Rows read, columns are drawn on: |attention × gradient of the loss|, mean over " +
    (report.pooling === "causal" ? "the token pairs of two steps" : "all token pairs of two steps, seen or not") +
    (report.heads > 1 ? ` and over ${report.heads} heads.` : ".");
  byId("exactness").textContent = `${+(100 * report.precision).toPrecision(2)} %`;
  byId("segments").append(...[...new Set(steps.map((step) => step.label))].map((label) => key(label, label)));
}

// Sets the layer, the selected step or both, and redraws what shows them.
function choose(change) {
  const layer = Math.min(layers.length - 1, Math.max(0, change.layer ?? state.layer));
  const selected = Math.min(count - 1, Math.max(0, change.selected ?? state.selected));
  Object.assign(state, change, { layer, selected });
  byId("layer").value = layer;
  byId("layer").setAttribute("aria-valuetext", `layer ${layers[layer]}`);
  byId("layer-name").textContent = layers[layer];
  byId("shallower").disabled = layer === 0;
  byId("deeper").disabled = layer === layers.length - 1;
  Object.assign(document.documentElement.dataset, { layer: layers[layer], selected });
  paintMap();
  showPanel();
  tintSteps();
  for (const chart of charts) chart.mark(layer);
}

function paintMap() {
  paintImage(state.layer, state.isLog, layOut());
  drawHeat(state);
  drawRamp(state.isLog);
  if (state.cursor) showTip();
}

function describe({ i, j }) {
  const { sums, total } = readsOf(state.layer, i);
  return {
    value: formatEntry(state.layer, i, j),
    share:
      total > 0
        ? `${percent(sums[j], total)} of what step ${i} reads in layer ${layers[state.layer]}`
        : `step ${i} reads nothing in layer ${layers[state.layer]}`,
    roles: i === j ? [[i, `${nameOf(i)} reads itself`]] : [[i, `${nameOf(i)} reads`], [j, nameOf(j)]],
  };
}

function showTip() {
  const { i, j } = state.cursor;
  const { value, share, roles } = describe(state.cursor);
  const tip = byId("tip");
  const parts = roles.map(([place, role]) => {
    const part = element("p");
    part.append(chip(place), ` ${role}`, element("span", textOf(place, 160), "quote"));
    return part;
  });
  tip.replaceChildren(element("b", value), element("div", share, "soft"), ...parts);
  tip.hidden = false;
  const room = heat.parentElement.clientWidth;
  const { offsetWidth: wide, offsetHeight: tall } = tip;
  // In the corner above the diagonal it hides no entry; a small map has no such room.
  const inCorner = count > 1 && plot.left + plot.size - wide > plot.left + tall + 12;
  const [x, y] = [j, i].map((place) => ((place + 0.5) * plot.size) / count);
  const beside = Math.min(plot.left + x + LARGEST_CELL / 2 + 8, room - wide);
  const below = y + tall + 22 > plot.size ? Math.max(0, y - tall - 40) : y + 22;
  tip.style.left = `${Math.max(0, inCorner ? plot.left + plot.size - wide : beside)}px`;
  tip.style.top = `${inCorner ? plot.top : below}px`;
}

function point(cursor) {
  const same = cursor && state.cursor && cursor.i === state.cursor.i && cursor.j === state.cursor.j;
  if (same || (!cursor && !state.cursor)) return;
  state.cursor = cursor;
  byId("tip").hidden = true;
  drawHeat(state);
  if (cursor) showTip();
}

function moveCursor(event) {
  const { i, j } = state.cursor || { i: state.selected, j: state.selected };
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  if (event.key in moves) {
    const row = Math.min(count - 1, Math.max(0, i + moves[event.key][0]));
    point({ i: row, j: Math.min(row, Math.max(0, j + moves[event.key][1])) });
  } else if (event.key === "Home" || event.key === "End") {
    point({ i, j: event.key === "Home" ? 0 : i });
  } else if (event.key === "PageUp" || event.key === "PageDown") {
    choose({ layer: state.layer + (event.key === "PageUp" ? 1 : -1) });
  } else if (event.key === "Enter" || event.key === " ") {
    choose({ selected: i });
  } else if (event.key === "Escape") {
    point(null);
  } else return;
  event.preventDefault();
  if (!state.cursor) return;
  const { value, share, roles } = describe(state.cursor);
  byId("spoken").textContent = [...roles.map(([place, role]) => `step ${place}, ${role}`), value, share].join(", ");
}

// The pointer's entry; beside the plot, the step of the row or column there.
function eventEntry(event) {
  const box = heat.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
}

function clickMap(event) {
  const [x, y] = eventEntry(event);
  const within = (place) => Math.min(plot.size - 0.5, Math.max(0.5, place));
  const isBelow = y > plot.top + plot.size;
  const { i, j } = entryAt(plot.left + within(x - plot.left), plot.top + within(y - plot.top));
  choose({ selected: isBelow ? j : i });
}

function hoverMap(event) {
  const entry = entryAt(...eventEntry(event));
  point(entry && entry.j <= entry.i ? entry : null);
}

function start() {
  showFacts();
  buildSteps();
  buildCharts();
  byId("layer").max = layers.length - 1;
  byId("layer").disabled = layers.length === 1;
  byId("layer").addEventListener("input", (event) => choose({ layer: Number(event.target.value) }));
  byId("shallower").addEventListener("click", () => choose({ layer: state.layer - 1 }));
  byId("deeper").addEventListener("click", () => choose({ layer: state.layer + 1 }));
  for (const option of document.getElementsByName("scale")) {
    option.addEventListener("change", () => {
      state.isLog = document.querySelector("[name=scale]:checked").value === "log";
      paintMap();
    });
  }
  heat.addEventListener("pointermove", hoverMap);
  heat.addEventListener("pointerleave", () => point(null));
  heat.addEventListener("blur", () => point(null));
  heat.addEventListener("click", clickMap);
  heat.addEventListener("keydown", moveCursor);
  darkTheme.addEventListener("change", paintMap);
  let width = 0;
  new ResizeObserver(([{ contentRect }]) => {
    if (contentRect.width !== width && width) paintMap();
    width = contentRect.width;
  }).observe(heat.parentElement);
  choose({});
  document.documentElement.dataset.ready = "true";
}

start();
