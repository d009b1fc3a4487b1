/** Picture files: decoded for the screen, made small, and read as masks. The service gets the file itself. */

const PIXELS_A_STRIP = 4e6; // read back from a canvas at a time: browsers limit a canvas to as little as 16 megapixels

/** A file that cannot be used: what is wrong, and what mends it. */
export class PictureError extends Error {
  /** @param {string} problem @param {string} remedy */
  constructor(problem, remedy) {
    super(problem);
    this.remedy = remedy;
  }
}

/** The picture upright by its EXIF orientation, as the service reads it. @param {Blob} file
 * @returns {Promise<ImageBitmap>} */
export async function decode(file) {
  try {
    const bytes = new Uint8Array(await file.arrayBuffer());
    const exif = webpExif(bytes);
    const orientation = exif ? exifOrientation(bytes.subarray(exif.start, exif.end)) : 1;
    if (!exif || orientation === 1) return await createImageBitmap(file);
    // Chromium does not turn a WebP and other browsers do. Without its EXIF none does.
    bytes.set(new TextEncoder().encode("SKIP"), exif.start - 8);
    return turned(await createImageBitmap(new Blob([bytes], { type: "image/webp" })), orientation);
  } catch {
    const { name = "", type } = /** @type {File} */ (file);
    const kind = type === "image/tiff" || /\.tiff?$/i.test(name) ? "a TIFF" : "this file";
    throw new PictureError(
      `The browser cannot show ${kind}.`,
      "Save it as PNG, JPEG, WebP or AVIF; `moebius-edge run` reads TIFF and JPEG 2000 too.",
    );
  }
}

/** Where the EXIF block of a WebP file lies, null if it is none. @param {Uint8Array} bytes */
function webpExif(bytes) {
  const view = new DataView(bytes.buffer);
  const name = (/** @type {number} */ at) => String.fromCharCode(...bytes.subarray(at, at + 4));
  if (name(0) !== "RIFF" || name(8) !== "WEBP") return null;
  for (let at = 12; at + 8 <= bytes.length; ) {
    const size = view.getUint32(at + 4, true);
    if (name(at) === "EXIF") return { start: at + 8, end: Math.min(at + 8 + size, bytes.length) };
    at += 8 + size + (size & 1);
  }
  return null;
}

/** Tag 0x0112 of the first directory, 1 if there is none. @param {Uint8Array} block */
function exifOrientation(block) {
  const skip = String.fromCharCode(...block.subarray(0, 4)) === "Exif" ? 6 : 0;
  const view = new DataView(block.buffer, block.byteOffset + skip, block.length - skip);
  try {
    const little = view.getUint16(0) === 0x4949;
    const directory = view.getUint32(4, little);
    for (let entry = 0; entry < view.getUint16(directory, little); entry++) {
      const at = directory + 2 + 12 * entry;
      const value = view.getUint16(at + 8, little);
      if (view.getUint16(at, little) === 0x0112) return value >= 1 && value <= 8 ? value : 1;
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // the block ends too early: as if it said nothing
  }
  return 1;
}

/** @param {ImageBitmap} bitmap @param {number} orientation  An EXIF orientation, 2 to 8. */
function turned(bitmap, orientation) {
  const { width: w, height: h } = bitmap;
  const canvas = orientation > 4 ? new OffscreenCanvas(h, w) : new OffscreenCanvas(w, h);
  const context = context2d(canvas);
  const matrices = [[-1, 0, 0, 1, w, 0], [-1, 0, 0, -1, w, h], [1, 0, 0, -1, 0, h], [0, 1, 1, 0, 0, 0],
                    [0, 1, -1, 0, h, 0], [0, -1, -1, 0, h, w], [0, -1, 1, 0, 0, w]]; // of the orientations from 2 on
  const [a, b, c, d, e, f] = matrices[orientation - 2];
  context.setTransform(a, b, c, d, e, f);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return canvas.transferToImageBitmap();
}

/** A small copy. @param {ImageBitmap} bitmap @param {number} side  The longest it may have. */
export function thumbnail(bitmap, side) {
  const canvas = document.createElement("canvas");
  const scale = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = context2d(canvas);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas;
}

/**
 * The mask in a file: what is white, or what is painted on a transparent background.
 * @param {Blob} file @param {number} width @param {number} height  Of the picture.
 * @returns {Promise<Uint8Array>}  A 0 or 1 for each pixel.
 */
export async function readMask(file, width, height) {
  const bitmap = await decode(file);
  if (bitmap.width !== width || bitmap.height !== height) {
    const [own, size] = [`${bitmap.width}×${bitmap.height}`, `${width}×${height}`];
    throw new PictureError(`The mask is ${own} and the picture is ${size}.`, `Resize the mask to ${size}.`);
  }
  const [white, painted] = [new Uint8Array(width * height), new Uint8Array(width * height)];
  const has = { clear: false, black: false, white: false };
  const rows = Math.max(1, Math.floor(PIXELS_A_STRIP / width));
  for (let top = 0; top < height; top += rows) {
    const context = context2d(new OffscreenCanvas(width, Math.min(rows, height - top)));
    context.drawImage(bitmap, 0, -top);
    const { data } = context.getImageData(0, 0, width, Math.min(rows, height - top));
    for (let at = 0, pixel = top * width; at < data.length; at += 4, pixel++) {
      const luma = 0.299 * data[at] + 0.587 * data[at + 1] + 0.114 * data[at + 2];
      const shown = data[at + 3] > 127;
      painted[pixel] = shown ? 1 : 0;
      white[pixel] = shown && luma > 127 ? 1 : 0;
      if (!shown) has.clear = true;
      else if (luma < 64) has.black = true;
      else if (luma > 191) has.white = true;
    }
  }
  bitmap.close();
  return has.clear && !(has.black && has.white) ? painted : white;
}

/** @param {HTMLCanvasElement | OffscreenCanvas} canvas */
export function context2d(canvas) {
  const context = /** @type {CanvasRenderingContext2D | null} */ (canvas.getContext("2d"));
  if (context) return context;
  throw new PictureError("The browser has no memory for the picture.", "Close other tabs, or scale it down.");
}
