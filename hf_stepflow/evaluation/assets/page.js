
// The page: what is chosen, and the views that follow it.

function showHeader() {
  byId("facts").replaceChildren(...run.facts.map((fact) => element("span", fact)));
  document.title = `StepFlow run · ${run.facts[0]}`;
  byId("verdicts").replaceChildren(...run.verdicts.map((text) => element("p", text)));
  for (const { name, settings } of run.arms) byId("arms").append(element("dt", name), element("dd", settings));
  run.arms.slice(1).forEach(({ name }, place) => {
    const option = element("option", name);
    option.value = place + 1;
    byId("arm").append(option);
  });
  byId("choose-arm").hidden = run.arms.length < 3;
}

// Shows a problem; the place is remembered in the address.
function choose(problem) {
  state.problem = problem;
  markChosen();
  showDetail();
  history.replaceState(null, "", `#${problem + 1}`);
  document.documentElement.dataset.problem = problem;
}

// Lists what the filter and the search leave; keeps the chosen problem if it is among them.
function refresh() {
  buildList();
  byId("detail").hidden = listed.length === 0;
  if (listed.length) choose(listed.includes(state.problem) ? state.problem : listed[0]);
}

function move(step) {
  const next = listed[listed.indexOf(state.problem) + step];
  if (next === undefined) return;
  choose(next);
  window.scrollTo({ top: Math.min(window.scrollY, byId("detail").offsetTop - byId("controls").offsetHeight - 8) });
}

function toDifference() {
  const row = byId("rows").querySelector(".first");
  if (!row) return;
  row.scrollIntoView({ block: "center" });
  row.focus({ preventScroll: true });
}

function setFilter(name) {
  const input = [...document.getElementsByName("filter")].find((one) => one.value === name);
  if (!input) return;
  input.checked = true;
  state.filter = name;
  refresh();
}

function setWhole(isWhole) {
  state.isWhole = byId("whole").checked = isWhole;
  showDetail();
}

function pressKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.id === "search") {
    if (event.key === "Escape" || event.key === "Enter") event.target.blur();
    return;
  }
  if (event.target.matches("select, input[type=radio]") && event.key.startsWith("Arrow")) return;
  const inList = event.target.closest("#list");
  const keys = {
    j: () => move(1),
    k: () => move(-1),
    d: toDifference,
    w: () => setWhole(!state.isWhole),
    "/": () => byId("search").focus(),
    ...(inList && {
      ArrowDown: () => move(1), ArrowUp: () => move(-1), Home: () => choose(listed[0]), End: () => choose(listed.at(-1)),
    }),
  };
  const filters = [...document.getElementsByName("filter")];
  if (/^[1-6]$/.test(event.key) && filters[event.key - 1]) keys[event.key] = () => setFilter(filters[event.key - 1].value);
  if (!(event.key in keys)) return;
  event.preventDefault();
  keys[event.key]();
  if (inList) byId("list").querySelector("[aria-selected=true]")?.focus();
}

async function start() {
  if (typeof DecompressionStream === "undefined") {
    byId("trouble").hidden = false;
    byId("trouble").textContent = "This browser cannot unpack the responses: open the page in one of 2023 or later.";
    return;
  }
  await readRun();
  showHeader();
  buildFilters();
  byId("filters").addEventListener("change", (event) => setFilter(event.target.value));
  byId("arm").addEventListener("change", (event) => {
    state.arm = Number(event.target.value);
    countFilters();
    refresh();
  });
  byId("search").addEventListener("input", (event) => {
    state.query = event.target.value;
    refresh();
  });
  byId("list").addEventListener("click", (event) => {
    const item = event.target.closest("[data-problem]");
    if (item) choose(Number(item.dataset.problem));
  });
  byId("previous").addEventListener("click", () => move(-1));
  byId("next").addEventListener("click", () => move(1));
  byId("to-difference").addEventListener("click", toDifference);
  byId("whole").addEventListener("change", (event) => setWhole(event.target.checked));
  document.addEventListener("keydown", pressKey);
  const asked = Number(location.hash.slice(1)) - 1;
  if (run.problems[asked]) state.problem = asked;
  refresh();
  document.documentElement.dataset.ready = "true";
}

start();
