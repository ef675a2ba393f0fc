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

// Colour and shape of each value of a column: those of the printed figures where they have some, else ones left over.
function looksOf(study, name) {
  const { values } = study.columns[name], known = study.styles[name] ?? {};
  const taken = values.filter((value) => known[value]).map((value) => known[value]);
  const free = (all, k) => all.filter((one) => !taken.some((look) => look[k] === one));
  const colours = free(PALETTE, 0), shapes = free(Object.keys(SHAPES), 1);
  let i = 0;
  return values.map((value) => {
    if (known[value]) return { colour: known[value][0], shape: known[value][1], dash: [] };
    const look = { colour: colours[i % colours.length], shape: shapes[i % shapes.length], dash: DASHES[Math.floor(i / colours.length) % DASHES.length] };
    i++;
    return look;
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

// A marker drawn once, to be copied.
function sprite(look, radius, open, scale) {
  const half = Math.ceil(radius + 2), canvas = document.createElement("canvas"), size = 2 * half * scale;
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.setTransform(scale, 0, 0, scale, half * scale, half * scale);
  mark(context, look, radius, open);
  return { canvas, half, size };
}

// Tens of thousands of markers: their opaque pixels written into the picture, many times faster than drawing images.
function stamp(context, points, spriteOf, scale) {
  const { width, height } = context.canvas, image = context.getImageData(0, 0, width, height);
  const target = new Uint32Array(image.data.buffer), pixels = new Map();
  const pixelsOf = (one) => {
    if (!pixels.has(one)) {
      const source = new Uint32Array(one.canvas.getContext("2d").getImageData(0, 0, one.size, one.size).data.buffer), found = [];
      source.forEach((colour, i) => { if (colour >>> 24 > 127) found.push(i % one.size, Math.floor(i / one.size), colour | 0xff000000); });
      pixels.set(one, found);
    }
    return pixels.get(one);
  };
  for (const p of points) {
    const one = spriteOf(p), left = Math.round((p.px - one.half) * scale), top = Math.round((p.py - one.half) * scale), dots = pixelsOf(one);
    for (let i = 0; i < dots.length; i += 3) {
      const x = left + dots[i], y = top + dots[i + 1];
      if (x >= 0 && x < width && y >= 0 && y < height) target[y * width + x] = dots[i + 2];
    }
  }
  context.putImageData(image, 0, 0);
}
