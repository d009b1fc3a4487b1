/** Undo and redo: a list of changes, each with a way there and a way back. */

/** @typedef {{undo: () => unknown, redo: () => unknown, bytes: number}} Change  `bytes` is the memory that it holds. */

const MOST_BYTES = 256e6; // the oldest changes are dropped beyond that

export class UndoStack {
  /** @type {Change[]} */
  #changes = [];
  #done = 0; // changes before this one are done, the others undone

  get canUndo() {
    return this.#done > 0;
  }

  get canRedo() {
    return this.#done < this.#changes.length;
  }

  /** Note a change that was made. @param {Change} change */
  push(change) {
    this.#changes.splice(this.#done, Infinity, change);
    let bytes = this.#changes.reduce((sum, each) => sum + each.bytes, 0);
    while (bytes > MOST_BYTES && this.#changes.length > 1) bytes -= this.#changes.shift()?.bytes ?? 0;
    this.#done = this.#changes.length;
  }

  async undo() {
    if (this.canUndo) await this.#changes[--this.#done].undo();
  }

  async redo() {
    if (this.canRedo) await this.#changes[this.#done++].redo();
  }
}
