// What the page knows, put together from a snapshot and the updates after it. Every list is bounded.

const MAX_LOAD = 900;
const MAX_KV_POINTS = 1200;
const MAX_COMMITS = 200;
const MAX_DEPARTED = 10;
const MAX_GROUPS = 40;

export class Store {
  server = null;
  /** The latest event, for everything that has no history. */
  now = null;
  engines = [];
  load = [];
  commits = [];
  departed = [];
  pushes = [];
  rewards = [];
  groups = [];
  #kv = new Map();

  /** True when the snapshot is of another server process than the one before. */
  snapshot(event) {
    const isAnother = this.server !== null && this.server.boot_id !== event.server.boot_id;
    this.server = event.server;
    this.#kv.clear();
    this.load = [];
    this.commits = [];
    this.departed = [];
    this.groups = [];
    this.pushes = [];
    this.rewards = [];
    this.update(event);
    return isAnother;
  }

  update(event) {
    this.now = event;
    this.engines = event.engines;
    append(this.load, event.load, MAX_LOAD);
    append(this.commits, event.commits, MAX_COMMITS);
    append(this.departed, event.departed, MAX_DEPARTED);
    append(this.groups, event.groups, MAX_GROUPS);
    this.pushes = event.pushes ?? this.pushes;
    this.rewards = event.rewards ?? this.rewards;
    const present = new Set(event.engines.map((engine) => engine.status.engine_id));
    for (const id of this.#kv.keys()) if (!present.has(id)) this.#kv.delete(id);
    for (const engine of event.engines) {
      const id = engine.status.engine_id;
      if (!this.#kv.has(id)) this.#kv.set(id, []);
      append(this.#kv.get(id), engine.kv_points, MAX_KV_POINTS);
    }
  }

  kvPoints(engineId) {
    return this.#kv.get(engineId) ?? [];
  }
}

/** The fraction of KV blocks at which the engine's gate closes; null where there is no gate. */
export function kvThreshold(engine) {
  const { policy, status } = engine;
  if (policy.mode === "off" || policy.mode === "always") return null;
  if (policy.kv_cache_threshold_tokens === null) return policy.kv_cache_threshold;
  const capacity = status.num_kv_blocks * status.block_size;
  return capacity ? Math.min(1, policy.kv_cache_threshold_tokens / capacity) : null;
}

function append(list, items, limit) {
  list.push(...items);
  if (list.length > limit) list.splice(0, list.length - limit);
}
