// Prometheus' text format, counters that survive restarts, and quantiles of histograms.

const SAMPLE = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?\s*$/;
const LABEL = /([A-Za-z_]\w*)\s*=\s*"((?:[^"\\]|\\.)*)"\s*,?\s*/gy;
const ESCAPES = { n: "\n", '"': '"', "\\": "\\" };

/** The samples of the named metrics: `{name, labels, value}`. Lines that are not samples are skipped. */
export function parseMetrics(text, names) {
  const samples = [];
  for (const line of text.split("\n")) {
    if (line === "" || line[0] === "#") continue;
    const end = line.search(/[{\s]/);
    if (names && !names.has(line.slice(0, end))) continue;
    const match = SAMPLE.exec(line);
    if (!match) continue;
    const labels = {};
    if (match[2]) {
      for (const [, name, value] of match[2].matchAll(LABEL)) labels[name] = value.replace(/\\(.)/g, (all, c) => ESCAPES[c] ?? all);
    }
    samples.push({ name: match[1], labels, value: number(match[3]) });
  }
  return samples;
}

function number(text) {
  if (/^[+-]?Inf$/i.test(text)) return text[0] === "-" ? -Infinity : Infinity;
  return Number(text);
}

/** Sums of a gauge by one label. */
export function sumBy(samples, name, label = "model") {
  const sums = new Map();
  for (const sample of samples) {
    if (sample.name === name) sums.set(sample.labels[label], (sums.get(sample.labels[label]) ?? 0) + sample.value);
  }
  return sums;
}

/**
 * Running totals of counters, from scrape to scrape.
 *
 * A value below the previous one is a restart, and counts from 0. A series of a replica (label `replica`) that is new
 * after the first scrape only sets its baseline: the replica may have been missing from a scrape. Any other new series
 * counts from 0, because a counter appears with its first event.
 */
export class Counters {
  #last = new Map();
  #totals = new Map();
  #scraped = false;

  /** @param {(sample) => string} keyOf the total that a sample belongs to. */
  constructor(keyOf) {
    this.keyOf = keyOf;
  }

  /** Totals after this scrape, as a new `Map` from key to sum. */
  add(samples) {
    for (const sample of samples) {
      const series = sample.name + JSON.stringify(Object.entries(sample.labels).sort());
      const before = this.#last.get(series);
      this.#last.set(series, sample.value);
      let increase = 0;
      if (before !== undefined) increase = sample.value < before ? sample.value : sample.value - before;
      else if (this.#scraped && sample.labels.replica === undefined) increase = sample.value;
      const key = this.keyOf(sample);
      this.#totals.set(key, (this.#totals.get(key) ?? 0) + increase);
    }
    this.#scraped = true;
    return new Map(this.#totals);
  }
}

/**
 * Quantile of a histogram, as Prometheus' `histogram_quantile`: linear within a bucket.
 *
 * @param {number} q between 0 and 1.
 * @param {[number, number][]} buckets upper bound and cumulative count; the last bound is Infinity.
 * @returns {number | null} null without observations; the highest finite bound if the quantile is above it.
 */
export function quantile(q, buckets) {
  const sorted = [...buckets].sort((a, b) => a[0] - b[0]);
  const total = sorted.at(-1)?.[1] ?? 0;
  if (sorted.length < 2 || sorted.at(-1)[0] !== Infinity || !(total > 0)) return null;
  const rank = q * total;
  const index = sorted.findIndex(([, count]) => count >= rank);
  if (index === sorted.length - 1) return sorted.at(-2)[0];
  const [bound, count] = sorted[index];
  if (index === 0 && bound <= 0) return bound;
  const [lower, below] = index ? sorted[index - 1] : [0, 0];
  return count === below ? bound : lower + ((bound - lower) * (rank - below)) / (count - below);
}
