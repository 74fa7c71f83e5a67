
// The heat map on its canvas: rows read, columns are read.

// Magma (matplotlib, CC0): from the dark end up, even steps of lightness.
const MAGMA = "000004 140e36 3b0f70 641a80 8c2981 b73779 de4968 f7705c fe9f6d fecf92 fcfdbf".split(" ");
const STRIP = 15; // thickness of the bands that name the segments, CSS pixels
const LARGEST_CELL = 64;

const heat = document.getElementById("heat");
const darkTheme = matchMedia("(prefers-color-scheme: dark)");
const image = document.createElement("canvas");
let plot = { left: 0, top: 0, size: 1 }; // CSS pixels

const cssColour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// 256 colours from least to most; the least stands nearest to the page.
function palette() {
  const stops = MAGMA.map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  if (!darkTheme.matches) stops.reverse();
  return Array.from({ length: 256 }, (_, number) => {
    const at = (darkTheme.matches ? 0.1 + (0.9 * number) / 255 : number / 255) * (stops.length - 1);
    const low = Math.min(Math.floor(at), stops.length - 2);
    const mixed = stops[low].map((value, channel) => value + (at - low) * (stops[low + 1][channel] - value));
    return mixed.map(Math.round);
  });
}

// Where the shared scale puts an entry, from 0 to 1.
function scaled(layer, i, code, isLog) {
  const { low, high, linear } = report.scale;
  if (code < 2) return 0;
  const log = logOf(layer, i, code);
  const at = isLog ? (high > low ? (log - Math.log(low)) / Math.log(high / low) : 1) : Math.exp(log) / linear;
  return Math.min(1, Math.max(0, at));
}

// The map of a layer with a pixel for each entry; of traces with more steps than pixels, the largest of each pixel.
function paintImage(layer, isLog, pixels) {
  const size = Math.min(count, pixels);
  const places = new Float32Array(size * size).fill(-1);
  for (let i = 0; i < count; i++) {
    const row = Math.floor((i * size) / count) * size;
    for (let j = 0; j <= i; j++) {
      const code = codeOf(layer, i, j);
      const pixel = row + Math.floor((j * size) / count);
      if (code > 0) places[pixel] = Math.max(places[pixel], scaled(layer, i, code, isLog));
    }
  }
  image.width = image.height = size;
  const context = image.getContext("2d");
  const data = context.createImageData(size, size);
  const colours = palette().map((colour) => [...colour, 255]);
  places.forEach((place, pixel) => {
    if (place >= 0) data.data.set(colours[Math.round(255 * place)], 4 * pixel);
  });
  context.putImageData(data, 0, 0);
}

// Runs of steps of one segment and round: [first, end, label].
function blocks() {
  const found = [];
  steps.forEach(({ label, round }, i) => {
    const last = found[found.length - 1];
    if (last && last.label === label && last.round === round) last.end = i + 1;
    else found.push({ first: i, end: i + 1, label, round });
  });
  return found;
}

// Fits the plot to the width at hand, with entries of whole device pixels where that costs little room.
function layOut() {
  const ratio = window.devicePixelRatio || 1;
  const left = STRIP + 16 + 8 * String(count - 1).length + 14;
  const bottom = STRIP + 38;
  const room = Math.min(heat.parentElement.clientWidth - left - 2, Math.max(360, window.innerHeight - 230));
  let size = Math.round(Math.max(160, Math.min(room, count * LARGEST_CELL)) * ratio);
  const whole = Math.floor(size / count) * count;
  if (whole > 0.86 * size) size = whole;
  plot = { left, top: 6, size: size / ratio };
  heat.width = Math.round((left + 2) * ratio) + size;
  heat.height = Math.round((plot.top + bottom) * ratio) + size;
  heat.style.width = `${heat.width / ratio}px`;
  heat.style.height = `${heat.height / ratio}px`;
  return size;
}

function drawHeat(state) {
  const ratio = window.devicePixelRatio || 1;
  const context = heat.getContext("2d");
  const { left, top: above, size } = plot;
  const at = (i) => Math.round(((i * size) / count) * ratio) / ratio;
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, heat.width, heat.height);
  context.translate(Math.round(left * ratio) / ratio, above);

  context.fillStyle = cssColour("--empty"); // the entries that exist, zeros included
  context.beginPath();
  context.moveTo(0, 0);
  for (let i = 0; i < count; i++) {
    context.lineTo(at(i + 1), at(i));
    context.lineTo(at(i + 1), at(i + 1));
  }
  context.lineTo(0, size);
  context.fill();
  context.imageSmoothingEnabled = false;
  context.drawImage(image, 0, 0, size, size);
  drawAxes(context, at);
  drawMarks(context, at, state);
}

function drawAxes(context, at) {
  const { size } = plot;
  const ink = cssColour("--soft");
  const font = "system-ui, sans-serif";
  context.textBaseline = "middle";
  context.textAlign = "center";
  for (const { first, end, label } of blocks()) {
    const [from, to] = [at(first), at(end)];
    context.fillStyle = cssColour(`--${label}`);
    context.fillRect(-STRIP - 3, from, STRIP, to - from);
    context.fillRect(from, size + 3, to - from, STRIP);
    context.font = `600 10px ${font}`;
    if (to - from > context.measureText(label).width + 6) {
      context.fillStyle = cssColour(`--on-${label}`);
      context.fillText(label, (from + to) / 2, size + 4 + STRIP / 2);
      context.save();
      context.translate(-3 - STRIP / 2, (from + to) / 2);
      context.rotate(-Math.PI / 2);
      context.fillText(label, 0, 1);
      context.restore();
    }
    if (first > 0) {
      const rim = Math.min(3, Math.max(1, size / count / 3));
      for (const [line, colour] of [[rim, cssColour("--paper")], [rim / 3, cssColour("--ink")]]) {
        context.fillStyle = colour;
        context.fillRect(-3, from - line / 2, from + 3, line);
        context.fillRect(from - line / 2, from, line, size - from + 3);
      }
    }
  }
  context.fillStyle = ink;
  context.font = `11px ${font}`;
  const gaps = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000];
  const every = gaps.find((gap) => (gap * size) / count >= 26) || count;
  for (let i = 0; i < count; i += every) {
    const middle = (at(i) + at(i + 1)) / 2;
    context.textAlign = "right";
    context.fillText(i, -STRIP - 8, middle);
    context.textAlign = "center";
    context.fillText(i, middle, size + STRIP + 12);
  }
  context.fillText("step drawn on", size / 2, size + STRIP + 28);
  context.translate(-plot.left + 8, size / 2);
  context.rotate(-Math.PI / 2);
  context.fillText("step that reads", 0, 0);
  context.rotate(Math.PI / 2);
  context.translate(plot.left - 8, -size / 2);
}

// The selected step's row and column, and the entry under the pointer.
function drawMarks(context, at, { selected, cursor }) {
  const [from, to, end] = [at(selected), at(selected + 1), plot.size];
  const [column, row] = [[from, from, to - from, end - from], [0, from, to, to - from]];
  for (const [name, [x, y, width, height]] of [["reader", column], ["source", row]]) {
    // Around the entries, with a rim in the page's colour, so that it shows on any colour of the map.
    for (const [line, colour] of [[3.5, cssColour("--paper")], [1.75, `rgb(${cssColour(`--${name}`)})`]]) {
      context.lineWidth = line;
      context.strokeStyle = colour;
      context.strokeRect(x - 1, y - 1, width + 2, height + 2);
    }
  }
  if (!cursor) return;
  const { i, j } = cursor;
  context.globalAlpha = 0.5;
  context.fillStyle = cssColour("--ink");
  const [x, y] = [(at(j) + at(j + 1)) / 2, (at(i) + at(i + 1)) / 2];
  context.fillRect(0, y - 0.5, Math.max(at(j) - 1, 0), 1);
  context.fillRect(x - 0.5, at(i + 1) + 1, 1, Math.max(plot.size - at(i + 1) - 1, 0));
  context.globalAlpha = 1;
  for (const [line, colour] of [[4, cssColour("--paper")], [2, cssColour("--ink")]]) {
    context.lineWidth = line;
    context.strokeStyle = colour;
    context.strokeRect(at(j) - 1, at(i) - 1, at(j + 1) - at(j) + 2, at(i + 1) - at(i) + 2);
  }
}

// The entry at a place of the canvas in CSS pixels; null outside, j > i above the diagonal.
function entryAt(x, y) {
  const [i, j] = [y - plot.top, x - plot.left].map((place) => Math.floor((place * count) / plot.size));
  return i >= 0 && i < count && j >= 0 && j < count ? { i, j } : null;
}

function drawRamp(isLog) {
  const ramp = document.getElementById("ramp");
  const ends = document.getElementById("ramp-ends");
  ramp.width = 256;
  const context = ramp.getContext("2d");
  palette().forEach((colour, x) => {
    context.fillStyle = `rgb(${colour})`;
    context.fillRect(x, 0, 1, 12);
  });
  const { low, high, linear } = report.scale;
  const middle = isLog ? Math.sqrt(low * high) : linear / 2;
  const [first, last] = isLog ? [`≤ ${format(low)}`, format(high)] : ["0", `≥ ${format(linear)}`];
  let words = [first, format(middle), last];
  if (low === high) words = [high > 0 ? `0 or ${format(high)}` : "all zero"];
  ramp.hidden = high === 0;
  ends.replaceChildren(...words.map((word) => Object.assign(document.createElement("span"), { textContent: word })));
}
