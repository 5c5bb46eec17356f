// One multiplier becomes an axis: all answers from one request, and what changes along it.

import { signal, type Signal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { Problem, compare, judge, type Comparison, type TokenEvent, type Verdict } from "./api";
import { Verdicts, meanGate } from "./arm";
import { Chart } from "./chart";
import { PromptCard, TraceSwitch } from "./compare";
import { question } from "./run";
import { MOST_SAMPLES, MOST_STEPS, attributeNames, body, defaults, drawSeed, find, hue, info, label, listing, state, update, whole, type Dose, type Part, type State } from "./state";
import { Icon, NumberField, ProblemBox, number, percent } from "./ui";

interface Point {
  multiplier: number;
  texts: string[];
  gate: number | null;
  kl: number | null;
  verdicts: Verdict[];
  tokens: TokenEvent[];
}

interface Curve {
  attribute: string;
  points: Point[];
  traced: boolean;
  done: boolean;
  changed: Signal<number>;
}

const curve = signal<Curve | null>(null);
const trouble = signal<Problem | null>(null);
let control: AbortController | null = null;

/** The checkpoint whose attribute it is: the active one, where it has it. */
function owner(attribute: string) {
  const usable = (listing.value?.checkpoints ?? []).filter((one) => (one.loadable || one.loaded) && attribute in one.attributes);
  return usable.find((one) => one.active) ?? usable[0];
}

/** What steers at one place of the axis: the arm that is named, if any, and the attribute with this multiplier. */
function partsAt(of: State, dose: Dose, multiplier: number): Part[] {
  const arm = of.arms.find((one) => one.name === dose.arm && one.parts.length);
  const parts = structuredClone(arm?.parts ?? []);
  let part = parts.find((one) => dose.attribute in (find(one.checkpoint)?.attributes ?? {}));
  if (!part) {
    const from = owner(dose.attribute);
    part = { checkpoint: from && !from.active ? label(from) : null, attributes: {} };
    parts.push(part);
  }
  part.attributes[dose.attribute] = multiplier;
  return parts;
}

function usual(): Dose {
  const arm = state.value.arms.find((one) => one.parts.length);
  const names = Object.keys(arm ? (find(arm.parts[0]!.checkpoint)?.attributes ?? {}) : defaults(null));
  const attribute = names[0] ?? attributeNames.value[0] ?? "";
  return { arm: null, attribute, ...rangeOf(attribute), steps: 9, samples: info.value?.judged ? 4 : 1 };
}

function rangeOf(attribute: string): { from: number; to: number } {
  const [low, high] = owner(attribute)?.attributes[attribute]?.range ?? [-2, 2];
  return { from: low / 2, to: high / 2 };
}

/** Rounded far below their distance, so that no two are one. */
function multipliers({ from, to, steps }: Dose): number[] {
  const distance = (to - from) / Math.max(1, steps - 1);
  const digits = whole(3 - Math.floor(Math.log10(distance)), 0, 100);
  return Array.from({ length: steps }, (_, at) => Number((from + distance * at).toFixed(digits)));
}

async function measure(dose: Dose): Promise<void> {
  control?.abort();
  const mine = (control = new AbortController());
  trouble.value = null;
  const of = structuredClone(state.value);
  const points = multipliers(dose).map((multiplier): Point => ({ multiplier, texts: [], gate: null, kl: null, verdicts: [], tokens: [] }));
  const current: Curve = { attribute: dose.attribute, points, traced: of.trace, done: false, changed: signal(0) };
  const byName = new Map(points.map((point) => [`x${point.multiplier}`, point]));
  of.arms = [{ name: "unsteered", parts: [] }];
  for (const [name, point] of byName) of.arms.push({ name, parts: partsAt(state.value, dose, point.multiplier) });
  const asked = { ...body(of, of.sampling.seed ?? drawSeed()), n: dose.samples, trace: of.trace };
  curve.value = current;
  let frame = 0;
  const show = () => {
    frame = 0;
    current.changed.value++;
  };
  try {
    const answer = await compare(
      asked,
      (token) => {
        if (token.index !== 0) return;
        byName.get(token.arm)?.tokens.push(token);
        frame ||= requestAnimationFrame(show);
      },
      mine.signal,
    );
    for (const arm of answer.arms.slice(1)) {
      const point = byName.get(arm.name)!;
      point.texts = arm.results.map((result) => result.text);
      const all = [arm.comparison].flat().filter((one): one is Comparison => one !== null);
      point.kl = all.reduce((sum, one) => sum + one.kl_per_token, 0) / all.length;
      point.gate = meanGate(
        arm.results.flatMap((result) => (result.trace ?? []).map((each) => ({ trace: each }))),
        dose.attribute,
      );
    }
    const about = question(of);
    if (info.value?.judged && about !== null) {
      const verdicts = await judge(about, points.flatMap((point) => point.texts)).catch(() => []);
      points.forEach((point, at) => (point.verdicts = verdicts.slice(at * dose.samples, (at + 1) * dose.samples)));
    }
  } catch (error) {
    if (control !== mine) return;
    if (error instanceof Problem) trouble.value = error;
    else if (!(error instanceof DOMException)) throw error;
  } finally {
    cancelAnimationFrame(frame);
    current.done = true;
    show();
  }
}

export function DoseResponse() {
  const given = state.value.dose;
  const dose = given && attributeNames.value.includes(given.attribute) ? given : usual();
  const set = (change: Partial<Dose>) => update((draft) => void (draft.dose = { ...dose, ...change }));
  useEffect(() => () => control?.abort(), []);
  const names = attributeNames.value;
  const arms = state.value.arms.filter((arm) => arm.parts.length);
  const room = info.value?.max_texts ?? 256;
  const texts = (dose.steps + 1) * dose.samples;
  const current = curve.value;
  if (current) void current.changed.value;
  if (!names.length) return <p class="muted">No checkpoint can be used yet: see Checkpoints.</p>;
  return (
    <>
      <PromptCard />
      <section class="card" aria-label="The axis">
        <div class="fields axis">
          <label class="field">
            <span>Attribute</span>
            <select value={dose.attribute} onChange={(event) => set({ attribute: event.currentTarget.value, ...rangeOf(event.currentTarget.value) })}>
              {names.map((name) => (
                <option key={name}>{name}</option>
              ))}
            </select>
          </label>
          <label class="field">
            <span>Others</span>
            <select value={dose.arm ?? ""} onChange={(event) => set({ arm: event.currentTarget.value || null })}>
              <option value="">at 0</option>
              {arms.map((arm) => (
                <option key={arm.name} value={arm.name}>
                  as in {arm.name}
                </option>
              ))}
            </select>
          </label>
          <NumberField label="From" value={dose.from} step={0.5} onChange={(value) => set({ from: value! })} />
          <NumberField label="To" value={dose.to} step={0.5} onChange={(value) => set({ to: value! })} />
          <NumberField label="Steps" value={dose.steps} min={2} max={MOST_STEPS} step={1} onChange={(value) => set({ steps: whole(value, 2, MOST_STEPS) })} />
          <NumberField label="Answers each" value={dose.samples} min={1} max={MOST_SAMPLES} step={1} onChange={(value) => set({ samples: whole(value, 1, MOST_SAMPLES) })} />
        </div>
        <div class="row measure">
          {current && !current.done ? (
            <button type="button" class="primary" onClick={() => control?.abort()}>
              <Icon name="stop" /> Stop
            </button>
          ) : (
            <button type="button" class="primary" disabled={texts > room || dose.from >= dose.to} onClick={() => void measure(dose)}>
              <Icon name="play" /> Measure
            </button>
          )}
          <TraceSwitch />
          <span class="muted">
            {texts > room ? `${texts} texts are more than the ${room} that one request may ask for.` : `${texts} texts in one request`}
          </span>
        </div>
      </section>
      <ProblemBox problem={trouble.value} onRetry={() => void measure(dose)} />
      {current && <Results curve={current} />}
    </>
  );
}

function Results({ curve }: { curve: Curve }) {
  void curve.changed.value;
  const { points, attribute, traced } = curve;
  const xs = points.map((point) => point.multiplier);
  const line = (name: string, of: (point: Point) => number | null, tint: number | null) => ({
    name,
    hue: tint,
    points: points.flatMap((point) => {
      const y = of(point);
      return y === null ? [] : [{ x: point.multiplier, y }];
    }),
  });
  const judged = [...new Set(points.flatMap((point) => point.verdicts.flatMap((one) => Object.keys(one).filter((name) => one[name] !== null))))];
  const x = `multiplier of ${attribute}`;
  return (
    <>
      {!traced && <p class="muted">Measured without a trace: the mean gate needs one.</p>}
      <div class="charts">
        {traced && <Chart title="Mean gate" x={x} xs={xs} top={1} lines={[line("mean gate", (point) => point.gate, hue(attribute))]} />}
        <Chart title="KL a token, nats" x={x} xs={xs} lines={[line("KL", (point) => point.kl, hue(attribute))]} />
        {(info.value?.judged ?? false) && (
          <Chart
            title="Judge"
            x={x}
            xs={xs}
            top={1}
            format={percent}
            lines={judged.map((name) => line(name.replaceAll("_", "-"), (point) => share(point, name), attributeNames.value.includes(name) ? hue(name) : null))}
          />
        )}
      </div>
      <div class="scroll" tabIndex={0} role="region" aria-label="Answers over the multiplier">
        <table class="answers">
          <thead>
            <tr>
              <th scope="col">multiplier</th>
              <th scope="col">answer{(points[0]?.texts.length ?? 0) > 1 && " (the first)"}</th>
              {traced && (
                <th scope="col" class="right">
                  mean gate
                </th>
              )}
              <th scope="col" class="right">KL</th>
              {judged.map((name) => (
                <th key={name} scope="col" class="right">
                  {name.replaceAll("_", "-")}
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {points.map((point) => (
              <tr key={point.multiplier} class={point.multiplier === 0 ? "zero" : ""}>
                <th scope="row">{String(point.multiplier).replace("-", "−")}</th>
                <td dir="auto" class="text">
                  {point.texts[0] ?? point.tokens.map((token) => token.text).join("")}
                  {point.verdicts[0] && point.texts.length === 1 && <Verdicts arm={{ verdict: point.verdicts[0] }} />}
                </td>
                {traced && <td class="right">{point.gate === null ? "–" : number(point.gate)}</td>}
                <td class="right">{point.kl === null ? "–" : number(point.kl)}</td>
                {judged.map((name) => (
                  <td key={name} class="right">
                    {percent(share(point, name) ?? 0)}
                  </td>
                ))}
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </>
  );
}

function share(point: Point, name: string): number | null {
  const said = point.verdicts.map((one) => one[name]).filter((one) => one !== null && one !== undefined);
  return said.length ? said.filter(Boolean).length / said.length : null;
}
