// One answer of a comparison: figures, text, the first difference from the reference.

import { costPerMillion } from "../lib/cost.js";
import { distributions, divergence, meanShift } from "../lib/divergence.js";
import { h, icon } from "../lib/dom.js";
import { explain } from "../lib/errors.js";
import { duration, figure, integer, money, percent, visible } from "../lib/format.js";

const ROWS = 5;
const FINISHED = { stop: "complete", length: "cut at max tokens" };

export class Column {
  run = null;
  difference = null;
  #drawn = null;

  /**
   * @param {string} name of the model, as clients give it.
   * @param {{retry, remove, first}} actions called with this column.
   */
  constructor(name, actions) {
    this.name = name;
    this.title = h("h3", {}, name);
    this.badge = h("span", { class: "badge" });
    this.retry = h("button", { type: "button", class: "quiet", onclick: () => actions.retry(this) }, icon("retry"));
    this.first = h("button", { type: "button", class: "quiet", title: "Compare the others with this one", onclick: () => actions.first(this) }, icon("first"));
    this.remove = h("button", { type: "button", class: "quiet", title: "Remove", onclick: () => actions.remove(this) }, icon("close"));
    this.values = {};
    this.figures = h(
      "dl",
      { class: "figures" },
      [["ttft", "TTFT"], ["tpot", "TPOT"], ["tokensPerS", "Tokens/s"], ["tokens", "Tokens"]].map(([key, label]) => {
        const value = h("span", { class: "value" }, "–");
        const expected = h("span", { class: "expected" });
        this.values[key] = { value, expected };
        return h("div", {}, h("dt", {}, label), h("dd", {}, value, expected));
      }),
    );
    this.parts = ["", "", ""].map((text) => document.createTextNode(text));
    this.mark = h("mark", { hidden: true }, this.parts[1]);
    this.reasoning = h("p", { class: "reasoning", hidden: true });
    this.text = h("p", {}, this.parts[0], this.mark, this.parts[2]);
    this.placeholder = h("p", { class: "empty" }, "The answer appears here.");
    this.answer = h("div", { class: "answer", tabindex: "0", role: "region" }, this.reasoning, this.text, this.placeholder);
    this.state = h("p", { class: "state" });
    this.problem = h("div", { class: "notice bad", hidden: true });
    this.details = h("div", { class: "difference", hidden: true });
    this.element = h(
      "article",
      { class: "column" },
      h("header", {}, h("div", { class: "name" }, this.title, this.badge), h("div", { class: "tools" }, this.retry, this.first, this.remove)),
      this.figures,
      this.answer,
      this.problem,
      this.state,
      this.details,
    );
  }

  start(run) {
    this.run = run;
    this.difference = null;
    this.#drawn = null;
    this.details.hidden = true;
  }

  /**
   * Draw the present state.
   *
   * @param {{reference: Column, model: object | undefined, label: string, secret: boolean, only: boolean, settings}} shown
   *   `secret` hides everything that tells which model answered.
   */
  draw({ reference, model, label, secret, only, settings }) {
    this.title.textContent = label;
    for (const [button, action] of [[this.retry, "Retry"], [this.first, "Make reference"], [this.remove, "Remove"]]) {
      button.setAttribute("aria-label", `${action}: ${label}`);
    }
    this.answer.setAttribute("aria-label", `Answer of ${label}`);
    const isReference = reference === this;
    this.badge.textContent = secret ? "" : [model && model.id !== this.name && `adapter of ${model.id}`, model?.method, model?.bits && `${model.bits} bit`].filter(Boolean).join(" · ");
    this.element.classList.toggle("reference", isReference && !only && !secret);
    this.first.hidden = isReference || only || secret;
    this.remove.hidden = only || secret;
    const { run } = this;
    this.retry.hidden = !run || run.running;
    this.answer.setAttribute("aria-busy", String(Boolean(run?.running)));
    this.answer.hidden = run?.state === "failed" && !run.tokens.length;
    const blank = !run || !(run.text + run.reasoning).trim();
    this.placeholder.hidden = !blank || run?.state === "streaming";
    this.placeholder.textContent = !run ? "The answer appears here." : run.state === "waiting" ? "Waiting for the first token…" : run.tokens.length ? "Only white space." : "No text.";
    this.text.hidden = blank;
    this.#drawFigures(model, secret, settings);
    if (!run) return;
    this.element.dataset.state = run.state;
    if (!isReference && !secret && reference.run) this.#compare(reference);
    else if (isReference) this.difference = null;
    this.#drawText(secret);
    this.#drawState(isReference && !only, secret);
    this.#drawProblem(secret);
    if (!isReference && !secret) this.#drawDifference(reference, label);
    else this.details.hidden = true;
  }

  #drawFigures(model, secret, settings) {
    const expected = model?.expected?.alone ?? model?.expected;
    const now = this.run && !secret ? this.run.figures() : {};
    const show = (key, text, hint) => {
      this.values[key].value.textContent = text;
      this.values[key].expected.textContent = secret ? "" : hint;
    };
    const hint = (value, unit) => (expected ? `exp. ${unit(value)}` : "");
    show("ttft", duration(now.ttft), hint(expected?.ttft_ms, duration));
    show("tpot", duration(now.tpot), hint(expected?.tpot_ms, duration));
    show("tokensPerS", figure(now.tokensPerS), hint(expected?.tokens_per_s, figure));
    const cost = costPerMillion(settings?.price_per_hour, now.tokensPerS);
    show("tokens", integer(this.run ? now.tokens : undefined), cost === null ? "" : `${money(cost, settings.currency)}/M alone`);
  }

  #compare(reference) {
    if (this.difference) return;
    const ended = this.run.state === "done" && reference.run.state === "done";
    this.difference = divergence(reference.run.tokens, this.run.tokens, ended);
  }

  #drawText(secret) {
    const { run } = this;
    const mark = secret ? null : this.difference;
    const drawn = `${run.text.length} ${run.reasoning.length} ${mark?.index}`;
    if (drawn === this.#drawn) return;
    this.#drawn = drawn;
    const atEnd = this.answer.scrollHeight - this.answer.scrollTop - this.answer.clientHeight < 24;
    this.reasoning.hidden = !run.reasoning;
    this.reasoning.textContent = run.reasoning;
    const tokens = run.tokens.map((token) => token.text);
    let before = mark ? tokens.slice(0, mark.index).join("") : run.text;
    if (run.reasoning && before.startsWith(run.reasoning)) before = before.slice(run.reasoning.length);
    const marked = mark && run.text.startsWith(before) ? (tokens[mark.index] ?? "") : null;
    if (marked === null) before = run.text;
    const length = marked === null ? 0 : Math.min(marked.length, run.text.length - before.length);
    this.parts[0].data = before;
    this.parts[1].data = run.text.slice(before.length, before.length + length);
    this.parts[2].data = run.text.slice(before.length + length);
    this.mark.hidden = length === 0;
    if (atEnd && run.running) this.answer.scrollTop = this.answer.scrollHeight;
  }

  #drawState(isReference, secret) {
    const { run } = this;
    const words = { waiting: "waiting", streaming: "answers…", stopped: "stopped", failed: "failed", done: FINISHED[run.finish] ?? run.finish };
    const notes = [isReference && !secret ? "reference" : "", words[run.state]];
    if (!run.ways.chat && !secret) notes.push("no chat template: prompt sent as plain text");
    if (!run.ways.logprobs && !secret) notes.push("no log-probabilities from this model");
    this.state.textContent = notes.filter(Boolean).join(" · ");
  }

  #drawProblem(secret) {
    const { error } = this.run;
    this.problem.hidden = !error;
    if (!error) return this.problem.replaceChildren();
    const { title, detail, todo } = explain(error);
    this.problem.replaceChildren(h("strong", {}, title), secret ? "" : h("p", {}, detail), h("p", {}, todo)); // details name the model
  }

  /** For the exports: where this answer differs from the reference's; null if it does not. */
  differenceFrom(reference) {
    if (!this.difference) return null;
    const { index, referenceIndex, comparable } = this.difference;
    const here = this.run.tokens[index];
    const there = reference.run.tokens[referenceIndex];
    const rows = comparable ? distributions(there, here) : [];
    return {
      from: reference.name,
      token: index,
      here: here?.text ?? "",
      there: there?.text ?? "",
      distributions: rows.map((row) => ({ token: row.text, here: row.other, there: row.reference })),
      mean_logprob_shift: comparable ? meanShift(reference.run.tokens, this.run.tokens, index) : null,
    };
  }

  #drawDifference(reference, label) {
    const other = reference.run;
    const key = `${this.difference?.index} ${this.run.state} ${other?.state} ${reference.name}`;
    if (this.details.dataset.key === key) return;
    this.details.dataset.key = key;
    const found = this.differenceFrom(reference);
    if (!found) {
      const same = this.run.state === "done" && other?.state === "done";
      this.details.hidden = !same;
      this.details.replaceChildren(h("p", {}, h("strong", {}, "Same answer"), ` as ${reference.name}, token by token.`));
      return;
    }
    const sampled = this.run.question.temperature > 0;
    this.details.hidden = false;
    this.details.replaceChildren(
      h("p", {}, h("strong", {}, `Differs from token ${found.token + 1} on`)),
      found.distributions.length ? table(found, label, reference.name) : h("p", {}, h("code", {}, visible(found.here)), " here, ", h("code", {}, visible(found.there)), ` in ${reference.name}`),
      found.mean_logprob_shift === null || !found.token
        ? ""
        : h("p", { class: "hint" }, `Before it, the log-probability of a token moved by ${figure(found.mean_logprob_shift)} on average.`),
      this.difference.comparable ? "" : h("p", { class: "hint" }, "The tokens before differ, so the distributions cannot be compared."),
      sampled ? h("p", { class: "hint" }, `At temperature ${this.run.question.temperature} answers differ by chance, too; 0 shows the quantization.`) : "",
    );
  }
}

function table(found, here, there) {
  const cells = (value, kind) => {
    const bar = h("span", { class: `bar ${kind}` });
    bar.style.inlineSize = `${Math.round(100 * (value ?? 0))}%`; // by script: the page's policy forbids style attributes
    return h("td", { class: "number" }, value === null ? "–" : percent(value), h("span", { class: "track", "aria-hidden": "true" }, bar));
  };
  return h(
    "table",
    {},
    h("caption", { class: "hidden" }, `Likeliest tokens at the first difference of ${here} from ${there}`),
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "token"), h("th", { scope: "col" }, "here"), h("th", { scope: "col" }, "reference"))),
    h(
      "tbody",
      {},
      found.distributions.slice(0, ROWS).map((row) =>
        h(
          "tr",
          {},
          h("th", { scope: "row" }, h("code", { class: row.token === found.here ? "chosen" : row.token === found.there ? "other" : "" }, visible(row.token))),
          cells(row.here, "here"),
          cells(row.there, "there"),
        ),
      ),
    ),
  );
}
