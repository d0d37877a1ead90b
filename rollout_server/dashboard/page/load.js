// The figures at a glance, throughput over time, and KV occupancy with speculation on and off.

import { drawChart, drawNothing, roundUp } from "./chart.js";
import { byId, clockTime, h, number, percent, renderWhenChanged, seconds, short } from "./dom.js";
import { kvThreshold } from "./store.js";

const WINDOW_S = 300;
const READY = new Set(["serving", "paused", "syncing"]);
const GAP_S = 5; // longer than this between two points nothing is known

export function drawTiles({ now, engines }) {
  const { samples } = now;
  const drafts = sum(engines, (engine) => engine.speculation?.num_drafts ?? 0);
  const accepted = sum(engines, (engine) => engine.speculation?.num_accepted_tokens ?? 0);
  const ready = engines.filter((engine) => READY.has(engine.status.state)).length;
  const tiles = [
    ["Tokens per second", short(sum(engines, (engine) => engine.tokens_per_s)), ""],
    ["Engines ready", number(ready), `of ${now.target_count}`],
    ["Running requests", number(sum(engines, (engine) => engine.status.num_running_reqs)), ""],
    ["Samples waiting", number(samples.num_queued), `of ${number(samples.num_pending)} pending`],
    ["Samples delivered", number(samples.num_delivered), samples.num_failed ? `${number(samples.num_failed)} failed` : ""],
    ["Acceptance length", drafts ? number(1 + accepted / drafts, 2) : "–", "tokens a step"],
    ["Weight version", String(now.committed_version), ""],
  ];
  renderWhenChanged(byId("tiles"), tiles, () => tiles.map(([name, value, more]) =>
    h("div", { class: "tile" }, h("dt", {}, name), h("dd", {}, value, " ", h("small", {}, more)))));
}

export function drawThroughput({ load, commits, now }) {
  const container = byId("throughput-chart");
  const low = Math.max(now.time_s - WINDOW_S, load[0]?.[0] ?? now.time_s);
  const points = load.filter(([time_s]) => time_s >= low).map(([time_s, rate]) => [time_s, rate]);
  if (points.length < 2) return drawNothing(container, "Nothing measured yet.");
  drawChart(container, {
    label: `Throughput: ${short(points.at(-1)[1])} tokens per second now`,
    series: [{ label: "tokens per second", colour: "blue", points, area: true }],
    x: timeAxis(low, now.time_s),
    y: { high: roundUp(Math.max(...points.map((point) => point[1]))), format: short },
    marks: commits.filter(([time_s]) => time_s >= low).map(([time_s, version]) => [time_s, `v${version}`]),
  });
}

/** `chosen` is the engine's id. */
export function drawKv(store, chosen) {
  const container = byId("kv-chart");
  const hint = byId("kv-hint");
  const engine = store.engines.find(({ status }) => status.engine_id === chosen);
  if (!engine) {
    hint.textContent = "";
    return drawNothing(container, "There is no engine.");
  }
  const all = store.kvPoints(chosen);
  const low = Math.max(store.now.time_s - WINDOW_S, all[0]?.[0] ?? store.now.time_s);
  const points = all.filter(([time_s]) => time_s >= low);
  const { policy } = engine;
  hint.textContent = `Mode ${policy.mode}${engine.has_own_policy ? " (settings of its own)" : ""}, `
    + `up to ${policy.num_speculative_tokens} drafted tokens.`;
  if (points.length < 2) return drawNothing(container, "Nothing measured yet.");
  const threshold = kvThreshold(engine);
  drawChart(container, {
    label: `KV-cache occupancy of ${chosen}: ${percent(points.at(-1)[1])} now, speculation `
      + `${points.at(-1)[2] > 0 ? "on" : "off"}`,
    series: [{ label: "KV blocks in use", colour: "blue", points: points.map(([t, usage]) => [t, usage]), area: true }],
    x: timeAxis(low, store.now.time_s),
    y: { high: 1, format: (value) => percent(value) },
    bands: bandsWhereOn(points, store.now.time_s),
    bandLabel: "speculation on",
    limit: threshold === null ? null : { y: threshold, label: `threshold ${percent(threshold)}` },
  });
}

/** Keeps the choice as engines come and go; returns the one to show. */
export function offerEngines(select, engines) {
  const ids = engines.map(({ status }) => status.engine_id);
  const chosen = ids.includes(select.value) ? select.value : ids[0];
  renderWhenChanged(select, ids, () => ids.map((id) => h("option", { value: id }, id)));
  if (chosen !== undefined) select.value = chosen;
  select.disabled = ids.length === 0;
  return chosen;
}

function bandsWhereOn(points, now_s) {
  const bands = [];
  points.forEach(([time_s, , length], index) => {
    if (length === 0) return;
    const next_s = points[index + 1]?.[0] ?? now_s;
    const until_s = Math.min(next_s, time_s + GAP_S);
    if (bands.length && bands.at(-1)[1] >= time_s) bands.at(-1)[1] = until_s;
    else bands.push([time_s, until_s]);
  });
  return bands;
}

function timeAxis(low, high) {
  const span = high - low;
  const text = (age_s) => (span < 10 ? `-${number(age_s, 1)} s` : `-${seconds(age_s).replace(/\.\d+/, "")}`);
  const ticks = [0.25, 0.5, 0.75].map((f) => [low + f * span, text((1 - f) * span)]);
  return { low, high: high || low + 1, ticks: [...ticks, [high - span * 0.01, "now"]], format: clockTime };
}

const sum = (list, value) => list.reduce((total, item) => total + value(item), 0);
