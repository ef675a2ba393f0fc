// The chosen cells as a table: sorted by any column, searched, a page at a time, copied or saved as a whole.

const PAGE = 50;

class CellTable {
  constructor(study, root) {
    this.study = study;
    this.page = 0;
    this.sort = { column: "model", down: false };
    this.words = "";
    this.every = false;
    root.innerHTML = `
      <div class="choices">
        <label>Search <input type="search" placeholder="opt-xs float4" aria-label="Search cells by words of model, label or key"></label>
        <label class="tick"><input type="checkbox"> all metrics</label>
        <button type="button" data-do="copy">Copy all rows</button>
        <button type="button" data-do="save">Save as TSV</button>
        <button type="button" data-do="back" aria-label="Previous page">‹</button><span class="where"></span><button type="button" data-do="on" aria-label="Next page">›</button>
        <span class="done" role="status"></span>
      </div>
      <div class="scroll" tabindex="0" role="region" aria-label="Cells"><table><thead></thead><tbody></tbody></table></div>`;
    this.root = root;
    this.part = (selector) => root.querySelector(selector);
    this.part("input[type=search]").addEventListener("input", (e) => { this.words = e.target.value; this.page = 0; this.fill(); });
    this.part("input[type=checkbox]").addEventListener("change", (e) => { this.every = e.target.checked; this.fill(); });
    root.addEventListener("click", (e) => this.click(e.target.closest("button")));
  }

  click(button) {
    if (!button) return;
    const { column } = button.dataset, act = button.dataset.do;
    if (column) {
      this.sort = { column, down: this.sort.column === column && !this.sort.down };
      this.page = 0;
      this.fill();
      this.part(`button[data-column="${CSS.escape(column)}"]`).focus();
    } else if (act === "copy") this.copy();
    else if (act === "save") this.save();
    else { this.page += act === "on" ? 1 : -1; this.fill(); }
  }

  // Columns shown: name for people, text of a row, and a number to sort by where it has one.
  columns() {
    const { study } = this, names = ["model", "label", "method", "bits", "dtype", "blocksize", "options", "state"];
    const told = names.map((name) => ({ id: name, name: FACETS[name] ?? "Quantization", text: (row) => study.text(name, row), codes: study.columns[name].codes }));
    for (const code of told) if (code.id === "bits" || code.id === "blocksize") code.key = (row) => code.codes[row];
    const number = (id, name, text, key) => ({ id, name, text, key, isNumber: true });
    const metrics = this.every ? study.metrics : [study.metric];
    return [
      ...told,
      number("bits_per_param", "Bits/param", (row) => study.number("bits_per_param", row).toFixed(3), (row) => study.number("bits_per_param", row)),
      number("total_bits", "Total bits", (row) => amount(study.number("total_bits", row)), (row) => study.number("total_bits", row)),
      ...metrics.flatMap((m) => [
        number(m.column, m.unit ? `${m.name} (${m.unit})` : m.name, (row) => show(study.value(m, row), m), (row) => study.value(m, row)),
        number(`${m.column}±`, "± s.e.", (row) => show(study.stderr(m, row), m), (row) => study.stderr(m, row)),
      ]),
      number("change", `Change from 16-bit, ${study.metric.name}`, (row) => show(study.change(study.metric, row), study.metric), (row) => study.change(study.metric, row)),
      { id: "key", name: "cell=", text: (row) => study.text("key", row) },
    ];
  }

  ordered(columns) {
    const by = columns.find((c) => c.id === this.sort.column) ?? columns[0], sign = this.sort.down ? -1 : 1;
    const words = this.words.toLowerCase().split(/\s+/).filter(Boolean), { study } = this;
    const has = (row) => {
      const said = `${study.text("model", row)} ${study.text("label", row)} ${study.text("options", row)} ${study.text("key", row)}`.toLowerCase();
      return words.every((word) => said.includes(word));
    };
    const rows = words.length ? Array.from(study.chosen).filter(has) : Array.from(study.chosen);
    if (!by.key) {
      const texts = by.codes ? null : new Map(rows.map((row) => [row, by.text(row)]));
      if (texts) return rows.sort((a, b) => sign * (texts.get(a) < texts.get(b) ? -1 : 1));
      const values = study.columns[by.id].values, place = new Int32Array(values.length + 1);
      [...values.keys()].sort((a, b) => (values[a] < values[b] ? -1 : 1)).forEach((code, i) => { place[code + 1] = i; });
      return rows.sort((a, b) => sign * (place[by.codes[a]] - place[by.codes[b]]) || a - b);
    }
    const keys = new Float64Array(study.rows);
    for (const row of rows) keys[row] = by.key(row);
    // What is missing comes last, whichever way.
    return rows.sort((a, b) => Number.isNaN(keys[a]) - Number.isNaN(keys[b]) || sign * (keys[a] - keys[b]) || a - b);
  }

  fill() {
    const columns = this.columns();
    this.rows = this.ordered(columns);
    const pages = Math.max(1, Math.ceil(this.rows.length / PAGE));
    this.page = Math.max(0, Math.min(pages - 1, this.page));
    const arrow = (c) => (c.id === this.sort.column ? (this.sort.down ? " ▼" : " ▲") : "");
    const state = (c) => (c.id === this.sort.column ? (this.sort.down ? "descending" : "ascending") : "none");
    const head = columns.map((c) => `<th scope="col" aria-sort="${state(c)}"${c.isNumber ? ' class="number"' : ""}><button type="button" data-column="${escaped(c.id)}">${escaped(c.name).replace(/[_/]/g, "$&<wbr>")}${arrow(c)}</button></th>`);
    const shown = this.rows.slice(this.page * PAGE, (this.page + 1) * PAGE);
    const body = shown.map((row) => `<tr>${columns.map((c) => `<td${c.isNumber ? ' class="number"' : ""}>${escaped(c.text(row))}</td>`).join("")}</tr>`);
    this.part("thead").innerHTML = `<tr>${head.join("")}</tr>`;
    this.part("tbody").innerHTML = body.join("");
    const first = this.page * PAGE + 1, count = this.rows.length;
    this.part(".where").textContent = count ? `${first.toLocaleString("en")}–${(first + shown.length - 1).toLocaleString("en")} of ${count.toLocaleString("en")}` : "no cell";
    this.part("[data-do=back]").disabled = this.page === 0;
    this.part("[data-do=on]").disabled = this.page >= pages - 1;
  }

  tsv() {
    const columns = this.columns();
    return [columns.map((c) => c.name), ...this.rows.map((row) => columns.map((c) => c.text(row)))].map((line) => line.join("\t")).join("\n");
  }

  async copy() {
    const text = this.tsv();
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = Object.assign(document.createElement("textarea"), { value: text });
      document.body.append(area);
      area.select();
      document.execCommand("copy"); // where a page from a file may not use the clipboard
      area.remove();
    }
    this.part(".done").textContent = `${this.rows.length.toLocaleString("en")} rows copied`;
  }

  save() {
    const address = URL.createObjectURL(new Blob([this.tsv()], { type: "text/tab-separated-values" }));
    Object.assign(document.createElement("a"), { href: address, download: "cells.tsv" }).click();
    URL.revokeObjectURL(address);
  }
}

const escaped = (text) => String(text).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
