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
    const top = points.reduce((low, { y }) => Math.min(low, y), Infinity);
    const bottom = points.reduce((high, { y }) => Math.max(high, y), -Infinity);
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
    const box = this.#changed;
    this.#changed = null;
    if (!box) return null;
    const { bits, added, removed } = this.#difference(box, this.#committed);
    this.#copyRows(box, this.data, this.#committed);
    this.filled += added - removed;
    return added + removed ? { box, bits } : null;
  }

  /** Take back what was drawn since the last commit. */
  revert() {
    if (this.#changed) this.#copyRows(this.#changed, this.#committed, this.data);
    this.#changed = null;
  }

  /** Apply a patch, or take it back, which is the same. @param {Patch | null} patch */
  apply(patch) {
    if (!patch) return;
    const { box, bits } = patch;
    for (let y = box.top, n = 0; y < box.bottom; y++) {
      const row = y * this.width;
      for (let x = box.left; x < box.right; x++, n++) this.data[row + x] ^= (bits[n >> 3] >> (n & 7)) & 1;
    }
    this.#touch(box.left, box.top, box.right, box.bottom);
    this.commit();
  }

  /** The patch that turns an empty mask into this one, null if it is empty. @returns {Patch | null} */
  toPatch() {
    let [left, top, right, bottom] = [this.width, -1, 0, 0];
    for (let y = 0; y < this.height; y++) {
      const row = this.#committed.subarray(y * this.width, (y + 1) * this.width);
      const first = row.indexOf(1);
      if (first < 0) continue;
      [left, right, bottom] = [Math.min(left, first), Math.max(right, row.lastIndexOf(1) + 1), y + 1];
      if (top < 0) top = y;
    }
    if (top < 0) return null;
    const box = { left, top, right, bottom };
    return { box, bits: this.#difference(box, null).bits };
  }

  /**
   * Which pixels of a box differ from `before`, null for an empty mask, and how many are set and cleared since then.
   * @param {Box} box @param {Uint8Array | null} before
   */
  #difference(box, before) {
    const bits = new Uint8Array(Math.ceil(((box.right - box.left) * (box.bottom - box.top)) / 8));
    let [added, removed] = [0, 0];
    for (let y = box.top, n = 0; y < box.bottom; y++) {
      const row = y * this.width;
      for (let x = box.left; x < box.right; x++, n++) {
        const value = this.data[row + x];
        if (value === (before ? before[row + x] : 0)) continue;
        bits[n >> 3] |= 1 << (n & 7);
        if (value) added++;
        else removed++;
      }
    }
    return { bits, added, removed };
  }

  /** @param {Box} box @param {Uint8Array} from @param {Uint8Array} to */
  #copyRows(box, from, to) {
    for (let y = box.top; y < box.bottom; y++) {
      const [start, end] = [y * this.width + box.left, y * this.width + box.right];
      to.set(from.subarray(start, end), start);
    }
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
