// The server's own API, as docs/api.md describes it. Addresses are below the page's own: the server may have a prefix.

export class Refused extends Error {
  constructor(status, code, message, retryAfter) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

async function refused(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // not our own form: a proxy's page, or nothing at all
  }
  const retry = Number(response.headers.get("Retry-After")) || null;
  return new Refused(response.status, error.code, error.message ?? `the server answered ${response.status}`, retry);
}

const LOST = "the server cannot be reached; is `sfumato serve` still running?";

async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path.replace(/^\//, ""), options);
  } catch (e) {
    if (e.name === "AbortError") throw e;
    throw new Refused(0, "unreachable", LOST);
  }
  if (!response.ok) throw await refused(response);
  return response;
}

const json = (body) => ({ method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

export const get = async (path) => (await call(path)).json();
export const post = async (path, body) => (await call(path, json(body))).json();
export const remove = async (path) => {
  const response = await call(path, { method: "DELETE" });
  return response.status === 204 ? null : response.json();
};
export const upload = async (path, blob) =>
  (await call(path, { method: "POST", headers: { "Content-Type": blob.type || "application/octet-stream" }, body: blob })).json();

// One JSON object a line, as they are computed; aborting, and reading no further, stop the computation.
export async function* lines(path, body, signal) {
  const response = await call(path, { ...json(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += value ?? "";
      const parts = rest.split("\n");
      rest = parts.pop();
      for (const part of parts) {
        if (!part) continue;
        const event = JSON.parse(part);
        if (event.kind === "error") throw new Refused(422, event.code, event.message);
        yield event;
      }
      if (done) return;
    }
  } catch (e) {
    if (e instanceof TypeError) throw new Refused(0, "unreachable", LOST); // as browsers tell it, each in its own words
    throw e;
  } finally {
    reader.cancel().catch(() => {});
  }
}
