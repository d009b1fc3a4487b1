/** The service's interface: what is behind it, and a request that fills a mask while it says how far it is. */

/** @typedef {{step: number, of: number, window: number, windows: number}} Progress  Steps count through all windows. */
/** @typedef {{image: Blob, settings: Record<string, unknown>}} Result */

const TOKEN = "moebius-edge-token"; // in the session's storage: it ends with the tab

/** What the service refused: the problem, what mends it, and the HTTP status. */
export class ServiceError extends Error {
  /** @param {string} problem @param {string} remedy @param {number} status @param {number} [retryAfter]  In seconds. */
  constructor(problem, remedy, status, retryAfter = 0) {
    super(problem);
    this.remedy = remedy;
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** @param {string} token */
export function setToken(token) {
  sessionStorage.setItem(TOKEN, token);
}

/** The JSON at an address of the service. @param {string} path */
export async function getJson(path) {
  return (await request(path, {})).json();
}

/** The file at an address of the service. @param {string} path */
export async function getBlob(path) {
  return (await request(path, {})).blob();
}

/**
 * Fill what is white in the mask.
 * @param {FormData} form  `image`, `mask`, and the options of `moebius-edge run`.
 * @param {AbortSignal} signal  Closes the request, which ends the work on it.
 * @param {{onProgress: (progress: Progress) => void, onPreview: (url: string) => void}} callbacks
 * @returns {Promise<Result>}
 */
export async function inpaint(form, signal, { onProgress, onPreview }) {
  const response = await request("/v1/inpaint/stream", { method: "POST", body: form, signal });
  for await (const { event, data } of serverEvents(response)) {
    if (event === "progress") onProgress(data);
    else if (event === "preview") onPreview(data.image);
    else if (event === "error") throw new ServiceError(data.error, data.remedy ?? "", data.status ?? 500);
    else if (event === "result") {
      return { image: new Blob([fromBase64(data.image)], { type: data.media_type }), settings: data.settings ?? {} };
    }
  }
  throw new ServiceError("The service closed the connection before the picture was done.", "Try again.", 0);
}

/** @param {string} path @param {RequestInit} options */
async function request(path, options) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = token ? { Authorization: `Bearer ${token}` } : undefined;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    const remedy = "Start it again with `moebius-edge serve`, then try again.";
    throw new ServiceError("The service does not answer.", remedy, 0);
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const problem = body.error ?? `The service answered ${response.status} ${response.statusText}.`;
  throw new ServiceError(problem, body.remedy ?? "", response.status, Number(response.headers.get("Retry-After")) || 0);
}

/** @param {string} text */
function fromBase64(text) {
  const characters = atob(text);
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return bytes;
}

/** The events of a text/event-stream. @param {Response} response */
async function* serverEvents(response) {
  const body = /** @type {ReadableStream<BufferSource>} */ (response.body);
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let [event, data] = ["message", /** @type {string[]} */ ([])];
  for await (const line of lines(reader)) {
    const [field, value] = line.split(/: ?(.*)/s);
    if (field === "event") event = value;
    else if (field === "data") data.push(value);
    else if (line === "") {
      if (data.length) yield { event, data: JSON.parse(data.join("\n")) };
      [event, data] = ["message", []];
    }
  }
}

/** @param {ReadableStreamDefaultReader<string>} reader */
async function* lines(reader) {
  let parts = /** @type {string[]} */ ([]); // of the line that has not ended, which may hold a whole picture
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const pieces = value.split("\n");
    for (const piece of pieces.slice(0, -1)) {
      yield [...parts, piece].join("").replace(/\r$/, "");
      parts = [];
    }
    parts.push(pieces[pieces.length - 1]);
  }
}
