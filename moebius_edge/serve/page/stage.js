/**
 * The stage: three canvases on top of each other (picture, mask, pointer), and what a gesture paints on the mask.
 *
 * Mouse, touch, pen and keyboard (`input.js`) all come down to `begin`, `extend`, `finish` and `abandon`.
 */

import { listen } from "./input.js";
import { context2d } from "./picture.js";
import { View } from "./view.js";

/** @typedef {import("./mask.js").Mask} Mask */
/** @typedef {import("./mask.js").Patch} Patch */
/** @typedef {import("./mask.js").Point} Point */
/** @typedef {"brush" | "eraser" | "rectangle" | "lasso" | "hand"} Tool */
/** @typedef {{tool: Tool, value: 0 | 1, points: Point[]}} Gesture  Points of a lasso; else the first and last. */

const FILL = [255, 45, 120, 120]; // red, green, blue and opacity of the mask
const EDGE = [255, 255, 255, 230];
const SMALLEST = 1; // pixels of the picture, of a brush

export class Stage {
  view = new View();
  /** @type {Mask | null} */
  mask = null;
  /** @type {Tool} */
  tool = "brush";
  size = 40; // the brush's diameter, in pixels of the picture
  locked = false; // nothing can be painted
  split = 0; // the share of the stage's width, from the left, that shows the picture before

  /** @type {Gesture | null} */
  gesture = null;
  /** @type {Point | null} */
  hover = null; // where the mouse or pen is, on the stage
  /** @type {Point | null} */
  cursor = null; // where the keyboard paints, in the picture
  /** @type {"" | "grab" | "grabbing"} */
  grip = ""; // the view can be moved, or is

  /** @type {ImageBitmap | null} */
  #picture = null;
  /** @type {HTMLCanvasElement | null} */
  #small = null; // the picture at a size that is drawn quickly
  /** @type {ImageBitmap | null} */
  #before = null;
  /** @type {HTMLImageElement | null} */
  #preview = null;
  #stale = new Set();

  /**
   * @param {HTMLElement} element  Holds the three canvases; the last one has the focus.
   * @param {{onPatch: (patch: Patch) => void, onSize: (size: number) => void, onPaint: () => void,
   *          onView: () => void, onCursor: (text: string) => void}} callbacks
   */
  constructor(element, callbacks) {
    const [picture, mask, pointer] = element.querySelectorAll("canvas");
    this.pictureCanvas = picture;
    this.maskCanvas = mask;
    this.canvas = pointer;
    this.callbacks = callbacks;
    new ResizeObserver(() => this.#resize(element.clientWidth, element.clientHeight)).observe(element);
    listen(this);
  }

  /**
   * Show a picture; the view stays if the size does.
   * @param {ImageBitmap} picture @param {ImageBitmap} before  To compare with. @param {HTMLCanvasElement} small
   * @param {Mask} mask
   */
  show(picture, before, small, mask) {
    const { picture: size } = this.view;
    [this.#picture, this.#before, this.#small, this.mask, this.#preview] = [picture, before, small, mask, null];
    if (size?.width !== picture.width || size.height !== picture.height) {
      this.view.setPicture(picture.width, picture.height);
      this.cursor = null;
    }
    this.changed();
  }

  /** An image of the work in progress in place of the picture, null for none. @param {string | null} url */
  async preview(url) {
    const image = url ? Object.assign(new Image(), { src: url }) : null;
    await image?.decode().catch(() => undefined);
    if (image && !this.locked) return; // the work has ended meanwhile
    this.#preview = image;
    this.draw("picture");
  }

  /** @param {number} size */
  setSize(size) {
    const largest = Math.max(this.mask?.width ?? 0, this.mask?.height ?? 0, 2 * SMALLEST);
    this.size = Math.min(Math.max(size, SMALLEST), largest);
    this.callbacks.onSize(this.size);
    this.draw("pointer");
  }

  /** @param {number} factor @param {Point} [at] */
  zoom(factor, at) {
    this.view.zoom(factor, at);
    this.changed();
  }

  fit() {
    this.view.fit();
    this.changed();
  }

  // --- gestures -----------------------------------------------------------------------------------------------------

  /** @param {Point} at @param {0 | 1} value */
  begin(at, value) {
    if (!this.mask || this.locked || this.tool === "hand") return;
    this.callbacks.onPaint();
    this.gesture = { tool: this.tool, value, points: [at, at] };
    this.extend(at);
  }

  /** @param {Point} at */
  extend(at) {
    if (!this.gesture || !this.mask) return;
    const { tool, value, points } = this.gesture;
    if (tool === "brush" || tool === "eraser") {
      this.mask.stroke(points[1], at, this.size / 2, value);
      this.gesture.points = [points[1], at];
      this.#drawMaskRound(points[1], at);
    } else if (tool === "lasso") points.push(at);
    else points[1] = at;
    this.draw("pointer");
  }

  finish() {
    if (!this.gesture || !this.mask) return;
    const { tool, value, points } = this.gesture;
    if (tool === "rectangle") this.mask.rectangle(points[0], points[1], value);
    if (tool === "lasso") this.mask.polygon(points, value);
    this.gesture = null;
    this.draw("mask", "pointer");
    const patch = this.mask.commit();
    if (patch) this.callbacks.onPatch(patch);
  }

  /** @returns {boolean} whether there was a gesture to give up. */
  abandon() {
    if (!this.gesture) return false;
    this.mask?.revert();
    this.gesture = null;
    this.draw("mask", "pointer");
    return true;
  }

  // --- drawing ------------------------------------------------------------------------------------------------------

  /** @param {number} width @param {number} height */
  #resize(width, height) {
    if (!width || !height) return;
    for (const canvas of [this.pictureCanvas, this.maskCanvas, this.canvas]) {
      // The mask is drawn pixel by pixel, at one a stage pixel: as many again would not be seen.
      const ratio = canvas === this.maskCanvas ? 1 : devicePixelRatio;
      [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
    }
    this.view.resize(width, height);
    this.changed(true);
  }

  /** Where the middle of the stage is in the picture. */
  get middle() {
    const { width, height } = this.view;
    return this.view.toPicture({ x: width / 2, y: height / 2 });
  }

  /** The view or the picture has changed. @param {boolean} [atOnce]  A resized canvas is blank until it is drawn. */
  changed(atOnce = false) {
    this.callbacks.onView();
    this.draw("picture", "mask", "pointer");
    if (atOnce) this.#drawStale();
  }

  /** @param {...("picture" | "mask" | "pointer")} layers */
  draw(...layers) {
    if (this.#stale.size === 0) requestAnimationFrame(() => this.#drawStale());
    for (const layer of layers) this.#stale.add(layer);
  }

  #drawStale() {
    const stale = [...this.#stale];
    this.#stale.clear();
    if (stale.includes("picture")) this.#drawPicture();
    if (stale.includes("mask")) this.#drawMask(0, 0, this.maskCanvas.width, this.maskCanvas.height);
    if (stale.includes("pointer")) this.#drawPointer();
  }

  /** Cleared, and scaled to stage pixels. @param {HTMLCanvasElement} canvas */
  #cleared(canvas) {
    const context = context2d(canvas);
    context.setTransform(canvas.width / (this.view.width || 1), 0, 0, canvas.height / (this.view.height || 1), 0, 0);
    context.clearRect(0, 0, this.view.width, this.view.height);
    return context;
  }

  #drawPicture() {
    const context = this.#cleared(this.pictureCanvas);
    if (!this.#picture) return;
    const { scale, width, height } = this.view;
    // On whole pixels of the screen, or the ground would shine through at the edges.
    const whole = (/** @type {number} */ at) => Math.round(at * devicePixelRatio) / devicePixelRatio;
    const [x, y] = [whole(this.view.x), whole(this.view.y)];
    const right = this.view.x + this.#picture.width * scale;
    const bottom = this.view.y + this.#picture.height * scale;
    const [w, h] = [whole(right) - x, whole(bottom) - y];
    context.imageSmoothingQuality = "high";
    context.imageSmoothingEnabled = scale < 4; // nearer than that, single pixels are to be seen
    drawChequers(context, x, y, w, h);
    const quick = this.#small && this.#small.width >= w * devicePixelRatio ? this.#small : this.#picture;
    context.drawImage(this.#preview ?? quick, x, y, w, h);
    const edge = this.split * width;
    if (edge <= 0 || !this.#before) return;
    context.save();
    context.beginPath();
    context.rect(0, 0, edge, height);
    context.clip();
    drawChequers(context, x, y, w, h);
    context.drawImage(this.#before, x, y, w, h);
    context.restore();
  }

  /** Draw the mask in a part of the stage, whose ends are exclusive.
   * @param {number} left @param {number} top @param {number} right @param {number} bottom */
  #drawMask(left, top, right, bottom) {
    const context = context2d(this.maskCanvas);
    const [width, height] = [right - left, bottom - top];
    if (width <= 0 || height <= 0) return;
    const pixels = new ImageData(width, height);
    if (this.mask && !(this.locked && this.#preview)) this.#colourMask(pixels, left, top);
    context.putImageData(pixels, left, top);
  }

  /** @param {ImageData} pixels @param {number} left @param {number} top */
  #colourMask(pixels, left, top) {
    const { data, width: columns, height: rows } = /** @type {Mask} */ (this.mask);
    const { scale, x, y } = this.view;
    const colours = new Uint32Array(pixels.data.buffer);
    const [fill, edge] = new Uint32Array(Uint8Array.from([...FILL, ...EDGE]).buffer);
    // One column and one row more, to the left and above, to see where the mask begins.
    const column = Int32Array.from({ length: pixels.width + 1 }, (_, i) => Math.floor((left + i - 0.5 - x) / scale));
    let [above, here] = [new Uint8Array(column.length), new Uint8Array(column.length)];
    for (let j = 0, at = 0; j <= pixels.height; j++) {
      [above, here] = [here, above];
      const row = Math.floor((top + j - 0.5 - y) / scale);
      for (let i = 0; i < column.length; i++) {
        here[i] = row >= 0 && row < rows && column[i] >= 0 && column[i] < columns ? data[row * columns + column[i]] : 0;
      }
      for (let i = 1; j > 0 && i < column.length; i++, at++) {
        if (here[i] !== here[i - 1] || here[i] !== above[i]) colours[at] = edge;
        else if (here[i]) colours[at] = fill;
      }
    }
  }

  /** After a stroke. @param {Point} from @param {Point} to  In the picture. */
  #drawMaskRound(from, to) {
    const [a, b] = [this.view.toStage(from), this.view.toStage(to)];
    const reach = (this.size / 2) * this.view.scale + this.view.scale + 2;
    const { width, height } = this.maskCanvas;
    const from0 = (/** @type {number} */ at) => Math.max(0, Math.floor(at - reach));
    const [right, bottom] = [Math.ceil(Math.max(a.x, b.x) + reach), Math.ceil(Math.max(a.y, b.y) + reach)];
    this.#drawMask(
      from0(Math.min(a.x, b.x)), from0(Math.min(a.y, b.y)), Math.min(width, right), Math.min(height, bottom),
    );
  }

  #drawPointer() {
    const context = this.#cleared(this.canvas);
    const grip = this.grip || (this.tool === "hand" ? "grab" : "");
    this.canvas.style.cursor = grip || "crosshair";
    if (!this.#picture) return;
    if (this.split > 0) outline(context, () => line(context, this.split * this.view.width, 0, 0, this.view.height));
    const at = this.cursor ? this.view.toStage(this.cursor) : this.hover;
    const brush = this.tool === "brush" || this.tool === "eraser";
    if (at && brush && !this.locked && (this.cursor || !grip)) {
      outline(context, () => context.arc(at.x, at.y, Math.max((this.size / 2) * this.view.scale, 1.5), 0, 2 * Math.PI));
    }
    if (at && this.cursor) {
      outline(context, () => (line(context, at.x - 10, at.y, 20, 0), line(context, at.x, at.y - 10, 0, 20)));
    }
    if (this.gesture && !brush) this.#drawShape(context, this.gesture);
  }

  /** @param {CanvasRenderingContext2D} context @param {Gesture} gesture */
  #drawShape(context, { tool, points }) {
    const corners = points.map((point) => this.view.toStage(point));
    const [a, b] = corners;
    outline(context, () => {
      if (tool === "rectangle") context.rect(a.x, a.y, b.x - a.x, b.y - a.y);
      else {
        for (const { x, y } of corners) context.lineTo(x, y);
        context.closePath();
      }
    });
  }
}

/** A line that is seen on anything: white on black.
 * @param {CanvasRenderingContext2D} context @param {() => void} path */
function outline(context, path) {
  context.beginPath();
  path();
  for (const [colour, width] of /** @type {[string, number][]} */ ([["rgb(0 0 0 / 65%)", 4], ["#fff", 1.75]])) {
    [context.strokeStyle, context.lineWidth] = [colour, width];
    context.stroke();
  }
}

/** @param {CanvasRenderingContext2D} context @param {number} x @param {number} y @param {number} dx
 * @param {number} dy */
function line(context, x, y, dx, dy) {
  context.moveTo(x, y);
  context.lineTo(x + dx, y + dy);
}

/** The ground under transparent pixels. @param {CanvasRenderingContext2D} context @param {number} x @param {number} y
 * @param {number} w @param {number} h */
function drawChequers(context, x, y, w, h) {
  const tile = new OffscreenCanvas(16, 16);
  const squares = context2d(tile);
  [["#fff", 0, 0, 16], ["#ccc", 0, 0, 8], ["#ccc", 8, 8, 8]].forEach(([colour, left, top, side]) => {
    squares.fillStyle = /** @type {string} */ (colour);
    squares.fillRect(Number(left), Number(top), Number(side), Number(side));
  });
  context.fillStyle = /** @type {CanvasPattern} */ (context.createPattern(tile, "repeat"));
  context.fillRect(x, y, w, h);
}
