
"use strict";
// The data of the report: the maps as html.py packs them, and the numbers that the views show.

const report = JSON.parse(document.getElementById("data").textContent);
const { steps, layers, indices } = report;
const count = steps.length;
const severalRounds = new Set(steps.map((step) => step.round).filter((round) => round > 0)).size > 1;

const { codes, peaks } = unpack(report.maps);
const largest = 256 ** report.maps.bytes - 1; // the code of a row's largest value
const triangle = (count * (count + 1)) / 2;

function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

function unpack(maps) {
  const bytes = bytesOf(maps.codes);
  const codes = maps.bytes === 1 ? bytes : new Uint16Array(bytes.buffer);
  return { codes, peaks: new Float32Array(bytesOf(maps.peaks).buffer) };
}

// The code of entry (i, j) of a layer: 0 for zero, 1 for less than can be shown, then a logarithmic grid.
const codeOf = (layer, i, j) => codes[layer * triangle + (i * (i + 1)) / 2 + j];

// Natural logarithm of the value behind a code of row i.
const logOf = (layer, i, code) => peaks[layer * count + i] - (largest - code) * report.maps.step;

function valueOf(layer, i, j) {
  const code = codeOf(layer, i, j);
  return code < 2 ? 0 : Math.exp(logOf(layer, i, code));
}

// Token pairs behind a mean, which make it a sum again.
function pairsOf(i, j) {
  const size = steps[i].tokens;
  return i === j && report.pooling === "causal" ? (size * (size + 1)) / 2 : size * steps[j].tokens;
}

// What step i reads in a layer: sums over pairs by source, and all of them together.
function readsOf(layer, i) {
  const sums = new Float64Array(count);
  let total = 0;
  for (let j = 0; j <= i; j++) total += sums[j] = valueOf(layer, i, j) * pairsOf(i, j);
  return { sums, total };
}

// What reads step j in a layer, by reader.
function readersOf(layer, j) {
  const sums = new Float64Array(count);
  let total = 0;
  for (let i = j; i < count; i++) total += sums[i] = valueOf(layer, i, j) * pairsOf(i, j);
  return { sums, total };
}

// Earlier rounds are context to a step, as the question is.
const GROUPS = {
  question: severalRounds ? "question and earlier rounds" : "question",
  thinking: "thinking",
  summary: "summary",
  itself: "itself",
};

function groupOf(i, j) {
  if (i === j) return "itself";
  return steps[i].label !== "question" && steps[j].round !== steps[i].round ? "question" : steps[j].label;
}

function nameOf(i) {
  const step = steps[i];
  if (!severalRounds || step.round === 0) return step.label;
  return step.label === "question"
    ? `question after round ${step.round}`
    : `${step.label}, step ${step.index} of round ${step.round}`;
}

function textOf(i, length = Infinity) {
  if (steps[i].text === null) return "(its text is not known)";
  const text = steps[i].text.trim();
  if (length === Infinity) return text;
  const flat = text.replace(/\s+/g, " ");
  return flat.length > length ? flat.slice(0, length - 1) + "…" : flat;
}

function format(value) {
  if (value === null) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size < 1e-3 || size >= 1e4 ? value.toExponential(2) : value.toPrecision(3);
}

function formatEntry(layer, i, j) {
  const code = codeOf(layer, i, j);
  return code === 1 ? `below ${format(Math.exp(logOf(layer, i, 2)))}` : format(valueOf(layer, i, j));
}

function percent(part, total) {
  if (!(total > 0)) return "–";
  const share = (100 * part) / total;
  if (share === 0) return "0 %";
  if (share < 0.1) return "< 0.1 %";
  return `${share.toFixed(share < 9.95 ? 1 : 0)} %`;
}
