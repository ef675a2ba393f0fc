// Markers: shapes differ as well as colours, for print in grey and for any colour vision.

const INK = "#1b1b1b";
const PALETTE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a7d00", "#000000"];
const POLYGON = (sides, turn = 0) => (c, r) => {
  for (let i = 0; i < sides; i++) {
    const angle = turn + (2 * Math.PI * i) / sides - Math.PI / 2;
    c[i ? "lineTo" : "moveTo"](r * Math.cos(angle), r * Math.sin(angle));
  }
  c.closePath();
};
const PLUS = (turn) => (c, r) => {
  const w = r / 2.6, corners = [[w, r], [w, w], [r, w], [r, -w], [w, -w], [w, -r], [-w, -r], [-w, -w], [-r, -w], [-r, w], [-w, w], [-w, r]];
  corners.forEach(([x, y], i) => c[i ? "lineTo" : "moveTo"](x * Math.cos(turn) - y * Math.sin(turn), x * Math.sin(turn) + y * Math.cos(turn)));
  c.closePath();
};
const SHAPES = {
  o: (c, r) => c.arc(0, 0, r * 0.9, 0, 2 * Math.PI),
  s: POLYGON(4, Math.PI / 4),
  "^": POLYGON(3),
  v: POLYGON(3, Math.PI),
  D: POLYGON(4),
  p: POLYGON(5),
  P: PLUS(0),
  X: PLUS(Math.PI / 4),
  "<": POLYGON(3, -Math.PI / 2),
  ">": POLYGON(3, Math.PI / 2),
  h: POLYGON(6),
};
const DASHES = [[], [6, 3], [2, 2], [8, 3, 2, 3], [1, 3]];

// Colour and shape of each value of a column: those of the printed figures where they have some.
function looksOf(study, name) {
  const shapes = Object.keys(SHAPES), known = study.styles[name] ?? {};
  return study.columns[name].values.map((value, i) => {
    const [colour, shape] = known[value] ?? [PALETTE[i % PALETTE.length], shapes[i % shapes.length]];
    return { colour, shape, dash: known[value] ? [] : DASHES[Math.floor(i / PALETTE.length) % DASHES.length] };
  });
}

function mark(context, look, radius, open) {
  context.beginPath();
  SHAPES[look.shape](context, radius);
  context.fillStyle = open ? "#ffffff" : look.colour;
  context.strokeStyle = open ? look.colour : "#ffffff";
  context.lineWidth = open ? 1.6 : 0.6;
  context.fill();
  context.stroke();
}

// A marker drawn once, to be copied: thousands of them cost no more than their pixels.
function sprite(look, radius, open, scale) {
  const half = Math.ceil(radius + 2), canvas = document.createElement("canvas");
  canvas.width = canvas.height = 2 * half * scale;
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, half * scale, half * scale);
  mark(context, look, radius, open);
  return { canvas, half };
}
