// Puts the page together: choices, figures, table.

const X_AXES = {
  total_bits: { name: "total bits", label: "Total model bits", log: true },
  bits_per_param: { name: "bits per parameter", label: "Bits per parameter of the quantized weights", log: false },
  params: { name: "parameters", label: "Parameters", log: true },
};

class Tip {
  constructor(root) { this.root = root; }
  show(text, x, y) {
    this.root.textContent = text;
    this.root.hidden = false;
    const { width, height } = this.root.getBoundingClientRect();
    this.root.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 4))}px`;
    this.root.style.top = `${y + 16 + height > innerHeight ? Math.max(4, y - height - 14) : y + 16}px`;
  }
  hide() { this.root.hidden = true; }
}

class Page {
  constructor(study) {
    this.study = study;
    const tip = new Tip(document.getElementById("tip")), charts = document.getElementById("charts");
    this.x = "total_bits";
    this.colour = study.columns.bits.values.length > 2 ? "bits" : "dtype";
    this.other = study.metrics.find((m) => m.column === "zero_shot_mean") ?? study.metrics.find((m) => m.higher) ?? study.metrics[0];
    this.charts = ["scaling", "change", "agreement"].map((id) => new Chart(study, id, tip));
    this.charts[0].root.classList.add("wide");
    this.charts[0].root.insertAdjacentHTML("afterbegin", '<ul class="key" aria-label="Key"></ul>');
    charts.append(...this.charts.map((c) => c.root));
    this.table = new CellTable(study, document.getElementById("table"));
    this.controls(document.getElementById("controls"));
    new ResizeObserver(() => this.draw()).observe(charts);
    this.update();
  }

  controls(root) {
    const { study } = this, options = (entries, chosen) => entries.map(([value, name]) => `<option value="${escaped(value)}"${value === chosen ? " selected" : ""}>${escaped(name)}</option>`).join("");
    const metrics = study.metrics.map((m, i) => [String(i), m.name]);
    root.innerHTML = `
      <div class="choices">
        <label>Metric <select data-set="metric">${options(metrics, "0")}</select></label>
        <label>Against <select data-set="x">${options(Object.entries(X_AXES).map(([id, x]) => [id, x.name]), this.x)}</select></label>
        <label>Colour and shape <select data-set="colour">${options(Object.entries(FACETS).filter(([id]) => id !== "state"), this.colour)}</select></label>
        <label>Compared with <select data-set="other">${options(metrics, String(study.metrics.indexOf(this.other)))}</select></label>
        <label>Cut losses at perplexity <input type="number" data-set="cut" min="2" step="any" placeholder="none" value="${study.cut ? Math.round(Math.exp(study.cut)) : ""}"></label>
      </div>
      <details><summary>Filters: <span class="count"></span></summary><div class="facets"></div></details>`;
    root.querySelector("details").open = innerWidth > 800;
    root.querySelector(".facets").append(...Object.keys(FACETS).map((name) => this.facet(name)).filter(Boolean));
    root.addEventListener("change", (e) => this.set(e.target));
    root.addEventListener("click", (e) => this.setAll(e.target));
  }

  facet(name) {
    const { values } = this.study.columns[name], allowed = this.study.allowed[name];
    if (values.length < 2) return null;
    const root = document.createElement("fieldset");
    const ticks = values.map((value, i) => `<label><input type="checkbox" data-facet="${name}" value="${i + 1}"${allowed[i + 1] ? " checked" : ""}> ${escaped(value)}</label>`);
    root.innerHTML = `<legend>${FACETS[name]}</legend><button type="button" data-all="${name}">all</button><button type="button" data-none="${name}">none</button><div>${ticks.join("")}</div>`;
    return root;
  }

  set(input) {
    const { study } = this, { facet, set } = input.dataset;
    if (facet) study.allowed[facet][input.value] = input.checked ? 1 : 0;
    else if (set === "metric") study.metric = study.metrics[input.value];
    else if (set === "other") this.other = study.metrics[input.value];
    else if (set === "cut") study.cut = input.value ? Math.log(input.value) : null;
    else if (set) this[set] = input.value;
    this.update();
  }

  setAll(button) {
    const name = button.dataset.all ?? button.dataset.none;
    if (!name) return;
    const on = "all" in button.dataset;
    this.study.choose(name, () => on);
    for (const tick of document.querySelectorAll(`[data-facet="${name}"]`)) tick.checked = on;
    this.update();
  }

  update() {
    const begun = performance.now();
    this.study.filter();
    document.querySelector(".count").textContent = `${this.study.chosen.length.toLocaleString("en")} of ${this.study.rows.toLocaleString("en")} cells`;
    this.draw();
    this.table.fill();
    this.took = performance.now() - begun;
  }

  draw() {
    const { study } = this, metric = study.metric, label = (m) => (m.unit ? `${m.name} (${m.unit})` : m.name);
    const x = X_AXES[this.x], model = study.columns.family.codes, kind = study.columns.label.codes;
    const cutOf = (m) => (!m.loss || !study.cut ? undefined : m.exp ? Math.exp(study.cut) : study.cut);
    const worst = (m) => (m.higher ? "low" : "high"), half = (m) => (row) => 1.96 * study.stderr(m, row);
    const beyond = (row) => study.value(metric, row) > (cutOf(metric) ?? Infinity);
    this.charts[0].set({
      title: `${metric.name} against ${x.name}`, xLabel: x.label, yLabel: label(metric), log: x.log, colour: this.colour,
      x: (row) => study.number(this.x, row), y: (row) => study.value(metric, row), error: half(metric), cut: cutOf(metric), worst: worst(metric),
      curve: this.x === "bits_per_param" ? null : (row) => model[row] * 1e6 + kind[row], note: this.x === "bits_per_param" ? "" : "A curve joins one quantization over the models of a family.",
    });
    this.charts[1].set({
      title: `Change of ${lower(metric.name)} from 16-bit`, xLabel: X_AXES.bits_per_param.label, yLabel: `Change${metric.unit ? ` (${metric.unit})` : ""}`, colour: this.colour, zero: true,
      x: (row) => (study.baseline[row] === row ? NaN : study.number("bits_per_param", row)), y: (row) => (beyond(row) ? Infinity : study.change(metric, row)), cut: cutOf(metric) && 1e300, worst: worst(metric),
    });
    this.charts[2].set({
      title: `${this.other.name} against ${lower(metric.name)}`, xLabel: label(metric), yLabel: label(this.other), colour: this.colour,
      x: (row) => (beyond(row) ? NaN : study.value(metric, row)), y: (row) => study.value(this.other, row), cut: cutOf(this.other), worst: worst(this.other), note: correlation(study, metric, this.other, beyond),
    });
    this.key();
  }

  key() {
    const looks = looksOf(this.study, this.colour), column = this.study.columns[this.colour], present = new Set();
    for (const row of this.study.chosen) present.add(column.codes[row]);
    const items = column.values.map((value, i) => {
      if (!present.has(i + 1)) return null;
      const item = document.createElement("li"), { canvas } = sprite(looks[i], 5, false, 2);
      item.append(canvas, value);
      return item;
    });
    document.querySelector(".key").replaceChildren(...items.filter(Boolean).slice(0, 40));
  }
}

// Pearson's, over the chosen cells that have both (the paper's is -0.94).
function correlation(study, a, b, leftOut) {
  let n = 0, sa = 0, sb = 0, saa = 0, sbb = 0, sab = 0;
  for (const row of study.chosen) {
    const x = study.value(a, row), y = study.value(b, row);
    if (!Number.isFinite(x) || !Number.isFinite(y) || leftOut(row)) continue;
    n++; sa += x; sb += y; saa += x * x; sbb += y * y; sab += x * y;
  }
  const r = (sab - (sa * sb) / n) / Math.sqrt((saa - (sa * sa) / n) * (sbb - (sb * sb) / n));
  return Number.isFinite(r) && n > 2 && a !== b ? `Pearson correlation ${r.toFixed(2)} over ${n.toLocaleString("en")} cells.` : "";
}

const lower = (name) => name[0].toLowerCase() + name.slice(1);

async function begin() {
  const head = JSON.parse(document.getElementById("report-head").textContent);
  if (!head.count || !head.metrics.length) {
    for (const id of ["figures", "cells"]) document.getElementById(id).hidden = true;
    return;
  }
  const bytes = await unpack(document.getElementById("report-cells").textContent);
  window.page = new Page(new Study(head, bytes));
}

begin().catch((error) => {
  document.getElementById("charts").textContent = `The cells of this page can't be shown by this browser: ${error.message}`;
});
