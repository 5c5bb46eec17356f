// What there is to steer with: each checkpoint's card, and what serves.

import { signal } from "@preact/signals";
import { useEffect, useState } from "preact/hooks";
import { Problem, change, getVersions, type Checkpoint, type CheckpointDetail } from "./api";
import { refresh } from "./served";
import { hue, label, listing, notice } from "./state";
import { Dialog, ProblemBox, number, percent } from "./ui";

type Action = "load" | "activate" | "unload";
interface Wish {
  action: Action;
  of: Checkpoint;
}

const asksKey = signal<Wish | null>(null);
const trouble = signal<{ wish: Wish; problem: Problem } | null>(null);
let adminKey = ""; // until the page is left

async function carryOut(wish: Wish): Promise<void> {
  trouble.value = null;
  try {
    await change(wish.action, wish.of.name, wish.of.version, adminKey);
    const done = { load: "is loaded", activate: "serves now", unload: "is unloaded" }[wish.action];
    await refresh();
    notice.value = `${label(wish.of)} ${done}.`;
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    if (error.status === 401 || error.status === 403) asksKey.value = wish;
    else trouble.value = { wish, problem: error };
  }
}

export function Checkpoints() {
  const { checkpoints, active, note } = listing.value!;
  useEffect(() => {
    void refresh();
    const timer = setInterval(() => document.visibilityState === "visible" && void refresh(), 5000);
    return () => clearInterval(timer);
  }, []);
  return (
    <>
      <div class="row spread">
        <p>
          {active ? (
            <>
              <strong>{active}</strong> serves requests that name no checkpoint.
            </>
          ) : (
            (note ?? "No checkpoint is active.")
          )}
        </p>
      </div>
      {checkpoints.map((one) => (
        <Card key={label(one)} of={one} />
      ))}
      {asksKey.value && <AskAdminKey wish={asksKey.value} />}
    </>
  );
}

function Card({ of }: { of: Checkpoint }) {
  const [open, setOpen] = useState(of.active);
  const wrong = trouble.value && label(trouble.value.wish.of) === label(of) ? trouble.value : null;
  const wish = (action: Action) => () => void carryOut({ action, of });
  return (
    <section class="card checkpoint" aria-label={label(of)}>
      <div class="row spread">
        <h2 class="row">
          {label(of)}
          {of.active && <span class="badge on">active</span>}
          {of.loaded && !of.active && <span class="badge">loaded</span>}
          {of.changed && <span class="badge bad" title="its folder holds another one by now; what was loaded is served">changed on disk</span>}
          {!of.loadable && <span class="badge bad">cannot be loaded</span>}
        </h2>
        <div class="row">
          {of.loadable && !of.loaded && (
            <button type="button" onClick={wish("load")}>
              Load
            </button>
          )}
          {of.loadable && of.loaded && of.changed && (
            <button type="button" onClick={wish("load")}>
              Load anew
            </button>
          )}
          {of.loadable && !of.active && (
            <button type="button" onClick={wish("activate")}>
              Activate
            </button>
          )}
          {of.loaded && (
            <button type="button" class="danger" onClick={wish("unload")}>
              Unload
            </button>
          )}
          <button type="button" class="quiet" aria-expanded={open} onClick={() => setOpen(!open)}>
            {open ? "Hide the card" : "Show the card"}
          </button>
        </div>
      </div>
      {of.reason && <p class="muted">{of.reason}</p>}
      <ul class="row attributes">
        {Object.entries(of.attributes).map(([name, one]) => (
          <li key={name}>
            <i class={`dot a${hue(name)}`} />
            {name}{" "}
            <span class="muted">
              {one.default} ({one.range[0]} to {one.range[1]}), at {one.sites.join(", ")}
            </span>
          </li>
        ))}
      </ul>
      {wrong && <ProblemBox problem={wrong.problem} onRetry={() => void carryOut(wrong.wish)} />}
      {open && <Detail of={of} />}
    </section>
  );
}

function AskAdminKey({ wish }: { wish: Wish }) {
  const [given, setGiven] = useState("");
  return (
    <Dialog title="The admin key" onClose={() => (asksKey.value = null)}>
      <form
        class="ask"
        onSubmit={(event) => {
          event.preventDefault();
          adminKey = given.trim();
          asksKey.value = null;
          void carryOut(wish);
        }}
      >
        <p>
          To {wish.action} {label(wish.of)} changes what is served: {adminKey ? "that key is not the one." : "the server asks for its admin key."}
        </p>
        <label class="field">
          <span>Admin key</span>
          <input type="password" autocomplete="off" value={given} onInput={(event) => setGiven(event.currentTarget.value)} />
        </label>
        <button type="submit" class="primary">
          {wish.action[0]!.toUpperCase() + wish.action.slice(1)}
        </button>
      </form>
    </Dialog>
  );
}

interface Metric {
  value: number;
  low: number;
  high: number;
  count: number;
}
interface MeasuredArm {
  arm: string;
  metrics?: Record<string, Metric>;
  perplexity?: number;
  perplexity_ratio?: number;
}
interface Gate {
  attribute: string;
  site: string;
  split: string;
  positive: number;
  negative: number;
}

function Detail({ of }: { of: Checkpoint }) {
  const [detail, setDetail] = useState<CheckpointDetail | null>(null);
  const [problem, setProblem] = useState<Problem | null>(null);
  const read = () =>
    getVersions(of.name).then(
      (versions) => setDetail(versions.find((one) => one.version === of.version) ?? null),
      (error) => (error instanceof Problem ? setProblem(error) : Promise.reject(error)),
    );
  useEffect(() => void read(), [label(of), of.sha256]);
  if (problem) return <ProblemBox problem={problem} onRetry={() => (setProblem(null), void read())} />;
  if (!detail) return <p class="muted">…</p>;
  const arms = (detail.evaluation.arms ?? []) as MeasuredArm[];
  const gates = (detail.training.gates ?? []) as Gate[];
  return (
    <div class="detail">
      {arms.length > 0 && <Evaluation arms={arms} kind={String(detail.evaluation.kind ?? "")} settings={detail.evaluation.settings as object} attributes={of.attributes} />}
      {gates.length > 0 && <Gates gates={gates} />}
      <details>
        <summary>How it was trained</summary>
        <Facts of={{ method: detail.method, "steered positions": detail.positions, sha256: detail.sha256, ...(detail.base_model && { "base model": detail.base_model.id }) }} />
        <Facts of={(detail.training.hyperparameters ?? {}) as Record<string, unknown>} />
        <Facts of={Object.fromEntries(((detail.training.data ?? []) as { name: string; path: string }[]).map((one) => [`data ${one.name}`, one.path]))} />
      </details>
    </div>
  );
}

const shown = (value: unknown): string => (typeof value === "string" ? value : JSON.stringify(value));

function Facts({ of }: { of: Record<string, unknown> }) {
  return (
    <dl class="facts">
      {Object.entries(of).map(([name, value]) => (
        <div key={name}>
          <dt>{name}</dt>
          <dd>{shown(value)}</dd>
        </div>
      ))}
    </dl>
  );
}

function Evaluation(props: { arms: MeasuredArm[]; kind: string; settings: object | undefined; attributes: object }) {
  const { arms, kind, settings, attributes } = props;
  const names = [...new Set(arms.flatMap((arm) => Object.keys(arm.metrics ?? {})))];
  return (
    <section>
      <h3>Evaluation</h3>
      <p class="muted">
        {kind === "generation" ? "Shares of judged answers" : kind}, with 95 % intervals
        {settings && `: ${Object.entries(settings).map(([name, value]) => `${name.replaceAll("_", " ")} ${shown(value)}`).join(", ")}`}.
      </p>
      <div class="scroll" tabIndex={0} role="region" aria-label="Evaluation">
        <table class="measured">
          <thead>
            <tr>
              <th scope="col">arm</th>
              {names.map((name) => (
                <th key={name} scope="col">
                  {name.replaceAll("_", "-")}
                </th>
              ))}
              {arms.some((arm) => arm.perplexity_ratio !== undefined) && (
                <th scope="col" class="right">
                  perplexity ratio
                </th>
              )}
            </tr>
          </thead>
          <tbody>
            {arms.map((arm) => (
              <tr key={arm.arm}>
                <th scope="row">{arm.arm}</th>
                {names.map((name) => {
                  const metric = arm.metrics?.[name];
                  return <td key={name}>{metric ? <Interval metric={metric} name={name} attributes={attributes} /> : "–"}</td>;
                })}
                {arm.perplexity_ratio !== undefined && <td class="right">{number(arm.perplexity_ratio)}×</td>}
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </section>
  );
}

/** A share with its interval, as a number and as a bar. */
function Interval({ metric, name, attributes }: { metric: Metric; name: string; attributes: object }) {
  const tenths = (value: number) => (value * 100).toFixed(1);
  return (
    <div class={`interval ${name in attributes ? `a${hue(name)}` : "a7"}`} title={`${tenths(metric.value)} % [${tenths(metric.low)}, ${tenths(metric.high)}] of ${metric.count}`}>
      <span>
        {tenths(metric.value)}{" "}
        <small class="muted">
          [{tenths(metric.low)}, {tenths(metric.high)}]
        </small>
      </span>
      <span class="bar" style={{ "--value": percentOf(metric.value), "--low": percentOf(metric.low), "--high": percentOf(metric.high) }} />
    </div>
  );
}

const percentOf = (value: number): string => `${Math.max(0, Math.min(1, value)) * 100}%`;

function Gates({ gates }: { gates: Gate[] }) {
  const split = gates.some((one) => one.split === "test") ? "test" : gates[0]!.split;
  return (
    <section>
      <h3>Gates</h3>
      <p class="muted">How open each gate is on {split} texts that have the attribute already, and on those that lack it: far apart is good.</p>
      <ul class="gates">
        {gates
          .filter((one) => one.split === split)
          .map((one) => (
            <li key={one.attribute + one.site} class={`a${hue(one.attribute)}`}>
              <span>
                {one.attribute} <small class="muted">{one.site}</small>
              </span>
              {(["positive", "negative"] as const).map((side) => (
                <span key={side} class="gate-row">
                  <small class="muted">{side === "positive" ? "have it" : "lack it"}</small>
                  <span class="bar" style={{ "--value": percentOf(one[side]), "--low": "0%", "--high": "0%" }} />
                  <span>{percent(one[side])}</span>
                </span>
              ))}
            </li>
          ))}
      </ul>
    </section>
  );
}
