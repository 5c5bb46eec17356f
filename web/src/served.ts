// What is served now, also where somebody else has changed it.

import { getActive, getCheckpoints } from "./api";
import { listing, notice } from "./state";

/** Reads every checkpoint's state, and says so where another one serves than before. */
export async function refresh(): Promise<void> {
  const before = listing.value;
  try {
    const now = await getCheckpoints();
    if (JSON.stringify(now) === JSON.stringify(before)) return;
    listing.value = now;
    if (before && now.active !== before.active) notice.value = now.active ? `${now.active} serves now.` : "No checkpoint is active now.";
  } catch {
    // what is asked for next will say it
  }
}

/** The same where only the active one matters: one small request as long as that has not changed. */
export async function look(): Promise<void> {
  const known = listing.value?.active;
  if ((await getActive().catch(() => known)) !== known) await refresh();
}
