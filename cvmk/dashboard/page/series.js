// One field of one run in what the server shows, ready to be drawn and read.

export class Series {
  constructor(run, columns, field) {
    this.run = run;
    this.x = columns.x;
    ({ mean: this.mean, least: this.least = null, greatest: this.greatest = null } = columns.fields[field]);
    this.breaks = new Set(columns.breaks);
    this.faint = new Set(columns.faint);
    this.smooth = this.mean;
  }

  // An exponential average whose first values count in full. Where training went back, it goes on from what was not done again.
  smoothen(weight) {
    this.smooth = this.mean;
    if (weight <= 0) return;
    let [sum, share] = [0, 0];
    let lasting = [sum, share];
    this.smooth = this.mean.map((value, at) => {
      if (this.breaks.has(at)) [sum, share] = lasting;
      if (value === null) return null;
      sum = weight * sum + (1 - weight) * value;
      share = weight * share + (1 - weight);
      if (!this.faint.has(at)) lasting = [sum, share];
      return sum / share;
    });
  }

  // The place in x that is nearest, -1 where there is none with a value; what was done again later only where nothing else is.
  nearest(x) {
    let [best, distance] = [-1, Infinity];
    this.x.forEach((there, at) => {
      if (this.mean[at] === null) return;
      const away = Math.abs(there - x) * (this.faint.has(at) ? 1.5 : 1);
      if (away < distance) [best, distance] = [at, away];
    });
    return best;
  }

  // Least and greatest of what is drawn between two places; only positive values where `positive`.
  range([low, high], positive, smoothed) {
    let [least, greatest] = [Infinity, -Infinity];
    const [below, above] = smoothed ? [this.smooth, this.smooth] : [this.least ?? this.mean, this.greatest ?? this.mean];
    this.x.forEach((x, at) => {
      if (x < low || x > high) return;
      for (const value of [below[at], above[at], this.smooth[at]]) {
        if (value === null || (positive && value <= 0)) continue;
        [least, greatest] = [Math.min(least, value), Math.max(greatest, value)];
      }
    });
    return [least, greatest];
  }
}
