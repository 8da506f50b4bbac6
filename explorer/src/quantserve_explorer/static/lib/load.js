// The series of the Load view, from scrapes of `/metrics`.

import { Counters, parseMetrics, quantile, sumBy } from "./prometheus.js";

const RUNNING = "quantserve_requests_in_progress";
const QUEUED = "quantserve_queue_length";
const REQUESTS = "quantserve_requests_total";
const TOKENS = "vllm:generation_tokens_total";
const TTFT = "vllm:time_to_first_token_seconds_bucket";
const TPOT = "vllm:request_time_per_output_token_seconds_bucket";
const GAUGES = [RUNNING, QUEUED];
const COUNTERS = [REQUESTS, TOKENS, TTFT, TPOT];
const NAMES = new Set([...GAUGES, ...COUNTERS]);
const RATE_S = 10;
const QUANTILE_S = 60;
const BUSY = "429";

/** Points over time per model; `null` where a value is unknown. */
export class LoadSeries {
  /** Seconds of each scrape. */
  times = [];
  /** @type {Map<string, Record<string, (number | null)[]>>} by model, then by the names in `FIELDS`. */
  models = new Map();
  #totals = [];
  #counters = new Counters(({ name, labels }) => [name, labels.model, name === REQUESTS ? labels.status : (labels.le ?? "")].join("\0"));

  static FIELDS = ["running", "queued", "requests", "busy", "tokens", "ttft50", "ttft95", "tpot50", "tpot95"];

  /** @param {number} keep seconds. */
  constructor(keep = 600) {
    this.keep = keep;
  }

  /** Add a scrape. @param {number} time seconds. */
  add(time, text) {
    const samples = parseMetrics(text, NAMES);
    const totals = this.#counters.add(samples.filter(({ name }) => COUNTERS.includes(name)));
    const gauges = Object.fromEntries(GAUGES.map((name) => [name, sumBy(samples, name)]));
    this.#totals.push({ time, totals });
    this.times.push(time);
    for (const model of gauges[RUNNING].keys()) {
      if (model === undefined || model === "unknown" || this.models.has(model)) continue;
      const empty = () => Array(this.times.length - 1).fill(null);
      this.models.set(model, Object.fromEntries(LoadSeries.FIELDS.map((field) => [field, empty()])));
    }
    for (const [model, series] of this.models) {
      series.running.push(gauges[RUNNING].get(model) ?? null);
      series.queued.push(gauges[QUEUED].get(model) ?? null);
      series.requests.push(this.#rate(REQUESTS, model));
      series.busy.push(this.#rate(REQUESTS, model, BUSY));
      series.tokens.push(this.#rate(TOKENS, model));
      for (const [field, name] of [["ttft", TTFT], ["tpot", TPOT]]) {
        const buckets = this.#buckets(name, model);
        series[`${field}50`].push(quantile(0.5, buckets));
        series[`${field}95`].push(quantile(0.95, buckets));
      }
    }
    this.#forget(time);
  }

  /** Totals at least `seconds` ago, or the oldest. */
  #before(seconds) {
    const now = this.#totals.at(-1).time;
    return this.#totals.findLast(({ time }) => time <= now - seconds) ?? this.#totals[0];
  }

  #rate(name, model, only) {
    const now = this.#totals.at(-1);
    const before = this.#before(RATE_S);
    if (now === before) return null;
    let increase = 0;
    const prefix = `${name}\0${model}\0`;
    for (const [key, total] of now.totals) {
      if (key.startsWith(prefix) && (!only || key === prefix + only)) increase += total - (before.totals.get(key) ?? 0);
    }
    return increase / (now.time - before.time);
  }

  #buckets(name, model) {
    const before = this.#before(QUANTILE_S);
    const prefix = `${name}\0${model}\0`;
    const buckets = [];
    for (const [key, total] of this.#totals.at(-1).totals) {
      if (!key.startsWith(prefix)) continue;
      const bound = key.slice(prefix.length);
      buckets.push([bound === "+Inf" ? Infinity : Number(bound), total - (before.totals.get(key) ?? 0)]);
    }
    return buckets;
  }

  #forget(time) {
    let old = this.times.findIndex((one) => one > time - this.keep);
    if (old < 0) old = 0;
    this.times.splice(0, old);
    for (const series of this.models.values()) for (const points of Object.values(series)) points.splice(0, old);
    const first = this.#totals.findLastIndex((one) => one.time <= time - QUANTILE_S);
    if (first > 0) this.#totals.splice(0, first);
  }
}
