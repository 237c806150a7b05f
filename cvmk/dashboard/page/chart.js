// A chart: lines of several runs over one axis, drawn on a canvas; values under the pointer or the keyboard's cursor; the same as a table.
import { logTicks, number, place, ticks } from "./format.js";

const MARGIN = { left: 58, right: 12, top: 12, bottom: 24 };
const DASHES = [[], [7, 4], [2, 3]];
const DRAWN_MARKS = new Set(["rollback", "early_stop", "interrupted", "start", "anomaly"]);
const ROWS = 40;

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

export function swatch(run) {
  const style = ["", " dashed", " dotted"][Math.floor(run.place / 8) % 3];
  return element("span", { class: `swatch${style}`, "data-place": run.place % 8, "aria-hidden": "true" });
}

export class Chart {
  // `page` has zoom(window), pan(share), point(x or null), toggleLog(key).
  constructor(spec, page) {
    [this.spec, this.page] = [spec, page];
    this.series = [];
    this.view = { axis: "step", window: [0, 1], log: false, smoothing: 0, marks: [] };
    const title = spec.unit ? `${spec.title}, ${spec.unit}` : spec.title;
    this.log = element("button", { type: "button", "aria-pressed": "false", "aria-label": `Log scale for ${spec.title}` }, "log");
    this.log.addEventListener("click", () => page.toggleLog(spec.key));
    this.canvas = element("canvas", { "aria-hidden": "true" });
    [this.cursor, this.selection, this.tip] = ["cursor", "selection", "tip"].map((name) => element("div", { class: name, hidden: true, "aria-hidden": "true" }));
    this.said = element("p", { class: "unseen", "aria-live": "polite" });
    this.plot = element("div", { class: "plot", tabindex: "0", role: "group", "aria-roledescription": "chart", "aria-label": title }, this.canvas, this.selection, this.cursor, this.tip);
    this.table = element("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": `${title}: values` });
    this.details = element("details", {}, element("summary", {}, "Table", element("span", { class: "unseen" }, ` of ${title}`)), this.table);
    this.details.addEventListener("toggle", () => this.fillTable());
    const heading = [element("h3", {}, spec.title), spec.unit ? element("span", { class: "hint" }, spec.unit) : "", element("span", { class: "gap" }), this.log];
    this.figure = element("figure", { class: "chart card", "data-key": spec.key }, element("figcaption", {}, ...heading), this.plot, this.said, this.details);
    this.at = null;
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  show(series, view) {
    [this.series, this.view] = [series, view];
    this.log.setAttribute("aria-pressed", String(view.log));
    for (const one of series) one.smoothen(view.smoothing);
    this.draw();
    this.fillTable();
    this.point(this.at, this.isHovered);
  }

  // -- drawing ------------------------------------------------------------------------------------------------------------------------------
  draw() {
    const [width, height] = [this.plot.clientWidth, this.plot.clientHeight];
    if (!width || !height) return;
    const scale = window.devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * scale) || this.canvas.height !== Math.round(height * scale)) {
      [this.canvas.width, this.canvas.height] = [Math.round(width * scale), Math.round(height * scale)];
    }
    this.box = { left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: height - MARGIN.bottom };
    this.values = this.range();
    const brush = this.canvas.getContext("2d");
    brush.setTransform(scale, 0, 0, scale, 0, 0);
    brush.clearRect(0, 0, width, height);
    this.colours = getComputedStyle(document.documentElement);
    this.drawAxes(brush);
    brush.save();
    brush.beginPath();
    brush.rect(this.box.left - 3, this.box.top - 4, this.box.right - this.box.left + 6, this.box.bottom - this.box.top + 8);
    brush.clip();
    for (const one of this.series) this.drawSeries(brush, one);
    this.drawMarks(brush);
    brush.restore();
  }

  colour(name) {
    return this.colours.getPropertyValue(`--${name}`).trim();
  }

  range() {
    const log = this.view.log;
    const found = this.series.map((one) => one.range(this.view.window, log, this.view.smoothing > 0));
    let [low, high] = [Math.min(...found.map(([least]) => least)), Math.max(...found.map(([, greatest]) => greatest))];
    if (!(low <= high)) return log ? [0.1, 10] : [0, 1];
    if (low === high) return log ? [low / 2, high * 2] : [low - (Math.abs(low) * 0.1 || 1), high + (Math.abs(high) * 0.1 || 1)];
    if (log) {
      const pad = (high / low) ** 0.05;
      return [low / pad, high * pad];
    }
    const pad = 0.05 * (high - low);
    return [low >= 0 && low < pad ? 0 : low - pad, high + pad];
  }

  toX(x) {
    const [low, high] = this.view.window;
    return this.box.left + ((x - low) / (high - low)) * (this.box.right - this.box.left);
  }

  fromX(pixel) {
    const [low, high] = this.view.window;
    const share = (pixel - this.box.left) / (this.box.right - this.box.left);
    return low + Math.min(1, Math.max(0, share)) * (high - low);
  }

  toY(value) {
    let [low, high] = this.values;
    if (this.view.log) {
      if (value <= 0) return null;
      [low, high, value] = [Math.log(low), Math.log(high), Math.log(value)];
    }
    return this.box.bottom - ((value - low) / (high - low)) * (this.box.bottom - this.box.top);
  }

  drawAxes(brush) {
    const { left, right, top, bottom } = this.box;
    const [low, high] = this.values;
    brush.font = `12px ${getComputedStyle(document.body).fontFamily}`;
    brush.lineWidth = 1;
    brush.fillStyle = this.colour("dim");
    brush.strokeStyle = this.colour("line");
    brush.textAlign = "right";
    brush.textBaseline = "middle";
    const shown = this.view.log ? logTicks(low, high, 5) : ticks(low, high, 5);
    const written = shorts(shown);
    shown.forEach((value, at) => {
      const y = Math.round(this.toY(value)) + 0.5;
      brush.beginPath();
      brush.moveTo(left, y);
      brush.lineTo(right, y);
      brush.stroke();
      brush.fillText(written[at], left - 7, y);
    });
    brush.textAlign = "center";
    brush.textBaseline = "top";
    for (const x of ticks(...this.view.window, Math.max(2, (right - left) / 75), this.view.axis)) {
      const at = Math.round(this.toX(x)) + 0.5;
      brush.beginPath();
      brush.moveTo(at, bottom);
      brush.lineTo(at, bottom + 4);
      brush.stroke();
      const text = this.view.axis === "time" ? place(x, "time") : short(x);
      const half = brush.measureText(text).width / 2;
      brush.fillText(text, Math.min(right + MARGIN.right - half - 1, Math.max(half, at)), bottom + 7);
    }
    brush.beginPath();
    brush.moveTo(left, bottom + 0.5);
    brush.lineTo(right, bottom + 0.5);
    brush.stroke();
    brush.clearRect(left, 0, right - left, top - 4);
  }

  drawMarks(brush) {
    for (const { run, mark } of this.view.marks) {
      if (!DRAWN_MARKS.has(mark.kind)) continue;
      const x = Math.round(this.toX(mark.x)) + 0.5;
      const y = mark.value === null || mark.value === undefined ? null : Math.min(this.box.bottom, Math.max(this.box.top, this.toY(mark.value) ?? this.box.bottom));
      brush.strokeStyle = this.colour(mark.trouble ? "bad" : "dim");
      brush.fillStyle = this.colour(`run-${run.place % 8}`);
      brush.beginPath();
      if (y !== null) { // an anomaly, where its value is
        brush.lineWidth = 1.6;
        brush.arc(x, y, 4.5, 0, 2 * Math.PI);
        brush.stroke();
        continue;
      }
      brush.lineWidth = 1;
      brush.globalAlpha = 0.7;
      brush.setLineDash([3, 3]);
      brush.moveTo(x, this.box.top + 4);
      brush.lineTo(x, this.box.bottom);
      brush.stroke();
      brush.setLineDash([]);
      brush.globalAlpha = 1;
      brush.beginPath();
      brush.moveTo(x - 5, this.box.top - 4);
      brush.lineTo(x + 5, this.box.top - 4);
      brush.lineTo(x, this.box.top + 4);
      brush.fill();
    }
  }

  drawSeries(brush, one) {
    const smoothed = this.view.smoothing > 0;
    brush.strokeStyle = brush.fillStyle = this.colour(`run-${one.run.place % 8}`);
    brush.lineJoin = "round";
    if (one.least && !smoothed) this.drawBand(brush, one);
    const dash = DASHES[Math.floor(one.run.place / 8) % DASHES.length];
    if (smoothed) this.drawLine(brush, one, one.mean, { alpha: 0.28, width: 1, dash });
    this.drawLine(brush, one, one.smooth, { alpha: 1, width: 1.8, dash });
    brush.setLineDash([]);
    brush.globalAlpha = 1;
  }

  drawBand(brush, one) {
    brush.globalAlpha = 0.16;
    let run = [];
    const fill = () => {
      if (run.length > 1) {
        brush.beginPath();
        run.forEach((at, place) => brush[place ? "lineTo" : "moveTo"](this.toX(one.x[at]), this.toY(one.greatest[at]) ?? this.box.bottom));
        run.reverse().forEach((at) => brush.lineTo(this.toX(one.x[at]), this.toY(one.least[at]) ?? this.box.bottom));
        brush.fill();
      }
      run = [];
    };
    one.x.forEach((_, at) => {
      if (one.breaks.has(at) || one.least[at] === null || one.faint.has(at)) fill();
      if (one.least[at] !== null && !one.faint.has(at)) run.push(at);
    });
    fill();
  }

  // What was done again later is drawn fainter.
  drawLine(brush, one, values, { alpha, width, dash }) {
    const dots = one.x.length <= 60 && alpha === 1;
    for (const faint of [true, false]) {
      brush.globalAlpha = faint ? 0.4 * alpha : alpha;
      brush.lineWidth = width;
      brush.setLineDash(faint ? [2, 3] : dash);
      brush.beginPath();
      let drawing = false;
      const points = [];
      values.forEach((value, at) => {
        const y = value === null ? null : this.toY(value);
        const mine = one.faint.has(at) === faint;
        if (y === null || one.breaks.has(at)) drawing = false;
        if (y === null) return;
        const x = this.toX(one.x[at]);
        if (drawing && (mine || (faint && one.faint.has(at - 1)))) brush.lineTo(x, y);
        else brush.moveTo(x, y);
        drawing = mine || one.faint.has(at + 1) === faint;
        if (mine && (dots || (values[at - 1] ?? null) === null || one.breaks.has(at))) points.push([x, y]);
      });
      brush.stroke();
      brush.setLineDash([]);
      for (const [x, y] of dots ? points : points.slice(0, 200)) {
        brush.beginPath();
        brush.arc(x, y, dots ? 2.4 : 1, 0, 2 * Math.PI);
        brush.fill();
      }
    }
  }

  // -- values -------------------------------------------------------------------------------------------------------------------------------
  // Shows the cursor at x (null: nowhere); with `told` also the values there.
  point(x, told = false) {
    [this.at, this.isHovered] = [x, told];
    const isIn = x !== null && this.box && x >= this.view.window[0] && x <= this.view.window[1];
    this.cursor.hidden = !isIn;
    this.tip.hidden = !isIn || !told;
    if (!isIn) return;
    const { top, bottom, left, right } = this.box;
    const pixel = this.toX(x);
    Object.assign(this.cursor.style, { left: `${pixel}px`, top: `${top}px`, height: `${bottom - top}px` });
    if (!told) return;
    this.tip.replaceChildren(...this.told(x));
    const [width, isRight] = [this.tip.offsetWidth, pixel > (left + right) / 2];
    const wanted = isRight ? pixel - width - 12 : pixel + 12;
    Object.assign(this.tip.style, { left: `${Math.max(0, Math.min(this.plot.clientWidth - width, wanted))}px`, top: `${top}px` });
  }

  readings(x) {
    return this.series.map((one) => ({ one, at: one.nearest(x) })).filter(({ at }) => at >= 0);
  }

  told(x) {
    const lines = this.readings(x).map(({ one, at }) => {
      const isSpread = one.least && one.least[at] !== one.greatest[at];
      const beside = [
        this.view.smoothing > 0 ? number(one.mean[at]) : "", isSpread ? `${number(one.least[at])} to ${number(one.greatest[at])}` : "",
        Math.abs(this.toX(one.x[at]) - this.toX(x)) > 2 ? `at ${place(one.x[at], this.view.axis)}` : "",
      ].filter(Boolean).join(", ");
      const name = element("span", { class: "name" }, one.run.name);
      return element("p", {}, swatch(one.run), name, element("b", {}, number(one.smooth[at])), element("span", { class: "dim" }, beside));
    });
    const near = this.view.marks.filter(({ mark }) => Math.abs(this.toX(mark.x) - this.toX(x)) < 5 && DRAWN_MARKS.has(mark.kind));
    const marks = near.slice(-3).map(({ run, mark }) => element("p", { class: `said ${mark.trouble ? "bad" : "dim"}` }, swatch(run), mark.text));
    return [element("p", { class: "dim" }, this.view.axis === "time" ? place(x, "time") : `iteration ${place(x, "step")}`), ...lines, ...marks];
  }

  fillTable() {
    if (!this.details.open) return;
    const head = element("tr", {}, element("th", { scope: "col", class: "number" }, this.view.axis === "time" ? "Time" : "Iteration"));
    for (const one of this.series) head.append(element("th", { scope: "col", class: "number" }, one.run.name));
    const [low, high] = this.view.window;
    const all = [...new Set(this.series.flatMap((one) => one.x.filter((x, at) => x >= low && x <= high && one.mean[at] !== null)))].sort((a, b) => a - b);
    const stride = Math.max(1, Math.ceil(all.length / ROWS));
    const rows = all.filter((_, at) => (all.length - 1 - at) % stride === 0).map((x) => {
      const row = element("tr", {}, element("td", { class: "number" }, place(x, this.view.axis)));
      for (const one of this.series) {
        const at = one.nearest(x);
        const isNear = at >= 0 && Math.abs(one.x[at] - x) <= (high - low) / ROWS;
        row.append(element("td", { class: "number" }, isNear ? number(one.mean[at]) : "–"));
      }
      return row;
    });
    this.table.replaceChildren(element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)));
  }

  // -- pointer and keyboard -----------------------------------------------------------------------------------------------------------------
  listen() {
    const pixel = (event) => event.clientX - this.plot.getBoundingClientRect().left;
    let from = null;
    const end = () => {
      from = null;
      this.selection.hidden = true;
    };
    this.plot.addEventListener("pointerdown", (event) => {
      if (event.button === 0 && event.pointerType !== "touch") {
        from = pixel(event);
        this.plot.setPointerCapture(event.pointerId);
      }
    });
    this.plot.addEventListener("pointermove", (event) => {
      const hand = `${event.clientX},${event.clientY}`;
      if (!this.box || hand === this.hand) return; // the page moved under it, not it over the page
      this.hand = hand;
      const x = pixel(event);
      this.page.point(this.snapped(this.fromX(x)), this);
      this.selection.hidden = from === null || Math.abs(x - from) < 5;
      if (this.selection.hidden) return;
      const [a, b] = [from, x].sort((one, other) => one - other).map((one) => Math.min(this.box.right, Math.max(this.box.left, one)));
      Object.assign(this.selection.style, { left: `${a}px`, width: `${b - a}px`, top: `${this.box.top}px`, height: `${this.box.bottom - this.box.top}px` });
    });
    this.plot.addEventListener("pointerup", (event) => {
      if (from !== null && Math.abs(pixel(event) - from) >= 5) {
        this.page.zoom([this.fromX(from), this.fromX(pixel(event))].sort((a, b) => a - b));
      }
      end();
    });
    this.plot.addEventListener("pointercancel", end);
    this.plot.addEventListener("pointerleave", () => { if (from === null) this.page.point(null, null); });
    this.plot.addEventListener("dblclick", () => this.page.zoom(null));
    this.plot.addEventListener("blur", () => this.page.point(null, null));
    this.plot.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && from !== null) end();
      else if (!event.ctrlKey && !event.altKey && !event.metaKey && this.key(event.key, event.shiftKey)) event.preventDefault();
    });
  }

  // The place of a value that is nearest.
  snapped(x) {
    const found = this.readings(x).map(({ one, at }) => one.x[at]).sort((a, b) => Math.abs(a - x) - Math.abs(b - x));
    return found.length ? Math.min(this.view.window[1], Math.max(this.view.window[0], found[0])) : x;
  }

  key(name, shift) {
    const [low, high] = this.view.window;
    const centre = this.at ?? (low + high) / 2;
    if (name === "ArrowLeft" || name === "ArrowRight") {
      const sign = name === "ArrowLeft" ? -1 : 1;
      if (shift) this.page.pan(0.25 * sign);
      else this.step(sign);
    } else if (name === "Home" || name === "End") this.tell(this.snapped(name === "Home" ? low : high));
    else if (name === "+" || name === "=") this.page.zoom([centre - (centre - low) / 2, centre + (high - centre) / 2]);
    else if (name === "-" || name === "−") this.page.zoom([low - (high - low) / 2, high + (high - low) / 2]);
    else if (name === "0" || name === "Escape") this.page.zoom(null);
    else return false;
    return true;
  }

  step(sign) {
    const [low, high] = this.view.window;
    const places = [...new Set(this.series.flatMap((one) => one.x.filter((x, at) => one.mean[at] !== null && x >= low && x <= high)))].sort((a, b) => a - b);
    if (!places.length) return;
    if (this.at === null) this.tell(sign > 0 ? places[0] : places.at(-1));
    else this.tell((sign > 0 ? places.find((x) => x > this.at) : places.findLast((x) => x < this.at)) ?? (sign > 0 ? places.at(-1) : places[0]));
  }

  tell(x) {
    this.page.point(x, this);
    const values = this.readings(x).map(({ one, at }) => `${one.run.name} ${number(one.mean[at])}`);
    this.said.textContent = `${this.view.axis === "time" ? "" : "iteration "}${place(x, this.view.axis)}: ${values.join(", ")}`;
  }
}

// Numbers of ticks in little room, all written in one way.
function shorts(values) {
  const isTiny = Math.max(...values.map(Math.abs)) < 1e-3;
  return values.map((value) => (isTiny || Math.abs(value) >= 1e-3 ? short(value) : String(Number(value.toFixed(5)))));
}

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${number(value / 1e6, 4)}M`;
  if (size >= 1e4) return `${number(value / 1e3, 4)}k`;
  return number(Number(value.toPrecision(6)), 4);
}
