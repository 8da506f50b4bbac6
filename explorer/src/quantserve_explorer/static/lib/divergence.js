// Where two answers to one prompt part, and what each model would have said there.

/**
 * A token of an answer: its text, its log-probability and those of the likeliest tokens at its place. The
 * log-probabilities are null where the server gives none.
 * @typedef {{text: string, logprob: number | null, top: {text: string, logprob: number}[]}} Token
 */

/**
 * The first difference between two answers, or null as long as one is the beginning of the other.
 *
 * @param {Token[]} reference
 * @param {Token[]} other
 * @param {boolean} [ended] whether both are complete: then a shorter answer differs where it ends.
 * @returns {{index: number, referenceIndex: number, comparable: boolean} | null} `index` is the first token of
 *   `other` that differs, `referenceIndex` that of `reference`; an index may be the answer's length. `comparable`:
 *   the tokens before are equal, so that both distributions belong to the same context.
 */
export function divergence(reference, other, ended = false) {
  let i = 0;
  let j = 0;
  let left = ""; // text of the reference beyond the common text, or of the other one
  let right = "";
  let comparable = true;
  let startI = 0;
  let startJ = 0;
  for (;;) {
    if (!left && !right) [startI, startJ] = [i, j];
    if (!left) {
      if (i === reference.length) return end(ended, right || j < other.length, startI, startJ, comparable);
      left = reference[i++].text;
    }
    if (!right) {
      if (j === other.length) return end(ended, left, startI, startJ, comparable);
      right = other[j++].text;
    }
    const common = Math.min(left.length, right.length);
    if (left.slice(0, common) !== right.slice(0, common)) {
      return { index: j - 1, referenceIndex: i - 1, comparable: comparable && startI === i - 1 && startJ === j - 1 };
    }
    if (left.length !== right.length) comparable = false; // other tokens for the same text
    left = left.slice(common);
    right = right.slice(common);
  }
}

function end(ended, longer, referenceIndex, index, comparable) {
  return ended && longer ? { index, referenceIndex, comparable } : null;
}

/**
 * Both distributions at the first difference: the tokens that either model names, the likeliest first.
 *
 * @returns {{text: string, reference: number | null, other: number | null}[]} probabilities; null: not among the
 *   likeliest of that model.
 */
export function distributions(referenceToken, otherToken) {
  const rows = new Map();
  const add = (token, name) => {
    for (const { text, logprob } of [...(token?.top ?? []), ...(token && token.logprob !== null ? [token] : [])]) {
      const row = rows.get(text) ?? { text, reference: null, other: null };
      row[name] = Math.exp(logprob);
      rows.set(text, row);
    }
  };
  add(referenceToken, "reference");
  add(otherToken, "other");
  const height = (row) => Math.max(row.reference ?? 0, row.other ?? 0);
  return [...rows.values()].sort((a, b) => height(b) - height(a));
}

/** Mean absolute difference of the tokens' log-probabilities (nats) over the first `count` tokens; null if unknown. */
export function meanShift(reference, other, count) {
  let sum = 0;
  let known = 0;
  for (let i = 0; i < Math.min(count, reference.length, other.length); i++) {
    if (reference[i].logprob === null || other[i].logprob === null) continue;
    sum += Math.abs(reference[i].logprob - other[i].logprob);
    known++;
  }
  return known ? sum / known : null;
}
