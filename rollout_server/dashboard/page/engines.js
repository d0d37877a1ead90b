// A card per engine, and those that are gone.

import { byId, clamp, clockTime, h, number, percent, renderWhenChanged, seconds, short } from "./dom.js";
import { kvThreshold } from "./store.js";

const STATE_PILLS = {
  serving: "good", starting: "busy", syncing: "busy", paused: "warning", draining: "warning", dead: "bad",
};

/** `actions.drain` is called with an id; null where the server has no such action. */
export function drawEngines(store, actions) {
  const { engines, departed } = store;
  const container = byId("engines");
  const cards = new Map([...container.children].map((card) => [card.dataset.engine, card]));
  const wanted = engines.map((engine) => {
    const card = cards.get(engine.status.engine_id) ?? newCard(engine.status.engine_id, actions);
    updateCard(card, engine, actions);
    return card;
  });
  if (!wanted.length) wanted.push(h("p", { class: "card empty" }, emptyText(store)));
  const isSame = wanted.length === container.children.length
    && wanted.every((card, index) => card === container.children[index]);
  if (!isSame) container.replaceChildren(...wanted);
  renderWhenChanged(byId("departed"), departed, () => departed.toReversed().map(departedItem));
}

function emptyText({ now }) {
  return now.target_count
    ? `There is no engine; ${now.target_count} should be there. Requests wait.`
    : "There are no engines: the server was scaled to 0. Requests wait until it is scaled up.";
}

function newCard(id, actions) {
  const facts = h("dl");
  return h("article", { class: "engine", "data-engine": id, "aria-label": `Engine ${id}` },
    h("div", { class: "row" },
      h("h3", {}, id),
      h("span", { class: "pill" }),
      h("button", { type: "button", class: "drain quiet", onclick: () => actions.drain?.(id) }, "Drain")),
    facts,
    h("div", { class: "meter", role: "meter", "aria-label": "KV blocks in use", "aria-valuemin": 0, "aria-valuemax": 100 },
      h("div", { class: "fill" }), h("div", { class: "limit" })),
    h("p", { class: "error" }));
}

function updateCard(card, engine, actions) {
  const { status, speculation } = engine;
  card.className = `engine ${status.state}`;
  const pill = card.querySelector(".pill");
  pill.className = `pill ${STATE_PILLS[status.state] ?? ""}`;
  pill.textContent = status.state;
  const button = card.querySelector(".drain");
  button.hidden = !actions.drain;
  button.disabled = !["serving", "paused"].includes(status.state);
  card.querySelector(".error").textContent = status.error ?? "";
  const rows = [
    ["Running, waiting", `${number(status.num_running_reqs)}, ${number(status.num_waiting_reqs)}`],
    ["Tokens per second", short(engine.tokens_per_s)],
    ["KV blocks in use", `${percent(status.kv_cache_usage)} of ${number(status.num_kv_blocks)}`],
    ["Draft length", draftText(status, speculation)],
    ["Accepted", acceptanceText(speculation)],
    ["By position", positions(speculation)],
    ["Weights, drafter", `v${status.target_version}, v${status.drafter_version} (${status.drafter_scheme})`],
    ["Up", status.uptime_s ? seconds(status.uptime_s) : "–"],
  ];
  const key = [rows.filter((_, index) => index !== 5), speculation?.acceptance_per_pos];
  renderWhenChanged(card.querySelector("dl"), key, () => rows.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
  const meter = card.querySelector(".meter");
  meter.setAttribute("aria-valuenow", Math.round(100 * status.kv_cache_usage));
  meter.querySelector(".fill").style.width = percent(clamp(status.kv_cache_usage), 1);
  const threshold = kvThreshold(engine);
  meter.querySelector(".limit").hidden = threshold === null;
  if (threshold !== null) meter.querySelector(".limit").style.left = percent(threshold, 1);
}

function draftText(status, speculation) {
  if (!speculation) return "–";
  if (!status.num_running_reqs) return "idle";
  return `${speculation.num_speculative_tokens} (${speculation.reason.replaceAll("_", " ")})`;
}

function acceptanceText(speculation) {
  if (!speculation?.num_draft_tokens) return "nothing drafted yet";
  const share = speculation.num_accepted_tokens / speculation.num_draft_tokens;
  return `${percent(share)}, length ${number(speculation.mean_acceptance_length, 2)}`;
}

function positions(speculation) {
  const shares = speculation?.acceptance_per_pos ?? [];
  if (!shares.length) return "–";
  const text = shares.map((share) => percent(share)).join(", ");
  return h("span", { class: "positions", role: "img", "aria-label": `Acceptance by position: ${text}`, title: text },
    shares.map((share) => h("i", { height_fraction: share })));
}

function departedItem({ engine_id: id, time_s, last_state: lastState, reason }) {
  const isDrained = lastState === "draining";
  return h("li", { class: isDrained ? "drained" : "lost" },
    h("strong", {}, id), isDrained ? " drained and stopped" : ` was lost while ${lastState}`,
    ` at ${clockTime(time_s)}`, reason && !isDrained ? `: ${reason}` : "");
}
