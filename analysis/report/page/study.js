// What is known of the cells, and which of them the filters choose.

const FACETS = { family: "Family", model: "Model", bits: "Bits", dtype: "Data type", blocksize: "Block size", method: "Method", options: "Options", state: "State" };
const NONE = "—";

class Study {
  constructor(head, bytes) {
    this.rows = head.count;
    this.columns = readColumns(head.columns, bytes, head.count);
    this.metrics = head.metrics;
    this.styles = head.styles;
    this.metric = head.metrics[0];
    this.cut = head.cut;
    this.baseline = this.baselines();
    this.allowed = {};
    for (const name in FACETS) this.allowed[name] = new Uint8Array(this.columns[name].values.length + 1).fill(1);
    for (const [name, values] of Object.entries(head.shown)) this.choose(name, (value) => values.includes(value));
    this.filter();
  }

  text(name, row) { return this.columns[name].text(row); }
  number(name, row) { return this.columns[name].numbers[row]; }

  // A metric's value; perplexity is the exponential of a stored loss.
  value(metric, row) {
    const stored = this.columns[metric.exp ?? metric.column].numbers[row];
    return metric.exp ? Math.exp(stored) : stored;
  }
  stderr(metric, row) {
    const stored = this.columns[`${metric.exp ?? metric.column}_stderr`].numbers[row];
    return metric.exp ? Math.exp(this.columns[metric.exp].numbers[row]) * stored : stored;
  }
  change(metric, row) {
    const base = this.baseline[row];
    return base < 0 ? NaN : this.value(metric, row) - this.value(metric, base);
  }
  diverged(row) { return this.text("state", row) === "diverged"; }

  // The row of each cell's 16-bit model, -1 where there is none.
  baselines() {
    const { model, method, bits } = this.columns, found = new Int32Array(model.values.length + 1).fill(-1);
    for (let row = 0; row < this.rows; row++) {
      if (method.text(row) === "baseline" || bits.text(row) === "16") found[model.codes[row]] = row;
    }
    return Int32Array.from(model.codes, (code) => found[code]);
  }

  choose(name, test) {
    this.columns[name].values.forEach((value, i) => { this.allowed[name][i + 1] = test(value) ? 1 : 0; });
  }

  // The 16-bit models are what everything is compared with: only family, model and state leave them out.
  filter() {
    const names = Object.keys(FACETS), always = new Set(["family", "model", "state"]);
    const codes = names.map((n) => this.columns[n].codes), allowed = names.map((n) => this.allowed[n]);
    const ofBaseline = names.map((n) => always.has(n));
    const chosen = [];
    for (let row = 0; row < this.rows; row++) {
      const isBaseline = this.baseline[row] === row;
      let keep = 1;
      for (let f = 0; keep && f < names.length; f++) if (!isBaseline || ofBaseline[f]) keep = allowed[f][codes[f][row]];
      if (keep) chosen.push(row);
    }
    this.chosen = Int32Array.from(chosen);
  }

  describe(row, metric) {
    const value = this.value(metric, row), error = this.stderr(metric, row), said = [];
    said.push(`${this.text("model", row)}: ${this.text("label", row)}${this.diverged(row) ? " (diverged)" : ""}`);
    if (Number.isFinite(value)) {
      const within = Number.isFinite(error) ? `, 95 % interval ${show(value - 1.96 * error, metric)} to ${show(value + 1.96 * error, metric)}` : "";
      said.push(`${metric.name}: ${show(value, metric)}${within}`);
    } else said.push(`${metric.name}: no finite value`);
    const change = this.change(metric, row);
    if (Number.isFinite(change) && this.baseline[row] !== row) said.push(`Change from 16-bit: ${change > 0 ? "+" : ""}${show(change, metric)}`);
    said.push(`${this.number("bits_per_param", row).toFixed(3)} bits a parameter, ${amount(this.number("total_bits", row))}bit in all`);
    said.push(`cell=${this.text("key", row)}`);
    return said.join("\n");
  }
}

const show = (value, metric) => (Number.isFinite(value) ? (Math.abs(value) >= 1e5 ? value.toExponential(2) : value.toFixed(metric.decimals + (metric.loss ? 1 : 0))) : NONE);

function amount(value) {
  if (!Number.isFinite(value)) return NONE;
  for (const [size, prefix] of [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e3, " k"]]) {
    if (value >= size) return Number((value / size).toPrecision(3)) + prefix;
  }
  return Number(value.toPrecision(3)) + " ";
}
