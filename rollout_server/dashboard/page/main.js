// The page: connects, keeps what it is told, and draws it.

import { apiKey } from "./api.js";
import { actions, buildControls, updateControls } from "./controls.js";
import { byId, clockTime, h, seconds } from "./dom.js";
import { drawEngines } from "./engines.js";
import { drawKv, drawThroughput, drawTiles, offerEngines } from "./load.js";
import { drawGroups } from "./rollouts.js";
import { Store } from "./store.js";
import { EventStream } from "./stream.js";
import { drawPushes, drawRewards } from "./weights.js";

const store = new Store();
const stream = new EventStream("v1/events", take, showConnection);
let controlsAreBuilt = false;
let lastEvent_s = null;

function take(name, event) {
  lastEvent_s = Date.now() / 1000;
  if (name === "snapshot") {
    const wasRestarted = store.snapshot(event);
    clearNotice("connection");
    if (wasRestarted) notice("restart", "warning", `The server was started again at ${clockTime(event.server.started_s)}: figures begin afresh.`);
    showServer(event.server);
    void offerControls();
  } else {
    store.update(event);
  }
  draw();
}

function draw() {
  if (!store.now || document.hidden) return; // drawn when somebody looks again
  drawTiles(store);
  drawThroughput(store);
  drawKv(store, offerEngines(byId("kv-engine"), store.engines));
  drawEngines(store, actions);
  drawPushes(store);
  drawRewards(store);
  drawGroups(store);
  updateControls(store);
}

function showServer({ model, version }) {
  const name = model.split("/").filter(Boolean).at(-1) ?? model;
  byId("server-facts").textContent = `${name}, server ${version}`;
  document.title = `${name} – Slipstream`;
}

async function offerControls() {
  if (controlsAreBuilt) return;
  try {
    await buildControls();
    controlsAreBuilt = true;
    draw();
  } catch (error) {
    byId("controls").replaceChildren(h("p", { class: "hint" }, `No controls: ${error.message}`));
  }
}

function showConnection(state, detail) {
  const pill = byId("connection");
  const [kind, text] = {
    connecting: ["busy", "connecting"],
    live: ["good", "live"],
    waiting: ["bad", "not connected"],
    refused: ["warning", "key needed"],
  }[state];
  pill.className = `pill ${kind}`;
  pill.textContent = text;
  document.body.classList.toggle("stale", state !== "live" && lastEvent_s !== null);
  if (state === "waiting") {
    const age = lastEvent_s === null ? "" : ` What you see is from ${clockTime(lastEvent_s)}.`;
    notice("connection", "bad", `Not connected: ${detail.reason}. Trying again in ${seconds(detail.seconds)}.${age}`);
  } else if (state === "refused") {
    clearNotice("connection");
    askForKey(detail.message);
  }
}

function notice(id, kind, text) {
  clearNotice(id);
  const close = h("button", { type: "button", class: "quiet", onclick: () => clearNotice(id) }, "Close");
  byId("notices").append(h("p", { class: `notice ${kind}`, "data-notice": id }, h("span", {}, text), id === "restart" ? close : ""));
}

function clearNotice(id) {
  byId("notices").querySelector(`[data-notice="${id}"]`)?.remove();
}

function askForKey(reason = null) {
  const dialog = byId("key-dialog");
  if (reason) byId("key-reason").textContent = `The server says: ${reason}`;
  byId("key-input").value = apiKey.get();
  if (!dialog.open) dialog.showModal();
}

byId("key-button").addEventListener("click", () => askForKey());
byId("key-dialog").addEventListener("close", (event) => {
  if (event.target.returnValue !== "save") return;
  apiKey.set(byId("key-input").value.trim());
  controlsAreBuilt = false;
  stream.connectNow();
});
byId("kv-engine").addEventListener("change", draw);
byId("rollouts-hold").addEventListener("change", draw);
document.addEventListener("visibilitychange", draw);
let resizing = null;
window.addEventListener("resize", () => {
  clearTimeout(resizing);
  resizing = setTimeout(draw, 100);
});
stream.connectNow();
