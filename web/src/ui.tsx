// Small parts that every view uses.

import type { ComponentChildren } from "preact";
import { useEffect, useRef } from "preact/hooks";
import type { Problem } from "./api";

const PATHS = {
  play: "M7 4.5v15l12-7.5z",
  stop: "M6 6h12v12H6z",
  plus: "M12 5v14M5 12h14",
  close: "M6 6l12 12M18 6L6 18",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  history: "M3 12a9 9 0 1 0 3-6.7M3 4v4h4M12 7v5l3 2",
  share: "M10 14a4 4 0 0 0 6 .5l3-3a4 4 0 0 0-6-6l-1 1M14 10a4 4 0 0 0-6-.5l-3 3a4 4 0 0 0 6 6l1-1",
  dice: "M4 4h16v16H4zM8.5 8.5h.01M15.5 8.5h.01M12 12h.01M8.5 15.5h.01M15.5 15.5h.01",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.5 1.5M17.5 17.5L19 19M19 5l-1.5 1.5M6.5 17.5L5 19",
  moon: "M20 14.5A8.5 8.5 0 0 1 9.5 4 8.5 8.5 0 1 0 20 14.5z",
  auto: "M12 3a9 9 0 1 0 0 18zM12 3a9 9 0 0 1 0 18",
  reply: "M9 7L4 12l5 5M4 12h10a6 6 0 0 1 6 6v1",
  code: "M8 7l-5 5 5 5M16 7l5 5-5 5",
} as const;

export function Icon({ name }: { name: keyof typeof PATHS }) {
  return (
    <svg class={`icon ${name === "play" || name === "stop" ? "solid" : ""}`} viewBox="0 0 24 24" aria-hidden="true">
      <path d={PATHS[name]} />
    </svg>
  );
}

export function IconButton(props: { icon: keyof typeof PATHS; label: string; onClick: () => void; class?: string }) {
  return (
    <button type="button" class={`icon-button ${props.class ?? ""}`} aria-label={props.label} title={props.label} onClick={props.onClick}>
      <Icon name={props.icon} />
    </button>
  );
}

/** What went wrong, where it went wrong, and the way out. */
export function ProblemBox({ problem, onRetry }: { problem: Problem | null; onRetry?: () => void }) {
  if (!problem) return null;
  const title =
    { connection: "No connection", queue_full: "The queue is full", prompt_too_long: "This is more than the context holds" }[problem.type] ??
    (problem.status >= 500 ? "The server failed" : "The server refused this");
  return (
    <div class="problem" role="alert">
      <div>
        <strong>{title}</strong>
        <p>{problem.message}</p>
        {problem.retryAfter !== null && <p>It asks for {problem.retryAfter} s of patience.</p>}
      </div>
      {onRetry && (
        <button type="button" onClick={onRetry}>
          Try again
        </button>
      )}
    </div>
  );
}

export function Dialog(props: { title: string; onClose: () => void; children: ComponentChildren; side?: boolean }) {
  const box = useRef<HTMLDialogElement>(null);
  useEffect(() => {
    box.current!.showModal();
  }, []);
  return (
    <dialog
      ref={box}
      class={props.side ? "side" : ""}
      aria-label={props.title}
      onClose={props.onClose}
      onClick={(event) => event.target === box.current && box.current?.close()}
    >
      <div class="dialog-body">
        <header>
          <h2>{props.title}</h2>
          <IconButton icon="close" label="Close" onClick={() => box.current!.close()} />
        </header>
        {props.children}
      </div>
    </dialog>
  );
}

export function NumberField(props: {
  label: string;
  value: number | null;
  onChange: (value: number | null) => void;
  min?: number;
  max?: number;
  step?: number;
  hint?: string;
  placeholder?: string;
  optional?: boolean;
}) {
  return (
    <label class="field" title={props.hint}>
      <span>{props.label}</span>
      <input
        type="number"
        value={props.value ?? ""}
        min={props.min}
        max={props.max}
        step={props.step ?? "any"}
        placeholder={props.placeholder}
        onInput={(event) => {
          const input = event.currentTarget;
          if (input.value === "") {
            if (props.optional) props.onChange(null);
          } else if (Number.isFinite(input.valueAsNumber)) props.onChange(input.valueAsNumber);
        }}
        onBlur={(event) => {
          if (event.currentTarget.value === "" && props.value !== null) event.currentTarget.value = String(props.value);
        }}
      />
    </label>
  );
}

/** A textarea as tall as its text. */
export function TextArea(props: {
  label: string;
  value: string;
  onInput: (value: string) => void;
  rows?: number;
  placeholder?: string;
  invalid?: boolean;
}) {
  const box = useRef<HTMLTextAreaElement>(null);
  useEffect(() => {
    const area = box.current!;
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight + 2}px`;
  }, [props.value]);
  return (
    <textarea
      ref={box}
      dir="auto"
      aria-label={props.label}
      aria-invalid={props.invalid ?? false}
      value={props.value}
      rows={props.rows ?? 2}
      placeholder={props.placeholder}
      onInput={(event) => props.onInput(event.currentTarget.value)}
    />
  );
}

export function Switch(props: { label: string; checked: boolean; onChange: (checked: boolean) => void; hint?: string }) {
  return (
    <label class="switch" title={props.hint}>
      <input type="checkbox" role="switch" checked={props.checked} onChange={(event) => props.onChange(event.currentTarget.checked)} />
      <span>{props.label}</span>
    </label>
  );
}

export const percent = (value: number): string => value > 0 && value < 0.0005 ? "<0.1 %" : `${(value * 100).toFixed(value > 0.0995 || value === 0 ? 0 : 1)} %`;

export function number(value: number, digits = 2): string {
  if (value !== 0 && Math.abs(value) < 10 ** -digits) return `${value < 0 ? "−" : ""}<0.${"0".repeat(digits - 1)}1`;
  return value.toFixed(Math.abs(value) >= 100 ? 0 : digits).replace("-", "−");
}
