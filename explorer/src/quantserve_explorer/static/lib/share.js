// A comparison as JSON, as Markdown and as a link.

import { duration, figure, percent, visible } from "./format.js";

/** @returns what `toMarkdown` and the JSON file have: figures in ms and tokens per second. */
export function comparison(question, answers, version, time = new Date()) {
  return {
    quantserve: version,
    time: time.toISOString(),
    prompt: question.prompt,
    system: question.system || null,
    temperature: question.temperature,
    max_tokens: question.maxTokens,
    seed: question.seed,
    answers,
  };
}

/** The comparison as a Markdown document. Texts are in fences that they cannot close. */
export function toMarkdown({ prompt, system, temperature, max_tokens, seed, answers, time, quantserve }) {
  const parts = ["## Prompt", fenced(prompt)];
  if (system) parts.push("System prompt:", fenced(system));
  parts.push(`Temperature ${temperature}, max tokens ${max_tokens}${seed === null ? "" : `, seed ${seed}`}.`);
  parts.push(
    [
      "| model | method | TTFT | TPOT | tokens/s | tokens |",
      "|---|---|---:|---:|---:|---:|",
      ...answers.map(
        (a) =>
          `| ${cell(a.model)} | ${cell(a.method ?? "")} | ${duration(a.ttft_ms)} | ${duration(a.tpot_ms)} | ` +
          `${figure(a.tokens_per_s)} | ${a.tokens} |`,
      ),
    ].join("\n"),
  );
  for (const answer of answers) {
    parts.push(`## ${cell(answer.model)}`);
    if (answer.text) parts.push(fenced(answer.text));
    if (answer.error) parts.push(`Error: ${cell(answer.error.message)}`);
    const different = answer.first_difference;
    if (different) {
      parts.push(
        `First difference from ${cell(different.from)} at token ${different.token + 1}: ${code(different.here)} here, ` +
          `${code(different.there)} there.`,
      );
      if (different.distributions?.length) {
        parts.push(
          [
            `| token | ${cell(answer.model)} | ${cell(different.from)} |`,
            "|---|---:|---:|",
            ...different.distributions.map((row) => `| ${code(row.token)} | ${percent(row.here)} | ${percent(row.there)} |`),
          ].join("\n"),
        );
      }
    }
  }
  parts.push(`quantserve ${quantserve}, ${time}`);
  return `${parts.join("\n\n")}\n`;
}

function fenced(text) {
  const longest = Math.max(2, ...(text.match(/`+/g) ?? []).map((run) => run.length));
  const fence = "`".repeat(longest + 1);
  return `${fence}text\n${text}\n${fence}`;
}

const cell = (text) => text.replace(/[\\|<>*_`[\]#&]/g, "\\$&").replace(/\s+/g, " ");

function code(text) {
  const shown = visible(text).replace(/\|/g, "\\|");
  const fence = "`".repeat(1 + Math.max(0, ...(shown.match(/`+/g) ?? []).map((run) => run.length)));
  return fence.length > 1 ? `${fence} ${shown} ${fence}` : `\`${shown}\``;
}

/** The question and the models as the part of an address after `#compare?`; never sent to a server. */
export function toQuery(question, models) {
  const query = new URLSearchParams();
  for (const model of models) query.append("model", model);
  query.set("prompt", question.prompt);
  if (question.system) query.set("system", question.system);
  query.set("temperature", question.temperature);
  query.set("max_tokens", question.maxTokens);
  if (question.seed !== null) query.set("seed", question.seed);
  return query.toString();
}

/** The inverse of `toQuery`; fields that are absent are null. */
export function fromQuery(text) {
  const query = new URLSearchParams(text);
  const number = (name) => (query.get(name) && Number.isFinite(Number(query.get(name))) ? Number(query.get(name)) : null);
  return {
    models: query.getAll("model"),
    prompt: query.get("prompt"),
    system: query.get("system"),
    temperature: number("temperature"),
    maxTokens: number("max_tokens"),
    seed: number("seed"),
  };
}
