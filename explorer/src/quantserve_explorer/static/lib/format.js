// Numbers as text. Unknown values are a dash.

export const UNKNOWN = "–";

const known = (value) => typeof value === "number" && Number.isFinite(value);

/** Three significant digits, without exponents and with separators. */
export function figure(value) {
  if (!known(value)) return UNKNOWN;
  const size = Math.abs(value);
  if (size < 1) return value.toLocaleString("en", { maximumSignificantDigits: 3 });
  const digits = size >= 100 ? 0 : size >= 10 ? 1 : 2;
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

export const integer = (value) => (known(value) ? Math.round(value).toLocaleString("en") : UNKNOWN);

/** A duration given in milliseconds. */
export function duration(ms) {
  if (!known(ms)) return UNKNOWN;
  return ms < 1000 ? `${figure(ms)} ms` : ms < 120_000 ? `${figure(ms / 1000)} s` : `${integer(ms / 60_000)} min`;
}

export function bytes(value) {
  if (!known(value)) return UNKNOWN;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; value >= 1024 && unit < units.length - 1; unit++) value /= 1024;
  return `${unit ? figure(value) : value} ${units[unit]}`;
}

export function percent(share) {
  if (!known(share)) return UNKNOWN;
  const hundredths = share * 100;
  if (hundredths > 0 && hundredths < 0.005) return "<0.01 %";
  return `${hundredths < 1 ? hundredths.toFixed(2) : figure(hundredths)} %`;
}

export function money(value, currency) {
  if (!known(value)) return UNKNOWN;
  try {
    return value.toLocaleString("en", { style: "currency", currency, maximumSignificantDigits: 3, minimumSignificantDigits: 3 });
  } catch {
    return `${figure(value)} ${currency}`;
  }
}

/** Any JSON value on one line. */
export const plain = (value) => (typeof value === "string" ? value : JSON.stringify(value));

/** A token so that its white space can be seen. */
export const visible = (text) => (text === "" ? "end" : text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/\r/g, "␍"));
