// The completions of a run: columns of numbers, turned into tokens when a completion is looked at.
//
// A number is a code, as `decimals.py` makes them: sign * (2 + 900 (exponent + 20) + three digits - 100).

const MISSING = -32768;
const PER_DECADE = 900;
const SMALLEST = -20;
const TOO_LARGE = 2 + 36 * PER_DECADE;

/** The decimal that a code stands for, as it is shown. */
function shown(code) {
  if (code === MISSING) return "\u2013";
  if (code === 0) return "0";
  const size = Math.abs(code);
  const sign = code < 0 ? "\u2212" : "";
  if (size === 1) return `${sign}<1e-20`;
  if (size >= TOO_LARGE) return `${sign}\u22651e+16`;
  return sign + magnitude(size).toPrecision(3);
}

/** From 2 on; the double nearest to the decimal. */
function magnitude(size) {
  const digits = 100 + ((size - 2) % PER_DECADE);
  const exponent = Math.floor((size - 2) / PER_DECADE) + SMALLEST;
  return Number(`${digits}e${exponent - 2}`);
}

/** Every code's number, so that many can be read fast: `values[code + 32768]`. */
const CODE_VALUES = (() => {
  const values = new Float64Array(65536);
  for (let size = 2; size <= TOO_LARGE; size++) {
    values[32768 + size] = magnitude(size);
    values[32768 - size] = -values[32768 + size];
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
    this.lowered = new Array(this.n).fill(null);
    this.weights = this.weightRanges();
  }

  isTrained(i) {
    return this.table.state[i] === "trained";
  }

  length(i) {
    return this.columns.length[i];
  }

  /** What a token is called: its text, or its id where the tokenizer is not known. */
  piece(place) {
    return this.table.pieces ? this.table.pieces[place] : `[${this.table.ids[place]}]`;
  }

  text(i) {
    this.texts[i] ??= this.table.text[i] ?? this.joined(i);
    return this.texts[i];
  }

  joined(i) {
    let text = "";
    for (let at = this.start[i]; at < this.start[i + 1]; at++) {
      const place = this.columns.token[at];
      if (!this.special.has(place)) text += this.table.pieces[place];
    }
    return text;
  }

  question(i) {
    const [prompt, answer] = this.table.questions[this.table.question[i]];
    return { prompt, answer };
  }

  /** What a search looks through: prompt and completion, in lower case. */
  searched(i) {
    this.lowered[i] ??= `${this.question(i).prompt}\n${this.text(i)}`.toLowerCase();
    return this.lowered[i];
  }

  /** Least and greatest weight of each trained completion, how far the farthest is from 1, and tokens outside. */
  weightRanges() {
    const numbers = () => new Float64Array(this.n).fill(NaN);
    const ranges = { least: numbers(), greatest: numbers(), extreme: numbers(), outside: new Uint32Array(this.n) };
    for (let i = 0; i < this.n; i++) {
      if (!this.isTrained(i)) continue;
      let [least, greatest] = [Infinity, -Infinity];
      for (let at = this.trainedStart[i]; at < this.trainedStart[i + 1]; at++) {
        const w = valueOf(this.columns.weight[at]);
        if (w < least) least = w;
        if (w > greatest) greatest = w;
        ranges.outside[i] += this.columns.outside[at];
      }
      ranges.least[i] = least;
      ranges.greatest[i] = greatest;
      ranges.extreme[i] = Math.max(1 - least, greatest - 1);
    }
    return ranges;
  }

  /** The tokens of a completion; the numbers as they are shown, but for `w`, which is one to compare with. */
  tokens(i) {
    const { token, mu, pi_above_mu, ratio, shift, weight, outside } = this.columns;
    return Array.from({ length: this.length(i) }, (_, k) => {
      const [at, t] = [this.start[i] + k, this.trainedStart[i] + k];
      const place = token[at];
      const drawn = { id: this.table.ids[place], text: this.piece(place), special: this.special.has(place), mu: shown(mu[at]) };
      if (!this.isTrained(i)) return drawn;
      const moved = { pi: shown(mu[at] + pi_above_mu[t]), r: shown(ratio[t]), D: shown(shift[t]) };
      return { ...drawn, ...moved, w: valueOf(weight[t]), wShown: shown(weight[t]), outside: outside[t] === 1 };
    });
  }
}

function startsOf(lengths) {
  const starts = new Uint32Array(lengths.length + 1);
  lengths.forEach((length, i) => { starts[i + 1] = starts[i] + length; });
  return starts;
}
