// The completions of a run: columns of numbers, turned into tokens when a completion is looked at.
//
// A number is a code, as `decimals.py` makes them: sign * (2 + 900 (exponent + 20) + three digits - 100).

const MISSING = -32768;
const PER_DECADE = 900;
const SMALLEST = -20;
const TOO_LARGE = 2 + 36 * PER_DECADE;
const COLUMN_TYPES = { uint8: Uint8Array, int16: Int16Array, uint32: Uint32Array };

/** Reads what `payload.columns_bytes` packed: name -> typed array. */
function readColumns(block) {
  let start = 4 + new DataView(block.buffer).getUint32(0, true);
  const columns = {};
  for (const [name, kind, length] of JSON.parse(new TextDecoder().decode(block.subarray(4, start)))) {
    const values = new COLUMN_TYPES[kind](length);
    // The low bytes of all numbers stand first, then the next ones; a typed array's store cuts off what does not fit.
    for (let byte = 0; byte < values.BYTES_PER_ELEMENT; byte++, start += length) {
      for (let i = 0; i < length; i++) values[i] |= block[start + i] << (8 * byte);
    }
    columns[name] = values;
  }
  return columns;
}

/** The decimal that a code stands for, as it is shown. */
function shown(code) {
  if (code === MISSING) return "\u2013";
  if (code === 0) return "0";
  const size = Math.abs(code);
  const sign = code < 0 ? "\u2212" : "";
  if (size === 1) return `${sign}<1e-20`;
  if (size >= TOO_LARGE) return `${sign}\u22651e+16`;
  return sign + Math.abs(valueOf(code)).toPrecision(3);
}

/** Every code's number, the double nearest to the decimal, so that many can be read fast. */
const CODE_VALUES = (() => {
  const values = new Float64Array(65536);
  for (let size = 2; size <= TOO_LARGE; size++) {
    const digits = 100 + ((size - 2) % PER_DECADE);
    const value = Number(`${digits}e${Math.floor((size - 2) / PER_DECADE) + SMALLEST - 2}`);
    [values[32768 + size], values[32768 - size]] = [value, -value];
  }
  values[0] = NaN;
  return values;
})();

function valueOf(code) {
  return CODE_VALUES[code + 32768];
}

class Rollouts {
  constructor(table, columns) {
    Object.assign(this, { table, columns });
    this.n = columns.length.length;
    this.start = startsOf(columns.length);
    // Trained tokens have columns of their own, which leave the others out.
    this.trainedStart = startsOf(columns.length.map((length, i) => (this.isTrained(i) ? length : 0)));
    this.special = new Set(table.special);
    this.texts = new Array(this.n).fill(null);
    this.weights = Array.from({ length: this.n }, (_, i) => (this.isTrained(i) ? this.weightsOf(i) : null));
  }

  isTrained(i) {
    return this.table.state[i] === "trained";
  }

  /** What a token is called: its text, or its id where the tokenizer is not known. */
  piece(place) {
    return this.table.pieces ? this.table.pieces[place] : `[${this.table.ids[place]}]`;
  }

  text(i) {
    const places = () => this.columns.token.subarray(this.start[i], this.start[i + 1]);
    const joined = () => Array.from(places(), (p) => (this.special.has(p) ? "" : this.table.pieces[p])).join("");
    this.texts[i] ??= this.table.text[i] ?? joined();
    return this.texts[i];
  }

  question(i) {
    const [prompt, answer] = this.table.questions[this.table.question[i]];
    return { prompt, answer };
  }

  /** Least and greatest weight of a trained completion, how far the farthest is from 1, and its tokens out of the region. */
  weightsOf(i) {
    let [least, greatest, out_of_region] = [Infinity, -Infinity, 0];
    for (let t = this.trainedStart[i]; t < this.trainedStart[i + 1]; t++) {
      const w = valueOf(this.columns.weight[t]);
      if (w < least) least = w;
      if (w > greatest) greatest = w;
      out_of_region += this.columns.out_of_region[t];
    }
    return { least, greatest, out_of_region, extreme: Math.max(1 - least, greatest - 1) };
  }

  /** The tokens of a completion; the numbers as they are shown, but for `w`, which is one to compare with. */
  tokens(i) {
    const { token, mu, pi_above_mu, ratio, prob_diff, weight, out_of_region } = this.columns;
    return Array.from({ length: this.columns.length[i] }, (_, k) => {
      const [at, t] = [this.start[i] + k, this.trainedStart[i] + k];
      const place = token[at];
      const drawn = { id: this.table.ids[place], text: this.piece(place), special: this.special.has(place), mu: shown(mu[at]) };
      if (!this.isTrained(i)) return drawn;
      const moved = { pi: shown(mu[at] + pi_above_mu[t]), r: shown(ratio[t]), D: shown(prob_diff[t]) };
      return { ...drawn, ...moved, w: valueOf(weight[t]), wShown: shown(weight[t]), out_of_region: out_of_region[t] === 1 };
    });
  }
}

function startsOf(lengths) {
  const starts = new Uint32Array(lengths.length + 1);
  lengths.forEach((length, i) => { starts[i + 1] = starts[i] + length; });
  return starts;
}
