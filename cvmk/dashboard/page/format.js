// Numbers and times as people read them, and the places of an axis's ticks.

export function number(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e9)) return value.toExponential(Math.max(0, digits - 2)).replace(/\.?0+e/, "e").replace("e+", "e");
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return value.toLocaleString("en", { maximumSignificantDigits: Math.max(digits, Math.floor(Math.log10(size)) + 1) });
}

export function duration(seconds) {
  const whole = Math.round(Math.abs(seconds));
  if (whole < 60) return `${Math.abs(seconds) < 10 && seconds % 1 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const sign = seconds < 0 ? "−" : "";
  if (hours >= 48) return `${sign}${Math.floor(hours / 24)} d ${hours % 24} h`;
  return hours ? `${sign}${hours}:${String(minutes).padStart(2, "0")}:${String(rest).padStart(2, "0")} h` : `${sign}${minutes}:${String(rest).padStart(2, "0")} min`;
}

export function place(value, axis) {
  return axis === "time" ? duration(value) : number(Math.round(value));
}

export function ago(seconds) {
  if (seconds < 5) return "just now";
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h ago` : `${Math.round(seconds / 86400)} days ago`;
}

export function clock(seconds) {
  const then = new Date(1000 * seconds);
  const today = then.toDateString() === new Date().toDateString();
  return today ? then.toLocaleTimeString() : then.toLocaleString();
}

const SECONDS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400];

// Places between low and high, about `count` of them.
export function ticks(low, high, count, axis = "") {
  const rough = (high - low) / Math.max(1, count);
  if (!(rough > 0)) return [];
  let step = SECONDS.find((one) => one >= rough);
  if (axis !== "time" || rough < 1 || step === undefined) {
    const unit = axis === "time" && rough > 86400 ? 86400 : 1;
    const power = 10 ** Math.floor(Math.log10(rough / unit));
    step = unit * power * [1, 2, 5, 10].find((one) => one * power * unit >= rough * 0.999);
  }
  if (axis === "step") step = Math.max(1, step);
  const found = [];
  for (let at = Math.ceil(low / step); at * step <= high && found.length < 100; at += 1) found.push(at * step);
  return found;
}

export function logTicks(low, high, count) {
  const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const stride = Math.max(1, Math.ceil((last - first) / Math.max(1, count)));
  const found = [];
  for (let power = first; power <= last; power += stride) {
    for (const factor of last - first <= 2 ? [1, 2, 5] : [1]) found.push(factor * 10 ** power);
  }
  const inside = found.filter((value) => value >= low && value <= high);
  return inside.length > 1 ? inside : ticks(low, high, count);
}
