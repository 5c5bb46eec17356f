// What lies over the page: export and history.

import { useState } from "preact/hooks";
import { curl, python, save, settled } from "./exports";
import { run } from "./run";
import { asQuestion, body, info, keep, past, state, view } from "./state";
import { Dialog } from "./ui";

const FORMATS = ["curl", "Python", "JSON"] as const;

export function Export({ onClose }: { onClose: () => void }) {
  const [format, setFormat] = useState<(typeof FORMATS)[number]>("curl");
  const [copied, setCopied] = useState("");
  const asked = run.value?.answer ? settled(run.value.asked, run.value.answer) : body(state.value, state.value.sampling.seed ?? 0);
  const target = { url: new URL(".", location.href).href.replace(/\/$/, ""), asksForKey: info.value?.asks_for_key ?? false };
  const text = {
    curl: () => curl(asked, target),
    Python: () => python("prompt" in asked ? asked : { prompt: null, ...asked }, target),
    JSON: () => JSON.stringify({ request: asked, response: run.value?.answer ?? null }, null, 2),
  }[format]();
  const copy = async (what: string, content: string) => {
    try {
      await navigator.clipboard.writeText(content);
      setCopied(`${what} is copied.`);
    } catch {
      setCopied("The browser does not let a page copy here: select the text.");
    }
  };
  return (
    <Dialog title="Share and export" onClose={onClose}>
      <p>
        The address of this page holds the whole comparison: prompt, sampling and arms.{" "}
        <button type="button" class="quiet" onClick={() => void copy("The link", location.href)}>
          Copy the link
        </button>
      </p>
      <div class="segmented" role="group" aria-label="Format">
        {FORMATS.map((name) => (
          <button key={name} type="button" aria-pressed={format === name} onClick={() => setFormat(name)}>
            {name}
          </button>
        ))}
      </div>
      <pre class="code" tabIndex={0} aria-label={`As ${format}`}>
        {text}
      </pre>
      <div class="row">
        <button type="button" class="primary" onClick={() => void copy(format, text)}>
          Copy
        </button>
        <button
          type="button"
          onClick={() => save(`comparison.${{ curl: "sh", Python: "py", JSON: "json" }[format]}`, new Blob([text], { type: "text/plain" }))}
        >
          Download
        </button>
        <span class="muted" role="status">
          {copied || (format === "JSON" && !run.value?.answer ? "Run it to have the answers, too." : "With the seed, it gives the same answers.")}
        </span>
      </div>
    </Dialog>
  );
}

export function History({ onClose }: { onClose: () => void }) {
  return (
    <Dialog title="History" onClose={onClose} side>
      {past.value.length === 0 ? (
        <p class="muted">What you run is kept here, in this browser only.</p>
      ) : (
        <>
          <ul class="history">
            {past.value.map((entry) => (
              <li key={entry.at}>
                <button
                  type="button"
                  onClick={() => {
                    state.value = structuredClone(entry.state);
                    view.value = "compare";
                    run.value = null;
                    onClose();
                  }}
                >
                  <time>{new Date(entry.at).toLocaleString()}</time>
                  <strong dir="auto">{entry.state.mode === "prompt" ? asQuestion(entry.state.prompt) : entry.state.turns.filter((turn) => turn.content).at(-1)?.content}</strong>
                  {entry.texts.map((text, index) => (
                    <span key={index} dir="auto">
                      <b>{entry.state.arms[index]?.name}</b> {text}
                    </span>
                  ))}
                </button>
              </li>
            ))}
          </ul>
          <button type="button" onClick={() => keep([])}>
            Forget all
          </button>
        </>
      )}
    </Dialog>
  );
}

