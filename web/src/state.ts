// What is asked for: the whole of it stands in the address, so that a link is a comparison.

import { computed, effect, signal } from "@preact/signals";
import type { Info, Listing } from "./api";
import { store, stored } from "./storage";

export interface Part {
  checkpoint: string | null; // null: the active one
  attributes: Record<string, number>;
}

export interface Arm {
  name: string;
  parts: Part[]; // none: unsteered
}

export interface Turn {
  role: "system" | "user" | "assistant";
  content: string;
}

export const SAMPLING = {
  max_new_tokens: 64,
  temperature: 1,
  top_p: 1,
  top_k: 0,
  min_p: 0,
  repetition_penalty: 1,
  presence_penalty: 0,
  frequency_penalty: 0,
};
export type Sampling = typeof SAMPLING & { seed: number | null; stop: string };

export interface Dose {
  arm: string | null; // whose other multipliers hold; null: they are 0
  attribute: string;
  from: number;
  to: number;
  steps: number;
  samples: number;
}

export const MOST_STEPS = 31;
export const MOST_SAMPLES = 16;
/** A whole number from `least` to `most`. */
export const whole = (value: unknown, least: number, most: number): number => Math.max(least, Math.min(most, Math.round(Number(value))));

export interface State {
  mode: "prompt" | "chat";
  prompt: string;
  turns: Turn[];
  sampling: Sampling;
  arms: Arm[];
  trace: boolean; // ask what was done to each token
  dose: Dose | null;
}

export const VIEWS = { compare: "Compare", dose: "Dose-response", checkpoints: "Checkpoints", blind: "Blind A/B" } as const;
export type View = keyof typeof VIEWS;

export const info = signal<Info | null>(null);
export const listing = signal<Listing | null>(null);
export const view = signal<View>("compare");
export const state = signal<State>(empty());
export const notice = signal<string | null>(null); // said at the top until it is closed
export const announced = signal(""); // said to screen readers

export const attributeNames = computed(() => {
  const names = new Set<string>();
  for (const one of listing.value?.checkpoints ?? []) if (one.loadable || one.loaded) Object.keys(one.attributes).forEach((name) => names.add(name));
  return [...names];
});

/** The number of an attribute's colour. */
export const hue = (attribute: string): number => Math.max(0, attributeNames.value.indexOf(attribute)) % 8;

export function empty(): State {
  return {
    mode: "prompt",
    prompt: "",
    turns: [{ role: "user", content: "" }],
    sampling: { ...SAMPLING, seed: null, stop: "" },
    arms: [{ name: "baseline", parts: [] }],
    trace: true,
    dose: null,
  };
}

/** What somebody sees who comes without a link: the baseline, and one arm with the active checkpoint's defaults. */
export function first(info: Info, listing: Listing): State {
  const fresh = empty();
  const active = listing.checkpoints.find((one) => one.active) ?? listing.checkpoints.find((one) => one.loadable);
  if (info.chat && !info.judged) fresh.mode = "chat";
  fresh.prompt = info.prompts[0] ?? "";
  fresh.turns = [{ role: "user", content: asQuestion(fresh.prompt) }];
  fresh.sampling.seed = 1;
  if (active) {
    const checkpoint = active.active ? null : label(active);
    fresh.arms.push({ name: "steered", parts: [{ checkpoint, attributes: defaults(checkpoint, listing) }] });
  }
  return fresh;
}

/** "Q: What is it? A:" as somebody would say it in a conversation. */
export const asQuestion = (prompt: string): string => prompt.replace(/^Q: (.*) A:$/s, "$1");

export const label = (one: { name: string; version: string }): string => `${one.name}@${one.version}`;

/** The checkpoint that a part names, as it is served now. */
export function find(name: string | null, within = listing.value) {
  const all = within?.checkpoints ?? [];
  if (name === null) return all.find((one) => one.active);
  return all.find((one) => label(one) === name) ?? all.filter((one) => one.name === name).at(-1);
}

export function defaults(checkpoint: string | null, within = listing.value): Record<string, number> {
  const attributes = find(checkpoint, within)?.attributes ?? {};
  return Object.fromEntries(Object.entries(attributes).map(([name, one]) => [name, one.default]));
}

export function update(change: (draft: State) => void): void {
  const draft = structuredClone(state.value);
  change(draft);
  state.value = draft;
}

/** A name that no arm has yet. */
export function freshName(wanted: string, arms: Arm[]): string {
  const taken = new Set(arms.map((arm) => arm.name));
  for (let count = 1; ; count++) {
    const name = count === 1 ? wanted : `${wanted} ${count}`;
    if (!taken.has(name)) return name;
  }
}

/** The body of /compare for a state. `seed`: what an unset one has become. */
export function body(of: State, seed: number): Record<string, unknown> {
  const asked: Record<string, unknown> =
    of.mode === "prompt" ? { prompt: of.prompt } : { messages: of.turns.filter((turn, at) => turn.content || at < of.turns.length - 1) };
  asked.arms = of.arms.map((arm) => ({ name: arm.name, ...steering(arm.parts) }));
  asked.max_new_tokens = of.sampling.max_new_tokens;
  for (const [name, neutral] of Object.entries(SAMPLING)) {
    const value = of.sampling[name as keyof typeof SAMPLING];
    if (value !== neutral) asked[name] = value;
  }
  const stop = stops(of.sampling.stop);
  if (stop.length) asked.stop = stop;
  asked.seed = seed;
  return asked;
}

export function steering(parts: Part[]): object {
  if (!parts.length) return { attributes: {} };
  const each = parts.map(({ checkpoint, attributes }) => ({ ...(checkpoint !== null && { checkpoint }), attributes }));
  return each.length === 1 ? each[0]! : { steering: each };
}

/** One stop text a line; \n in it is a line's end. */
export const stops = (text: string): string[] => text.split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n"));

export const drawSeed = (): number => crypto.getRandomValues(new Uint32Array(1))[0]!;

// --- the address ---

const toBase64 = (text: string): string =>
  btoa(String.fromCharCode(...new TextEncoder().encode(text))).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
const fromBase64 = (text: string): string =>
  new TextDecoder().decode(Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (char) => char.charCodeAt(0)));

export function toHash(view: View, of: State): string {
  return `#${view}=${toBase64(JSON.stringify(of))}`;
}

/** Reads an address's fragment. Throws where it holds no state that this page can use. */
export function fromHash(hash: string): { view: View; state: State | null } | null {
  const [name = "", packed = ""] = hash.replace(/^#/, "").split("=", 2);
  if (!name) return null;
  if (!(name in VIEWS)) throw new Error(`no view ${name}`);
  return { view: name as View, state: packed ? checked(JSON.parse(fromBase64(packed))) : null };
}

/** A state from outside: only what has the right type is taken. */
export function checked(given: unknown): State {
  const fresh = empty();
  if (typeof given !== "object" || given === null) throw new Error("no state");
  const from = given as Record<string, unknown>;
  if (from.mode === "chat") fresh.mode = "chat";
  if (typeof from.prompt === "string") fresh.prompt = from.prompt;
  const turns = list(from.turns).flatMap(({ role, content }): Turn[] =>
    (role === "system" || role === "user" || role === "assistant") && typeof content === "string" ? [{ role, content }] : [],
  );
  if (turns.length) fresh.turns = turns;
  const sampling = (from.sampling ?? {}) as Record<string, unknown>;
  for (const name of Object.keys(SAMPLING) as (keyof typeof SAMPLING)[]) if (isNumber(sampling[name])) fresh.sampling[name] = sampling[name];
  fresh.sampling.seed = isNumber(sampling.seed) ? sampling.seed : null;
  if (typeof sampling.stop === "string") fresh.sampling.stop = sampling.stop;
  const arms = list(from.arms).map((arm) => ({
    name: String(arm.name ?? "arm").slice(0, 64),
    parts: list(arm.parts).map((part) => ({
      checkpoint: typeof part.checkpoint === "string" ? part.checkpoint : null,
      attributes: Object.fromEntries(
        Object.entries((part.attributes ?? {}) as object).filter((one): one is [string, number] => isNumber(one[1])),
      ),
    })),
  }));
  if (!arms.length) throw new Error("no arms");
  fresh.arms = arms.slice(0, 32);
  fresh.trace = from.trace !== false;
  const dose = from.dose as Record<string, unknown> | null | undefined;
  if (dose && typeof dose.attribute === "string" && [dose.from, dose.to, dose.steps, dose.samples].every(isNumber))
    fresh.dose = {
      arm: typeof dose.arm === "string" ? dose.arm : null,
      attribute: dose.attribute,
      from: dose.from as number,
      to: dose.to as number,
      steps: whole(dose.steps, 2, MOST_STEPS),
      samples: whole(dose.samples, 1, MOST_SAMPLES),
    };
  return fresh;
}

const isNumber = (value: unknown): value is number => typeof value === "number" && Number.isFinite(value);
const list = (value: unknown): Record<string, unknown>[] =>
  Array.isArray(value) ? value.filter((one) => typeof one === "object" && one !== null) : [];

let written = "";

/** From now on the address follows the state, and the state an address that is put in by hand. */
export function followAddress(): void {
  let timer = 0;
  effect(() => {
    const hash = toHash(view.value, state.value);
    clearTimeout(timer);
    timer = window.setTimeout(() => {
      written = hash;
      history.replaceState(null, "", hash);
    }, 200);
  });
  window.addEventListener("hashchange", () => {
    if (location.hash !== written) readAddress();
  });
}

/** Whether the address held a state. */
export function readAddress(): boolean {
  try {
    const found = fromHash(location.hash);
    if (!found) return false;
    view.value = found.view;
    if (found.state) state.value = found.state;
    return found.state !== null;
  } catch {
    notice.value = "This address holds no comparison that this page can read. It may have been cut off.";
    return false;
  }
}

// --- kept by this browser ---

export interface Past {
  at: number;
  state: State;
  texts: string[];
}

const HISTORY = "mat-steer.history";
const MOST = 60;
export const past = signal<Past[]>(readPast());

function readPast(): Past[] {
  try {
    return list(JSON.parse(stored(HISTORY) ?? "[]")).map((one) => ({
      at: Number(one.at),
      state: checked(one.state),
      texts: (one.texts as string[]).map(String),
    }));
  } catch {
    return [];
  }
}

/** Keeps a finished run; the same question with other sliders soon after takes the place of the one before. */
export function remember(entry: Past): void {
  const newest = past.value[0];
  const question = (one: Past) => JSON.stringify([one.state.mode, one.state.prompt, one.state.turns, one.state.arms.map((arm) => arm.name)]);
  const replaces = newest && entry.at - newest.at < 10_000 && question(newest) === question(entry);
  keep([entry, ...past.value.slice(replaces ? 1 : 0)].slice(0, MOST));
}

export function keep(entries: Past[]): void {
  past.value = entries;
  store(HISTORY, JSON.stringify(entries));
}

const THEME = "mat-steer.theme";
export type Theme = "auto" | "light" | "dark";
export const theme = signal<Theme>((stored(THEME) as Theme | null) ?? "auto");
export function followTheme(): void {
  effect(() => {
    if (theme.value === "auto") document.documentElement.removeAttribute("data-theme");
    else document.documentElement.dataset.theme = theme.value;
    store(THEME, theme.value);
  });
}
