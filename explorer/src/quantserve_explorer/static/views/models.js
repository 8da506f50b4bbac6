// Models: a row per model, and everything about one of them.

import { costPerMillion } from "../lib/cost.js";
import { h, icon, term } from "../lib/dom.js";
import { explain } from "../lib/errors.js";
import { bytes, duration, figure, integer, money, percent, plain, UNKNOWN } from "../lib/format.js";

const SEVERITIES = ["error", "warning", "info"];

export function modelsView(state) {
  let chosen = null;
  let focus = false;
  let drawn = "";
  const body = h("tbody");
  const heads = ["Model", "State", "Method", "Weights", "KV cache", "Length", "TTFT", "TPOT", "Tokens/s", "Perplexity", "Findings"];
  const costHead = h("th", { scope: "col", class: "number", hidden: true }, "Cost/M");
  const table = h(
    "div",
    { class: "scroll", role: "region", "aria-label": "Models", tabindex: "0" },
    h(
      "table",
      { class: "models" },
      h("caption", { class: "hidden" }, "Models of this server. Figures are the mean of the last minutes, below it the expected one"),
      h("thead", {}, h("tr", {}, heads.map((head, i) => h("th", { scope: "col", class: i > 2 && i < 9 ? "number" : null }, head)), costHead)),
      body,
    ),
  );
  const details = h("section", { class: "details", "aria-labelledby": "model-title", hidden: true });
  const message = h("p", { class: "empty" }, "Loading the models…");
  const legend = h("p", { class: "hint", hidden: true }, "TTFT, TPOT and tokens/s: observed over the last 5 minutes; below, what is expected for the load in the details.");
  const element = h("div", { class: "view" }, h("h1", { class: "hidden" }, "Models"), message, table, legend, details);
  table.hidden = true;

  function draw() {
    if (!state.status) {
      message.textContent = state.error ? `${explain(state.error).title}. ${explain(state.error).todo}` : "Loading the models…";
      return;
    }
    const { models } = state.status;
    const { settings } = state;
    const key = JSON.stringify([models, settings, chosen]);
    if (key === drawn) return; // a reader's selection and focus stay
    drawn = key;
    message.hidden = true;
    table.hidden = legend.hidden = false;
    const priced = settings?.price_per_hour !== null && settings?.price_per_hour !== undefined;
    costHead.hidden = !priced;
    const focused = document.activeElement?.closest?.(".models a")?.getAttribute("href");
    body.replaceChildren(...models.map((model) => row(model, chosen, priced ? settings : null)));
    if (focused) body.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus();
    const model = models.find(({ id }) => id === chosen);
    details.hidden = chosen === null;
    if (chosen === null) return;
    const open = [...details.querySelectorAll("details[open]")].map((one) => one.dataset.name);
    if (model) details.replaceChildren(...about(model, settings));
    else details.replaceChildren(h("h2", { id: "model-title", tabindex: "-1" }, chosen), h("p", { class: "empty" }, "This model is not served here."));
    for (const one of details.querySelectorAll("details")) if (open.includes(one.dataset.name)) one.open = true;
    if (focus) {
      focus = false;
      details.querySelector("h2").focus();
      details.scrollIntoView({ block: "start" });
    }
  }

  return {
    element,
    show(rest) {
      const id = rest ? decoded(rest) : null;
      focus = id !== null && id !== chosen;
      chosen = id;
    },
    update: draw,
  };
}

/** A part of an address; as it is where its escapes are wrong. */
function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

const number = (...content) => h("td", { class: "number" }, ...content);
const pair = (observed, expected) => number(observed, h("span", { class: "expected" }, expected));

function row(model, chosen, settings) {
  const { expected, observed, quality } = model;
  const counts = SEVERITIES.map((severity) => [severity, model.findings.filter((finding) => finding.severity === severity).length]).filter(([, count]) => count);
  return h(
    "tr",
    { "aria-current": model.id === chosen ? "true" : null },
    h("th", { scope: "row" }, h("a", { href: `#models/${encodeURIComponent(model.id)}` }, model.id)),
    h("td", {}, pill(model.state), h("span", { class: "expected" }, replicaCount(model))),
    h("td", {}, model.method, h("span", { class: "expected" }, model.bits ? `${model.bits} bit` : "")),
    number(bytes(model.weights_bytes)),
    pair(bytes(model.kv_cache_bytes), model.kv_cache_tokens ? `${integer(model.kv_cache_tokens)} tokens` : ""),
    number(integer(model.max_model_len)),
    pair(duration(observed?.ttft_ms), hint(expected?.ttft_ms, duration)),
    pair(duration(observed?.tpot_ms), hint(expected?.tpot_ms, duration)),
    pair(figure(observed?.tokens_per_s), hint(expected?.tokens_per_s, figure)),
    h("td", {}, qualityText(quality), h("span", { class: "expected" }, quality ? (quality.measured ? "measured" : "published") : "")),
    h("td", {}, counts.length ? h("span", { class: "pills" }, counts.map(([severity, count]) => h("span", { class: `pill ${severity}` }, `${count} ${severity}`))) : h("span", { class: "hint" }, "none")),
    settings ? pair(money(costPerMillion(settings.price_per_hour, observed?.total_tokens_per_s), settings.currency), hint(expectedCost(expected, settings), (cost) => money(cost, settings.currency))) : null,
  );
}

const hint = (value, unit) => (value === null || value === undefined ? "" : `exp. ${unit(value)}`);
const pill = (state) => h("span", { class: `pill ${state}` }, state);
const bits = ({ bits: width, bits_per_weight: kept }) => [width && `${width} bit`, kept && kept !== width && `${figure(kept)} per weight`].filter(Boolean).join(", ");
const expectedTotal = (expected) => (expected?.tokens_per_s && expected.concurrency ? expected.tokens_per_s * expected.concurrency : null);
const expectedCost = (expected, settings) => costPerMillion(settings?.price_per_hour, expectedTotal(expected));

function replicaCount({ replicas, ongoing, queued }) {
  const ready = replicas.filter((replica) => replica.state === "ready").length;
  return [`${ready} of ${replicas.length} up`, ongoing && `${ongoing} running`, queued && `${queued} queued`].filter(Boolean).join(", ");
}

const qualityText = (quality) => (quality?.perplexity_ratio ? `×${quality.perplexity_ratio.toFixed(3)}` : UNKNOWN);

function about(model, settings) {
  const { expected, observed, quality, target } = model;
  const card = (title, ...content) => h("section", { class: "card" }, h("h3", {}, title), ...content);
  const cost = (tokensPerS) => money(costPerMillion(settings?.price_per_hour, tokensPerS), settings?.currency);
  const link = /^https?:\/\//.test(model.url ?? "") ? h("a", { href: model.url, rel: "noreferrer noopener", target: "_blank" }, model.url, icon("out")) : null;
  return [
    h("div", { class: "title" }, h("h2", { id: "model-title", tabindex: "-1" }, model.id), pill(model.state), h("a", { class: "quiet", href: "#models" }, icon("close"), "Close")),
    h("p", { class: "lead" }, model.description, model.description && link ? " " : null, link),
    h(
      "div",
      { class: "cards" },
      card(
        "Model",
        h(
          "dl",
          { class: "terms" },
          term("Method", [model.method, bits(model)].filter(Boolean).join(", ")),
          model.kernel ? term("Kernel", model.kernel) : null,
          term("Source", h("span", { class: "path" }, model.source)),
          model.revision ? term("Revision", model.revision) : null,
          term("Target", target ? [target.name ?? plain(target), target.count > 1 ? `${target.count} devices` : "", target.memory_bytes ? bytes(target.memory_bytes) : ""].filter(Boolean).join(", ") : UNKNOWN),
          term("Activations", model.dtype ?? UNKNOWN),
          term("Tensor parallel", integer(model.tensor_parallel_size)),
          term("Context length", `${integer(model.max_model_len)} tokens`),
          term("Weights", bytes(model.weights_bytes)),
          term("KV cache", `${bytes(model.kv_cache_bytes)}, ${integer(model.kv_cache_tokens)} tokens`),
          model.plugins?.length ? term("Plugins", model.plugins.map((plugin) => `${plugin.name} ${plugin.version}`).join(", ")) : null,
          model.adapters.length ? term("LoRA adapters", model.adapters.join(", ")) : null,
        ),
      ),
      card(
        "Performance",
        h(
          "table",
          {},
          h("thead", {}, h("tr", {}, h("td"), ["Observed", "Expected", "Alone"].map((head) => h("th", { scope: "col", class: "number" }, head)))),
          h(
            "tbody",
            {},
            [["TTFT", "ttft_ms", duration], ["TPOT", "tpot_ms", duration], ["Tokens/s per request", "tokens_per_s", figure]].map(([name, key, unit]) =>
              h("tr", {}, h("th", { scope: "row" }, name), [observed, expected, expected?.alone].map((figures) => number(unit(figures?.[key])))),
            ),
            h("tr", {}, h("th", { scope: "row" }, "Tokens/s of all"), number(figure(observed?.total_tokens_per_s)), number(figure(expectedTotal(expected))), number("")),
            settings?.price_per_hour !== null && settings
              ? h("tr", {}, h("th", { scope: "row" }, "Cost per million tokens"), number(cost(observed?.total_tokens_per_s)), number(money(expectedCost(expected, settings), settings.currency)), number(cost(expected?.alone?.tokens_per_s)))
              : null,
          ),
        ),
        h("p", { class: "hint" }, observed ? `Observed: ${integer(observed.requests)} ${observed.requests === 1 ? "request" : "requests"} in ${duration(observed.window_s * 1000)}.` : "Observed: no request has completed yet."),
        expected ? h("p", { class: "hint" }, expectation(expected)) : h("p", { class: "hint" }, "No expectation: quantserve predict or bench makes one."),
      ),
      card(
        "Quality",
        quality
          ? [
              h(
                "dl",
                { class: "terms" },
                term("Perplexity", quality.perplexity_ratio ? `×${quality.perplexity_ratio.toFixed(3)} of the reference's` : UNKNOWN),
                quality.measured ? term("KL divergence", quality.kl_mean === null ? UNKNOWN : `${figure(quality.kl_mean)} nats per token`) : null,
                quality.measured ? term("Same top token", percent(quality.same_top)) : null,
                quality.reference ? term("Reference", quality.reference) : null,
              ),
              h("p", { class: "hint" }, quality.measured ? `Measured: ${quality.source}.` : `Published for another model (${quality.text ?? "not named"}): ${quality.source}.`),
            ]
          : h("p", { class: "hint" }, "Not measured. `quantserve quality` compares the model with its original."),
      ),
      card(
        "Replicas",
        model.replicas.length
          ? h(
              "table",
              {},
              h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Replica"), h("th", { scope: "col" }, "State"), h("th", { scope: "col", class: "number" }, "Running"))),
              h("tbody", {}, model.replicas.map((replica) => h("tr", {}, h("th", { scope: "row", class: "path" }, replica.id.split("#").at(-1)), h("td", {}, pill(replica.state)), number(integer(replica.ongoing))))),
            )
          : h("p", { class: "hint" }, "No replica."),
        h("p", { class: "hint" }, `Limits: ${limit(model.limits.ongoing)} running per replica, ${limit(model.limits.queued)} queued.`),
      ),
    ),
    h(
      "section",
      { class: "card" },
      h("h3", {}, "Findings"),
      model.findings.length ? h("ul", { class: "findings" }, [...model.findings].sort((a, b) => SEVERITIES.indexOf(a.severity) - SEVERITIES.indexOf(b.severity)).map(finding)) : h("p", { class: "hint" }, "quantserve check finds nothing to say about this model."),
    ),
    settingsTable("Engine arguments", model.engine_arguments),
    settingsTable("Environment", model.environment),
  ];
}

function expectation({ concurrency, source, conditions, alone }) {
  const load = concurrency ? ` at ${integer(concurrency)} users` : "";
  return `Expected${load} (${source}): ${conditions ?? "no conditions given"}.${alone ? " Alone: one request at a time." : ""}`;
}

const limit = (count) => (count < 0 ? "any number" : integer(count));

function finding({ code, severity, message, where, fix }) {
  const places = [where ?? []].flat();
  return h(
    "li",
    {},
    h("p", {}, h("span", { class: `pill ${severity}` }, severity), " ", h("code", {}, code)),
    h("p", {}, message),
    places.length ? h("p", { class: "hint path" }, places.slice(0, 6).join(", "), places.length > 6 ? ` and ${places.length - 6} more` : "") : null,
    fix ? h("p", {}, h("strong", {}, "Fix: "), fix) : null,
  );
}

function settingsTable(title, settings) {
  if (!settings.length) return null;
  return h(
    "details",
    { class: "card", "data-name": title },
    h("summary", {}, h("h3", {}, title), h("span", { class: "hint" }, String(settings.length))),
    h(
      "div",
      { class: "scroll", role: "region", "aria-label": title, tabindex: "0" },
      h(
        "table",
        {},
        h("thead", {}, h("tr", {}, ["Name", "Value", "Set by"].map((head) => h("th", { scope: "col" }, head)))),
        h("tbody", {}, settings.map(({ name, value, set_by: by }) => h("tr", {}, h("th", { scope: "row" }, h("code", {}, name)), h("td", { class: "path" }, h("code", {}, plain(value))), h("td", {}, by)))),
      ),
    ),
  );
}
