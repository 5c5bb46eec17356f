// The same arms outside this page: as JSON, as a command, as Python.

import type { CompareResponse } from "./api";

export interface Target {
  url: string; // of the server, without a slash at its end
  asksForKey: boolean;
}

/** The request with the versions that answered it, so that it means the same when another checkpoint is active. */
export function settled(asked: Record<string, unknown>, answer: CompareResponse | null): Record<string, unknown> {
  if (!answer) return asked;
  const arms = (asked.arms as Record<string, unknown>[]).map((arm, index) => {
    const { steering } = answer.arms[index]!.results[0]!;
    if (Array.isArray(arm.steering))
      return { ...arm, steering: arm.steering.map((part, at) => ({ ...part, ...(steering.parts?.[at] && { checkpoint: label(steering.parts[at]) }) })) };
    const steered = Object.keys(arm.attributes as object).length > 0 && steering.checkpoint !== null;
    return steered ? { ...arm, checkpoint: `${steering.checkpoint}@${steering.version}` } : arm;
  });
  return { ...asked, arms };
}

const label = (part: { checkpoint: string; version: string }): string => `${part.checkpoint}@${part.version}`;

const quoted = (text: string): string => `'${text.replaceAll("'", `'\\''`)}'`;

export function curl(body: object, { url, asksForKey }: Target): string {
  const key = asksForKey ? ` -H "Authorization: Bearer $MATSTEER_API_KEY"` : "";
  return `curl -s ${quoted(`${url}/compare`)}${key} -H 'Content-Type: application/json' -d ${quoted(JSON.stringify(body, null, 2))}`;
}

export function python(body: Record<string, unknown>, { url, asksForKey }: Target): string {
  const fields = Object.entries(body).map(([name, value]) => `    ${name}=${literal(value, 4)},\n`).join("");
  const key = asksForKey ? `, api_key=os.environ["MATSTEER_API_KEY"]` : "";
  return `${asksForKey ? "import os\n\n" : ""}from server.client import Client

client = Client(${literal(url, 0)}${key})
answer = client.compare(
${fields})
for arm in answer.arms:
    print(arm.name, arm.results[0].text, sep=": ")
`;
}

/** A JSON value in Python's spelling. JSON's strings are Python's, but for surrogates, which JSON.stringify leaves whole. */
function literal(value: unknown, indent: number): string {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const inner = " ".repeat(indent + 4);
  const parts = Array.isArray(value)
    ? value.map((one) => literal(one, indent + 4))
    : Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${literal(one, indent + 4)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const flat = `${open}${parts.join(", ")}${close}`;
  if (flat.length + indent < 90 && !flat.includes("\n")) return flat;
  return `${open}\n${parts.map((part) => `${inner}${part},\n`).join("")}${" ".repeat(indent)}${close}`;
}

export function save(name: string, content: Blob): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
