// One completion: its question, and each token shaded by its gradient weight, with its numbers beside it on demand.

/** The shades, from the most damped to the most amplified; each holds weights below `below`. */
const SHADES = [
  { style: "masked", below: 0, label: "w \u2264 0" },
  { style: "down-3", below: 0.5, label: "to 0.5" },
  { style: "down-2", below: 0.8, label: "to 0.8" },
  { style: "down-1", below: 0.95, label: "to 0.95" },
  { style: "even", below: 1.05, label: "about 1" },
  { style: "up-1", below: 1.2, label: "to 1.2" },
  { style: "up-2", below: 1.5, label: "to 1.5" },
  { style: "up-3", below: 2, label: "to 2" },
  { style: "up-4", below: Infinity, label: "above 2" },
];

const STATES = {
  skipped: "Not trained on: its advantage is 0, and so is every token's gradient. It did not go through the model: there is no \u03c0.",
  unknown: "The dump does not have the policy's probabilities: there is no \u03c0.",
  unscored: "Not trained on: it has no reward, so it took no part in the update.",
};

const TOKENS_ROLE = { class: "tokens", role: "group", "aria-label": "Tokens; left and right arrows move from one to the next" };

/** How the messages of a conversation are set; any other role is set as "other". */
const ROLES = ["system", "user", "assistant", "tool"];
const BRANCH = "Branch: the history was rendered anew here, and a further sequence of tokens begins.";

function shadeOf(w) {
  if (w <= 0) return SHADES[0];
  return SHADES.find(({ below }, i) => i > 0 && w < below) ?? SHADES.at(-1);
}

/** A text with what cannot be seen made visible; line breaks stay. */
function visible(text) {
  const picture = (control) => String.fromCharCode(0x2400 + control.charCodeAt(0));
  return text.replace(/[\u0000-\u0009\u000b-\u001f]/g, picture).replace(/\u007f/g, "\u2421");
}

function showLegend(rollouts) {
  const { weight, out_of_region } = rollouts.columns;
  const counts = new Map(SHADES.map((shade) => [shade, 0]));
  for (const code of weight) {
    const shade = shadeOf(rollouts.values.weight[code]);
    counts.set(shade, counts.get(shade) + 1);
  }
  const share = (n) => el("span", { class: "share" }, `${((100 * n) / weight.length).toFixed(2)} %`);
  const item = (style, label, ...rest) => el("li", {}, el("span", { class: `swatch ${style}` }, label), ...rest);
  const items = SHADES.map((shade) => item(shade.style, shade.label, share(counts.get(shade))));
  const left = out_of_region.reduce((a, b) => a + b, 0);
  items.push(item("out-of-region", "outline", " left the region", share(left)), item("", "plain", " no gradient"));
  const shadesOf = `Shade: gradient weight w, and the share of the run's ${count(weight.length)} trained tokens`;
  byId("legend").replaceChildren(el("strong", {}, shadesOf), el("ul", {}, items));
}

class RolloutView {
  constructor(rollouts) {
    Object.assign(this, { rollouts, i: null, tokens: [], explained: null });
    this.host = byId("view");
    this.tooltip = byId("tooltip");
    this.host.addEventListener("mouseover", (event) => this.explain(event.target.closest(".token")));
    this.host.addEventListener("mouseleave", () => this.explain(null));
    this.host.addEventListener("focusin", (event) => this.explain(event.target.closest(".token")));
    this.host.addEventListener("focusout", () => this.explain(null));
    this.host.addEventListener("scroll", () => this.follow());
  }

  show(i) {
    this.i = i;
    this.explain(null);
    this.tokens = i === null ? [] : this.rollouts.tokens(i);
    this.host.replaceChildren(...(i === null ? [el("p", { class: "empty" }, "Nothing to show.")] : this.parts(i)));
    this.host.scrollTop = 0;
  }

  parts(i) {
    const { prompt, answer } = this.rollouts.question(i);
    const { state, failure, conversation } = this.rollouts.table;
    const talk = conversation[i];
    const note = STATES[state[i]] ? [el("p", { class: "state" }, STATES[state[i]])] : [];
    return [
      el("ul", { class: "chips" }, this.chips(i).map(([text, mark]) => el("li", mark ? { class: mark } : {}, text))),
      ...(talk ? [] : quoted("Prompt", prompt)),
      ...quoted("Reference answer", answer),
      ...quoted(talk?.failed ? "The environment failed" : "The reward failed", failure[i] ?? ""),
      ...(talk ? this.conversation(talk, note) : [el("h3", {}, "Completion"), ...note, this.spans(0, this.tokens.length)]),
      ...(talk ? [el("details", {}, el("summary", {}, "The first prompt as the model read it"), el("div", { class: "quoted" }, visible(prompt)))] : []),
    ];
  }

  /** Pairs of a text and how it is marked, if at all. */
  chips(i) {
    const t = this.rollouts.table;
    const chips = [[`step ${t.step[i]}`], [`problem ${t.problem[i]}, sample ${t.sample[i]}`]];
    if (t.update[i] !== null) chips.push([`update ${t.update[i] + 1}`]);
    chips.push([rewardText(t.reward[i])]);
    if (t.advantage[i] !== null) chips.push([`A = ${brief(t.advantage[i])}`]);
    chips.push([`${this.rollouts.columns.length[i]} tokens`]);
    if (t.conversation[i]) chips.push(...t.conversation[i].remarks.map(([text, warns]) => [text, warns ? "warn" : ""]));
    else chips.push([t.finish_reason[i] === "length" ? "cut at the limit" : "ended by itself"]);
    const age = t.version[i] === null ? 0 : t.step[i] - 1 - t.version[i];
    if (age > 0) chips.push([`weights ${counted(age, "step")} old`]);
    return chips;
  }

  /** The messages of an episode, those that the model sampled token by token. */
  conversation({ messages, turns }, note) {
    const start = startsOf(turns);
    const body = ({ text, turn }) => (turn === null ? el("div", { class: "quoted" }, visible(text)) : this.spans(start[turn], start[turn + 1]));
    return [
      el("h3", {}, "Conversation"),
      ...note,
      el("ol", { class: "conversation" }, messages.flatMap((m) => [
        ...(m.branch ? [el("li", { class: "branch" }, BRANCH)] : []),
        el("li", { class: `bubble ${bubbleStyle(m)}` }, this.heading(m, turns), body(m), m.calls.map((call) => el("div", { class: "call" }, "calls ", el("code", {}, visible(call))))),
      ])),
    ];
  }

  heading({ role, name, turn, reward, failed }, turns) {
    const about = [];
    if (role === "tool") about.push(`result${name === "" ? "" : ` of ${name}`}`);
    if (turn !== null) about.push(`turn ${turn + 1}`, counted(turns[turn], "token"));
    if (turn === null && role === "assistant") about.push("in the prompt");
    if (reward !== null) about.push(`reward ${brief(reward)}`);
    const marks = failed ? [el("span", { class: "warn" }, "failed call")] : [];
    return el("div", { class: "who" }, el("strong", {}, visible(role)), about.map((text) => el("span", {}, visible(text))), marks);
  }

  /** The tokens from one to before another. */
  spans(first, behind) {
    return el("div", TOKENS_ROLE, this.tokens.slice(first, behind).map((token, k) => this.span(token, first + k)));
  }

  /** Only one token is a stop of the Tab key; the arrows lead on from there. */
  span(token, k) {
    const shade = token.w === undefined ? "" : shadeOf(token.w).style;
    const styles = ["token", shade, token.out_of_region ? "out-of-region" : "", token.special ? "special" : ""];
    const focus = { tabindex: k === 0 ? 0 : -1, "aria-describedby": "tooltip" };
    return el("span", { class: styles.filter(Boolean).join(" "), "data-k": k, ...focus }, withMarks(token.text));
  }

  moveToken(by) {
    const spans = [...this.host.querySelectorAll(".token")];
    const now = spans.indexOf(document.activeElement);
    const next = spans[now < 0 ? 0 : Math.min(spans.length - 1, Math.max(0, now + by))];
    if (!next) return;
    spans.forEach((span) => span.setAttribute("tabindex", span === next ? 0 : -1));
    next.focus();
  }

  explain(span) {
    this.explained = span;
    this.tooltip.hidden = span === null;
    if (span === null) return;
    this.tooltip.replaceChildren(...this.numbers(this.tokens[span.dataset.k]));
    this.place(span.getClientRects()[0] ?? span.getBoundingClientRect());
  }

  /** Keeps the numbers beside their token while the view is scrolled, also by the arrow keys; away where it has gone. */
  follow() {
    if (this.explained === null) return;
    const [token, frame] = [this.explained, this.host].map((element) => element.getBoundingClientRect());
    if (token.bottom < frame.top || token.top > frame.bottom) this.explain(null);
    else this.place(token);
  }

  numbers(token) {
    const advantage = this.rollouts.table.advantage[this.i];
    const rows = [
      ["\u03bc", token.mu], ["\u03c0", token.pi], ["r = \u03c0/\u03bc", token.r], ["D = \u03c0\u2212\u03bc", token.D],
      ["A", token.A ?? (advantage === null ? undefined : brief(advantage))], ["w", token.wShown],
    ].filter(([, value]) => value !== undefined);
    const row = ([name, value]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, value));
    return [
      el("div", { class: "name" }, `${JSON.stringify(token.text)} \u00b7 id ${token.id}`),
      el("table", {}, el("tbody", {}, rows.map(row))),
      el("div", { class: "verdict" }, verdictOn(token)),
    ];
  }

  /** Below the token, or above it where there is no room. */
  place({ left, top, bottom }) {
    const { offsetWidth, offsetHeight } = this.tooltip;
    const x = Math.min(left, innerWidth - offsetWidth - 10);
    const y = bottom + 8 + offsetHeight > innerHeight ? top - offsetHeight - 8 : bottom + 8;
    Object.assign(this.tooltip.style, { left: `${Math.max(8, x)}px`, top: `${y}px` });
  }
}

function bubbleStyle({ role, turn }) {
  return `${ROLES.includes(role) ? role : "other"}${turn === null ? "" : " sampled"}`;
}

function quoted(title, text) {
  return text === "" ? [] : [el("h3", {}, title), el("div", { class: "quoted" }, visible(text))];
}

/** What happens to a token, in words; nothing where it is pushed as usual. */
function verdictOn({ w, out_of_region }) {
  if (w === undefined) return "no gradient";
  const masked = w < 0 ? ["pulled back"] : w === 0 ? ["masked"] : [];
  return [...masked, ...(out_of_region ? ["out of the region"] : [])].join(", ");
}

/** A token's text, with a mark where a line ends. */
function withMarks(text) {
  const [first, ...others] = visible(text).split("\n");
  const mark = () => el("span", { class: "mark", "aria-hidden": "true" }, "\u21b5");
  return [first, ...others.flatMap((line) => [mark(), "\n", line])].filter((part) => part !== "");
}
