// The server's routes, as this page uses them: docs/api.md has every field.

import { store, stored } from "./storage";

export interface Info {
  model: string;
  version: string;
  asks_for_key: boolean;
  chat: boolean;
  context: number | null;
  max_texts: number;
  prompts: string[];
  judged: boolean;
  studies: boolean;
}

export interface Attribute {
  default: number;
  range: [number, number];
  sites: string[];
}

export interface Checkpoint {
  name: string;
  version: string;
  active: boolean;
  loaded: boolean;
  changed: boolean;
  loadable: boolean;
  reason: string | null;
  method: string | null;
  positions: string | null;
  attributes: Record<string, Attribute>;
  sha256: string | null;
  base_model: Record<string, unknown> | null;
}

export interface CheckpointDetail extends Checkpoint {
  training: Record<string, unknown>;
  evaluation: Record<string, unknown>;
}

export interface Listing {
  active: string | null;
  checkpoints: Checkpoint[];
  note: string | null;
}

export interface Logprob {
  token_id: number;
  token: string;
  logprob: number;
}

export interface Column {
  attribute: string;
  site: string;
  gate: number;
  strength: number;
  delta_norm: number;
  cosine: number;
}

export interface TokenEvent {
  arm: string;
  index: number;
  token_id: number;
  text: string;
  logprob: (Logprob & { top: Logprob[] }) | null;
  trace: { token: string; columns: Column[] } | null;
}

export interface Result {
  text: string;
  token_ids: number[];
  finish_reason: string;
  usage: { prompt_tokens: number; completion_tokens: number };
  steering: {
    checkpoint: string | null;
    version: string | null;
    sha256: string | null;
    attributes: Record<string, number>;
    positions: string;
    steered_tokens: number | null;
    parts: { checkpoint: string; version: string; sha256: string }[] | null;
  };
  timing: { queue_ms: number; ttft_ms: number; total_ms: number };
  trace: { token: string; columns: Column[] }[] | null;
}

export interface Comparison {
  first_divergence: number | null;
  kl_per_token: number;
  logprob_under_baseline: number;
  perplexity_ratio: number;
}

export interface CompareResponse {
  id: string;
  model: string;
  created: number;
  arms: { name: string; results: Result[]; comparison: Comparison | Comparison[] | null }[];
}

export type Verdict = Record<string, boolean | null>;

export interface Study {
  study: string;
  arms: [string, string];
  votes: number;
  wins: [number, number];
  ties: number;
  win_rate: number;
  low: number;
  high: number;
}

/** What went wrong, in the server's words where it has said any. */
export class Problem extends Error {
  constructor(
    readonly type: string,
    message: string,
    readonly status = 0,
    readonly param: string | null = null,
    readonly retryAfter: number | null = null,
  ) {
    super(message);
  }
}

const KEY = "mat-steer.key";
let key = stored(KEY, "sessionStorage") ?? "";

export function setKey(given: string): void {
  key = given;
  store(KEY, given, "sessionStorage");
}

async function send(path: string, options: { method?: string; body?: unknown; key?: string; signal?: AbortSignal } = {}): Promise<Response> {
  const headers: Record<string, string> = {};
  const secret = options.key ?? key;
  if (secret) headers.Authorization = `Bearer ${secret}`;
  if (options.body !== undefined) headers["Content-Type"] = "application/json";
  let response: Response;
  try {
    response = await fetch(path, {
      method: options.method ?? (options.body === undefined ? "GET" : "POST"),
      headers,
      ...(options.body !== undefined && { body: JSON.stringify(options.body) }),
      ...(options.signal && { signal: options.signal }),
    });
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new Problem("connection", "The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response: Response): Promise<Problem> {
  const after = Number(response.headers.get("retry-after") ?? NaN);
  try {
    const { error } = (await response.json()) as { error: { type: string; message: string; param: string | null } };
    return new Problem(error.type, error.message, response.status, error.param, Number.isFinite(after) ? after : null);
  } catch {
    return new Problem("unknown", `The server answered ${response.status} ${response.statusText}.`, response.status);
  }
}

async function json<T>(path: string, options?: Parameters<typeof send>[1]): Promise<T> {
  return (await (await send(path, options)).json()) as T;
}

export const getInfo = () => json<Info>("page.json");
export const getCheckpoints = () => json<Listing>("checkpoints");
export const getVersions = (name: string) =>
  json<{ versions: CheckpointDetail[] }>(`checkpoints/${encodeURIComponent(name)}`).then((body) => body.versions);
export const getActive = () => json<{ checkpoint: string | null }>("readyz").then((body) => body.checkpoint);
export const judge = (prompt: string, texts: string[]) =>
  json<{ verdicts: Verdict[] }>("judge", { body: { prompt, texts } }).then((body) => body.verdicts);
export const getStudies = () => json<{ studies: Study[] }>("studies").then((body) => body.studies);
export const vote = (study: string, body: unknown) =>
  json<Study>(`studies/${encodeURIComponent(study)}/votes`, { body });
export const download = async (path: string) => (await send(path)).blob();

/** `action`: load, activate or unload; `adminKey`: asked of the person where the server wants one. */
export async function change(action: "load" | "activate" | "unload", name: string, version: string, adminKey?: string): Promise<void> {
  const path = `checkpoints/${encodeURIComponent(name)}`;
  const secret = adminKey ? { key: adminKey } : {};
  if (action === "unload") await send(`${path}?version=${encodeURIComponent(version)}`, { method: "DELETE", ...secret });
  else await send(`${path}/${action}`, { body: { version }, ...secret });
}

/** Streams a comparison: `onToken` for each token, then the whole answer. Throws Problem; AbortError where `signal` ends it. */
export async function compare(body: object, onToken: (token: TokenEvent) => void, signal: AbortSignal): Promise<CompareResponse> {
  const response = await send("compare", { body: { ...body, stream: true }, signal });
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const events = (rest + value).split("\n\n");
      rest = events.pop()!;
      for (const event of events) {
        const [, name, data] = /^event: (\w+)\ndata: (.*)$/s.exec(event) ?? [];
        if (data === undefined) continue;
        const parsed = JSON.parse(data);
        if (name === "token") onToken(parsed as TokenEvent);
        else if (name === "done") return parsed as CompareResponse;
        else if (name === "error") throw new Problem(parsed.error.type, parsed.error.message, 500, parsed.error.param);
      }
    }
  } catch (error) {
    if (error instanceof Problem || (error instanceof DOMException && error.name === "AbortError")) throw error;
    throw new Problem("connection", "The connection was lost before the answers ended.");
  } finally {
    reader.cancel().catch(() => undefined);
  }
  throw new Problem("connection", "The connection was lost before the answers ended.");
}
