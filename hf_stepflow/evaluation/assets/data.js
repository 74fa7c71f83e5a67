
"use strict";
// What the file holds, and what is asked of it: the verdicts of a problem, its steps and its text.

const byId = (id) => document.getElementById(id);
let run = { problems: [], arms: [] };
// The chosen problem (its place in run.problems), the arm beside the first, the filter and the words to find.
const state = { problem: 0, arm: 1, filter: "all", query: "", isWhole: false };

async function readRun() {
  const text = atob(JSON.parse(byId("data").textContent));
  const bytes = Uint8Array.from(text, (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  run = JSON.parse(await new Response(stream).text());
}

function element(name, text = "", classes = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (classes) made.className = classes;
  return made;
}

// The response of the first arm and that of the arm beside it; null where a run is not finished.
const sidesOf = (problem) => {
  const { responses } = run.problems[problem];
  return run.arms.length > 1 ? [responses[0], responses[state.arm]] : [responses[0]];
};

const FILTERS = {
  all: { about: "All", holds: () => true },
  gained: { about: "Gained", holds: ([first, other]) => Boolean(first && other && other.right && !first.right) },
  lost: { about: "Lost", holds: ([first, other]) => Boolean(first && other && first.right && !other.right) },
  changed: { about: "Changed", holds: ([first, other]) => Boolean(first && other && fullText(first) !== fullText(other)) },
  looped: { about: "Looped", holds: (sides) => sides.some((side) => side && side.loops > 0) },
  unfinished: { about: "Unfinished", holds: (sides) => sides.some((side) => side && side.outcome === "unfinished") },
};

const fullText = (side) => side.pieces.map((piece) => piece[2]).join("");
const stepsOf = (side) => (side ? side.pieces.filter((piece) => piece[0]) : []);
const nameOf = ({ id, sample }) => (sample === undefined ? id : `${id}, sample ${sample + 1}`);

// All that is searched in a problem, in small letters; made when it is first asked for.
const haystacks = new Map();
function haystackOf(problem) {
  if (!haystacks.has(problem)) {
    const { id, question = "", responses } = run.problems[problem];
    const texts = responses.filter(Boolean).map(fullText);
    haystacks.set(problem, [id, question, ...texts].join("\n").toLowerCase());
  }
  return haystacks.get(problem);
}

// The problems that the filter and the search leave.
function found() {
  const query = state.query.toLowerCase();
  return run.problems
    .map((_, problem) => problem)
    .filter((problem) => FILTERS[state.filter].holds(sidesOf(problem)))
    .filter((problem) => !query || haystackOf(problem).includes(query));
}
