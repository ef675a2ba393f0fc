// Columns back from their bytes: see encoding.py for how they were made.

async function unpack(text) {
  const raw = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  if (typeof DecompressionStream === "undefined") return inflate(raw.subarray(10, raw.length - 8)); // gzip's frame
  const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function readColumns(heads, bytes, rows) {
  const columns = {};
  let at = 0;
  for (const head of heads) {
    const planes = bytes.subarray(at, (at += rows * head.width));
    columns[head.name] = head.kind === "key" ? readKeys(planes, head, rows) : readColumn(planes, head, rows);
  }
  return columns;
}

function readKeys(planes, head, rows) {
  const digits = (row, k) => planes[k * rows + row].toString(16).padStart(2, "0");
  return { kind: "key", text: (row) => Array.from({ length: head.width }, (_, k) => digits(row, k)).join("") };
}

function readColumn(planes, head, rows) {
  const whole = new Float64Array(rows);
  for (let k = 0, unit = 1; k < head.width; k++, unit *= 256) {
    for (let row = 0, at = k * rows; row < rows; row++, at++) whole[row] += planes[at] * unit;
  }
  if (head.delta) {
    for (let row = 0, sum = 0; row < rows; row++) {
      const step = whole[row];
      sum += step % 2 ? -(step + 1) / 2 : step / 2;
      whole[row] = sum;
    }
  }
  if (head.kind === "name") {
    const codes = Int32Array.from(whole);
    return { kind: "name", codes, values: head.values, text: (row) => head.values[codes[row] - 1] ?? "" };
  }
  const numbers = whole.map((n) => (n ? (n - 1 + head.least) * head.step : NaN));
  return { kind: "number", numbers: head.kind === "log" ? numbers.map(Math.exp) : numbers };
}

// RFC 1951, for browsers without DecompressionStream.
function inflate(source) {
  let at = 0, held = 0, count = 0, out = new Uint8Array(source.length * 8), size = 0;
  const bits = (n) => {
    while (count < n) { held |= source[at++] << count; count += 8; }
    const found = held & ((1 << n) - 1);
    held >>>= n; count -= n;
    return found;
  };
  const put = (byte) => {
    if (size === out.length) { const larger = new Uint8Array(2 * size); larger.set(out); out = larger; }
    out[size++] = byte;
  };
  const symbol = (tree) => {
    for (let code = 0, first = 0, index = 0, length = 1; ; length++) {
      code |= bits(1);
      const here = tree.counts[length];
      if (code - here < first) return tree.symbols[index + code - first];
      index += here; first = (first + here) << 1; code <<= 1;
    }
  };
  const huffman = (lengths) => {
    const counts = new Uint16Array(16), offsets = new Uint16Array(16), symbols = [];
    for (const length of lengths) counts[length]++;
    counts[0] = 0;
    for (let i = 1; i < 16; i++) offsets[i] = offsets[i - 1] + counts[i - 1];
    lengths.forEach((length, value) => { if (length) symbols[offsets[length]++] = value; });
    return { counts, symbols };
  };
  const LENGTHS = [3,4,5,6,7,8,9,10,11,13,15,17,19,23,27,31,35,43,51,59,67,83,99,115,131,163,195,227,258];
  const LENGTH_BITS = [0,0,0,0,0,0,0,0,1,1,1,1,2,2,2,2,3,3,3,3,4,4,4,4,5,5,5,5,0];
  const BACK = [1,2,3,4,5,7,9,13,17,25,33,49,65,97,129,193,257,385,513,769,1025,1537,2049,3073,4097,6145,8193,12289,16385,24577];
  const ORDER = [16,17,18,0,8,7,9,6,10,5,11,4,12,3,13,2,14,1,15];
  const fixed = () => [
    huffman(Array.from({ length: 288 }, (_, i) => (i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8))),
    huffman(new Array(30).fill(5)),
  ];
  const dynamic = () => {
    const literals = bits(5) + 257, distances = bits(5) + 1, codes = bits(4) + 4, lengths = new Array(19).fill(0);
    for (let i = 0; i < codes; i++) lengths[ORDER[i]] = bits(3);
    const tree = huffman(lengths), all = [];
    while (all.length < literals + distances) {
      const s = symbol(tree);
      if (s < 16) all.push(s);
      else if (s === 16) { const last = all[all.length - 1]; for (let n = bits(2) + 3; n; n--) all.push(last); }
      else for (let n = s === 17 ? bits(3) + 3 : bits(7) + 11; n; n--) all.push(0);
    }
    return [huffman(all.slice(0, literals)), huffman(all.slice(literals))];
  };
  for (let last = 0; !last; ) {
    last = bits(1);
    const kind = bits(2);
    if (kind === 0) {
      held = count = 0;
      const length = source[at] | (source[at + 1] << 8);
      at += 4;
      for (let i = 0; i < length; i++) put(source[at++]);
      continue;
    }
    const [literal, distance] = kind === 1 ? fixed() : dynamic();
    for (let s = symbol(literal); s !== 256; s = symbol(literal)) {
      if (s < 256) { put(s); continue; }
      const length = LENGTHS[s - 257] + bits(LENGTH_BITS[s - 257]);
      const d = symbol(distance);
      const back = BACK[d] + bits(d < 2 ? 0 : (d >> 1) - 1);
      for (let i = 0; i < length; i++) put(out[size - back]);
    }
  }
  return out.subarray(0, size);
}
