// One figure on a canvas: axes, curves, error bars, markers; the pointer and the arrow keys ask what a marker is.

const MARGIN = { left: 62, right: 14, top: 10, bottom: 44 };
const MOST_LINED = 4000, MOST_BARRED = 600, MANY = 1500, REACH = 24;

class Chart {
  constructor(study, id, tip) {
    this.study = study;
    this.tip = tip;
    this.root = document.createElement("figure");
    this.root.id = id;
    this.root.innerHTML = '<figcaption><b></b></figcaption><canvas tabindex="0" role="img"></canvas><figcaption class="said"></figcaption>';
    [this.heading, this.canvas, this.said] = [this.root.querySelector("b"), this.root.querySelector("canvas"), this.root.querySelector(".said")];
    this.at = -1;
    this.listen();
  }

  listen() {
    const { canvas } = this;
    canvas.addEventListener("pointermove", (e) => this.point(e));
    canvas.addEventListener("pointerdown", (e) => this.point(e));
    canvas.addEventListener("pointerleave", () => this.leave());
    canvas.addEventListener("blur", () => this.leave());
    canvas.addEventListener("keydown", (e) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, PageDown: 25, PageUp: -25, Home: -Infinity, End: Infinity }[e.key];
      if (e.key === "Escape") this.leave();
      if (step === undefined || !this.points.length) return;
      e.preventDefault();
      this.walk(step);
    });
  }

  // What is drawn: x and y of a row, with labels; `error` half of its 95 % interval; `worst` where diverged cells stand.
  set(spec) { this.spec = spec; this.draw(); }

  draw() {
    const { spec, study } = this;
    if (!spec || !this.measure()) return;
    this.looks = looksOf(study, spec.colour);
    this.codes = study.columns[spec.colour].codes;
    this.collect();
    this.at = -1;
    this.ringed = null;
    this.context.clearRect(0, 0, this.width, this.height);
    this.axes();
    if (spec.curve && this.points.length <= MOST_LINED) this.curves();
    if (spec.error && this.points.length <= MOST_BARRED) this.bars();
    this.markers();
    this.caption();
  }

  measure() {
    const width = this.root.clientWidth, scale = window.devicePixelRatio || 1;
    if (!width) return false;
    this.width = width;
    this.height = Math.round(Math.min(460, Math.max(260, width * 0.62)));
    this.canvas.width = width * scale;
    this.canvas.height = this.height * scale;
    this.canvas.style.height = `${this.height}px`;
    this.scale = scale;
    this.context = this.canvas.getContext("2d", { willReadFrequently: true });
    this.context.setTransform(scale, 0, 0, scale, 0, 0);
    return true;
  }

  // Rows with a place, in order of x; limits of both axes; what is cut or diverged stands on the worse edge.
  collect() {
    const { spec, study } = this, points = [];
    let [lowX, highX, lowY, highY] = [Infinity, -Infinity, Infinity, -Infinity];
    this.cut = this.diverged = 0;
    for (const row of study.chosen) {
      const x = spec.x(row);
      if (!Number.isFinite(x) || (spec.log && x <= 0)) continue;
      const y = spec.y(row), diverged = study.diverged(row);
      const isCut = spec.cut !== undefined && y > spec.cut;
      if (!Number.isFinite(y) && !diverged) continue;
      this.cut += isCut; this.diverged += diverged;
      const edge = isCut || !Number.isFinite(y);
      if (!edge) { lowY = Math.min(lowY, y); highY = Math.max(highY, y); }
      lowX = Math.min(lowX, x); highX = Math.max(highX, x);
      points.push({ row, x, y: edge ? NaN : y, open: edge || diverged });
    }
    this.points = points;
    this.ordered = points.length <= MOST_LINED;
    if (this.ordered) this.order();
    if (!(lowY <= highY)) [lowY, highY] = [0, 1];
    const room = (highY - lowY || Math.abs(highY) || 1) * 0.06;
    const wide = spec.log ? 1.08 : (highX - lowX || 1) * 0.04;
    this.limits = { lowX: spec.log ? lowX / wide : lowX - wide, highX: spec.log ? highX * wide : highX + wide, lowY: lowY - room, highY: highY + room };
    for (const p of this.points) {
      p.px = this.toX(p.x);
      p.py = Number.isNaN(p.y) ? (spec.worst === "low" ? this.height - MARGIN.bottom : MARGIN.top) : this.toY(p.y);
    }
  }

  order() { this.points.sort((a, b) => a.x - b.x || a.y - b.y); }

  toX(x) {
    const { lowX, highX } = this.limits, part = this.spec.log ? Math.log(x / lowX) / Math.log(highX / lowX) : (x - lowX) / (highX - lowX);
    return MARGIN.left + part * (this.width - MARGIN.left - MARGIN.right);
  }
  toY(y) {
    const { lowY, highY } = this.limits;
    return this.height - MARGIN.bottom - ((y - lowY) / (highY - lowY)) * (this.height - MARGIN.top - MARGIN.bottom);
  }

  axes() {
    const { context: c, width, height, spec } = this, bottom = height - MARGIN.bottom;
    c.font = "12px system-ui, 'DejaVu Sans', sans-serif";
    c.lineWidth = 1;
    if (!this.points.length) {
      c.fillStyle = INK; c.textAlign = "center";
      c.fillText("No cell has a place here: choose others above.", width / 2, height / 2);
      return;
    }
    c.textAlign = "right"; c.textBaseline = "middle";
    for (const y of ticks(this.limits.lowY, this.limits.highY, height / 60)) {
      this.rule(MARGIN.left, this.toY(y), width - MARGIN.right, this.toY(y), "#e4e4e4");
      c.fillStyle = INK; c.fillText(tidy(y), MARGIN.left - 6, this.toY(y));
    }
    c.textAlign = "center"; c.textBaseline = "top";
    const found = spec.log ? logTicks(this.limits.lowX, this.limits.highX, width / 75) : ticks(this.limits.lowX, this.limits.highX, width / 75);
    for (const x of found) {
      this.rule(this.toX(x), bottom, this.toX(x), bottom + 4, INK);
      c.fillStyle = INK; c.fillText(spec.log ? amount(x).replace(" ", "") : tidy(x), this.toX(x), bottom + 7);
    }
    this.rule(MARGIN.left, bottom, width - MARGIN.right, bottom, INK);
    if (spec.zero && this.limits.lowY < 0) this.rule(MARGIN.left, this.toY(0), width - MARGIN.right, this.toY(0), INK);
    c.fillText(spec.xLabel, (MARGIN.left + width - MARGIN.right) / 2, height - 16);
    c.save();
    c.translate(11, (MARGIN.top + bottom) / 2); c.rotate(-Math.PI / 2); c.textBaseline = "middle";
    c.fillText(spec.yLabel, 0, 0, bottom - MARGIN.top + 30);
    c.restore();
  }

  rule(x1, y1, x2, y2, colour) {
    const c = this.context;
    c.strokeStyle = colour; c.beginPath(); c.moveTo(x1, Math.round(y1) + 0.5); c.lineTo(x2, Math.round(y2) + 0.5); c.stroke();
  }

  curves() {
    const c = this.context, lines = new Map();
    for (const p of this.points) {
      const key = this.spec.curve(p.row);
      if (!lines.has(key)) lines.set(key, []);
      lines.get(key).push(p);
    }
    c.lineWidth = 1.3;
    for (const line of lines.values()) {
      const look = this.looks[this.codes[line[0].row] - 1];
      if (line.length < 2 || !look) continue;
      c.strokeStyle = look.colour; c.setLineDash(look.dash); c.beginPath();
      let down = false;
      for (const p of line) {
        if (Number.isNaN(p.y)) { down = false; continue; }
        c[down ? "lineTo" : "moveTo"](p.px, p.py); down = true;
      }
      c.stroke();
    }
    c.setLineDash([]);
  }

  bars() {
    const c = this.context;
    c.globalAlpha = 0.5; c.lineWidth = 1;
    for (const p of this.points) {
      const half = this.spec.error(p.row), look = this.looks[this.codes[p.row] - 1];
      if (p.open || !look || !Number.isFinite(half)) continue;
      c.strokeStyle = look.colour; c.beginPath();
      c.moveTo(p.px, Math.max(MARGIN.top, this.toY(p.y + half)));
      c.lineTo(p.px, Math.min(this.height - MARGIN.bottom, this.toY(p.y - half)));
      c.stroke();
    }
    c.globalAlpha = 1;
  }

  markers() {
    const many = this.points.length > MANY, sprites = new Map();
    const of = (p) => {
      const code = this.codes[p.row], name = 2 * code + p.open;
      if (!sprites.has(name)) sprites.set(name, sprite(this.looks[code - 1], many ? 2.6 : 4.6, p.open, this.scale));
      return sprites.get(name);
    };
    const placed = this.points.filter((p) => this.codes[p.row]);
    if (many) {
      stamp(this.context, placed, of, this.scale);
      return;
    }
    for (const p of placed) {
      const { canvas, half } = of(p);
      this.context.drawImage(canvas, p.px - half, p.py - half, 2 * half, 2 * half);
    }
  }

  caption() {
    const { spec, points } = this, said = [`${points.length.toLocaleString("en")} cells.`];
    if (spec.note) said.push(spec.note);
    if (spec.error && points.length <= MOST_BARRED) said.push("Bars: 95 % interval of the value (1.96 standard errors).");
    if (spec.curve && points.length > MOST_LINED) said.push(`Curves are drawn for up to ${MOST_LINED.toLocaleString("en")} cells.`);
    if (this.diverged) said.push(`${this.diverged.toLocaleString("en")} diverged (open markers; on the edge without a finite value).`);
    if (this.cut) said.push(`${this.cut.toLocaleString("en")} lie beyond the cut and stand on the edge (open markers); the data are not cut.`);
    this.heading.textContent = spec.title;
    this.said.textContent = said.join(" ");
    this.canvas.setAttribute("aria-label", `${spec.title}. ${said.join(" ")} Arrow keys go from cell to cell.`);
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    let best = -1, least = REACH * REACH;
    this.points?.forEach((p, i) => {
      const d = (p.px - x) ** 2 + (p.py - y) ** 2;
      if (d < least) { least = d; best = i; }
    });
    best < 0 ? this.leave() : this.tell(best);
  }

  walk(step) {
    const last = this.points.length - 1;
    if (!this.ordered) { this.order(); this.ordered = true; }
    const to = this.at < 0 && Number.isFinite(step) ? (step < 0 ? last : 0) : this.at + step;
    this.tell(Math.max(0, Math.min(last, to)));
  }

  tell(index) {
    if (index === this.at && !this.tip.root.hidden) return;
    this.at = index;
    const p = this.points[index], box = this.canvas.getBoundingClientRect();
    this.ring();
    this.tip.show(this.study.describe(p.row, this.study.metric), box.left + p.px, box.top + p.py);
  }

  // The ring around the cell that is told of lies over the drawing, which is kept.
  ring() {
    const c = this.context, p = this.points[this.at];
    if (this.ringed) c.putImageData(this.ringed.image, this.ringed.x, this.ringed.y);
    this.ringed = null;
    if (!p) return;
    const s = this.scale, x = Math.floor((p.px - 14) * s), y = Math.floor((p.py - 14) * s);
    this.ringed = { image: c.getImageData(x, y, 28 * s, 28 * s), x, y };
    c.strokeStyle = INK; c.lineWidth = 2; c.beginPath(); c.arc(p.px, p.py, 9, 0, 2 * Math.PI); c.stroke();
  }

  leave() {
    if (this.at < 0) return;
    this.at = -1;
    this.ring();
    this.tip.hide();
  }
}

function ticks(low, high, most) {
  const rough = (high - low) / Math.max(2, most), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((k) => k * power >= rough) * power, found = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(i * step);
  return found;
}

function logTicks(low, high, most) {
  for (const digits of [[1, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]]) {
    const found = [];
    for (let power = 10 ** Math.floor(Math.log10(low)); power <= high; power *= 10) {
      for (const digit of digits) if (digit * power >= low && digit * power <= high) found.push(digit * power);
    }
    if (found.length <= most || digits.length === 1) return found.filter((_, i) => i % Math.ceil(found.length / most) === 0);
  }
}

const tidy = (value) => String(Number(value.toPrecision(6)));
