// The frame of the page: views by address, theme, key and the state of the server.

import { getJson, keyWorks, onKeyNeeded, storedKey, storeKey } from "./lib/api.js";
import { announce, h } from "./lib/dom.js";
import { ApiError, explain } from "./lib/errors.js";
import { compareView } from "./views/compare.js";
import { loadView } from "./views/load.js";
import { modelsView } from "./views/models.js";
import { votesView } from "./views/votes.js";

const REFRESH_MS = 5000;
const VIEWS = { compare: compareView, models: modelsView, load: loadView, votes: votesView };
const $ = (selector) => document.querySelector(selector);

/**
 * What the views share.
 *
 * `settings`: of settings.json. `status`: the last of `/status`; null before the first. `error`: of the last attempt to
 * get it. Views get `update()` after each.
 */
const state = { settings: null, status: null, error: null };
const views = {};
let current = null;

/** @param {boolean} ask for a key where one is missing. */
async function refresh(ask = false) {
  try {
    state.settings ??= await getJson("explorer/settings.json");
    state.status = await getJson("status", { quiet: !ask && state.error?.status === 401 });
    state.error = null;
  } catch (error) {
    state.error = error;
  }
  showHealth();
  const key = $("#key");
  key.hidden = !state.settings?.keys && !storedKey();
  key.querySelector("span").textContent = storedKey() ? "Forget key" : "Enter key";
  $('nav a[href="#votes"]').hidden = !state.settings?.votes;
  current?.update?.();
}

function showHealth() {
  const health = $("#health");
  if (state.error) {
    health.className = "health bad";
    health.textContent = explain(state.error).title;
    return;
  }
  const models = state.status.models;
  const ready = models.filter((model) => model.state === "ready").length;
  health.className = `health ${ready === models.length ? "good" : ready ? "warn" : "bad"}`;
  health.textContent = `${ready} of ${models.length} ready`;
}

function show() {
  const [name, ...rest] = location.hash.slice(1).split(/[/?]/);
  if (name === "main") return; // the skip link
  const view = Object.hasOwn(VIEWS, name) ? name : "compare";
  views[view] ??= VIEWS[view](state);
  const changed = current !== views[view];
  if (changed) {
    current?.hide?.();
    current = views[view];
    $("#main").replaceChildren(current.element);
    for (const link of document.querySelectorAll("nav a")) {
      if (link.hash === `#${view}`) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    scrollTo(0, 0);
    document.title = `${view[0].toUpperCase()}${view.slice(1)} · quantserve`;
  }
  current.show?.(location.hash.slice(view.length + 2), rest, changed);
  current.update?.();
}

function askForKey(wrong) {
  const dialog = $("#key-dialog");
  const input = $("#key-input");
  const problem = $("#key-problem");
  const submit = dialog.querySelector('[type="submit"]');
  const complain = (text) => {
    problem.textContent = text;
    input.setAttribute("aria-invalid", String(text !== ""));
  };
  input.value = "";
  complain(wrong ? "The key is no longer valid. Enter another one." : "");
  dialog.showModal();
  input.focus();
  return new Promise((resolve) => {
    const controller = new AbortController();
    const listen = (target, event, listener) => target.addEventListener(event, listener, { signal: controller.signal });
    const finish = (key) => {
      controller.abort();
      dialog.close();
      resolve(key);
    };
    listen(dialog, "cancel", () => finish(null));
    listen($("#key-cancel"), "click", () => finish(null));
    listen(dialog, "submit", async (event) => {
      event.preventDefault();
      const key = input.value.trim();
      if (!/^[\x21-\x7e]+$/.test(key)) return complain("A key has only printable ASCII characters without spaces.");
      submit.disabled = true;
      try {
        if (await keyWorks(key)) return finish(key);
        complain("This key is wrong: the server refused it. Check it for missing characters.");
        input.select();
      } catch (error) {
        complain(`The key could not be checked: ${error.message}`);
      } finally {
        submit.disabled = false;
      }
    });
  });
}

function setTheme(theme) {
  const root = document.documentElement;
  if (theme) root.dataset.theme = theme;
  try {
    if (theme) localStorage.setItem("quantserve.theme", theme);
  } catch {
    // storage is off: the theme lasts until the page is closed
  }
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const next = dark ? "light" : "dark";
  const button = $("#theme");
  button.querySelector("span").textContent = dark ? "Light" : "Dark";
  button.setAttribute("aria-label", `Use the ${next} theme`);
  button.onclick = () => setTheme(next);
  document.dispatchEvent(new Event("themechange"));
}

async function poll() {
  for (;;) {
    await refresh();
    await new Promise((wake) => setTimeout(wake, REFRESH_MS));
    while (document.hidden) await new Promise((wake) => document.addEventListener("visibilitychange", wake, { once: true }));
  }
}

onKeyNeeded(askForKey);
$("#key").addEventListener("click", () => {
  if (!storedKey()) return refresh(true);
  storeKey(null);
  state.status = null;
  state.error = new ApiError(401, { message: "The key is forgotten." });
  announce("The key is forgotten.");
  refresh();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTheme());
$(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  $("#main").focus();
});
addEventListener("hashchange", show);
setTheme();
$("#main").replaceChildren(h("p", { class: "empty" }, "Loading…"));
show();
poll();
