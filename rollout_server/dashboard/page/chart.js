// A line chart in SVG: lines, bands, a limit, marks, a legend, and the values under the pointer.

import { clamp, h, s } from "./dom.js";

const HEIGHT = 200;
const MARGIN = { left: 46, right: 10, top: 14, bottom: 26 };

/**
 * Draws into `container`, in place of what was there.
 *
 * series: [{label, colour: "blue"|"green"|"orange", points: [[x, y]], dots, area}]
 * x: {low, high, ticks: [[x, text]], format}; y: {low (0), high, format}
 * bands: [[x0, x1]] with bandLabel; limit: {y, label}; marks: [[x, text]].
 */
export function drawChart(container, chart) {
  const pointerX = container.pointerX;
  const width = Math.max(260, container.clientWidth || 600);
  const plot = { left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: HEIGHT - MARGIN.bottom };
  const { x, y, series, bands = [], limit = null, marks = [] } = chart;
  const span = x.high - x.low || 1;
  const toX = (value) => plot.left + ((value - x.low) / span) * (plot.right - plot.left);
  const yLow = y.low ?? 0;
  const toY = (value) => plot.bottom - clamp((value - yLow) / (y.high - yLow || 1)) * (plot.bottom - plot.top);
  const svg = s("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": chart.label });

  for (const [from, to] of bands) {
    const left = toX(Math.max(from, x.low));
    const right = Math.max(toX(Math.min(to, x.high)), left + 1);
    svg.append(s("rect", { class: "band", x: left, width: right - left, y: plot.top, height: plot.bottom - plot.top }));
  }
  for (const fraction of [0, 0.25, 0.5, 0.75, 1]) {
    const value = yLow + fraction * (y.high - yLow);
    const at = toY(value);
    svg.append(
      s("line", { class: fraction ? "grid" : "axis", x1: plot.left, x2: plot.right, y1: at, y2: at }),
      s("text", { x: plot.left - 6, y: at + 4, "text-anchor": "end" }, y.format(value)),
    );
  }
  for (const [value, text] of x.ticks) {
    svg.append(s("text", { x: toX(value), y: HEIGHT - 8, "text-anchor": "middle" }, text));
  }
  marks.forEach(([value, text], index) => {
    svg.append(s("line", { class: "mark", x1: toX(value), x2: toX(value), y1: plot.top, y2: plot.bottom }));
    const next = marks[index + 1];
    const hasRoom = next === undefined || toX(next[0]) - toX(value) > 26;
    if (hasRoom) svg.append(s("text", { x: toX(value), y: plot.top - 3, "text-anchor": "middle" }, text));
  });
  for (const line of series) drawLine(svg, line, toX, toY, plot);
  if (limit) {
    svg.append(s("line", { class: "limit", x1: plot.left, x2: plot.right, y1: toY(limit.y), y2: toY(limit.y) }));
  }
  const tip = h("div", { class: "tip", hidden: true });
  container.replaceChildren(svg, legend(chart), tip);
  const move = (clientX) => showValues(container, svg, tip, chart, { toX, plot, width, span }, clientX);
  svg.addEventListener("pointermove", (event) => move(event.clientX));
  svg.addEventListener("pointerleave", () => move(null));
  if (pointerX !== undefined && pointerX !== null) move(pointerX);
}

/** In place of a chart that has nothing to show. */
export function drawNothing(container, text) {
  container.replaceChildren(h("p", { class: "empty" }, text));
}

/** A round number that `value` fits below. */
export function roundUp(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 5, 8, 10].find((step) => step * power >= value) * power;
}

function drawLine(svg, { points, colour, dots = false, area = false }, toX, toY, plot) {
  if (!points.length) return;
  const path = points.map(([px, py], i) => `${i ? "L" : "M"}${toX(px).toFixed(1)} ${toY(py).toFixed(1)}`).join("");
  if (area) {
    const end = `L${toX(points.at(-1)[0]).toFixed(1)} ${plot.bottom}L${toX(points[0][0]).toFixed(1)} ${plot.bottom}Z`;
    svg.append(s("path", { class: "area", d: path + end }));
  }
  svg.append(s("path", { class: `line ${colour}`, d: path }));
  if (dots || points.length === 1) {
    for (const [px, py] of points) {
      svg.append(s("circle", { class: `dot ${colour}`, cx: toX(px), cy: toY(py), r: 3.5 }));
    }
  }
}

function legend({ series, bands, bandLabel, limit }) {
  const items = series.map(({ label, colour }) => [
    s("line", { class: `line ${colour}`, x1: 0, x2: 22, y1: 6, y2: 6 }), label,
  ]);
  if (bands) items.push([s("rect", { class: "band", width: 22, height: 12 }), bandLabel]);
  if (limit) items.push([s("line", { class: "limit", x1: 0, x2: 22, y1: 6, y2: 6 }), limit.label]);
  return h("ul", { class: "legend" }, items.map(([drawing, text]) =>
    h("li", {}, s("svg", { viewBox: "0 0 22 12", "aria-hidden": "true" }, drawing), text)));
}

function showValues(container, svg, tip, chart, { toX, plot, width, span }, clientX) {
  container.pointerX = clientX;
  svg.querySelector(".cursor")?.remove();
  tip.hidden = clientX === null;
  if (clientX === null) return;
  const box = svg.getBoundingClientRect();
  const at = chart.x.low + (((clientX - box.left) * (width / box.width) - plot.left) / (plot.right - plot.left)) * span;
  const found = chart.series.map((line) => [line, nearest(line.points, at)]).filter(([, point]) => point);
  if (!found.length) {
    tip.hidden = true;
    return;
  }
  const atX = toX(found[0][1][0]);
  svg.append(s("line", { class: "cursor", x1: atX, x2: atX, y1: plot.top, y2: plot.bottom }));
  const values = found.map(([line, point]) => `${line.label} ${chart.y.format(point[1])}`);
  tip.textContent = `${chart.x.format(found[0][1][0])}: ${values.join(", ")}`;
  const left = (atX / width) * box.width;
  tip.style.left = `${clamp(left - tip.offsetWidth / 2, 0, box.width - tip.offsetWidth)}px`;
}

function nearest(points, at) {
  let best = null;
  for (const point of points) {
    if (best === null || Math.abs(point[0] - at) < Math.abs(best[0] - at)) best = point;
  }
  return best;
}
