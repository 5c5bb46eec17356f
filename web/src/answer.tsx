// An answer, token by token, with what steering did to each under it.

import { signal } from "@preact/signals";
import { useEffect, useLayoutEffect, useMemo, useRef } from "preact/hooks";
import { memo } from "./memo";
import type { Column, TokenEvent } from "./api";
import { divergence, run, type ArmRun, type Run } from "./run";
import { hue } from "./state";
import { number, percent } from "./ui";

export type Shown = "strength" | "gate";
export const shown = signal<Shown>("strength");

interface Picked {
  arm: string;
  at: number;
  anchor: HTMLElement;
  pinned: boolean;
}
const picked = signal<Picked | null>(null);

/** The attributes that have a lane under the tokens: those that some arm steers; of gates, all. */
export function lanes(of: Run): string[] {
  const steered = new Set<string>();
  const all = new Set<string>();
  for (const arm of of.arms)
    for (const column of arm.tokens[0]?.trace?.columns ?? []) {
      all.add(column.attribute);
      if (arm.tokens.some((token) => token.trace?.columns.some((one) => one.attribute === column.attribute && one.strength))) steered.add(column.attribute);
    }
  return [...(shown.value === "gate" ? all : steered)];
}

/** The strongest that one attribute did to a token; an attribute may act at several sites. */
function strongest(columns: Column[], attribute: string): Column | undefined {
  return columns
    .filter((column) => column.attribute === attribute)
    .reduce<Column | undefined>((most, one) => (!most || Math.abs(one.strength || one.gate) > Math.abs(most.strength || most.gate) ? one : most), undefined);
}

function scale(of: Run): number {
  const multipliers = of.state.arms.flatMap((arm) => arm.parts.flatMap((part) => Object.values(part.attributes).map(Math.abs)));
  return shown.value === "gate" ? 1 : Math.max(1, ...multipliers);
}

function stripe(columns: Column[], attribute: string, most: number): string {
  const column = strongest(columns, attribute);
  const value = column ? (shown.value === "gate" ? column.gate : column.strength) : 0;
  const share = Math.min(1, Math.abs(value) / most);
  const colour = `color-mix(in oklab, var(--a${hue(attribute)}) ${Math.round(share * 100)}%, var(--lane))`;
  return value < 0 ? `repeating-linear-gradient(135deg, ${colour} 0 2px, var(--lane) 2px 4px)` : `linear-gradient(${colour} 0 0)`;
}

const Token = memo(function Token(props: { token: TokenEvent; at: number; lanes: string[]; most: number; kind: string; mode: Shown }) {
  const { token, at, lanes, most, kind } = props;
  const columns = token.trace?.columns ?? [];
  const unseen = token.text === "";
  return (
    <span
      class={`tok ${kind} ${unseen ? "unseen" : ""}`}
      data-at={at}
      style={{
        backgroundImage: lanes.map((name) => stripe(columns, name, most)).join(","),
        backgroundPosition: lanes.map((_, lane) => `0 calc(100% - ${(lanes.length - 1 - lane) * 5}px)`).join(","),
        paddingBottom: `${lanes.length * 5 + 2}px`,
      }}
    >
      {unseen ? "·" : at === 0 ? token.text.trimStart() || token.text : token.text}
    </span>
  );
});

export function Answer({ of, arm, busy }: { of: Run; arm: ArmRun; busy: boolean }) {
  void of.changed.value;
  const box = useRef<HTMLDivElement>(null);
  const names = lanes(of);
  const key = names.join("\n");
  const stable = useMemo(() => names, [key]);
  const baseline = of.arms[0]!;
  const differs = arm === baseline ? null : divergence(arm, baseline);
  const most = scale(of);
  const tokens = arm.tokens;
  const selected = picked.value?.arm === arm.name ? picked.value.at : -1;

  // While an answer streams, its box never gets smaller than it was.
  useLayoutEffect(() => {
    const element = box.current!;
    if (busy) element.style.minHeight = `${element.offsetHeight}px`;
    else element.style.minHeight = "";
  }, [busy]);

  useEffect(() => {
    box.current!.querySelector(".tok.on")?.classList.remove("on");
    if (selected >= 0) box.current!.querySelector(`[data-at="${selected}"]`)?.classList.add("on");
  }, [selected, tokens.length]);

  const pick = (element: Element | null, pinned: boolean) => {
    const token = element?.closest<HTMLElement>(".tok");
    if (!token || !box.current!.contains(token)) return;
    picked.value = { arm: arm.name, at: Number(token.dataset.at), anchor: token, pinned };
  };
  const go = (event: KeyboardEvent) => {
    const by = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") picked.value = null;
    if (by === undefined || !tokens.length) return;
    event.preventDefault();
    const from = selected < 0 ? (by > 0 ? -1 : tokens.length) : selected;
    const to = Math.max(0, Math.min(tokens.length - 1, from + by));
    pick(box.current!.querySelector(`[data-at="${to}"]`), true);
  };

  return (
    <div
      ref={box}
      class={`answer ${busy ? "busy" : ""}`}
      dir="auto"
      role="group"
      tabIndex={0}
      aria-label={`Answer of ${arm.name}. Arrow keys go from token to token.`}
      aria-busy={busy}
      onKeyDown={go}
      onPointerOver={(event) => event.pointerType === "mouse" && !picked.value?.pinned && pick(event.target as Element, false)}
      onPointerLeave={() => !picked.value?.pinned && (picked.value = null)}
      onClick={(event) => pick(event.target as Element, true)}
    >
      {tokens.map((token, at) => (
        <>
          {differs === at && <DivergenceMark />}
          <Token
            token={token}
            at={at}
            lanes={stable}
            most={most}
            mode={shown.value}
            kind={arm === baseline ? "" : differs === null || at < differs ? "same" : "differs"}
          />
        </>
      ))}
      {differs === tokens.length && arm.result && <DivergenceMark />}
      {busy && <span class="caret" aria-hidden="true" />}
    </div>
  );
}

function DivergenceMark() {
  return (
    <span class="divergence" title="From here on the text differs from the baseline" role="img" aria-label="differs from the baseline from here on">
      ◆
    </span>
  );
}

/** The numbers of the token that is hovered over, tapped or gone to with the keyboard. */
export function TokenCard() {
  const box = useRef<HTMLDivElement>(null);
  const of = run.value;
  const choice = picked.value;
  const arm = choice && of?.arms.find((one) => one.name === choice.arm);
  const token = arm?.tokens[choice?.at ?? -1];

  useLayoutEffect(() => {
    if (!token || !choice || !box.current) return;
    const place = choice.anchor.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = box.current;
    const left = Math.max(8, Math.min(place.left, innerWidth - width - 8));
    const below = place.bottom + 8;
    const top = below + height < innerHeight ? below : Math.max(8, place.top - height - 8);
    box.current.style.setProperty("--left", `${left}px`);
    box.current.style.setProperty("--top", `${top}px`);
  });
  useEffect(() => {
    if (!choice?.pinned) return;
    const close = (event: Event) => {
      if (event instanceof KeyboardEvent ? event.key === "Escape" : !(event.target as Element).closest?.(".answer, .token-card")) picked.value = null;
    };
    const away = () => (picked.value = null);
    document.addEventListener("pointerdown", close);
    document.addEventListener("keydown", close);
    window.addEventListener("resize", away);
    return () => {
      document.removeEventListener("pointerdown", close);
      document.removeEventListener("keydown", close);
      window.removeEventListener("resize", away);
    };
  }, [choice]);

  if (!of || !choice || !arm || !token) return null;
  const other = arm === of.arms[0] ? undefined : of.arms[0]?.tokens[choice.at];
  const name = token.trace?.token ?? token.text;
  return (
    <div ref={box} class={`token-card ${choice.pinned ? "pinned" : ""}`} role="status">
      <div class="head">
        <code>{visible(name)}</code>
        <span class="muted">
          token {choice.at + 1} of {arm.name}
        </span>
        {choice.pinned && (
          <button type="button" class="icon-button" aria-label="Close" onClick={() => (picked.value = null)}>
            ✕
          </button>
        )}
      </div>
      {token.trace && token.trace.columns.length > 0 ? (
        <table>
          <thead>
            <tr>
              <th scope="col">steering</th>
              <th scope="col" title="how far the gate was open for this token, 0 to 1">gate</th>
              <th scope="col" title="multiplier x gate: how much of the vector was added">strength</th>
              <th scope="col" title="length of what was added to the activation">‖Δ‖</th>
              <th scope="col" title="between what was added and the activation: −1 against it, 1 along with it">cos</th>
            </tr>
          </thead>
          <tbody>
            {token.trace.columns.map((column) => (
              <tr key={column.attribute + column.site} class={column.strength ? "" : "muted"}>
                <th scope="row">
                  <i class={`dot a${hue(column.attribute)}`} />
                  {column.attribute}
                  <small> {column.site}</small>
                </th>
                <td>{number(column.gate)}</td>
                <td>{number(column.strength)}</td>
                <td>{column.delta_norm ? number(column.delta_norm, 1) : "0"}</td>
                <td>{number(column.cosine)}</td>
              </tr>
            ))}
          </tbody>
        </table>
      ) : (
        <p class="muted">{of.state.trace ? "No checkpoint acts on this arm." : "Run without a trace: what was done to this token is not known."}</p>
      )}
      {token.logprob && (
        <ul class="tops" aria-label="What the steered model held likely here">
          {withChosen(token).map((one) => (
            <li key={one.token_id} class={one.token_id === token.token_id ? "chosen" : ""}>
              <code>{visible(one.token)}</code>
              <span class="bar" style={{ "--share": `${Math.exp(one.logprob) * 100}%` }} />
              <span>{percent(Math.exp(one.logprob))}</span>
            </li>
          ))}
        </ul>
      )}
      {other && other.token_id !== token.token_id && (
        <p class="muted">
          The baseline has <code>{visible(other.trace?.token ?? other.text)}</code> here.
        </p>
      )}
    </div>
  );
}

function withChosen(token: TokenEvent) {
  const { top, ...own } = token.logprob!;
  return top.some((one) => one.token_id === own.token_id) ? top : [...top, own];
}

/** A token's text with what cannot be seen made visible. */
const visible = (text: string): string => text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
