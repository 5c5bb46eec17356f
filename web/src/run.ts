// A comparison under way: tokens as they come, then the whole answer.

import { signal, type Signal } from "@preact/signals";
import { Problem, compare, judge, type CompareResponse, type Comparison, type Result, type TokenEvent, type Verdict } from "./api";
import { look } from "./served";
import { announced, asQuestion, body, drawSeed, info, listing, remember, state, type State } from "./state";

export interface ArmRun {
  name: string;
  tokens: TokenEvent[];
  result: Result | null;
  comparison: Comparison | null;
  verdict: Verdict | null;
}

export interface Run {
  asked: Record<string, unknown>;
  state: State; // as it was asked, with the seed that was drawn
  arms: ArmRun[];
  answer: CompareResponse | null;
  status: "running" | "done" | "stopped" | "failed";
  active: string | null; // which checkpoint was active when it began
  changed: Signal<number>; // counts what came, for those who show it
  swapped: string | null; // what became active while it ran
}

export const run = signal<Run | null>(null);
export const problem = signal<Problem | null>(null);
export const live = signal(false); // asks again whenever a slider has moved
let control: AbortController | null = null;

export function stop(): void {
  control?.abort();
}

/** Asks for what the state says, in place of what is still running. */
export async function start(): Promise<void> {
  control?.abort();
  const mine = (control = new AbortController());
  const seed = state.value.sampling.seed ?? drawSeed();
  const asked = body(state.value, seed);
  const of = structuredClone(state.value);
  of.sampling.seed = seed;
  const arms = of.arms.map((arm): ArmRun => ({ name: arm.name, tokens: [], result: null, comparison: null, verdict: null }));
  const byName = new Map(arms.map((arm) => [arm.name, arm]));
  const before = run.value;
  const current: Run = { asked, state: of, arms, answer: null, status: "running", active: listing.value?.active ?? null, changed: signal(0), swapped: null };
  let shown = false;
  let frame = 0;
  const show = () => {
    frame = 0;
    // What was answered before stays until there is something to put in its place.
    if (!shown) run.value = current;
    shown = true;
    current.changed.value++;
  };
  if (!before) show();
  else run.value = { ...before, status: "running" };
  problem.value = null;
  const watch = window.setInterval(() => void lookForSwap(current), 1000);
  try {
    const answer = await compare(
      { ...asked, trace: of.trace, logprobs: 5 },
      (token) => {
        byName.get(token.arm)?.tokens.push(token);
        frame ||= requestAnimationFrame(show);
      },
      mine.signal,
    );
    await lookForSwap(current);
    if (control !== mine) return;
    current.answer = answer;
    answer.arms.forEach((arm, index) => {
      arms[index]!.result = arm.results[0]!;
      arms[index]!.comparison = one(arm.comparison);
    });
    current.status = "done";
    finish(current, before);
    announced.value = arms.map((arm) => `${arm.name}: ${arm.result!.text}`).join(". ");
    remember({ at: Date.now(), state: of, texts: arms.map((arm) => arm.result!.text) });
    await addVerdicts(current);
  } catch (error) {
    if (control !== mine) return; // another one has begun
    const aborted = error instanceof DOMException && error.name === "AbortError";
    if (!aborted && !(error instanceof Problem)) throw error;
    current.status = aborted ? "stopped" : "failed";
    if (!aborted) problem.value = error as Problem;
    finish(current, before);
  } finally {
    clearInterval(watch);
    cancelAnimationFrame(frame);
  }

  function finish(current: Run, before: Run | null): void {
    // An error before the first token leaves the answers that are there.
    const empty = arms.every((arm) => !arm.tokens.length && !arm.result);
    run.value = empty && before ? { ...before, status: before.answer ? "done" : "stopped" } : { ...current };
    current.changed.value++;
  }
}

async function lookForSwap(current: Run): Promise<void> {
  await look();
  const active = listing.value?.active ?? null;
  if (active === current.active) return;
  current.swapped = active ?? "no checkpoint";
  current.changed.value++;
}

async function addVerdicts(current: Run): Promise<void> {
  const asked = question(current.state);
  if (!info.value?.judged || asked === null) return;
  try {
    const verdicts = await judge(asked, current.arms.map((arm) => arm.result!.text));
    current.arms.forEach((arm, index) => (arm.verdict = verdicts[index]!));
    current.changed.value++;
  } catch {
    // no question that the judge knows
  }
}

/** What a judge is asked about: the prompt, or what was said last. */
export function question(of: State): string | null {
  if (of.mode === "prompt") return of.prompt;
  const last = of.turns.filter((turn) => turn.content).at(-1);
  return last?.role === "user" ? `Q: ${asQuestion(last.content)} A:` : null;
}

export const one = (comparison: Comparison | Comparison[] | null): Comparison | null =>
  Array.isArray(comparison) ? (comparison[0] ?? null) : comparison;

/** The first token that differs from the baseline's, as far as both have come; null: none yet. */
export function divergence(arm: ArmRun, baseline: ArmRun): number | null {
  if (arm.comparison) return arm.comparison.first_divergence;
  const common = Math.min(arm.tokens.length, baseline.tokens.length);
  for (let at = 0; at < common; at++) if (arm.tokens[at]!.token_id !== baseline.tokens[at]!.token_id) return at;
  return null;
}

let timer = 0;

/** After a slider has moved. */
export function moved(): void {
  if (!live.value) return;
  clearTimeout(timer);
  timer = window.setTimeout(() => void start(), 150);
}
