// Two arms' answers without their names: a person says which is better, and the server keeps it.

import { signal } from "@preact/signals";
import { useEffect, useState } from "preact/hooks";
import { Problem, compare, download, getStudies, vote, type Study } from "./api";
import { PromptCard } from "./compare";
import { save } from "./exports";
import { body, drawSeed, label, find, state, steering, type Arm } from "./state";
import { Icon, ProblemBox } from "./ui";

interface Round {
  asked: Record<string, unknown>;
  arms: [Arm, Arm];
  texts: [string, string] | null; // in the order of the arms
  first: 0 | 1; // which arm stands on the left
  id: string;
  winner: 0 | 1 | null | undefined; // undefined: not said yet
}

const round = signal<Round | null>(null);
const trouble = signal<{ problem: Problem; retry: () => void } | null>(null);
const studies = signal<Study[]>([]);
const busy = signal(false);

/** With its checkpoint by version, so that every vote of a study is about the same steering. */
function settled(arm: Arm): Arm {
  const parts = arm.parts.map((part) => {
    const served = find(part.checkpoint);
    return { ...part, checkpoint: served ? label(served) : part.checkpoint };
  });
  return { ...arm, parts };
}

async function attempt(work: () => Promise<void>): Promise<void> {
  trouble.value = null;
  busy.value = true;
  try {
    await work();
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    trouble.value = { problem: error, retry: () => void attempt(work) };
  } finally {
    busy.value = false;
  }
}

const reload = () => attempt(async () => void (studies.value = await getStudies()));

const ask = (arms: [Arm, Arm]) =>
  attempt(async () => {
    round.value = null;
    const of = { ...structuredClone(state.value), arms };
    const asked = body(of, drawSeed());
    const answer = await compare(asked, () => undefined, new AbortController().signal);
    const texts = answer.arms.map((arm) => arm.results[0]!.text) as [string, string];
    // Not randomUUID: a page without TLS, other than of this machine, has none.
    const id = [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
    round.value = { asked, arms, texts, first: Math.random() < 0.5 ? 0 : 1, id, winner: undefined };
  });

const decide = (study: string, of: Round, winner: 0 | 1 | null) =>
  attempt(async () => {
    const { arms, ...asked } = of.asked;
    await vote(study, {
      id: of.id,
      arms: of.arms.map((arm) => ({ name: arm.name, ...steering(arm.parts) })),
      asked,
      texts: of.texts,
      winner,
      shown_first: of.first,
    });
    round.value = { ...of, winner };
    studies.value = await getStudies();
  });

export function Blind() {
  const { arms } = state.value;
  const [study, setStudy] = useState("study");
  const [chosen, setChosen] = useState<[string, string]>([arms[0]!.name, (arms[1] ?? arms[0]!).name]);
  useEffect(() => void reload(), []);
  const pair = chosen.map((name) => arms.find((arm) => arm.name === name)).filter((arm) => arm !== undefined).map(settled);
  const ready = pair.length === 2 && pair[0]!.name !== pair[1]!.name && study.trim() !== "";
  const current = round.value;
  const next = () => void ask(pair as [Arm, Arm]);

  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      if (event.target instanceof HTMLElement && event.target.closest("input, textarea, select")) return;
      const open = current && current.winner === undefined && !busy.value;
      if (open && event.key === "1") void decide(study.trim(), current, current.first);
      else if (open && event.key === "2") void decide(study.trim(), current, current.first ? 0 : 1);
      else if (open && event.key === "0") void decide(study.trim(), current, null);
      else if (event.key === "n" && ready && !busy.value && current?.winner !== undefined) next();
    };
    document.addEventListener("keydown", onKey);
    return () => document.removeEventListener("keydown", onKey);
  });

  return (
    <>
      <PromptCard />
      <section class="card" aria-label="The study">
        <div class="fields axis">
          <label class="field">
            <span>Study</span>
            <input value={study} maxLength={64} onInput={(event) => setStudy(event.currentTarget.value)} />
          </label>
          {([0, 1] as const).map((index) => (
            <label key={index} class="field">
              <span>{index ? "against" : "Arm"}</span>
              <select
                value={chosen[index]}
                onChange={(event) => setChosen(index ? [chosen[0], event.currentTarget.value] : [event.currentTarget.value, chosen[1]])}
              >
                {arms.map((arm) => (
                  <option key={arm.name}>{arm.name}</option>
                ))}
              </select>
            </label>
          ))}
        </div>
        <div class="row measure">
          <button type="button" class="primary" disabled={!ready || busy.value} onClick={next}>
            <Icon name="play" /> {current ? "Next pair" : "First pair"}
          </button>
          <span class="muted">{ready ? "Both answer the prompt above; which is which is shown after the vote." : "Choose two different arms; they are made in Compare."}</span>
        </div>
      </section>
      {trouble.value && <ProblemBox problem={trouble.value.problem} onRetry={trouble.value.retry} />}
      {current?.texts && (
        <>
          <div class="blind">
            {[current.first, current.first ? 0 : 1].map((index, place) => (
              <article key={place} class="card" aria-label={`Answer ${place + 1}`}>
                <h2>
                  Answer {place + 1}
                  {current.winner !== undefined && <span class="badge on"> {current.arms[index]!.name}</span>}
                </h2>
                <p class="text" dir="auto">
                  {current.texts![index]!.trim()}
                </p>
                <button
                  type="button"
                  disabled={busy.value || current.winner !== undefined}
                  onClick={() => void decide(study.trim(), current, index as 0 | 1)}
                >
                  Answer {place + 1} is better <kbd>{place + 1}</kbd>
                </button>
              </article>
            ))}
          </div>
          <div class="row">
            <button type="button" disabled={busy.value || current.winner !== undefined} onClick={() => void decide(study.trim(), current, null)}>
              A tie <kbd>0</kbd>
            </button>
            <span class="muted" role="status">
              {current.winner !== undefined && "The vote is kept."}
            </span>
          </div>
        </>
      )}
      {studies.value.length > 0 && <Results />}
    </>
  );
}

function Results() {
  return (
    <section class="card">
      <h2>Studies</h2>
      <div class="scroll" tabIndex={0} role="region" aria-label="Studies">
        <table>
          <thead>
            <tr>
              <th scope="col">study</th>
              <th scope="col">arms</th>
              <th scope="col" class="right">
                votes
              </th>
              <th scope="col" title="of the second arm against the first; a tie is half a win">
                win rate of the second, 95 % interval
              </th>
              <th scope="col" />
            </tr>
          </thead>
          <tbody>
            {studies.value.map((one) => (
              <tr key={one.study}>
                <th scope="row">{one.study}</th>
                <td>
                  {one.arms[0]} against {one.arms[1]}
                </td>
                <td class="right nowrap">
                  {one.votes} <small class="muted">({one.wins[0]} : {one.wins[1]}, ties {one.ties})</small>
                </td>
                <td>
                  <div class="interval a4">
                    <span>
                      {(one.win_rate * 100).toFixed(0)} %{" "}
                      <small class="muted">
                        [{(one.low * 100).toFixed(0)}, {(one.high * 100).toFixed(0)}]
                      </small>
                    </span>
                    <span
                      class="bar"
                      style={{ "--value": `${one.win_rate * 100}%`, "--low": `${one.low * 100}%`, "--high": `${one.high * 100}%` }}
                    />
                  </div>
                </td>
                <td class="right">
                  <button
                    type="button"
                    class="quiet"
                    onClick={() => void attempt(async () => save(`${one.study}.csv`, await download(`studies/${encodeURIComponent(one.study)}/votes.csv`)))}
                  >
                    CSV
                  </button>
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </section>
  );
}
