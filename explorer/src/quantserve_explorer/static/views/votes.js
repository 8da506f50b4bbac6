// Votes: win rates with their intervals.

import { getJson, request } from "../lib/api.js";
import { download, h, icon } from "../lib/dom.js";
import { explain } from "../lib/errors.js";
import { figure, integer, percent } from "../lib/format.js";

export function votesView(state) {
  const body = h("div", { class: "view" }, h("p", { class: "empty" }, "Loading the votes…"));
  const save = h("button", { type: "button", hidden: true, onclick: exportAll }, icon("download"), "Save CSV");
  const element = h("div", { class: "view" }, h("div", { class: "row bar-top" }, h("h1", {}, "Votes"), save), body);

  async function show() {
    try {
      const { votes, methods, models } = await getJson("explorer/votes");
      save.hidden = !votes;
      if (!votes) return body.replaceChildren(h("p", { class: "empty" }, "No votes yet. ", h("a", { href: "#compare" }, "Compare models"), " and choose the better answer."));
      body.replaceChildren(
        h("p", { class: "hint" }, `${integer(votes)} ${votes === 1 ? "vote" : "votes"}. The winner of a vote beats each of the others; a tie is half a win. The bar is the 95 % interval.`),
        table("Methods", methods),
        table("Models", models),
      );
    } catch (error) {
      const { title, detail, todo } = explain(error);
      body.replaceChildren(h("div", { class: "notice bad" }, h("strong", {}, title), h("p", {}, detail), h("p", {}, todo)));
    }
  }

  async function exportAll() {
    download("explorer-votes.csv", await (await request("explorer/votes.csv")).text(), "text/csv");
  }

  return { element, show: () => state.settings && show(), update: () => body.querySelector(".empty") && state.settings && show() };
}

function table(title, rows) {
  return h(
    "section",
    { class: "card" },
    h("h2", {}, title),
    h(
      "div",
      { class: "scroll", role: "region", "aria-label": title, tabindex: "0" },
      h(
        "table",
        { class: "votes" },
        h("thead", {}, h("tr", {}, h("th", { scope: "col" }, title.slice(0, -1)), h("th", { scope: "col", class: "number" }, "Win rate"), h("th", { scope: "col" }, "95 % interval"), h("th", { scope: "col", class: "number" }, "Won"), h("th", { scope: "col", class: "number" }, "Meetings"), h("th", { scope: "col", class: "number" }, "Votes"))),
        h(
          "tbody",
          {},
          rows.map((row) =>
            h(
              "tr",
              {},
              h("th", { scope: "row" }, row.name, row.method ? h("span", { class: "expected" }, row.method) : null),
              h("td", { class: "number" }, percent(row.win_rate)),
              h("td", {}, interval(row)),
              h("td", { class: "number" }, figure(row.won)),
              h("td", { class: "number" }, integer(row.meetings)),
              h("td", { class: "number" }, integer(row.votes)),
            ),
          ),
        ),
      ),
    ),
  );
}

function interval({ low, high, win_rate: rate }) {
  const range = h("span", { class: "range" });
  const point = h("span", { class: "point" });
  range.style.insetInlineStart = `${low * 100}%`;
  range.style.inlineSize = `${(high - low) * 100}%`;
  point.style.insetInlineStart = `${rate * 100}%`;
  return [h("span", { class: "interval", "aria-hidden": "true" }, range, point), h("span", { class: "expected" }, `${percent(low)} to ${percent(high)}`)];
}
