// Requests to the server. The one place where the API key is kept and sent.

const KEY = "slipstream-api-key";

export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY)),
};

/** What the server answered instead of what was asked for. */
export class ApiError extends Error {
  constructor(status, message, { code = null, param = null, requestId = null, retryAfter_s = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param, requestId, retryAfter_s });
  }

  get isAboutKey() {
    return this.status === 401 || this.status === 403;
  }
}

/** Paths are relative to the page's own folder, so that a proxy may put everything under a prefix. */
export async function request(method, path, { body, signal, accept = "application/json" } = {}) {
  const headers = { Accept: accept };
  if (apiKey.get()) headers.Authorization = `Bearer ${apiKey.get()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path.replace(/^\//, ""), {
      method, headers, signal, cache: "no-store", credentials: "same-origin",
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "the server does not answer");
  }
  if (!response.ok) throw await toError(response);
  return response;
}

export const getJson = async (path) => (await request("GET", path)).json();

async function toError(response) {
  const requestId = response.headers.get("x-request-id");
  const wait = Number.parseFloat(response.headers.get("retry-after"));
  const more = { requestId, retryAfter_s: Number.isFinite(wait) ? wait : null };
  try {
    const { error } = await response.json();
    return new ApiError(response.status, error.message, { ...more, code: error.code, param: error.param });
  } catch {
    return new ApiError(response.status, `the answer is ${response.status} ${response.statusText}`, more);
  }
}
