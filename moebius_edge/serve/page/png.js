/**
 * A mask as a PNG of one bit a pixel: W3C, "Portable Network Graphics (PNG) Specification", third edition.
 *
 * A canvas would write one too, but has a limit to its size, a soft edge, and four bytes for each pixel.
 */

/** @typedef {import("./mask.js").Mask} Mask */

const SIGNATURE = Uint8Array.of(0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a);

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

/** White where the mask is to be filled, black elsewhere. @param {Mask} mask @returns {Promise<Blob>} */
export async function encodeMask(mask) {
  const { width, height, data } = mask;
  const stride = Math.ceil(width / 8) + 1; // a row begins with the number of its filter, 0 for none
  const rows = new Uint8Array(stride * height);
  for (let y = 0; y < height; y++) {
    for (let x = 0, at = y * width; x < width; x++, at++) {
      if (data[at]) rows[y * stride + 1 + (x >> 3)] |= 0x80 >> (x & 7);
    }
  }
  const header = new DataView(new ArrayBuffer(13));
  header.setUint32(0, width);
  header.setUint32(4, height);
  header.setUint8(8, 1); // bits; what follows is 0: grey, deflate, the one set of filters, not interlaced
  const zlib = new Blob([rows]).stream().pipeThrough(new CompressionStream("deflate"));
  const packed = new Uint8Array(await new Response(zlib).arrayBuffer());
  const chunks = [chunk("IHDR", new Uint8Array(header.buffer)), chunk("IDAT", packed), chunk("IEND", new Uint8Array())];
  return new Blob([SIGNATURE, ...chunks], { type: "image/png" });
}

/** Length, type, contents and checksum. @param {string} type @param {Uint8Array} contents */
function chunk(type, contents) {
  const bytes = new Uint8Array(12 + contents.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, contents.length);
  bytes.set(new TextEncoder().encode(type), 4);
  bytes.set(contents, 8);
  let crc = 0xffffffff;
  for (const byte of bytes.subarray(4, -4)) crc = CRC[(crc ^ byte) & 255] ^ (crc >>> 8);
  view.setUint32(8 + contents.length, ~crc >>> 0);
  return bytes;
}
