// One arm: what steers it, what it answers, and what that amounts to.

import { useEffect, useId, useState } from "preact/hooks";
import { Answer } from "./answer";
import type { Attribute, Column } from "./api";
import { moved, problem, run, start, type ArmRun, type Run } from "./run";
import { defaults, find, freshName, hue, label, listing, state, update, type Arm, type Part } from "./state";
import { IconButton, ProblemBox, number } from "./ui";

export function ArmCard({ arm, index }: { arm: Arm; index: number }) {
  const of = run.value;
  const result = of?.arms.find((one) => one.name === arm.name);
  const wrong = problem.value?.param?.startsWith(`arms.${index}.`) ? problem.value : null;
  return (
    <article class="arm" aria-label={`Arm ${arm.name}`}>
      <ArmHeader arm={arm} index={index} />
      <div class="steering">
        {arm.parts.map((part, at) => (
          <PartEditor key={at} part={part} arm={index} at={at} />
        ))}
        {arm.parts.length === 0 && <p class="muted unsteered">Unsteered{index === 0 ? ": the others are compared with this." : "."}</p>}
        <AddPart index={index} parts={arm.parts} />
        <ProblemBox problem={wrong} onRetry={() => void start()} />
      </div>
      {of && result ? (
        <Answer of={of} arm={result} busy={of.status === "running" && !result.result} />
      ) : (
        <div class="answer empty">
          <span class="muted">{of ? "Not run yet." : "The answer comes here."}</span>
        </div>
      )}
      {of && result ? <Summary of={of} arm={result} /> : <div />}
    </article>
  );
}

function ArmHeader({ arm, index }: { arm: Arm; index: number }) {
  const [name, setName] = useState(arm.name);
  useEffect(() => setName(arm.name), [arm.name]);
  const rename = () => {
    const wanted = name.trim().slice(0, 64);
    const others = state.value.arms.filter((_, at) => at !== index);
    const given = wanted ? freshName(wanted, others) : arm.name;
    setName(given);
    if (given === arm.name) return;
    const shown = run.value?.arms.find((one) => one.name === arm.name);
    if (shown) shown.name = given;
    update((draft) => void (draft.arms[index]!.name = given));
  };
  return (
    <header class="arm-header">
      <input
        class="arm-name"
        aria-label="Name of the arm"
        value={name}
        maxLength={64}
        onInput={(event) => setName(event.currentTarget.value)}
        onBlur={rename}
        onKeyDown={(event) => event.key === "Enter" && event.currentTarget.blur()}
      />
      {index === 0 && <span class="badge">reference</span>}
      <IconButton
        icon="copy"
        label={`Duplicate ${arm.name}`}
        onClick={() =>
          update((draft) => {
            const copy = structuredClone(draft.arms[index]!);
            copy.name = freshName(copy.parts.length ? copy.name : "unsteered", draft.arms);
            draft.arms.splice(index + 1, 0, copy);
          })
        }
      />
      {index > 0 && (
        <IconButton icon="close" label={`Remove ${arm.name}`} onClick={() => update((draft) => void draft.arms.splice(index, 1))} />
      )}
    </header>
  );
}

function AddPart({ index, parts }: { index: number; parts: Part[] }) {
  const usable = (listing.value?.checkpoints ?? []).filter((one) => one.loadable || one.loaded);
  const named = parts.map((part) => find(part.checkpoint)).map((one) => one && label(one));
  const free = usable.find((one) => !named.includes(label(one)));
  if (!free || (index === 0 && parts.length === 0 && !usable.length)) return null;
  const checkpoint = free.active ? null : label(free);
  return (
    <button
      type="button"
      class="quiet"
      onClick={() => update((draft) => void draft.arms[index]!.parts.push({ checkpoint, attributes: defaults(checkpoint) }))}
    >
      + {parts.length ? "another checkpoint" : "steer it"}
    </button>
  );
}

function PartEditor({ part, arm, at }: { part: Part; arm: number; at: number }) {
  const all = listing.value?.checkpoints ?? [];
  const served = find(part.checkpoint);
  const id = useId();
  const several = state.value.arms[arm]!.parts.length > 1;
  // Attributes of a link that the checkpoint does not have stay visible, and can be taken out.
  const strange = Object.keys(part.attributes).filter((name) => served && !(name in served.attributes));
  const set = (change: (part: Part) => void) => {
    update((draft) => change(draft.arms[arm]!.parts[at]!));
    moved();
  };
  return (
    <div class="part">
      <div class="part-head">
        <label for={id} class="sr-only">
          Checkpoint
        </label>
        <select
          id={id}
          value={part.checkpoint ?? ""}
          onChange={(event) => {
            const checkpoint = event.currentTarget.value || null;
            set((one) => Object.assign(one, { checkpoint, attributes: defaults(checkpoint) }));
          }}
        >
          <option value="">active{listing.value?.active ? ` (${listing.value.active})` : ": none"}</option>
          {part.checkpoint && !all.some((one) => label(one) === part.checkpoint) && <option value={part.checkpoint}>{part.checkpoint}</option>}
          {all.map((one) => (
            <option key={label(one)} value={label(one)} disabled={!one.loadable && !one.loaded}>
              {label(one)}
            </option>
          ))}
        </select>
        <IconButton
          icon="close"
          label={several ? `Take ${part.checkpoint ?? "this checkpoint"} out` : "Do not steer this arm"}
          onClick={() => {
            update((draft) => void draft.arms[arm]!.parts.splice(at, 1));
            moved();
          }}
        />
      </div>
      {served ? (
        Object.entries(served.attributes).map(([name, attribute]) => (
          <Slider
            key={name}
            name={name}
            attribute={attribute}
            value={part.attributes[name] ?? 0}
            onInput={(value) => set((one) => void (one.attributes[name] = value))}
          />
        ))
      ) : (
        <p class="muted">{part.checkpoint ? "There is no such checkpoint here." : "No checkpoint is active."}</p>
      )}
      {strange.map((name) => (
        <p key={name} class="muted">
          {label(served!)} has no attribute “{name}”.{" "}
          <button type="button" class="quiet" onClick={() => set((one) => void delete one.attributes[name])}>
            Leave it out
          </button>
        </p>
      ))}
    </div>
  );
}

export function Slider(props: { name: string; attribute: Attribute; value: number; onInput: (value: number) => void }) {
  const { name, attribute, value, onInput } = props;
  const id = useId();
  const [low, high] = attribute.range;
  const step = 10 ** Math.floor(Math.log10((high - low) / 50));
  const place = (at: number) => `${(100 * (Math.max(low, Math.min(high, at)) - low)) / (high - low)}%`;
  const tidy = (given: number) => Number((Math.round(given / step) * step).toFixed(6));
  const reset = () => onInput(attribute.default);
  const marks = [...new Set([0, attribute.default])].filter((at) => at >= low && at <= high);
  return (
    <div class={`slider a${hue(name)}`}>
      <label for={id}>
        <i class={`dot a${hue(name)}`} />
        {name}
      </label>
      <input
        class="multiplier"
        type="number"
        aria-label={`Multiplier of ${name}`}
        step={step}
        value={value}
        onChange={(event) => Number.isFinite(event.currentTarget.valueAsNumber) && onInput(event.currentTarget.valueAsNumber)}
      />
      <div class="track" style={{ "--value": place(value), "--zero": place(0) }}>
        <input
          id={id}
          type="range"
          min={low}
          max={high}
          step={step}
          value={value}
          title={`${low} to ${high}. ${low < 0 ? "Below 0 the vector is taken away, as far as its gate is open. " : ""}Double click or Delete: back to ${attribute.default}`}
          onInput={(event) => onInput(tidy(event.currentTarget.valueAsNumber))}
          onDblClick={reset}
          onKeyDown={(event) => {
            if (event.key === "Delete" || event.key === "Backspace") reset();
            else if (event.key === "0") onInput(0);
          }}
        />
        {marks.map((at) => (
          <button
            key={at}
            type="button"
            class="mark"
            style={{ "--at": place(at) }}
            aria-label={at === attribute.default ? `${name}: back to the default, ${at}` : `${name}: ${at}`}
            onClick={() => onInput(at)}
          >
            {at}
          </button>
        ))}
      </div>
    </div>
  );
}

const TERMS = {
  steered: "How many of the answer's tokens had something added to an activation, counted on the device where it happens.",
  gate: "The mean over the answer's tokens of how far the gates of the attributes with a multiplier were open: 0 is shut, 1 is wide open. A gate decides for each token how much of the vector is added.",
  kl: "Kullback-Leibler divergence a token, in nats: how differently the steered model would have gone on at each token, compared with the first arm. 0 is no difference.",
  perplexity: "Perplexity of this text divided by that of the first arm's, both under the first arm's model. 1 is equally natural; far above 1, steering has cost fluency.",
  speed: "Tokens a second of this answer, from the start of its computation. All arms share the device.",
} as const;

function Summary({ of, arm }: { of: Run; arm: ArmRun }) {
  void of.changed.value;
  const [open, setOpen] = useState<keyof typeof TERMS | null>(null);
  const id = useId();
  const { result, comparison } = arm;
  const stat = (term: keyof typeof TERMS, name: string, value: string | null) => (
    <div class="stat">
      <dd>{value ?? "–"}</dd>
      <dt>
        <button type="button" class="term" aria-expanded={open === term} aria-controls={id} title={TERMS[term]} onClick={() => setOpen(open === term ? null : term)}>
          {name}
        </button>
      </dt>
    </div>
  );
  const total = result?.usage.completion_tokens ?? 0;
  const seconds = result ? (result.timing.total_ms - result.timing.queue_ms) / 1000 : 0;
  const gate = meanGate(arm.tokens);
  const ended = result && ({ length: "cut at the longest that was asked for", stop: "ended by itself" }[result.finish_reason] ?? result.finish_reason);
  const used = of.asked.max_new_tokens as number;
  const full = result?.finish_reason === "length" && total < used;
  return (
    <footer class="summary">
      <Verdicts arm={arm} />
      <dl>
        {stat("steered", "steered tokens", result && `${result.steering.steered_tokens ?? 0} / ${total}`)}
        {stat("gate", "mean gate", of.state.trace ? result && gate !== null ? number(gate) : null : "no trace")}
        {stat("kl", "KL / token", comparison && number(comparison.kl_per_token))}
        {stat("perplexity", "perplexity ratio", comparison && `${number(comparison.perplexity_ratio)}×`)}
        {stat("speed", "tokens / s", result && seconds > 0 ? (total / seconds).toFixed(0) : null)}
      </dl>
      <p id={id} class="explanation" hidden={!open} role="status">
        {open && TERMS[open]}
        {open === "gate" && !of.state.trace && " It needs a trace, and this was run without one."}
      </p>
      <p class="provenance">
        {result ? (
          <>
            {by(arm)}
            {full ? "the context is full" : ended}
            {of.swapped && ` · ${of.swapped} became active meanwhile: this answer ended on what it began with`}
          </>
        ) : (
          <>{of.status === "stopped" ? "stopped" : of.status === "failed" ? "interrupted" : "…"}</>
        )}
      </p>
      {state.value.mode === "chat" && result && (
        <button
          type="button"
          class="quiet"
          onClick={() =>
            update((draft) => {
              while (draft.turns.at(-1)?.content === "") draft.turns.pop();
              draft.turns.push({ role: "assistant", content: result.text.trim() }, { role: "user", content: "" });
            })
          }
        >
          Go on with this answer
        </button>
      )}
    </footer>
  );
}

function by(arm: ArmRun): string {
  const { steering } = arm.result!;
  const names = steering.parts?.map((one) => `${one.checkpoint}@${one.version}`) ?? (steering.checkpoint ? [`${steering.checkpoint}@${steering.version}`] : []);
  return steering.steered_tokens && names.length ? `by ${names.join(" and ")} · ` : "";
}

/** Over the tokens and their columns: those that have a multiplier, or those of `attribute`; null: there are none. */
export function meanGate(tokens: { trace: { columns: Column[] } | null }[], attribute?: string): number | null {
  const meant = (one: Column) => (attribute === undefined ? one.strength !== 0 : one.attribute === attribute);
  const gates = tokens.flatMap((token) => (token.trace?.columns ?? []).filter(meant).map((one) => one.gate));
  return gates.length ? gates.reduce((sum, one) => sum + one, 0) / gates.length : null;
}

export function Verdicts({ arm }: { arm: Pick<ArmRun, "verdict"> }) {
  if (!arm.verdict) return null;
  const said = Object.entries(arm.verdict).filter((one): one is [string, boolean] => one[1] !== null);
  return (
    <ul class="verdicts" aria-label="The judge's verdicts">
      {said.map(([name, good]) => (
        <li key={name} class={good ? "good" : "bad"}>
          <span aria-hidden="true">{good ? "✓" : "✗"}</span> <span class="sr-only">{good ? "" : "not "}</span>
          {name.replaceAll("_", "-")}
        </li>
      ))}
    </ul>
  );
}

