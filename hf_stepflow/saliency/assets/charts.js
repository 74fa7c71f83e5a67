
// The indices over depth, a small chart each.

const CHART = { width: 320, height: 140, left: 44, right: 8, above: 8, bottom: 20 };

// Ticks of the layers' axis, as many as there is room for.
function layerTicks(left, column, y) {
  const every = Math.ceil(26 / column);
  return layers.flatMap((layer, place) =>
    place % every ? [] : [shape("text", { x: left + (place + 0.5) * column, y, "text-anchor": "middle" }, `${layer}`)],
  );
}

// The layer's place under the pointer, in a chart of these measures.
function layerAt(svg, event, { width, left, right }) {
  const box = svg.getBoundingClientRect();
  const x = ((event.clientX - box.left) / box.width) * width - left;
  const place = Math.floor((x * layers.length) / (width - left - right));
  return Math.min(layers.length - 1, Math.max(0, place));
}

// Two to five round numbers from low to high.
function ticks(low, high) {
  const size = 10 ** Math.floor(Math.log10((high - low) / 2));
  const gap = [5, 2, 1].map((factor) => factor * size).find((one) => (high - low) / one >= 2) ?? size;
  const found = [];
  const [first, last] = [Math.ceil(low / gap - 1e-9), Math.floor(high / gap + 1e-9)];
  for (let at = first; at <= last; at++) found.push(+(at * gap).toPrecision(6));
  return found;
}

// The axis of an index: ratios of several orders are shown by their logarithm.
function axisOf(values) {
  const known = values.filter((value) => value !== null);
  const [least, most] = [Math.min(...known), Math.max(...known)];
  if (least > 0 && most / least > 20) {
    const [low, high] = [Math.floor(Math.log10(least)), Math.ceil(Math.log10(most))];
    const every = Math.ceil((high - low) / 4);
    const marks = [];
    for (let power = low; power <= high; power += every) marks.push(10 ** power);
    return { place: (value) => (Math.log10(value) - low) / (high - low), marks };
  }
  let [low, high] = [Math.min(0, least), Math.max(0, most)];
  if (low === high) high = 1;
  const margin = 0.04 * (high - low);
  low -= low < 0 ? margin : 0;
  high += high > 0 ? margin : 0;
  return { place: (value) => (value - low) / (high - low), marks: ticks(low, high) };
}

function buildCharts() {
  for (const [name, { about, values }] of Object.entries(indices)) {
    const card = element("div");
    const head = element("h3", name);
    const read = element("span");
    head.append(read);
    card.append(head, element("p", about, "soft small"));
    byId("charts").append(card);
    if (values.every((value) => value === null)) {
      card.append(element("p", "No layer of this trace has it.", "small"));
      continue;
    }
    const svg = shape("svg", { viewBox: `0 0 ${CHART.width} ${CHART.height}`, role: "img" });
    card.append(svg);
    charts.push(drawChart(svg, name, values, read));
  }
}

function drawChart(svg, name, values, read) {
  const { width, height, left, right, above, bottom } = CHART;
  const column = (width - left - right) / layers.length;
  const { place, marks } = axisOf(values);
  const [base, tall] = [height - bottom, height - bottom - above];
  const point = (layer) => [left + (layer + 0.5) * column, base - tall * place(values[layer])];
  for (const mark of marks) {
    const y = base - tall * place(mark);
    svg.append(shape("line", { class: "grid", x1: left, x2: width - right, y1: y, y2: y }));
    svg.append(shape("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, `${+mark.toPrecision(3)}`));
  }
  svg.append(...layerTicks(left, column, height - 4));
  const here = shape("line", { class: "here", y1: above, y2: base });
  svg.append(here);
  let path = "";
  values.forEach((value, layer) => {
    if (value === null) return;
    const joins = layer > 0 && values[layer - 1] !== null;
    path += `${joins ? "L" : "M"}${point(layer).map((at) => at.toFixed(1)).join(" ")}`;
    const isAlone = !joins && (values[layer + 1] ?? null) === null;
    if (isAlone) svg.append(shape("circle", { cx: point(layer)[0], cy: point(layer)[1], r: 2.5 }));
  });
  svg.append(shape("path", { class: "line", d: path }));
  const now = shape("circle", { class: "now", r: 4 });
  svg.append(now);

  const say = (layer) => (read.textContent = `layer ${layers[layer]}: ${format(values[layer])}`);
  svg.addEventListener("pointermove", (event) => say(layerAt(svg, event, CHART)));
  svg.addEventListener("pointerleave", () => say(state.layer));
  svg.addEventListener("click", (event) => choose({ layer: layerAt(svg, event, CHART) }));
  const mark = (layer) => {
    const x = left + (layer + 0.5) * column;
    here.setAttribute("x1", x);
    here.setAttribute("x2", x);
    now.style.display = values[layer] === null ? "none" : "";
    if (values[layer] !== null) {
      now.setAttribute("cx", point(layer)[0]);
      now.setAttribute("cy", point(layer)[1]);
    }
    say(layer);
    svg.setAttribute("aria-label", `${name} over depth, ${read.textContent}`);
  };
  return { mark };
}
