// Weight pushes with their phases, and reward and accuracy by weight version.

import { drawChart, drawNothing, roundUp } from "./chart.js";
import { byId, h, number, renderWhenChanged, seconds, short } from "./dom.js";

const PHASES = ["verifying", "staging", "loading", "recording", "resume"];
const ENDED = new Set(["committed", "refused"]);
const MAX_SHOWN_PUSHES = 8;
const MAX_TICKS = 7;

export function drawPushes({ now, pushes }) {
  const { push } = now;
  byId("push-now").textContent = push && !ENDED.has(push.phase)
    ? `Version ${push.version} is being pushed: ${push.phase.replaceAll("_", " ")}.`
    : `Version ${now.committed_version} is committed.`;
  renderWhenChanged(byId("pushes"), pushes, () => {
    if (!pushes.length) return h("p", { class: "empty" }, "Nothing was pushed to this server yet.");
    const shown = pushes.slice(-MAX_SHOWN_PUSHES).toReversed();
    const longest_s = Math.max(...shown.map((row) => row.total_s));
    return [...shown.map((row) => pushRow(row, longest_s)), legend()];
  });
}

function pushRow(row, longest_s) {
  const phases = PHASES.filter((name) => row.phases_s[name] !== undefined);
  const told = phases.map((name) => `${name} ${seconds(row.phases_s[name])}`).join(", ");
  const paused = row.paused_s === null ? "" : `; engines stood still ${seconds(row.paused_s)}`;
  const bar = h("div", { class: "phases", role: "img", title: told + paused, "aria-label": told ? `Phases: ${told}${paused}` : "Phases are not known" },
    phases.map((name) => h("i", { class: `phase-${name}`, width_fraction: row.phases_s[name] / longest_s })));
  return h("div", { class: "push" }, h("span", {}, `v${row.version}`),
    row.committed ? bar : h("span", {}, h("span", { class: "pill bad" }, "refused")),
    h("span", { class: "took" }, seconds(row.total_s)),
    row.error && h("p", { class: "error" }, row.error));
}

function legend() {
  return h("ul", { class: "legend" }, PHASES.map((name) =>
    h("li", {}, h("span", { class: `swatch phase-${name}` }), name)));
}

export function drawRewards({ rewards }) {
  const container = byId("reward-chart");
  const key = JSON.stringify([rewards, container.clientWidth]);
  if (container.shownKey === key) return;
  container.shownKey = key;
  const sampled = rewards.filter((entry) => !entry.is_greedy);
  const greedy = rewards.filter((entry) => entry.is_greedy);
  if (!rewards.length) return drawNothing(container, "No scored sample was delivered yet.");
  const mean = sampled.map((entry) => [entry.version, entry.mean_reward]);
  const accuracy = greedy.map((entry) => [entry.version, entry.num_at_least_one / entry.num_samples]);
  const series = [];
  if (mean.length) series.push({ label: "mean reward", colour: "blue", points: mean, dots: mean.length < 60 });
  if (accuracy.length) series.push({ label: "accuracy", colour: "green", points: accuracy, dots: accuracy.length < 60 });
  const values = [...mean, ...accuracy];
  const low = Math.min(...values.map(([version]) => version));
  const high = Math.max(...values.map(([version]) => version));
  const top = Math.max(...values.map(([, value]) => value));
  const bottom = Math.min(...values.map(([, value]) => value));
  const last = series.map(({ label, points }) => `${label} ${number(points.at(-1)[1], 3)} at version ${points.at(-1)[0]}`);
  drawChart(container, {
    label: `Reward by weight version: ${last.join(", ")}`,
    series,
    x: { low: low - 0.3, high: high + 0.3, ticks: versionTicks(low, high), format: (version) => `version ${version}` },
    y: { low: bottom < 0 ? -roundUp(-bottom) : 0, high: top <= 1 ? 1 : roundUp(top), format: short },
  });
}

function versionTicks(low, high) {
  const step = Math.max(1, Math.ceil((high - low) / MAX_TICKS));
  const ticks = [];
  for (let version = low; version <= high; version += step) ticks.push([version, `v${version}`]);
  return ticks;
}
