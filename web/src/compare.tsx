// The first view: a prompt or a conversation, how to sample, and the arms side by side.

import { useEffect, useId } from "preact/hooks";
import { lanes, shown } from "./answer";
import { ArmCard } from "./arm";
import { live, problem, run, start, stop } from "./run";
import { SAMPLING, asQuestion, attributeNames, defaults, drawSeed, freshName, hue, info, listing, state, update, type Turn } from "./state";
import { Icon, IconButton, NumberField, ProblemBox, Switch, TextArea } from "./ui";

const AT_PROMPT = /^(prompt|messages|chat_template|add_)/;

export function Compare() {
  const { arms } = state.value;
  const wrong = problem.value;
  const elsewhere = wrong && !AT_PROMPT.test(wrong.param ?? "") && !wrong.param?.startsWith("arms.") ? wrong : null;
  return (
    <>
      <PromptCard />
      <RunBar />
      <ProblemBox problem={elsewhere} onRetry={() => void start()} />
      <Legend />
      <div class="arms" style={{ "--arms": arms.length }}>
        {arms.map((arm, index) => (
          <ArmCard key={index} arm={arm} index={index} />
        ))}
      </div>
      <AddArm />
    </>
  );
}

export function PromptCard() {
  const { mode, prompt, turns } = state.value;
  const wrong = problem.value && AT_PROMPT.test(problem.value.param ?? "") ? problem.value : null;
  const say = (text: string) =>
    update((draft) => {
      if (draft.mode === "prompt") draft.prompt = text;
      else draft.turns = [...draft.turns.filter((turn) => turn.role === "system"), { role: "user", content: asQuestion(text) }];
    });
  return (
    <section class="card prompt-card" aria-label="What to ask">
      <div class="row spread">
        <div class="segmented" role="group" aria-label="Prompt or chat">
          {(["prompt", "chat"] as const).map((one) => (
            <button
              key={one}
              type="button"
              aria-pressed={mode === one}
              disabled={one === "chat" && !info.value?.chat}
              title={one === "chat" && !info.value?.chat ? "This model has no chat template." : undefined}
              onClick={() => update((draft) => void (draft.mode = one))}
            >
              {one === "prompt" ? "Prompt" : "Chat"}
            </button>
          ))}
        </div>
        <div class="examples">
          {(info.value?.prompts ?? []).map((text) => (
            <button key={text} type="button" class="chip" onClick={() => say(text)} title={text}>
              {shortened(asQuestion(text))}
            </button>
          ))}
        </div>
      </div>
      {mode === "prompt" ? (
        <TextArea
          label="Prompt"
          value={prompt}
          placeholder="A text for the model to go on with"
          invalid={wrong !== null}
          onInput={(text) => update((draft) => void (draft.prompt = text))}
        />
      ) : (
        <Conversation turns={turns} invalid={wrong !== null} />
      )}
      <ProblemBox problem={wrong} onRetry={() => void start()} />
      <SamplingFields />
    </section>
  );
}

const shortened = (text: string): string => (text.length > 44 ? `${text.slice(0, 42).trimEnd()}…` : text);

function Conversation({ turns, invalid }: { turns: Turn[]; invalid: boolean }) {
  return (
    <div class="turns">
      {turns.map((turn, index) => (
        <div key={index} class={`turn ${turn.role}`}>
          <select
            aria-label={`Who says turn ${index + 1}`}
            value={turn.role}
            onChange={(event) => update((draft) => void (draft.turns[index]!.role = event.currentTarget.value as Turn["role"]))}
          >
            {["system", "user", "assistant"].map((role) => (
              <option key={role}>{role}</option>
            ))}
          </select>
          <TextArea
            label={`Turn ${index + 1}, ${turn.role}`}
            value={turn.content}
            rows={1}
            invalid={invalid}
            placeholder={turn.role === "user" ? "What you say" : ""}
            onInput={(text) => update((draft) => void (draft.turns[index]!.content = text))}
          />
          {turns.length > 1 && (
            <IconButton icon="close" label={`Remove turn ${index + 1}`} onClick={() => update((draft) => void draft.turns.splice(index, 1))} />
          )}
        </div>
      ))}
      <button
        type="button"
        class="quiet"
        onClick={() => update((draft) => void draft.turns.push({ role: draft.turns.at(-1)?.role === "user" ? "assistant" : "user", content: "" }))}
      >
        + turn
      </button>
    </div>
  );
}

const FIELDS: [keyof typeof SAMPLING, string, { min?: number; max?: number; step?: number; hint: string }][] = [
  ["max_new_tokens", "Longest answer", { min: 1, step: 1, hint: "tokens" }],
  ["temperature", "Temperature", { min: 0, max: 100, step: 0.1, hint: "0 takes the likeliest token each time" }],
  ["top_p", "Top p", { min: 0.01, max: 1, step: 0.05, hint: "only the likeliest tokens that make up this share; 1 is off" }],
  ["top_k", "Top k", { min: 0, step: 1, hint: "only so many of the likeliest tokens; 0 is off" }],
  ["min_p", "Min p", { min: 0, max: 1, step: 0.05, hint: "only tokens at least this share as likely as the likeliest; 0 is off" }],
  ["repetition_penalty", "Repetition penalty", { min: 0.01, step: 0.1, hint: "1 is off" }],
  ["presence_penalty", "Presence penalty", { min: -2, max: 2, step: 0.1, hint: "0 is off" }],
  ["frequency_penalty", "Frequency penalty", { min: -2, max: 2, step: 0.1, hint: "0 is off" }],
];

function SamplingFields() {
  const { sampling } = state.value;
  const id = useId();
  const told = [
    `temperature ${sampling.temperature}`,
    `up to ${sampling.max_new_tokens} tokens`,
    sampling.seed === null ? "a new seed each time" : `seed ${sampling.seed}`,
    ...FIELDS.slice(2)
      .filter(([name]) => sampling[name] !== SAMPLING[name])
      .map(([name, title]) => `${title.toLowerCase()} ${sampling[name]}`),
  ].join(", ");
  return (
    <details class="sampling">
      <summary>
        Sampling <span class="muted">{told}</span>
      </summary>
      <div class="fields">
        {FIELDS.map(([name, title, options]) => (
          <NumberField
            key={name}
            label={title}
            value={sampling[name]}
            {...options}
            onChange={(value) => update((draft) => void (draft.sampling[name] = value!))}
          />
        ))}
        <div class="with-button">
          <NumberField
            label="Seed"
            value={sampling.seed}
            step={1}
            optional
            placeholder="new each time"
            hint="the same seed gives the same text; all arms share it"
            onChange={(value) => update((draft) => void (draft.sampling.seed = value))}
          />
          <IconButton icon="dice" label="Draw a seed" onClick={() => update((draft) => void (draft.sampling.seed = drawSeed() % 10_000))} />
        </div>
        <label class="field wide" for={id}>
          <span>Stop texts, one a line</span>
          <textarea
            id={id}
            rows={1}
            value={sampling.stop}
            placeholder="\n for the end of a line"
            onInput={(event) => {
              const text = event.currentTarget.value;
              update((draft) => void (draft.sampling.stop = text));
            }}
          />
        </label>
      </div>
    </details>
  );
}

function RunBar() {
  const running = run.value?.status === "running";
  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        void start();
      }
    };
    document.addEventListener("keydown", onKey);
    return () => document.removeEventListener("keydown", onKey);
  }, []);
  return (
    <div class="row run-bar">
      {running ? (
        <button type="button" class="primary" onClick={stop}>
          <Icon name="stop" /> Stop
        </button>
      ) : (
        <button type="button" class="primary" onClick={() => void start()} title="Ctrl + Enter">
          <Icon name="play" /> Run
        </button>
      )}
      <Switch
        label="Run as sliders move"
        checked={live.value}
        hint="Each change of a slider asks the server again"
        onChange={(on) => (live.value = on)}
      />
      <TraceSwitch />
      {run.value && <span class="muted seed">seed {String(run.value.asked.seed)}</span>}
    </div>
  );
}

/** Compare and Dose-response ask with it, or without. */
export function TraceSwitch() {
  return (
    <Switch
      label="Trace"
      checked={state.value.trace}
      hint="What was done to each token: the strips, their numbers, and the mean gate. On a GPU, answers come faster without, since steps with a trace run outside of CUDA graphs."
      onChange={(on) => update((draft) => void (draft.trace = on))}
    />
  );
}

function Legend() {
  const of = run.value;
  if (of) void of.changed.value;
  if (!of?.arms.some((arm) => arm.tokens.length)) {
    const names = attributeNames.value;
    return (
      <p class="muted legend">
        {names.length
          ? "Steering adds vectors to what a model computes while it writes. Run this, move a slider, and see which tokens it touched: each arm answers the same prompt with the same seed."
          : "No checkpoint can be used yet: see Checkpoints."}
      </p>
    );
  }
  return (
    <div class="row legend">
      {of.state.trace ? (
        <div class="segmented small" role="group" aria-label="What the strips show">
          <button type="button" aria-pressed={shown.value === "strength"} title="multiplier x gate" onClick={() => (shown.value = "strength")}>
            Steering
          </button>
          <button type="button" aria-pressed={shown.value === "gate"} title="how open each gate was, also where the multiplier is 0" onClick={() => (shown.value = "gate")}>
            Gates
          </button>
        </div>
      ) : (
        <span class="muted">Run without a trace: what was done to each token is not known.</span>
      )}
      {of.state.trace && (
        <ul class="keys" aria-label="Colours of the strips, from top to bottom">
          {lanes(of).map((name) => (
            <li key={name}>
              <i class={`ramp a${hue(name)}`} /> {name}
            </li>
          ))}
        </ul>
      )}
      <span class="muted">
        <span class="divergence">◆</span> first token that differs from {of.arms[0]!.name}
      </span>
    </div>
  );
}

function AddArm() {
  const { arms } = state.value;
  if (arms.length >= 32) return null;
  const add = (name: string, attributes: Record<string, number>) =>
    update((draft) => void draft.arms.push({ name: freshName(name, draft.arms), parts: [{ checkpoint: null, attributes }] }));
  const active = listing.value?.active ? defaults(null) : {};
  const names = Object.keys(active);
  return (
    <div class="row add-arm">
      <span class="muted">Add an arm:</span>
      {names.length > 1 &&
        names.map((name) => (
          <button key={name} type="button" class="chip" onClick={() => add(`${name} alone`, Object.fromEntries(names.map((one) => [one, one === name ? active[one]! : 0])))}>
            <i class={`dot a${hue(name)}`} /> {name} alone
          </button>
        ))}
      {names.length > 0 && (
        <button type="button" class="chip" onClick={() => add("away", Object.fromEntries(names.map((one) => [one, -active[one]!])))}>
          steered away
        </button>
      )}
      <button type="button" class="chip" onClick={() => update((draft) => void draft.arms.push({ name: freshName("unsteered", draft.arms), parts: [] }))}>
        unsteered
      </button>
    </div>
  );
}
