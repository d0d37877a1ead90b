// Elements and numbers. Text always goes in as text: samples may hold anything.

const SVG = "http://www.w3.org/2000/svg";

/** An element; `attributes` may hold `class`, `on...` handlers and any attribute; null leaves out. */
export function h(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** The same for SVG. */
export function s(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "width_fraction") element.style.width = `${100 * clamp(value)}%`;
    else if (key === "left_fraction") element.style.left = `${100 * clamp(value)}%`;
    else if (key === "height_fraction") element.style.height = `${100 * clamp(value)}%`;
    else element.setAttribute(key, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const byId = (id) => document.getElementById(id);

export const clamp = (value, low = 0, high = 1) => Math.min(high, Math.max(low, value));

/** `fallback` stands for numbers that do not exist. */
export function number(value, digits = 0, fallback = "–") {
  if (value === null || value === undefined || !Number.isFinite(value)) return fallback;
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** Three figures or so, whatever the size. */
export function short(value) {
  if (!Number.isFinite(value)) return "–";
  if (value !== 0 && Math.abs(value) < 0.01) return value.toPrecision(2);
  if (Math.abs(value) >= 10000) return `${number(value / 1000, value >= 100000 ? 0 : 1)}k`;
  return number(value, Math.abs(value) >= 100 || Number.isInteger(value) ? 0 : 2);
}

export const percent = (fraction, digits = 0) => `${number(100 * fraction, digits)}%`;

export function seconds(value) {
  if (value < 0.0995) return `${number(1000 * value)} ms`;
  if (value < 99.5) return `${number(value, value < 9.95 ? 2 : 1)} s`;
  const minutes = Math.round(value / 60);
  return minutes < 100 ? `${minutes} min` : `${number(minutes / 60, 1)} h`;
}

export const clockTime = (time_s) => new Date(1000 * time_s).toLocaleTimeString();

/** Replaces the children only when `key` is another than last time: focus and scrolling stay. */
export function renderWhenChanged(element, key, render) {
  const text = JSON.stringify(key);
  if (element.dataset.shown === text) return;
  element.dataset.shown = text;
  element.replaceChildren(...[render()].flat());
}
