/** Where the picture lies on the stage: `scale` stage pixels for each of its own, its corner at (`x`, `y`). */

/** @typedef {import("./mask.js").Point} Point */

const MARGIN = 16; // stage pixels round a picture that is shown whole
const LARGEST_FIT = 4; // a small picture is enlarged so much at first
const LARGEST = 40;

export class View {
  scale = 1;
  x = 0;
  y = 0;
  width = 0; // of the stage
  height = 0;
  fitted = true; // the picture is shown whole, and is to stay so when the stage changes

  /** @param {number} width @param {number} height  Of the picture. */
  setPicture(width, height) {
    this.picture = { width, height };
    this.fit();
  }

  /** @param {number} width @param {number} height  Of the stage. */
  resize(width, height) {
    const middle = this.toPicture({ x: this.width / 2, y: this.height / 2 });
    [this.width, this.height] = [width, height];
    if (this.fitted) this.fit();
    else this.#place(middle, { x: width / 2, y: height / 2 });
  }

  get #whole() {
    const { width, height } = this.picture ?? { width: 1, height: 1 };
    const [across, down] = [(this.width - 2 * MARGIN) / width, (this.height - 2 * MARGIN) / height];
    return Math.max(Math.min(across, down, LARGEST_FIT), 1e-3);
  }

  fit() {
    this.scale = this.#whole;
    const { width, height } = this.picture ?? { width: 1, height: 1 };
    this.#place({ x: width / 2, y: height / 2 }, { x: this.width / 2, y: this.height / 2 });
    this.fitted = true;
  }

  /** Zoom about a point of the stage. @param {number} factor @param {Point} [at] */
  zoom(factor, at = { x: this.width / 2, y: this.height / 2 }) {
    const fixed = this.toPicture(at);
    const smallest = Math.min(this.#whole, 1) / 2;
    this.scale = Math.min(Math.max(this.scale * factor, smallest), Math.max(LARGEST, this.#whole));
    this.#place(fixed, at);
  }

  /** @param {number} dx @param {number} dy  In stage pixels. */
  pan(dx, dy) {
    this.#place({ x: 0, y: 0 }, { x: this.x + dx, y: this.y + dy });
  }

  /** Pan until a point of the picture is well inside. @param {Point} point */
  show(point) {
    const { x, y } = this.toStage(point);
    const inside = (/** @type {number} */ at, /** @type {number} */ size) =>
      Math.min(Math.max(at, Math.min(48, size / 4)), size - Math.min(48, size / 4)) - at;
    const [dx, dy] = [inside(x, this.width), inside(y, this.height)];
    if (!this.fitted && (dx || dy)) this.pan(dx, dy);
  }

  /** @param {Point} point @returns {Point} */
  toPicture({ x, y }) {
    return { x: (x - this.x) / this.scale, y: (y - this.y) / this.scale };
  }

  /** @param {Point} point @returns {Point} */
  toStage({ x, y }) {
    return { x: x * this.scale + this.x, y: y * this.scale + this.y };
  }

  /** Bring a point of the picture to one of the stage, but keep the picture in sight.
   * @param {Point} point @param {Point} at */
  #place(point, at) {
    const { width, height } = this.picture ?? { width: 1, height: 1 };
    const keep = (/** @type {number} */ corner, /** @type {number} */ size, /** @type {number} */ stage) => {
      const sight = Math.min(size, stage) / 2;
      return Math.min(Math.max(corner, sight - size), stage - sight);
    };
    this.x = keep(at.x - point.x * this.scale, width * this.scale, this.width);
    this.y = keep(at.y - point.y * this.scale, height * this.scale, this.height);
    this.fitted = false;
  }
}
