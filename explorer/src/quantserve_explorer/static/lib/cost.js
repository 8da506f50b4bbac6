/**
 * Cost of a million output tokens.
 *
 * @param {number | null | undefined} pricePerHour of the machine.
 * @param {number | null | undefined} tokensPerSecond of all requests that run at a time.
 * @returns {number | null} in the price's currency; null if either is unknown.
 */
export function costPerMillion(pricePerHour, tokensPerSecond) {
  if (!(pricePerHour >= 0) || pricePerHour === null || !(tokensPerSecond > 0)) return null;
  return (pricePerHour / 3600 / tokensPerSecond) * 1e6;
}
