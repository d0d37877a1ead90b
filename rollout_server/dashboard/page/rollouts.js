// The latest delivered groups, and one sample of them token by token, coloured by its probability
// or by how it came about.

import { getJson } from "./api.js";
import { byId, clamp, clockTime, h, number, percent, renderWhenChanged, short } from "./dom.js";

// Lower ends of the probability of a token, from pale to strong.
const PROBABILITIES = [0.9, 0.5, 0.2, 0.05, 0];
const MAX_LISTED = 25;
const ORIGINS = {
  p: ["plain", "sampled without drafts"], a: ["accepted", "drafted and accepted"],
  r: ["recovered", "sampled where a draft was rejected"], b: ["bonus", "sampled behind accepted drafts"],
  "?": ["unknown", "sampled by an engine that died"],
};

let chosen = null; // a group's number
let tokens = null; // of that group, as the server gave them
let sampleIndex = 0;
let colours = "probability"; // or "origin"

export function drawGroups({ groups }) {
  if (byId("rollouts-hold").checked && byId("groups").childElementCount) return;
  const shown = groups.slice(-MAX_LISTED).toReversed();
  renderWhenChanged(byId("groups"), [chosen, shown.map((group) => group.number)], () =>
    shown.length ? shown.map(groupButton) : h("p", { class: "empty" }, "No rollout was delivered yet."));
  if (chosen === null) showHelp();
}

function groupButton(group) {
  const first = group.samples[0];
  const reward = group.mean_reward === null ? "no reward" : `reward ${short(group.mean_reward)}`;
  return h("button", { type: "button", "aria-pressed": String(group.number === chosen), onclick: () => choose(group.number) },
    h("span", { class: "head" }, h("b", {}, reward),
      h("span", {}, `${group.num_samples} sample${group.num_samples === 1 ? "" : "s"}${group.is_greedy ? ", greedy" : ""}`),
      h("span", {}, group.engine_id), h("span", {}, clockTime(group.time_s))),
    h("span", { class: "preview" }, first ? first.preview.replaceAll("\n", " ⏎ ") || "(no text)" : ""));
}

async function choose(number) {
  chosen = number;
  sampleIndex = 0;
  tokens = null;
  for (const button of byId("groups").querySelectorAll("button")) button.setAttribute("aria-pressed", "false");
  document.activeElement?.closest?.(".groups button")?.setAttribute("aria-pressed", "true");
  const view = byId("token-view");
  try {
    const answer = await getJson(`v1/events/groups/${number}`);
    if (number !== chosen) return;
    tokens = answer;
    drawTokens(view);
  } catch (error) {
    if (number === chosen) view.replaceChildren(h("p", { class: "empty", role: "alert" }, error.message));
  }
}

function showHelp() {
  const view = byId("token-view");
  if (view.childElementCount) return;
  view.replaceChildren(h("p", { class: "empty" }, "Choose a rollout to see it token by token."));
}

function drawTokens(view) {
  const sample = tokens.samples[sampleIndex];
  const hidden = tokens.num_samples - tokens.samples.length;
  view.replaceChildren(
    h("p", { class: "hint" }, `${tokens.group_id} on ${tokens.engine_id}`, tokens.answer === null ? "" : `, expected: ${tokens.answer}`),
    h("pre", { class: "prompt", "aria-label": "Prompt", tabindex: 0 }, tokens.prompt),
    h("div", { class: "samples", role: "group", "aria-label": "Sample" },
      tokens.samples.map((other, index) => h("button", {
        type: "button", "aria-pressed": String(index === sampleIndex),
        onclick: () => chooseSample(view, index),
      }, `#${other.sample_index}`)),
      hidden > 0 && h("span", { class: "hint" }, `and ${hidden} more that are not kept`)),
    facts(sample),
    colourChoice(view, sample),
    tokenText(sample),
    h("p", { class: "hint number", id: "token-facts", role: "status" }, "Point at a token, or focus the text and use the arrow keys."),
    showsOrigins(sample) ? originLegend(sample) : legend());
}

const showsOrigins = (sample) => colours === "origin" && sample.token_origins !== "";

function colourChoice(view, sample) {
  const choice = (name, text) => h("button", {
    type: "button", "aria-pressed": String(colours === name),
    disabled: name === "origin" && sample.token_origins === "",
    onclick: () => {
      colours = name;
      drawTokens(view);
      view.querySelector(`.colours button[aria-pressed="true"]`).focus();
    },
  }, text);
  return h("div", { class: "samples colours", role: "group", "aria-label": "Colour tokens by" },
    h("span", { class: "hint" }, "Colour by"), choice("probability", "probability"), choice("origin", "draft"));
}

function chooseSample(view, index) {
  sampleIndex = index;
  drawTokens(view);
  view.querySelectorAll(".samples button")[index].focus();
}

function facts(sample) {
  const reward = sample.reward === null ? `no reward (${sample.reward_status})` : `reward ${short(sample.reward)}`;
  const drafted = sample.num_draft_tokens
    ? `${sample.num_accepted_tokens} of ${sample.num_draft_tokens} drafted tokens accepted (${percent(sample.num_accepted_tokens / sample.num_draft_tokens)})`
    : "nothing was drafted";
  const mean = sample.logprobs.reduce((total, value) => total + value, 0) / sample.logprobs.length;
  const cut = sample.texts.length < sample.num_tokens ? `, the first ${sample.texts.length} shown` : "";
  return h("p", { class: "sample-facts" }, h("b", {}, reward), h("span", {}, `${number(sample.num_tokens)} tokens${cut}`),
    h("span", {}, `ended by ${sample.finish_reason}`), h("span", {}, `mean logprob ${number(mean, 3)}`), h("span", {}, drafted));
}

function tokenText(sample) {
  const starts = new Map(sample.weight_versions.map((span) => [span.start, span.version]));
  const style = (index) => (showsOrigins(sample) ? `origin-${ORIGINS[sample.token_origins[index]][0]}` : `token-${shade(sample.logprobs[index])}`);
  const spans = sample.texts.map((text, index) =>
    h("span", { class: `token ${style(index)}`, "data-index": index }, visible(text)));
  const children = spans.flatMap((span, index) =>
    starts.has(index) ? [h("span", { class: "version-mark" }, `v${starts.get(index)} `), span] : [span]);
  const text = h("pre", { class: "tokens", tabindex: 0, role: "group", "aria-label": "Completion, token by token", "aria-describedby": "token-facts" }, children);
  let at = -1;
  const point = (index) => {
    spans[at]?.classList.remove("chosen");
    at = clamp(index, 0, spans.length - 1);
    spans[at]?.classList.add("chosen");
    spans[at]?.scrollIntoView({ block: "nearest" });
    describe(sample, at);
  };
  text.addEventListener("pointerover", (event) => {
    if (event.target.dataset.index) describe(sample, Number(event.target.dataset.index));
  });
  text.addEventListener("click", (event) => event.target.dataset.index && point(Number(event.target.dataset.index)));
  text.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    point(at + step);
  });
  return text;
}

function describe(sample, index) {
  const logprob = sample.logprobs[index];
  const span = sample.weight_versions.find(({ start, end }) => start <= index && index < end);
  byId("token-facts").textContent = `Token ${index}: ${JSON.stringify(sample.texts[index])}, logprob ${number(logprob, 3)}, `
    + `probability ${percent(Math.exp(logprob), 1)}${span ? `, weight version ${span.version}` : ""}`
    + (sample.token_origins ? `, ${ORIGINS[sample.token_origins[index]][1]}` : "");
}

/** A line break is shown as well as made; a token without text (half a character) stays visible. */
const visible = (text) => (text === "" ? "·" : text.replaceAll("\n", "⏎\n"));

const shade = (logprob) => 1 + PROBABILITIES.findIndex((lowest) => Math.exp(logprob) >= lowest);

function legend() {
  return h("ul", { class: "legend", "aria-label": "Colours by probability" }, PROBABILITIES.map((lowest, index) =>
    h("li", {}, h("span", { class: `swatch token token-${index + 1}` }),
      index === PROBABILITIES.length - 1 ? `below ${percent(PROBABILITIES[index - 1])}` : `${percent(lowest)} or more`)));
}

function originLegend(sample) {
  const counts = [...sample.token_origins].reduce((sums, letter) => sums.set(letter, (sums.get(letter) ?? 0) + 1), new Map());
  return h("ul", { class: "legend", "aria-label": "Colours by draft" }, Object.entries(ORIGINS)
    .filter(([letter]) => counts.has(letter))
    .map(([letter, [name, meaning]]) =>
      h("li", {}, h("span", { class: `swatch token origin-${name}` }), `${name}: ${meaning} (${number(counts.get(letter))})`)));
}
