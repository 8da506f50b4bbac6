// Compare: one prompt, up to four models.

import { request } from "../lib/api.js";
import { announce, download, h, icon } from "../lib/dom.js";
import { explain } from "../lib/errors.js";
import { Run } from "../lib/run.js";
import { comparison, fromQuery, toMarkdown, toQuery } from "../lib/share.js";
import { Column } from "./column.js";

const MOST = 4;
const FIRST = 3;
const EXAMPLES = [
  ["What does str.join do?", "What does str.join do?"],
  ["Prime numbers", "Write a Python function that returns the prime numbers below n, and explain it in two sentences."],
  ["Reasoning", "Anna is twice as old as Ben was when Anna was as old as Ben is now. Ben is 24. How old is Anna?"],
  ["Story", "Tell a story of five sentences about a lighthouse keeper who finds a letter."],
  ["JSON", "List three European capitals as a JSON array of objects with the fields city, country and population."],
];

const LEGEND = "TTFT: time to the first token, as seen here. TPOT: time per further token. exp.: expected for one request alone.";
const PRICED = " /M alone: cost of a million tokens if the request had the machine alone.";

export function compareView(state) {
  const columns = [];
  const plain = new Set(); // models without a chat template
  let round = null; // {question, secret, voted}
  let known = "";
  let wanted = null; // models of a link, before the list is known
  let drawing = false;
  let early = false; // asked to run before the models were known

  const prompt = h("textarea", { id: "prompt", rows: "3", placeholder: "Ask something", spellcheck: "true" });
  const system = h("textarea", { id: "system", rows: "2", placeholder: "None" });
  const field = (id, label, attributes) => {
    const input = h("input", { id, type: "number", ...attributes });
    return [input, h("div", { class: "field" }, h("label", { for: id }, label), input)];
  };
  const [temperature, temperatureField] = field("temperature", "Temperature", { value: "0", min: "0", max: "2", step: "0.1", required: true });
  const [maxTokens, maxTokensField] = field("max-tokens", "Max tokens", { value: "128", min: "1", step: "1", required: true });
  const [seed, seedField] = field("seed", "Seed", { placeholder: "none", step: "1", min: "0" });
  const blind = h("input", { type: "checkbox", id: "blind", onchange: () => draw() });
  const blindField = h("label", { class: "check", hidden: true }, blind, "Blind: hide names until a vote");
  const chips = h("div", { class: "chips", role: "group", "aria-label": "Models to compare, up to four" });
  const runButton = h("button", { type: "submit", class: "primary" }, icon("run"), "Run");
  const stopButton = h("button", { type: "button", onclick: stop, hidden: true }, icon("stop"), "Stop");
  const grid = h("div", { class: "columns" });
  const vote = h("div", { class: "vote", hidden: true });
  const notice = h("div", { class: "notice bad", hidden: true });
  const share = h(
    "div",
    { class: "row share", hidden: true, role: "group", "aria-label": "Share this comparison" },
    h("button", { type: "button", class: "quiet", onclick: (e) => copy(e.currentTarget, toMarkdown(shared())) }, icon("copy"), "Copy Markdown"),
    h("button", { type: "button", class: "quiet", onclick: () => download("comparison.json", JSON.stringify(shared(), null, 2), "application/json") }, icon("download"), "Save JSON"),
    h("button", { type: "button", class: "quiet", onclick: (e) => copy(e.currentTarget, link()) }, icon("link"), "Copy link"),
  );
  const legend = h("p", { class: "hint" }, LEGEND);
  const form = h(
    "form",
    { class: "card composer", novalidate: false },
    h("label", { for: "prompt", class: "hidden" }, "Prompt"),
    prompt,
    h(
      "div",
      { class: "row examples", role: "group", "aria-label": "Example prompts" },
      h("span", { class: "hint" }, "Try"),
      EXAMPLES.map(([name, text]) => h("button", { type: "button", class: "chip", onclick: () => ((prompt.value = text), prompt.focus()) }, name)),
    ),
    h("div", { class: "row models" }, h("span", { class: "hint" }, "Models"), chips, blindField),
    h(
      "div",
      { class: "row parameters" },
      temperatureField,
      maxTokensField,
      seedField,
      h("details", {}, h("summary", {}, "System prompt"), h("label", { for: "system", class: "hidden" }, "System prompt"), system),
      h("div", { class: "row go" }, h("span", { class: "hint keys", "aria-hidden": "true" }, h("kbd", {}, "Ctrl"), " ", h("kbd", {}, "Enter")), stopButton, runButton),
    ),
  );
  const element = h("div", { class: "view compare" }, h("h1", { class: "hidden" }, "Compare models"), form, notice, h("section", { "aria-labelledby": "answers" }, h("h2", { class: "hidden", id: "answers" }, "Answers"), grid), vote, h("div", { class: "row foot" }, legend, share));

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    runAll();
  });
  element.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      form.requestSubmit();
    } else if (event.key === "Escape" && columns.some((column) => column.run?.running)) {
      stop();
    }
  });

  const served = () => state.status?.models ?? [];
  const names = () => served().flatMap((model) => [model.id, ...model.adapters]);
  const modelOf = (name) => served().find((model) => model.id === name || model.adapters.includes(name));
  const canVote = () => Boolean(state.settings?.votes);
  const secret = () => (round ? round.secret && !round.voted : canVote() && blind.checked);
  const label = (column) => (secret() ? `Answer ${"ABCD"[columns.indexOf(column)]}` : column.name);
  const running = () => columns.some((column) => column.run?.running);

  function question() {
    return {
      prompt: prompt.value,
      system: system.value,
      temperature: temperature.valueAsNumber,
      maxTokens: maxTokens.valueAsNumber,
      seed: Number.isNaN(seed.valueAsNumber) ? null : seed.valueAsNumber,
    };
  }

  function runAll() {
    stop();
    early = !state.status;
    if (early) return announce("The list of models is still loading; the models are asked then.");
    if (!prompt.value.trim()) return complain("The prompt is empty. Write one, or take an example.", prompt);
    if (!columns.length) return complain("No model is chosen. Choose one to four above.", chips.querySelector("button"));
    notice.hidden = true;
    const hide = canVote() && blind.checked && columns.length > 1;
    round = { question: question(), secret: hide, voted: false };
    if (hide) shuffle(columns);
    announce(`Asking ${columns.length} ${columns.length === 1 ? "model" : "models"}.`);
    for (const column of columns) begin(column);
    arrange();
  }

  function complain(text, target) {
    notice.hidden = false;
    notice.replaceChildren(h("p", {}, text));
    announce(text);
    target?.focus();
  }

  async function begin(column) {
    const run = new Run(column.name, round.question, { chat: !plain.has(column.name), logprobs: true });
    column.start(run);
    for (const other of columns) other.difference = null;
    drawLoop();
    await run.execute();
    if (!run.ways.chat) plain.add(column.name);
    if (column.run !== run || !columns.includes(column)) return;
    const what = run.state === "failed" ? explain(run.error).title : run.state === "done" ? `${run.figures().tokens} tokens` : "stopped";
    announce(running() ? `${label(column)}: ${what}.` : `${label(column)}: ${what}. All answers have ended.`);
    draw();
  }

  function stop() {
    for (const column of columns) column.run?.stop();
  }

  function retry(column) {
    if (round) begin(column);
    draw();
  }

  function toggle(name) {
    const at = columns.findIndex((column) => column.name === name);
    if (at >= 0) columns.splice(at, 1)[0].run?.stop();
    else if (columns.length < MOST) columns.push(new Column(name, { retry, first, remove: (column) => toggle(column.name) }));
    else return complain("Four models are chosen. Remove one first.");
    notice.hidden = true;
    arrange();
  }

  function first(column) {
    columns.splice(columns.indexOf(column), 1);
    columns.unshift(column);
    for (const other of columns) other.difference = null;
    arrange();
    column.retry.focus();
  }

  function arrange() {
    grid.className = `columns n${columns.length}`;
    grid.replaceChildren(...columns.map((column) => column.element));
    draw();
  }

  function drawLoop() {
    if (drawing) return;
    drawing = true;
    const frame = () => {
      draw();
      if (running()) requestAnimationFrame(frame);
      else drawing = false;
    };
    requestAnimationFrame(frame);
  }

  function draw() {
    const hidden = secret();
    const only = columns.length === 1;
    for (const column of columns) {
      column.draw({ reference: columns[0], model: modelOf(column.name), label: label(column), secret: hidden, only, settings: state.settings });
    }
    const busy = running();
    stopButton.hidden = !busy;
    runButton.disabled = busy;
    share.hidden = busy || hidden || !columns.some((column) => column.run);
    drawChips();
    drawVote(busy);
  }

  function drawChips() {
    const list = names();
    if (known !== list.join("\n")) {
      known = list.join("\n");
      chips.replaceChildren(
        ...list.map((name) => h("button", { type: "button", class: "chip", "data-name": name, onclick: () => toggle(name) }, name)),
      );
    }
    const hidden = Boolean(round?.secret && !round.voted && columns.some((column) => column.run));
    for (const chip of chips.children) {
      chip.setAttribute("aria-pressed", String(columns.some((column) => column.name === chip.dataset.name)));
      chip.disabled = hidden && running();
      const model = modelOf(chip.dataset.name);
      chip.dataset.state = model.state;
      chip.title = `${[model.method, model.bits && `${model.bits} bit`].filter(Boolean).join(", ")}; ${model.state}`;
    }
  }

  function drawVote(busy) {
    const answered = columns.filter((column) => column.run?.state === "done");
    vote.hidden = !canVote() || busy || answered.length < 2 || !round;
    if (vote.hidden) return void (vote.dataset.key = "");
    const key = `${round.voted} ${answered.map((column) => column.name).join("\n")}`;
    if (vote.dataset.key === key) return;
    vote.dataset.key = key;
    if (round.voted) return vote.replaceChildren(h("p", {}, round.voted, " ", h("a", { href: "#votes" }, "See all votes")));
    vote.replaceChildren(
      h("strong", { id: "vote-title" }, "Which answer is better?"),
      h(
        "div",
        { class: "row", role: "group", "aria-labelledby": "vote-title" },
        answered.map((column) => h("button", { type: "button", onclick: () => cast(answered, column) }, label(column))),
        h("button", { type: "button", onclick: () => cast(answered, null) }, "Tie"),
      ),
    );
  }

  async function cast(answered, winner) {
    const body = {
      models: answered.map((column) => column.name),
      winner: winner?.name ?? null,
      blind: round.secret,
      prompt: round.question.prompt,
    };
    try {
      const { votes } = await (await request("explorer/votes", { body })).json();
      round.voted = `${winner ? `Your vote: ${winner.name}.` : "Your vote: a tie."} ${votes} ${votes === 1 ? "vote" : "votes"} so far.`;
      announce(round.voted);
      draw();
    } catch (error) {
      const { title, detail } = explain(error);
      complain(`The vote was not stored. ${title}: ${detail}`);
    }
  }

  function shared() {
    const answers = columns
      .filter((column) => column.run)
      .map((column) => {
        const { run } = column;
        const figures = run.figures();
        const model = modelOf(column.name);
        return {
          model: column.name,
          method: model?.method ?? null,
          bits: model?.bits ?? null,
          text: run.text,
          reasoning: run.reasoning || null,
          ttft_ms: figures.ttft,
          tpot_ms: figures.tpot,
          tokens_per_s: figures.tokensPerS,
          tokens: figures.tokens,
          expected: model?.expected ?? null,
          finish_reason: run.finish,
          error: run.error && { status: run.error.status, code: run.error.code, message: run.error.message },
          first_difference: column === columns[0] ? null : column.differenceFrom(columns[0]),
        };
      });
    return comparison(round.question, answers, state.status?.version ?? "");
  }

  const link = () => `${location.href.split("#")[0]}#compare?${toQuery(round.question, columns.map((column) => column.name))}`;

  function choose(list) {
    for (const name of list.slice(0, MOST)) if (!columns.some((column) => column.name === name)) toggle(name);
  }

  return {
    element,
    show(query, _rest, changed) {
      if (query) {
        const given = fromQuery(query);
        if (given.prompt !== null) prompt.value = given.prompt;
        if (given.system !== null) system.value = given.system;
        if (given.system) system.closest("details").open = true;
        if (given.temperature !== null) temperature.valueAsNumber = given.temperature;
        if (given.maxTokens !== null) maxTokens.valueAsNumber = given.maxTokens;
        if (given.seed !== null) seed.valueAsNumber = given.seed;
        wanted = given.models.length ? given.models : wanted;
      }
      if (changed && !columns.length) prompt.focus({ preventScroll: true });
    },
    update() {
      legend.textContent = LEGEND + (state.settings?.price_per_hour == null ? "" : PRICED);
      if (state.settings && blindField.hidden && state.settings.votes) {
        blindField.hidden = false;
        blind.checked = state.settings.blind;
      }
      if (state.status && wanted) {
        const available = wanted.filter((name) => names().includes(name));
        while (columns.length) columns.pop().run?.stop();
        choose(available);
        if (available.length < wanted.length) complain(`Not served here: ${wanted.filter((name) => !available.includes(name)).join(", ")}.`);
        wanted = null;
      } else if (state.status && !known) {
        choose(served().slice(0, FIRST).map((model) => model.id));
      }
      if (!state.status) {
        const text = state.error ? `${explain(state.error).title}. ${explain(state.error).todo}` : "Loading the list of models…";
        grid.replaceChildren(h("p", { class: "empty" }, text));
        return;
      }
      draw();
      if (early) runAll();
    },
  };
}

function shuffle(list) {
  for (let i = list.length - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [list[i], list[j]] = [list[j], list[i]];
  }
}

async function copy(button, text) {
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = h("textarea", { class: "hidden", value: text }); // pages without TLS have no clipboard
    document.body.append(area);
    area.select();
    done = document.execCommand("copy");
    area.remove();
    button.focus();
  }
  announce(done ? "Copied." : "The browser does not allow copying.");
  button.classList.toggle("done", done);
  setTimeout(() => button.classList.remove("done"), 1500);
}
