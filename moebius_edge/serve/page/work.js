/** The pictures of one piece of work, from the file that was opened to the last result, and the way back. */

import { Mask } from "./mask.js";
import { decode, thumbnail } from "./picture.js";
import { UndoStack } from "./undo.js";

/** @typedef {import("./mask.js").Patch} Patch */
/** @typedef {import("./stage.js").Stage} Stage */
/** @typedef {{detail: string, notes: string, seed: number}} Remarks  How a result was made. */
/**
 * A picture of the history; `source` is the state that it was made from, for a result.
 * @typedef {Remarks & {blob: Blob, thumbnail: HTMLCanvasElement, source?: State}} Step
 */
/**
 * All that is seen: which picture of which history, and the mask as a patch on an empty one.
 * @typedef {{name: string, steps: Step[], index: number, mask: Patch | null}} State
 */

const THUMBNAIL = 144; // pixels
const QUICK = 2048; // pixels, of the copy that is drawn where the picture is shown smaller

export class Work {
  #undo = new UndoStack();
  /** @type {Promise<unknown>} */
  #last = Promise.resolve(); // changes come one after the other, though they wait for decoders
  /** @type {State | null} */
  #state = null;
  /** @type {Map<Blob, ImageBitmap>} */
  #decoded = new Map(); // the picture that is shown, the first one, and what is about to be shown

  /** @param {Stage} stage @param {() => void} onChange */
  constructor(stage, onChange) {
    this.stage = stage;
    this.onChange = onChange;
  }

  get steps() {
    return this.#state?.steps ?? [];
  }

  get index() {
    return this.#state?.index ?? 0;
  }

  get name() {
    return this.#state?.name ?? "";
  }

  /** @returns {Step | undefined} */
  get current() {
    return this.steps[this.index];
  }

  get canUndo() {
    return this.#undo.canUndo;
  }

  get canRedo() {
    return this.#undo.canRedo;
  }

  /** Begin anew with a file. Raises `PictureError`. @param {Blob} file @param {string} name */
  open(file, name) {
    return this.#queue(async () => {
      const first = await this.#step(file, { detail: "", notes: "", seed: 0 });
      await this.#change({ name, steps: [first], index: 0, mask: null });
    });
  }

  /** What is on the stage, to be returned to. @returns {State} */
  snapshot() {
    if (!this.#state) throw new Error("there is no picture");
    return { ...this.#state, mask: this.stage.mask?.toPatch() ?? null };
  }

  /** @param {State} source  What the result was made from. @param {Blob} blob @param {Remarks} remarks */
  addResult(source, blob, remarks) {
    return this.#queue(async () => {
      const steps = [...source.steps, { ...(await this.#step(blob, remarks)), source }];
      await this.#change({ ...source, steps, index: steps.length - 1, mask: null });
    });
  }

  /** Show another picture of the history under the same mask. @param {number} index */
  show(index) {
    return this.#queue(async () => {
      if (this.#state && index !== this.index) await this.#change({ ...this.snapshot(), index });
    });
  }

  /** Back to what the picture was made from, its mask included, with all results in the history. */
  returnToSource() {
    return this.#queue(async () => {
      const source = this.current?.source;
      if (source) await this.#change({ ...source, steps: this.steps });
    });
  }

  /** Change the mask at once, as a step that can be undone. @param {(mask: Mask) => void} draw */
  draw(draw) {
    const { mask } = this.stage;
    if (!mask || this.stage.locked) return;
    draw(mask);
    const patch = mask.commit();
    if (patch) this.notePatch(patch);
    this.stage.draw("picture", "mask", "pointer");
  }

  /** Note a change of the mask that was made. @param {Patch} patch */
  notePatch(patch) {
    const toggle = () => {
      this.stage.mask?.apply(patch);
      this.stage.draw("picture", "mask", "pointer");
    };
    this.#undo.push({ undo: toggle, redo: toggle, bytes: patch.bits.length });
    this.onChange();
  }

  undo() {
    return this.#queue(() => this.#undo.undo());
  }

  redo() {
    return this.#queue(() => this.#undo.redo());
  }

  /** @param {() => Promise<void>} change @returns {Promise<void>} */
  #queue(change) {
    const next = this.#last.then(async () => {
      this.stage.abandon();
      await change();
      this.onChange();
    });
    this.#last = next.catch(() => undefined);
    return next;
  }

  /** @param {State} after */
  async #change(after) {
    const before = this.#state && this.snapshot();
    await this.#enter(after);
    if (!before) return;
    const bytes = (before.mask?.bits.length ?? 0) + (after.mask?.bits.length ?? 0);
    this.#undo.push({ undo: () => this.#enter(before), redo: () => this.#enter(after), bytes });
  }

  /** @param {State} state */
  async #enter(state) {
    const { locked } = this.stage;
    this.stage.locked = true; // what is painted meanwhile would be lost
    try {
      const blobs = [state.steps[state.index].blob, state.steps[0].blob];
      const picture = await this.#bitmap(blobs[0]);
      const first = await this.#bitmap(blobs[1]);
      const mask = new Mask(picture.width, picture.height);
      mask.apply(state.mask);
      this.stage.show(picture, first, thumbnail(picture, QUICK), mask);
      this.#state = state;
      for (const [blob, bitmap] of this.#decoded) {
        if (blobs.includes(blob)) continue;
        bitmap.close();
        this.#decoded.delete(blob);
      }
    } finally {
      this.stage.locked = locked;
    }
  }

  /** @param {Blob} blob */
  async #bitmap(blob) {
    const bitmap = this.#decoded.get(blob) ?? (await decode(blob));
    this.#decoded.set(blob, bitmap);
    return bitmap;
  }

  /** @param {Blob} blob @param {Remarks} remarks @returns {Promise<Step>} */
  async #step(blob, remarks) {
    return { ...remarks, blob, thumbnail: thumbnail(await this.#bitmap(blob), THUMBNAIL) };
  }
}
