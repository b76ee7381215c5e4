// The completions of a run: columns of numbers, turned into tokens when a completion is looked at.

const COLUMNS = ["length", "n_trained", "token", "out_of_region", "mu", "pi", "ratio", "prob_diff", "weight", "advantage"];

/** Reads what `payload.column_bytes` wrote. */
async function readColumn(name) {
  const bytes = new Uint8Array(await payload(name));
  const values = new Uint32Array(bytes.length / 4);
  // The low bytes of all numbers stand first, then the next ones.
  for (let at = 0, n = values.length; at < bytes.length; at++) values[at % n] |= bytes[at] << (8 * Math.floor(at / n));
  return values;
}

/** A number of three digits as it is shown. */
function shown(value) {
  if (Number.isNaN(value)) return "\u2013";
  return value === 0 ? "0" : value.toPrecision(3).replace(/^-/, "\u2212");
}

class Rollouts {
  constructor(table, columns) {
    Object.assign(this, { table, columns });
    this.values = Object.fromEntries(Object.entries(table.values).map(([k, v]) => [k, Float64Array.from(v, (x) => x ?? NaN)]));
    this.n = columns.length.length;
    this.start = startsOf(columns.length);
    // Trained tokens have columns of their own, which leave the others out.
    this.trainedStart = startsOf(columns.n_trained);
    this.special = new Set(table.special);
    this.texts = new Array(this.n).fill(null);
    this.weights = Array.from({ length: this.n }, (_, i) => (this.isTrained(i) ? this.weightsOf(i) : null));
  }

  isTrained(i) {
    return this.table.state[i] === "trained";
  }

  /** A number of the t-th token of a column. */
  number(name, t) {
    return this.values[name][this.columns[name][t]];
  }

  /** What a token is called: its text, or its id where the tokenizer is not known. */
  piece(place) {
    return this.table.pieces ? this.table.pieces[place] : `[${this.table.ids[place]}]`;
  }

  text(i) {
    const talk = this.table.conversation[i];
    this.texts[i] ??= talk ? this.exchange(i, talk) : this.table.text[i] ?? this.joined(this.start[i], this.start[i + 1]);
    return this.texts[i];
  }

  /** The tokens of a span as text, without those that are marks for the model. */
  joined(first, behind) {
    const places = this.columns.token.subarray(first, behind);
    return Array.from(places, (p) => (this.special.has(p) ? "" : this.table.pieces[p])).join("");
  }

  /** What was said from the model's first turn on, a line for each message. */
  exchange(i, { messages, turns }) {
    const start = startsOf(turns);
    const said = ({ text, turn }) => text ?? this.joined(this.start[i] + start[turn], this.start[i] + start[turn + 1]);
    const first = messages.findIndex(({ turn }) => turn !== null);
    return first < 0 ? "" : messages.slice(first).map(said).join("\n");
  }

  question(i) {
    const [prompt, answer] = this.table.questions[this.table.question[i]];
    return { prompt, answer };
  }

  /** Least and greatest weight of a trained completion, how far the farthest is from 1, and its tokens out of the region. */
  weightsOf(i) {
    let [least, greatest, out_of_region] = [Infinity, -Infinity, 0];
    for (let t = this.trainedStart[i]; t < this.trainedStart[i + 1]; t++) {
      const w = this.number("weight", t);
      if (w < least) least = w;
      if (w > greatest) greatest = w;
      out_of_region += this.columns.out_of_region[t];
    }
    return { least, greatest, out_of_region, extreme: Math.max(1 - least, greatest - 1) };
  }

  /** The tokens of a completion; the numbers as they are shown, but for `w`, which is one to compare with. */
  tokens(i) {
    let t = this.trainedStart[i];
    const gaps = this.table.gaps[i] ?? [];
    return Array.from({ length: this.columns.length[i] }, (_, k) => {
      const at = this.start[i] + k;
      const place = this.columns.token[at];
      const drawn = { id: this.table.ids[place], text: this.piece(place), special: this.special.has(place), mu: shown(this.number("mu", at)) };
      if (!this.isTrained(i) || gaps.some(([first, behind]) => first <= k && k < behind)) return drawn;
      return { ...drawn, ...this.seen(t++) };
    });
  }

  /** What an update saw of a trained token. */
  seen(t) {
    const [pi, r, D, w] = ["pi", "ratio", "prob_diff", "weight"].map((name) => this.number(name, t));
    const seen = { pi: shown(pi), r: shown(r), D: shown(D), w, wShown: shown(w), out_of_region: this.columns.out_of_region[t] === 1 };
    return this.columns.advantage ? { ...seen, A: brief(this.number("advantage", t)) } : seen;
  }
}

function startsOf(lengths) {
  const starts = new Uint32Array(lengths.length + 1);
  lengths.forEach((length, i) => { starts[i + 1] = starts[i] + length; });
  return starts;
}
