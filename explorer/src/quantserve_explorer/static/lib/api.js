// Requests to the gateway: relative to this file, so that a reverse proxy may serve the page below any path.

import { ApiError } from "./errors.js";
import { sseEvents } from "./sse.js";

const ROOT = new URL("../../", import.meta.url);
const KEY = "quantserve.key";

let asking = null;
let askForKey = async () => null;

/** @param {(wrong: boolean) => Promise<string | null>} ask asks the user for a key; null if they give none. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

export const storedKey = () => sessionStorage.getItem(KEY);

export function storeKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/**
 * A response with a status below 400. A 401 asks for a key, until one is right or the user gives up; not if `quiet`.
 *
 * @throws {ApiError}
 */
export async function request(path, options = {}) {
  for (;;) {
    const key = storedKey();
    const response = await send(path, options, key);
    if (response.ok) return response;
    const error = await errorOf(response);
    if (response.status !== 401 || options.quiet) throw error;
    if (storedKey() !== key) continue; // another request has asked meanwhile
    asking ??= askForKey(key !== null).finally(() => (asking = null));
    const given = await asking;
    if (given === null) throw error;
    storeKey(given);
  }
}

/** Whether the server takes this key. */
export async function keyWorks(key) {
  const response = await send("v1/models", {}, key);
  if (response.status === 401) return false;
  if (!response.ok) throw await errorOf(response);
  return true;
}

export const getJson = async (path, options) => (await request(path, options)).json();

/** The JSON values of a stream of events, until `[DONE]`. */
export async function* streamJson(path, body, signal) {
  const response = await request(path, { body, signal });
  try {
    for await (const { data } of sseEvents(response.body)) {
      if (data === "[DONE]") return;
      const value = JSON.parse(data);
      if (value.error) throw new ApiError(0, value.error);
      yield value;
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError(0, { code: "incomplete", message: "The connection was lost before the end of the answer." });
  }
  throw new ApiError(0, { code: "incomplete", message: "The stream ended before the end of the answer." });
}

async function send(path, { body, signal }, key) {
  const headers = {};
  if (body !== undefined) headers["content-type"] = "application/json";
  if (key) headers.authorization = `Bearer ${key}`;
  const method = body === undefined ? "GET" : "POST";
  try {
    return await fetch(new URL(path, ROOT), { method, headers, signal, body: body && JSON.stringify(body), cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { code: "network", message: "The server did not answer." });
  }
}

async function errorOf(response) {
  const retryAfter = Number(response.headers.get("retry-after")) || null;
  let error;
  try {
    ({ error } = await response.json());
  } catch {
    // a proxy's own page
  }
  return new ApiError(response.status, error ?? {}, retryAfter);
}
