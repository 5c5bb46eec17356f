// The page: what is served, the views, and what is asked for before anything can be shown.

import { useEffect, useState } from "preact/hooks";
import { TokenCard } from "./answer";
import { Problem, getCheckpoints, getInfo, setKey } from "./api";
import { Blind } from "./blind";
import { Checkpoints } from "./checkpoints";
import { Compare } from "./compare";
import { Export, History } from "./dialogs";
import { DoseResponse } from "./dose";
import { live } from "./run";
import { look } from "./served";
import { VIEWS, announced, first, followAddress, info, listing, notice, readAddress, state, theme, view, type Theme, type View } from "./state";
import { IconButton, ProblemBox } from "./ui";

const NEXT: Record<Theme, Theme> = { auto: "light", light: "dark", dark: "auto" };
const ICONS = { auto: "auto", light: "sun", dark: "moon" } as const;

export function App() {
  const [trouble, setTrouble] = useState<Problem | null>(null);
  const [open, setOpen] = useState<"export" | "history" | null>(null);
  const ready = listing.value !== null;

  const load = async () => {
    try {
      info.value = await getInfo();
      listing.value = await getCheckpoints();
      live.value = info.value.judged;
      if (!readAddress()) state.value = first(info.value, listing.value);
      followAddress();
      setTrouble(null);
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      setTrouble(error);
    }
  };
  useEffect(() => {
    void load();
    const timer = setInterval(() => {
      if (document.visibilityState === "visible" && listing.value) void look();
    }, 5000);
    return () => clearInterval(timer);
  }, []);

  return (
    <>
      <a class="skip" href="#main" onClick={(event) => (event.preventDefault(), document.getElementById("main")?.focus())}>
        To the content
      </a>
      <header class="top">
        <h1>
          <img src="./page/icon.svg" alt="" width="28" height="28" /> mat-steer
        </h1>
        <p class="served">
          {info.value && (
            <>
              <span>{info.value.model}</span>
              {ready && <span class={`pill ${listing.value!.active ? "on" : ""}`}>{listing.value!.active ?? "no checkpoint is active"}</span>}
            </>
          )}
        </p>
        <div class="tools">
          {ready && (
            <>
              <IconButton icon="history" label="History" onClick={() => setOpen("history")} />
              <IconButton icon="share" label="Share and export" onClick={() => setOpen("export")} />
            </>
          )}
          <IconButton icon={ICONS[theme.value]} label={`Colours: ${theme.value}`} onClick={() => (theme.value = NEXT[theme.value])} />
          <a class="api" href="docs" title="The API's documentation">
            API
          </a>
        </div>
        {ready && (
          <nav aria-label="Views">
            {(Object.keys(VIEWS) as View[])
              .filter((name) => name !== "blind" || info.value!.studies)
              .map((name) => (
                <button key={name} type="button" aria-current={view.value === name ? "page" : undefined} onClick={() => (view.value = name)}>
                  {VIEWS[name]}
                </button>
              ))}
          </nav>
        )}
      </header>
      <main id="main" tabIndex={-1}>
        {notice.value && (
          <div class="notice" role="status">
            <p>{notice.value}</p>
            <IconButton icon="close" label="Close" onClick={() => (notice.value = null)} />
          </div>
        )}
        {trouble?.status === 401 ? (
          <AskForKey retry={load} wrong={trouble.message} />
        ) : (
          <ProblemBox problem={trouble} onRetry={() => void load()} />
        )}
        {ready && { compare: <Compare />, dose: <DoseResponse />, checkpoints: <Checkpoints />, blind: <Blind /> }[view.value]}
      </main>
      <TokenCard />
      <div class="sr-only" role="status">
        {announced.value}
      </div>
      {open === "export" && <Export onClose={() => setOpen(null)} />}
      {open === "history" && <History onClose={() => setOpen(null)} />}
    </>
  );
}

function AskForKey({ retry, wrong }: { retry: () => Promise<void>; wrong: string }) {
  const [given, setGiven] = useState("");
  return (
    <form
      class="card ask"
      onSubmit={(event) => {
        event.preventDefault();
        setKey(given.trim());
        void retry();
      }}
    >
      <h2>A key is needed</h2>
      <p class="muted">{wrong} It is kept until this tab is closed.</p>
      <label class="field">
        <span>API key</span>
        <input type="password" autocomplete="off" value={given} onInput={(event) => setGiven(event.currentTarget.value)} />
      </label>
      <button class="primary" type="submit">
        Go on
      </button>
    </form>
  );
}
