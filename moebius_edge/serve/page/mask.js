/**
 * The mask of a picture: a byte for each pixel of the whole picture (1 = fill), however small it is shown.
 *
 * Shapes have no soft edges, since the service cuts a mask at half. A gesture draws, then `commit` returns what it
 * changed as a patch, or `revert` takes it back.
 */

/** @typedef {{x: number, y: number}} Point  In pixels of the picture; the centre of a pixel lies at a half. */
/** @typedef {{left: number, top: number, right: number, bottom: number}} Box  Whole pixels, the ends exclusive. */
/** @typedef {{box: Box, bits: Uint8Array}} Patch  A bit for each pixel of the box, set where the pixel changes. */

export class Mask {
  /** @type {Box | null} */
  #changed = null; // what was drawn on since the last commit
  /** @type {Uint8Array} */
  #committed;

  /** @param {number} width @param {number} height */
  constructor(width, height) {
    this.width = width;
    this.height = height;
    this.data = new Uint8Array(width * height);
    this.#committed = new Uint8Array(width * height);
    this.filled = 0; // the number of pixels to fill at the last commit
  }

  /**
   * Set everything within `radius` of the line from `a` to `b`, and always the pixel at `b`.
   * @param {Point} a @param {Point} b @param {number} radius @param {0 | 1} value
   */
  stroke(a, b, radius, value) {
    const length = Math.hypot(b.x - a.x, b.y - a.y) || 1;
    const [dx, dy] = [((a.y - b.y) / length) * radius, ((b.x - a.x) / length) * radius];
    const band = [[a.x + dx, a.y + dy], [b.x + dx, b.y + dy], [b.x - dx, b.y - dy], [a.x - dx, a.y - dy]];
    // Two discs and the band between them are convex together: they cover one run of pixels in each row.
    this.#rows(Math.min(a.y, b.y) - radius, Math.max(a.y, b.y) + radius, (y) => {
      const ends = [];
      for (const centre of [a, b]) {
        const half = Math.sqrt(radius ** 2 - (y - centre.y) ** 2);
        if (half >= 0) ends.push(centre.x - half, centre.x + half);
      }
      ends.push(...crossings(band, y).map(({ x }) => x));
      if (ends.length) this.#run(y, Math.min(...ends), Math.max(...ends), value);
    });
    this.#run(Math.floor(b.y) + 0.5, Math.floor(b.x), Math.floor(b.x) + 1, value);
  }

  /** @param {Point} a @param {Point} b  Opposite corners. @param {0 | 1} value */
  rectangle(a, b, value) {
    const [left, right] = [Math.min(a.x, b.x), Math.max(a.x, b.x)];
    this.#rows(Math.min(a.y, b.y), Math.max(a.y, b.y), (y) => this.#run(y, left, right, value));
  }

  /** Set what a closed line goes round, once or more often. @param {Point[]} points @param {0 | 1} value */
  polygon(points, value) {
    const corners = points.map(({ x, y }) => [x, y]);
    const heights = points.map(({ y }) => y);
    const [top, bottom] = heights.reduce(([low, high], y) => [Math.min(low, y), Math.max(high, y)], [Infinity, -Infinity]);
    this.#rows(top, bottom, (y) => {
      let [winding, start] = [0, 0];
      for (const { x, direction } of crossings(corners, y).sort((one, other) => one.x - other.x)) {
        if (winding === 0) start = x;
        winding += direction;
        if (winding === 0) this.#run(y, start, x, value);
      }
    });
  }

  invert() {
    const { data } = this;
    for (let i = 0; i < data.length; i++) data[i] ^= 1;
    this.#touch(0, 0, this.width, this.height);
  }

  clear() {
    this.data.fill(0);
    this.#touch(0, 0, this.width, this.height);
  }

  /** Replace the whole mask. @param {Uint8Array} data  A 0 or 1 for each pixel. */
  replace(data) {
    this.data.set(data);
    this.#touch(0, 0, this.width, this.height);
  }

  /** What changed since the last commit, null if nothing did. @returns {Patch | null} */
  commit() {
    const box = this.#changed && this.#tight(this.#changed);
    this.#changed = null;
    if (!box) return null;
    const bits = new Uint8Array(Math.ceil(((box.right - box.left) * (box.bottom - box.top)) / 8));
    this.#each(box, (pixel, n) => {
      if (this.data[pixel] === this.#committed[pixel]) return;
      bits[n >> 3] |= 1 << (n & 7);
      this.filled += this.data[pixel] ? 1 : -1;
      this.#committed[pixel] = this.data[pixel];
    });
    return { box, bits };
  }

  /** Take back what was drawn since the last commit. */
  revert() {
    if (this.#changed) this.#each(this.#changed, (pixel) => (this.data[pixel] = this.#committed[pixel]));
    this.#changed = null;
  }

  /** Apply a patch, or take it back, which is the same. @param {Patch | null} patch */
  apply(patch) {
    if (!patch) return;
    const { box, bits } = patch;
    this.#each(box, (pixel, n) => (this.data[pixel] ^= (bits[n >> 3] >> (n & 7)) & 1));
    this.#touch(box.left, box.top, box.right, box.bottom);
    this.commit();
  }

  /** The patch that turns an empty mask into this one. @returns {Patch | null} */
  toPatch() {
    const whole = new Mask(this.width, this.height);
    whole.replace(this.#committed);
    return whole.commit();
  }

  /** Call `draw` with the height of each row's middle. @param {number} top @param {number} bottom
   * @param {(y: number) => void} draw */
  #rows(top, bottom, draw) {
    const last = Math.min(this.height - 1, Math.floor(bottom - 0.5));
    for (let row = Math.max(0, Math.ceil(top - 0.5)); row <= last; row++) draw(row + 0.5);
  }

  /** Set the pixels of a row whose centres lie between `left` and `right`.
   * @param {number} y @param {number} left @param {number} right @param {0 | 1} value */
  #run(y, left, right, value) {
    const row = Math.floor(y);
    const start = Math.max(0, Math.ceil(left - 0.5));
    const end = Math.min(this.width, Math.floor(right - 0.5) + 1);
    if (end <= start || row < 0 || row >= this.height) return;
    this.data.fill(value, row * this.width + start, row * this.width + end);
    this.#touch(start, row, end, row + 1);
  }

  /** @param {number} left @param {number} top @param {number} right @param {number} bottom */
  #touch(left, top, right, bottom) {
    const box = this.#changed ?? { left, top, right, bottom };
    this.#changed = {
      left: Math.min(box.left, left),
      top: Math.min(box.top, top),
      right: Math.max(box.right, right),
      bottom: Math.max(box.bottom, bottom),
    };
  }

  /** The smallest box round what really changed in `box`, null if nothing did. @param {Box} box @returns {Box | null} */
  #tight(box) {
    let [left, top, right, bottom] = [Infinity, Infinity, -1, -1];
    for (let y = box.top; y < box.bottom; y++) {
      for (let x = box.left, pixel = y * this.width + x; x < box.right; x++, pixel++) {
        if (this.data[pixel] === this.#committed[pixel]) continue;
        if (x < left) left = x;
        if (x >= right) right = x + 1;
        if (y < top) top = y;
        bottom = y + 1;
      }
    }
    return bottom < 0 ? null : { left, top, right, bottom };
  }

  /** Call `visit` with the index of every pixel of `box` and its number there.
   * @param {Box} box @param {(pixel: number, n: number) => void} visit */
  #each(box, visit) {
    let n = 0;
    for (let y = box.top; y < box.bottom; y++) {
      for (let pixel = y * this.width + box.left, end = pixel + box.right - box.left; pixel < end; pixel++) visit(pixel, n++);
    }
  }
}

/** Where a closed line crosses the height `y`, and whether downwards (1) or upwards (-1). @param {number[][]} corners
 * @param {number} y @returns {{x: number, direction: number}[]} */
function crossings(corners, y) {
  const found = [];
  for (let i = 0; i < corners.length; i++) {
    const [[x0, y0], [x1, y1]] = [corners[i], corners[(i + 1) % corners.length]];
    if (y0 <= y === y1 <= y) continue;
    found.push({ x: x0 + ((y - y0) / (y1 - y0)) * (x1 - x0), direction: y0 <= y ? 1 : -1 });
  }
  return found;
}
