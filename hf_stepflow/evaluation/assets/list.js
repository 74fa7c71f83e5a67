
// The list of problems, with a mark for each arm.

let listed = []; // the problems in the list, in order

function markOf(side) {
  if (!side) return element("span", "·", "mark soft");
  const mark = element("span", side.right ? "✓" : "✗", `mark ${side.right ? "good" : "bad"}`);
  mark.title = side.outcome;
  return mark;
}

function tagsOf(problem) {
  const sides = sidesOf(problem);
  return ["gained", "lost", "looped", "unfinished"].filter((name) => FILTERS[name].holds(sides));
}

function buildList() {
  listed = found();
  const items = listed.map((problem) => {
    const item = element("li");
    item.setAttribute("role", "option");
    item.dataset.problem = problem;
    const marks = element("span", "", "marks");
    marks.append(...sidesOf(problem).map(markOf));
    item.append(marks, element("span", nameOf(run.problems[problem]), "name"));
    item.append(...tagsOf(problem).map((name) => element("span", name, `tag ${name}`)));
    return item;
  });
  byId("list").replaceChildren(...items);
  const all = run.problems.length;
  byId("count").textContent = listed.length === all ? `${all} problems` : `${listed.length} of ${all} problems`;
}

// Marks the chosen problem, and brings it into view inside of the list alone.
function markChosen() {
  const list = byId("list");
  for (const item of list.querySelectorAll("[aria-selected=true]")) item.setAttribute("aria-selected", "false");
  for (const item of list.querySelectorAll("[tabindex='0']")) item.tabIndex = -1;
  const place = listed.indexOf(state.problem);
  byId("previous").disabled = place <= 0;
  byId("next").disabled = place < 0 || place === listed.length - 1;
  const item = list.children[place];
  if (!item) return;
  item.setAttribute("aria-selected", "true");
  item.tabIndex = 0;
  const [above, below] = [item.offsetTop - list.offsetTop, item.offsetTop - list.offsetTop + item.offsetHeight];
  if (above < list.scrollTop) list.scrollTop = above;
  if (below > list.scrollTop + list.clientHeight) list.scrollTop = below - list.clientHeight;
}

function buildFilters() {
  const filters = Object.entries(FILTERS).map(([name, { about, holds }]) => {
    const count = run.problems.filter((_, problem) => holds(sidesOf(problem))).length;
    const label = element("label");
    const input = element("input");
    Object.assign(input, { type: "radio", name: "filter", value: name, checked: name === state.filter });
    const text = element("span", `${about} `);
    text.append(element("b", `${count}`));
    label.append(input, text);
    return label;
  });
  const alone = run.arms.length < 2;
  byId("filters").append(...filters.filter((_, place) => !alone || ![1, 2, 3].includes(place)));
}

function countFilters() {
  for (const input of document.getElementsByName("filter")) {
    const { holds } = FILTERS[input.value];
    const count = run.problems.filter((_, problem) => holds(sidesOf(problem))).length;
    input.nextSibling.querySelector("b").textContent = count;
  }
}
