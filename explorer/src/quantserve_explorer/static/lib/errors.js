// What a failed request means, and what to do about it.

/** A response with status 400 and above, an error event of a stream (status 0), or a lost connection (code `network`). */
export class ApiError extends Error {
  constructor(status, error = {}, retryAfter = null) {
    super(error.message || `HTTP status ${status}`);
    this.status = status;
    this.code = error.code ?? null;
    this.param = error.param ?? null;
    this.retryAfter = retryAfter;
  }
}

/** @returns {{title: string, detail: string, todo: string}} */
export function explain(error) {
  const { status, code, message, retryAfter } = error;
  const wait = retryAfter ? `Retry in ${retryAfter} s` : "Retry in a few seconds";
  if (code === "network") {
    return { title: "No connection", detail: message, todo: "Check that the server runs and can be reached, then retry." };
  }
  if (code === "incomplete") {
    return { title: "The answer broke off", detail: message, todo: "Retry. The Models view shows whether its replica is up." };
  }
  if (status === 401) {
    return { title: "API key needed", detail: message, todo: "Retry and enter a key from the operator of this server." };
  }
  if (code === "key_limit") {
    return { title: "Too many requests of this key", detail: message, todo: `${wait}, or ask the operator to raise max_requests_per_key.` };
  }
  if (status === 429 || code === "queue_full" || code === "queue_timeout") {
    return {
      title: "The model is busy",
      detail: message,
      todo: `${wait}. The operator can raise max_ongoing_requests or add replicas; the Load view shows the queue.`,
    };
  }
  if (code === "shutdown") {
    return { title: "The server stops", detail: message, todo: "Retry when it has started again." };
  }
  if (status === 503 || code === "model_unavailable") {
    return {
      title: "The model has no replica that answers",
      detail: message,
      todo: `${wait}. A lost replica is started again by itself; the Models view shows its state.`,
    };
  }
  if (status === 504 || code === "timeout") {
    return { title: "The request took too long", detail: message, todo: "Lower max tokens, or ask the operator to raise request_timeout_s." };
  }
  if (status === 404) {
    return { title: "Not found", detail: message, todo: "Reload the page: the server may have been started with other models." };
  }
  if (status >= 400 && status < 500) {
    return { title: "The server refused the request", detail: message, todo: "Change the prompt or the parameters, then retry." };
  }
  if (status === 0) {
    return { title: "The model failed while it answered", detail: message, todo: `${wait}. A lost replica is started again by itself.` };
  }
  return { title: "The server failed", detail: message, todo: "Retry; the server's log has the cause." };
}
