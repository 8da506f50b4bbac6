// Elements without HTML strings: text of models and users always becomes text nodes.

/**
 * An element. Properties that begin with "on" are listeners, `class` and all others are attributes; null, undefined and
 * false leave an attribute out.
 */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(2).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** An icon of index.html's sprite. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** A term with its value, for a `dl`. */
export const term = (name, ...values) => h("div", {}, h("dt", {}, name), h("dd", {}, ...values));

let announced = 0;

/** Tell screen readers, politely; the page's own text is elsewhere. */
export function announce(message) {
  const region = document.getElementById("live");
  clearTimeout(announced);
  announced = setTimeout(() => (region.textContent = message), 150); // of several at once only the last
}

/** Offer text as a file. */
export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = h("a", { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
