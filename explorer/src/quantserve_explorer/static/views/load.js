// Load: live charts from `/metrics`.

import { request } from "../lib/api.js";
import { h, icon } from "../lib/dom.js";
import { explain } from "../lib/errors.js";
import { duration, figure, integer } from "../lib/format.js";
import { LoadSeries } from "../lib/load.js";

const EVERY_MS = 3000;
const SHOWN_S = 600;
const SHORTEST_S = 120;
const HEIGHT = 150;
const COLOURS = 8;
const DASH = [4, 4];
const WHOLE = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000];
const ms = (seconds) => duration(seconds === null || seconds === undefined ? undefined : seconds * 1000);
const CHARTS = [
  { title: "Requests running", fields: ["running"], unit: integer, whole: true },
  { title: "Requests queued", fields: ["queued"], unit: integer, whole: true },
  { title: "Requests per second", note: "dashed: refused with 429", fields: ["requests", "busy"], unit: figure },
  { title: "Output tokens per second", fields: ["tokens"], unit: figure },
  { title: "Time to first token", note: "median; dashed: p95", fields: ["ttft50", "ttft95"], unit: ms },
  { title: "Time per output token", note: "median; dashed: p95", fields: ["tpot50", "tpot95"], unit: ms },
];
const COLUMNS = [
  ["Running", "running", integer],
  ["Queued", "queued", integer],
  ["Requests/s", "requests", figure],
  ["429/s", "busy", figure],
  ["Tokens/s", "tokens", figure],
  ["TTFT p50", "ttft50", ms],
  ["TTFT p95", "ttft95", ms],
  ["TPOT p50", "tpot50", ms],
  ["TPOT p95", "tpot95", ms],
];

export function loadView(state) {
  const series = new LoadSeries(SHOWN_S);
  const left = new Set(); // models that the charts leave out
  let library = null;
  let timer = 0;
  let paused = false;
  let visible = false;
  const pause = h("button", { type: "button", "aria-pressed": "false", onclick: () => setPaused(!paused) }, icon("pause"), "Pause");
  const grafana = h("a", { hidden: true, target: "_blank", rel: "noreferrer noopener" }, "Grafana", icon("out"));
  const note = h("p", { class: "hint" }, `Every ${EVERY_MS / 1000} s from /metrics, the last ${SHOWN_S / 60} minutes. Rates are over 10 s, percentiles over 60 s.`);
  const problem = h("div", { class: "notice bad", hidden: true });
  const legend = h("ul", { class: "legend", "aria-label": "Models" });
  const body = h("tbody");
  const charts = CHARTS.map((chart) => {
    const plot = h("div", { class: "plot", role: "img", "aria-label": `${chart.title} over time; the table below has the present values` });
    return { ...chart, plot, drawn: null, element: h("section", { class: "card chart" }, h("h2", {}, chart.title, chart.note ? h("span", { class: "hint" }, chart.note) : null), plot) };
  });
  const limits = h("ul");
  const element = h(
    "div",
    { class: "view" },
    h("h1", { class: "hidden" }, "Load"),
    h("div", { class: "row bar-top" }, legend, h("div", { class: "row" }, grafana, pause)),
    problem,
    h("div", { class: "charts" }, charts.map((chart) => chart.element)),
    h(
      "div",
      { class: "scroll", role: "region", "aria-label": "Present values", tabindex: "0" },
      h("table", {}, h("caption", { class: "hidden" }, "Present values"), h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Now"), COLUMNS.map(([name]) => h("th", { scope: "col", class: "number" }, name)))), body),
    ),
    note,
    h(
      "section",
      { class: "card" },
      h("h2", {}, "What 429 means"),
      h("p", {}, "A replica runs a limited number of requests at a time; further ones wait in the gateway's queue. A request beyond both limits, or one that waits longer than queue_timeout_s, gets 429 at once. Nothing is broken: the header Retry-After has the seconds until the queue has room at the present rate."),
      limits,
      h("p", {}, "Clients should wait that long and retry. If it happens often, add replicas (autoscaling_config), raise max_ongoing_requests up to the engine's max_num_seqs, or let more requests wait (max_queued_requests)."),
    ),
  );

  function setPaused(value) {
    paused = value;
    pause.setAttribute("aria-pressed", String(paused));
    if (!paused) tick();
  }

  async function tick() {
    clearTimeout(timer);
    if (!visible || paused) return;
    if (!document.hidden) {
      try {
        const response = await request("metrics", { quiet: state.error?.status === 401 });
        series.add(Date.now() / 1000, await response.text());
        problem.hidden = true;
        draw();
      } catch (error) {
        const { title, detail, todo } = explain(error);
        problem.replaceChildren(h("strong", {}, title), h("p", {}, detail), h("p", {}, todo));
        problem.hidden = false;
      }
    }
    clearTimeout(timer);
    timer = setTimeout(tick, EVERY_MS);
  }

  function draw() {
    const models = [...series.models.keys()];
    if (legend.children.length !== models.length) {
      legend.replaceChildren(...models.map((model, i) => h("li", {}, entry(model, i))));
    }
    body.replaceChildren(
      ...models.map((model) => h("tr", {}, h("th", { scope: "row" }, model), COLUMNS.map(([, field, unit]) => h("td", { class: "number" }, unit(series.models.get(model)[field].at(-1)))))),
    );
    if (library) for (const chart of charts) plot(chart, models);
  }

  /** A model of the legend; a click leaves its lines out, or draws them again. */
  function entry(model, i) {
    const toggle = ({ currentTarget }) => {
      if (!left.delete(model)) left.add(model);
      currentTarget.setAttribute("aria-pressed", String(!left.has(model)));
      redraw();
    };
    return h("button", { type: "button", class: "quiet", "aria-pressed": String(!left.has(model)), title: "Show or hide its lines", onclick: toggle }, h("span", { class: `swatch c${i % COLOURS}`, "aria-hidden": "true" }), model);
  }

  function plot(chart, models) {
    const data = [series.times, ...models.flatMap((model) => chart.fields.map((field) => series.models.get(model)[field]))];
    const width = chart.plot.clientWidth;
    if (!width) return;
    if (chart.drawn && chart.models === models.length) {
      chart.drawn.setSize({ width, height: HEIGHT });
      chart.drawn.setData(data);
      return;
    }
    chart.drawn?.destroy();
    chart.models = models.length;
    const css = getComputedStyle(document.documentElement);
    const paint = (name) => resolved(css.getPropertyValue(name));
    const axis = { stroke: paint("--muted"), grid: { stroke: paint("--line"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    chart.drawn = new library(
      {
        width,
        height: HEIGHT,
        padding: [8, 24, 0, 0], // half of the last time fits
        legend: { show: false },
        cursor: { drag: { x: false, y: false }, points: { size: 6 } },
        scales: { x: { range: (_, __, max) => [Math.min(series.times[0], max - SHORTEST_S), max] }, y: { range: (_, __, max) => [0, max > 0 ? max * 1.15 : 1] } },
        axes: [
          { ...axis, size: 24, space: 64, values: (plotted, ticks) => ticks.map((tick) => clock(tick, plotted.scales.x)) },
          { ...axis, size: 58, space: 32, incrs: chart.whole ? WHOLE : undefined, values: (_, ticks) => ticks.map((tick) => short(tick, chart.unit)) },
        ],
        series: [
          {},
          ...models.flatMap((model, i) =>
            chart.fields.map((field, j) => ({ label: model, show: !left.has(model), stroke: paint(`--c${i % COLOURS}`), width: 1.75, dash: j ? DASH : undefined, points: { show: true, filter: alone } })),
          ),
        ],
      },
      data,
      chart.plot,
    );
  }

  function redraw() {
    for (const chart of charts) {
      chart.drawn?.destroy();
      chart.drawn = null;
    }
    draw();
  }

  async function start() {
    try {
      if (!library) {
        document.head.append(h("link", { rel: "stylesheet", href: new URL("../vendor/uplot/uPlot.min.css", import.meta.url).href }));
        ({ default: library } = await import("../vendor/uplot/uPlot.esm.js"));
      }
    } catch {
      problem.replaceChildren(h("strong", {}, "The charts could not be loaded"), h("p", {}, "The table below is complete."));
      problem.hidden = false;
    }
    draw();
  }

  document.addEventListener("themechange", () => visible && redraw());
  addEventListener("resize", () => visible && draw());

  return {
    element,
    show() {
      if (visible) return;
      visible = true;
      start();
      tick();
    },
    hide() {
      visible = false;
      clearTimeout(timer);
    },
    update() {
      const url = state.settings?.grafana_url;
      grafana.hidden = !/^https?:\/\//.test(url ?? "");
      if (!grafana.hidden) grafana.href = url;
      const count = (number, what) => (number < 0 ? `any number ${what}` : `${integer(number)} ${what}`);
      limits.replaceChildren(
        ...(state.status?.models ?? []).map(({ id, limits: { ongoing, queued }, replicas }) =>
          h("li", {}, h("strong", {}, id), `: ${count(ongoing, "running")} on each of ${integer(replicas.length)} ${replicas.length === 1 ? "replica" : "replicas"}, ${count(queued, "queued")}.`),
        ),
      );
    },
  };
}

/** The points that no line reaches. */
function alone(plot, index) {
  const points = plot.data[index];
  const known = (i) => points[i] !== null && points[i] !== undefined;
  return [...points.keys()].filter((i) => known(i) && !known(i - 1) && !known(i + 1));
}

/** A value of an axis: 60 ms instead of 60.0 ms. */
const short = (tick, unit) => (tick === 0 ? "0" : unit(tick).replace(/\.0+(?=\D|$)/, ""));

/** Time of day, with seconds where the axis is short. */
function clock(time, { min, max }) {
  const seconds = max - min < 300 ? { second: "2-digit" } : {};
  return new Date(time * 1000).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit", ...seconds });
}

/** A colour as a canvas knows it: `light-dark()` is only resolved in a property. */
function resolved(colour) {
  const probe = h("span");
  probe.style.color = colour;
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}
