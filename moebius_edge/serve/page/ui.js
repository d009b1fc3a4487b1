/** Elements of the page, and what it says and asks: messages, errors, progress, the token. */

import { ServiceError } from "./api.js";
import { PictureError } from "./picture.js";

/** @template {HTMLElement} [T=HTMLElement] @param {string} id @returns {T} */
export const get = (id) => /** @type {T} */ (document.getElementById(id));
/** @param {string} id */
export const button = (id) => /** @type {HTMLButtonElement} */ (get(id));
/** @param {string} id */
export const input = (id) => /** @type {HTMLInputElement} */ (get(id));
export const settings = /** @type {HTMLFormElement} */ (get("settings"));

/** @param {string} name @param {string | Node} content */
export function element(name, content) {
  const made = document.createElement(name);
  made.append(content);
  return made;
}

/** @param {string} text */
export function say(text) {
  get("status").textContent = text;
}

/** @param {unknown} error */
export function showError(error) {
  const { message, remedy } = /** @type {{message: string, remedy?: string}} */ (error);
  if (!(error instanceof ServiceError || error instanceof PictureError)) console.error(error);
  get("problem").textContent = message;
  get("remedy").textContent = remedy ?? "";
  get("error").hidden = false;
  say("");
}

/** @type {number | undefined} */
let cursorTimer;
/** Once the cursor rests: a screen reader would otherwise read every step. @param {string} text */
export function announceCursor(text) {
  clearTimeout(cursorTimer);
  cursorTimer = setTimeout(() => (get("cursor").textContent = text), 400);
}

/** @param {Blob} blob @param {string} name */
export function download(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** @param {ServiceError} error @returns {Promise<string>} empty if it was not given. */
export function askToken(error) {
  const dialog = /** @type {HTMLDialogElement} */ (get("token-dialog"));
  const form = /** @type {HTMLFormElement} */ (dialog.querySelector("form"));
  get("token-problem").textContent = error.message;
  form.reset();
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    form.onsubmit = () => resolve(form.token.value);
    dialog.onclose = () => resolve(""); // after a submit it is resolved already
  });
}

/** @param {string} text @param {number | null} share  Null while it is not known. */
export function showProgress(text, share) {
  const bar = /** @type {HTMLProgressElement} */ (document.querySelector("progress"));
  if (share === null) bar.removeAttribute("value");
  else bar.value = share;
  get("progress-text").textContent = text;
}

/** @param {boolean} [open] */
export function togglePanel(open = !document.body.classList.contains("panel-open")) {
  document.body.classList.toggle("panel-open", open);
  button("panel-toggle").setAttribute("aria-expanded", String(open));
}
