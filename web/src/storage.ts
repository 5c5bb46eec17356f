// What the browser keeps, where it lets a page keep anything.

export function stored(name: string, where: "localStorage" | "sessionStorage" = "localStorage"): string | null {
  try {
    return window[where].getItem(name);
  } catch {
    return null;
  }
}

export function store(name: string, value: string, where: "localStorage" | "sessionStorage" = "localStorage"): void {
  try {
    window[where].setItem(name, value);
  } catch {
    // full, or not allowed: it lasts as long as the page
  }
}
