// Server-sent events from a byte stream, as the HTML standard defines them.

/** Splits text that arrives in parts into events. An event that no blank line ends is dropped, as the standard says. */
export class SseParser {
  #rest = "";
  #data = [];
  #event = "";
  #started = false;
  #afterReturn = false;

  /** The events that are complete with this text: `{event, data}`. */
  feed(text) {
    if (!this.#started && text) {
      this.#started = true;
      text = text.replace(/^\uFEFF/, "");
    }
    if (this.#afterReturn && text.startsWith("\n")) text = text.slice(1); // "\r\n" in two parts
    if (text) this.#afterReturn = text.endsWith("\r");
    const lines = (this.#rest + text).split(/\r\n|\r|\n/);
    this.#rest = lines.pop();
    const events = [];
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length) events.push({ event: this.#event || "message", data: this.#data.join("\n") });
        this.#data = [];
        this.#event = "";
        continue;
      }
      const colon = line.indexOf(":");
      const field = colon < 0 ? line : line.slice(0, colon);
      const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
      if (field === "data") this.#data.push(value);
      else if (field === "event") this.#event = value;
    }
    return events;
  }
}

/** The events of a `ReadableStream` of UTF-8 bytes. */
export async function* sseEvents(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  const parser = new SseParser();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      yield* parser.feed(done ? decoder.decode() : decoder.decode(value, { stream: true }));
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
