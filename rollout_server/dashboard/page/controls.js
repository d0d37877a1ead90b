// Buttons for what an operator may do. Only actions that this server has are offered: its own
// OpenAPI document tells.

import { getJson, request } from "./api.js";
import { byId, h, number, percent, seconds } from "./dom.js";

const MODES = ["adaptive", "kv_gate", "always", "off"];
const PAUSE_MODES = [["keep", "freeze what runs"], ["wait", "let it finish"], ["abort", "abort what runs"]];

/** What engine cards may call; set once it is known what the server has. */
export const actions = { drain: null };

let fields = null;

/** Asks the server what it can do and builds the forms. Throws when it cannot be asked. */
export async function buildControls() {
  const { paths } = await getJson("openapi.json");
  const has = (method, path) => paths[path]?.[method] !== undefined;
  const drainPath = Object.keys(paths).find((path) => /^\/v1\/engines\/\{[^}]+\}\/drain$/.test(path));
  actions.drain = drainPath && has("post", drainPath)
    ? (id) => confirmed(`Drain ${id}? It finishes what it has and stops.`)
      && act(`drain ${id}`, "POST", drainPath.replace(/\{[^}]+\}/, encodeURIComponent(id)), {})
    : null;
  fields = {
    count: h("input", { type: "number", min: 0, step: 1, value: "" }),
    mode: h("select", {}, MODES.map((mode) => h("option", { value: mode }, mode))),
    threshold: h("input", { type: "number", min: 0, max: 100, step: 1 }),
    length: h("input", { type: "number", min: 1, step: 1 }),
    pause: h("select", {}, PAUSE_MODES.map(([mode, text]) => h("option", { value: mode }, text))),
  };
  for (const field of Object.values(fields)) {
    // From here on the field holds what the person wants, not what the server says.
    field.addEventListener("input", () => (field.dataset.touched = "yes"));
  }
  byId("controls").replaceChildren(...[
    has("put", "/v1/engines") && form("Engines", [["How many", fields.count]], [["Scale", scale]]),
    has("patch", "/v1/speculation") && form("Speculation, on every engine", [
      ["Mode", fields.mode], ["KV threshold, %", fields.threshold], ["Draft length", fields.length],
    ], [["Apply", speculate]]),
    has("post", "/v1/pause") && form("Generation", [["On a pause", fields.pause]], [
      ["Pause", () => act("pause", "POST", "v1/pause", { mode: fields.pause.value })],
      ["Resume", () => act("resume", "POST", "v1/resume", {})],
    ]),
    has("post", "/v1/weights/audit") && form("Integrity of weights", [], [["Audit every engine", audit]]),
  ].filter(Boolean));
}

/** Fields that nobody touched follow the server. */
export function updateControls({ now }) {
  if (!fields) return;
  const { policy } = now;
  follow(fields.count, now.target_count);
  follow(fields.mode, policy.mode);
  follow(fields.threshold, policy.kv_cache_threshold_tokens === null ? Math.round(1000 * policy.kv_cache_threshold) / 10 : "");
  follow(fields.length, policy.num_speculative_tokens);
  fields.length.max = now.max_num_speculative_tokens;
}

function follow(field, value) {
  if (!field.dataset.touched && document.activeElement !== field) field.value = value;
}

function form(title, labelled, buttons) {
  return h("form", { onsubmit: (event) => { event.preventDefault(); buttons[0][1](); } },
    h("fieldset", {}, h("legend", {}, title),
      h("div", { class: "fields" },
        labelled.map(([text, field]) => h("label", {}, text, field)),
        buttons.map(([text, press], index) => h("button", {
          type: index ? "button" : "submit", onclick: index ? press : null,
        }, text)))));
}

function scale() {
  return act("scale", "PUT", "v1/engines", { count: fields.count.valueAsNumber }, (answer) =>
    `${number(answer.target_count)} engines are asked for; they start and drain in the background.`);
}

function speculate() {
  const change = {};
  if (fields.mode.dataset.touched) change.mode = fields.mode.value;
  if (fields.threshold.dataset.touched) change.kv_cache_threshold = fields.threshold.valueAsNumber / 100;
  if (fields.length.dataset.touched) change.num_speculative_tokens = fields.length.valueAsNumber;
  if (!Object.keys(change).length) return tell("good", "Nothing to change: mode, threshold and length are as they were.");
  return act("change speculation", "PATCH", "v1/speculation", change, ({ policy }) =>
    `Speculation on every engine: ${policy.mode}, threshold `
    + `${policy.kv_cache_threshold_tokens === null ? percent(policy.kv_cache_threshold, 1) : `${number(policy.kv_cache_threshold_tokens)} tokens`}`
    + `, up to ${policy.num_speculative_tokens} drafted tokens.`);
}

function audit() {
  return act("audit", "POST", "v1/weights/audit", undefined, (answer) => {
    const equal = answer.engines.reduce((total, engine) => total + engine.num_equal, 0);
    const longest_s = Math.max(0, ...answer.engines.map((engine) => engine.audit_s));
    const lines = [answer.is_intact
      ? `Version ${answer.version} is intact on ${number(answer.engines.length)} engines: ${number(equal)} tensors equal, ${seconds(longest_s)}.`
      : `Version ${answer.version} is NOT intact; replaced: ${answer.engines_removed.join(", ") || "none"}.`];
    for (const [id, error] of Object.entries(answer.errors)) lines.push(`${id} could not be asked: ${error}`);
    return lines.join("\n");
  });
}

async function act(what, method, path, body, describe = () => `Done: ${what}.`) {
  const buttons = document.querySelectorAll(".controls button, .engine .drain");
  for (const button of buttons) button.setAttribute("aria-busy", "true");
  tell("", `${what}…`);
  try {
    const answer = await (await request(method, path, { body })).json();
    for (const field of Object.values(fields)) delete field.dataset.touched;
    tell("good", describe(answer));
  } catch (error) {
    const code = error.code ? ` (${error.code}, request ${error.requestId})` : "";
    tell("bad", `Could not ${what}: ${error.message}${code}`);
  } finally {
    for (const button of buttons) button.removeAttribute("aria-busy");
  }
}

function tell(kind, text) {
  const result = byId("control-result");
  result.className = kind;
  result.textContent = text;
}

const confirmed = (question) => window.confirm(question);
