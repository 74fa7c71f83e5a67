
// The selected step: where it reads over depth, its sources and readers, and the trace tinted by them.

const PROFILE = { width: 460, height: 110, left: 34, right: 0, bottom: 18 };

// Shares of what step i reads, by group of sources.
function groupShares(layer, i) {
  const { sums, total } = readsOf(layer, i);
  const shares = Object.fromEntries(Object.keys(GROUPS).map((group) => [group, 0]));
  if (total > 0) for (let j = 0; j <= i; j++) shares[groupOf(i, j)] += sums[j] / total;
  return shares;
}

function showPanel() {
  const i = state.selected;
  const { tokens, start, end } = steps[i];
  byId("panel-title").replaceChildren(chip(i), nameOf(i));
  byId("panel-about").textContent = `${tokens} tokens, ${start} to ${end - 1} of the trace`;
  byId("panel-text").textContent = textOf(i);
  showProfile(i);
  const layer = layers[state.layer];
  byId("sources-about").textContent = `shares of all it reads in layer ${layer}`;
  byId("readers-about").textContent = `shares of all that reads it in layer ${layer}`;
  rank(byId("sources"), readsOf(state.layer, i));
  rank(byId("readers"), readersOf(state.layer, i));
}

function showProfile(i) {
  const { width, height, left, bottom } = PROFILE;
  const svg = byId("profile");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const [column, tall] = [(width - left) / layers.length, height - bottom - 6];
  const gap = Math.min(2, column / 6);
  const parts = [];
  for (const share of [0, 0.5, 1]) {
    const y = 6 + tall * (1 - share);
    parts.push(shape("line", { class: "grid", x1: left, x2: width, y1: y, y2: y }));
    parts.push(shape("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, `${100 * share} %`));
  }
  const used = new Set();
  for (let layer = 0; layer < layers.length; layer++) {
    const x = left + layer * column + gap / 2;
    let y = 6 + tall;
    for (const [group, share] of Object.entries(groupShares(layer, i))) {
      if (!(share > 0)) continue;
      used.add(group);
      y -= share * tall;
      const bar = shape("rect", { x, y, width: column - gap, height: share * tall });
      bar.style.fill = `var(--${group})`;
      parts.push(bar);
    }
  }
  const x = left + state.layer * column + gap / 2;
  parts.push(shape("rect", { class: "band", x, y: 6, width: column - gap, height: tall }));
  parts.push(...layerTicks(left, column, height - 4));
  svg.replaceChildren(...parts);
  svg.onclick = (event) => choose({ layer: layerAt(svg, event, PROFILE) });
  const shares = groupShares(state.layer, i);
  const groups = Object.keys(GROUPS).filter((group) => used.has(group));
  const keys = groups.map((group) => key(group, `${GROUPS[group]} ${percent(shares[group], 1)}`));
  byId("groups").replaceChildren(...keys);
}

function rank(list, { sums, total }) {
  const order = Array.from(sums.keys()).filter((i) => sums[i] > 0).sort((a, b) => sums[b] - sums[a]).slice(0, SHOWN);
  list.replaceChildren(...order.map((i) => {
    const item = element("li");
    const button = element("button");
    button.type = "button";
    button.addEventListener("click", () => choose({ selected: i }));
    const head = element("span", "", "head");
    head.append(chip(i), i === state.selected ? "itself" : nameOf(i), element("b", percent(sums[i], total)));
    const bar = element("span", "", "bar");
    const filled = element("i");
    filled.style.width = `${(100 * sums[i]) / total}%`;
    bar.append(filled);
    button.append(head, bar, element("span", textOf(i, 160), "text"));
    item.append(button);
    return item;
  }));
  if (order.length === 0) list.replaceChildren(element("li", "nothing", "soft"));
}

function buildSteps() {
  const list = byId("steps");
  for (const { first, end, label, round } of blocks()) {
    const about = severalRounds && round > 0 ? `${label}, round ${round}` : label;
    const head = element("li", `${about}: ${end - first === 1 ? "one step" : `${end - first} steps`}`, "block");
    head.setAttribute("role", "presentation");
    list.append(head);
    for (let i = first; i < end; i++) {
      const item = element("li");
      item.setAttribute("role", "option");
      item.dataset.step = i;
      const number = element("span");
      number.append(chip(i));
      item.append(number, element("span", textOf(i), "text"), element("span", "", "share"));
      list.append(item);
    }
  }
  list.addEventListener("click", (event) => {
    const item = event.target.closest("[data-step]");
    if (item && !String(getSelection())) choose({ selected: Number(item.dataset.step) });
  });
  list.addEventListener("keydown", (event) => {
    const goals = { ArrowUp: state.selected - 1, ArrowDown: state.selected + 1, Home: 0, End: count - 1 };
    if (!(event.key in goals)) return;
    event.preventDefault();
    choose({ selected: goals[event.key] });
    list.querySelector("[aria-selected=true]").focus();
  });
}

// Sources stand before the selected step and readers after it, so one tint each is enough.
function tintSteps() {
  const i = state.selected;
  const [reads, readers] = [readsOf(state.layer, i), readersOf(state.layer, i)];
  const greatest = (sums) => sums.reduce((a, b) => Math.max(a, b), 0);
  const [mostRead, mostReading] = [greatest(reads.sums), greatest(readers.sums.slice(i + 1))];
  for (const item of byId("steps").querySelectorAll("[data-step]")) {
    const j = Number(item.dataset.step);
    const [{ sums, total }, most, colour] = j > i ? [readers, mostReading, "reader"] : [reads, mostRead, "source"];
    const strength = most > 0 ? sums[j] / most : 0;
    item.style.background = strength > 0 ? `rgba(var(--${colour}), ${(0.42 * Math.sqrt(strength)).toFixed(3)})` : "";
    item.setAttribute("aria-selected", j === i);
    item.tabIndex = j === i ? 0 : -1;
    item.lastChild.textContent = percent(sums[j], total);
  }
}
