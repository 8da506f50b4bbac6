// One request to one model: its body, its stream, its figures.

import { streamJson } from "./api.js";
import { ApiError } from "./errors.js";

const TOP = 5; // OpenAI's and vLLM's default limits allow more; five fit beside an answer

/**
 * @typedef {{prompt: string, system: string, temperature: number, maxTokens: number, seed: number | null}} Question
 */

/** Path and body of a request. Without `chat` the prompt is completed as plain text; the system prompt stands before it. */
export function requestOf(model, question, { chat, logprobs }) {
  const { prompt, system, temperature, maxTokens, seed } = question;
  const body = { model, temperature, max_tokens: maxTokens, stream: true, stream_options: { include_usage: true } };
  if (seed !== null) body.seed = seed;
  if (!chat) {
    if (logprobs) body.logprobs = TOP;
    return { path: "v1/completions", body: { ...body, prompt: system ? `${system}\n\n${prompt}` : prompt } };
  }
  if (logprobs) Object.assign(body, { logprobs: true, top_logprobs: TOP });
  const messages = [{ role: "user", content: prompt }];
  if (system) messages.unshift({ role: "system", content: system });
  return { path: "v1/chat/completions", body: { ...body, messages } };
}

/** What to ask without, after a refusal: the fields of `ways` that change; null if the refusal has another cause. */
export function waysAfter(error, ways) {
  if (error.status !== 400) return null;
  if (ways.chat && /chat.?template/i.test(error.message)) return { ...ways, chat: false };
  if (ways.logprobs && /logprobs/i.test(`${error.param} ${error.message}`)) return { ...ways, logprobs: false };
  return null;
}

/** Text, reasoning, tokens, finish reason and usage of one chunk of a stream. */
export function readChunk(chunk) {
  const choice = chunk.choices?.[0];
  const delta = choice?.delta ?? {};
  const text = delta.content ?? choice?.text ?? "";
  const reasoning = delta.reasoning ?? delta.reasoning_content ?? "";
  return {
    text,
    reasoning,
    tokens: tokensOf(choice?.logprobs) ?? (text || reasoning ? [{ text: text || reasoning, logprob: null, top: [] }] : []),
    finish: choice?.finish_reason ?? null,
    usage: chunk.usage ?? null,
  };
}

function tokensOf(logprobs) {
  if (logprobs?.content) {
    return logprobs.content.map(({ token, logprob, top_logprobs: top }) => ({
      text: token,
      logprob,
      top: (top ?? []).map((entry) => ({ text: entry.token, logprob: entry.logprob })),
    }));
  }
  if (logprobs?.tokens) {
    return logprobs.tokens.map((text, i) => ({
      text,
      logprob: logprobs.token_logprobs?.[i] ?? null,
      top: Object.entries(logprobs.top_logprobs?.[i] ?? {}).map(([name, logprob]) => ({ text: name, logprob })),
    }));
  }
  return null;
}

/** One answer, while it comes and after. `state`: waiting, streaming, done, stopped or failed. */
export class Run {
  state = "waiting";
  text = "";
  reasoning = "";
  tokens = [];
  usage = null;
  finish = null;
  error = null;
  started = performance.now();
  first = null;
  last = null;

  /** @param {{chat: boolean, logprobs: boolean}} ways what the model is asked with; changed by refusals. */
  constructor(model, question, ways) {
    Object.assign(this, { model, question, ways });
    this.controller = new AbortController();
  }

  get running() {
    return this.state === "waiting" || this.state === "streaming";
  }

  stop() {
    this.controller.abort();
  }

  /** Ends when the answer is complete, stopped or failed; never throws. */
  async execute() {
    try {
      for (;;) {
        try {
          await this.#stream();
          break;
        } catch (error) {
          const ways = error instanceof ApiError && !this.tokens.length ? waysAfter(error, this.ways) : null;
          if (!ways) throw error;
          this.ways = ways;
        }
      }
      this.state = "done";
    } catch (error) {
      this.state = error.name === "AbortError" ? "stopped" : "failed";
      if (this.state === "failed") this.error = error instanceof ApiError ? error : new ApiError(0, { message: String(error) });
    }
    return this;
  }

  async #stream() {
    this.started = performance.now();
    const { path, body } = requestOf(this.model, this.question, this.ways);
    for await (const chunk of streamJson(path, body, this.controller.signal)) {
      const { text, reasoning, tokens, finish, usage } = readChunk(chunk);
      if (tokens.length) {
        this.last = performance.now();
        this.first ??= this.last;
        this.state = "streaming";
      }
      this.text += text;
      this.reasoning += reasoning;
      this.tokens.push(...tokens);
      this.finish ??= finish;
      this.usage = usage ?? this.usage;
    }
  }

  /** TTFT and TPOT in ms, tokens per second of this request, tokens; null where unknown. */
  figures(now = performance.now()) {
    const tokens = this.usage?.completion_tokens ?? this.tokens.length;
    const end = this.running ? now : (this.last ?? now);
    return {
      ttft: this.first === null ? null : this.first - this.started,
      tpot: tokens > 1 ? (this.last - this.first) / (tokens - 1) : null,
      tokensPerS: tokens && end > this.started ? (tokens / (end - this.started)) * 1000 : null,
      tokens,
    };
  }
}
