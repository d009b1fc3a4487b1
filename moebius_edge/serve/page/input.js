/** Mouse, touch, pen and keyboard on the stage: what paints, what moves the view, what sets the size of the brush. */

/** @typedef {import("./mask.js").Point} Point */
/** @typedef {import("./stage.js").Stage} Stage */

const PEN_ERASER = 32; // in PointerEvent.buttons
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** Let the stage's uppermost canvas take part. @param {Stage} stage */
export function listen(stage) {
  const [pointers, keys] = [new Pointers(stage), new Keys(stage)];
  const { canvas } = stage;
  canvas.addEventListener("pointerdown", (event) => pointers.onDown(event, keys.space));
  canvas.addEventListener("pointermove", (event) => pointers.onMove(event));
  for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) {
    canvas.addEventListener(name, (event) => pointers.onUp(/** @type {PointerEvent} */ (event), keys.space));
  }
  canvas.addEventListener("pointerleave", () => pointers.setHover(null));
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("wheel", (event) => pointers.onWheel(event), { passive: false });
  canvas.addEventListener("keydown", (event) => keys.onDown(event));
  canvas.addEventListener("keyup", (event) => keys.onUp(event));
  canvas.addEventListener("focus", () => keys.onFocus());
  canvas.addEventListener("blur", () => keys.onBlur());
}

/** Mouse, pen and fingers. */
class Pointers {
  /** @type {Map<number, Point>} */
  #down = new Map(); // where they are on the stage
  #fingers = false; // those that are down are fingers
  #moving = false; // they move the view

  /** @param {Stage} stage */
  constructor(stage) {
    this.stage = stage;
  }

  /** @param {PointerEvent} event @param {boolean} space  Held, to move the view. */
  onDown(event, space) {
    const { stage } = this;
    if (!stage.mask) return;
    event.preventDefault(); // no text is selected, and the focus is set here
    stage.canvas.focus({ preventScroll: true });
    stage.cursor = null;
    if (event.pointerType === "touch" && this.#down.size && !this.#fingers) return; // a hand beside the pen
    stage.canvas.setPointerCapture(event.pointerId);
    this.#down.set(event.pointerId, this.#at(event));
    this.#fingers = event.pointerType === "touch";
    if (this.#down.size > 1) {
      stage.abandon();
      this.#moving = true;
    } else if (event.button === 1 || space || stage.tool === "hand") this.#moving = true;
    else {
      const erase = stage.tool === "eraser" || event.button === 2 || event.altKey || event.buttons & PEN_ERASER;
      stage.begin(stage.view.toPicture(this.#at(event)), erase ? 0 : 1);
    }
    if (this.#moving) stage.grip = "grabbing";
    this.setHover(this.#fingers ? null : this.#at(event));
  }

  /** @param {PointerEvent} event */
  onMove(event) {
    const at = this.#at(event);
    if (event.pointerType !== "touch") this.setHover(at);
    if (!this.#down.has(event.pointerId)) return;
    if (this.#moving) return this.#moveView(event.pointerId, at);
    this.#down.set(event.pointerId, at);
    const events = event.getCoalescedEvents?.() ?? [];
    for (const each of events.length ? events : [event]) this.stage.extend(this.stage.view.toPicture(this.#at(each)));
  }

  /** @param {PointerEvent} event @param {boolean} space */
  onUp(event, space) {
    if (!this.#down.delete(event.pointerId)) return;
    if (event.type === "pointercancel") this.stage.abandon();
    else if (!this.#moving) this.stage.finish();
    if (this.#down.size === 0) {
      this.#moving = false;
      this.stage.grip = space ? "grab" : "";
    }
    this.stage.draw("pointer");
  }

  /** @param {WheelEvent} event */
  onWheel(event) {
    event.preventDefault();
    if (!this.stage.mask) return;
    const distance = event.deltaY * (event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 30 : 1);
    const within = (/** @type {number} */ most) => Math.min(Math.max(distance, -most), most);
    // A touchpad's pinch comes with ctrlKey and small steps, a wheel with large ones.
    if (event.ctrlKey || event.metaKey) this.stage.zoom(Math.exp(-within(25) / 100), this.#at(event));
    else this.stage.setSize(this.stage.size * Math.exp(-within(100) / 700));
  }

  /** @param {Point | null} at  On the stage. */
  setHover(at) {
    this.stage.hover = at;
    if (at && !this.stage.gesture) this.stage.cursor = null;
    this.stage.draw("pointer");
  }

  /** Pan by one pointer; by two, zoom as their distance changes. @param {number} id @param {Point} at */
  #moveView(id, at) {
    const { view } = this.stage;
    const old = /** @type {Point} */ (this.#down.get(id));
    this.#down.set(id, at);
    const others = [...this.#down].filter(([other]) => other !== id).map(([, point]) => point);
    const share = 1 / (1 + others.length);
    view.pan((at.x - old.x) * share, (at.y - old.y) * share);
    if (others.length) {
      const distance = (/** @type {Point} */ from) => Math.hypot(from.x - others[0].x, from.y - others[0].y) || 1;
      view.zoom(distance(at) / distance(old), { x: (at.x + others[0].x) / 2, y: (at.y + others[0].y) / 2 });
    }
    this.stage.changed();
  }

  /** @param {MouseEvent} event @returns {Point} */
  #at(event) {
    const { left, top } = this.stage.canvas.getBoundingClientRect();
    return { x: event.clientX - left, y: event.clientY - top };
  }
}

/** Painting by keyboard: arrows move a cursor, the space bar paints where it is. With a mouse Space moves the view. */
class Keys {
  space = false; // held, to move the view with the mouse

  /** @param {Stage} stage */
  constructor(stage) {
    this.stage = stage;
  }

  /** @param {KeyboardEvent} event */
  onDown(event) {
    const { stage } = this;
    if (!stage.mask || event.ctrlKey || event.metaKey) return;
    if (event.key in ARROWS) this.#move(event);
    else if (event.key !== " ") return;
    else if (!stage.cursor) {
      this.space = true;
      stage.grip ||= "grab";
    } else if (!event.repeat && !stage.gesture) {
      stage.begin(stage.cursor, stage.tool === "eraser" || event.altKey ? 0 : 1);
    }
    event.preventDefault();
    stage.draw("pointer");
  }

  /** @param {KeyboardEvent} event */
  onUp(event) {
    if (event.key !== " ") return;
    this.space = false;
    if (this.stage.grip === "grab") this.stage.grip = "";
    if (this.stage.cursor) {
      this.stage.finish();
      this.#tell();
    }
    this.stage.draw("pointer");
  }

  onFocus() {
    const { mask, canvas, cursor, middle } = this.stage;
    if (mask && canvas.matches(":focus-visible")) this.#setCursor(cursor ?? middle);
  }

  onBlur() {
    this.space = false;
    if (this.stage.cursor) this.stage.finish();
    this.#setCursor(null);
  }

  /** @param {KeyboardEvent} event */
  #move(event) {
    const { stage } = this;
    if (stage.gesture && !stage.cursor) return; // a mouse is painting
    const [dx, dy] = ARROWS[/** @type {keyof typeof ARROWS} */ (event.key)];
    const step = event.altKey ? 1 : Math.max(1, stage.size / 4) * (event.shiftKey ? 4 : 1);
    const { x, y } = stage.cursor ?? stage.middle;
    this.#setCursor({ x: x + dx * step, y: y + dy * step });
    if (stage.cursor) stage.extend(stage.cursor);
  }

  /** @param {Point | null} at */
  #setCursor(at) {
    const { stage } = this;
    stage.cursor = null;
    if (at && stage.mask) {
      const inside = (/** @type {number} */ value, /** @type {number} */ size) =>
        Math.min(Math.max(value, 0), size - 0.5);
      stage.cursor = { x: inside(at.x, stage.mask.width), y: inside(at.y, stage.mask.height) };
      stage.hover = null;
      stage.view.show(stage.cursor);
      stage.changed();
      this.#tell();
    }
    stage.draw("pointer");
  }

  /** Say where the cursor is, for those who do not see it. */
  #tell() {
    const { cursor, mask, callbacks } = this.stage;
    if (!cursor || !mask) return;
    const [x, y] = [Math.floor(cursor.x), Math.floor(cursor.y)];
    const painted = mask.data[y * mask.width + x] ? "in the mask" : "not in the mask";
    callbacks.onCursor(`Column ${x + 1} of ${mask.width}, row ${y + 1} of ${mask.height}, ${painted}.`);
  }
}
