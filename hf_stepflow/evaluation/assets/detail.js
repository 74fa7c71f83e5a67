
// The chosen problem: what was asked, what each arm made of it, and their steps side by side.

const LABELS = { t: "thinking", s: "summary", q: "question", "-": "left out" };

function showDetail() {
  const problem = run.problems[state.problem];
  const sides = sidesOf(state.problem);
  byId("title").textContent = nameOf(problem);
  fill(byId("question"), problem.question ?? "");
  byId("answer").textContent = problem.answer === undefined ? "" : `The right answer is ${problem.answer}.`;
  byId("cards").replaceChildren(...sides.map((side, place) => card(side, armOf(place))));
  byId("rows").className = sides.length > 1 ? "two" : "one";
  const rows = state.isWhole ? [wholeRow(sides)] : sides.length > 1 ? pairRows(problem, sides) : singleRows(sides[0]);
  byId("rows").replaceChildren(...rows);
  byId("to-difference").hidden = !byId("rows").querySelector(".first");
}

const armOf = (place) => run.arms[place === 0 ? 0 : state.arm].name;

function card(side, arm) {
  const made = element("section", "", "card");
  made.append(element("h3", arm));
  if (!side) {
    made.append(element("p", "This arm has not answered yet.", "soft"));
    return made;
  }
  const verdict = element("p", side.outcome, `outcome ${side.right ? "good" : "bad"}`);
  if (side.answer !== null) verdict.append(element("span", `: ${side.answer}`));
  const steps = stepsOf(side).length;
  const parts = [`${side.tokens} tokens`, `${steps} step${steps === 1 ? "" : "s"}`];
  if (side.loops) parts.push("ends in a loop");
  if (side.votes) parts.push(`votes: ${side.votes.map(([answer, outcome]) => answer ?? outcome).join(", ")}`);
  made.append(verdict, element("p", parts.join(" · "), "soft small"));
  if (side.stepflow) made.append(element("p", effectOf(side.stepflow), "soft small"));
  return made;
}

// The mean effect of StepFlow on a response.
function effectOf({ mass_before: before, mass_after: after, injections }) {
  const bridge =
    before === null ? "no bridge" : `bridge mass ${before.toPrecision(3)} to ${after.toPrecision(3)} (mean)`;
  return `StepFlow: ${bridge}, ${injections} injections`;
}

// The rows of two arms: a step that both have is shown once.
function pairRows(problem, sides) {
  const [ours, theirs] = sides.map(stepsOf);
  const rows = [];
  let isFirst = true;
  for (const [first, other, isSame, length] of problem.rows[state.arm - 1]) {
    for (let place = 0; place < length; place++) {
      const [one, two] = [ours[first < 0 ? -1 : first + place], theirs[other < 0 ? -1 : other + place]];
      const row = element("div", "", `row ${isSame ? "same" : "apart"}`);
      if (isSame) row.append(cell(one, first + place, other + place));
      else row.append(cell(one, first + place, null, armOf(0)), cell(two, null, other + place, armOf(1)));
      if (!isSame && isFirst) {
        row.classList.add("first");
        row.tabIndex = -1;
        rows.push(element("div", "first difference", "flag"));
        isFirst = false;
      }
      rows.push(row);
    }
  }
  if (isFirst) rows.unshift(element("div", "no difference", "flag none"));
  return rows;
}

function singleRows(side) {
  return stepsOf(side).map((step, place) => {
    const row = element("div", "", "row same");
    row.append(cell(step, place, place));
    return row;
  });
}

// One step; its number is its place among the steps of the response.
function cell(step, first, other, arm = "") {
  const made = element("div", "", step ? `cell ${LABELS[step[0]].replace(" ", "-")}` : "cell none");
  if (!step) return made;
  const [label, , text] = step;
  const numbers = [first, other].filter((number) => number !== null).map((number) => number + 1);
  const number = element("span", [...new Set(numbers)].join("|"), "chip");
  number.title = LABELS[label];
  const body = element("span", "", "text");
  fill(body, text.trim());
  made.append(number);
  if (arm) made.append(element("span", arm, "arm"));
  made.append(body);
  return made;
}

function wholeRow(sides) {
  const row = element("div", "", "row apart");
  row.append(
    ...sides.map((side) => {
      const made = element("pre");
      if (side) fill(made, fullText(side));
      return made;
    }),
  );
  return row;
}

// Writes a text, with what is searched for marked.
function fill(target, text) {
  target.textContent = "";
  const query = state.query.toLowerCase();
  const small = text.toLowerCase();
  let at = 0;
  // Where small letters are longer than capitals, places of the one are not those of the other.
  while (query && small.length === text.length) {
    const next = small.indexOf(query, at);
    if (next < 0) break;
    target.append(text.slice(at, next), element("mark", text.slice(next, next + query.length)));
    at = next + query.length;
  }
  target.append(text.slice(at));
}
