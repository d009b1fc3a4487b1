/** The page: buttons, keys and files on one side, the stage, the work and the service on the other. */

import { getBlob, getJson, inpaint, ServiceError, setToken } from "./api.js";
import { readMask } from "./picture.js";
import { encodeMask } from "./png.js";
import { Stage } from "./stage.js";
import { announceCursor, askToken, button, download, element, get, input, say, settings } from "./ui.js";
import { showError, showProgress, togglePanel } from "./ui.js";
import { Work } from "./work.js";

// Of media types; where it is the same as the type's own name, that is taken.
const SUFFIXES = { "image/jpeg": "jpg", "image/tiff": "tif" };
// Of the brush: pixels at one end of the slider, share of the picture at the other.
const SIZES = { smallest: 2, share: 0.5 };
const THUMB = 44; // stage pixels, of the slider's thumb in style.css
const BUSY_S = 2; // until the next try, where a busy service does not say

const stage = new Stage(get("stage"), {
  onPatch: (patch) => work.notePatch(patch),
  onSize: showSize,
  onPaint: () => compare(0),
  onView: () => {
    get("zoom-text").textContent = `${Math.round(stage.view.scale * 100)}%`;
    placeSplit();
  },
  onCursor: (text) => announceCursor(text),
});
const work = new Work(stage, refresh);
/** @type {AbortController | null} */
let running = null; // stops the request
let saved = true; // all results are, or are made again easily

// --- what is shown ---------------------------------------------------------------------------------------------------

/** Bring buttons and lists in line with the work. */
function refresh() {
  const [open, busy] = [work.current !== undefined, running !== null];
  get("empty").hidden = open;
  get("zoom").hidden = !open;
  input("compare").hidden = !open || busy || work.index === 0;
  if (input("compare").hidden) compare(0);
  /** @type {HTMLFieldSetElement} */ (get("tools")).disabled = !open || busy;
  button("undo").disabled = !work.canUndo;
  button("redo").disabled = !work.canRedo;
  button("save").disabled = !open || busy || work.index === 0;
  button("run").disabled = !open;
  button("run").children[0].textContent = busy ? "Stop" : "Fill";
  button("run").children[1].textContent = busy ? "Esc" : "Enter";
  button("run").classList.toggle("stop", busy);
  button("again").hidden = busy || !work.current?.source || stage.mask?.filled !== 0;
  for (const id of ["open", "camera"]) button(id).disabled = busy;
  get("progress").hidden = !busy;
  refreshHistory(busy);
}

/** @param {boolean} busy */
function refreshHistory(busy) {
  get("history-empty").hidden = work.steps.length > 1;
  const hadFocus = get("history").contains(document.activeElement);
  const items = work.steps.map((step, index) => {
    const item = document.createElement("button");
    Object.assign(item, { type: "button", disabled: busy, onclick: () => work.show(index).catch(showError) });
    item.setAttribute("aria-current", String(index === work.index));
    step.thumbnail.setAttribute("aria-hidden", "true");
    const text = document.createElement("span");
    text.append(index ? `Result ${index}` : "Original", element("small", step.detail || work.name));
    item.title = step.notes;
    item.append(step.thumbnail, text);
    return element("li", item);
  });
  get("history").replaceChildren(...items);
  if (hadFocus) items[work.index]?.querySelector("button")?.focus();
}

/** The slider is logarithmic. @param {number} size  In pixels. */
function showSize(size) {
  const largest = Math.max(stage.mask?.width ?? 0, stage.mask?.height ?? 0) * SIZES.share || 1000;
  const place = Math.log(size / SIZES.smallest) / Math.log(largest / SIZES.smallest);
  input("size").value = String(1000 * place);
  get("size-text").textContent = `${Math.round(size)} px`;
  input("size").setAttribute("aria-valuetext", `${Math.round(size)} pixels`);
}

/** Show the picture before on so much of the stage. @param {number} share */
function compare(share) {
  input("compare").value = String(1000 * share);
  placeSplit();
  stage.draw("picture", "mask", "pointer");
}

/** The pictures meet at the middle of the slider's thumb, which stays inside the stage. */
function placeSplit() {
  const share = Number(input("compare").value) / 1000;
  stage.split = share && (share * (stage.view.width - THUMB) + THUMB / 2) / stage.view.width;
}

// --- files -----------------------------------------------------------------------------------------------------------

/** @param {Blob | null | undefined} file @param {string} [name] */
async function open(file, name = /** @type {File} */ (file)?.name || "picture.png") {
  if (!file || running) return;
  get("error").hidden = true;
  try {
    await work.open(file, name);
  } catch (error) {
    return showError(error);
  }
  saved = true;
  compare(0);
  const { width, height } = /** @type {import("./mask.js").Mask} */ (stage.mask);
  stage.setSize(Math.max(SIZES.smallest, Math.min(width, height) / 12));
  say(`${name}, ${width} × ${height}. Paint over what is to go.`);
  stage.canvas.focus({ preventScroll: true });
}

/** The file as the service sent it. */
function save() {
  if (!work.current || work.index === 0 || running) return;
  const { blob } = work.current;
  const suffix = SUFFIXES[/** @type {keyof typeof SUFFIXES} */ (blob.type)] ?? blob.type.split("/")[1];
  download(blob, `${baseName()}_inpainted.${suffix}`);
  saved = true;
}

function baseName() {
  return work.name.replace(/\.[^.]*$/, "") || "picture";
}

/** @param {Blob | undefined} file */
async function loadMask(file) {
  if (!file || !stage.mask) return;
  try {
    const data = await readMask(file, stage.mask.width, stage.mask.height);
    work.draw((mask) => mask.replace(data));
  } catch (error) {
    showError(error);
  }
}

// --- the service -----------------------------------------------------------------------------------------------------

async function run() {
  if (running || !work.current) return;
  if (stage.abandon()) return;
  get("error").hidden = true;
  if (!stage.mask?.filled) return say("Nothing is painted yet: paint over what is to go.");
  if (!settings.checkValidity()) {
    const hidden = settings.querySelector("details");
    if (hidden?.querySelector(":invalid")) hidden.open = true;
    togglePanel(true);
    return void settings.reportValidity();
  }
  const begin = performance.now();
  running = new AbortController();
  stage.locked = true;
  compare(0);
  showProgress("Starting", null);
  say("Filling what is painted.");
  refresh();
  try {
    const source = work.snapshot();
    const result = await asked(async () => send(await orderForm(), /** @type {AbortController} */ (running).signal));
    const seconds = `${((performance.now() - begin) / 1000).toFixed(1)} s`;
    const made = result.settings;
    const seed = Number(made.seed ?? 0);
    await work.addResult(source, result.image, { detail: `seed ${seed}, ${seconds}`, notes: notes(made), seed });
    saved = false;
    say(`Done in ${seconds}. ${notes(made)}`.trim());
  } catch (error) {
    if (running.signal.aborted) say("Stopped. Nothing has changed.");
    else showError(error);
  } finally {
    running = null;
    stage.locked = false;
    await stage.preview(null);
    refresh();
    stage.draw("picture", "mask", "pointer");
  }
}

/** The picture, its mask, and those settings that were chosen. */
async function orderForm() {
  const form = new FormData();
  form.append("image", /** @type {import("./work.js").Step} */ (work.current).blob, "image");
  form.append("mask", await encodeMask(/** @type {import("./mask.js").Mask} */ (stage.mask)), "mask.png");
  for (const [name, value] of new FormData(settings)) {
    if (value !== "" && name !== "match_colours") form.append(name, value);
  }
  form.append("match_colours", String(settings.match_colours.checked));
  return form;
}

/** Send it, and again for as long as the service is busy. @param {FormData} form @param {AbortSignal} signal */
async function send(form, signal) {
  const onProgress = (/** @type {import("./api.js").Progress} */ { step, of, window, windows }) => {
    const part = windows > 1 ? `, part ${window} of ${windows}` : "";
    showProgress(`Step ${step} of ${of}${part}`, step / of);
  };
  for (;;) {
    try {
      return await inpaint(form, signal, { onProgress, onPreview: (url) => void stage.preview(url) });
    } catch (error) {
      if (!(error instanceof ServiceError) || error.status !== 429) throw error;
      for (let left = Math.ceil(error.retryAfter || BUSY_S); left > 0; left--) {
        showProgress(`The service is busy: next try in ${left} s`, null);
        await new Promise((resolve) => {
          setTimeout(resolve, 1000);
          signal.addEventListener("abort", resolve, { once: true });
        });
        signal.throwIfAborted();
      }
    }
  }
}

/** Ask for a token as often as the service wants one. @template T @param {() => Promise<T>} action
 * @returns {Promise<T>} */
async function asked(action) {
  for (;;) {
    try {
      return await action();
    } catch (error) {
      if (!(error instanceof ServiceError) || error.status !== 401) throw error;
      const token = await askToken(error);
      if (!token) throw error;
      setToken(token);
    }
  }
}

/** @param {Record<string, unknown>} made  The settings of a result. */
function notes(made) {
  return Array.isArray(made.notes) ? made.notes.map((note) => `Note: ${note}.`).join(" ") : "";
}

/** The same mask on the same picture, with the next seed. */
async function again() {
  if (running || !work.current?.source) return;
  settings.seed.value = String(work.current.seed + 1);
  await work.returnToSource();
  await run();
}

/** The model's name, and a token before any work is done, if one is needed. */
async function greet() {
  const [model] = (await asked(() => getJson("/v1/models"))).models;
  get("model").textContent = [model.name, model.precision].filter(Boolean).join(", ");
  get("model").title = model.description ?? "";
}

// --- buttons and keys ------------------------------------------------------------------------------------------------

/** @param {string} tool */
function chooseTool(tool) {
  const radio = /** @type {HTMLInputElement} */ (document.querySelector(`[name=tool][value=${tool}]`));
  radio.checked = true;
  stage.tool = /** @type {import("./stage.js").Tool} */ (tool);
  stage.draw("picture", "mask", "pointer");
}

function stop() {
  if (running) running.abort();
  else if (stage.abandon()) return;
  else if (!get("error").hidden) get("error").hidden = true;
  else togglePanel(false);
}

/** @type {Record<string, () => unknown>} */
const ACTIONS = {
  open: () => input("file").click(),
  "open-first": () => input("file").click(),
  camera: () => input("camera-file").click(),
  "camera-first": () => input("camera-file").click(),
  save,
  help: () => /** @type {HTMLDialogElement} */ (get("help-dialog")).showModal(),
  "panel-toggle": () => togglePanel(),
  "panel-close": () => togglePanel(false),
  undo: () => !running && work.undo().catch(showError),
  redo: () => !running && work.redo().catch(showError),
  clear: () => work.draw((mask) => mask.clear()),
  invert: () => work.draw((mask) => mask.invert()),
  "mask-open": () => input("mask-file").click(),
  "mask-save": async () => stage.mask && download(await encodeMask(stage.mask), `${baseName()}_mask.png`),
  "zoom-in": () => stage.zoom(1.25),
  "zoom-out": () => stage.zoom(0.8),
  "zoom-fit": () => stage.fit(),
  "error-close": () => (get("error").hidden = true),
  "token-cancel": () => /** @type {HTMLDialogElement} */ (get("token-dialog")).close(),
  run: () => (running ? stop() : run()),
  again,
};

/** Single keys, which work outside of fields. @type {Record<string, () => unknown>} */
const KEYS = {
  b: () => chooseTool("brush"),
  e: () => chooseTool("eraser"),
  r: () => chooseTool("rectangle"),
  l: () => chooseTool("lasso"),
  h: () => chooseTool("hand"),
  "[": () => stage.setSize(stage.size / 1.15),
  "]": () => stage.setSize(stage.size * 1.15),
  "+": ACTIONS["zoom-in"],
  "=": ACTIONS["zoom-in"],
  "-": ACTIONS["zoom-out"],
  "0": ACTIONS["zoom-fit"],
  i: ACTIONS.invert,
  delete: ACTIONS.clear,
  c: () => !input("compare").hidden && compare(stage.split ? 0 : 1),
  o: () => !running && ACTIONS.open(),
  "?": ACTIONS.help,
  enter: run,
};

/** With Ctrl, or Cmd. @type {Record<string, () => unknown>} */
const COMMANDS = { z: ACTIONS.undo, y: ACTIONS.redo, Z: ACTIONS.redo, s: save };

document.addEventListener("keydown", (event) => {
  const target = /** @type {HTMLElement} */ (event.target);
  if (target.closest("dialog") || event.isComposing) return;
  if (event.key === "Escape") return stop();
  if (target.matches("input[type=number], select") && event.key !== "Enter") return;
  const command = event.ctrlKey || event.metaKey;
  const key = event.key.length > 1 ? event.key.toLowerCase() : event.key;
  const action = command ? COMMANDS[event.shiftKey ? key.toUpperCase() : key] : event.altKey ? undefined : KEYS[key];
  if (!action || (key === "enter" && (event.repeat || target.closest("button, summary")))) return;
  event.preventDefault();
  action();
});

for (const [id, action] of Object.entries(ACTIONS)) button(id).addEventListener("click", () => void action());
for (const id of ["file", "camera-file", "mask-file"]) {
  input(id).addEventListener("change", () => {
    const file = input(id).files?.[0];
    input(id).value = ""; // so that the same file can be chosen again
    void (id === "mask-file" ? loadMask(file) : open(file));
  });
}
document.addEventListener("click", (event) => {
  const target = /** @type {HTMLElement} */ (event.target);
  // A button that was clicked, not pressed, gives up the focus: Enter is to fill, not to click it again.
  const clicked = event.detail && target.closest("button") && !target.closest("dialog");
  if (clicked && work.current) stage.canvas.focus({ preventScroll: true });
});
get("tools").addEventListener("change", (event) => {
  const { name, value } = /** @type {HTMLInputElement} */ (event.target);
  if (name === "tool") chooseTool(value);
});
input("size").addEventListener("input", () => {
  const largest = Math.max(stage.mask?.width ?? 0, stage.mask?.height ?? 0) * SIZES.share;
  stage.setSize(SIZES.smallest * (largest / SIZES.smallest) ** (Number(input("size").value) / 1000));
});
input("compare").addEventListener("input", () => compare(Number(input("compare").value) / 1000));
get("stage").addEventListener("pointerdown", () => togglePanel(false));

for (const image of get("samples").querySelectorAll("img")) {
  const choose = async () => open(await getBlob(image.src), image.dataset.name);
  image.closest("button")?.addEventListener("click", () => void choose().catch(showError));
}
document.addEventListener("paste", (event) => void open(event.clipboardData?.files[0]));
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dropping", name === "dragover" && !running);
    if (name === "drop") void open(/** @type {DragEvent} */ (event).dataTransfer?.files[0]);
  });
}
window.addEventListener("beforeunload", (event) => {
  if (!saved || running) event.preventDefault();
});

refresh();
greet().catch(showError);
