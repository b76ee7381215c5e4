// The frame of every page: data out of the file, and elements into the document. Text reaches the document as text
// nodes alone, never as HTML.

async function payload(name) {
  const binary = atob(document.getElementById(`payload-${name}`).textContent);
  const packed = new Uint8Array(binary.length);
  for (let i = 0; i < packed.length; i++) packed[i] = binary.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

async function payloadText(name) {
  return new TextDecoder().decode(await payload(name));
}

async function payloadJSON(name) {
  return JSON.parse(await payloadText(name));
}

const COLUMN_TYPES = { uint8: Uint8Array, int16: Int16Array, uint32: Uint32Array };

/** Reads what `payload.columns_bytes` packed: name -> typed array. */
async function payloadColumns(name) {
  const block = new Uint8Array(await payload(name));
  let start = 4 + new DataView(block.buffer).getUint32(0, true);
  const contents = JSON.parse(new TextDecoder().decode(block.subarray(4, start)));
  const columns = {};
  for (const [column, kind, length] of contents) {
    const values = new COLUMN_TYPES[kind](length);
    const size = values.BYTES_PER_ELEMENT;
    columns[column] = joinPlanes(block.subarray(start, start + length * size), values);
    start += length * size;
  }
  return columns;
}

/** The low bytes of all numbers stand first, then the next ones; a typed array's store cuts off what does not fit. */
function joinPlanes(planes, values) {
  const n = values.length;
  for (let byte = 0; byte < values.BYTES_PER_ELEMENT; byte++) {
    const plane = planes.subarray(byte * n, (byte + 1) * n);
    for (let i = 0; i < n; i++) values[i] |= plane[i] << (8 * byte);
  }
  return values;
}

/** Makes an element: attributes by name, those that are null or false left out, then text and elements. */
function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null));
  return element;
}

function byId(id) {
  return document.getElementById(id);
}

/** Shows a message in place of what could not be shown. */
function note(text) {
  return el("p", { class: "note" }, text);
}

/** What is to be minded, in the masthead; nothing where there is none. */
function showCaution(text) {
  byId("caution").textContent = text;
  byId("caution").hidden = !text;
}

function showFacts(facts) {
  byId("facts").append(...facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}

function percent(share, digits = 1) {
  return `${(100 * share).toFixed(digits)} %`;
}

/** Three significant digits, without the zeros behind them; a dash for what there is not. */
function brief(value) {
  return value === null ? "\u2013" : String(Number(value.toPrecision(3))).replace(/^-/, "\u2212");
}

function count(n) {
  return n.toLocaleString("en-US");
}

/** When what there is so far is on the screen: plotly takes long to unpack, and the rest need not wait for it. */
function painted() {
  return new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
}
