import { getCheckpoints } from "./api";
import { listing, notice } from "./state";

/** Looks what is served now, and says so where that has changed. */
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
